"""What is trained: LoRA factors beside frozen linears, P-Tuning v2 prefixes, and parts of the eyes if asked.

LoRA (Hu et al. 2021): y = W x + b + (alpha / r) · B A x, with W and b frozen, A [r, in] random and B [out, r] zero at
the start, so that training begins at the base model's own answers.

QLoRA (Dettmers et al. 2023) is LoRA over weights kept in 4 bits: see `model.frozen`.
"""

import argparse
import math
from typing import Any

import torch

from model.checkpoints.layout import find_weights, read_json_object
from model.checkpoints.metadata import METHODS, has_lora, settings_to_go_on
from model.frozen import FrozenLinear, keep_in_4_bits
from model.model_flags import DEFAULT_LORA_TARGETS, add_method_flags, part_rates
from model.progress import say
from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel

import_sat()

from sat.model import BaseMixin  # noqa: E402  (sat can be imported only after import_sat)
from sat.model.finetune import PTuningV2Mixin  # noqa: E402

TRAINED_NAMES = {
    "use_ptuning": ("ptuning",),
    "use_lora": ("matrix_A", "matrix_B"),
    "use_qlora": ("matrix_A", "matrix_B"),
}
EYES = "mixins.eva.model."  # before the names of the vision parts' tensors
PART_OF_TARGET = {  # where SAT's layers keep the linears of --lora_target
    "query_key_value": "attention",
    "dense": "attention",
    "dense_h_to_4h": "mlp",
    "dense_4h_to_h": "mlp",
}


# --- LoRA -------------------------------------------------------------------------------------------------------------


class LoraLinear(torch.nn.Module):
    """A frozen linear with a low-rank change beside it, one pair of factors for each of its stacked parts.

    Parameter names are the released ones: `original.{weight,bias}`, `matrix_A.{part}` [r, in] and
    `matrix_B.{part}` [out / parts, r]. A checkpoint of the plain linear loads too: its weight becomes `original.weight`.
    """

    def __init__(self, original: Any, rank: int, parts: int = 1, alpha: float = 1.0, dropout: float = 0.0) -> None:
        """Wrap original, whose output stacks `parts` projections (query_key_value: 3).

        dropout is the probability with which the factors, and they alone, don't see a number of their input.

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
        self.dropout = torch.nn.Dropout(dropout)
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
        # Two products, however many parts: the A of all below each other, and each part's B on its own r columns.
        low_rank = (self.dropout(hidden_states) @ torch.cat(tuple(self.matrix_A)).T) * self.scale
        return self.original(hidden_states) + low_rank @ torch.block_diag(*self.matrix_B).T

    @torch.no_grad()
    def merged(self) -> torch.nn.Module:
        """The original linear with the change folded into its weight; from 4 bits, a plain linear of the same width."""
        plain = self.original.plain() if isinstance(self.original, FrozenLinear) else self.original
        plain.weight.copy_(folded(plain.weight, list(self.matrix_A), list(self.matrix_B), self.scale))
        return plain


def folded(
    weight: torch.Tensor, matrix_a: list[torch.Tensor], matrix_b: list[torch.Tensor], scale: float
) -> torch.Tensor:
    """W + scale · B A, [out, in], of all stacked parts; added in float32, in the weight's own dtype in the end."""
    change = torch.cat([b.float() @ a.float() for a, b in zip(matrix_a, matrix_b, strict=True)])
    return (weight.float() + change * scale).to(weight.dtype)


def _plain_linear_as_original(_: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *__: Any) -> None:
    """Rename a plain linear's tensors, in place, to where a LoraLinear keeps them."""
    for name in ("weight", "bias"):
        if prefix + name in state_dict:
            state_dict[f"{prefix}original.{name}"] = state_dict.pop(prefix + name)


class LoraMixin(BaseMixin):
    """LoRA on chosen linears of chosen layers; query_key_value has factors for each of its three parts."""

    def __init__(
        self,
        num_layers: int,
        rank: int,
        layer_range: list[int] | None = None,
        alpha: float = 1.0,
        dropout: float = 0.0,
        targets: list[str] | None = None,
    ) -> None:
        """layer_range lists the layers, counted from 0; None or an empty list means all of them.

        targets are names of PART_OF_TARGET; None means the attention's two, as released.
        """
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.layer_range = list(layer_range or range(num_layers))
        self.targets = [name for name in PART_OF_TARGET if name in (targets or DEFAULT_LORA_TARGETS)]

    def reinit(self, parent_model: Any = None) -> None:
        """Put the factors into the parent model; SAT calls this when the mixin is added."""
        # Dense comes before query_key_value, as the released script makes them: the first random numbers are its own.
        for layer, name in ((layer, name) for layer in self._layers() for name in reversed(self.targets)):
            part = getattr(layer, PART_OF_TARGET[name])
            stacked = layer.attention.stride if name == "query_key_value" else 1
            setattr(part, name, LoraLinear(getattr(part, name), self.rank, stacked, self.alpha, self.dropout))

    def merge_lora(self) -> None:
        """Fold the factors into the frozen weights, so that the model is a plain one that answers the same.

        The linears become plain again, and their tensors have the base model's names. Over 4-bit weights the sum is kept
        in full width: it isn't one of their 16 levels.
        """
        for layer in self._layers():
            for name in self.targets:
                part = getattr(layer, PART_OF_TARGET[name])
                if isinstance(getattr(part, name), LoraLinear):
                    setattr(part, name, getattr(part, name).merged())

    def _layers(self) -> list[Any]:
        return [self.transformer.layers[index] for index in self.layer_range]


# --- the model --------------------------------------------------------------------------------------------------------


class FineTuneVisualGLMModel(VisualGLMModel):
    """VisualGLM with the adapters that args asks for; only they, and the parts of --train_parts, are trained."""

    def __init__(
        self, args: Any, transformer: torch.nn.Module | None = None, parallel_output: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(args, transformer=transformer, parallel_output=parallel_output, **kwargs)
        asked = vars(args)
        trained_methods = getattr(args, "trained_methods", None) or [flag for flag in METHODS if asked.get(flag)]
        self.trained_names = tuple(dict.fromkeys(name for flag in trained_methods for name in TRAINED_NAMES[flag]))
        self.part_rates = part_rates(asked.get("train_parts") or [])
        self.lr = asked.get("lr")
        if args.use_ptuning:
            heads = args.num_attention_heads
            self.add_mixin(
                "ptuning", PTuningV2Mixin(args.num_layers, args.hidden_size // heads, heads, args.pre_seq_len)
            )
        if has_lora(asked):
            lora = LoraMixin(
                args.num_layers,
                args.lora_rank,
                args.layer_range,
                asked.get("lora_alpha", 1.0),
                asked.get("lora_dropout", 0.0),
                asked.get("lora_target"),
            )
            self.add_mixin("lora", lora, reinit=True)
        if asked.get("use_qlora"):
            keep_in_4_bits(self.transformer.layers)

    def is_trained_name(self, name: str) -> bool:
        """Whether the tensor of this name is to be learned."""
        parts = tuple(f"{EYES}{part}." for part in self.part_rates)
        return name.startswith(parts) or any(part in name for part in self.trained_names)

    def freeze(self) -> None:
        """Let nothing ask for gradients but what is trained.

        A part's own learning rate goes where SAT looks for it: `lr_scale`, in multiples of --lr.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_trained_name(name))
            for part, rate in self.part_rates.items():
                if rate is not None and name.startswith(f"{EYES}{part}."):
                    parameter.lr_scale = rate / self.lr

    def disable_untrainable_params(self) -> None:
        """Freeze everything but what is trained, and print what that is. SAT calls this once, before training."""
        self.freeze()
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        count, of_all = (sum(p.numel() for p in some) for some in ((p for _, p in trained), self.parameters()))
        say(f"Trainable, {count:,} of {of_all:,} parameters in {len(trained)} tensors:")
        say("\n".join(f"  {name} {list(parameter.shape)}" for name, parameter in trained))

    @classmethod
    def from_pretrained(cls, name: str, args: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """The model of a checkpoint of any kind (`model.checkpoints.metadata`), with the adapters that args asks for.

        Adapters that the checkpoint has stay; what args asks for joins them, and it alone is trained.

        Args:
            name: a folder, an iteration's folder, its weights file, or a name in $SAT_HOME.
            args: SAT's namespace; `base` and `force_base` in it tell where an adapter's base is.
            kwargs: SAT's; `build_only=True` leaves the weights out.
        """
        args = cls.get_args() if args is None else args
        config = read_json_object(find_weights(str(name)).parent.parent / "model_config.json", "The configuration")
        settings = settings_to_go_on(config, vars(args))
        typed = [method for method in METHODS if getattr(args, method, False)]
        args.trained_methods = typed or [method for method in METHODS if settings[method]]
        # The quantised linears get their weights from the file; until then full ones would fill the memory.
        args.skip_init = args.skip_init or settings["use_qlora"]
        overwrite_args = {**settings, **kwargs.pop("overwrite_args", {})}
        return super().from_pretrained(name, args, overwrite_args=overwrite_args, **kwargs)

    @classmethod
    def add_model_specific_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Declare the adapters' sizes, so that SAT writes them into every checkpoint's `model_config.json`."""
        add_method_flags(parser)
        return super().add_model_specific_args(parser)
