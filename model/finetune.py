"""VisualGLM with adapters: what is trained, and what is frozen."""

import argparse
from typing import Any

import torch

from model.checkpoints.layout import find_weights, read_json_object
from model.checkpoints.metadata import METHODS, has_lora, settings_to_go_on
from model.frozen import keep_in_4_bits
from model.lora import LoraMixin
from model.model_flags import add_method_flags, part_rates
from model.progress import say
from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel

import_sat()

from sat.model.finetune import PTuningV2Mixin  # noqa: E402  (sat can be imported only after import_sat)

TRAINED_NAMES = {
    "use_ptuning": ("ptuning",),
    "use_lora": ("matrix_A", "matrix_B"),
    "use_qlora": ("matrix_A", "matrix_B"),
}
EYES = "mixins.eva.model."  # before the names of the vision parts' tensors


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
