"""One task in a process of its own, while this process gets on with another. Standard library only."""

import multiprocessing
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from model.errors import InputError

PATIENCE = 0.3  # seconds: what is done by then is waited for

Result = TypeVar("Result")


def done_beside(task: Callable[[], Result], meanwhile: Callable[[], object]) -> Result:
    """What task gives, which is done in a forked process; if it isn't done in a moment, meanwhile is done here.

    Only the result is copied, so it must be picklable; task may be anything.

    Raises:
        InputError: task raised it, or its process died.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return task()
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)
    process = forked.Process(target=_do, args=(task, receiver, sender))
    process.start()
    sender.close()
    try:
        if not wait([receiver, process.sentinel], PATIENCE):
            meanwhile()
        result, problem = _answer(receiver, process)
    finally:
        receiver.close()
        process.terminate()
        process.join()
    if problem is not None:
        raise problem
    return result


def _answer(receiver: Connection, process: BaseProcess) -> tuple[Any, InputError | None]:
    # Not the receiver alone is waited for: processes that the task has started keep it open.
    if receiver in wait([receiver, process.sentinel]):
        with suppress(EOFError):  # told below
            return receiver.recv()
    process.join()
    raise InputError(f"The process that checks the data died (status {process.exitcode}; no memory left?).")


def _do(task: Callable[[], object], receiver: Connection, sender: Connection) -> None:
    receiver.close()  # or else nobody would tell this process that its parent has died
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    answer: tuple[object, InputError | None]
    try:
        answer = task(), None
    except InputError as problem:
        answer = None, problem
    try:
        sender.send(answer)
    except BrokenPipeError:
        sys.exit(1)
