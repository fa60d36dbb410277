"""Command lines as forks of one process that has imported everything already: a start of Python takes
seconds of imports. A few tests keep the real thing, `command`: python, torchrun, Ctrl-C.
"""

import importlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import utils

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--batch_size 4 --mini_batch_size 4 --group_size 2 --micro_batch_tokens 200 --save_every 1 "
        "--max_new_tokens 60 --warmup_steps 0").split()


def splits(data):
    names = ("train", "validation", "test")
    return [word for n in names for word in (f"--{n}_data", str(data / f"{n}.jsonl"))]


def command(*words, ranks=1):
    """The words of `python script ...`, or of torchrun with several ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    return [*([sys.executable] if ranks == 1 else [*torchrun, str(ranks), "--"]), *map(str, words)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def group_of(ranks):
    """The environment in which ranks that nobody's torchrun started find each other."""
    return {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


# ---------------------------------------------------------------------------------------------
# Forks


def stage(words):
    """A script of ours to its end, as `python script ...` runs it; its functions can be replaced before."""
    module = importlib.import_module(Path(words[0]).stem)
    utils.run_script(module.main, module.Args)


def elsewhere(words):
    """A script in a folder that nothing of ours can be imported from, or its tests: `pytest` and more words."""
    for name, module in [*sys.modules.items()]:
        if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "tests"):
            del sys.modules[name]
    sys.path[:] = [os.getcwd(), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests"))]
    if words[0] == "pytest":
        sys.exit(pytest.main(words[1:]))
    runpy.run_path(words[0], run_name="__main__")


def one_rank(act, words, folder, environment, logs, fault):
    """What a forked process does: its output goes to files; the fault is prepared; the script."""
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    torch.set_num_threads(1)
    sys.argv = words
    if fault:
        fault()
    act(words)


def fork(*words, act=stage, ranks=1, fault=None, folder=ROOT):
    """Run a script to its end; its processes' exit codes, what stands on stdout, and on stderr."""
    with pytest.MonkeyPatch.context() as patch:  # the first time it is started, and warmed
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.set_forkserver_preload(["warm"])
        multiprocessing.forkserver.ensure_running()
    environment = os.environ | (group_of(ranks) if ranks > 1 else {})
    with tempfile.TemporaryDirectory() as place:
        logs = [Path(place, "stdout"), Path(place, "stderr")]
        for log in logs:
            log.touch()
        kind = multiprocessing.get_context("forkserver").Process
        processes = [kind(target=one_rank, args=(
            act, [*map(str, words)], folder, environment | ({"RANK": str(i)} if ranks > 1 else {}), logs, fault))
            for i in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.time() + 100
        for process in processes:
            process.join(max(0, deadline - time.time()))  # without an end there is no exit code
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes, *(log.read_text() for log in logs)


def run(*words, ranks=1, code=0, fault=None, real=False):
    """Run a script to its end; return the JSON of its last line of stdout, and its stderr.

    A `real` one is started as a user starts it, several ranks of it by torchrun.
    """
    if real:
        done = subprocess.run(command(*words, ranks=ranks), cwd=ROOT, capture_output=True, text=True, timeout=300)
        codes, out, err = [done.returncode] * ranks, done.stdout, done.stderr
    else:
        codes, out, err = fork(*words, ranks=ranks, fault=fault)
    assert codes == [code] * ranks, err[-3000:]
    return (json.loads(out.splitlines()[-1]) if code == 0 else None), err


def at_call(number, place, act, only=None):
    """Replace the function at `place`, module.name: its n-th call is `act(original, *arguments)`."""
    if only in (None, utils.rank()):
        module, _, name = place.rpartition(".")
        module = importlib.import_module(module)
        original, calls = getattr(module, name), itertools.count(1)
        setattr(module, name, lambda *values, **more: (
            partial(act, original) if next(calls) == number else original)(*values, **more))


def resumable_throughout():
    """Of a forked run: no checkpoint loses what it resumes by, so that a test can go back to any of them."""
    utils.thin_out = lambda *_: None


# ---------------------------------------------------------------------------------------------
# What is looked for in logs


def timeless(path):
    """The rows of a log without what differs by machine: clocks, memory, the number of ranks."""
    return [{k: v for k, v in row.items() if not re.search("seconds|memory|ranks", k)}
            for row in utils.read_jsonl(path)]


def all_finite(rows):
    """No NaN and no infinity in a log; a ratio without a denominator is None, the words are a dict."""
    values = [v for row in rows for v in row.values() if v is not None]
    return all(math.isfinite(n) for v in values for n in (v.values() if isinstance(v, dict) else [v]))
