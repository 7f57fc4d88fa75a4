"""The pictures of many rows, opened once each before training, and remembered so that the next run need not.

Standard library and Pillow only.
"""

import hashlib
import math
import os
import random
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

from model.data.bad_rows import cache_folder, first_lines
from model.data.images import checked_file, open_image
from model.data.rows import Row
from model.distributed import is_first_process
from model.errors import InputError, raise_problems
from model.progress import with_progress

MOST_REMEMBERED_BYTES = 64 * 2**20  # eight million pictures; then the memory starts afresh


class CheckedImages:
    """Which pictures were whole when they were last opened: a file of 8-byte digests of path, size and time of change.

    It only saves time: without a place to write, or with a damaged file, pictures are opened again.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or checked_images_file()
        known = array("Q")
        try:
            content = self.file.read_bytes()
        except OSError:
            content = b""
        if len(content) <= MOST_REMEMBERED_BYTES:
            known.frombytes(content[: len(content) // 8 * 8])
        self._known = set(known)
        self._new = array("Q")
        self._folder = os.getcwd() + os.sep

    def _digest(self, path: str, status: os.stat_result) -> int:
        text = f"{path if os.path.isabs(path) else self._folder + path}|{status.st_size}|{status.st_mtime_ns}"
        return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")

    def knows(self, path: str, status: os.stat_result) -> bool:
        """Whether the picture at path was whole, and has not changed since; status is what the system says of it now."""
        return bool(self._known) and self._digest(path, status) in self._known

    def add(self, path: str) -> None:
        """Note a picture that was opened and is whole."""
        self._new.append(self._digest(path, os.stat(path)))

    def write(self) -> None:
        """Put what was noted into the file, behind what other runs have put there."""
        if not self._new:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            full = self.file.exists() and self.file.stat().st_size > MOST_REMEMBERED_BYTES
            with open(self.file, "wb" if full else "ab") as file:
                file.write(self._new.tobytes())
        except OSError:
            return  # a home folder that can't be written to costs the next run some time, and this one nothing
        self._known.update(self._new)
        self._new = array("Q")


def checked_images_file() -> Path:
    """Where pictures are remembered."""
    return cache_folder() / "pictures-1"


@dataclass
class ImageCheck:
    """What became of the pictures of some rows, each distinct path counted once."""

    problems: dict[int, str] = field(default_factory=dict)  # index of a row → where: what was found; what is needed
    opened: int = 0
    remembered: int = 0
    unopened: int = 0  # there was no time left


def check_rows(
    rows: Sequence[Row], memory: CheckedImages | None = None, seconds: float = math.inf, progress: bool = True
) -> ImageCheck:
    """Look at every distinct picture of rows: is it a file, and can it be opened?

    Files are looked for in any case. They are opened in as many threads as there are CPUs, but for those that memory
    knows, in an order of chance, until the seconds are over; looking for them may take half of that away.

    With progress, stderr shows how far it is and the time left, once it has taken two seconds.
    """
    started = time.monotonic()
    result = ImageCheck()
    bad: dict[str, str] = {}
    to_open: list[str] = []
    for path in dict.fromkeys(row.img for row in rows):
        if path is None:
            continue
        try:
            status = checked_file(path)
        except InputError as problem:
            bad[path] = str(problem)
            continue
        if memory is not None and memory.knows(path, status):
            result.remembered += 1
        else:
            to_open.append(path)
    random.Random(0).shuffle(to_open)
    seconds = max(seconds / 2, seconds - (time.monotonic() - started))
    checked: Iterable[tuple[str, str | None]] = _opened(to_open, seconds)
    if progress and is_first_process():
        checked = with_progress(checked, len(to_open), "Checking pictures", stops_after=seconds)
    for path, found in checked:
        result.opened += 1
        if found:
            bad[path] = found
        elif memory is not None:
            memory.add(path)
    result.unopened = len(to_open) - result.opened
    if memory is not None:
        memory.write()
    if bad:
        result.problems = {
            index: f"{row.where}: {bad[row.img]}"
            for index, row in enumerate(rows)
            if row.img is not None and row.img in bad
        }
    return result


def check_images(rows: Sequence[Row], progress: bool = True) -> None:
    """Open every distinct picture of rows once; do nothing if all are good.

    Raises:
        InputError: some aren't; the first 20 rows concerned are named (`image_problems` gives all).
    """
    raise_problems(first_lines(image_problems(rows, progress)))


def image_problems(rows: Sequence[Row], progress: bool = True) -> list[str]:
    """One line for each row whose picture can't be used: `{row.where}: {what was found}; {what is needed}`."""
    return list(check_rows(rows, progress=progress).problems.values())


def _opened(paths: Sequence[str], seconds: float) -> Iterator[tuple[str, str | None]]:
    """(path, problem) of pictures until the seconds are over."""
    if not paths:
        return
    end = time.monotonic() + seconds
    threads = os.cpu_count() or 1
    at_once = 4 * threads
    with ThreadPool(threads) as pool:
        for start in range(0, len(paths), at_once):
            if time.monotonic() > end:
                return
            some = paths[start : start + at_once]
            yield from zip(some, pool.map(_image_problem, some, chunksize=1), strict=True)


def _image_problem(path: str) -> str | None:
    try:
        open_image(path)
    except InputError as problem:
        return str(problem)
    return None
