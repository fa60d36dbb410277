"""Stage: reinforcement learning. GRPO for a vision-language model, written out by hand.

What textbooks have and this leaves out: the critic and its value loss (the mean reward of a group
of answers to one prompt is the baseline), GAE (the reward comes once, at the end, so an answer's
tokens share one advantage), the reference model unless --kl_coef asks for one, and the pass for the
old policy when a batch is used for one update only (it is the new one then). What remains is the
paper's four steps (arXiv 2504.02587), which are the banners below:

    Step I    data flow             prompts and images become samples
    Step II   response collection   an engine answers every prompt G times
    Step III  trajectory            rewards become advantages
    Step IV   policy update         a clipped, advantage-weighted likelihood step

    python train_grpo.py                       # the toy, on a laptop, no argument needed
    torchrun --standalone --nproc_per_node 8 train_grpo.py --model Qwen/Qwen2.5-VL-3B-Instruct \
        --train_data train.jsonl --validation_data validation.jsonl --test_data test.jsonl \
        --batch_size 128 --lr 1e-6 --max_new_tokens 2048 --gradient_checkpointing
"""

import utils  # first: from here on Ctrl-C is no traceback

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

from utils import UserError, print0, rank, world_size


@dataclass
class Args:
    # Run
    model: str = "toy_model"  # folder or hub id of a vision-language model
    out: str = ""  # run folder; empty: a new one under runs/; an unfinished run there goes on
    seed: int = 0  # of the data order and of sampling
    # Data
    train_data: str = "toy_data/train.jsonl"  # JSON lines, parquet, or a hub id with :split
    validation_data: str = "toy_data/validation.jsonl"  # measured before and after; empty: none
    test_data: str = "toy_data/test.jsonl"  # out of distribution; empty: none
    columns: str = ""  # OURS=THEIRS, joined by commas: columns of another name; empty: none
    image_root: str = ""  # folder that image paths begin from; empty: the data file's
    min_pixels: int = 0  # images with fewer are enlarged; 0: the model's own bound
    max_pixels: int = 0  # images with more are reduced; 0: the model's own bound
    instruction: str = (  # the end of every prompt; empty: none
        "Think step by step and put the final answer in \\boxed{}.")
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    # Rollout
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    group_size: int = 8  # completions a prompt, G
    temperature: float = 1.0  # of sampling, and of the policy that is trained; in [0.01, 100]
    max_new_tokens: int = 96  # completions are cut off here
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.4  # share of a GPU's memory for vLLM, in (0, 1); the rest trains
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    doctor: bool = True  # before step 1, compare vLLM with the trainer in a dozen ways
    # Objective
    rewards: str = "accuracy:1.0"  # name:weight or file.py:function:weight, joined by commas
    reward_timeout: int = 3600  # seconds that one reward may take to score a step
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce++"] = "grpo"  # how rewards compare
    loss: Literal["token", "sequence", "dr_grpo", "gspo", "cispo"] = "token"  # see "The loss"
    clip_low: float = 0.2  # in [0, 1]: the ratio to the old policy is clipped at 1 - clip_low ...
    clip_high: float = 0.2  # ... and at 1 + clip_high, in [0, inf)
    tis_cap: float = 2.0  # in [1, inf): most that trainer / sampler weighs a token; 0: not
    tis: Literal["token", "mask", "sequence_mask"] = "token"  # past the cap: held, out, answer out
    kl_coef: float = 0.0  # weight of the divergence from the first policy; 0: no reference model
    kl: Literal["k3", "k2", "k1"] = "k3"  # its estimate: k3 or k2 in the loss, k1 in the reward
    mask_truncated: bool = False  # no loss on completions that were cut off
    refills: int = 0  # times that groups with equal accuracy make way for new prompts; 0: never
    # Optimiser
    epochs: int = 3  # passes over the training prompts
    max_steps: int = 0  # stop after this many generation steps; 0: after all epochs
    batch_size: int = 32  # prompts a generation step, over all ranks
    mini_batch_size: int = 32  # prompts a gradient step, over all ranks
    ppo_epochs: int = 1  # passes over each batch of completions
    micro_batch_tokens: int = 16384  # tokens in one forward pass on a rank, prompts included
    plain: bool = False  # a copy of the prompt for each completion: without siblings.py, slower
    vision_cache: int = 1024  # MB of host memory for features of frozen vision; 0: none
    lr: float = 5e-5  # AdamW learning rate, constant after the warm-up; in (0, 1]
    warmup_steps: int = 2  # gradient steps from 0 to lr; 0: none
    weight_decay: float = 0.0  # AdamW, in [0, 1]
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    train_vision: bool = False  # train the vision tower
    train_connector: bool = False  # train the vision-language connector
    train_language: bool = True  # train the language model
    lora_rank: int = 0  # train updates of this rank in place of the language's weights; 0: weights
    lora_alpha: float = 32.0  # such an update counts alpha / rank
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of compute; master weights are float32
    gradient_checkpointing: bool = False  # recompute layers in backward: less memory, more time
    offload: bool = False  # weights, gradients and optimiser wait on the host: less memory, slower
    # Measuring and saving
    eval_settings: str = "pass1_t0.6"  # decoding settings of evaluate.py, joined by commas
    eval_every: int = 0  # epochs between evaluations; 0: before and after only
    save_every: int = 0  # generation steps between checkpoints; 0: only the last
    keep: int = 0  # newest checkpoints that are kept, older ones are deleted; 0: all
    keep_best: str = ""  # SPLIT/SETTING whose best step is saved and kept besides; empty: none
    wandb: str = ""  # mirror metrics.jsonl to this Weights & Biases project; empty: nowhere


# ---------------------------------------------------------------------------------------------
# Step I: data flow


def epoch_batches(samples, batch_size, seed, epoch):
    """The epoch's batches of prompts, the same on every rank; a short last batch is dropped."""
    order = list(range(len(samples)))
    random.Random(f"{seed} {epoch}").shuffle(order)
    whole = len(order) - len(order) % batch_size
    return [[samples[i] for i in order[k : k + batch_size]] for k in range(0, whole, batch_size)]


# ---------------------------------------------------------------------------------------------
# Step II: response collection


def in_groups(samples, group_size):
    return [samples[i : i + group_size] for i in range(0, len(samples), group_size)]


def is_alike(group):
    """All right or all wrong (without an accuracy: equal rewards), so that nothing is learnt.

    An answer that was not scored is like any other.
    """
    known = {s.rewards.get("accuracy") for s in group} - {None}
    return len(known or {s.reward for s in group} - {None}) < 2


def collect(answer, prompts, pool, args, step):
    """Answered and scored samples, G a prompt; dead groups make way for others.

    `answer(prompts, seed)` samples and scores. DAPO's dynamic sampling (arXiv 2503.14476, section
    3.2), bounded: what is still alike after `args.refills` rounds stays. A slot of the batch has
    its own queue of new prompts, so that ranks need not talk and their number changes nothing.
    """
    samples = answer(prompts, f"{args.seed} {step}")
    for attempt in range(1, args.refills + 1):
        groups = in_groups(samples, args.group_size)
        dead = [i for i, group in enumerate(groups) if is_alike(group)]  # slots of this rank
        if not dead:
            break
        order = random.Random(f"{args.seed} {step} {attempt}").sample(pool, len(pool))
        # slot i of rank r is slot r + i * W of the batch, wherever it is answered
        new = [order[rank() + i * world_size()] for i in dead]
        fresh = in_groups(answer(new, f"{args.seed} {step} {attempt}"), args.group_size)
        for i, group in zip(dead, fresh):
            groups[i] = group
        samples = [s for group in groups for s in group]
    return samples


# ---------------------------------------------------------------------------------------------
# Step III: trajectory. Advantages are pure functions of rewards; NaN: could not be scored


def centred(rewards):
    """Rewards (prompts, G) minus the mean of their group, unscored ones 0; and how many count.

    A group with equal rewards is exactly 0: by rule, as the mean of seven 0.1s is not 0.1.
    """
    scored = ~rewards.isnan()
    count = scored.sum(1, keepdim=True)  # (prompts, 1), as are mean, lowest and highest
    mean = rewards.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    lowest = torch.where(scored, rewards, math.inf).min(1, keepdim=True).values
    highest = torch.where(scored, rewards, -math.inf).max(1, keepdim=True).values
    # an unscored answer pushes nowhere; a group without a difference has nothing to say
    return torch.where(scored & (highest > lowest), rewards - mean, 0.0), count


def grpo_advantages(rewards):
    """(r - mean) / std within a prompt's answers, the std over n - 1. (prompts, G).

    DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    difference, count = centred(rewards)
    variance = difference.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)  # (prompts, 1)
    # 1e-4 bounds what a group with hardly any difference is blown up to
    return difference / (variance.sqrt() + 1e-4)


def dr_grpo_advantages(rewards):
    """r - mean: without the std, which makes much of groups that hardly differ. (prompts, G).

    Dr. GRPO, arXiv 2503.20783, section 3.2.
    """
    return centred(rewards)[0]


def rloo_advantages(rewards):
    """r - mean of the others, an unbiased baseline. (prompts, G).

    With the answer itself in the mean, r - mean is (n - 1) / n of it. Back to Basics, arXiv
    2402.14740, equation 5.
    """
    difference, count = centred(rewards)
    return difference * count / (count - 1).clamp(min=1)


def reinforce_advantages(rewards):
    """The paper's advantages: rewards normalised over the batch, even with one answer a prompt.

    rewards (N,) of all ranks, NaN where unscored, returns (N,). REINFORCE++ with discount 1 and the
    reward at EOS, so that the return of every token is the reward; all alike gives exactly 0.
    """
    scored = rewards[~rewards.isnan()]
    if len(scored) == 0 or scored.min() == scored.max():
        return torch.zeros_like(rewards)
    return ((rewards - scored.mean()) / (scored.std() + 1e-4)).nan_to_num()


def subtract_divergence(samples, old, ref, kl_coef):
    """KL in the reward: minus `kl_coef` times the k1 estimate, summed over the completion."""
    for s in samples:
        if s.reward is not None:
            s.reward -= kl_coef * (math.fsum(old[id(s)]) - math.fsum(ref[id(s)]))


def set_advantages(samples, group_size, kind):
    """Turn the rewards of this rank's samples into advantages, one number a sample. COLLECTIVE."""
    rewards = [math.nan if s.reward is None else s.reward for s in samples]
    if kind == "reinforce++":
        everyone = torch.tensor(utils.gather(rewards)).view(world_size(), -1)
        advantages = reinforce_advantages(everyone.flatten()).view_as(everyone)[rank()]
    else:  # a prompt's group lives on one rank
        compare = {"grpo": grpo_advantages, "dr_grpo": dr_grpo_advantages, "rloo": rloo_advantages}
        advantages = compare[kind](torch.tensor(rewards).view(-1, group_size)).flatten()
    for s, a in zip(samples, advantages.tolist(), strict=True):
        s.advantage = a


def teaches(sample, args):
    """Whether a sample has a gradient: from its advantage, or from a divergence in the loss."""
    return sample.advantage != 0 or (args.kl_coef > 0 and args.kl != "k1")


def logprob_pass(policy, samples, args, every=False):
    """Log-probabilities without gradient, one list a sample. COLLECTIVE when sharded.

    Of those that teach something, or of `every` one.
    """
    result, dummy = {}, samples[:1]
    samples = [s for s in samples if every or teaches(s, args)]
    for part in policy.micro_batches(samples, args.micro_batch_tokens):
        with torch.no_grad():
            logprobs, _ = policy(policy.batch(part or dummy), args.temperature)
        finite = logprobs.isfinite().all(1).tolist()
        strange = [s for s, fine in zip(part, finite) if not fine]
        utils.stop_if_not_finite(logprobs[: len(part)].sum(), "log-probability", strange)
        for s, row in zip(part, logprobs.tolist()):
            result[id(s)] = row[: len(s.completion_ids)]
    return result


# ---------------------------------------------------------------------------------------------
# Step IV: policy update. First the loss, in pure functions of (B, C), nats, over completion tokens
#
#   --loss      ratio     surrogate   a token counts   summed and divided by, over all ranks
#   token       token     clipped     1                tokens                     (DAPO)
#   sequence    token     clipped     1 / its length   completions                (GRPO)
#   dr_grpo     token     clipped     1                completions x max_new_tokens
#   gspo        sequence  clipped     1 / its length   completions
#   cispo       token     weighted    1                tokens


def clipped_loss(log_ratio, advantages, clip_low, clip_high):
    """The clipped surrogate of every token, to be minimised; advantages (B, 1) or (B, C).

    PPO, arXiv 1707.06347, equation 7; two bounds as in DAPO, arXiv 2503.14476, equation 10.
    """
    ratio = log_ratio.exp()  # (B, C), 1 on padding
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    # the minimum is the pessimist's choice: no gain for moving past a bound, full pain for it
    return -torch.minimum(ratio * advantages, clipped * advantages)


def sequence_log_ratio(log_ratio, mask):
    """A completion's mean log-ratio on each of its tokens: the ratio of whole answers, by length.

    GSPO, arXiv 2507.18071, equation 7.
    """
    mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(log_ratio)


def cispo_loss(logprobs, log_ratio, advantages, clip_low, clip_high):
    """REINFORCE weighed by the clipped ratio: a token past a bound still has a gradient.

    MiniMax-M1, arXiv 2506.13585, equation 4.
    """
    weight = log_ratio.exp().clamp(1 - clip_low, 1 + clip_high).detach()  # a number, not a path
    return -weight * advantages * logprobs


def policy_loss(logprobs, old_logprobs, advantages, mask, kind, clip_low, clip_high):
    """The surrogate of the `kind` above, 0 outside the mask, and its log-ratio. Both (B, C)."""
    log_ratio = (logprobs - old_logprobs) * mask  # (B, C)
    if kind == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, mask)
    if kind == "cispo":
        losses = cispo_loss(logprobs, log_ratio, advantages, clip_low, clip_high)
    else:
        losses = clipped_loss(log_ratio, advantages, clip_low, clip_high)
    return losses * mask, log_ratio


def count_clipped(log_ratio, advantages, mask, clip_low, clip_high):
    """How many tokens a bound holds: those whose ratio has moved the way their advantage wants."""
    ratio = log_ratio.detach().exp()
    below = (ratio < 1 - clip_low) & (advantages < 0) & mask
    above = (ratio > 1 + clip_high) & (advantages > 0) & mask
    return below.sum().item(), above.sum().item()


def token_weights(mask, kind):
    """What each token counts in the sum: 1, or an equal part of its completion. (B, C)."""
    if kind in ("sequence", "gspo"):
        return mask / mask.sum(1, keepdim=True).clamp(min=1)
    return mask.float()


def loss_divisor(kind, tokens, completions, max_new_tokens):
    """What the weighed sum is divided by; no length in dr_grpo's, so that none is favoured."""
    if kind == "dr_grpo":
        return completions * max_new_tokens
    return completions if kind in ("sequence", "gspo") else tokens


def kl_estimate(logprobs, ref_logprobs, mask, kind):
    """Schulman's estimates of KL(policy || reference) a token, (B, C), nats.

    With r = reference / policy: k3 = r - 1 - log r (the paper's equation 1), never negative and
    unbiased; k2 = (log r)^2 / 2, biased, but with an unbiased gradient as a loss; k1 = -log r.
    "Approximating KL divergence", joschu.net, 2020.
    """
    log_ratio = ref_logprobs - logprobs
    if kind == "k3":
        return (torch.exp(log_ratio) - 1 - log_ratio) * mask
    return (log_ratio.square() / 2 if kind == "k2" else -log_ratio) * mask


def importance_weights(old_logprobs, sampler_logprobs, mask, cap, kind):
    """How much likelier a token is to the trainer than to the sampler that drew it. (B, C).

    A sampler with kernels of its own draws from a slightly other policy: the loss is weighed by
    this, without gradient, and `cap` bounds the variance. A ratio above it is, for the kind
    token: `cap`, truncated importance sampling (Ionides 2008; Yao et al. 2025, "Your efficient RL
        framework secretly brings you off-policy RL training");
    mask: 0, as one below 1 / cap is (IcePop, arXiv 2510.18855, whose bounds are 0.5 and 5);
    sequence_mask: 0, all tokens having the ratio of their completion, a product (Liu et al. 2025,
        "When speed kills stability: demystifying RL collapse from training-inference mismatch").
    """
    log_ratio = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach()  # (B, C)
    if kind == "sequence_mask":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    ratio = log_ratio.exp()  # may be infinite, which each kind replaces
    if kind == "token":
        return ratio.clamp(max=cap)
    low = 1 / cap if kind == "mask" else 0.0
    return torch.where((low <= ratio) & (ratio <= cap), ratio, 0.0)


def update(policy, optimizer, samples, old, ref, args):
    """One gradient step on this rank's share of a mini-batch. COLLECTIVE.

    `old` and `ref` map id(sample) to its tokens' log-probabilities, or are None where not needed.
    Returns this rank's sums over tokens, the gradient norm before clipping, and the 99th percentile
    of the absolute differences between sampler and trainer, in nats.
    """
    gaps, given, dummy = [], samples, samples[:1]
    if args.mask_truncated:  # out of the sum and of what divides it
        samples = [s for s in samples if s.finish_reason != "length"]
    tokens = sum(len(s.completion_ids) for s in samples)
    divisor = loss_divisor(args.loss, tokens, len(samples), args.max_new_tokens)
    # at least 1: where everything was cut off and masked, 0 / 0 would be NaN
    everywhere = max(1, utils.sum_over_ranks({"divisor": divisor})["divisor"])
    # what teaches nothing counts in the divisor and costs no pass
    samples = [s for s in samples if teaches(s, args)]
    sums = Counter(update_tokens=sum(len(s.completion_ids) for s in samples), divisor=divisor)
    for part in policy.micro_batches(samples, args.micro_batch_tokens):
        # a rank that has run out repeats a sample under an empty mask: FSDP needs its passes
        batch = policy.batch(part or dummy)
        batch["mask"] &= bool(part)
        mask = batch["mask"]  # (B, C)
        advantages = torch.tensor([[s.advantage] for s in part or dummy], device=mask.device)
        logprobs, entropies = policy(batch, args.temperature)  # (B, C), (B, C)
        # with a single update the policy has not moved since it answered: it is the old policy
        old_logprobs = beside(mask, part, old) if old else logprobs.detach()
        losses, log_ratio = policy_loss(logprobs, old_logprobs, advantages, mask, args.loss,
                                        args.clip_low, args.clip_high)
        sampler = beside(mask, part, {id(s): s.sampler_logprobs for s in part})
        if args.tis_cap:
            weights = importance_weights(old_logprobs, sampler, mask, args.tis_cap, args.tis)
            losses = losses * weights
            sums["tis_masked"] += ((weights == 0) & mask).sum().item()
        if ref:
            kl = kl_estimate(logprobs, beside(mask, part, ref), mask, args.kl)
            losses = losses + args.kl_coef * kl * (args.kl != "k1")  # k1 is in the reward already
            sums["kl"] += kl.sum().item()
        losses = losses * token_weights(mask, args.loss)
        # divided by the sum over ALL ranks and micro-batches, so that how the work is split
        # changes nothing; times world_size because FSDP averages gradients over ranks
        loss = losses.sum() * world_size() / everywhere
        utils.stop_if_not_finite(loss, "loss", part)
        loss.backward()
        gaps.append((old_logprobs - sampler)[mask])  # (tokens of this micro-batch,), nats
        low, high = count_clipped(log_ratio, advantages, mask, args.clip_low, args.clip_high)
        sums.update(gap_sums(gaps[-1]), loss=losses.sum().item(), entropy=entropies.sum().item(),
                    clipped_low=low, clipped_high=high)  # a Counter's update adds
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    utils.stop_if_not_finite(norm, "gradient norm", given)
    optimizer.step()
    optimizer.zero_grad()
    return sums, norm.item(), percentile_99(torch.cat(gaps).abs())


def gap_sums(gap):
    """Sums over tokens of how far the sampler is from the trainer; `gap` (tokens,) in nats.

    Sums of bounded values, but for the plain one: one token must not decide, nor overflow.
    """
    held = gap.clamp(-20, 20)
    return {"sampler_gap": gap.abs().sum().item(),
            "sampler_gap_clipped": gap.abs().clamp(max=1).sum().item(),
            "sampler_ratio": held.exp().sum().item(),
            "sampler_ratio_squared": (2 * held).exp().sum().item()}


def percentile_99(values):
    """0 if there are none; of more than 2^24, which is torch.quantile's limit, of the first."""
    return torch.quantile(values[: 2**24], 0.99).item() if len(values) else 0.0


def beside(mask, samples, rows):
    """Token values by id(sample) as a tensor (B, C) of the mask's shape, 0 on padding."""
    table = torch.zeros(mask.shape)
    for i, s in enumerate(samples):
        table[i, : len(rows[id(s)])] = torch.tensor(rows[id(s)])
    return table.to(mask.device)


# ---------------------------------------------------------------------------------------------
# Log, evaluate, save


def rollout_sums(samples, group_size):
    """Sums over this rank's samples; `step_metrics` makes means of them."""
    groups = in_groups(samples, group_size)
    flat = [g for g in groups if all(s.advantage == 0 for s in g)]
    sums = Counter()
    for s in samples:
        sums.update(completions=1, tokens=len(s.completion_ids), unscored=s.reward is None,
                    truncated=s.finish_reason == "length")  # a Counter's update adds
        by_name = {"reward": s.reward} | {f"reward/{name}": x for name, x in s.rewards.items()}
        for name, value in by_name.items():
            sums[name] += value or 0.0
            sums[f"scored {name}"] += value is not None
    sums.update(groups=len(groups), groups_all_alike=len(flat))  # the latter teach nothing
    return sums


def step_metrics(sums, norms, seconds, learning_rate):
    """Sums over all ranks to the means that are logged and shown."""
    n, tokens = sums["completions"], max(1, sums["update_tokens"])
    metrics = {name: sums[name] / sums[f"scored {name}"]
               for name in sums if name.startswith("reward") and sums[f"scored {name}"]}
    metrics |= {"tokens": sums["tokens"], "length": sums["tokens"] / n}
    metrics |= {name: sums[name] / n for name in ("truncated", "unscored")}
    metrics["groups_all_alike"] = sums["groups_all_alike"] / sums["groups"]
    metrics["loss"] = sums["loss"] / max(1, sums["divisor"])
    names = ("entropy", "kl", "clipped_low", "clipped_high", "sampler_gap", "sampler_gap_clipped",
             "sampler_ratio", "tis_masked")
    metrics |= {name: sums[name] / tokens for name in names if name in sums}
    size = sums["sampler_ratio"] ** 2 / (tokens * sums["sampler_ratio_squared"] or 1)
    metrics["sampler_effective_size"] = size
    metrics |= {"grad_norm": sum(norms) / len(norms), "lr": learning_rate}
    return metrics | {f"seconds_{name}": round(s, 3) for name, s in seconds.items()}


def behind_the_bar(metrics, seconds):
    """What a user watches: rewards, length, and where the time goes."""
    rewards = {name.removeprefix("reward/"): f"{metrics[name]:.2f}"
               for name in metrics if name.startswith("reward")}
    clocks = " ".join(f"{name} {s:.1f}" for name, s in seconds.items())
    return rewards | {"length": f"{metrics['length']:.0f}", "seconds": clocks}


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
    from rollout import check_engine

    if args.advantage != "reinforce++" and args.group_size < 2:
        raise UserError(f"--group_size must be at least 2: {args.advantage} compares the answers "
                        "to a prompt; reinforce++ needs no group.")
    if args.batch_size % args.mini_batch_size or args.mini_batch_size % world_size():
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of --mini_batch_size "
                        f"{args.mini_batch_size}, and that one of the {world_size()} "
                        f"rank{'s' * (world_size() > 1)}.")
    check_engine(args)


def main(args):
    from data import count_steps, data_record, load_splits, refuse_mixture
    from doctor import consult, rehearse, stop_if_sampler_strays
    from evaluate import (
        before_and_after, best_step, chosen_settings, evaluate_splits, is_right, reflection_metrics)
    from policy import (
        Policy, add_lora, compute_dtype, freeze, load_model, load_processor, shard, twin)
    from rollout import choose_engine, make_engine, share
    from scoring import load_rewards, score
    from signs import begin, tell

    refuse_mixture(args)
    check_args(args)
    utils.check_wandb(args.wandb)
    args.engine = choose_engine(args.engine)  # args.json says what ran
    if args.engine == "hf" and compute_dtype(args.dtype) == torch.float32:
        args.tis_cap = 0.0  # sampler and trainer are one; in bfloat16 they round differently
    rewards = load_rewards(args.rewards, args.max_new_tokens)
    settings = chosen_settings(args.eval_settings, args)
    started = time.time()
    out, continues = utils.choose_run(args, longer=True)  # no step depends on how many follow
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)

    # Step I: data flow. Prompts with their images become samples, all checked before step 1
    data = load_splits(args, processor)
    record = data_record(out, data, args)
    prompts = [s for split in data.values() for s in split]
    train = data.pop("train")
    steps_per_epoch, total = count_steps(train, args)
    utils.refuse_shorter(out, steps_per_epoch, total)

    # A sampler starts while the device is empty; the policy comes from the host, sharded over ranks
    dtype = compute_dtype(args.dtype)
    model = load_model(args.model)
    count = freeze(model, args.train_vision, args.train_connector, args.train_language)
    sharing = None if args.plain else share(model, processor, args.vision_cache)
    engine = make_engine(args.engine, model, processor, args, sharing)
    engine.sleep()
    reference = None
    if args.kl_coef:
        first = twin(model).requires_grad_(False)
        reference = shard(Policy(first, processor, sharing), dtype, args.offload)
    if args.lora_rank:
        count = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = shard(Policy(model, processor, sharing), dtype, args.offload).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)  # in one kernel, without copies of all weights
    # N updates a batch, the paper's formula; a single one is exactly on-policy
    updates = args.batch_size // args.mini_batch_size * args.ppo_epochs
    k1 = reference and args.kl == "k1"  # a divergence that is part of what was earned
    # a few prompts go through all four steps, so that what cannot work is a sentence before step 1
    engine.sync(policy.model)
    score(rehearse(engine, prompts, args, policy), rewards, args.reward_timeout)
    print0(f"Training {count:,} weights on {len(train)} prompts: {total} steps of "
           f"{args.batch_size} prompts x {args.group_size} answers, on {world_size()} x "
           f"{utils.device().type}. {out}")
    utils.try_saving(out, policy, dtype, total, args)
    utils.begin_run(out, args, record)
    utils.start_mirror(out, args)

    # A run that was stopped goes on after its last whole checkpoint: data order and sampling depend
    # on the seed and the step alone, so nothing else has to be restored
    start = 0
    if continues and (newest := utils.whole_checkpoint(out)):
        engine.sleep()  # or the optimiser's state finds no room
        start = utils.load_resume_state(newest, policy, optimizer)
        engine.sync(policy.model)
        print0(f"Continuing after step {start}.")
    utils.cut_logs(out, start)
    watch = begin(out, args)
    if args.engine == "vllm" and args.doctor:
        consult(engine, policy, train, processor, args)
    if start == 0:
        evaluate_splits(engine, data, settings, args, 0, 0.0, out)

    steps = range(start + 1, total + 1)
    for step in (bar := tqdm(steps, "GRPO", total, initial=start, disable=rank() > 0 or None)):
        epoch, k = divmod(step - 1, steps_per_epoch)
        seconds = defaultdict(float)
        utils.forget_peak_memory()
        prompts = epoch_batches(train, args.batch_size, args.seed, epoch)[k][rank() :: world_size()]

        # Step II: response collection. Every rank answers its own prompts, G times each
        def answer(prompts, seed):
            with timed(seconds, "rollout"):
                done = engine.generate(prompts, args.group_size, args.temperature, 1.0,
                                       args.max_new_tokens, seed)
            with timed(seconds, "reward"):
                score(done, rewards, args.reward_timeout)
            return done

        samples = collect(answer, prompts, train, args, step)
        engine.sleep()  # its memory is the trainer's until the sync

        # Step III: trajectory. Rewards become advantages; log-probabilities as they are before the
        # first update of this batch, None where nothing asks for them
        set_advantages(samples, args.group_size, args.advantage)
        with timed(seconds, "logprobs"):
            old = logprob_pass(policy, samples, args, k1) if updates > 1 or k1 else None
            ref = logprob_pass(reference, samples, args, k1) if reference else None
        if k1:  # other rewards, so other advantages
            subtract_divergence(samples, old, ref, args.kl_coef)
            set_advantages(samples, args.group_size, args.advantage)

        # Step IV: policy update. N gradient steps, then the sampler takes over the new weights
        size = args.mini_batch_size // world_size() * args.group_size  # samples an update, a rank
        sums, norms, tails = rollout_sums(samples, args.group_size), [], []
        with timed(seconds, "update"):
            for n in range(updates):
                warmed = ((step - 1) * updates + n + 1) / max(1, args.warmup_steps)
                optimizer.param_groups[0]["lr"] = learning_rate = args.lr * min(1, warmed)
                part = samples[n * size % len(samples) :][:size]
                part_sums, norm, tail = update(policy, optimizer, part, old, ref, args)
                sums.update(part_sums)  # a Counter's update adds
                norms.append(norm)
                tails.append(tail)
        with timed(seconds, "sync"):
            engine.sync(policy.model)

        # Log, evaluate, save
        metrics = step_metrics(utils.sum_over_ranks(sums), norms, seconds, learning_rate)
        metrics["sampler_gap_p99"] = max(utils.gather(tails))
        stop_if_sampler_strays(metrics)
        metrics["peak_memory_gb"] = max(utils.gather([utils.peak_memory() / 1e9]))
        records = utils.gather([s.record() for s in samples])
        metrics |= reflection_metrics([r["completion_text"] for r in records],
                                      [is_right(r["rewards"]) for r in records])
        place = {"generation_step": step, "gradient_step": step * updates,
                 "epoch": step / steps_per_epoch, "ranks": world_size()}
        if rank() == 0:
            utils.write_jsonl(out / "samples" / f"step_{step:06d}.jsonl", records)
            utils.log_row(out / "metrics.jsonl", place | metrics)
        utils.show(bar, step, behind_the_bar(metrics, seconds))
        # COLLECTIVE, both. Saved last: what stands before a checkpoint in the logs is complete
        if step == total or (args.eval_every and step % (args.eval_every * steps_per_epoch) == 0):
            evaluate_splits(engine, data, settings, args, step, step / steps_per_epoch, out)
        tell(watch, place | metrics, out)
        best, _ = utils.gather([best_step(out, args.keep_best)])[0]
        if step in (total, best) or (args.save_every and step % args.save_every == 0):
            utils.save_checkpoint(out, step, policy, optimizer, dtype, args.keep, best)

    result = before_and_after(out, args.keep_best) | {
        "steps": total, "minutes": round((time.time() - started) / 60, 2), "out": str(out)}
    if rank() == 0:
        utils.write_json(out / "result.json", result)
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
