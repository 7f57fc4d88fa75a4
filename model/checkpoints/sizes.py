"""What a checkpoint takes on the disk, and whether there is room for it.

Only the standard library is imported.
"""

import os
import shutil
from pathlib import Path


def folder_problems(flag: str, folder: str, bytes_needed: int = 0) -> list[str]:
    """Why so many bytes can't be put into the folder that flag names, which may not be there yet."""
    target = Path(folder).expanduser().absolute()
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        return [f"{flag} {folder}: {existing} is a file; a folder is needed."]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{flag} {folder}: {existing} can't be written to; a folder of your own is needed."]
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        return [f"{flag} {folder}: {_size(free)} free on its disk; {_size(bytes_needed)} are needed."]
    return []


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
