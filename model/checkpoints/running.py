"""Whose a run's folder is at the moment. A second run that went on in it would overwrite what the first one saves.

    refuse_running(folder)             where another process trains there
    with Running() as running:
        running.claim(folder)          the same, and from here on this one does

`<run>/running.txt` names the process, which keeps a record lock on the file. The system takes the lock back however the
process ends, workers that it forks don't inherit it, and NFS shows it to other machines. Where files can't be locked, nothing
is refused.

Only the standard library is imported.
"""

import os
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from model.checkpoints.whole import remove
from model.distributed import is_first_process
from model.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUNNING_FILE = "running.txt"  # in the run's folder
SECONDS_FOR_THE_FIRST, SECONDS_BETWEEN_LOOKS = 30.0, 0.1


class Running:
    """This process's claim of a run's folder. As a context manager it ends with the block, and its file goes."""

    def __init__(self) -> None:
        """Claim nothing yet."""
        self.path: Path | None = None
        self.file: IO[str] | None = None

    def __enter__(self) -> "Running":
        return self

    def claim(self, folder: Path) -> None:
        """Let no other process train in this folder.

        Raises:
            InputError: one does already.
        """
        path = folder / RUNNING_FILE
        while self.file is None:
            try:
                file = path.open("a+", encoding="utf-8")
            except OSError:  # whoever can't write here is told so by the first checkpoint
                return
            if not _locked(file, "lockf", "LOCK_EX"):
                file.close()
                refuse_running(folder)
                continue  # it has ended in between
            if _is_at(file, path):
                self.path, self.file = path, file
            else:
                file.close()  # its process has just ended, and taken the file away
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {platform.node()}\n")
        self.file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.path is not None and self.file is not None:
            remove(self.path)
            self.file.close()


def refuse_running(folder: Path) -> None:
    """Return if no other process trains in this folder.

    Of several processes the first one knows at once. The others wait a while: it may be the first one itself, at the end of
    the run before in the same processes.

    Raises:
        InputError: one does.
    """
    until = time.monotonic() + (0 if is_first_process() else SECONDS_FOR_THE_FIRST)
    while (found := _who_trains_in(folder)) and time.monotonic() < until:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if found:
        raise InputError(
            f"--resume: {folder} is trained in by {found} now, and two at once would overwrite each other's checkpoints; wait "
            "until it has ended, or end it."
        )


def _who_trains_in(folder: Path) -> str:
    """The other process that has claimed the folder; "" where there is none."""
    try:
        file = (folder / RUNNING_FILE).open(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    with file:
        return "" if _locked(file, "lockf", "LOCK_SH") else file.readline().strip() or "another process"


def locked_here(file: IO[bytes]) -> bool:
    """Whether nobody else had locked an open file; now it is locked until it is closed here and wherever it was forked to."""
    return _locked(file, "flock", "LOCK_EX")


def _locked(file: IO[Any], function: str, kind: str) -> bool:
    """Whether nobody else has locked the file: it now has a lock of this kind, or its file system knows none."""
    if fcntl is None:
        return True
    try:
        getattr(fcntl, function)(file, getattr(fcntl, kind) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
