"""When does RL beat SFT? The tables, verdicts and figure of that section, made again from the raw files in results/."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "results")]

import report
import when
from test_pages import same_picture

README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "results/README.md"))
NEW = ("columns", "places", "answers", "own")  # the arms that were run for this section


# ---------------------------------------------------------------------------------------------
# The numbers, by hand


@pytest.mark.parametrize("low, high, said", [(0.01, 0.2, "RL wins"), (-0.2, -0.01, "SFT wins"), (-0.1, 0.1, "undecided"),
                                             (0.0, 0.2, "undecided")])
def test_a_verdict_is_of_the_interval_not_of_the_mean(low, high, said):
    assert when.verdict((5.0, np.array([low] * 50 + [high] * 50))) == said


def test_ranks_are_correlated_not_sizes():
    assert when.rank_correlation([1, 2, 3, 1000], [5, 6, 7, 8], [0] * 4) == pytest.approx(1)
    assert when.rank_correlation([1, 2, 3, 4], [9, 3, 2, 1], [0] * 4) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 * 5)
    assert when.rank_correlation([1, 2, 2, 3], [1, 3, 2, 4], [0] * 4) == pytest.approx(4.5 / 22.5**0.5)


def test_within_groups_a_difference_between_groups_does_not_count():
    x, y = [1, 2, 11, 12], [2, 1, 12, 11]
    assert when.rank_correlation(x, y, [0] * 4) == pytest.approx(0.6)
    assert when.rank_correlation(x, y, [0, 0, 1, 1]) == pytest.approx(-1)


# ---------------------------------------------------------------------------------------------
# The toy, by where the golden reasoning comes from


@pytest.mark.parametrize("made", [lambda: when.accuracy_table(when.toys()), lambda: when.verdict_table(when.toys()),
                                  when.habits_table, lambda: when.sweep_table(ROOT / "results/provenance", NEW)],
                         ids=["accuracy", "verdicts", "habits", "trials"])
def test_a_table_of_the_toy_is_made_of_the_raw_files(made):
    assert report.markdown_table(made()) in RESULTS


def test_the_arms_differ_in_what_the_rules_say_alone():
    arms = when.toys()
    assert list(arms) == list(when.ARMS.values())
    free = {"out", "seed", "train_data", "validation_data", "test_data", "lr", "script"}
    usual = arms["SFT, habit"][0].args
    for label, runs in arms.items():
        assert [run.args["seed"] for run in runs] == [0, 1, 2, 3, 4]
        for run in runs:
            assert len(run.evals) == 4 * 2 * 3 and {row["n"] for row in run.evals} == {512}
            if label.startswith("SFT"):  # flags that came later are as they are by default
                assert {k: run.args[k] for k in usual if k not in free} == {k: v for k, v in usual.items() if k not in free}


@pytest.mark.parametrize("arm", NEW)
def test_the_rate_of_an_arm_is_what_its_trials_say(arm):
    found = subprocess.run([sys.executable, ROOT / "results/best_rate.py", ROOT / "results/provenance/sweep", arm, "8"],
                           capture_output=True, text=True, check=True).stdout
    [rate] = {run.args["lr"] for run in when.toys()[when.ARMS[arm]]}
    assert rate == float(found)


def test_own_is_what_the_base_got_right():
    for seed in range(5):
        result = json.loads((ROOT / f"results/provenance/own/{seed}/result.json").read_text())
        assert result["prompts"] == 512 and result["right_prompts"] == result["right_rows"] <= 512


def test_the_figure_is_drawn_of_the_raw_files(tmp_path):
    when.draw(when.shown(), tmp_path / "when.png")
    assert same_picture(tmp_path / "when.png", ROOT / "results" / "when.png")
