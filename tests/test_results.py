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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "results")]

import torch

import bench
import cost
import report
import toy
from siblings import FLASH
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


# ---------------------------------------------------------------------------------------------
# The cost of RL and of SFT: results/cost.py


COST = json.loads((ROOT / "results" / "cost.json").read_text())
MEASURED, EXTENDED = COST[:2], COST[2:]


def compact(number):
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def both_arms(of):
    """What GRPO and what SFT take, of operations or of seconds by part."""
    return of["picture"] + of["rollout"] + of["update"], of["picture"] + of["SFT's update"]


def times(of):
    grpo, sft = both_arms(of)
    return grpo / sft


def operations_table():
    """10^9 operations a query by part; times what SFT takes, layers recomputed, and layers kept."""
    rows = [["model", "P", "C", "tokens, GRPO", "SFT", "picture", "rollout", "GRPO's update",
             "SFT's update", "GRPO : SFT", "with layers kept"]]
    for row in COST:
        P, C, parts = row["prompt"], row["answer"], row["formula"]
        rows.append([row["model"], *(f"{n:,}" for n in (P, C, P + 8 * C, P + C)),
                     *(compact(n / 1e9) for n in parts.values()),
                     f"{times(parts):.1f}" if row in EXTENDED else "",
                     f"{times(row.get('layers kept', parts)):.1f}"])
    return rows


def measured_table():
    """CPU seconds a query, and the most bytes that a step adds to weights and AdamW's state."""
    rows = [["model", "picture, s", "rollout, s", "GRPO's update, s", "SFT's update, s", "GRPO : SFT",
             "of operations", "rollout, MB", "GRPO's update, MB", "SFT's update, MB",
             "tokens a pass, GRPO", "SFT"]]
    for row in MEASURED:
        P, C, most = row["prompt"], row["answer"], row["tokens a pass"]
        passes = [min(row["queries"], most // tokens) * tokens for tokens in (P + 8 * C, P + C)]
        rows.append([row["model"], *(f"{s:.3f}" for s in row["CPU seconds"].values()),
                     f"{times(row['CPU seconds']):.1f}", f"{times(row['counted']):.1f}",
                     *(f"{b / 1e6:,.0f}" for b in [*row["peak bytes"].values()][1:]),
                     *(f"{tokens:,}" for tokens in passes)])
    return rows


def sampler_table():
    """GB of a trainer, for either, and of a sampler; a rollout's operations for a byte it must read."""
    rows = [["model", "P", "C", "weights, gradients, AdamW, GB", "sampler's weights, GB",
             "its caches, GB", "read a query, GB", "operations a byte"]]
    for row in EXTENDED:
        trainer = 16 * row["trained"] + 2 * (row["weights"] - row["trained"])
        held = (trainer, 2 * row["weights"], row["sampler caches"])
        rows.append([row["model"], f"{row['prompt']:,}", f"{row['answer']:,}",
                     *(f"{b / 1e9:,.1f}" for b in held), f"{row['sampler reads'] / 1e9:,.0f}",
                     f"{row['formula']['rollout'] / row['sampler reads']:.0f}"])
    return rows


def cost_sentences():
    """What the section says beside its tables."""
    small, smol = MEASURED
    counted, seconds = ([100 * row[key]["rollout"] / both_arms(row[key])[0] for row in MEASURED]
                        for key in ("counted", "CPU seconds"))
    ratios = [times(row["formula"]) for row in EXTENDED]
    rule = [(1.25 if row in EXTENDED else 4 / 3) * (row["prompt"] + 8 * row["answer"])
            / (row["prompt"] + row["answer"]) / times(row["formula"]) for row in COST]
    lengths = [json.loads(line)["length"] for seed in (0, 1, 2) for line in (
        ROOT / f"results/quickstart/seed_{seed}/metrics.jsonl").read_text().splitlines()]
    by_byte = [row["formula"]["rollout"] / row["sampler reads"] for row in EXTENDED]
    slower = [(row["CPU seconds"]["rollout"] / row["counted"]["rollout"])
              / (row["CPU seconds"]["update"] / row["counted"]["update"]) for row in MEASURED]
    look = small["CPU seconds"]["picture"] / both_arms(small["CPU seconds"])[1]
    return {
        "ratio": f"GRPO costs {times(small['counted']):.1f} times SFT's operations on the toy, "
                 f"{times(smol['counted']):.1f} at 135M, {min(ratios):.1f} to {max(ratios):.1f} at 3B and 7B",
        "rule": f"within {100 * max(abs(r - 1) for r in rule):.0f} % of the table",
        "length": f"golden answers have {small['answer']} tokens, and here sampled ones too; in the "
                  f"quick start's runs the mean is {mean(lengths):.0f}",
        "steps": f"over {small['steps']} steps of {small['queries']} queries on the toy, "
                 f"{smol['steps']} of {smol['queries']} at 135M",
        "slower": f"takes {min(slower):.1f} to {max(slower):.1f} times as long as one of an update",
        "seconds": f"a rollout is {counted[0]:.0f} and {counted[1]:.0f} % of GRPO's operations, and "
                   f"{seconds[0]:.0f} and {seconds[1]:.0f} % of its seconds",
        "picture": f"to read and to look at a picture takes {100 * look:.0f} % of SFT's seconds",
        "gradients": f"{smol['trained'] * 4 / 1e6:.0f} MB of GRPO's peak are gradients of earlier passes",
        "bytes": f"{min(by_byte):.0f} to {max(by_byte):.0f} operations for each byte; an H100 needs "
                 f"{989 / 3.35:.0f} ",
    }


TABLES = [accuracy_table, sweep_table, without_table, ablation_table, damage_table, habits_table, cost_table,
          lambda: findings_table("main"), operations_table, measured_table, sampler_table]


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
    third = int(re.search(r"(\d+) % of its answers", said["route"])[1])
    assert "reflected in a third of them" in short and abs(third - 100 / 3) < 2


def test_the_figure_of_the_comparison_is_what_the_report_draws(tmp_path):
    """By the command beside it, which needs nothing but what is kept in results/."""
    arms = arms_of("main")
    (tmp_path / "accuracy.png").write_bytes(report.draw(list(report.accuracy_panels(arms)), arms))
    assert same_picture(tmp_path / "accuracy.png", FOLDER / "report" / "main" / "accuracy.png")
    assert "(experiment/report/main/accuracy.png)\n" in RESULTS


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


# ---------------------------------------------------------------------------------------------
# The cost of RL and of SFT


def test_the_cost_sections_sentences_are_made_of_the_raw_file():
    text = " ".join(RESULTS.split("\n## The cost of RL and of SFT\n")[1].split("\n## ")[0].split())
    for place, sentence in cost_sentences().items():
        assert sentence in text, f"{place}: {sentence}"
    for row in COST:  # "to the last operation"
        assert all(row["counted"][part] == row["formula"][part] for part in row["counted"])
    assert all(set(row["counted"]) == {"picture", "rollout", "update", "SFT's update"} for row in MEASURED)
    assert all(set(row["counted"]) == {"update", "SFT's update"} for row in EXTENDED)


def test_the_counted_operations_are_those_of_products_by_hand():
    assert bench.count_operations(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == 2 * 2 * 3 * 4
    attend = getattr(torch.ops.aten, FLASH)
    q, k = torch.ones(1, 1, 3, 8), torch.ones(1, 1, 5, 8)
    assert bench.count_operations(lambda: attend(q, k, k)) == 2 * 2 * 3 * 5 * 8
    assert bench.count_operations(lambda: attend(q, q, q, is_causal=True)) == 2 * 2 * 6 * 8  # 1 + 2 + 3 pairs


def test_the_cost_of_a_query_is_what_it_was(one_rank):
    """A query's operations, by the formula and as they run, on fewer queries than for the raw file."""
    found = cost.measured("toy", ROOT / "toy_model", 2, 1)
    for key in ("weights", "trained", "prompt", "answer", "formula", "counted"):
        assert found[key] == MEASURED[0][key], key
    assert found["counted"] == found["formula"]
    assert all(seconds > 0 for seconds in found["CPU seconds"].values())
    assert found["peak bytes"]["update"] > found["peak bytes"]["SFT's update"] > 0
    assert cost.extended("3B", 400, 400) == EXTENDED[0]


if __name__ == "__main__":
    for made in TABLES:
        print(f"{made.__doc__ or made.__name__}\n\n{report.markdown_table(made())}\n")
