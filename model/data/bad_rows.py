"""Rows that can't be used: how they are listed before training, and what --bad_rows does about those found later."""

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.distributed import is_first_process
from model.errors import RowError
from model.progress import warn_from_any_process

MOST_PROBLEM_LINES = 20  # what fits on a screen
MOST_LINES_OF_A_CAUSE = 3

# What a sentence says of a row, without the name of its picture.
_OF_A_ROW = re.compile(r"(?P<file>.+?) (?P<kind>row|line) (?P<number>\d+)(?P<what>\D.*)", re.DOTALL)
_NAMES = re.compile(
    r"(?<=there is no file ).+?(?=;)"
    r"|(?<=: ).+?(?= (?:isn't a picture|is damaged|is empty|is a folder|can't be|is not an ordinary|has more|has no pixels|is a link"
    r"|is an address|has values|takes more))"
)


def first_lines(problems: list[str]) -> list[str]:
    """The first MOST_PROBLEM_LINES problems, and one line that counts the rest and names a file that has them all.

    Many rows of a file with one cause are one line. The file with all of them is written here, by the first process. If
    each problem has its line, it is not.
    """
    lines = by_cause(problems)
    more = len(lines) - MOST_PROBLEM_LINES
    if len(lines) == len(problems) and more <= 0:
        return problems
    rest = f"… and {more} more" if more > 0 else f"{len(problems)} in all"
    return [*lines[:MOST_PROBLEM_LINES], f"{rest}; {all_listed(problems)}."]


def all_listed(problems: Sequence[str]) -> str:
    """Write all problems into a file, and say where; the first process does, for the others print nothing."""
    file = cache_folder() / "bad-rows.txt"
    if is_first_process():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            return f"they can't be listed in {file}: {error.strerror}"
    return f"all are in {file}"


def by_cause(problems: Sequence[str]) -> list[str]:
    """problems, in which more than MOST_LINES_OF_A_CAUSE rows of a file with one cause are one sentence with their count.

    rows.json row 3 and 6417 more rows: there is no file img/3.png; …
    """
    causes: dict[object, list[str]] = {}
    for problem in problems:
        match = _OF_A_ROW.fullmatch(problem)
        cause = (match["file"], match["kind"], _NAMES.sub("", match["what"])) if match else problem
        causes.setdefault(cause, []).append(problem)
    lines = []
    for same in causes.values():
        if len(same) <= MOST_LINES_OF_A_CAUSE:
            lines += same
        elif match := _OF_A_ROW.fullmatch(same[0]):
            place = f"{match['file']} {match['kind']} {match['number']}"
            lines.append(f"{place} and {len(same) - 1} more {match['kind']}s{match['what']}")
        else:
            lines.append(same[0])
    return lines


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
        raise RowError("\n".join(dict.fromkeys(problems)))  # a row may be drawn twice
    for problem in problems:
        _tell_once(problem)


@functools.cache
def _tell_once(problem: str) -> None:
    warn_from_any_process(f"Left out: {problem}")
