"""Step I, data flow: rows and their pictures become samples, the only thing that stages pass on.

A data set is JSON lines with the pictures' files beside it, or what the package `datasets` reads: a
parquet file, a folder of such files, a set of the hub. A row is checked whole before step 1, so
that nothing of it can fail, or get lost, in mid-run. What textbooks have and this leaves out: a
Dataset and a DataLoader with workers. Samples hold token ids and the names of pictures; tensors
are made of a few samples at a time, by `collate` in policy.py.

    python data.py toy_data/train.jsonl --model toy_model      # look at a data set before you train
    python data.py --benchmark mathvista --out mathvista       # a public benchmark as JSON lines
"""

import utils  # first: from here on Ctrl-C is no traceback

import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pictures import (
    PICTURES, WRITTEN, open_image, picture_sizes, refuse_lost_images, row_images, stored)
from sources import as_columns, folder_of, read_rows, renamed
from utils import UserError, first_line, print0, rank

# default of each stage's --instruction, which ends every prompt
INSTRUCTION = "Think step by step and put the final answer in \\boxed{}."
IMAGE_MARK = "<image>"
OTHER_MARK = re.compile(r"<\W*(?:image|img|video|audio)[ _-]?(?:here|placeholder|pad|token|\d*)"
                        r"(?:[ _-]?\d+)?\W*>", re.I)  # other programs' marks, and ours
# what a call of a tokenizer says for itself, since a checkpoint's files may say otherwise
BARE = {"add_special_tokens": False, "padding": False, "truncation": False, "max_length": None}
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Args:
    data: list = field(default_factory=list)  # data sets; empty: with --benchmark, the hub's
    model: str = "toy_model"  # folder or hub id of the model whose processor reads them
    columns: str = ""  # OURS=THEIRS, joined by commas: columns of another name; empty: none
    image_root: str = ""  # folder that image paths begin from; empty: the data file's
    min_pixels: int = 0  # images with fewer are enlarged; 0: the model's own bound
    max_pixels: int = 0  # images with more are reduced; 0: the model's own bound
    instruction: str = (  # the end of every prompt; empty: none
        "Think step by step and put the final answer in \\boxed{}.")
    max_prompt_tokens: int = 2048  # longer prompts, images included, are dropped
    benchmark: str = ""  # public benchmark to write as JSON lines, as mathvista; empty: none
    out: str = ""  # folder that --benchmark writes; empty: named like it


@dataclass
class Sample:
    """A row of a data set and, once it is answered, its completion and what that earned."""

    id: str
    question: str
    answer: str  # the reference, never what a model said
    solution: str  # golden response for SFT, "" where the data has none
    images: list  # a path, or the bytes of a parquet row, for each image; decoded late
    prompt_text: str = ""  # what a sampler wants: one placeholder an image
    prompt_ids: list[int] = field(default_factory=list)  # the trainer's: one a merged patch
    completion_ids: list[int] = field(default_factory=list)  # EOS included
    completion_text: str = ""
    finish_reason: str = ""  # "stop" (EOS was sampled) or "length" (cut off)
    sampler_logprobs: list[float] = field(default_factory=list)  # nats, one a completion token
    rewards: dict = field(default_factory=dict)  # by name, before weighing; None: not scored
    reward: float | None = None
    advantage: float = 0.0
    place: str = ""  # file and line of the row, for messages

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
# Prompts: a question in the model's own chat template, and its token ids


def conversation(question, instruction=INSTRUCTION):
    """The messages of a prompt, for the chat template: the only place where a prompt is written."""
    content = []
    for i, text in enumerate(question.split(IMAGE_MARK)):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}]
    if instruction.strip():
        content.append({"type": "text", "text": f"\n{instruction}"})
    return [{"role": "user", "content": content}]


def tokenise(tokenizer, text):
    """A text's ids, whole and bare, whatever the checkpoint's files say.

    No special token is put around it, and nothing is cut, filled up, or spelt out.
    """
    return tokenizer(text, **BARE, split_special_tokens=False)["input_ids"]


def banned_ids(processor):
    """Ids that must never be sampled: a placeholder in a completion has no image behind it."""
    own = getattr(processor, "image_token_id", None)  # Gemma 3's, of a prompt's text, is one apart
    ids = [own, *processor.image_token_ids, *processor.video_token_ids]
    return list(dict.fromkeys(i for i in ids if i is not None))


def mark_in(text, processor):
    """The first of what would be a mark of the chat or of an image to the model, or ""."""
    tokenizer = processor.tokenizer
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {*marks, *banned_ids(processor)} - {tokenizer.unk_token_id}
    found = [i for i in tokenise(tokenizer, text) if i in marks]
    return "".join(tokenizer.convert_ids_to_tokens(found[:1]))


def refuse_marks(text, what, processor):
    """UserError where a text holds a mark of the model."""
    if mark := mark_in(text, processor):
        raise UserError(f"the {what} holds the model's mark {mark}; remove it.")


def written_prompt(question, processor, instruction):
    """The prompt's text, complete: with what the tokenizer puts before a text, such as BOS."""
    tokenizer, refused = processor.tokenizer, ""
    try:
        prompt = processor.apply_chat_template(
            conversation(question, instruction), add_generation_prompt=True, tokenize=False)
        lost = [t for t in (*question.split(IMAGE_MARK), instruction) if t.strip() not in prompt]
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


@functools.lru_cache(maxsize=8)
def repeats_placeholders(processor):
    """Whether an image is as many placeholders as the processor's formula says of its size.

    Where it is not, as where tiles have marks of their own, only the processor can say.
    """
    sizes = [(90, 60), (200, 330)]
    try:
        prompt = processor.image_token.join(("a", "b", "c"))
        images = [Image.new("RGB", size) for size in sizes]
        theirs = [*processor(text=[prompt], images=images, **BARE)["input_ids"][0]]
        return theirs == with_placeholders(tokenise(processor.tokenizer, prompt), sizes, processor)
    except Exception:  # another family's formula may be missing, or of another kind
        return False


def with_placeholders(ids, sizes, processor):
    """A prompt's ids, each image's one placeholder repeated as its (width, height) asks for."""
    counts = iter(())
    if sizes:
        found = processor._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in sizes])
        counts = iter(found["num_image_tokens"])
    mark = processor.image_token_id
    return [i for token in ids for i in ([token] * next(counts) if token == mark else [token])]


# ---------------------------------------------------------------------------------------------
# Samples


def text_of(row, name):
    """A field as text, "" where there is none; UserError where it is no text or number."""
    value = row.get(name)
    if value is None:
        return ""
    number = type(value) is int or type(value) in (float, Decimal) and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise UserError(f'field "{name}" is missing, empty or no text; correct it.')
    if re.search("[\ud800-\udfff]", str(value)):
        raise UserError(f'field "{name}" holds half a character ({value!a:.40}); correct it.')
    return str(value)


@contextmanager
def at(place):
    """A UserError of what is inside names the place."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


@contextmanager
def with_one_voice():
    """A UserError that a rank meets inside is raised by all: only rank 0 is heard. COLLECTIVE."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    utils.refuse_together(problem)


def unwritten_sample(row, folder, place, processor):
    """A row as a sample without its prompt: its texts and marks are checked, its images found."""
    asked = "problem" if row.get("question") is None and "problem" in row else "question"
    read = (asked, "answer", "solution", "id")
    question, answer, solution, name = (text_of(row, field) for field in read)
    for field_, text in ((asked, question), ("answer", answer)):
        if not text.strip():
            raise UserError(f'field "{field_}" is missing, empty or no text; correct it, or name '
                            f"the right one of {', '.join(row)} by --columns.")
    refuse_marks(question.replace(IMAGE_MARK, ""), "question", processor)
    refuse_marks(solution, "solution", processor)
    for mark in (*OTHER_MARK.findall(question), *WRITTEN.findall(question)):
        if mark != IMAGE_MARK:
            raise UserError(f"the question holds {mark:.40}; images alone are read, each at a mark "
                            f"{IMAGE_MARK}: write these, or remove the row.")
    images = row_images(row, folder)
    refuse_lost_images(row, PICTURES, read, images, folder)
    if IMAGE_MARK not in question:  # then they stand first
        question = IMAGE_MARK * len(images) + question
    marks = question.count(IMAGE_MARK)
    if marks != len(images):
        raise UserError(f"{marks} {IMAGE_MARK} marks in the question for {len(images)} images; "
                        "give one mark an image.")
    name = name or place.replace("/,", ",").rpartition("/")[2]  # it seeds sampling: files may move
    return Sample(name, question, answer, solution, images, place=place)


def write_prompt(sample, sizes, processor, instruction):
    """Set a sample's prompt; `sizes` is what `picture_sizes` found of its images."""
    sizes = [sizes[image] for image in sample.images]
    for problem in (size for size in sizes if isinstance(size, str)):
        raise UserError(problem)
    prompt = written_prompt(sample.question, processor, instruction)
    try:
        if repeats_placeholders(processor):
            ids = with_placeholders(tokenise(processor.tokenizer, prompt), sizes, processor)
        else:
            pictures = [open_image(image) for image in sample.images] or None
            ids = list(processor(text=[prompt], images=pictures, **BARE)["input_ids"][0])
    except Exception as error:  # such as for a picture 200 times as wide as high
        raise UserError(f"the processor refuses the row ({first_line(error)}); change its images.")
    if sizes and not {*ids} & {*banned_ids(processor)}:
        raise UserError("the model's chat template loses the images; give a model whose template "
                        "takes a user's text and images.")
    sample.prompt_text, sample.prompt_ids = prompt, ids


def make_sample(row, folder, place, processor, instruction=INSTRUCTION):
    """One row, checked, as a sample; its image paths begin from `folder`. COLLECTIVE.

    `place` is what a UserError names and, without its folder, an id for want of one.
    """
    with at(place):
        sample = unwritten_sample(row, folder, place, processor)
        write_prompt(sample, picture_sizes(sample.images), processor, instruction)
    return sample


def read_samples(source, processor, columns="", instruction=INSTRUCTION, image_root="", limit=0):
    """A data set's samples, each row checked, and `{image: (width, height)}`. COLLECTIVE.

    A UserError names the first row that is wrong. Of `limit` rows at most; 0: of all.
    """
    folder, columns = Path(image_root or folder_of(source)), as_columns(columns)
    refuse_marks(instruction, "--instruction", processor)
    if marks := OTHER_MARK.findall(instruction):
        raise UserError(f"the --instruction holds {marks[0]}; it is for every prompt, remove it.")
    samples, places, seen = [], {}, set()
    bar = functools.partial(tqdm, leave=False, delay=2, disable=rank() > 0 or None, mininterval=1)
    with with_one_voice():
        rows = itertools.islice(read_rows(source), limit or None)
        for place, row in bar(rows, f"Reading {source}"):
            seen.update(row)
            with at(place):
                s = unwritten_sample(renamed(row, columns), folder, place, processor)
            if s.id in places:
                raise UserError(f"{places[s.id]} and {place}: two rows have the same id {s.id}; "
                                "make every id unique.")
            places[s.id] = place
            samples.append(s)
        if not samples:
            raise UserError(f"{source}: it holds no rows; give a data set with at least one.")
        wanted = {name for theirs in columns.values() for name in theirs.split("+")}
        if not wanted <= seen:
            raise UserError(f"{source}: no row has {min(wanted - seen)}, which --columns names; "
                            f"they have {', '.join(sorted(seen))}.")
    unread = seen - {*PICTURES, "question", "problem", "answer", "solution", "id"} - wanted
    if unread:
        print0(f"{source}: not read: {', '.join(sorted(unread))}")
    # what is dear, shared over the ranks; the rest is a third of a millisecond a row
    sizes = picture_sizes(image for s in samples for image in s.images)
    for s in bar(samples, f"Writing prompts of {source}"):
        with at(s.place):
            write_prompt(s, sizes, processor, instruction)
    return samples, sizes


def load_samples(source, processor, max_prompt_tokens, *reading):
    """Read a data set as `read_samples` does, and leave out what is too long. COLLECTIVE.

    Prompts longer than `max_prompt_tokens` are dropped, and said; never cut.
    """
    samples, _ = read_samples(source, processor, *reading)
    kept = [s for s in samples if len(s.prompt_ids) <= max_prompt_tokens]
    dropped = [s.id for s in samples if len(s.prompt_ids) > max_prompt_tokens]
    if not kept:
        shortest = min(len(s.prompt_ids) for s in samples)
        raise UserError(f"{source}: every prompt is longer than --max_prompt_tokens "
                        f"{max_prompt_tokens}, the shortest has {shortest} tokens; raise it or "
                        "lower --max_pixels.")
    if dropped:
        print0(f"{source}: left out {len(dropped)} of {len(samples)} prompts that are longer than "
               f"{max_prompt_tokens} tokens: {', '.join(dropped[:5])}{' ...' * (len(dropped) > 5)}")
    return kept


def write_rows(path, samples, most):
    """Write answered samples as rows for SFT, pictures beside them; return how many there are.

    Of each prompt the first `most` that differ, each read as that prompt again, without a flag and
    wherever the folder lies. Without a row there is no file.
    """
    rows, count = [], Counter()
    for s in {(s.id, s.completion_text): s for s in samples}.values():
        count[s.id] += 1
        if count[s.id] <= most:
            # HAZARD: a mark before > is another one; those that stand first, the reader puts there
            question = s.question.removeprefix(IMAGE_MARK * len(s.images))
            rows.append({"id": f"{s.id}-{count[s.id]}" if most > 1 else s.id,
                         "question": question if question.strip() else s.question,
                         "answer": s.answer, "solution": s.completion_text,
                         "images": [stored(image, path.parent) for image in s.images]})
    path.unlink(missing_ok=True)  # of a run that ended before it was done
    if rows:
        utils.write_jsonl(path, rows)
    return len(rows)


def load_data(source, args, processor, limit=0):
    """A stage's data set, read as the stage's flags say. COLLECTIVE."""
    return load_samples(source, processor, args.max_prompt_tokens, args.columns, args.instruction,
                        args.image_root, limit)


def load_splits(args, processor):
    """A trainer's data sets by split, "train" first; without those whose flag is empty."""
    paths = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    return {split: load_data(path, args, processor) for split, path in paths.items() if path}


def data_record(out, splits, args):
    """`{split: {"rows": n, "sha256": hash}}` of a trainer's samples, for data.json in its folder.

    UserError where the run in `out` began with others; it may know nothing of them. COLLECTIVE.
    """
    record = {}
    for split, samples in splits.items():
        root = args.image_root or folder_of(getattr(args, f"{split}_data"))
        record[split] = {"rows": len(samples), "sha256": hash_of(samples, root)}
    path = out / "data.json"
    with with_one_voice():
        try:
            before = json.loads(path.read_text()) if path.exists() else record
            for split in before | record:
                had, has = (rows.get(split, {"rows": 0}) for rows in (before, record))
                if had != has:
                    others = " others" * (had["rows"] == has["rows"])
                    raise UserError(f"--out {out} holds a run over other data: {split} had "
                                    f"{had['rows']} rows, and has {has['rows']}{others} now; give "
                                    "the data that it began with, or a new folder.")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f"{path} is not as it was written; give a new folder as --out.")
    return record


def hash_of(samples, root):
    """What samples hold, in their order, wherever the folder `root` lies that has their pictures.

    A picture's file counts by its path there and its size, since to read all again would be dear.
    """
    digest = hashlib.sha256()
    for s in samples:
        images = [hashlib.sha256(image).hexdigest() if isinstance(image, bytes)
                  else [os.path.relpath(image, root), os.path.getsize(image)] for image in s.images]
        row = [s.id, s.question, s.answer, s.solution, s.prompt_ids, images]
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


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


def kilobytes(sample):
    """What a sample takes in memory, with the bytes of its pictures if it holds them."""
    parts = [sample, vars(sample), *vars(sample).values(), *sample.images]
    parts += {id(token): token for token in sample.prompt_ids}.values()  # a placeholder is one
    return sum(map(sys.getsizeof, parts)) / 1e3


def main(args):
    from policy import load_processor

    idle = args.given - {"benchmark", "out"} if args.benchmark else args.given & {"out"}
    if idle or not (args.data or args.benchmark):
        raise UserError(f"--{min(idle)} is not for {'' if args.benchmark else 'anything but '}"
                        "--benchmark; leave it out." if idle else
                        "give a data set to look at, or --benchmark.")
    if args.benchmark:
        from benchmarks import convert

        with with_one_voice():  # of rank 0, which alone writes
            result = convert(args.benchmark, args.data, args.out) if rank() == 0 else {}
        return result
    processor, result = load_processor(args.model, args.min_pixels, args.max_pixels), {}
    for source in args.data:
        samples, sizes = read_samples(source, processor, args.columns, args.instruction,
                                      args.image_root)
        tokens = [len(s.prompt_ids) for s in samples]
        long = [s.id for s in samples if len(s.prompt_ids) > args.max_prompt_tokens]
        shown = [sizes[image] for s in samples for image in s.images]
        result[source] = found = {
            "rows": len(samples), "images": len(shown), "dropped": len(long),
            "without image": sum(not s.images for s in samples),
            "without solution": sum(not s.solution for s in samples),
            "prompt tokens": quantiles(tokens),
            "image width": quantiles(width for width, _ in shown),
            "image height": quantiles(height for _, height in shown),
            "memory, kB a row": round(sum(map(kilobytes, samples)) / len(samples), 1)}
        print0(source)
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
