"""QLoRA checkpoints of the script of 2023, whose weights bitsandbytes had packed into 4 bits, in full width again.

    ….weight         uint8[out · in / 2, 1], two codes a byte: the first in the upper half
    ….quant_state    [scales, shape, dtype, numbers in a block, nested, "nf4"], or from bitsandbytes 0.41.2 on an object
    nested           [offset, [scales, levels, numbers in a block]] where the scales are codes of 8 bits; else null

Nothing of bitsandbytes is needed, nor any of its code run.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

NF4 = (  # the levels, from the QLoRA paper (Dettmers et al. 2023), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STATE = "quant_state"


class QuantState:
    """What a file has in an object of bitsandbytes' class of this name: its attributes, without its code."""

    absmax: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    code: torch.Tensor
    offset: torch.Tensor
    state2: "QuantState | None"


class Packing(NamedTuple):
    """How one weight is packed."""

    scales: torch.Tensor  # float32[blocks], or uint8[blocks] where nested
    shape: tuple[int, ...]
    dtype: torch.dtype  # that it had before
    block: int  # numbers that share a scale
    nested: tuple[float, torch.Tensor, torch.Tensor, int] | None  # offset, scales, levels and block of the scales


def states(module: object) -> dict[str, Any]:
    """What stands in a file's "module" beside packed weights, by the names of the weights; empty where none is packed."""
    if not isinstance(module, dict):
        return {}
    names = [name for name in module if isinstance(name, str) and name.endswith(f".{STATE}")]
    return {name.removesuffix(STATE) + "weight": module[name] for name in names}


def packings(states: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Packing]:
    """How these weights are packed, by their names.

    Raises:
        ValueError: in another way than this one.
    """
    try:
        found = {name: _packing(state) for name, state in states.items()}
        if any(2 * tensors[name].nbytes != math.prod(packing.shape) for name, packing in found.items()):
            raise ValueError
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError from error
    return found


def _packing(state: Any) -> Packing:
    if isinstance(state, QuantState):
        within = state.state2 and [state.offset, [state.state2.absmax, state.state2.code, state.state2.blocksize]]
        state = [state.absmax, state.shape, state.dtype, state.blocksize, within, state.quant_type]
    scales, shape, dtype, block, nested, kind = state[:6]
    if kind != "nf4" or not isinstance(scales, torch.Tensor) or not isinstance(dtype, torch.dtype):
        raise ValueError(kind)
    return Packing(scales, tuple(shape), dtype, block, nested and (float(nested[0]), *nested[1][:3]))


def in_full_width(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """A packed weight in the shape and dtype that it had."""
    scales = packing.scales
    if packing.nested:
        offset, outer, levels, block = packing.nested
        scales = levels.index_select(0, scales.int()) * outer.repeat_interleave(block)[: len(scales)] + offset
    numbers = packed.flatten()
    codes = torch.stack([numbers >> 4, numbers & 15], dim=1).flatten().int()
    found = torch.tensor(NF4).index_select(0, codes) * scales.repeat_interleave(packing.block)[: len(codes)]
    return found.to(packing.dtype).view(packing.shape)
