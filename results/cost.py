"""What GRPO costs beside SFT, to train on the same queries once: operations, seconds, bytes.

    PYTHONPATH=. python results/cost.py > results/cost.json      # one thread, 5 minutes, 8 GB

A query is a prompt with its picture; GRPO samples 8 answers to it and makes one update, without a
reference model, SFT has one golden answer, as long as a sampled one. Both train the language model
alone and look at a picture once. Operations and seconds are a query's, bytes a step's.

Measured on toy_data, and held to PyTorch's counter: toy_model, and a Qwen2.5-VL of SmolLM2-135M's
shape, of random weights, as only shapes cost anything. By formula, and held to results/work.json,
where the counter saw tensors without numbers: the published shapes of 3B and 7B.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

import train_sft
import utils
from bench import Stepper, count_operations, peak_bytes
from data import load_samples
from policy import freeze, load_processor
from simulate import SHAPES, build_model, pairs, published

G, IN_FLIGHT = 8, 32  # answers to a query, and queries that are answered at once
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
           "layer_types": ["full_attention"] * 30}

# ---------------------------------------------------------------------------------------------
# By formula: an operation is a multiplication or an addition in a product of matrices. A token
# costs two for each weight it meets; a pair of tokens that see each other, four for each number of
# each layer's hidden state: query times key, score times value


def sizes(config):
    """Weights of decoder, of what ends its layers, of the head; numbers that a token caches."""
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    cached = 2 * layers * text.num_key_value_heads * hidden // text.num_attention_heads
    last = layers * hidden * text.intermediate_size
    decoder = 2 * layers * hidden**2 + cached * hidden + 3 * last
    return decoder, last, hidden * text.vocab_size, cached


def operations(config, prompt, merged, answer, recomputed):
    """Of each part of a step; `merged` tokens of the prompt are its picture's.

    A backward pass is two forward ones, 2.5 of attention. `recomputed`: it computes layers and head
    again, but for the product that ends a layer, whose output nobody wants again.
    """
    (decoder, last, head, _), text = sizes(config), config.get_text_config()
    pair = 4 * text.num_hidden_layers * text.hidden_size

    def update(answers):  # the prompt once, and answers blind to each other
        tokens, drawn = prompt + answers * answer, answers * answer
        linear = (3 + recomputed) * (decoder * tokens + head * drawn) - recomputed * last * tokens
        return 2 * linear + (3.5 + recomputed) * pair * pairs(prompt, answer, answers, False)

    read = G * (answer - 1)  # token by token; an answer's last one is drawn, and never read
    rollout = 2 * (decoder * (prompt + read) + head * (1 + read))
    return {"picture": picture(config.vision_config, merged),
            "rollout": rollout + pair * pairs(prompt, answer - 1, G, False),
            "update": update(G), "SFT's update": update(1)}


def picture(vision, merged):
    """A pass of the tower: 4 patches become a token, most layers look no further than a window."""
    hidden, patches = vision.hidden_size, 4 * merged
    weights = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * hidden
    weights += vision.depth * (4 * hidden**2 + 3 * hidden * vision.intermediate_size)
    connector = 4 * hidden * (4 * hidden + vision.out_hidden_size)
    full, window = len(vision.fullatt_block_indexes), (vision.window_size // vision.patch_size) ** 2
    seen = full * patches + (vision.depth - full) * min(patches, window)
    return 2 * (weights * patches + connector * merged) + 4 * hidden * patches * seen


def extended(model, prompt, answer):
    """A row of a published shape, layers recomputed; its sampler is in bfloat16."""
    config = published(model, load_processor(ROOT / "toy_model"))
    with FakeTensorMode():
        weights = build_model(config, torch.bfloat16)
    counted, = (row for row in json.loads((ROOT / "results/work.json").read_text())["work"]
                if [*row.values()][:4] == [model, G, prompt, answer])
    shape = config, prompt, int((prompt - 40) ** 0.5) ** 2, answer  # a square picture
    decoder, _, head, cached = sizes(config)
    # for a token of every answer in flight, the weights are read once, and each answer's cache
    read = 2 * answer * ((decoder + head) / IN_FLIGHT + G * cached * (prompt + answer / 2))
    return {"model": model, "weights": sum(p.numel() for p in weights.parameters()),
            "trained": freeze(weights, False, False, True), "prompt": prompt, "answer": answer,
            "formula": operations(*shape, True), "layers kept": operations(*shape, False),
            "counted": {"update": counted["shared"]["operations"],
                        "SFT's update": counted["plain"]["operations"] / G},  # a prompt an answer
            "sampler reads": read, "sampler caches": 2 * IN_FLIGHT * cached * (prompt + G * answer)}


# ---------------------------------------------------------------------------------------------
# Measured


def measured(model, path, queries, steps, **flags):
    """A row: a step that is counted and warms up, `steps` timed ones, one for peaks of memory."""
    processor = load_processor(path)
    prompts = load_samples(ROOT / "toy_data/train.jsonl", processor, 2048)
    golden = train_sft.with_golden_responses(prompts, processor, 96, 2)
    (prompt, answer), = {(len(s.prompt_ids), len(s.completion_ids)) for s in golden}
    stepper = Stepper(path, G, answer, **flags)  # GRPO, whose answers all have that length
    engine, policy = stepper.engine, stepper.policy
    engine.model.requires_grad_(False)  # or the counter asks for gradients

    def parts(step):
        batch, look = slice(step * queries, (step + 1) * queries), engine.sharing.vision.features
        images = [image for s in prompts[batch] for image in s.images]

        def rollout():
            stepper.done = engine.generate(prompts[batch], G, 1.0, 1.0, answer, step)
            for s in stepper.done:
                s.advantage = 1.0  # a group that is all alike would cost no update

        def update():
            stepper.update()
            engine.sync(policy.model)

        return {"picture": lambda: look(policy.model.base_model, images), "rollout": rollout,
                "update": update, "SFT's update": lambda: train_sft.update(
                    policy, stepper.optimizer, golden[batch], train_sft.Args())}

    merged = prompts[0].prompt_ids.count(processor.image_token_id)
    row = {"model": model, "weights": sum(p.numel() for p in policy.parameters()),
           "trained": sum(p.numel() for p in policy.parameters() if p.requires_grad),
           "prompt": prompt, "answer": answer, "queries": queries, "steps": steps,
           "tokens a pass": stepper.args.micro_batch_tokens,  # at the most
           "formula": operations(policy.model.config, prompt, merged, answer, False)}
    row["counted"] = {name: count_operations(part) / queries for name, part in parts(0).items()}
    row["CPU seconds"] = dict.fromkeys(row["counted"], 0.0)
    for step in range(1, steps + 1):
        for name, part in parts(step).items():
            before = time.process_time()  # of this process, whatever else the machine does
            part()
            row["CPU seconds"][name] += (time.process_time() - before) / queries / steps
    row["peak bytes"] = {name: peak_bytes(part) for name, part in parts(steps + 1).items()}
    return row


def smollm2(folder):
    config = AutoConfig.from_pretrained(ROOT / "toy_model")
    config.text_config.update(SMOLLM2)
    config.vision_config.out_hidden_size = config.text_config.hidden_size
    build_model(config, torch.float32).save_pretrained(folder)
    load_processor(ROOT / "toy_model").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    torch.set_num_threads(1)
    utils.start_ranks()
    found = [measured("toy", ROOT / "toy_model", 32, 8)]
    with tempfile.TemporaryDirectory() as path:  # two queries a pass, so that it takes less memory
        found.append(measured("135M", smollm2(path), 8, 2, micro_batch_tokens=700))
    found += [extended(m, p, c) for m in SHAPES for p in (400, 1300) for c in (400, 2048)]
    print(json.dumps(found, indent=1))
