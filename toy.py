"""An offline stand-in for the real thing: a tiny Qwen2.5-VL and a visual task drawn with Pillow.

The model is transformers' own class with its own processor and chat template, only small (1.2 M
parameters), and the task is written as the same JSON lines and PNG files as a real data set, so
that every line of the real path runs. A picture is a 3 x 3 grid of coloured shapes; the question is
how many objects have a colour. The base was taught four habits of answering, on purpose, and picks
one at random with the first word of its answer:

    At a glance   a number, at once: mostly a guess
    Quick look    reads the first two rows and forgets the third
    Row by row    reads every row with a running count; now and then misreads one
    Let me see    the same, but doubts a row and re-checks it, which mends most misreadings

It can see and count from the start, but its likeliest first word is a bad one. Reinforcement
learning can make it choose better, and read with fewer slips: the paper's conclusion in miniature,
RL amplifies what is there. `--check` prints how often each habit is right when it is forced.

    python toy.py --build            train the base again into toy_model/ (22 minutes on one core)
    python toy.py --check            measure every promise above, exit 1 if one is broken
    python toy.py --habits --model CHECKPOINT   which habits a model picks, and how good they are
    python toy.py --data my_folder   write the data set as files
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is no traceback, not even during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import hashlib
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import utils
from data import IMAGE_MARK, INSTRUCTION, as_png, load_samples, make_sample
from policy import Policy, collate, load_model, load_processor

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (40, 90, 220),
    "yellow": (245, 200, 30),
}
SHAPES = ("circle", "square", "triangle")
# one pair of each colour is never drawn outside the test split
UNSEEN = {("red", "triangle"), ("green", "circle"), ("blue", "square"), ("yellow", "triangle")}
GRID, CELL = 3, 28  # 28 pixels = patch 14 x merge 2: a cell is one image token
ANSWERS = 6  # 0 to 5, all equally frequent in every split
SPLITS = {"train": 512, "validation": 512, "test": 512}  # prompts
BATCH = 64  # fresh scenes a step of the building


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
    """Draw `(scene, colour asked for)` with `answer` objects of that colour.

    Usual scenes hold 1 to 6 objects; unusual ones (the test split) 7 to 9, half of them of a
    colour and shape never seen together.
    """
    colour = rng.choice(list(COLOURS))
    # more objects than the base ever saw, and pairs it never saw: out of distribution twice over
    objects = rng.randint(7, 9) if unusual else rng.randint(max(1, answer), 6)
    scene = [None] * GRID**2
    for i, cell in enumerate(rng.sample(range(GRID**2), objects)):
        rare = unusual and rng.random() < 0.5
        pairs = [(c, s) for c in COLOURS for s in SHAPES]
        pairs = [p for p in pairs if (p[0] == colour) == (i < answer) and (p in UNSEEN) == rare]
        scene[cell] = rng.choice(pairs)
    return tuple(scene), colour


def draw(scene, rng):
    """The scene as an RGB image, 84 x 84 pixels; places and sizes vary a little."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL), "white")
    pen = ImageDraw.Draw(image)
    for i, thing in enumerate(scene):
        if thing is None:
            continue
        size = rng.randint(8, 11)
        # a thing never leaves its cell, so that one image token can tell what it is
        x = i % GRID * CELL + CELL // 2 + rng.randint(-2, 2)
        y = i // GRID * CELL + CELL // 2 + rng.randint(-2, 2)
        box = (x - size, y - size, x + size, y + size)
        colour, shape = COLOURS[thing[0]], thing[1]
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon(((x, y - size), (x - size, y + size), (x + size, y + size)), fill=colour)
    return image


def question(colour):
    return f"<image>How many {colour} objects are in the picture?"


def make_split(name):
    """Yield `(id, scene, colour, answer, image)`; no (scene, colour) is in two splits, or twice."""
    taken = set() if name == "train" else {(s, c) for _, s, c, _, _ in make_split("train")}
    rng = random.Random(name)
    for i in range(SPLITS[name]):
        answer = i % ANSWERS  # in turn, so that always guessing one answer earns a sixth
        problem = make_problem(rng, answer, unusual=name == "test")
        while problem in taken:  # by layout, which is stricter than by pixels
            problem = make_problem(rng, answer, unusual=name == "test")
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
    wrong = list(row)
    cell = rng.randrange(GRID)
    wrong[cell] = rng.choice([w for w in [*COLOURS, "-"] if w != row[cell]])
    return wrong


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


def read_rows(opening, rows, colour, doubted=None, first=None):
    """Write a reading with its running count; row `doubted` is read as `first`, then once more."""
    text, total = opening, 0
    for i, row in enumerate(rows):
        if i == doubted:
            text += f" row {i + 1}: {' '.join(first)} makes {total + first.count(colour)}."
            text += " wait, re-check"
        total += row.count(colour)
        text += f" row {i + 1}: {' '.join(row)} makes {total}."
    return f"{text} \\boxed{{{total}}}"


HABITS = {  # opening words: (how it answers, its share while it is taught, its share in the base)
    "At a glance": (at_a_glance, 0.10, 0.32),
    "Quick look": (quick_look, 0.10, 0.38),
    "Row by row": (row_by_row, 0.20, 0.12),
    "Let me see": (let_me_see, 0.60, 0.18),
}


# ---------------------------------------------------------------------------------------------
# Building the base

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]


def build_processor():
    """Qwen2.5-VL's processor with some 400 byte-level pieces, so that any text can be encoded."""
    rng = random.Random(0)
    corpus = []  # the words of the task become single tokens; other text falls to pieces
    for i in range(2000):
        scene, colour = make_problem(rng, i % ANSWERS, unusual=False)
        asked = question(colour).removeprefix(IMAGE_MARK)
        corpus.append(f"user\n{asked}\n{INSTRUCTION}\nassistant\n")
        corpus += [habit(scene, colour, rng) for habit, _, _ in HABITS.values()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=400, min_frequency=50, initial_alphabet=alphabet, special_tokens=SPECIAL,
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    videos = Qwen2VLVideoProcessor()
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_model(processor, seed):
    """A Qwen2.5-VL of 1.2 M parameters; head sizes 64 and 32, which vLLM's kernels know."""
    ids = {name: processor.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    # M-RoPE gives columns its lowest frequencies; a base of 100 lets them tell three columns apart
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 100.0}
    text = {"vocab_size": len(processor.tokenizer), "hidden_size": 128, "intermediate_size": 384,
            "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "rope_parameters": rope, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"]}
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 192, "num_heads": 2,
              "out_hidden_size": 128, "fullatt_block_indexes": [1], "patch_size": 14,
              "window_size": 112}
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"]))


def lessons(processor, held_out, habits, rng):
    """Endless samples of fresh scenes, none held out, answered by habits drawn by their shares."""
    eos = [processor.tokenizer.eos_token_id]
    blank = as_png(draw([None] * GRID**2, rng))
    prompts = {}  # made once: a prompt depends on its colour alone, every picture has 9 tokens
    for colour in COLOURS:
        row = {"question": question(colour), "answer": "0", "images": [blank]}
        prompts[colour] = make_sample(row, Path("."), colour, processor)
    while True:
        scene, colour = make_problem(rng, rng.randrange(ANSWERS), unusual=False)
        if (scene, colour) in held_out:
            continue  # validation and test stay unseen by the base too
        picture = as_png(draw(scene, rng))
        habit = rng.choices([h for h, _ in habits], [share for _, share in habits])[0]
        ids = processor.tokenizer(habit(scene, colour, rng))["input_ids"]
        yield replace(prompts[colour], images=[picture], completion_ids=ids + eos)


def teach(policy, processor, stream, steps, lr):
    """Maximum likelihood on the response tokens: AdamW, one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="teach")
    for _ in bar:
        batch = collate([next(stream) for _ in range(BATCH)], processor)
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
        raise utils.UserError(f"--without {args.without!r} is no habit; choose from "
                              f"{', '.join(HABITS)}.")
    started = time.time()
    torch.set_num_threads(1)  # sums in one order, so that a second build gives the same bits
    processor = build_processor()
    model = build_model(processor, args.seed)
    policy = Policy(model, processor)
    rng = random.Random(args.seed)
    held_out = {(s, c) for name in ("validation", "test") for _, s, c, _, _ in make_split(name)}
    shown = [habit for opening, habit in HABITS.items() if opening != args.without]
    courses = [  # what is taught, for how long, at which learning rate
        ([(partial(row_by_row, slip=0), 1.0)], args.see_steps, 1.5e-3),
        ([(habit, taught) for habit, taught, _ in shown], args.habit_steps, 1e-3),
        ([(habit, share) for habit, _, share in shown], args.share_steps, 5e-4),
    ]
    for habits, steps, lr in courses:
        teach(policy, processor, lessons(processor, held_out, habits, rng), steps, lr)
    model.save_pretrained(args.model)
    processor.save_pretrained(args.model)
    weights = (Path(args.model) / "model.safetensors").read_bytes()
    record = {"sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights),
              "seed": args.seed, "steps": [args.see_steps, args.habit_steps, args.share_steps],
              "torch": torch.__version__,
              "minutes": round((time.time() - started) / 60, 1)}
    utils.write_json(Path(args.model) / "build.json", record)
    return record


# ---------------------------------------------------------------------------------------------
# Checking the base's promises


def forced(samples, opening, processor):
    """The same prompts with the answer's opening words already written."""
    # no opening ends inside a piece of the vocabulary, so that the pieces are those of an answer
    ids = processor.tokenizer(opening)["input_ids"]
    return [replace(s, prompt_ids=s.prompt_ids + ids) for s in samples]


def blanked(samples):
    """The same prompts over white pictures."""
    blank = as_png(draw([None] * GRID**2, random.Random(0)))
    return [replace(s, images=[blank]) for s in samples]


def mended(sample):
    """Whether a re-check changed the count, and the answer is right."""
    before, _, after = sample.completion_text.partition(" wait, re-check")
    counts = [re.search(r"makes (\d)\.$", before), re.search(r"makes (\d)\.", after)]
    return all(counts) and counts[0][1] != counts[1][1] and sample.reward == 1


def well_formed(sample):
    """10 to 80 tokens that end in a box."""
    return 10 <= len(sample.completion_ids) <= 80 and sample.completion_text.endswith("}")


def picture_and_question(sample):
    """What must not occur in two splits, as a digest."""
    picture = Path(sample.images[0]).read_bytes()
    return hashlib.sha256(picture + sample.question.encode()).hexdigest()


def file_promises(path, splits, config):
    """Promises about files and shapes, as `(what, measured, lowest, highest)`."""
    digests = {name: {picture_and_question(s) for s in splits[name]} for name in splits}
    yield "smallest split, prompts", min(map(len, digests.values())), 500, None
    seen = digests["train"] & (digests["validation"] | digests["test"])
    yield "held-out (picture, question) in train", len(seen), 0, 0
    weights = (path / "model.safetensors").read_bytes()
    record = json.loads((path / "build.json").read_text())
    same = hashlib.sha256(weights).hexdigest() == record["sha256"]
    yield "weights are those that --build wrote", int(same), 1, 1
    yield "minutes that --build took", record["minutes"], None, 30
    yield "megabytes of weights", len(weights) / 1e6, None, 8
    text, vision = config.text_config, config.vision_config
    # the head sizes that vLLM's attention kernels were written for
    yield "head size, language", text.hidden_size // text.num_attention_heads, 64, 64
    yield "head size, vision", vision.hidden_size // vision.num_heads, 32, 32


def behaviour_promises(engine, processor, splits):
    """Promises about what the base answers, as `(what, measured, lowest, highest)`."""
    from evaluate import evaluate

    def measure(samples, setting):
        return evaluate(engine, samples, setting, max_new_tokens=96, seed=0)

    held = splits["validation"]
    usual, done = measure(held, "pass8_t1")
    yield "accuracy at T = 1", usual["accuracy"], 0.30, 0.60
    yield "pass@8 at T = 1", usual["pass@8"], 0.85, None
    yield "accuracy at T = 0.6", measure(held, "pass1_t0.6")[0]["accuracy"], None, 0.65
    yield "accuracy, greedy", measure(held, "pass1_t0.01")[0]["accuracy"], None, 0.75
    yield "of 10-80 tokens, ending in a box", sum(map(well_formed, done)) / len(done), 0.98, None
    yield "with a reflection word", usual["reflection_ratio"], 0.10, 0.40
    yield "right because a re-check mended it", sum(map(mended, done)) / len(done), 0.01, None
    answers = [s.answer for s in held]
    commonest = max(answers.count(a) for a in answers) / len(answers)
    blind = measure(blanked(held), "pass8_t1")[0]["accuracy"]
    yield "accuracy on blank pictures, T = 1", blind, None, commonest + 0.03
    for name in ("validation", "test"):
        for opening in HABITS:
            opened = forced(splits[name][:256], opening, processor)
            accuracy = measure(opened, "pass8_t1")[0]["accuracy"]
            careful = opening in ("Row by row", "Let me see") and name == "validation"
            yield f"{name}, forced {opening!r}", accuracy, 0.85 if careful else None, None
    for setting in ("pass8_t1", "pass1_t0.6"):
        accuracy = measure(splits["test"], setting)[0]["accuracy"]
        yield f"test (out of distribution), {setting}", accuracy, None, None


def habits(args):
    """Which habits a model picks by itself at T = 1, and how often each is right.

    By split: the accuracy, and for every habit its share, its accuracy where it was picked (None
    where it never was), and its accuracy when its opening words are forced.
    """
    from reward import load_rewards, score
    from rollout import HFEngine

    processor, model = load_processor(args.model), load_model(args.model)
    engine = HFEngine(model, processor, batch_size=256)
    grade = load_rewards("accuracy:1.0")

    def answers(samples):
        done = engine.generate(samples, 2, 1.0, 1.0, 96, args.seed)
        score(done, grade)
        return done

    def accuracy(done):
        return round(sum(s.reward for s in done) / len(done), 4) if done else None

    result = {"model": args.model}
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        for name in ("validation", "test"):
            samples = load_samples(Path(folder) / f"{name}.jsonl", processor, 256)
            free = answers(samples)
            table = {"n": len(free), "accuracy": accuracy(free)}
            for opening in HABITS:
                chosen = [s for s in free if s.completion_text.startswith(opening)]
                table[opening] = {"share": round(len(chosen) / len(free), 4),
                                  "accuracy": accuracy(chosen),
                                  "forced": accuracy(answers(forced(samples, opening, processor)))}
            result[name] = table
    return result


def check(args):
    """Print every promise beside its bounds; exit code 1 if one is broken."""
    from rollout import HFEngine

    processor, model = load_processor(args.model), load_model(args.model)
    engine = HFEngine(model, processor, batch_size=512)
    with tempfile.TemporaryDirectory() as folder:
        write_data(folder)
        splits = {name: load_samples(Path(folder) / f"{name}.jsonl", processor, 256)
                  for name in SPLITS}
        rows = [*file_promises(Path(args.model), splits, model.config)]
        rows += behaviour_promises(engine, processor, splits)
    broken = []
    for what, value, lowest, highest in rows:
        good = (lowest is None or value >= lowest) and (highest is None or value <= highest)
        broken += [what] * (not good)
        bounds = " ".join(f"{sign} {bound:.4g}" for sign, bound in ((">=", lowest), ("<=", highest))
                          if bound is not None)
        print(f"{what:38} {value:8.4g}   {bounds:18} {'ok' if good else 'BROKEN'}")
    if broken:
        raise SystemExit(1)
    return {"promises": len(rows), "broken": 0}


def main(args):
    if sum(map(bool, (args.build, args.check, args.habits, args.data))) != 1:
        raise utils.UserError("say one thing to do: --build, --check, --habits or --data FOLDER.")
    if args.data:
        write_data(args.data, args.blank)
        return {"data": args.data}
    if args.build:
        return build(args)
    if args.check:
        return check(args)
    return habits(args)


if __name__ == "__main__":
    utils.run_script(main, Args)
