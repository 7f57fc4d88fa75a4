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
from typing import Any

import torch

from model.checkpoints.layout import read_json_object
from model.checkpoints.metadata import KEY, METHODS, Base, base_of, find_base, is_adapter, is_adapter_name
from model.errors import InputError
from model.model_flags import DEFAULT_LORA_TARGETS, part_rates
from model.progress import say, warn
from model.sat_compat import import_sat

import_sat()

from sat import get_tokenizer, mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.training.model_io import extract_model_specific_args_to_dump  # noqa: E402

SAMPLES_PER_TENSOR = 16  # places, spread evenly, where a fingerprint looks into a tensor
SAMPLE_LENGTH = 32  # numbers in a row that it reads there


def weights_path(folder: Path, iteration: str | int) -> Path:
    """Where this process's part of the weights lies."""
    return folder / str(iteration) / f"mp_rank_{mpu.get_model_parallel_rank():02d}_model_states.pt"


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
    iteration: int, model: torch.nn.Module, optimizer: Any, lr_scheduler: Any, args: argparse.Namespace
) -> None:
    """Write a checkpoint into args.save (SAT has put the experiment's name into it). SAT calls this on every rank.

    Args:
        model: DeepSpeed's engine, or the model itself.
        optimizer, lr_scheduler: SAT hands them over; its layout has no place for the optimizer's state.
    """
    module = getattr(model, "module", model)
    folder = Path(args.save)
    full = getattr(args, "save_full_model", False) or not hasattr(module, "is_trained_name")
    if mpu.get_data_parallel_rank() == 0:
        weights = {"module": module.state_dict() if full else trained_weights(module), "iteration": iteration}
        write_whole(weights_path(folder, iteration), lambda path: torch.save(weights, path))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        config = extract_model_specific_args_to_dump(args, module)
        config[KEY] = description(args, module, full)
        text = json.dumps(config, indent=4, ensure_ascii=False)
        write_whole(folder / "model_config.json", lambda path: path.write_text(text, encoding="utf-8"))
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


def description(args: argparse.Namespace, module: Any, full: bool) -> dict[str, Any]:
    """What `model_config.json` says of the fine-tuning, under the key KEY of `model.checkpoints.metadata`."""
    settings = vars(args)
    packages = ("torch", "SwissArmyTransformer", "deepspeed", "transformers", "bitsandbytes")
    described: dict[str, Any] = {
        "contents": "full" if full else "adapter",
        "base": vars(module.base),
        "methods": [method.removeprefix("use_") for method in METHODS if settings.get(method)],
        "trained_parts": list(part_rates(settings.get("train_parts") or [])),
        "versions": {name: version for name in packages if (version := _installed_version(name))},
    }
    if settings.get("use_lora") or settings.get("use_qlora"):
        lora = module.get_mixin("lora")
        described["lora"] = {
            "rank": lora.rank,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "layers": lora.layer_range,
            "targets": settings.get("lora_target") or list(DEFAULT_LORA_TARGETS),
        }
    return described


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_checkpoint(
    model: torch.nn.Module,
    args: argparse.Namespace,
    load_path: str | None = None,
    prefix: str = "",
    specific_iteration: int | None = None,
) -> int:
    """Read a checkpoint's weights into model, and return the iteration to go on from. SAT calls this.

    Only weights are read; no code in the file is ever run. Adapters that the file lacks keep their fresh values.

    Args:
        load_path: a checkpoint folder, or its weights file; args.load if absent.
        args: `base` and `force_base` tell where an adapter's base is.
        prefix: take only the tensors whose names start with it, without it.
        specific_iteration: instead of the one that `latest` names.

    Raises:
        InputError: no checkpoint there, one that can't be read, or one of another model.
    """
    path = _weights_file(Path(load_path or args.load), specific_iteration)
    folder = path.parent.parent
    weights, base, tuned_names = whole_weights(
        path,
        name=getattr(args, "from_pretrained", None) if load_path else args.load,
        given_base=getattr(args, "base", None),
        force_base=getattr(args, "force_base", False),
    )
    module = getattr(model, "module", model)
    selected = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        missing, unexpected = module.load_state_dict(selected, strict=False)
    except RuntimeError as error:  # torch lists every tensor of another shape
        raise InputError(
            f"{path}: the weights are of another model than {folder / 'model_config.json'}: {error}"
        ) from None
    needed = [name for name in missing if not is_adapter_name(name)]
    if needed:
        raise InputError(
            f"{path}: {len(needed)} tensors are missing (the first: {', '.join(needed[:3])}); needed are all the weights "
            "that model_config.json describes."
        )
    if unexpected:
        warn(f"{path}: {len(unexpected)} tensors belong to no part of this model and are left out: {unexpected[:3]} …")
    module.base, module.tuned_names = base, tuned_names
    mode = getattr(args, "mode", "inference")
    if mode == "inference":
        module.eval()
    iteration = path.parent.name
    return int(iteration) if mode == "pretrain" and iteration.isdigit() else 0


def _weights_file(path: Path, iteration: int | None = None) -> Path:
    """The weights file that path, a checkpoint's folder or that file itself, means for this process."""
    if path.is_file():
        return path
    latest = path / "latest"
    if not latest.is_file():
        raise InputError(f"{path}: no file named latest; a checkpoint folder has one.")
    return weights_path(path, str(iteration or latest.read_text().strip()))


def whole_weights(
    path: Path, name: str | None = None, given_base: str | None = None, force_base: bool = False
) -> tuple[dict[str, torch.Tensor], Base, set[str]]:
    """All the weights that a checkpoint stands for, mapped from the disk; their base; the names that aren't the base's.

    For an adapter checkpoint the base's weights and its own; for any other the base is the checkpoint itself, without
    its adapters.

    Args:
        path: the weights file. name: what was typed to mean it.
        given_base: where an adapter's base is, if it has been moved.
        force_base: take it even if it isn't the one that the adapter was trained on.

    Raises:
        InputError: a file can't be read, or the base is another one.
    """
    weights = read_weights(path)
    folder = path.parent.parent
    config_path = folder / "model_config.json"
    config = read_json_object(config_path, "The configuration") if config_path.is_file() else {}
    if not is_adapter(config):
        adapters = {tensor for tensor in weights if is_adapter_name(tensor)}
        return weights, Base(name or str(folder), os.path.abspath(path), fingerprint(weights)), adapters
    recorded = base_of(config)
    base_path = find_base(config, folder, given_base)
    base_config = read_json_object(base_path.parent.parent / "model_config.json", "The base's configuration")
    if is_adapter(base_config):
        raise InputError(f"{base_path}: an adapter checkpoint too; the model that {folder} was trained on is needed.")
    base_weights = without_adapters(read_weights(base_path))
    found = fingerprint(base_weights)
    if found != recorded.fingerprint and not force_base:
        raise InputError(
            f"{folder}: trained on other weights than those of {base_path} (fingerprint {recorded.fingerprint[:12]}, found "
            f"{found[:12]}); --base with {recorded.name} as it was is needed, or --force_base to use this one all the same."
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
