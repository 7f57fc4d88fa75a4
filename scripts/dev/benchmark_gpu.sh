#!/usr/bin/env bash
# Measures a GPU in one go of some minutes: the 6B shape with random weights, the released way and ours, and what only a GPU can
# decide. It ends in a table for BENCHMARKS.md, which says what to change where a number disagrees with what is done now.
# It needs only this repository and its packages: those of an active environment, else of .venv (scripts/setup.sh). Each row's
# figures go to a JSON file in a folder (default: benchmark_gpu), and the table to choices.md there. Words that follow go to
# gpu_choices.py, the folder first: figures --dtype bf16
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$project/.venv" ]; then
    export PATH="$project/.venv/bin:$PATH"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python "$project/scripts/dev/gpu_choices.py" "${@:-benchmark_gpu}"
