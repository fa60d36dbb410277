"""The learning rate that did best in equal trials: the rule of every sweep here, as the scripts ask for it.

    python results/best_rate.py FOLDER ARM TRIALS

FOLDER/ARM_RATE_SEED/result.json is a trial, TRIALS how many the arm has in all; exit code 1 while some are missing.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

folder, arm, trials = sys.argv[1:]
found = defaultdict(list)
for path in Path(folder).glob(f"{arm}_*/result.json"):
    rate = path.parent.name.removeprefix(f"{arm}_").rpartition("_")[0]
    found[rate].append(json.loads(path.read_text())["validation_pass1_t0.6"]["after"]["accuracy"])
counts = {len(values) for values in found.values()}
if sum(map(len, found.values())) != int(trials) or len(counts) != 1:
    sys.exit(f"{folder}: {arm} has not its {trials} trials yet")
# the best mean accuracy on validation after the last epoch, the smaller of two alike
print(max(sorted(found, key=float), key=lambda rate: sum(found[rate])))
