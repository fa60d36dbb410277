"""Tier 3: --wandb against a module of that name which writes down how it is called."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import train_sft
import utils
from runs import resumable_throughout, run, TINY

FAKE = '''
import json, os

def note(**call):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, row, step):
        note(call="log", row=row, step=step)

def init(**words):
    assert os.path.exists(os.path.join(words["dir"], "args.json"))
    note(call="init", **words)
    return Run()

note(call="import", rank=os.environ.get("RANK", "0"))
'''
STEPS = ["--max_steps", 2, "--test_data="]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The fake module is there; what it was asked to do so far, as a function."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("WANDB_CALLS", str(tmp_path / "calls.jsonl"))
    return lambda: utils.read_jsonl(tmp_path / "calls.jsonl")


def logged(calls, name):
    """The rows that were sent with a number of this name, each with its step."""
    return [(call["step"], call["row"]) for call in calls if call["call"] == "log" and name in call["row"]]


def by_step(path):
    return [(row["generation_step"], row) for row in utils.read_jsonl(path)]


def test_grpo_is_mirrored_and_goes_on_in_the_same_run(calls, data, tmp_path):
    """Two ranks of which one mirrors; then a step is forgotten, and done again."""
    out = tmp_path / "grpo"
    words = ["train_grpo.py", *TINY, *STEPS, "--train_data", data / "train.jsonl", "--validation_data",
             data / "validation.jsonl", "--out", out, "--wandb", "shapes"]
    run(*words, ranks=2, fault=resumable_throughout)
    first = calls()
    assert [call for call in first if call["call"] == "import"] == [{"call": "import", "rank": "0"}]
    begun = [call for call in first if call["call"] == "init"]
    assert begun == [{"call": "init", "project": "shapes", "id": begun[0]["id"], "name": "grpo",
                      "resume": "allow", "dir": str(out), "config": json.loads((out / "args.json").read_text())}]
    assert len(begun[0]["id"]) == 16
    assert logged(first, "reward") == by_step(out / "metrics.jsonl") and len(logged(first, "reward")) == 2
    name = "eval/validation/pass1_t0.6/"
    rows = utils.read_jsonl(out / "eval.jsonl")
    for kind in ("accuracy", "length", "truncated", "reflection_ratio"):
        assert [(step, row[name + kind]) for step, row in logged(first, name + kind)] == [
            (step, row[kind]) for step, row in zip((0, 2), rows, strict=True)]
    sent = [value for call in first if call["call"] == "log" for value in call["row"].values()]
    assert all(isinstance(value, (int, float, dict)) for value in sent)

    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step_000002")
    run(*words)
    again = calls()[len(first):]
    assert [call for call in again if call["call"] == "init"] == begun
    assert logged(again, "reward") == by_step(out / "metrics.jsonl")[1:]


def test_sft_is_mirrored(calls, data, tmp_path):
    words = ["train_sft.py", *STEPS, "--batch_size", 4, "--train_data", data / "train.jsonl",
             "--validation_data="]
    run(*words, "--out", tmp_path / "plain")
    assert calls() == []  # nobody asked for it: not even imported
    run(*words, "--out", tmp_path / "sft", "--wandb", "shapes")
    assert logged(calls(), "loss") == by_step(tmp_path / "sft" / "metrics.jsonl")
    assert [step for step, _ in logged(calls(), "loss")] == [1, 2]


@pytest.mark.parametrize("script, ranks", [("train_grpo.py", 2), ("train_sft.py", 1)])
def test_without_the_package_nothing_begins(tmp_path, monkeypatch, script, ranks):
    """Not installed, though a folder of that name is in the way, as wandb itself leaves one."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    _, stderr = run(script, "--out", tmp_path / "run", "--wandb", "shapes", ranks=ranks, code=2)
    assert stderr.count("--wandb needs the package wandb; run `pip install wandb`, or leave the flag out.") == 1
    assert not (tmp_path / "run").exists() and len(stderr.splitlines()) == 1


def test_every_rank_says_no_where_rank_0_lacks_it(tmp_path, monkeypatch, calls):
    """Rank 0 alone needs the package: its answer, the first that is gathered, is everybody's."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "fake"), *sys.path])  # this rank has it
    monkeypatch.setattr(utils, "gather", lambda items: [None, *items])  # rank 0 has not
    with pytest.raises(utils.UserError, match="needs the package wandb"):
        utils.check_wandb("shapes")
    monkeypatch.setattr(utils, "gather", lambda items: ["/there/wandb.py", None])
    utils.check_wandb("shapes")
    utils.check_wandb("")
    assert "wandb" not in sys.modules


def broken(*_, **__):
    raise ValueError("no network")


def test_a_mirror_that_breaks_loses_no_row(tmp_path, monkeypatch, capsys):
    """The row is in the file before it is sent; a failure is said once, and nothing more is sent."""
    seen = []

    def log(numbers, step):
        seen.append(step)
        assert utils.read_jsonl(tmp_path / "metrics.jsonl")[-1]["generation_step"] == step
        if step == 2:
            broken()

    monkeypatch.setattr(utils, "mirror", [SimpleNamespace(log=log)])
    for step in (1, 2, 3):
        utils.log_row(tmp_path / "metrics.jsonl", {"generation_step": step, "note": "text"})
    assert [row["generation_step"] for row in utils.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert seen == [1, 2]
    assert capsys.readouterr().err.count("Weights & Biases failed (no network); the run goes on without it.") == 1


def test_a_mirror_that_cannot_begin_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=broken))
    args = train_sft.Args(wandb="shapes")
    with pytest.raises(utils.RunError, match=r"--wandb shapes: it cannot begin \(no network\); run `wandb login` or"):
        utils.start_mirror(tmp_path, args)
    monkeypatch.setenv("RANK", "1")
    utils.start_mirror(tmp_path, args)  # another rank does not even try
    assert os.environ["RANK"] == "1" and utils.mirror == []
