"""LoRA folded into the weights, from file to file: no model is built, and one tensor at a time is in memory."""

import json
import mmap
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.checkpoints.layout import WEIGHTS_FILE, find_weights, read_json_object
from model.checkpoints.metadata import KEY, LORA_SIZES, METHODS, PTUNING_SIZES, has_lora
from model.checkpoints.weights import whole_weights, without_adapters, write_whole
from model.data.tokenizer import find_tokenizer
from model.errors import InputError
from model.frozen import dequantized, quantized
from model.lora import folded

ITERATION = "1"  # a merged checkpoint starts anew; SAT takes any number above 0


def merge(checkpoint: str, out: str, base: str | None = None, force_base: bool = False) -> Path:
    """Write the checkpoint's weights with its LoRA folded in, as an ordinary checkpoint in the new folder out.

    From QLoRA the sum is that of the weights as they were in training: packed into 4 bits and unpacked again.

    Args:
        checkpoint: with LoRA or QLoRA, all weights or what was trained only; anything `model.checkpoints.layout.find_weights` takes.
        base, force_base: where an adapter's base is, and whether to take another one than it was trained on.

    Raises:
        InputError: there is nothing that can be merged, a file can't be used, or out is in use or has no room.
    """
    path, folder = find_weights(checkpoint, "CHECKPOINT"), Path(out)
    config = read_json_object(path.parent.parent / "model_config.json", "The checkpoint's configuration")
    _refuse_unmergeable(checkpoint, config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{out}: something is there already; a new folder is needed.")
    weights, _, _ = whole_weights(path, given_base=base, force_base=force_base)
    plain = without_adapters(weights)
    size = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise InputError(f"{out}: {free / 2**30:.1f} GiB free on its disk; {size / 2**30:.1f} GiB are needed.")
    scale = config.get("lora_alpha", 1.0) / config["lora_rank"]
    packed = bool(config.get("use_qlora"))

    def merged(name: str) -> torch.Tensor:
        weight = plain[name]
        prefix = name.removesuffix("weight")
        if packed and is_packed_in_qlora(name, weight):
            weight = dequantized(*quantized(weight), torch.float32)
        if f"{prefix}matrix_A.0" in weights:
            weight = folded(
                weight, _factors(weights, f"{prefix}matrix_A."), _factors(weights, f"{prefix}matrix_B."), scale
            )
        return weight.to(plain[name].dtype)

    write_whole(folder / ITERATION / WEIGHTS_FILE, lambda file: write_weights(file, plain, merged))
    text = json.dumps(_plain_config(config, checkpoint), indent=4, ensure_ascii=False)
    write_whole(folder / "model_config.json", lambda file: file.write_text(text, encoding="utf-8"))
    tokenizer = find_tokenizer(path.parent.parent, None)
    write_whole(folder / Path(tokenizer).name, lambda file: shutil.copyfile(tokenizer, file))
    write_whole(folder / "latest", lambda file: file.write_text(ITERATION))
    return folder


def _refuse_unmergeable(checkpoint: str, config: Mapping[str, Any]) -> None:
    if config.get("use_ptuning"):
        raise InputError(
            f"{checkpoint}: it has P-Tuning prefixes, which stand beside the keys and values and change no weight, so they "
            "can't be merged; only LoRA and QLoRA can."
        )
    if not has_lora(config):
        raise InputError(f"{checkpoint}: no LoRA in it; nothing is to be merged.")


def is_packed_in_qlora(name: str, weight: torch.Tensor) -> bool:
    """Whether QLoRA keeps this tensor in 4 bits: the weight of a linear in the language model's layers."""
    return re.match(r"transformer\.layers\.\d+\..*\.weight$", name) is not None and weight.dim() == 2


def _factors(weights: Mapping[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """The tensors named prefix0, prefix1, … in that order."""
    count = sum(name.startswith(prefix) for name in weights)
    return [weights[f"{prefix}{part}"] for part in range(count)]


def write_weights(path: Path, like: Mapping[str, torch.Tensor], value: Callable[[str], torch.Tensor]) -> None:
    """Write a weights file of SAT's layout, with value(name) for each tensor, one after another.

    torch.save needs every tensor at once. So it writes the file without their numbers first, and those go through a
    memory map of the file.

    Args:
        like: tensors of the same names, shapes and dtypes.
    """
    with FakeTensorMode():
        empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({"module": empty, "iteration": int(ITERATION)}, path)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        on_disk = torch.load(path, mmap=True, weights_only=True)["module"]
    for name in list(on_disk):
        on_disk.pop(name).copy_(value(name))


def _plain_config(config: Mapping[str, Any], checkpoint: str) -> dict[str, Any]:
    """The config of an ordinary VisualGLM checkpoint, with a word on where it comes from."""
    method = {*METHODS, *LORA_SIZES, *PTUNING_SIZES, "lora_dropout", "train_parts", KEY}
    plain = {key: value for key, value in config.items() if key not in method}
    merged_from = {key: value for key, value in config.get(KEY, {}).items() if key != "contents"}
    return {
        **plain,
        "model_class": "VisualGLMModel",
        KEY: {"contents": "merged", "checkpoint": checkpoint, **merged_from},
    }
