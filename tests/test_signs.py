"""The signs, worked by hand: just below and just above each threshold, once each, and quiet on what is healthy."""

import functools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest

import signs
import utils
from runs import run
from signs import ADVICE, STILL, WINDOW, Watch
from test_house import ROOT, source
from test_pages import LESSON, section, words

HEALTHY = {"reward": 0.5, "reward/accuracy": 0.5, "length": 100.0, "truncated": 0.0, "unscored": 0.0,
           "groups_all_alike": 0.2, "loss": 0.0, "entropy": 0.3, "clipped_low": 0.0, "clipped_high": 0.0,
           "sampler_gap": 1e-7, "grad_norm": 0.2, "tis_masked": 0.0, "kl": 0.0}
UNREST = (-0.02, 0.01, 0.0, -0.01, 0.02)  # of a window's five steps: mean 0


def steps(count, **changes):
    """Rows of metrics; a number stands for every step, a pair for the first five and all later ones.

    All have the unrest of UNREST, in their own scale, but for shares, which are exact.
    """
    rows = []
    for i in range(count):
        row = {"generation_step": i + 1}
        for name, value in (HEALTHY | changes).items():
            value = value[i >= WINDOW] if isinstance(value, tuple) else value
            moves = name in ("reward", "reward/accuracy", "length", "entropy", "loss")
            row[name] = value * (1 + UNREST[i % 5]) if moves and value is not None else value
        rows.append(row)
    return rows


def said(rows, evals=(), folder=None, **flags):
    """The names of the signs in the order in which a run of these rows says them; the sentences are well formed."""
    watch, found = Watch({"max_grad_norm": 1.0, "kl_coef": 0.0} | flags), []
    for row in rows:
        found += signs.notice(watch, row)
    if evals:
        utils.write_jsonl(folder / "eval.jsonl", evals)
        found += signs.notice_evaluations(watch, folder)
    names = [re.fullmatch(r"SIGN, step \d+: (.+?) \(.+\)\. Cause, probably: .+\. Turn: .+\.", text)[1] for text in found]
    assert len(names) == len(set(names)) and set(names) == watch.said
    return names


def evaluation(step, right, n=1, **more):
    solved = sum(r > 0 for r in right) / len(right)
    return {"generation_step": step, "epoch": step / 10, "split": "validation", "setting": "pass1_t0.6", "n": len(right),
            "right": right, "accuracy": solved, f"pass@{n}": solved, f"pass@{n}_interval": [0, 1]} | more


# a sign, what is just not enough for it, and what just is
EDGES = [
    ("dead groups", dict(groups_all_alike=0.50), dict(groups_all_alike=0.51)),
    ("dead groups, all right", dict(groups_all_alike=0.50, **{"reward/accuracy": 0.9}),
     dict(groups_all_alike=0.51, **{"reward/accuracy": 0.81})),
    ("dead groups, all wrong", dict(groups_all_alike=0.50, **{"reward/accuracy": 0.09}),
     dict(groups_all_alike=0.51, **{"reward/accuracy": 0.09})),
    ("answers cut off", dict(truncated=0.10), dict(truncated=0.11)),
    ("sampler and trainer disagree", dict(sampler_gap=0.05), dict(sampler_gap=0.051)),
    ("never right", {"reward/accuracy": 0.001}, {"reward/accuracy": 0.0}),
    ("unscored", dict(unscored=0.1), dict(unscored=0.11)),
    ("other languages", {"reward/language": -0.0100}, {"reward/language": (-0.02, -0.0101)}),
    ("length collapses", dict(length=(100.0, 60.1)), dict(length=(100.0, 59.9))),
    ("length explodes", dict(length=(100.0, 199.9)), dict(length=(100.0, 200.1))),
    ("entropy collapses", dict(entropy=(0.3, 0.0601)), dict(entropy=(0.3, 0.0599))),
    ("entropy collapses", dict(entropy=0.0101), dict(entropy=0.0099)),
    ("accuracy falls", {"reward/accuracy": (0.7, 0.561)}, {"reward/accuracy": (0.7, 0.559)}),
    ("accuracy falls", {"reward/accuracy": (0.4, 0.301)}, {"reward/accuracy": (0.4, 0.299)}),
    ("reward hacking", {"reward": (0.5, 0.9), "reward/accuracy": (0.5, 0.4501)},
     {"reward": (0.5, 0.9), "reward/accuracy": (0.5, 0.4499)}),
    ("clipped too often", dict(clipped_low=0.05, clipped_high=0.05), dict(clipped_low=0.05, clipped_high=0.051)),
    ("gradients too large", dict(grad_norm=3.0), dict(grad_norm=3.01)),
    ("gradients too large", dict(grad_norm=(0.2, 1.99)), dict(grad_norm=(0.2, 2.01))),
    ("tokens masked", dict(tis_masked=0.5), dict(tis_masked=0.51)),
    ("the divergence weighs too much", dict(kl=0.05), dict(kl=0.0501)),
]


@pytest.mark.parametrize("sign, below, above", EDGES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(EDGES)])
def test_each_sign_has_an_edge(sign, below, above):
    """Just below it is not said, just above it is; both after one whole window, and no other sign is."""
    language = {"reward/language": -0.005} if sign == "other languages" else {}
    for change, wanted in ((below, []), (above, [sign])):
        found = said(steps(10, **(language | change)), kl_coef=2.0)
        expected = {"never right", "dead groups, all wrong", "a reward that never varies", "accuracy falls"}
        assert [name for name in found if name == sign or name not in expected] == wanted, found


def test_every_sign_is_tried():
    tried = {name for name, *_ in EDGES} | {"a reward that never varies", "nothing moves", "validation has not risen",
                                           "reward up while validation is down"}
    assert tried == set(ADVICE)


def test_a_window_must_be_full():
    """Four steps say nothing, the fifth does, and the same is never said again."""
    rows = steps(40, truncated=0.9)
    assert said(rows[: WINDOW - 1]) == [] and said(rows[:WINDOW]) == ["answers cut off"]
    assert said(rows, lr=1).count("answers cut off") == 1


def test_a_window_is_a_mean():
    """One bad step of five is noise: 0.4 / 5 is below a tenth, 0.6 / 5 is above."""
    for share, wanted in ((0.4, []), (0.6, ["answers cut off"])):
        rows = steps(5)
        rows[2]["truncated"] = share
        assert said(rows) == wanted


def test_the_sampler_is_judged_at_its_worst():
    """One step from another policy is no noise: it is a mean over all of its tokens."""
    rows = steps(5)
    rows[2]["sampler_gap"] = 0.06
    assert said(rows) == ["sampler and trainer disagree"]


def test_noise_is_no_fall():
    """The same means, but steps that lie far apart: three standard errors are not reached."""
    rows = steps(10, **{"reward/accuracy": (0.7, 0.5)})
    assert said(rows) == ["accuracy falls"]
    for row, unrest in zip(rows, UNREST + UNREST):
        row["reward/accuracy"] += 10 * unrest
    assert said(rows) == []


def test_a_rise_by_hand():
    """Five values 1 apart: variance 2.5, so that three standard errors of the mean are 3 * sqrt(0.5) = 2.1213."""
    before = [{"x": 0.0}] * 5
    for d, wanted in ((2.121, 0.0), (2.122, 2.122), (-2.121, 0.0), (-2.122, -2.122)):
        assert signs.rise(before, [{"x": d + i} for i in (-2, -1, 0, 1, 2)], "x") == pytest.approx(wanted)
    assert math.isnan(signs.rise(before, [{"x": 1.0}], "x"))


def test_a_norm_may_grow_below_the_clip():
    assert said(steps(10, grad_norm=(0.02, 0.9))) == []


def test_bounds_on_whole_answers_hold_more():
    assert said(steps(5, clipped_low=0.3), loss="gspo") == []
    assert said(steps(5, clipped_low=0.31), loss="gspo") == ["clipped too often"]


def test_longer_and_better_is_no_sign():
    rows = steps(30)
    for i, row in enumerate(rows[WINDOW:], 1):
        row["length"] *= 1 + 0.1 * i
        row["reward/accuracy"] += 0.01 * i
    assert said(rows) == []
    for row in rows:
        row["reward/accuracy"] = 0.5
    assert said(rows) == ["length explodes"]


def test_what_is_solved_may_lose_its_entropy():
    low = dict(entropy=(0.3, 0.005), reward=(0.5, 0.81))
    assert said(steps(10, **low, **{"reward/accuracy": (0.5, 0.81)})) == []
    assert said(steps(10, **low, **{"reward/accuracy": (0.5, 0.79)})) == ["entropy collapses"]


@pytest.mark.parametrize("name, value, wanted", [
    ("format", 1.0, True), ("format", 0.0, True), ("mine", 0.3, True), ("language", 0.0, False),
    ("language", -0.005, True), ("unfinished", 0.0, False), ("overlong", 0.0, False)])
def test_a_reward_that_is_constant(name, value, wanted):
    """A penalty at 0 is as it should be; anything else that never changes teaches nothing; a single change will do."""
    rows = steps(5, **{f"reward/{name}": value})
    assert said(rows) == ["a reward that never varies"] * wanted
    rows[3][f"reward/{name}"] = value + 1e-6
    assert said(rows) == []


def test_nothing_moves_is_asked_every_twenty_steps():
    still = steps(20)
    assert said(still[:-1]) == [] and said(still) == ["nothing moves"]
    for name in ("reward", "length", "entropy"):  # one that moves will do: by a tenth, or beyond noise
        for factor, wanted in ((1.099, ["nothing moves"]), (1.101, [])):
            rows = steps(STILL)
            for row in rows[WINDOW:]:
                row[name] *= factor
            for row, unrest in zip(rows, UNREST * 4):
                row[name] *= 1 + 5 * unrest
            assert said(rows) == wanted, (name, factor)
        rows = steps(STILL)
        for row in rows[WINDOW:]:
            row[name] *= 1.05  # less than a tenth, and 3.3 standard errors of 0.0148
        assert said(rows) == [], name


def test_sft_has_the_same_hint():
    """Its rows have a loss, an entropy, and lengths that are the data's own."""
    rows = [{"generation_step": i + 1, "loss": 0.5 + UNREST[i % 5], "entropy": 0.4, "length": 30.0 + i, "grad_norm": 0.5}
            for i in range(STILL)]
    assert said(rows) == ["nothing moves"]
    for i, row in enumerate(rows):
        row["loss"] -= 0.02 * i
    assert said(rows) == []


def test_steps_without_updates_are_left_out():
    """All groups alike: entropy, clipping and norm are then means over nothing, written as 0."""
    assert said(steps(5, groups_all_alike=1.0, entropy=0.0, grad_norm=0.0)) == ["dead groups"]


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("how", ["missing", "null"])
def test_older_folders(name, how):
    """A metric that is not there, or null, is no sign, and none of the others' trouble."""
    rows = steps(STILL + 5, length=(100.0, 130.0), reward=(0.5, 0.7), **{"reward/accuracy": (0.5, 0.7)})
    for row in rows:
        row[name] = None
        if how == "missing":
            del row[name]
    assert said(rows) == []


def test_rows_that_know_nothing():
    assert said([{"generation_step": i} for i in range(STILL + 1)]) == []
    assert said([{"generation_step": i} | dict.fromkeys(HEALTHY) for i in range(STILL + 1)]) == []


# ---------------------------------------------------------------------------------------------
# Evaluations


def test_a_gain_by_hand():
    """Pairs: 3 prompts of 8 gained, 1 lost: mean 0.25, squares about it 3.5, / 7 / 8. Else two independent shares."""
    before, after = evaluation(0, [1, 0, 0, 0, 1, 1, 0, 1]), evaluation(20, [0, 1, 1, 1, 1, 1, 0, 1])
    assert signs.gain(before, after) == (0.25, 0.25)
    for row in (before, after):
        del row["right"]
    assert signs.gain(before, after) == (0.25, pytest.approx(math.sqrt((0.25 + 0.1875) / 8)))


def test_a_slump_of_validation(tmp_path):
    """Of 400 prompts 4 fewer are a point, and no sign; 5 fewer are; and none where the reward did not rise."""
    def fall(count, **reward):
        rows = [evaluation(e, [1] * 400) for e in (0, 10)] + [evaluation(20, [1] * (400 - count) + [0] * count)]
        return said(steps(10, **reward), rows, tmp_path)

    up = {"reward": (0.5, 0.9)}
    assert fall(4, **up) == [] and fall(5, **up) == ["reward up while validation is down"]
    assert fall(5, reward=(0.9, 0.9 - 1e-9)) == []


def test_validation_that_has_not_risen(tmp_path):
    """n = 100: a rise of 4 is 1.96 * sqrt(0.04 * 0.96 / 100) = 0.0384 and more, one of 3 is not."""
    def rise(count, step=STILL, start=50):
        rows = [evaluation(0, [1] * start + [0] * (100 - start)),
                evaluation(step, [1] * (start + count) + [0] * (100 - start - count))]
        return said(steps(10, reward=(0.5, 0.9)), rows, tmp_path)

    assert rise(4) == [] and rise(3) == ["validation has not risen"]
    assert rise(3, step=STILL - 1) == []  # too early to say
    assert rise(3, start=89) != [] and rise(3, start=90) == []  # there was not much left


def test_test_prompts_and_other_settings_are_apart(tmp_path):
    """Only validation speaks, each setting for itself."""
    flat = [evaluation(s, [1, 0] * 50, split="test") for s in (0, 20)]
    assert said(steps(10, reward=(0.5, 0.9)), flat, tmp_path) == []
    mixed = [evaluation(0, [1, 0] * 50), evaluation(20, [0, 0] * 50, setting="pass8_t1")]
    assert said(steps(10, reward=(0.5, 0.9)), mixed, tmp_path) == []


# ---------------------------------------------------------------------------------------------
# In the trainers


def test_constant_work_a_step():
    """However long the run, a Watch holds three windows."""
    watch = Watch({})
    for row in steps(1000):
        signs.notice(watch, row)
    assert [len(part) for part in (watch.first, watch.best, watch.last)] == [WINDOW] * 3


def test_the_best_steps_are_kept():
    rows = steps(30, **{"reward/accuracy": 0.5})
    for row in rows[10:15]:
        row["reward/accuracy"] = 0.9
    watch = Watch({})
    for row in rows:
        signs.notice(watch, row)
    assert watch.best == rows[10:15] and watch.first == rows[:5] and watch.last == rows[-5:]
    assert "accuracy falls" in watch.said


def test_a_resumed_run_does_not_say_it_again(tmp_path, capsys):
    rows = steps(12, truncated=0.9)
    utils.write_jsonl(tmp_path / "metrics.jsonl", rows[:6])
    watch = signs.begin(tmp_path, SimpleNamespace(max_grad_norm=1.0))
    assert watch.said == {"answers cut off"} and watch.flags == {"max_grad_norm": 1.0}
    for row in rows[6:]:
        signs.tell(watch, row | {"unscored": 0.9}, tmp_path)
    shown = capsys.readouterr().err
    assert shown.count("SIGN") == 1 and "SIGN, step 7: unscored (" in shown


def test_evaluations_are_read_where_they_have_grown(tmp_path, monkeypatch):
    reads, read = [], utils.read_jsonl
    monkeypatch.setattr(utils, "read_jsonl", lambda path: reads.append(path.name) or read(path))
    watch = Watch({})
    for step in range(1, 7):
        if step in (2, 5):
            utils.append_jsonl(tmp_path / "eval.jsonl", evaluation(step, [1, 0]))
        signs.tell(watch, steps(1)[0], tmp_path)
    assert reads == ["eval.jsonl"] * 2


def test_rank_one_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "rank", lambda: 1)
    watch = Watch({})
    for row in steps(6, truncated=0.9):
        signs.tell(watch, row, tmp_path)
    assert watch.steps == 0 and capsys.readouterr().err == ""


def toy(folder, count, change=lambda i, r: {}):
    """The toy's first training rows in a folder, changed."""
    rows = utils.read_jsonl(ROOT / "toy_data" / "train.jsonl")[:count]
    for row in rows:
        (folder / "images").mkdir(exist_ok=True)
        shutil.copy(ROOT / "toy_data" / row["image"], folder / row["image"])
    utils.write_jsonl(folder / "train.jsonl", [r | change(i, r) for i, r in enumerate(rows)])
    return "--train_data", folder / "train.jsonl", "--validation_data=", "--test_data="


def test_the_rl_trainer_says_them(tmp_path):
    """Answers cut off: once, with the flag to turn, though six steps show it."""
    data = toy(tmp_path, 8)
    _, log = run("train_grpo.py", "--model", ROOT / "toy_model", *data, "--batch_size", 2, "--mini_batch_size", 2,
                 "--group_size", 2, "--max_new_tokens", 12, "--epochs", 2, "--max_steps", WINDOW + 1, "--out",
                 tmp_path / "run")
    assert log.count("answers cut off (100.0% of the last 5 steps'). Cause, probably: ") == 1
    assert "Turn: --max_new_tokens, " in log


def test_sft_says_which_golden_responses_are_wrong(tmp_path):
    """Two of four end in another answer; one without an answer can not be judged. Then it trains as ever."""
    answers = {1: "99", 2: "98", 3: "?"}
    data = toy(tmp_path, 4, lambda i, r: {"answer": answers.get(i, r["answer"])})
    _, log = run("train_sft.py", "--model", ROOT / "toy_model", *data, "--batch_size", 4, "--max_steps", 1, "--out",
                 tmp_path / "run")
    first = utils.read_jsonl(tmp_path / "train.jsonl")[1]["id"]
    assert log.count("2 of 4 golden responses end in another answer than their row has") == 1
    assert f"The first is prompt {first}.\n" in log


@pytest.mark.parametrize("folder", ["quickstart", "lora", "experiment/main"])
def test_what_is_healthy_says_nothing_but_that_it_is_solved(folder):
    """The published runs: no sign but the end of what can be learnt, and one slump of validation by 1.3 points."""
    for path in sorted((ROOT / "results" / folder).glob("*/metrics.jsonl")):
        watch = Watch(json.loads((path.parent / "args.json").read_text()))
        for row in utils.read_jsonl(path):
            signs.notice(watch, row)
        signs.notice_evaluations(watch, path.parent)
        watch.said -= {"dead groups, all right"}
        if folder == "lora":  # half of the groups are alike two steps before accuracy is above SOLVED
            watch.said -= {"dead groups"}
        wanted = {"reward up while validation is down"} if path.parent.name == "reinforce_4" else set()
        assert watch.said == wanted, path


def test_every_flag_in_the_advice_is_one():
    flags = {flag for _, turn in ADVICE.values() for flag in re.findall(r"--(\w+)", turn)}
    known = source("train_grpo") + source("train_sft")
    # --instruction comes with the flags for data
    assert [flag for flag in flags - {"instruction"} if not re.search(rf"^    {flag}: ", known, re.M)] == []


# ---------------------------------------------------------------------------------------------
# The lesson's table, made again from results/symptoms.json and results/quickstart


@functools.cache
def quick():
    """What the runs of results/symptoms.sh said, by name; and the quick start's three seeds, from its raw metrics."""
    found = json.loads((ROOT / "results" / "symptoms.json").read_text())
    seeds = {}
    for seed in "012":
        folder, watch, texts = ROOT / "results" / "quickstart" / f"seed_{seed}", Watch({}), []
        for row in utils.read_jsonl(folder / "metrics.jsonl"):
            texts += signs.notice(watch, row)
        said = [re.match(r"SIGN, step (\d+): (.+?) \((.+?)\)\. Cause", text).groups() for text in texts]
        seeds[seed] = {name: {"step": int(step), "measured": measured} for step, name, measured in said}
    return found | {"quick start": {"command": "train_grpo.py", "seeds": seeds}}


def made_by(name, words):
    return words if name == "quick start" else f"{words} (`{name}`)"


def it_said(sign, name):
    """The first seed's words, and how many seeds said it."""
    seeds = quick()[name]["seeds"].values()
    shown = [seed[sign] for seed in seeds if sign in seed]
    if not shown:
        return f"did not appear, 0 of {len(seeds)}"
    return f"step {shown[0]['step']}: {shown[0]['measured']}; {len(shown)} of {len(seeds)}"


def healthy_rows():
    """Mean of the first and the last window of each seed of the quick start, the lowest and the highest of three."""
    rows = ["| metric | first | last |", "|---|---|---|"]
    runs = [utils.read_jsonl(ROOT / "results" / "quickstart" / f"seed_{seed}" / "metrics.jsonl") for seed in (0, 1, 2)]
    for name in ("reward/accuracy", "length", "truncated", "groups_all_alike", "entropy", "clipped_high", "sampler_gap",
                 "grad_norm", "loss"):
        cells = []
        for part in (slice(WINDOW), slice(-WINDOW, None)):
            low, *_, high = sorted(signs.average(rows_of[part], name) for rows_of in runs)
            cells.append(f"{low:.2g} to {high:.2g}" if high else "0")
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return rows


def test_the_lesson_has_a_row_for_each_sign():
    """Cause and remedy are signs.py's, the flags of a run stood on its command line, and it said what the page says."""
    table = section("My reward does not rise", LESSON)
    rows = [line.strip("| ").split(" | ") for line in table.split("\n| sign |")[1].split("\n\n")[0].splitlines()[2:]]
    assert [row[0] for row in rows] == list(ADVICE)
    meanings = section("Metrics", LESSON)
    for sign, look, cause, turn, made, shown in rows:
        assert (cause, turn) == ADVICE[sign]
        for metric in re.findall(r"`([\w/.]+)`", look):
            assert f"`{metric}`" in meanings or metric in ("reward/accuracy", "language", "eval.jsonl"), metric
        name = (re.findall(r" \(`(\w+)`\)$", made) or ["quick start"])[0]
        assert shown == it_said(sign, name)
        for flags in re.findall(r"`(--[^`]+)`", made):
            assert flags in quick()[name]["command"]
    assert "\n".join(healthy_rows()) in table
    golden = quick()["golden"]["seeds"]["0"]["golden responses"].removesuffix(" golden responses")
    assert f"({golden} in `golden`" in words(table)


def test_the_lessons_loss_near_zero_stands_in_results():
    runs = [utils.read_jsonl(path) for path in (ROOT / "results/experiment/ablation").glob("sequence_loss_*/metrics.jsonl")]
    most = max(abs(row["loss"]) for rows in runs for row in rows)
    first, last = (sum(signs.average(rows[part], "reward/accuracy") for rows in runs) / 3
                   for part in (slice(WINDOW), slice(-WINDOW, None)))
    said = f"never left 0 by more than {most:.0e} while accuracy rose from {100 * first:.0f} % to {100 * last:.0f} %"
    assert len(runs) == 3 and said.replace("e-08", "e-8") in words(LESSON)
