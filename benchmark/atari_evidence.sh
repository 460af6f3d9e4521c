#!/usr/bin/env bash
# The runs behind benchmark/results/atari/: Phoenix in the paper's setting, without and with PFO (last layer, coefficient
# 1), at so many epochs that the collapse comes within reach of a workstation, then the paper's own 8; plasticity losses,
# films, figures and tables after either.
# EPOCHS=16 FRAMES=8000000 bash benchmark/atari_evidence.sh changes the first of them, PRECISION=float32 is for a CPU
# without instructions for bfloat16. Given again, it does what is missing. What stands behind is passed on to the runner:
# --dry-run, --num-cpus 2, --gpus-per-run 0.25, …
set -euo pipefail
cd "$(dirname "$0")/.."

epochs=${EPOCHS:-12} frames=${FRAMES:-12000000} precision=${PRECISION:-bfloat16} dry=""
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry=yes; fi # there are no runs yet, for what comes after them
done

study() { # epochs, seeds, frames, iterations from a diagnosis to the next, and what is passed on
    local length="--precision $precision --total-timesteps $3 --diagnostics-interval $4"
    # shellcheck disable=SC2086 # seeds are words
    python -m benchmark.run --folder atari_study --env-ids Phoenix-v5 --epochs "$1" --seeds $2 --commands \
        "python ppo_atari_2models.py $length" "python ppo_pfo_atari.py --pfo-coef 1 $length" "${@:5}"
}

results() {
    if [ "$dry" ]; then return; fi
    python -m benchmark.run --folder atari_study --commands "python plasticity_probe.py" --runs atari_study/runs/* "$@"
    local output=benchmark/results/atari
    mkdir -p "$output"
    python -m benchmark.logs --runs atari_study/runs --output "$output"
    python -m benchmark.figures --figure 1 2 3 4 6 7 --window 100000 --runs atari_study/runs --output "$output"
    python -m benchmark.figures --figure 1 --aggregate iqm --normalise human --runs atari_study/runs --output "$output"
    python -m benchmark.table --runs atari_study/runs --output "$output"
    python -m benchmark.claims --runs atari_study/runs --output "$output"
    python -m benchmark.statistics --normalise human --runs atari_study/runs --output "$output"
    # not .gz, which are the curves
    find "$output" \( -name 'figure*.csv' -o -name 'aligned*.csv' \) -size +200k -exec bzip2 -9f {} +
    # The policies before, at and after the collapse, in the runs' videos/
    python -m benchmark.film atari_study/runs/*__ppo_atari_2models+*__25__*
}

study "$epochs" "25 7" "$frames" 4 "$@"
results "$@"
study 8 25 30000000 10 "$@"
results "$@"
