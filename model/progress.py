"""What a run says while it works: one function prints, on one process, and knows how to write a time."""

import os
import sys


def is_first_process() -> bool:
    """Whether this process is rank 0 of the run (every launcher sets RANK; without one there is one process)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print text for the person at the prompt, from rank 0 only, at once."""
    if is_first_process():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print text on standard error, from rank 0 only, at once."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as a person says it: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
