"""The processes of a run watch each other: where one dies, fails or is stopped, all end, and say why.

    with Watchdog.of_run(options, …) as watchdog:
        …                                # the process group is made
        watchdog.start(options, inputs)  # refuses to train where processes see different files
        …

What each process does beside its work, in two threads:

    beats       every half second, a number that it counts up goes into a store, which the first process serves
    reads       the numbers of the others, and the cause of the end if one of them has written it

What ends a run, and what the others say as their last line:

    an error                 the process writes its sentence, with its row where it has one, before it leaves
    killed, or stopped       its number stands still for --rank_timeout seconds; a few, if a connection broke as well
    the first process gone   the store is gone
    the launcher gone        nothing is said: it is taken for a SIGTERM, so that the run is saved (`model.training.signals`)

A process that waits for the others can't be interrupted: it is ended where it is. Checkpoints stand that, they are put in
place whole; one that lies ready is put in place first.

What this can't find out: a process that lives and makes no progress, in an endless loop or on a disk that doesn't answer.
It looks like one that has much to do. And nobody watches before `start`: torch's own limits hold there.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from model.cli.options import SCRIPT, Options
from model.cli.preflight import Inputs
from model.distributed import from_all_processes, store_of_run
from model.errors import (
    STATUS_OF_A_LOST_PROCESS,
    STATUS_OF_A_SIGNAL,
    STATUS_OF_BAD_INPUT,
    STATUS_WITHOUT_READER,
    InputError,
    RowError,
    handling,
    ignore_signals_from_now_on,
)
from model.progress import warn, warn_from_any_process
from model.training.launcher import Launcher
from model.training.same_inputs import refuse_different, seen_by_this_process
from model.training.saving import CheckpointSaver
from model.training.signals import StopAtSignal
from model.training.trouble import BatchesAtHand

SECONDS_BETWEEN_BEATS = 0.5
BEATS_WITHIN_THE_TIMEOUT = 6
# How long a process may be silent once a connection to one of them broke, or while this one is asked to end.
SECONDS_AFTER_A_BROKEN_CONNECTION = 3.0
SECONDS_AFTER_A_SIGNAL = 20.0  # deepspeed's launcher and torchrun kill what hasn't ended 30 s after their SIGTERM
SECONDS_FOR_A_CAUSE = 15.0  # until one that is known elsewhere must have come
SECONDS_TO_LEAVE = 1.0  # for a process that has met the same error, to leave in its own way
SECONDS_TO_BE_HEARD = 5.0
SECONDS_OF_A_SIGNAL = 0.5  # the same, where a signal asks for haste
SECONDS_TO_FINISH = 20.0  # a checkpoint that lies ready
TIMEOUTS_WITHOUT_A_LAUNCHER = 10  # then this process ends, saved or not
CAUSE = "cause"

_BROKEN_CONNECTION = re.compile("Connection closed|Connection reset|Broken pipe|gloo|NCCL|Socket")


@dataclass(frozen=True)
class Cause:
    """Why a run ends: the first cause, as the process writes it that met it."""

    text: str
    status: int  # that all processes leave with
    lost: int | None = None  # the process that it is about, if that can't say anything itself


class Watchdog:
    """Watches the other processes of a run, and lets them know of this one. It does nothing where there is one process."""

    def __init__(
        self,
        seconds: float,
        rows: Callable[[], str] = lambda: "",
        finish: Callable[[float], object] = lambda seconds: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            seconds: how long a process may be silent; 0 for any time (--rank_timeout).
            rows: the rows that this process works on, as a person reads them; "" if none.
            finish: waits so many seconds at most for a checkpoint that is being put in place.
            is_stopping: whether a signal has asked the run to end.
        """
        self.seconds, self.rows, self.finish, self.is_stopping = seconds or float("inf"), rows, finish, is_stopping
        self.interval = min(SECONDS_BETWEEN_BEATS, self.seconds / BEATS_WITHIN_THE_TIMEOUT)
        self.patience = self.seconds  # how long a process may be silent now
        self.names: list[str] = []  # of the processes, for a person
        self.rank = 0
        self.is_first_here = False  # of this machine's processes, but for the first of all
        self._has_begun = False
        self._store: Any = None
        self._store_to_tell: Any = None  # another connection to it, for `_tell`
        self._telling: threading.Thread | None = None
        self._beats: list[str] = []  # as they were read last
        self._silence: list[float] = []  # seconds, of each process
        self._cause: Cause | None = None
        self._tells = False  # whether this process tells it, for all on this machine
        self._store_is_gone = False
        self._heartbeat: threading.Thread | None = None
        self._launcher = Launcher.of_this_command()
        self._over = threading.Event()  # this process leaves in its own way
        self._leaving = threading.Lock()  # held by the thread that ends this process

    # --- the run's own thread

    def __enter__(self) -> "Watchdog":
        if self._launcher.line:
            self._start_watching()
        return self

    @classmethod
    def of_run(cls, options: Options, batches: BatchesAtHand, saver: CheckpointSaver, stop: StopAtSignal) -> "Watchdog":
        """The watchdog of a run with these parts."""
        return cls(options.rank_timeout, batches.named, saver.finish, lambda: bool(stop.number))

    def start(self, options: Options, inputs: Inputs) -> None:
        """Watch the others from now on. Every process calls this, once there is a process group.

        Raises:
            InputError: the processes see different files or flags. Every process raises it.
        """
        import torch

        self._has_begun = True
        processes = torch.distributed.get_world_size()
        if processes == 1:
            return
        self.rank = torch.distributed.get_rank()
        store = store_of_run()
        if self.rank == 0:
            store.set(CAUSE, "")
        store.set(_beat(self.rank), "0")
        # Also: every key is there once they have told each other.
        all_see = from_all_processes((socket.gethostname(), seen_by_this_process(options, inputs)))
        hosts, seen = zip(*all_see, strict=True)
        self.names = [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]
        first = [rank for rank in range(1, processes) if hosts[rank] == hosts[self.rank]]
        self.is_first_here = bool(first) and first[0] == self.rank
        self._silence = [0.0] * processes
        # All connections are made now: where the store can't be reached, making one stops every thread of this process.
        self._store, self._store_to_tell = store, store.clone()
        self._heartbeat = threading.Thread(target=self._beat_and_read, args=(store.clone(),), daemon=True)
        self._heartbeat.start()
        if not self._launcher.line:
            self._start_watching()
        refuse_different(self.names, seen)

    def _start_watching(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Let the others know that this process leaves, and why.

        Raises:
            SystemExit: the error was not one of bad input. It has been printed.
        """
        try:
            if self._store is not None:
                self._leave(error)
        finally:
            with self._leaving:  # for good, if a thread ends this process already
                self._over.set()
            if self._heartbeat is not None:
                self._heartbeat.join(SECONDS_TO_LEAVE)  # in torch's code, it would crash while Python ends

    def _leave(self, error: BaseException | None) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._wait_for_the_others()
            return
        told_by_command = isinstance(error, InputError | SystemExit | BrokenPipeError)  # `model.errors`
        with handling(lambda *_: None):  # the launcher ends all as soon as one has ended
            if is_broken_connection(error):
                self.patience = min(self.patience, SECONDS_AFTER_A_BROKEN_CONNECTION)
                time.sleep(SECONDS_FOR_A_CAUSE)  # the thread ends this process in the midst of it
            with self._leaving:
                self._over.set()
            cause = self._cause_in(error)
            self._publish(cause, tells=isinstance(error, RowError) or not told_by_command)
            if not told_by_command:
                traceback.print_exception(error)
                warn_from_any_process(f"{SCRIPT}: error: {cause.text}")
            self._wait_until_heard(SECONDS_OF_A_SIGNAL if isinstance(error, SystemExit) else SECONDS_TO_BE_HEARD)
        ignore_signals_from_now_on()
        if not told_by_command:
            raise SystemExit(cause.status) from None

    def _cause_in(self, error: BaseException) -> Cause:
        name = self.names[self.rank]
        if isinstance(error, InputError):
            return Cause(f"{name}: {error}", STATUS_OF_BAD_INPUT)
        if isinstance(error, BrokenPipeError):
            return Cause(f"{name}: nobody reads its output any more.", STATUS_WITHOUT_READER)
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
            by_a_signal = status > STATUS_OF_A_SIGNAL
            by = signal.Signals(status - STATUS_OF_A_SIGNAL).name if by_a_signal else "itself"
            return Cause(f"{name} was ended by {by}.", status)
        text = (str(error).strip() or "no more is given").splitlines()[0]
        rows = self.rows()
        at_hand = f" The rows of its batch: {rows}." if rows else ""
        return Cause(f"{name} failed: {type(error).__name__}: {text.rstrip('.')}.{at_hand}", 1)

    def _publish(self, cause: Cause, tells: bool) -> None:
        """Write cause, unless there is one already."""
        with self._while_there_is_a_store():
            if tells:
                self._store.add(self._told_here(), 1)
            self._store.compare_set(CAUSE, "", json.dumps(asdict(cause)))
            self._store.set(_leaves(self.rank), "1")

    def _wait_for_the_others(self) -> None:
        """The first process stays until the others have come to the end, for it serves the store."""
        with self._while_there_is_a_store():
            self._store.set(_leaves(self.rank), "1")
            while self.rank == 0 and not self._store.check([*map(_leaves, range(len(self.names)))]):
                time.sleep(self.interval / 10)

    def _wait_until_heard(self, seconds: float, lost: int | None = None) -> None:
        """Wait so long at most until all processes but a lost one know the cause."""
        until = time.monotonic() + seconds
        others = [_leaves(rank) for rank in range(len(self.names)) if rank != lost]
        with self._while_there_is_a_store():
            while not self._store.check(others) and time.monotonic() < until:
                time.sleep(self.interval / 10)

    @contextmanager
    def _while_there_is_a_store(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # the first process has gone, and the store with it
            self._store_is_gone = True

    def _told_here(self) -> str:
        return f"told on {socket.gethostname()}"

    # --- the thread that talks with the store, which may keep it waiting

    def _beat_and_read(self, store: Any) -> None:
        keys = [CAUSE, *map(_beat, range(len(self.names)))]
        number = 0
        with self._while_there_is_a_store():
            while not self._over.is_set():
                number += 1
                store.set(_beat(self.rank), str(number))
                cause, *self._beats = [value.decode() for value in store.multi_get(keys)]
                if cause:
                    self._tells = store.add(self._told_here(), 1) == 1
                    store.set(_leaves(self.rank), "1")
                    self._cause = Cause(**json.loads(cause))
                    return
                self._over.wait(self.interval)

    # --- the thread that watches, and never waits for anyone

    def _watch(self) -> None:
        before, last, asked_to_end_at = list(self._beats), time.monotonic(), None
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if self.is_stopping():
                self.patience = min(self.patience, SECONDS_AFTER_A_SIGNAL)
            # A process that was stopped itself, as by Ctrl-Z, has heard nothing, but hasn't listened either.
            self._count_silence(before, min(now - last, 2 * self.interval))
            before, last = list(self._beats), now
            cause = self._found()
            if cause is not None:
                self._end(cause)
            elif asked_to_end_at is None and self._launcher.is_gone():
                asked_to_end_at = now
                warn("The launcher of this run has gone.")
                os.kill(os.getpid(), signal.SIGTERM)
            elif asked_to_end_at is not None and now - asked_to_end_at > self._seconds_without_a_launcher():
                self._end(Cause("the launcher has gone, and this process couldn't end.", STATUS_OF_A_SIGNAL + 15))

    def _count_silence(self, before: list[str], seconds: float) -> None:
        if not before:
            return
        for rank, beat in enumerate(self._beats):
            self._silence[rank] = 0.0 if beat != before[rank] else self._silence[rank] + seconds

    def _seconds_without_a_launcher(self) -> float:
        if not self._has_begun:
            return SECONDS_TO_BE_HEARD  # there is nothing to save yet
        return TIMEOUTS_WITHOUT_A_LAUNCHER * self.seconds

    def _found(self) -> Cause | None:
        """Why the run must end, if it must."""
        if self._store is None or self._cause is not None:
            return self._cause
        if self._store_is_gone:
            self._tells = self.is_first_here
            return Cause(
                f"{self.names[0]} has gone: it was killed, or its machine can't be reached.",
                STATUS_OF_A_LOST_PROCESS,
                0,
            )
        if self._silence[self.rank] > self.patience:  # its own beats don't come back: the store is silent
            silent = 0
        else:
            silent = next((rank for rank, seconds in enumerate(self._silence) if seconds > self.patience), -1)
        if silent < 0:
            return None
        as_asked = " --rank_timeout says how long the others wait." if self.patience == self.seconds else ""
        cause = Cause(
            f"{self.names[silent]} gave no sign of life for {self._silence[silent]:.0f} s: it was killed or stopped, or its "
            f"machine can't be reached.{as_asked}",
            STATUS_OF_A_LOST_PROCESS,
            silent,
        )
        if silent == 0:  # which serves the store: none can tell the others
            self._tells = self.is_first_here
            return cause
        if self._telling is None:
            self._telling = threading.Thread(target=self._tell, args=(cause,), daemon=True)
            self._telling.start()
        return None

    def _tell(self, cause: Cause) -> None:
        """Write cause for all to read, this process too. It may wait for a store that can't be reached."""
        with self._while_there_is_a_store():
            self._store_to_tell.compare_set(CAUSE, "", json.dumps(asdict(cause)))

    def _end(self, cause: Cause) -> None:
        """End this process, wherever it is, unless it leaves in its own way within a second."""
        if self._over.wait(SECONDS_TO_LEAVE):
            return
        with self._leaving:
            if self._over.is_set():
                return
            self.finish(SECONDS_TO_FINISH)
            if self._tells:
                warn_from_any_process(f"{SCRIPT}: error: {cause.text}")
            if self.rank == 0 and self._store is not None:
                self._wait_until_heard(SECONDS_TO_BE_HEARD, cause.lost)
            for child in multiprocessing.active_children():
                child.kill()
            sys.stdout.flush()
            os._exit(cause.status)


def is_broken_connection(error: BaseException) -> bool:
    """Whether error is what a process meets when another has gone: in gloo, in NCCL, or in the store of the first."""
    import torch

    of_the_store = isinstance(error, torch.distributed.DistError)
    return of_the_store or (isinstance(error, RuntimeError) and bool(_BROKEN_CONNECTION.search(str(error))))


def _beat(rank: int) -> str:
    return f"beat of {rank}"


def _leaves(rank: int) -> str:
    return f"{rank} leaves"
