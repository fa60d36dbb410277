"""Scoring: which rewards a run has, and what each sample earns.

--rewards names built-in ones and functions in files of the user's own, each with its weight; a
sample's reward is their weighted sum, or `unfinished` alone where that is not 0. A file is a module
like any other, with its helpers beside it: pools can start workers from it, and what it does wrong
is one sentence with its line. There is no registry to enter functions in; a path and a name are
enough. And None is no 0: what cannot be scored is left out of the sum, and a sample that nothing
scored has no advantage.

    python train_grpo.py --rewards accuracy:1.0,language:1.0
    torchrun --standalone --nproc_per_node 8 train_grpo.py --rewards accuracy:1.0,mine.py:brief:0.5
"""

import importlib.machinery
import os
import re
import sys
import traceback
from functools import partial

from reward import (
    accuracy_reward, format_reward, language_reward, overlong_penalty, unfinished_penalty)
from utils import RunError, UserError, watchdog

REWARDS = {  # what --rewards can name: functions of the samples, a number or None for each
    "accuracy": lambda samples: [accuracy_reward(s.completion_text, s.answer) for s in samples],
    "language": lambda samples: [language_reward(s.completion_text) for s in samples],
    "format": lambda samples: [format_reward(s.completion_text) for s in samples],
    "unfinished": unfinished_penalty, "overlong": overlong_penalty}
LARGEST_REWARD = 1e15  # float32, in which advantages are computed, still holds its square
FOLDERS = set()  # of the reward files that were loaded


def load_rewards(spec: str, max_new_tokens: int = 2048) -> dict[str, tuple]:
    """"accuracy:1.0,my_file.py:my_function:0.5" -> {name: (function of the samples, weight)}.

    A function that is named like another gets its file's name too: my_file.my_function.
    """
    overlong = partial(overlong_penalty, max_length=max_new_tokens, buffer=max_new_tokens / 4)
    rewards, files = {}, {"": REWARDS | {"overlong": overlong}}
    if re.search(r"[;|&]|:\s*[-\d.]+\s*[+\s]\s*\w", spec):
        raise UserError(f"--rewards {spec}: write a comma between rewards")
    parts = [[word.strip() for word in p.split(":")] for p in spec.split(",")]
    for part in parts:
        (*path, name), weight = ["", *part[:-1]], part[-1]
        path = ":".join(path[1:])
        if not name or not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d\d?)?", weight):
            raise UserError(f"reward {':'.join(part)!r} has no weight: write name:weight or "
                            "file.py:function:weight for each, as in accuracy:1.0,language:0.5")
        if path not in files:
            files[path] = load_file(path)
        if not callable(files[path].get(name)):
            raise UserError(f"{path or 'reward.py'} has no reward {name!r}: take one of "
                            f"{', '.join(REWARDS)}, or file.py:function:weight with your own")
        alike = sum(other[-2:-1] == [name] for other in parts) > 1
        title = f"{os.path.basename(path)[:-3]}.{name}" if path and alike else name
        if title in rewards:
            raise UserError(f"reward {title!r} is there twice: give it once, with the whole weight")
        rewards[title] = (files[path][name], float(weight))
    return rewards


def load_file(path: str) -> dict:
    """Import a reward file, its folder first on sys.path, and give what it defines."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        raise UserError(f"reward file {path!r} does not exist, or is no file that ends in .py")
    folder, file = os.path.split(os.path.realpath(path))
    find_spec = importlib.machinery.PathFinder.find_spec
    others = [other for other in sys.path if os.path.realpath(other) != folder]
    for name in {entry.partition(".")[0] for entry in os.listdir(folder)}:
        here, there = (getattr(find_spec(name, x), "origin", None) for x in ([folder], others))
        if here and (there or name in sys.stdlib_module_names):  # one would stand in for the other
            raise UserError(f"{here} has the name of another module: rename it, or give the reward "
                            f"file {path!r} a folder of its own")
    FOLDERS.add(folder)
    sys.path.insert(0, folder)  # for the helpers beside the file, and for the workers of its pools
    try:
        return vars(importlib.import_module(file.removesuffix(".py")))
    except (Exception, SystemExit) as error:
        raise UserError(f"reward file {path!r} cannot be loaded{told(error)}.")


def told(error: BaseException) -> str:
    """What a user's code raised, and its last line in a reward file or beside one."""
    places = [(x.filename, x.lineno) for x in traceback.extract_tb(error.__traceback__)[1:]]
    if isinstance(error, SyntaxError) and error.lineno:
        places.append((str(error.filename), error.lineno))
    places = [" ({}, line {})".format(*x) for x in places if os.path.dirname(x[0]) in FOLDERS]
    text = traceback.format_exception_only(error)[-1]  # even where its __str__ raises
    return f"{''.join(places[-1:])}: {' '.join(text.split())[:300]}"


def score(samples: list, rewards: dict[str, tuple], timeout: int = 3600) -> None:
    """Set rewards (by name) and reward (weighted sum of those that are not None) of each sample.

    RunError where one raises or returns anything else; one that takes `timeout` s ends the process.
    """
    values = {}
    for name, (function, weight) in rewards.items():
        try:
            with watchdog(timeout, f"reward {name!r} took {timeout} s; see --reward_timeout."):
                column = function(samples)
                shown = ascii(column)[:80]  # here, since a __repr__ can raise too
        except (Exception, SystemExit) as error:
            raise RunError(f"reward {name!r} failed{told(error)}.")
        try:
            values[name] = [x if x is None else x.__float__() for x in column]  # text has none
            good = isinstance(column, list) and len(column) == len(samples) and all(
                x is None or max(1, abs(weight)) * abs(x) <= LARGEST_REWARD for x in values[name])
        except Exception:  # None, 10**400, an array of two
            good = False
        if not good:
            raise RunError(f"reward {name!r} must return a list of {len(samples)} finite numbers "
                           "(None for what cannot be scored), each, weighed too, at most "
                           f"{LARGEST_REWARD:.0e}: it returned {shown}.")
    for sample, *row in zip(samples, *values.values()):
        sample.rewards = dict(zip(values, row))
        parts = {name: rewards[name][1] * x for name, x in sample.rewards.items() if x is not None}
        # the paper's code: -0.1 in all for an unfinished response, whatever else it earned
        sample.reward = parts.get("unfinished") or (sum(parts.values()) if parts else None)
