"""Tier 4: a run on two ranks that is killed again and again is the run that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from runs import command, group_of, ROOT, splits, TINY
from test_faults import fingerprint, saved, steps

STEPS, KILLS = 12, 5
pytestmark = pytest.mark.slow


def start(data, out, log):
    """Two ranks in one process group; torchrun would put each of them into one of its own."""
    words = [sys.executable, "train_grpo.py", *TINY, *splits(data)[:4], "--test_data=", "--max_steps",
             STEPS, "--eval_every", 1, "--keep", 2, "--out", out]
    group, ranks = group_of(2), []
    for number in ("0", "1"):
        ranks.append(subprocess.Popen(
            list(map(str, words)), cwd=ROOT, env=os.environ | group | {"RANK": number}, stdout=log,
            stderr=log, process_group=ranks[0].pid if ranks else 0))
    return ranks


def test_five_kills_at_random_change_nothing(data, tmp_path):
    """SIGKILL to both ranks at any moment from 1 s after the start to the expected end, and again
    the same command: weights, optimiser state, samples, metrics and evaluations, bit for bit. Each
    life has two more steps at most, so that there are five."""
    calm, out = tmp_path / "calm", tmp_path / "run"
    chance = random.Random(1)
    with open(tmp_path / "log", "w") as log:
        started = time.time()
        assert [p.wait(120) for p in start(data, calm, log)] == [0, 0]
        expected = time.time() - started
        for enough in range(2, STEPS, STEPS // KILLS):
            moment = time.time() + chance.uniform(1, expected)
            ranks = start(data, out, log)
            while time.time() < moment and len(steps(out)) < enough:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))  # of a step, an evaluation or a checkpoint
            assert ranks[0].poll() is None
            os.killpg(ranks[0].pid, signal.SIGKILL)
            for process in ranks:
                process.wait(60)
            print("killed:", len(steps(out)), "steps,", sorted(p.name for p in out.glob("*/step*"))[:4])
        assert [p.wait(120) for p in start(data, out, log)] == [0, 0]
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said and "passed over" not in said
    assert steps(out) == list(range(1, STEPS + 1))
    assert saved(out) == saved(calm) and fingerprint(out) == fingerprint(calm)


TORCHRUN = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
sys.argv[0] = "train_grpo.py"
import os, time
import train_grpo, utils
from runs import at_call
from test_faults import kill
{fault}
utils.run_script(train_grpo.main, train_grpo.Args)
"""


def torchrun(whole, out, fault, *options):
    """Run GRPO on two ranks under torchrun; its exit code, what was said, and how long it took."""
    (out.parent / "faulty.py").write_text(TORCHRUN.format(root=str(ROOT), fault=fault))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             *options, "--", out.parent / "faulty.py", *whole[0][1:], "--out", out]
    started = time.time()
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr, time.time() - started


def test_torchrun_ends_a_rank_that_is_in_no_collective(whole, tmp_path):
    """Rank 0 dies while rank 1 computes: only torchrun can tell, and somebody must speak."""
    fault = ('at_call(3, "train_grpo.update", kill, only=0)\n'
             'at_call(3, "train_grpo.update", lambda *_: time.sleep(90), only=1)')
    code, said, seconds = torchrun(whole, tmp_path / "run", fault)
    assert code == 1 and seconds < 60
    last = tmp_path / "run" / "checkpoints" / "step_000002"
    assert said.count(f"Stopped. The last whole checkpoint is {last}.") == 1, said


def test_torchrun_restarts_and_the_run_goes_on(whole, tmp_path):
    """--max-restarts: one rank of two dies in step 3; the workers that follow go on from step 2."""
    fault = ('if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":\n'
             '    at_call(3, "train_grpo.update", kill, only=1)')
    code, said, _ = torchrun(whole, tmp_path / "run", fault, "--max-restarts", 2)
    assert code == 0 and said.count("Continuing after step 2.") == 1, said
    assert steps(tmp_path / "run") == [1, 2, 3, 4] and (tmp_path / "run" / "result.json").exists()


RESTARTED = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import torch.distributed as dist
import utils
if utils.rank() == 0:
    time.sleep(1)
utils.start_ranks()
dist.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] != "3":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_restarted_ranks_find_each_other(tmp_path):
    """torchrun's store outlives a restart (pytorch#135712): a rank that came before its peer took the
    dead one's address from there, and five times of six both waited for ever."""
    (tmp_path / "restarted.py").write_text(RESTARTED.format(root=str(ROOT)))
    words = command(tmp_path / "restarted.py", ranks=2)
    words[words.index("--"):words.index("--")] = ["--max-restarts", "3"]
    assert subprocess.run(words, timeout=120).returncode == 0
