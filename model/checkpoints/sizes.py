"""What a checkpoint takes on the disk, and whether there is room for it.

Only the standard library is imported.
"""

import os
import shutil
from pathlib import Path

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import ModelConfig

BYTES_OF_FLOAT32 = 4
ROOM_FOR_THE_REST = 2**20  # bytes: the configuration, the tokenizer, the names of the tensors


def adapter_size(adapters: AdapterConfig, config: ModelConfig) -> int:
    """About how many bytes an adapter checkpoint takes, in float32: rather too many than too few.

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
    numbers = 0
    if adapters.has_lora:
        layers = len(adapters.lora_layers(config["num_layers"]))
        numbers += layers * adapters.rank * sum(widths[target] for target in adapters.lora_targets)
    if adapters.has_ptuning:
        numbers += config["num_layers"] * 2 * hidden * adapters.prefix_length
    return BYTES_OF_FLOAT32 * numbers + ROOM_FOR_THE_REST


def folder_problems(flag: str, folder: str, bytes_needed: int = 0) -> list[str]:
    """Why so many bytes can't be put into the folder that flag names, which may not be there yet."""
    target = Path(folder).expanduser().absolute()
    existing = _nearest_existing(target)
    if not existing.is_dir():
        return [f"{flag} {folder}: {existing} is a file; a folder is needed."]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{flag} {folder}: {existing} can't be written to; a folder of your own is needed."]
    free = free_bytes(target)
    if free < bytes_needed:
        return [f"{flag} {folder}: {_size(free)} free on its disk; {_size(bytes_needed)} are needed."]
    return []


def free_bytes(path: Path) -> int:
    """How many bytes are free on the disk where path is or would be made."""
    return shutil.disk_usage(_nearest_existing(path.absolute())).free


def _nearest_existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
