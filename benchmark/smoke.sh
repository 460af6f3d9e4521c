#!/usr/bin/env bash
# Every stage of a study in minutes on two cores: small runs, plasticity losses, figures and tables, all under smoke/.
# They show that it works; their budgets are too small to show anything else. Given again, it does what is missing.
# What stands behind is passed on to the scheduler: --dry-run, --num-cpus 2, --address auto, …
set -euo pipefail
cd "$(dirname "$0")/.."

python -m benchmark.run \
    --folder smoke \
    --commands "python ppo_mujoco.py" "python ppo_mujoco.py --pfo-coef 1" \
    --env-ids Hopper-v4 --epochs 10 20 --seeds 25 7 \
    --batch-seeds "$@" -- --total-timesteps 20480

python -m benchmark.run \
    --folder smoke \
    --commands "python ppo_atari_2models.py" "python ppo_pfo_atari.py --pfo-coef 1" \
    --env-ids Phoenix-v5 --epochs 1 2 --seeds 25 \
    "$@" -- --total-timesteps 24576

for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exit; fi # there are no runs yet, for what comes next
done

python -m benchmark.run \
    --folder smoke \
    --commands "python plasticity_probe.py" \
    --runs smoke/runs/* \
    "$@" -- --checkpoints first last --max-samples 512

python -m benchmark.figures --figure 1 2 3 4 6 7 --runs smoke/runs --output smoke/figures \
    --window 4096 --keep-constant-ranks
python toy_problem.py --output smoke/figures/figure5.png
python -m benchmark.table --runs smoke/runs --output smoke/figures
