"""LoRA folded into the weights, from file to file: no model is built, and one tensor at a time is in memory."""

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from model.adapter_config import ADAPTER_KEYS, AdapterConfig
from model.checkpoints.config_types import model_problems
from model.checkpoints.layout import Checkpoint, hiding_problem, weights_path
from model.checkpoints.metadata import KEY, refuse_needless_base, with_base
from model.checkpoints.save import size_of
from model.checkpoints.sizes import free_bytes, size_text
from model.checkpoints.tensors import shapes, write_weights
from model.checkpoints.weights import (
    old_rows_problem,
    open_weights,
    refuse_unless_finite,
    whole_weights,
    without_adapters,
)
from model.checkpoints.whole import (
    CONFIG_FILE,
    SHARED_FILES,
    UNFINISHED,
    json_text,
    put_in_place,
    remove,
    remove_unfinished,
    take_place,
    write_whole,
)
from model.data.tokenizer import VOCAB_FILE, find_tokenizer
from model.errors import InputError, raise_problems
from model.frozen import NF4_BLOCK, dequantized, import_bitsandbytes, quantized
from model.lora import folded
from model.progress import say

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
WORTH_SAYING = 0.05  # of the LoRA's change, by its norm
ITERATION = "1"  # a merged checkpoint starts anew; SAT takes any number above 0


def merge(
    checkpoint: str | Checkpoint,
    out: str,
    base: str | None = None,
    force_base: bool = False,
    overwrite: bool = False,
    tokenizer: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the checkpoint's weights with its LoRA folded in, as an ordinary checkpoint in the new folder out.

    From QLoRA the sum is that of the weights as they were in training: packed into 4 bits and unpacked again.

    Args:
        checkpoint: with LoRA or QLoRA, all weights or what was trained only; anything that `Checkpoint.find` takes.
        base, force_base: where an adapter's base is, and whether to take another one than it was trained on.
        overwrite: put it in the place of the checkpoint that out has.
        tokenizer: where its file is, if the checkpoint's folder has none.
        dtype: "fp32" writes float32; else each tensor keeps the dtype that it has.

    Raises:
        InputError: there is nothing that can be merged, a file can't be used, or out is in use or has no room.
    """
    checkpoint = Checkpoint.find(checkpoint, "CHECKPOINT")
    adapters = AdapterConfig.from_json(checkpoint.config)
    _refuse_unmergeable(checkpoint.name, adapters)
    if "qlora" in adapters.methods:
        import_bitsandbytes()  # a sentence, if need be, before anything is written
    refuse_needless_base(checkpoint, base)
    whole = with_base(checkpoint, base)
    raise_problems(model_problems(whole.config, str(checkpoint.config_file)))
    # LoRA's factors are in today's order even where the weights are not: their sum would be in neither.
    if problem := old_rows_problem(checkpoint, open_weights(checkpoint)):
        raise InputError(problem)
    vocabulary = find_tokenizer(checkpoint.folder, tokenizer)
    old, folder = _place(Path(os.path.abspath(out)) if overwrite else Path(out), whole, overwrite)
    is_replaced = old != folder
    weights, _, _ = whole_weights(whole, force_base=force_base)
    plain = without_adapters(weights)
    like = _in_float32(shapes(plain)) if dtype == "fp32" else shapes(plain)
    needed = size_of(like)
    free = free_bytes(folder)
    if free < needed:
        raise InputError(f"{out}: {size_text(free)} free on its disk; {size_text(needed)} are needed.")

    merged = MergedTensors(checkpoint.name, plain, weights, adapters, like)
    unfinished, was_there = folder / f"{ITERATION}{UNFINISHED}", folder.exists()
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        write_weights(weights_path(folder, unfinished.name), like, merged, int(ITERATION))
        put_in_place(unfinished, folder / ITERATION, _write_config_and_tokenizer(folder, checkpoint, vocabulary))
        write_whole(folder / "latest", lambda file: file.write_text(ITERATION))
    except OSError as error:
        raise InputError(
            f"{out}: the merged checkpoint can't be written ({error.strerror}); {size_text(free_bytes(folder))} free on its "
            f"disk, {size_text(needed)} and a folder that can be written to are needed."
        ) from error
    finally:
        remove_unfinished(folder)
        if not (folder / "latest").is_file():  # which is written last
            for path in [*folder.glob("*")] if was_there else [folder]:
                remove(path)
    if is_replaced:
        take_place(folder, old)
        folder = old
    _say_who_packed(shapes(plain), adapters)
    merged.say_rounding()
    return folder


def _in_float32(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same names and shapes, those of floating-point numbers in float32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


class MergedTensors:
    """The tensors of the plain model with their LoRA folded in, by name, and how far rounding takes them from it."""

    def __init__(
        self,
        checkpoint: str,
        plain: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        adapters: AdapterConfig,
        like: Mapping[str, torch.Tensor],
    ) -> None:
        """Args:
        plain: the tensors without LoRA. weights: where the factors are. like: tensors of the dtypes to write.
        """
        self.checkpoint, self.plain, self.weights, self.adapters, self.like = checkpoint, plain, weights, adapters, like
        self._change = self._error = 0.0  # sums of squares
        self._dtypes: set[torch.dtype] = set()

    def __call__(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            InputError: it isn't finite.
        """
        weight = self.plain[name]
        unpacked = (
            dequantized(*quantized(weight), torch.float32) if _is_unpacked(name, weight, self.adapters) else weight
        )
        exact = _with_lora(name, unpacked, self.weights, self.adapters)
        merged = exact.to(self.like[name].dtype)
        if exact is not weight:
            refuse_unless_finite({name: merged}, f"{self.checkpoint}, merged")
        if exact is not unpacked and merged.dtype != exact.dtype:
            self._dtypes.add(merged.dtype)
            self._change += (exact - unpacked.float()).norm().item() ** 2
            self._error += (merged.float() - exact).norm().item() ** 2
        return merged

    def say_rounding(self) -> None:
        """Say how far the LoRA's change is off because it was rounded, if that is worth a word."""
        share = math.sqrt(self._error / self._change) if self._change else 0.0
        if share > WORTH_SAYING:
            dtypes = " and ".join(sorted(NAMES.get(dtype, str(dtype)) for dtype in self._dtypes))
            say(
                f"Rounded to {dtypes}, the LoRA's change is off by {100 * share:.0f} % of its size. It isn't in the checkpoint "
                "before the merge; nor with --dtype fp32, in twice the room, if the result is loaded in fp32 too."
            )


def _say_who_packed(plain: Mapping[str, torch.Tensor], adapters: AdapterConfig) -> None:
    """Of QLoRA, say whose code packed the base's weights: a merge is exact only with the numbers of the training."""
    linears = [tensor for name, tensor in plain.items() if _is_unpacked(name, tensor, adapters)]
    if linears:
        ours = all(tensor.numel() % NF4_BLOCK == 0 for tensor in linears)
        say(
            f"The base was packed into 4 bits by {'this project' if ours else 'bitsandbytes'}'s code for a CPU. A run on a GPU "
            "had it packed by bitsandbytes' for CUDA, which may round a number the other way that is midway between two levels."
        )


def _write_config_and_tokenizer(folder: Path, checkpoint: Checkpoint, vocabulary: Path) -> list[Path]:
    """Write what stands above the merged checkpoint's weights, and give the paths."""
    text = json_text(_plain_config(checkpoint), 4)
    write_whole(folder / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"))
    write_whole(folder / VOCAB_FILE, lambda file: shutil.copyfile(vocabulary, file))
    return [folder / CONFIG_FILE, folder / VOCAB_FILE]


def _place(out: Path, whole: Checkpoint, overwrite: bool) -> tuple[Path, Path]:
    """Where the merged checkpoint goes in the end, and where it is written: beside the one that it is to replace.

    Raises:
        InputError: something is there that stays.
    """
    if overwrite and (out / CONFIG_FILE).is_file():
        read = [one.folder.resolve() for one in (whole, whole.base) if one is not None]
        if any(folder.is_relative_to(out.resolve()) for folder in read):
            raise InputError(f"{out}: what is merged is read from there; another folder is needed.")
        others = sorted(path.name for path in out.iterdir() if not _is_of_a_checkpoint(path))
        if others:
            raise InputError(
                f"{out}: {', '.join(others[:3])}{' …' if len(others) > 3 else ''} found besides a checkpoint, and would go "
                "with it; another folder is needed, or to move that away."
            )
        beside = out.with_name(out.name + UNFINISHED)
        remove(beside)
        return out, beside
    if out.exists() and (not out.is_dir() or any(path.suffix != UNFINISHED for path in out.iterdir())):
        raise InputError(f"{out}: something is there already; a new folder is needed, or --overwrite for a checkpoint.")
    if problem := hiding_problem(out, whole):
        raise InputError(f"{out}: {problem}")
    return out, out


def _is_of_a_checkpoint(path: Path) -> bool:
    return path.name in (*SHARED_FILES, "latest") or path.name.isdecimal() or path.suffix == UNFINISHED


def _refuse_unmergeable(checkpoint: str, adapters: AdapterConfig) -> None:
    if adapters.has_ptuning:
        raise InputError(
            f"{checkpoint}: it has P-Tuning prefixes, which stand beside the keys and values and change no weight, so they "
            "can't be merged; only LoRA and QLoRA can."
        )
    if not adapters.has_lora:
        raise InputError(f"{checkpoint}: no LoRA in it; nothing is to be merged.")


def _with_lora(
    name: str, weight: torch.Tensor, weights: Mapping[str, torch.Tensor], adapters: AdapterConfig
) -> torch.Tensor:
    """A tensor of the plain model with its LoRA factors folded in, in float32; weight itself if it has none.

    Args:
        name: of the tensor, as in the plain model. weights: where its factors are.
    """
    prefix = name.removesuffix("weight")
    if f"{prefix}matrix_A.0" not in weights:
        return weight
    a, b = (_factors(weights, f"{prefix}{matrix}.") for matrix in ("matrix_A", "matrix_B"))
    return folded(weight.float(), a, b, adapters.scale)


def _is_unpacked(name: str, weight: torch.Tensor, adapters: AdapterConfig) -> bool:
    return "qlora" in adapters.methods and is_packed_in_qlora(name, weight)


def is_packed_in_qlora(name: str, weight: torch.Tensor) -> bool:
    """Whether QLoRA keeps this tensor in 4 bits: the weight of a linear in the language model's layers."""
    return re.match(r"transformer\.layers\.\d+\..*\.weight$", name) is not None and weight.dim() == 2


def _factors(weights: Mapping[str, torch.Tensor], prefix: str) -> list[torch.Tensor]:
    """The tensors named prefix0, prefix1, … in that order."""
    count = sum(name.startswith(prefix) for name in weights)
    return [weights[f"{prefix}{part}"] for part in range(count)]


def _plain_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The config of an ordinary VisualGLM checkpoint, with a word on where it comes from."""
    config = checkpoint.config
    plain = {key: value for key, value in config.items() if key not in (*ADAPTER_KEYS, KEY)}
    merged_from = {key: value for key, value in config.get("finetuning", {}).items() if key != "contents"}
    return {
        **plain,
        "model_class": "VisualGLMModel",
        "model_parallel_size": 1,
        KEY: {"contents": "merged", "checkpoint": checkpoint.name, **merged_from},
    }
