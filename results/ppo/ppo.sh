#!/usr/bin/env bash
# PPO with a critic (tests/exercises/ppo.patch) beside the quick start's GRPO; results/README.md has the rules. Half an hour
# on one core, a run 2 to 4 minutes; stop it whenever you like, started again it passes over what is finished. The
# environment with requirements.txt must be active. Writes into runs/ppo, and results/ppo/ppo.json.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
R=$PWD/runs/ppo
if [ ! -d "$R/tree" ]; then
    mkdir -p "$R/tree"
    cp -r ./*.py toy_model toy_data "$R/tree"
    patch --quiet --strip 1 --directory "$R/tree" < tests/exercises/ppo.patch
fi

train() {  # OUT FLAG...
    [ -e "$R/$1/result.json" ] || (cd "$R/tree" && python train_grpo.py --advantage gae --out "../$1" "${@:2}")
}

best() { python results/best_rate.py "$R/sweep" ppo 6; }

for seed in 10 11; do
    for lr in 5e-5 1e-4 2e-4; do
        train sweep/ppo_${lr}_$seed --lr $lr --seed $seed --test_data ""
    done
done
if [ "${1:-}" = sweep ]; then  # alone
    best
    exit
fi
lr=$(best)
for seed in 0 1 2; do
    train seed_$seed --lr "$lr" --seed $seed
    mkdir -p results/ppo/seed_$seed
    for file in args.json result.json eval.jsonl metrics.jsonl; do
        cp "$R/seed_$seed/$file" results/ppo/seed_$seed
    done
done
python - "$R" > results/ppo/ppo.json <<'END'
import json
import sys
from pathlib import Path

R = Path(sys.argv[1])


def ends(run):
    """Accuracy on validation before and after, in %."""
    points = json.loads((run / "result.json").read_text())["validation_pass1_t0.6"]
    return [round(100 * points[when]["accuracy"], 1) for when in ("before", "after")]


sweep = {lr: [ends(R / "sweep" / f"ppo_{lr}_{seed}") for seed in (10, 11)] for lr in ("5e-5", "1e-4", "2e-4")}
chosen = json.loads((R / "seed_0" / "args.json").read_text())
print(json.dumps({"validation before and after, by learning rate and tuning seed": sweep, "chosen": chosen["lr"]}, indent=1))
END
