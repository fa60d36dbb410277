"""What a fine-tuned checkpoint has forgotten, and how far it has moved from its start.

Three measures. The likelihood of an English text (text.txt), and how many of 100 simple questions
(knowledge.jsonl) it answers: no picture, no chat template, nothing of what it was trained on. And
the KL divergence between the two models' answers to held-out prompts, exact at each token. All in
float32, of the distribution that is sampled from at T = 1: softmax without the placeholders' ids.

    PYTHONPATH=. python results/pretrained/forgetting.py --model CHECKPOINT --start START \
        --data toy_data/validation.jsonl --out FILE.json
"""

import utils  # first: from here on Ctrl-C is no traceback

import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from data import INSTRUCTION, Sample, banned_ids, load_samples, tokenise
from evaluate import wilson_interval
from policy import Policy, collate, load_model, load_processor, split_rows
from rollout import HFEngine
from utils import UserError, print0

HERE = Path(__file__).parent
TOKENS = 512  # of rows that are computed at one time, padding included


@dataclass
class Args:
    model: str = "toy_model"  # folder of the checkpoint that is measured
    start: str = "toy_model"  # folder of the model that its training began from
    data: str = "toy_data/validation.jsonl"  # prompts that neither was trained on
    limit: int = 64  # how many of them, the first, [2, 2147483647]
    instruction: str = INSTRUCTION  # the end of every prompt, as in training; empty: none
    max_new_tokens: int = 64  # answers are cut off here
    out: str = ""  # the JSON file to write; empty: none
    seed: int = 0  # of the answers that are sampled


# ---------------------------------------------------------------------------------------------
# What it knows: log-likelihoods of plain text


@torch.inference_mode()
def log_likelihoods(policy, pairs):
    """Log-likelihoods in nats of the tokens of each pair's second list of ids after its first.

    `pairs` are of lists of ids, none empty; returns a list of floats for each, as long as its
    second list.
    """
    rows = [Sample(str(i), "", "", "", [], prompt_ids=given, completion_ids=ids)
            for i, (given, ids) in enumerate(pairs)]
    found = {}
    for part in split_rows(rows, TOKENS):
        batch = policy.batch(part)
        for s, values, mask in zip(part, policy(batch, 1.0)[0], batch["mask"]):
            found[s.id] = values[mask].tolist()
    return [found[s.id] for s in rows]


def text_likelihood(policy, text):
    """Mean log-likelihood of a text in nats a token, and how many tokens: all but the first."""
    ids = tokenise(policy.processor.tokenizer, text)
    [values] = log_likelihoods(policy, [(ids[:1], ids[1:])])
    return mean(values), len(values)


def choice(options):
    """Which option is likeliest, its number from 0, the first of equals.

    `options` has a list of nats for each, one a token. Their sum counts, not their mean: the
    likelihood that the model writes this option. A mean would favour a word in many pieces, of
    which the later ones are certain.
    """
    sums = [math.fsum(values) for values in options]
    return sums.index(max(sums))


def knowledge(policy, rows):
    """How many questions are answered right, each option a plain continuation of its question.

    `rows` have `question`, `options` and `answer`. Also a 95 % Wilson interval of the share, and by
    row 1 for right and 0 for wrong: two models are asked the same, so compare them row by row.
    """
    tokenizer = policy.processor.tokenizer
    pairs = [(tokenise(tokenizer, row["question"]), tokenise(tokenizer, f" {option}"))
             for row in rows for option in row["options"]]
    values = iter(log_likelihoods(policy, pairs))
    said = [row["options"][choice([next(values) for _ in row["options"]])] for row in rows]
    by_row = [int(answer == row["answer"]) for answer, row in zip(said, rows)]
    interval = [round(bound, 4) for bound in wilson_interval(mean(by_row), len(rows))]
    return {"right": sum(by_row), "of": len(rows), "interval_95": interval,
            "by_row": "".join(map(str, by_row))}


# ---------------------------------------------------------------------------------------------
# How far it has moved: divergences of what it answers


@torch.inference_mode()
def distributions(model, batch, banned):
    """Log-probabilities of every id at each token of a batch's answers: (N, V), nats, float32.

    `batch` comes from `collate`; its rows' tokens stand one after another. `banned` ids have none.
    """
    hidden = model.base_model(**batch["inputs"], use_cache=False).last_hidden_state.flatten(0, 1)
    logits = model.get_output_embeddings()(hidden[batch["predictors"][batch["mask"]]]).float()
    logits[:, banned] = torch.finfo(logits.dtype).min
    return logits.log_softmax(-1)


def token_divergences(p, q):
    """KL(p || q) in nats at each token, (N,) in float64, of their log-probabilities (N, V)."""
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64)


def divergence(model, other, processor, prompts, max_new_tokens, seed):
    """KL(model || other) in nats, over one answer of `model` to each prompt, sampled at T = 1.

    By the chain rule, the divergence between two models' whole answers is the expectation, over
    answers of the first, of the sum of the divergences at their tokens: `answer` is the mean of
    that sum over prompts. Only the answers are sampled; at a token, the sum over the vocabulary is
    exact, so no estimate of a token's divergence (k1, k2, k3) comes in. `token` is the mean over
    prompts of an answer's mean. Errors are standard errors over prompts. An answer that is cut off
    counts as far as it goes: then it is the divergence of the first `max_new_tokens` tokens.
    """
    engine = HFEngine(model, processor, len(prompts))
    done = engine.generate(prompts, 1, 1.0, 1.0, max_new_tokens, seed)
    sums, means = [], []
    for part in split_rows(done, TOKENS):
        batch = collate(part, processor)
        p, q = (distributions(m, batch, banned_ids(processor)) for m in (model, other))
        for found in token_divergences(p, q).split([len(s.completion_ids) for s in part]):
            sums.append(found.sum().item())
            means.append(found.mean().item())
    spread = {name: {"mean": mean(values), "standard_error": stdev(values) / len(values) ** 0.5}
              for name, values in (("answer", sums), ("token", means))}
    return spread | {"prompts": len(done), "length": mean(len(s.completion_ids) for s in done),
                     "truncated": mean(s.finish_reason == "length" for s in done)}


def main(args):
    started = time.time()
    processor, theirs = load_processor(args.model), load_processor(args.start)
    if processor.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise UserError(f"--start {args.start}: its vocabulary is not that of --model "
                        f"{args.model}; give the model that the training began from.")
    prompts = load_samples(args.data, processor, 2048, "", args.instruction, "", args.limit)
    if len(prompts) < 2:
        raise UserError(f"--data {args.data}: one prompt has no standard error; give more.")
    model, start = (load_model(path, torch.float32).eval().to(utils.device())
                    for path in (args.model, args.start))
    policy = Policy(model, processor)
    likelihood, tokens = text_likelihood(policy, (HERE / "text.txt").read_text())
    print0(f"text: {likelihood:.4f} nats a token, {time.time() - started:.0f} s")
    known = knowledge(policy, utils.read_jsonl(HERE / "knowledge.jsonl"))
    print0(f"knowledge: {known['right']} of {known['of']}, {time.time() - started:.0f} s")
    result = {"model": args.model, "start": args.start, "data": args.data,
              "log_likelihood": likelihood, "tokens": tokens, "knowledge": known}
    for name, p, q in (("kl_from_start", model, start), ("kl_to_start", start, model)):
        result[name] = divergence(p, q, processor, prompts, args.max_new_tokens, args.seed)
        print0(f"{name}: {result[name]['answer']['mean']:.4f} nats an answer, "
               f"{time.time() - started:.0f} s")
    result["seconds"] = round(time.time() - started, 1)
    if args.out:
        utils.write_json(Path(args.out), result)
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
