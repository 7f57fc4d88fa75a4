"""The one error that a user can cause: bad input, told in a sentence, with status 2."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from model.progress import warn, warn_from_any_process


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

    Rank 0 tells it, but for a RowError: the process that met the row tells that.
    """
    try:
        yield
    except InputError as problem:
        tell = warn_from_any_process if isinstance(problem, RowError) else warn
        tell(f"{program}: error: {problem}")
        sys.exit(2)
