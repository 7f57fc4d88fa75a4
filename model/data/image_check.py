"""The images of many rows, each opened once before training. Later runs open only those that are new or have changed.

    check = check_rows(rows, CheckedImages(), seconds=20)     all that was found

Standard library and Pillow only.
"""

import hashlib
import math
import os
import random
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from model.data.bad_rows import cache_folder
from model.data.images import checked_file, open_image
from model.data.rows import Row
from model.errors import InputError
from model.progress import with_progress

MOST_REMEMBERED_BYTES = 64 * 2**20  # eight million images; a larger file is begun anew


class CheckedImages:
    """The images that earlier runs found whole: a file of 8-byte digests of path, size and time of change.

    It only saves time. If the file can't be written or is damaged, images are opened again.
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
        """Whether the image at path was found whole and has not changed since. status is its present one."""
        return bool(self._known) and self._digest(path, status) in self._known

    def add(self, path: str) -> None:
        """Note an image that was opened and is whole; `write` puts it into the file."""
        self._new.append(self._digest(path, os.stat(path)))

    def write(self) -> None:
        """Append what was noted to the file. Other runs may do so at the same time."""
        if not self._new:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            full = self.file.exists() and self.file.stat().st_size > MOST_REMEMBERED_BYTES
            with open(self.file, "wb" if full else "ab") as file:
                file.write(self._new.tobytes())
        except OSError:
            return  # the next run opens these images again
        self._known.update(self._new)
        self._new = array("Q")


def checked_images_file() -> Path:
    """Where `CheckedImages` is kept."""
    return cache_folder() / "pictures-1"


@dataclass
class ImageCheck:
    """What was found about the images of some rows. Each distinct path counts once."""

    problems: dict[int, str] = field(default_factory=dict)  # index of a row → where: what was found; what is needed
    opened: int = 0
    remembered: int = 0  # from an earlier run
    unopened: int = 0  # for want of time


def check_rows(
    rows: Sequence[Row], checked_before: CheckedImages | None = None, seconds: float = math.inf
) -> ImageCheck:
    """Check every distinct image of rows: is there such a file, and can it be opened?

    All files are looked for. Those that weren't checked before are opened in random order, in as many threads as there
    are CPUs, until the time is over. After two seconds, the first process shows on stderr how far it is and the time left.

    Args:
        checked_before: images that are not opened again; those found whole are added.
        seconds: how long both may take. At least half of it is for opening images, however long looking for them took.
    """
    started = time.monotonic()
    result = ImageCheck()
    bad, to_open = _missing_and_unchecked(rows, checked_before, result)
    random.Random(0).shuffle(to_open)
    seconds = max(seconds / 2, seconds - (time.monotonic() - started))
    checked = problems_by_path(to_open, seconds)
    for path, found in with_progress(checked, len(to_open), "Checking pictures", stops_after=seconds):
        result.opened += 1
        if found:
            bad[path] = found
        elif checked_before is not None:
            checked_before.add(path)
    result.unopened = len(to_open) - result.opened
    if checked_before is not None:
        checked_before.write()
    if bad:
        result.problems = {
            index: f"{row.where}: {bad[row.img]}"
            for index, row in enumerate(rows)
            if row.img is not None and row.img in bad
        }
    return result


def _missing_and_unchecked(
    rows: Sequence[Row], checked_before: CheckedImages | None, result: ImageCheck
) -> tuple[dict[str, str], list[str]]:
    """What is wrong with the files of rows, by path, and the images that are still to be opened.

    Args:
        result: images that were checked before are counted in it.
    """
    bad: dict[str, str] = {}
    unchecked: list[str] = []
    for path in dict.fromkeys(row.img for row in rows if row.img is not None):
        try:
            status = checked_file(path)
        except InputError as problem:
            bad[path] = str(problem)
            continue
        if checked_before is not None and checked_before.knows(path, status):
            result.remembered += 1
        else:
            unchecked.append(path)
    return bad, unchecked


def problems_by_path(paths: Sequence[str], seconds: float) -> Iterator[tuple[str, str | None]]:
    """Open images in threads until the seconds are over; yields each one's path, and what is wrong with it or None."""
    if not paths:
        return
    end = time.monotonic() + seconds
    threads = os.cpu_count() or 1
    at_once = 4 * threads
    with ThreadPoolExecutor(threads) as pool:  # multiprocessing's needs room in /dev/shm
        for start in range(0, len(paths), at_once):
            if time.monotonic() > end:
                return
            some = paths[start : start + at_once]
            yield from zip(some, pool.map(_image_problem, some), strict=True)


def _image_problem(path: str) -> str | None:
    try:
        open_image(path)
    except InputError as problem:
        return str(problem)
    return None
