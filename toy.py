"""An offline stand-in for the real thing: a tiny Qwen2.5-VL and a visual task drawn with Pillow.

The model is transformers' own class, only small (1.2 M parameters: toy_model/config.json), and the
task lies in toy_data/ as JSON lines and PNG files, so that every line of the real path runs. A
picture is a 3 x 3 grid of coloured shapes; the question is how many objects have a colour. The base
was taught four habits of answering and picks one at random with the first word of its answer:

    At a glance   a number, at once: mostly a guess
    Quick look    reads the first two rows and forgets the third
    Row by row    reads every row with a running count; now and then misreads one
    Let me see    the same, but doubts a row and re-checks it, which mends most misreadings

It can see and count from the start, but its likeliest first word is a bad one. RL can make it
choose better, and read with fewer slips: it amplifies what is there, the paper's conclusion.

    python toy.py --build            train the base again into toy_model/ (22 minutes on one core)
    python toy.py --check            measure every promise on toy_data/, exit 1 if one is broken
    python toy.py --habits --model CHECKPOINT   which habits a model picks, and how good they are
    python toy.py --data my_folder   write the data set as files
"""

import utils  # first: from here on Ctrl-C is no traceback

import hashlib
import json
import random
import re
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (AutoConfig, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration,
                          Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor)

from data import IMAGE_MARK, INSTRUCTION, load_samples, make_sample
from pictures import as_png
from policy import Policy, collate, load_model, load_processor

COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (40, 90, 220),
           "yellow": (245, 200, 30)}
SHAPES = ("circle", "square", "triangle")
# one pair of each colour is never drawn outside the test split
UNSEEN = {("red", "triangle"), ("green", "circle"), ("blue", "square"), ("yellow", "triangle")}
GRID, CELL = 3, 28  # 28 pixels = patch 14 x merge 2: a cell is one image token
ANSWERS = 6  # 0 to 5, all equally frequent in every split
SPLITS = {"train": 512, "validation": 512, "test": 512}  # prompts
HERE, INF = Path(__file__).parent, float("inf")


@dataclass
class Args:
    build: bool = False  # train the base and write it to --model
    check: bool = False  # measure the base's promises
    habits: bool = False  # measure which habits --model picks, and how good each one is
    data: str = ""  # write the three splits into this folder
    blank: bool = False  # with --data: every picture white, so that there is nothing to see
    model: str = "toy_model"  # folder of the base
    see_steps: int = 1000  # building: steps that teach seeing and counting
    habit_steps: int = 800  # building: steps that teach the four habits, the re-check above all
    share_steps: int = 200  # building: steps that teach how often to use which
    without: str = ""  # building: opening words of a habit that the base never sees
    seed: int = 0  # of the building


# ---------------------------------------------------------------------------------------------
# The task: a scene is 9 cells in reading order, each None or (colour, shape)


def make_problem(rng, answer, unusual):
    """Draw `(scene, colour asked for)` with `answer` objects of that colour."""
    colour = rng.choice(list(COLOURS))
    # the test split is out of distribution twice over: more objects, and half of them new pairs
    objects = rng.randint(7, 9) if unusual else rng.randint(max(1, answer), 6)
    scene = [None] * GRID**2
    for i, cell in enumerate(rng.sample(range(GRID**2), objects)):
        rare = unusual and rng.random() < 0.5
        pairs = [(c, s) for c in COLOURS for s in SHAPES]
        pairs = [p for p in pairs if (p[0] == colour) == (i < answer) and (p in UNSEEN) == rare]
        scene[cell] = rng.choice(pairs)
    return tuple(scene), colour


def draw(scene, rng):
    """The scene as an RGB image, 84 x 84 pixels; places and sizes vary, inside their cells."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL), "white")
    pen = ImageDraw.Draw(image)
    for i, (colour, shape) in ((i, thing) for i, thing in enumerate(scene) if thing):
        size = rng.randint(8, 11)
        x = i % GRID * CELL + CELL // 2 + rng.randint(-2, 2)
        y = i // GRID * CELL + CELL // 2 + rng.randint(-2, 2)
        box = (x - size, y - size, x + size, y + size)
        if shape == "triangle":
            pen.polygon((x, y - size, x - size, y + size, x + size, y + size), COLOURS[colour])
        else:
            (pen.ellipse if shape == "circle" else pen.rectangle)(box, COLOURS[colour])
    return image


def question(colour):
    return f"<image>How many {colour} objects are in the picture?"


def make_split(name):
    """Yield `(id, scene, colour, answer, image)`; no (scene, colour) is in two splits, or twice."""
    taken = set() if name == "train" else {(s, c) for _, s, c, _, _ in make_split("train")}
    rng = random.Random(name)
    for i in range(SPLITS[name]):
        answer = i % ANSWERS  # in turn, so that always guessing one answer earns a sixth
        while (problem := make_problem(rng, answer, unusual=name == "test")) in taken:
            continue  # by layout, which is stricter than by pixels
        taken.add(problem)
        yield f"toy_{name}_{i:04d}", *problem, answer, draw(problem[0], rng)


def write_data(folder, blank=False):
    """Write train.jsonl, validation.jsonl, test.jsonl and the images into `folder`."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        rows = []
        for key, scene, colour, answer, image in make_split(name):
            image = Image.new("RGB", image.size, "white") if blank else image
            image.save(folder / "images" / f"{key}.png")
            golden = row_by_row(scene, colour, random.Random(key), slip=0)
            rows.append({"question": question(colour), "answer": str(answer), "solution": golden,
                         "id": key, "image": f"images/{key}.png"})
        utils.write_jsonl(folder / f"{name}.jsonl", rows)


# ---------------------------------------------------------------------------------------------
# The habits: (scene, colour, rng) to a response


def grid_rows(scene):
    words = [thing[0] if thing else "-" for thing in scene]
    return [words[i : i + GRID] for i in range(0, GRID**2, GRID)]


def misread(row, rng):
    """The row with one cell read wrongly."""
    cell = rng.randrange(GRID)
    wrong = rng.choice([w for w in [*COLOURS, "-"] if w != row[cell]])
    return [*row[:cell], wrong, *row[cell + 1 :]]


def at_a_glance(scene, colour, rng):
    count = sum(row.count(colour) for row in grid_rows(scene))
    said = count if rng.random() < 0.3 else rng.randrange(ANSWERS)
    return f"At a glance I see {said} {colour}. \\boxed{{{said}}}"


def quick_look(scene, colour, rng):
    return read_rows("Quick look.", grid_rows(scene)[:2], colour)


def row_by_row(scene, colour, rng, slip=0.2):
    rows = grid_rows(scene)
    if rng.random() < slip:
        bad = rng.randrange(GRID)
        rows[bad] = misread(rows[bad], rng)
    return read_rows("Row by row.", rows, colour)


def let_me_see(scene, colour, rng, slip=0.4, missed=0.02):
    rows = grid_rows(scene)
    doubted = rng.randrange(GRID)
    first = rows[doubted]
    if rng.random() < slip:
        first = misread(first, rng)
        if rng.random() < missed:
            rows[doubted] = first
    return read_rows("Let me see.", rows, colour, doubted, first)


def read_rows(opening, rows, colour, doubted=None, old=None):
    """Write a reading with its running count; row `doubted` is read as `old`, then once more."""
    text, total = opening, 0
    for n, row in enumerate(rows, 1):
        if n - 1 == doubted:
            text += f" row {n}: {' '.join(old)} makes {total + old.count(colour)}. wait, re-check"
        total += row.count(colour)
        text += f" row {n}: {' '.join(row)} makes {total}."
    return f"{text} \\boxed{{{total}}}"


HABITS = {  # opening words: (how it answers, its share while it is taught, its share in the base)
    "At a glance": (at_a_glance, 0.10, 0.32),
    "Quick look": (quick_look, 0.10, 0.38),
    "Row by row": (row_by_row, 0.20, 0.12),
    "Let me see": (let_me_see, 0.60, 0.18)}


# ---------------------------------------------------------------------------------------------
# Building the base

CHAT_TEMPLATE = (HERE / "toy_model" / "chat_template.jinja").read_text(encoding="utf-8")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]


def build_processor():
    """Qwen2.5-VL's processor with some 400 byte-level pieces, so that any text can be encoded."""
    rng = random.Random(0)
    corpus = []  # the words of the task become single tokens; other text falls to pieces
    for i in range(2000):
        scene, colour = make_problem(rng, i % ANSWERS, unusual=False)
        corpus.append(f"user\n{question(colour)[len(IMAGE_MARK):]}\n{INSTRUCTION}\nassistant\n")
        corpus += [habit(scene, colour, rng) for habit, _, _ in HABITS.values()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=400, min_frequency=50, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    return Qwen2_5_VLProcessor(
        images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def lessons(processor, held_out, habits, rng):
    """Endless samples of fresh scenes, none held out, answered by habits drawn by their shares."""
    blank = as_png(draw([None] * GRID**2, rng))
    # made once: a prompt depends on its colour alone, every picture has 9 tokens
    prompts = {colour: make_sample({"question": question(colour), "answer": "0", "images": [blank]},
                                   Path("."), colour, processor) for colour in COLOURS}
    while True:
        scene, colour = make_problem(rng, rng.randrange(ANSWERS), unusual=False)
        if (scene, colour) in held_out:
            continue  # validation and test stay unseen by the base too
        picture = as_png(draw(scene, rng))
        habit = rng.choices(list(habits), habits.values())[0]
        ids = processor.tokenizer(habit(scene, colour, rng) + "<|im_end|>")["input_ids"]
        yield replace(prompts[colour], images=[picture], completion_ids=ids)


def teach(policy, processor, stream, steps, lr):
    """Maximum likelihood on the response tokens: AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="teach")):
        batch = collate([next(stream) for _ in range(64)], processor)
        logprobs, _ = policy(batch, temperature=1.0)  # (B, C)
        loss = -logprobs.sum() / batch["mask"].sum()  # the mean over response tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.4f}")


def build(args):
    """Teach the base to see and count, and only then its habits: at once, it learns neither."""
    if args.without and args.without not in HABITS:
        raise utils.UserError(f"--without {args.without!r} is no habit: {', '.join(HABITS)}.")
    started = time.time()
    torch.set_num_threads(1)  # sums in one order, so that a second build gives the same bits
    processor = build_processor()
    torch.manual_seed(args.seed)
    # M-RoPE gives columns its lowest frequencies: a base of 100 there lets them tell three apart
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(HERE / "toy_model"))
    policy = Policy(model, processor)
    rng = random.Random(args.seed)
    held_out = {(s, c) for name in ("validation", "test") for _, s, c, _, _ in make_split(name)}
    shown = [habit for opening, habit in HABITS.items() if opening != args.without]
    courses = [  # what is taught, for how long, at which learning rate
        ({lambda *problem: row_by_row(*problem, slip=0): 1.0}, args.see_steps, 1.5e-3),
        ({habit: taught for habit, taught, _ in shown}, args.habit_steps, 1e-3),
        ({habit: share for habit, _, share in shown}, args.share_steps, 5e-4)]
    for habits, steps, lr in courses:
        teach(policy, processor, lessons(processor, held_out, habits, rng), steps, lr)
    for part in (model, processor):
        part.save_pretrained(args.model)
    weights = (Path(args.model) / "model.safetensors").read_bytes()
    record = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights),
              "seed": args.seed, "steps": [args.see_steps, args.habit_steps, args.share_steps],
              "torch": torch.__version__, "minutes": round((time.time() - started) / 60, 1)}
    utils.write_json(Path(args.model) / "build.json", record)
    return record


# ---------------------------------------------------------------------------------------------
# Measuring: the base's promises, and the habits that a model picks

# a re-check that changed the count: "makes 2. wait, re-check row 2: - blue - makes 1."
MENDED = re.compile(r"makes (\d)\. wait, re-check(?:(?!makes).)*makes (?!\1)\d\.", re.S)


def load(args):
    """A sampler of the model, and the splits of toy_data/."""
    from rollout import HFEngine, share

    model, processor, folder = load_model(args.model), load_processor(args.model), HERE / "toy_data"
    splits = {name: load_samples(folder / f"{name}.jsonl", processor, 256) for name in SPLITS}
    return HFEngine(model, processor, 512, share(model, processor)), splits


def forced(samples, opening, processor):
    """The same prompts with an answer's opening words written: no piece spans their end."""
    ids = processor.tokenizer(opening)["input_ids"]
    return [replace(s, prompt_ids=s.prompt_ids + ids) for s in samples]


def promises(args):
    """What the base has to be, as `(what, measured, lowest, highest)`."""
    from evaluate import evaluate

    def accuracy(samples, setting="pass8_t1"):
        return evaluate(engine, samples, setting, 96, 0)[0]["accuracy"]

    engine, splits = load(args)
    seen = {name: {Path(s.images[0]).read_bytes() + s.question.encode() for s in samples}
            for name, samples in splits.items()}
    yield "smallest split, prompts", min(map(len, seen.values())), 500, INF
    held_out = seen["train"] & (seen["validation"] | seen["test"])
    yield "held-out (picture, question) in train", len(held_out), 0, 0
    weights = (Path(args.model) / "model.safetensors").read_bytes()
    record = json.loads((Path(args.model) / "build.json").read_text())
    same = hashlib.sha256(weights).hexdigest() == record["sha256"]
    yield "weights are those that --build wrote", int(same), 1, 1
    yield "minutes that --build took", record["minutes"], -INF, 30
    yield "megabytes of weights", len(weights) / 1e6, -INF, 8
    text, vision = engine.model.config.text_config, engine.model.config.vision_config
    yield "head size, language", text.hidden_size // text.num_attention_heads, 64, 64
    yield "head size, vision", vision.hidden_size // vision.num_heads, 32, 32  # vLLM knows both
    held, test = splits["validation"], splits["test"]
    usual, done = evaluate(engine, held, "pass8_t1", 96, 0)
    yield "accuracy at T = 1", usual["accuracy"], 0.30, 0.60
    yield "pass@8 at T = 1", usual["pass@8"], 0.85, INF
    yield "accuracy at T = 0.6", accuracy(held, "pass1_t0.6"), -INF, 0.65
    yield "accuracy, greedy", accuracy(held, "pass1_t0.01"), -INF, 0.75
    tidy = [10 <= len(s.completion_ids) <= 80 and s.completion_text.endswith("}") for s in done]
    yield "of 10-80 tokens, ending in a box", sum(tidy) / len(done), 0.98, INF
    yield "with a reflection word", usual["reflection_ratio"], 0.10, 0.40
    mended = [s.reward == 1 and MENDED.search(s.completion_text) is not None for s in done]
    yield "right because a re-check mended it", sum(mended) / len(done), 0.01, INF
    commonest = max(map([s.answer for s in held].count, "012345")) / len(held)
    white = as_png(draw([None] * GRID**2, random.Random(0)))
    blind = accuracy([replace(s, images=[white]) for s in held])
    yield "accuracy on blank pictures, T = 1", blind, -INF, commonest + 0.03
    for name, opening in product(("validation", "test"), HABITS):
        opened = accuracy(forced(splits[name][:256], opening, engine.processor))
        careful = name == "validation" and opening in ("Row by row", "Let me see")
        yield f"{name}, forced {opening!r}", opened, 0.85 if careful else -INF, INF
    yield "test, accuracy at T = 1", accuracy(test), -INF, INF
    yield "test, accuracy at T = 0.6", accuracy(test, "pass1_t0.6"), -INF, INF


def check(args):
    """Print every promise beside its bounds; exit code 1 if one is broken."""
    kept = []
    for what, value, lowest, highest in promises(args):
        kept.append(lowest <= value <= highest)
        bounds = f">= {lowest:.4g} " * (lowest > -INF) + f"<= {highest:.4g}" * (highest < INF)
        print(f"{what:38} {value:8.4g}   {bounds:18} {'ok' if kept[-1] else 'BROKEN'}")
    if not all(kept):
        raise SystemExit(1)
    return {"promises": len(kept), "broken": 0}


def habits(args):
    """How often a model picks each habit by itself at T = 1, and is right then, and when forced."""
    from scoring import load_rewards, score

    def accuracy(done):
        score(done, load_rewards("accuracy:1.0"))
        return round(sum(s.reward for s in done) / len(done), 4) if done else None

    engine, splits = load(args)
    how = (2, 1.0, 1.0, 96, args.seed)  # answers a prompt, temperature, top_p, tokens, seed
    result = {"model": args.model}
    for name in ("validation", "test"):
        free = engine.generate(splits[name], *how)
        result[name] = {"n": len(free), "accuracy": accuracy(free)}
        for opening in HABITS:
            chosen = [s for s in free if s.completion_text.startswith(opening)]
            opened = engine.generate(forced(splits[name], opening, engine.processor), *how)
            result[name][opening] = {"share": round(len(chosen) / len(free), 4),
                                     "accuracy": accuracy(chosen), "forced": accuracy(opened)}
    return result


def main(args):
    if sum(map(bool, (args.build, args.check, args.habits, args.data))) != 1:
        raise utils.UserError("say one thing to do: --build, --check, --habits or --data FOLDER.")
    if args.data:
        write_data(args.data, args.blank)
        return {"data": args.data}
    return build(args) if args.build else check(args) if args.check else habits(args)


if __name__ == "__main__":
    utils.run_script(main, Args)
