"""Tier 3: every command line at toy size on the CPU, one rank and two, and its files.

Most are forked (runs.py); a start by python, by torchrun, and Ctrl-C are real.
"""

import functools
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import data as data_flow
import doctor
import evaluate
import report
import rollout
import toy
import train_grpo
import train_sft
import utils
from policy import load_processor
from reward import accuracy_reward
from runs import all_finite, command, ROOT, run, splits, timeless, TINY


def test_grpo_writes_the_run_folder(grpo_run):
    """All that DESIGN section 2 lists is there, and the last line of stdout is one JSON document."""
    _, out, result, stderr = grpo_run
    assert result["steps"] == 4 and result["out"] == str(out) and result["minutes"] > 0
    assert json.loads((out / "result.json").read_text()) == result
    for split in ("validation", "test"):
        for moment in ("before", "after"):
            point = result[f"{split}_pass1_t0.6"][moment]
            low, high = point["interval_95"]
            assert 0 <= low <= point["accuracy"] <= high <= 1
    args = json.loads((out / "args.json").read_text())
    assert set(args) == {"script", *train_grpo.Args.__dataclass_fields__}
    metrics = utils.read_jsonl(out / "metrics.jsonl")
    assert [row["generation_step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[3]["gradient_step"] == 4 and metrics[3]["epoch"] == 1.0
    for name in ("reward", "reward/accuracy", "length", "truncated", "loss", "entropy", "grad_norm",
                 "lr", "sampler_gap", "seconds_rollout", "seconds_update", "seconds_sync"):
        assert name in metrics[0], name
    assert metrics[0]["sampler_gap"] < 1e-5  # the sampler is the trainer
    samples = utils.read_jsonl(out / "samples" / "step_000001.jsonl")
    assert len(samples) == 8  # 4 prompts x 2 answers
    assert {"id", "completion_text", "rewards", "length", "finish_reason"} <= set(samples[0])
    evals = utils.read_jsonl(out / "eval.jsonl")
    assert len(evals) == 4  # two splits, before and after
    for row in evals:  # the counts that intervals are made of
        assert len(row["right"]) == row["n"] == 16 and sum(row["right"]) == row["accuracy"] * 16
    for word in ("reward", "accuracy", "length", "rollout", "update"):
        assert word in stderr, f"the progress bar does not show {word}"


def test_what_a_step_cost_and_how_it_reflected_is_logged(grpo_run):
    """The paper's ratios and words, tokens and memory, for every generation step; pictures by path."""
    _, out, _, _ = grpo_run
    for row in utils.read_jsonl(out / "metrics.jsonl"):
        samples = utils.read_jsonl(out / "samples" / f"step_{row['generation_step']:06d}.jsonl")
        texts = [r["completion_text"] for r in samples]
        found = evaluate.reflection_metrics(texts, [r["reward"] == 1 for r in samples])
        assert {name: row[name] for name in found} == found
        assert row["tokens"] == sum(r["length"] for r in samples) and row["ranks"] == 1
        assert 0.1 < row["peak_memory_gb"] < 10
        assert all(Path(picture).is_file() for r in samples for picture in r["images"])


def test_checkpoints_are_hugging_face_folders(grpo_run):
    """transformers alone loads a checkpoint, and its weights are the trained ones."""
    _, out, _, _ = grpo_run
    folders = sorted((out / "checkpoints").iterdir())
    assert [f.name for f in folders] == [f"step_{i:06d}" for i in (1, 2, 3, 4)]
    model = AutoModelForImageTextToText.from_pretrained(folders[-1])
    base = AutoModelForImageTextToText.from_pretrained(ROOT / "toy_model")
    assert AutoProcessor.from_pretrained(folders[-1]).chat_template
    moved = {name for (name, a), b in zip(model.named_parameters(), base.parameters())
             if not torch.equal(a, b)}
    assert any("language_model" in name for name in moved)
    assert not any("visual" in name for name in moved)  # frozen by default, as in the paper


def test_two_ranks_do_the_first_step_of_one(grpo_run, data, tmp_path):
    """The same prompts, completions and rewards, and the same loss to rounding."""
    _, out, _, _ = grpo_run
    words = ["train_grpo.py", *TINY, *splits(data), "--max_steps", 1, "--out", tmp_path / "two"]
    run(*words, ranks=2)
    one, two = (utils.read_jsonl(o / "metrics.jsonl")[0] for o in (out, tmp_path / "two"))
    for name in ("reward", "length", "loss", "entropy", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    texts = [{(r["id"], r["completion_text"], r["advantage"])
              for r in utils.read_jsonl(o / "samples" / "step_000001.jsonl")}
             for o in (out, tmp_path / "two")]
    assert texts[0] == texts[1]


def test_a_stopped_run_goes_on_bit_for_bit(grpo_run):
    """Forget the last two steps of a run; the same command repeats them exactly."""
    words, out, _, _ = grpo_run
    last = out / "checkpoints" / "step_000004"
    weights = load_file(last / "model.safetensors")
    logs = {name: timeless(out / name) for name in ("metrics.jsonl", "eval.jsonl")}
    _, stderr = run(*words, code=2)
    assert "holds a finished run" in stderr
    (out / "result.json").unlink()
    shutil.rmtree(last)
    shutil.rmtree(out / "checkpoints" / "step_000003")
    (out / "checkpoints" / "step_000003.part").mkdir()  # what a crash while saving leaves
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"generation_step": 5, "rew')  # what a crash while logging leaves
    _, stderr = run(*words, real=True)  # whose dictionaries and sets have other orders
    assert "Continuing after step 2" in stderr
    again = load_file(last / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert logs == {name: timeless(out / name) for name in logs}
    _, stderr = run(*words, "--lr", "0.5", code=2)
    assert "other arguments" in stderr


def test_in_float32_the_embedded_sampler_is_the_trainer(grpo_run):
    """Nothing is weighed then."""
    out = grpo_run[1]
    assert json.loads((out / "args.json").read_text())["tis_cap"] == 0
    assert not any("tis_masked" in row for row in utils.read_jsonl(out / "metrics.jsonl"))


def test_several_updates_with_divergence_and_every_part_training(data, tmp_path):
    """The options that the quick start leaves off: 4 updates a batch, KL, vision, checkpointing."""
    words = ["train_grpo.py", *splits(data), "--batch_size", 4, "--mini_batch_size", 2, "--group_size",
             2, "--ppo_epochs", 2, "--kl_coef", 0.1, "--max_steps", 2, "--train_vision",
             "--train_connector", "--gradient_checkpointing", "--advantage", "reinforce++",
             "--max_new_tokens", 60, "--out", tmp_path / "run"]
    run(*words)
    rows = utils.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["gradient_step"] for row in rows] == [4, 8]  # N = (4 // 2) x 2
    assert rows[1]["kl"] > 0
    assert rows[1]["seconds_logprobs"] > 0


@pytest.mark.parametrize("words", [
    "--advantage rloo --loss gspo --kl_coef 0.01 --kl k1 --refills 2 --mask_truncated",
    "--advantage dr_grpo --loss dr_grpo --kl_coef 0.01 --kl k2 --ppo_epochs 2",
    "--advantage reinforce++ --group_size 1 --loss cispo --rewards accuracy:1.0,overlong:1.0",
    "--loss sequence --max_new_tokens 3 --mask_truncated"])  # nothing ends within 3 tokens
def test_every_algorithm_runs(data, tmp_path, words):
    out = tmp_path / "run"
    run("train_grpo.py", *TINY, *splits(data)[:2], "--validation_data=", "--test_data=", "--save_every", 0,
        "--epochs", 1, "--max_steps", 2, *words.split(), "--out", out)
    metrics = utils.read_jsonl(out / "metrics.jsonl")
    assert len(metrics) == 2 and all_finite(metrics)
    assert ("kl" in metrics[0]) == ("kl_coef" in words)
    if "tokens 3" in words:
        assert metrics[0]["truncated"] == 1 and metrics[0]["grad_norm"] == metrics[0]["loss"] == 0


def test_mixed_precision_with_unequal_work_on_two_ranks(data, tmp_path):
    """bfloat16 compute over float32 master weights, every part training, recomputed layers; every
    other prompt has no picture, and the shuffle gives ranks unequal shares. A hang is a failure."""
    rows = utils.read_jsonl(data / "train.jsonl")
    for i, row in enumerate(rows):
        if i % 2:
            row.update(question=row["question"].replace("<image>", ""), image=None)
        else:
            row["image"] = str(data / row["image"])
    utils.write_jsonl(data / "mixed.jsonl", rows)
    out = tmp_path / "run"
    run("train_grpo.py", *TINY, "--train_data", data / "mixed.jsonl", "--validation_data", "", "--test_data",
        "", "--epochs", 1, "--max_steps", 3, "--micro_batch_tokens", 150, "--train_vision", "--train_connector",
        "--dtype", "bfloat16", "--gradient_checkpointing", "--save_every", 0, "--tis", "mask", "--tis_cap",
        1.001, "--out", out, ranks=2)
    metrics = utils.read_jsonl(out / "metrics.jsonl")
    assert len(metrics) == 3 and all_finite(metrics)
    assert 0 < max(row["tis_masked"] for row in metrics) < 1  # the sampler rounds otherwise than the trainer
    assert max(row["sampler_gap"] for row in metrics) < 0.2  # rounding of bfloat16, not another policy


def test_sft_writes_the_same_kind_of_run(data, tmp_path):
    """Golden responses lower the loss; the checkpoint is evaluated by the stand-alone script."""
    out = tmp_path / "sft"
    words = ["train_sft.py", *splits(data), "--batch_size", 4, "--epochs", 2, "--lr", 1e-3, "--out", out]
    result, _ = run(*words, ranks=2)
    metrics = utils.read_jsonl(out / "metrics.jsonl")
    assert [row["generation_step"] for row in metrics] == list(range(1, 9))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[3]["lr"] == pytest.approx(1e-3)  # the peak, after 4 warm-up steps
    assert metrics[-1]["lr"] == pytest.approx(0)
    assert result["validation_pass1_t0.6"]["after"]["accuracy"] >= 0
    words = ["evaluate.py", "--model", out / "checkpoints" / "step_000008", "--data",
             data / "validation.jsonl", "--out", tmp_path / "eval"]
    result, stderr = run(*words)
    for name, n in (("pass8_t1", 8), ("pass1_t0.6", 1), ("pass1_t0.01", 1)):
        assert result[name]["n"] == 16 and 0 <= result[name][f"pass@{n}"] <= 1
        assert name in stderr
    rows = utils.read_jsonl(tmp_path / "eval" / "eval.jsonl")
    assert [row["setting"] for row in rows] == ["pass8_t1", "pass1_t0.6", "pass1_t0.01"]
    assert rows[0]["completions"] == 128


def test_rollout_is_the_same_on_two_ranks(data, tmp_path):
    """8 completions a prompt with their scores, in the data's order, whatever the ranks."""
    texts = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        result, _ = run("rollout.py", "--model", "toy_model", "--data", data / "test.jsonl", "--n",
                        8, "--limit", 5, "--out", out, ranks=ranks)
        assert result["completions"] == 40
        rows = utils.read_jsonl(out / "samples" / "step_000000.jsonl")
        assert [r["id"] for r in rows] == [f"toy_test_{i:04d}" for i in range(5) for _ in range(8)]
        assert {r["reward"] for r in rows} <= {0.0, 1.0}
        texts.append([r["completion_text"] for r in rows])
    assert texts[0] == texts[1]


def test_right_answers_are_golden_responses(data, tmp_path):
    """Rejection sampling, end to end: the same file on two ranks; moved, and without the data that it was made of, it
    is read as the same prompts, and train_sft.py takes it."""
    theirs = shutil.copytree(data, tmp_path / "theirs")
    for ranks in (1, 2):
        result, _ = run("rollout.py", "--data", theirs / "train.jsonl", "--n", 4, "--keep_right", 2, "--out",
                        tmp_path / str(ranks), ranks=ranks)
    texts = [(tmp_path / name / "right.jsonl").read_text() for name in "12"]
    assert texts[0] == texts[1]
    assert len({*(path.name for path in tmp_path.glob("[12]/images/*"))}) == len([*tmp_path.glob("1/images/*")])
    processor = load_processor(ROOT / "toy_model")
    prompts = {s.id: s for s in data_flow.load_samples(theirs / "train.jsonl", processor, 512)}
    shutil.rmtree(theirs)
    right = (tmp_path / "1").rename(tmp_path / "moved") / "right.jsonl"
    read = data_flow.load_samples(right, processor, 512)
    assert (result["right_rows"], result["right_prompts"]) == (len(read), len({s.id[:-2] for s in read}))
    assert 16 <= len(read) <= 32 and all(accuracy_reward(s.solution, s.answer) == 1 for s in read)
    for s in read:
        before = prompts[s.id[:-2]]
        assert (s.question, s.answer, s.prompt_ids) == (before.question, before.answer, before.prompt_ids)
    result, stderr = run("train_sft.py", "--train_data", right, "--validation_data=", "--test_data=", "--max_steps", 1,
                         "--out", tmp_path / "sft")
    assert result["steps"] == 1 and "golden responses end in another answer" not in stderr


def test_ctrl_c_ends_all_ranks_and_names_the_checkpoint(data, tmp_path):
    """SIGINT to the terminal's process group, as Ctrl-C sends it, while both ranks are at work."""
    out = tmp_path / "run"
    words = ["train_grpo.py", *TINY, *splits(data), "--epochs", 500, "--out", out]
    process = subprocess.Popen(command(*words, ranks=2), cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 120
    while len(list(out.glob("checkpoints/step_??????"))) < 2 and time.time() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)  # raises when a rank hangs
    assert process.returncode != 0
    assert stderr.count("Stopped. The last whole checkpoint is") == 1
    named = Path(stderr.split("The last whole checkpoint is ")[1].split(". The same")[0])
    assert AutoModelForImageTextToText.from_pretrained(named)
    assert not (out / "result.json").exists()


@pytest.mark.parametrize("script, place", [
    *((name, " dataclasses") for name in
      ("train_grpo", "train_sft", "rollout", "doctor", "evaluate", "report", "data", "toy")),
    ("report", " numpy"), ("evaluate", " torch._C"), ("toy", " torch")])
def test_ctrl_c_during_imports(tmp_path, script, place):
    """From the first line on: silence and exit code 130. -X importtime says where Python is."""
    words = [sys.executable, "-X", "importtime", f"{script}.py", "--out", tmp_path / "run"]
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = next(line for line in process.stderr if line.endswith(f"{place}\n"))
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert [line for line in said.splitlines() if not line.startswith("import time:")] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mistake_is_one_sentence(data, tmp_path, ranks):
    """Exit code 2, the sentence once, no traceback."""
    path = tmp_path / "train.jsonl"
    path.write_text((data / "train.jsonl").read_text().splitlines()[0] + "\n{broken\n")
    shutil.copytree(data / "images", tmp_path / "images")
    words = ["train_grpo.py", "--train_data", path, "--validation_data=", "--test_data=",
             "--out", tmp_path / "run"]
    _, stderr = run(*words, ranks=ranks, code=2, real=ranks == 1)
    assert stderr.count("train.jsonl, line 2: not valid JSON") == 1
    assert not (tmp_path / "run").exists()  # nothing half-written
    assert "Traceback" not in stderr and len(stderr.splitlines()) == 1


@pytest.mark.parametrize("words, sentence", [
    (["--group_size", 1], "--group_size must be at least 2"),
    (["--batch_size", 10, "--mini_batch_size", 4], "must be a multiple"),
    (["--batch_size", 600, "--mini_batch_size", 600], "is more than the 16 prompts"),
    (["--max_new_tokens", 0], "--max_new_tokens must be at least 1"),
    (["--train_data", ""], "--train_data must not be empty"),
    (["--eval_settings", "pass9"], "the decoding settings 'pass9' must be one or more, each once; choose from pass8_t1"),
    (["--rewards", "accuracy:much"], "reward 'accuracy:much' has no weight"),
    (["--no-train_language"], "nothing is left to train"),
    (["--learning_rate", 1], "unrecognized arguments: --learning_rate"),
])
def test_mistakes_in_the_flags(data, tmp_path, words, sentence):
    """Each ends with exit code 2 and a sentence that says what to change."""
    words = ["train_grpo.py", *TINY, *splits(data), "--out", tmp_path / "run", *words]
    _, stderr = run(*words, code=2)
    assert sentence in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


# ---------------------------------------------------------------------------------------------
# Flags: what each may be, said and refused before anything is written or loaded


SOURCE = functools.cache(inspect.getsource)  # which each command line asks for


@pytest.fixture
def script(monkeypatch, tmp_path, capsys, one_rank):
    """`script(stage, *words)`: a command line in this process, in a folder that holds a toy_data of 8 prompts
    a split and nothing else. Returns its JSON, or its one sentence where it ends with exit code 2."""
    for name in ("start_ranks", "end_on_signal"):
        monkeypatch.setattr(utils, name, lambda: None)
    monkeypatch.setattr(utils.inspect, "getsource", SOURCE)
    monkeypatch.setattr(utils.dist, "destroy_process_group", lambda: None)
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "toy_data").glob("*.jsonl"):
        rows = utils.read_jsonl(path)[:8]
        utils.write_jsonl(tmp_path / "toy_data" / path.name, rows)
        for row in rows:
            (tmp_path / "toy_data" / "images").mkdir(exist_ok=True)
            shutil.copy(path.parent / row["image"], tmp_path / "toy_data" / row["image"])

    def script(stage, *words):
        monkeypatch.setattr(utils, "run_folder", [])
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, words)])
        capsys.readouterr()
        try:
            utils.run_script(stage.main, stage.Args)
        except SystemExit as end:
            said = capsys.readouterr().err
            assert end.code == 2 and said.count("\n") == 1, said
            return said
        return json.loads(capsys.readouterr().out)
    return script


def nothing_new(folder):
    return [path.name for path in folder.iterdir()] == ["toy_data"]


STAGES = (data_flow, doctor, evaluate, report, rollout, toy, train_grpo, train_sft)
NUMBERS = [(stage, f.name, f.type) for stage in STAGES for f in fields(stage.Args) if f.type in (int, float)]
RANGES = {  # by hand: what a float may be, and what it may not
    "temperature": ("0.01 0.6 100", "0.001 101 1e-40 -0.5"), "top_p": ("0.001 1", "0 1.5"),
    "vllm_memory": ("0.4", "0 1"), "clip_low": ("0 0.2 1", "1.5"), "clip_high": ("0 5", ""),
    "tis_cap": ("0 1 2", "0.5"), "kl_coef": ("0 0.04", ""), "lr": ("1e-9 1", "0 1.01"),
    "weight_decay": ("0 0.1 1", "2"), "lora_alpha": ("0.5 1e9", "0"), "max_grad_norm": ("0.1 1e9", "0")}
NOUGHT = set("seed refills max_steps vision_cache warmup_steps eval_every save_every keep limit groups lora_rank "
             "min_pixels max_pixels keep_right"
             .split())


def may_be(stage, name, value):
    words = ["runs"] * (stage in (report, data_flow)) + [f"--{name}={value}"]
    return getattr(utils.parse_args(stage.Args, words), name)


@pytest.mark.parametrize("stage, name, kind", NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_numbers_without_sense_are_refused(stage, name, kind, script, tmp_path):
    """Every number of every stage: one sentence with flag, bound and value; nothing written. 0 is allowed
    where it means something."""
    allowed, refused = RANGES[name] if kind is float else ("1 2147483647", "2147483648 1" + "0" * 30)
    allowed, refused = allowed.split(), [*refused.split(), "-1", *["nan", "inf", "-inf"] * (kind is float)]
    nought = name in NOUGHT or (stage, name) == (rollout, "temperature") or "0" in allowed
    (allowed if nought else refused).append("0")
    for value in allowed:
        assert may_be(stage, name, value) == kind(value)
    for value in refused:
        said = script(stage, *["runs"] * (stage in (report, data_flow)), f"--{name}={value}")
        assert re.search(rf"--{name} must be (0, or )?(at least|above) \S+ and (at most|below) \S+, not ", said)
        assert float(said.split(", not ")[1].split(";")[0]) == pytest.approx(float(value), nan_ok=True)
    assert nothing_new(tmp_path)


@pytest.mark.parametrize("stage, words, sentence", [
    (evaluate, ["--settings", ""], "--settings must not be empty"),
    (evaluate, ["--settings", " , "], "must be one or more, each once; choose from pass8_t1"),
    (evaluate, ["--settings", "pass8_t1, pass1_t0.6,pass8_t1"], "must be one or more, each once"),
    (train_grpo, ["--eval_settings", "pass1_t0.6,pass1_t0.6"], "must be one or more, each once"),
    (train_sft, ["--eval_settings", " "], "--eval_settings must not be empty"),
    (train_grpo, ["--keep_best", "validation/pass1_t0.6"], "--keep_best validation/pass1_t0.6 needs --eval_every, and"),
    (train_sft, ["--keep_best", "train/pass1_t0.6", "--eval_every", 1], "one of ['validation/pass1_t0.6', 'test/pass"),
    (train_grpo, ["--keep_best", "test/pass8_t1", "--eval_every", 1], "one of ['validation/pass1_t0.6', 'test/pass1_"),
    (train_sft, ["--keep_best", "test/pass1_t0.6", "--eval_every", 1, "--test_data="], "one of ['validation/pass1_t0.6'], "),
    (train_grpo, ["--tis", "sequence"], "--tis: invalid choice: 'sequence'"),
    (train_grpo, ["--rewards", ""], "--rewards must not be empty"),
    (train_sft, ["--model", ""], "--model must not be empty"),
    (rollout, ["--data="], "--data must not be empty"),
    (rollout, ["--n", 2, "--keep_right", 3], "--keep_right 3 is more than the 2 answers a prompt; lower it, or raise --n."),
    (report, [""], "--runs must not be empty"),
    (toy, [], "say one thing to do"),
    (toy, ["--data", "x", "--build"], "say one thing to do")])
def test_words_without_sense_are_refused(stage, words, sentence, script, tmp_path):
    assert sentence in script(stage, *words) and nothing_new(tmp_path)


def test_blanks_around_settings_are_no_part_of_them():
    assert evaluate.chosen_settings(" pass8_t1, pass1_t0.6 ,") == ["pass8_t1", "pass1_t0.6"]


# ---------------------------------------------------------------------------------------------
# The toy's data, where nobody asked for them


@pytest.mark.parametrize("stage", [train_grpo, train_sft])
def test_own_data_beside_the_toys_are_refused(stage, script, tmp_path):
    """All mixtures of three splits: left alone, own, none, or the toy's by name."""
    ways = {"left": [], "own": ["mine.jsonl"], "none": [""], "toy": ["toy_data/test.jsonl"]}
    for chosen in product(ways, repeat=3):
        given = {f"{name}_data": ways[how] for name, how in zip(("train", "validation", "test"), chosen)}
        if chosen[0] == "none":
            continue
        words = [f"--{name}={way[0]}" for name, way in given.items() if way]
        args = utils.parse_args(stage.Args, words)
        if not {"own", "left"} <= set(chosen):
            data_flow.refuse_mixture(args)
            continue
        said = script(stage, *words)
        for name, how in zip(given, chosen):
            remedy = f"--{name}=toy_data/train.jsonl for the toy" if name == "train_data" else f"--{name}= for none"
            assert (remedy in said) == (how == "left")
        assert "give yours there too, or " in said
    assert nothing_new(tmp_path)
    assert data_flow.refuse_mixture(stage.Args(model="my/model")) is None
    with pytest.raises(utils.UserError, match="would be the toy's"):  # from a program, without a command line
        data_flow.refuse_mixture(stage.Args(train_data="mine.jsonl"))


@pytest.mark.parametrize("stage", [doctor, evaluate, rollout])
def test_an_own_model_is_not_measured_on_the_toy_unasked(stage, script, tmp_path):
    model = shutil.copytree(ROOT / "toy_model", tmp_path / "mine")
    said = script(stage, "--model", model)
    assert "--model is your own, but --data would be the toy's" in said
    assert "or --data=toy_data/validation.jsonl for the toy." in said
    assert {*tmp_path.iterdir()} == {model, tmp_path / "toy_data"}
    data_flow.refuse_mixture(utils.parse_args(stage.Args, ["--model", "mine", "--data", "toy_data/validation.jsonl"]))


@pytest.mark.parametrize("stage, words, sentence", [
    (train_grpo, ["--batch_size", 32], "--batch_size 32 is more than the 8 prompts"),
    (train_grpo, ["--batch_size", 8, "--mini_batch_size", 8, "--no-train_language"], "nothing is left to train"),
    (train_sft, ["--max_new_tokens", 9], "the golden response has"),
    (evaluate, ["--max_prompt_tokens", 5], "every prompt is longer than"),
    (rollout, ["--data", "toy_data/trian.jsonl"], "toy_data/trian.jsonl: no such file"),
    (doctor, ["--max_new_tokens", 4, "--engine", "hf"], None)])
def test_a_refusal_leaves_no_folder_behind(stage, words, sentence, script, tmp_path):
    (tmp_path / "mine").mkdir()
    for out in ("runs/new", "mine"):
        folder = [] if stage is doctor else ["--out", out]
        found = script(stage, "--model", ROOT / "toy_model", *words, *folder)
        assert sentence in found if sentence else all(row["passed"] for row in found["doctor"])
        assert {*tmp_path.iterdir()} == {tmp_path / "mine", tmp_path / "toy_data"}
        assert list((tmp_path / "mine").iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Little: one prompt, one row, fewer prompts than ranks


def test_little_data_can_be_measured_and_trained_on(script, tmp_path):
    """A limit above the data, one prompt, one row, a batch of one prompt with two answers; then a report."""
    model = ["--model", ROOT / "toy_model", "--max_new_tokens", 40, "--engine", "hf"]
    for limit, n in ((1, 1), (1000, 8)):
        found = script(evaluate, *model, "--limit", limit, "--out", f"evaluate_{limit}")
        assert [found[setting]["n"] for setting in evaluate.SETTINGS] == [n] * 3
        found = script(rollout, *model, "--limit", limit, "--n", 1, "--out", f"rollout_{limit}")
        assert (found["prompts"], found["completions"]) == (n, n)
    one = tmp_path / "toy_data" / "one.jsonl"
    utils.write_jsonl(one, utils.read_jsonl(tmp_path / "toy_data" / "train.jsonl")[:1])
    words = [*model, "--train_data", one, "--validation_data", one, "--test_data", one, "--epochs", 1]
    assert "--batch_size 16 is more than the 1 prompt;" in script(train_sft, *words)
    words += ["--batch_size", 1, "--out"]
    assert script(train_sft, *words, "sft")["steps"] == 1
    words = [*words[:-1], "--mini_batch_size", 1]
    for how in (["--group_size", 2], ["--advantage", "reinforce++", "--group_size", 1]):
        assert script(train_grpo, *words, *how, "--out", f"grpo_{len(how)}")["steps"] == 1
    runs = [path.parent for path in tmp_path.glob("*/args.json")]
    assert script(report, *runs, "--out", "report")["runs"] == len(runs) == 7


def test_which_answers_are_kept(script, tmp_path, monkeypatch):
    """Right by our grader, ended, without a mark of the model, unlike each other, the first two; no file without any,
    not even the one of a run that was stopped."""
    answers, said = {}, []

    def generate(samples, n, *_):
        return [replace(s, completion_text=text.format(s.answer), finish_reason=reason, completion_ids=[1])
                for s in samples for text, reason in answers.get(s.id[-1], [("\\boxed{{9}}", "stop")] * n)]

    monkeypatch.setattr(rollout, "make_engine", lambda *_: SimpleNamespace(generate=generate))
    monkeypatch.setattr(doctor, "rehearse", lambda *_: None)
    monkeypatch.setattr(rollout, "print0", said.append)
    one, cut, two = ("1: \\boxed{{{}}}", "stop"), ("cut: \\boxed{{{}}}", "length"), ("2: \\boxed{{{}}}", "stop")
    wrong, marked, three = ("\\boxed{{9}}", "stop"), ("<|im_start|>\\boxed{{{}}}", "stop"), ("3: \\boxed{{{}}}", "stop")
    answers |= {"0": [wrong, cut, one, one, two, three], "1": [wrong, wrong, marked, three, cut, wrong], "2": [cut] * 6}
    words = [rollout, "--model", ROOT / "toy_model", "--n", 6, "--keep_right", 2, "--rewards", "format:1.0", "--out", "run"]
    result, rows = script(*words), utils.read_jsonl(tmp_path / "run" / "right.jsonl")
    assert [(row["id"][-3:], row["solution"][:2]) for row in rows] == [("0-1", "1:"), ("0-2", "2:"), ("1-1", "3:")]
    assert (result["right_prompts"], result["right_rows"]) == (2, 3)
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert not any("right.jsonl" in line for line in said)
    (tmp_path / "run" / "result.json").unlink()
    answers.clear()
    result = script(*words)
    assert (result["right_prompts"], result["right_rows"]) == (0, 0) and not (tmp_path / "run" / "right.jsonl").exists()
    assert sum(line.startswith("No prompt has a right answer that ended, so there is no right.jsonl;") for line in said) == 1


PICKY = """
def first(samples):
    wanted = samples[0].answer
    return [float(s.answer == wanted) for s in samples]
"""


def test_a_rank_without_prompts_waits_for_the_others(data, tmp_path):
    """One prompt for two ranks, and a reward that looks at the first of its samples."""
    (tmp_path / "picky.py").write_text(PICKY)
    result, _ = run("rollout.py", "--data", data / "test.jsonl", "--limit", 1, "--n", 2, "--max_new_tokens",
                    8, "--rewards", f"{tmp_path / 'picky.py'}:first:1", "--out", tmp_path / "run", ranks=2)
    assert (result["prompts"], result["completions"], result["reward"]) == (1, 2, 1.0)


def test_reward_command_says_equal_or_not():
    for pair, equal in (((r"\frac{1}{2}", "0.5"), True), (("3", "4"), False)):
        done = subprocess.run(command("reward.py", *pair), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == {"equal": equal}


@pytest.mark.slow
def test_the_gpu_check_runs_on_a_cpu_too():
    """At a tiny shape, so that it works on the day a GPU is there."""
    done = subprocess.run(command("tests/gpu_check.py", "--tiny"), cwd=ROOT, capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert result["numbers"]["greedy_equal_to_float32"] > 0.9
    for kind in ("plain", "shared"):
        assert result["speed"][kind]["sampler_gap"] < 1e-2
    assert result["speed"]["shared"]["grad_norm"] == pytest.approx(result["speed"]["plain"]["grad_norm"], rel=1e-2)
    for errors in result["flex"].values():
        assert errors["flex"]["logprob_error"] < 1.5 * errors["plain"]["logprob_error"]
        assert errors["rectangles"]["gradient_error"] < 1.5 * errors["plain"]["gradient_error"]
    assert len(result["step"]) == 6 and min(kind["gradient_cosine"] for kind in result["step"].values()) > 0.99
    for way in result["memory"].values():  # a CPU's bytes are not counted there; tests/test_memory.py does
        assert way["start"]["planned"] > 0 and way["seconds"]["whole update"] > 0
    assert "skipped" in result["vllm"]
