#!/usr/bin/env bash
# Measures the whole table of one GPU in a few minutes: the 6B shape with random weights, the released way and ours. Then it
# measures what only a GPU can decide, and prints a table for BENCHMARKS.md, which says what to change where a number disagrees.
# It needs only this repository and its packages: those of an active environment, else of .venv (scripts/setup.sh). Each row's
# figures go to a JSON file in the folder $1 (default: benchmark_gpu), and the table to choices.md there.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$project/.venv" ]; then
    export PATH="$project/.venv/bin:$PATH"
fi
out=${1:-benchmark_gpu}
mkdir -p "$out"

row() {
    local name=$1
    shift
    echo "== $name: $*"
    python "$project/scripts/dev/benchmark.py" --shape 6b --steps 5 --json "$out/$name.json" "$@"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
row few-shot-fp16 --dtype fp16 --batch-size 4
row few-shot-bf16 --dtype bf16 --batch-size 4
row full-batches --dtype bf16 --batch-size 16 --seq 1024 --max_source_length 512 --max_target_length 512
row lora-batch-1 --dtype fp16 --batch-size 1
row ptuning --dtype fp16 --batch-size 4 --method ptuning
row qlora-batch-1 --dtype fp16 --batch-size 1 --method qlora
row ablation --dtype fp16 --batch-size 4 --ablate
python "$project/scripts/dev/gpu_choices.py" "$out" | tee "$out/choices.md"
