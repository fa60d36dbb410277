#!/usr/bin/env bash
# Each sign of signs.py made once on purpose, for LESSON.md's "My reward does not rise": some 15 minutes on two cores.
# What is finished is passed over. Flags, steps and seeds were fixed before any of it was run; a sign that did not
# appear stands in results/symptoms.json as one that did not. Reads nothing but the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1  # a thread a run: the same figures on a machine that has other work
R=runs/symptoms
mkdir -p $R
cp -r toy_data/images $R
python - $R <<'EOF'
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
train = [json.loads(line) for line in open("toy_data/train.jsonl")]


def write(name, change, rows=train):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r | change(i, r)) + "\n" for i, r in enumerate(rows)))


write("hard", lambda i, r: {} if i % 16 == 0 else {"answer": "99"})  # one row in sixteen can be answered
write("impossible", lambda i, r: {"answer": "99"})  # none can
write("mute", lambda i, r: {} if i % 4 else {"answer": "?"})  # one row in four has an answer that says nothing
write("three", lambda i, r: {"answer": "3"})  # the label of another data set, so to speak
write("shifted", lambda i, r: {} if i % 4 else {"solution": train[i - 1]["solution"]})  # one in four is a neighbour's
write("russian", lambda i, r: {"solution": f"Я вижу {r['answer']}. \\boxed{{{r['answer']}}}"})  # half of them at first: RL unlearnt it
write("measured", lambda i, r: {}, [json.loads(line) for line in open("toy_data/validation.jsonl")][:128])
(folder / "mine.py").write_text('''"""Rewards of one's own that can be had without a right answer."""


def short(samples):
    return [1 - len(s.completion_ids) / 96 for s in samples]


def long(samples):
    return [len(s.completion_ids) / 96 for s in samples]


def sure(samples):
    return [float("I see" in s.completion_text) for s in samples]
''')
EOF

make() {  # NAME SEEDS SCRIPT FLAG...: one training a seed, unless it is finished; its words in a log
    local name=$1 seeds=$2
    shift 2
    for seed in $seeds; do
        [ -e "$R/$name/seed_$seed/result.json" ] && continue
        rm -rf "$R/$name/seed_$seed"
        mkdir -p "$R/$name"
        echo "$*" > "$R/$name/command"
        python "$@" --seed "$seed" --out "$R/$name/seed_$seed" 2> "$R/$name/seed_$seed.log" > /dev/null || {
            code=$?  # 1 is a run that its own guards ended; anything else is a mistake here
            [ $code = 1 ] || exit $code
            echo "ended with code 1" >> "$R/$name/seed_$seed.log"
            echo {} > "$R/$name/seed_$seed/result.json"
        }
    done
}
none="--validation_data= --test_data="
some="--validation_data $R/measured.jsonl --test_data="
own="--train_data toy_data/train.jsonl"  # said, since own validation rows beside the toy's may be a mistake

# 6 steps and three seeds each
for pair in "hard --train_data $R/hard.jsonl" "pairs --group_size 2" \
    "impossible --train_data $R/impossible.jsonl" "format --rewards accuracy:1.0,format:1.0" \
    "cut --max_new_tokens 30" "cold --temperature 0.05" "mute --train_data $R/mute.jsonl" \
    "mask --dtype bfloat16 --tis mask --tis_cap 1" "bfloat16 --dtype bfloat16 --temperature 0.1"; do
    # shellcheck disable=SC2086
    make ${pair%% *} "0 1 2" train_grpo.py ${pair#* } $none --max_steps 6
done
# longer, one seed each
# shellcheck disable=SC2086
{
make glances 0 train_grpo.py --rewards "accuracy:1.0,$R/mine.py:sure:2" --lr 2e-4 $none --max_steps 24
make short 0 train_grpo.py --rewards "accuracy:1.0,$R/mine.py:short:8" --lr 2e-4 $none --max_steps 24
make long 0 train_grpo.py --rewards "accuracy:1.0,$R/mine.py:long:8" --lr 2e-4 $none --max_steps 32
make torn 0 train_grpo.py --lr 5e-3 $none --max_steps 16
make stale 0 train_grpo.py --lr 1e-3 --ppo_epochs 4 --mini_batch_size 8 $none --max_steps 8
make still 0 train_grpo.py $own --lr 1e-8 $some --max_steps 20
make still_sft 0 train_sft.py $own --lr 1e-8 $some --max_steps 20
make held 0 train_grpo.py --kl_coef 10 $none --max_steps 20
make labels 0 train_grpo.py --train_data $R/three.jsonl --lr 1e-4 $some --max_steps 24
make golden 0 train_sft.py --train_data $R/shifted.jsonl $none --max_steps 1
make russian_base 0 train_sft.py --train_data $R/russian.jsonl --lr 1e-3 $none --max_steps 48
make russian 0 train_grpo.py --model $R/russian_base/seed_0/checkpoints/step_000048 \
    --rewards accuracy:1.0,language:0 $none --max_steps 6
# added when the first run of this file had not shown four signs: at 5e-3 accuracy falls before there are five steps to
# fall from; no gradient was large; rounding alone does not reach the sampler's bound; a policy that is held by
# --kl_coef 10 does not diverge at all
make pulled 0 train_grpo.py --kl_coef 1 --lr 1e-3 $none --max_steps 8
make steep 0 train_grpo.py --lr 1e-3 $none --max_steps 16
make tight 0 train_grpo.py --max_grad_norm 0.05 $none --max_steps 6
make torn_bfloat16 0 train_grpo.py --dtype bfloat16 --lr 5e-3 $none --max_steps 6
}

python - $R > results/symptoms.json <<'EOF'
import json
import re
import sys
from pathlib import Path

runs, found = Path(sys.argv[1]), {}
for path in sorted(runs.glob("*/command")):
    seeds = {}
    for log in sorted(path.parent.glob("seed_*.log")):
        text = log.read_text()
        said = {name: {"step": int(step), "measured": measured} for step, name, measured
                in re.findall(r"SIGN, step (\d+): ([^(]+) \((.+?)\)\. Cause", text)}
        golden = re.findall(r"\d+ of \d+ golden responses", text)
        ended = re.findall(r"ended with code \d+", text)
        seeds[log.stem[5:]] = said | ({"golden responses": golden[0]} if golden else {}) | (
            {"ended": ended[0]} if ended else {})
    found[path.parent.name] = {"command": path.read_text().strip(), "seeds": seeds}
print(json.dumps(found, indent=1))
EOF
