"""What is trained: LoRA factors beside frozen linears, or P-Tuning v2 prefixes in front of the keys and values.

LoRA (Hu et al. 2021): y = W x + b + (alpha / r) · B A x, with W and b frozen, A [r, in] random and B [out, r] zero at
the start, so that training begins at the base model's own answers.
"""

import argparse
import math
from typing import Any

import torch

from model.options import add_method_flags
from model.progress import say
from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel

import_sat()

from sat.model import BaseMixin  # noqa: E402  (sat can be imported only after import_sat)
from sat.model.finetune import PTuningV2Mixin  # noqa: E402

TRAINED_NAMES = {"use_ptuning": ("ptuning",), "use_lora": ("matrix_A", "matrix_B")}


class LoraLinear(torch.nn.Module):
    """A frozen linear with a low-rank change beside it, one pair of factors for each of its stacked parts.

    Parameter names are the released ones: `original.{weight,bias}`, `matrix_A.{part}` [r, in] and
    `matrix_B.{part}` [out / parts, r]. A checkpoint of the plain linear loads too: its weight becomes `original.weight`.
    """

    def __init__(self, original: Any, rank: int, parts: int = 1, alpha: float = 1.0) -> None:
        """Wrap original, whose output stacks `parts` projections (query_key_value: 3).

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
        self.matrix_A = torch.nn.ParameterList(
            torch.nn.Parameter(weight.new_empty(rank, in_features)) for _ in range(parts)
        )
        self.matrix_B = torch.nn.ParameterList(
            torch.nn.Parameter(weight.new_zeros(out_features // parts, rank)) for _ in range(parts)
        )
        for factor in self.matrix_A:
            torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.register_load_state_dict_pre_hook(_plain_linear_as_original)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The original's output plus scale · B A x, [..., in] → [..., out]."""
        # All parts' A in one product; then each part's B on its own r columns.
        low_rank = hidden_states @ torch.cat(tuple(self.matrix_A)).T
        parts = low_rank.split(self.matrix_A[0].shape[0], dim=-1)
        change = torch.cat([part @ b.T for part, b in zip(parts, self.matrix_B, strict=True)], dim=-1)
        return torch.add(self.original(hidden_states), change, alpha=self.scale)


def _plain_linear_as_original(_: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Rename a plain linear's tensors, in place, to where a LoraLinear keeps them."""
    for name in ("weight", "bias"):
        if prefix + name in state_dict:
            state_dict[f"{prefix}original.{name}"] = state_dict.pop(prefix + name)


class LoraMixin(BaseMixin):
    """LoRA on the attention of chosen layers: query_key_value in three parts, and dense."""

    def __init__(self, num_layers: int, rank: int, layer_range: list[int] | None = None, alpha: float = 1.0) -> None:
        """layer_range lists the layers, counted from 0; None or an empty list means all of them."""
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.layer_range = list(layer_range or range(num_layers))

    def reinit(self, parent_model: Any = None) -> None:
        """Put the factors into the parent model; SAT calls this when the mixin is added."""
        for index in self.layer_range:
            attention = parent_model.transformer.layers[index].attention
            attention.dense = LoraLinear(attention.dense, self.rank, alpha=self.alpha)
            attention.query_key_value = LoraLinear(
                attention.query_key_value, self.rank, parts=attention.stride, alpha=self.alpha
            )


class FineTuneVisualGLMModel(VisualGLMModel):
    """VisualGLM with the adapters that args asks for; only they are trained."""

    def __init__(
        self, args: Any, transformer: torch.nn.Module | None = None, parallel_output: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(args, transformer=transformer, parallel_output=parallel_output, **kwargs)
        self.trained_names = tuple(
            name for flag, names in TRAINED_NAMES.items() if getattr(args, flag, False) for name in names
        )
        if args.use_ptuning:
            heads = args.num_attention_heads
            self.add_mixin(
                "ptuning", PTuningV2Mixin(args.num_layers, args.hidden_size // heads, heads, args.pre_seq_len)
            )
        if args.use_lora:
            self.add_mixin("lora", LoraMixin(args.num_layers, args.lora_rank, args.layer_range), reinit=True)

    def freeze(self) -> None:
        """Let the adapters alone ask for gradients."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in self.trained_names))

    def disable_untrainable_params(self) -> None:
        """Freeze everything but the adapters, and print what is left to train. SAT calls this once, before training."""
        self.freeze()
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        count, of_all = (sum(p.numel() for p in some) for some in ((p for _, p in trained), self.parameters()))
        say(f"Trainable, {count:,} of {of_all:,} parameters in {len(trained)} tensors:")
        say("\n".join(f"  {name} {list(parameter.shape)}" for name, parameter in trained))

    @classmethod
    def add_model_specific_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Declare the adapters' sizes, so that SAT writes them into every checkpoint's `model_config.json`."""
        add_method_flags(parser)
        return super().add_model_specific_args(parser)
