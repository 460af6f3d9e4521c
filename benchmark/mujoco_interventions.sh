#!/usr/bin/env bash
# The paper's interventions on MuJoCo, each alone: PFO on the last and on all layers (coefficient 1 with Tanh, 10 with
# ReLU), Adam forgotten after each rollout, Adam's betas (0.9, 0.9), one trunk for actor and critic.
# 5 interventions x 2 environments x 3 numbers of epochs x 2 activations x 5 seeds = 300 runs of 5 M steps.
# What stands behind is passed on: --dry-run, --batch-seeds, --env-ids Hopper-v4, --address auto, -- --track, …
set -euo pipefail
cd "$(dirname "$0")/.."

exec python -m benchmark.run \
    --commands \
    "python ppo_mujoco.py --activation Tanh --pfo-coef 1" \
    "python ppo_mujoco.py --activation Tanh --pfo-coef 1 --pfo-layers all" \
    "python ppo_mujoco.py --activation Tanh --reset-optimizer" \
    "python ppo_mujoco.py --activation Tanh --adam-beta2 0.9" \
    "python ppo_mujoco.py --activation Tanh --share-features" \
    "python ppo_mujoco.py --activation ReLU --pfo-coef 10" \
    "python ppo_mujoco.py --activation ReLU --pfo-coef 10 --pfo-layers all" \
    "python ppo_mujoco.py --activation ReLU --reset-optimizer" \
    "python ppo_mujoco.py --activation ReLU --adam-beta2 0.9" \
    "python ppo_mujoco.py --activation ReLU --share-features" \
    --env-ids Humanoid-v4 Hopper-v4 \
    --epochs 10 15 20 \
    --seeds 25 7 64 27 4 \
    "$@"
