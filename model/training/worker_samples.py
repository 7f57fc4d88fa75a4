"""What worker processes hand over: the samples they open, noted so that one that dies can be named; and whole batches.

    samples = NotedSamples(samples, workers=2)
    loader = DataLoader(samples, collate_fn=HandedOver(data_collator), …)
    with dead_workers_named(…):             # asks samples.opened_by(pid)
        batch = received(next(iter(loader)))

Batches go through /dev/shm, as torch sends them. In a container it may have 64 MB. A worker that finds it full sends the
batch through its pipe: slower, but torch's own way waits for ever.
"""

import functools
import io
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from model.data.workers import end_workers_at_exit
from model.errors import InputError, RowError
from model.progress import warn_from_any_process

SAVED = "saved"  # the key of a batch that came through the pipe
LOCKS_AS_QUEUES = 3  # what a DataLoader shares besides a queue for each worker: a queue and two events
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\)")


class NotedSamples(Dataset[Any]):
    """Samples of which each worker process notes, in memory that all share, the one that it opens."""

    def __init__(self, samples: Any, workers: int) -> None:
        """samples: what a DataLoader takes."""
        self.samples = samples
        self._notes = multiprocessing.RawArray(
            "q", 3 * max(1, workers)
        )  # of each worker: pid, sample, whether it's open

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.samples[index]
        place = 3 * worker.id
        self._notes[place : place + 3] = [os.getpid(), index, 1]
        sample = self.samples[index]
        self._notes[place + 2] = 0
        return sample

    def opened_by(self, pid: int, name: Callable[[int], str]) -> tuple[str, bool] | None:
        """What the worker with this process number opened last, and whether it still was at it; None if nothing.

        Args:
            name: of a sample by its index, for a person.
        """
        for place in range(0, len(self._notes), 3):
            process, index, is_open = self._notes[place : place + 3]
            if process == pid:
                return name(index), bool(is_open)
        return None


class HandedOver:
    """A collate function whose batches reach the main process whether or not /dev/shm has room for them."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, examples: Any) -> Any:
        batch = self.collate_fn(examples)
        if get_worker_info() is None:
            return batch
        try:
            for tensor in _tensors_in(batch):
                tensor.share_memory_()
        except (RuntimeError, OSError):  # of torch, for a full /dev/shm
            file = io.BytesIO()
            torch.save(batch, file)
            return {SAVED: file.getvalue()}
        return batch


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """loader's iterator.

    Raises:
        InputError: /dev/shm has no room for what its processes share to start with.
    """
    try:
        if loader.num_workers > 0:
            # Asked beforehand: torch's half-made iterator prints a traceback when it is dropped.
            _ = [multiprocessing.Queue() for _ in range(loader.num_workers + LOCKS_AS_QUEUES)]
            end_workers_at_exit()
        return iter(loader)
    except OSError as error:
        raise InputError(
            f"the data workers can't be started: {error.strerror}. Needed is room in /dev/shm (in Docker, --shm-size=8g), "
            "or --num-workers 0."
        ) from None


def _tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict | list | tuple):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _tensors_in(part)


def received(batch: Any) -> Any:
    """The batch that `HandedOver` made."""
    if not isinstance(batch, dict) or SAVED not in batch:
        return batch
    _warn_once_of_full_memory()
    return torch.load(io.BytesIO(batch[SAVED]), weights_only=True)


@functools.cache
def _warn_once_of_full_memory() -> None:
    warn_from_any_process(
        "/dev/shm is too small for the batches of the data workers, which now come through a pipe, slower. In Docker, "
        "--shm-size=8g makes it larger; a smaller --num-workers or --prefetch-factor needs less of it."
    )


@contextmanager
def dead_workers_named(opened_by: Callable[[int], tuple[str, bool] | None]) -> Iterator[None]:
    """Tell torch's error about a worker process that died in a sentence, with what it opened.

    Args:
        opened_by: what the worker of a process number opened last, for a person, and whether it still was at it.

    Raises:
        RowError: in place of that error. torch raises it wherever the main process is, from a signal.
    """
    try:
        yield
    except RuntimeError as error:
        dead = _DEAD_WORKER.search(str(error))
        if dead is None:
            raise
        opened = [found for pid in dead["pids"].split(",") if (found := opened_by(int(pid))) is not None]
        named = " and ".join(f"{'while' if is_open else 'after'} it opened {what}" for what, is_open in opened)
        raise RowError(
            f"a data worker died{' ' * bool(named)}{named}. Linux kills a process when memory runs out; "
            "fewer --num-workers need less of it. With --num-workers 0 rows are opened in the main process."
        ) from None
