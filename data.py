"""Step I, data flow: rows and their pictures become samples, the only thing that stages pass on.

A data set is JSON lines with the pictures' files beside it, or a parquet file that holds them. A
row is checked whole before step 1, so that nothing of it can fail, or get lost, in mid-run. Left
out of the textbook: a Dataset and a DataLoader with workers. Samples hold token ids and the names
of pictures; tensors are made of a few samples at a time, by `collate` in policy.py.

    python data.py toy_data/train.jsonl --model toy_model      # look at a data set before you train
"""

import utils  # first: from here on Ctrl-C is no traceback

import io
import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import UserError, first_line, print0

# the one prompt template: training, evaluation and every engine use it
INSTRUCTION = "Think step by step and put the final answer in \\boxed{}."
IMAGE_MARK = "<image>"
PICTURES = ("images", "image", "decoded_image")  # the fields whose pictures a row is about
# a text that is a picture (group 1) or the name of one; a video or a sound
PICTURE = re.compile(r"^(data:image/|iVBORw0KGgo|/9j/|R0lGOD|UklGR)|\.(png|jpe?g|gif|bmp|tiff?|webp"
                     r"|avif|heic|jp2|p[gp]m|svg)(\?\S*)?$", re.I)
VIDEO = re.compile(r"^data:(video|audio)/|\.(mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac"
                   r"|ogg|m4a)(\?\S*)?$", re.I)
# what a call of a tokenizer says for itself, since a checkpoint's files may say otherwise
BARE = {"add_special_tokens": False, "padding": False, "truncation": False, "max_length": None}
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Args:
    data: list = field(default_factory=list)  # .jsonl or .parquet data sets
    model: str = "toy_model"  # folder or hub id of the model whose processor reads them
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped


@dataclass
class Sample:
    """A row of a data set and, once it is answered, its completion and what that earned."""

    id: str
    question: str
    answer: str
    solution: str  # golden response for SFT, "" where the data has none
    images: list  # a path (or the bytes of a parquet row) for each image; decoded late
    prompt_text: str  # what a sampler wants: one placeholder an image
    prompt_ids: list[int]  # what the trainer sees: one placeholder a merged patch
    completion_ids: list[int] = field(default_factory=list)  # EOS included
    completion_text: str = ""
    finish_reason: str = ""  # "stop" (EOS was sampled) or "length" (cut off)
    sampler_logprobs: list[float] = field(default_factory=list)  # nats, one a completion token
    rewards: dict = field(default_factory=dict)  # by name, before weighing; None: not scored
    reward: float | None = None
    advantage: float = 0.0

    def length(self):
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def record(self):
        """What a run folder keeps of this sample, ready for JSON."""
        names = "id question answer completion_text finish_reason rewards reward advantage".split()
        kept = {n: getattr(self, n) for n in names} | {"length": len(self.completion_ids)}
        # the pixels of a parquet row would be repeated by each of its completions
        return kept | {"images": [image for image in self.images if isinstance(image, str)]}


# ---------------------------------------------------------------------------------------------
# Rows: a file to dictionaries


def read_rows(path):
    """Yield `(place, row)` for every row of a .jsonl or .parquet file; `place` is for messages."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .jsonl or .parquet data set.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (ImportError, ValueError, OSError, NotImplementedError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); replace it, "
                            "or run `pip install pyarrow`.")
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
        return
    for n, line in enumerate(path.read_bytes().splitlines(), 1):
        place = f"{path}, line {n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unlike_fields)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets for ever
            raise UserError(f"{place}: not valid JSON ({error}); correct or remove the line.")
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object with question and answer; correct it.")
        yield place, row


def unlike_fields(pairs):
    """A JSON object, of whose fields Python would keep the last one of a name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("two fields have one name")
    return row


def text_of(row, name):
    """A field as text, "" where there is none; UserError where it is no text or number."""
    value = row.get(name)
    if value is None:
        return ""
    number = type(value) is int or type(value) is float and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise UserError(f'field "{name}" is missing, empty or no text; correct it.')
    if re.search("[\ud800-\udfff]", str(value)):
        raise UserError(f'field "{name}" holds half a character ({value!a:.40}); correct it.')
    return str(value)


# ---------------------------------------------------------------------------------------------
# Pictures: every one of a row is used, or the row is refused


def row_images(row, folder):
    """The pictures of a row, each as a path or bytes; UserError where fields disagree."""

    def source(part):  # a struct as `datasets` writes it: where it has bytes, its path is a name
        if not isinstance(part, dict) or not part.keys() & {"bytes", "path"}:
            return part
        return part.get("path") if part.get("bytes") is None else part["bytes"]

    def nowhere(parts):
        return all(isinstance(p, str) and not os.path.isfile(folder / p) for p in parts)

    given = {}
    for name in PICTURES:
        value = row.get(name)
        if name == "images" and isinstance(value, str):
            raise UserError("images must be a list of paths; correct it.")
        if any(True for _ in leaves(value)):
            given[name] = [source(part) for part in (value if type(value) is list else [value])]
    held = next((ps for ps in given.values() if all(isinstance(p, bytes) for p in ps)), None)
    if held:  # beside them, names of files that are not there are metadata, as in MathVista
        given = {name: parts for name, parts in given.items()
                 if not (nowhere(parts) and len(parts) == len(held))}
    first = next(iter(given.values()), [])
    if any(parts != first for parts in given.values()):
        raise UserError(f"{' and '.join(given)} hold different images; keep one of them.")
    return first


def refuse_lost_images(row, read, images, folder):
    """UserError where a field that nobody reads holds a picture, a video or a sound.

    The name of a file that is not there is metadata where the row has its pictures and the field
    has no picture's name.
    """
    known = [text for name in PICTURES for text in leaves(row.get(name)) if isinstance(text, str)]
    known = {*known, *map(os.path.basename, known)}
    for name, leaf in ((n, leaf) for n in row if n not in read for leaf in leaves(row[n])):
        text = leaf if isinstance(leaf, str) else ""
        what = f'the field "{name}" holds'
        if VIDEO.search(text) or re.fullmatch("(video|audio)s?", name, re.I) and leaf:
            raise UserError(f"{what} a video or sound ({leaf!a:.40}); only text and images are "
                            "read, remove the row.")
        looks, file = PICTURE.search(text), folder / text
        named = re.fullmatch(r"(image|img|picture|pic|photo|figure)s?_?\d*", name, re.I)
        lost = looks and (not images or looks[1] or named or os.path.isfile(file))
        if leaf not in known and (isinstance(leaf, bytes) or lost or is_image(file)):
            raise UserError(f"{what} a picture ({leaf!a:.40}) that would be lost; rename the field "
                            "to image or images, or remove it.")


def leaves(value):
    """What a field holds in its lists, maps and structs, however deep; not None, not ""."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list, tuple)):
            stack.extend(value.values() if isinstance(value, dict) else value)
        elif value is not None and value != "":
            yield value


def is_image(file):
    """Whether there is a file that begins as a picture does."""
    if not os.path.isfile(file):
        return False
    try:
        Image.open(file).close()
    except Exception:  # Pillow's plug-ins raise what they like
        return False
    return True


def checked_image(image, folder):
    """A row's image, checked: its absolute path in the folder, or its bytes; and the picture."""
    name = "image bytes"
    if not isinstance(image, bytes):
        if not isinstance(image, str) or re.search("[\0\ud800-\udfff]", image):
            raise UserError(f"an image is given as {image!a:.60}; give its path as text.")
        name, image = f"image {image:.100}", os.path.realpath(folder / image)
        if not Path(image).is_relative_to(folder.resolve()):
            raise UserError(f"{name} lies outside {folder}; move it inside.")
        if not os.path.isfile(image):
            raise UserError(f"{name} does not exist in {folder}; correct the path.")
    try:
        return image, open_image(image)
    except Exception as error:  # Pillow's plug-ins raise what they like
        raise UserError(f"{name} cannot be read ({first_line(error)}); replace it.")


def open_image(source):
    """Decode a path or bytes to RGB: EXIF rotation applied, transparency laid on white."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return grey_of_8_bits(image, [65535] if deep else [1, 255, 65535]).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def grey_of_8_bits(image, tops):
    """A grey picture of 16 or 32 bits, which Pillow's own conversion would clip to white or black.

    32 bits do not say their range: it ends at the first of `tops` that holds all values. Where none
    does, they are stretched from the lowest to the highest.
    """
    values = np.asarray(image, float)
    low, high = values.min(), values.max()
    if not math.isfinite(high - low):
        raise ValueError("it holds values that are not finite")
    top = next((top for top in tops if 0 <= low and high <= top), None)
    if top:
        low, high = 0, min(top, 255 * 256)  # of 16 bits the upper 8
    grey = (values - low) * 255 / (high - low) if high > low else values * 0 + 128
    grey[values == image.info.get("transparency")] = 255  # laid on white, as above
    return Image.fromarray(grey.astype(np.uint8))


def as_png(image):
    """The bytes of an image as a data set's file would hold them."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


# ---------------------------------------------------------------------------------------------
# Prompts: a question in the model's own chat template, and its token ids


def conversation(question):
    """The messages of a prompt, for the chat template: the only place where a prompt is written."""
    content = []
    for i, text in enumerate(question.split(IMAGE_MARK)):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": f"\n{INSTRUCTION}"}]}]


def tokenise(tokenizer, text):
    """A text's ids, whole and bare, whatever the checkpoint's files say.

    No special token is put around it, and nothing is cut, filled up, or spelt out.
    """
    return tokenizer(text, **BARE, split_special_tokens=False)["input_ids"]


def banned_ids(processor):
    """Ids that must never be sampled: a placeholder in a completion has no image behind it."""
    names = ("image_token_id", "video_token_id")
    return [getattr(processor, n) for n in names if getattr(processor, n, None) is not None]


def refuse_marks(text, what, processor):
    """UserError where a text holds what would be a mark of the chat or of an image to the model."""
    tokenizer = processor.tokenizer
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {*marks, *banned_ids(processor)} - {tokenizer.unk_token_id}
    for i in tokenise(tokenizer, text):
        if i in marks:
            mark = tokenizer.convert_ids_to_tokens(i)
            raise UserError(f"the {what} holds the model's mark {mark}; remove it.")


def written_prompt(question, processor):
    """The prompt's text, complete: with what the tokenizer puts before a text, such as BOS."""
    tokenizer, refused = processor.tokenizer, ""
    try:
        prompt = processor.apply_chat_template(
            conversation(question), add_generation_prompt=True, tokenize=False)
        lost = [t for t in (*question.split(IMAGE_MARK), INSTRUCTION) if t.strip() not in prompt]
        mark = getattr(processor, "image_token", None)
        if lost:
            refused = f"loses or changes the text {lost[0]!a:.40}"
        elif mark and prompt.count(mark) not in (0, question.count(IMAGE_MARK)):
            refused = f"writes {mark} {prompt.count(mark)} times"
    except Exception as error:  # a template raises what it likes
        refused = f"fails ({first_line(error)})"
    if refused:
        raise UserError(f"the model's chat template {refused}; give a model whose "
                        "template takes a user's text and images.")
    bare = tokenise(tokenizer, "a")  # what is put around a text does not depend on it
    whole = tokenizer("a", **BARE | {"add_special_tokens": True})["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    begin = "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    return prompt if prompt.lstrip().startswith(begin) else begin + prompt


# ---------------------------------------------------------------------------------------------
# Samples


def make_sample(row, path, place, processor):
    """A row, checked, as a sample. `place` is what a UserError names, and an id for want of one."""
    try:
        return checked_sample(row, path.parent, place, processor)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def checked_sample(row, folder, place, processor):
    asked = "problem" if row.get("question") is None and "problem" in row else "question"
    read = (asked, "answer", "solution", "id")
    question, answer, solution, name = (text_of(row, field) for field in read)
    for field_, text in ((asked, question), ("answer", answer)):
        if not text.strip():
            raise UserError(f'field "{field_}" is missing, empty or no text; correct it.')
    refuse_marks(question.replace(IMAGE_MARK, ""), "question", processor)
    refuse_marks(solution, "solution", processor)
    for mark in re.findall(r"<(?:image|video|audio)[ _-]?\d*>", question, re.I):
        if mark != IMAGE_MARK:
            raise UserError(f"the question holds {mark}; images alone are read, each at a mark "
                            f"{IMAGE_MARK}: write these, or remove the row.")
    images = row_images(row, folder)
    refuse_lost_images(row, (*read, *PICTURES), images, folder)
    images = [checked_image(image, folder) for image in images]
    if IMAGE_MARK not in question:  # then they stand first
        question = IMAGE_MARK * len(images) + question
    marks = question.count(IMAGE_MARK)
    if marks != len(images):
        raise UserError(f"{marks} {IMAGE_MARK} marks in the question for {len(images)} images; "
                        "give one mark an image.")
    prompt = written_prompt(question, processor)
    try:
        pictures = [picture for _, picture in images] or None
        inputs = processor(text=[prompt], images=pictures, **BARE)
    except Exception as error:  # such as for a picture 200 times as wide as high
        raise UserError(f"the processor refuses the row ({first_line(error)}); change its images.")
    ids = list(inputs["input_ids"][0])
    if images and not {*ids} & {*banned_ids(processor)}:
        raise UserError("the model's chat template loses the images; give a model whose template "
                        "takes a user's text and images.")
    if "image_grid_thw" in inputs:  # one placeholder for every merge x merge block of patches
        merged = sum(int(grid.prod()) for grid in inputs["image_grid_thw"])
        merged //= processor.image_processor.merge_size**2
        held = ids.count(processor.image_token_id)
        assert held == merged, f"{place}: {held} image placeholders for {merged} merged patches"
    sources = [source for source, _ in images]
    return Sample(name or place, question, answer, solution, sources, prompt, ids)


def read_samples(path, processor):
    """All of a data set's samples, each row checked; a UserError names the first that is wrong."""
    samples, places = [], {}
    for place, row in read_rows(path):
        s = make_sample(row, path, place, processor)
        if s.id in places:
            raise UserError(f"{places[s.id]} and {place}: two rows have the same id {s.id}; make "
                            "every id unique.")
        places[s.id] = place
        samples.append(s)
    if not samples:
        raise UserError(f"{path}: the file holds no rows; give a data set with at least one.")
    return samples


def load_samples(path, processor, max_prompt_tokens):
    """Read a data set. Prompts longer than `max_prompt_tokens` are dropped, and said; never cut."""
    samples = read_samples(utils.find(path), processor)
    kept = [s for s in samples if len(s.prompt_ids) <= max_prompt_tokens]
    dropped = [s.id for s in samples if len(s.prompt_ids) > max_prompt_tokens]
    if not kept:
        shortest = min(len(s.prompt_ids) for s in samples)
        raise UserError(f"{path}: every prompt is longer than --max_prompt_tokens "
                        f"{max_prompt_tokens}, the shortest has {shortest} tokens; raise it or use "
                        "smaller images.")
    if dropped:
        print0(f"{path}: left out {len(dropped)} of {len(samples)} prompts that are longer than "
               f"{max_prompt_tokens} tokens: {', '.join(dropped[:5])}{' ...' * (len(dropped) > 5)}")
    return kept


def load_splits(args, processor):
    """A trainer's data sets by split, "train" first; without those whose flag is empty."""
    paths = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    return {split: load_samples(path, processor, args.max_prompt_tokens)
            for split, path in paths.items() if path}


def count_steps(train, args):
    """A run's steps in an epoch, and in all: a short last batch is left out."""
    each = len(train) // args.batch_size
    if each == 0:
        raise UserError(f"--batch_size {args.batch_size} is more than the {len(train)} "
                        f"prompt{'s' * (len(train) > 1)}; lower it, or give more of them.")
    if len(train) % args.batch_size:
        print0(f"Each epoch leaves out {len(train) % args.batch_size} of {len(train)} prompts.")
    return each, min(each * args.epochs, args.max_steps or math.inf)


def refuse_mixture(args):
    """UserError where one's own data or model would be measured on the toy's data, by default.

    A data flag that was left alone means the toy's: beside one's own data, or for one's own model
    where that is all that is measured, they would pass for one's own without a word.
    """
    defaults = {f.name: f.default for f in fields(args) if f.name.endswith("data")}
    left = [name for name, toys in defaults.items() if getattr(args, name) == toys
            and name not in getattr(args, "given", ())]
    own = [name for name in defaults if getattr(args, name) not in ("", *defaults.values())]
    own += ["model"] * ("data" in defaults and Path(args.model).name != "toy_model")
    if own and left:
        ways = {"validation_data": "= for none", "test_data": "= for none"}
        ways = [f"--{n}{ways.get(n, f'={defaults[n]} for the toy')}" for n in left]
        raise UserError(f"--{own[0]} is your own, but --{' and --'.join(left)} would be the toy's: "
                        f"give yours there too, or {', '.join(ways)}.")


# ---------------------------------------------------------------------------------------------
# The command: what one wants to know of a data set before renting GPUs


def quantiles(values):
    """QUANTILES of some numbers, each one of them; {} of none."""
    values = sorted(values)
    return {f"{q:.0%}": values[int(q * (len(values) - 1))] for q in QUANTILES if values}


def main(args):
    from policy import load_processor

    processor, result = load_processor(args.model), {}
    for path in args.data:
        samples = read_samples(utils.find(path), processor)
        tokens = [len(s.prompt_ids) for s in samples]
        long = [s.id for s in samples if len(s.prompt_ids) > args.max_prompt_tokens]
        sizes = [open_image(image).size for s in samples for image in s.images]
        result[path] = found = {
            "rows": len(samples), "images": len(sizes), "dropped": len(long),
            "without image": sum(not s.images for s in samples),
            "without solution": sum(not s.solution for s in samples),
            "prompt tokens": quantiles(tokens),
            "image width": quantiles(width for width, _ in sizes),
            "image height": quantiles(height for _, height in sizes)}
        print0(path)
        for name, value in found.items():
            print0(f"    {name:18}" + re.sub("[{}']", "", str(value)))
        if long:
            print0(f"    dropped, since longer than --max_prompt_tokens {args.max_prompt_tokens}: "
                   f"{', '.join(long[:5])}{' ...' * (len(long) > 5)}")
        text = processor.tokenizer.decode(samples[0].prompt_ids)
        for mark in map(processor.tokenizer.convert_ids_to_tokens, banned_ids(processor)):
            many = rf"(?:{re.escape(mark)}){{2,}}"
            text = re.sub(many, lambda run: f"{mark} x {run[0].count(mark)}", text)
        print0(f"The prompt {samples[0].id} as the model reads it, {tokens[0]} tokens; the answer "
               f"is {samples[0].answer!r}:\n{text}")
    return result


if __name__ == "__main__":
    utils.run_script(main, Args)
