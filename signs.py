"""Signs: what a run's metrics say when training does not work, the probable cause, what to turn.

Pure functions of rows of metrics.jsonl and eval.jsonl, for the trainers, which say a sign as it
occurs and once, and for report.py. What a row lacks is NaN here, beyond which nothing lies. The
loss, which textbooks watch, is none: with one update a batch the ratio is 1 and advantages cancel
within a group, so that its value is near 0; its gradient is not.
"""

import math
from dataclasses import dataclass, field

import utils

WINDOW = 5  # steps that are looked at together, so that noise does not speak
STILL = 20  # steps in which something should have moved
SOLVED = 0.8  # accuracy from which on groups and answers that are all alike are no trouble
PENALTIES = ("reward/language", "reward/unfinished", "reward/overlong")  # at 0 nothing is wrong
ADVICE = {  # sign: (probable cause, what to turn); LESSON.md has each of them made on purpose
    "dead groups, all right": ("hardly anything is left to learn", "harder prompts, or stop here"),
    "dead groups, all wrong": ("too hard, or the answer's form is never met",
                               "easier prompts, --instruction, train_sft.py first, --group_size"),
    "dead groups": ("answers to a prompt hardly differ", "--group_size, --temperature, --refills"),
    "never right": ("no answer is found where the grader looks, or none can be right",
                    "read samples/, python reward.py SAID WANTED, --instruction, a format reward"),
    "a reward that never varies": ("always earned or never: it teaches nothing", "--rewards"),
    "answers cut off": ("no room to finish, or no end is found",
                        "--max_new_tokens, --rewards ...,overlong:1.0, --mask_truncated"),
    "length collapses": ("short answers pay, right or not", "--rewards, --loss dr_grpo"),
    "length explodes": ("long answers pay, or no end is found",
                        "--rewards ...,overlong:1.0, --loss dr_grpo, --lr"),
    "entropy collapses": ("nothing is explored any more",
                          "--temperature, --clip_high 0.28, --kl_coef, --lr"),
    "reward hacking": ("another reward is earned, not right answers", "--rewards, its weights"),
    "accuracy falls": ("steps too large: the policy is torn", "--lr, --clip_high, --kl_coef"),
    "clipped too often": ("the policy runs away from the one that answered",
                          "--lr, --ppo_epochs, --mini_batch_size"),
    "gradients too large": ("steps too large, or a batch too small",
                            "--lr, --warmup_steps, --batch_size, --max_grad_norm"),
    "nothing moves": ("steps too small, or held back", "--lr, --warmup_steps, --kl_coef"),
    "the divergence weighs too much": ("the policy has left the first one, and is pulled back",
                                       "--kl_coef, --lr"),
    "other languages": ("nothing asks for one language",
                        "--rewards ...,language:1.0, --instruction, --kl_coef"),
    "unscored": ("answers in the data that say nothing, or a reward that gives up",
                 "--train_data, --rewards"),
    "tokens masked": ("products or ratios past the cap", "--tis token, --tis_cap, --dtype float32"),
    "sampler and trainer disagree": ("rounding, or two policies",
                                     "python doctor.py, --engine hf, --dtype float32, --tis"),
    "reward up while validation is down": ("training prompts are learnt by heart, or the reward",
                                           "--keep_best, --epochs, more prompts, --kl_coef"),
    "validation has not risen": ("too little was learnt, or of other prompts",
                                 "--lr, --epochs, --train_data"),
}


# ---------------------------------------------------------------------------------------------
# Numbers


def known(rows, name):
    return [row[name] for row in rows if row.get(name) is not None]


def average(rows, name):
    return mean(known(rows, name))


def mean(numbers):
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def squared_error(numbers):
    """The square of the standard error of their mean."""
    centre = mean(numbers)
    return math.fsum((x - centre) ** 2 for x in numbers) / (len(numbers) - 1) / len(numbers)


def rise(before, after, name):
    """Difference of the means; 0 within three standard errors, NaN of fewer than two values."""
    old, new = known(before, name), known(after, name)
    if min(len(old), len(new)) < 2:
        return math.nan
    difference = mean(new) - mean(old)
    # how far steps of one window lie apart is what noise can do
    noise = math.sqrt(squared_error(old) + squared_error(new))
    return difference if abs(difference) > 3 * noise + 1e-9 else 0.0


def pass_name(row):
    """Which pass@n a row of eval.jsonl reports; pass@1 is the accuracy."""
    return next((k for k in row if k.startswith("pass@") and "interval" not in k), "accuracy")


def gain(before, after):
    """By how much pass@n rose between two evaluations, and the standard error of that.

    Over the same prompts one by one where both rows say how many of their answers were `right`.
    """
    old, new = ([r > 0 for r in row.get("right") or []] for row in (before, after))
    if len(old) == len(new) > 1:
        changes = [y - x for x, y in zip(old, new)]
        return mean(changes), math.sqrt(squared_error(changes))
    p, q = (row[pass_name(row)] for row in (before, after))
    return q - p, math.sqrt(p * (1 - p) / before["n"] + q * (1 - q) / after["n"])


# ---------------------------------------------------------------------------------------------
# Signs, each `(name, what was measured, is it a sign of trouble)`


def dead_groups(rows, whose):
    dead, right = average(rows, "groups_all_alike"), average(rows, "reward/accuracy")
    kind = ", all right" if right > SOLVED else ", all wrong" if right < 0.1 else ""
    return f"dead groups{kind}", f"{dead:.0%} of {whose} groups all alike", dead > 0.5


def cut_off(rows, whose):
    cut = average(rows, "truncated")
    return "answers cut off", f"{cut:.1%} of {whose}", cut > 0.1


def stray_sampler(rows):
    """bfloat16 alone makes up to 0.035 nats; above 0.1 doctor.py ends the run."""
    gap = max(known(rows, "sampler_gap"), default=math.nan)
    return "sampler and trainer disagree", f"mean difference {gap:.1e} nats at worst", gap > 0.05


def slump(rewards, evals):
    """`rewards`: mean before and now; `evals`: one split and setting, in order, two or more."""
    best = max(evals[:-1], key=lambda row: row[pass_name(row)])
    (before, now), (change, noise), last = rewards, gain(best, evals[-1]), evals[-1]
    return ("reward up while validation is down",
            f"reward {before:.2f} to {now:.2f}, {last['setting']} {best[pass_name(best)]:.1%} at "
            f"its best before, {last[pass_name(last)]:.1%} at last",
            # surely below an earlier one, and by more than a point
            now > before and change < min(-0.01, -1.96 * noise))


def no_gain(evals):
    (change, noise), start, last = gain(evals[0], evals[-1]), evals[0], evals[-1]
    was, now = start[pass_name(start)], last[pass_name(last)]
    return ("validation has not risen", f"{last['setting']} {was:.1%} at first, {now:.1%} now",
            last["generation_step"] >= STILL and was < 0.9 and change <= 1.96 * noise)


def reward_signs(first, best, last):
    """What rewards, lengths and the policy say, from the first, the best and the last steps."""
    right, name = average(last, "reward/accuracy"), "reward/accuracy"
    name = name if right == right else "reward"
    earned = [k for k in last[-1] if k.startswith("reward/") and k != name and known(last, k)]
    others = "".join(f", {k[7:]} {average(last, k):.2f}" for k in earned)
    yield "never right", f"accuracy 0 in {WINDOW} steps{others}", max(
        known(last, "reward/accuracy"), default=math.nan) == 0
    for k in earned:
        found = known(last, k)
        flat = max(found) - min(found) < 1e-9 and not (k in PENALTIES and abs(found[0]) < 1e-9)
        yield "a reward that never varies", f"{k} {found[0]:.3g} in every step", flat
    more, fall = rise(first, last, "reward"), rise(first, last, "reward/accuracy")
    yield ("reward hacking", f"reward {average(first, 'reward'):.2f} to "
           f"{average(last, 'reward'):.2f}, accuracy {fall:+.2f}", more > 0 and fall < -0.05)
    # against the best steps: what rose and fell again is the usual way in which a run ends
    top, now = average(best, name), average(last, name)
    yield ("accuracy falls", f"{name} {top:.2f} at its best, {now:.2f} now",
           rise(best, last, name) < -max(0.1, 0.2 * abs(top)))
    start, long = average(first, "length"), average(last, "length")
    useless, said = not rise(first, last, name) > 0, f"{start:.1f} tokens at first, {long:.1f} now"
    yield "length collapses", said, long < 0.6 * start and useless
    yield "length explodes", said, long > 2 * start and useless
    foreign = -10 * average(last, "reward/language")  # the reward is -0.1 a letter
    yield "other languages", f"{foreign:.0%} of the letters", foreign > 0.1
    unscored = average(last, "unscored")
    yield "unscored", f"{unscored:.0%} of the answers", unscored > 0.1


def update_signs(first, last, flags):
    """What the updates say; steps in which all groups were alike had none, and are left out."""
    first, last = ([row for row in rows if (row.get("groups_all_alike") or 0) < 1]
                   for rows in (first, last))
    start, now = average(first, "entropy"), average(last, "entropy")
    solved = average(last, "reward/accuracy") > SOLVED
    yield ("entropy collapses", f"{start:.3f} nats at first, {now:.4f} now",
           now < max(0.01, start / 5) and not solved and bool(known(last, "reward")))
    clipped = average(last, "clipped_low") + average(last, "clipped_high")
    most = 0.3 if flags.get("loss") == "gspo" else 0.1  # bounds on whole answers hold more of them
    yield "clipped too often", f"{clipped:.0%} of the tokens", clipped > most
    norms, most = known(last, "grad_norm"), flags.get("max_grad_norm", 1.0)
    start, now = average(first, "grad_norm"), average(last, "grad_norm")
    yield ("gradients too large", f"norm {start:.2g} at first, {now:.2g} now, clipped to {most:g}",
           min(norms, default=0) > 3 * most or now > max(most, 10 * start))
    masked = average(last, "tis_masked")
    yield "tokens masked", f"{masked:.0%} of them have no weight", masked > 0.5
    kl, weight = average(last, "kl"), flags.get("kl_coef", 0.0)
    yield ("the divergence weighs too much", f"{kl:.2g} nats a token x --kl_coef {weight:g}",
           weight * kl > 0.1)


def nothing_moves(first, last, step):
    names = ("reward", "length", "entropy") if known(last, "reward") else ("loss", "entropy")
    pairs = {k: (average(first, k), average(last, k)) for k in names}
    still = all(rise(first, last, k) == 0 and abs(now - was) < 0.1 * abs(was)
                for k, (was, now) in pairs.items())
    said = ", ".join(f"{k} {was:.3g} to {now:.3g}" for k, (was, now) in pairs.items())
    return "nothing moves", f"in {step} steps, {said}", still and step % STILL == 0


# ---------------------------------------------------------------------------------------------
# A run as it goes: constant work a step


@dataclass
class Watch:
    flags: dict  # of the trainer
    first: list = field(default_factory=list)  # the first WINDOW rows of metrics.jsonl ...
    best: list = field(default_factory=list)  # ... those with the highest accuracy or reward ...
    last: list = field(default_factory=list)  # ... and the last
    steps: int = 0
    said: set = field(default_factory=set)
    evaluated: int = 0  # bytes of eval.jsonl that were read


def notice(watch, row):
    """Take in a row of metrics.jsonl; the signs that it shows for the first time, as sentences."""
    watch.steps += 1
    watch.last = [*watch.last, row][-WINDOW:]
    if watch.steps < WINDOW:  # too few to speak of
        return []
    watch.first = watch.first or watch.last
    name = "reward/accuracy" if known(watch.last, "reward/accuracy") else "reward"
    if not average(watch.best, name) >= average(watch.last, name):
        watch.best = watch.last
    whose = f"the last {WINDOW} steps'"
    return fresh(watch, [
        dead_groups(watch.last, whose), cut_off(watch.last, whose), stray_sampler(watch.last),
        *(reward_signs(watch.first, watch.best, watch.last)
          if known(watch.last, "reward") else []),
        *update_signs(watch.first, watch.last, watch.flags),
        nothing_moves(watch.first, watch.last, watch.steps)])


def notice_evaluations(watch, out):
    """The same of eval.jsonl in the folder `out`, which is read where it has grown."""
    path, found = out / "eval.jsonl", []
    size = path.stat().st_size if path.exists() else 0
    if size == watch.evaluated:
        return []
    watch.evaluated, rows = size, utils.read_jsonl(path)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [r for r in rows if (r["split"], r["setting"]) == ("validation", setting)]
        rewards = [average(part, "reward") for part in (watch.first, watch.last)]
        found += [slump(rewards, mine), no_gain(mine)] if len(mine) > 1 else []
    return fresh(watch, found)


def fresh(watch, found):
    """Sentences of the signs that trouble and were not said yet; said they are now."""
    said = []
    for name, measured, bad in found:
        if bad and name not in watch.said:
            watch.said.add(name)
            cause, turn = ADVICE[name]
            said.append(f"SIGN, step {watch.steps}: {name} ({measured}). Cause, probably: {cause}. "
                        f"Turn: {turn}.")
    return said


def begin(out, args):
    """A Watch on the run in `out`; what its logs showed before it was stopped is not said again."""
    watch = Watch(vars(args))
    for row in utils.read_jsonl(out / "metrics.jsonl"):
        notice(watch, row)
    notice_evaluations(watch, out)
    return watch


def tell(watch, row, out):
    """What a trainer does after each step: print on rank 0 what it shows for the first time."""
    if utils.rank() == 0:
        for sentence in notice(watch, row) + notice_evaluations(watch, out):
            utils.print0(sentence)
