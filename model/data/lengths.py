"""How many tokens rows take, and what the length flags cut off."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar, cast

from model.data.prompt import (
    IMAGE_OPEN,
    LEAST_TARGET_LENGTH,
    Lengths,
    Tokenizer,
    chat_prompt,
    least_source_length,
    question_text,
    sample_from_row,
)
from model.data.rows import Row, RowValues, row_turns, values_of_turns
from model.data.split import Selection
from model.errors import InputError

ROWS_PER_PROCESS = 10_000  # below that, counting is quicker than starting a process
Part = tuple[str, range]  # a file, and some of its rows
Result = TypeVar("Result")
_task: Callable[[Part], object] | None = None  # of a process that was started for it


@dataclass(frozen=True, slots=True)
class Cuts:
    """How many samples there are, and how many of them lose something: prompts, labels and earlier turns."""

    samples: int = 0
    prompts: int = 0
    labels: int = 0
    histories: int = 0

    def __add__(self, other: "Cuts") -> "Cuts":
        return Cuts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def count_cuts(rows: Iterable[RowValues], tokenizer: Tokenizer, lengths: Lengths) -> Cuts:
    """How many samples rows make, each given by its values, and what `lengths` cut off from them.

    Only texts are tokenized of which that can't be told from their characters, and a prompt only once.

    Raises:
        InputError: as `sample_from_row`.
    """
    room = lengths.max_source_length - 1
    image_tokens = len(tokenizer.encode(IMAGE_OPEN, add_special_tokens=False)) + lengths.image_length
    # A frame has no more tokens around a prompt than it has characters.
    frame_texts = [
        chat_prompt(lengths.source_prefix, None, True, english).removeprefix(IMAGE_OPEN) for english in (False, True)
    ]
    frame_room = max(map(len, frame_texts)) if all(_is_known(text, tokenizer) for text in frame_texts) else room
    label_room = lengths.max_target_length - 2
    unsure_labels: list[str] = []
    unsure_questions: dict[tuple[str, int], int] = {}  # text and room → how many samples ask it
    samples = prompts = histories = 0
    for values in rows:
        for img, prompt, label, history, lang in values_of_turns(values) if values[3] else (values,):
            samples += 1
            if not _surely_fits(label, label_room, tokenizer):
                unsure_labels.append(label)
            question_room = room - (image_tokens if img else 0)
            if history:
                sample = sample_from_row(Row(img, prompt, label, "", history, lang), tokenizer, lengths)
                prompts += sample.prompt_tokens_cut > 0
                histories += sample.turns_cut > 0
            elif not _surely_fits(prompt, question_room - frame_room, tokenizer):
                text = chat_prompt(
                    lengths.source_prefix + prompt, None, img is not None, (lang or lengths.lang) == "en"
                )
                key = text.removeprefix(IMAGE_OPEN), question_room
                unsure_questions[key] = unsure_questions.get(key, 0) + 1
    labels = sum(tokens > label_room for tokens in tokenizer.token_counts(unsure_labels))
    tokens_of_questions = tokenizer.token_counts([text for text, _ in unsure_questions])
    for ((_, question_room), asked), tokens in zip(unsure_questions.items(), tokens_of_questions, strict=True):
        prompts += asked * (tokens > question_room)
    return Cuts(samples, prompts, labels, histories)


def needed_lengths(rows: Iterable[Row], tokenizer: Tokenizer, lengths: Lengths) -> tuple[int, int]:
    """The --max_source_length and --max_target_length that cut nothing of rows, history included.

    Args:
        lengths: what surrounds the texts; its two lengths are not read.
    """
    image_tokens = len(tokenizer.encode(IMAGE_OPEN, add_special_tokens=False)) + lengths.image_length
    source, target = least_source_length(tokenizer, lengths.image_length), LEAST_TARGET_LENGTH
    for row in rows:
        for turn in row_turns(row):
            label_tokens = 0 if _surely_fits(turn.label, target - 2, tokenizer) else len(
                tokenizer.encode(turn.label, add_special_tokens=False)
            )  # fmt: skip
            target = max(target, label_tokens + 2)
        text = question_text(row, lengths, row.history)  # of the last turn: the longest, it holds the others
        around = (image_tokens if row.img else 0) + 1
        if not _surely_fits(text, source - around, tokenizer):
            source = max(source, len(tokenizer.encode(text, add_special_tokens=False)) + around)
    return source, target


def _surely_fits(text: str, tokens: int, tokenizer: Tokenizer) -> bool:
    """Whether text has at most so many tokens, as far as that can be told without tokenizing; false if not."""
    return len(text) < tokens and _is_known(text, tokenizer)  # less: SentencePiece puts one mark of its own before it


def _is_known(text: str, tokenizer: Tokenizer) -> bool:
    return tokenizer.known_characters.issuperset(text) and "  " not in text  # several spaces are a piece by themselves


def begin_to_count_cuts(selection: Selection, tokenizer: Tokenizer, lengths: Lengths) -> Callable[[], dict[str, Cuts]]:
    """What lengths cut off from the rows of every file; returned is a function that waits until they are counted.

    Very many rows are counted in processes of their own, while this one does something else.
    """

    def cuts(part: Part) -> Cuts:
        file, some = part
        return count_cuts(selection.rows[file].values(some.start, some.stop), tokenizer, lengths)

    parts = _parts(selection)
    counted = _begun(cuts, parts)

    def by_file() -> dict[str, Cuts]:
        found = dict.fromkeys(selection.rows, Cuts())
        for (file, _), some in zip(parts, counted(), strict=True):
            found[file] += some
        return found

    return by_file


def auto_lengths(
    selection: Selection, tokenizer: Tokenizer, lengths: Lengths, source: int | None, target: int | None, limit: int
) -> tuple[int, int]:
    """--max_source_length and --max_target_length, with what the data needs in the place of None.

    Where both don't fit into the model together, a question has at least half of the room if it needs it.

    Args:
        limit: tokens that the model takes, the two together.
    """

    def needed_by(part: Part) -> tuple[int, int]:
        file, some = part
        return needed_lengths(selection.rows[file][some.start : some.stop], tokenizer, lengths)

    needed = _begun(needed_by, _parts(selection))()
    needed_source, needed_target = (max(pair[part] for pair in needed) for part in (0, 1))
    if source is None:
        source = min(needed_source, limit - target if target is not None else max(limit - needed_target, limit // 2))
    if target is None:
        target = min(needed_target, limit - source)
    return source, target


def _parts(selection: Selection) -> list[Part]:
    """All rows of a selection in parts; each file has one at least."""
    return [
        (file, range(start, min(start + ROWS_PER_PROCESS, len(rows))))
        for file, rows in selection.rows.items()
        for start in range(0, max(1, len(rows)), ROWS_PER_PROCESS)
    ]


def _begun(task: Callable[[Part], Result], parts: list[Part]) -> Callable[[], list[Result]]:
    """A function that waits for task's results for parts; processes are forked, so nothing but results is copied."""
    number = sum(len(rows) for _, rows in parts)
    if number < 2 * ROWS_PER_PROCESS or "fork" not in multiprocessing.get_all_start_methods():
        return lambda: [task(part) for part in parts]
    workers = ProcessPoolExecutor(
        max(1, (os.cpu_count() or 1) - 1), multiprocessing.get_context("fork"), _take, (task,)
    )
    results = [cast("Future[Result]", workers.submit(_result, part)) for part in parts]

    def found() -> list[Result]:
        try:
            return [result.result() for result in results]
        except BrokenProcessPool as error:
            raise InputError("A process that counted tokens died (no memory left?).") from error
        finally:
            workers.shutdown()

    return found


def _take(task: Callable[[Part], object]) -> None:
    global _task
    _task = task


def _result(part: Part) -> object:
    assert _task is not None
    return _task(part)
