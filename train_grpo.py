"""Stage: reinforcement learning. GRPO for a vision-language model, written out by hand.

Left out of the textbook: the critic and its value loss (the mean reward of a group of answers to
one prompt is the baseline), GAE (the reward comes once, at the end, so an answer's tokens share one
advantage), the reference model unless --kl_coef asks for one, and the pass for the old policy
when a batch is used for one update only (the new policy is the old one then). What remains is the
paper's four steps (arXiv 2504.02587), which are the banners below:

    Step I    data flow             prompts and images become samples
    Step II   response collection   an engine answers every prompt G times
    Step III  trajectory            rewards become advantages
    Step IV   policy update         a clipped, advantage-weighted likelihood step

    python train_grpo.py                       # the toy, on a laptop, no argument needed
    torchrun --standalone --nproc_per_node 8 train_grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct \
        --train_data geometry3k/rl.jsonl --validation_data geometry3k/validation.jsonl \
        --test_data geometry3k/test.jsonl --batch_size 128 --lr 1e-6 --max_new_tokens 2048
"""

import copy
import math
import random
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import utils
from utils import RunError, UserError, print0, rank, world_size


@dataclass
class Args:
    # Run
    model: str = "toy_model"  # folder or hub id of a vision-language model
    out: str = ""  # run folder; empty: a new one under runs/; an unfinished run there goes on
    seed: int = 0  # of the data order and of sampling
    # Data
    train_data: str = "toy:train"  # .jsonl or .parquet data set
    validation_data: str = "toy:validation"  # measured before and after; empty: none
    test_data: str = "toy:test"  # out of distribution; empty: none
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    # Rollout
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    group_size: int = 8  # completions a prompt, G
    temperature: float = 1.0  # of sampling, and of the policy that is trained
    max_new_tokens: int = 96  # completions are cut off here
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.4  # share of a GPU's memory for vLLM; the rest is the trainer's
    seed_requests: bool = False  # vLLM: randomness by prompt, not by rank; slower
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    doctor: bool = True  # before step 1, compare vLLM with the trainer in ten ways
    # Objective
    rewards: str = "accuracy:1.0"  # name:weight or file.py:function:weight, joined by commas
    advantage: Literal["grpo", "reinforce++"] = "grpo"  # how rewards become advantages
    clip_low: float = 0.2  # the ratio to the old policy is clipped at 1 - clip_low ...
    clip_high: float = 0.2  # ... and at 1 + clip_high
    tis_cap: float = 2.0  # most a token is weighed up for vLLM's own rounding; 0: not weighed
    kl_coef: float = 0.0  # weight of the k3 divergence from the first policy; 0: no reference model
    # Optimiser
    epochs: int = 3  # passes over the training prompts
    max_steps: int = 0  # stop after this many generation steps; 0: after all epochs
    batch_size: int = 32  # prompts a generation step, over all ranks
    mini_batch_size: int = 32  # prompts a gradient step, over all ranks
    ppo_epochs: int = 1  # passes over each batch of completions
    micro_batch_size: int = 64  # sequences in one forward pass on a rank
    lr: float = 5e-5  # AdamW learning rate, constant after the warm-up
    warmup_steps: int = 2  # gradient steps from 0 to lr; 0: none
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    train_vision: bool = False  # train the vision tower
    train_connector: bool = False  # train the vision-language connector
    train_language: bool = True  # train the language model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; master weights are float32
    gradient_checkpointing: bool = False  # recompute layers in backward: less memory, more time
    # Measuring and saving
    eval_settings: str = "pass1_t0.6"  # decoding settings of evaluate.py, joined by commas
    eval_every: int = 0  # epochs between evaluations; 0: before and after only
    save_every: int = 0  # generation steps between checkpoints; 0: only the last


# ---------------------------------------------------------------------------------------------
# Pure functions: advantages and the loss. Tensors in, tensors out


def grpo_advantages(rewards):
    """Group-relative advantages: (r - mean) / std within a prompt's answers.

    rewards (prompts, G), NaN where an answer could not be scored, returns (prompts, G). A group
    with equal rewards gets exactly 0: by rule, not by a small number under the division. The std is
    the unbiased one. DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True)  # (prompts, 1), as are mean, std, lowest and highest
    mean = rewards.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(scored, rewards - mean, 0.0)  # unscored answers push nowhere
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    lowest = torch.where(scored, rewards, math.inf).min(1, keepdim=True).values
    highest = torch.where(scored, rewards, -math.inf).max(1, keepdim=True).values
    return torch.where(highest > lowest, centred / (std + 1e-4), 0.0)


def reinforce_advantages(rewards):
    """The paper's advantages: rewards normalised over the batch, even with one answer a prompt.

    rewards (N,) of all ranks, NaN where unscored, returns (N,). REINFORCE++ with discount 1 and the
    reward at EOS, so that the return of every token is the reward; all alike gives exactly 0.
    """
    scored = rewards[~rewards.isnan()]
    if len(scored) == 0 or scored.min() == scored.max():
        return torch.zeros_like(rewards)
    return ((rewards - scored.mean()) / (scored.std() + 1e-4)).nan_to_num()


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """The clipped surrogate of every completion token, and how many were clipped low and high.

    logprobs, old_logprobs, mask (B, C), advantages (B, 1) or (B, C); returns losses (B, C), to be
    minimised, 0 outside the mask. PPO, arXiv 1707.06347, equation 7; two bounds as in DAPO.
    """
    ratio = torch.exp(logprobs - old_logprobs)  # (B, C), 1 on padding
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # the minimum is the pessimist's choice: no gain for moving past a bound, full pain for it
    losses = -torch.minimum(ratio * advantages, clipped * advantages) * mask  # (B, C)
    # a bound holds only a ratio that has moved the way its advantage wants
    below = (ratio < 1 - clip_low) & (advantages < 0) & mask
    above = (ratio > 1 + clip_high) & (advantages > 0) & mask
    return losses, below.sum(), above.sum()


def k3_divergence(logprobs, ref_logprobs, mask):
    """Schulman's k3 estimate of KL(policy || reference) a token, (B, C), nats, never negative.

    r - 1 - log r with r = reference / policy; the paper's equation 1.
    """
    log_ratio = ref_logprobs - logprobs
    return (torch.exp(log_ratio) - 1 - log_ratio) * mask


def importance_weights(old_logprobs, sampler_logprobs, cap):
    """How much likelier a token is to the trainer than to the sampler that drew it, at most `cap`.

    Two (B, C) to (B, C), without gradient. A sampler with kernels of its own draws from a slightly
    other policy; the loss is weighed by this, and `cap` bounds the variance. Truncated importance
    sampling (Ionides 2008); between sampler and trainer: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".
    """
    return torch.exp(old_logprobs - sampler_logprobs).clamp(max=cap).detach()


# ---------------------------------------------------------------------------------------------
# Step I: data flow


def epoch_batches(samples, batch_size, seed, epoch):
    """The epoch's batches of prompts, the same on every rank; a short last batch is dropped."""
    order = list(range(len(samples)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    whole = len(order) - len(order) % batch_size
    return [[samples[i] for i in order[k : k + batch_size]] for k in range(0, whole, batch_size)]


# ---------------------------------------------------------------------------------------------
# Step III: trajectory


def set_advantages(samples, group_size, kind):
    """Turn the rewards of this rank's samples into advantages, one number a sample. COLLECTIVE."""
    rewards = [math.nan if s.reward is None else s.reward for s in samples]
    if kind == "grpo":  # a prompt's group lives on one rank
        advantages = grpo_advantages(torch.tensor(rewards).view(-1, group_size)).flatten()
    elif kind == "reinforce++":
        everyone = torch.tensor(utils.gather(rewards)).view(world_size(), -1)
        advantages = reinforce_advantages(everyone.flatten()).view_as(everyone)[rank()]
    for s, a in zip(samples, advantages.tolist(), strict=True):
        s.advantage = a


def rollout_sums(samples, group_size):
    """Sums over this rank's samples; `step_metrics` makes means of them."""
    groups = [samples[i : i + group_size] for i in range(0, len(samples), group_size)]
    flat = [g for g in groups if all(s.advantage == 0 for s in g)]
    sums = Counter()
    for s in samples:
        sums["completions"] += 1
        sums["tokens"] += len(s.completion_ids)
        sums["truncated"] += s.finish_reason == "length"
        sums["unscored"] += s.reward is None
        for name, value in [("reward", s.reward), *s.rewards.items()]:
            name = name if name == "reward" else f"reward/{name}"
            sums[name] += value or 0.0
            sums[f"scored {name}"] += value is not None
    sums["groups"] = len(groups)
    sums["groups_all_alike"] = len(flat)  # no advantage, so nothing to learn
    return sums


# ---------------------------------------------------------------------------------------------
# Step IV: policy update


def micro_batches(samples, size, count):
    """`count` lists of at most `size` samples, alike in length; empty ones keep ranks in step."""
    ordered = sorted(samples, key=lambda s: len(s.prompt_ids) + len(s.completion_ids))
    return [ordered[i * size : (i + 1) * size] for i in range(count)]


def logprob_pass(policy, samples, processor, args):
    """Log-probabilities without gradient, one list a sample. COLLECTIVE when sharded."""
    count = max(utils.gather([math.ceil(len(samples) / args.micro_batch_size)]))
    result = {}
    for part in micro_batches(samples, args.micro_batch_size, count):
        batch = utils.collate(part or samples[:1], processor)
        with torch.no_grad():
            logprobs, _ = policy(batch, args.temperature)
        for s, row in zip(part, logprobs.tolist()):
            result[id(s)] = row[: len(s.completion_ids)]
    return result


def update(policy, optimizer, samples, old, ref, processor, args):
    """One gradient step on this rank's share of a mini-batch. COLLECTIVE.

    `old` and `ref` hold log-probabilities by sample, or are None where the algorithm needs none.
    Returns this rank's sums over tokens, the gradient norm before clipping, and the 99th percentile
    of the differences between sampler and trainer.
    """
    gaps = []
    count = max(utils.gather([math.ceil(len(samples) / args.micro_batch_size)]))
    sums = defaultdict(float, update_tokens=sum(len(s.completion_ids) for s in samples))
    all_tokens = utils.sum_over_ranks({"tokens": sums["update_tokens"]})["tokens"]
    for part in micro_batches(samples, args.micro_batch_size, count):
        # a rank that has run out repeats a sample under an empty mask: FSDP needs its passes
        batch = utils.collate(part or samples[:1], processor)
        batch["mask"] &= bool(part)
        mask = batch["mask"]  # (B, C)
        advantages = torch.tensor([[s.advantage] for s in part or samples[:1]], device=mask.device)
        logprobs, entropies = policy(batch, args.temperature)  # (B, C), (B, C)
        # with a single update the policy has not moved since it answered: it is the old policy
        old_logprobs = beside(mask, part, old) if old else logprobs.detach()
        losses, low, high = policy_loss(logprobs, old_logprobs, advantages, mask,
                                        args.clip_low, args.clip_high)
        sampler = beside(mask, part, {id(s): s.sampler_logprobs for s in part})
        if args.tis_cap:
            losses = losses * importance_weights(old_logprobs, sampler, args.tis_cap)
        if ref:
            kl = k3_divergence(logprobs, beside(mask, part, ref), mask)
            losses = losses + args.kl_coef * kl
            sums["kl"] += kl.sum().item()
        # divided by the tokens of ALL ranks and micro-batches, so that how the work is split
        # changes nothing; times world_size because FSDP averages gradients over ranks
        loss = losses.sum() * world_size() / all_tokens
        stop_if_not_finite(loss, "loss", part)
        loss.backward()
        gap = (old_logprobs - sampler)[mask]  # (tokens of this micro-batch,), nats
        gaps.append(gap.abs())
        sums["loss"] += losses.sum().item()
        sums["entropy"] += entropies.sum().item()
        sums["clipped_low"] += low.item()
        sums["clipped_high"] += high.item()
        sums["sampler_gap"] += gap.abs().sum().item()
        sums["sampler_ratio"] += gap.exp().sum().item()
        sums["sampler_ratio_squared"] += (2 * gap).exp().sum().item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    stop_if_not_finite(norm, "gradient norm", samples)
    optimizer.step()
    optimizer.zero_grad()
    return sums, norm.item(), torch.cat(gaps).quantile(0.99).item()


def beside(mask, samples, rows):
    """The samples' lists of token values as a tensor (B, C) of the mask's shape, 0 on padding."""
    table = torch.zeros(mask.shape)
    for i, s in enumerate(samples):
        table[i, : len(rows[id(s)])] = torch.tensor(rows[id(s)])
    return table.to(mask.device)


def stop_if_not_finite(value, what, samples):
    """End the run rather than spoil the weights; the batch is named for inspection."""
    if not torch.isfinite(value):
        names = sorted({s.id for s in samples})
        raise RunError(f"the {what} is {value.item()} on the prompts {names}; this batch has not "
                       "changed the weights.")


def stop_if_sampler_strays(metrics):
    """End the run where its samples plainly come from another policy than the one that is trained.

    The mean ratio of trainer to sampler is 1 where both are one policy, and the effective sample
    size the share of tokens that still count once weighed. Bounds far from what rounding does.
    """
    ratio, size = metrics["sampler_ratio"], metrics["sampler_effective_size"]
    if rank() == 0 and not (0.5 < ratio < 2 and size > 0.2):
        raise RunError(
            f"the sampler has strayed from the policy: mean ratio {ratio:.3g}, effective sample "
            f"size {size:.1%}. Likely causes: weights that were not taken over, images or "
            "positions that the two read differently, another temperature; rollout.py --doctor "
            "looks for each.")


def step_metrics(sums, norms, seconds, learning_rate):
    """Sums over all ranks to the means that are logged and shown."""
    n, tokens = sums["completions"], sums["update_tokens"]
    metrics = {name: sums[name] / max(1, sums[f"scored {name}"])
               for name in sums if name.startswith("reward")}
    metrics["length"] = sums["tokens"] / n
    metrics |= {name: sums[name] / n for name in ("truncated", "unscored")}
    metrics["groups_all_alike"] = sums["groups_all_alike"] / sums["groups"]
    names = ("loss", "entropy", "kl", "clipped_low", "clipped_high", "sampler_gap", "sampler_ratio")
    metrics |= {name: sums[name] / tokens for name in names if name in sums}
    metrics["sampler_effective_size"] = (
        sums["sampler_ratio"] ** 2 / (tokens * sums["sampler_ratio_squared"]))
    metrics |= {"grad_norm": sum(norms) / len(norms), "lr": learning_rate}
    return metrics | {f"seconds_{name}": round(s, 3) for name, s in seconds.items()}


# ---------------------------------------------------------------------------------------------
# The stage


@contextmanager
def timed(seconds, name):
    """Add the time that the block takes to `seconds[name]`."""
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def check_args(args):
    """Refuse what cannot work, before anything is loaded."""
    if args.advantage == "grpo" and args.group_size < 2:
        raise UserError("--group_size must be at least 2: grpo compares the answers to a prompt.")
    if args.temperature <= 0:
        raise UserError("--temperature must be above 0: training needs a policy with chances.")
    if args.batch_size % args.mini_batch_size or args.mini_batch_size % world_size():
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of --mini_batch_size "
                        f"{args.mini_batch_size}, and that one of the {world_size()} ranks.")


def main(args):
    from evaluate import before_and_after, chosen_settings, evaluate_splits
    from reward import load_rewards, score
    from rollout import choose_engine, consult, make_engine

    check_args(args)
    args.engine = choose_engine(args.engine)  # args.json says what ran
    if args.engine == "hf":
        args.tis_cap = 0.0  # sampler and trainer are one
    rewards = utils.checked(load_rewards, args.rewards, args.max_new_tokens)
    settings = chosen_settings(args.eval_settings)
    started = time.time()
    out, continues = utils.choose_run(args)
    processor = utils.load_processor(args.model)

    # Step I: data flow. Prompts with their images become samples, all checked before step 1
    names = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    paths = {split: utils.data_path(name, out) for split, name in names.items() if name}
    data = {split: utils.load_samples(path, processor, args.max_prompt_tokens)
            for split, path in paths.items()}
    train = data.pop("train")
    steps_per_epoch = len(train) // args.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(train)} prompts.")
    if len(train) % args.batch_size:
        print0(f"Each epoch leaves out {len(train) % args.batch_size} of {len(train)} prompts.")
    total = steps_per_epoch * args.epochs
    total = min(total, args.max_steps) if args.max_steps else total

    # The sampler has whole weights of its own; the policy is sharded over the ranks
    dtype = utils.compute_dtype(args.dtype)
    model = utils.load_model(args.model)
    engine = make_engine(args.engine, model, processor, args)
    reference = None
    if args.kl_coef:
        reference = utils.shard(utils.Policy(copy.deepcopy(model), processor), dtype)
    count = utils.freeze(model, args.train_vision, args.train_connector, args.train_language)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = utils.shard(utils.Policy(model, processor), dtype).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.95), weight_decay=args.weight_decay)
    # N updates a batch, the paper's formula; a single one is exactly on-policy
    updates = args.batch_size // args.mini_batch_size * args.ppo_epochs
    print0(f"Training {count:,} weights on {len(train)} prompts: {total} steps of "
           f"{args.batch_size} prompts x {args.group_size} answers, on {world_size()} x "
           f"{utils.device().type}. {out}")
    utils.begin_run(out, args)

    # A run that was stopped goes on after its last whole checkpoint: data order and sampling depend
    # on the seed and the step alone, so nothing else has to be restored
    start = 0
    if continues and utils.latest_checkpoint(out):
        start = utils.load_resume_state(utils.latest_checkpoint(out), policy, optimizer)
        engine.sync(policy.model)
        print0(f"Continuing after step {start}.")
    utils.cut_logs(out, start)
    if args.engine == "vllm" and args.doctor:
        consult(engine, policy, train, processor, args)
    if start == 0:
        evaluate_splits(engine, data, settings, args, 0, 0.0, out)

    steps = range(start + 1, total + 1)
    for step in (bar := tqdm(steps, "GRPO", total, initial=start, disable=rank() > 0)):
        epoch, k = divmod(step - 1, steps_per_epoch)
        seconds = defaultdict(float)
        batch = epoch_batches(train, args.batch_size, args.seed, epoch)[k]
        prompts = batch[rank() :: world_size()]

        # Step II: response collection. Every rank answers its own prompts, G times each
        with timed(seconds, "rollout"):
            samples = engine.generate(prompts, args.group_size, args.temperature, 1.0,
                                      args.max_new_tokens, f"{args.seed} {step}")
            engine.sleep()  # its memory is the trainer's until the sync

        # Step III: trajectory. Rewards, advantages, and the log-probabilities to compare with
        with timed(seconds, "reward"):
            score(samples, rewards)
            set_advantages(samples, args.group_size, args.advantage)
        # as they were before the first update of this batch; None where nothing asks for them
        with timed(seconds, "logprobs"):
            old = logprob_pass(policy, samples, processor, args) if updates > 1 else None
            ref = logprob_pass(reference, samples, processor, args) if reference else None

        # Step IV: policy update. N gradient steps, then the sampler takes over the new weights
        share = args.mini_batch_size // world_size() * args.group_size  # samples an update, a rank
        sums, norms, tails = rollout_sums(samples, args.group_size), [], []
        with timed(seconds, "update"):
            for n in range(updates):
                warmed = ((step - 1) * updates + n + 1) / max(1, args.warmup_steps)
                optimizer.param_groups[0]["lr"] = learning_rate = args.lr * min(1, warmed)
                part = samples[n * share % len(samples) :][:share]
                part_sums, norm, tail = update(policy, optimizer, part, old, ref, processor, args)
                sums.update(part_sums)
                norms.append(norm)
                tails.append(tail)
        with timed(seconds, "sync"):
            engine.sync(policy.model)

        # Log, evaluate, save
        metrics = step_metrics(utils.sum_over_ranks(sums), norms, seconds, learning_rate)
        metrics["sampler_gap_p99"] = max(utils.gather(tails))
        stop_if_sampler_strays(metrics)
        records = utils.gather([s.record() for s in samples])
        place = {"generation_step": step, "gradient_step": step * updates,
                 "epoch": step / steps_per_epoch}
        if rank() == 0:
            utils.write_jsonl(out / "samples" / f"step_{step:06d}.jsonl", records)
            utils.append_jsonl(out / "metrics.jsonl", place | metrics)
        shown = {name.removeprefix("reward/"): f"{metrics[name]:.2f}"
                 for name in metrics if name.startswith("reward")}
        shown["length"] = f"{metrics['length']:.0f}"
        shown["seconds"] = " ".join(f"{name} {s:.1f}" for name, s in seconds.items())
        bar.set_postfix(shown)
        last = step == total
        # COLLECTIVE, both. Saved last: what stands before a checkpoint in the logs is complete
        if last or (args.eval_every and step % (args.eval_every * steps_per_epoch) == 0):
            evaluate_splits(engine, data, settings, args, step, step / steps_per_epoch, out)
        if last or (args.save_every and step % args.save_every == 0):
            utils.save_checkpoint(out, step, policy, processor, optimizer, dtype)

    minutes = round((time.time() - started) / 60, 2)
    result = before_and_after(out) | {"steps": total, "minutes": minutes, "out": str(out)}
    if rank() == 0:
        utils.write_json(out / "result.json", result)
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
