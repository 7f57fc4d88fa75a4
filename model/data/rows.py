"""Data files and their pictures: standard library and Pillow only, so that they are checked before torch is loaded."""

import json
import marshal
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, overload

from model.data.bad_rows import first_lines
from model.data.images import place_of
from model.errors import InputError, raise_problems

_OTHER_NAMES_OF_IMG = ("image", "images", "picture")
LANGUAGES = ("zh", "en")
RowValues = tuple[str | None, str, str, tuple[tuple[str, str], ...], str | None]  # img, prompt, label, history, lang
ROW_NEEDS = 'every row is an object with the texts "prompt" and "label", and "img" unless it has no picture'


_NEXT = re.compile(r"[ \t\n\r]*(,?)[ \t\n\r]*")  # from one value of a list to another
_BLANK = re.compile(r"[ \t\n\r]*")  # what JSON allows between values


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file, checked. `where` names it for a person: `fewshot-data/dataset.json row 3`.

    Rows are counted from 1. A row without a picture has no img. history holds the earlier turns as (question, answer),
    oldest first; lang is "zh" or "en" where the row itself says so.
    """

    img: str | None
    prompt: str
    label: str
    where: str
    history: tuple[tuple[str, str], ...] = ()
    lang: str | None = None

    def values(self) -> RowValues:
        """What the row says, without where."""
        return self.img, self.prompt, self.label, self.history, self.lang


class Rows(Sequence[Row]):
    """The rows of one data file in few bytes: a Row is made when it is asked for.

    Texts lie in one block of memory, which worker processes share with their parent: 300,000 Row objects would be
    copied into every worker as soon as their reference counts change.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._texts = bytearray()
        self._ends = array("Q")
        self._numbers = array("L")
        self.turns = array("L")  # of each row, earlier ones and its own

    def append(self, values: RowValues, number: int) -> None:
        """Add a row by its values: the file's number-th, counted from 1."""
        self._texts += marshal.dumps(values)
        self._ends.append(len(self._texts))
        self._numbers.append(number)
        self.turns.append(1 + len(values[3]))

    def values(self, start: int = 0, stop: int | None = None) -> Iterator[RowValues]:
        """(img, prompt, label, history, lang) of each row from start to before stop. Quicker than asking for the rows."""
        begin = self._ends[start - 1] if start else 0
        with memoryview(self._texts) as texts:
            for end in self._ends[start:stop]:
                yield marshal.loads(texts[begin:end])
                begin = end

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        ((img, prompt, label, history, lang),) = self.values(index, index + 1)
        return Row(img, prompt, label, f"{self.path} row {self._numbers[index]}", history, lang)


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """Rows of a data file, all of them good; as `scan_rows`.

    Raises:
        InputError: the file can't be used as a whole, or has bad rows (the first 20 are named).
    """
    rows, problems = scan_rows(path)
    raise_problems(first_lines(problems))
    return rows


def scan_rows(path: str | os.PathLike[str]) -> tuple[Rows, list[str]]:
    """The good rows of a data file, and a sentence for each bad one.

    The file is a JSON list of objects, or JSON Lines (one object a line, empty lines are fine), UTF-8 with or without
    a byte-order mark. Each img is already looked up (`find_picture`); one that was not found stays as written.

    Raises:
        InputError: the file can't be read, isn't one of these, or holds no row at all.
    """
    rows, problems = Rows(path), []
    file, folder = str(path), os.path.dirname(path)
    folders: dict[str, bool] = {}  # of pictures, seen from the working directory: is there such a folder?
    count = 0
    for count, entry in enumerate(values_of(path), 1):
        try:
            if isinstance(entry, InputError):
                raise entry
            values = plain_values(entry) or row_from_json(entry, f"{file} row {count}").values()
        except InputError as problem:
            problems.append(str(problem))
            continue
        img = values[0]
        place = img and (place_of(img, folder, folders) or img)
        rows.append((place, *values[1:]), count)
    if not count:
        raise InputError(f"{path}: the list is empty; at least one row is needed.")
    return rows, problems


def values_of(path: str | os.PathLike[str]) -> Iterator[object]:
    """The values of a data file one by one; in JSON Lines, an InputError in place of a line that is no JSON.

    Raises:
        InputError: the file can't be read, or is neither a JSON list nor JSON Lines.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a JSON file of rows is needed.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} isn't UTF-8; save the file as UTF-8.") from error
    start = _skip_blank(text, 0)
    if text[start : start + 1] == "{" and _has_rows_in_lines(text, start):
        return _entries_of_lines(path, text)
    return _entries_of_list(path, text, start)


def _skip_blank(text: str, start: int) -> int:
    return cast(re.Match[str], _BLANK.match(text, start)).end()


def _has_rows_in_lines(text: str, start: int) -> bool:
    """Whether text is JSON Lines rather than a single object: a row in its first line, or something after the object."""
    try:
        first, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return "\n" in text[start:].strip()  # a broken first line, then others
    return bool({"prompt", "label", "conversations", "messages"} & first.keys()) or _skip_blank(text, end) < len(text)


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
            json.loads(text)  # tells what is wrong with it, if it is no JSON at all
            raise InputError(f"{path}: not a JSON list; a list of rows is needed, and {ROW_NEEDS}.")
        position = _skip_blank(text, start + 1)
        while text[position : position + 1] != "]":
            value, position = decode(text, position)
            yield value
            between = cast(re.Match[str], _NEXT.match(text, position))
            position = between.end()
            if not between[1] and text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
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


def row_from_json(entry: object, where: str) -> Row:
    """Row from one entry of a data file. Keys beyond those of a row are fine, and so is an empty prompt.

        {"img": path, "prompt": text, "label": text, "history": [[question, answer], …], "lang": "zh" or "en"}

    "img", "history" and "lang" may be absent or null. A row without "img" is one of text only; one that has "image",
    "images" or "picture" in its place is refused, for its pictures would be lost.

    Raises:
        InputError: entry is no object, lacks a key, holds something else than these, or its label is empty.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {_json_kind(entry)} instead of an object; {ROW_NEEDS}.")
    missing = [key for key in ("prompt", "label") if key not in entry]
    if missing:
        raise InputError(f"{where}: no {_quoted(missing)}; {ROW_NEEDS}.")
    img, prompt, label = entry.get("img"), entry["prompt"], entry["label"]
    if img is None and (other_name := next((key for key in _OTHER_NAMES_OF_IMG if key in entry), None)):
        raise InputError(f'{where}: no "img", but "{other_name}"; rename it, or convert the file (convert_data.py).')
    for key, value in (("img", "" if img is None else img), ("prompt", prompt), ("label", label)):
        if not isinstance(value, str):
            raise InputError(f'{where}: "{key}" is {_json_kind(value)}; {ROW_NEEDS}.')
    if not _is_unicode(f"{img}{prompt}{label}"):
        key = next(key for key in ("img", "prompt", "label") if not _is_unicode(str(entry.get(key))))
        raise InputError(f'{where}: "{key}" holds half a character (a lone \\ud800–\\udfff); whole ones are needed.')
    if img is not None and not img.strip():
        raise InputError(f'{where}: "img" is empty; it is the path of a picture, or left out in a row of text only.')
    if not label.strip():
        raise InputError(f'{where}: "label" is empty; it is the answer to learn.')
    lang = entry.get("lang")
    if lang is not None and lang not in LANGUAGES:
        raise InputError(f'{where}: "lang" is {_shown(lang)}; "zh" or "en" is needed.')
    return Row(img, prompt, label, where, _history(entry.get("history"), where), lang)


def plain_values(entry: object) -> RowValues | None:
    """Values of an entry that is a good row of the three released keys and no other; None if it is anything else.

    Five times as fast as `row_from_json`, which tells what the others are: most files are of such rows throughout.
    """
    if not isinstance(entry, dict) or len(entry) != 3:
        return None
    img, prompt, label = entry.get("img"), entry.get("prompt"), entry.get("label")
    if not (isinstance(img, str) and isinstance(prompt, str) and isinstance(label, str)):
        return None
    if not img.strip() or not label.strip() or not _is_unicode(f"{img}{prompt}{label}"):
        return None
    return img, prompt, label, (), None


def row_turns(row: Row) -> list[Row]:
    """What a row teaches, oldest first: each earlier turn as the answer to what came before it, and its own label.

    history [[q1, a1]], prompt q2, label a2   →   q1 → a1   and   q1 a1 q2 → a2
    """
    earlier = [
        replace(row, prompt=question, label=answer, history=row.history[:turn])
        for turn, (question, answer) in enumerate(row.history)
    ]
    return [*earlier, row]


def values_of_turns(values: RowValues) -> list[RowValues]:
    img, prompt, label, history, lang = values
    return [turn.values() for turn in row_turns(Row(img, prompt, label, "", history, lang))]


def _history(turns: object, where: str) -> tuple[tuple[str, str], ...]:
    needed = "a list of [question, answer] pairs of texts is needed"
    if turns is None:
        return ()
    if not isinstance(turns, list):
        raise InputError(f'{where}: "history" is {_json_kind(turns)}; {needed}.')
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f'{where}: "history" holds {_shown(turn)} as its turn {number}; {needed}.')
        if not all(_is_unicode(text) for text in turn):
            raise InputError(f'{where}: "history" holds half a character in its turn {number}; {needed}.')
        if not turn[1].strip():
            raise InputError(f'{where}: "history" has an empty answer in its turn {number}; it is an answer to learn.')
    return tuple((question, answer) for question, answer in turns)


def _quoted(keys: Sequence[str]) -> str:
    return " and no ".join(f'"{key}"' for key in keys)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
