"""What a step keeps in memory: activations where they fit, and on a CPU prepacked weights."""

from typing import Any

import psutil
import torch

from model.cpu import can_pack, pack_linears
from model.distributed import processes_here
from model.frozen import plain_linears
from model.progress import say

# Numbers that a layer with frozen weights keeps for the backward pass, for each token and unit of width. Counted on this
# model: inputs of two layer norms and of GELU (1 + 1 + 4), query, key and value before and after their rotation (5),
# attention's output (1), two residuals (2), dropout's masks (about 2). A third is added for temporary tensors.
KEPT_PER_WIDTH = 16 * 4 / 3
USABLE = 0.8  # of what is free; the rest is for gradients, the optimizer and fragmentation


def activation_bytes(layers: int, width: int, tokens: int, bytes_per_number: int) -> int:
    """Bytes that the language model keeps for the backward pass of a micro-batch of so many tokens."""
    return int(layers * tokens * width * KEPT_PER_WIDTH * bytes_per_number)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on the device now. The processes of a machine share a CPU's; each has a GPU of its own."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes_here()[1]


def fit_into_memory(model: Any, tokens: int, zero_stage: int = 0) -> None:
    """Choose what is kept for a micro-batch of so many tokens, by the memory that is free, and by DeepSpeed's zero_stage.

    If the activations don't fit, they are checkpointed, and that is said. If they do on a CPU, the language model's
    frozen linears are prepacked (`model.cpu`), provided that there is room for their weights a second time: the gradient
    needs them in an order of its own.
    """
    transformer, weight = model.transformer, model.transformer.word_embeddings.weight
    free = USABLE * free_bytes(weight.device)
    needed = activation_bytes(len(transformer.layers), transformer.hidden_size, tokens, weight.element_size())
    if transformer.checkpoint_activations:
        needed = 0
    elif needed > free:
        transformer.checkpoint_activations = True
        say(
            f"Activations of {tokens} tokens take about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB can be used: they "
            "are computed again in the backward pass, which takes a third longer. A smaller --batch-size avoids that."
        )
        return
    if not can_pack(weight) or zero_stage == 3:  # ZeRO 3 keeps a part of each weight, in torch's order
        return
    networks = (transformer.layers, model.get_mixin("chatglm-final"))
    weights = [linear.weight for network in networks for _, _, linear in plain_linears(network)]
    if needed + sum(weight.nbytes for weight in weights if not weight.requires_grad) <= free:
        for network in networks:
            pack_linears(network)
