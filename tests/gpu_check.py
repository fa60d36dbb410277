"""Every check that only a GPU can make, in one command and one JSON document, in under 8 minutes.

    python tests/gpu_check.py            # on a machine with one CUDA device of 80 GB, and 128 GB of host memory
    python tests/gpu_check.py --tiny     # the same code on a CPU with a small shape, to keep it alive

What it checks: log-probabilities, and a training step through FSDP2 on one rank, offloaded and with LoRA too, in
bfloat16 against float32; flex attention against the plain path; and, with the shape of Qwen2.5-VL-3B and random
weights (neither speed nor memory depends on what they are), peaks of memory against the plan that simulate.py makes
without a GPU; tokens/s and share of the measured matrix peak of a GRPO step, plain and with shared prefixes; and
vLLM's start, sleep, wake-up and sync beside the trainer, where vllm is installed. Paste the document into results/.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bench
import toy
import train_grpo
import utils
from bench import matrix_peak, qwen_config, useful_work
from conftest import branching, sampler
from data import load_samples, make_sample
from doctor import mean_gap, trainer_logprobs
from policy import (
    add_lora, collate, compute_dtype, freeze, load_model, load_processor, Policy, shard, twin, whole, whole_weights)
from rollout import Args, choose_engine, make_engine, share
from siblings import pack, Sharing

SHAPES = {  # what differs between Qwen2.5-VL-3B and the stand-in for a CPU
    "3b": {"text": bench.SHAPES["3B"], "vision": bench.VISION, "sections": bench.SECTIONS,
           "side": 504, "tokens": 400, "group": 8, "prompts": 4},
    "tiny": {"text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000,
                      "tie_word_embeddings": True},
             "vision": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                        "fullatt_block_indexes": [1]},
             "sections": [4, 6, 6], "side": 112, "tokens": 8, "group": 2, "prompts": 2},
}


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes():
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def held_bytes():
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def toy_prompts():
    processor = load_processor(ROOT / "toy_model")
    return processor, load_samples(ROOT / "toy_data" / "validation.jsonl", processor, 256)[:64]


def check_numbers():
    """The toy: greedy answers and log-probabilities on this device against float32 on the CPU."""
    processor, prompts = toy_prompts()
    model = load_model(ROOT / "toy_model")
    dtype = compute_dtype("auto")
    exactly = twin(model, utils.device())
    done = sampler(exactly, processor, 64).generate(prompts, 1, 0, 1.0, 96, 0)
    low = make_engine("hf", model, processor, Args(rollout_batch_size=64), share(model, processor, megabytes=0))
    low = low.generate(prompts, 1, 0, 1.0, 96, 0)
    with torch.no_grad():
        exact, _ = Policy(exactly, processor)(collate(done, processor), 1.0)
        policy = shard(Policy(copy.deepcopy(model), processor), dtype)
        rounded, _ = policy(collate(done, processor), 1.0)
    tokens = sum(len(s.completion_ids) for s in done)
    same = sum(a.completion_ids == b.completion_ids for a, b in zip(done, low))
    return {"dtype": str(dtype), "greedy_equal_to_float32": same / len(done),
            "dlogp_mean_bf16_to_fp32": (rounded - exact).abs().sum().item() / tokens,
            "dlogp_max_bf16_to_fp32": (rounded - exact).abs().max().item()}


def big_config(shape, processor):
    return qwen_config(shape["text"], shape["vision"], shape["sections"], processor)


def big_model(shape):
    """A random model of the shape on the host, as `load_model` gives it, its language trainable; and its processor."""
    processor = toy.build_processor()
    limits = {"shortest_edge": 28**2, "longest_edge": 28**2 * 1024}
    processor.image_processor.size = type(processor.image_processor.size)(**limits)
    with torch.device(utils.device()):  # where random numbers are made fast
        model = Qwen2_5_VLForConditionalGeneration(big_config(shape, processor))
    model = twin(model, "cpu", compute_dtype("auto")).cpu()
    freeze(model, False, False, True)
    return model, processor


def big_prompts(shape, processor, folder):
    """Prompts of the shape, each with a picture of `side` x `side` pixels."""
    prompts = []
    for i in range(shape["prompts"]):
        Image.effect_noise((shape["side"],) * 2, 80).convert("RGB").save(folder / f"{i}.png")
        row = {"id": str(i), "question": "<image>" + "How many? " * 10, "answer": "1", "images": [f"{i}.png"]}
        prompts.append(make_sample(row, folder, "here", processor))
    return prompts


def adam(policy):
    return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 1e-6, fused=True)


def answered_toy(group=4):
    """The toy's model, frozen but for its language, and some answers of its own with advantages."""
    processor, prompts = toy_prompts()
    model = load_model(ROOT / "toy_model").to(utils.device())
    freeze(model, False, False, True)
    done = sampler(copy.deepcopy(model), processor, 64).generate(prompts[:16], group, 1.0, 1.0, 96, 0)
    for i, s in enumerate(done):
        s.advantage = (-1.0) ** i
    return processor, model, done


def logprobs_and_gradient(policy, batch):
    """Log-probabilities of a batch, and the gradient of their weighed sum as one float64 vector."""
    logprobs, _ = policy(batch, 1.0)
    weights = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    (weights * logprobs).sum().backward()
    gradient = torch.cat([p.grad.double().flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    return logprobs.detach().double(), gradient


def check_flex():
    """Errors against float64 of the plain path and of flex attention.

    On a CPU of the rectangles too, and flex attention, which has no backward there, is held to its
    log-probabilities alone.
    """
    processor, model, done = answered_toy()
    exact = Policy(copy.deepcopy(model).double(), processor)
    truth, true_gradient = logprobs_and_gradient(exact, collate(done, processor))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = branching(copy.deepcopy(model).to(dtype), processor)
        batches = {"plain": collate(done, processor)}
        batches["flex"] = pack(done, policy.sharing, policy.model, flex=True)
        if not torch.cuda.is_available():
            batches["rectangles"] = pack(done, policy.sharing, policy.model)
        for name, batch in batches.items():
            row = found.setdefault(str(dtype).removeprefix("torch."), {}).setdefault(name, {})
            if name == "flex" and not torch.cuda.is_available():
                with torch.no_grad():
                    logprobs = policy(batch, 1.0)[0].double()
            else:
                logprobs, gradient = logprobs_and_gradient(policy, batch)
                row["gradient_error"] = ((gradient - true_gradient).norm() / true_gradient.norm()).item()
            row["logprob_error"] = (logprobs - truth).abs().max().item()
    return found


def check_step():
    """One update on the same batch: in float32, and in bfloat16 through FSDP2, offloaded too; the same with LoRA."""
    processor, model, done = answered_toy()
    found = {}
    for rank in (0, 8):
        kinds = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False),
                 "bfloat16, offload": (torch.bfloat16, True)}
        for kind, (dtype, offload) in kinds.items():
            own = copy.deepcopy(model)
            if rank:
                add_lora(own, rank, 16.0, seed=0)
            policy = shard(branching(own, processor), dtype, offload).train()
            optimizer, gradient = adam(policy), []
            step = optimizer.step
            optimizer.step = lambda: (gradient.append(torch.cat(
                [whole(p.grad).flatten() for p in policy.parameters() if p.grad is not None])), step())
            sums, norm, _ = train_grpo.update(policy, optimizer, done, None, None, train_grpo.Args(tis_cap=0.0))
            if kind == "float32":
                exact = gradient[0]
            found[f"LoRA, {kind}" if rank else kind] = {
                "loss": sums["loss"] / sums["divisor"], "entropy": sums["entropy"] / sums["update_tokens"],
                "grad_norm": norm,
                "gradient_cosine": torch.nn.functional.cosine_similarity(
                    exact.double(), gradient[0].double(), dim=0).item()}
    return found


# what a rank is given in turn, each beside --gradient_checkpointing, and how it is called
WAYS = {"checkpointing": {}, "offload": {"offload": True}, "LoRA 64": {"lora_rank": 64}}
MOMENTS = ("start", "rest", "update", "step", "sync")


def flags(shape, **more):
    return train_grpo.Args(micro_batch_tokens=8192, gradient_checkpointing=True, tis_cap=0.0, group_size=shape["group"],
                           max_new_tokens=shape["tokens"], **more)


def plan(shape, prompt_tokens):
    """Bytes of the device by way and moment, simulated: to be called where no process group is."""
    import simulate

    simulate.install()
    processor, planned = toy.build_processor(), {}
    for way, more in WAYS.items():
        found = simulate.moments(big_config(shape, processor), processor, flags(shape, **more), 1, [prompt_tokens])
        found["update"] = found.pop(f"update {prompt_tokens}")
        planned[way] = {moment: found[moment].get("gpu", 0) for moment in MOMENTS}
    return planned


def check_memory(shape, folder):
    """The most bytes that the device holds at each moment, measured and as planned; and seconds."""
    found, seconds = {}, {}
    model, processor = big_model(shape)
    prompts = big_prompts(shape, processor, folder)
    word = len(processor.tokenizer) - 1
    for way, more in WAYS.items():
        args, own, most = flags(shape, **more), copy.deepcopy(model), {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = held_bytes()

        def at(moment, function, *values):
            start = clock()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            out = function(*values)
            seconds.setdefault(way, {})[moment], most[moment] = clock() - start, peak_bytes() - before
            return out

        def start():
            sharing = Sharing(own, processor)
            if args.lora_rank:
                add_lora(own, args.lora_rank, args.lora_alpha, 0)
            own.gradient_checkpointing_enable()
            return shard(Policy(own, processor, sharing), compute_dtype("auto"), args.offload).train()

        policy = at("start", start)
        optimizer = adam(policy)
        samples = [replace(s, completion_ids=[word] * shape["tokens"], sampler_logprobs=[-1.0] * shape["tokens"],
                           finish_reason="stop", advantage=1.0) for s in prompts for _ in range(shape["group"])]
        part = policy.micro_batches(samples, args.micro_batch_tokens)[0]
        train_grpo.update(policy, optimizer, part, None, None, args)  # compiles, and makes the optimiser's state
        most["rest"] = held_bytes() - before
        for p in policy.parameters():  # as an update's later micro-batches find them
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        step = optimizer.step
        optimizer.step = lambda: (most.update(update=peak_bytes() - before), at("step", step))
        at("whole update", train_grpo.update, policy, optimizer, part, None, None, args)
        at("sync", lambda: [None for _ in whole_weights(policy.model)])
        found[way] = {moment: most[moment] for moment in MOMENTS} | {"seconds": seconds[way]}
        del policy, optimizer, own, step
    words = [sys.executable, __file__, "--plan", str(len(prompts[0].prompt_ids)), *sys.argv[1:]]
    done = subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    planned = json.loads(done.stdout) if done.returncode == 0 else {}
    for way, moments in found.items():
        for moment in MOMENTS:
            plan_bytes = planned[way][moment] / 1e9 if planned else f"failed: {done.stderr.strip()[-300:]}"
            moments[moment] = {"gigabytes": moments[moment] / 1e9, "planned": plan_bytes}
    return found


def check_vllm(shape, folder):
    """vLLM beside the trainer: seconds of its start, sleep, wake-up with the sync, and answers; the gap to the trainer."""
    if choose_engine("auto") != "vllm":
        return {"skipped": "there is no vllm for this device here"}
    model, processor = big_model(shape)
    for part in (model, processor):
        part.save_pretrained(folder / "model")
    prompts, found = big_prompts(shape, processor, folder), {}
    args = flags(shape, model=str(folder / "model"), vllm_memory=0.4)

    def timed(what, function, *values):
        start = clock()
        out = function(*values)
        found[f"seconds_{what}"] = clock() - start
        return out

    engine = timed("start", make_engine, "vllm", model, processor, args)
    timed("sleep", engine.sleep)
    if torch.cuda.is_available():
        found["gigabytes_asleep"] = (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 1e9
    model.gradient_checkpointing_enable()
    policy = shard(Policy(model, processor, Sharing(model, processor)), compute_dtype("auto")).train()
    optimizer = adam(policy)
    for round in ("first", "after_an_update"):
        timed(f"sync_{round}", engine.sync, policy.model)
        done = timed(f"answers_{round}", engine.generate, prompts, shape["group"], 1.0, 1.0, shape["tokens"], round)
        found[f"tokens_{round}"] = sum(len(s.completion_ids) for s in done)
        engine.sleep()
        found[f"gap_{round}"] = mean_gap(trainer_logprobs(policy, done), [s.sampler_logprobs for s in done])
        for i, s in enumerate(done):
            s.advantage = (-1.0) ** i
        train_grpo.update(policy, optimizer, done, None, None, args)
    return found


def check_speed(shape, folder):
    """A GRPO step: seconds and tokens/s by phase, peak memory, the update plain and with shared prefixes."""
    model, processor = big_model(shape)
    prompts = big_prompts(shape, processor, folder)
    dtype = compute_dtype("auto")
    sharing = Sharing(model, processor)
    engine = make_engine("hf", model, processor, Args(rollout_batch_size=64), sharing)
    engine.eos = torch.tensor([-1], device=utils.device())  # every answer gets its full length
    model.gradient_checkpointing_enable()
    policy = shard(Policy(model, processor, sharing), dtype).train()
    optimizer, args = adam(policy), train_grpo.Args(micro_batch_tokens=8192)
    made = shape["prompts"] * shape["group"] * shape["tokens"]
    peak = matrix_peak(8192 if torch.cuda.is_available() else 512, dtype=dtype, device=utils.device())
    found = {"parameters": sum(p.numel() for p in policy.parameters()), "matrix_teraflops": peak / 1e12,
             "prompt_tokens": len(prompts[0].prompt_ids), "completion_tokens": shape["tokens"],
             "prompts": shape["prompts"], "group": shape["group"]}
    for name in ("plain", "shared", "plain", "shared"):  # the first round compiles and warms up
        policy.sharing = sharing if name == "shared" else None
        start = clock()
        samples = engine.generate(prompts, shape["group"], 1.0, 1.0, shape["tokens"], 0)
        middle = clock()
        for i, s in enumerate(samples):
            s.advantage = (-1.0) ** i
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        sums, norm, _ = train_grpo.update(policy, optimizer, samples, None, None, args)
        end = clock()
        peak_memory = peak_bytes() / 1e9
        engine.sync(policy.model)
        seconds = {"rollout": middle - start, "update": end - middle, "sync": clock() - end}
        work = useful_work(model, samples)
        found[name] = {
            "seconds": seconds, "grad_norm": norm, "sampler_gap": sums["sampler_gap"] / sums["update_tokens"],
            "rollout_tokens_per_second": made / seconds["rollout"],
            "update_tokens_per_second": made / seconds["update"],
            "step_tokens_per_second": made / sum(seconds.values()),
            "update_share_of_matrix_peak": 3 * work / seconds["update"] / peak,
            "rollout_share_of_matrix_peak": work / seconds["rollout"] / peak, "update_peak_gigabytes": peak_memory}
    found["update_times_faster"] = found["plain"]["seconds"]["update"] / found["shared"]["seconds"]["update"]
    return found


def main():
    shape = SHAPES["tiny" if "--tiny" in sys.argv else "3b"]
    if "--plan" in sys.argv:
        print(json.dumps(plan(shape, int(sys.argv[sys.argv.index("--plan") + 1]))))
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    started = clock()
    utils.start_ranks()
    result = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checks = {"numbers": check_numbers, "flex": check_flex, "step": check_step,
                  "memory": lambda: check_memory(shape, folder),
                  "speed": lambda: check_speed(shape, folder), "vllm": lambda: check_vllm(shape, folder)}
        for name, check in checks.items():
            try:
                result[name] = check()
            except Exception as error:  # one check that fails must not cost what the others found
                result[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{name}: {clock() - started:.0f} s", file=sys.stderr)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    result["seconds"] = clock() - started
    torch.distributed.destroy_process_group()
    print(json.dumps(result, indent=1))
    sys.exit(any("failed" in value for value in result.values() if isinstance(value, dict)))


if __name__ == "__main__":
    main()
