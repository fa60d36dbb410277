"""The shared module: flags, ranks, records, models, batches, shared prefixes, runs, checkpoints.

Read records and batches early, the rest late (README, "Reading order"): no advantage and no loss is
computed here. A stage and this file can be copied into another project together.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image, ImageOps
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText, AutoProcessor,
    GenerationConfig)
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.processing_utils import TextKwargs
from transformers.utils import logging as transformers_logging

# what a call of a tokenizer says for itself, since a checkpoint's files may say otherwise
BARE = {"add_special_tokens": False, "padding": False, "truncation": False, "max_length": None}
# the one prompt template: training, evaluation and every engine use it
INSTRUCTION = "Think step by step and put the final answer in \\boxed{}."
IMAGE_MARK = "<image>"
TOY_DATA = ("toy:train", "toy:validation", "toy:test")  # data sets that toy.py writes when asked
PICTURES = ("images", "image", "decoded_image")  # the fields whose pictures a row is about
# a text that is a picture (group 1) or the name of one; a video or a sound
PICTURE = re.compile(r"^(data:image/|iVBORw0KGgo|/9j/|R0lGOD|UklGR)|\.(png|jpe?g|gif|bmp|tiff?|webp"
                     r"|avif|heic|jp2|p[gp]m|svg)(\?\S*)?$", re.I)
VIDEO = re.compile(r"^data:(video|audio)/|\.(mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac"
                   r"|ogg|m4a)(\?\S*)?$", re.I)
HEAD_NUMBERS = 2**27  # of [completion tokens, vocabulary], that exist at one time
run_folder = []  # of this process, once `begin_run` has written it: what an error message names
made_folders = []  # for the toy's data, deepest first: what goes again where no run begins
mirror = []  # the Weights & Biases run of this process, once `start_mirror` has begun it


# ---------------------------------------------------------------------------------------------
# Flags, and the ways a script ends


class UserError(Exception):
    """A mistake in what the user gave: one sentence on stderr, exit code 2, no traceback."""


class RunError(Exception):
    """What ends a run that began well: a sentence from each rank that met it, exit code 1."""


def parse_args(Args, argv=None):
    """Turn the dataclass `Args` into a command line: a field is a flag, its comment is its help.

    What the comment says of a flag's values holds: see `refusal`. `args.given` names the flags that
    stood on the command line.
    """
    purpose = sys.modules[Args.__module__].__doc__.split("\n\n")[0]
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=purpose, formatter_class=style, allow_abbrev=False)
    # every rank parses the same flags; one of them complains
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: error: {message}; see --help.\n" * (rank() == 0))
    docs = dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(Args), re.M))
    for f in fields(Args):
        if f.type is list:  # what stands without a flag
            parser.add_argument(f.name, nargs="+", help=docs[f.name])
            continue
        kind = {"type": f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        text = docs[f.name].replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    args = Args(**vars(parser.parse_args(argv)))
    for f in fields(Args):
        if reason := refusal(f, docs[f.name], getattr(args, f.name)):
            parser.error(f"--{f.name} {reason}")
    words = sys.argv[1:] if argv is None else argv
    args.given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return args


def refusal(flag, text, value):
    """What is wrong with the value of a flag (a dataclass field) whose help is `text`, or None.

    A number lies in the interval that the help names, as in (0, 1]; in one from 0 up where it names
    none, and 0 itself is allowed where it is the default or the help says what `0:` means. Words
    are not empty, but where `empty:` means something, or the default is so. NaN lies nowhere.
    """
    if flag.type in (str, list):
        empty = not flag.default or "empty:" in text
        words = value if flag.type is list else [value]
        return None if all(w.strip() for w in words) or empty else "must not be empty"
    zero = flag.default == 0 or "0:" in text
    if flag.type not in (int, float) or zero and value == 0:
        return None
    usual = "[0, " if zero else "[1, " if flag.type is int else "(0, "
    usual += "2147483647]" if flag.type is int else "inf)"
    named = re.search(r"([(\[])([\d.]+), ([\d.]+|inf)([)\]])", f"{text} {usual}")
    left, low, high, right = named.groups()
    above = float(low) < value or left == "[" and float(low) == value
    below = value < float(high) or right == "]" and float(high) == value
    if above and below:
        return None
    either = "0, or " if zero and float(low) > 0 else ""
    return (f"must be {either}{'at least' if left == '[' else 'above'} {low} and "
            f"{'at most' if right == ']' else 'below'} {high}, not {value}")


def run_script(main, Args):
    """Parse the flags, join the other ranks, run `main(args)`, print what it returns as JSON.

    Exit codes: 2 for a user's mistake, 1 for a run that failed, 128 + signal number for Ctrl-C and
    SIGTERM. A bug keeps its traceback; what a disk, a file or another rank does is a sentence.
    """
    # HAZARD: a KeyboardInterrupt is swallowed by destructors, and made another error by imports
    signal.signal(signal.SIGINT, lambda *_: os._exit(130) if rank() else end_run("Stopped.", 130))
    args = parse_args(Args)
    try:
        start_ranks()
        result = main(args)
        if rank() == 0:
            print(as_json(result), flush=True)
    except UserError as error:
        print0(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(2)
    except RunError as error:
        end_run(f"rank {rank()}: {error}", 1)
    except OSError as error:
        end_run(f"rank {rank()}: {error}.", 1 if run_folder else 2)
    except SystemExit as error:
        if run_folder:  # nothing of ours leaves a run in this way
            end_run(f"rank {rank()}: something called sys.exit({error.code}), a reward perhaps.", 1)
        raise
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or "can't allocate memory" in reason:
            end_run(f"rank {rank()}: out of memory{reason and f' ({reason})'}; lower "
                    "--micro_batch_tokens, --rollout_batch_size or --max_new_tokens.", 1)
        if not re.search("gloo|NCCL", str(error)):  # what speaks when a collective fails
            raise
        end_run(f"rank {rank()}: another rank is gone ({reason}).", 1)
    finally:
        forget_toy()
        if dist.is_initialized() and "vllm" not in sys.modules:  # which ends the group by itself
            dist.destroy_process_group()


def end_run(reason, code):
    """Leave this process at once; say why, and from where the same command goes on.

    The other ranks may wait for this one in a collective for ever: torchrun ends them. Every file
    of a run is whole at every moment, so leaving at any moment is safe.
    """
    where = "No run folder was written."
    if run_folder:
        last = latest_checkpoint(run_folder[0])
        where = f"The last whole checkpoint is {last}." if last else "There is no checkpoint yet."
        where += f" The same command with --out {run_folder[0]} goes on."
    try:  # not by print0: whoever holds its lock may be waiting in a collective
        sys.stderr.write(f"\n{reason} {where}\n")
        forget_toy()
        # what was printed so far; whoever holds stdout's lock may wait for a reader for ever
        threading.excepthook = lambda _: None  # or have lost it
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
        flushing.start()
        flushing.join(2)
    finally:  # even where the log's disk is full
        os._exit(code)


@contextmanager
def watchdog(seconds, sentence):
    """End this process with a sentence when the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, end_run, (f"rank {rank()}: {sentence}", 1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_on_signal():
    """From now on leave at once on Ctrl-C or SIGTERM, and name the run's last whole checkpoint.

    Python runs a signal's handler between two bytecodes, so a rank that waits inside a collective
    would never run it; the wake-up descriptor is written by the C handler itself, and a thread
    reads it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait():
        number = os.read(reader, 1)[0]
        # one rank speaks; two when torchrun sends SIGTERM, as it may be the first one that died
        if rank() > (number == signal.SIGTERM):
            os._exit(128 + number)
        end_run("Stopped.", 128 + number)

    threading.Thread(target=wait, daemon=True).start()


# ---------------------------------------------------------------------------------------------
# Ranks: one process a device; one plain process is a group of one


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def device():
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def print0(*values):
    """Print on rank 0, to stderr: stdout is kept for results."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, values)), file=sys.stderr)


def start_ranks():
    """Join the process group that torchrun made room for, or form a group of one."""
    share_cores()
    transformers_logging.disable_progress_bar()
    loading = transformers_logging.get_logger("transformers.modeling_utils")
    loading.addFilter(  # what `load_model` says in a sentence
        lambda record: not re.search("LOAD REPORT|seem corrupted", record.getMessage()))
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    else:
        keep_memory()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = next(rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # HAZARD: torchrun keeps its store over a restart, and a rank that reads a dead one's
        # address there waits for it for ever (pytorch#135712). Only on one machine is this count
        # everyone's
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # a dead rank's connection closes at once, and each call that may hang has its own watchdog: the
    # default of 30 minutes would end a rank that waits for another's slow reward or engine
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(),
                            timeout=timedelta(days=10_000))


def share_cores():
    """Give each of torchrun's ranks its part of the cores; torchrun itself leaves them one each."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))


def keep_memory():
    """Keep what tensors on a CPU free for the next ones: the kernel clears each page it takes back.

    glibc's settings, as in its mallopt(3); other C libraries have none of that name.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    for name in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(name, 2**31 - 1)


def forget_peak_memory():
    """From here on `peak_memory` counts anew, on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """The most memory this process has held, in bytes: the GPU's, without vLLM's pool; or its own.

    HAZARD: PyTorch counts vLLM's weights and cache at all times, also when they are asleep.
    """
    if torch.cuda.is_available():
        cumem = sys.modules.get("vllm.device_allocator.cumem")
        pool = cumem and cumem.CuMemAllocator.instance
        return torch.cuda.max_memory_allocated() - (pool.get_current_usage() if pool else 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes


def sum_over_ranks(values):
    """Sum a dictionary of numbers over ranks, in float64. COLLECTIVE: same keys, in one order."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather(items):
    """The ranks' lists joined, in rank order, on every rank. COLLECTIVE."""
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


# ---------------------------------------------------------------------------------------------
# Records: a data set is JSON lines; a list of samples travels through the stages


@dataclass
class Sample:
    """One prompt and, once an engine has answered it, one completion: the contract between stages.

    Lists of samples travel; tensors exist only inside `collate`.
    """

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


def check_data(args):
    """Refuse the toy's data where nobody asked for them, and toy data that there are not.

    A data flag that was left alone means the toy's. Beside one's own data, or for one's own model
    where that is all that is measured, they would pass for one's own without a word.
    """
    sets = {f.name: getattr(args, f.name) for f in fields(args) if f.name.endswith("data")}
    toys = [name for name, value in sets.items() if value.startswith("toy:")]
    for name in toys:
        if sets[name] not in TOY_DATA:
            raise UserError(f"--{name} {sets[name]}: the toy has no such split; choose from "
                            f"{', '.join(TOY_DATA)}.")
    own = [name for name, value in sets.items() if value and name not in toys]
    own += ["model"] * ("data" in sets and Path(args.model).name != "toy_model")
    left = [name for name in toys if name not in getattr(args, "given", ())
            and sets[name] == getattr(type(args), name)]
    if own and left:
        ways = {"validation_data": "= for none", "test_data": "= for none"}
        ways = [f"--{name}{ways.get(name, f'={sets[name]} for the toy')}" for name in left]
        raise UserError(f"--{own[0]} is your own, but --{' and --'.join(left)} would be the toy's: "
                        f"give yours there too, or {', '.join(ways)}.")


def data_path(name, out):
    """A data set's path; `toy:train` and its like are first written into the run folder `out`."""
    if not name.startswith("toy:"):
        return Path(name)
    path = Path(out) / "toy_data" / f"toy_{name.removeprefix('toy:')}.jsonl"
    if rank() == 0 and not path.exists():
        from toy import write_data

        made_folders.extend([path.parent, *(p for p in path.parent.parents if not p.exists())])
        write_data(path.parent)
    dist.barrier()
    return path


def forget_toy():
    """Take back the toy's data where no run came of them, and the folders made for them."""
    for folder in [] if run_folder else made_folders:
        if folder.name == "toy_data":
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@functools.cache
def say_once(sentence):
    print0(sentence)


def unlike_fields(pairs):
    """A JSON object, of whose fields Python would keep the last one of a name."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("two fields have one name")
    return row


def read_rows(path):
    """Yield `(place, row)` for every row of a .jsonl or .parquet file; `place` is for messages."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .jsonl or .parquet data set.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        except ImportError:
            raise UserError(f"{path}: reading parquet needs pyarrow; run `pip install pyarrow`.")
        except (ValueError, OSError, NotImplementedError) as error:
            raise UserError(f"{path}: cannot be read as parquet ({first_line(error)}); replace it.")
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


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


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
        grey = values * {1: 255, 255: 1, 65535: 1 / 256}[top]
    else:
        grey = (values - low) * 255 / (high - low) if high > low else values * 0 + 128
    grey[values == image.info.get("transparency")] = 255  # laid on white, as above
    return Image.fromarray(grey.astype(np.uint8))


def as_png(image):
    """The bytes of an image as a data set's file would hold them."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def leaves(value):
    """What a field holds in its lists, maps and structs, however deep; not None, not ""."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list, tuple)):
            stack.extend(value.values() if isinstance(value, dict) else value)
        elif value is not None and value != "":
            yield value


def row_images(row, path, place):
    """The pictures of a row, each as a path or bytes; UserError where fields disagree."""

    def source(part):  # a struct as `datasets` writes it: where it has bytes, its path is a name
        if not isinstance(part, dict) or not part.keys() & {"bytes", "path"}:
            return part
        return part.get("path") if part.get("bytes") is None else part["bytes"]

    def nowhere(parts):
        return all(isinstance(p, str) and not os.path.isfile(path.parent / p) for p in parts)

    given = {}
    for name in PICTURES:
        value = row.get(name)
        if name == "images" and isinstance(value, str):
            raise UserError(f"{place}: images must be a list of paths; correct it.")
        if any(True for _ in leaves(value)):
            given[name] = [source(part) for part in (value if type(value) is list else [value])]
    kept = next((n for n in given if all(isinstance(p, bytes) for p in given[n])), None)
    for name in [n for n in given if kept and nowhere(given[n])]:  # as MathVista has it
        if len(given[name]) == len(given[kept]):
            say_once(f"{path}: images are those of {kept}; {name} names files that are not there.")
            del given[name]
    first = next(iter(given.values()), [])
    if any(parts != first for parts in given.values()):
        raise UserError(f"{place}: {' and '.join(given)} hold different images; keep one of them.")
    return first


def refuse_lost_images(row, read, images, path, place):
    """UserError where a field that nobody reads holds a picture, a video or a sound.

    The name of a file that is not there is said and passed over, as metadata, where the row has
    its pictures and the field has no picture's name.
    """
    known = [text for name in PICTURES for text in leaves(row.get(name)) if isinstance(text, str)]
    known = {*known, *map(os.path.basename, known)}
    for name, leaf in ((n, leaf) for n in row if n not in read for leaf in leaves(row[n])):
        text = leaf if isinstance(leaf, str) else ""
        what = f'{place}: the field "{name}" holds'
        if VIDEO.search(text) or re.fullmatch("(video|audio)s?", name, re.I) and leaf:
            raise UserError(f"{what} a video or sound ({leaf!a:.40}); only text and images are "
                            "read, remove the row.")
        looks, file = PICTURE.search(text), path.parent / text
        if leaf in known or not (isinstance(leaf, bytes) or looks or is_image(file)):
            continue
        picture = re.fullmatch(r"(image|img|picture|pic|photo|figure)s?_?\d*", name, re.I)
        if not images or not looks or looks[1] or picture or os.path.isfile(file):
            raise UserError(f"{what} a picture ({leaf!a:.40}) that would be lost; rename the field "
                            "to image or images, or remove it.")
        say_once(f"{path}: {name} names images that are not there; it is taken for metadata.")


def is_image(file):
    """Whether there is a file that begins as a picture does."""
    if not os.path.isfile(file):
        return False
    try:
        Image.open(file).close()
    except Exception:  # Pillow's plug-ins raise what they like
        return False
    return True


def checked_image(image, folder, place):
    """A row's image, checked: its absolute path in the folder, or its bytes; and the picture."""
    name = "image bytes"
    if not isinstance(image, bytes):
        if not isinstance(image, str) or re.search("[\0\ud800-\udfff]", image):
            raise UserError(f"{place}: an image is given as {image!a:.60}; give its path as text.")
        name, image = f"image {image:.100}", os.path.realpath(folder / image)
        if not Path(image).is_relative_to(folder.resolve()):
            raise UserError(f"{place}: {name} lies outside {folder}; move it inside.")
        if not os.path.isfile(image):
            raise UserError(f"{place}: {name} does not exist in {folder}; correct the path.")
    try:
        return image, open_image(image)
    except Exception as error:  # Pillow's plug-ins raise what they like
        raise UserError(f"{place}: {name} cannot be read ({first_line(error)}); replace it.")


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


def text_of(row, name, place):
    """A field as text, "" where there is none; UserError where it is no text or number."""
    value = row.get(name)
    if value is None:
        return ""
    number = type(value) is int or type(value) is float and math.isfinite(value)
    if not number and not isinstance(value, str):
        raise UserError(f'{place}: field "{name}" is missing, empty or no text; correct it.')
    if re.search("[\ud800-\udfff]", str(value)):
        raise UserError(f'{place}: field "{name}" holds half a character ({value!a:.40}); correct '
                        "it.")
    return str(value)


def refuse_marks(text, what, place, processor):
    """UserError where a text holds what would be a mark of the chat or of an image to the model."""
    tokenizer = processor.tokenizer
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {*marks, *banned_ids(processor)} - {tokenizer.unk_token_id}
    for i in tokenise(tokenizer, text):
        if i in marks:
            mark = tokenizer.convert_ids_to_tokens(i)
            raise UserError(f"{place}: the {what} holds the model's mark {mark}; remove it.")


def written_prompt(question, place, processor):
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
        raise UserError(f"{place}: the model's chat template {refused}; give a model whose "
                        "template takes a user's text and images.")
    bare = tokenise(tokenizer, "a")  # what is put around a text does not depend on it
    whole = tokenizer("a", **BARE | {"add_special_tokens": True})["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    begin = "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    return prompt if prompt.lstrip().startswith(begin) else begin + prompt


def make_sample(row, path, place, processor):
    """Check one row and make a sample of it."""
    asked = "problem" if row.get("question") is None and "problem" in row else "question"
    read = (asked, "answer", "solution", "id")
    question, answer, solution, name = (text_of(row, field, place) for field in read)
    for field, text in ((asked, question), ("answer", answer)):
        if not text.strip():
            raise UserError(f'{place}: field "{field}" is missing, empty or no text; correct it.')
    refuse_marks(question.replace(IMAGE_MARK, ""), "question", place, processor)
    refuse_marks(solution, "solution", place, processor)
    odd = [mark[0] for mark in re.finditer(r"<(image|video|audio)[ _-]?\d*>", question, re.I)
           if mark[0] != IMAGE_MARK]
    if odd:
        raise UserError(f"{place}: the question holds {odd[0]}; images alone are read, each at a "
                        f"mark {IMAGE_MARK}: write these, or remove the row.")
    images = row_images(row, path, place)
    refuse_lost_images(row, (*read, *PICTURES), images, path, place)
    pictures = [checked_image(image, path.parent, place) for image in images]
    images = [source for source, _ in pictures]
    if IMAGE_MARK not in question:  # then they stand first
        question = IMAGE_MARK * len(images) + question
    marks = question.count(IMAGE_MARK)
    if marks != len(images):
        raise UserError(f"{place}: {marks} {IMAGE_MARK} marks in the question for {len(images)} "
                        "images; give one mark an image.")
    prompt = written_prompt(question, place, processor)
    try:
        inputs = processor(text=[prompt], images=[picture for _, picture in pictures] or None,
                           **BARE)
    except Exception as error:  # such as for a picture 200 times as wide as high
        raise UserError(f"{place}: the processor refuses the row ({first_line(error)}); change its "
                        "images.")
    ids = list(inputs["input_ids"][0])
    if images and not {*ids} & {*banned_ids(processor)}:
        raise UserError(f"{place}: the model's chat template loses the images; give a model whose "
                        "template takes a user's text and images.")
    if "image_grid_thw" in inputs:  # one placeholder for every merge x merge block of patches
        merged = sum(int(grid.prod()) for grid in inputs["image_grid_thw"])
        merged //= processor.image_processor.merge_size**2
        held = ids.count(processor.image_token_id)
        assert held == merged, f"{place}: {held} image placeholders for {merged} merged patches"
    return Sample(name or place, question, answer, solution, images, prompt, ids)


def load_samples(path, processor, max_prompt_tokens):
    """Read a data set. Prompts longer than `max_prompt_tokens` are dropped, and said; never cut."""
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


def load_splits(args, out, processor):
    """A trainer's data sets by split, "train" first; without those whose flag is empty."""
    names = {"train": args.train_data, "validation": args.validation_data, "test": args.test_data}
    paths = {split: data_path(name, out) for split, name in names.items() if name}
    return {split: load_samples(path, processor, args.max_prompt_tokens)
            for split, path in paths.items()}


# ---------------------------------------------------------------------------------------------
# Models


def load_pretrained(loader, path, **kwargs):
    """`loader.from_pretrained(path)`, its failure told in one sentence."""
    owner = Path(str(path).partition("/")[0])
    hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) and not owner.exists()
    if not Path(path).is_dir() and not hub_id:  # a typing mistake must not wait for a network
        raise UserError(f"--model {path}: no such folder; give one, or a hub id like Qwen/NAME.")
    check_files(Path(path))
    try:
        return loader.from_pretrained(path, **kwargs)
    except Exception as error:  # whatever a file of somebody else's makes of transformers
        reason = first_line(error)
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"--model {path}: cannot be loaded ({reason}); give a folder or hub id of "
                        "an instruction-tuned vision-language model with its processor files.")


def check_files(folder):
    """UserError with the name of a checkpoint's file that is torn, empty, or no JSON object."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*")):
        try:
            if re.fullmatch(r"model.*\.safetensors", path.name):
                safe_open(path, "pt")  # compares the length with what the header says
            elif re.search(r"(config|tokenizer|template|index|map|tokens|vocab)\.json$", path.name):
                if not isinstance(json.loads(path.read_text("utf-8")), dict):
                    raise ValueError("no JSON object")
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise UserError(f"--model {folder}: its file {path.name} is torn or not what its name "
                            f"says ({error}); copy or download it again.")


def load_processor(path):
    """The checkpoint's processor: tokenizer, chat template and image processor in one."""
    processor = load_pretrained(AutoProcessor, path)
    if not getattr(processor, "chat_template", None) or not hasattr(processor, "image_processor"):
        raise UserError(f"--model {path}: its processor has no chat template or takes no images; "
                        "give an instruction-tuned vision-language model.")
    if "token_type_ids" in processor.model_input_names:  # without, its answers are silently wrong
        raise UserError(f"--model {path}: this family looks at images in both directions, told by "
                        "token_type_ids; `collate` makes none yet (the README's last exercise).")
    # what a trainer left in the tokenizer's files would be defaults of each call of the processor
    tokenizer = processor.tokenizer
    for kwargs in (TextKwargs, processor.image_processor.valid_kwargs):
        for name in kwargs.__annotations__:
            tokenizer.init_kwargs.pop(name, None)
    tokenizer.split_special_tokens = tokenizer.clean_up_tokenization_spaces = False
    try:
        tokenise(tokenizer, INSTRUCTION)
    except Exception as error:  # whatever a field of its files makes of transformers
        raise UserError(f"--model {path}: its tokenizer fails ({first_line(error)}); correct "
                        "tokenizer_config.json, or give another model.")
    return processor


def load_model(path, dtype=torch.float32):
    """The checkpoint's model on this rank's device, weights in `dtype`, and never a random one.

    UserError where weights and config.json do not fit each other, or a weight is no number.
    """
    model, info = load_pretrained(
        AutoModelForImageTextToText, path, dtype=dtype, attn_implementation="sdpa",
        output_loading_info=True, ignore_mismatched_sizes=True)
    model = model.to(device())
    wrong = {"missing": info["missing_keys"], "without a place": info["unexpected_keys"],
             "of another shape": [name for name, *_ in info["mismatched_keys"]],
             "quantised": [name for name, weight in model.named_parameters()
                           if weight.dtype not in (dtype, torch.float32)],
             "not finite": [name for name, weight in model.named_parameters()
                            if not weight.sum(dtype=torch.float32).isfinite()]}
    said = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{' ...' * (len(names) > 3)})"
            for what, names in wrong.items() if names]
    if said:
        raise UserError(f"--model {path}: its weights are not those that its config.json tells of: "
                        f"{', '.join(said)}; copy or download it again, or save it whole.")
    drop_nothing(model)
    return model


def drop_nothing(model):
    """Set each dropout probability, and the noise of routers, to 0 in modules and their configs.

    A sampler drops nothing, so what drops in training is not the policy that answered. The config
    as it was is kept for `export`.
    """
    model.source_config = copy.deepcopy(model.config)
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    for holder in (*model.modules(), *configs):
        layer = "Dropout" in type(holder).__name__
        for name, value in list(vars(holder).items()):
            chance = re.search("drop|jitter", name) or (layer and name == "p")
            if chance and type(value) in (int, float):
                setattr(holder, name, type(value)(0))


def compute_dtype(name):
    """The `--dtype` flag as a torch dtype; auto is bfloat16 on CUDA and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)


def language_weights(model):
    """The parameters of the language model, its head included; the rest is vision's."""
    return {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}


def freeze(model, train_vision, train_connector, train_language):
    """Choose what trains; return the number of trainable weights. The paper: the language alone."""
    language = language_weights(model)
    for name, parameter in model.named_parameters():
        wanted = train_vision
        if parameter in language:
            wanted = train_language
        elif re.search("merger|projector|connector|aligner", name):
            wanted = train_connector
        parameter.requires_grad_(wanted)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if count == 0:
        raise UserError("nothing is left to train; give --train_language, --train_connector or "
                        "--train_vision.")
    return count


def banned_ids(processor):
    """Ids that must never be sampled: a placeholder in a completion has no image behind it."""
    names = ("image_token_id", "video_token_id")
    return [getattr(processor, n) for n in names if getattr(processor, n, None) is not None]


class Policy(torch.nn.Module):
    """A model behind one forward: batch in, log-probabilities of the completion tokens out.

    FSDP2 gathers weights in the forward of the module they belong to. All that touches weights runs
    inside this one forward; a call of the inner model or the head from outside would meet shards.
    """

    def __init__(self, model, processor, cache=None, shared=False):
        super().__init__()
        self.model, self.processor = model, processor
        self.banned = banned_ids(processor)
        self.cache = cache  # of image features, where vision is frozen
        self.shared = shared and share_prefixes(model)

    def batch(self, samples):
        """Tensors of answered samples, in the form that this policy computes."""
        if self.shared:
            return pack(samples, self.processor, self.model, self.cache)
        return collate(samples, self.processor, self.cache)

    def forward(self, batch, temperature):
        """Log-probabilities and entropies of the completion tokens: (B, C), nats, 0 on padding.

        `batch` comes from `collate` or from `pack`. The distribution is softmax(logits /
        temperature) without the banned ids, in float32: what an engine samples from at top_p = 1.
        """
        mask, targets = batch["mask"], batch["completion_ids"][batch["mask"]]  # (B, C), (N,)
        with remembered(self.model.base_model, batch["images"], self.cache):
            out = self.model.base_model(**batch["inputs"], use_cache=False)
        # (rows, L, H) to (N, H): a token is predicted at the one before it, wherever that stands
        hidden = out.last_hidden_state.flatten(0, 1)[batch["predictors"][mask]]
        size = max(1, HEAD_NUMBERS // len(self.model.get_output_embeddings().weight))
        head = self.token_logprobs
        if len(hidden) > size:  # recomputed in backward: [tokens, vocabulary] never exists whole
            head = functools.partial(checkpoint, head, use_reentrant=False)
        parts = [head(h, t, temperature) for h, t in zip(hidden.split(size), targets.split(size))]
        blank = torch.zeros(mask.shape, device=mask.device)
        logprobs, entropies = (blank.masked_scatter(mask, torch.cat(p)) for p in zip(*parts))
        if "pixel_values" not in batch["inputs"]:
            # HAZARD: FSDP reduces the same gradients on every rank, and this batch has none for a
            # vision tower that trains: its weights are touched with weight 0
            language = {*self.model.get_decoder().parameters()}
            idle = [p for p in self.model.parameters() if p.requires_grad and p not in language]
            logprobs = logprobs + 0.0 * sum(p.sum() for p in idle)
        return logprobs, entropies

    def token_logprobs(self, hidden, targets, temperature):
        """(N, H) hidden states and (N,) targets to (N,) log-probabilities and (N,) entropies."""
        logits = self.model.get_output_embeddings()(hidden).float() / temperature  # (N, V)
        with torch.no_grad():  # what has no chance has no gradient
            logits[:, self.banned] = torch.finfo(logits.dtype).min
        logprobs = logits.log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def shard(policy, dtype):
    """Shard `policy` over the ranks by FSDP2: float32 master weights, compute in `dtype`.

    A decoder layer is a group; the rest is the root's: tied embeddings and head, which must share
    one, and the vision tower, which a rank without images never calls (see Policy.forward). One
    rank in float32 has nothing to share out or to cast, and stays as it is.
    """
    if world_size() == 1 and dtype == torch.float32:
        return policy
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer, mp_policy=mixed)
    return fully_shard(policy, mp_policy=mixed)


# ---------------------------------------------------------------------------------------------
# Batches


@functools.lru_cache(maxsize=64)
def image_inputs(image_processor, source):
    """One image's tensors (`pixel_values`, its grid, ...), remembered for the G completions."""
    return dict(image_processor(images=[open_image(source)], return_tensors="pt"))


def padded(lists, value):
    """Lists of numbers as a tensor on this rank's device, filled up with `value` on the right."""
    width = max(1, max(map(len, lists)))
    return torch.tensor([x + [value] * (width - len(x)) for x in lists], device=device())


def collate(samples, processor, cache=None):
    """Samples to tensors on this rank's device; a row is prompt, completion, padding on the right.

    Masks come from lengths, never from token ids: padding and EOS may share one. Returns `inputs`
    (the model's own arguments), `images` (whose features `cache` has to supply), `completion_ids`,
    `mask` and `predictors`, all three (B, C) with C the longest completion. A token's predictor is
    the place of the token before it when the rows of `inputs` are laid end to end.
    """
    rows = [s.prompt_ids + s.completion_ids for s in samples]
    # any id but an image's; some tokenizers have none for padding
    ids = processor.tokenizer.pad_token_id, processor.tokenizer.eos_token_id, *range(9)
    pad = next(i for i in ids if i is not None and i not in banned_ids(processor))
    inputs = {"input_ids": padded(rows, pad)}
    inputs["attention_mask"] = padded([[1] * len(r) for r in rows], 0)
    if "mm_token_type_ids" in processor.model_input_names:  # 1 on an image's placeholders
        image = processor.image_token_id
        inputs["mm_token_type_ids"] = padded([[int(t == image) for t in r] for r in rows], 0)
    images = [i for s in samples for i in s.images]  # in reading order
    look = cache.inputs if cache else functools.partial(image_inputs, processor.image_processor)
    parts = [look(i) for i in images]
    for name in parts[0] if parts else ():  # joined along the first axis
        inputs[name] = torch.cat([p[name] for p in parts]).to(device())
    completions = [s.completion_ids for s in samples]
    width = inputs["input_ids"].shape[1]
    places = [[i * width + len(s.prompt_ids) + k - 1 for k in range(len(s.completion_ids))]
              for i, s in enumerate(samples)]
    return {"inputs": inputs, "images": images, "completion_ids": padded(completions, pad),
            "mask": padded([[True] * len(c) for c in completions], False),
            "predictors": padded(places, 0)}


def split_rows(samples, budget):
    """Lists of samples, alike in length, that `collate` makes at most `budget` tokens of.

    Each costs as much as the longest beside it; a sample above the budget goes alone.
    """
    parts = []
    for s in sorted(samples, key=Sample.length):
        if parts and (len(parts[-1]) + 1) * s.length() <= budget:
            parts[-1].append(s)
        else:
            parts.append([s])
    return parts


def split_groups(samples, budget):
    """The same for `pack`, where a prompt counts once and nothing is padded.

    A group of answers to one prompt is cut only if it is above the budget by itself.
    """
    groups = {}
    for s in sorted(samples, key=Sample.length):
        groups.setdefault(s.id, []).append(s)
    parts, tokens = [], 0
    for group in sorted(groups.values(), key=lambda group: group[-1].length()):
        prompt = len(group[0].prompt_ids)
        if not parts or tokens + prompt + sum(len(s.completion_ids) for s in group) > budget:
            parts.append([])
            tokens = 0
        tokens += prompt
        for s in group:
            tokens += len(s.completion_ids)
            if tokens > budget and parts[-1]:
                parts.append([])
                tokens = s.length()
            parts[-1].append(s)
    return parts


def micro_batches(samples, budget, shared):
    """Samples split by tokens; empty lists last, so that ranks have equally many. COLLECTIVE."""
    parts = split_groups(samples, budget) if shared else split_rows(samples, budget)
    return parts + [[]] * (max(1, *gather([len(parts)])) - len(parts))


# ---------------------------------------------------------------------------------------------
# Shared prefix: a prompt once and all its completions after it, each blind to the others. What
# comes out is what `collate` gives, to rounding; a prompt with G completions costs P + G C tokens
# instead of G (P + C)


@dataclass
class Branches:
    """Who sees whom in a packed row, which is all prompts, end to end, and then all completions.

    On a CPU attention is computed on rectangles: prompts (P, L) and completions (P, n, C), with n
    the most completions that a prompt has here. `slots` (T,) says where in the two, laid end to
    end, each token of the row stands. `block_mask` is the same relation for flex attention.
    """

    shape: tuple[int, int, int, int]  # P, L, n, C
    slots: torch.Tensor
    bias: torch.Tensor | None  # (P, 1, 1, L), -inf on the padding of prompts; None: there is none
    block_mask: BlockMask | None = None

    def mask_blocks(self):
        """The relation token by token, for flex attention."""
        P, L, n, C = self.shape
        branch = (self.slots - P * L) // C  # (T,), below 0 in prompts
        family = torch.where(branch < 0, self.slots // L, branch // n)

        def sees(_, head, q, k):  # what came before, of the prompt or of one's own completion
            related = (branch[k] < 0) | (branch[q] == branch[k])
            return (family[q] == family[k]) & related & (q >= k)

        T = len(self.slots)
        self.block_mask = create_block_mask(sees, None, None, T, T, device=self.slots.device)

    def attend(self, module, query, key, value, scaling):
        """Attention over the row: query (1, heads, T, D) to (1, T, heads, D)."""
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        if self.block_mask is not None:
            flex = compiled_flex_attention() if query.is_cuda else flex_attention
            out = flex(query, key, value, block_mask=self.block_mask, scale=scaling)
            return out.transpose(1, 2)
        (q, own_q), (k, own_k), (v, own_v) = map(self.rectangles, (query, key, value))
        # a prompt is an ordinary row: causal, with its padding on the right, where nobody looks
        first, _ = sdpa_attention_forward(module, q, k, v, None, scaling=scaling, is_causal=True)
        bias = None if self.bias is None else self.bias.to(q.dtype)
        rest = TwoPartAttention.apply(own_q, k, v, own_k, own_v, bias, scaling)
        out = torch.cat([first.flatten(0, 1), rest.transpose(1, 2).flatten(0, 1)])
        return out[self.slots][None]

    def rectangles(self, x):
        """(1, heads, T, D) to prompts (P, heads, L, D) and completions (P * n, heads, C, D)."""
        P, L, n, C = self.shape
        x = x[0].transpose(0, 1)  # (T, heads, D)
        blank = x.new_zeros(P * (L + n * C), *x.shape[1:])
        prompts, rest = blank.index_put((self.slots,), x).split([P * L, P * n * C])
        return (prompts.unflatten(0, (P, L)).transpose(1, 2),
                rest.unflatten(0, (P * n, C)).transpose(1, 2))


class TwoPartAttention(torch.autograd.Function):
    """Completions attend to their prompt and to themselves, without a copy of the prompt's keys.

    Each part is a flash attention of its own; where they ask their prompt, n siblings are one long
    row. The two outputs are weighed by their shares of the common normaliser. Backward, flash
    attention's own is exact for each part once it is given the common output and normaliser
    (FlashAttention, arXiv 2205.14135, appendix B.2; ring attention does the same).
    """

    @staticmethod
    def forward(ctx, q, k, v, own_k, own_v, bias, scale):
        """q, own_k, own_v (P * n, h, C, D), k and v (P, h, L, D) to (P * n, h, C, D)."""
        P, n = len(k), len(q) // len(k)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        first, total = flash(siblings_together(q, P), k, v, attn_mask=bias, scale=scale)
        rest, own_total = flash(q, own_k, own_v, is_causal=True, scale=scale)
        first, total = siblings_apart(first, n), siblings_apart(total, n)  # totals are logarithms
        common = torch.logaddexp(total, own_total)  # (P * n, h, C)
        out = (first * (total - common).exp()[..., None].to(q.dtype)
               + rest * (own_total - common).exp()[..., None].to(q.dtype))
        ctx.save_for_backward(q, k, v, own_k, own_v, out, common)
        ctx.bias, ctx.scale = bias, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, own_k, own_v, out, common = ctx.saved_tensors
        P, n = len(k), len(q) // len(k)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, *grad_prompt = flash(
            siblings_together(grad, P), siblings_together(q, P), k, v, siblings_together(out, P),
            siblings_together(common, P), 0.0, False, attn_mask=ctx.bias, scale=ctx.scale)
        own_grad_q, *grad_own = flash(
            grad, q, own_k, own_v, out, common, 0.0, True, scale=ctx.scale)
        return siblings_apart(grad_q, n) + own_grad_q, *grad_prompt, *grad_own, None, None


def siblings_together(x, P):
    """(P * n, h, C, ...) to (P, h, n * C, ...)."""
    return x.unflatten(0, (P, -1)).transpose(1, 2).flatten(2, 3)


def siblings_apart(x, n):
    """(P, h, n * C, ...) to (P * n, h, C, ...)."""
    return x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)


def branch_attention(module, query, key, value, attention_mask, branches=None, **kwargs):
    """Attention as transformers calls it, where `branches` knows who sees whom.

    A batch without is an ordinary one, and goes to SDPA.
    """
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return branches.attend(module, query, key, value, kwargs["scaling"]), None


@functools.cache
def compiled_flex_attention():
    """Flex attention as one kernel; uncompiled, it would hold every score at once."""
    return torch.compile(flex_attention)


AttentionInterface.register("branches", branch_attention)
AttentionMaskInterface.register("branches", sdpa_mask)  # for ordinary batches


def share_prefixes(model):
    """Let `model` take packed rows; False where its family cannot, or tells nobody its positions.

    Only the language model's attention is replaced, the vision tower keeps its own.
    """
    text = model.config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or ["full_attention"])}
    bounds = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    # a recurrent layer would carry its state from one branch into the next, one with a window or
    # chunks would see beyond them
    full = kinds == {"full_attention"} and not any(bounds)
    if not full or not hasattr(model.base_model, "get_rope_index"):
        print0("This family cannot branch a prompt (full attention with known positions can): "
               "every completion is computed with its own copy of it, as with --plain.")
        return False
    model.set_attn_implementation({"text_config": "branches"})
    return True


def pack(samples, processor, model, cache=None, flex=None):
    """What `collate` returns, with `inputs` that hold each distinct prompt once, in a single row.

    A completion's positions continue its prompt's, which an image makes fewer than its tokens
    (M-RoPE). Needs `share_prefixes(model)`. `flex` attention is the default on CUDA alone.
    """
    assert model.config.get_text_config()._attn_implementation == "branches", "share_prefixes first"
    groups, place = {}, []  # prompt id to the samples that answer it; where a sample is among them
    for s in samples:
        siblings = groups.setdefault(s.id, [])
        place.append(len(siblings))
        siblings.append(s)
        assert s.prompt_ids == siblings[0].prompt_ids, f"two prompts have the id {s.id}"
    firsts = [replace(siblings[0], completion_ids=[]) for siblings in groups.values()]
    batch = collate(firsts, processor, cache)
    inputs = batch["inputs"]
    ids = inputs.pop("input_ids")  # (P, L)
    held = inputs.pop("attention_mask")
    positions, _ = model.base_model.get_rope_index(
        ids, inputs.pop("mm_token_type_ids"), inputs.get("image_grid_thw"), attention_mask=held)
    held = held.bool()  # (P, L), positions are (3, P, L)
    completions = padded([s.completion_ids for s in samples], 0)
    mask = padded([[True] * len(s.completion_ids) for s in samples], False)  # (N, C), as above

    # the row holds prompts in the order of `groups`, completions in the order of `samples`
    number = {name: i for i, name in enumerate(groups)}
    group = torch.tensor([number[s.id] for s in samples], device=ids.device)  # (N,)
    place = torch.tensor(place, device=ids.device)  # (N,)
    (P, L), C, n = ids.shape, mask.shape[1], max(map(len, groups.values()))
    step = torch.arange(C, device=ids.device)
    inputs["input_ids"] = torch.cat([ids[held], completions[mask]])[None]  # (1, T)
    after = positions.amax((0, 2))[group] + 1
    after = (after[:, None] + step)[mask].expand(3, -1)
    inputs["position_ids"] = torch.cat([positions[:, held], after], 1)[:, None]  # (3, 1, T)
    corner = P * L + (group * n + place) * C
    slots = torch.cat([held.flatten().nonzero().squeeze(1), (corner[:, None] + step)[mask]])
    bias = None
    if not held.all():
        bias = torch.zeros(P, L, device=ids.device).masked_fill(~held, -math.inf)[:, None, None]
    inputs["branches"] = Branches((P, L, n, C), slots, bias)
    if ids.is_cuda if flex is None else flex:
        inputs["branches"].mask_blocks()
    lengths = mask.sum(1)
    start = held.sum() + lengths.cumsum(0) - lengths  # (N,), of each completion in the row
    predictors = start[:, None] + step - 1
    predictors[:, 0] = held.sum(1).cumsum(0)[group] - 1  # the last token of the prompt
    return {"inputs": inputs, "images": batch["images"], "completion_ids": completions,
            "mask": mask, "predictors": predictors}


# ---------------------------------------------------------------------------------------------
# Image features: computed once where vision is frozen


class VisionCache:
    """What a frozen vision tower and connector make of an image, for every later pass over it.

    Each image is computed alone, so that its features depend on nothing else in the batch. At most
    `megabytes` of host memory are held; the image that was asked for longest ago goes first.
    """

    def __init__(self, processor, megabytes):
        self.image_processor = processor.image_processor
        self.limit, self.held = megabytes * 2**20, 0  # bytes
        self.kept = OrderedDict()  # image source to (grid, [features, those of deeper layers ...])
        self.joined = False  # whether base.forward wants those of deeper layers for all images

    def inputs(self, image):
        """What `image_inputs` gives, without pixels: `features` looks for them where it must."""
        known = self.kept.get(image)
        grid = known[0] if known else image_inputs(self.image_processor, image)["image_grid_thw"]
        return {"pixel_values": torch.empty(0), "image_grid_thw": grid}

    def features(self, base, images):
        """The features of `images`, in the form in which `base.forward` asks for them."""
        found = [[f.to(device()) for f in self.look(base, image)[1]] for image in images]
        first, *deeper = zip(*found)
        if self.joined:
            deeper = [torch.cat(layer) for layer in deeper]
        return SimpleNamespace(pooler_output=first, deepstack_features=deeper)

    @torch.inference_mode(False)  # a sampler asks within it, and what is kept is for training too
    @torch.no_grad()
    def look(self, base, image):
        """(grid, features) of an image, computed if it is not known."""
        if image not in self.kept:
            pixels = image_inputs(self.image_processor, image)
            grid = pixels["image_grid_thw"]
            out = type(base).get_image_features(
                base, pixels["pixel_values"].to(device()), grid.to(device()), return_dict=True)
            deeper = getattr(out, "deepstack_features", ())
            self.joined = any(torch.is_tensor(layer) for layer in deeper)  # transformers 5.17
            deeper = deeper if self.joined else [layer[0] for layer in deeper]
            self.kept[image] = grid, [f.cpu() for f in (out.pooler_output[0], *deeper)]
            self.held += sum(f.nbytes for f in self.kept[image][1])
        self.kept.move_to_end(image)
        entry = self.kept[image]
        while self.held > self.limit:
            self.held -= sum(f.nbytes for f in self.kept.popitem(last=False)[1][1])
        return entry


def vision_cache(model, processor, megabytes=1024):
    """A VisionCache where `model`'s vision is frozen and has images as Qwen's, else None."""
    language = language_weights(model)
    trains = any(p.requires_grad for p in model.parameters() if p not in language)
    if trains or not megabytes or not hasattr(model.base_model, "get_rope_index"):
        return None
    return VisionCache(processor, megabytes)


@contextmanager
def remembered(base, images, cache):
    """Within, `base.forward` takes the features of its images from `cache`, if there is one."""
    if cache is None or not images:
        yield
        return
    features = cache.features(base, images)
    base.get_image_features = lambda *_, **__: features  # hides the class's method
    try:
        yield
    finally:
        del base.get_image_features


# ---------------------------------------------------------------------------------------------
# Run folder: args.json, metrics.jsonl, samples/, eval.jsonl, checkpoints/, result.json


def write_text(path, text):
    """Write a file so that a crash at any moment leaves the old one or the new one, whole."""
    write_bytes(path, text.encode())


def write_bytes(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def as_json(value, indent=None):
    """A value as JSON text. RunError where it holds NaN or an infinity, which JSON cannot say."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        odd = [name for name, v in value.items() if re.search(r"NaN|Infinity", json.dumps(v))]
        raise RunError(f"{', '.join(odd)}: not finite, so that it cannot be written as JSON.")


def write_json(path, value):
    write_text(path, as_json(value, indent=1) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(as_json(row) + "\n" for row in rows))


def append_jsonl(path, row):
    """Append a row with one write; `read_jsonl` passes over a line that a crash cut short."""
    line = as_json(row) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def check_wandb(project):
    """UserError, on every rank, where rank 0 lacks the package that --wandb needs. COLLECTIVE."""
    spec = importlib.util.find_spec("wandb") if project else None
    if project and not gather([spec and spec.origin])[0]:  # a mere folder has no origin
        raise UserError("--wandb needs the package wandb; run `pip install wandb`, or leave the "
                        "flag out.")


def start_mirror(out, args):
    """On rank 0 begin, or go on with, the Weights & Biases run that --wandb asks for."""
    if args.wandb and rank() == 0:
        import wandb

        key = out / "wandb_id.txt"  # a run that goes on does so there too
        if not key.exists():
            write_text(key, os.urandom(8).hex())
        try:
            mirror.append(wandb.init(project=args.wandb, id=key.read_text(), name=out.name,
                                     resume="allow", dir=str(out), config=run_arguments(args, out)))
        except Exception as error:  # nobody is logged in, no network, ...
            raise RunError(f"--wandb {args.wandb}: it cannot begin ({error}); run `wandb login` or "
                           "set WANDB_MODE=offline.") from error


def log_row(path, row, prefix=""):
    """Append a row to a log; then send its numbers to the mirror, whose failure is only said."""
    append_jsonl(path, row)
    numbers = {prefix + k: v for k, v in row.items() if isinstance(v, (int, float, dict))}
    try:
        for run in mirror:
            run.log(numbers, step=row["generation_step"])
    except Exception as error:  # whatever it is, training goes on
        mirror.clear()
        print0(f"Weights & Biases failed ({error}); the run goes on without it.")


def read_jsonl(path):
    """All whole lines of a file that `append_jsonl` wrote."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def choose_run(args):
    """The run folder's path, and whether an unfinished run of the same arguments goes on there.

    A folder with another run, a finished one, or other files is refused. Nothing is written yet.
    COLLECTIVE.
    """
    script = Path(sys.argv[0]).stem
    out = Path(args.out or f"runs/{script}_{time.strftime('%Y%m%d_%H%M%S')}")
    out = gather([out])[0]  # two ranks' clocks may differ
    goes_on = (out / "args.json").exists()
    problem, base = None, next(p for p in (out, *out.parents) if p.exists())
    first = {"toy_data", "trial.part", "args.json.part"}  # what a run writes before its args.json
    if not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
        problem = f"cannot be written in {base}"
    elif not goes_on and out.exists() and {p.name for p in out.iterdir()} - first:
        problem = "is not empty and holds no run"
    elif goes_on and (other := other_arguments(out, args)):
        problem = f"holds a run with other arguments ({other})"
    elif goes_on and (out / "result.json").exists():
        problem = "holds a finished run"
    if any(gather([problem])):  # after the ranks have all looked, before rank 0 writes
        raise UserError(f"--out {out} {problem}; give a new folder.")
    return out, goes_on


def other_arguments(out, args):
    """How the run in `out` was called otherwise, in words; "" where `args` mean the same.

    A path may be written in any way and the folder may have moved; a flag that the run did not know
    yet had its default, and one that is gone since meant nothing.
    """
    def meant(value):  # paths made absolute and free of links; other words fare alike
        words = re.split("[,:]", value) if isinstance(value, str) else None
        return [os.path.realpath(word) for word in words] if words else value

    try:
        before = json.loads((out / "args.json").read_text())
        before = {f.name: f.default for f in fields(args)} | before
    except (ValueError, TypeError):
        return "its args.json is no JSON object"
    return ", ".join(f"{name} was {before.get(name)!r}, is {value!r}"
                     for name, value in run_arguments(args, out).items()
                     if name != "out" and meant(before.get(name)) != meant(value))


def run_arguments(args, out):
    return {"script": Path(sys.argv[0]).stem} | asdict(args) | {"out": str(out)}


def begin_run(out, args):
    """Write args.json: from here on the folder is this run's, and a signal names its checkpoint."""
    if rank() == 0:
        write_json(out / "args.json", run_arguments(args, out))
    run_folder.append(out)
    end_on_signal()


def cut_logs(out, last_step):
    """Forget what a stopped run logged after the step that it goes on from."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        if rank() == 0 and (out / name).exists():
            rows = [r for r in read_jsonl(out / name) if r["generation_step"] <= last_step]
            write_jsonl(out / name, rows if last_step else [])


def save_failed_batch(samples, what):
    """Write a batch with something not finite into the run folder, if there is one; say where."""
    if not run_folder:
        return ""
    path = run_folder[0] / f"failed_batch_rank{rank()}.jsonl"
    records = json.dumps([{"not_finite": what} | s.record() for s in samples])
    write_jsonl(path, json.loads(records, parse_constant=str))  # NaN as text
    return f" Its samples are in {path}."


# ---------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder, with the resume state beside the weights


def latest_checkpoint(out):
    """The newest checkpoint of a run, or None. Half-written and torn ones have another name."""
    return max(Path(out).glob("checkpoints/step_??????"), default=None)


def file_hashes(folder):
    """The sha256 of every file in a checkpoint, by its path there; manifest.json is left out."""

    def sha256(path):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet is not whole
            return hashlib.file_digest(file, "sha256").hexdigest()

    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    with ThreadPoolExecutor() as pool:  # a large model has a file a rank
        return dict(zip((str(p.relative_to(folder)) for p in files), pool.map(sha256, files)))


def is_whole(path):
    """Whether a checkpoint's files are what its manifest.json says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return manifest.items() <= file_hashes(path).items()
    except (OSError, ValueError):  # no manifest, or half of one
        return False


def whole_checkpoint(out):
    """The newest checkpoint of a run that is whole, or None; rank 0 looks, for all. COLLECTIVE.

    A torn one is said, and renamed so that nothing takes it for whole again.
    """
    while rank() == 0 and (path := latest_checkpoint(out)) and not is_whole(path):
        aside = path.with_name(path.name + ".torn")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        print0(f"{path} is torn or was changed: it is passed over, and named {aside.name} now.")
    path = gather([latest_checkpoint(out)])[0]
    if path is None:
        print0(f"There is no whole checkpoint in {out}: starting from step 0.")
    return path


def export(folder, model, processor, weights, dtype):
    """Write `weights`, by name, as a Hugging Face folder in `dtype` that says so, like its source.

    A tied head is written once. The generation config is the source's even where transformers would
    not save it: vicuna's and LLaVA's have a temperature without do_sample.
    """
    once = dict(model.named_parameters())  # what is tied has its first name here
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - once
    weights = {name: weight.to(dtype) if name in once else weight  # buffers stay as they are
               for name, weight in weights.items() if name not in again}
    config, generation = model.config, model.generation_config
    model.config = getattr(model, "source_config", config)
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.config, model.generation_config = config, generation
    generation.to_json_file(folder / "generation_config.json")
    processor.save_pretrained(folder)
    name = {"dtype": str(dtype).removeprefix("torch.")}  # not that of the master weights
    said = json.loads((folder / "config.json").read_text(),
                      object_hook=lambda part: part | name if "dtype" in part else part)
    write_json(folder / "config.json", said)
    for path in folder.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(folder / "config.json", path)


def try_saving(out, policy, processor, dtype, total, args):
    """Try before step 1 what a run does first at its end. UserError; nothing stays. COLLECTIVE.

    Writes the files that a checkpoint has beside its weights, and looks whether these have room.
    """
    problem = None
    if rank() == 0:
        trial = Path(out) / "trial.part"
        made = [p for p in (trial, *trial.parents) if not p.exists()]
        try:
            for half in Path(out).glob("checkpoints/*.part"):  # of a crash, and in the way
                shutil.rmtree(half)
            export(trial, policy.model, processor, {}, dtype)
            problem = lack_of_room(out, policy, dtype, total, args)
        except OSError as error:
            problem = f"--out {out}: a checkpoint cannot be written there ({error}); mend that."
        except Exception as error:  # transformers reads some files that it refuses to write
            problem = (f"--model {args.model}: what it holds cannot be saved again "
                       f"({type(error).__name__}: {first_line(error)}); correct its files.")
        shutil.rmtree(made[-1] if made else trial, ignore_errors=True)
    if problem := gather([problem])[0]:
        raise UserError(problem)


def lack_of_room(out, policy, dtype, total, args):
    """A sentence where the disk has no room for one checkpoint; that later ones have none is said.

    One holds the weights in `dtype`, and the float32 master weights and optimiser states.
    """
    size = sum(p.numel() * (dtype.itemsize + 4 + 8 * p.requires_grad) for p in policy.parameters())
    saves = -(-total // (args.save_every or total))
    most = min(saves, args.keep + 1) if args.keep else saves  # an old one goes after a new one came
    free = shutil.disk_usage(out).free
    needs = f"a checkpoint takes {size / 2**20:,.0f} MB, and {free / 2**20:,.0f} MB are free there"
    if free < size:
        return f"--out {out}: {needs}; free some or give another folder."
    if free < size * most:
        print0(f"--out {out}: {needs}: {most} of them will not fit; see --keep and --save_every.")
    return None


def save_checkpoint(out, step, policy, processor, optimizer, dtype, keep=0):
    """Write `checkpoints/step_N`, complete or not at all; then delete all but the newest `keep`.

    0 keeps all. RunError where it cannot be written. COLLECTIVE.
    """
    path = Path(out) / "checkpoints" / f"step_{step:06d}"
    part = path.with_name(path.name + ".part")
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(policy.model, options=whole)  # empty but on rank 0
    model_state, optimizer_state = dcp_state.get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            export(part, policy.model, processor, weights, dtype)
        dist.barrier()
        dcp.save(state, checkpoint_id=part / "resume")
        dist.barrier()
        if rank() == 0:
            write_json(part / "manifest.json", file_hashes(part))
            os.replace(part, path)
            old = sorted(path.parent.glob("step_??????"))
            for folder in old[:-keep] if keep else []:
                shutil.rmtree(folder)
        dist.barrier()  # nobody goes on before it is whole
    except (Exception, CheckpointException) as error:  # what torch and others make of a full disk
        met = next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error
        free = shutil.disk_usage(out).free / 2**20
        raise RunError(f"{path} cannot be saved ({met}); {free:,.0f} MB are free there.") from error


def load_resume_state(path, policy, optimizer):
    """Put a checkpoint's weights and optimiser state back, on any number of ranks; return its step.

    COLLECTIVE.
    """
    model_state, optimizer_state = dcp_state.get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=path / "resume")
    dcp_state.set_state_dict(policy, optimizer, model_state_dict=state["model"],
                             optim_state_dict=state["optimizer"])
    return int(path.name.removeprefix("step_"))
