"""What a file is that should hold weights and doesn't: a web page, a pointer of git-lfs, or half a download.

Only the standard library is imported.
"""

import json
import zipfile
from pathlib import Path

from model.data.file_kinds import is_lfs_pointer, is_web_page

HEAD = 512  # bytes that tell what a file is
LARGEST_HEADER = 100_000_000  # bytes: the limit that the safetensors library sets


def what_it_is_instead(path: Path) -> str | None:
    """What keeps a file from being weights, as a clause; None where nothing is seen without reading it whole."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return None  # whoever opens it says why
    if not head:
        return "it is empty"
    if is_web_page(head):
        return "it is a web page: the link of the download led to a page, or asked for a login"
    if is_lfs_pointer(head):
        return "it is a pointer of git-lfs, not the file itself: git lfs pull fetches that"
    if path.suffix == ".safetensors":
        return _safetensors_problem(path)
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "its end is missing, as after half a download"
    return None


def _safetensors_problem(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            return "it doesn't begin as safetensors do"
        header = file.read(length)
    if len(header) < length:
        return "its end is missing, as after half a download"
    try:
        tensors = json.loads(header)
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "it doesn't begin as safetensors do"
    needed = 8 + length + max(ends, default=0)
    if size < needed:
        return f"{size:,} of {needed:,} bytes are there, as after half a download"
    return None


def safetensors_shapes(path: Path) -> list[list[int]] | None:
    """The shapes of the tensors in a safetensors file; None where it is broken."""
    if what_it_is_instead(path) is not None:
        return None
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [tensor["shape"] for name, tensor in header.items() if name != "__metadata__"]
