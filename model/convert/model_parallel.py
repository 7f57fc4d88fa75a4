"""The parts that model-parallel processes saved, put together: mp_rank_00, mp_rank_01, … of one iteration.

SAT splits these tensors among the processes, and every other one is the same in all parts:

    word_embeddings                          rows, where they are many enough
    query_key_value, key_value               rows of each of the 3 or 2 stacked projections
    query, dense_h_to_4h, lm_head            rows
    weight of dense and dense_4h_to_h        columns
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from model.checkpoints.tensors import LazyTensor, LazyTensors

STACKED = {"query_key_value": 3, "key_value": 2}  # projections below each other, SAT's `stride`
BY_ROWS = ("query", "dense_h_to_4h", "lm_head")
BY_COLUMNS = ("dense", "dense_4h_to_h")  # their bias is whole in every part


def joined(parts: Sequence[Mapping[str, torch.Tensor]], config: Mapping[str, Any]) -> LazyTensors:
    """The tensors of the whole model; each is put together when it is asked for.

    Args:
        parts: of rank 0, 1, … config: the whole model's `model_config.json`.
    """
    return LazyTensors({name: _joined(name, [part[name] for part in parts], config) for name in parts[0]})


def _joined(name: str, parts: list[torch.Tensor], config: Mapping[str, Any]) -> LazyTensor:
    *_, module, kind = ("", *name.split("."))
    rows, *columns = parts[0].shape or (1,)
    if module in BY_COLUMNS and kind == "weight":
        return LazyTensor((rows, columns[0] * len(parts)), parts[0].dtype, lambda: torch.cat(parts, dim=1))
    stacked = STACKED.get(module, 1)
    is_split = module in STACKED or module in BY_ROWS
    if module == "word_embeddings":
        is_split = rows * len(parts) == _vocabulary(name, config)
    if not is_split:
        return LazyTensor.of(parts[0])

    def below_each_other() -> torch.Tensor:
        pieces = [part.chunk(stacked) for part in parts]
        return torch.cat([piece[projection] for projection in range(stacked) for piece in pieces])

    return LazyTensor((rows * len(parts), *columns), parts[0].dtype, below_each_other)


def _vocabulary(name: str, config: Mapping[str, Any]) -> int:
    """How many rows the word embeddings of this part of the model have."""
    part = re.match(r"mixins\.eva\.model\.(vit|qformer)\.", name)
    if part is None:
        return int(config["vocab_size"])
    sizes = config["eva_args" if part[1] == "vit" else "qformer_args"]
    return int(sizes["vocab_size"])
