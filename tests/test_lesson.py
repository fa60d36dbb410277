"""The lesson: its reading order is the code's, the README's steps too; what the exercises show stands in results/."""

import ast
import json
import re
import subprocess

import pytest

import utils
from test_house import ROOT, source
from test_pages import LESSON, README, RESULTS, words

ORDER = re.findall(r"^\| (\d+) \| \[([\w/]+)\.py\]\(\S+\) \| (.*?) \|", LESSON, re.M)
STEPS = re.findall(r"^\d\. \*\*(Step [IV]+, [\w ]+|Log, evaluate, save)\.\*\*", README, re.M)


def spans(path):
    """First and last line of every function, class and constant of a file, by name."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno, node.end_lineno
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.lineno, node.end_lineno
    return found


def test_the_reading_order_takes_ninety_minutes():
    said = int(re.search(r"(\d+) minutes, at (\d+) lines a minute or fewer", LESSON)[1])
    assert sum(int(minutes) for minutes, _, _ in ORDER) == said <= 90


@pytest.mark.parametrize("minutes, file, names", ORDER, ids=[f"{m}-{f}" for m, f, _ in ORDER])
def test_the_lines_to_look_at_are_there_in_this_order(minutes, file, names):
    found = spans(ROOT / f"{file}.py")
    looked_at = [found[name] for name in re.findall(r"`(\w+)`", names)]
    assert looked_at == sorted(looked_at) and len(looked_at) >= 3
    rate = int(re.search(r"at (\d+) lines a minute or fewer", LESSON)[1])
    assert sum(last - first + 1 for first, last in looked_at) <= rate * int(minutes)


@pytest.mark.parametrize("trainer, count", [("train_sft", 4), ("train_grpo", 5)])
def test_the_steps_of_the_readme_are_the_banners_and_the_comments_of_main(trainer, count):
    wanted = [step.replace(", ", ": ") if step[:4] == "Step" else step for step in STEPS]
    assert len(wanted) == 5
    shape = r"# (Step [IV]+: [\w ]+|Log, evaluate, save)"
    banners = re.findall(rf"^# -+\n{shape}", source(trainer), re.M)
    assert banners == wanted[:count]
    main = source(trainer).split("\ndef main(")[1]
    assert re.findall(rf"^ +{shape}", main, re.M) == wanted


def test_the_two_trainers_share_their_shape():
    """A name that both have is written alike, so that what `diff` shows differs for a reason."""
    sft, grpo = source("train_sft"), source("train_grpo")
    bodies = [re.search(r"^def epoch_batches\(.*?(?=\n\n\n)", text, re.M | re.S)[0] for text in (sft, grpo)]
    assert bodies[0] == bodies[1]
    shared = set(spans(ROOT / "train_sft.py")) & set(spans(ROOT / "train_grpo.py"))
    assert {"Args", "update", "main"} <= shared
    own = set(spans(ROOT / "train_sft.py")) - shared
    assert {"with_golden_responses", "learning_rate_at"} <= own


def test_the_diff_is_as_long_as_the_lesson_says():
    """Lines that come in and that go, within a sixth."""
    found = subprocess.run(["diff", "train_sft.py", "train_grpo.py"], cwd=ROOT, capture_output=True, text=True).stdout
    said = re.search(r"\(some (\d+) lines come in, (\d+) go\)", LESSON).groups()
    for sign, lines in zip("><", said):
        count = sum(line.startswith(f"{sign} ") for line in found.splitlines())
        assert abs(count - int(lines)) <= count / 6, (sign, count)


def test_the_first_ten_lines_stand_in_results():
    top = README.split("## ")[0].split("\n", 1)[1]
    lines = [line for line in top.splitlines() if line.strip()]
    assert len(lines) <= 10
    text = words(top)
    step = json.loads((ROOT / "results" / "step.json").read_text())["step"]
    times = [step[name]["contestants"]["TRL"]["ours_times_faster"] for name in ("short", "long")]
    assert f"{times[0]:.1f} times faster, with long prompts {times[1]:.1f} times" in text
    peers = json.loads((ROOT / "results" / "peers.json").read_text())
    code = {name: found["closure"][2] for name, found in peers.items()}
    assert f"is {code['glassbox']:,} lines of code, there {code['EasyR1']:,}, in TRL {code['trl']:,}" in text
    assert f"code ({code['MAYE']:,} lines, fewer than ours): we have {peers['glassbox']['tests']} test functions, it has none" in text
    assert peers["MAYE"]["tests"] == 0


def test_what_the_exercises_show_stands_in_results():
    found = json.loads((ROOT / "results" / "exercises.json").read_text())
    text = words(LESSON)
    for weight, seeds in found["short, by weight and seed"].items():
        lengths = ", ".join(f"{s['length']:.1f}" for s in seeds)
        accuracy = ", ".join(f"{100 * s['reward/accuracy']:.0f}" for s in seeds)
        assert f"| {weight} | {lengths} | {accuracy} |\n" in LESSON
    habits = re.search(r"\| toy_model \| \d+, (\d+) \| \d+, \d+ \| \d+, (\d+)", RESULTS)  # accuracy, forced
    glance, reading = (int(percent) / 100 for percent in habits.groups())
    tokens = re.search(r"a glance takes (\d+) tokens, a reading (\d+)", text)
    gap = int(tokens[2]) - int(tokens[1])
    assert f"Arithmetic says {96 * (reading - glance) / gap:.1f};" in text  # weight * gap / 96 = what care earns

    def three(values, digits):
        return "{}, {} and {}".format(*(f"{value:.{digits}f}" for value in values))

    bug = found["silent_bug_planted, by seed"]
    usual = []
    for seed in (0, 1, 2):
        rows = utils.read_jsonl(ROOT / "results" / "quickstart" / f"seed_{seed}" / "metrics.jsonl")[-8:]
        usual.append(100 * sum(row["groups_all_alike"] for row in rows) / 8)
    alike = three([100 * run["groups_all_alike"] for run in bug], 0)
    assert f"ends at {three([run['validation'][1] for run in bug], 1)} %, as without it; but {alike} %" in text
    assert f"the quick start has {three(usual, 0)}." in text
    grpo, sft = (three([run["validation"][1] for run in found["first_row, by trainer and seed"][name]], 1)
                 for name in ("train_grpo", "train_sft"))
    common = found["first_row, the commonest answer"]
    assert f"GRPO ends at {grpo} % on validation, where always saying the commonest number gets {common} %" in text
    assert f"SFT ends at {sft} %" in text
    first, last = zip(*(run["validation"] for run in found["first_row, by trainer and seed"]["train_grpo"]))
    one, two, third = sorted(value - common for value in last)
    assert 0 < one < two < 5 and f"RL began at {min(first):.0f} to {max(first):.0f} %;" in text
    assert f"two seeds end less than 5 points above that guess, the third {third:.0f}." in text
