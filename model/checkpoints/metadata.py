"""What kind of checkpoint a `model_config.json` describes, and where an adapter's base is.

    base      a model as released: every weight, no adapters
    full      every weight, adapters among them
    adapter   only what differs from a base, which the description names
    merged    adapters folded into the weights: a base again

The description stands under the key "finetuning". The method's own flags stand beside it, where the released script
writes and looks for them: see `model.adapter_config`. Only the standard library is imported.
"""

from dataclasses import dataclass, replace
from typing import cast

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import Checkpoint, ModelConfig
from model.checkpoints.whole import DamagedCheckpoint
from model.errors import InputError

KEY = "finetuning"
SIZES = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")  # of an adapter's base
VISION = "mixins.eva.model."  # before the names of the vision parts' tensors
ADAPTER_NAMES = ("matrix_A", "matrix_B", "ptuning")  # parts of adapter tensors' names


@dataclass(frozen=True)
class Base:
    """The weights that an adapter was trained on: the name that was given, where they lay, and their fingerprint."""

    name: str
    path: str
    fingerprint: str


def is_adapter_name(name: str) -> bool:
    """Whether a tensor of this name belongs to LoRA or P-Tuning."""
    return any(part in name for part in ADAPTER_NAMES)


def is_finetuned(config: ModelConfig) -> bool:
    """Whether a checkpoint with this config has adapters, or is nothing but what was trained."""
    return bool(AdapterConfig.from_json(config).methods) or is_adapter(config)


def is_adapter(config: ModelConfig) -> bool:
    """Whether a checkpoint with this config holds only what differs from its base."""
    return config.get("finetuning", {}).get("contents") == "adapter"


def adapter_tensors(config: ModelConfig) -> list[str]:
    """The names of the tensors of LoRA and P-Tuning that a checkpoint with this config has."""
    adapters, layers = AdapterConfig.from_json(config), config.get("num_layers", 0)
    names = []
    if adapters.has_lora:
        for layer in adapters.lora_layers(layers):
            for target in adapters.lora_targets:
                room = "attention" if target in ("query_key_value", "dense") else "mlp"
                prefix = f"transformer.layers.{layer}.{room}.{target}.matrix_"
                parts = 3 if target == "query_key_value" else 1  # query, key and value have factors of their own
                names += [f"{prefix}{factor}.{part}" for factor in "AB" for part in range(parts)]
    if adapters.has_ptuning:
        names += [f"mixins.ptuning.prefix.{layer}" for layer in range(layers)]
    return names


def base_of(config: ModelConfig) -> Base:
    """The base that an adapter checkpoint's config names."""
    base = config["finetuning"]["base"]
    return Base(base["name"], base["path"], base["fingerprint"])


def with_base(checkpoint: Checkpoint, given: str | None = None) -> Checkpoint:
    """The same checkpoint with its base, if it is an adapter checkpoint.

    The base is the given one, else it is looked for where it lay, else by its name. Settings of the base that SAT doesn't
    write into an adapter checkpoint, such as its dropout, are the base's.

    Raises:
        InputError: it is in none of those places, or is an adapter checkpoint too.
    """
    if checkpoint.base is not None or not is_adapter(checkpoint.config):
        return checkpoint
    base = found_base(checkpoint, given)
    if is_adapter(base.config):
        raise InputError(
            f"{base.weights_file()}: an adapter checkpoint too; the model that {checkpoint.folder} was trained on is needed."
        )
    others = other_sizes(base, checkpoint)
    if others:
        raise InputError(
            f"--base {base.name}: a model of other sizes than {checkpoint.name} was trained on ({'; '.join(others)}); that "
            "model is needed."
        )
    return replace(checkpoint, base=base, config=cast(ModelConfig, {**base.config, **checkpoint.config}))


def other_sizes(base: Checkpoint, checkpoint: Checkpoint) -> list[str]:
    """Which sizes a base has otherwise than the model that checkpoint was trained on."""
    found, needed = {**base.config}, {**checkpoint.config}
    return [
        f"{name} {found[name]}, not {needed[name]}"
        for name in SIZES
        if name in found and name in needed and found[name] != needed[name]
    ]


def refuse_needless_base(checkpoint: Checkpoint, given: str | None) -> None:
    """Raise an error if a base is given for a checkpoint that has all its weights itself.

    Raises:
        InputError: as said.
    """
    if given is not None and not is_adapter(checkpoint.config):
        raise InputError(f"--base {given}: {checkpoint.name} is no adapter and has all its weights; leave --base out.")


def found_base(checkpoint: Checkpoint, given: str | None) -> Checkpoint:
    """What a fine-tuned checkpoint was trained on: the given one, else where it lay, else by its name.

    By then another model may have the name: in another folder if it is a relative one, or on the hub, which nobody has to
    ask where the files lie. One of other sizes is the base only if there is no other: the caller says so.

    Raises:
        InputError: it is in none of those places.
    """
    if given is not None:
        return Checkpoint.find(given, "--base")
    recorded = base_of(checkpoint.config)
    others = []
    for place in (recorded.path, recorded.name):
        try:
            found = Checkpoint.find(place, "--base")
        except DamagedCheckpoint:
            raise  # not "is not there"
        except InputError:
            continue
        if not other_sizes(found, checkpoint):
            return found
        others.append(found)
    if others:
        return others[0]
    raise InputError(
        f"{checkpoint.name}: its base {recorded.name} is not there, nor at {recorded.path}; --base with the folder of that "
        "model is needed."
    )


def answer_length(positions: int, asked: int | None, default: int | None = None) -> int:
    """Tokens of context and answer together: as many as asked for, else the default, or as many as the model takes.

    positions is that number, `max_sequence_length`.

    Raises:
        InputError: more than the model takes are asked for.
    """
    if asked is None:
        return min(default or positions, positions)
    if asked > positions:
        raise InputError(
            f"--max_length {asked}: this model takes {positions} tokens (max_sequence_length), so less is needed."
        )
    return asked
