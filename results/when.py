"""When does RL beat SFT? The tables and the figure of that section, from the raw files of both comparisons.

    PYTHONPATH=. python results/when.py results/when.png
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np

import report
import toy

HERE = Path(__file__).parent
ARMS = {"grpo": "GRPO", "reinforce": "REINFORCE++", "habit": "SFT, habit", "columns": "SFT, columns",
        "places": "SFT, places", "answers": "SFT, answers", "own": "SFT, own"}
GOLDEN = {"habit": "its best habit,\nwithout a slip", "columns": "foreign reasoning,\nthorough",
          "places": "foreign reasoning,\nterse", "answers": "answers alone", "own": "its own\nright answers"}
USUAL = "pass1_t0.6"
SETTINGS = (USUAL, "pass1_t0.01", "pass8_t1")


def read(paths):
    """The runs of each arm by seed; arms that have all seeds that any arm has."""
    most = max(map(len, paths.values()))
    return {ARMS[arm]: [report.read_run(path, False) for path in found]
            for arm, found in paths.items() if len(found) == most > 0}


def files(arm, experiment, provenance):
    """An arm's files on the toy, by seed: three arms were run for results/experiment, where habit is sft."""
    return sorted([*HERE.glob(f"experiment/{experiment.format(arm.replace('habit', 'sft'))}"),
                   *HERE.glob(f"provenance/{provenance.format(arm)}")])


def toys():
    """The toy's runs by arm, `{label: [runs, by seed]}`."""
    return read({arm: files(arm, "main/{}_*", "main/{}_*") for arm in ARMS})


def longer():
    """The toy's exploratory runs: columns, ten times the epochs."""
    return [report.read_run(path, False) for path in sorted(HERE.glob("provenance/longer/columns_*"))]


def pretrained():
    """The pretrained model's runs by arm, with what was kept of every answer in training."""
    arms = read({arm: sorted(HERE.glob(f"pretrained/runs/main/{arm}_*")) for arm in ARMS})
    for run in (run for runs in arms.values() for run in runs if (run.path / "answers.json").exists()):
        run.answers = np.array(json.loads((run.path / "answers.json").read_text()), dtype=float).reshape(-1, 5)
    return arms


def final(run, split):
    """What the last evaluation of a run measured of a split at T = 0.6."""
    return [row for row in run.evals if (row["split"], row["setting"]) == (split, USUAL)][-1]


def percent(runs, split, setting, name):
    return report.percent(report.statistic(runs, split, setting, name))


def accuracy_table(arms):
    """Accuracy in % where the prompts are as in training and out of distribution, and what the answers look like."""
    rows = [["arm", "validation, last epoch", "test, untrained", "test, mean of epochs", "test, last epoch",
             "test, last, T = 0.01", "test, last, pass@8", "tokens", "reflect, %"]]
    for label, runs in arms.items():
        last = [final(run, "test") for run in runs]
        rows.append([label, percent(runs, "validation", USUAL, "last"),
                     percent(runs, "test", USUAL, report.START), percent(runs, "test", USUAL, "mean"),
                     *(percent(runs, "test", setting, "last") for setting in SETTINGS),
                     f"{mean(r['length'] for r in last):.1f}",
                     f"{100 * mean(r['reflection_ratio'] for r in last):.0f}"])
    return rows


def gaps(arms):
    """RL minus SFT on `test`, mean of epochs: `{(rl, sft): {setting: (value, replicates)}}`."""
    found = defaultdict(dict)
    for split, setting, compared, difference, _ in report.against_sft(arms):
        if split == "test":
            found[tuple(compared.split(" - "))][setting] = difference
    return found


def verdict(difference):
    """By the rule that was fixed beforehand, of the interval at T = 0.6."""
    said = report.judge(*report.interval(difference[1]))
    return {"reproduced": "RL wins", "the opposite": "SFT wins"}.get(said, said)


def verdict_table(arms):
    rows = [["RL", "minus", "points at T = 0.6", "verdict", "T = 0.01", "pass@8"]]
    for (rl, sft), found in gaps(arms).items():
        usual, *others = (report.percent(found[setting]) for setting in SETTINGS)
        rows.append([rl, sft, usual, verdict(found[USUAL]), *others])
    return rows


def habits_table():
    """Of the toy's answers to validation at T = 1: a habit's share, its accuracy when forced, in %."""
    rows = [["model", *toy.HABITS, "anything else"]]
    for arm, label in {"toy_model": "base", **ARMS}.items():
        tables = [json.loads(path.read_text())["validation"]
                  for path in files(arm, "habits/{}*.json", "main/{}_*/habits.json")]
        share, forced = ([mean(table[opening][key] for table in tables) for opening in toy.HABITS]
                         for key in ("share", "forced"))
        rows.append([label, *(f"{100 * s:.0f}, {100 * f:.0f}" for s, f in zip(share, forced)),
                     f"{100 * (1 - sum(share)):.0f}"])
    return rows


def sweep_table(folder, arms):
    """Validation at T = 0.6 after the last epoch of each trial, mean of its seeds; the best is taken."""
    rows = []
    for arm in arms:
        found = defaultdict(list)
        for path in folder.glob(f"sweep/{arm}_*/result.json"):
            result = json.loads(path.read_text())
            rate = path.parent.name.split("_")[1]
            found[float(rate)].append(100 * result[f"validation_{USUAL}"]["after"]["accuracy"])
        if found:
            rows.append([ARMS[arm], *(f"{mean(found[rate]):.1f} at {rate:.1e}".replace(".0e", "e").replace("e-0", "e-")
                                      for rate in sorted(found))])
    names = ("lowest", "second", "third", "highest")
    return [["arm", *(f"{name} rate" for name in names[:max(map(len, rows)) - 1])]] + rows


def moved(run):
    """What forgetting.py measured of a run's final model."""
    return json.loads((run / "forgetting.json").read_text())


def forgetting_table(arms):
    """Means over seeds: what was forgotten, how far the model went from its start, and what it was good for."""
    start = json.loads((HERE / "pretrained" / "runs" / "start.json").read_text())
    rows = [["model", "English text, nats a token", "questions right, of 100", "KL(model, start), nats an answer",
             "KL(start, model)", "test, last epoch, %"],
            ["start", f"{start['log_likelihood']:.3f}", start["knowledge"]["right"], None, None, None]]
    for label, runs in arms.items():
        found = [moved(run.path) for run in runs]
        rows.append([label, f"{mean(f['log_likelihood'] for f in found):.3f}",
                     f"{mean(f['knowledge']['right'] for f in found):.1f}",
                     *(f"{mean(f[way]['answer']['mean'] for f in found):.2f}"
                       for way in ("kl_from_start", "kl_to_start")),
                     f"{100 * report.statistic(runs, 'test', USUAL, 'last')[0]:.1f}"])
    return rows


def rank_correlation(x, y, group):
    """Spearman's: Pearson's r of ranks, equals sharing theirs; each group's mean rank taken off."""
    group, centred = np.array(group), []
    for values in (np.array(x), np.array(y)):
        ranks = np.array([(values < v).sum() + (values == v).sum() / 2 for v in values])
        centred.append(ranks - np.array([ranks[group == g].mean() for g in group]))
    a, b = centred
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else None  # one that is all alike goes with nothing


def shift_and_transfer(arms):
    """Rank correlation of KL(model, start) and last accuracy on test: over all runs, and within arms."""
    runs = [(label, run) for label, found in arms.items() for run in found]
    shift = [moved(run.path)["kl_from_start"]["answer"]["mean"] for _, run in runs]
    reached = [report.statistic([run], "test", USUAL, "last")[0] for _, run in runs]
    return [rank_correlation(shift, reached, group) for group in ([0] * len(runs), [label for label, _ in runs])]


def reflection_and_length(arms, split):
    """Rank correlation over all final models of an answer's mean length and the share that reflects."""
    last = [final(run, split) for runs in arms.values() for run in runs]
    return rank_correlation([r["length"] for r in last], [r["reflection_ratio"] for r in last], [0] * len(last))


def findings_table(arms):
    """The paper's second and third finding by the rules of report.py; verdict_table has the first."""
    return [row for row in report.findings(arms) if not row[0].startswith("1.")]


def draw(experiments, path):
    """RL minus each SFT out of distribution, T = 0.6, mean of epochs; `experiments` are (title, arms)."""
    from matplotlib.figure import Figure  # no window is ever opened

    figure = Figure(figsize=(6 * len(experiments), 3.6), layout="constrained", dpi=96)
    panels = figure.subplots(1, len(experiments), sharex=True, squeeze=False)[0]
    for axis, (title, arms) in zip(panels, experiments):
        found = gaps(arms)
        rls, names = (list(dict.fromkeys(pair[i] for pair in found)) for i in (0, 1))
        for (rl, sft), settings in found.items():
            value, replicates = settings[USUAL]
            low, high = report.interval(replicates)
            number = rls.index(rl)
            beside = 0.12 * (len(rls) - 1 - 2 * number)  # two RL arms stand one above the other
            axis.errorbar(100 * value, beside - names.index(sft), fmt="os"[number], capsize=3,
                          xerr=[[100 * (value - low)], [100 * (high - value)]],
                          color=report.COLOURS[number], label=rl if sft == names[0] else None)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.set_yticks([-i for i in range(len(names))], [GOLDEN[name.partition(", ")[2]] for name in names])
        axis.set_ylim(0.5 - len(names), 0.5)
        axis.set_ylabel("SFT on ...")
        axis.set_xlabel("RL minus SFT out of distribution, points\nleft of 0: SFT is better; right: RL is")
        axis.legend(loc="lower right")
    figure.savefig(path, metadata={"Software": None})


def kept_answers(folder):
    """Of every completion of a run: step, tokens, reflects, right, opening; what report.py asks of completions."""
    return report.read_run(Path(folder), False).answers.astype(int).tolist()


def shown():
    """The panels of the figure: an experiment with as many seeds as its rules ask for."""
    found = [("the toy, 1.2 M weights", toys(), 5), ("SmolLM2 with eyes, 135 M", pretrained(), 3)]
    return [(title, arms) for title, arms, seeds in found if seeds == max(map(len, arms.values()), default=0)]


def main():
    small, large = toys(), pretrained()
    for rows in (accuracy_table(small), verdict_table(small), habits_table(),
                 sweep_table(HERE / "provenance", ("columns", "places", "answers", "own")),
                 accuracy_table(large), verdict_table(large), sweep_table(HERE / "pretrained" / "runs", ARMS),
                 forgetting_table(large), findings_table(large)):
        print(report.markdown_table(rows), "\n")
    print("rank correlation of shift from the start with accuracy on test, over all runs and within arms:",
          shift_and_transfer(large))
    print("and of length with reflection over final models, on validation and test:",
          [reflection_and_length(large, split) for split in ("validation", "test")])
    draw(shown(), sys.argv[1])


if __name__ == "__main__":
    if sys.argv[1] == "--keep":
        print(json.dumps(kept_answers(sys.argv[2]), separators=(",", ":")))
    else:
        main()
