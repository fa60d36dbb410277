"""The tables of the experiments in results/README.md, made again from the raw logs in results/experiment.

`python tests/test_results.py` prints them, for the page to hold.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import report
import toy
from test_pages import same_picture

FOLDER = ROOT / "results" / "experiment"
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "results/README.md"))
SHORT = "pass1_t0.6"


def arms_of(*parts):
    """The arms of the runs below results/experiment, in the report's own order."""
    runs = [report.read_run(path, False) for path in report.find_runs([FOLDER / part for part in parts])]
    return report.in_arms(runs)


def published(name, title):
    """A table of the report that was published with the runs."""
    return json.loads((FOLDER / "report" / name / "report.json").read_text())[title]


def cell(runs, split, name):
    return report.percent(report.statistic(runs, split, SHORT, name))


def accuracy_table():
    """Every split and setting of the comparison, as the report has it."""
    return report.accuracy_table(arms_of("main"))


def sweep_table():
    """Validation after the last epoch by learning rate, mean of the two tuning seeds."""
    rows = []
    for arm, runs in arms_of("sweep").items():
        kind, _, rate = arm.partition(" --lr ")
        assert [run.args["seed"] for run in runs] == [10, 11]
        last = mean(report.scores(run, "validation", SHORT)[1][-1] for run in runs)
        rows.append((kind, float(rate), f"{100 * last:.1f}"))
    kinds = sorted({kind for kind, _, _ in rows})
    return [["arm", *(f"{i} rate" for i in ("lowest", "second", "third", "highest"))]] + [
        [kind, *(f"{accuracy} at {rate:.0e}".replace("e-0", "e-") for _, rate, accuracy in sorted(
            row for row in rows if row[0] == kind))] for kind in kinds]


def without_table():
    """The same arms from a base that was never shown a reflection."""
    rows = [["arm", "validation, untrained", "last epoch", "test, untrained", "last epoch"]]
    for label, runs in arms_of("without").items():
        rows.append([label, *(cell(runs, split, name) for split in ("validation", "test")
                              for name in (report.START, "last"))])
    return rows


def ablation_table():
    """One thing changed at a time; accuracy after the last epoch, and where length and reflection ended."""
    rows = [["GRPO, but", "validation", "test", "tokens an answer", "reflect, %", "seconds of training"]]
    for label, runs in arms_of("ablation", *(f"main/grpo_{seed}" for seed in (0, 1, 2))).items():
        assert [run.args["seed"] for run in runs] == [0, 1, 2]
        last = [[r for r in run.evals if (r["split"], r["setting"]) == ("validation", SHORT)][-1] for run in runs]
        spent = mean(sum(v for m in run.metrics for k, v in m.items() if k.startswith("seconds_")) for run in runs)
        rows.append([label, cell(runs, "validation", "last"), cell(runs, "test", "last"),
                     f"{mean(r['length'] for r in last):.1f}",
                     f"{100 * mean(r['reflection_ratio'] for r in last):.1f}", f"{spent:.0f}"])
    return rows


def damage_table():
    """Accuracy on validation pictures as they are and damaged, in %, mean of three seeds (the base: one)."""
    kinds = ("none", "blank", "noise", "rotate", "swap")
    rows = [["model", *(kind.replace("none", "as they are") for kind in kinds)]]
    for name in ("toy_model", "sft", "grpo", "reinforce"):
        found = {kind: [json.loads(p.read_text())[SHORT]["accuracy"]
                        for p in sorted(FOLDER.glob(f"damaged/{name}*_{kind}/result.json"))] for kind in kinds}
        assert {len(values) for values in found.values()} == {1 if name == "toy_model" else 3}
        rows.append([name, *(f"{100 * mean(values):.1f}" for values in found.values())])
    return rows


def habits(name, split):
    """Mean over seeds of what `toy.py --habits` measured: `{opening: (share, forced accuracy)}`, accuracy."""
    tables = [json.loads(p.read_text())[split] for p in sorted(FOLDER.glob(f"habits/{name}*.json"))]
    assert len(tables) == (1 if name == "toy_model" else 5)
    each = {opening: tuple(mean(t[opening][key] for t in tables) for key in ("share", "forced"))
            for opening in toy.HABITS}
    return each, mean(t["accuracy"] for t in tables)


def habits_table():
    """Share of each habit at T = 1 on validation, and accuracy when it is forced, in %; then the gain's parts."""
    rows = [["model", *toy.HABITS, "accuracy", "gain", "by choosing"]]
    base, start = habits("toy_model", "validation")
    for name in ("toy_model", "sft", "grpo", "reinforce"):
        each, accuracy = habits(name, "validation")
        # had each habit stayed as good as it was in the base
        chosen = sum((share - base[opening][0]) * base[opening][1] for opening, (share, _) in each.items())
        gains = [f"{100 * gain:.1f}" for gain in (accuracy - start, chosen)] if name != "toy_model" else [None] * 2
        rows.append([name, *(f"{100 * share:.0f}, {100 * forced:.0f}" for share, forced in each.values()),
                     f"{100 * accuracy:.1f}", *gains])
    return rows


def cost_table():
    found = published("main", "Cost")
    return [list(found[0]), *(list(row.values()) for row in found)]


def findings_table(name):
    found = published(name, "The paper's findings")
    return [list(found[0]), *(list(row.values()) for row in found)]


def sentences():
    """What results/README.md says beside its tables, with the numbers in it, by the place where it says it."""
    arms, built_in = arms_of("main"), habits_table()
    found = {(row["finding"], row["arm"]): row["effect"] for row in published("main", "The paper's findings")}
    gap = {label: found["1. RL generalises better than SFT: test, mean of epochs", f"{label} - SFT, {SHORT}"]
           for label in ("GRPO", "REINFORCE++")}
    r = {how: found[f"3. Reflection goes with length, between {how}", "GRPO"]
         for how in ("steps of a run", "answers of a step", "answers of a step that open alike")}
    lengths = {label: [mean(report.by_epoch(run, "length")[3]) for run in runs] for label, runs in arms.items()}
    second = sorted((mean(report.by_epoch(run, "length")[2]), 100 * mean(report.by_epoch(run, "reflection_ratio")[2]))
                    for run in arms["REINFORCE++"])
    others = [share for _, share in second[:-1]]
    reach = [row for row in accuracy_table() if row[:3] == ["test", "pass8_t1", "GRPO"]][0]
    gained = {row[0]: (row[-2], row[-1]) for row in built_in[1:]}
    base, start = habits("toy_model", "validation")
    forced = sum(share * accuracy for share, accuracy in base.values())
    few = found["3. Reflection goes with length, between answers of a step that open alike", "REINFORCE++"]
    without = {row[0]: row for row in without_table()[1:]}
    apart = {(row[0], row[2]): row[3] for row in report.difference_table(arms_of("without"))[1:] if row[1] == SHORT}
    quick = [json.loads((ROOT / "results" / "quickstart" / f"seed_{s}" / "result.json").read_text())
             ["test_pass1_t0.6"]["after"]["accuracy"] for s in (0, 1, 2)]
    drops = [100 * (report.statistic(arms[label], "test", SHORT, "last")[0]
                    - report.statistic(arms_of("without")[label], "test", SHORT, "last")[0])
             for label in ("GRPO", "REINFORCE++", "SFT")]
    return {
        "rl": f"GRPO minus SFT out of distribution is {gap['GRPO']}, REINFORCE++ minus SFT {gap['REINFORCE++']} "
              f"(T = 0.6, mean of epochs)",
        "reach": f"GRPO's pass@8 out of distribution falls from {reach[4]} untrained to {reach[7]}",
        "quick": f"the quick start's half as large learning rate ends at {100 * mean(quick):.1f} on test",
        "length": f"{min(lengths['GRPO']):.1f} to {max(lengths['GRPO']):.1f} tokens over the five seeds of GRPO, "
                  f"{min(lengths['REINFORCE++']):.1f} to {max(lengths['REINFORCE++']):.1f} of REINFORCE++",
        "route": f"in epoch 2 one of them wrote {second[-1][0]:.1f} tokens and reflected in {second[-1][1]:.0f} % of its "
                 f"answers, where the other four wrote {second[0][0]:.1f} to {second[-2][0]:.1f} and reflected in "
                 f"{min(others):.0f} to {max(others):.0f} %",
        "within": f"Between the answers of one step {r['answers of a step']}; among those that open alike "
                  f"{r['answers of a step that open alike']}; from step to step of a run {r['steps of a run']}",
        "few": f"among answers that open alike rests on {few.rpartition(' ')[2]} answers only",
        "forced": f"its forced accuracies make {100 * forced:.1f}, not the {100 * start:.1f} that gains are counted from",
        "choosing": f"{gained['grpo'][1]} of GRPO's {gained['grpo'][0]} points, {gained['reinforce'][1]} of "
                    f"REINFORCE++'s {gained['reinforce'][0]} and {gained['sft'][1]} of SFT's {gained['sft'][0]}",
        "without": f"GRPO ends at {without['GRPO'][4]} on test and SFT at {without['SFT'][4]}; the difference, mean of "
                   f"epochs, is {apart['test', 'GRPO - SFT']}",
        "bases": "by {:.1f}, {:.1f} and {:.1f} points".format(*drops),
    }


TABLES = [accuracy_table, sweep_table, without_table, ablation_table, damage_table, habits_table, cost_table,
          lambda: findings_table("main")]


@pytest.mark.parametrize("made", TABLES, ids=lambda made: made.__name__)
def test_a_table_is_made_of_the_raw_files(made):
    assert report.markdown_table(made()) in RESULTS


def test_the_sentences_are_made_of_the_raw_files():
    text = " ".join(RESULTS.split())
    said = sentences()
    for place, sentence in said.items():
        assert sentence in text, place
    # and the README's ten lines of them
    short = " ".join(README.split())
    less = re.search(r"SFT out of distribution is -([\d.]+)", said["rl"])[1]
    assert f"GRPO is {less} points below SFT, mean of epochs" in short
    half = re.search(r"ends at ([\d.]+) on test", said["quick"])[1]
    sft = [row for row in accuracy_table() if row[:3] == ["test", SHORT, "SFT"]][0][-1].split()[0]
    assert f"at half its rate, the default, it ends at {half} in other runs, SFT at {sft})" in short
    third = int(re.search(r"(\d+) % of its answers", said["route"])[1])
    assert "reflected in a third of them" in short and abs(third - 100 / 3) < 2


def test_the_readmes_figure_is_what_the_report_draws(tmp_path):
    """By the command beside it, which needs nothing but what is kept in results/."""
    arms = arms_of("main")
    (tmp_path / "accuracy.png").write_bytes(report.draw(list(report.accuracy_panels(arms)), arms))
    assert same_picture(tmp_path / "accuracy.png", FOLDER / "report" / "main" / "accuracy.png")
    assert "(results/experiment/report/main/accuracy.png)\n\n`python report.py results/experiment/main` draws" in README


@pytest.mark.parametrize("name, parts", [("main", ["main"]), ("without", ["without"]), ("sweep", ["sweep"]),
                                         ("ablation", ["ablation", "main/grpo_0", "main/grpo_1", "main/grpo_2"])])
def test_the_published_reports_are_made_of_the_raw_files(name, parts):
    """All of their accuracies, differences and lengths; what needs the completions is not kept here."""
    arms = arms_of(*parts)
    for title, make in (("Accuracy", report.accuracy_table), ("RL against SFT", report.difference_table),
                        ("Out of distribution", report.transfer_table), ("Cost", report.cost_table)):
        rows = make(arms)
        if len(rows) > 1:
            assert [list(row.values()) for row in published(name, title)] == rows[1:], title
    signs = report.diagnostics(arms, report.findings(arms))[1:]
    assert signs == [list(r.values()) for r in published(name, "Failure signatures") if r["sign"][:10] != "reflection"]
    lengths = [row for row in report.findings(arms)[1:] if row[0][0] in "12"]
    assert [list(r.values()) for r in published(name, "The paper's findings") if r["finding"][0] in "12"] == lengths


def test_the_comparison_is_what_the_page_says():
    """Five seeds an arm, the same prompts, as many epochs, every setting after each."""
    arms = arms_of("main")
    assert sorted(arms) == ["GRPO", "REINFORCE++", "SFT"]
    for runs in arms.values():
        assert [run.args["seed"] for run in runs] == [0, 1, 2, 3, 4]
        for run in runs:
            assert run.args["epochs"] == 3 and re.search(r"data/(toy_)?train\.jsonl$", run.args["train_data"])
            points = {(r["epoch"], r["split"], r["setting"]) for r in run.evals}
            assert len(points) == len(run.evals) == 4 * 2 * 3
            assert json.loads((run.path / "result.json").read_text())["minutes"] <= 4


if __name__ == "__main__":
    for made in TABLES:
        print(f"{made.__doc__ or made.__name__}\n\n{report.markdown_table(made())}\n")
