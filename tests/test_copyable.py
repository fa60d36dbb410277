"""Copying is proven: stages in an empty folder, with what the README says they need, do their work there."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import toy
import utils
from test_house import ROOT, STAGES, section, source

# as scripts they need, beside utils.py, what they import inside their functions
SECTION = section("Copying a stage")
NEEDS = dict(re.findall(r"^\| `(\w+)\.py` \| (.+?) \|", SECTION, re.M))
LITTLE = "--engine hf --max_new_tokens 48".split()


def imported(stage):
    """The stages that a stage imports anywhere, and those that these do."""
    names = {n.module for n in ast.walk(ast.parse(source(stage))) if isinstance(n, ast.ImportFrom)}
    found = {name for name in names & set(STAGES) if name != "utils"}
    return found.union(*map(imported, found - {"toy"}))  # toy draws its own data, where asked for it


def copy(folder, *stages):
    folder.mkdir()
    for stage in stages:
        shutil.copy(ROOT / f"{stage}.py", folder)
    return folder


def python(folder, *words, code=0):
    """Run python in a folder that nothing but the copies can be imported from."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Somebody else's project: a checkpoint and data of its own, eight rows a split."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(ROOT / "toy_model", folder / "their_model")
    toy.write_data(folder / "data")
    for path in (folder / "data").glob("*.jsonl"):
        utils.write_jsonl(path, utils.read_jsonl(path)[:8])
    return folder


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in ("utils", "toy")])
def test_the_readme_says_what_a_stage_needs(stage):
    said = set(re.findall(r"`(\w+)\.py`", NEEDS[stage]))
    assert said == imported(stage) | {"utils"}


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "utils"])
def test_with_its_first_imports_alone_it_can_be_asked_for_help(stage, tmp_path):
    """With what it imports at import time, which is utils alone but for the report."""
    first = {n.module for n in ast.parse(source(stage)).body if isinstance(n, ast.ImportFrom)} & set(STAGES)
    assert first <= ({"utils", "evaluate"} if stage == "report" else {"utils"})
    folder = copy(tmp_path / "project", stage, *first | {"utils"})
    assert len(python(folder, f"{stage}.py", "--help")) > 300


def test_the_readmes_snippet_runs_with_utils_alone(tmp_path):
    """The copied advantages, loss and grader, as the README calls them."""
    snippet, = re.findall(r"```python\n(.*?)```", SECTION, re.S)
    folder = copy(tmp_path / "project", "train_grpo", "reward", "utils")
    (folder / "theirs.py").write_text(snippet)
    loss, verdict = python(folder, "theirs.py").split()
    # 2 right of 4: (r - 1/2) / 0.57735 = +-0.86603, less a hair for the 1e-4; each row 3 tokens; their sum is 0
    assert abs(float(loss)) < 1e-6 and verdict == "1.0"


def test_the_grader_needs_nothing_at_all(tmp_path):
    folder = copy(tmp_path / "project", "reward")
    assert json.loads(python(folder, "reward.py", "\\frac{1}{2}", "0.5").splitlines()[-1])["equal"]


@pytest.mark.parametrize("stage, words, files", [
    ("rollout", ["--n", 2, *LITTLE], ["samples/step_000000.jsonl"]),
    ("evaluate", ["--settings", "pass1_t0.6", *LITTLE], ["eval.jsonl", "samples/pass1_t0.6.jsonl"])])
def test_the_copied_sampler_and_evaluation_run(stage, words, files, foreign, tmp_path):
    folder = copy(tmp_path / "project", stage, *imported(stage), "utils")
    data = foreign / "data" / "toy_validation.jsonl"
    result = json.loads(python(folder, f"{stage}.py", "--model", foreign / "their_model", "--data", data,
                               "--out", "run", *words))
    assert result.get("prompts", 8) == 8
    for name in files:
        assert utils.read_jsonl(folder / "run" / name)


@pytest.mark.parametrize("stage, words", [
    ("train_sft", ["--batch_size", 4]),
    ("train_grpo", ["--batch_size", 4, "--mini_batch_size", 4, "--group_size", 2])])
def test_the_copied_trainers_train_two_steps(stage, words, foreign, tmp_path):
    """And the copied report reads what they wrote."""
    folder = copy(tmp_path / "project", stage, *imported(stage), "report", "utils")
    splits = [w for name in ("train", "validation", "test")
              for w in (f"--{name}_data", foreign / "data" / f"toy_{name}.jsonl")]
    more = ["--max_new_tokens", 64, "--max_steps", 2, "--engine", "hf"]
    python(folder, f"{stage}.py", "--model", foreign / "their_model", *splits, *words, *more, "--out", "run")
    assert [row["generation_step"] for row in utils.read_jsonl(folder / "run" / "metrics.jsonl")] == [1, 2]
    trained = utils.load_model(folder / "run" / "checkpoints" / "step_000002")
    before = utils.load_model(foreign / "their_model")
    assert any((a != b).any() for a, b in zip(trained.parameters(), before.parameters()))
    assert json.loads(python(folder, "report.py", "run", "--out", "report"))["runs"] == 1
