#!/usr/bin/env bash
# The experiments of results/README.md on the toy: 4 hours at most on two cores, one run at most 4 minutes. Stop it
# whenever you like; started again it passes over what is finished and goes on. Reads nothing but the
# repository, writes into runs/experiment. The environment with requirements.txt must be active.
set -euo pipefail
cd "$(dirname "$0")/.."
R=runs/experiment
three="--eval_every 1 --eval_settings pass8_t1,pass1_t0.6,pass1_t0.01"  # the paper's scheme, each epoch

train() {  # NAME SCRIPT FLAG...: one training on two ranks, unless it is finished
    local out=$R/$1 script=$2
    shift 2
    [ -e "$out/result.json" ] || torchrun --standalone --nproc_per_node 2 "$script" --out "$out" \
        --train_data $R/data/train.jsonl --validation_data $R/data/validation.jsonl \
        --test_data $R/data/test.jsonl "$@"
}

grpo="train_grpo.py"
# the paper's algorithm: one response a query, so that only the batch is a baseline; four updates a batch
reinforce="train_grpo.py --advantage reinforce++ --group_size 1 --mini_batch_size 8"
sft="train_sft.py"
declare -A script=([grpo]=$grpo [reinforce]=$reinforce [sft]=$sft)

[ -e $R/data/test.jsonl ] || python toy.py --data $R/data
[ -e $R/blank/test.jsonl ] || python toy.py --data $R/blank --blank
[ -e $R/base_without_reflection/build.json ] ||  # 22 minutes on one core
    python toy.py --build --without "Let me see" --model $R/base_without_reflection

# 1. Equal trials: four learning rates each on seeds 10 and 11, which appear nowhere else; validation only
for seed in 10 11; do
    for lr in 2e-5 5e-5 1e-4 2e-4; do
        train sweep/grpo_${lr}_$seed $grpo --lr $lr --seed $seed --test_data ""
        train sweep/reinforce_${lr}_$seed $reinforce --lr $lr --seed $seed --test_data ""
    done
    for lr in 5e-5 1e-4 3e-4 1e-3; do
        train sweep/sft_${lr}_$seed $sft --lr $lr --seed $seed --test_data ""
    done
done
# the rate with the best validation accuracy after the last epoch, mean of both seeds; the smaller of two alike
declare -A best
for arm in grpo reinforce sft; do
    best[$arm]=$(python results/best_rate.py $R/sweep $arm 8)
done
echo "learning rates: grpo ${best[grpo]}, reinforce++ ${best[reinforce]}, sft ${best[sft]}" >&2

# 2. The comparison: five seeds, the same prompts, as many epochs, the paper's three settings each epoch
for seed in 0 1 2 3 4; do
    for arm in grpo sft reinforce; do
        train main/${arm}_$seed ${script[$arm]} --lr ${best[$arm]} --seed $seed $three
    done
done
# which habits each model picks, and how good each is when forced
mkdir -p $R/habits
for model in toy_model $R/main/*/checkpoints/step_*; do
    name=$(echo $model | sed "s|$R/main/||; s|/checkpoints.*||")
    [ -e $R/habits/$name.json ] || { python toy.py --habits --model $model > $R/habits/part &&
        mv $R/habits/part $R/habits/$name.json; }
done

# 3. The same from a base that was never shown a reflection; the rates are those found above
for seed in 0 1 2 3 4; do
    for arm in grpo sft reinforce; do
        train without/${arm}_$seed ${script[$arm]} --model $R/base_without_reflection --lr ${best[$arm]} \
            --seed $seed --eval_every 1 --eval_settings pass1_t0.6,pass1_t0.01
    done
done

# 4. Ablations of GRPO, one thing at a time, three seeds; what they are compared with is main/grpo_0 to _2
for seed in 0 1 2; do
    alter() { train ablation/$1_$seed $grpo --lr ${best[grpo]} --seed $seed "${@:2}"; }
    alter group_2 --group_size 2
    alter group_4 --group_size 4
    alter group_16 --group_size 16
    alter kl --kl_coef 0.04
    alter sequence_loss --loss sequence
    alter dr_grpo_loss --loss dr_grpo --advantage dr_grpo
    alter vision --train_vision --train_connector
    alter blank --train_data $R/blank/train.jsonl
    alter reinforce_8 --advantage reinforce++
done

# 5. Damaged pictures: does a model look at them? The base and three seeds of each arm, on validation
for model in toy_model $R/main/*_[012]/checkpoints/step_*; do
    name=$(echo $model | sed "s|$R/main/||; s|/checkpoints.*||")
    for how in none blank noise rotate swap; do
        [ -e $R/damaged/${name}_$how/result.json ] || python evaluate.py --model $model --perturb $how \
            --data $R/data/validation.jsonl --settings pass1_t0.6 --out $R/damaged/${name}_$how
    done
done

# 6. Reports; and what results/ keeps of each run: everything but completions and weights
python report.py $R/main $R/damaged --out $R/report/main
python report.py $R/without --out $R/report/without
python report.py $R/ablation $R/main/grpo_[012] --out $R/report/ablation
python report.py $R/sweep --out $R/report/sweep
rm -rf results/experiment
for file in $R/*/*/{args,result}.json $R/*/*/{eval,metrics}.jsonl $R/habits/*.json $R/report/*/report.{md,json} \
    $R/report/*/*.png $R/report/main/report.html; do
    mkdir -p "results/experiment/$(dirname "${file#$R/}")"
    cp "$file" "results/experiment/${file#$R/}"
done
