"""Turn conversations in the shape of LLaVA or ShareGPT, or a table, into rows for fine-tuning.

    python scripts/convert_data.py llava.json rows.json --images pictures/
    python scripts/convert_data.py table.csv rows.json

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}, …]}
    → {"img": "pictures/a.jpg", "prompt": last question, "label": last answer, "history": [[question, answer], …]}

A table is a .csv or .tsv in UTF-8 whose first line names the columns: img or image, prompt or question, label or answer;
lang and history (in JSON) are kept, other columns aren't. Without labels, predict.py can answer its rows.

Also understood: "images": [one path], {"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}, JSON
Lines, conversations without a picture. Every answer is learned: a row with history teaches each of its turns. What the
system says goes before the first question. If some conversations can't be rows, each is named in a sentence, nothing is
written, and the exit status is 2; --bad_rows skip leaves them out instead.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from os.path import expanduser
from typing import Any

from model.checkpoints.whole import is_same_file, write_whole
from model.cli.flag_parser import FlagParser
from model.data.bad_rows import first_lines
from model.data.images import image_path, image_places
from model.data.rows import TABLES, row_from_json, text_of, values_of
from model.errors import InputError, command, raise_problems
from model.progress import count_of, say, warn

SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}
IMAGE_MARK = "<image>"
STANDARD_OUTPUT = "-"
MOST_OF_A_CELL = 10**8  # characters; Python's own limit is 131,072
COLUMNS = {  # of a table: the names that each part of a row may have there
    "img": ("img", "image"),
    "prompt": ("prompt", "question"),
    "label": ("label", "answer"),
    "history": ("history",),
    "lang": ("lang",),
}


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "conversations",
        type=expanduser,
        metavar="IN",
        help="JSON or JSON Lines file of conversations, or a table: .csv or .tsv",
    )
    parser.add_argument(
        "rows",
        type=expanduser,
        metavar="OUT",
        help="JSON file to write; .jsonl writes JSON Lines, and - to standard output",
    )
    parser.add_argument(
        "--images",
        type=expanduser,
        default="",
        metavar="FOLDER",
        help="put before every picture's path (default: nothing)",
    )
    parser.add_argument("--lang", choices=["zh", "en"], help='"lang" of every row (default: none, the run decides)')
    parser.add_argument(
        "--bad_rows", default="error", choices=["error", "skip"], help="stop at bad ones, or leave them out"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file at OUT")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("convert_data.py"):
        convert(command_line().parse_args(argv))


def convert(options: argparse.Namespace) -> None:
    """Write the rows, and print how many there are.

    Raises:
        InputError: the file can't be used, or holds conversations that can't be rows (the first 20 are named).
    """
    tell = say
    if options.rows == STANDARD_OUTPUT:
        tell = warn  # on standard error
    else:
        refuse_to_overwrite(options)
    is_table = Path(options.conversations).suffix.lower() in TABLES
    made_from = "row" if is_table else "conversation"
    entries = table_entries(Path(options.conversations)) if is_table else values_of(options.conversations)
    rows, problems = [], []
    known_folders: dict[str, bool] = {}
    for number, entry in enumerate(entries, 1):
        try:
            if isinstance(entry, InputError):
                raise entry
            where = f"{options.conversations} row {number}"
            row = (row_of_cells if is_table else row_of)(entry, where, options.images, options.lang)
            if "img" in row and not options.images:
                row["img"] = found_from(options.rows, row["img"], options.conversations, where, known_folders)
            rows.append(row)
        except InputError as problem:
            problems.append(str(problem))
    if options.bad_rows == "error":
        raise_problems(first_lines(problems))
    if not rows:
        can_be = "used" if is_table else "a row"
        none = f"{options.conversations}: no {made_from} in it that can be {can_be}; at least one is needed."
        raise_problems([*first_lines(problems), none])
    write_rows(rows, Path(options.rows))
    tell(
        f"{options.rows}: {count_of(len(rows), 'row')}, {count_of(sum(1 + len(row.get('history', ())) for row in rows), 'turn')}"
    )
    if not any("label" in row for row in rows):
        names = " or ".join(map(json.dumps, COLUMNS["label"]))
        tell(
            f"{options.conversations}: no column {names}; predict.py can answer its rows, but nothing is learned from them."
        )
    if problems:
        tell(
            "\n".join(
                [f"Left out, {count_of(len(problems), f'bad {made_from}')} (--bad_rows skip):", *first_lines(problems)]
            )
        )


def refuse_to_overwrite(options: argparse.Namespace) -> None:
    """Return if what is at OUT, if anything, may be replaced.

    Raises:
        InputError: it is the file of conversations itself or no file, or --overwrite is not given.
    """
    out = Path(options.rows)
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: no folder {out.absolute().parent}; one that is there is needed.")
    if out.exists() and not out.is_file():
        raise InputError(f"{out}: not a file; the name of one is needed.")
    if is_same_file(out, options.conversations):
        raise InputError(f"{out}: the same file as IN; another one is needed.")
    if out.exists() and not options.overwrite:
        raise InputError(f"{out}: there is such a file; another name or --overwrite is needed.")


def found_from(rows: str, img: str, conversations: str, where: str, known_folders: dict[str, bool]) -> str:
    """The path by which rows in a file find the image that img names in the file of conversations.

    It is img itself, where both files find the same one or there is none; else the image's absolute path.

    Args:
        known_folders: see `model.data.images.image_path`.

    Raises:
        InputError: one of the files finds two different images of that name.
    """
    try:
        found = image_path(img, image_places(conversations), known_folders)
        from_rows = image_path(img, image_places(rows), known_folders)
    except InputError as problem:
        raise InputError(f"{where}: {problem}") from None
    if found is None or (from_rows is not None and os.path.realpath(from_rows) == os.path.realpath(found)):
        return img
    return os.path.abspath(found)


def row_of(entry: object, where: str, images: str = "", lang: str | None = None) -> dict[str, Any]:
    """The row of one conversation, as a JSON object.

    Raises:
        InputError: it has no turns, several pictures, the mark of a picture but no picture, or speakers out of turn.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: no object; a conversation {{…}} is needed.")
    turns = _turns(entry, where)
    img = _image(entry, where)
    (*earlier, (prompt, label)) = turns
    row: dict[str, Any] = {} if img is None else {"img": os.path.join(images, img)}
    row |= {"prompt": prompt, "label": label}
    if earlier:
        row["history"] = [list(turn) for turn in earlier]
    if lang:
        row["lang"] = lang
    row_from_json(row, where)  # what training will find wrong with it
    return row


def _turns(entry: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(question, answer) of each turn, without the mark of the picture."""
    spoken = entry.get("conversations", entry.get("messages"))
    if not isinstance(spoken, list) or not spoken:
        key = next((key for key in ("conversations", "messages") if key in entry), None)
        found = f'"{key}" is no list with something in it' if key else 'no "conversations" nor "messages"'
        raise InputError(f"{where}: {found}; a list of what was said is needed.")
    system = "" if entry.get("system") is None else entry["system"]  # ShareGPT's and LLaMA-Factory's key
    if not isinstance(system, str):
        raise InputError(f'{where}: "system" is no text; what the system says is needed.')
    said, turns, question = [system], [], None
    for number, part in enumerate(spoken, 1):
        speaker, text = _part(part, f"{where} part {number}")
        if speaker == "system" and number == 1:
            said.append(text)
        elif speaker == "question" and question is None:
            question = "\n".join([*filter(None, map(str.strip, said)), _without_mark(text)])
            said = []
        elif speaker == "answer" and question is not None:
            turns.append((question, text.strip()))
            question = None
        else:
            raise InputError(f"{where} part {number}: {speaker} out of turn; question and answer by turns are needed.")
    if question is not None or not turns:
        raise InputError(f"{where}: the last question has no answer; an answer to learn is needed.")
    return turns


def _part(part: object, where: str) -> tuple[str, str]:
    """Who speaks (question, answer or system), and what is said."""
    if not isinstance(part, dict):
        raise InputError(f'{where}: no object; {{"from": …, "value": …}} is needed.')
    speaker, text = part.get("from", part.get("role")), part.get("value", part.get("content"))
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        shown = json.dumps(speaker)[:40]
        raise InputError(f"{where}: spoken by {shown}; one of {', '.join(SPEAKERS)} is needed.")
    if not isinstance(text, str):
        key = "value" if "value" in part else "content"
        raise InputError(f'{where}: "{key}" is no text; what was said is needed.')
    return SPEAKERS[speaker], text


def _without_mark(text: str) -> str:
    return text.replace(IMAGE_MARK, "").strip()


def _image(entry: dict[str, Any], where: str) -> str | None:
    images = _as_list(entry.get("images"))
    images += [img for img in _as_list(entry.get("image")) if img not in images]
    if not all(isinstance(img, str) for img in images):
        raise InputError(f'{where}: "image" is no text; the path of a picture is needed.')
    marks = json.dumps(entry.get("conversations", entry.get("messages"))).count(IMAGE_MARK)
    if len(images) > 1 or marks > 1:
        raise InputError(f"{where}: {max(len(images), marks)} pictures; one at most is needed.")
    if marks and not images:
        raise InputError(f'{where}: {IMAGE_MARK} in a question, but no "image"; the path of a picture is needed.')
    return images[0] if images else None


def _as_list(value: object) -> list[Any]:
    return [one for one in (value if isinstance(value, list) else [value]) if one not in (None, "")]


def table_entries(path: Path) -> Iterator[dict[str, str] | InputError]:
    """The cells of each line of a table by what they are in a row, and what is wrong with a line in its place.

    Raises:
        InputError: the file can't be read, has no line that names the columns, or one is missing or there twice.
    """
    lines = csv.reader(io.StringIO(text_of(path), newline=""), delimiter=TABLES[path.suffix.lower()], strict=True)
    csv.field_size_limit(MOST_OF_A_CELL)
    try:
        header = [name.strip() for name in next(lines, [])]
        columns = _columns(header, path)
        for number, cells in enumerate(filter(any, lines), 1):
            if len(cells) == len(header):
                yield {key: cells[place] for key, place in columns.items()}
            else:
                found = f"{path} row {number}: {count_of(len(cells), 'cell')}"
                yield InputError(f"{found}; as many as there are columns are needed, {len(header)}.")
    except csv.Error as error:
        raise InputError(
            f"{path} line {lines.line_num}: a cell that can't be read ({error}); a quote opens and closes a cell, and is doubled inside it."
        ) from None


def _columns(header: Sequence[str], path: Path) -> dict[str, int]:
    """Which column of a table has which part of a row."""
    if not any(header):
        raise InputError(f"{path}: no line that names the columns; one is needed, such as img,prompt,label.")
    places = {key: [at for at, name in enumerate(header) if name.lower() in names] for key, names in COLUMNS.items()}
    for several in places.values():
        if len(several) > 1:
            raise InputError(
                f"{path}: the columns {_listed(header[at] for at in several)} mean the same; one of them is needed."
            )
    if not places["prompt"]:
        names = " or ".join(map(json.dumps, COLUMNS["prompt"]))
        raise InputError(f"{path}: no column {names} among {_listed(header)}; it is needed.")
    return {key: at for key, found in places.items() for at in found}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def row_of_cells(entry: Any, where: str, images: str, lang: str | None) -> dict[str, Any]:
    """The row of a table's line, as a JSON object; an empty cell is none, but for the prompt and the label.

    Raises:
        InputError: it can't be a row.
    """
    row = {key: cell for key, cell in entry.items() if cell.strip() or key in ("prompt", "label")}
    if "img" in row:
        row["img"] = os.path.join(images, row["img"].strip())
    if "history" in row:
        with suppress(ValueError):  # what isn't JSON is told as a text
            row["history"] = json.loads(row["history"])
    if lang:
        row["lang"] = lang
    row_from_json(row, where, needs_label="label" in row)
    return row


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as a JSON list, a row a line, or as JSON Lines where path ends in .jsonl; whole or not at all.

    The path - is standard output.

    Raises:
        InputError: path can't be written.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]"
    if str(path) == STANDARD_OUTPUT:
        sys.stdout.buffer.write(f"{text}\n".encode())
        sys.stdout.buffer.flush()
        return
    try:
        write_whole(path.resolve(), lambda file: file.write_text(text + "\n", encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a place to write to is needed.") from error


if __name__ == "__main__":
    main()
