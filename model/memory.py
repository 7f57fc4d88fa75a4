"""Whether a step's activations fit into memory, or are better computed again in the backward pass."""

from typing import Any

import psutil
import torch

from model.progress import say

# Numbers that a layer keeps for the backward pass, per token and width, with frozen weights: the inputs of two layer
# norms and of GELU (1 + 1 + 4), query, key and value before and after their rotation (5), attention's output (1), two
# residuals (2), and dropout's masks (about 2). Counted on this model; a third is added for what comes and goes.
KEPT_PER_WIDTH = 16 * 4 / 3
USABLE = 0.8  # of what is free: the rest is for gradients, the optimizer and fragmentation


def activation_bytes(layers: int, width: int, tokens: int, bytes_per_number: int) -> int:
    """What the language model keeps for the backward pass of a micro-batch of so many tokens."""
    return int(layers * tokens * width * KEPT_PER_WIDTH * bytes_per_number)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def recompute_where_needed(model: Any, tokens: int) -> None:
    """Turn activation checkpointing on, and say so, where a micro-batch of so many tokens doesn't fit without it."""
    transformer, weight = model.transformer, model.transformer.word_embeddings.weight
    if transformer.checkpoint_activations:
        return
    needed = activation_bytes(len(transformer.layers), transformer.hidden_size, tokens, weight.element_size())
    free = free_bytes(weight.device)
    if needed > USABLE * free:
        transformer.checkpoint_activations = True
        say(
            f"Activations of {tokens} tokens take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: they are "
            "computed again in the backward pass, which takes a third longer. A smaller --batch-size avoids that."
        )
