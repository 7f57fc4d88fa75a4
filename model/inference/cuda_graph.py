"""On a GPU: the pass over one token of every row, recorded once and replayed.

A token of the 6B is some thousand kernels, and Python takes several times longer to start them than the GPU to compute them.
A CUDA graph starts them all at once, but then does the same work on the same memory each time. So

    rows and keys   are filled up to a power of two, and there is a graph for each pair of them that is met twice
    numbers         what is new of each token lies in one tensor, which is filled in before

Shapes: rows = answers in the making, keys = places of the cache that a pass may see, vocab = entries of the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from model.inference.cache import KeyValueCache
from model.progress import warn
from model.sat_compat import model_parallel

LEAST_KEYS = 128  # up to so many, attention takes no part of a pass that is worth a graph of its own
UNUSED = 1  # a context's length, a position and a token that can be had everywhere, for rows that are filled up

Work = Callable[[], torch.Tensor]


def can_be_recorded(model: Any) -> bool:
    """Whether the model is on a GPU, whole, and only asked: a run that trains it does more there than a graph may hold."""
    weights = list(model.parameters())
    is_trained = any(weight.requires_grad for weight in weights)
    return weights[0].device.type == "cuda" and model_parallel().ranks == 1 and not is_trained


class Recorder:
    """Makes CUDA graphs, which share the memory that they work in."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, work: Work) -> Work:
        """work as a graph: each call does it again, into the tensor that the call before gave.

        Raises:
            RuntimeError: work waits for the device, or does something else that can't be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # other threads may go on
            result = work()
        self.pool = graph.pool()

        def replayed() -> torch.Tensor:
            graph.replay()
            return result

        return replayed


class TokenGraphs:
    """Passes over one token of each row, for an engine whose keys and values are in cache.

    Args:
        read: gives the scores [rows, vocab] of numbers, int64[3, rows], as a `TokenPass` does.
    """

    def __init__(self, cache: KeyValueCache, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.cache, self.read, self.record = cache, read, Recorder()
        self.numbers = torch.full((3, cache.slots), UNUSED, device=cache.device)
        self.met: dict[tuple[int, int], Work | None] = {}  # rows and keys of a pass, and its graph once there is one
        self.refused: set[tuple[int, int]] = set()  # those that couldn't be recorded

    def scores(self, numbers: Sequence[list[int]]) -> torch.Tensor:
        """The scores [rows, vocab] that read gives of numbers; they stand until the next call."""
        given, positions = len(numbers[0]), numbers[1]
        rows = min(power_of_two(given), self.cache.slots)
        keys = min(max(power_of_two(self.cache.keys_at(positions)), LEAST_KEYS), self.cache.most_keys)
        self.cache.clear(keys)  # a graph can't know what has been cleared
        self.numbers[:, :rows] = torch.tensor([row + [UNUSED] * (rows - given) for row in numbers])
        return self._pass(rows, keys)()[:given]

    def _pass(self, rows: int, keys: int) -> Work:
        """The pass over so many rows and keys: as it is at first, which loads its kernels, and then as a graph."""

        def work() -> torch.Tensor:
            numbers = self.numbers[:, :rows]
            self.cache.advance_each(numbers[1], keys)
            return self.read(numbers)

        size = rows, keys
        is_new = size not in self.met
        graph = self.met.setdefault(size)
        if graph is None and not is_new and size not in self.refused:
            try:
                graph = self.met[size] = self.record(work)
            except RuntimeError as error:  # it may be another thread's doing, so that other sizes are tried
                if not self.refused:
                    reason = " ".join(str(error).split())[:200]
                    warn(f"Answers come more slowly: a pass can't be recorded here ({reason}).")
                self.refused.add(size)
        return graph or work


def power_of_two(number: int) -> int:
    """The least one that isn't below number, which is 1 or more."""
    return 1 << (number - 1).bit_length()
