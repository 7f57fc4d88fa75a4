"""LoRA (Hu et al. 2021): trained factors of low rank beside frozen linears.

    y = W x + b + (alpha / r) · B A x        W, b frozen; A [r, in] random, B [out, r] zero

B is zero at the start, so that training begins at the base model's own answers. QLoRA (Dettmers et al. 2023) is LoRA
over weights kept in 4 bits: see `model.frozen`.
"""

import math
from typing import Any

import torch

from model.adapter_config import AdapterConfig
from model.frozen import FrozenLinear, split_of_linear
from model.sat_compat import import_sat

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.model import BaseMixin  # noqa: E402

PART_OF_TARGET = {  # where SAT's layers keep the linears of --lora_target
    "query_key_value": "attention",
    "dense": "attention",
    "dense_h_to_4h": "mlp",
    "dense_4h_to_h": "mlp",
}


class LoraLinear(torch.nn.Module):
    """A frozen linear with a low-rank change beside it, one pair of factors for each of its stacked parts.

    Parameter names are the released ones: `original.{weight,bias}`, `matrix_A.{part}` [r, in] and
    `matrix_B.{part}` [out / parts, r]. A checkpoint of the plain linear loads too: its weight becomes `original.weight`.
    """

    def __init__(self, original: Any, rank: int, parts: int = 1, alpha: float = 1.0, dropout: float = 0.0) -> None:
        """Wrap original, whose output stacks `parts` projections (query_key_value: 3).

        dropout is the probability that a number of the input is hidden from the factors. The original sees them all.

        Raises:
            ValueError: the output can't be divided into that many parts.
        """
        super().__init__()
        weight = original.weight
        out_features, in_features = weight.shape
        if out_features % parts:
            raise ValueError(f"LoRA on a linear of {out_features} outputs in {parts} parts; they must be equal parts.")
        self.original = original
        self.scale = alpha / rank
        self.split = split_of_linear(original)
        self.dropout = torch.nn.Dropout(dropout)
        self.matrix_A = torch.nn.ParameterList(
            torch.nn.Parameter(weight.new_empty(rank, in_features)) for _ in range(parts)
        )
        self.matrix_B = torch.nn.ParameterList(
            torch.nn.Parameter(weight.new_zeros(out_features // parts, rank)) for _ in range(parts)
        )
        self.draw(self.matrix_A[0].device)
        self.register_load_state_dict_pre_hook(_plain_linear_as_original)

    @torch.no_grad()
    def draw(self, device: torch.device) -> None:
        """Put fresh factors on the device, in place of those that are there: drawn on the CPU, the same on every device.

        On the meta device, which has no numbers, those that are there stay.
        """
        for factors, split in ((self.matrix_A, "columns"), (self.matrix_B, "rows")):
            for part, old in enumerate(factors):
                if device.type != "meta":
                    new = torch.zeros(old.shape, dtype=old.dtype)
                    if factors is self.matrix_A:
                        new = first_factor(new, self.split)
                    factors[part] = torch.nn.Parameter(new.to(device), requires_grad=old.requires_grad)
                factors[part].model_parallel = self.split == split

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The original's output plus scale · B A x, [..., in] → [..., out]."""
        # Two products, however many parts there are: all A below each other, then all B on a block diagonal.
        low_rank = (self.dropout(hidden_states) @ torch.cat(tuple(self.matrix_A)).T) * self.scale
        if self.split == "columns":
            low_rank = mpu.reduce_from_model_parallel_region(low_rank)
        elif self.split == "rows":
            low_rank = mpu.copy_to_model_parallel_region(low_rank)
        return self.original(hidden_states) + low_rank @ torch.block_diag(*self.matrix_B).T

    @torch.no_grad()
    def merged(self) -> torch.nn.Module:
        """The original linear with the change folded into its weight; from 4 bits, a plain linear of the same width."""
        plain = self.original.plain() if isinstance(self.original, FrozenLinear) else self.original
        plain.weight.copy_(folded(plain.weight, list(self.matrix_A), list(self.matrix_B), self.scale))
        return plain


def first_factor(like: torch.Tensor, split: str | None) -> torch.Tensor:
    """A random A [rank, in]: this process's columns of the one that every process draws, if it has a part."""
    processes = mpu.get_model_parallel_world_size() if split == "columns" else 1
    factor = torch.nn.init.kaiming_uniform_(like.repeat(1, processes), a=math.sqrt(5))
    return factor.chunk(processes, 1)[mpu.get_model_parallel_rank()].clone() if processes > 1 else factor


def folded(
    weight: torch.Tensor, matrix_a: list[torch.Tensor], matrix_b: list[torch.Tensor], scale: float
) -> torch.Tensor:
    """W + scale · B A, [out, in], of all stacked parts: summed in float32, returned in the weight's own dtype."""
    change = torch.cat([b.float() @ a.float() for a, b in zip(matrix_a, matrix_b, strict=True)])
    return (weight.float() + change * scale).to(weight.dtype)


def _plain_linear_as_original(_: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Rename a plain linear's tensors, in place, to where a LoraLinear keeps them."""
    for name in ("weight", "bias"):
        if prefix + name in state_dict:
            state_dict[f"{prefix}original.{name}"] = state_dict.pop(prefix + name)


class LoraMixin(BaseMixin):
    """LoRA on chosen linears of chosen layers; query_key_value has factors for each of its three parts."""

    def __init__(self, num_layers: int, adapters: AdapterConfig) -> None:
        """Factors of adapters' rank, on its linears in its layers, of num_layers."""
        super().__init__()
        self.rank, self.alpha, self.dropout = adapters.rank, adapters.alpha, adapters.dropout
        self.layer_range = adapters.lora_layers(num_layers)
        self.targets = [name for name in PART_OF_TARGET if name in adapters.lora_targets]

    def reinit(self, parent_model: Any = None) -> None:
        """Put the factors into the parent model; SAT calls this when the mixin is added."""
        for layer, name in ((layer, name) for layer in self._layers() for name in reversed(self.targets)):
            part = getattr(layer, PART_OF_TARGET[name])
            stacked = layer.attention.stride if name == "query_key_value" else 1
            setattr(part, name, LoraLinear(getattr(part, name), self.rank, stacked, self.alpha, self.dropout))

    def merge_lora(self) -> None:
        """Fold the factors into the frozen weights. The model answers as before and is a plain one.

        Its tensors have the base model's names again. Over 4-bit weights the sum is kept in full width, as it isn't one
        of their 16 levels.
        """
        for layer in self._layers():
            for name in self.targets:
                part = getattr(layer, PART_OF_TARGET[name])
                if isinstance(getattr(part, name), LoraLinear):
                    setattr(part, name, getattr(part, name).merged())

    def _layers(self) -> list[Any]:
        return [self.transformer.layers[index] for index in self.layer_range]
