"""Which rows of the data files are trained on, which are held out for evaluation, and which are left out as bad.

Standard library and Pillow only.
"""

import filecmp
import functools
import hashlib
import marshal
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from model.data.bad_rows import first_lines
from model.data.image_check import CheckedImages, ImageCheck, check_rows
from model.data.images import checked_file
from model.data.rows import Row, Rows, scan_rows
from model.distributed import is_first_process
from model.errors import InputError, raise_problems
from model.progress import count_of, with_progress

SECONDS_FOR_PICTURES = 2.0  # where rows are bad already
END_BYTES = 4096  # of a picture: different ones of one size often begin alike, and seldom end so


@dataclass
class Selection:
    """The rows of every data file, and which of them are left out or held out; by file, counted from 0."""

    rows: dict[str, Rows]
    left_out: dict[str, list[int]] = field(default_factory=dict)  # their images are bad, and --bad_rows is skip
    held_out: dict[str, list[int]] = field(default_factory=dict)  # by --holdout; some may be left out as well
    problems: list[str] = field(default_factory=list)  # a sentence for each bad row, with --bad_rows skip
    also_trained_on: set[str] = field(default_factory=set)  # `Row.where` of rows for evaluation that training has, too

    def chosen(self, path: str, training: bool) -> list[int] | None:
        """Rows of a file to train on, None if all are; or, if not training, the rows held out of it."""
        bad, held = set(self.left_out.get(path, ())), set(self.held_out.get(path, ()))
        if not training:
            return [index for index in self.held_out.get(path, ()) if index not in bad]
        if not bad and not held:
            return None
        return [index for index in range(len(self.rows[path])) if index not in bad and index not in held]

    def row_count(self, path: str) -> int:
        """How many rows of a file are trained on."""
        chosen = self.chosen(path, training=True)
        return len(self.rows[path]) if chosen is None else len(chosen)

    def trained_rows(self, path: str) -> Iterator[Row]:
        """The rows of a file that are trained on, read one by one."""
        rows, chosen = self.rows[path], self.chosen(path, training=True)
        return iter(rows) if chosen is None else map(rows.__getitem__, chosen)

    def sample_count(self, path: str, training: bool = True) -> int:
        """How many samples the rows of `chosen` make: one for every turn."""
        turns = self.rows[path].turns
        chosen = self.chosen(path, training)
        return sum(turns) if chosen is None else sum(turns[index] for index in chosen)


def read_selection(files: Sequence[str], bad_rows: str, check_seconds: float) -> tuple[Selection, list[str]]:
    """The rows of files, and notes for the person at the prompt: `scan_files` and `leave_out_bad_images`."""
    selection, problems = scan_files(files, bad_rows)
    return selection, leave_out_bad_images(selection, problems, bad_rows, check_seconds)


def scan_files(files: Sequence[str], bad_rows: str, image_folder: str | None = None) -> tuple[Selection, list[str]]:
    """The good rows of files, and a sentence for each bad one.

    Args:
        bad_rows: "error" or "skip"; the latter leaves bad rows out.
        image_folder: where relative images are (`model.data.images.image_places`).

    Raises:
        InputError: a file can't be used; or bad_rows is "error", and there are some (the first 20 are named).
    """
    selection, problems = Selection({}), []
    unusable: list[str] = []
    for file in dict.fromkeys(files):
        try:
            selection.rows[file], bad = scan_rows(file, image_folder)
            problems += bad
        except InputError as problem:
            unusable.append(str(problem))
    raise_problems(dict.fromkeys(unusable))  # one that is about all files is told once
    if bad_rows == "error" and problems:  # what is wrong with pictures is told with it, and not at the next try
        problems += [
            problem for _, check in _checked(selection, SECONDS_FOR_PICTURES) for problem in check.problems.values()
        ]
        raise_problems(first_lines(problems))
    return selection, problems


def _checked(selection: Selection, seconds: float) -> Iterator[tuple[str, ImageCheck]]:
    """Each file, and what was found in its pictures, in so many seconds in all. Only the first process opens images."""
    if not is_first_process():
        return
    checked_before, end = CheckedImages(), time.monotonic() + seconds
    for file, rows in selection.rows.items():
        yield file, check_rows(rows, checked_before, end - time.monotonic())


def leave_out_bad_images(selection: Selection, problems: list[str], bad_rows: str, check_seconds: float) -> list[str]:
    """Put rows with bad images into selection.left_out. Returns notes for the person at the prompt.

    Only the first process opens images.

    Args:
        problems: sentences of `scan_files` about rows; those about images are added.
        check_seconds: how long images may be opened that were not checked by an earlier run, in all files together.

    Raises:
        InputError: bad_rows is "error" and there are bad rows (the first 20 are named), or every row of a file is bad.
    """
    notes, unopened = [], 0
    for file, check in _checked(selection, check_seconds):
        problems += check.problems.values()
        selection.left_out[file] = list(check.problems)
        unopened += check.unopened
    if bad_rows == "error":
        raise_problems(first_lines(problems))
    elif problems:
        selection.problems = problems
        notes += [f"Left out, {count_of(len(problems), 'bad row')} (--bad_rows skip):", *first_lines(problems)]
    if unopened:
        notes.append(
            f"{unopened} pictures have not been opened yet ({check_seconds:g} seconds, --check_seconds): one that turns out"
            f" bad while training {'stops the run' if bad_rows == 'error' else 'is left out then'} (--bad_rows)."
            " scripts/check_data.py opens them all, and remembers."
        )
    for file, rows in selection.rows.items():
        if len(selection.left_out.get(file, ())) == len(rows):
            raise InputError(f"{file}: every row is bad; the first: {problems[0]}")
    return notes


def hold_out(selection: Selection, files: Sequence[str], share: float, seed: int) -> None:
    """Take rows out of files for evaluation, and put them into selection.held_out.

    May take more or fewer rows than asked for: rows that share an image stay together, so that no image is both trained
    on and evaluated on, under whatever name; so do rows of text that are the same. Which rows are taken depends on the
    seed, the files and their images, not on the process or --bad_rows.

    Args:
        share: a number of rows (1 or more), or a share of all (below 1).

    Raises:
        InputError: nothing would be left to train on, or all rows that are taken are left out as bad.
    """
    groups = _rows_that_stay_together(selection, files)
    total = sum(map(len, groups))
    number = int(share) if share >= 1 else max(1, round(share * total))
    if number >= total:
        raise InputError(
            f"--holdout {share:g}: {total} rows in --train-data, so none would be left to learn; less is needed."
        )
    if len(groups) == 1:
        has_picture = selection.rows[groups[0][0][0]][0].img is not None
        alike, others = (
            ("have the same picture", "rows with other pictures") if has_picture else ("are the same", "other rows")
        )
        raise InputError(
            f"--holdout {share:g}: all {total} rows in --train-data {alike}, so none would be left to learn; {others} are"
            " needed, or --valid-data."
        )
    random.Random(f"holdout {seed}").shuffle(groups)
    held: list[tuple[str, int]] = []
    left: list[list[tuple[str, int]]] = []
    for group in groups:
        if len(group) <= number - len(held):
            held += group
        else:
            left.append(group)
    smallest, missing = min(left, key=len), number - len(held)
    too_many = len(smallest) - missing
    if not held or (too_many < missing and len(left) > 1):  # with one group more, the number is closer
        held += smallest
    for file, index in sorted(held):
        selection.held_out.setdefault(file, []).append(index)
    if not any(selection.chosen(file, training=False) for file in selection.held_out):
        raise InputError(
            f"--holdout {share:g} takes {count_of(len(held), 'row')}, all of them bad (--bad_rows skip), so nothing would be "
            "left to evaluate on; more rows, or others by another --seed, are needed."
        )


def _rows_that_stay_together(selection: Selection, files: Sequence[str]) -> list[list[tuple[str, int]]]:
    """File and index of every row, in groups that share an image, or that are the same text without one."""
    place = _real_paths()
    by_path: dict[Hashable, list[tuple[str, int]]] = {}
    for file in dict.fromkeys(files):
        for index, row in enumerate(selection.rows[file]):
            path_or_text = row_digest(row, None) if row.img is None else place(row.img)
            by_path.setdefault(path_or_text, []).append((file, index))
    contents = _contents([key for key in by_path if isinstance(key, str)])
    groups: dict[Hashable, list[tuple[str, int]]] = {}
    for key, group in by_path.items():
        groups.setdefault(contents.get(key, key), []).extend(group)
    return list(groups.values())


def row_digest(row: Row, picture: str | None) -> bytes:
    """What is the same for rows that say the same of the same picture, and for no others."""
    return digest_of(picture, row.prompt, row.label, row.history)


def digest_of(*values: Any) -> bytes:
    """What is the same for the same values, and for no others."""
    return hashlib.blake2b(marshal.dumps(values, 2), digest_size=16).digest()  # 2: equal values, equal bytes


def _real_paths() -> Callable[[str], str]:
    """What gives the path of an image without links."""
    folder = os.getcwd()

    @functools.cache
    def real(folder_of_img: str) -> tuple[str, set[str]]:
        """Where a folder is, and its links: asking for each picture takes longer than all that is done here."""
        place = os.path.realpath(folder_of_img)
        with suppress(OSError), os.scandir(place) as entries:
            return place, {entry.name for entry in entries if entry.is_symlink()}
        return place, set()

    def place(img: str) -> str:
        folder_of_img, name = os.path.split(os.path.join(folder, img))
        real_folder, links = real(folder_of_img)
        path = os.path.join(real_folder, name)
        return os.path.realpath(path) if name in links else path

    return place


def _contents(paths: Sequence[str]) -> dict[Hashable, Hashable]:
    """What is the same for files of the same bytes and for no others, by path. No more is read than it takes to tell."""
    known: dict[Hashable, tuple[Hashable, ...]] = dict.fromkeys(paths, ())
    for look in (_size, _end, _whole):
        files = Counter(known.values())
        alike = [path for path in paths if files[known[path]] > 1]
        for path in with_progress(alike, len(alike), "Checking pictures"):
            try:
                known[path] += (look(path),)
            except (InputError, OSError):
                known[path] += (path,)
    return {**known}


def _size(path: str) -> int:
    return checked_file(path).st_size


def _end(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - END_BYTES))
        return hashlib.sha256(file.read(END_BYTES)).digest()


def _whole(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def find_trained_rows(selection: Selection, train: Sequence[str], valid: Sequence[str]) -> list[str]:
    """Put rows of valid that are trained on, too, into selection.also_trained_on. Returns a warning for each such file."""
    if not valid:
        return []
    place = _real_paths()

    def digest(row: Row) -> bytes:
        return row_digest(row, None if row.img is None else place(row.img))

    trained: set[bytes] = set()
    for file in train:
        trained.update(map(digest, selection.trained_rows(file)))
    warnings = []
    for file in dict.fromkeys(valid):
        whole_file = same_file_warnings(train, [file])
        found = [row.where for row in selection.rows[file] if whole_file or digest(row) in trained]
        selection.also_trained_on.update(found)
        if found:
            warnings += whole_file or [
                f"WARNING: {len(found)} of {selection.row_count(file)} rows of {file} are also trained on: of these, the"
                " evaluation will only say how well they are remembered. --holdout 0.1 takes other rows out of --train-data."
            ]
    return warnings


def same_file_warnings(train: Sequence[str], valid: Sequence[str]) -> list[str]:
    """A sentence for each file of valid that is also one of train, under whatever name."""
    warnings = []
    for one in valid:
        same = [other for other in train if _is_same(one, other)]
        if same:
            other_name = "" if one in same else f" (for training as {same[0]})"
            warnings.append(
                f"WARNING: {one} is given for training and for evaluation{other_name}: the evaluation will only say how well"
                " its rows are remembered. --holdout 0.1 takes other rows out of --train-data."
            )
    return warnings


def _is_same(one: str, other: str) -> bool:
    return os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False)
