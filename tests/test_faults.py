"""Tier 3: what goes wrong in the middle of a run, on purpose; what the user reads, and what is left.

A run is forked (runs.py), so that each takes seconds; a fault replaces one function at its n-th call.
"""

import errno
import importlib
import json
import math
import operator
import os
import re
import resource
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import evaluate
import scoring
import train_grpo
import train_sft
import utils
from data import load_samples
from policy import add_lora, freeze, load_model, load_processor, Policy, shard
from runs import all_finite, at_call, fork, ROOT, splits, timeless, TINY
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


GRPO = ["train_grpo.py", *TINY, "--max_steps", "4", "--validation_data=", "--test_data="]
SFT = ["train_sft.py", "--save_every", "1", *GRPO[-4:]]


# ---------------------------------------------------------------------------------------------
# Runs and faults


def run(words, out, fault=None, ranks=1):
    """Run a script to its end; its processes' exit codes (the one code of one), and what they say."""
    codes, *said = fork(*words, "--out", out, fault=fault, ranks=ranks)
    return codes[0] if ranks == 1 else codes, "".join(said)


def prepare(fault, original, *values, **more):
    """An act: from this call on there is another fault to come."""
    fault()
    return original(*values, **more)


def kill(original, *values, **more):
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(original, *values, **more):
    os.fsync = no_space
    return original(*values, **more)


def small_files(original, *values, **more):
    """The kernel itself refuses what is longer: Python, torch and safetensors each meet it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return original(*values, **more)


def nan_loss(original, *values):
    losses, log_ratio = original(*values)
    return losses * math.nan, log_ratio


def infinite_norm(original, *values):
    return original(*values) * math.inf


def lose_images(folder, original, *values):
    shutil.rmtree(folder)
    return original(*values)


def bug(original, *values):
    raise RuntimeError("two shapes do not agree")


def stopped(whole, out, last, thin=True, **changed):
    """A copy of the undisturbed run as it was after step `last`, before anything else was written.

    What `changed` names of its arguments was another from the beginning. Not `thin`: all its checkpoints can be
    gone on from.
    """
    shutil.copytree(whole[1], out)
    arguments = json.loads((out / "args.json").read_text())
    utils.write_json(out / "args.json", arguments | {"out": str(out)} | changed)
    (out / "result.json").unlink()
    for step in range(last + 1, 5):
        shutil.rmtree(out / "checkpoints" / f"step_{step:06d}")
        (out / "samples" / f"step_{step:06d}.jsonl").unlink()
    if thin:
        utils.thin_out(out / "checkpoints" / f"step_{last:06d}", 0, 0)
    return out


def steps(out):
    return [row["generation_step"] for row in utils.read_jsonl(out / "metrics.jsonl")]


def saved(out):
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def fingerprint(out):
    """All that a run leaves, apart from what a clock measured or a path or a save's number is."""
    checkpoint = utils.latest_checkpoint(out)
    assert utils.is_whole(checkpoint)
    hashes = json.loads((checkpoint / "manifest.json").read_text())
    del hashes["resume/.metadata"]  # holds the path and a random number of the save
    assert {"model.safetensors", "resume/__0_0.distcp"} <= set(hashes)
    texts = {p.name: p.read_text() for p in out.glob("samples/*")}
    logs = {name: timeless(out / name) for name in ("metrics.jsonl", "eval.jsonl")}
    return {"checkpoint": checkpoint.name} | hashes | texts | logs


# ---------------------------------------------------------------------------------------------
# Checkpoints


def test_the_manifest_names_every_file(whole):
    folder = whole[1] / "checkpoints" / "step_000004"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(json.loads((folder / "manifest.json").read_text())) == files - {"manifest.json"}
    assert len(files) > 8


def damage(folder, kind):
    part = next((folder / "resume").glob("*.distcp"))
    if kind == "missing":
        part.unlink()
    elif kind == "changed":
        old = part.read_bytes()
        part.write_bytes(old[:-100] + bytes([old[-100] ^ 1]) + old[-99:])
    elif kind == "cut":
        os.truncate(folder / "model.safetensors", 1000)
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "half a manifest":
        os.truncate(folder / "manifest.json", 100)


@pytest.mark.parametrize("kind", ["missing", "changed", "cut", "no manifest", "half a manifest"])
def test_a_torn_checkpoint_is_passed_over(whole, tmp_path, one_rank, capsys, kind):
    """Where the one before has not lost its resume state yet."""
    out = stopped(whole, tmp_path / "run", 4, thin=False)
    assert utils.whole_checkpoint(out).name == "step_000004"
    (out / "checkpoints" / "step_000004" / "notes.txt").write_text("a user's file does no harm")
    assert utils.whole_checkpoint(out).name == "step_000004"
    assert capsys.readouterr().err == ""
    damage(out / "checkpoints" / "step_000004", kind)
    assert utils.whole_checkpoint(out).name == "step_000003"
    assert re.fullmatch(r"\S+step_000004 is torn .* step_000004.torn now.\n", capsys.readouterr().err)
    assert utils.whole_checkpoint(out).name == "step_000003"  # and it is not said twice
    assert capsys.readouterr().err == ""


def has_resume(out):
    return [p.parent.name for p in sorted(out.glob("checkpoints/*/resume"))]


def test_the_newest_checkpoint_alone_can_be_gone_on_from(data, tmp_path):
    """Those before it are plain folders of weights, whole by their manifests, in both trainers."""
    for words in (GRPO, [*SFT, "--epochs", 4]):
        out = tmp_path / words[0]
        code, said = run([*words, *splits(data)[:2], "--max_steps", 3], out)
        assert code == 0 and saved(out) == [f"step_{n:06d}" for n in (1, 2, 3)], said
        assert has_resume(out) == ["step_000003"]
        for path in sorted((out / "checkpoints").iterdir()):
            files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"manifest.json"}
            assert utils.is_whole(path) and set(utils.json.loads((path / "manifest.json").read_text())) == files
            assert "model.safetensors" in files
        load_model(out / "checkpoints" / "step_000001")


@pytest.mark.parametrize("place, number, resumes", [("os.replace", 1, 3), ("os.replace", 2, 3), ("os.replace", 3, 3),
                                                    ("shutil.rmtree", 1, 3), ("shutil.rmtree", 2, 2)])
def test_a_kill_while_old_ones_are_thinned_out(whole, tmp_path, one_rank, monkeypatch, place, number, resumes):
    """At each file that is replaced and each folder that goes: all are whole, the newest goes on, and the next
    save finishes the work. The third replacement is of the second manifest."""
    out = stopped(whole, tmp_path / "run", 3, thin=False)
    newest, calls = out / "checkpoints" / "step_000003", iter(range(1, 9))
    module, name = importlib.import_module(place.split(".")[0]), place.split(".")[1]
    original = getattr(module, name)

    def dies(path, *more, **options):
        if next(calls) < number:
            return original(path, *more, **options)
        if name == "rmtree":  # half of the folder is gone
            next(path.glob("*.distcp")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, dies)
    if number < 3:  # there are two older ones
        with pytest.raises(KeyboardInterrupt):
            utils.thin_out(newest, 0, 0)
    else:
        utils.thin_out(newest, 0, 0)
    monkeypatch.undo()
    assert all(utils.is_whole(path) for path in newest.parent.iterdir())
    assert utils.whole_checkpoint(out) == newest
    utils.thin_out(newest, 0, 0)
    assert has_resume(out) == ["step_000003"] and all(utils.is_whole(path) for path in newest.parent.iterdir())


def test_what_has_weights_alone_is_not_gone_on_from(whole, tmp_path):
    """One sentence, with the way out, on both ranks; the logs stay. Its weights begin another run."""
    out = stopped(whole, tmp_path / "run", 4)
    damage(out / "checkpoints" / "step_000004", "missing")
    older = out / "checkpoints" / "step_000003"
    for torn in (1, 0):  # the second time it is aside already
        codes, said = run(whole[0], out, ranks=2)
        assert codes == [2, 2] and said.count("passed over") == torn, said
        assert said.count(f"--out {out} cannot go on: {older} is whole and has no optimiser's state; begin a new run "
                          f"from its weights with --model {older} and another --out.") == 1
        assert "Traceback" not in said and steps(out) == [1, 2, 3, 4] and not (out / "result.json").exists()
    code, said = run([*whole[0], "--model", older, "--max_steps", 1], tmp_path / "new")
    assert code == 0, said


def test_a_run_goes_on_from_the_one_before_on_two_ranks(whole, tmp_path):
    """Rank 0's verdict is every rank's; what was logged after the whole one is forgotten."""
    out = stopped(whole, tmp_path / "run", 4, thin=False)
    damage(out / "checkpoints" / "step_000004", "changed")
    damage(out / "checkpoints" / "step_000003", "missing")
    codes, said = run(whole[0], out, ranks=2)
    assert codes == [0, 0], said
    assert said.count("passed over") == 2 and said.count("Continuing after step 2.") == 1
    assert steps(out) == [1, 2, 3, 4]
    assert saved(out) == ["step_000001", "step_000002", "step_000003", "step_000003.torn",
                          "step_000004", "step_000004.torn"]


def test_without_a_whole_checkpoint_a_run_starts_anew(whole, tmp_path):
    out = stopped(whole, tmp_path / "run", 1)
    damage(out / "checkpoints" / "step_000001", "cut")
    code, said = run(whole[0], out)
    assert code == 0 and said.count(f"There is no whole checkpoint in {out}: starting from step 0.") == 1
    assert fingerprint(out) == fingerprint(whole[1])


def test_keep_deletes_the_older_ones(data, tmp_path):
    """In both trainers; also while there are fewer than are to be kept."""
    words = [*GRPO, *splits(data)[:2], "--keep", 2]
    code, said = run(words, tmp_path / "grpo")
    assert code == 0 and saved(tmp_path / "grpo") == ["step_000003", "step_000004"], said
    code, said = run([*SFT, *splits(data)[:2], "--epochs", 4, "--keep", 3], tmp_path / "sft")
    assert code == 0 and saved(tmp_path / "sft") == [f"step_{n:06d}" for n in (2, 3, 4)], said


def scripted(accuracies):
    """Evaluations find these accuracies, one after the other."""
    original, left = evaluate.evaluate, iter(accuracies)

    def act(*values):
        metrics, done = original(*values)
        return metrics | {"accuracy": next(left)}, done

    evaluate.evaluate = act


def scripted_and_killed(accuracies, place, number):
    scripted(accuracies)
    at_call(number, place, kill)


@pytest.mark.parametrize("words, ranks", [
    (GRPO, 1), pytest.param(SFT, 1, marks=pytest.mark.slow), pytest.param(GRPO, 2, marks=pytest.mark.slow)])
def test_the_best_step_keeps_its_checkpoint(data, tmp_path, words, ranks):
    """The first of equals, not the model before step 1; saved although --save_every asks for none; and all the same
    when the run is killed in between."""
    out = tmp_path / "run"
    words = [*words, *splits(data)[:4], "--batch_size", 16, *["--mini_batch_size", 16][: 2 * (words is GRPO)],
             "--save_every", 0, "--epochs", 4, "--eval_every", 1, "--keep", 1, "--keep_best", "validation/pass1_t0.6"]
    stage = words[0].removesuffix(".py")
    fault = partial(scripted_and_killed, [0.9, 0.2, 0.5, 0.5, 0.3], f"{stage}.update", 4)
    codes, said = run(words, out, fault, ranks)
    assert codes in (-9, [-9, -9]) and steps(out) == [1, 2, 3], said
    assert saved(out) == ["step_000002"]  # the first one was the best for a while
    codes, said = run(words, out, partial(scripted, [0.5, 0.3]), ranks)
    assert codes in (0, [0, 0]) and "Continuing after step 2." in said, said
    assert saved(out) == ["step_000002", "step_000004"] and has_resume(out) == ["step_000004"]
    assert utils.is_whole(out / "checkpoints" / "step_000002")
    result = json.loads((out / "result.json").read_text())
    assert result["best"] == {"checkpoint": str(out / "checkpoints" / "step_000002"), "accuracy": 0.5}


def test_where_all_are_kept_the_best_is_saved_and_named(data, tmp_path):
    out = tmp_path / "run"
    words = [*SFT, *splits(data)[:4], "--batch_size", 16, "--save_every", 0, "--epochs", 4, "--eval_every", 1]
    code, said = run([*words, "--keep_best", "validation/pass1_t0.6"], out, partial(scripted, [0, 0.1, 0.4, 0.2, 0.3]))
    assert code == 0 and saved(out) == ["step_000001", "step_000002", "step_000004"], said
    assert json.loads((out / "result.json").read_text())["best"]["checkpoint"].endswith("step_000002")


def test_the_best_step_by_hand(tmp_path):
    def row(step, accuracy, split="validation", setting="pass1_t0.6"):
        return {"generation_step": step, "split": split, "setting": setting, "accuracy": accuracy}

    assert evaluate.best_step(tmp_path, "validation/pass1_t0.6") == (0, 0)
    utils.write_jsonl(tmp_path / "eval.jsonl", [
        row(0, 0.9), row(2, 0.3), row(4, 0.5), row(4, 0.8, "test"), row(6, 0.5), row(6, 0.7, setting="pass8_t1")])
    assert evaluate.best_step(tmp_path, "validation/pass1_t0.6") == (4, 0.5)
    assert evaluate.best_step(tmp_path, "validation/pass8_t1") == (6, 0.7)
    assert evaluate.best_step(tmp_path, "test/pass8_t1") == evaluate.best_step(tmp_path, "") == (0, 0)


def keep_loaded_state(path, original, last, policy, optimizer):
    """After loading, the state of all ranks in one file."""
    step = original(last, policy, optimizer)
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = dcp_state.get_state_dict(policy, optimizer, options=options)
    if utils.rank() == 0:
        torch.save({"model": model, "optimizer": optimizer}, path)
    return step


def flat(value, name=""):
    """A tree of dictionaries and lists as {path: leaf}."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flat(part, f"{name}/{key}").items()}
    return {name: value}


@pytest.mark.parametrize("before, after", [
    (2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_ranks(whole, tmp_path, before, after):
    """The weights and the optimiser's state are those that were saved; the logs have no gap."""
    out = tmp_path / "run"
    if before == 1:
        stopped(whole, out, 2)
    else:
        died = partial(at_call, 3, "train_grpo.update", kill)
        assert run(whole[0], out, died, ranks=2)[0] == [-9, -9]
    resume = out / "checkpoints" / "step_000002" / "resume"
    assert len(list(resume.glob("*.distcp"))) == before
    dcp_to_torch_save(resume, tmp_path / "saved.pt")
    loaded = partial(keep_loaded_state, tmp_path / "loaded.pt")
    code, said = run(whole[0], out, partial(at_call, 1, "utils.load_resume_state", loaded), after)
    assert code in (0, [0, 0]) and "Continuing after step 2." in said, said
    assert steps(out) == [1, 2, 3, 4] and (out / "result.json").exists()
    old, new = (flat(torch.load(tmp_path / f"{name}.pt")) for name in ("saved", "loaded"))
    assert old.keys() < new.keys() and any("exp_avg_sq" in name for name in old)
    for name in old:
        same = torch.equal if isinstance(old[name], torch.Tensor) else operator.eq
        assert same(old[name], new[name]), name
    base = load_model(ROOT / "toy_model").state_dict()
    for name in new.keys() - old.keys():  # frozen and from --model, or tied and there under its first name
        short = name.removeprefix("/model/model.")
        same = base[short] if "visual" in short else old["/model/model.model.language_model.embed_tokens.weight"]
        assert ("visual" in short or short == "lm_head.weight") and torch.equal(new[name], same), name


def prepared(kind, dtype, offload):
    """The toy's policy with what `kind` says to train, sharded, and an optimiser that has made two steps."""
    torch.manual_seed(0)
    model = load_model(ROOT / "toy_model")
    freeze(model, "vision" in kind, "connector" in kind, "language" in kind or kind == "low rank")
    if kind == "low rank":  # small weights beside a frozen model
        add_lora(model, 4, 8, 0)
    policy = shard(Policy(model, load_processor(ROOT / "toy_model")), dtype, offload)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    return policy, trained, torch.optim.AdamW(trained.values(), 1e-2)


def values(policy, optimizer):
    """Weights and optimiser state as plain tensors."""
    policy.state_dict()
    weights = {f"weight {name}": p for name, p in policy.named_parameters()}
    states = {f"{name} {i}": value for i, p in enumerate(optimizer.param_groups[0]["params"])
              for name, value in optimizer.state[p].items()}
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone()
            for name, v in (weights | states).items()}


@pytest.mark.parametrize("kind, dtype, offload", [
    ("language", torch.float32, False), ("connector", torch.bfloat16, False),
    pytest.param("vision connector language", torch.bfloat16, False, marks=pytest.mark.slow),
    pytest.param("low rank", torch.bfloat16, True, marks=pytest.mark.slow)])
def test_the_resume_state_is_what_trains(tmp_path, one_rank, kind, dtype, offload):
    """By name and size on disk; in another process's objects all is as it was, also after a forward that has left
    weights gathered, and where the frozen part is tied."""
    policy, trained, optimizer = prepared(kind, dtype, offload)
    for step in (1, 2):
        for p in trained.values():
            p.grad = torch.full_like(p, step)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    sample = load_samples(ROOT / "toy_data" / "test.jsonl", policy.processor, 512)[0]
    sample.completion_ids = [20, 21]
    with torch.no_grad():
        policy(policy.batch([sample]), 1.0)
    utils.save_checkpoint(tmp_path, 3, policy, optimizer, dtype)
    folder = tmp_path / "checkpoints" / "step_000003" / "resume"
    dcp_to_torch_save(folder, tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt")["model"].keys() == trained.keys()
    count = sum(p.numel() for p in trained.values())
    assert 12 * count < sum(p.stat().st_size for p in folder.glob("*.distcp")) < 12.5 * count + 500_000
    other, _, another = prepared(kind, dtype, offload)
    with torch.no_grad():
        other(other.batch([sample]), 1.0)
    assert utils.load_resume_state(folder.parent, other, another) == 3
    old, new = values(policy, optimizer), values(other, another)
    assert another.param_groups[0]["lr"] == 0.5
    assert old.keys() == new.keys() and sum("exp_avg" in name for name in old) == 2 * len(trained)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_two_steps_a_kill_and_two_steps_are_four_steps(whole, tmp_path):
    """SIGKILL inside step 3, whose samples are collected: bit for bit what was never disturbed."""
    out = tmp_path / "run"
    code, _ = run(whole[0], out, partial(at_call, 3, "train_grpo.update", kill))
    assert code == -signal.SIGKILL and steps(out) == [1, 2]
    code, said = run(whole[0], out)
    assert code == 0 and "Continuing after step 2." in said, said
    assert fingerprint(out) == fingerprint(whole[1])


@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_while_saving_leaves_the_checkpoint_before(whole, tmp_path, number):
    """Step 3's, before its manifest is there, and before it gets its own name."""
    out = stopped(whole, tmp_path / "run", 2)
    die = partial(prepare, partial(at_call, number, "os.replace", kill))
    code, _ = run(whole[0], out, partial(at_call, 1, "utils.save_checkpoint", die))
    assert code == -signal.SIGKILL
    assert saved(out) == ["step_000001", "step_000002", "step_000003.part"]
    code, said = run(whole[0], out)
    assert code == 0 and "Continuing after step 2." in said, said
    assert fingerprint(out) == fingerprint(whole[1])


def test_a_kill_before_args_json_is_no_other_run(tmp_path, one_rank):
    """What is there before a run has its args.json does not keep the same command from starting."""
    (tmp_path / "args.json.part").write_text('{"scri')
    assert utils.choose_run(train_grpo.Args(out=str(tmp_path))) == (tmp_path, False)


# ---------------------------------------------------------------------------------------------
# Another rank


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_ends_the_other(whole, tmp_path, dies):
    """A collective tells the other one, at once; under torchrun see tests/test_chaos.py."""
    out = stopped(whole, tmp_path / "run", 2)
    codes, said = run(whole[0], out, partial(at_call, 1, "train_grpo.update", kill, dies), ranks=2)
    assert codes == ([-9, 1] if dies == 0 else [1, -9]), said
    last = out / "checkpoints" / "step_000002"
    assert re.search(rf"rank {1 - dies}: another rank is gone \(.*\)\. The last whole checkpoint is "
                     rf"{last}\. The same command", said), said
    assert "Traceback" not in said and utils.is_whole(last)


# ---------------------------------------------------------------------------------------------
# The disk


@pytest.mark.parametrize("place, act, sentence", [
    ("utils.save_checkpoint", full_disk, r"step_000003 cannot be saved \(.*No space left.*\); .* free"),
    pytest.param("utils.save_checkpoint", small_files, r"step_000003 cannot be saved \(.*File too large.*\);",
                 marks=pytest.mark.slow),
    ("torch.distributed.checkpoint.save", small_files, r"step_000003 cannot be saved \(.*\);"),
    ("utils.append_jsonl", full_disk, r"rank 0: \[Errno 28\] No space left on device\.")])
def test_a_full_disk(whole, tmp_path, place, act, sentence):
    """One sentence, exit code 1, nothing half-written under its name; with room the run goes on."""
    out = stopped(whole, tmp_path / "run", 2, keep=1)
    words = [*whole[0], "--keep", 1]
    code, said = run(words, out, partial(at_call, 1, place, act))
    last = out / "checkpoints" / "step_000002"
    assert code == 1 and re.search(f"{sentence}.* The last whole checkpoint is {last}[.]", said), said
    assert "Traceback" not in said and utils.is_whole(last)
    assert set(saved(out)) <= {"step_000001", "step_000002", "step_000003.part"}
    code, said = run(words, out)
    assert code == 0 and "Continuing after step 2." in said, said
    assert fingerprint(out) == fingerprint(whole[1])


def test_an_out_that_cannot_be_written(whole, tmp_path):
    (tmp_path / "file").write_text("a regular file")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, said = run(whole[0], out)
        assert code == 2 and len(said.splitlines()) == 1, said
        assert f"--out {out} cannot be written in {tmp_path / 'file'}; give a new folder." in said


# ---------------------------------------------------------------------------------------------
# What the run is given: numbers, rewards, images


@pytest.mark.parametrize("words, number, place, act, what, count", [
    # step 3, in one pass, to which a divergence brings every sample
    ([*GRPO, "--micro_batch_tokens", 1000, "--kl_coef", 0.001], 3, "train_grpo.policy_loss", nan_loss, "loss: nan", 8),
    (SFT, 3, "torch.nn.utils.clip_grad_norm_", infinite_norm, "gradient norm: inf", 16)])
def test_what_is_not_finite_ends_the_run_and_its_batch_is_kept(
        data, tmp_path, words, number, place, act, what, count):
    """In both trainers: which number, on which samples, with the weights as they were."""
    out = tmp_path / "run"
    code, said = run([*words, *splits(data)[:2]], out, partial(at_call, number, place, act))
    kept = out / "failed_batch_rank0.jsonl"
    assert code == 1 and "Traceback" not in said, said
    assert f"Its samples are in {kept}. The last whole checkpoint is" in said
    rows = utils.read_jsonl(kept)
    assert len(rows) == count and {row["not_finite"] for row in rows} == {what}
    assert {"id", "question", "answer", "completion_text", "advantage"} <= set(rows[0])
    assert all(row["id"] in said for row in rows)
    assert steps(out) == [1, 2] and utils.is_whole(out / "checkpoints" / "step_000002")


JUDGE = """
import time
calls = []

def judge(samples):
    calls.append(1)
    if len(calls) == 4:  # the first is the rehearsal's
        {act}
    return [0.0] * len(samples)
"""


@pytest.mark.parametrize("act, sentence", [
    ("{}['key']", r"reward 'judge' failed \({}, line 8\): KeyError: 'key'\."),
    ("time.sleep(90)", r"reward 'judge' took 2 s; see --reward_timeout\."),
    ("return 'well'", r"reward 'judge' must return a list of 8 finite numbers .* it returned 'well'\.")])
def test_a_reward_that_fails(whole, tmp_path, act, sentence):
    """At the third step: it raises, it hangs, it returns nonsense."""
    path = tmp_path / "judge.py"
    path.write_text(JUDGE.replace("{act}", act))
    out = tmp_path / "run"
    words = [*whole[0], "--rewards", f"accuracy:1.0,{path}:judge:0.5", "--reward_timeout", 2]
    code, said = run(words, out)
    assert code == 1 and "Traceback" not in said, said
    sentence = sentence.replace("{}", re.escape(str(path)))
    assert re.search(rf"rank 0: {sentence} The last whole checkpoint is \S+step_000002\.", said), said
    assert steps(out) == [1, 2]


def test_a_reward_that_cannot_be_called_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "uncallable.py").write_text("def judge():\n    return []\n")
    rewards = scoring.load_rewards(f"{tmp_path}/uncallable.py:judge:1")
    with pytest.raises(utils.RunError, match=r"^reward 'judge' failed: TypeError: judge\(\) takes 0 "):
        scoring.score([], rewards)


def test_an_image_that_goes_missing(data, tmp_path):
    """After the data was checked: the images of step 3 are looked for in vain."""
    folder = shutil.copytree(data, tmp_path / "data")
    fault = partial(at_call, 2, "train_grpo.update", partial(lose_images, folder / "images"))
    code, said = run([*GRPO, "--train_data", folder / "train.jsonl"], tmp_path / "run", fault)
    assert code == 1 and "Traceback" not in said, said
    assert re.search(rf"rank 0: .*No such file or directory: '{folder}/images/toy_train_\d+.png'\. The "
                     r"last whole checkpoint is \S+step_000002\.", said), said


@pytest.mark.parametrize("flags", [[], ["--mask_truncated"]])
def test_nothing_but_dead_groups(whole, tmp_path, flags):
    """Every answer is cut off and wrong: the run goes on, says so, and moves no weight."""
    out = tmp_path / "run"
    words = [*whole[0], "--max_steps", 2, "--max_new_tokens", 2, *flags]
    code, said = run(words, out)
    assert code == 0, said
    rows = utils.read_jsonl(out / "metrics.jsonl")
    assert [(row["truncated"], row["groups_all_alike"], row["reward"]) for row in rows] == [(1, 1, 0)] * 2
    assert all_finite(rows)
    old, new = (load_file(folder / "model.safetensors")
                for folder in (ROOT / "toy_model", utils.latest_checkpoint(out)))
    assert all(torch.equal(old[name], new[name]) for name in new)


# ---------------------------------------------------------------------------------------------
# Bugs and mistakes


def test_a_bug_keeps_its_traceback(whole, tmp_path):
    """What is nobody's fault but ours must not be made into a sentence."""
    code, said = run(whole[0], stopped(whole, tmp_path / "run", 2), partial(at_call, 1, "train_grpo.update", bug))
    assert code == 1 and "Traceback" in said and "RuntimeError: two shapes do not agree" in said


def test_more_mistakes_at_the_command_line(whole, tmp_path, monkeypatch, one_rank):
    """What tests/test_commands.py and tests/test_data.py leave out."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(utils.UserError, match="--mini_batch_size 32, and that one of the 3 ranks"):
        train_grpo.check_args(train_grpo.Args())
    with pytest.raises(utils.UserError, match="--batch_size 16 must be a multiple of the 3 ranks"):
        train_sft.main(train_sft.Args())
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(utils.UserError, match="is not empty and holds no run; give a new folder"):
        utils.choose_run(train_grpo.Args(out=str(tmp_path)))
    model = shutil.copytree(whole[1] / "checkpoints" / "step_000004", tmp_path / "model")
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (model / name).unlink()
    with pytest.raises(utils.UserError, match="cannot be loaded .* with its processor files"):
        load_processor(model)


# ---------------------------------------------------------------------------------------------
# What is given as a checkpoint, and what becomes of it


def toy_weights(change):
    """A fault of a folder's weights: `change` is called with them and one of their names."""
    def act(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights, "model.layers.1.mlp.up_proj.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return act


NAME = r"model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, sentence", [
    (lambda w, name: w.pop(name), rf"1 missing \({NAME}\);"),
    (lambda w, name: [w.pop(n) for n in list(w) if "up_proj" in n and "layers" in n],
     r"4 missing \(\S+up_proj.weight, \S+up_proj.weight, \S+up_proj.weight ...\);"),
    (lambda w, name: w.update(extra=torch.ones(2)), r"1 without a place \(extra\);"),
    (lambda w, name: w.update(renamed=w.pop(name)), rf"1 missing \({NAME}\), 1 without a place \(renamed\);"),
    (lambda w, name: w.update({name: w[name][1:].clone()}), rf"1 of another shape \({NAME}\);"),
    (lambda w, name: w[name][3].fill_(math.nan), rf"1 not finite \({NAME}\);"),
    (lambda w, name: w[name][3].fill_(-math.inf), rf"1 not finite \({NAME}\);"),
    (lambda w, name: [w.pop(n) for n in list(w) if "embed" in n], r"3 missing \(lm_head.weight, \S+embed_tokens.weight, \S+patch_embed\S+\);")])
def test_weights_that_config_json_does_not_tell_of(tmp_path, change, sentence):
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    toy_weights(change)(folder)
    with pytest.raises(utils.UserError, match=f"--model {folder}: its weights .*{sentence}.* download it again"):
        load_model(folder)


def test_weights_that_stay_quantised_are_refused(monkeypatch):
    """Where the packages for it are there, transformers loads what a quantization_config says, and nothing trains."""
    model = load_model(ROOT / "toy_model")
    model.get_decoder().norm.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    monkeypatch.setattr("policy.load_pretrained", lambda loader, *_, **__: (
        model.config if loader is transformers.AutoConfig else (model, info)))
    with pytest.raises(utils.UserError, match=r"1 quantised \(model.language_model.norm.weight\)"):
        load_model("anywhere")


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_or_is_not_there(tmp_path, tied):
    """A tied head may stand in the file or not; one that is not tied must."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    utils.write_json(folder / "config.json", config)
    if tied:
        load_model(folder)
        toy_weights(lambda w, _: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(folder)
        load_model(folder)  # as ours were written before
    else:
        with pytest.raises(utils.UserError, match=r"1 missing \(lm_head.weight\)"):
            load_model(folder)


FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json", "model.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"[]", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, "half"])
def test_a_torn_file_of_a_checkpoint_is_named(tmp_path, name, content):
    """Whichever is loaded, and also where transformers would go on without it in silence."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    path = folder / name
    if content == "half":
        content = path.read_bytes()[:path.stat().st_size // 2] if path.exists() else b'{"weight_map": {'
    path.write_bytes(content)
    for load in (load_processor, load_model):
        with pytest.raises(utils.UserError, match=f"--model {folder}: its file {name} is torn .* again"):
            load(folder)


@pytest.mark.parametrize("name, content, load", [
    ("config.json", '{"model_type": "abacus"}', "load_model"), ("config.json", "{}", "load_model"),
    ("tokenizer.json", "{}", "load_processor"), ("chat_template.jinja", "", "load_processor"),
    ("generation_config.json", '{"watermarking_config": {"a": 1}}', "load_model"),
    ("generation_config.json", '{"early_stopping": "sometimes"}', "load_model"),
    ("model.safetensors.index.json", '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}', "load_model"),
    ("model.safetensors.index.json", "{}", "load_model")])
def test_a_file_of_a_checkpoint_that_means_nothing(tmp_path, name, content, load):
    """Whatever transformers makes of it: KeyError, TypeError, its own exceptions."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    (folder / name).write_text(content)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    with pytest.raises(utils.UserError, match=f"^--model {folder}: .*; give a"):
        getattr(importlib.import_module("policy"), load)(folder)


def test_a_mistake_in_a_checkpoint_is_one_line(whole, tmp_path):
    """And transformers' own table of what is missing does not stand above it."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    toy_weights(lambda w, name: w.pop(name))(folder)
    code, said = run([*whole[0], "--model", folder], tmp_path / "run")
    assert code == 2 and len(said.splitlines()) == 1 and "1 missing" in said, said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def policy(one_rank):
    return Policy(load_model(ROOT / "toy_model"), load_processor(ROOT / "toy_model"))


SETTINGS = (  # of vicuna and LLaVA, and others that transformers reads and does not write
    {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}, {"do_sample": False, "temperature": 0.3},
    {"early_stopping": True, "num_beams": 1}, {"pad_token_id": -1}, {"output_scores": True})


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_generation_config_that_transformers_would_not_save(tmp_path, one_rank, settings):
    """The source's comes out as it went in."""
    folder = shutil.copytree(ROOT / "toy_model", tmp_path / "model")
    utils.write_json(folder / "generation_config.json", settings)
    policy = Policy(load_model(folder), load_processor(folder))
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        policy.model.save_pretrained(tmp_path / "wrong")
    utils.try_saving(tmp_path / "run", policy, torch.float32, 4, train_grpo.Args())
    assert not (tmp_path / "run").exists()
    policy.export(tmp_path / "out", torch.float32)
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.items() <= said.items()
    assert load_model(tmp_path / "out").generation_config.to_dict() == policy.model.generation_config.to_dict()


def raises(error):
    def act(*_, **__):
        raise error
    return act


@pytest.mark.parametrize("place, error, sentence", [
    ("utils.write_json", OSError(errno.EROFS, "Read-only file system"), "--out {out}: .*OSError: .*Read-only file system"),
    ("transformers.PreTrainedConfig.save_pretrained", ValueError("generation parameters\nare set"),
     "cannot be saved \\(ValueError: generation parameters\\); correct the files that --model names"),
    ("transformers.Qwen2_5_VLProcessor.save_pretrained", KeyError("a"), "cannot be saved .KeyError: 'a'")])
@pytest.mark.parametrize("before", [[], ["args.json", "eval.jsonl", "checkpoints/step_000001/a"]])
def test_saving_is_tried_before_step_1(policy, tmp_path, monkeypatch, place, error, sentence, before):
    """What is read but cannot be written is said then; nothing stays of the trial, and all else does."""
    out = tmp_path / "runs" / "run"
    for name in before:
        utils.write_text(out / name, "")
    module, _, name = place.rpartition(".")
    owner, _, part = module.partition(".")
    owner = importlib.import_module(owner)
    monkeypatch.setattr(getattr(owner, part) if part else owner, name, raises(error))
    with pytest.raises(utils.UserError, match=sentence.format(out=out)):
        utils.try_saving(out, policy, torch.float32, 4, train_grpo.Args())
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(before)
    assert out.parent.exists() == bool(before)


def free_bytes(monkeypatch, n):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=n))


def test_the_size_of_a_checkpoint_is_foretold(whole, policy, monkeypatch):
    """What `save_checkpoint` wrote, to a few percent: of these weights a part is frozen."""
    freeze(policy.model, False, False, True)
    folder = whole[1] / "checkpoints" / "step_000004"
    real = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free_bytes(monkeypatch, int(1.05 * real))
    utils.try_saving(whole[1], policy, torch.float32, 1, train_grpo.Args())
    free_bytes(monkeypatch, int(0.95 * real))
    with pytest.raises(utils.UserError, match=r"0.01\d GB are free there, a checkpoint takes 0.01\d GB; free"):
        utils.try_saving(whole[1], policy, torch.float32, 1, train_grpo.Args())


@pytest.mark.parametrize("save_every, keep, best, need", [
    (0, 0, 0, 1 + 3), (1, 0, 0, 4 + 6), (3, 0, 0, 2 + 6), (1, 1, 0, 2 + 6), (1, 2, 0, 3 + 6), (0, 3, 0, 1 + 3),
    (0, 0, 1, 4 + 6), (0, 1, 1, 3 + 6), (1, 0, 1, 7 + 6), (1, 2, 1, 4 + 6)])
def test_later_checkpoints_that_will_not_fit_are_said(
        policy, tmp_path, monkeypatch, capsys, save_every, keep, best, need):
    """Of a run of 4 steps and 3 epochs, in float32 weights: one a checkpoint, and three more what two at most, the
    old and the new one, resume by. An old one goes after a new one has come; the best may be a third."""
    args = train_grpo.Args(save_every=save_every, keep=keep, keep_best="validation/pass1_t0.6" * best, eval_every=best)
    for room in (need + 0.1, need - 0.1):
        free_bytes(monkeypatch, int(room * 4 * policy.model.num_parameters()))
        if room < 4:
            with pytest.raises(utils.UserError, match="GB are free there"):
                utils.try_saving(tmp_path, policy, torch.float32, 4, args)
            continue
        utils.try_saving(tmp_path, policy, torch.float32, 4, args)
        said = capsys.readouterr().err
        assert bool(said) == (room < need)
        if said:
            gb = policy.model.num_parameters() * 4 / 1e9
            assert said == (f"--out {tmp_path}: {room * gb:.3f} GB are free there, a checkpoint takes {4 * gb:.3f} GB, "
                            f"all {need * gb:.3f} GB: --keep, --keep_best, --save_every.\n")


def small_disk():
    shutil.disk_usage = lambda path: SimpleNamespace(free=10 * 2**20)


@pytest.mark.parametrize("words, ranks", [(GRPO, 1), (GRPO, 2), (SFT, 1)])
def test_a_disk_without_room_for_one_checkpoint(data, tmp_path, words, ranks):
    """No run folder, one sentence, exit code 2 on every rank; both trainers ask."""
    codes, said = run([*words, *splits(data)[:2]], tmp_path / "run", small_disk, ranks)
    assert codes in (2, [2, 2]) and said.count("0.010 GB are free there, a checkpoint takes 0.01") == 1, said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_what_a_crash_left_half_written_does_not_count_as_used(policy, tmp_path):
    utils.write_text(tmp_path / "checkpoints" / "step_000002.part" / "model.safetensors", "half")
    utils.try_saving(tmp_path, policy, torch.float32, 4, train_grpo.Args())
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoints"]


def umask_of_a_group():
    os.umask(0o027)


@pytest.mark.parametrize("ranks, dtype", [
    (1, "bfloat16"), pytest.param(2, "float32", marks=pytest.mark.slow), (2, "bfloat16")])
def test_what_is_exported(data, tmp_path, ranks, dtype):
    """On 1 rank and 2, in both dtypes: a tied head once, the dtype as it is, the umask's modes."""
    words = [*GRPO, *splits(data)[:2], "--max_steps", 1, "--dtype", dtype]
    codes, said = run(words, tmp_path / "run", umask_of_a_group, ranks)
    assert codes in (0, [0, 0]), said
    folder = tmp_path / "run" / "checkpoints" / "step_000001"
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == 80 and not any("lm_head" in name for name in weights)
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
    config = json.loads((folder / "config.json").read_text())
    parts = (config, config["text_config"], config["vision_config"])
    assert {part["dtype"] for part in parts} == {dtype}
    paths = [folder, *folder.rglob("*")]
    assert {p.stat().st_mode & 0o777 for p in paths if p.is_file()} == {0o640}
    assert {p.stat().st_mode & 0o777 for p in paths if p.is_dir()} == {0o750}


# ---------------------------------------------------------------------------------------------
# One run by many names


def test_a_run_by_another_name_is_the_same(tmp_path, one_rank, monkeypatch):
    """Relative, absolute, through a link, with a slash, moved; so are its model, data and rewards."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "model/config.json", "judge.py"):
        utils.write_text(tmp_path / name, "")
    (tmp_path / "link").symlink_to(tmp_path)
    given = dict(model="model", train_data="mine.jsonl", rewards="accuracy:1.0,judge.py:f:2", out="run")
    args = train_grpo.Args(**given)
    utils.write_json(tmp_path / "run" / "args.json", utils.run_arguments(args, Path("run")))

    def goes_on(**changed):
        return utils.choose_run(train_grpo.Args(**given | changed))[1]

    assert goes_on()
    for out in (tmp_path / "run", "run/", "./run", "link/run", tmp_path / "link" / "run", "model/../run"):
        assert goes_on(out=str(out)), out
    for place in (".", tmp_path, "link", "model/.."):
        assert goes_on(model=f"{place}/model/", train_data=f"{place}/mine.jsonl"), place
        assert goes_on(rewards=f"accuracy:1.0,{place}/judge.py:f:2"), place
    os.rename("run", "moved")
    assert goes_on(out="moved") and goes_on(out=str(tmp_path / "moved"))
    for changed in ({"model": "link"}, {"train_data": "link/model"}, {"lr": 0.5},
                    {"rewards": "accuracy:1.0,judge.py:g:2"}, {"rewards": "accuracy:1.0"}):
        name, value = next(iter(changed.items()))
        old = getattr(args, name)
        with pytest.raises(utils.UserError, match=re.escape(
                f"--out moved holds a run with other arguments ({name} was {old!r}, is {value!r}); give")):
            goes_on(out="moved", **changed)


def test_flags_that_came_or_went_make_no_other_run(tmp_path, one_rank):
    args = train_grpo.Args(out=str(tmp_path), keep=2)
    before = utils.run_arguments(args, tmp_path)
    utils.write_json(tmp_path / "args.json", before | {"gone_since": True})
    assert utils.choose_run(args)[1]
    del before["clip_high"]
    utils.write_json(tmp_path / "args.json", before)
    assert utils.choose_run(args)[1]
    with pytest.raises(utils.UserError, match="other arguments .clip_high was 0.2, is 0.3.; give"):
        utils.choose_run(train_grpo.Args(out=str(tmp_path), keep=2, clip_high=0.3))
    with pytest.raises(utils.UserError, match=r"arguments \(seed was 0, is 1, lr was 5e-05, is 0.1\); give"):
        utils.choose_run(train_grpo.Args(out=str(tmp_path), seed=1, lr=0.1, keep=3))
    with pytest.raises(utils.UserError, match="script was 'train_sft', is '"):
        utils.write_json(tmp_path / "args.json", before | {"script": "train_sft"})
        utils.choose_run(args)
    for content in ("{", "[]", "null"):
        (tmp_path / "args.json").write_text(content)
        with pytest.raises(utils.UserError, match="its args.json is no JSON object"):
            utils.choose_run(args)


def test_a_moved_run_goes_on_by_its_absolute_name(whole, tmp_path, monkeypatch):
    """And it ends with the same bits."""
    out = stopped(whole, tmp_path / "run", 2)
    utils.write_json(out / "args.json", json.loads((out / "args.json").read_text()) | {"out": "runs/elsewhere"})
    code, said = run(whole[0], out)
    assert code == 0 and "Continuing after step 2." in said, said
    assert fingerprint(out) == fingerprint(whole[1])


# ---------------------------------------------------------------------------------------------
# Ends of a process


def test_a_group_waits_longer_than_any_flag(monkeypatch):
    """A rank may wait for another's reward or engine, which have time limits of their own."""
    given = {}
    monkeypatch.setattr(utils.dist, "init_process_group", lambda *_, **options: given.update(options))
    utils.start_ranks()
    longest = 10**8  # seconds, three years
    assert given["timeout"].total_seconds() > longest
    assert threading.TIMEOUT_MAX > given["timeout"].total_seconds()


def interrupt(original, *values):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*values)
    except BaseException as error:  # as some imports and destructors do with a KeyboardInterrupt
        raise ImportError("cannot be imported") from error


def test_ctrl_c_before_a_run_begins(whole, tmp_path):
    code, said = run(whole[0], tmp_path / "run", partial(at_call, 1, "policy.load_processor", interrupt))
    assert (code, said) == (130, "\nStopped. No run folder was written.\n")
    assert not (tmp_path / "run").exists()


def leave(original, *_):
    sys.stdout = open(1, "w", closefd=False)  # buffered, whatever PYTHONUNBUFFERED says
    print("half a line", end="")
    sys.exit(0)


def fill_memory(original, *_):
    raise MemoryError


def fill_tensors(original, *_):
    torch.empty(2**50)


@pytest.mark.parametrize("act, sentence", [
    (leave, r"half a line|rank 0: something called sys.exit\(0\)\."),
    (fill_memory, "rank 0: out of memory .MemoryError.; lower --micro_batch_tokens"),
    (fill_tensors, "rank 0: out of memory \\(.*allocate memory.*\\); lower --micro_batch_tokens")])
def test_ends_that_are_no_bug(whole, tmp_path, act, sentence):
    """A run never ends with exit code 0 before its end; what was printed before is not lost."""
    code, said = run(whole[0], stopped(whole, tmp_path / "run", 2), partial(at_call, 1, "train_grpo.update", act))
    assert code == 1 and "Traceback" not in said, said
    for part in sentence.split("|"):
        assert re.search(part, said), said
    assert re.search(r"The last whole checkpoint is \S+step_000002\.", said), said
