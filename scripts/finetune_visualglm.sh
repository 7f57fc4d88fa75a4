#!/usr/bin/env bash
# Fine-tunes VisualGLM-6B with LoRA: the released recipe, but evaluated every 100 iterations on a tenth of the rows,
# which is held out of training.
# Flags that follow win over those below, as do those of a --config file:
# bash scripts/finetune_visualglm.sh --train-data my.json --lr 0.001
# The released recipe had --checkpoint-activations. Here activations are recomputed only if they don't fit into memory.
# The checkpoint is looked for in $SAT_HOME (~/.sat_models if unset), unless --from_pretrained FOLDER names another.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

"${launch[@]}" "$project/finetune_visualglm.py" \
    --from_pretrained visualglm-6b \
    --experiment-name finetune-visualglm-6b \
    --model-parallel-size 1 \
    --mode finetune \
    "${steps[@]}" \
    --resume-dataloader \
    --max_source_length 64 \
    --max_target_length 256 \
    --lora_rank 10 \
    --layer_range 0 14 \
    --train-data "$project/fewshot-data/dataset.json" \
    "${held_out[@]}" \
    --distributed-backend nccl \
    --lr-decay-style cosine \
    --warmup .02 \
    --save-interval 300 \
    --eval-interval 100 \
    --save ./checkpoints \
    --split 1 \
    --eval-batch-size 8 \
    --zero-stage 1 \
    --lr 0.0001 \
    --batch-size 4 \
    --skip-init \
    $numbers \
    --use_lora \
    --recipe_ends \
    "$@"
