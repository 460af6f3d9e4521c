#!/usr/bin/env bash
# The paper's plasticity losses of every checkpoint of every run in runs/; RUNS=smoke/runs names another folder.
# What stands behind is passed on: --dry-run, --cpus-per-run 2, --address auto, -- --targets initial --name initial, …
# Given again, it probes those runs that have new checkpoints since.
set -euo pipefail
cd "$(dirname "$0")/.."

exec python -m benchmark.run \
    --commands "python plasticity_probe.py" \
    --runs "${RUNS:-runs}"/* \
    "$@"
