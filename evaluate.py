"""Stage: evaluation. The paper's scheme: three decoding settings, lengths, reflection, intervals.

Textbook evaluation is one greedy accuracy. The paper looks three ways: pass@8 at T = 1 asks what
the model can reach, pass@1 at T = 0.6 what it usually does, pass@1 at T = 0.01 what it thinks best;
and it counts reflection words, since longer answers that reconsider themselves are what RL is said
to bring. Every headline number has a 95 % interval. The trainers call `evaluate_splits`.

    python evaluate.py --model toy_model --data toy_data/validation.jsonl --out runs/evaluate
    torchrun --standalone --nproc_per_node 8 evaluate.py --model CHECKPOINT --data data.jsonl
"""

import utils  # first: from here on Ctrl-C is no traceback

import math
import random
import re
import time
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from utils import RunError, UserError, print0, rank, world_size

# name: (completions a prompt, temperature, top_p), from section 4 of arXiv 2504.02587
SETTINGS = {
    "pass8_t1": (8, 1.0, 1.0),
    "pass1_t0.6": (1, 0.6, 1.0),
    "pass1_t0.01": (1, 0.01, 0.001),
}

REFLECTION_WORDS = (
    "re-check", "re-evaluate", "re-examine", "re-think", "recheck", "reevaluate", "reexamine",
    "reevaluation", "rethink", "check again", "think again", "try again", "verify", "wait", "yet",
)


@dataclass
class Args:
    model: str = "toy_model"  # folder or hub id of a vision-language model
    data: str = "toy_data/validation.jsonl"  # JSON lines, parquet, or a hub id with :split
    columns: str = ""  # OURS=THEIRS, joined by commas: columns of another name; empty: none
    image_root: str = ""  # folder that image paths begin from; empty: the data file's
    min_pixels: int = 0  # images with fewer are enlarged; 0: the model's own bound
    max_pixels: int = 0  # images with more are reduced; 0: the model's own bound
    instruction: str = (  # the end of every prompt; empty: none
        "Think step by step and put the final answer in \\boxed{}.")
    out: str = ""  # run folder; empty: a new one under runs/
    settings: str = ",".join(SETTINGS)  # which decoding settings to run, joined by commas
    max_new_tokens: int = 96  # completions are cut off here
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    limit: int = 0  # use only the first this many rows; 0: all
    perturb: Literal["none", "blank", "noise", "rotate", "swap"] = "none"  # damage the images first
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.85  # share of a GPU's memory for vLLM, in (0, 1)
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32
    seed: int = 0  # same seed, same completions


# ---------------------------------------------------------------------------------------------
# Damaged images: does the model look at them? Where accuracy stays as it was, it does not


def perturbed(samples, how, seed):
    """The samples over damaged images, as PNG bytes; the given ones stay as they are.

    `how`: "blank" is white, "noise" draws every pixel at random, "rotate" turns the picture by a
    quarter, "swap" shows the next on a shuffled circle of all that is none of the sample's own (an
    image stays where there is none), "none" changes nothing. An image keeps its width and height,
    so that the prompt's placeholders still fit. Every rank gets the same.
    """
    from pictures import as_png, open_image

    if how == "none":
        return samples
    circle = list(dict.fromkeys(image for s in samples for image in s.images))
    random.Random(seed).shuffle(circle)
    following = dict(zip(circle, circle[1:] + circle[:1]))
    damaged = []
    for s in samples:
        images = []
        for i, image in enumerate(s.images):
            size = width, height = open_image(image).size
            if how == "blank":
                picture = Image.new("RGB", size, "white")
            elif how == "noise":  # by id, not by turn: it depends on no other sample
                pixels = random.Random(f"{seed} {s.id} {i}").randbytes(3 * width * height)
                picture = Image.frombytes("RGB", size, pixels)
            elif how == "rotate":  # anticlockwise
                picture = open_image(image).transpose(Image.Transpose.ROTATE_90)
            else:
                other = following[image]
                while other in s.images and other != image:
                    other = following[other]
                picture = open_image(other)
            images.append(as_png(picture.resize(size)))  # no change where it is right
        damaged.append(replace(s, images=images))
    return damaged


# ---------------------------------------------------------------------------------------------
# Scores


def pass_at_k(n, c, k):
    """Unbiased estimate that k draws hold a right one, from n samples with c right.

    1 - C(n - c, k) / C(n, k); arXiv 2107.03374, equation 1. Needs 1 <= k <= n and 0 <= c <= n.
    """
    assert 1 <= k <= n and 0 <= c <= n, f"need 1 <= k <= n and 0 <= c <= n, got {n=} {c=} {k=}"
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(mean, n, z=1.96):
    """95 % interval for a mean of n independent values in [0, 1] (Wilson 1927), as (low, high).

    It stays inside [0, 1] and keeps a width at 0 and at 1, where the normal one collapses.
    """
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def count_reflections(text, substring=False):
    """How often each reflection word occurs in a text, as a dict of those that do."""
    text = text.lower()
    # the left edge is looked for last: a pattern that begins with \b is ten times slower
    counts = {word: len(re.findall(word if substring else rf"{word}\b(?<=\b{word})", text))
              for word in REFLECTION_WORDS}
    return {word: n for word, n in counts.items() if n}


def is_right(rewards):
    """Whether an answer is right, by its rewards; None where nobody said so or could."""
    accuracy = rewards.get("accuracy")
    return None if accuracy is None else accuracy == 1.0


def reflection_metrics(texts, is_correct, substring=False):
    """The paper's five ratios (section 4, Table 2), and `words`: how often each word occurs.

    `texts` are the responses, `is_correct` a truth value for each, or None: neither right nor
    wrong, and in no ratio that asks for it. A ratio is None where there is nothing to divide by. A
    word counts between word boundaries; with `substring`, the paper's own rule, also within one.
    """
    return reflection_ratios([count_reflections(text, substring) for text in texts], is_correct)


def reflection_ratios(found, is_correct):
    """The same from what `count_reflections` found in each response."""
    known = [(bool(r), bool(c)) for r, c in zip(found, is_correct, strict=True) if c is not None]
    shares = {
        "reflection_ratio": [bool(r) for r in found],
        "reflection_ratio_in_correct_answers": [r for r, c in known if c],
        "reflection_ratio_in_incorrect_answers": [r for r, c in known if not c],
        "correct_ratio_in_reflection_texts": [c for r, c in known if r],
        "correct_ratio_in_no_reflection_texts": [c for r, c in known if not r],
    }
    return {name: sum(of) / len(of) if of else None for name, of in shares.items()} | {
        "words": {w: sum(counts.get(w, 0) for counts in found) for w in REFLECTION_WORDS},
    }


def summarize(samples, n):
    """Metrics of completions that come prompt by prompt, n each, with `rewards["accuracy"]` set.

    Intervals count prompts, not completions: the n answers to one prompt are not independent. A
    prompt with an answer that could not be scored (an accuracy of None) is neither solved nor
    missed: accuracy, pass@n, their intervals and `n` leave it out. RunError where none is left.
    """
    right = [is_right(s.rewards) for s in samples]
    groups = [right[i : i + n] for i in range(0, len(right), n)]
    counts = [sum(group) for group in groups if None not in group]
    if not (prompts := len(counts)):
        raise RunError(f"none of {len(groups)} prompts can be scored; see their answers.")
    accuracy = sum(counts) / (prompts * n)
    passed = sum(pass_at_k(n, c, n) for c in counts) / prompts
    lengths = sorted(len(s.completion_ids) for s in samples)
    return {
        "n": prompts,
        "unscored": len(groups) - prompts,
        "completions": len(samples),
        "right": counts,  # of n, a prompt: what intervals over prompts and runs are made of
        "accuracy": accuracy,
        "accuracy_interval": wilson_interval(accuracy, prompts),
        f"pass@{n}": passed,
        f"pass@{n}_interval": wilson_interval(passed, prompts),
        "length": sum(lengths) / len(lengths),
        "length_quantiles": {str(q): lengths[int(q * (len(lengths) - 1))]
                             for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "truncated": sum(s.finish_reason == "length" for s in samples) / len(samples),
        **reflection_metrics([s.completion_text for s in samples], right),
    }


def evaluate(engine, samples, setting, max_new_tokens, seed):
    """Run one setting of `SETTINGS` over all prompts, shared among ranks. COLLECTIVE.

    Returns `(metrics, completed samples)`, the same on every rank, prompts in the order given.
    """
    from scoring import load_rewards, score

    n, temperature, top_p = SETTINGS[setting]
    started = time.time()
    mine = range(rank(), len(samples), world_size())
    done = engine.generate([samples[i] for i in mine], n, temperature, top_p, max_new_tokens, seed)
    score(done, load_rewards("accuracy:1.0"))
    names = ("completion_ids", "completion_text", "finish_reason", "rewards", "reward")
    answers = [{f: getattr(s, f) for f in names} for s in done]  # each rank has all pictures
    done = utils.gather([(i, answers[k * n : (k + 1) * n]) for k, i in enumerate(mine)])
    done = [replace(samples[i], **a) for i, part in sorted(done, key=lambda p: p[0]) for a in part]
    return {"setting": setting, **summarize(done, n), "seconds": time.time() - started}, done


def evaluate_splits(engine, data, settings, args, step, epoch, out):
    """What a trainer measures: every split under every setting, kept in eval.jsonl. COLLECTIVE."""
    for split, samples in data.items():
        for setting in settings:
            metrics, _ = evaluate(engine, samples, setting, args.max_new_tokens, args.seed)
            low, high = metrics["accuracy_interval"]
            print0(f"epoch {epoch:<5g} {split:10} {setting:11} accuracy {metrics['accuracy']:.1%} "
                   f"[{low:.1%}, {high:.1%}]  length {metrics['length']:.1f}")
            if rank() == 0:
                row = {"generation_step": step, "epoch": epoch, "split": split, **metrics}
                utils.log_row(out / "eval.jsonl", row, f"eval/{split}/{setting}/")


def best_step(out, keep_best):
    """The step of the best accuracy in `keep_best`, SPLIT/SETTING, the first of equals; and it."""
    rows = [row for row in utils.read_jsonl(out / "eval.jsonl") if row["generation_step"]
            and f"{row['split']}/{row['setting']}" == keep_best] if keep_best else []
    accuracy, step = max(((r["accuracy"], -r["generation_step"]) for r in rows), default=(0, 0))
    return -step, accuracy  # before step 1 there is no checkpoint


def before_and_after(out, keep_best=""):
    """The first and the last evaluation of a run, by split and setting; `best` is of best_step."""
    table = {}
    for row in utils.read_jsonl(out / "eval.jsonl"):
        entry = table.setdefault(f"{row['split']}_{row['setting']}", {})
        entry["after" if entry else "before"] = {
            "accuracy": round(row["accuracy"], 4),
            "interval_95": [round(bound, 4) for bound in row["accuracy_interval"]]}
    step, accuracy = best_step(out, keep_best)
    best = {"checkpoint": f"{out}/checkpoints/step_{step:06d}", "accuracy": round(accuracy, 4)}
    return table | ({"best": best} if step else {})


def chosen_settings(names, trainer=None):
    """Check a comma-separated list of settings, and --keep_best of a trainer's flags."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or len(set(wanted) & set(SETTINGS)) < len(wanted):
        raise UserError(f"the decoding settings {names!r} must be one or more, each once; choose "
                        f"from {', '.join(SETTINGS)}.")
    splits = [s for s in ("validation", "test") if trainer and getattr(trainer, f"{s}_data")]
    known = [f"{split}/{name}" for split in splits for name in wanted]
    if trainer and trainer.keep_best and not (trainer.eval_every and trainer.keep_best in known):
        raise UserError(f"--keep_best {trainer.keep_best} needs --eval_every, and must be one of "
                        f"{known}, which this run's data and --eval_settings measure.")
    return wanted


# ---------------------------------------------------------------------------------------------
# The stage


def main(args):
    from data import load_data, refuse_mixture
    from doctor import rehearse
    from policy import load_processor
    from rollout import check_engine, make_engine

    refuse_mixture(args)
    check_engine(args)
    settings = chosen_settings(args.settings)
    out, _ = utils.choose_run(args)
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    samples = load_data(args.data, args, processor, args.limit)
    samples = perturbed(samples, args.perturb, args.seed)
    engine = make_engine(args.engine, None, processor, args)
    rehearse(engine, samples, args)
    utils.begin_run(out, args)
    utils.cut_logs(out, 0)  # an evaluation that was stopped starts anew

    result = {"model": args.model, "data": args.data, "perturb": args.perturb, "out": str(out)}
    for setting in settings:
        metrics, done = evaluate(engine, samples, setting, args.max_new_tokens, args.seed)
        n = SETTINGS[setting][0]
        passed, (low, high) = metrics[f"pass@{n}"], metrics[f"pass@{n}_interval"]
        print0(f"{setting:11} pass@{n} {passed:6.1%} [{low:.1%}, {high:.1%}]  accuracy "
               f"{metrics['accuracy']:6.1%}  length {metrics['length']:6.1f}  truncated "
               f"{metrics['truncated']:6.1%}  reflection {metrics['reflection_ratio']:6.1%}")
        headline = (f"pass@{n}", f"pass@{n}_interval", "accuracy", "length", "truncated", "n")
        result[setting] = {name: metrics[name] for name in headline}
        if rank() == 0:
            row = {"generation_step": 0, "epoch": 0, "split": args.data, "perturb": args.perturb}
            utils.append_jsonl(out / "eval.jsonl", row | metrics)
            utils.write_jsonl(out / "samples" / f"{setting}.jsonl", [s.record() for s in done])
    if rank() == 0:
        utils.write_json(out / "result.json", result)
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
