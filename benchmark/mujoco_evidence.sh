#!/usr/bin/env bash
# The runs behind benchmark/results/mujoco/, in the order of what they tell: what more epochs do, what PFO does, both
# with ReLU, the other interventions, a third number of epochs, and Humanoid; then plasticity losses, figures and tables.
# Hopper's 5 seeds of one setting take about an hour of one core. Given again, it does what is missing.
# What stands behind is passed on to the runner: --dry-run, --num-cpus 2, --address auto, …
set -euo pipefail
cd "$(dirname "$0")/.."

study() { python -m benchmark.run --folder study --batch-seeds --seeds 25 7 64 27 4 "$@"; }
study --env-ids Hopper-v4 --epochs 10 20 --commands "python ppo_mujoco.py --activation Tanh" "$@"
study --env-ids Hopper-v4 --epochs 10 20 --commands "python ppo_mujoco.py --activation Tanh --pfo-coef 1" "$@"
study --env-ids Hopper-v4 --epochs 10 20 --commands "python ppo_mujoco.py --activation ReLU" \
    "python ppo_mujoco.py --activation ReLU --pfo-coef 10" "$@"
study --env-ids Hopper-v4 --epochs 20 --commands "python ppo_mujoco.py --activation Tanh --reset-optimizer" \
    "python ppo_mujoco.py --activation Tanh --adam-beta2 0.9" \
    "python ppo_mujoco.py --activation Tanh --share-features" \
    "python ppo_mujoco.py --activation Tanh --pfo-coef 1 --pfo-layers all" "$@"
study --env-ids Hopper-v4 --epochs 15 --commands "python ppo_mujoco.py --activation Tanh" "$@"
study --env-ids Humanoid-v4 --epochs 10 20 --commands "python ppo_mujoco.py --activation Tanh" \
    "python ppo_mujoco.py --activation Tanh --pfo-coef 1" "$@"

for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exit; fi # there are no runs yet, for what comes next
done

python -m benchmark.run --folder study --commands "python plasticity_probe.py" --runs study/runs/* "$@"
results=benchmark/results/mujoco
python -m benchmark.logs --runs study/runs --output "$results"
python -m benchmark.figures --figure 1 2 4 6 7 --runs study/runs --output "$results"
python -m benchmark.figures --figure 1 --aggregate iqm --runs study/runs --output "$results"
python -m benchmark.table --runs study/runs --output "$results"
python -m benchmark.claims --runs study/runs --output "$results"
python -m benchmark.statistics --runs study/runs --output "$results"
find "$results" \( -name 'figure*.csv' -o -name 'aligned*.csv' \) -size +200k -exec bzip2 -9f {} + # not .gz, which are the curves
