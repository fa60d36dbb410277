"""Benchmarks, side by side in one run: a table on stderr, then one JSON document on stdout.

    python tests/bench.py grader --peer math_verify     # pip install math-verify, in any environment
    python tests/bench.py grader --peer math_verify --cases rows.jsonl
    python tests/bench.py rollout        # the embedded engine and transformers' generate
    python tests/bench.py ranks          # samples/s of the quick start on one rank and on two
    python tests/bench.py memory         # bytes a rank by formula, for 3B and 7B on 1 and 8 GPUs

Speeds of two programs are compared by alternating them, round by round, in the same process, so that
what else the machine does meets both; what is printed is the median over the rounds.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def microseconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return (time.perf_counter() - start) * 1e6


# ---------------------------------------------------------------------------------------------
# The grader


def ordinary_answers():
    """Pairs (prediction, reference) as responses to geometry questions hold them, right and wrong."""
    spellings = ["{}", "{}.0", "{} cm", r"{}^\circ", r"{}\sqrt{{3}}", r"\frac{{{}}}{{7}}", r"{}\pi", r"{}\%",
                 r"x = {}", r"\sqrt{{{}}}", "{}.25", r"\text{{{} units}}"]
    return [(spelling.format(n + wrong), spelling.format(n).replace(" cm", ""))
            for n in (3, 12, 45, 144, 1250) for spelling in spellings for wrong in (0, 1)]


def grader(peer, cases, rounds):
    """Microseconds a verdict: the median over pairs of each pair's median over rounds.

    "cold" has an empty cache, as at the first sight of an answer; "warm" meets a pair again, as the
    G responses to one prompt do.
    """
    import reward

    pairs = ordinary_answers()
    if cases:
        rows = [json.loads(line) for line in Path(cases).read_text().splitlines()]
        pairs = [(row["prediction"], row["reference"]) for row in rows if row.get("pred_form") != "response"]
    timed = {"ours, cold": lambda x, y: reward.is_equal(x, y), "ours, warm": lambda x, y: reward.is_equal(x, y)}
    if peer == "math_verify":
        import math_verify

        def their_verdict(prediction, reference):
            """As its README has it: both sides wrapped for its LaTeX extractor, parsed, compared."""
            return math_verify.verify(math_verify.parse(f"${reference}$"), math_verify.parse(f"${prediction}$"))

        timed["math_verify"] = their_verdict
    samples = {name: [[] for _ in pairs] for name in timed}
    for _ in range(rounds):
        for name, function in timed.items():
            for pair, times in zip(pairs, samples[name]):
                if name == "ours, cold":
                    reward.understand.cache_clear()
                if name == "ours, warm":
                    function(*pair)
                times.append(microseconds(function, *pair))
    parsed = [x != y and not (reward.PLAIN.fullmatch(x) and reward.PLAIN.fullmatch(y)) for x, y in pairs]
    result = {"pairs": len(pairs), "need_the_parser": sum(parsed), "rounds": rounds, "microseconds": {}}
    print(f"{'us a verdict':>12} {'median':>10} {'of the parsed':>14} {'slowest pair':>14}", file=sys.stderr)
    for name in timed:
        times = [median(times) for times in samples[name]]
        cells = [round(median(times), 2), round(median(t for t, p in zip(times, parsed) if p), 2), round(max(times), 1)]
        result["microseconds"][name] = dict(zip(("median", "median_of_parsed", "slowest_pair"), cells))
        print(f"{name:>12} {cells[0]:>10} {cells[1]:>14} {cells[2]:>14}", file=sys.stderr)
    if peer == "math_verify":
        theirs = result["microseconds"]["math_verify"]
        result["times_faster"] = {
            name: {key: round(theirs[key] / value, 1) for key, value in result["microseconds"][name].items()}
            for name in ("ours, cold", "ours, warm")}
    return result


# ---------------------------------------------------------------------------------------------
# Response collection


def rollout(rounds, prompts=32, group=8, max_new_tokens=96):
    """Completion tokens a second on the toy, and of a prompt that every answer must prefill anew.

    transformers' `generate` gets what HFEngine has: G answers a prompt in one batch, the same bans,
    temperature 1 and no other filter. Both find their images decoded and processed.
    """
    import tempfile

    import torch

    import toy
    import utils
    from rollout import HFEngine

    processor = utils.load_processor(ROOT / "toy_model")
    with tempfile.TemporaryDirectory() as folder:
        toy.write_data(Path(folder))
        samples = utils.load_samples(Path(folder) / "toy_validation.jsonl", processor, 256)[:prompts]
        inputs = utils.collate(samples, processor)["inputs"]  # the toy's prompts are alike in length
    model = utils.load_model(ROOT / "toy_model")
    engine = HFEngine(model, processor, prompts * group)
    eos = engine.eos.tolist()

    def ours(seed):
        done = engine.generate(samples, group, 1.0, 1.0, max_new_tokens, seed)
        return sum(len(s.completion_ids) for s in done)

    def theirs(seed):
        torch.manual_seed(seed)
        rows = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, num_return_sequences=group,
            max_new_tokens=max_new_tokens, suppress_tokens=engine.banned)[:, inputs["input_ids"].shape[1]:]
        ended = torch.isin(rows, torch.tensor(eos)).int()
        return int((ended.cumsum(1) - ended == 0).sum())  # up to the first EOS, which counts

    lengths = {len(s.prompt_ids) for s in samples}
    assert len(lengths) == 1 or inputs["attention_mask"].all(), "rows are padded on the right"
    speeds = {"HFEngine": [], "generate": []}
    for seed in range(rounds):
        for name, function in (("HFEngine", ours), ("generate", theirs)):
            start = time.perf_counter()
            tokens = function(seed)
            speeds[name].append(tokens / (time.perf_counter() - start))
    result = {name: round(median(found)) for name, found in speeds.items()}
    for name, speed in result.items():
        print(f"{name:>12} {speed:>8} completion tokens/s", file=sys.stderr)
    return {"prompts": prompts, "group": group, "rounds": rounds, "tokens_per_second": result,
            "times_faster": round(median(a / b for a, b in zip(*speeds.values())), 2)}


# ---------------------------------------------------------------------------------------------
# Training


def ranks(rounds, steps=6):
    """Samples a second of the quick start's command on one rank and on two, the first step aside."""
    import subprocess
    import tempfile

    speeds = {1: [], 2: []}
    for _ in range(rounds):
        for count in speeds:
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                     str(count), str(ROOT / "train_grpo.py"), "--max_steps", str(steps), "--test_data", "",
                     "--validation_data", "", "--out", f"{folder}/run"], check=True, capture_output=True)
                rows = [json.loads(x) for x in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
            seconds = [sum(v for k, v in row.items() if k.startswith("seconds_")) for row in rows[1:]]
            speeds[count].append(32 * 8 / median(seconds))
    result = {str(count): round(median(found), 1) for count, found in speeds.items()}
    for count, speed in result.items():
        print(f"{count} rank(s): {speed} samples/s", file=sys.stderr)
    return {"rounds": rounds, "steps": steps, "samples_per_second": result}


# total and trained weights, the language model's width, MLP width, layers and vocabulary
SHAPES = {"Qwen2.5-VL-3B": (3.75e9, 3.09e9, 2048, 11008, 36, 151936),
          "Qwen2.5-VL-7B": (8.29e9, 7.62e9, 3584, 18944, 28, 152064)}


def memory_a_rank(shape, world_size, tokens, completion_tokens, width=2, checkpointing=True, reference=False):
    """Bytes on one rank during an update, by part.

    `tokens` are a micro-batch's, padding and prompts included; `width` is the bytes of a number in
    compute (bfloat16: 2). Master weights, gradients and Adam's two moments are float32, sharded. A
    layer saves about 12 numbers of the model's width and 4 of the MLP's a token, or with gradient
    checkpointing its input alone, and one layer at a time is computed again.
    """
    total, trained, hidden, mlp, layers, vocabulary = shape
    layer = trained / layers
    one_layer = 12 * hidden + 4 * mlp
    saved = layers * hidden + one_layer if checkpointing else layers * one_layer
    from utils import HEAD_CHUNK
    return {
        "weights": 4 * total / world_size,
        "gradients": 4 * trained / world_size,
        "optimiser": 8 * trained / world_size,
        "reference": 4 * total / world_size if reference else 0,
        # in compute precision and whole: two layers, and the root group (embeddings, vision tower)
        "gathered": width * (2 * layer + total - trained + vocabulary * hidden),
        "activations": tokens * width * saved,
        # the chunk's logits, their softmax and its gradient
        "head": 3 * 4 * min(HEAD_CHUNK, completion_tokens) * vocabulary,
        "embedded sampler": 2 * total,
    }


def memory():
    """The README's table: 4 answers a micro-batch, 400 tokens of prompt, 2,048 of completion."""
    rows = {}
    for name, shape in SHAPES.items():
        for world_size in (1, 8):
            parts = memory_a_rank(shape, world_size, 4 * 2448, 4 * 2048)
            cells = [sum(parts[k] for k in ("weights", "gradients", "optimiser")), parts["gathered"],
                     parts["activations"] + parts["head"], parts["embedded sampler"], sum(parts.values())]
            rows[f"{name}, {world_size}"] = [round(x / 1e9, 1) for x in cells]
            print("| " + " | ".join(map(str, [name, world_size, *rows[f"{name}, {world_size}"]])) + " |",
                  file=sys.stderr)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grader", "rollout", "ranks", "memory"])
    parser.add_argument("--peer", choices=["math_verify"], help="measure this library beside ours")
    parser.add_argument("--cases", help="JSON lines of prediction and reference; default: built-in pairs")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each measurement")
    args = parser.parse_args()
    found = {"grader": lambda: grader(args.peer, args.cases, args.rounds), "rollout": lambda: rollout(args.rounds),
             "ranks": lambda: ranks(args.rounds), "memory": memory}[args.what]()
    print(json.dumps({args.what: found}))


if __name__ == "__main__":
    main()
