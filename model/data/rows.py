"""Data files are read into rows. Standard library and Pillow only, so that rows are checked before torch is loaded.

    rows, problems = scan_rows("rows.json")     the good rows, and a sentence for each bad one
    rows = read_rows("rows.json")               the same, but a bad row is an error
    rows[0].prompt

A `Row` is the only form that a row has after reading.
"""

import errno
import json
import marshal
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast, overload

from model.data.bad_rows import first_lines
from model.data.file_kinds import compression_of
from model.data.images import image_path, image_places
from model.errors import InputError, raise_problems
from model.progress import is_unicode

LANGUAGES = ("zh", "en")
ROW_NEEDS = 'every row is an object with the texts "prompt" and "label", and "img" unless it has no picture'
QUESTION_NEEDS = 'every row is an object with the text "prompt", and "img" unless it has no picture'

TABLES = {".csv": ",", ".tsv": "\t"}  # what convert_data.py reads, and what stands between cells
WORKBOOKS = (".xlsx", ".xls", ".ods")

_OTHER_NAMES_OF_IMG = ("image", "images", "picture")
_OF_CONVERSATIONS = ("conversations", "messages")  # LLaVA's and ShareGPT's keys
_AFTER_VALUE = re.compile(r"[ \t\n\r]*(?:,[ \t\n\r]*|(?=\]))")  # of a JSON list: up to the next value, or to its end
_BLANK = re.compile(r"[ \t\n\r]*")  # JSON allows it around every value


class Row(NamedTuple):
    """One row of a data file, checked.

    img      path of the picture; None in a row of text only
    where    names the row for a person, counted from 1: `fewshot-data/dataset.json row 3`
    history  the earlier turns as (question, answer), oldest first
    lang     "zh" or "en" if the row says which, else None
    """

    img: str | None
    prompt: str
    label: str
    where: str
    history: tuple[tuple[str, str], ...] = ()
    lang: str | None = None


class Rows(Sequence[Row]):
    """The rows of one data file in few bytes. A Row is made when it is asked for.

    The texts lie in one block of memory, which worker processes share with their parent. 300,000 Row objects would be
    copied into every worker: reading an object writes its reference count.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._texts = bytearray()
        self._ends = array("Q")
        self.numbers = array("L")  # of each row in its file, counted from 1
        self.turns = array("L")  # how many turns each row has, its own question included

    def append(self, row: Row, number: int) -> None:
        """Add a row, which is the file's number-th, counted from 1."""
        img, prompt, label, _, history, lang = row
        self._texts += marshal.dumps((img, prompt, label, history, lang))
        self._ends.append(len(self._texts))
        self.numbers.append(number)
        self.turns.append(1 + len(history))

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Row]:
        return self._from_to(0, len(self))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: "slice[int | None, int | None, int | None]") -> list[Row]: ...
    def __getitem__(self, index: "int | slice[int | None, int | None, int | None]") -> Row | list[Row]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(self._from_to(start, stop)) if step == 1 else [self[one] for one in range(start, stop, step)]
        index = range(len(self))[index]
        return next(self._from_to(index, index + 1))

    def _from_to(self, start: int, stop: int) -> Iterator[Row]:
        path, begin = self.path, self._ends[start - 1] if start else 0
        with memoryview(self._texts) as texts:
            for end, number in zip(self._ends[start:stop], self.numbers[start:stop], strict=True):
                img, prompt, label, history, lang = marshal.loads(texts[begin:end])
                yield Row(img, prompt, label, f"{path} row {number}", history, lang)
                begin = end


def read_rows(path: str | os.PathLike[str], image_folder: str | None = None) -> Rows:
    """Rows of a data file, all of them good; as `scan_rows`.

    Raises:
        InputError: the file can't be used as a whole, or has bad rows (the first 20 are named).
    """
    rows, problems = scan_rows(path, image_folder)
    raise_problems(first_lines(problems))
    return rows


def scan_rows(path: str | os.PathLike[str], image_folder: str | None = None) -> tuple[Rows, list[str]]:
    """The good rows of a data file, and a sentence for each bad one.

    The file is a JSON list of objects, or JSON Lines (one object a line, empty lines are fine), UTF-8 with or without
    a byte-order mark. Each img becomes the path that `model.data.images.image_path` finds, or stays as written.

    Args:
        image_folder: where relative images are, if not in the places that are looked in without it (--image_folder).

    Raises:
        InputError: the file can't be read, isn't one of these, or holds no row at all.
    """
    rows, problems = Rows(path), []
    for number, row in enumerate(rows_in_place(path, image_folder), 1):
        if isinstance(row, InputError):
            problems.append(str(row))
        else:
            rows.append(row, number)
    return rows, problems


def missing_file_problems(files: Sequence[str]) -> list[str]:
    """A sentence for each data file that is not there, as reading it would say it: a look that takes no time."""
    problems = {file: why_missing(file) for file in sorted(set(files))}
    return [f"{file}: {problem}; a JSON file of rows is needed." for file, problem in problems.items() if problem]


def why_missing(path: str) -> str | None:
    """Why nothing can be found at path, in the system's words, if that is so."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # the second of a path that no system takes
        return getattr(error, "strerror", None) or os.strerror(errno.ENOENT)
    return None


def rows_in_place(
    path: str | os.PathLike[str], image_folder: str | None = None, needs_label: bool = True
) -> Iterator[Row | InputError]:
    """The rows of a data file in its order, and what is wrong with a bad one in its place; as `scan_rows`.

    Args:
        needs_label: rows without a label are bad; else a row's label is "" if it has none, or none of use.

    Raises:
        InputError: the file can't be read, isn't a data file, or holds no row at all; or there is no image_folder.
    """
    if image_folder and not os.path.isdir(image_folder):
        found = why_missing(image_folder)
        found = "no such folder" if found in (None, os.strerror(errno.ENOENT)) else found
        raise InputError(f"--image_folder {image_folder}: {found}; the one that the pictures are in is needed.")
    file, places = str(path), image_places(path, image_folder)
    known_folders: dict[str, bool] = {}
    count = 0
    for count, entry in enumerate(values_of(path), 1):
        where = f"{file} row {count}"
        try:
            row = released_row(entry, where) or row_from_json(entry, where, needs_label)
            yield _with_found_image(row, places, known_folders)
        except InputError as problem:
            yield problem
    if not count:
        raise InputError(f"{path}: the list is empty; at least one row is needed.")


def _with_found_image(row: Row, places: Sequence[str], known_folders: dict[str, bool]) -> Row:
    if row.img is None:
        return row
    try:
        found = image_path(row.img, places, known_folders)
    except InputError as problem:
        raise InputError(f"{row.where}: {problem}") from None
    return row if found is None else Row(found, *row[1:])


def values_of(path: str | os.PathLike[str]) -> Iterator[object]:
    """The values of a data file one by one; in JSON Lines, an InputError in place of a line that is no JSON.

    Raises:
        InputError: the file can't be read, or is neither a JSON list nor JSON Lines.
    """
    path = Path(path)
    text = text_of(path)
    start = _skip_blank(text, 0)
    if path.suffix.lower() in TABLES and text[start : start + 1] not in ("[", "{", ""):
        raise InputError(f"{path}: a table, and no JSON; convert_data.py makes rows of it.")
    if start == len(text):
        raise InputError(f"{path}: line 1 column 1: not JSON, for the file is empty; at least one row is needed.")
    if text[start : start + 1] == "{" and _has_rows_in_lines(text, start):
        return _entries_of_lines(path, text)
    return _entries_of_list(path, text, start)


def text_of(path: Path) -> str:
    """What stands in a data file.

    Raises:
        InputError: the file can't be read, or isn't UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a JSON file of rows is needed.") from error
    if path.suffix.lower() in WORKBOOKS:
        raise InputError(f"{path}: a workbook, and no JSON; convert_data.py makes rows of it once it is saved as CSV.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if compression := compression_of(content):
            raise InputError(f"{path}: compressed ({compression}); the JSON file that is in it is needed.") from error
        raise InputError(f"{path}: byte {error.start + 1} isn't UTF-8; save the file as UTF-8.") from error


def _skip_blank(text: str, start: int) -> int:
    return cast(re.Match[str], _BLANK.match(text, start)).end()


def _has_rows_in_lines(text: str, start: int) -> bool:
    """Whether text is JSON Lines: its first object is a row, or is followed by something. Else it is a single object."""
    try:
        first, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return "\n" in text[start:].strip()  # a broken first line, then others
    if "\n" in text[start:end]:
        return False
    return bool({"prompt", "label", *_OF_CONVERSATIONS} & first.keys()) or _skip_blank(text, end) < len(text)


def _entries_of_lines(path: Path, text: str) -> Iterator[object]:
    start = number = 0
    while start < len(text):
        number += 1
        end = text.find("\n", start)  # not splitlines: that also splits at characters that JSON texts may hold
        end = len(text) if end < 0 else end
        line, start = text[start:end], end + 1
        if not line.strip(" \t\r\n"):
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            found = f"column {error.colno}: not JSON ({error.msg})"
            yield InputError(f"{path} line {number} {found}; a row in one line is needed.")
        except (ValueError, RecursionError) as error:
            yield InputError(f"{path} line {number}: JSON that can't be read ({error}); a row in one line is needed.")


def _entries_of_list(path: Path, text: str, start: int) -> Iterator[object]:
    """The values of a JSON list, each decoded when it is asked for: all at once would take five times the memory."""
    decode = json.JSONDecoder().raw_decode
    try:
        if text[start : start + 1] != "[":
            decode(text, start)  # tells what is wrong with it, if it is no JSON at all
            raise InputError(
                f"{path}: not a JSON list, and no JSON Lines; rows [{{…}}, {{…}}] are needed, or one in each line."
            )
        position = _skip_blank(text, start + 1)
        while text[position : position + 1] != "]":
            value, position = decode(text, position)
            yield value
            gap = _AFTER_VALUE.match(text, position)
            if gap is None:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, _skip_blank(text, position))
            position = gap.end()
        end = _skip_blank(text, position + 1)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno} column {error.colno}: not JSON ({error.msg}); a JSON list of rows is needed."
        ) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in thousands of brackets
        raise InputError(f"{path}: JSON that can't be read ({error}); a list of rows is needed.") from error


def row_from_json(entry: object, where: str, needs_label: bool = True) -> Row:
    """Row of one entry of a data file.

        {"img": path, "prompt": text, "label": text, "history": [[question, answer], …], "lang": "zh" or "en"}

    "img", "history" and "lang" may be absent or null, the prompt may be empty, and other keys are ignored. An entry
    that has "image", "images" or "picture" but no "img" is refused: it would be trained on without its picture.

    Args:
        entry: a value of the file, or the error that `values_of` gives in place of a line that is no JSON.
        needs_label: else the entry's label isn't looked at, and the row's is "".

    Raises:
        InputError: entry is no object, lacks a key, holds a value of another kind, or its label is empty.
    """
    texts, needs = (("prompt", "label"), ROW_NEEDS) if needs_label else (("prompt",), QUESTION_NEEDS)
    if isinstance(entry, InputError):
        raise entry
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {_json_kind(entry)} instead of an object; {needs}.")
    missing = [key for key in texts if key not in entry]
    if missing and (conversation := next((key for key in _OF_CONVERSATIONS if key in entry), None)):
        raise InputError(
            f'{where}: no {_quoted(missing)}, but "{conversation}"; convert_data.py makes rows of conversations.'
        )
    if missing:
        raise InputError(f"{where}: no {_quoted(missing)}; {needs}.")
    img, prompt, label = entry.get("img"), entry["prompt"], entry["label"] if needs_label else ""
    if img is None and (other_name := next((key for key in _OTHER_NAMES_OF_IMG if key in entry), None)):
        raise InputError(f'{where}: no "img", but "{other_name}"; rename it, or convert the file (convert_data.py).')
    for key, value in (("img", "" if img is None else img), ("prompt", prompt), ("label", label)):
        _check_text(key, value, where, needs)
    if img is not None and not img.strip():
        raise InputError(f'{where}: "img" is empty; it is the path of a picture, or left out in a row of text only.')
    if needs_label and not label.strip():
        raise InputError(f'{where}: "label" is empty; it is the answer to learn.')
    lang = entry.get("lang")
    if lang is not None and lang not in LANGUAGES:
        raise InputError(f'{where}: "lang" is {_shown(lang)}; "zh" or "en" is needed.')
    return Row(img, prompt, label, where, _history(entry.get("history"), where), lang)


def _check_text(key: str, value: object, where: str, needs: str) -> None:
    if not isinstance(value, str):
        raise InputError(f'{where}: "{key}" is {_json_kind(value)}; {needs}.')
    if not is_unicode(value):
        raise InputError(f'{where}: "{key}" holds half a character (a lone \\ud800–\\udfff); whole ones are needed.')


def released_row(entry: object, where: str) -> Row | None:
    """Row of an entry that is good and has the three keys of the released data, and no others; else None.

    It takes a fifth of the time of `row_from_json`, which says what is wrong with others. In most files, all rows are
    such.
    """
    if not isinstance(entry, dict) or len(entry) != 3:
        return None
    img, prompt, label = entry.get("img"), entry.get("prompt"), entry.get("label")
    if not (isinstance(img, str) and isinstance(prompt, str) and isinstance(label, str)):
        return None
    if not img.strip() or not label.strip():
        return None
    try:
        f"{img}{prompt}{label}".encode()  # half a character can't be
    except UnicodeEncodeError:
        return None
    return Row(img, prompt, label, where)


def json_row(row: Row) -> dict[str, object]:
    """The entry of a data file that gives row; the opposite of `row_from_json`."""
    entry: dict[str, object] = {"img": row.img, "prompt": row.prompt, "label": row.label}
    entry |= {"history": [list(turn) for turn in row.history] or None, "lang": row.lang}
    return {key: value for key, value in entry.items() if value is not None}


def row_turns(row: Row) -> list[Row]:
    """What a row teaches, oldest first: each earlier answer after what came before it, then the row's own label.

    history [[q1, a1]], prompt q2, label a2   →   q1 → a1   and   q1 a1 q2 → a2
    """
    earlier = [
        row._replace(prompt=question, label=answer, history=row.history[:turn])
        for turn, (question, answer) in enumerate(row.history)
    ]
    return [*earlier, row]


def _history(turns: object, where: str) -> tuple[tuple[str, str], ...]:
    needed = "a list of [question, answer] pairs of texts is needed"
    if turns is None:
        return ()
    if not isinstance(turns, list):
        raise InputError(f'{where}: "history" is {_json_kind(turns)}; {needed}.')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f'{where}: "history" holds {_shown(turn)} as its turn {number}; {needed}.')
        if not all(is_unicode(text) for text in turn):
            raise InputError(f'{where}: "history" holds half a character in its turn {number}; {needed}.')
        if not turn[1].strip():
            raise InputError(f'{where}: "history" has an empty answer in its turn {number}; it is an answer to learn.')
    return tuple((question, answer) for question, answer in turns)


def _quoted(keys: Sequence[str]) -> str:
    return " and no ".join(f'"{key}"' for key in keys)


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    """A value as JSON, short enough for one line."""
    text = json.dumps(value)  # ASCII: a line break or half a character would garble the report
    return text if len(text) <= 60 else text[:57] + "…"
