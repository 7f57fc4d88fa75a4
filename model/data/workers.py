"""Work in forked processes, which inherit what it is done on. Standard library only.

    result = run_in_subprocess(task, meanwhile)     one task there, something else here
    wait = begin_in_processes(task, parts, what)    task(part) for every part, on all CPUs but this one
    results = wait()

A task may be any function, over any data: nothing is copied but the results, which must be picklable. Where processes
can't be forked, all of it is done here.
"""

import atexit
import ctypes
import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Generic, TypeVar

from model.errors import ENDING_SIGNALS, InputError, unusable_paths_told

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
PATIENCE = 0.3  # seconds: a task that is done by then is waited for

Part = TypeVar("Part")
Result = TypeVar("Result")


def run_in_subprocess(task: Callable[[], Result], meanwhile: Callable[[], object]) -> Result:
    """What task returns. It runs in a forked process; unless it is done in PATIENCE seconds, meanwhile() runs here.

    Raises:
        InputError: task raised it, or its process died.
    """
    if not _can_fork():
        return task()
    with _ForkedTask(task, "The process that checks the data") as forked:
        if not forked.is_done_within(PATIENCE):
            meanwhile()
        return forked.result()


def begin_in_processes(task: Callable[[Part], Result], parts: Sequence[Part], what: str) -> Callable[[], list[Result]]:
    """Begin task(part) for every part in forked processes; returns a function that waits for the results, in order.

    Args:
        what: names one of the processes in the sentence that says that it died, as "The process that counts tokens".

    Raises (the function that is returned):
        InputError: task raised it, or a process died.
    """
    if not _can_fork():
        return lambda: [task(part) for part in parts]
    processes = min(len(parts), max(1, (os.cpu_count() or 1) - 1))

    def share(first: int) -> Callable[[], list[Result]]:
        return lambda: [task(part) for part in parts[first::processes]]

    # A daemon, so that it ends with this process even if nobody waits for its results.
    forked = [_ForkedTask(share(first), what, daemon=True) for first in range(processes)]

    def results() -> list[Result]:
        with ExitStack() as stack:
            shares = [stack.enter_context(one) for one in forked]
            found = [one.result() for one in shares]
        return [found[index % processes][index // processes] for index in range(len(parts))]

    return results


def leave_signals_to_the_parent() -> None:
    """Let the signals of a terminal or a launcher, which reach a whole group of processes, end this one with its parent.

    A second SIGTERM ends it: the parent's, where the first was the group's. If the parent is killed, this process is too.
    """
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    end_with_parent()
    hush_threads()


@functools.cache
def end_workers_at_exit() -> None:
    """Have the processes that left signals to this one end with it, also after an error whose traceback keeps them in use.

    At its exit, Python sends each one SIGTERM, the first, and waits for it. One more comes before that.
    """

    def send_the_first() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises an error that its workers are killed
        for child in multiprocessing.active_children():
            child.terminate()

    atexit.register(send_the_first)  # what is registered last is called first


def hush_threads() -> None:
    """Let threads of this process print no traceback, but for the main one.

    Python's thread that hands tensors over prints one where the main process gives an iterator up in the middle.
    """
    hook = sys.excepthook

    def of_main_thread(*error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            hook(*error)

    sys.excepthook = of_main_thread


def end_with_parent() -> None:
    """Have the system kill this process when its parent has ended, however that ends. Linux only; else nothing."""
    parent = multiprocessing.parent_process()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent.pid:  # it has ended already
            os._exit(1)


def _can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods()


class _ForkedTask(Generic[Result]):
    """A task that a forked process works on from now on. Leaving its `with` block ends the process."""

    def __init__(self, task: Callable[[], Result], what: str, daemon: bool = False) -> None:
        context = multiprocessing.get_context("fork")
        self._what = what
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=self._work, args=(task, sender), daemon=daemon)
        self._process.start()
        sender.close()

    def is_done_within(self, seconds: float) -> bool:
        # Not the receiver alone is waited for: processes that the task has started keep its other end open.
        return bool(wait([self._receiver, self._process.sentinel], seconds))

    def result(self) -> Result:
        """Wait for it.

        Raises:
            InputError: the task raised it, or the process died.
        """
        if self._receiver in wait([self._receiver, self._process.sentinel]):
            with suppress(EOFError):
                result, problem = self._receiver.recv()
                if problem is not None:
                    raise problem
                return result
        self._process.join()
        raise InputError(f"{self._what} died (status {self._process.exitcode}; no memory left?).")

    def _work(self, task: Callable[[], Result], sender: Any) -> None:
        """Send (result, None) or (None, problem). This runs in the forked process."""
        self._receiver.close()  # else sending to a parent that has died would not fail
        leave_signals_to_the_parent()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        answer: tuple[Result | None, InputError | None]
        try:
            with unusable_paths_told():
                answer = task(), None
        except InputError as problem:
            answer = None, problem
        try:
            sender.send(answer)
        except BrokenPipeError:
            sys.exit(1)

    def __enter__(self) -> "_ForkedTask[Result]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._receiver.close()
        self._process.terminate()
        self._process.join()
