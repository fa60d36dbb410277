"""Every check that only a GPU can make, in one command and one JSON document, in under 8 minutes.

    python tests/gpu_check.py            # on a machine with one CUDA device of 80 GB
    python tests/gpu_check.py --tiny     # the same code on a CPU with a small shape, to keep it alive

What it checks now: log-probabilities in bfloat16 against float32, a training step through FSDP2 on one
rank, the embedded sampler, and memory and tokens/s of a GRPO step with the shape of Qwen2.5-VL-3B and
random weights (speed does not depend on what the weights are).
"""

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import toy
import train_grpo
import utils
from rollout import HFEngine

SHAPES = {  # what differs between Qwen2.5-VL-3B and the stand-in for a CPU
    "3b": {"text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
           "vision": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                      "fullatt_block_indexes": [7, 15, 23, 31]},
           "sections": [16, 24, 24], "side": 504, "tokens": 400, "group": 8},
    "tiny": {"text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1000},
             "vision": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
                        "fullatt_block_indexes": [1]},
             "sections": [4, 6, 6], "side": 112, "tokens": 8, "group": 2},
}


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gigabytes():
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def toy_prompts(folder):
    toy.write_data(folder)
    processor = utils.load_processor(ROOT / "toy_model")
    return processor, utils.load_samples(folder / "toy_validation.jsonl", processor, 256)[:64]


def check_numbers(folder):
    """The toy: greedy answers and log-probabilities on this device against float32 on the CPU."""
    processor, prompts = toy_prompts(folder)
    model = utils.load_model(ROOT / "toy_model")
    dtype = utils.compute_dtype("auto")
    engine = HFEngine(copy.deepcopy(model), processor, 64)
    done = engine.generate(prompts, 1, 0, 1.0, 96, 0)
    low = HFEngine(copy.deepcopy(model).to(dtype), processor, 64).generate(prompts, 1, 0, 1.0, 96, 0)
    with torch.no_grad():
        exact, _ = utils.Policy(model, processor)(utils.collate(done, processor), 1.0)
        policy = utils.shard(utils.Policy(copy.deepcopy(model), processor), dtype)
        rounded, _ = policy(utils.collate(done, processor), 1.0)
    tokens = sum(len(s.completion_ids) for s in done)
    same = sum(a.completion_ids == b.completion_ids for a, b in zip(done, low))
    return {"dtype": str(dtype), "greedy_equal_to_float32": same / len(done),
            "dlogp_mean_bf16_to_fp32": (rounded - exact).abs().sum().item() / tokens,
            "dlogp_max_bf16_to_fp32": (rounded - exact).abs().max().item()}


def big_model(shape):
    """A random Qwen2.5-VL of the shape, and one prompt with a picture of `side` x `side` pixels."""
    processor = toy.build_processor()
    limits = {"shortest_edge": 28**2, "longest_edge": 28**2 * 1024}
    processor.image_processor.size = type(processor.image_processor.size)(**limits)
    ids = processor.tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": shape["sections"], "rope_theta": 1e6}
    text = shape["text"] | {"rope_parameters": rope, "tie_word_embeddings": True,
                            "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
                            "pad_token_id": ids("<|endoftext|>")}
    vision = shape["vision"] | {"out_hidden_size": text["hidden_size"], "patch_size": 14}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"))
    with torch.device(utils.device()):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return model, processor


def check_speed(shape, folder):
    """One GRPO step on one prompt with its group: tokens/s by phase and peak memory."""
    model, processor = big_model(shape)
    picture = folder / "picture.png"
    Image.effect_noise((shape["side"], shape["side"]), 80).convert("RGB").save(picture)
    row = {"question": "<image>" + "How many? " * 10, "answer": "1", "images": [picture.name]}
    prompts = [utils.make_sample(row, folder / "data.jsonl", "here", processor)]
    dtype = utils.compute_dtype("auto")
    engine = HFEngine(copy.deepcopy(model).to(dtype), processor, 64)
    engine.eos = torch.tensor([-1], device=utils.device())  # every answer gets its full length
    utils.freeze(model, False, False, True)
    model.gradient_checkpointing_enable()
    policy = utils.shard(utils.Policy(model, processor), dtype).train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], 1e-6)
    args = train_grpo.Args(micro_batch_size=4)
    seconds = {}
    for _ in range(2):  # the first round warms up
        start = clock()
        samples = engine.generate(prompts, shape["group"], 1.0, 1.0, shape["tokens"], 0)
        middle = clock()
        for i, s in enumerate(samples):
            s.advantage = (-1.0) ** i
        sums, norm, _ = train_grpo.update(policy, optimizer, samples, None, None, processor, args)
        end = clock()
        engine.sync(policy.model)
        seconds = {"rollout": middle - start, "update": end - middle, "sync": clock() - end}
    made = shape["group"] * shape["tokens"]
    total = made + shape["group"] * len(prompts[0].prompt_ids)
    return {"parameters": sum(p.numel() for p in policy.parameters()),
            "prompt_tokens": len(prompts[0].prompt_ids), "completion_tokens": shape["tokens"],
            "group": shape["group"], "grad_norm": norm,
            "sampler_gap": sums["sampler_gap"] / sums["update_tokens"],
            "rollout_tokens_per_second": made / seconds["rollout"],
            "update_tokens_per_second": total / seconds["update"], "seconds": seconds,
            "peak_gigabytes": peak_gigabytes()}


def main():
    shape = SHAPES["tiny" if "--tiny" in sys.argv else "3b"]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    started = clock()
    utils.start_ranks()
    with tempfile.TemporaryDirectory() as folder:
        result = {"device": name, "torch": torch.__version__, "numbers": check_numbers(Path(folder)),
                  "speed": check_speed(shape, Path(folder))}
    result["seconds"] = clock() - started
    torch.distributed.destroy_process_group()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
