"""An entry of the speedrun, timed: three runs of the quick start's command with other flags, one JSON line.

    python results/speedrun.py --max_steps 16 --lr 2e-4 >> results/speedrun.jsonl

Seconds are of the whole command on two ranks, from its start to its end, imports and both measurements of
validation included. See speedrun.md for the rules.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def main(flags):
    entry = {"flags": " ".join(flags), "seconds": [], "validation": []}
    for seed in (0, 1, 2):
        with tempfile.TemporaryDirectory() as folder:
            words = ["train_grpo.py", "--test_data", "", "--seed", str(seed), "--out", f"{folder}/run", *flags]
            started = time.perf_counter()
            done = subprocess.run(LAUNCH + words, cwd=ROOT, capture_output=True, text=True, check=True)
            entry["seconds"].append(round(time.perf_counter() - started, 1))
        entry["validation"].append(json.loads(done.stdout.splitlines()[-1])["validation_pass1_t0.6"]["after"]["accuracy"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    print(json.dumps(entry | {"minutes": round(median(entry["seconds"]) / 60, 2), "commit": commit.stdout.strip()}))


if __name__ == "__main__":
    main(sys.argv[1:])
