"""Stage: supervised fine-tuning. The baseline that reinforcement learning is compared with.

Maximum likelihood on golden responses. Data, prompt, model, evaluation and run folder are those of
train_grpo.py, so that the two files differ in what they teach, and in the learning rate's schedule:
read them with `diff train_sft.py train_grpo.py`. What textbooks have and this leaves out: dropout,
label smoothing, a loss on the prompt. An epoch is one pass over the training prompts.

    Step I    data flow             prompts, images and golden responses become samples
    Step II   response collection   nothing to collect: the response is given
    Step III  trajectory            nothing to weigh: every response token counts the same
    Step IV   policy update         a likelihood step

    python train_sft.py                        # the toy, on a laptop, no argument needed
    torchrun --standalone --nproc_per_node 8 train_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct \
        --train_data train.jsonl --validation_data validation.jsonl --test_data test.jsonl \
        --batch_size 16 --lr 1e-5 --max_new_tokens 2048 --gradient_checkpointing
"""

import utils  # first: from here on Ctrl-C is no traceback

import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import tokenise
from reward import accuracy_reward
from utils import UserError, print0, rank, world_size


@dataclass
class Args:
    # Run
    model: str = "toy_model"  # folder or hub id of a vision-language model
    out: str = ""  # run folder; empty: a new one under runs/; an unfinished run there goes on
    seed: int = 0  # of the data order
    # Data
    train_data: str = "toy_data/train.jsonl"  # JSON lines, parquet or hub, with "solution"
    validation_data: str = "toy_data/validation.jsonl"  # measured before and after; empty: none
    test_data: str = "toy_data/test.jsonl"  # out of distribution; empty: none
    columns: str = ""  # OURS=THEIRS, joined by commas: columns of another name; empty: none
    image_root: str = ""  # folder that image paths begin from; empty: the data file's
    min_pixels: int = 0  # images with fewer are enlarged; 0: the model's own bound
    max_pixels: int = 0  # images with more are reduced; 0: the model's own bound
    instruction: str = (  # the end of every prompt; empty: none
        "Think step by step and put the final answer in \\boxed{}.")
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    # Rollout, for the evaluation alone
    engine: Literal["auto", "hf", "vllm"] = "auto"  # sampler; auto: vllm on CUDA, else embedded
    max_new_tokens: int = 96  # completions are cut off here; longer golden responses are refused
    rollout_batch_size: int = 256  # completions sampled at one time on a rank
    vllm_memory: float = 0.4  # share of a GPU's memory for vLLM, in (0, 1); the rest trains
    engine_timeout: int = 3600  # seconds that one call of vLLM may take
    # Optimiser
    epochs: int = 3  # passes over the training prompts
    max_steps: int = 0  # stop after this many gradient steps; 0: after all epochs
    batch_size: int = 16  # prompts a gradient step, over all ranks
    micro_batch_tokens: int = 16384  # tokens in one forward pass on a rank, prompts included
    vision_cache: int = 1024  # MB of host memory for features of frozen vision; 0: none
    lr: float = 1e-4  # AdamW learning rate at its peak, in (0, 1]; then a cosine to 0
    warmup_steps: int = 4  # gradient steps from 0 to lr; 0: none
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
    save_every: int = 0  # gradient steps between checkpoints; 0: only the last
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


def with_golden_responses(samples, processor, max_new_tokens, eos):
    """Samples completed by golden responses and `eos`: a model that never sees it never stops."""
    done = []
    for s in samples:
        ids = tokenise(processor.tokenizer, s.solution) if s.solution.strip() else []
        if not ids:
            raise UserError(f'{s.place}: the field "solution" is empty; add a golden response.')
        if len(ids) >= max_new_tokens:
            raise UserError(f"{s.place}: the golden response has {len(ids)} tokens; raise "
                            f"--max_new_tokens above that, it is {max_new_tokens}.")
        done.append(replace(s, completion_ids=[*ids, eos], completion_text=s.solution,
                            finish_reason="stop"))
    if wrong := [s.id for s in done if accuracy_reward(s.solution, s.answer) == 0]:
        print0(f"{len(wrong)} of {len(done)} golden responses end in another answer than their row "
               f"has, by our own grader: it would be taught. The first is prompt {wrong[0]}.")
    return done


# ---------------------------------------------------------------------------------------------
# Step II: response collection. Nothing to do: the golden responses are given


# ---------------------------------------------------------------------------------------------
# Step III: trajectory. Nothing to do: every token of them counts the same


# ---------------------------------------------------------------------------------------------
# Step IV: policy update. The loss is minus the log-likelihood, so small that it stands in `update`


def learning_rate_at(step, total, peak, warmup):
    """Linear to `peak` over `warmup` steps, then a cosine, whose 0 at `total` moves nothing."""
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def update(policy, optimizer, samples, args):
    """One gradient step on this rank's share of a batch. COLLECTIVE.

    Returns this rank's sums over tokens, and the gradient norm before clipping.
    """
    sums = defaultdict(float, update_tokens=sum(len(s.completion_ids) for s in samples))
    all_tokens = utils.sum_over_ranks({"tokens": sums["update_tokens"]})["tokens"]
    for part in policy.micro_batches(samples, args.micro_batch_tokens):
        # a rank that has run out repeats a sample under an empty mask: FSDP needs its passes
        batch = policy.batch(part or samples[:1])
        batch["mask"] &= bool(part)
        logprobs, entropies = policy(batch, temperature=1.0)  # (B, C), (B, C), 0 outside the mask
        # divided by the tokens of ALL ranks and micro-batches, so that how the work is split
        # changes nothing; times world_size because FSDP averages gradients over ranks
        loss = -logprobs.sum() * world_size() / all_tokens
        utils.stop_if_not_finite(loss, "loss", part)
        loss.backward()
        sums["loss"] -= logprobs.sum().item()
        sums["entropy"] += entropies.sum().item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    utils.stop_if_not_finite(norm, "gradient norm", samples)
    optimizer.step()
    optimizer.zero_grad()
    return sums, norm.item()


# ---------------------------------------------------------------------------------------------
# The stage


def main(args):
    from data import count_steps, data_record, load_splits, refuse_mixture
    from doctor import rehearse
    from evaluate import before_and_after, best_step, chosen_settings, evaluate_splits
    from policy import (
        Policy, add_lora, compute_dtype, freeze, load_model, load_processor, shard)
    from rollout import check_engine, end_ids, generation_config, make_engine, share
    from signs import begin, tell

    refuse_mixture(args)
    if args.batch_size % world_size():
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of the {world_size()} "
                        "ranks.")
    check_engine(args)
    utils.check_wandb(args.wandb)
    settings = chosen_settings(args.eval_settings, args)
    started = time.time()
    out, continues = utils.choose_run(args)
    processor = load_processor(args.model, args.min_pixels, args.max_pixels)

    # Step I: data flow. Prompts with their images become samples, all checked before step 1
    data = load_splits(args, processor)
    record = data_record(out, data, args)
    prompts = [s for split in data.values() for s in split]
    eos = end_ids(generation_config(args.model), processor)[0]  # where every sampler stops
    train = with_golden_responses(data.pop("train"), processor, args.max_new_tokens, eos)
    steps_per_epoch, total = count_steps(train, args)

    # A sampler starts while the device is empty; the policy comes from the host, sharded over ranks
    dtype = compute_dtype(args.dtype)
    model = load_model(args.model)
    count = freeze(model, args.train_vision, args.train_connector, args.train_language)
    sharing = share(model, processor, args.vision_cache)
    engine = make_engine(args.engine, model, processor, args, sharing)
    engine.sleep()
    if args.lora_rank:
        count = add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    policy = shard(Policy(model, processor, sharing), dtype, args.offload).train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.95), weight_decay=args.weight_decay,
                                  fused=True)
    engine.sync(policy.model)
    rehearse(engine, prompts, args, policy)  # what cannot work is a sentence before step 1
    print0(f"Training {count:,} weights on {len(train)} prompts: {total} steps of "
           f"{args.batch_size} golden responses, on {world_size()} x {utils.device().type}. {out}")
    utils.try_saving(out, policy, dtype, total, args)
    utils.begin_run(out, args, record)
    utils.start_mirror(out, args)

    start = 0
    if continues and (newest := utils.whole_checkpoint(out)):
        engine.sleep()  # or the optimiser's state finds no room
        start = utils.load_resume_state(newest, policy, optimizer)
        print0(f"Continuing after step {start}.")
    utils.cut_logs(out, start)
    watch = begin(out, args)
    if start == 0:
        evaluate_splits(engine, data, settings, args, 0, 0.0, out)
    engine.sleep()

    steps = range(start + 1, total + 1)
    for step in (bar := tqdm(steps, "SFT", total, initial=start, disable=rank() > 0 or None)):
        epoch, k = divmod(step - 1, steps_per_epoch)
        utils.forget_peak_memory()
        samples = epoch_batches(train, args.batch_size, args.seed, epoch)[k][rank() :: world_size()]

        # Step II: response collection. The golden responses are there already
        # Step III: trajectory. Every token of them counts the same

        # Step IV: policy update. One gradient step
        learning_rate = learning_rate_at(step, total, args.lr, args.warmup_steps)
        optimizer.param_groups[0]["lr"] = learning_rate
        began = time.perf_counter()
        sums, norm = update(policy, optimizer, samples, args)
        seconds = round(time.perf_counter() - began, 3)

        # Log, evaluate, save
        sums = utils.sum_over_ranks(sums)
        metrics = {name: sums[name] / sums["update_tokens"] for name in ("loss", "entropy")}
        metrics["tokens"] = sums["update_tokens"]
        metrics["length"] = sums["update_tokens"] / args.batch_size
        metrics["peak_memory_gb"] = max(utils.gather([utils.peak_memory() / 1e9]))
        metrics |= {"grad_norm": norm, "lr": learning_rate, "seconds_update": seconds}
        place = {"generation_step": step, "gradient_step": step,
                 "epoch": step / steps_per_epoch, "ranks": world_size()}
        if rank() == 0:
            utils.log_row(out / "metrics.jsonl", place | metrics)
        utils.show(bar, step, {"loss": f"{metrics['loss']:.3f}", "update": f"{seconds:.1f}s"})
        # COLLECTIVE, both. Saved last: what stands before a checkpoint in the logs is complete
        if step == total or (args.eval_every and step % (args.eval_every * steps_per_epoch) == 0):
            engine.sync(policy.model)
            evaluate_splits(engine, data, settings, args, step, step / steps_per_epoch, out)
            engine.sleep()
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
