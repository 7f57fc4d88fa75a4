"""What a step keeps in memory: activations where they fit, and on a CPU prepacked weights."""

from typing import Any

import psutil
import torch

from model.cpu import can_pack, pack_linears
from model.distributed import processes_here
from model.frozen import Nf4Linear, plain_linears
from model.lora import LoraLinear
from model.loss import CHUNK_LOGITS
from model.progress import say

# Numbers that a layer with frozen weights keeps for the backward pass, for each token and unit of width: inputs of two
# layer norms and of GELU (1 + 1 + 4), query, key and value (3), attention's output (1). tests/test_gpu_rehearsal.py counts
# them on the 6B's shape.
KEPT_PER_WIDTH = 10
KEPT_OF_A_PREFIX = 1  # more: keys with P-Tuning's before them, beside those without
BYTES_OF_DROPOUT = 2  # for each token and unit of width: two masks
BYTES_OF_A_SCORE = 8  # beside the score itself, while the loss is made of it: in float32, and its logarithm
USABLE = 0.8  # of what is free; the rest is for gradients, the optimizer and fragmentation


def activation_bytes(model: Any, tokens: int) -> int:
    """Bytes that the language model keeps for the backward pass of a micro-batch of so many tokens."""
    transformer, bytes_per_number = model.transformer, model.transformer.word_embeddings.weight.element_size()
    numbers = transformer.hidden_size * (KEPT_PER_WIDTH + KEPT_OF_A_PREFIX * ("ptuning" in model.mixins))
    kept = numbers * bytes_per_number * len(transformer.layers)
    for layer in transformer.layers:
        if layer.attention.output_dropout.p > 0:
            kept += transformer.hidden_size * BYTES_OF_DROPOUT
        adapted = [part for part in layer.modules() if isinstance(part, LoraLinear)]
        kept += sum(part.matrix_A[0].shape[1] * bytes_per_number for part in adapted)  # A's gradient needs its input
    return tokens * kept


def temporary_bytes(model: Any, tokens: int) -> int:
    """Bytes that a step takes beside them for a moment: the scores of a chunk of tokens, or a weight unpacked from 4 bits."""
    weight = model.transformer.word_embeddings.weight
    scores = min(CHUNK_LOGITS, tokens * len(weight)) * (weight.element_size() + BYTES_OF_A_SCORE)
    packed = (part for part in model.transformer.layers.modules() if isinstance(part, Nf4Linear))
    unpacked = max((part.in_features * part.out_features * weight.element_size() for part in packed), default=0)
    return max(scores, unpacked)


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
    needed = activation_bytes(model, tokens) + temporary_bytes(model, tokens)
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
