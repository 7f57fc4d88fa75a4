"""The one error that a user can cause: bad input, told in a sentence."""

from collections.abc import Iterable


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
