"""The tensors of a checkpoint in either layout, under SAT's names, each read when it is asked for.

    weights = open_huggingface(folder, heads)     nothing is read but the files' headers
    weights["transformer.word_embeddings.weight"]
    shapes(weights)                               the same names, with tensors that have no numbers

A weights file of SAT's is mapped from the disk and is a plain dictionary. One of Hugging Face's has the rows of
query_key_value in another order, so that mapping is not enough: they are put in order when they are read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.broken_files import what_it_is_instead
from model.checkpoints.huggingface import is_reordered, rows_for_sat, sat_name, weights_files
from model.errors import InputError

DTYPES = {  # of the safetensors format
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NOT_OF_TORCH = "it isn't a file of tensors that torch wrote"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is on the disk: its shape and dtype, and how it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name. Each is read anew whenever it is asked for, and kept by nobody."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self.entries = dict(entries)

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


def shapes(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the same names, shapes and dtypes, for which no lazy one is read."""
    if not isinstance(weights, LazyTensors):
        return dict(weights)
    return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in weights.entries.items()}


def size_in_bytes(weights: Mapping[str, torch.Tensor]) -> int:
    """How many bytes the numbers of these tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in shapes(weights).values())


def by_layer(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups, those of one layer in each: of lazy ones, no more than that is in memory at a time."""
    if not isinstance(weights, LazyTensors):
        yield dict(weights)
        return
    groups: dict[str, list[str]] = {}
    for name in weights:
        layer = re.match(r".*\.layers\.\d+\.", name)
        groups.setdefault(layer[0] if layer else name, []).append(name)
    for names in groups.values():
        yield {name: weights[name] for name in names}


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
        tensors |= open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
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
        file = safe_open(path, framework="pt")
        for name in file.offset_keys():  # in the order in which they lie there
            piece = file.get_slice(name)
            dtype = DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise unreadable(path, f"{name} holds {piece.get_dtype()}, which no VisualGLM does")
            tensors[name] = LazyTensor(tuple(piece.get_shape()), dtype, _reader(file, name))
    except (SafetensorError, OSError) as error:
        raise unreadable(path, str(error)) from None
    return tensors


def _reader(file: Any, name: str) -> Callable[[], torch.Tensor]:
    return lambda: file.get_tensor(name)


def _open_pickle(path: Path) -> dict[str, LazyTensor]:
    content = load_tensors(path)
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise InputError(f"{path}: something else than tensors in it; a file of named tensors is needed.")
    return {name: LazyTensor.of(tensor) for name, tensor in content.items()}


def load_tensors(path: Path) -> Any:
    """What torch.save wrote into a file, its tensors mapped from the disk where that can be. No code in it is run.

    Raises:
        InputError: the file is missing or broken, or asks for something else than tensors.
    """
    problem = what_it_is_instead(path)
    if problem:
        raise unreadable(path, problem)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it holds the checkpoint's weights.") from None
    except (RuntimeError, OSError) as error:
        raise unreadable(path, _first_line(error)) from None
    except Exception as error:  # torch raises several kinds, for broken pickles and forbidden types
        asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise unreadable(
            path,
            f"it asks for {asked_for[1]}, which is no tensor and could run code" if asked_for else NOT_OF_TORCH,
        ) from None


def _first_line(error: Exception) -> str:
    """What torch says, unless it tells people to let the file run its code."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines and "weights_only" not in lines[0] else NOT_OF_TORCH


def unreadable(path: Path, reason: str) -> InputError:
    """The error of a file that holds no weights, for a reason."""
    return InputError(f"{path}: can't be read as weights ({reason}); needed is a checkpoint that is whole.")
