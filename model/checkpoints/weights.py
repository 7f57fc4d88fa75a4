"""Checkpoints in SAT's layout, written so that a kill at any moment leaves the previous one whole.

<save>/<experiment>-<mm-dd-HH-MM>/
    model_config.json                        what to build
    ice_text.model                           the tokenizer
    <iteration>/mp_rank_00_model_states.pt   {"module": weights, "iteration": int}
    latest                                   the iteration; written last

The weights are those that differ from the base, or all of them with --save_full_model: see `model.checkpoints.metadata`.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from model.adapter_config import TENSOR_NAMES, AdapterConfig
from model.checkpoints.layout import CONFIG_FILE, Checkpoint, weights_path
from model.checkpoints.metadata import KEY, Base, base_of, is_adapter_name, with_base
from model.errors import InputError
from model.progress import say, warn
from model.sat_compat import import_sat

import_sat()

from sat import get_tokenizer, mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.training.model_io import extract_model_specific_args_to_dump  # noqa: E402

SAMPLES_PER_TENSOR = 16  # places, spread evenly, where a fingerprint looks into a tensor
SAMPLE_LENGTH = 32  # numbers in a row that it reads there


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write fill a file beside path, force it to the disk, and only then give it path's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    write(unfinished)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(
    iteration: int,
    model: torch.nn.Module,
    optimizer: Any,
    lr_scheduler: Any,
    args: argparse.Namespace,
    extra_files: Mapping[str, Callable[[Path], Any]] = MappingProxyType({}),
) -> None:
    """Write a checkpoint into args.save (SAT has put the experiment's name into it). SAT calls this on every rank.

    Args:
        model: DeepSpeed's engine, or the model itself.
        optimizer, lr_scheduler: SAT hands them over; its layout has no place for the optimizer's state.
        extra_files: further files of the iteration, by name, in this order; each function writes to a path.
    """
    module: Any = getattr(model, "module", model)
    folder = Path(args.save)
    full = getattr(args, "save_full_model", False) or not hasattr(module, "is_trained_name")
    if mpu.get_data_parallel_rank() == 0:
        rank = mpu.get_model_parallel_rank()
        weights = {"module": module.state_dict() if full else trained_weights(module), "iteration": iteration}
        write_whole(weights_path(folder, iteration, rank), lambda path: torch.save(weights, path))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for name, write in extra_files.items():
            write_whole(folder / str(iteration) / name, write)
        config = extract_model_specific_args_to_dump(args, module)
        config[KEY] = description(AdapterConfig.from_options(args), module.base, args.num_layers, full)
        text = json.dumps(config, indent=4, ensure_ascii=False)
        write_whole(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
        get_tokenizer().save_pretrained(folder)
        write_whole(folder / "latest", lambda path: path.write_text(str(iteration)))
        say(f"Saved {folder} (iteration {iteration}).")
    torch.distributed.barrier()


def trained_weights(module: Any) -> dict[str, torch.Tensor]:
    """The tensors of module that differ from its base's: those trained now, and those that were trained before."""
    return {
        name: parameter.detach().cpu().clone()  # ZeRO keeps them as views of one long tensor
        for name, parameter in module.named_parameters()
        if module.is_trained_name(name) or name in module.tuned_names
    }


def description(adapters: AdapterConfig, base: Base, num_layers: int, full: bool) -> dict[str, Any]:
    """What `model_config.json` says of the fine-tuning, under the key KEY of `model.checkpoints.metadata`.

    Args:
        num_layers: of the language model. full: whether the checkpoint has every weight.
    """
    packages = ("torch", "SwissArmyTransformer", "deepspeed", "transformers", "bitsandbytes")
    return {
        "contents": "full" if full else "adapter",
        "base": vars(base),
        "methods": list(adapters.methods),
        "trained_parts": list(adapters.part_rates),
        "versions": {name: version for name in packages if (version := _installed_version(name))},
        **adapters.lora_section(num_layers),
    }


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_checkpoint(
    model: torch.nn.Module,
    args: argparse.Namespace,
    load_path: str | Path | Checkpoint | None = None,
    prefix: str = "",
    specific_iteration: int | None = None,
) -> int:
    """Read a checkpoint's weights into model, and return the iteration to go on from. SAT calls this.

    Only weights are read; no code in the file is ever run. Adapters that the checkpoint doesn't have keep
    their fresh values.

    Args:
        load_path: a checkpoint, its folder, or its weights file; args.load if absent.
        args: `base` and `force_base` tell where an adapter's base is.
        prefix: take only the tensors whose names start with it, without it.
        specific_iteration: instead of the one that `latest` names.

    Raises:
        InputError: no checkpoint there, one that can't be read, or one of another model.
    """
    place = load_path or args.load
    checkpoint = place if isinstance(place, Checkpoint) else Checkpoint.at(place, specific_iteration)
    checkpoint = with_base(checkpoint, getattr(args, "base", None))
    weights, base, tuned_names = whole_weights(checkpoint, getattr(args, "force_base", False))
    module = getattr(model, "module", model)
    _put_into(module, weights, prefix, checkpoint)
    module.base, module.tuned_names = base, tuned_names
    mode = getattr(args, "mode", "inference")
    if mode == "inference":
        module.eval()
    return int(checkpoint.iteration) if mode == "pretrain" and checkpoint.iteration.isdigit() else 0


def _put_into(
    module: torch.nn.Module, weights: Mapping[str, torch.Tensor], prefix: str, checkpoint: Checkpoint
) -> None:
    """Copy the tensors under prefix into module.

    Raises:
        InputError: they are of another model, or some are missing.
    """
    path = checkpoint.weights_file(mpu.get_model_parallel_rank())
    selected = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        missing, unexpected = module.load_state_dict(selected, strict=False)
    except RuntimeError as error:  # torch lists every tensor of another shape
        raise InputError(
            f"{path}: the weights are of another model than {checkpoint.folder / CONFIG_FILE}: {error}"
        ) from None
    own = tuple(part for method in AdapterConfig.from_json(checkpoint.config).methods for part in TENSOR_NAMES[method])
    needed = [name for name in missing if not is_adapter_name(name) or any(part in name for part in own)]
    if needed:
        raise InputError(
            f"{path}: {len(needed)} tensors are missing (the first: {', '.join(needed[:3])}); needed are all the weights "
            "that model_config.json describes."
        )
    if unexpected:
        warn(f"{path}: {len(unexpected)} tensors belong to no part of this model and are left out: {unexpected[:3]} …")


def whole_weights(checkpoint: Checkpoint, force_base: bool = False) -> tuple[dict[str, torch.Tensor], Base, set[str]]:
    """All the weights that a checkpoint stands for, mapped from the disk; their base; the names that aren't the base's.

    For an adapter checkpoint the base's weights and its own; for any other the base is the checkpoint itself, without
    its adapters.

    Args:
        checkpoint: an adapter checkpoint with its base, see `model.checkpoints.metadata.with_base`; or any other.
        force_base: take the base even if it isn't the one that the adapter was trained on.

    Raises:
        InputError: a file can't be read, or the base is another one.
    """
    rank = mpu.get_model_parallel_rank() if mpu.model_parallel_is_initialized() else 0
    path = checkpoint.weights_file(rank)
    weights = read_weights(path)
    if checkpoint.base is None:
        adapters = {tensor for tensor in weights if is_adapter_name(tensor)}
        return weights, Base(checkpoint.name, os.path.abspath(path), fingerprint(weights)), adapters
    recorded = base_of(checkpoint.config)
    base_path = checkpoint.base.weights_file(rank)
    base_weights = without_adapters(read_weights(base_path))
    found = fingerprint(base_weights)
    if found != recorded.fingerprint and not force_base:
        raise InputError(
            f"{checkpoint.folder}: trained on other weights than those of {base_path} (fingerprint "
            f"{recorded.fingerprint[:12]}, found {found[:12]}); --base with {recorded.name} as it was is needed, or "
            "--force_base to use this one all the same."
        )
    return base_weights | weights, Base(recorded.name, os.path.abspath(base_path), found), set(weights)


def without_adapters(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint but for LoRA and P-Tuning, under the names that they have in a base model."""
    return {name.replace(".original.", "."): tensor for name, tensor in weights.items() if not is_adapter_name(name)}


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A hexadecimal SHA-256 that tells base models apart: of names, shapes, dtypes and samples of every tensor.

    Adapters don't count, so that a full checkpoint has its base's fingerprint unless the base was changed. Samples do:
    reading 15 GB at every start would take longer than loading them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(without_adapters(weights).items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        numbers = tensor.detach().reshape(-1)
        step = max(1, len(numbers) // SAMPLES_PER_TENSOR)
        for start in range(0, len(numbers), step):
            digest.update(numbers[start : start + SAMPLE_LENGTH].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's weights file by name, mapped from the disk rather than read where it can be.

    Raises:
        InputError: the file is missing, broken, or holds something else than weights.
    """
    try:
        with torch.serialization.safe_globals(safe_checkpoint_types()):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it holds the checkpoint's weights.") from None
    except Exception as error:  # torch raises several kinds, for broken zips, pickles and forbidden types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: can't be read as weights ({reason}); needed is a checkpoint that is whole."
        ) from None
    if not isinstance(content, dict) or "module" not in content:
        raise InputError(f'{path}: no "module" in it; a checkpoint of SAT has its weights there.')
    return content["module"]


def safe_checkpoint_types() -> list[Any]:
    """What old checkpoints may hold besides tensors: numpy's random state.

    `torch.load` reads weights only by default and refuses it; nothing listed here can run code.
    """
    import numpy

    reconstruct = numpy._core.multiarray._reconstruct  # type: ignore[attr-defined]
    return [
        reconstruct,
        (reconstruct, "numpy.core.multiarray._reconstruct"),  # as numpy 1 wrote it
        numpy.ndarray,
        numpy.dtype,
        numpy.dtypes.UInt32DType,
        numpy.dtypes.Int64DType,
        numpy.dtypes.Float64DType,
    ]
