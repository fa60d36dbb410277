"""Copying is proven: stages in an empty folder, with what LESSON.md says they need, do their work there."""

import ast
import json
import re
import shutil

import pytest

import policy
import utils
from runs import elsewhere, fork
from test_house import ROOT, source, STAGES
from test_pages import LESSON, section

SECTION = section("Copying a stage", LESSON)
NEEDS = {stage: re.findall(r"`(\w+)\.py`", files)
         for stage, files in re.findall(r"^\| `(\w+)\.py` \| (.+?) \|", SECTION, re.M)}
PURE = "answers", "evaluate", "signs", "train_grpo"  # their pure functions work beside utils.py alone
LITTLE = "--engine hf --max_new_tokens 48".split()


def imported(stage, main=True):
    """The files of ours that a stage imports, and those that these import outside their `main`.

    siblings.py is not needed, benchmarks.py for benchmarks alone, and toy.py nobody imports.
    """
    tree = ast.parse(source(stage))
    tree.body = [node for node in tree.body if main or getattr(node, "name", "") != "main"]
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found = (names & set(STAGES)) - {"siblings", "benchmarks"}
    return found.union(*(imported(name, False) for name in found))


def copy(folder, *stages):
    folder.mkdir()
    for stage in stages:
        shutil.copy(ROOT / f"{stage}.py", folder)
    return folder


def python(folder, *words, code=0):
    """Run a script in a folder that nothing but the copies can be imported from."""
    codes, out, err = fork(*words, act=elsewhere, folder=folder)
    assert codes == [code], err
    return out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Somebody else's project: a checkpoint and data of its own, eight rows a split."""
    folder = tmp_path_factory.mktemp("foreign")
    shutil.copytree(ROOT / "toy_model", folder / "their_model")
    shutil.copytree(ROOT / "toy_data", folder / "data")
    for path in (folder / "data").glob("*.jsonl"):
        utils.write_jsonl(path, utils.read_jsonl(path)[:8])
    return folder


def test_every_stage_has_a_row():
    assert sorted(NEEDS) == sorted(set(STAGES) - {"utils", "toy"})


@pytest.mark.parametrize("stage", NEEDS)
def test_the_lesson_says_what_a_stage_needs(stage):
    assert sorted(NEEDS[stage]) == sorted(imported(stage) - {stage})


def test_with_what_it_needs_it_can_be_imported_and_asked_for_help(tmp_path):
    """The pure ones beside utils.py alone, each in a folder of its own."""
    folders = [copy(tmp_path / stage, stage, *(["utils"] if stage in PURE else NEEDS[stage])) for stage in NEEDS]
    said = "".join(python(folder, f"{folder.name}.py", "--help") for folder in folders)
    # no commands: pictures, sources, signs, policy, decode, siblings, answers, scoring, benchmarks; reward.py has its own way
    assert said.count("usage: ") == len(NEEDS) - 10


def test_the_snippet_runs_with_utils_alone(tmp_path):
    """The copied advantages, loss and grader, as the lesson calls them."""
    snippet, = re.findall(r"```python\n(.*?)```", SECTION, re.S)
    folder = copy(tmp_path / "project", "train_grpo", "reward", *NEEDS["reward"], "utils")
    (folder / "theirs.py").write_text(snippet)
    loss, verdict = python(folder, "theirs.py").split()
    # 2 right of 4: (r - 1/2) / 0.57735 = +-0.86603, less a hair for the 1e-4; each row 3 tokens; their sum is 0
    assert abs(float(loss)) < 1e-6 and verdict == "1.0"


def test_the_grader_needs_what_reads_answers_and_nothing_else(tmp_path):
    folder = copy(tmp_path / "project", "reward", "answers")
    assert json.loads(python(folder, "reward.py", "\\frac{1}{2}", "0.5").splitlines()[-1])["equal"]


@pytest.mark.parametrize("stage, words, files", [
    ("rollout", ["--n", 2, *LITTLE], ["samples/step_000000.jsonl"]),
    ("evaluate", ["--settings", "pass1_t0.6", *LITTLE], ["eval.jsonl", "samples/pass1_t0.6.jsonl"])])
def test_the_copied_sampler_and_evaluation_run(stage, words, files, foreign, tmp_path):
    folder = copy(tmp_path / "project", stage, *NEEDS[stage])
    data = foreign / "data" / "validation.jsonl"
    result = json.loads(python(folder, f"{stage}.py", "--model", foreign / "their_model", "--data", data,
                               "--out", "run", *words))
    assert result.get("prompts", 8) == 8
    for name in files:
        assert utils.read_jsonl(folder / "run" / name)


def test_the_copied_look_at_data_runs(foreign, tmp_path):
    folder = copy(tmp_path / "project", "data", *NEEDS["data"])
    python(folder, "data.py", foreign / "data" / "train.jsonl", "--model", foreign / "their_model")


@pytest.mark.parametrize("stage, words", [
    ("train_sft", ["--batch_size", 4]),
    ("train_grpo", ["--batch_size", 4, "--mini_batch_size", 4, "--group_size", 2, "--plain"])])
def test_the_copied_trainers_train_two_steps(stage, words, foreign, tmp_path):
    """Without siblings.py, as with --plain; the copied report reads what they wrote, in a folder of its own."""
    folder = copy(tmp_path / "project", stage, *NEEDS[stage])
    splits = [w for name in ("train", "validation", "test")
              for w in (f"--{name}_data", foreign / "data" / f"{name}.jsonl")]
    more = ["--max_new_tokens", 64, "--max_steps", 2, "--engine", "hf"]
    python(folder, f"{stage}.py", "--model", foreign / "their_model", *splits, *words, *more, "--out", "run")
    assert [row["generation_step"] for row in utils.read_jsonl(folder / "run" / "metrics.jsonl")] == [1, 2]
    trained = policy.load_model(folder / "run" / "checkpoints" / "step_000002")
    before = policy.load_model(foreign / "their_model")
    assert any((a != b).any() for a, b in zip(trained.parameters(), before.parameters()))
    reader = copy(tmp_path / "reader", "report", *NEEDS["report"])
    assert json.loads(python(reader, "report.py", folder / "run", "--out", "report"))["runs"] == 1
