"""Where features of pictures lie: in memory, or in files that a run's processes share, and that may outlast it.

Each process adds to a part of its own, and reads all parts. A file's index, beside it, lists the digests of the pictures
whose features are on the disk.
"""

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil
import torch

from model.distributed import from_processes_here, processes_here
from model.errors import InputError

MEMORY_SHARE = 0.25  # of what is free now; beyond it features lie in a file
DIGEST_BYTES = 16
NEW_BEFORE_NOTED = 1024  # pictures that a run which is killed may look at in vain, with --feature_cache


class FeaturePart:
    """The features [queries, width] that this process makes: in memory, or in a file that the others on this machine read.

    A file of the run's own has no name, and the system removes it when the run ends, however it ends. One that stays has
    an index beside it, which lists the digests whose features are on the disk.
    """

    def __init__(
        self, new: int, shape: tuple[int, int], dtype: torch.dtype, file: Path | None = None, is_shared: bool = False
    ) -> None:
        """new is how many may be added, is_shared whether other processes are to read them. With file, they stay there,
        behind what it has, unless another run is adding to it: then they are for this run only.

        Raises:
            InputError: there is no room for the file.
        """
        self.digests: list[bytes] = []
        self.start = self.noted = 0
        self.path, self.index = file, None if file is None else _locked_index(file)
        if file is not None and self.index is not None:
            self.start = len(_listed(file, shape, dtype))
            if not self.start:
                self.index.truncate(0)  # of a features file that is gone
            self.rows = rows_in(file, self.start + new, shape, dtype)[self.start :]
        elif is_shared or new * _row_bytes(shape, dtype) > MEMORY_SHARE * psutil.virtual_memory().available:
            self.nameless = tempfile.TemporaryFile()  # noqa: SIM115  (as long as this process, so that others find it)
            self.path = Path(f"/proc/{os.getpid()}/fd/{self.nameless.fileno()}")
            self.rows = rows_in(self.path, new, shape, dtype, place=tempfile.gettempdir())
        else:
            self.rows = torch.empty(new, *shape, dtype=dtype)

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        """Keep the features [pictures, queries, width] of pictures that are not here yet."""
        self.rows[len(self.digests) : len(self.digests) + len(features)] = features
        self.digests += digests
        if len(self.digests) - self.noted >= NEW_BEFORE_NOTED:
            self._note()

    def _note(self) -> None:
        """List what has been added, once it is on the disk: a run that is killed leaves nothing half-written."""
        if self.path is None or self.index is None:
            return
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        self.index.write(b"".join(self.digests[self.noted :]))
        self.index.flush()
        self.noted = len(self.digests)

    def close(self) -> None:
        """Note the last ones, and let other runs add theirs."""
        if self.index is not None:
            self._note()
            self.index.close()
            self.index = None


def part_of_this_process(new: int, shape: tuple[int, int], dtype: torch.dtype, file: Path | None) -> FeaturePart:
    """A part for as many features as this process may add; with file, it stays there, or beside it.

    Raises:
        InputError: one of the processes on this machine has no room for its file; then all of them raise it.
    """
    process, processes = processes_here()
    own_file = file.with_stem(f"{file.stem}-{process}") if file and process else file
    part, problem = None, None
    try:
        part = FeaturePart(new, shape, dtype, own_file, is_shared=processes > 1)
    except InputError as error:
        problem = str(error)
    problems = [told for told in from_processes_here(problem) if told]
    if problems or part is None:
        raise InputError(problems[0])
    return part


def _locked_index(file: Path) -> IO[bytes] | None:
    """The index of file, open for this process alone to add to; None if another one has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    index = open(file.with_suffix(".index"), "ab")  # noqa: SIM115  (held until the part is closed)
    try:
        fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        index.close()
        return None
    return index


def _row_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize


def _listed(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> list[bytes]:
    """The digests whose features are in file; none when it doesn't hold as many as its index lists."""
    index = file.with_suffix(".index")
    if not file.exists() or not index.exists():
        return []
    listed = index.read_bytes()
    digests = [listed[i : i + DIGEST_BYTES] for i in range(0, len(listed) - DIGEST_BYTES + 1, DIGEST_BYTES)]
    return digests if file.stat().st_size >= len(digests) * _row_bytes(shape, dtype) else []


def rows_in(
    file: Path, count: int, shape: tuple[int, int], dtype: torch.dtype, place: str | None = None
) -> torch.Tensor:
    """[count, queries, width] in a file, which is made as large as that; place is what a message calls it."""
    needed = count * _row_bytes(shape, dtype)
    try:
        with open(file, "ab") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(1, needed))
    except OSError as error:
        raise InputError(
            f"{place or file}: {error.strerror}; {needed / 2**20:.0f} MiB are needed there for features of pictures."
        ) from error
    return torch.from_file(str(file), shared=True, size=count * shape[0] * shape[1], dtype=dtype).view(count, *shape)


Places = dict[bytes, tuple[torch.Tensor, int]]  # features and the row among them, by digest


def placed(digests: Sequence[bytes], rows: torch.Tensor) -> Places:
    """Where the features of digests are: the first rows, in this order."""
    return {digest: (rows, row) for row, digest in enumerate(digests)}


def kept_in(file: Path, shape: tuple[int, int], dtype: torch.dtype) -> Places:
    """What earlier runs have left in file and in the files of other processes beside it."""
    kept: Places = {}
    for part in sorted(file.parent.glob(f"{file.stem}*{file.suffix}")):
        digests = _listed(part, shape, dtype)
        if digests:
            kept |= placed(digests, rows_in(part, len(digests), shape, dtype))
    return kept
