"""Where features of images are kept: in memory, in a file of the run, or in files that outlast it.

    FeaturesInMemory      one process, and few of them
    FeaturesOfTheRun      a file without a name, which the run's other processes on this machine read
    FeaturesOnDisk        with --feature_cache: `<name>.features`, and `<name>.index`, which says what is in it

Each process adds to one part of its own, and reads the parts of all.

`.features` has the rows one behind the other. `.index` has a line that names its version, and for each row the digest of
the image and a checksum of the digest and the row. All rows are checked when a run starts; that reads what training will
read anyway. A row that is damaged is made again and added at the end. Rows that are listed never change: other runs
may be reading them. So a file that is of no use is not overwritten, but removed, and a new one is made.
"""

import errno
import fcntl
import hashlib
import math
import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy
import psutil
import torch

from model.distributed import from_processes_here, processes_here
from model.errors import InputError
from model.progress import say

MEMORY_SHARE = 0.25  # of what is free now; more features than that lie in a file
DIGEST_BYTES = 16  # of an image, and of a checksum
HEADER = b"features of images, version 2\n"  # earlier versions had none, and no checksums
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
        self.index, self.noted, self.format = index, 0, format
        entries = listed(file, format)
        start = len(entries) if entries and _any_is_whole(entries, rows_in(file, len(entries), format)) else 0
        if start:
            # A run that was killed may have left half an entry behind them.
            index.truncate(len(HEADER) + len(b"".join(entries)))
        else:
            index.truncate(0)
            file.unlink(missing_ok=True)
        try:
            rows = rows_in(file, start + room, format)
        except InputError:
            self._leave_as_before(file, start)
            raise
        super().__init__(rows[start:], file, start)

    def _leave_as_before(self, file: Path, start: int) -> None:
        """Without room for more: what was made for it goes, and the features of earlier runs stay."""
        if start:
            os.truncate(file, self.format.bytes_of(start))
        else:
            for made in (file, file.with_suffix(".index")):
                made.unlink(missing_ok=True)
        self.index.close()

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        super().add(digests, features)
        if len(self.digests) - self.noted >= NEW_BEFORE_NOTED:
            self._note()

    def _note(self) -> None:
        """List what has been added, once it is on the disk: a run that is killed leaves nothing half-written."""
        assert self.path is not None
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        if not os.fstat(self.index.fileno()).st_size:
            self.index.write(HEADER)
        new = self.digests[self.noted :]
        rows = as_bytes(self.rows[self.noted : len(self.digests)])
        self.index.write(b"".join(digest + checksum(digest, row) for digest, row in zip(new, rows, strict=True)))
        self.index.flush()
        self.noted = len(self.digests)

    def close(self) -> None:
        """Note the last ones, give back the room that was not needed, and let other runs add theirs."""
        if not self.index.closed:
            self._note()
            assert self.path is not None
            os.truncate(self.path, self.format.bytes_of(self.start + len(self.digests)))
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
    """The index of file, open for this process alone to add to; None while another one has it, or where none can lock it.

    Raises:
        InputError: it can't be opened, or is a link.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        index = os.fdopen(_opened(file.with_suffix(".index")), "ab")
    except OSError as error:
        raise InputError(_problem(file.with_suffix(".index"), error)) from None
    try:
        fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        index.close()
        if not isinstance(error, BlockingIOError):  # two runs that add to one file would take each other's features
            say(
                f"{file.parent}: its file system can't lock files ({error.strerror}), so features of pictures are kept for this "
                "run only; a --feature_cache on another one is needed."
            )
        return None
    return index


def _opened(path: Path) -> int:
    """A file descriptor to add to a file, which is made if need be. A link is not followed: it may lead to any file."""
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _problem(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{path}: a link found; a file in the folder of --feature_cache itself is needed, so remove the link."
    return f"{path}: {error.strerror}; a file that can be written to is needed for features of pictures."


def listed(file: Path, format: FeatureFormat) -> list[bytes]:
    """The entries of file's index, for its first rows: an image's digest and a checksum each.

    There are none where it has no index of this version, or is shorter than that says.

    Raises:
        InputError: one of the two is a link.
    """
    index = file.with_suffix(".index")
    for path in (file, index):
        if path.is_symlink():
            raise InputError(_problem(path, OSError(errno.ELOOP, "")))
        if not path.is_file():
            return []
    content = index.read_bytes()
    if not content.startswith(HEADER):
        return []
    size = 2 * DIGEST_BYTES
    entries = [content[i : i + size] for i in range(len(HEADER), len(content) - size + 1, size)]
    return entries if file.stat().st_size >= format.bytes_of(len(entries)) else []


def checksum(digest: bytes, row: numpy.ndarray) -> bytes:
    """Of an image's digest and its features together.

    Args:
        row: uint8[bytes], of `as_bytes`.
    """
    return hashlib.blake2b(row.data, key=digest, digest_size=DIGEST_BYTES).digest()


def as_bytes(rows: torch.Tensor) -> numpy.ndarray:
    """Features [images, queries, width] as uint8[images, bytes], not copied."""
    return rows.flatten(1).view(torch.uint8).numpy()


def is_whole(entry: bytes, row: numpy.ndarray) -> bool:
    """Whether a row of features, uint8[bytes], is the one that its entry was written for."""
    return checksum(entry[:DIGEST_BYTES], row) == entry[DIGEST_BYTES:]


def _any_is_whole(entries: Sequence[bytes], rows: torch.Tensor) -> bool:
    return any(is_whole(entry, row) for entry, row in zip(entries, as_bytes(rows), strict=True))


def rows_in(file: Path, count: int, format: FeatureFormat, place: str | None = None) -> torch.Tensor:
    """[count, queries, width] in a file, which is made as large as that.

    Args:
        place: of a file without a name, what the message calls it.

    Raises:
        InputError: there is no room for it, or it is a link.
    """
    needed = format.bytes_of(count)
    try:
        is_named = file.parts[1:2] != ("proc",)  # the others are links to what has no name
        opened = _opened(file) if is_named else os.open(file, os.O_RDWR)
    except OSError as error:
        raise InputError(_problem(file, error)) from None
    try:
        os.posix_fallocate(opened, 0, max(1, needed))
        shape = (count, format.queries, format.width)
        own = f"/proc/self/fd/{opened}"  # not the name: another file may have it by now
        return torch.from_file(own, shared=True, size=math.prod(shape), dtype=format.dtype).view(shape)
    except OSError as error:
        raise InputError(
            f"{place or file}: {error.strerror}; {math.ceil(needed / 2**20)} MiB are needed there for features of pictures."
        ) from error
    finally:
        os.close(opened)


Places = dict[bytes, tuple[torch.Tensor, int]]  # by an image's digest: a tensor of features, and the image's row in it


def placed(digests: Sequence[bytes], rows: torch.Tensor) -> Places:
    """Where the features of digests are: the first rows, in this order."""
    return {digest: (rows, row) for row, digest in enumerate(digests)}


def kept_in(file: Path, format: FeatureFormat, known: Collection[bytes] = ()) -> Places:
    """What earlier runs have left in file, and in the files of other processes beside it.

    Rows that are damaged are left out. How many these are is told, unless known is given.

    Args:
        known: digests that are not looked for.

    Raises:
        InputError: one of the files is a link.
    """
    kept: Places = {}
    for part in sorted(file.parent.glob(f"{file.stem}*{file.suffix}")):
        entries = listed(part, format)
        if not entries:
            index = part.with_suffix(".index")
            if not known and index.is_file() and index.stat().st_size:
                say(f"{index}: it is of an earlier version, without checksums, or damaged; the features are made anew.")
            continue
        rows = rows_in(part, len(entries), format)
        damaged = set()
        for row, (entry, content) in enumerate(zip(entries, as_bytes(rows), strict=True)):
            digest = entry[:DIGEST_BYTES]
            if digest in known:
                continue
            if is_whole(entry, content):
                kept[digest] = (rows, row)
            else:
                damaged.add(digest)
        damaged -= kept.keys()  # made anew before
        if damaged and not known:
            say(f"{part}: the features of {len(damaged)} of {len(entries)} pictures are damaged; they are made anew.")
    return kept
