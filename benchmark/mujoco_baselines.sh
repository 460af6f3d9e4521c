#!/usr/bin/env bash
# The paper's baselines on MuJoCo:
# 4 environments x 3 numbers of epochs x 2 learning rate schedules x 2 activations x 5 seeds = 240 runs of 5 M steps.
# What stands behind is passed on: --dry-run, --batch-seeds, --env-ids Hopper-v4, --address auto, -- --track, …
set -euo pipefail
cd "$(dirname "$0")/.."

exec python -m benchmark.run \
    --commands \
    "python ppo_mujoco.py --activation Tanh" \
    "python ppo_mujoco.py --activation Tanh --anneal-lr" \
    "python ppo_mujoco.py --activation ReLU" \
    "python ppo_mujoco.py --activation ReLU --anneal-lr" \
    --env-ids Ant-v4 HalfCheetah-v4 Humanoid-v4 Hopper-v4 \
    --epochs 10 15 20 \
    --seeds 25 7 64 27 4 \
    "$@"
