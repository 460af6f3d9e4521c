#!/usr/bin/env bash
# Which remedies stop PPO's collapse on Hopper? All recipes on ppo_mujoco.py, PPO and PFO, and the two variants of the
# paper's code without clipping, 20 epochs, ReLU, 2 M steps, 5 seeds each; then plasticity losses, table and figure.
# Five seeds of one setting take about half an hour of one core. Given again, it does what is missing.
# What stands behind is passed on to the runner: --dry-run, --num-cpus 2, --address auto, …
set -euo pipefail
cd "$(dirname "$0")/.."

recipes="spo layer_norm adam_rel weight_decay weight_clipping soft_shrink_perturb l2_init parseval chain crelu nap redo"
recipes="$recipes output_pfo bootstrap_truncation"
setting="--activation ReLU --total-timesteps 2000000"
commands=("python ppo_mujoco.py $setting" "python ppo_mujoco.py $setting --pfo-coef 10")
commands+=("python ppo_mujoco.py $setting --no-clip-objective --kl-coef 1")
commands+=("python ppo_mujoco.py $setting --no-clip-objective --target-kl 0.01")
names=()
for recipe in $recipes; do
    names+=("${recipe}_mujoco")
    commands+=("python ${recipe}_mujoco.py $setting")
done
python -m benchmark.recipe "${names[@]}"
python -m benchmark.run --folder remedies --batch-seeds --seeds 25 7 64 27 4 --env-ids Hopper-v4 --epochs 20 \
    --commands "${commands[@]}" "$@"

for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exit; fi # there are no runs yet, for what comes next
done

python -m benchmark.run --folder remedies --commands "python plasticity_probe.py" --runs remedies/runs/* "$@"
python -m benchmark.logs --runs remedies/runs --output benchmark/results/remedies
python -m benchmark.remedies --runs remedies/runs --output benchmark/results/remedies
