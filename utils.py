"""What every stage needs and no lesson is about: flags, ranks, how a run ends, its folder.

Small and boring on purpose: nothing here knows what is trained, on what, or how. Read it last.
"""

import os
import signal
import sys

script, here = (os.path.dirname(os.path.realpath(path)) for path in (sys.argv[0], __file__))
if script == here and os.path.isfile(sys.argv[0]):
    # a stage runs: Ctrl-C is no traceback, not even during the imports below
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import atexit
import ctypes
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import re
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

run_folder = []  # of this process, once `begin_run` has written it: what an error message names
mirror = []  # the Weights & Biases run of this process, once `start_mirror` has begun it
# flags that no number of a run depends on: it goes on under any. Not those that cut work in other
# parts, whose sums round otherwise, nor what is measured when
FREE = ("out", "keep", "save_every", "engine_timeout", "reward_timeout", "wandb")


# ---------------------------------------------------------------------------------------------
# Flags, and the ways a script ends


class UserError(Exception):
    """A mistake in what the user gave: one sentence on stderr, exit code 2, no traceback."""


class RunError(Exception):
    """What ends a run that began well: a sentence from each rank that met it, exit code 1.

    Where the same command would end in the same way, it is said `again`.
    """

    def __init__(self, sentence, again=False):
        super().__init__(sentence)
        self.again = again


def parse_args(Args, argv=None):
    """Turn the dataclass `Args` into a command line: a field is a flag, its comment is its help.

    What the comment says of a flag's values holds: see `refusal`. A ~ that begins a path is the
    home folder. `args.given` names the flags that stood on the command line.
    """
    purpose = sys.modules[Args.__module__].__doc__.split("\n\n")[0]
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=purpose, formatter_class=style, allow_abbrev=False)

    def complain(message):
        message = re.sub("argument (\\S+): expected one argument", r"\1 needs a value", message)
        message = re.sub("argument (\\S+): invalid (int|float) value: ",
                         lambda m: f"{m[1]} must be a {m[2]}, not ", message)
        message = message.replace("a float,", "a number,").replace("a int,", "a whole number,")
        end_by_mistake(f"error: {message}; see --help.")

    parser.error = complain
    docs = dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(Args), re.M))
    for f in fields(Args):
        if f.type is list:  # what stands without a flag
            many = "*" if "empty:" in docs[f.name] else "+"
            parser.add_argument(f.name, nargs=many, help=docs[f.name], type=at_home)
            continue
        kind = {"type": at_home if f.type is str else f.type}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            kind = {"choices": get_args(f.type)}
        text = docs[f.name].replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    words = sys.argv[1:] if argv is None else argv
    if reason := misspelt(words, {f.name: f.type for f in fields(Args) if f.type is not list}):
        parser.error(reason)
    args = Args(**vars(parser.parse_args(words)))
    for f in fields(Args):
        if reason := refusal(f, docs[f.name], getattr(args, f.name)):
            parser.error(f"--{f.name} {reason}")
    args.given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return args


def at_home(text):
    """A flag's text; each ~ at its begin or after a comma is the home folder, as in a shell."""
    return re.sub(r"(^|,\s*)(~[^/,:]*)", lambda m: m[1] + os.path.expanduser(m[2]), text.strip())


def misspelt(words, kinds):
    """What is no flag among `words`, or a switch with a value, and the remedy; None where all fit.

    `kinds` has each flag's type by its name.
    """
    flags = {name: f"--{name}" for name in ("help", *kinds)}
    flags |= {f"no_{name}": f"--no-{name}" for name, kind in kinds.items() if kind is bool}
    for word, after in zip(words, [*words[1:], "--"]):
        if word == "--":
            return None
        flag, given, value = word.partition("=")
        name = re.sub(r"\W+", "_", flag.lower()).strip("_")
        if flag == flags.get(name):
            switch = name if name in kinds else name.removeprefix("no_")
            truth = after.strip().lower() in ("", "true", "false", "yes", "no", "1", "0")
            if kinds.get(switch) is bool and (given or truth):
                return f"--{switch} takes no value: write --{switch} or --no-{switch}"
            if value == "--":  # HAZARD: which argparse makes an empty list
                return f"{flag} needs a value"
        elif re.match(r"[-–—]+(?!h$|inf$|nan$)[A-Za-z]\S*$", flag):
            part = [n for n in flags if n in name.split("_")]  # as lr in lr_rate
            near = (difflib.get_close_matches(name, flags, 1, 0.8) or part
                    or difflib.get_close_matches(name, flags, 1))
            hint = f": did you mean {flags[near[0]]}?" if near else ""
            return f"unrecognized arguments: {flag}{hint}"
    return None


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
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    if above and below:
        return None
    return (f"must be {'0, or ' * (zero and float(low) > 0)}"
            f"{'at least' if left == '[' else 'above'} {low} and "
            f"{'at most' if right == ']' else 'below'} {high}, not {value}")


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


def run_script(main, Args):
    """Parse the flags, join the other ranks, run `main(args)`, print what it returns as JSON.

    Exit codes: 2 for a user's mistake, 1 for a run that failed, 128 + signal number for Ctrl-C and
    SIGTERM. A bug keeps its traceback; what a disk, a file or another rank does is a sentence.
    """
    end_on_signal()
    args = parse_args(Args)
    try:
        start_ranks()
        result = main(args)
        if rank() == 0:
            print(as_json(result), flush=True)
    except UserError as error:
        end_by_mistake(error)
    except (RunError, OSError) as error:
        began = run_folder or isinstance(error, RunError)
        end_run(f"rank {rank()}: {str(error).rstrip('.')}.", 1 if began else 2,
                getattr(error, "again", False))
    except SystemExit as error:
        if run_folder:  # nothing of ours leaves a run in this way
            end_run(f"rank {rank()}: something called sys.exit({error.code}).", 1)
        raise
    except (RuntimeError, MemoryError) as error:
        reason = first_line(error)
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or "can't allocate memory" in reason:
            end_run(f"rank {rank()}: out of memory ({reason}); lower --micro_batch_tokens, "
                    "--rollout_batch_size or --max_new_tokens.", 1, again=True)
        if not re.search("gloo|NCCL", str(error)):  # what speaks when a collective fails
            raise
        end_run(f"rank {rank()}: another rank is gone ({reason}).", 1)


def end_by_mistake(sentence):
    """Leave with exit code 2; rank 0 says why, or whoever is alone in this.

    HAZARD: every rank meets the same mistake, and torchrun ends all as soon as one has ended.
    """
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if rank() and torchrun:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # in silence
        time.sleep(30 + int(os.environ["LOCAL_RANK"]))
    if rank() == 0 or torchrun:
        tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(sentence).split())}", file=sys.stderr)
    sys.exit(2)


def end_run(reason, code, again=False):
    """Leave this process at once; say why, and from where a command goes on.

    The same one, but where that would only end `again`. The other ranks may wait for this one in a
    collective for ever: torchrun ends them. Every file of a run is whole at every moment, so
    leaving at any moment is safe.
    """
    where = "No run folder was written."
    if run_folder:
        last = latest_checkpoint(run_folder[0])
        where = f"The last whole checkpoint is {last}." if last else "There is no checkpoint yet."
        where += f" The same command with --out {run_folder[0]} goes on." if not again else (
            " The same command would meet this again: change what led to it (--lr, --dtype, the "
            f"data, ...), and begin with another --out{f' and --model {last}' if last else ''}.")
    try:  # not by print0: whoever holds its lock may be waiting in a collective
        sys.stderr.write(f"\n{reason} {where}\n")
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

    A KeyboardInterrupt is swallowed by destructors, and made another error by imports. And Python
    runs a signal's handler between two bytecodes, so a rank that waits inside a collective would
    never run it; the wake-up descriptor is written by the C handler itself, and a thread reads it.
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


def show(bar, step, values):
    """Put a step's values behind its bar; where stderr is no terminal, write both as one line."""
    bar.set_postfix(values)
    if bar.disable:
        first, began = vars(bar).setdefault("first", (step, time.time()))
        print0(bar.format_meter(step, bar.total, time.time() - began, initial=first, prefix="step",
                                postfix=bar.postfix))


def start_ranks():
    """Join the process group that torchrun made room for, or form a group of one."""
    share_cores()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    else:  # keep what tensors free for the next ones: the kernel clears each page it takes back
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # glibc's, see mallopt(3)
        for name in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(name, 2**31 - 1)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = next(rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # HAZARD: torchrun keeps its store over a restart, and a rank that reads a dead one's
        # address there waits for it for ever (pytorch#135712). Only on one machine is this count
        # everyone's
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # a dead rank's connection closes at once, and each call that may hang has its own watchdog: the
    # default of 30 minutes would end a rank that waits for another's slow step
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(),
                            timeout=timedelta(days=10_000))
    # after the ends of all that is begun later and needs the group, or takes it along, as vLLM does
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def share_cores():
    """Give each of torchrun's ranks its part of the cores; torchrun itself leaves them one each."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))


def forget_peak_memory():
    """From here on `peak_memory` counts anew, on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """The most memory this process has held, in bytes: the GPU's, without vLLM's pool; or its own.

    HAZARD: PyTorch counts what vLLM holds, asleep or not; Linux counts kilobytes, macOS bytes.
    """
    if torch.cuda.is_available():
        cumem = sys.modules.get("vllm.device_allocator.cumem")
        pool = cumem and cumem.CuMemAllocator.instance
        return torch.cuda.max_memory_allocated() - (pool.get_current_usage() if pool else 0)
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sum_over_ranks(values):
    """Sum a dictionary of numbers over ranks, in float64. COLLECTIVE: same keys, in one order."""
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def gather(items):
    """The ranks' lists joined, in rank order, on every rank. COLLECTIVE."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def refuse_together(problem):
    """UserError on all ranks with the first one's `problem`; None has none. COLLECTIVE."""
    if problem := next(filter(None, gather([problem])), None):
        raise UserError(problem)


# ---------------------------------------------------------------------------------------------
# Run folder: args.json, data.json, metrics.jsonl, samples/, eval.jsonl, checkpoints/, result.json


def find(path):
    """Where a path leads from here or, if nowhere, from this file's folder: the toy lies there."""
    beside = Path(here, path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else Path(path)


def write_bytes(path, content):
    """Write a file so that a crash at any moment leaves the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_text(path, text):
    write_bytes(path, text.encode())


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


def read_jsonl(path):
    """All whole lines of a file that `append_jsonl` wrote."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


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


def choose_run(args, longer=False):
    """The run folder's path, and whether an unfinished run of the same arguments goes on there.

    A folder with another run, a finished one, or other files is refused. Where the run may be
    `longer`, --epochs and --max_steps are left to `refuse_shorter`. COLLECTIVE.
    """
    out = args.out or f"runs/{Path(sys.argv[0]).stem}_{time.strftime('%Y%m%d_%H%M%S')}"
    out = Path(gather([out])[0])  # two ranks' clocks may differ
    problem, goes_on, remedy = None, False, "give a new folder"
    try:
        goes_on = (out / "args.json").exists()
        base = next(p for p in (out, *out.parents) if p.exists())
        other, newest = other_arguments(out, args) if goes_on else {}, latest_checkpoint(out)
        lengths = {name: other.pop(name) for name in ("epochs", "max_steps") if name in other}
        if not base.is_dir() or not os.access(base, os.W_OK | os.X_OK):
            problem = f"cannot be written in {base}"
        elif not goes_on and out.exists() and {p.name for p in out.iterdir()} - {"args.json.part"}:
            problem = "is not empty and holds no run"
        elif other or lengths and not longer:
            words = other if longer else other | lengths
            problem = f"holds a run with other arguments ({', '.join(words.values())})"
            if not other:  # of a schedule that ends with the run
                problem += ", which set its learning rates"
                remedy = f"train on with --model {newest} and another --out" if newest else remedy
        elif not lengths and (out / "result.json").exists():
            problem = f"holds a finished run{', which a larger --max_steps would extend' * longer}"
    except OSError as error:
        problem = f"cannot be read ({error})"
    refuse_together(problem and f"--out {out} {problem}; {remedy}.")  # before rank 0 writes
    return out, goes_on


def other_arguments(out, args):
    """How the run in `out` was called otherwise, in words by flag; {} where `args` mean the same.

    A path may be written in any way, the folder may have moved, and data that data.json tells of; a
    flag that the run did not know yet had its default, and one that is gone since meant nothing.
    """
    paths = {f.name: "^[^:]+" for f in fields(args) if f.name.endswith("data")}  # without a split
    paths["image_root"] = ".+"
    free = (*FREE, *paths) if (out / "data.json").exists() else FREE
    paths |= {"model": ".+", "rewards": r"[^,:]+\.py(?=:)"}

    def meant(name, value):  # paths made absolute and free of links; other words as they are
        if name not in paths or not isinstance(value, str):
            return value
        return re.sub(paths[name], lambda path: os.path.realpath(path[0]), value)

    try:
        before = json.loads((out / "args.json").read_text())
        before = {f.name: f.default for f in fields(args)} | before
    except (ValueError, TypeError, RecursionError):
        return {"": "its args.json is no JSON object"}
    return {name: f"{name} was {before.get(name)!r}, is {value!r}"
            for name, value in run_arguments(args, out).items()
            if name not in free and meant(name, before.get(name)) != meant(name, value)}


def refuse_shorter(out, steps_per_epoch, total):
    """UserError where the run in `out` was to take more than `total` steps, or has. COLLECTIVE."""
    problem = None
    if (out / "args.json").exists():
        before = json.loads((out / "args.json").read_text())
        steps = min(steps_per_epoch * before["epochs"], before["max_steps"] or math.inf)
        if steps > total or steps == total and (out / "result.json").exists():
            problem = (f"--out {out} holds a run of {steps} steps, --max_steps and --epochs ask "
                       f"for {total}: give larger ones, or a new folder.")
    refuse_together(problem)


def run_arguments(args, out):
    return {"script": Path(sys.argv[0]).stem} | asdict(args) | {"out": str(out)}


def begin_run(out, args, record=None):
    """Write args.json, and data.json: the folder is this run's now, and what ends it names it."""
    if rank() == 0:
        (out / "result.json").unlink(missing_ok=True)  # first: of a run that is made longer
        write_json(out / "args.json", run_arguments(args, out))
        if record:
            write_json(out / "data.json", record)
    run_folder.append(out)


def cut_logs(out, last_step):
    """Forget what a stopped run logged after the step that it goes on from."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        if rank() == 0 and (out / name).exists():
            rows = [r for r in read_jsonl(out / name) if r["generation_step"] <= last_step]
            write_jsonl(out / name, rows if last_step else [])


def stop_if_not_finite(value, what, samples):
    """End the run rather than spoil the weights; the batch is named, and kept for inspection."""
    if not torch.isfinite(value):
        where = ""
        if run_folder:
            path = run_folder[0] / f"failed_batch_rank{rank()}.jsonl"
            records = [{"not_finite": f"{what}: {value.item()}"} | s.record() for s in samples]
            records = json.loads(json.dumps(records), parse_constant=str)  # NaN as text
            write_jsonl(path, records)
            where = f" Its samples are in {path}."
        names = sorted({s.id for s in samples})
        raise RunError(f"the {what} is {value.item()} on the prompts {names}; this batch has not "
                       f"changed the weights.{where}", again=True)


# ---------------------------------------------------------------------------------------------
# Checkpoints: what `policy.export` writes, with the resume state beside it


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
    with ThreadPoolExecutor() as pool:  # large ones have a file a rank
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

    A torn one is said, and renamed for good. UserError where the next one has weights alone.
    """
    while rank() == 0 and (path := latest_checkpoint(out)) and not is_whole(path):
        aside = path.with_name(path.name + ".torn")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        print0(f"{path} is torn or was changed: it is passed over, and named {aside.name} now.")
    path = gather([latest_checkpoint(out)])[0]
    if path is None:
        print0(f"There is no whole checkpoint in {out}: starting from step 0.")
    elif '"resume/' not in (path / "manifest.json").read_text():  # step 0 would cut the logs
        raise UserError(f"--out {out} cannot go on: {path} is whole and has no optimiser's state; "
                        f"begin a new run from its weights with --model {path} and another --out.")
    return path


def try_saving(out, policy, dtype, total, args):
    """Try before step 1 what a run does first at its end. UserError; nothing stays. COLLECTIVE.

    Writes the files that a checkpoint has beside its weights, and looks whether these have room: in
    `dtype`; and, of those that train, in float32 and as the optimiser's two states.
    """
    weights = sum(p.numel() * dtype.itemsize for p in policy.parameters()) / 1e9  # GB, as all here
    resume = sum(12 * p.numel() for p in policy.parameters() if p.requires_grad) / 1e9
    saves = -(-total // (args.save_every or total))
    saves += args.epochs // args.eval_every if args.keep_best else 0  # each may be the best so far
    most = min(saves, (args.keep or saves) + 1 + bool(args.keep_best)) * weights
    most += min(saves, 2) * resume  # what is old goes after the new one came
    problem = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            policy.export(Path(folder), dtype, weights=False)
    except Exception as error:  # files that can be read and not written again
        problem = (f"a checkpoint cannot be saved ({type(error).__name__}: {first_line(error)}); "
                   "correct the files that --model names")
    if rank() == 0:
        for half in out.glob("checkpoints/*.part"):  # of a crash, and in the way
            shutil.rmtree(half)
        free = shutil.disk_usage(next(p for p in (out, *out.parents) if p.exists())).free / 1e9
        needs = f"{free:,.3f} GB are free there, a checkpoint takes {weights + resume:,.3f} GB"
        if free < weights + resume:
            problem = problem or f"{needs}; free some or give another folder"
        elif free < most:
            print0(f"--out {out}: {needs}, all {most:,.3f} GB: --keep, --keep_best, --save_every.")
    refuse_together(problem and f"--out {out}: {problem}.")


def resume_state(policy, optimizer):
    """What trains, weights and optimiser state; what is frozen comes from --model. COLLECTIVE."""
    weights = policy.state_dict()  # FSDP shards first what a forward has left gathered
    trained = {name: weights[name] for name, p in policy.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}


def thin_out(newest, keep, best):
    """Keep the newest `keep` (0: all) and step `best`; in all but the newest the weights alone."""
    paths = sorted(newest.parent.glob("step_??????"))
    for path in paths:
        if keep and path not in paths[-keep:] and path.name != f"step_{best:06d}":
            shutil.rmtree(path)
        elif path != newest and (path / "resume").exists():
            hashes = json.loads((path / "manifest.json").read_text())
            weights = {name: h for name, h in hashes.items() if not name.startswith("resume/")}
            write_json(path / "manifest.json", weights)  # first, so that it is whole throughout
            shutil.rmtree(path / "resume")


def save_checkpoint(out, step, policy, optimizer, dtype, keep=0, best=0):
    """Write `checkpoints/step_N`, complete or not at all; RunError where it cannot. COLLECTIVE."""
    path = Path(out) / "checkpoints" / f"step_{step:06d}"
    part = path.with_name(path.name + ".part")
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        policy.export(part, dtype)
        dist.barrier()
        dcp.save(resume_state(policy, optimizer), checkpoint_id=part / "resume")
        dist.barrier()
        if rank() == 0:
            write_json(part / "manifest.json", file_hashes(part))
            os.replace(part, path)
            thin_out(path, keep, best)
        dist.barrier()  # nobody goes on before it is whole
    except (Exception, dcp.CheckpointException) as error:  # what a full disk becomes
        met = next(iter(error.failures.values()))[0] if hasattr(error, "failures") else error
        free = shutil.disk_usage(out).free / 2**20
        raise RunError(f"{path} cannot be saved ({met}); {free:,.0f} MB are free there.") from error


def load_resume_state(path, policy, optimizer):
    """Put a checkpoint's state back, on any number of ranks; return its step. COLLECTIVE."""
    states = resume_state(policy, optimizer)
    dcp.load(states, checkpoint_id=path / "resume")  # into the weights themselves
    dcp_state.set_optimizer_state_dict(policy, optimizer, states["optimizer"])
    return int(path.name.removeprefix("step_"))
