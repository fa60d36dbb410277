"""When does RL beat SFT? The tables, verdicts and figure of that section, made of the raw files in results/."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
    assert when.rank_correlation(x, [3, 3, 3, 3], [0] * 4) is None
    assert when.rank_correlation(x, y, range(4)) is None  # groups of one


def test_between_models_the_last_evaluation_of_each_counts():
    def run(*lengths_and_shares):
        rows = [{"split": "test", "setting": when.USUAL, "length": n, "reflection_ratio": share}
                for n, share in lengths_and_shares]
        return SimpleNamespace(evals=[*rows, {**rows[-1], "setting": "pass8_t1", "length": 0},
                                      {**rows[-1], "split": "validation", "length": 0}])

    arms = {"GRPO": [run((99, 0), (20, 0.1)), run((0, 1), (30, 0.3))], "SFT, own": [run((1, 1), (40, 0.2))]}
    # ranks 1, 2, 3 and 1, 3, 2
    assert when.reflection_and_length(arms, "test") == pytest.approx(0.5)


def test_an_arm_without_trials_is_no_row(tmp_path):
    for name, reached in (("grpo_5e-6_10", 0.5), ("grpo_5e-6_11", 0.75), ("grpo_2e-5_10", 1), ("own_1e-5_10", 0.25)):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        result = {"validation_pass1_t0.6": {"after": {"accuracy": reached}}}
        (tmp_path / "sweep" / name / "result.json").write_text(json.dumps(result))
    assert when.sweep_table(tmp_path, when.ARMS) == [
        ["arm", "lowest rate", "second rate"], ["GRPO", "62.5 at 5e-6", "100.0 at 2e-5"], ["SFT, own", "25.0 at 1e-5"]]


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
            if label.startswith("SFT"):  # the older runs lack later flags, and have one that is no more
                both = run.args.keys() & usual.keys() - free
                assert len(both) > 20 and {k: run.args[k] for k in both} == {k: usual[k] for k in both}


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


def test_the_exploratory_runs_are_three_and_differ_in_epochs_and_rate():
    short = {run.args["seed"]: run.args for run in when.toys()["SFT, columns"]}
    assert [run.args["seed"] for run in when.longer()] == [0, 1, 2]
    for run in when.longer():
        other = short[run.args["seed"]]
        assert {key for key in other if other[key] != run.args[key]} == {"out", "epochs", "lr", "eval_every"}
        assert (run.args["epochs"], run.args["lr"]) == (30, 3e-4)


def sentences():
    """What the pages say of the toy beside the tables, with the numbers in it."""
    arms = when.toys()
    gap = {sft: f"{100 * found[when.USUAL][0]:.1f}" for (rl, sft), found in when.gaps(arms).items() if rl == "GRPO"}
    table = {row[0]: dict(zip(when.accuracy_table(arms)[0], row)) for row in when.accuracy_table(arms)}
    reach = {label: row["test, last, pass@8"].split()[0] for label, row in table.items()}
    built = {row[0]: row[1:] for row in when.habits_table()}
    counts = [json.loads((ROOT / f"results/provenance/own/{seed}/result.json").read_text())["right_rows"]
              for seed in range(5)]
    near, far = (when.percent(when.longer(), split, when.USUAL, "last") for split in ("validation", "test"))
    rows = built["SFT, columns"][2].split(", ")[1], built["base"][2].split(", ")[1]
    return {
        "gaps": f"{gap['SFT, own']} points above SFT on the base's own right answers, {gap['SFT, answers']} above SFT on "
                f"answers alone, {gap['SFT, columns']} and {gap['SFT, places']} above SFT on right but foreign reasoning",
        "below": f"{gap['SFT, habit'].removeprefix('-')} points below SFT on the base's own best habit",
        "damage": f"{built['SFT, columns'][-1]} % of its answers open in none of the base's habits, and row by row, when "
                  f"forced, is right in {rows[0]} % where the base was in {rows[1]}",
        "own": f"it reflects in {table['SFT, own']['reflect, %']} % of its answers",
        "reach": f"pass@8 is {reach['SFT, own']}, GRPO's {reach['GRPO']}",
        "longer": f"After ten times the epochs columns are right in {near} % of validation, and in {far} % of `test`",
        "tenth": f"where GRPO with a tenth of the epochs has {table['GRPO']['validation, last epoch'].split()[0]} and "
                 f"{table['GRPO']['test, last epoch'].split()[0]}",
        "kept": f"{min(counts)} to {max(counts)} of the 512 prompts",
        "answers": f"{built['SFT, answers'][-1]} % of the answers open in none",
    }


def readme_on_the_toy():
    """The README's sentence, where the differences have their intervals."""
    gap = {sft.removeprefix("SFT, "): found[when.USUAL] for (rl, sft), found in when.gaps(when.toys()).items() if rl == "GRPO"}
    value, replicates = gap.pop("habit")
    above = {arm: report.percent(difference) for arm, difference in gap.items()}
    return (f"the toy's GRPO is {report.percent((-value, -replicates))} points below SFT on the base's own best habit; but "
            f"{above['own']} above SFT on its own right answers, {above['answers']} on answers alone, {above['columns']} and "
            f"{above['places']} on right but foreign reasoning.")


def test_the_sentences_about_the_toy_are_made_of_the_raw_files():
    text = " ".join(RESULTS.split())
    said = sentences()
    for place, sentence in said.items():
        assert sentence in text, f"{place}: {sentence}"
    assert readme_on_the_toy() in " ".join(README.split())


# ---------------------------------------------------------------------------------------------
# A pretrained language model

PRETRAINED = ROOT / "results/pretrained/runs"


@pytest.mark.parametrize("made", [lambda: when.accuracy_table(when.pretrained()), lambda: when.verdict_table(when.pretrained()),
                                  lambda: when.forgetting_table(when.pretrained()),
                                  lambda: when.findings_table(when.pretrained()),
                                  lambda: when.sweep_table(PRETRAINED, when.ARMS)],
                         ids=["accuracy", "verdicts", "forgetting", "findings", "trials"])
def test_a_table_of_the_pretrained_model_is_made_of_the_raw_files(made):
    assert report.markdown_table(made()) in RESULTS


def test_the_pretrained_runs_are_what_the_rules_say():
    arms = when.pretrained()
    assert list(arms) == ["GRPO", "SFT, columns", "SFT, answers", "SFT, own"]
    usual = arms["SFT, columns"][0]
    for label, runs in arms.items():
        assert [run.args["seed"] for run in runs] == [0, 1, 2]
        for run in runs:
            asked = {"epochs": 2, "batch_size": 8, "dtype": "bfloat16", "model": usual.args["model"]}
            assert asked.items() <= run.args.items()
            assert len(run.evals) == 3 * 2 * 3 and {row["n"] for row in run.evals} == {96}
            if label.startswith("SFT"):
                free = {"out", "seed", "train_data", "lr"}
                assert {k: v for k, v in run.args.items() if k not in free} == {
                    k: v for k, v in usual.args.items() if k not in free}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_pretrained_run_of_a_seed_begins_at_one_start(seed):
    """Some were made after the start had been made again: before training the same answers are right, prompt for prompt."""
    first, *others = [[(row["split"], row["setting"], row["right"]) for row in runs[seed].evals if row["epoch"] == 0]
                      for runs in when.pretrained().values()]
    assert len(first) == 6 and len(others) >= 2 and all(other == first for other in others)


@pytest.mark.parametrize("arm", ["grpo", "columns", "answers", "own"])
def test_the_rate_of_a_pretrained_arm_is_what_its_trials_say(arm):
    found = subprocess.run([sys.executable, ROOT / "results/best_rate.py", PRETRAINED / "sweep", arm, "3"],
                           capture_output=True, text=True, check=True).stdout
    assert {run.args["lr"] for run in when.pretrained()[when.ARMS[arm]]} == {float(found)}


def sentences_of_the_pretrained():
    """What the pages say of the pretrained model beside the tables, with the numbers in it."""
    arms = when.pretrained()
    header, *rows = when.accuracy_table(arms)
    table = {row[0]: {name: cell.split()[0] for name, cell in zip(header[1:], row[1:])} for row in rows}
    gap = {sft: report.percent(found[when.USUAL]) for (rl, sft), found in when.gaps(arms).items() if rl == "GRPO"}
    gain = {label: [f"{100 * report.statistic(runs, split, when.USUAL, 'gain')[0]:.1f}" for split in ("validation", "test")]
            for label, runs in arms.items()}
    start = 100 * report.statistic(arms["GRPO"], "test", "pass8_t1", report.START)[0]
    columns, own, grpo = (table[label] for label in ("SFT, columns", "SFT, own", "GRPO"))
    header, _, *rows = when.forgetting_table(arms)
    shift = {row[0]: row[header.index("KL(model, start), nats an answer")] for row in rows}
    found = [when.moved(run.path) for runs in arms.values() for run in runs]
    right, text = ([f(run) for run in found] for f in (lambda run: run["knowledge"]["right"], lambda run: run["log_likelihood"]))
    lengths = [[json.loads(line)["length"] for line in (PRETRAINED / f"sweep/answers_{rate}_10/eval.jsonl").open()][-1]
               for rate in ("4e-5", "1.6e-4")]
    overall, within = when.shift_and_transfer(arms)
    models = [when.reflection_and_length(arms, split) for split in ("validation", "test")]
    kept = [json.loads((PRETRAINED / f"own/{seed}/result.json").read_text())["right_rows"] for seed in range(3)]
    arrives = [row[-1] for row in report.transfer_table({"longer": when.longer(), "GRPO": when.toys()["GRPO"]})
               if row[0] == when.USUAL]
    share = [100 * np.mean([run.reflection[step]["reflection_ratio"] for run in arms["GRPO"] for step in steps])
             for steps in (range(1, 6), range(7, 12), range(26, 31))]
    length = [np.mean([row["length"] for run in arms["GRPO"] for row in run.metrics[part]])
              for part in (slice(0, 5), slice(25, 30))]
    return {
        "gaps": f"{gap['SFT, own']} above SFT on own answers, {gap['SFT, answers']} on answers alone, "
                f"{gap['SFT, columns']} on foreign reasoning",
        "gains": f"GRPO gains {gain['GRPO'][0]} points on validation and {gain['GRPO'][1]} on `test`, columns "
                 f"{gain['SFT, columns'][0]} and {gain['SFT, columns'][1]}, own {gain['SFT, own'][0]} and {gain['SFT, own'][1]}",
        "arrives": f"{arrives[0].replace(']', '] %')} of what columns gained, {arrives[1]} of what GRPO did",
        "own": f"right in {own['test, last epoch']} % of `test` at T = 0.6 and reflects in {own['reflect, %']} %",
        "kept": f"{min(kept)} to {max(kept)} of the 120 prompts",
        "reach": f"pass@8 on `test` is {start:.1f} at the start, after own, columns, GRPO and answers "
                 + ", ".join(table[label]["test, last, pass@8"] for label in ("SFT, own", "SFT, columns", "GRPO", "SFT, answers")),
        "shift": f"Own has moved {shift['SFT, own']} nats an answer from the start, GRPO {shift['GRPO']}, and they end at "
                 f"{own['test, last epoch']} and {grpo['test, last epoch']} out of distribution; columns have moved "
                 f"{float(shift['SFT, columns']):.0f} and end at {columns['test, last epoch']}",
        "answers": f"the lowest, left the model where it was ({shift['SFT, answers']} nats an answer away)",
        "brief": f"answers of {lengths[0]:.0f} and {lengths[1]:.0f} tokens",
        "correlation": f"over all {len(found)} runs the rank correlation of shift with accuracy is {overall:.2f}, within arms "
                       f"{within:.2f}",
        "forgotten": f"{min(right)} to {max(right)} of 100 questions (the start: 77), and {min(text):.2f} to {max(text):.2f} nats a "
                     "token of the text (the start: -3.87)",
        "rise": f"length rises from {length[0]:.0f} tokens (the first five steps) to {length[1]:.0f} (the last five)",
        "fall": f"from {share[0]:.0f} to {share[1]:.0f} % of the answers (steps 7 to 11) and falls to {share[2]:.0f}",
        "models": f"{models[0]:.2f} on validation and {models[1]:.2f} on `test`",
    }


def test_the_sentences_about_the_pretrained_model_are_made_of_the_raw_files():
    text = " ".join(RESULTS.split())
    said = sentences_of_the_pretrained()
    for place, sentence in said.items():
        assert sentence in text, f"{place}: {sentence}"
    assert said["gaps"] in " ".join(README.split())
