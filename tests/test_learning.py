"""Tier 4, slow: the scripts learn, to a threshold, and the toy keeps its promises.

Run by `pytest -m slow`. The thresholds are far below what the README reports, and far above chance.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import toy
import utils

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def torchrun(*words):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *words)


def gain(result, split):
    entry = result[f"{split}_pass1_t0.6"]
    return entry["after"]["accuracy"] - entry["before"]["accuracy"]


def test_the_toy_keeps_its_promises():
    """`python toy.py --check` exits with 0 only if all of them hold."""
    assert run("toy.py", "--check")["broken"] == 0


def test_the_habits_of_the_base_are_those_it_was_taught():
    """Shares within 7 points of what toy.py says; a habit forced is about as good as the habit chosen."""
    table = run("toy.py", "--habits")["validation"]
    for opening, (_, _, share) in toy.HABITS.items():
        assert abs(table[opening]["share"] - share) < 0.07, opening
        assert abs(table[opening]["forced"] - table[opening]["accuracy"]) < 0.12, opening
    assert sum(table[opening]["share"] for opening in toy.HABITS) > 0.99
    mean = sum(table[opening]["share"] * table[opening]["accuracy"] for opening in toy.HABITS)
    assert abs(mean - table["accuracy"]) < 0.01


def test_building_the_base_is_deterministic(tmp_path):
    """The committed weights are what --build gives; here two builds of a few steps."""
    few = ["--see_steps", 3, "--habit_steps", 2, "--share_steps", 2]
    records = [run("toy.py", "--build", "--model", tmp_path / name, *few) for name in "ab"]
    assert records[0]["sha256"] == records[1]["sha256"]
    other = run("toy.py", "--build", "--model", tmp_path / "c", "--seed", 1, *few)
    assert other["sha256"] != records[0]["sha256"]


def test_grpo_learns_on_two_ranks(tmp_path):
    """The README's command, with a seed that no figure was taken from."""
    result = torchrun("train_grpo.py", "--seed", 100, "--out", tmp_path / "run")
    assert gain(result, "validation") > 0.2
    assert gain(result, "test") > 0.1
    rows = utils.read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["entropy"] < rows[0]["entropy"]  # it has made up its mind
    assert max(row["sampler_gap"] for row in rows) < 1e-4  # and the sampler kept up


def test_lora_learns(tmp_path):
    """Rank 8 in place of the language's weights: a tenth of the numbers."""
    result = torchrun("train_grpo.py", "--lora_rank", 8, "--lr", 1e-3, "--seed", 100, "--epochs", 1, "--out",
                      tmp_path / "run")
    assert gain(result, "validation") > 0.2
    assert gain(result, "test") > 0.1


def test_grpo_learns_nothing_from_a_reward_that_says_nothing(tmp_path):
    """The control: random rewards must not raise accuracy, or the gain above is not the reward's."""
    (tmp_path / "coin.py").write_text(
        "import hashlib\n\n\ndef coin(samples):\n    texts = [s.id + s.completion_text for s in samples]\n"
        "    return [hashlib.md5(t.encode()).digest()[0] % 2 * 1.0 for t in texts]\n")
    result = torchrun("train_grpo.py", "--rewards", f"{tmp_path / 'coin.py'}:coin:1.0", "--seed", 100,
                      "--epochs", 1, "--out", tmp_path / "run")
    assert gain(result, "validation") < 0.1


def test_sft_learns(tmp_path):
    result = torchrun("train_sft.py", "--seed", 100, "--epochs", 1, "--out", tmp_path / "run")
    assert gain(result, "validation") > 0.2


def test_blank_pictures_are_not_answered(tmp_path):
    """A trained model that looks at its pictures knows nothing about white ones."""
    run("toy.py", "--data", tmp_path / "data", "--blank")
    result = run("evaluate.py", "--data", tmp_path / "data" / "validation.jsonl", "--settings",
                 "pass1_t0.6", "--out", tmp_path / "eval")
    assert result["pass1_t0.6"]["accuracy"] < 1 / 6 + 0.06
