"""VisualGLM with adapters: what is trained, and what is frozen."""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.adapter_config import AdapterConfig
from model.attention import PrefixMixin
from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import VISION
from model.checkpoints.model_parallel import whole_shape
from model.checkpoints.save import is_split_here
from model.frozen import FrozenLinear, import_bitsandbytes, keep_in_4_bits
from model.lora import LoraLinear, LoraMixin
from model.model_flags import add_method_flags
from model.progress import count_of, say
from model.sat_compat import model_parallel
from model.visualglm import VisualGLMModel


class FineTuneVisualGLMModel(VisualGLMModel):
    """VisualGLM with the adapters that args asks for; only they, and the parts of --train_parts, are trained."""

    def __init__(
        self,
        args: Any,
        transformer: torch.nn.Module | None = None,
        parallel_output: bool = True,
        adapters: AdapterConfig | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the model that args, SAT's namespace, describes; kwargs are SAT's.

        Args:
            adapters: in place of those that args asks for.
        """
        super().__init__(args, transformer=transformer, parallel_output=parallel_output, **kwargs)
        self.args = args  # overridden methods of 2023 read it
        self.adapters = AdapterConfig.from_options(args) if adapters is None else adapters
        self.lr: Any = getattr(args, "lr", None)
        self.seed: int | None = getattr(args, "seed", None)
        if self.adapters.has_ptuning:
            heads = args.num_attention_heads
            head_size = args.hidden_size // heads
            self.add_mixin("ptuning", PrefixMixin(args.num_layers, head_size, heads, self.adapters.prefix_length))
        if self.adapters.has_lora:
            self.add_mixin("lora", LoraMixin(args.num_layers, self.adapters), reinit=True)
        if "qlora" in self.adapters.methods:
            keep_in_4_bits(self.transformer.layers)

    def is_trained_name(self, name: str) -> bool:
        """Whether the tensor of this name is to be learned."""
        parts = tuple(f"{VISION}{part}." for part in self.adapters.part_rates)
        return name.startswith(parts) or any(part in name for part in self.adapters.trained_tensor_names)

    def freeze(self) -> None:
        """Let nothing ask for gradients but what is trained.

        A part's own learning rate goes where SAT looks for it: `lr_scale`, in multiples of --lr.
        """
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_trained_name(name))
            for part, rate in self.adapters.part_rates.items():
                if rate is not None and name.startswith(f"{VISION}{part}."):
                    parameter.lr_scale = rate / self.lr

    def disable_untrainable_params(self) -> None:
        """Freeze everything but what is trained, and print what that is, kind by kind. SAT calls this once, before training."""
        self.freeze()
        whole = {
            name: whole_shape(name, parameter.shape, is_split_here(self, name))
            for name, parameter in self.named_parameters()
        }
        trained = {name: whole[name] for name, parameter in self.named_parameters() if parameter.requires_grad}
        count, of_all = (sum(map(math.prod, shapes.values())) for shapes in (trained, whole))
        ranks = model_parallel().ranks
        for module in self.modules():
            if isinstance(module, FrozenLinear):  # whose weight is kept otherwise
                of_all += module.in_features * module.out_features * (ranks if module.split else 1)
        say(f"Trainable, {count:,} of {of_all:,} parameters in {len(trained)} tensors:")
        say("\n".join(f"  {line}" for line in by_kind(trained)))

    @classmethod
    def from_pretrained(cls, name: str | Path | Checkpoint, args: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """The model of a checkpoint of any kind (`model.checkpoints.metadata`), with the adapters that args asks for.

        Adapters that the checkpoint has stay; what args asks for joins them, and it alone is trained.

        Args:
            name: a folder, an iteration's folder, its weights file, a name in $SAT_HOME, or a checkpoint found before.
            args: SAT's namespace, or some of it; `base` and `force_base` in it tell where an adapter's base is.
            kwargs: SAT's; `build_only=True` leaves the weights out, and `overwrite_args` asks before args does.

        Raises:
            InputError: no such checkpoint, or one of another model.
        """
        checkpoint = Checkpoint.find(name)
        overwrite_args = kwargs.pop("overwrite_args", {})
        given = {**({} if args is None else vars(args)), **overwrite_args}
        asked = AdapterConfig.from_options(argparse.Namespace(**given))
        adapters = asked.resumed_from(checkpoint.config)
        if "qlora" in adapters.methods:
            import_bitsandbytes()  # torch would repeat its error for every weight
        overwrite_args = {**overwrite_args, **adapters.to_json()}  # what the model has
        return super().from_pretrained(checkpoint, args, overwrite_args=overwrite_args, adapters=adapters, **kwargs)

    def make_fresh_adapters(self, device: torch.device) -> None:
        """Draw the adapters that no checkpoint had, on the device.

        They are those of --seed, whatever else has drawn numbers before. So they are the same on every process, too.
        """
        with torch.random.fork_rng(devices=[]):
            if self.seed is not None:
                torch.manual_seed(self.seed)
            for module in self.modules():
                if isinstance(module, LoraLinear | PrefixMixin) and any(p.is_meta for p in module.parameters()):
                    module.draw(device)

    @classmethod
    def add_model_specific_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Declare the adapters' sizes, so that SAT writes them into every checkpoint's `model_config.json`."""
        add_method_flags(parser)
        return super().add_model_specific_args(parser)


def by_kind(shapes: Mapping[str, list[int]]) -> list[str]:
    """A line for each kind of tensor: a name without its numbers, how many there are, their shape, and their layers.

    transformer.layers.*.attention.dense.matrix_A.*: 2 tensors [10, 4096], layers 0 14

    Args:
        shapes: by name.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, shape in shapes.items():
        kinds.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", name), str(shape)), []).append(name)
    return [
        f"{kind}: {count_of(len(names), 'tensor')} {shape}{_layers(names)}" for (kind, shape), names in kinds.items()
    ]


def _layers(names: Sequence[str]) -> str:
    """The layers of tensors, as --layer_range takes them, or from the first to the last where none is left out."""
    found = sorted({int(match[1]) for name in names if (match := re.search(r"\.(?:layers|prefix)\.(\d+)", name))})
    if not found:
        return ""
    is_whole = found == list(range(found[0], found[-1] + 1)) and len(found) > 2
    listed = f"{found[0]} to {found[-1]}" if is_whole else " ".join(map(str, found))
    return f", layer{'s' if len(found) > 1 else ''} {listed}"
