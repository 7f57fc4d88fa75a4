"""A model that is split among model-parallel processes: which part of a tensor each has, and the whole again.

    own_parts(weights, rank, ranks)     what a process takes of a whole model's tensors; only its part of a file is read
    joined(parts, config)             mp_rank_00, mp_rank_01, … of a checkpoint that SAT wrote in parts, put together

SAT splits these tensors, and every other one is the same on all processes:

    word_embeddings                          rows, where they are many enough
    query_key_value, key_value               rows of each of the 3 or 2 stacked projections
    query, dense_h_to_4h, lm_head            rows
    weight of dense and dense_4h_to_h        columns

An adapter follows its linear. LoRA's B has the rows that its linear has, and A the columns; a prefix is split by heads.
Checkpoints of SAT split the vision part too. Here it is whole on every process (`model.visualglm.ImageMixin`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from model.checkpoints.metadata import VISION
from model.checkpoints.tensors import LazyTensor, LazyTensors
from model.errors import InputError
from model.sat_compat import model_parallel

STACKED = {"query_key_value": 3, "key_value": 2}  # projections below each other, SAT's `stride`
BY_ROWS = (*STACKED, "query", "dense_h_to_4h", "lm_head", "word_embeddings")
BY_COLUMNS = ("dense", "dense_4h_to_h")  # their bias is whole in every part
LEAST_VOCABULARY = 1000  # rows of word embeddings that SAT splits: its BaseTransformer
OF_A_LINEAR = re.compile(r"(?:^|\.)(\w+)\.(?:original\.)?(weight|bias|matrix_A|matrix_B)(?:\.\d+)?$")


class Split(NamedTuple):
    """How a tensor is split: along a dimension, in each of the projections that are stacked there."""

    dim: int
    stacked: int = 1


def split_of(name: str) -> Split | None:
    """How the tensor of a name is split among model-parallel processes; None if each has all of it."""
    if name.startswith("mixins.ptuning.prefix."):
        return Split(1)  # [2, heads, length, head_dim]
    found = OF_A_LINEAR.search(name)
    if found is None:
        return None
    linear, kind = found.groups()
    if linear in BY_ROWS and kind != "matrix_A":
        return Split(0, STACKED.get(linear, 1) if kind != "matrix_B" else 1)  # a factor for each projection
    return Split(1) if linear in BY_COLUMNS and kind in ("weight", "matrix_A") else None


def own_part(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What the process of a rank has of a whole tensor, or of what an optimizer keeps for it."""
    split = _split_here(name, len(tensor)) if tensor.dim() else None
    if split is None or ranks == 1:
        return tensor
    pieces = [piece.chunk(ranks, split.dim)[rank] for piece in tensor.chunk(split.stacked, split.dim)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, split.dim)


def whole(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor whose parts the processes have, as `own_part` gives them."""
    split = split_of(name) if len(parts) > 1 else None
    if split is None:
        return parts[0]
    pieces = [one.chunk(split.stacked, split.dim) for one in parts]
    return torch.cat([piece[number] for number in range(split.stacked) for piece in pieces], split.dim)


def whole_shape(name: str, shape: Sequence[int], is_split: bool = True) -> list[int]:
    """The shape of the whole tensor of a name, of which this process has a part of the given shape."""
    ranks, split = model_parallel().ranks, split_of(name)
    if split is None or not is_split or name.startswith(VISION):
        return list(shape)
    return [size * ranks if dim == split.dim else size for dim, size in enumerate(shape)]


def own_parts(weights: Mapping[str, torch.Tensor], rank: int, ranks: int) -> Mapping[str, torch.Tensor]:
    """The tensors that the process of a rank has of a whole model; each is taken out when it is asked for."""
    if ranks == 1:
        return weights
    entries = LazyTensors.of(weights).entries
    return LazyTensors({name: _lazy_part(name, entry, rank, ranks) for name, entry in entries.items()})


def _lazy_part(name: str, entry: LazyTensor, rank: int, ranks: int) -> LazyTensor:
    split = _split_here(name, entry.shape[0] if entry.shape else 1)
    if split is None:
        return entry
    shape = list(entry.shape)
    shape[split.dim] //= ranks
    return LazyTensor(tuple(shape), entry.dtype, lambda: own_part(name, entry.read(), rank, ranks))


def _split_here(name: str, rows: int) -> Split | None:
    """How a whole tensor of so many rows is split in this project's model."""
    is_small = ".word_embeddings." in name and rows < LEAST_VOCABULARY
    return None if name.startswith(VISION) or is_small else split_of(name)


def joined(parts: Sequence[Mapping[str, torch.Tensor]], config: Mapping[str, Any]) -> LazyTensors:
    """The tensors of the whole model; each is put together when it is asked for.

    Args:
        parts: of rank 0, 1, … config: the whole model's `model_config.json`.

    Raises:
        InputError: a part lacks a tensor that the first one has.
    """
    for rank, part in enumerate(parts):
        missing = [name for name in parts[0] if name not in part]
        if missing:
            raise InputError(
                f"mp_rank_{rank:02d}_model_states.pt: {len(missing)} tensors of mp_rank_00_model_states.pt are missing (the "
                f"first: {missing[0]}); all parts of one checkpoint are needed."
            )
    return LazyTensors({name: _joined(name, [part[name] for part in parts], config) for name in parts[0]})


def gathered(name: str, tensor: torch.Tensor, is_split: bool = True) -> torch.Tensor:
    """The whole tensor of a name, put together from all model-parallel processes, each of which calls this."""
    _, ranks, group = model_parallel()
    if ranks == 1 or not is_split or name.startswith(VISION) or split_of(name) is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(ranks)]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return whole(name, parts)


def _joined(name: str, parts: list[torch.Tensor], config: Mapping[str, Any]) -> LazyTensor:
    split = split_of(name)
    if ".word_embeddings." in name and len(parts[0]) * len(parts) != _vocabulary(name, config):
        split = None
    if split is None:
        return LazyTensor.of(parts[0])
    shape = list(parts[0].shape)
    shape[split.dim] *= len(parts)
    return LazyTensor(tuple(shape), parts[0].dtype, lambda: whole(name, parts))


def _vocabulary(name: str, config: Mapping[str, Any]) -> int:
    """How many rows the word embeddings of this part of the model have."""
    of_vision = re.match(r"mixins\.eva\.model\.(vit|qformer)\.", name)
    if of_vision is None:
        return int(config["vocab_size"])
    sizes = config["eva_args" if of_vision[1] == "vit" else "qformer_args"]
    return int(sizes["vocab_size"])
