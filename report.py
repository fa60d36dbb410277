"""Stage: report. Run folders in; curves, tables, verdicts, diagnostics and an HTML page out.

Reads what the trainers and evaluate.py wrote and needs no model. Runs that differ in nothing but
seed and folder are one arm: a line in the figures, a row in the tables. What textbooks have and
this leaves out: significance tests. Every headline number has a 95 % bootstrap interval, over seeds
and prompts at once, since both were drawn; arms are compared on the same drawn prompts.

    python report.py runs/grpo_0 runs/grpo_1 runs/sft_0 runs/sft_1 --out runs/report
    python report.py runs --out runs/report        # every run that lies below a folder
"""

import utils  # first: from here on Ctrl-C is no traceback

import base64
import functools
import io
import json
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np

from pictures import as_png, open_image
from evaluate import REFLECTION_WORDS, SETTINGS, count_reflections, is_right, reflection_ratios
from signs import cut_off, dead_groups, known, pass_name, slump, stray_sampler
from utils import UserError, print0

ROUNDS = 2000  # of the bootstrap
TRAINERS = ("train_grpo", "train_sft")
# Okabe and Ito's colours, told apart by the colour-blind; dashes and marks tell them apart in print
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")
MARKS = "os^Dv<>P"
RATIOS = [name for name in reflection_ratios([], []) if name != "words"]  # the paper's five
START = "before training"  # of whatever a run began from, which may have been trained before
MARK = "<image>"  # a picture's place in a question, as data.py has it


@dataclass
class Args:
    runs: list = field(default_factory=list)  # run folders, or folders that hold them
    out: str = ""  # folder of the report; empty: report/ in the first folder given
    groups: int = 4  # prompts a step in the page, of the first, middle and last step; 0: none
    substring: bool = False  # count reflection words as the paper did: "wait" in "await" too


@dataclass
class Run:
    """What one run folder holds; `missing` says in sentences what it does not."""

    path: Path
    args: dict
    evals: list  # rows of eval.jsonl
    metrics: list  # rows of metrics.jsonl
    reflection: dict  # by step: what reflection_metrics says
    answers: np.ndarray  # (completions, 5): step, length, reflects, right or NaN, opening
    aha: list  # records that reflect and are right, best first
    missing: list


# ---------------------------------------------------------------------------------------------
# Reading: a crashed run, a cut line, a file that is not there cost a sentence, not the report


def read_rows(path, missing):
    """The rows of a .jsonl file, in order; a file that is not there or not whole is said."""
    if not path.exists():
        missing.append(f"{path.name} is not there")
    elif (content := path.read_bytes()) and not content.endswith(b"\n"):
        missing.append(f"{path.name} ends in a cut line, which was passed over")
    return utils.read_jsonl(path)


def find_runs(paths):
    """The run folders among and below `paths`, each once, in the order given."""
    found = {}
    for path in map(Path, paths):
        below = sorted(path.rglob("args.json"))
        if not below:
            raise UserError(f"{path}: no such folder, or one that holds no run, since no args.json "
                            "lies in it or below; give run folders, or folders that hold them.")
        found |= {file.parent.resolve(): file.parent for file in below}
    return list(found.values())


def read_run(path, substring):
    """Read one run folder; what is no row of ours in it raises ValueError, KeyError, TypeError."""
    args = json.loads((path / "args.json").read_text())
    script, missing = args.get("script"), []
    evals = read_rows(path / "eval.jsonl", missing)
    metrics = read_rows(path / "metrics.jsonl", missing) if script in TRAINERS else []
    answers, aha, openings = [], [], {}
    # logged by the trainer; counted anew where the completions are there
    reflection = {m["generation_step"]: m for m in metrics
                  if "reflection_ratio" in m and not substring}
    for file in sorted((path / "samples").glob("step_*.jsonl")):
        step, records = int(file.stem.removeprefix("step_")), read_rows(file, missing)
        right = [is_right(r["rewards"]) for r in records]
        found = [count_reflections(r["completion_text"], substring) for r in records]
        reflection[step] = reflection_ratios(found, right)
        for r, good, words in zip(records, right, found):
            # how an answer begins tells its habit; within one habit length means something else
            opening = " ".join(r["completion_text"].split(maxsplit=3)[:3])
            number = openings.setdefault(opening, len(openings))
            answers.append((step, r["length"], bool(words), good, number))
            aha += [r | {"step": step}] if good and words else []
        # right where its siblings failed: the advantage says so
        aha = sorted(aha, key=lambda r: (-r["advantage"], r["step"], r["id"]))[:3]
    if script == "train_grpo" and not answers:
        missing.append("samples/ holds no completions: no correlation within steps, no examples")
        if substring:
            missing.append("--substring needs the completions: its ratios are left out")
    if not (path / "result.json").exists():
        last = f"; its last logged step is {metrics[-1]['generation_step'] if metrics else 0}"
        missing.append("it has not ended" + last * (script in TRAINERS))
    answers = np.array(answers, dtype=float).reshape(-1, 5)
    return Run(path, args, evals, metrics, reflection, answers, aha, missing)


def in_arms(runs):
    """Training runs by arm, `{label: [runs, by seed]}`; the label says what sets the arm apart."""
    # what does not change the training
    own = ("seed", "out", "wandb", "eval_settings", "eval_every", "save_every", "keep", "keep_best")
    kinds = defaultdict(lambda: defaultdict(list))  # {kind: {arguments: runs}}
    for run in runs:
        if run.args.get("script") in TRAINERS:
            kind = run.args.get("advantage", "sft").upper()
            rest = {k: v for k, v in run.args.items() if k not in own}
            kinds[kind][json.dumps(rest, sort_keys=True)].append(run)
    arms = {}
    for kind, variants in kinds.items():
        settings = [json.loads(text) for text in variants]
        names = sorted({name for s in settings for name in s})
        for mine, members in zip(settings, variants.values()):
            words = [kind]
            for name in names:
                values = [s.get(name) for s in settings]
                usual = max(values, key=values.count)  # goes without saying, unless all differ
                alone = values.count(usual) == 1 < len(values)
                if mine.get(name) != (None if alone else usual):
                    v = " ".join(str(mine.get(name)).split())  # if long, without its middle
                    words.append(f"--{name} {v if len(v) < 61 else v[:20] + ' ... ' + v[-35:]}")
            members.sort(key=lambda run: (run.args.get("seed", 0), str(run.path)))
            words += [f"({members[0].path})"] if " ".join(words) in arms else []
            arms[" ".join(words)] = members
    return arms


# ---------------------------------------------------------------------------------------------
# Numbers. Pure functions: arrays in, arrays out


@functools.cache
def draws(n, *seed):
    """ROUNDS bootstrap draws of n things, as weights (ROUNDS, n) whose rows sum to 1."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), ROUNDS) / n


def interval(replicates):
    """The 95 % percentile interval of bootstrap replicates, as [low, high]."""
    return [float(v) for v in np.quantile(replicates, (0.025, 0.975))]


def scores(run, split, setting):
    """`(epochs, values (epochs,), redrawn (epochs, ROUNDS))` of one run, by epoch; 0 is before.

    The values are pass@n: one right among n answers will do. `redrawn` holds them over redrawn
    prompts, the same draws for every run over as many, so that runs are compared on the same ones.
    """
    rows = {r["epoch"]: r for r in run.evals if (r["split"], r["setting"]) == (split, setting)}
    epochs = sorted(rows)
    values = np.array([rows[e][pass_name(rows[e])] for e in epochs], dtype=float)
    redrawn = np.repeat(values[:, None], ROUNDS, axis=1)
    for i, e in enumerate(epochs):
        if right := rows[e].get("right"):  # how many of a prompt's n answers; runs of old have none
            redrawn[i] = draws(len(right), 0) @ (np.array(right) > 0)
    return epochs, values, redrawn


def in_epochs(run):
    """Its rows of metrics.jsonl by epoch; an epoch ends at its whole number."""
    rows = defaultdict(list)
    for m in run.metrics:
        rows[math.ceil(m["epoch"] - 1e-9)].append(m)  # 3 / 3 may be stored as a little above 1
    return rows


def by_epoch(run, name):
    """A metric's values by epoch, `{epoch: [one a step]}`."""
    return {e: found for e, rows in in_epochs(run).items() if (found := known(rows, name))}


def judge(low, high):
    """The verdict on an effect that the paper found to be positive, from its interval."""
    return "reproduced" if low > 0 else "the opposite" if high < 0 else "undecided"


STATISTICS = {  # of an array (epochs, ...), epoch 0 first
    START: lambda a: a[0],
    "mean": lambda a: a[1:].mean(0),
    "max": lambda a: a[1:].max(0),
    "last": lambda a: a[-1],
    "gain": lambda a: a[-1] - a[0],
}


def statistic(runs, split, setting, name):
    """One of STATISTICS, averaged over runs: `(value, replicates (ROUNDS,))`, or None of no run."""
    found = []
    for run in runs:
        epochs, *arrays = scores(run, split, setting)
        if len(epochs) > 1 and epochs[0] == 0:  # evaluated before training, and later
            found.append([STATISTICS[name](array) for array in arrays])
    if not found:
        return None
    values, redrawn = zip(*found)
    drawn = draws(len(found), 1, *map(ord, runs[0].path.name))  # other arms draw other seeds
    return float(np.mean(values)), (drawn * np.array(redrawn).T).sum(1)


def correlation(x, y, group, run, step):
    """Pearson's r of x and y within groups: `(r, [low, high], how many vary in both)`, or None.

    All are (n,), `group` also (n, k). The mean of each group is taken off: what differs between
    groups does not count, and one in which x or y does not vary says nothing; None of such alone.
    The interval redraws runs, and steps within runs, since answers of a step are not independent.
    """
    _, group = np.unique(group, axis=0, return_inverse=True)
    size = np.bincount(group)
    x, y = (v - (np.bincount(group, v) / size)[group] for v in (x, y))
    # a group all alike is exactly 0, as the mean of it may not be
    x, y = (np.where(np.abs(v) < 1e-9, 0.0, v) for v in (x, y))
    if not (x.any() and y.any()):
        return None
    varied = np.bincount(group, abs(x)) * np.bincount(group, abs(y)) > 0  # by group
    redrawn = []
    for number in np.unique(run):
        mine = run == number
        _, block = np.unique(step[mine], return_inverse=True)
        sums = [np.bincount(block, product[mine]) for product in (x * y, x * x, y * y)]
        # (ROUNDS, 3): the sums of as many steps as there are, each round's own
        redrawn.append(draws(len(sums[0]), 2, int(number)) @ np.stack(sums, 1) * len(sums[0]))
    # r of pooled sums, not a mean of the runs' r: a run in which little varies says little
    pooled = np.einsum("br,rbs->sb", draws(len(redrawn), 3), np.array(redrawn))
    with np.errstate(invalid="ignore"):  # a draw in which nothing varies has no correlation
        rounds = pooled[0] / np.sqrt(pooled[1] * pooled[2])
    r = float(x @ y / math.sqrt((x @ x) * (y @ y)))
    return r, interval(rounds[~np.isnan(rounds)]), int(varied[group].sum())


def seed_sensitivity(lengths):
    """How far lengths, `[[mean of a step, ...] of a seed, ...]`, depend on the seed; None of one.

    `between` seeds and `within` one are standard deviations; the interval redraws seeds.
    """
    if len(lengths) < 2 or min(map(len, lengths)) < 2:
        return None
    means = np.array([np.mean(steps) for steps in lengths])
    weights = draws(len(means), 4)
    spread = weights @ means**2 - (weights @ means) ** 2  # (ROUNDS,), divided by n
    redrawn = np.sqrt(np.maximum(spread, 0) * len(means) / (len(means) - 1))
    return {"mean": means.mean(), "between": means.std(ddof=1), "interval": interval(redrawn),
            "within": np.mean([np.std(steps, ddof=1) for steps in lengths])}


# ---------------------------------------------------------------------------------------------
# Tables, findings and failure signatures: lists of cells; None is a dash


def percent(found):
    """`(value, replicates)` as "41.2 [38.0, 44.1]", in percent; also for a row's own interval."""
    if found is None:
        return None
    value, spread = found
    low, high = spread if len(spread) == 2 else interval(spread)
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def measured(arms):
    """The (split, setting) pairs of all evaluations, in the paper's order, with a row of each."""
    order = ("validation", "test", *SETTINGS)
    rows = {(r["split"], r["setting"]): r for runs in arms.values() for run in runs
            for r in run.evals}
    return dict(sorted(rows.items(), key=lambda item: [order.index(name) for name in item[0]]))


def accuracy_table(arms):
    """The paper's Table 3: before training, mean and maximum over epochs, averaged over seeds."""
    rows = [["split", "setting", "arm", "seeds", START, "mean of epochs", "best epoch",
             "last epoch"]]
    for split, setting in measured(arms):
        for label, runs in arms.items():
            cells = [percent(statistic(runs, split, setting, name))
                     for name in (START, "mean", "max", "last")]
            rows += [[split, setting, label, len(runs), *cells]] if any(cells) else []
    return rows


def against_sft(arms):
    """Arms against SFT from the same base: `(split, setting, "arm - SFT", mean, last epoch)`."""
    pairs = [(one, other) for other in arms for one in arms
             if other.startswith("SFT") and not one.startswith("SFT")
             and arms[one][0].args["model"] == arms[other][0].args["model"]]
    for split, setting in measured(arms):
        for one, other in pairs:
            found = []  # as `statistic` has it; seeds are drawn apart, prompts together
            for name in ("mean", "last"):
                a, b = (statistic(arms[label], split, setting, name) for label in (one, other))
                found.append((a[0] - b[0], a[1] - b[1]) if a and b else None)
            yield split, setting, f"{one} - {other}", *found


def difference_table(arms):
    rows = [["split", "setting", "arms", "mean of epochs, points", "last epoch, points"]]
    return rows + [[*place, percent(mean), percent(last)]
                   for *place, mean, last in against_sft(arms) if mean]


def transfer_table(arms):
    """Out of distribution: what training gained on validation, and how much of it on test."""
    rows = [["setting", "arm", "gain on validation", "gain on test", "share that carries over"]]
    for setting in dict.fromkeys(setting for _, setting in measured(arms)):
        for label, runs in arms.items():
            near, far = (statistic(runs, s, setting, "gain") for s in ("validation", "test"))
            if near and far:  # a share of next to nothing says nothing
                much = near[1].min() > 0.02
                share = percent((far[0] / near[0], far[1] / near[1])) if much else None
                rows.append([setting, label, percent(near), percent(far), share])
    return rows


def evaluation_table(runs):
    """What evaluate.py measured, on images as they are and on damaged ones."""
    rows = [["model", "data", "setting", "images", "prompts", "pass@n"]]
    for run in (run for run in runs if run.args.get("script") == "evaluate"):
        for row in run.evals:
            damage = row["perturb"].replace("none", "as they are")
            passed = percent((row[pass_name(row)], row[f"{pass_name(row)}_interval"]))
            rows.append([run.args["model"], row["split"], row["setting"], damage, row["n"], passed])
    return rows


def cost_table(arms):
    """What a run of each arm costs, as the mean over its seeds."""
    phases = ("rollout", "reward", "logprobs", "update", "sync")
    rows = [["arm", "steps", *(f"{p}, s" for p in phases), "evaluation, s", "completion tokens",
             "peak memory, GB", "device-seconds"]]
    logged = (*(f"seconds_{p}" for p in phases), "ranks", "tokens", "peak_memory_gb")
    for label, runs in arms.items():
        costs = []  # of a run
        for run in (run for run in runs if run.metrics):
            *seconds, ranks, tokens, peak = np.array(
                [[m.get(name, 0.0) for name in logged] for m in run.metrics]).T
            costs.append((len(ranks), *np.sum(seconds, 1), sum(r["seconds"] for r in run.evals),
                          tokens.sum(), peak.max(), (ranks * seconds).sum()))
        if costs:
            steps, *seconds, tokens, peak, devices = np.mean(costs, 0)
            rows.append([label, f"{steps:.0f}", *(f"{s:.1f}" for s in seconds), f"{tokens:,.0f}",
                         f"{peak:.2f}", f"{devices:.1f}"])
    return rows


def findings(arms):
    """The paper's three findings, each arm's figure beside a rule that was fixed beforehand."""
    rows = [["finding", "arm", "effect", "verdict"]]
    for split, setting, compared, mean, _ in against_sft(arms):
        if split == "test" and mean:
            rows.append(["1. RL generalises better than SFT: test, mean of epochs",
                         f"{compared}, {setting}", f"{percent(mean)} points",
                         judge(*interval(mean[1]))])
    for label, runs in arms.items():
        last = [list(lengths.values())[-1] for run in runs
                if (lengths := by_epoch(run, "length")) and not label.startswith("SFT")]
        if found := seed_sensitivity(last):
            # more than a run's own unrest, and enough to be seen in a plot
            parted = found["between"] > max(found["within"], 0.05 * found["mean"])
            low, high = found["interval"]
            effect = (f"SD between seeds {found['between']:.2f} [{low:.2f}, {high:.2f}] of "
                      f"{found['mean']:.1f} tokens, within a run {found['within']:.2f}")
            rows.append(["2. Response length depends on the seed", label, effect,
                         "reproduced" if parted else "not reproduced"])
    for label, runs in arms.items():
        # columns: run, step, length, share or truth of reflection; of answers also right, opening
        steps = np.array([(i, m["generation_step"], m["length"], found["reflection_ratio"])
                          for i, run in enumerate(runs) for m in run.metrics
                          if (found := run.reflection.get(m["generation_step"]))], dtype=float)
        answers = np.concatenate([np.insert(run.answers, 0, i, 1) for i, run in enumerate(runs)])
        for how, table, group in (("steps of a run", steps, [0]),
                                  ("answers of a step", answers, [0, 1]),
                                  ("answers of a step that open alike", answers, [0, 1, 5])):
            if len(table) < 3 * len(runs):  # two points of a run always lie on a line
                continue
            run, step, length, reflects = table[:, :4].T
            effect, verdict = "length or reflection does not vary", "not testable"
            if result := correlation(length, reflects, table[:, group], run, step):
                r, (low, high), n = result
                effect = f"r = {r:.2f} [{low:.2f}, {high:.2f}], n = {n:,}"
                verdict = judge(low, high)
            rows.append([f"3. Reflection goes with length, between {how}", label, effect, verdict])
    return rows


def diagnose(run):
    """Failure signatures of one run, as `(what, measured, is it a sign of trouble)`."""
    reward = [np.mean(found) for found in by_epoch(run, "reward").values()]
    for setting in SETTINGS:
        rows = {r["epoch"]: r for r in run.evals
                if (r["split"], r["setting"]) == ("validation", setting)}
        # the reward is of training prompts: memorising them shows as a slump elsewhere
        if reward and len(rows) > 1:
            yield slump((reward[0], reward[-1]), [rows[epoch] for epoch in sorted(rows)])
    *_, last = [[], *in_epochs(run).values()]
    if known(last, "groups_all_alike"):
        what, *more = dead_groups(last, "the last epoch's")
        yield what.partition(",")[0], *more  # one row in the table, of whatever kind
    if known(last, "truncated"):
        yield cut_off(last, "the last epoch's")
    if known(run.metrics, "sampler_gap"):
        yield stray_sampler(run.metrics)
    step, _, reflects, right, _ = run.answers[~np.isnan(run.answers[:, 3])].T
    if found := correlation(right, reflects, step, np.zeros(len(step)), step):
        r, (low, high), _ = found
        yield ("reflection unrelated to success", f"r = {r:.2f} [{low:.2f}, {high:.2f}] between "
               "the answers of a step", low <= 0 <= high)


def diagnostics(arms, found):
    """Failure signatures by arm; `found` are the rows of `findings`."""
    rows = [["arm", "sign", "runs that show it", "measured, in the first such run"]]
    for label, runs in arms.items():
        signs = defaultdict(list)
        for run in runs:
            for what, said, bad in diagnose(run):
                signs[what].append((bad, f"{run.path.name}: {said}"))
        for what, seen in signs.items():
            _, measure = max(seen, key=lambda sign: sign[0])  # the first that is bad, if any
            rows.append([label, what, f"{sum(bad for bad, _ in seen)} of {len(seen)}", measure])
    # lengths that part over seeds are the arm's, not a run's
    return rows + [[label, "length unstable over seeds", "yes" if verdict == "reproduced" else "no",
                    effect] for what, label, effect, verdict in found if what[0] == "2"]


# ---------------------------------------------------------------------------------------------
# Figures: panels `(title, x, y, {arm: [{x: y} of a run, ...]})` laid side by side


def curves_of(arms, points):
    """The curves of a panel; `points(run)` are those of a run, and a y of None is a gap."""
    return {label: [{x: y for x, y in points(run).items() if y is not None} for run in runs]
            for label, runs in arms.items()}


def accuracy_panels(arms):
    """Accuracy by epoch: of the answers given in training, then of every split and setting."""
    curves = curves_of(arms, lambda run: {  # cumulative: the mean over the epoch's steps so far
        rows[-1]["epoch"]: 100 * np.mean(found) for rows in in_epochs(run).values()
        if (found := known(rows, "reward/accuracy"))})
    yield "train, as it was answered", "epoch", "accuracy, %", curves
    for (split, setting), row in measured(arms).items():
        curves = curves_of(arms, lambda run: {
            epoch: 100 * value for epoch, value, _ in zip(*scores(run, split, setting))})
        if len({runs[0].args["model"] for runs in arms.values()}) == 1:
            end = max(epoch for runs in curves.values() for curve in runs for epoch in curve)
            curves[START] = [{0: c[0], end: c[0]} for r in curves.values() for c in r if 0 in c]
        yield f"{split}, {setting}, n = {row['n']}", "epoch", f"{pass_name(row)}, %", curves


def training_panels(arms):
    """Response length and the paper's five ratios by generation step, where a model answered."""
    curves = curves_of(arms, lambda run: {m["generation_step"]: m["length"] for m in run.metrics
                                          if run.args["script"] != "train_sft"})
    yield "response length", "generation step", "tokens", curves
    for name in RATIOS:  # in percent; without a denominator, a ratio is None
        curves = curves_of(arms, lambda run: {
            step: found[name] and 100 * found[name] for step, found in run.reflection.items()})
        yield name, "generation step", "%", curves


def words_panels(arms):
    """How often each of the 15 words occurs; those that nobody said have no panel."""
    for word in REFLECTION_WORDS:
        curves = curves_of(arms, lambda run: {
            step: found["words"][word] for step, found in run.reflection.items()})
        if any(any(curve.values()) for runs in curves.values() for curve in runs):
            yield f'"{word}"', "generation step", "times a step", curves


def draw(panels, arms):
    """PNG bytes of a figure: the mean over seeds, one standard deviation as a band."""
    from matplotlib.figure import Figure  # no window is ever opened

    shown = [k for k in [*arms, START] if any(any(p[-1].get(k, [])) for p in panels)]
    columns = 4 if len(panels) in (4, 7, 8) or len(panels) > 9 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    wide = 48 * columns - 8  # characters of the legend that fit into a row, beside a mark
    beside = max(1, min(4, wide // (max(map(len, shown)) + 8)))
    names = [textwrap.fill(k, wide).replace("$", r"\$") for k in shown]  # a dollar is no formula
    height = 3.25 * rows + 1 + 0.25 * math.ceil(sum(len(n.splitlines()) for n in names) / beside)
    figure = Figure(figsize=(4.5 * columns, height), layout="constrained", dpi=96)
    lines, bands = {}, []
    for number, (title, at, y, curves) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, number, title=title, xlabel=at, ylabel=y)
        for i, (label, runs) in enumerate(curves.items()):
            xs = sorted({x for curve in runs for x in curve})
            values = [[curve[x] for curve in runs if x in curve] for x in xs]
            mean = np.array([np.mean(v) for v in values])
            spread = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values])
            j = i + i // 8  # from the ninth on, a colour meets another dash and mark
            [lines[label]] = axis.plot(xs, mean, MARKS[j % 8] + DASHES[j % 4], color=COLOURS[i % 8],
                                       markevery=max(1, len(xs) // 6), markersize=5)
            # no share lies outside 0 and 100 %
            low, high = np.clip((mean - spread, mean + spread), 0, 100 if "%" in y else None)
            axis.fill_between(xs, low, high, color=COLOURS[i % 8], alpha=0.2, linewidth=0)
            bands.append(spread.any())
        if not any(bands[-len(curves) :]):  # nothing parts a trend from noise: nothing is enlarged
            top = max(axis.dataLim.y1, 10 if "%" in y else 1)
            axis.set_ylim(-0.05 * top, 1.05 * top)
        axis.locator_params("x", integer=True)
        if not axis.dataLim.width:
            axis.set_xticks([axis.dataLim.x0])
    figure.legend(map(lines.get, shown), names, ncols=beside, loc="outside upper center")
    seeds = [", ".join(str(run.args.get("seed")) for run in runs) for runs in arms.values()]
    caption = (f"{'Mean over seeds' if ',' in ''.join(seeds) else 'One seed an arm'} "
               f"({'; '.join(dict.fromkeys(seeds))}); "
               f"{'a band is one standard deviation over runs' if any(bands) else 'no bands'}.")
    figure.supxlabel(textwrap.fill(caption, 45 * columns), fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the same bytes each time
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------
# Pages


def markdown_table(rows):
    cells = [["–" if c is None else str(c).replace("|", "\\|") for c in row] for row in rows]
    lines = [" ".join(f"| {' | '.join(row)} |".split()) for row in cells]  # each on one line
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def html_table(rows):
    """Every cell is escaped: labels hold what a user typed, cells what a model wrote."""
    html = ""
    for row in rows:
        tag = "td" if html else "th"
        cells = (f"<{tag}>{escape('–' if cell is None else str(cell))}</{tag}>" for cell in row)
        html += f"<tr>{''.join(cells)}</tr>"
    return f"<table>{html}</table>"


def embedded(png, words):
    return f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def picture(source):
    """An image as an element that needs no other file, at most 256 pixels wide or high."""
    try:
        image = open_image(source)
    except Exception:  # Pillow's plug-ins raise what they like
        why = f"not found or broken: {source}" if source else "not kept: its data hold it as bytes"
        return f"<p class=missing>picture {escape(why)}</p>"
    image.thumbnail((256, 256))  # a page of full photographs would be too heavy to send
    return embedded(as_png(image), "the prompt's picture")


def card(r):
    """One completion with its rewards."""
    rewards = ", ".join(f"{name} {value}" for name, value in r["rewards"].items())
    # a mark beside the colour: one of them reaches everybody
    kind, mark = {True: ("good", "✓"), False: ("bad", "✗"), None: ("unscored", "")}[
        is_right(r["rewards"])]
    return (f"<div class={kind}><b>{mark} advantage {r['advantage']:+.2f}</b> "
            f"<small>{escape(rewards)}; {r['length']} tokens, {escape(r['finish_reason'])}</small>"
            f"<pre>{escape(r['completion_text'])}</pre></div>")


def groups_of(members, label, count):
    """HTML of `count` prompts of an arm's first, middle and last kept step, each with G answers."""
    run = max(members, key=lambda run: len(run.answers) > 0)  # a page of all would be too large
    files = sorted((run.path / "samples").glob("step_*.jsonl"))
    for path in dict.fromkeys(files[i] for i in (0, len(files) // 2, -1) if files):
        groups = defaultdict(list)
        for r in read_rows(path, []):
            groups[r["id"]].append(r)
        for prompt, records in list(groups.items())[:count]:
            title, first = f"{label}, {run.path.name}, {path.stem}, prompt {prompt}", records[0]
            images, (*texts, last) = first.get("images", []), first["question"].split(MARK)
            images = map(picture, images if len(images) == len(texts) else [None] * len(texts))
            asked = "".join(f"{escape(text)}{image}" for text, image in zip(texts, images))
            yield (f"<section><h3>{escape(title)}</h3><div class=prompt>{asked}{escape(last)}"
                   f"<p>Answer: <b>{escape(first['answer'])}</b></p></div>"
                   f"<div class=cards>{''.join(map(card, records))}</div></section>")


# one file that opens without a network; its policy forbids scripts, whatever it holds
HEAD = """<!doctype html><html lang=en><meta charset=utf-8><title>Glassbox report</title>
<meta http-equiv=Content-Security-Policy content="default-src 'none'; \
img-src data:; style-src 'unsafe-inline'"><style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em;
       color: #111; background: #fff; overflow-wrap: break-word }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .25em .6em; text-align: left }
img { max-width: 100% } .prompt img { image-rendering: pixelated; min-width: 128px; display: block }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: .6em }
.cards div { border-left: 4px solid #999; background: #f6f6f6; padding: .4em .6em }
.cards .good { border-color: #0072B2 } .cards .bad { border-color: #D55E00 } small { color: #444 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 0; font-size: 12px }
</style><h1>Glassbox report</h1>"""


# ---------------------------------------------------------------------------------------------
# The stage


def main(args):
    runs = []
    for path in find_runs(args.runs):
        try:
            runs.append(read_run(path, args.substring))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its files are not those of a run ({error!r}); mend them, or "
                            "leave this run out.")
    out = Path(args.out or Path(args.runs[0]) / "report")
    arms = in_arms(runs)
    found = findings(arms)
    tables = {
        "Accuracy": accuracy_table(arms),
        "RL against SFT": difference_table(arms),
        "Out of distribution": transfer_table(arms),
        "Evaluations": evaluation_table(runs),
        "The paper's findings": found,
        "Cost": cost_table(arms),
        "Failure signatures": diagnostics(arms, found),
        "Reflections that were right": [
            ["run", "step", "question", "answer", "advantage", "response"],
            *([str(run.path), r["step"], r["question"].replace(MARK, ""), r["answer"],
               f"{r['advantage']:+.2f}", r["completion_text"]] for run in runs for r in run.aha)],
        "Missing": [["run", "what is missing"], *([str(run.path), sentence] for run in runs
                                                  for sentence in run.missing)],
    }
    tables = {title: rows for title, rows in tables.items() if len(rows) > 1}

    note = (f"pass@n in percent. 95 % intervals: of arms {ROUNDS} redraws of seeds and prompts, of "
            "evaluations Wilson's. Best epoch: the maximum over epochs, which favours noise.")
    page, text = [HEAD, f"<p>{note}</p>"], [f"# Report\n\n{note}"]
    for name, panels_of in (("accuracy", accuracy_panels), ("training", training_panels),
                            ("words", words_panels)):
        # those with a point: without accuracies, nothing is right or wrong
        if panels := [panel for panel in panels_of(arms) if any(map(any, panel[-1].values()))]:
            png = draw(panels, arms)
            page.append(f"<h2>{name.capitalize()}</h2>{embedded(png, name)}")
            text.append(f"![{name}]({name}.png)")
            utils.write_bytes(out / f"{name}.png", png)
    for title, rows in tables.items():
        page.append(f"<h2>{escape(title)}</h2>{html_table(rows)}")
        text.append(f"## {title}\n\n{markdown_table(rows)}")
    groups = [g for label, runs in arms.items() for g in groups_of(runs, label, args.groups)]
    page += ["<h2>Prompts and their answers</h2>", *groups] if groups else []
    utils.write_text(out / "report.html", "\n".join(page))
    utils.write_text(out / "report.md", "\n\n".join(text) + "\n")
    utils.write_json(out / "report.json", {
        title: [dict(zip(rows[0], row)) for row in rows[1:]] for title, rows in tables.items()})
    for row in tables.get("Missing", [])[1:]:
        print0(": ".join(row))
    return {"out": str(out), "runs": len(runs), "arms": {k: len(v) for k, v in arms.items()},
            "completions": sum(len(run.answers) for run in runs)}


if __name__ == "__main__":
    utils.run_script(main, Args)
