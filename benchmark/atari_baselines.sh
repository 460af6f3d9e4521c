#!/usr/bin/env bash
# The paper's baselines on Atari:
# 6 environments x 3 numbers of epochs x 2 learning rate schedules x 5 seeds = 180 runs of 100 M frames.
# What stands behind is passed on: --dry-run, --gpus-per-run 0.25 --cpus-per-run 4, --address auto, -- --track, …
set -euo pipefail
cd "$(dirname "$0")/.."

exec python -m benchmark.run \
    --commands \
    "python ppo_atari_2models.py" \
    "python ppo_atari_2models.py --anneal-lr" \
    --env-ids Phoenix-v5 NameThisGame-v5 DoubleDunk-v5 Qbert-v5 BattleZone-v5 Gravitar-v5 \
    --epochs 4 6 8 \
    --seeds 25 7 64 27 4 \
    "$@"
