"""What a `model_config.json` must hold: other values are told before any code meets them.

    type_problems(config, where)      which JSON types its keys have; only what this code reads, and only where it is there
    model_problems(config, where)     what a VisualGLM can't be built without, and sizes that fit each other

Only the standard library is imported.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from model.adapter_config import LORA_TARGETS, VISION_PARTS

MOST_SHOWN = 60  # characters of a value that is wrong

# What a VisualGLM's model_config.json must say, and in which JSON type.
MODEL_KEYS: Mapping[str, type] = {
    "num_layers": int,
    "hidden_size": int,
    "num_attention_heads": int,
    "vocab_size": int,
    "eva_args": dict,
    "qformer_args": dict,
    "image_length": int,
    "bos_token_id": int,
    "mask_token_id": int,
    "gmask_token_id": int,
    "pad_token_id": int,
}
_TYPE_NAMES = {int: "a whole number", dict: "an object {…}"}


class Kind(NamedTuple):
    """What a value must be: whether one is, and how that is said."""

    holds: Callable[[object], bool]
    words: str


def _list_of(kind: Kind, words: str) -> Kind:
    return Kind(lambda value: isinstance(value, list) and all(map(kind.holds, value)), words)


def or_auto(kind: Kind) -> Kind:
    """The same, or what a DeepSpeed file has where it leaves a value to the command line."""
    return Kind(lambda value: value in (None, "auto") or kind.holds(value), f'{kind.words} or "auto"')


def _or_null(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.holds(value), f"{kind.words} or null")


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object, holds: Callable[[float], bool]) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and holds(value)


COUNT = Kind(lambda value: _is_whole(value, 1), "a whole number of 1 or more")
WHOLE = Kind(lambda value: _is_whole(value, 0), "a whole number of 0 or more")
RATE = Kind(lambda value: _is_number(value, lambda number: 0 < number < math.inf), "a number above 0")
AMOUNT = Kind(lambda value: _is_number(value, lambda number: 0 <= number < math.inf), "a number of 0 or more")
SHARE = Kind(lambda value: _is_number(value, lambda number: 0 <= number < 1), "a number from 0 to less than 1")
TRUTH = Kind(lambda value: type(value) is bool, "true or false")
TEXT = Kind(lambda value: isinstance(value, str), "a text")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object {…}")
BETAS = Kind(
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(SHARE.holds, value)),
    "a list of two numbers from 0 to less than 1",
)
TEXTS = _list_of(TEXT, "a list of texts")
TARGETS = _list_of(Kind(lambda value: value in LORA_TARGETS, ""), f"a list of {', '.join(LORA_TARGETS)}")
PARTS = _list_of(
    Kind(lambda value: isinstance(value, str) and value.partition("=")[0] in VISION_PARTS, ""),
    f"a list of {', '.join(VISION_PARTS)}",
)
LAYERS = _list_of(WHOLE, "a list of layers counted from 0")
SIZE = Kind(
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(COUNT.holds, value)),
    "a list of height and width in pixels",
)
DECODERS = Kind(
    lambda value: TRUTH.holds(value) or (isinstance(value, list) and all(map(TRUTH.holds, value))),
    "true, false or a list of these, one a layer,",
)

# Of ViT and Q-Former, below "eva_args" and "qformer_args".
_VISION_KINDS: Mapping[str, Kind] = {
    "num_layers": COUNT,
    "hidden_size": COUNT,
    "inner_hidden_size": _or_null(COUNT),
    "num_attention_heads": COUNT,
    "vocab_size": COUNT,
    "max_sequence_length": WHOLE,
    "layernorm_epsilon": AMOUNT,
    "hidden_dropout": SHARE,
    "attention_dropout": SHARE,
}
# By the path to the value.
KINDS: Mapping[tuple[str, ...], Kind] = {
    ("num_layers",): COUNT,
    ("hidden_size",): COUNT,
    ("inner_hidden_size",): _or_null(COUNT),
    ("num_attention_heads",): COUNT,
    ("vocab_size",): COUNT,
    ("max_sequence_length",): COUNT,
    ("image_length",): COUNT,
    ("layernorm_epsilon",): AMOUNT,
    ("hidden_dropout",): SHARE,
    ("attention_dropout",): SHARE,
    ("bos_token_id",): _or_null(WHOLE),
    ("mask_token_id",): _or_null(WHOLE),
    ("gmask_token_id",): _or_null(WHOLE),
    ("pad_token_id",): _or_null(WHOLE),
    ("model_class",): TEXT,
    ("eva_args",): OBJECT,
    ("eva_args", "image_size"): SIZE,
    ("eva_args", "patch_size"): COUNT,
    ("eva_args", "pre_len"): WHOLE,
    ("eva_args", "post_len"): WHOLE,
    ("eva_args", "in_channels"): COUNT,
    ("qformer_args",): OBJECT,
    ("qformer_args", "is_decoder"): DECODERS,
    ("qformer_args", "cross_attn_hidden_size"): _or_null(COUNT),
    **{(part, key): kind for part in ("eva_args", "qformer_args") for key, kind in _VISION_KINDS.items()},
    ("use_lora",): _or_null(TRUTH),
    ("use_qlora",): _or_null(TRUTH),
    ("use_ptuning",): _or_null(TRUTH),
    ("lora_rank",): COUNT,
    ("lora_alpha",): RATE,
    ("lora_dropout",): SHARE,
    ("lora_target",): _or_null(TARGETS),
    ("layer_range",): _or_null(LAYERS),
    ("pre_seq_len",): COUNT,
    ("train_parts",): _or_null(PARTS),
    ("finetuning",): OBJECT,
    ("finetuning", "contents"): TEXT,
    ("finetuning", "base"): OBJECT,
    ("finetuning", "base", "name"): TEXT,
    ("finetuning", "base", "path"): TEXT,
    ("finetuning", "base", "fingerprint"): TEXT,
    ("finetuning", "methods"): TEXTS,
    ("finetuning", "trained_parts"): TEXTS,
    ("finetuning", "lora"): OBJECT,
    ("finetuning", "asked_as"): OBJECT,
    ("finetuning", "asked_as", "lang"): Kind(lambda value: value in ("zh", "en"), "zh or en"),
    ("finetuning", "asked_as", "source_prefix"): TEXT,
    ("finetuning", "asked_as", "max_source_length"): _or_null(COUNT),
    ("finetuning", "asked_as", "max_target_length"): _or_null(COUNT),
}


def type_problems(config: Mapping[str, object], where: str) -> list[str]:
    """A sentence for each value that is of another kind than its key has; and for a base that an adapter doesn't name.

    Args:
        config: what a `model_config.json` holds. where: begins each sentence.
    """
    problems = problems_of_kind(config, KINDS, where)
    finetuning = config.get("finetuning")
    if not problems and isinstance(finetuning, dict) and finetuning.get("contents") == "adapter":
        base = finetuning.get("base", {})
        missing = [f'"{key}"' for key in ("name", "path", "fingerprint") if key not in base]
        if missing:
            problems.append(f'{where}: no {", ".join(missing)} in "finetuning.base"; an adapter\'s base has them.')
    return problems


def model_problems(config: Mapping[str, object], where: str) -> list[str]:
    """Why no VisualGLM can be built from a config, or one that computes something else; a sentence each.

    Args:
        config: what a `model_config.json` holds. where: begins each sentence.
    """
    missing = [f'"{key}"' for key in MODEL_KEYS if key not in config]
    if missing:
        return [f"{where}: no {', '.join(missing)}; a VisualGLM checkpoint has {', '.join(MODEL_KEYS)}."]
    problems = [
        f'{where}: "{key}" is {json.dumps(config[key])}; {_TYPE_NAMES[needed]} is needed.'
        for key, needed in MODEL_KEYS.items()
        if type(config[key]) is not needed
    ]
    return problems or [
        *_order_problems(config, where),
        *_width_problems(config, where),
        *_slot_problems(config, where),
    ]


def _order_problems(config: Mapping[str, object], where: str) -> list[str]:
    order = config.get("layernorm_order")
    return [] if order == "post" else [f'{where}: "layernorm_order" is {json.dumps(order)}; a ChatGLM has "post".']


def _width_problems(config: Mapping[str, Any], where: str) -> list[str]:
    """Which parts have a width that their attention heads can't share."""
    problems = []
    for part, sizes in (("", config), ("eva_args.", config["eva_args"]), ("qformer_args.", config["qformer_args"])):
        width: Any = sizes.get("hidden_size")
        heads: Any = sizes.get("num_attention_heads")
        if not (COUNT.holds(width) and COUNT.holds(heads)) or width % heads:
            problems.append(
                f'{where}: "{part}hidden_size" is {_shown(width)} and "{part}num_attention_heads" {_shown(heads)}; whole '
                "numbers are needed, the first a multiple of the second."
            )
    return problems


def _slot_problems(config: Mapping[str, Any], where: str) -> list[str]:
    queries = config["qformer_args"].get("vocab_size")
    if config["image_length"] == queries:
        return []
    return [
        f'{where}: "image_length" is {config["image_length"]} and "qformer_args.vocab_size" {_shown(queries)}; the same is '
        "needed: each query of the Q-Former takes one position."
    ]


def problems_of_kind(config: Mapping[str, object], kinds: Mapping[tuple[str, ...], Kind], where: str) -> list[str]:
    """A sentence for each value of config, by the path to it, that is there and is of another kind than it must be."""
    problems = []
    for path, kind in kinds.items():
        holder = _at(config, path[:-1])
        if isinstance(holder, dict) and path[-1] in holder and not kind.holds(holder[path[-1]]):
            name = ".".join(path)
            problems.append(f'{where}: "{name}" is {_shown(holder[path[-1]])}; {kind.words} is needed.')
    return problems


def _at(value: object, path: tuple[str, ...]) -> object:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"
