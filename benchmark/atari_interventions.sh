#!/usr/bin/env bash
# The paper's interventions on Atari, each alone: PFO on the last and on all layers, Adam forgotten after each rollout,
# Adam's betas (0.9, 0.9), one trunk for actor and critic.
# 5 interventions x 3 environments x 3 numbers of epochs x 5 seeds = 225 runs of 100 M frames.
# What stands behind is passed on: --dry-run, --gpus-per-run 0.25 --cpus-per-run 4, --address auto, -- --track, …
set -euo pipefail
cd "$(dirname "$0")/.."

exec python -m benchmark.run \
    --commands \
    "python ppo_pfo_atari.py --pfo-coef 1" \
    "python ppo_pfo_atari.py --pfo-coef 10 --pfo-layers all" \
    "python ppo_atari_2models.py --reset-optimizer" \
    "python ppo_atari_2models.py --adam-beta2 0.9" \
    "python ppo_atari.py" \
    --env-ids Phoenix-v5 NameThisGame-v5 Gravitar-v5 \
    --epochs 4 6 8 \
    --seeds 25 7 64 27 4 \
    "$@"
