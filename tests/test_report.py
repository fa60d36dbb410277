"""The report: its numbers worked by hand, what it makes of broken folders, and its page in a browser."""

import html.parser
import json
import math
import shutil
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
import utils
from runs import run

ROOT = Path(__file__).parents[1]
HOSTILE = "</pre><script>window.hacked = 1; document.title = 'hacked'</script><img src=x onerror=alert(1)>"


def evaluation(epoch, right, split="validation", n=1, setting="pass1_t0.6", **more):
    solved = sum(r > 0 for r in right) / len(right)
    return {"generation_step": epoch, "epoch": epoch, "split": split, "setting": setting, "n": len(right),
            "right": right, "accuracy": sum(right) / len(right) / n, f"pass@{n}": solved,
            f"pass@{n}_interval": [0.0, 1.0], "length": 10.0, "seconds": 2.0} | more


def metric(step, epoch, length=10.0, **more):
    return {"generation_step": step, "epoch": epoch, "ranks": 2, "reward": 0.5, "reward/accuracy": 0.5,
            "tokens": 100.0, "length": length, "truncated": 0.0, "groups_all_alike": 0.0, "sampler_gap": 0.0,
            "seconds_rollout": 1.0, "seconds_update": 2.0, "peak_memory_gb": 1.5} | more


def completion(prompt, text, right, advantage=0.0, **more):
    return {"id": prompt, "question": "<image>How many?", "answer": "2", "completion_text": text,
            "finish_reason": "stop", "rewards": {"accuracy": float(right)}, "reward": float(right),
            "advantage": advantage, "length": len(text.split()), "images": []} | more


def write_run(folder, evals=(), metrics=(), samples=(), script="train_grpo", ended=True, **args):
    args = {"script": script, "model": "toy_model", "out": str(folder), "seed": 0} | args
    if script == "train_grpo":
        args = {"advantage": "grpo"} | args
    utils.write_json(folder / "args.json", args)
    utils.write_jsonl(folder / "eval.jsonl", evals)
    utils.write_jsonl(folder / "metrics.jsonl", metrics)
    for step, records in enumerate(samples, 1):
        utils.write_jsonl(folder / "samples" / f"step_{step:06d}.jsonl", records)
    if ended:
        utils.write_json(folder / "result.json", {})
    return folder


def read(folder, substring=False):
    return report.read_run(folder, substring)


def make(out, *runs, **more):
    return report.main(report.Args(runs=[str(r) for r in runs], out=str(out), **more))


def table(out, title):
    return json.loads((out / "report.json").read_text()).get(title, [])


# ---------------------------------------------------------------------------------------------
# Numbers


def test_draws_are_a_bootstrap():
    """Each round weighs n things by how often they were drawn; the spread of a mean is sd / sqrt(n)."""
    weights = report.draws(50, 0)
    assert weights.shape == (report.ROUNDS, 50) and np.allclose(weights.sum(1), 1)
    solved = np.arange(50) < 20
    spread = (weights @ solved).std()
    assert spread == pytest.approx(math.sqrt(0.4 * 0.6 / 50), rel=0.05)
    assert (report.draws(50, 0) == weights).all() and (report.draws(50, 1) != weights).any()


def test_scores_are_pass_n_by_epoch(tmp_path):
    """pass@2 counts prompts with any right answer; a repeated epoch counts once, with its last row."""
    rows = [evaluation(1, [2, 1, 0, 0], n=2), evaluation(0, [1, 0, 0, 0], n=2), evaluation(1, [2, 2, 1, 0], n=2),
            evaluation(1, [2, 2, 2, 2], split="test", n=2)]
    epochs, values, redrawn = report.scores(read(write_run(tmp_path, rows)), "validation", "pass1_t0.6")
    assert epochs == [0, 1] and values.tolist() == [0.25, 0.75] and redrawn.shape == (2, report.ROUNDS)
    assert redrawn.mean(1) == pytest.approx([0.25, 0.75], abs=0.02)


def two_runs(tmp_path, name, rights, **args):
    return [read(write_run(tmp_path / f"{name}_{seed}", [evaluation(e, r) for e, r in enumerate(run)],
                           seed=seed, **args)) for seed, run in enumerate(rights)]


@pytest.mark.parametrize("name, expected", [
    (report.START, (0.25 + 0.25) / 2), ("mean", ((0.5 + 1.0) / 2 + (0.75 + 0.25) / 2) / 2),
    ("max", (1.0 + 0.75) / 2), ("last", (1.0 + 0.25) / 2), ("gain", (0.75 + 0.0) / 2)])
def test_statistics_by_hand(tmp_path, name, expected):
    """Mean and maximum are over the epochs after training began, then over runs, in this order."""
    runs = two_runs(tmp_path, "a", [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
                                    [[0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0]]])
    value, rounds = report.statistic(runs, "validation", "pass1_t0.6", name)
    assert value == expected and rounds.shape == (report.ROUNDS,)


def test_a_statistic_needs_both_ends(tmp_path):
    """A run that crashed before its first epoch ended says nothing about training."""
    runs = two_runs(tmp_path, "a", [[[1, 0]], [[1, 0], [1, 1]]])
    assert report.statistic(runs, "validation", "pass1_t0.6", "last")[0] == 1.0
    assert report.statistic(runs[:1], "validation", "pass1_t0.6", "last") is None
    assert report.statistic(runs, "test", "pass1_t0.6", "last") is None


def test_interval_covers_as_often_as_it_says(tmp_path):
    """Of 200 runs over 100 prompts that are right with chance 0.3, 95 % of the intervals hold 0.3."""
    rng = np.random.default_rng(0)
    solved = (rng.random((200, 100)) < 0.3).astype(float)
    rounds = report.draws(100, 0) @ solved.T  # (ROUNDS, 200)
    bounds = np.array([report.interval(column) for column in rounds.T])
    held = ((bounds[:, 0] <= 0.3) & (0.3 <= bounds[:, 1])).mean()
    assert 0.90 <= held <= 0.99


def test_arms_are_compared_on_the_same_prompts(tmp_path):
    """Two runs that solve the same prompts differ by exactly 0 however the prompts are drawn."""
    right = [[0] * 20 + [1] * 20, [1, 0] * 20]
    arms = {"GRPO": two_runs(tmp_path, "g", [right]),
            "SFT": two_runs(tmp_path, "s", [right], script="train_sft")}
    [(split, setting, names, mean, last)] = report.against_sft(arms)
    assert (split, setting, names) == ("validation", "pass1_t0.6", "GRPO - SFT")
    assert mean[0] == 0 and not mean[1].any() and not last[1].any()


def test_arms_from_different_bases_are_not_compared(tmp_path):
    arms = {"GRPO": two_runs(tmp_path, "g", [[[0, 1], [1, 1]]], model="other"),
            "SFT": two_runs(tmp_path, "s", [[[0, 1], [1, 1]]], script="train_sft")}
    assert list(report.against_sft(arms)) == []


def test_correlation_is_within_groups():
    """Simpson's paradox: r = -1 within each of two groups, +0.9 over both."""
    x, y = np.array([1.0, 2, 3, 11, 12, 13]), np.array([3.0, 2, 1, 13, 12, 11])
    group, run = np.array([0, 0, 0, 1, 1, 1]), np.zeros(6)
    step = np.array([1, 1, 2, 2, 3, 3])
    assert np.corrcoef(x, y)[0, 1] > 0.9
    r, (low, high), n = report.correlation(x.copy(), y.copy(), group, run, step)
    assert r == pytest.approx(-1) and low == pytest.approx(-1) and high == pytest.approx(-1) and n == 6
    assert report.correlation(x, y, run, run, step)[0] == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_correlation_leaves_out_what_does_not_vary():
    """A group in which all reflect says nothing about length and reflection."""
    x, y = np.array([1.0, 2, 5, 9, 9, 9]), np.array([0.0, 1, 1, 1, 0, 1])
    group = np.array([0, 0, 1, 1, 2, 2])
    r, _, n = report.correlation(x, y, group, np.zeros(6), np.arange(6))
    # group 0: (-0.5, -0.5), (0.5, 0.5); group 1: x -2, 2, y 0; group 2: x 0, y -0.5, 0.5
    assert n == 2 and r == pytest.approx(0.5 / math.sqrt((0.5 + 8) * (0.5 + 0.5)))
    assert report.correlation(x[2:], y[2:] * 0 + 0.1, group[2:], np.zeros(4), np.arange(4)) is None


def test_correlation_interval_redraws_steps():
    """Independent noise: the interval holds 0, about 2 / sqrt(n) to either side."""
    rng = np.random.default_rng(0)
    x, y = rng.random(900), rng.random(900)
    _, (low, high), _ = report.correlation(x, y, np.zeros(900), np.zeros(900), np.repeat(np.arange(90), 10))
    assert low < 0 < high and high - low == pytest.approx(4 / 30, rel=0.25)


def test_seed_sensitivity_by_hand():
    """Means 11 and 21 differ by 10: SD 7.07; each run's own steps differ by 2: SD 1.41; ratio 5."""
    found = report.seed_sensitivity([[10, 12], [20, 22]])
    assert found["mean"] == 16 and found["between"] == pytest.approx(math.sqrt(50))
    assert found["within"] == pytest.approx(math.sqrt(2))
    assert found["interval"] == [0.0, pytest.approx(math.sqrt(50))]
    assert report.seed_sensitivity([[10, 12]]) is None and report.seed_sensitivity([[10], [20]]) is None


def test_an_epoch_ends_at_its_whole_number(tmp_path):
    run = read(write_run(tmp_path, metrics=[metric(i, i / 3, length=i) for i in range(1, 7)]))
    assert report.by_epoch(run, "length") == {1: [1, 2, 3], 2: [4, 5, 6]}


def test_judge():
    assert [report.judge(*pair) for pair in ((0.1, 1), (-1, -0.1), (-1, 1))] == [
        "reproduced", "the opposite", "undecided"]


# ---------------------------------------------------------------------------------------------
# Arms, findings, signatures


def test_arms_are_told_apart_by_what_changes_training(tmp_path):
    """Seed, folder and what is measured do not part runs; a flag of the algorithm does, and is named."""
    given = [dict(seed=1, kl_coef=0.0), dict(seed=0, kl_coef=0.0, eval_every=1), dict(seed=0, kl_coef=0.1),
             dict(seed=0, script="train_sft"), dict(seed=0, script="evaluate")]
    runs = [read(write_run(tmp_path / str(i), **args)) for i, args in enumerate(given)]
    arms = report.in_arms(runs)
    assert {label: [run.path.name for run in members] for label, members in arms.items()} == {
        "GRPO --kl_coef 0.0": ["1", "0"], "GRPO --kl_coef 0.1": ["2"], "SFT": ["3"]}


def test_a_label_leaves_out_what_most_arms_share(tmp_path):
    """Three arms: the one with the usual values has a bare label."""
    given = [dict(group_size=8, lr=1e-3), dict(group_size=2, lr=1e-3), dict(group_size=8, lr=1e-4)]
    runs = [read(write_run(tmp_path / str(i), **args)) for i, args in enumerate(given)]
    assert list(report.in_arms(runs)) == ["GRPO", "GRPO --group_size 2", "GRPO --lr 0.0001"]


def full_run(folder, seed, lengths, right_last, **args):
    """Two epochs of two steps; in each step a long answer that reflects and a short one that does not."""
    samples = [[completion("p1", "wait, it is 2 and not 3", True, 1.0), completion("p1", "3", False, -1.0)],
               [completion("p2", "re-check it once more: 2", True, 1.0), completion("p2", "it is 4", False, -1.0)]]
    rows = [evaluation(e, r, split) for split in ("validation", "test")
            for e, r in enumerate(([1, 0, 0, 0], [1, 1, 0, 0], right_last))]
    return write_run(folder, rows, [metric(i + 1, (i + 1) / 2, n) for i, n in enumerate(lengths)],
                     samples * 2, seed=seed, **args)


def test_findings_of_made_runs(tmp_path):
    """Better than SFT on every prompt, lengths that part, long answers that reflect: all reproduced."""
    for seed, lengths in enumerate([(10, 10, 20, 21), (10, 10, 40, 41), (10, 10, 60, 61)]):
        full_run(tmp_path / f"g{seed}", seed, lengths, [1, 1, 1, 1])
        full_run(tmp_path / f"s{seed}", seed, lengths, [0, 0, 0, 0], script="train_sft")
    make(tmp_path / "out", tmp_path)
    found = {row["finding"]: row for row in table(tmp_path / "out", "The paper's findings")}
    assert len(found) == 5
    better = found["1. RL generalises better than SFT: test, mean of epochs"]
    assert better["effect"].startswith("50.0 [") and better["verdict"] == "reproduced"
    parted = found["2. Response length depends on the seed"]
    assert parted["effect"] == "SD between seeds 20.00 [0.00, 23.09] of 40.5 tokens, within a run 0.71"
    assert parted["verdict"] == "reproduced"
    r = found["3. Reflection goes with length, between answers of a step"]
    # deviations of length 3 and 1 beside deviations of a half: 4 / sqrt(20)
    assert r["effect"].startswith("r = 0.89 [") and r["verdict"] == "reproduced"
    flat = found["3. Reflection goes with length, between steps of a run"]
    assert flat["verdict"] == "not testable"  # half of each step's answers reflect


@pytest.mark.parametrize("steps, said", [(2, False), (3, True)])
def test_two_steps_are_no_correlation(tmp_path, steps, said):
    """They always lie on a line: r would be 1 or -1, without an interval."""
    words = {"words": dict.fromkeys(report.REFLECTION_WORDS, 0)}
    for seed in (0, 1):
        write_run(tmp_path / f"g{seed}", seed=seed, metrics=[
            metric(i + 1, (i + 1) / steps, 10.0 + i, **dict.fromkeys(report.RATIOS, share), **words)
            for i, share in enumerate((0.1, 0.3, 0.4)[:steps])])
    make(tmp_path / "out", tmp_path)
    found = [row["finding"] for row in table(tmp_path / "out", "The paper's findings")]
    assert ("3. Reflection goes with length, between steps of a run" in found) == said


@pytest.mark.parametrize("sign, change", [
    ("reward up while validation is down", dict(rows=([1] * 40, [0] * 40), late={"reward": 0.9})),
    ("dead groups", dict(late={"groups_all_alike": 0.6})),
    ("answers cut off", dict(late={"truncated": 0.2})),
    ("sampler and trainer disagree", dict(late={"sampler_gap": 0.06})),
    ("reflection unrelated to success", dict(right=(1, 0, 1, 0)))])
def test_each_failure_signature_is_named(tmp_path, sign, change):
    """A healthy run shows none; one that differs in one thing shows that one alone."""
    def signs(folder, rows=([0] * 40, [1] * 40), late={}, right=(1, 1, 0, 0)):
        texts = ("wait: 2", "wait, 2", "2", "it is 2")
        records = [completion("p", text, is_right) for text, is_right in zip(texts, right)]
        more = [metric(i, i / 2, **(late if i > 2 else {})) for i in range(1, 5)]
        run = read(write_run(folder, [evaluation(e, r) for e, r in enumerate(rows)], more, [records] * 4))
        return [what for what, _, bad in report.diagnose(run) if bad]

    assert signs(tmp_path / "well") == []
    assert signs(tmp_path / "ill", **change) == [sign]


def test_a_slump_within_noise_is_no_sign(tmp_path):
    """Validation one prompt of four lower than before, reward up: that is luck."""
    rows = [evaluation(e, r) for e, r in enumerate(([1, 1, 1, 0], [1, 1, 0, 0]))]
    run = read(write_run(tmp_path, rows, [metric(1, 1.0), metric(2, 2.0, reward=0.9)]))
    assert not any(bad for _, _, bad in report.diagnose(run))


def test_signs_are_counted_over_runs(tmp_path):
    """One run of two has dead groups: it is the one that is quoted; nobody's answers are cut off: the first is."""
    for seed, alike in enumerate((0.25, 0.75)):
        write_run(tmp_path / str(seed), [evaluation(0, [1])], [metric(1, 1.0, groups_all_alike=alike)], seed=seed)
    make(tmp_path / "out", tmp_path)
    rows = {row["sign"]: list(row.values())[2:] for row in table(tmp_path / "out", "Failure signatures")}
    assert rows["dead groups"] == ["1 of 2", "1: 75% of the last epoch's groups all alike"]
    assert rows["answers cut off"] == ["0 of 2", "0: 0.0% of the last epoch's"]


def test_costs_by_hand(tmp_path):
    """Two ranks for 3 seconds a step are 6 device-seconds; evaluation is counted apart."""
    write_run(tmp_path / "a", [evaluation(0, [1]), evaluation(1, [1])], [metric(1, 0.5), metric(2, 1.0)])
    make(tmp_path / "out", tmp_path / "a")
    [row] = table(tmp_path / "out", "Cost")
    assert {row[k] for k in ("steps", "rollout, s", "update, s", "evaluation, s")} == {"2", "2.0", "4.0"}
    assert row["completion tokens"] == "200" and row["device-seconds"] == "12.0"
    assert row["peak memory, GB"] == "1.50"


def test_damaged_images_are_a_table_of_evaluations(tmp_path):
    for how in ("none", "blank"):
        rows = [evaluation(0, [1, 0], split="toy_data/test.jsonl", perturb=how)]
        write_run(tmp_path / how, rows, script="evaluate", model="m")
    make(tmp_path / "out", tmp_path)
    rows = table(tmp_path / "out", "Evaluations")
    assert [(r["images"], r["pass@n"]) for r in rows] == [
        ("blank", "50.0 [0.0, 100.0]"), ("as they are", "50.0 [0.0, 100.0]")]


def test_a_long_value_is_named_without_its_middle(tmp_path):
    """On one line; and where the ends are alike, both arms are still there."""
    ends = ("Think\nstep by step. " * 9, *(f"/data/geometry/{'sub/' * 20}{n}/{'more/' * 9}train.jsonl" for n in "12"))
    runs = [read(write_run(tmp_path / str(i), instruction=end)) for i, end in enumerate(ends)]
    first, second, third = report.in_arms(runs)
    assert first == "GRPO --instruction Think step by step.  ... k step by step. Think step by step."
    assert second == "GRPO --instruction /data/geometry/sub/s ... ore/more/more/more/more/train.jsonl"
    assert third == f"{second} ({tmp_path / '2'})" and max(map(len, (first, second))) < 80


def test_what_is_kept_does_not_part_arms(tmp_path):
    runs = [read(write_run(tmp_path / str(i), seed=i, keep_best=best)) for i, best in enumerate(("", "test/pass1_t0.6"))]
    assert list(report.in_arms(runs)) == ["GRPO"]


def test_a_plain_evaluation_alone(tmp_path):
    """It is called an evaluation, not a damaged image; no section is empty; stopped, it has no training step."""
    write_run(tmp_path / "a", [evaluation(0, [1, 0], split="test.jsonl", perturb="none")], script="evaluate", ended=False)
    make(tmp_path / "out", tmp_path / "a")
    assert [row["pass@n"] for row in table(tmp_path / "out", "Evaluations")] == ["50.0 [0.0, 100.0]"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Damaged" not in page and "of evaluations Wilson's" in page and "Prompts and their answers" not in page
    assert [row["what is missing"] for row in table(tmp_path / "out", "Missing")] == ["it has not ended"]


def test_a_difference_of_nothing_has_no_row(tmp_path):
    """An arm that crashed before its first epoch ended is compared with nothing."""
    write_run(tmp_path / "g", [evaluation(0, [1, 0])])
    write_run(tmp_path / "s", [evaluation(e, [1, 0]) for e in (0, 1)], script="train_sft")
    make(tmp_path / "out", tmp_path / "g", tmp_path / "s")
    assert table(tmp_path / "out", "RL against SFT") == [] and len(table(tmp_path / "out", "Accuracy")) == 1


# ---------------------------------------------------------------------------------------------
# Figures


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn, in the order accuracy, training, words."""
    from matplotlib.figure import Figure
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: drawn.append(self) or save(self, *args, **more))
    return drawn


def entries(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


FLAGS = dict(group_size=16, kl_coef=0.04, loss="dr_grpo", lr=1e-5, rewards="accuracy:1.0,language:0.5,unfinished:0.5",
             train_data="/data/A/RATHER/LONG/FOLDER/geometry3k/geometry3k_rl_v0_filtered.jsonl")


@pytest.mark.parametrize("arms, splits", [(2, ["test"]), (2, ["validation", "test"]), (12, ["test"])])
def test_the_legend_fits(tmp_path, figures, arms, splits):
    """Whatever flags set arms apart, it lies inside the figure and above its panels."""
    for i in range(arms):
        given = FLAGS | {"instruction": f"$\\boxed{{{i}}}$"} if i else dict(group_size=8)
        write_run(tmp_path / str(i), [evaluation(e, [1, 0], s) for e in (0, 1) for s in splits], **given)
    make(tmp_path / "out", tmp_path)
    [figure] = figures
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert 0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 and len(entries(figure)) == arms + 1
    for axis in figure.axes:
        assert axis.get_tightbbox().y1 <= box.y0 and axis.bbox.height > 100
    assert r"--instruction $\boxed{1}$" in " ".join(entries(figure)[1].split()).replace(r"\$", "$")


def test_what_a_run_began_from_may_have_been_trained(tmp_path, figures):
    write_run(tmp_path / "a", [evaluation(e, [1, 0]) for e in (0, 1)], model="runs/sft/checkpoints/step_000640")
    make(tmp_path / "out", tmp_path / "a")
    assert entries(figures[0]) == ["GRPO", "before training"]
    assert "before training" in table(tmp_path / "out", "Accuracy")[0]
    assert "untrained" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("rights, expected", [
    ([[[0, 0], [0, 0]]] * 2, (-0.5, 10.5)),  # all seeds at 0 %
    ([[[1, 1], [1, 1]]], (-5, 105)),
    ([[[1] * 50 + [0] * 50, [1] * 51 + [0] * 49]], (-0.05 * 51, 1.05 * 51))])  # one seed, one point up
def test_nothing_is_enlarged_without_a_band(tmp_path, figures, rights, expected):
    """The axis of a share begins at 0 and shows 10 points at least, where no spread says what noise is."""
    for seed, run in enumerate(rights):
        write_run(tmp_path / str(seed), [evaluation(e, r) for e, r in enumerate(run)], seed=seed)
    make(tmp_path / "out", tmp_path)
    assert figures[0].axes[0].get_ylim() == pytest.approx(expected)


def test_a_band_may_be_looked_at_closely(tmp_path, figures):
    """Two seeds, 60 and 80 % after the epoch: from 50 %, where both began, to the band's end at 70 + 14.1."""
    for seed, n in enumerate((6, 8)):
        write_run(tmp_path / str(seed), [evaluation(0, [1, 0]), evaluation(1, [1] * n + [0] * (10 - n))], seed=seed)
    make(tmp_path / "out", tmp_path)
    low, high = figures[0].axes[0].get_ylim()
    margin = 0.05 * (20 + math.sqrt(200))
    assert (low, high) == pytest.approx((50 - margin, 70 + math.sqrt(200) + margin))


@pytest.mark.parametrize("seeds, spread, caption", [
    ((3,), 1, "One seed an arm (3); no bands."),
    ((3, 5), 1, "Mean over seeds (3, 5); a band is one standard deviation over runs."),
    ((3, 5), 0, "Mean over seeds (3, 5); no bands.")])
def test_the_caption_speaks_of_what_is_drawn(tmp_path, figures, seeds, spread, caption):
    for seed in seeds:
        write_run(tmp_path / str(seed), metrics=[metric(1, 0.5, spread * seed), metric(2, 1.0)], seed=seed)
    make(tmp_path / "out", tmp_path)
    assert figures[1].get_supxlabel().replace("\n", " ") == caption


def test_without_evaluations_training_accuracy_is_drawn(tmp_path, figures):
    """Half an epoch stands at one half, alone on its axis; an arm with no point has no entry."""
    write_run(tmp_path / "a", metrics=[metric(1, 0.25), metric(2, 0.5, **{"reward/accuracy": 1.0})])
    write_run(tmp_path / "b", lr=1.0, ended=False)
    make(tmp_path / "out", tmp_path)
    [axis] = figures[0].axes
    assert axis.lines[0].get_xydata().tolist() == [[0.5, 75]] and list(axis.get_xticks()) == [0.5]
    assert entries(figures[0]) == ["GRPO"]


def test_an_arm_has_one_colour_in_all_figures(tmp_path, figures):
    """SFT, which stands first, answers nothing in training; GRPO is second all the same."""
    full_run(tmp_path / "a", 0, (10, 11, 12, 13), [1, 1, 1, 0], script="train_sft")
    full_run(tmp_path / "b", 0, (10, 11, 12, 13), [1, 1, 1, 0])
    for file in (tmp_path / "a" / "samples").iterdir():
        file.unlink()
    make(tmp_path / "out", tmp_path)
    assert [entries(f) for f in figures] == [["SFT", "GRPO", "before training"], ["GRPO"], ["GRPO"]]
    colours = {f.legends[0].get_lines()[entries(f).index("GRPO")].get_color() for f in figures}
    assert colours == {report.COLOURS[1]}


# ---------------------------------------------------------------------------------------------
# Reading folders


def test_reflection_from_samples_and_from_metrics(tmp_path):
    """Counted anew from the completions where they are there; else what was logged."""
    texts = ["await the yeti", "wait, re-check", "2"]
    samples = [[completion("p", text, True) for text in texts]]
    run = read(write_run(tmp_path / "a", metrics=[metric(1, 1)], samples=samples))
    assert run.reflection[1]["reflection_ratio"] == pytest.approx(1 / 3)
    run = read(tmp_path / "a", substring=True)
    assert run.reflection[1]["reflection_ratio"] == pytest.approx(2 / 3)
    assert run.reflection[1]["words"]["wait"] == 2 and run.reflection[1]["words"]["yet"] == 1
    logged = run.reflection[1] | metric(1, 1)
    run = read(write_run(tmp_path / "b", metrics=[logged]))
    assert run.reflection == {1: logged} and "samples/ holds no completions" in " ".join(run.missing)
    run = read(tmp_path / "b", substring=True)
    assert run.reflection == {} and "--substring needs the completions" in " ".join(run.missing)


def test_a_crashed_run_is_reported_and_what_is_missing_said(tmp_path, capsys):
    """A cut line, no eval.jsonl, no result: the rest is still reported."""
    folder = write_run(tmp_path / "a", metrics=[metric(1, 0.5)], ended=False,
                       samples=[[completion("p", "wait", True)]])
    (folder / "eval.jsonl").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"generation_step": 2, "ep')
    with open(folder / "samples" / "step_000001.jsonl", "a") as file:
        file.write('{"completion_text": "wa')
    make(tmp_path / "out", folder)
    said = [row["what is missing"] for row in table(tmp_path / "out", "Missing")]
    assert said == ["eval.jsonl is not there",
                    "metrics.jsonl ends in a cut line, which was passed over",
                    "step_000001.jsonl ends in a cut line, which was passed over",
                    "it has not ended; its last logged step is 1"]
    shown = capsys.readouterr().err
    assert all(sentence in shown for sentence in said)
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "training.png").exists()


def test_an_empty_run_is_no_crash(tmp_path):
    write_run(tmp_path / "a", ended=False)
    assert make(tmp_path / "out", tmp_path)["arms"] == {"GRPO": 1}


def test_the_same_runs_give_the_same_bytes(tmp_path):
    for seed in (0, 1):
        full_run(tmp_path / f"g{seed}", seed, (10, 11, 12, 13), [1, 1, 1, 0])
    files = []
    for out in ("one", "two"):
        make(tmp_path / out, tmp_path / "g0", tmp_path / "g1")
        files.append({p.name: p.read_bytes() for p in sorted((tmp_path / out).iterdir())})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["accuracy.png", "report.html", "report.json", "report.md", "training.png",
                                "words.png"]


@pytest.mark.parametrize("prepare, sentence", [
    (lambda d: None, "no such folder"), (lambda d: d.mkdir(), "holds no run"),
    (lambda d: utils.write_text(d / "args.json", "{"), "not those of a run"),
    (lambda d: utils.write_text(d / "args.json", "[]"), "not those of a run"),
    (lambda d: utils.write_text(d / "args.json", "{}") or utils.write_text(d / "eval.jsonl", "rubbish\n"),
     "not those of a run")])
def test_what_is_no_run_is_a_sentence(tmp_path, prepare, sentence):
    prepare(tmp_path / "run")
    _, log = run("report.py", tmp_path / "run", "--out", tmp_path / "out", code=2)
    assert sentence in log and "Traceback" not in log
    assert not (tmp_path / "out").exists()


def test_the_default_folder_is_the_runs_own(tmp_path):
    write_run(tmp_path / "a")
    assert make("", tmp_path / "a")["out"] == str(tmp_path / "a" / "report")


def test_right_reflections_are_shown_best_first(tmp_path):
    """Right, with a word, ranked by how far above its siblings; the others are not shown."""
    records = [completion("p", "wait: 2", True, 0.5), completion("q", "verify: 2", True, 2.0),
               completion("r", "wait: 3", False, 3.0), completion("s", "2", True, 4.0)]
    write_run(tmp_path / "a", metrics=[metric(1, 1)], samples=[records])
    make(tmp_path / "out", tmp_path / "a")
    shown = table(tmp_path / "out", "Reflections that were right")
    assert [row["response"] for row in shown] == ["verify: 2", "wait: 2"]


def graded(folder, accuracies):
    """A run of one step whose answers have these accuracies; "no" where it had no accuracy reward at all."""
    texts = ("wait: 2", "wait, 2", "2", "it is 2")
    records = [completion("p", text, a == 1) | {"rewards": {"format": 1.0} if a == "no" else {"accuracy": a}}
               for text, a in zip(texts, accuracies)]
    row = metric(1, 1.0)
    if all(a in ("no", None) for a in accuracies):
        del row["reward/accuracy"]
    return write_run(folder, [evaluation(0, [1]), evaluation(1, [1])], [row], [records])


@pytest.mark.parametrize("accuracies", [["no"] * 4, [None] * 4])
def test_without_an_accuracy_nothing_is_wrong(tmp_path, accuracies, monkeypatch):
    """No cross and no tick, no train accuracy, no ratio of incorrect answers, no reflection that was right."""
    titles, draw = [], report.draw
    monkeypatch.setattr(report, "draw", lambda panels, arms: [titles.append(p[0]) for p in panels] and draw(panels, arms))
    make(tmp_path / "out", graded(tmp_path / "a", accuracies))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "✗" not in page and "✓" not in page and page.count("<div class=unscored>") == 4
    assert titles == ["validation, pass1_t0.6, n = 1", "response length", "reflection_ratio", '"wait"']
    assert table(tmp_path / "out", "Reflections that were right") == []
    assert not any("unrelated" in row["sign"] for row in table(tmp_path / "out", "Failure signatures"))
    found = read(tmp_path / "a").reflection[1]
    assert found["reflection_ratio"] == 0.5 and found["reflection_ratio_in_incorrect_answers"] is None


def test_some_answers_unscored(tmp_path):
    """They have no mark and are in no ratio of right and wrong; the others have all that they had."""
    make(tmp_path / "out", graded(tmp_path / "a", [1.0, None, 0.0, None]))
    page = (tmp_path / "out" / "report.html").read_text()
    assert [page.count(mark) for mark in ("✓", "✗", "<div class=unscored>")] == [1, 1, 2]
    run = read(tmp_path / "a")
    assert [run.reflection[1][name] for name in report.RATIOS] == [0.5, 1, 0, 1, 0]
    assert [s for s, _, _ in report.diagnose(run)].count("reflection unrelated to success") == 1
    right = run.answers[:, 3]
    assert np.isnan(right[[1, 3]]).all() and right[[0, 2]].tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report on two runs whose completions, questions and names are as hostile as can be."""
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    records = [completion("p<b>", f"wait {HOSTILE} {i}", i % 2, i - 1.5, question=f"<image>{HOSTILE}",
                          images=[str(folder / "picture.png")]) for i in range(4)]
    records += [completion("q", "wait " + "x" * 3000, 1, 0.5, images=[f"/nowhere/{'x' * 200}<i>.png"])]
    for seed in (0, 1):
        write_run(folder / f"run{seed}", [evaluation(e, [1, 0, e]) for e in (0, 1)], [metric(1, 1.0)], [records],
                  seed=seed, rewards="a|b")
    make(folder / "out", folder / "run0", folder / "run1")
    return folder / "out" / "report.html"


class Reader(html.parser.HTMLParser):
    """What elements a page has, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_one_file_with_escaped_text(page):
    read = Reader(page.read_text())
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "a", "b>"}
    assert all(a["src"].startswith("data:image/png;base64,") for t, a in read.elements if t == "img")
    assert not [a for _, a in read.elements for name in a if name.startswith("on")]
    text = "".join(read.text)
    assert HOSTILE in text and "✓ advantage +1.50" in text and "✗ advantage -1.50" in text
    assert f"picture not found or broken: /nowhere/{'x' * 200}<i>.png" in text


@pytest.mark.parametrize("question, images, shown", [
    ("<image>How many?", ["a"], "[a]How many?"), ("How many?", [], "How many?"),
    ("Is <image> like <image>, <b>?", ["a", "a"], "Is [a] like [a], <b>?"),
    ("<image>How many?", [], "picture not kept: its data hold it as bytesHow many?"),  # parquet, hub, data URI
    ("<image>How many?", ["text"], "picture not found or broken: TEXTHow many?")])
def test_a_picture_stands_at_its_mark(tmp_path, question, images, shown):
    """And where none can be shown it is said why; the mark itself is nobody's to read, in tables neither."""
    files = {"a": tmp_path / "a.png", "text": tmp_path / "text.png"}
    Image.new("RGB", (4, 4)).save(files["a"])
    files["text"].write_text("no picture")
    record = completion("p", "wait: 2", True, question=question, images=[str(files[name]) for name in images])
    write_run(tmp_path / "0", ended=False)  # crashed at once; the next seed's answers are shown
    write_run(tmp_path / "1", metrics=[metric(1, 1.0)], samples=[[record]], seed=1)
    make(tmp_path / "out", tmp_path)
    page = (tmp_path / "out" / "report.html").read_text()
    prompt = page.partition("<div class=prompt>")[2].partition("<p>Answer")[0].replace("<img ", "[a]<img ")
    assert "".join(Reader(prompt).text) == shown.replace("TEXT", str(files["text"]))
    assert prompt.count("<img ") == shown.count("[a]")
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "<image>" not in text and "&lt;image&gt;" not in text


def test_a_row_is_one_line_of_markdown():
    assert report.markdown_table([["a", "b"], ["one\n\ntwo", None]]).splitlines()[2:] == ["| one two | – |"]


def test_table_cells_are_escaped():
    rows = [["<a>"], [None], ["x|y & <b>"]]
    assert report.html_table(rows) == ("<table><tr><th>&lt;a&gt;</th></tr><tr><td>–</td></tr>"
                                       "<tr><td>x|y &amp; &lt;b&gt;</td></tr></table>")
    assert report.markdown_table(rows) == "| <a> |\n|---|\n| – |\n| x\\|y & <b> |"


@pytest.fixture
def browser(tmp_path):
    """`execute(script)` in headless Chromium, driven through chromedriver's own protocol."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs a browser: Debian's packages chromium and chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    port = next(line for line in driver.stdout if "successfully on port" in line).split()[-1].rstrip(".")

    def call(path, body, method="POST"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/session{path}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"}, method=method)
        return json.loads(urllib.request.urlopen(request, timeout=120).read())["value"]

    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
             "--disable-background-networking --disable-component-update --window-size=1200,900").split()
    options = {"binary": shutil.which("chromium"), "args": [*flags, f"--user-data-dir={tmp_path / 'profile'}"]}
    try:
        session = call("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})["sessionId"]
        yield lambda path, **body: call(f"/{session}/{path}", body)
        call(f"/{session}", {}, "DELETE")  # which closes the browser
    finally:
        driver.terminate()
        driver.wait()


def test_page_in_a_real_browser(page, browser):
    """It opens from the disk, shows its pictures, runs nothing, fetches nothing and fits the window."""
    browser("url", url=page.as_uri())
    look = lambda script: browser("execute/sync", script=f"return {script}", args=[])
    assert look("document.title") == "Glassbox report" and look("window.hacked") is None
    widths = look("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 4 and min(widths) == 40  # three figures, and the prompt's picture
    assert look("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    assert HOSTILE in look("document.querySelector('pre').textContent")
    for width in (1200, 420):
        browser("window/rect", width=width, height=900)
        assert look("document.documentElement.scrollWidth <= window.innerWidth"), width
