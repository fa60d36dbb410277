#!/usr/bin/env bash
# What LESSON.md says of exercises 1, 5 and 9: three seeds each, half an hour on two cores. What is finished is passed over.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=$PWD/runs/exercises

solved() {  # a copy of the tree with a patch of tests/exercises
    if [ ! -d "$runs/$1/tree" ]; then
        mkdir -p "$runs/$1/tree"
        cp -r ./*.py toy_model toy_data "$runs/$1/tree"
        patch --quiet --strip 1 --directory "$runs/$1/tree" < "tests/exercises/$1.patch"
    fi
    cd "$runs/$1/tree"
}

train() {  # the quick start with other flags: out, script, flags
    [ -f "$1/result.json" ] || torchrun --standalone --nproc_per_node 2 -- "$2" --out "$1" "${@:3}"
}

for seed in 0 1 2; do
    (solved short
    for weight in 0 1 2 4 8; do
        train "$runs/short/weight_${weight}_seed_$seed" train_grpo.py --seed $seed --validation_data "" --test_data "" \
            --rewards "accuracy:1.0,short.py:short_reward:$weight"
    done)
    (solved silent_bug_planted
    train "$runs/silent_bug_planted/seed_$seed" train_grpo.py --seed $seed --test_data "")
    (solved first_row
    [ -d "$runs/first_row/data" ] || python toy.py --first_row --data "$runs/first_row/data"
    rows="--train_data $runs/first_row/data/train.jsonl --validation_data $runs/first_row/data/validation.jsonl"
    for trainer in train_grpo train_sft; do
        # shellcheck disable=SC2086
        train "$runs/first_row/${trainer}_seed_$seed" $trainer.py --seed $seed $rows \
            --test_data "$runs/first_row/data/test.jsonl"
    done)
done
python - "$runs" > results/exercises.json <<'EOF'
import json
import sys
from pathlib import Path

runs = Path(sys.argv[1])


def last(run, name):
    """The mean of a metric over the last 8 steps."""
    rows = [json.loads(line) for line in open(run / "metrics.jsonl")][-8:]
    return round(sum(row[name] for row in rows) / 8, 3)


def ends(run, split):
    """Accuracy before and after training, in %."""
    points = json.loads((run / "result.json").read_text())[f"{split}_pass1_t0.6"]
    return [round(100 * points[when]["accuracy"], 1) for when in ("before", "after")]


short = {weight: [{name: last(runs / "short" / f"weight_{weight}_seed_{seed}", name) for name in ("length", "reward/accuracy")}
                  for seed in (0, 1, 2)] for weight in (0, 1, 2, 4, 8)}
bug = [{"groups_all_alike": last(run, "groups_all_alike"), "validation": ends(run, "validation")}
       for run in (runs / "silent_bug_planted" / f"seed_{seed}" for seed in (0, 1, 2))]
row = {trainer: [{split: ends(runs / "first_row" / f"{trainer}_seed_{seed}", split) for split in ("validation", "test")}
                 for seed in (0, 1, 2)] for trainer in ("train_grpo", "train_sft")}
answers = [json.loads(line)["answer"] for line in open(runs / "first_row" / "data" / "validation.jsonl")]
commonest = round(100 * max(map(answers.count, answers)) / len(answers), 1)
print(json.dumps({"short, by weight and seed": short, "silent_bug_planted, by seed": bug,
                  "first_row, by trainer and seed": row, "first_row, the commonest answer": commonest}, indent=1))
EOF
