"""Where features of images are kept: in memory, in a file of the run, or in files that outlast it.

    FeaturesInMemory      one process, and few of them
    FeaturesOfTheRun      a file without a name, which the run's other processes on this machine read
    FeaturesOnDisk        with --feature_cache: `<name>.features`, and `<name>.index` with the digests of what is in it

Each process adds to one part of its own, and reads the parts of all.
"""

import fcntl
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil
import torch

from model.distributed import from_processes_here, processes_here
from model.errors import InputError

MEMORY_SHARE = 0.25  # of what is free now; more features than that lie in a file
DIGEST_BYTES = 16
NEW_BEFORE_NOTED = 1024  # images whose features are lost at most when a run with --feature_cache is killed


class FeatureFormat(NamedTuple):
    """What the features of one image are: dtype[queries, width]."""

    queries: int
    width: int
    dtype: torch.dtype

    def bytes_of(self, count: int) -> int:
        """What the features of so many images take."""
        return count * self.queries * self.width * self.dtype.itemsize


class FeaturePart:
    """The features that this process adds. Where their rows lie is up to the three kinds below.

    digests    of the images whose features were added, in that order
    rows       [room, queries, width]: the first len(digests) of them are in use
    path       the file that the rows are in, for other processes; None if there is none
    start      how many features of earlier runs lie in that file before rows
    """

    def __init__(self, rows: torch.Tensor, path: Path | None = None, start: int = 0) -> None:
        self.digests: list[bytes] = []
        self.rows, self.path, self.start = rows, path, start

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        """Keep the features [images, queries, width] of images that are not here yet."""
        self.rows[len(self.digests) : len(self.digests) + len(features)] = features
        self.digests += digests

    def close(self) -> None:
        """Nothing is added any more."""


class FeaturesInMemory(FeaturePart):
    """Features that nobody else reads, and few enough for memory."""

    def __init__(self, room: int, format: FeatureFormat) -> None:
        super().__init__(torch.empty(room, format.queries, format.width, dtype=format.dtype))


class FeaturesOfTheRun(FeaturePart):
    """Features in a file without a name: the system removes it when the run ends, however it ends."""

    def __init__(self, room: int, format: FeatureFormat) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  (as long as this process, so that others find it)
        path = Path(f"/proc/{os.getpid()}/fd/{self.file.fileno()}")
        super().__init__(rows_in(path, room, format, place=tempfile.gettempdir()), path)


class FeaturesOnDisk(FeaturePart):
    """Features in a file that stays, behind those of earlier runs. Its index lists what is surely on the disk."""

    def __init__(self, room: int, format: FeatureFormat, file: Path, index: IO[bytes]) -> None:
        """index is `locked_index(file)`; it is closed with this part."""
        self.index, self.noted = index, 0
        start = len(listed_digests(file, format))
        if not start:
            index.truncate(0)  # of a features file that is gone
        super().__init__(rows_in(file, start + room, format)[start:], file, start)

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        super().add(digests, features)
        if len(self.digests) - self.noted >= NEW_BEFORE_NOTED:
            self._note()

    def _note(self) -> None:
        """List what has been added, once it is on the disk: a run that is killed leaves nothing half-written."""
        assert self.path is not None
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        self.index.write(b"".join(self.digests[self.noted :]))
        self.index.flush()
        self.noted = len(self.digests)

    def close(self) -> None:
        """Note the last ones, and let other runs add theirs."""
        if not self.index.closed:
            self._note()
            self.index.close()


def new_part(room: int, format: FeatureFormat, file: Path | None = None, is_shared: bool = False) -> FeaturePart:
    """An empty part with room for so many features.

    Args:
        file: where they are to stay. While another run is adding to it, they are for this run only.
        is_shared: whether other processes are to read them.

    Raises:
        InputError: there is no room for the file.
    """
    index = None if file is None else locked_index(file)
    if file is not None and index is not None:
        return FeaturesOnDisk(room, format, file, index)
    if is_shared or format.bytes_of(room) > MEMORY_SHARE * psutil.virtual_memory().available:
        return FeaturesOfTheRun(room, format)
    return FeaturesInMemory(room, format)


def part_of_this_process(room: int, format: FeatureFormat, file: Path | None) -> FeaturePart:
    """A part with room for as many features as this process may add; with file, they stay there, or beside it.

    Raises:
        InputError: one of the processes on this machine has no room for its file. Then all of them raise it.
    """
    process, processes = processes_here()
    own_file = file.with_stem(f"{file.stem}-{process}") if file and process else file
    part, problem = None, None
    try:
        part = new_part(room, format, own_file, is_shared=processes > 1)
    except InputError as error:
        problem = str(error)
    problems = [told for told in from_processes_here(problem) if told]
    if problems or part is None:
        raise InputError(problems[0])
    return part


def locked_index(file: Path) -> IO[bytes] | None:
    """The index of file, open for this process alone to add to; None while another one has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    index = open(file.with_suffix(".index"), "ab")  # noqa: SIM115  (held until the part is closed)
    try:
        fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        index.close()
        return None
    return index


def listed_digests(file: Path, format: FeatureFormat) -> list[bytes]:
    """The digests whose features are in file, in their order; none when it is shorter than its index says."""
    index = file.with_suffix(".index")
    if not file.exists() or not index.exists():
        return []
    listed = index.read_bytes()
    digests = [listed[i : i + DIGEST_BYTES] for i in range(0, len(listed) - DIGEST_BYTES + 1, DIGEST_BYTES)]
    return digests if file.stat().st_size >= format.bytes_of(len(digests)) else []


def rows_in(file: Path, count: int, format: FeatureFormat, place: str | None = None) -> torch.Tensor:
    """[count, queries, width] in a file, which is made as large as that.

    Raises:
        InputError: there is no room for it. The message calls it place, if that is given.
    """
    needed = format.bytes_of(count)
    try:
        with open(file, "ab") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(1, needed))
    except OSError as error:
        raise InputError(
            f"{place or file}: {error.strerror}; {needed / 2**20:.0f} MiB are needed there for features of pictures."
        ) from error
    shape = (count, format.queries, format.width)
    return torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=format.dtype).view(shape)


Places = dict[bytes, tuple[torch.Tensor, int]]  # by an image's digest: a tensor of features, and the image's row in it


def placed(digests: Sequence[bytes], rows: torch.Tensor) -> Places:
    """Where the features of digests are: the first rows, in this order."""
    return {digest: (rows, row) for row, digest in enumerate(digests)}


def kept_in(file: Path, format: FeatureFormat) -> Places:
    """What earlier runs have left in file, and in the files of other processes beside it."""
    kept: Places = {}
    for part in sorted(file.parent.glob(f"{file.stem}*{file.suffix}")):
        digests = listed_digests(part, format)
        if digests:
            kept |= placed(digests, rows_in(part, len(digests), format))
    return kept
