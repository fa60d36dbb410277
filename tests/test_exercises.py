"""The ten exercises of LESSON.md: unsolved, each check fails; with its solution, in a copy, it passes."""

import os
import re
import shutil
import subprocess

import pytest

from runs import elsewhere, fork
from test_pages import LESSON, ROOT, section

FOLDER = ROOT / "tests" / "exercises"
NAMES = re.findall(r"^\d+\. \*\*.*?\*\* \(`(\w+)`\)", section("Exercises", LESSON), re.M)


def copy_tree(folder):
    """What a check needs of the tree, for real; the toy's weights and data as links."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "tests" / "exercises").mkdir(parents=True)
    for name in ("conftest", "runs"):  # the checks import them
        shutil.copy(ROOT / "tests" / f"{name}.py", folder / "tests")
    shutil.copy(FOLDER / "checks.py", folder / "tests" / "exercises")
    for name in ("toy_model", "toy_data"):
        os.symlink(ROOT / name, folder / name)


def apply(patch, folder):
    subprocess.run(["git", "apply", FOLDER / f"{patch}.patch"], cwd=folder, check=True)


def check(folder, *names):
    """Run checks as the lesson says; returns pytest's exit code and report."""
    words = ["pytest", "-q", "-p", "no:cacheprovider", "tests/exercises/checks.py", "-k", " or ".join(names)]
    (code,), out, err = fork(*words, act=elsewhere, folder=folder)
    return code, out + err


def changed_lines(patch):
    """Lines that a patch adds, and those that it takes away."""
    lines = (FOLDER / f"{patch}.patch").read_text().splitlines()
    return [sum(x.startswith(sign) and not x.startswith(sign * 3) for x in lines) for sign in "+-"]


def test_there_are_ten_with_a_check_and_a_solution_each():
    checks = re.findall(r"^def test_(\w+)\(", (FOLDER / "checks.py").read_text(), re.M)
    assert len(NAMES) == 10 and sorted(NAMES) == sorted(checks)
    assert {p.stem for p in FOLDER.glob("*.patch")} == {*NAMES, "silent_bug_planted", "ppo"}  # the last: test_ppo.py
    for name in NAMES:
        added, removed = changed_lines(name)
        assert 1 <= added <= 15 and removed <= 15, name


def test_unsolved_every_check_fails(tmp_path):
    copy_tree(tmp_path)
    apply("silent_bug_planted", tmp_path)
    code, report = check(tmp_path, *NAMES)
    assert code == 1 and f"{len(NAMES)} failed" in report and "passed" not in report.splitlines()[-1], report


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow if i % 3 or name == "short" else ()) for i, name in enumerate(NAMES)])
def test_solved_its_check_passes(name, tmp_path):
    copy_tree(tmp_path)
    if name == "silent_bug":
        apply("silent_bug_planted", tmp_path)
    apply(name, tmp_path)
    code, report = check(tmp_path, name)
    assert code == 0 and "1 passed" in report, report
