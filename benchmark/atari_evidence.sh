#!/usr/bin/env bash
# The runs behind benchmark/results/atari/: Phoenix in the paper's setting, without and with PFO (last layer, coefficient
# 1), at so many epochs that the collapse comes within reach of a workstation, then the paper's own 8; plasticity losses,
# figures and tables.
# EPOCHS=16 FRAMES=8000000 bash benchmark/atari_evidence.sh changes the first of them. Given again, it does what is
# missing. What stands behind is passed on to the runner: --dry-run, --num-cpus 2, --gpus-per-run 0.25, …
set -euo pipefail
cd "$(dirname "$0")/.."

study() { python -m benchmark.run --folder atari_study --env-ids Phoenix-v5 "$@"; }
length="--precision bfloat16 --total-timesteps ${FRAMES:-4000000} --diagnostics-interval 4"
study --epochs "${EPOCHS:-24}" --seeds 25 7 --commands "python ppo_atari_2models.py $length" \
    "python ppo_pfo_atari.py --pfo-coef 1 $length" "$@"
study --epochs 8 --seeds 25 --commands \
    "python ppo_atari_2models.py --precision bfloat16 --total-timesteps 30000000 --diagnostics-interval 10" \
    "python ppo_pfo_atari.py --pfo-coef 1 --precision bfloat16 --total-timesteps 30000000 --diagnostics-interval 10" "$@"

for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exit; fi # there are no runs yet, for what comes next
done

python -m benchmark.run --folder atari_study --commands "python plasticity_probe.py" --runs atari_study/runs/* "$@"
python -m benchmark.film atari_study/runs/*__ppo_atari_2models+*__25__* # before, at and after the collapse, in videos/
results=benchmark/results/atari
mkdir -p "$results"
python -m benchmark.logs --runs atari_study/runs --output "$results"
python -m benchmark.figures --figure 1 2 3 4 6 7 --runs atari_study/runs --output "$results"
python -m benchmark.figures --figure 1 --aggregate iqm --normalise human --runs atari_study/runs --output "$results"
python -m benchmark.table --runs atari_study/runs --output "$results"
python -m benchmark.claims --runs atari_study/runs --output "$results"
python -m benchmark.statistics --normalise human --runs atari_study/runs --output "$results"
find "$results" \( -name 'figure*.csv' -o -name 'aligned*.csv' \) -size +200k -exec bzip2 -9f {} + # not .gz, which are the curves
