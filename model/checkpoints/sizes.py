"""What a checkpoint takes on the disk, and whether there is room for it.

Only the standard library is imported.
"""

import errno
import math
import os
import pickle
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from model.adapter_config import AdapterConfig
from model.checkpoints.broken_files import safetensors_shapes
from model.checkpoints.layout import Checkpoint, ModelConfig, hiding_problem

BYTES_OF_FLOAT32 = 4
STATES_OF_A_NUMBER = 3  # that a run needs to go on: the weight in float32 and two averages of Adam's, in float32 too
ROOM_FOR_THE_REST = 2**20  # bytes: the configuration, the tokenizer, the names of the tensors


def adapter_numbers(adapters: AdapterConfig, config: ModelConfig) -> dict[str, int]:
    """Parameters of the adapters: LoRA's, and P-Tuning's.

    Args:
        config: of the model that the adapters are put into.
    """
    hidden = config["hidden_size"]
    inner = config.get("inner_hidden_size") or 4 * hidden
    widths = {  # numbers that go into and out of one rank of the factors
        "query_key_value": 3 * hidden + 3 * hidden,
        "dense": hidden + hidden,
        "dense_h_to_4h": hidden + inner,
        "dense_4h_to_h": inner + hidden,
    }
    layers = len(adapters.lora_layers(config["num_layers"])) if adapters.has_lora else 0
    lora = layers * adapters.rank * sum(widths[target] for target in adapters.lora_targets)
    prefix = config["num_layers"] * 2 * hidden * adapters.prefix_length if adapters.has_ptuning else 0
    return {"lora": lora, "ptuning": prefix}


def adapter_size(adapters: AdapterConfig, config: ModelConfig) -> int:
    """About how many bytes an adapter checkpoint takes, in float32: rather too many than too few.

    Args:
        config: of the model that the adapters are put into.
    """
    return BYTES_OF_FLOAT32 * sum(adapter_numbers(adapters, config).values()) + ROOM_FOR_THE_REST


def state_size(trained: int) -> int:
    """About how many bytes the state of a run takes that trains so many numbers."""
    return STATES_OF_A_NUMBER * BYTES_OF_FLOAT32 * trained


def full_size(weights: Path, bytes_of_a_number: int) -> int:
    """How many bytes a weights file takes when its numbers are saved again in another width.

    Args:
        weights: of all the model, or a part. Where it is neither torch's zip file nor safetensors, its own size is all
            that is known.
    """
    size = weights.stat().st_size
    if weights.suffix == ".safetensors":
        shapes = safetensors_shapes(weights)
        return size if shapes is None else bytes_of_a_number * sum(math.prod(shape) for shape in shapes)
    try:
        with zipfile.ZipFile(weights) as file:
            [pickled] = [name for name in file.namelist() if name.endswith("/data.pkl")]
            with file.open(pickled) as content:
                storages = _Storages(content)
                storages.load()
            stored = sum(entry.file_size for entry in file.infolist() if "/data/" in entry.filename)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        ValueError,
        EOFError,
        AttributeError,
        TypeError,
        IndexError,
        KeyError,
    ):
        return size  # broken, or of an early torch: it is read, and refused if need be, later
    return size - stored + bytes_of_a_number * sum(storages.numbers.values())


class _Storages(pickle.Unpickler):
    """Reads how many numbers each of a weights file's storages has, and makes nothing else of it: no code in it is run."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.numbers: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> type["_Nothing"]:
        return _Nothing

    def persistent_load(self, storage: tuple[object, object, str, object, int]) -> None:
        _, _, key, _, count = storage
        self.numbers[key] = int(count)


class _Nothing:
    """In place of every class and function that a weights file names."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def folder_problems(flag: str, folder: str, bytes_needed: int = 0) -> list[str]:
    """Why so many bytes can't be put into the folder that flag names, which may not be there yet."""
    target = Path(folder).expanduser().absolute()
    existing = _nearest_existing(target)
    broken = next((place for place in (target, *target.parents) if place.is_symlink() and not place.exists()), None)
    if broken:
        return [f"{flag} {folder}: {broken} is a link to {broken.readlink()}, which isn't there; a folder is needed."]
    if not existing.is_dir():
        return [f"{flag} {folder}: {existing} is a file; a folder is needed."]
    if not _can_be_written_to(existing):
        return [f"{flag} {folder}: {existing} can't be written to; a folder of your own is needed."]
    free = free_bytes(target)
    if free < bytes_needed:
        return [f"{flag} {folder}: {size_text(free)} free on its disk; {size_text(bytes_needed)} are needed."]
    return []


def new_folder_problems(flag: str, folder: str, source: Checkpoint | None = None) -> list[str]:
    """Why the folder that flag names is no new or empty one, or would hide a run, or the source of what goes there."""
    target = Path(folder).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        return [f"{flag} {folder}: something is there already; a new or empty folder is needed."]
    hiding = hiding_problem(target, source)
    return [f"{flag} {folder}: {hiding}"] if hiding else []


def _can_be_written_to(folder: Path) -> bool:
    """Whether a file can be made there; the rights alone don't tell (root has them all, in /proc too)."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        return error.errno == errno.ENOSPC  # room is another question


def free_bytes(path: Path) -> int:
    """How many bytes are free on the disk where path is or would be made."""
    return shutil.disk_usage(_nearest_existing(path.absolute())).free


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def size_text(count: int) -> str:
    """A number of bytes as a person says it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
