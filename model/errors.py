"""How a command ends: with a sentence on bad input, quietly at a signal or where nobody reads its output any more.

    def main(argv=None):
        with command("evaluate.py"):
            …

    status 0     all is well
           2     bad input: a sentence on standard error says where, what was found and what is needed
           3     another process of the run has gone, or gave no sign of life (`model.training.watchdog`)
           129   SIGHUP      130  SIGINT (Ctrl-C)      138  SIGUSR1      143  SIGTERM
           141   the reader of standard output has gone, as in `… | head -1`; training goes on without one

A signal ends a command within a second: what it began is undone, and the processes that it started end with it. Training
does more, see `model.training.signals`. Only the standard library is imported.
"""

import atexit
import errno
import math
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from model.distributed import is_first_process, world_size
from model.progress import OutputIsFull, any_text_printable, flush, warn_from_any_process

# The signals that ask a program to end; Windows lacks some.
ENDING_SIGNALS = [
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if name in signal.Signals.__members__
]
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)  # a path, whatever the code does with it
STATUS_OF_BAD_INPUT = 2
STATUS_OF_A_LOST_PROCESS = 3
STATUS_OF_A_SIGNAL = 128  # plus its number, as a shell tells it
STATUS_WITHOUT_READER = 141  # as a shell tells it of a program that SIGPIPE ended
TOO_MANY_FILES = (
    "too many files are open; a higher limit is needed, as by ulimit -n 4096. In training, --num-workers 0 opens fewer."
)
SECONDS_TO_CLEAN_UP = 0.7  # then a command ends as it is
SECONDS_FOR_A_HANDLER = 3.0  # of a signal that came to a process of several
SECONDS_FOR_THE_FIRST_TO_TELL = 5.0  # what is wrong with the input, and for the launcher to end the others

_is_a_program = False  # whether this process is a command's, and not a notebook's or a test's

Handler = Callable[[int, FrameType | None], Any]


class InputError(ValueError):
    """A flag, file, row or picture that can't be used. Its text is shown as it is, without a traceback.

    The text says where, what was found and what is needed.
    """


class RowError(InputError):
    """A row that turned out bad while training. Only the process that read it knows, so that process tells it."""


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one error that lists every problem, a line each; do nothing when there is none.

    Raises:
        InputError: problems is not empty.
    """
    lines = list(problems)
    if lines:
        raise InputError("\n".join(lines))


@contextmanager
def exit_on_input_error(program: str) -> Iterator[None]:
    """End program with status 2 and a sentence on standard error where the block raises an InputError.

    The first process of each machine tells it, for files may be missing on one. A RowError is told by the process that met
    the row. The others stay until they are ended: torchrun ends all as soon as one has ended, and the first one may be
    slower. One that is left alone was the only one that met it, and tells it then.
    """
    try:
        with unusable_paths_told():
            yield
    except (InputError, OutputIsFull) as problem:
        tells = isinstance(problem, RowError) or is_first_process() or os.environ.get("LOCAL_RANK") == "0"
        if not tells and _is_a_program and world_size() > 1:
            time.sleep(SECONDS_FOR_THE_FIRST_TO_TELL)
            tells = True
        if tells:
            warn_from_any_process(f"{program}: error: {problem}")
        sys.exit(STATUS_OF_BAD_INPUT)
    except (OSError, RuntimeError) as problem:  # torch's is of the second kind
        if os.strerror(errno.EMFILE) not in str(problem):
            raise
        warn_from_any_process(f"{program}: error: {TOO_MANY_FILES}")
        sys.exit(STATUS_OF_BAD_INPUT)


@contextmanager
def unusable_paths_told() -> Iterator[None]:
    """Make bad input of a path that the system refuses, wherever it is met: Path.is_file raises it too.

    Raises:
        InputError: the block left an error of UNUSABLE on a path. Any other error is a bug of ours, and stays.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNUSABLE or not isinstance(error.filename, str | os.PathLike):
            raise
        raise InputError(f"{error.filename}: {error.strerror}; a path that can be used is needed.") from error


@contextmanager
def command(program: str) -> Iterator[None]:
    """What every command runs in: bad input, a signal, a closed pipe and a terminal without UTF-8 give no traceback.

    Raises:
        SystemExit: with a status of the list above.
    """
    try:
        with any_text_printable(), _exit_without_reader(), exit_on_input_error(program), leaving_at_signals():
            try:
                yield
            finally:
                flush()  # here a pipe that is closed can still be told from a bug
    except SystemExit as leaving:
        _end_before_torch_does(leaving.code)
        raise
    _end_before_torch_does(0)


def _end_before_torch_does(status: object) -> None:
    """End a program that has a process group here: its threads now and then abort the process while Python ends (gloo)."""
    torch = sys.modules.get("torch")
    if not _is_a_program or torch is None or not torch.distributed.is_initialized() or not isinstance(status, int):
        return
    # A worker of a step that failed is still there. It takes no SIGTERM, so that Python would wait for it without end.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler makes an error of a killed worker
    _kill_children()
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def interrupt_ends_quietly() -> None:
    """Let Ctrl-C end this process without a traceback where no `command` takes it: while Python imports, and at its end.

    For programs, which call it before they import more: `if __name__ == "__main__": …`. Streams that the caller has closed,
    as in `… >&-`, lead nowhere from then on: a file of ours must not take their place.
    """
    global _is_a_program
    _is_a_program = True
    _open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_closed_streams() -> None:
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)  # most often it has this number already
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115  (until the process ends)


# --- signals ----------------------------------------------------------------------------------------------------------


@contextmanager
def leaving_at_signals() -> Iterator[None]:
    """Leave the block at the first signal that asks to end; at a second one, end the process as it is.

    Raises:
        SystemExit: a signal came. The status is 128 + its number. A program ends here instead.
    """
    leaving = Leaving()
    if _is_a_program and world_size() > 1:
        _listener.start()
    try:
        with handling(leaving.begin):
            yield
    except BaseException:
        # A library may have made another exception of the one that `begin` raised.
        if not leaving.status:
            raise
    finally:
        if not leaving.status or not _is_a_program:
            leaving.end()
    if leaving.status and _is_a_program:
        end_now(leaving.status - STATUS_OF_A_SIGNAL)  # Python's own way out takes a second with torch
    if leaving.status:
        raise SystemExit(leaving.status)


def ignore_signals_from_now_on() -> None:
    """The command is done but for Python's way out: another signal must not change the status that it ends with.

    In a notebook or a test, whose process goes on, nothing is changed.
    """
    if _is_a_program and threading.current_thread() is threading.main_thread():
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a handler would not do: Python puts the system's back early


@contextmanager
def handling(handler: Handler, may_wait: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Let handler take the signals that ask a program to end, inside the block, but for those that are ignored.

    `nohup` has a program ignore SIGHUP. Only the main thread can handle signals: in another one nothing is changed.

    Args:
        may_wait: whether a signal now has time until handler is called, however long that takes.
    """

    def called(number: int, frame: FrameType | None) -> Any:
        _listener.called_at = time.monotonic()
        return handler(number, frame)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
        before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    _listener.may_wait.append(may_wait)
    try:
        for number in before:
            signal.signal(number, called)
        yield
    finally:
        _listener.may_wait.remove(may_wait)
        for number, old in before.items():
            if signal.getsignal(number) == called:
                signal.signal(number, signal.SIG_DFL if old is None else old)


class Leaving:
    """A signal's way out of a command, which holds however the code in between takes it."""

    def __init__(self) -> None:
        self.status = 0  # 128 + the number of the signal that came
        self._undo: list[Callable[[], object]] = []

    def begin(self, number: int, frame: FrameType | None = None) -> NoReturn:
        """End the processes that this one has started, and leave; at once if called again.

        Raises:
            SystemExit: always, the first time. It may be lost where Python calls back from other code; the process then
                ends SECONDS_TO_CLEAN_UP later.
        """
        if self.status:
            end_now(number)
        self.status = STATUS_OF_A_SIGNAL + number
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # it would print a traceback
        self._undo.append(lambda: setattr(sys, "unraisablehook", hook))
        of_threads, threading.excepthook = threading.excepthook, lambda _: None  # some wait for the processes
        self._undo.append(lambda: setattr(threading, "excepthook", of_threads))
        if hasattr(signal, "setitimer"):
            alarm = signal.signal(signal.SIGALRM, lambda *_: end_now(number))
            signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_CLEAN_UP)
            self._undo += [
                lambda: signal.signal(signal.SIGALRM, alarm),
                lambda: signal.setitimer(signal.ITIMER_REAL, 0),
            ]
        for child in multiprocessing.active_children():
            child.terminate()
        raise SystemExit(self.status)

    def end(self) -> None:
        """The block has been left: put back what `begin` changed."""
        while self._undo:
            self._undo.pop()()


class _Listener:
    """Ends a process of several that a signal can't reach.

    Python calls a handler between two of its own steps. A process that waits for another one makes none, as in gloo, where
    that one has ended; a launcher would wait half a minute for it. A thread is told of each signal at once.
    """

    def __init__(self) -> None:
        self.called_at = -math.inf  # when a handler was called last, in seconds
        self.may_wait: list[Callable[[], bool]] = []  # of the handlers, the innermost last
        self._is_started = False

    def start(self) -> None:
        """Listen from now on, until the process ends."""
        if self._is_started or threading.current_thread() is not threading.main_thread():
            return
        self._is_started = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _listen(self, reader: int) -> None:
        while True:
            (number,) = os.read(reader, 1)
            came_at = time.monotonic()
            if number not in ENDING_SIGNALS:
                continue
            time.sleep(SECONDS_FOR_A_HANDLER)
            if self.called_at < came_at - SECONDS_TO_CLEAN_UP and not (self.may_wait and self.may_wait[-1]()):
                end_now(number)


_listener = _Listener()


def end_now(number: int) -> NoReturn:
    """End this process and those that it has started at this point, with the status of a signal."""
    _kill_children()
    with suppress(OSError, RuntimeError):  # nobody reads it, or a signal came while it was written
        sys.stdout.flush()
    os._exit(STATUS_OF_A_SIGNAL + number)


def _kill_children() -> None:
    """Kill the processes that this one has started. Its threads that wait for them have nothing to say of it."""
    threading.excepthook = lambda _: None
    for child in multiprocessing.active_children():
        child.kill()


# --- closed pipes -----------------------------------------------------------------------------------------------------


@contextmanager
def _exit_without_reader() -> Iterator[None]:
    """Leave silently where the block prints into a pipe that nobody reads any more."""
    try:
        yield
    except BrokenPipeError:
        if not _reader_is_gone(sys.stdout) and not _reader_is_gone(sys.stderr):
            raise  # another pipe
        _print_into_nothing()
        sys.exit(STATUS_WITHOUT_READER)


def _reader_is_gone(stream: Any) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))  # POLLERR, which is not asked for, tells that the other end is closed


def _print_into_nothing() -> None:
    """Let what is still in the buffers go nowhere: Python prints a traceback where it can't write it at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _reader_is_gone(stream):
            os.dup2(nothing, stream.fileno())
    os.close(nothing)
