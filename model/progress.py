"""What a run says while it works: one function prints, on one process, and knows how to write a time.

Text that comes from rows, configurations and file names may hold escape codes, which a terminal obeys: it is printed
through `printable`.
"""

import errno
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from threading import RLock
from typing import TextIO, TypeVar

from model.chinese import in_ui_language
from model.distributed import is_first_process

QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LOG_LINES = 30.0  # where stderr is a file
GOES_ON = (
    "Nobody reads the output any more: the run goes on without. Ctrl-C ends it after the step in hand, and saves it."
)
DISK_IS_FULL = "The disk that the output goes to is full: the run goes on, and its output is lost from here on."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ERASE_TO_END = "\x1b[K"  # of a terminal's line
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but \t and \n

Item = TypeVar("Item")

_printing = RLock()  # a thread that saves may print too
_renewed: TextIO | None = None  # where a line stands that the next one replaces
_outlives_readers = False  # whether the process goes on where nobody reads what it prints


class OutputIsFull(Exception):
    """What standard output goes to takes no more. Its text says so."""


def say(text: str) -> None:
    """Print text for the person at the prompt, from rank 0 only, at once."""
    if is_first_process():
        _print(in_ui_language(text, sys.stdout), sys.stdout)


def warn(text: str) -> None:
    """Print text on standard error, from rank 0 only, at once."""
    if is_first_process():
        _print(in_ui_language(text, sys.stderr), sys.stderr)


def warn_from_any_process(text: str) -> None:
    """Print on standard error what this process alone knows."""
    _print(in_ui_language(text, sys.stderr), sys.stderr)


def show(text: str, end: str = "\n") -> None:
    """Print text of others, such as a row's or a model's, as it is: it is no message that may have a translation."""
    if is_first_process():
        _print(text, sys.stdout, end)


def is_on_screen(stream: TextIO) -> bool:
    """Whether a line on stream can be replaced by the next one."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def renew(text: str) -> None:
    """Show text in place of the line that was shown so before, on a terminal, from rank 0 only.

    Whatever else is printed takes its place.
    """
    global _renewed
    if is_first_process():
        shown = _fitting(printable(in_ui_language(text, sys.stdout)), shutil.get_terminal_size().columns - 1)
        with _printing:
            _written(f"\r{shown}{ERASE_TO_END}", sys.stdout)
            _renewed = sys.stdout


def in_column(text: str, columns: int) -> str:
    """text in the language of the UI, with blanks behind it to fill so many columns of a table."""
    text = in_ui_language(text, sys.stdout)
    return text + " " * (columns - sum(map(_columns_of, text)))


def _columns_of(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1  # a Chinese one takes two


def _fitting(text: str, columns: int) -> str:
    """The start of text that fits into so many columns."""
    taken = 0
    for length, character in enumerate(text):
        taken += _columns_of(character)
        if taken > columns:
            return text[:length]
    return text


def printable(text: str) -> str:
    """Text without what a terminal would obey: control characters, but for line ends and tabs, are written as \\x1b."""
    return CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def is_unicode(text: str) -> bool:
    """Whether text has no half characters. Names of files may: Linux allows any bytes, those of a Chinese Windows, say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _print(text: str, stream: TextIO, end: str = "\n") -> None:
    global _renewed
    with _printing:
        if _renewed is not None:
            _written(f"\r{ERASE_TO_END}", _renewed)
            _renewed = None
        _written(f"{printable(text)}{end}", stream)


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Go on inside the block where the reader of what is printed has gone, as in `… | head -1`; standard error says so."""
    global _outlives_readers
    before, _outlives_readers = _outlives_readers, True
    try:
        yield
    finally:
        _outlives_readers = before


def _written(text: str, stream: TextIO) -> None:
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        # The terminal was closed: a run whose SIGHUP is ignored goes on, any other is saved.
        terminal_is_gone, is_full = error.errno == errno.EIO, error.errno in FULL
        if not terminal_is_gone and not is_full and not (_outlives_readers and error.errno == errno.EPIPE):
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        if terminal_is_gone or stream is not sys.stdout:
            return
        if is_full and not _outlives_readers:
            raise OutputIsFull(
                f"standard output: {error.strerror}; a place with room for what is printed is needed."
            ) from None
        warn(DISK_IS_FULL if is_full else GOES_ON)


def flush() -> None:
    """Hand on what has been printed in other ways than by this module.

    Raises:
        OutputIsFull: as for what this module prints.
    """
    _written("", sys.stdout)


@contextmanager
def any_text_printable() -> Iterator[None]:
    """Let a terminal without UTF-8 print, inside the block, what it can't show as \\u56fe in place of failing."""
    with ExitStack() as undo:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a notebook's has none, and takes all text
                undo.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        yield


def duration(seconds: float) -> str:
    """A time as a person says it: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count_of(number: int, what: str, many: str | None = None) -> str:
    """A number of things as a person says it: `1 row`, `20 rows`.

    Args:
        many: what several are called, if not what with an s.
    """
    return f"{number} {what}" if number == 1 else f"{number} {many or what + 's'}"


def with_progress(
    items: Iterable[Item], total: int, what: str, stops_after: float = math.inf, sizes: Sequence[float] | None = None
) -> Iterator[Item]:
    """Yield items; after two quiet seconds, keep one line on stderr, from rank 0 only, that says how many and the time left.

    Args:
        stops_after: seconds after which items end, however many there are.
        sizes: of the items, in anything that grows with the time that they take; None if all take as long.
    """
    if not is_first_process():
        yield from items
        return
    on_screen = sys.stderr.isatty()
    start = time.monotonic()
    next_line = start + QUIET_SECONDS
    shown = False
    so_far = list(accumulate(sizes or ()))
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now >= next_line:
            share = max(so_far[done - 1], 1) / max(so_far[-1], 1) if so_far else done / total
            left = min((now - start) * (1 / share - 1), start + stops_after - now)
            line = printable(in_ui_language(f"{what}: {done} of {total}, {duration(left)} left", sys.stderr))
            _written(f"\r{line:<60}" if on_screen else f"{line}\n", sys.stderr)
            next_line = now + (0.2 if on_screen else SECONDS_BETWEEN_LOG_LINES)
            shown = True
    if shown and on_screen:
        _written("\n", sys.stderr)
