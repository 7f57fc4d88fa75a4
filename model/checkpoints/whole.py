"""Files and folders that are there whole, or not at all.

A file, or the folder of an iteration, is written beside its place under a name that ends in `.unfinished`, forced to the
disk, and only then renamed. So a kill leaves what was there before, and litter that the next save removes.

`<iteration>/checksums.json` has the size and the SHA-256 of each of the iteration's files, and of the two files that all
iterations of a run share. It is checked whenever a checkpoint is looked up. Checkpoints without one are taken as they are:
older ones, and those of other tools. torch finds them cut short, but no changed bit: it maps them, and a map skips the
checksums of the zip file that they are.

Only the standard library is imported.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from model.errors import InputError
from model.progress import say

UNFINISHED = ".unfinished"
CHECKSUMS_FILE = "checksums.json"
CONFIG_FILE = "model_config.json"
SHARED_FILES = (CONFIG_FILE, "ice_text.model")  # in the checkpoint's folder, above its iterations
HEAD = 2**16  # bytes of a file that tell whose it is
WORTH_SAYING = 2**30  # bytes: hashing more takes seconds


class DamagedCheckpoint(InputError):
    """A file of a checkpoint isn't as it was saved."""


# --- writing ----------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let write fill a file beside path, force it to the disk, and only then give it path's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        remove(unfinished)
        raise
    sync(path.parent)


def is_same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two names lead to one file, by links of any kind; of files that aren't there yet, whether they will."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return Path(one).resolve() == Path(other).resolve()


def place_problem(path: str | Path) -> str | None:
    """Why no file can be written at path, in half a sentence, as far as its place tells before anything is done."""
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        return "a folder; the name of a file is needed."
    if not folder.is_dir():
        return f"no folder {folder}; one that is there is needed."
    if not os.access(folder, os.W_OK):
        return f"{folder} can't be written to; another place is needed."
    return None


def is_replaceable(path: Path, own: re.Pattern[bytes]) -> bool:
    """Whether nothing of anybody else's is lost by writing path: nothing is there, or a file that is empty or matches own."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return not head or own.match(head) is not None


def json_text(content: Any, indent: int) -> str:
    """JSON that a file in UTF-8 can hold: a byte of a file's name that is none stands as \\udcXX, as JSON writes it."""
    return json.dumps(content, indent=indent, ensure_ascii=False).encode(errors="backslashreplace").decode()


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def put_in_place(unfinished: Path, folder: Path, shared: Iterable[Path] = ()) -> None:
    """Give the finished folder unfinished the name folder, with the checksums of its files and of shared ones in it.

    A folder of that name is replaced: see `take_place`. Of a kill in between, the iteration before is used.
    """
    files = sorted(path for path in unfinished.iterdir() if path.is_file())
    for path in files:
        sync(path)
    checksums = {path.name: checksum(path) for path in files} | {f"../{path.name}": checksum(path) for path in shared}
    text = json.dumps({"files": checksums}, indent=4, ensure_ascii=False)
    write_whole(unfinished / CHECKSUMS_FILE, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    take_place(unfinished, folder)


def take_place(new: Path, folder: Path) -> None:
    """Give the folder new the name folder, and remove what had it.

    That takes two renames. A kill in the microseconds between them leaves both, under names that end in `.unfinished`.
    """
    replaced = folder.with_name(f"{folder.name}.replaced{UNFINISHED}")
    remove(replaced)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(new, folder)
    sync(folder.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there; where that fails, it stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a disk that has become read-only: the error that led here is told


def remove_unfinished(folder: Path) -> None:
    """Remove what a save that was killed has left in a run's folder."""
    for path in folder.glob(f"*{UNFINISHED}"):
        remove(path)


# --- checking ---------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> dict[str, int | str]:
    """The size in bytes and the SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def has_checksums(iteration: Path) -> bool:
    """Whether the folder of an iteration says what its files must be."""
    return (iteration / CHECKSUMS_FILE).is_file()


def damage(iteration: Path) -> str | None:
    """What is wrong with the files of an iteration, in half a sentence; None for a folder without checksums."""
    if not has_checksums(iteration):
        return None
    try:
        expected = _read_checksums(iteration / CHECKSUMS_FILE)
    except OSError as error:
        return f"{iteration / CHECKSUMS_FILE} can't be read: {error.strerror}"
    if expected is None:
        return f"{iteration / CHECKSUMS_FILE} is damaged"
    problems = (_file_damage(iteration, name, **sums) for name, sums in expected.items() if name != f"../{CONFIG_FILE}")
    return next((problem for problem in problems if problem), None)


def config_was_changed(iteration: Path) -> bool:
    """Whether `model_config.json` is another one than the iteration was saved with. People edit it: that's no damage."""
    if not os.access(iteration.parent / CONFIG_FILE, os.R_OK):
        return False  # whoever reads it says so
    expected = (_read_checksums(iteration / CHECKSUMS_FILE) or {}) if has_checksums(iteration) else {}
    sums = expected.get(f"../{CONFIG_FILE}")
    return sums is not None and _file_damage(iteration, f"../{CONFIG_FILE}", **sums) is not None


def _read_checksums(path: Path) -> dict[str, dict[str, Any]] | None:
    """The sizes and checksums by file name; None if the file has none.

    Raises:
        OSError: it can't be read.
    """
    try:
        files = json.loads(path.read_bytes())["files"]
        names = {name for name in files if Path(name).name == name} | {f"../{name}" for name in SHARED_FILES}
        is_good = bool(files) and all(
            name in names and isinstance(sums["bytes"], int) and isinstance(sums["sha256"], str) and len(sums) == 2
            for name, sums in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return files if is_good else None


def _file_damage(iteration: Path, name: str, bytes: int, sha256: str) -> str | None:
    path = iteration.parent / name[3:] if name.startswith("../") else iteration / name
    if not path.is_file():
        return f"{path} is missing"
    try:
        size = path.stat().st_size
        if size != bytes:
            return f"{path} has {size} bytes, and was saved with {bytes}"
        if size > WORTH_SAYING:
            say(f"Checking {size / 2**30:.1f} GiB of {path} against their checksum.")
        is_as_saved = checksum(path)["sha256"] == sha256
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    return None if is_as_saved else f"{path} is damaged: its checksum isn't the one in checksums.json"
