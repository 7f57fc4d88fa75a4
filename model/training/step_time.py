"""How long a step will take, told before it begins: its matrix products, at the rate that this processor has in one of them.

    rate = measured_rate(setup, batch, "cpu")     operations a second, measured in half a second
    step_operations(setup, batch) / rate          seconds that a micro-batch takes at least

A product of the step's own size and number format is measured: of few tokens, or with weights that no cache holds, a
processor doesn't reach what it does in a large square one. What is no product is not counted: norms, GELU, softmax, sums,
and Python itself. scripts/dev/BENCHMARKS.md says how much longer steps take.

Only the standard library and numbers of `model.training.memory` are imported at the top.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from model.training.memory import (
    Batch,
    Setup,
    decoders,
    first_trained_layer,
    image_positions,
    inner_size,
    layer_linears,
    seen_keys,
)

SECONDS = 0.3  # that a rate is measured for
OF_WEIGHTS = 2**28  # bytes of weights that it is measured with, or one of them: more than a cache holds
SECONDS_TO_START = 0.002  # the kernels of a layer, forward and backward: short rows take 54 to 71 ms on an H200
NUMBERS_UNPACKED = 2**23  # from 4 bits, in one measurement


def step_operations(setup: Setup, batch: Batch) -> float:
    """Floating-point operations of one micro-batch's products in a process, with pictures that are looked at in each step.

    A product with a frozen weight takes 2 operations a number and token, and its gradient 2 more, from the first trained
    layer up. The last layer works on what its attention gives at supervised positions only, as the head does.
    """
    config, tokens = setup.config, batch.tokens
    hidden, layers, answers = config["hidden_size"], config["num_layers"], min(batch.answers, batch.tokens)
    with_gradient = layers - first_trained_layer(setup)
    passes = 2 * layers + 2 * with_gradient + (2 * with_gradient if setup.recomputed else 0)  # of a number and token
    once = 6 if setup.recomputed else 4  # the same, of one layer that gradients come to
    spared = once * (tokens - answers) * (layer_linears(config) - 3 * hidden * hidden)
    products = passes * tokens * layer_linears(config) - spared + 4 * answers * config["vocab_size"] * hidden
    attention = (
        2 * tokens * seen_keys(setup, batch) * hidden * (passes + 2 * with_gradient)
    )  # a gradient to each of its two factors
    trained = 3 if setup.trains_vision else 1
    return (products + attention) / setup.model_parallel + batch.images * trained * picture_operations(config)


def picture_operations(config: Any) -> float:
    """Floating-point operations of the products that ViT, Q-Former and projection do for a picture."""
    vit, qformer = config["eva_args"], config["qformer_args"]
    positions, queries = image_positions(config), qformer["vocab_size"]
    width, hidden, seen = vit["hidden_size"], qformer["hidden_size"], qformer["cross_attn_hidden_size"]
    patch = vit["in_channels"] * vit["patch_size"] ** 2 * width
    of_position = vit["num_layers"] * _of_layer(width, inner_size(vit)) + patch + 2 * decoders(qformer) * seen * hidden
    of_query = qformer["num_layers"] * _of_layer(hidden, inner_size(qformer)) + 2 * decoders(qformer) * hidden * hidden
    of_query += hidden * config["hidden_size"]
    attention = 2 * positions * (vit["num_layers"] * positions * width + decoders(qformer) * queries * hidden)
    return 2.0 * (positions * of_position + queries * of_query + attention)


def _of_layer(width: int, inner: int) -> int:
    """Numbers in the matrices of a transformer's layer."""
    return 4 * width * width + 2 * width * inner


def starting_seconds(setup: Setup) -> float:
    """How long a core takes to start the kernels of a micro-batch's layers on a GPU; nothing shorter is to be had."""
    return SECONDS_TO_START * setup.config["num_layers"] * (2 if setup.recomputed else 1)


def unpacked_numbers(setup: Setup) -> int:
    """Numbers that a micro-batch unpacks from 4 bits: a weight for its product, and again for the gradient."""
    if not setup.is_4bit:
        return 0
    layers = setup.config["num_layers"]
    times = layers + (layers - first_trained_layer(setup)) * (2 if setup.recomputed else 1)
    return times * layer_linears(setup.config) // setup.model_parallel


def measured_rate(setup: Setup, batch: Batch, device: str) -> float:
    """Operations a second of the product that makes a layer wide, in the run's number format, as the run does it.

    As in a step, the weights of many layers come in turns. So a cache holds them here only if it does so there.
    """
    import torch
    import torch.nn.functional as F

    dtype = _dtype(setup)
    hidden, inner = setup.config["hidden_size"], inner_size(setup.config) // setup.model_parallel
    x = torch.ones(batch.tokens, hidden, device=device, dtype=dtype)
    count = max(1, min(setup.config["num_layers"], OF_WEIGHTS // (inner * hidden * setup.bytes)))
    weights = [torch.ones(inner, hidden, device=device, dtype=dtype) for _ in range(count)]
    product: Callable[[Any], Any] = lambda weight: F.linear(x, weight)  # noqa: E731
    if setup.packed and not setup.is_4bit:
        from model.cpu import can_pack, in_onednn_order, onednn_linear

        if can_pack(weights[0]):
            weights = [in_onednn_order(weight) for weight in weights]
            product = lambda weight: onednn_linear(x, weight, None)  # noqa: E731
    in_turns = itertools.cycle(weights)
    return 2 * batch.tokens * hidden * inner / typical_seconds(lambda: product(next(in_turns)), device)


def measured_unpacking(setup: Setup, device: str) -> float:
    """Numbers a second that are unpacked from 4 bits."""
    import torch

    from model.frozen import dequantized, quantized

    dtype = _dtype(setup)
    packed, state = quantized(torch.ones(NUMBERS_UNPACKED // 1024, 1024, device=device))
    return NUMBERS_UNPACKED / typical_seconds(lambda: dequantized(packed, state, dtype), device)


def _dtype(setup: Setup) -> Any:
    """The torch.dtype of a run."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[setup.dtype]


def typical_seconds(call: Callable[[], Any], device: str) -> float:
    """The median time of a call, after one that makes plans and tables."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times: list[float] = []
    call()
    while sum(times) < SECONDS:
        wait()
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
