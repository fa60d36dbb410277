"""Benchmarks, side by side in one run: a table on stderr, then one JSON document on stdout.

    python tests/bench.py                # a GRPO step by phase, on short and on long prompts
    python tests/bench.py --peer trl     # beside TRL's; pip install trl, in any environment
    python tests/bench.py profile        # where a step's time goes, by operation
    python tests/bench.py growth         # seconds and memory against G, length and image tokens
    python tests/bench.py grader --peer math_verify     # pip install math-verify, in any environment
    python tests/bench.py grader --peer math_verify --cases rows.jsonl
    python tests/bench.py rollout        # the embedded engine and transformers' generate
    python tests/bench.py ranks          # samples/s of the quick start on one rank and on two
    python tests/bench.py report         # seconds that a report on 102,400 completions takes
    python tests/bench.py data           # seconds and memory to read 10,000 rows with pictures of 1000 x 700
    python tests/bench.py memory         # bytes a rank at each moment, for 3B and 7B: what fits on which GPU, simulated
    python tests/bench.py work           # operations and bytes of an update, plain and with shared prompts, counted

Speeds of two programs are compared by alternating them, round by round, in the same process, so that
what else the machine does meets both; what is printed is the median over the rounds.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import os
import sys
import tempfile
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

    from data import load_samples
    from policy import collate, load_model, load_processor
    from rollout import HFEngine, share

    processor = load_processor(ROOT / "toy_model")
    samples = load_samples(ROOT / "toy_data" / "validation.jsonl", processor, 256)[:prompts]
    inputs = collate(samples, processor)["inputs"]  # the toy's prompts are alike in length
    model = load_model(ROOT / "toy_model")
    engine = HFEngine(model, processor, prompts * group, share(model, processor, megabytes=0))
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
# A GRPO step, by phase, beside TRL's

PHASES = ("rollout", "reward", "logprobs", "update", "sync")
STEP_SHAPES = {  # prompts a step, answers a prompt, tokens an answer, side of the picture in pixels
    "short": (32, 8, 36, 84),  # the toy as it is: 9 image tokens
    "long": (8, 8, 64, 448),  # 256 image tokens
}


def matrix_peak(size=1024, rounds=20, **kind):
    """Floating-point operations a second of a large matrix product (float32, CPU), the best of `rounds`."""
    import torch

    a = torch.randn(size, size, **kind)

    def product():
        torch.mm(a, a)[0, 0].item()  # waits for the device

    return 2 * size**3 / (min(microseconds(product) for _ in range(rounds)) / 1e6)


def useful_work(model, samples):
    """Operations of one forward pass over each prompt once and its answers, the vision tower aside.

    Two for each weight of a linear layer and token, the head on answers alone, and four a width and layer for
    each pair of tokens of which one sees the other. Whoever computes a prompt G times does more, for the same.
    """
    import torch

    text = model.config.get_text_config()
    linear = sum(m.weight.numel() for m in model.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear))
    prompts = [len(p) for p in {s.id: s.prompt_ids for s in samples}.values()]
    answers = [(len(s.prompt_ids), len(s.completion_ids)) for s in samples]
    tokens = sum(prompts) + sum(c for _, c in answers)
    pairs = sum(p * (p + 1) // 2 for p in prompts) + sum(c * p + c * (c + 1) // 2 for p, c in answers)
    head = text.vocab_size * text.hidden_size * sum(c for _, c in answers)
    return 2 * linear * tokens + 2 * head + 4 * text.num_hidden_layers * text.hidden_size * pairs


def peak_bytes(function):
    """The most that torch's allocations grew by at any moment while `function` ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    return peak_of(seen)


def peak_of(seen):
    """The same of a profile that has ended."""
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes))


def count_operations(function):
    """Multiplications and additions in the products of matrices that run in `function`."""
    from math import prod

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from siblings import FLASH

    def product(query, key, causal):
        *rest, rows, width = query
        return 2 * prod(rest) * width * (rows * (rows + 1) // 2 if causal else rows * key[-2])

    kernels = {  # a CPU's, which PyTorch's counter does not know: forward two products, backward five
        FLASH: lambda q, k, v, drop=0.0, causal=False, **_: 2 * product(q, k, causal),
        FLASH + "_backward": lambda grad, q, k, v, out, total, drop, causal, **_: 5 * product(q, k, causal)}
    known = {getattr(torch.ops.aten, name): cost for name, cost in kernels.items()}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        function()
    return counter.get_total_flops()


class Stepper:
    """train_grpo.py's step on a saved toy, every answer exactly `length` tokens long, phases timed.

    Rewards alternate, so that no group is dead, after the grader has done its work.
    """

    def __init__(self, path, group, length, **flags):
        import torch

        import train_grpo
        from policy import Policy, freeze, load_model, load_processor, shard
        from rollout import HFEngine, share
        from scoring import load_rewards

        self.group, self.length = group, length
        self.args = train_grpo.Args(tis_cap=0.0, group_size=group, max_new_tokens=length, lr=1e-6, **flags)
        self.processor = load_processor(path)
        model = load_model(path)
        freeze(model, False, False, True)
        sharing = None if self.args.plain else share(model, self.processor, self.args.vision_cache)
        self.engine = HFEngine(copy.deepcopy(model), self.processor, self.args.rollout_batch_size, sharing)
        self.engine.eos = torch.tensor([-1])
        self.policy = shard(Policy(model, self.processor, sharing), torch.float32).train()
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, self.args.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
        self.rewards, self.steps = load_rewards("accuracy:1.0"), 0

    def step(self, prompts):
        """Seconds by phase."""
        import train_grpo
        from scoring import score

        self.steps += 1
        seconds = dict.fromkeys(PHASES, 0.0)
        with train_grpo.timed(seconds, "rollout"):
            done = self.engine.generate(prompts, self.group, 1.0, 1.0, self.length, self.steps)
        with train_grpo.timed(seconds, "reward"):
            score(done, self.rewards)
        for i, s in enumerate(done):
            s.reward = float(i % 2)
        train_grpo.set_advantages(done, self.group, "grpo")  # logprobs: one update, so no pass
        self.done = done
        with train_grpo.timed(seconds, "update"):
            self.update()
        with train_grpo.timed(seconds, "sync"):
            self.engine.sync(self.policy.model)
        return seconds

    def update(self):
        import train_grpo

        train_grpo.update(self.policy, self.optimizer, self.done, None, None, self.args)


def toy_with_pictures(folder, side, count):
    """A toy checkpoint whose processor takes pictures of `side` pixels, and `count` prompts with such."""
    from PIL import Image

    import toy
    import utils
    from data import load_samples
    from policy import load_model, load_processor

    processor = load_processor(ROOT / "toy_model")
    limits = {"shortest_edge": 28**2, "longest_edge": 28**2 * 1024}
    processor.image_processor.size = type(processor.image_processor.size)(**limits)
    path = folder / f"toy_{side}"
    load_model(ROOT / "toy_model").save_pretrained(path)
    processor.save_pretrained(path)
    rows = []
    for key, _, colour, answer, image in itertools.islice(toy.make_split("train"), count):
        image.resize((side, side), Image.Resampling.NEAREST).save(path / f"{key}.png")
        rows.append({"id": key, "question": toy.question(colour), "answer": str(answer), "image": f"{key}.png"})
    utils.write_jsonl(path / "data.jsonl", rows)
    return path, load_samples(path / "data.jsonl", processor, 4096)


def step(peer, rounds):
    """Samples/s of whole steps and of their phases, every step on other prompts.

    "ours" has met their images before, as in every epoch but the first; "ours, new images" has not. The others
    compute image features each time.
    """
    import torch

    peak = matrix_peak()
    print(f"matrix peak: {peak / 1e9:.0f} GFLOP/s in float32 on {torch.get_num_threads()} threads", file=sys.stderr)
    print(f"{'shape':>6} {'':>16} {'samples/s':>10} {'tokens/s':>9} " + " ".join(f"{p:>9}" for p in PHASES)
          + f" {'of peak':>8} {'peak MB':>8}", file=sys.stderr)
    found = {"rounds": rounds, "threads": torch.get_num_threads(), "matrix_gflops": round(peak / 1e9)}
    for name, (count, group, length, side) in STEP_SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path, samples = toy_with_pictures(Path(folder), side, count * (rounds + 2))
            batches = [samples[k : k + count] for k in range(0, len(samples), count)]
            ours = {"ours": Stepper(path, group, length), "ours, new images": Stepper(path, group, length),
                    "ours, --plain": Stepper(path, group, length, plain=True, vision_cache=0)}
            model = ours["ours"].engine.model
            for s in samples:
                ours["ours"].engine.sharing.vision.features(model.base_model, s.images)
            seconds = {label: [] for label in ours}
            upcoming = iter(batches)

            def everyone():
                prompts = next(upcoming)
                for label, stepper in ours.items():
                    seconds[label].append(stepper.step(prompts))

            if peer == "trl":
                theirs, their_bytes = trl_steps(path, batches, group, length, everyone)
                seconds["TRL"] = [{"whole": s} for s in theirs]
            else:
                for _ in range(rounds + 1):
                    everyone()
            memory = {label: peak_bytes(lambda: s.step(batches[-1])) for label, s in ours.items()}
            if peer == "trl":
                memory["TRL"] = their_bytes
            made = count * group
            work = 4 * useful_work(ours["ours"].policy.model, ours["ours"].done)  # forward, and 3 for the update
            found[name] = {"prompts": count, "group": group, "completion_tokens": length,
                           "prompt_tokens": len(samples[0].prompt_ids), "contestants": {}}
            for label, rows in seconds.items():
                rows = rows[1:]  # the first one warms up
                whole = median(sum(row.values()) for row in rows)
                phases = {p: median(row[p] for row in rows) for p in PHASES if p in rows[0]}
                entry = {"samples_per_second": round(made / whole, 1), "tokens_per_second": round(made * length / whole),
                         "seconds_by_phase": {p: round(s, 4) for p, s in phases.items()},
                         "share_of_matrix_peak": round(work / whole / peak, 3),
                         "peak_megabytes": round(memory[label] / 1e6)}
                if label != "ours":  # round by round, as the machine's speed drifts
                    pairs = zip(seconds["ours"][1:], rows)
                    entry["ours_times_faster"] = round(median(sum(b.values()) / sum(a.values()) for a, b in pairs), 2)
                found[name]["contestants"][label] = entry
                cells = [f"{made / phases[p]:>9.0f}" if phases.get(p) else f"{'-':>9}" for p in PHASES]
                print(f"{name:>6} {label:>16} {made / whole:>10.1f} {made * length / whole:>9.0f} " + " ".join(cells)
                      + f" {work / whole / peak:>8.1%} {memory[label] / 1e6:>8.0f}", file=sys.stderr)
    return found


def where_time_goes():
    """Print, for a short step's rollout and update, the operations that take most; return their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    count, group, length, side = STEP_SHAPES["short"]
    with tempfile.TemporaryDirectory() as folder:
        path, samples = toy_with_pictures(Path(folder), side, count)
        stepper = Stepper(path, group, length)
        for _ in range(3):
            stepper.step(samples)
        phases = {
            "rollout": lambda: stepper.engine.generate(samples, group, 1.0, 1.0, length, 0),
            "update": stepper.update}
        found = {}
        for name, phase in phases.items():
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                phase()
            rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
            total = sum(row.self_cpu_time_total for row in rows)
            print(f"{name}: {total / 1e3:.0f} ms in {sum(row.count for row in rows):,} operations", file=sys.stderr)
            found[name] = {}
            for row in rows[:16]:
                found[name][row.key] = round(row.self_cpu_time_total / 1e3, 1)
                print(f"{row.self_cpu_time_total / 1e3:>10.1f} ms {row.self_cpu_time_total / total:>5.0%} "
                      f"{row.count:>7,} x {row.key}", file=sys.stderr)
    return found


def step_table(found):
    """The rows of results/README.md, of what `step` found."""
    rows = ["| shape | | samples/s | completion tokens/s | rollout, s | update, s | of the peak | peak MB | ours is faster |",
            "|---|---|---|---|---|---|---|---|---|"]
    for name in STEP_SHAPES:
        shape = found[name]
        for who, entry in shape["contestants"].items():
            seconds, faster = entry["seconds_by_phase"], entry.get("ours_times_faster")
            cells = [f"{name}: {shape['prompts']} x {shape['group']}, {shape['prompt_tokens']} + "
                     f"{shape['completion_tokens']} tokens" if who == "ours" else "", who,
                     f"{entry['samples_per_second']:.0f}", f"{entry['tokens_per_second']:,}",
                     *(f"{seconds[p]:.2f}" if seconds else "" for p in ("rollout", "update")),
                     f"{entry['share_of_matrix_peak']:.0%}", str(entry["peak_megabytes"]),
                     f"{faster:.1f} x" if faster else ""]
            rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------
# TRL


def trl_steps(path, batches, group, length, between):
    """Seconds of a TRL step on each batch of prompts but the last, and the peak memory of that one.

    `between()` runs between two steps, off the clock; all else that TRL does is on it. As ours: the language
    model trains, alone, one AdamW step a batch, in float32, every completion `length` tokens long. Its other
    settings are the fastest of those that were tried: 2 micro-batches (of 1, 2, 4, 8, 16), fused AdamW, SDPA,
    no data workers, pictures decoded once rather than for each of the G answers. torch_compile is off on both
    sides: after 80 seconds it made TRL 8 and 3 % faster.
    """
    from datasets import Dataset
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from data import banned_ids, conversation
    from pictures import open_image
    from policy import freeze, load_model
    from rollout import end_ids

    class Clock(TrainerCallback):
        seconds, memory = [], profile(activities=[ProfilerActivity.CPU], profile_memory=True)

        def on_train_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.started)
            if len(self.seconds) < len(batches):
                between()
            if len(self.seconds) == len(batches) - 1:
                self.memory.start()
            self.started = time.perf_counter()

    samples = [s for batch in batches for s in batch]
    opened = [(conversation(s.question), [open_image(i) for i in s.images]) for s in samples]

    def look_up(rows):
        prompts, images = zip(*(opened[i] for i in rows["row"]))
        return {"prompt": list(prompts), "images": list(images)}

    processor = AutoProcessor.from_pretrained(path, padding_side="left")
    model = load_model(path)
    freeze(model, False, False, True)
    never = banned_ids(processor) + end_ids(model.generation_config, processor)
    clock, size = Clock(), len(batches[0]) * group
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, max_steps=len(batches), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
            per_device_train_batch_size=size // 2, gradient_accumulation_steps=2, num_generations=group,
            max_completion_length=length, temperature=1.0, top_p=1.0, top_k=0, shuffle_dataset=False,
            generation_kwargs={"suppress_tokens": never}, learning_rate=1e-6, lr_scheduler_type="constant",
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(
            model, lambda completions, **_: [float(i % 2) for i in range(len(completions))], config,
            Dataset.from_dict({"row": range(len(samples))}).with_transform(look_up), processing_class=processor,
            callbacks=[clock])
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    clock.memory.stop()
    return clock.seconds[:-1], peak_of(clock.memory)


# ---------------------------------------------------------------------------------------------
# How cost grows

GROWTH = {  # what is varied, the others staying as in GROWTH_BASE
    "group size G": ("group", (2, 4, 8, 16, 32)),
    "completion tokens C": ("length", (32, 64, 128, 256, 512, 1024)),
    "image tokens": ("side", (112, 224, 448, 896)),  # pixels: a token is 28 x 28
}
GROWTH_BASE = {"group": 8, "length": 64, "side": 224}


def growth(rounds, prompts=4):
    """Seconds of rollout and update, and the latter's peak memory, on a few prompts: shared prefix against plain."""
    table = {}
    for title, (name, values) in GROWTH.items():
        table[title] = []
        for value in values:
            point = GROWTH_BASE | {name: value}
            row = {"value": (value // 28) ** 2 if name == "side" else value}
            with tempfile.TemporaryDirectory() as folder:
                path, samples = toy_with_pictures(Path(folder), point["side"], prompts * (rounds + 1))
                batches = [samples[k : k + prompts] for k in range(0, len(samples), prompts)]
                kinds = {"ours": {}, "plain": {"plain": True, "vision_cache": 0}}
                kinds = {k: Stepper(path, point["group"], point["length"], **v) for k, v in kinds.items()}
                steps = [{k: s.step(batch) for k, s in kinds.items()} for batch in batches]
                for kind, stepper in kinds.items():
                    row[kind] = {p: round(median(s[kind][p] for s in steps[1:]), 4) for p in ("rollout", "update")}
                    row[kind]["peak_megabytes"] = round(peak_bytes(stepper.update) / 1e6, 1)
            table[title].append(row)
            ours, plain = row["ours"], row["plain"]
            print(f"{title:>20} {row['value']:>5}  rollout {ours['rollout']:7.3f} {plain['rollout']:7.3f} s  update "
                  f"{ours['update']:7.3f} {plain['update']:7.3f} s ({plain['update'] / ours['update']:4.1f} x)  peak "
                  f"{ours['peak_megabytes']:7.1f} {plain['peak_megabytes']:7.1f} MB", file=sys.stderr)
    return {"prompts": prompts, "rounds": rounds, "base": GROWTH_BASE, "table": table}


def draw_growth(found, path):
    """The table as six panels on logarithmic axes: seconds and memory of an update, by what is varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.6), sharey="row", layout="constrained")
    styles = {"plain": ("#D55E00", "s", "--", "a prompt for each completion (--plain)"),
              "ours": ("#0072B2", "o", "-", "shared prefix, frozen features kept")}
    rows = (("update", "seconds an update"), ("peak_megabytes", "peak memory of an update, MB"))
    for column, (title, points) in zip(axes.T, found["table"].items()):
        for panel, (metric, label) in zip(column, rows):
            for kind, (colour, marker, line, name) in styles.items():
                panel.plot([p["value"] for p in points], [p[kind][metric] for p in points], line, color=colour,
                           marker=marker, label=name)
            panel.set(xscale="log", yscale="log", xlabel=title)
            panel.set_xticks([p["value"] for p in points], [str(p["value"]) for p in points])
            panel.xaxis.set_minor_locator(ticker.NullLocator())
            panel.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
            panel.grid(alpha=0.3)
            if panel in axes[:, 0]:
                panel.set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    base = found["base"]
    figure.suptitle(f"{found['prompts']} prompts of the toy; where not varied G = {base['group']}, C = "
                    f"{base['length']}, {(base['side'] // 28) ** 2} image tokens; two cores, float32, medians of "
                    f"{found['rounds']} steps", fontsize=9)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------------------------------
# The published shapes of Qwen2.5-VL, for what is simulated, and for what a GPU is to show

SHAPES = {
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
          "fullatt_block_indexes": [7, 15, 23, 31]}
SECTIONS = [16, 24, 24]  # of M-RoPE


def qwen_config(text, vision, sections, processor):
    """A Qwen2.5-VL's config of these sizes, with the toy's special tokens."""
    from transformers import Qwen2_5_VLConfig

    ids, tied = processor.tokenizer.convert_tokens_to_ids, text["tie_word_embeddings"]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    text = text | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": ids("<|im_end|>"),
                   "pad_token_id": ids("<|endoftext|>")}
    vision = vision | {"out_hidden_size": text["hidden_size"], "patch_size": 14}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied,
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"))


# ---------------------------------------------------------------------------------------------
# Ranks, and reports


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


def report(rounds):
    """Seconds and peak memory of a report on one made run, 400 steps of 256 answers of 200 words each."""
    import report
    import utils

    words = "row 1 : red - blue makes wait, re-check verify yeti 2".split()
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = Path(folder) / "run", []
        utils.write_json(run / "args.json", {"script": "train_grpo", "model": "toy_model", "advantage": "grpo"})
        for step in range(1, 401):
            texts = [" ".join(words[(i * j + step) % len(words)] for j in range(200)) for i in range(256)]
            utils.write_jsonl(run / "samples" / f"step_{step:06d}.jsonl", [
                {"id": f"p{i // 8}", "question": "?", "answer": "2", "completion_text": text, "finish_reason": "stop",
                 "rewards": {"accuracy": i % 2}, "advantage": i % 2 - 0.5, "length": 200 + i % 7}
                for i, text in enumerate(texts)])
            utils.append_jsonl(run / "metrics.jsonl", {"generation_step": step, "epoch": step / 100, "length": 203.0})
        for _ in range(rounds):
            started = time.perf_counter()
            found = report.main(report.Args(runs=[str(run)], out=f"{folder}/out"))
            seconds.append(time.perf_counter() - started)
    result = {"completions": found["completions"], "seconds": round(median(seconds), 1),
              "peak_memory_gb": round(utils.peak_memory() / 1e9, 2)}
    print(result, file=sys.stderr)
    return result


def photographs(folder, rows):
    """A data set twice, as JSON lines beside JPEG files and as a parquet file that holds them, no two alike."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    import utils

    made, files = [], []
    for i in range(50):
        path = folder / f"{i}.jpg"
        Image.effect_noise((200, 140), 90).resize((1000, 700)).convert("RGB").save(path, quality=90)
        files.append(path.read_bytes())
    schema = pyarrow.schema([("question", "string"), ("answer", "string"), ("image", "binary")])
    with pyarrow.parquet.ParquetWriter(folder / "data.parquet", schema) as writer:
        for start in range(0, rows, 100):  # in groups as large as those of the hub's
            group = []
            for i in range(start, min(rows, start + 100)):
                text = f"<image>In triangle ABC, AB = {i} and the angle at B is right. Find AC."
                os.link(folder / f"{i % 50}.jpg", folder / f"row{i}.jpg")
                made.append({"question": text, "answer": str(i), "image": f"row{i}.jpg"})
                # what stands behind a JPEG file's end makes it another one, and is not decoded
                group.append(made[-1] | {"image": files[i % 50] + str(i).encode()})
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
    utils.write_jsonl(folder / "data.jsonl", made)
    return sum(len(files[i % 50]) for i in range(rows))


def data(rows=10_000):
    """Seconds of `python data.py`, its start included, and memory a row, on one core and on two ranks of one each.

    Beside it, of 100 rows, what asking the processor of each picture takes.
    """
    import subprocess

    import torch

    from pictures import open_image
    from policy import load_processor

    result, cores = {"rows": rows}, sorted(os.sched_getaffinity(0))[:2]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        processor = load_processor(ROOT / "toy_model", 4 * 28**2, 16384 * 28**2)  # Qwen2.5-VL's bounds
        processor.save_pretrained(folder / "model")
        result["megabytes_of_pictures"] = round(photographs(folder, rows) / 1e6)
        for name, ranks in (("data.jsonl", 1), ("data.jsonl", 2), ("data.parquet", 1)):
            words = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] * (ranks - 1),
                     str(ROOT / "data.py"), str(folder / name), "--model", str(folder / "model")]
            started, busy = time.perf_counter(), sum(os.times()[2:4])
            done = subprocess.run(words, capture_output=True, text=True, check=True,
                                  preexec_fn=lambda: os.sched_setaffinity(0, cores[:ranks]))
            found = {"seconds": round(time.perf_counter() - started, 1),
                     "cpu_seconds": round(sum(os.times()[2:4]) - busy, 1)}
            (look,) = json.loads(done.stdout.splitlines()[-1]).values()
            assert look["rows"] == look["images"] == rows
            found["kB_in_memory_a_row"] = look["memory, kB a row"]
            result[f"{name}, {ranks} rank(s)"] = found
            print(name, ranks, "rank(s):", found, file=sys.stderr)
        torch.set_num_threads(1)
        started = time.perf_counter()
        for i in range(100):
            processor(text=["<|image_pad|>?"], images=[open_image(folder / f"row{i}.jpg")])
        result["seconds_by_the_processor"] = round((time.perf_counter() - started) * rows / 100)
    return result


def simulated(what):
    """Of simulate.py, which is imported late: it makes a device known to this process."""
    import simulate

    return getattr(simulate, what)()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["step", "profile", "growth", "grader", "rollout", "ranks",
                                                       "report", "data", "memory", "work"])
    parser.add_argument("--peer", choices=["trl", "math_verify"], help="measure this library beside ours")
    parser.add_argument("--cases", help="JSON lines of prediction and reference; default: built-in pairs")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions of each measurement")
    parser.add_argument("--plot", help="growth: draw the table here")
    args = parser.parse_args()
    what = args.what or ("grader" if args.peer == "math_verify" else "step")
    if args.peer and what != {"trl": "step", "math_verify": "grader"}[args.peer]:
        parser.error(f"--peer {args.peer} is not for {what}")
    if args.peer and not importlib.util.find_spec(args.peer):
        parser.error(f"--peer {args.peer} is not installed; pip install {args.peer.replace('_', '-')}")
    if what == "data" and not hasattr(os, "sched_setaffinity"):
        parser.error("data holds ranks to one core each, which only Linux can")
    if what in ("step", "profile", "growth"):
        import torch

        import utils

        utils.start_ranks()
        torch.set_num_threads(os.cpu_count())
    found = {"step": lambda: step(args.peer, args.rounds), "growth": lambda: growth(args.rounds),
             "grader": lambda: grader(args.peer, args.cases, args.rounds), "rollout": lambda: rollout(args.rounds),
             "ranks": lambda: ranks(args.rounds), "memory": lambda: simulated("memory"),
             "work": lambda: simulated("work"), "report": lambda: report(args.rounds), "data": data, "profile": where_time_goes}[what]()
    if args.plot:
        draw_growth(found, args.plot)
    print(json.dumps({what: found}))


if __name__ == "__main__":
    main()
