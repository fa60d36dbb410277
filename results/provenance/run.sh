#!/usr/bin/env bash
# When does RL beat SFT, on the toy: SFT on golden reasoning of four more origins, beside the GRPO, REINFORCE++ and SFT of
# results/experiment.sh (results/README.md has the rules). Two hours on one core; a run is one process with one thread; started
# twice at once, this uses two. Stop it whenever you like, started again it passes over what is finished. The environment with
# requirements.txt must be active.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1
R=runs/provenance
K=results/provenance
. results/resumable.sh

splits="--validation_data $R/golden/validation.jsonl --test_data $R/golden/test.jsonl"

golden() { [ -e $R/golden/answers.jsonl ] || python results/provenance/golden.py --out $R/golden; }

own() {  # SEED: the base's own right answers, the first right one of eight to a prompt
    (flock 8; finished own/$1 || { python rollout.py --data toy_data/train.jsonl --n 8 --keep_right 1 --seed $1 \
        --out $R/own/$1; keep own/$1 result; }) 8> $R/locks/own_$1  # trials of one seed wait for one another
}

train() {  # ARM SEED LR NAME FLAG...
    local data=$R/golden/$1.jsonl
    [ $1 != own ] || { own $2; data=$R/own/$2/right.jsonl; }
    finished $4 || python train_sft.py --train_data $data $splits --lr $3 --seed $2 --out $R/$4 "${@:5}"
}

trial() {  # ARM SEED LR: validation alone
    [ -e $K/sweep/$1_$3_$2/result.json ] || {
        train $1 $2 $3 sweep/$1_$3_$2 --test_data ""
        keep sweep/$1_$3_$2 args result
    }
}

compared() {  # ARM SEED LR: the paper's three settings each epoch; then which habits it picks, and how good each is when forced
    [ -e $K/main/$1_$2/habits.json ] || {
        train $1 $2 $3 main/$1_$2 --eval_every 1 --eval_settings pass8_t1,pass1_t0.6,pass1_t0.01
        python toy.py --habits --model $R/main/$1_$2/checkpoints/step_* > $R/main/$1_$2/part
        mv $R/main/$1_$2/part $R/main/$1_$2/habits.json
        keep main/$1_$2 args eval metrics result habits
    }
}

longer() {  # ARM SEED: ten times the epochs, measured at their end
    [ -e $K/longer/$1_$2/result.json ] || {
        train $1 $2 3e-4 longer/$1_$2 --epochs 30 --eval_settings pass8_t1,pass1_t0.6,pass1_t0.01
        keep longer/$1_$2 args eval result
    }
}

lock start golden
# equal trials: four learning rates on seeds 10 and 11, which appear nowhere else
for seed in 10 11; do
    for arm in columns places answers own; do
        for lr in 5e-5 1e-4 3e-4 1e-3; do lock sweep_${arm}_${lr}_$seed trial $arm $seed $lr; done
    done
done
for seed in 0 1 2 3 4; do
    for arm in columns places answers own; do
        lr=$(python results/best_rate.py $K/sweep $arm 8) || continue  # another shell is at a trial
        lock main_${arm}_$seed compared $arm $seed $lr
    done
done
# exploratory, no part of the verdicts: with time, does the toy learn foreign reasoning, and is it then better?
for seed in 0 1 2; do lock longer_columns_$seed longer columns $seed; done
