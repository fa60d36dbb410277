#!/usr/bin/env bash
# When does RL beat SFT, on the toy: SFT on golden reasoning of five origins beside GRPO and REINFORCE++ (results/README.md
# has the rules). Some hours on one core; stop it whenever you like, started again it passes over what is finished. The environment with requirements.txt must be active.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=.
R=runs/provenance
three="--eval_every 1 --eval_settings pass8_t1,pass1_t0.6,pass1_t0.01"  # the paper's scheme, each epoch

splits="--validation_data $R/golden/validation.jsonl --test_data $R/golden/test.jsonl"

finished() { [ -e "$R/$1/result.json" ]; }

own() {  # SEED: the base's own right answers, the first right one of eight to a prompt
    finished own/$1 || python rollout.py --data toy_data/train.jsonl --n 8 --keep_right 1 --seed $1 --out $R/own/$1
}

golden() {  # ARM SEED: the file that an arm is trained on
    if [ $1 = own ]; then echo $R/own/$2/right.jsonl; else echo $R/golden/$1.jsonl; fi
}

[ -e $R/golden/answers.jsonl ] || python results/provenance/golden.py --out $R/golden

# 1. Equal trials: four learning rates on seeds 10 and 11, which appear nowhere else; validation only. GRPO's,
#    REINFORCE++'s and habit's are results/experiment.sh's, found by the same trials
for seed in 10 11; do
    for arm in columns places answers own; do
        [ $arm != own ] || own $seed
        for lr in 5e-5 1e-4 3e-4 1e-3; do
            finished sweep/${arm}_${lr}_$seed || python train_sft.py --train_data "$(golden $arm $seed)" \
                $splits --lr $lr --seed $seed --test_data "" --out $R/sweep/${arm}_${lr}_$seed
        done
    done
done
declare -A rate=([grpo]=1e-4 [reinforce]=5e-5 [habit]=5e-5)
for arm in columns places answers own; do
    rate[$arm]=$(python results/best_rate.py $R/sweep $arm 8)
    echo "learning rate of $arm: ${rate[$arm]}" >&2
done

# 2. The comparison: five seeds, the same prompts, as many epochs, the paper's three settings each epoch; then which
#    habits each model picks, and how good each is when forced
for seed in 0 1 2 3 4; do
    for arm in grpo reinforce habit columns places answers own; do
        [ $arm != own ] || own $seed
        case $arm in
            grpo) how="train_grpo.py --train_data $R/golden/habit.jsonl" ;;
            reinforce) how="train_grpo.py --train_data $R/golden/habit.jsonl --advantage reinforce++ --group_size 1 --mini_batch_size 8" ;;
            *) how="train_sft.py --train_data $(golden $arm $seed)" ;;
        esac
        finished main/${arm}_$seed || python $how $splits --lr ${rate[$arm]} --seed $seed $three --out $R/main/${arm}_$seed
        [ -e $R/main/${arm}_$seed/habits.json ] || { python toy.py --habits \
            --model $R/main/${arm}_$seed/checkpoints/step_* > $R/main/${arm}_$seed/part
            mv $R/main/${arm}_$seed/part $R/main/${arm}_$seed/habits.json; }
    done
done

# 3. What results/ keeps of each run: everything but completions and weights
for file in $R/{main,sweep,own}/*/{args,result,habits}.json $R/main/*/{eval,metrics}.jsonl; do
    [ ! -e "$file" ] || { mkdir -p "results/provenance/$(dirname "${file#$R/}")"
        cp "$file" "results/provenance/${file#$R/}"; }
done
