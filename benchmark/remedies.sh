#!/usr/bin/env bash
# Which remedies stop PPO's collapse on Hopper? All recipes on ppo_mujoco.py, PPO and PFO, and the two variants of the
# paper's code without clipping, 20 epochs, ReLU, 2 M steps, 5 seeds each; then plasticity losses, table and figure.
# Five seeds of one setting take about an hour of one core. Given again, it does what is missing.
# What stands behind is passed on to the runner: --dry-run, --num-cpus 2, --address auto, …
# Settings that benchmark/results/remedies/runs.csv has five runs of are not run again: remove it to begin anew.
set -euo pipefail
cd "$(dirname "$0")/.."

recipes="spo layer_norm adam_rel weight_decay weight_clipping soft_shrink_perturb l2_init parseval chain crelu nap redo"
recipes="$recipes output_pfo bootstrap_truncation"
setting="--activation ReLU --total-timesteps 2000000"
results=benchmark/results/remedies
commands=() names=()
add() { # what marks its rows in runs.csv, and the command
    [ "$(grep -c -F -e "$1" "$results/runs.csv" 2>/dev/null)" = 5 ] || commands+=("$2")
}
add ",20,none," "python ppo_mujoco.py $setting"
add ",20,PFO last," "python ppo_mujoco.py $setting --pfo-coef 10"
add ",20,KL penalty," "python ppo_mujoco.py $setting --no-clip-objective --kl-coef 1"
add ",20,early stopping," "python ppo_mujoco.py $setting --no-clip-objective --target-kl 0.01"
for recipe in $recipes; do
    names+=("${recipe}_mujoco")
    add "__${recipe}_mujoco+" "python ${recipe}_mujoco.py $setting"
done
if [ ${#commands[@]} = 0 ]; then
    echo "$results/runs.csv has them all"
    exit
fi
python -m benchmark.recipe "${names[@]}"
python -m benchmark.run --folder remedies --batch-seeds --seeds 25 7 64 27 4 --env-ids Hopper-v4 --epochs 20 \
    --commands "${commands[@]}" "$@" || [ $? = 1 ] # a run that a number that is not finite ends is a result too

for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exit; fi # there are no runs yet, for what comes next
done

python -m benchmark.run --folder remedies --commands "python plasticity_probe.py" --runs remedies/runs/* "$@"
python -m benchmark.logs --runs remedies/runs --output "$results"
earlier=""
if [ -e "$results/runs.csv" ]; then earlier="--earlier $results/runs.csv"; fi
# shellcheck disable=SC2086 # two words, or none
python -m benchmark.remedies --unfinished --runs remedies/runs $earlier --output "$results"
