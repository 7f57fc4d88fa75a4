"""Rows that can't be used: how they are listed before training, and what --bad_rows does about those found later."""

import functools
import os
from pathlib import Path
from typing import Any

from model.distributed import is_first_process
from model.errors import RowError
from model.progress import warn_from_any_process

MOST_PROBLEM_LINES = 20  # what fits on a screen


def first_lines(problems: list[str]) -> list[str]:
    """The first MOST_PROBLEM_LINES problems, and one line that counts the rest and names a file that has them all.

    The file is written here, by the first process. If there is no rest, it is not.
    """
    more = len(problems) - MOST_PROBLEM_LINES
    if more <= 0:
        return problems
    file = cache_folder() / "bad-rows.txt"
    where_all_are = f"all are in {file}"
    if is_first_process():  # the others print nothing
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            where_all_are = f"they can't be listed in {file}: {error.strerror}"
    return [*problems[:MOST_PROBLEM_LINES], f"… and {more} more; {where_all_are}."]


def cache_folder() -> Path:
    """Where things are kept from run to run: in the user's cache folder. Nothing is written beside the data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "visualglm")


def handle_bad_rows(batch: dict[str, Any], bad_rows: str) -> None:
    """Do what --bad_rows says about the rows of a batch whose images can't be opened.

    "skip" names each such row once. Nothing is learned from it, and no other row takes its place: all processes must make
    the same number of steps. "error" stops the run.

    Raises:
        RowError: bad_rows is "error" and there are such rows.
    """
    problems = batch.get("problems", [])
    if problems and bad_rows != "skip":
        raise RowError("\n".join(problems))
    for problem in problems:
        _tell_once(problem)


@functools.cache
def _tell_once(problem: str) -> None:
    warn_from_any_process(f"Left out: {problem}")
