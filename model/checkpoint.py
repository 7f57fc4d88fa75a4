"""Checkpoints in SAT's layout, written so that a kill at any moment leaves the previous one whole.

<save>/<experiment>-<mm-dd-HH-MM>/
    model_config.json                        what to build
    ice_text.model                           the tokenizer
    <iteration>/mp_rank_00_model_states.pt   {"module": weights, "iteration": int}
    latest                                   the iteration; written last
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.errors import InputError
from model.progress import say, warn
from model.sat_compat import import_sat, safe_checkpoint_types

import_sat()

from sat import get_tokenizer, mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.training.model_io import extract_model_specific_args_to_dump  # noqa: E402

ADAPTER_NAMES = ("matrix_A", "matrix_B", "ptuning")  # may be missing from a checkpoint: then they start fresh


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
    if mpu.get_data_parallel_rank() == 0:
        weights = {"module": module.state_dict(), "iteration": iteration}
        write_whole(weights_path(folder, iteration), lambda path: torch.save(weights, path))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        config = json.dumps(extract_model_specific_args_to_dump(args, module), indent=4, ensure_ascii=False)
        write_whole(folder / "model_config.json", lambda path: path.write_text(config, encoding="utf-8"))
        get_tokenizer().save_pretrained(folder)
        write_whole(folder / "latest", lambda path: path.write_text(str(iteration)))
        say(f"Saved {folder} (iteration {iteration}).")
    torch.distributed.barrier()


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
        load_path: a checkpoint folder; args.load if absent.
        prefix: take only the tensors whose names start with it, without it.
        specific_iteration: instead of the one that `latest` names.

    Raises:
        InputError: no checkpoint there, one that can't be read, or one of another model.
    """
    folder = Path(load_path or args.load)
    latest = folder / "latest"
    if not latest.is_file():
        raise InputError(f"{folder}: no file named latest; a checkpoint folder has one.")
    iteration = str(specific_iteration or latest.read_text().strip())
    path = weights_path(folder, iteration)
    weights = read_weights(path)
    module = getattr(model, "module", model)
    selected = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        missing, unexpected = module.load_state_dict(selected, strict=False)
    except RuntimeError as error:  # torch lists every tensor of another shape
        raise InputError(
            f"{path}: the weights are of another model than {folder / 'model_config.json'}: {error}"
        ) from None
    needed = [name for name in missing if not any(part in name for part in ADAPTER_NAMES)]
    if needed:
        raise InputError(
            f"{path}: {len(needed)} tensors are missing (the first: {', '.join(needed[:3])}); needed are all the weights "
            "that model_config.json describes."
        )
    if unexpected:
        warn(f"{path}: {len(unexpected)} tensors belong to no part of this model and are left out: {unexpected[:3]} …")
    mode = getattr(args, "mode", "inference")
    if mode == "inference":
        module.eval()
    return int(iteration) if mode == "pretrain" and iteration.isdigit() else 0


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
