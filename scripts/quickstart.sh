#!/usr/bin/env bash
# Teaches the small VisualGLM that ships with the project a question that it has never seen, and shows what it learned:
# sets up, asks about held-out pictures, fine-tunes with LoRA on fewshot-data/dataset.json, and asks again.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh

# The small model's matrices are too small to share between threads. One thread is as fast, and far faster on a busy
# machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run=.quickstart
rm -rf "$run"
answers() { "$python" scripts/evaluate.py --from_pretrained "$1" --data fewshot-data/heldout.json | tee >(cat >&2); }
right() { grep -o '[0-9]*/[0-9]*$' <<< "$1" | tail -n 1; }

echo "Before: the small model answers pictures that it won't be trained on."
before=$(answers model/tiny)

echo
# In float32: for so small a model bfloat16 is hardly faster, and not every CPU has instructions for it.
echo "Training: LoRA on the 20 rows of fewshot-data/dataset.json."
"$python" finetune_visualglm.py \
    --from_pretrained model/tiny \
    --experiment-name quickstart \
    --mode finetune \
    --use_lora \
    --train-data fewshot-data/dataset.json \
    --train-iters 120 \
    --auto_warmup_steps 0 \
    --batch-size 4 \
    --lr 0.01 \
    --lr-decay-style cosine \
    --num-workers 0 \
    --save "$run"

echo
echo "After: a new process loads the checkpoint and answers the same pictures."
trained=$(dirname "$run"/*/latest)
after=$(answers "$trained")

echo "The run on one page, with its curves and answers: $trained/report.html"
echo "held-out answers right: before $(right "$before"), after $(right "$after")"
