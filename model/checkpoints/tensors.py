"""The tensors of a checkpoint in either layout, under SAT's names, each read when it is asked for.

    weights = open_huggingface(folder, heads)     nothing is read but the files' headers
    weights["transformer.word_embeddings.weight"]
    shapes(weights)                               the same names, with tensors that have no numbers

A weights file of SAT's is opened as a plain dictionary of tensors mapped from the disk, and loaded from its places there
(`one_by_one`). One of Hugging Face's has the rows of query_key_value in another order: they are put in order when they are read.
"""

import json
import math
import os
import re
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from model.checkpoints.broken_files import what_it_is_instead
from model.checkpoints.huggingface import is_reordered, rows_for_sat, sat_name, weights_files
from model.checkpoints.packed import QuantState
from model.errors import InputError
from model.progress import with_progress

DTYPES = {  # of the safetensors format
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# The share of the differences among the biases' sizes that an order of the rows has to explain, to be recognised.
# A key's bias hardly changes the attention and stays small, so that the right order explains most of them: 0.85 to 0.96
# in each layer of model/tiny, and another order 0.01 to 0.11. Weights that were never trained show nothing.
EXPLAINS, DOES_NOT = 0.6, 0.3
LENGTH_OF_HEADER = 8  # bytes of a safetensors file that say how long its header is
READERS = 4  # threads that read one tensor: a disk is asked several things at once, and so is the system's cache
BYTES_AT_A_TIME = 2**25  # that one of them reads
NOT_OF_TORCH = "it isn't a file of tensors that torch wrote"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is on the disk: its shape and dtype, and how it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    read_some: Callable[[Sequence[int], int], list[torch.Tensor]] | None = None  # see `some`

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def some(self, places: Sequence[int], count: int) -> list[torch.Tensor]:
        """So many numbers in a row from each of the places, which are counted as if the tensor had one dimension."""
        if self.read_some is not None:
            return self.read_some(places, count)
        numbers = self.read().detach().reshape(-1)
        return [numbers[place : place + count] for place in places]


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name. Each is read anew whenever it is asked for, and kept by nobody."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> "LazyTensors":
        """The same tensors as lazy ones; they themselves if they are."""
        if isinstance(weights, LazyTensors):
            return weights
        return cls({name: LazyTensor.of(tensor) for name, tensor in weights.items()})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def with_others(self, others: Mapping[str, torch.Tensor]) -> "LazyTensors":
        """These tensors and others, which win where a name is in both."""
        return LazyTensors(self.entries | {name: LazyTensor.of(tensor) for name, tensor in others.items()})

    def renamed(self, new_name: Callable[[str], str | None]) -> "LazyTensors":
        """These tensors under other names, without those for which new_name gives None."""
        named = ((new_name(name), entry) for name, entry in self.entries.items())
        return LazyTensors({name: entry for name, entry in named if name is not None})

    def converted(self, convert: Callable[[str, torch.Tensor], torch.Tensor]) -> "LazyTensors":
        """What convert makes of each tensor, by its name, when it is asked for."""

        def of(name: str, entry: LazyTensor) -> LazyTensor:
            return LazyTensor(entry.shape, entry.dtype, lambda: convert(name, entry.read()))

        return LazyTensors({name: of(name, entry) for name, entry in self.entries.items()})


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same names, shapes and dtypes, for which no lazy one is read."""
    if not isinstance(weights, LazyTensors):
        return dict(weights)
    return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in weights.entries.items()}


def size_in_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """How many bytes the numbers of these tensors take."""
    return sum(tensor.nbytes for tensor in shapes(weights).values())


def by_layer(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups, those of one layer in each: of lazy ones, no more than that is in memory at a time."""
    if not isinstance(weights, LazyTensors):
        yield dict(weights)
        return
    for names in layers(weights):
        yield {name: weights[name] for name in names}


def layers(names: Iterable[str]) -> list[list[str]]:
    """Names of tensors in groups, those of one layer in each."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*\.layers\.\d+\.", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    return list(groups.values())


def open_huggingface(folder: Path, heads: int) -> LazyTensors:
    """The weights of a folder in Hugging Face's layout, under SAT's names and in SAT's order.

    Args:
        heads: attention heads of the language model.

    Raises:
        InputError: a file is missing or broken, or holds something else than a VisualGLM's weights.
    """
    entries: dict[str, LazyTensor] = {}
    for name, tensor in _huggingface_tensors(folder).items():
        ours = sat_name(name)
        if ours is not None:
            entries[ours] = _in_sat_order(ours, tensor, heads)
    return LazyTensors(entries)


def _in_sat_order(name: str, tensor: LazyTensor, heads: int) -> LazyTensor:
    if not is_reordered(name):
        return tensor
    return LazyTensor(tensor.shape, tensor.dtype, lambda: rows_for_sat(tensor.read(), heads))


def _huggingface_tensors(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of all weights files, under their own names."""
    tensors: dict[str, LazyTensor] = {}
    for file in weights_files(folder):
        tensors |= open_safetensors(file) if file.suffix == ".safetensors" else open_pickle(file)
    return tensors


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, under their own names.

    Raises:
        InputError: it can't be read, or has numbers of a kind that no VisualGLM has.
    """
    from safetensors import SafetensorError, safe_open

    problem = what_it_is_instead(path)
    if problem:
        raise unreadable(path, problem)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as checked:
            file = OpenFile(path)
            length = int.from_bytes(file.read(0, LENGTH_OF_HEADER), "little")
            header = json.loads(file.read(LENGTH_OF_HEADER, length))
            for name in checked.offset_keys():  # in the order in which they lie there
                piece = header[name]
                dtype = DTYPES.get(piece["dtype"])
                if dtype is None:
                    raise unreadable(path, f"{name} holds {piece['dtype']}, which no VisualGLM does")
                place = LENGTH_OF_HEADER + length + piece["data_offsets"][0]
                tensors[name] = file.tensor(place, tuple(piece["shape"]), dtype)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, str(error)) from None
    return tensors


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file in which torch.save wrote them by name, under their own names.

    Raises:
        InputError: it can't be read, or holds something else.
    """
    content = load_tensors(path)
    if not is_named_tensors(content):
        raise InputError(f"{path}: something else than tensors in it; a file of named tensors is needed.")
    return _in_torchs_file(path, content, lambda located: located)


def is_named_tensors(content: object) -> bool:
    """Whether what was in a file is a dictionary of texts and tensors, and nothing else."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )


def todays_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names of today: in May 2023, LoRA of a linear of one part had no number."""
    return {f"{name}.0" if name.endswith((".matrix_A", ".matrix_B")) else name: tensors[name] for name in tensors}


def one_by_one(path: Path, mapped: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors that torch.save wrote into a file's "module", each read by itself; of old files, the mapped ones.

    A process that maps a file of 15 GB and goes through it seems to take 15 GB, although the system may take them back.

    Args:
        mapped: the same tensors, see `load_tensors`, under today's names.
    """
    if isinstance(mapped, LazyTensors) or not zipfile.is_zipfile(path):
        return mapped
    return LazyTensors(_in_torchs_file(path, mapped, lambda located: todays_names(located["module"])))


def _in_torchs_file(
    path: Path, mapped: Mapping[str, torch.Tensor], among: Callable[[Any], Mapping[str, torch.Tensor]]
) -> dict[str, LazyTensor]:
    """The tensors of a file that torch.save wrote: those that lie there as they are by their places, the others mapped.

    torch doesn't look for the places in the file: it computes where its own writer puts them. If another program wrote the
    file anew, they lie elsewhere, and all tensors stay mapped.

    Args:
        among: gives the same tensors of all that is in the file.
    """
    entries = {name: LazyTensor.of(tensor) for name, tensor in mapped.items()}
    if not _is_read_as_it_lies(path):
        return entries
    try:
        located = among(load_tensors(path, device="meta"))
    except InputError:  # tensors of a kind that the meta device hasn't
        return entries
    file, starts, placed = OpenFile(path), set(), {}
    for name, tensor in located.items():
        place, size = place_in_file(tensor)
        if size:
            starts.add(mapped[name].untyped_storage().data_ptr() - place)
        if size == tensor.nbytes and tensor.is_contiguous():
            placed[name] = file.tensor(place, tuple(tensor.shape), tensor.dtype)
    return entries | placed if len(starts) == 1 else entries  # where the file is mapped to, by every tensor's place


def _is_read_as_it_lies(path: Path) -> bool:
    """Whether the numbers in a file of torch's lie in it as in this machine's memory: before torch 1.6 they didn't."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    except zipfile.BadZipFile:  # torch can be told to write no check sums
        return False
    return all(order == sys.byteorder.encode() for order in orders)


class OpenFile:
    """A file of tensors, from whose places numbers are read. It stays the one that was opened if it is replaced."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            InputError: it can't be opened.
        """
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; a file that can be read is needed.") from None
        weakref.finalize(self, os.close, self.descriptor)

    def tensor(self, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        """The one whose numbers lie in the file one after another, from place on."""
        if 0 in shape:
            return LazyTensor.of(torch.empty(shape, dtype=dtype, device="cpu"))
        size = math.prod(shape) * dtype.itemsize

        def read() -> torch.Tensor:
            numbers = numpy.empty(size, numpy.uint8)  # which asks for large pages, unlike torch
            self.read_into(numbers, place)
            return torch.from_numpy(numbers).view(dtype).view(shape)

        def some(places: Sequence[int], count: int) -> list[torch.Tensor]:
            ends = [min(start + count, math.prod(shape)) for start in places]
            found = [
                self.read(place + start * dtype.itemsize, (end - start) * dtype.itemsize)
                for start, end in zip(places, ends, strict=True)
            ]
            return [torch.frombuffer(numbers, dtype=dtype) for numbers in found]

        return LazyTensor(shape, dtype, read, some)

    def read(self, place: int, size: int) -> bytearray:
        """So many bytes from a place on.

        Raises:
            InputError: the file ends before, or can't be read.
        """
        numbers = bytearray(size)
        self._read_piece(memoryview(numbers), place)
        return numbers

    def read_into(self, numbers: "numpy.ndarray[Any, Any]", place: int) -> None:
        """Fill numbers with the bytes from a place on, by several threads. Raises as `read` does."""
        starts = range(0, len(numbers), BYTES_AT_A_TIME)
        pieces = [numbers[start : start + BYTES_AT_A_TIME].data for start in starts]
        if len(pieces) == 1:
            self._read_piece(pieces[0], place)
            return
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(self._read_piece, pieces, [place + start for start in starts]))

    def _read_piece(self, numbers: memoryview, place: int) -> None:
        while numbers:
            try:
                got = os.preadv(self.descriptor, [numbers], place)
            except OSError as error:
                raise unreadable(self.path, error.strerror or str(error)) from None
            if not got:
                raise unreadable(self.path, "it ends within a tensor")
            numbers, place = numbers[got:], place + got


def place_in_file(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the numbers of a tensor are in its file, if it was loaded for the meta device: first byte, bytes.

    That such tensors know it stands in torch's notes on serialization.
    """
    storage: Any = tensor.untyped_storage()
    return storage._checkpoint_offset, storage.nbytes()


def on_device(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of a tensor that was read, on a device and in a dtype; the GPU converts what goes to it."""
    there = tensor.to(device)
    return there.to(dtype or tensor.dtype, copy=there is tensor)


def write_weights(
    path: Path, like: Mapping[str, torch.Tensor], value: Callable[[str], torch.Tensor], iteration: int = 1
) -> None:
    """Write a weights file of SAT's layout, with value(name) for each tensor, one after another.

    torch.save needs every tensor at once. So it writes the file without their numbers first, and those are put into
    their places.

    Args:
        like: tensors of the same names, shapes and dtypes.
    """
    with torch.serialization.skip_data():
        torch.save({"module": without_numbers(like), "iteration": iteration}, path)
    places = load_tensors(path, device="meta")["module"]
    with open(path, "r+b") as file:
        sizes = [tensor.nbytes for tensor in places.values()]
        for name in with_progress(list(places), len(places), "Tensors written", sizes=sizes):
            offset, size = place_in_file(places[name])
            numbers = value(name).detach().to("cpu", places[name].dtype).contiguous().reshape(-1).view(torch.uint8)
            assert len(numbers) == size, name
            file.seek(offset)
            file.write(numbers.numpy().data)


def without_numbers(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors like these on the CPU, each in its own storage, for whom only asks for their names, shapes and dtypes.

    Those of a dtype lie over each other in memory that is never read or written, so that it takes no room.
    """
    largest: dict[torch.dtype, int] = {}
    for tensor in like.values():
        largest[tensor.dtype] = max(tensor.numel(), largest.get(tensor.dtype, 0))
    room = {dtype: torch.empty(numel, dtype=dtype).view(torch.uint8).numpy() for dtype, numel in largest.items()}
    return {
        name: torch.frombuffer(room[tensor.dtype], dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        if tensor.numel()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in like.items()
    }


def load_tensors(path: Path, device: str = "cpu") -> Any:
    """What torch.save wrote into a file, its tensors mapped from the disk where that can be. No code in it is run.

    Args:
        device: "meta" leaves their numbers in the file, see `place_in_file`.

    Raises:
        InputError: the file is missing or broken, or asks for something else than tensors.
    """
    problem = what_it_is_instead(path)
    if problem:
        raise unreadable(path, problem)
    try:
        with torch.serialization.safe_globals(safe_checkpoint_types()):
            try:
                return torch.load(path, map_location=device, weights_only=True, mmap=device == "cpu")
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location=device, weights_only=True)  # torch's format before 1.6
    except FileNotFoundError:
        gone = (
            ""
            if path.parent.is_dir()
            else " (a run that goes on removes old iterations: --save_total_limit; try again)"
        )
        raise InputError(f"{path}: no such file; it holds the checkpoint's weights{gone}.") from None
    except (RuntimeError, OSError) as error:
        raise unreadable(path, _first_line(error)) from None
    except Exception as error:  # torch raises several kinds, for broken pickles and forbidden types
        asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise unreadable(
            path,
            f"it asks for {asked_for[1]}, which is no tensor and could run code" if asked_for else NOT_OF_TORCH,
        ) from None


def safe_checkpoint_types() -> list[Any]:
    """What old checkpoints may hold besides tensors: numpy's random state, and how bitsandbytes packed weights.

    `torch.load` reads weights only by default and refuses it; nothing listed here can run code.
    """
    reconstruct = numpy._core.multiarray._reconstruct  # type: ignore[attr-defined]
    return [
        reconstruct,
        (reconstruct, "numpy.core.multiarray._reconstruct"),  # as numpy 1 wrote it
        (QuantState, "bitsandbytes.functional.QuantState"),  # ours, in its place
        numpy.ndarray,
        numpy.dtype,
        numpy.dtypes.UInt32DType,
        numpy.dtypes.Int64DType,
        numpy.dtypes.Float64DType,
    ]


def _first_line(error: Exception) -> str:
    """What torch says, unless it tells people to let the file run its code."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and "weights_only" not in lines[0] else NOT_OF_TORCH


def unreadable(path: Path, reason: str) -> InputError:
    """The error of a file that holds no weights, for a reason."""
    return InputError(f"{path}: can't be read as weights ({reason}); needed is a checkpoint that is whole.")


def looks_old(weights: Mapping[str, torch.Tensor], heads: int) -> bool:
    """Whether the rows of query_key_value look ordered (head, 3, head_dim), as in Hugging Face's layout.

    Told by the sizes of the biases, see `EXPLAINS`. False where nothing can be told.
    """
    biases = [weights[name] for name in weights if is_reordered(name) and name.endswith("bias")]
    if not biases:
        return False
    blocks = torch.arange(3 * heads)
    new, old = (
        sum(_explained(bias, parts) for bias in biases) / len(biases) for parts in (blocks // heads, blocks % 3)
    )
    return old > EXPLAINS and new < DOES_NOT


def _explained(bias: torch.Tensor, parts: torch.Tensor) -> float:
    """The share of the variance of the blocks' norms that their parts explain: 0 to 1.

    Args:
        bias: [blocks · head_dim]. parts: int64[blocks], query, key or value.
    """
    norms = bias.float().reshape(len(parts), -1).norm(dim=1)
    means = torch.stack([norms[parts == part].mean() for part in range(3)])
    total = (norms - norms.mean()).square().sum()
    return float((means[parts] - norms.mean()).square().sum() / total) if total > 0 else 0.0
