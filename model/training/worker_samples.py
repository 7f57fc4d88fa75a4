"""What worker processes hand over: the samples they open, noted so that one that dies can be named; and whole batches.

    samples = NotedSamples(samples, workers=2)
    loader = DataLoader(samples, collate_fn=HandedOver(data_collator), …)
    with dead_workers_named(…):             # asks samples.opened_by(pid)
        batch = received(next(iter(loader)))

Batches go through /dev/shm, as torch sends them. In a container it may have 64 MB. A worker that finds it full sends the
batch through its pipe: slower, but torch's own way waits for ever.
"""

import errno
import functools
import io
import multiprocessing
import multiprocessing.queues
import os
import re
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from model.data.workers import end_workers_at_exit, leave_signals_to_the_parent
from model.errors import TOO_MANY_FILES, InputError, RowError
from model.progress import warn_from_any_process

OPEN_FILES = 65536  # more would slow down programs that close all they might have
NOTES = 4  # numbers for each worker
SECONDS_TO_END = 2.0  # that a worker which has closed its connections may take to be gone
SAVED = "saved"  # the key of a batch that came through the pipe
LOCKS_AS_QUEUES = 3  # what a DataLoader shares besides a queue for each worker: a queue and two events
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pids>[\d, ]+)\)")


class NotedSamples(Dataset[Any]):
    """Samples of which each worker process notes, in memory that all share, the one that it opens."""

    def __init__(self, samples: Any, workers: int) -> None:
        """samples: what a DataLoader takes."""
        self.samples = samples
        # Of each worker: pid, sample, whether it's open, the system's number of the error that ended it.
        self._notes = multiprocessing.RawArray("q", NOTES * max(1, workers))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.samples[index]
        place = NOTES * worker.id
        self._notes[place : place + NOTES] = [os.getpid(), index, 1, 0]
        sample = self.samples[index]
        self._notes[place + 2] = 0
        return sample

    def note_error(self, worker: int, number: int) -> None:
        """Worker number worker ends, by the error that the system gives this number."""
        self._notes[NOTES * worker + 3] = number

    def opened_by(self, pid: int, name: Callable[[int], str]) -> tuple[str, bool] | None:
        """What the worker with this process number opened last, and whether it still was at it; None if nothing.

        Args:
            name: of a sample by its index, for a person.

        Raises:
            InputError: the worker ended because it could open no more files.
        """
        for place in range(0, len(self._notes), NOTES):
            process, index, is_open, error = self._notes[place : place + NOTES]
            if process == pid:
                if error == errno.EMFILE:
                    raise InputError(TOO_MANY_FILES)
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


def begin_work(worker: int) -> None:
    """What a worker process of the training rows does first."""
    leave_signals_to_the_parent()
    end_if_unable(worker)


def end_if_unable(worker: int) -> None:
    """Let this worker process end where it can't hand over a batch.

    A thread of Python's hands batches over. Its error would be printed, and the main process would wait for ever.
    """

    def end(error: Exception, item: object) -> None:
        if isinstance(error, OSError) and error.errno:
            samples: Any = get_worker_info().dataset  # type: ignore[union-attr]  # this is one
            samples.note_error(worker, error.errno)
        if not _is_of_open_files(error):
            traceback.print_exception(error)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


def allow_open_files() -> None:
    """Let this process open as many files as it may, up to OPEN_FILES: each tensor on its way from a worker is one."""
    with suppress(ValueError, OSError):
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        enough = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, enough), most))


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """loader's iterator.

    Raises:
        InputError: /dev/shm has no room for what its processes share to start with.
    """
    try:
        if loader.num_workers > 0:
            allow_open_files()
            # Asked beforehand: torch's half-made iterator prints a traceback when it is dropped.
            _ = [multiprocessing.Queue() for _ in range(loader.num_workers + LOCKS_AS_QUEUES)]
            end_workers_at_exit()
        return iter(loader)
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise InputError(TOO_MANY_FILES) from None
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
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most != resource.RLIM_INFINITY and most < len(batch[SAVED]):
        _warn_once_of_small_files(most)
    else:
        _warn_once_of_full_memory()
    return torch.load(io.BytesIO(batch[SAVED]), weights_only=True)


@functools.cache
def _warn_once_of_full_memory() -> None:
    warn_from_any_process(
        "/dev/shm is too small for the batches of the data workers, which now come through a pipe, slower. In Docker, "
        "--shm-size=8g makes it larger; a smaller --num-workers or --prefetch-factor needs less of it."
    )


@functools.cache
def _warn_once_of_small_files(most: int) -> None:
    warn_from_any_process(
        f"A file may have {most} bytes at most (ulimit -f), too few for the batches of the data workers, which now come "
        "through a pipe, slower. A higher limit lets them go through /dev/shm."
    )


@contextmanager
def dead_workers_named(opened_by: Callable[[int], tuple[str, bool] | None]) -> Iterator[None]:
    """Tell torch's error about a worker process that died in a sentence, with what it opened.

    Args:
        opened_by: what the worker of a process number opened last, for a person, and whether it still was at it.

    Raises:
        RowError: in place of that error. torch raises it wherever the main process is, from a signal.
        InputError: too many files are open.
    """
    try:
        try:
            yield
        except EOFError:
            # From a worker that is ending: the signal of its end, which says which it is, comes a moment later.
            time.sleep(SECONDS_TO_END)
            raise
    except (RuntimeError, OSError) as error:
        if _is_of_open_files(error):
            raise InputError(TOO_MANY_FILES) from None
        if isinstance(error, OSError):
            raise
        dead = _DEAD_WORKER.search(str(error))
        if dead is None:
            raise
        opened = [found for pid in dead["pids"].split(",") if (found := opened_by(int(pid))) is not None]
        named = " and ".join(f"{'while' if is_open else 'after'} it opened {what}" for what, is_open in opened)
        raise RowError(
            f"a data worker died{' ' * bool(named)}{named}. Linux kills a process when memory runs out; "
            "fewer --num-workers need less of it. With --num-workers 0 rows are opened in the main process."
        ) from None


def _is_of_open_files(error: Exception) -> bool:
    """Whether the main process could take no more from a worker, since it has too many files open."""
    return "ancillary data" in str(error) or (isinstance(error, OSError) and error.errno == errno.EMFILE)
