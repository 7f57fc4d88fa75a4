"""What a checkpoint's `model_config.json` says of its fine-tuning, and what follows for those who start from it.

    base      a model as released: every weight, no adapters
    full      every weight, adapters among them
    adapter   only what differs from a base, which the description names
    merged    adapters folded into the weights: a base again

The description stands under the key "finetuning". The method's own flags stand beside it, where the released script
writes and looks for them. Only the standard library is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoints.layout import find_weights
from model.errors import InputError

KEY = "finetuning"
METHODS = ("use_lora", "use_qlora", "use_ptuning")
# What gives a method's tensors their names, shapes and meaning, and can't change once they are trained.
LORA_SIZES = ("lora_rank", "lora_alpha", "layer_range", "lora_target")
PTUNING_SIZES = ("pre_seq_len",)
ADAPTER_NAMES = ("matrix_A", "matrix_B", "ptuning")  # parts of adapter tensors' names


@dataclass(frozen=True)
class Base:
    """The weights that an adapter was trained on: the name that was typed, where they lay, and their fingerprint."""

    name: str
    path: str
    fingerprint: str


def is_adapter_name(name: str) -> bool:
    """Whether a tensor of this name belongs to LoRA or P-Tuning."""
    return any(part in name for part in ADAPTER_NAMES)


def has_lora(config: Mapping[str, Any]) -> bool:
    """Whether a config (or SAT's namespace, as a mapping) asks for LoRA factors, over weights of any width."""
    return bool(config.get("use_lora") or config.get("use_qlora"))


def is_finetuned(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config has adapters, or is nothing but what was trained."""
    return any(config.get(method) for method in METHODS) or is_adapter(config)


def is_adapter(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this config holds only what differs from its base."""
    return config.get(KEY, {}).get("contents") == "adapter"


def base_of(config: Mapping[str, Any]) -> Base:
    """The base that an adapter checkpoint's config names."""
    return Base(**config[KEY]["base"])


def find_base(config: Mapping[str, Any], checkpoint: str | Path, given: str | None = None) -> Path:
    """The weights file of an adapter checkpoint's base: the given one, else by its name, else where it lay.

    Raises:
        InputError: it is in none of those places.
    """
    if given is not None:
        return find_weights(given, "--base")
    base = base_of(config)
    for place in (base.name, base.path):
        try:
            return find_weights(place, "--base")
        except InputError:
            continue
    raise InputError(
        f"{checkpoint}: its base {base.name} is not there, nor at {base.path}; --base with the folder of that model is "
        "needed."
    )


def settings_to_go_on(config: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The method's flags for a model that starts from a checkpoint with this config.

    The checkpoint's adapters stay, at their own sizes; what is asked for joins them. Where there are none, its config
    says nothing: a merged or old one may still hold the sizes that it was trained with.

    Args:
        asked: the method's flags by attribute name, as typed or at their defaults.
    """
    settings: dict[str, Any] = {method: bool(asked.get(method)) for method in METHODS}
    settings["use_ptuning"] |= bool(config.get("use_ptuning"))
    if has_lora(config) and not has_lora(settings):
        settings |= {method: bool(config.get(method)) for method in ("use_lora", "use_qlora")}
    lora, ptuning = (config if has_lora(config) else asked), (config if config.get("use_ptuning") else asked)
    settings |= {name: lora.get(name, asked.get(name)) for name in LORA_SIZES}
    if has_lora(config):  # the released script knew neither
        settings["lora_alpha"] = config.get("lora_alpha", 1.0)
        settings["lora_target"] = config.get("lora_target")
    settings |= {name: ptuning.get(name, asked.get(name)) for name in PTUNING_SIZES}
    settings["lora_dropout"] = asked.get("lora_dropout", 0.0)
    settings["train_parts"] = list(asked.get("train_parts") or [])
    return settings
