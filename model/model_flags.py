"""The flags that SAT writes into every checkpoint's `model_config.json`: the method's and the model's.

The command line and the model's own parser both declare them from here. Only the standard library is imported.
"""

import argparse
import json
import math

from model.adapter_config import DEFAULT_LORA_TARGETS, LORA_TARGETS, VISION_PARTS


class MethodOptions:
    """What the flags of `add_method_flags` set: see `model.adapter_config` for what they mean together."""

    use_lora: bool
    use_qlora: bool
    use_ptuning: bool
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target: list[str] | None
    layer_range: list[int] | None
    pre_seq_len: int
    train_parts: list[str]


class ModelOptions:
    """What the flags of `add_model_flags` set."""

    image_length: int
    eva_args: dict[str, object]
    qformer_args: dict[str, object]
    bos_token_id: int | None
    mask_token_id: int | None
    gmask_token_id: int | None
    pad_token_id: int | None


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Declare what is trained: the flags that SAT writes into the `model_config.json` of a fine-tuned checkpoint."""
    add = parser.add_argument_group("what is trained (at least one method)").add_argument
    # fmt: off
    add("--use_lora", action="store_true",
        help="Train LoRA factors on the attention of the language model.")
    add("--use_qlora", action="store_true",
        help="Train LoRA factors while the language model is kept in 4-bit NF4 (needs the package bitsandbytes).")
    add("--use_ptuning", action="store_true",
        help="Train P-Tuning v2 prefixes, alone or together with LoRA.")
    add("--lora_rank", type=int, default=10, metavar="N",
        help="Rank r of the LoRA factors (default %(default)s).")
    add("--lora_alpha", type=float, default=1.0, metavar="X",
        help="The factors' product is scaled by X/r (default %(default)s).")
    add("--lora_dropout", type=float, default=0.0, metavar="P",
        help="Dropout probability of what goes into the LoRA factors in training (default %(default)s).")
    add("--lora_target", nargs="+", choices=LORA_TARGETS, metavar="NAME",
        help=f"Linears that get LoRA, of {', '.join(LORA_TARGETS)}: the attention's two, then the feed-forward part's "
             f"(default: {' '.join(DEFAULT_LORA_TARGETS)}).")
    add("--layer_range", type=int, nargs="+", metavar="L",
        help="Layers that get LoRA, counted from 0: a list, not a range, so that 0 14 means layer 0 and layer 14 "
             "(default: all layers).")
    add("--pre_seq_len", type=int, default=8, metavar="N",
        help="Prefix positions per layer of P-Tuning v2 (default %(default)s).")
    add("--train_parts", type=_part_and_rate, nargs="+", default=[], metavar="PART[=LR]",
        help=f"Parts of the vision tower to train too, of {', '.join(VISION_PARTS)}, each with a peak learning rate of its own "
             "if one is given: qformer=1e-5 glm_proj (default: none).")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Declare what a checkpoint's `model_config.json` says of the picture's part and the token ids."""
    add = parser.add_argument_group("VisualGLM (normally from the checkpoint's model_config.json)").add_argument
    # fmt: off
    add("--image_length", type=int, default=32, metavar="N",
        help="Token positions that a picture takes (default %(default)s).")
    add("--eva_args", type=_json_object, default={}, metavar="JSON",
        help="Sizes of the vision tower, as a JSON object.")
    add("--qformer_args", type=_json_object, default={}, metavar="JSON",
        help="Sizes of the Q-Former, as a JSON object.")
    add("--bos-token-id", type=int, metavar="ID", help="Token id of <sop>, which starts an answer.")
    add("--mask-token-id", type=int, metavar="ID", help="Token id of [MASK].")
    add("--gmask-token-id", type=int, metavar="ID", help="Token id of [gMASK], which stands before the answer.")
    add("--pad-token-id", type=int, metavar="ID", help="Token id of <pad>, which fills rows up and holds image places.")


def _part_and_rate(text: str) -> str:
    """text, checked to be a part's name, with a learning rate after = if there is one."""
    part, equals, rate = text.partition("=")
    if part not in VISION_PARTS:
        raise argparse.ArgumentTypeError(f'"{part}" found; one of {", ".join(VISION_PARTS)} is needed')
    try:
        good_rate = not equals or 0 < float(rate) < math.inf
    except ValueError:
        good_rate = False
    if not good_rate:
        raise argparse.ArgumentTypeError(f'"{text}" found; a learning rate above 0 is needed after =')
    return text


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON at column {error.colno}; an object {{…}} is needed") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} found; a JSON object {{…}} is needed")
    return value
