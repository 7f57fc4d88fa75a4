"""What a run says while it works: one function prints, on one process, and knows how to write a time."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from model.chinese import in_ui_language
from model.distributed import is_first_process

QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LOG_LINES = 30.0  # where stderr is a file

Item = TypeVar("Item")


def say(text: str) -> None:
    """Print text for the person at the prompt, from rank 0 only, at once."""
    if is_first_process():
        text = in_ui_language(text, sys.stdout)
        print(f"{text}\n", end="", flush=True)  # in one piece: a thread that saves may print too


def warn(text: str) -> None:
    """Print text on standard error, from rank 0 only, at once."""
    if is_first_process():
        print(in_ui_language(text, sys.stderr), file=sys.stderr, flush=True)


def warn_from_any_process(text: str) -> None:
    """Print on standard error what this process alone knows."""
    print(in_ui_language(text, sys.stderr), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as a person says it: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def with_progress(items: Iterable[Item], total: int, what: str, stops_after: float = math.inf) -> Iterator[Item]:
    """Yield items; after two quiet seconds, keep one line on stderr that says how many and the time left.

    Args:
        stops_after: seconds after which items end, however many there are.
    """
    on_screen = sys.stderr.isatty()
    start = time.monotonic()
    next_line = start + QUIET_SECONDS
    shown = False
    for done, item in enumerate(items, 1):
        now = time.monotonic()
        if now >= next_line:
            left = min((now - start) / done * (total - done), start + stops_after - now)
            line = in_ui_language(f"{what}: {done} of {total}, {duration(left)} left", sys.stderr)
            print(f"\r{line:<60}" if on_screen else line, end="" if on_screen else "\n", file=sys.stderr, flush=True)
            next_line = now + (0.2 if on_screen else SECONDS_BETWEEN_LOG_LINES)
            shown = True
        yield item
    if shown and on_screen:
        print(file=sys.stderr)
