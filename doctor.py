"""The doctor: do sampler and trainer speak of the same policy?

Where they are two programs, they can silently disagree: stale weights, image positions lost,
another temperature. Nothing fails then, training merely goes wrong. Each check is a way in which
real frameworks did; a stage calls `rehearse`, the short form, before step 1, and train_grpo.py the
whole of it where vLLM is the sampler.

    python doctor.py --model toy_model --data toy_data/validation.jsonl --engine hf
    python doctor.py --model Qwen/Qwen2.5-VL-3B-Instruct --data data.jsonl --engine vllm
"""

import utils  # first: from here on Ctrl-C is no traceback

import math
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data import IMAGE_MARK, banned_ids, load_data, make_sample, refuse_mixture
from policy import (
    Policy, collate, compute_dtype, language_weights, load_model, load_processor, shard)
from rollout import check_engine, make_engine, share
from utils import RunError, UserError, first_line, print0, rank


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
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    max_new_tokens: int = 96  # of an answer; 32 of them at most are looked at
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.4  # share of a GPU's memory for vLLM, in (0, 1); the rest trains
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA, else float32


# ---------------------------------------------------------------------------------------------
# The rehearsal: a few prompts go through every step once, before anything is written


def unlike(samples):
    """The first prompt, the shortest and longest with images, the one with most, one without."""
    pictured = sorted((s for s in samples if s.images), key=lambda s: len(s.prompt_ids))
    most = max(samples, key=lambda s: len(s.images))
    picks = [samples[0], *pictured[:1], *pictured[-1:], most, *(s for s in samples if not s.images)]
    return list({s.id: s for s in picks[:5]}.values())


def rehearse(engine, samples, args, policy=None):
    """Answer a few prompts and, where a policy trains, read the answers back, together and alone.

    Returns the answers. UserError, before step 1, for what a family, a processor or a row asks for
    and nobody here does, and for a sampler that speaks of another policy. COLLECTIVE.
    """
    asked, done, problem = unlike(samples), [], None
    names = "the prompts " + ", ".join(s.id for s in asked)
    try:
        done = engine.generate(asked, 2, 1.0, 1.0, min(4, args.max_new_tokens), "rehearsal")
        if policy:
            said = [s.sampler_logprobs for s in done]
            alone = [trainer_logprobs(policy, [s])[0] for s in done[::2]]  # a batch may spoil both
            gaps = mean_gap(trainer_logprobs(policy, done), said), mean_gap(alone, said[::2])
            if not all(gap <= 2 * tolerance(args) for gap in gaps):  # means of few tokens
                problem = f"sampler and trainer are {max(gaps):.2g} nats apart on {names}"
    except Exception as error:  # whatever a family's own code can raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        problem = (f"answering {names}, or reading the answers, fails "
                   f"({type(error).__name__}: {first_line(error)}; {where})")
    utils.refuse_together(problem and f"--model {args.model}: {problem}; give another model or "
                          "other rows, or see the README's families.")
    return done


def tolerance(args):
    """How far apart, in nats of a mean, two programs may be that round each in its own way."""
    # measured in bfloat16: 0.04 with 12 random layers, 0.05 with 36; a GPU's float32 may be TF32
    return 5e-3 if compute_dtype(args.dtype) == torch.float32 else 0.1


def mean_gap(first, second):
    """Mean absolute difference of two lists of lists of log-probabilities, in nats."""
    pairs = [abs(x - y) for a, b in zip(first, second) for x, y in zip(a, b, strict=True)]
    return sum(pairs) / max(1, len(pairs))


@torch.no_grad()
def trainer_logprobs(policy, done, processor=None, temperature=1.0):
    """The trainer's log-probabilities of what was answered, one list a sample. COLLECTIVE."""
    # with a processor nothing is shared or remembered: the doctor changes what features are made by
    batch = collate(done, processor) if processor else policy.batch(done)
    table, _ = policy(batch, temperature)
    return [row[: len(s.completion_ids)] for row, s in zip(table.tolist(), done)]


# ---------------------------------------------------------------------------------------------
# The examination


def probes(samples, processor, max_prompt_tokens):
    """A few prompts of each kind: with an image, without one, with two. Made up where missing."""
    pictured = [s for s in samples if s.images][:4]
    plain = [s for s in samples if not s.images][:2]
    rows = [{"id": f"{s.id} without its image",
             "question": s.question.replace(IMAGE_MARK, "").strip() or "What is 2 + 3?"}
            for s in pictured[: 2 - len(plain)]]
    if len(pictured) > 1:
        rows.append({"id": "two images", "images": [s.images[0] for s in pictured[:2]],
                     "question": f"{IMAGE_MARK} or {IMAGE_MARK}: which is larger?"})
    root = Path("/")  # a sample's paths are whole
    made = [make_sample(row | {"answer": "?"}, root, "doctor", processor) for row in rows]
    return [s for s in pictured + plain + made if len(s.prompt_ids) <= max_prompt_tokens]


def together(act, *values):
    """What `act` gives; a rank's RunError is everyone's, or passes would part. COLLECTIVE."""
    given, problems = None, []
    try:
        given = act(*values)
    except RunError as error:
        problems = [str(error)]
    for problem in utils.gather(problems):
        raise RunError(problem)
    return given


@torch.no_grad()
def doctor(engine, policy, samples, processor, args):
    """Compare the sampler with the trainer; return rows (check, passed, detail). COLLECTIVE.

    Weights are changed on the way and put back.
    """
    bound = tolerance(args)
    asked = probes(samples, processor, args.max_prompt_tokens)
    logprobs = partial(trainer_logprobs, policy, processor=processor)
    banned, tokens, rows = {*banned_ids(processor)}, [], []

    def answer(prompts, temperature=1.0, n=1):
        length = min(32, args.max_new_tokens)
        done = together(engine.generate, prompts, n, temperature, 1.0, length, "doctor")
        for s in done:
            tokens.extend(s.completion_ids)
            # what follows a placeholder the trainer cannot read: it has no image for it
            end = next((i for i, t in enumerate(s.completion_ids) if t in banned), None)
            s.completion_ids, s.sampler_logprobs = s.completion_ids[:end], s.sampler_logprobs[:end]
        return done

    try:
        together(engine.sync, policy.model)
        greedy = answer(asked, 0)
        rows.append(("every weight taken over", True, f"{len([*policy.parameters()])} tensors"))
        rows.append(("prompts read alike", True, f"{len(asked)}, token by token"))
        rows.extend(check_logprobs(answer, logprobs, asked, greedy, bound))
        rows.extend(check_sync(answer, logprobs, asked, engine, policy.model, bound))
    except RunError as error:  # the rows so far are kept
        rows.append(("answers" if rows else "weights and prompts", False, str(error)))
    if tokens:
        bad = sum(t in banned for t in tokens)
        rows.append(("no placeholder sampled", bad == 0, f"{bad} in {len(tokens)} tokens"))
    return rows


def check_logprobs(answer, logprobs, asked, greedy, bound):
    """Same best tokens, same log-probabilities, whatever else is in the batch. COLLECTIVE."""
    tie = 5 * bound  # nats between tokens of which either may win; 0.2 was the worst rounding
    # sharpened a thousandfold, a log-probability says how far the trainer's best token is above
    best = [-x / 1000 <= tie for row in logprobs(greedy, temperature=1e-3) for x in row]
    yield "greedy tokens agree", sum(best) >= 0.99 * len(best), f"{sum(best)} of {len(best)}"
    drawn = answer(asked, 0.7, n=4)  # at 1, a sampler that is deaf to temperature would pass
    for kind in ("text", "images"):
        if chosen := [s for s in drawn if bool(s.images) == (kind == "images")]:
            gap = mean_gap(logprobs(chosen, temperature=0.7), [s.sampler_logprobs for s in chosen])
            detail = f"mean difference {gap:.1e} nats in {len(chosen)} answers"
            yield f"log-probabilities, {kind}", gap <= bound, detail
    some = drawn[::4]
    gap = mean_gap(logprobs(some), [logprobs([s])[0] for s in some])
    yield "trainer: padding", gap <= bound, f"in a batch and alone differ by {gap:.1e}"
    alone, same = [answer([s], 0)[0] for s in asked], 0
    for a, b, p, q in zip(greedy, alone, logprobs(greedy), logprobs(alone)):
        parted = [i for i, (x, y) in enumerate(zip(a.completion_ids, b.completion_ids)) if x != y]
        same += not parted or abs(p[parted[0]] - q[parted[0]]) <= tie
    detail = f"{same} of {len(asked)} greedy answers are the same in a batch and alone"
    yield "sampler: padding", same >= 0.8 * len(asked), detail


def check_sync(answer, logprobs, asked, engine, model, bound):
    """Changed weights arrive, and all that was computed with the old ones goes. COLLECTIVE.

    Negating is exact to undo, and one weight that keeps its old sign spoils the whole answer. With
    its last norm negated a model says what it was least likely to say, placeholders if it may.
    """
    language = language_weights(model)
    vision = [p for p in model.parameters() if p not in language]
    changed = {"changed language weights arrive": language, "changed vision weights arrive": vision,
               "changed last weights arrive": [model.get_decoder().norm.weight], "and go again": []}
    for name, weights in changed.items():
        if not (prompts := [s for s in asked if s.images or weights is not vision]):
            continue
        before = answer(prompts)
        old = logprobs(before)
        for weight in weights:
            weight.neg_()
        try:
            together(engine.sync, model)
            shift = mean_gap(logprobs(before), old)
            after = answer(prompts)
            gap = mean_gap(logprobs(after), [s.sampler_logprobs for s in after])
            detail = (f"{len(weights)} negated: trainer moved {shift:.1e} nats, "
                      f"sampler {gap:.1e} off")
        except RunError as error:  # NaN, say, from what a weight that never came left open
            gap, shift, detail = math.inf, 0, str(error)
        finally:  # whatever goes wrong, the policy is what it was
            for weight in weights:
                weight.neg_()
        yield name, gap <= bound * max(1, shift / 5), detail  # large numbers round more


def consult(engine, policy, samples, processor, args):
    """Print the doctor's table; refuse to go on where a check failed on any rank. COLLECTIVE."""
    rows = doctor(engine, policy, samples, processor, args)
    for name, passed, detail in rows:
        print0(f"{'ok' if passed else 'FAILED':8}{name:34}{detail}")
    if failed := utils.gather([name for name, passed, _ in rows if not passed]):
        raise UserError(f"sampler and trainer disagree ({', '.join(dict.fromkeys(failed))}); give "
                        "both the same checkpoint, processor and versions, or give --engine hf.")
    return [{"check": name, "passed": passed, "detail": detail} for name, passed, detail in rows]


def stop_if_sampler_strays(metrics):
    """End the run where its samples plainly come from another policy than the one that is trained.

    Judged by the mean difference where a token counts at most 1 nat, so that no single one decides.
    Measured: 0.001 to 0.035 for rounding to bfloat16; 0.4 to 0.9 for another temperature, lost
    images or stale weights, 0.2 to 0.45 for half of that, on models that are far from sure.
    """
    gap, ratio = metrics["sampler_gap_clipped"], metrics["sampler_ratio"]
    if rank() == 0 and not (gap <= 0.1 and math.isfinite(metrics["sampler_gap"])):
        raise RunError(
            f"the sampler has strayed from the policy: mean difference {gap:.3g} nats, mean ratio "
            f"{ratio:.3g}. Likely causes: weights that were not taken over, NaN in them, images or "
            "positions that the two read differently, another temperature; doctor.py looks for "
            "each.", again=True)


# ---------------------------------------------------------------------------------------------
# The command


def main(args):
    refuse_mixture(args)
    check_engine(args)
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)
    samples = load_data(args.data, args, processor, limit=1000)
    policy = Policy(load_model(args.model).requires_grad_(False), processor)
    # no memory of image features: the doctor changes the weights that made them
    sharing = share(policy.model, processor, megabytes=0)
    engine = make_engine(args.engine, policy.model, processor, args, sharing)
    policy = shard(policy, compute_dtype(args.dtype)).eval()
    return {"doctor": consult(engine, policy, samples, processor, args)}


if __name__ == "__main__":
    utils.run_script(main, Args)
