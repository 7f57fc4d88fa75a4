"""Rows become training batches: pictures are opened when asked for, and padding ends with the batch's longest row.

Shapes: batch rows, pictures those of them that have one, seq tokens, image[3, H, W].
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from model.data.images import open_picture
from model.data.prompt import IGNORE_INDEX, Lengths, Tokenizer, sample_from_row
from model.data.rows import Row, Rows, read_rows, row_turns
from model.errors import InputError
from model.masks import packed_position_ids, supervised_positions

PACKED_TOKENS = 2048  # of one sequence with --packing: attention's cost grows with its square
PAD_MULTIPLE = 8  # tokens; half-precision matrix units work in tiles of 8


class FewShotDataset(Dataset[dict[str, Any]]):
    """The rows of one data file as samples: texts in memory, pictures on disk until a row is asked for.

    A row with history makes one sample of every turn. processor turns a Pillow image into float32[3, H, W]. args is any
    object with `image_length`, `max_source_length`, `max_target_length` and, if wanted, `source_prefix`,
    `ignore_pad_token_for_loss` and `lang`.

    Args:
        rows: of the file at path, if they have been read already.
        chosen: which of them, counted from 0; all if absent.
        note_bad_pictures: give a sample that has nothing to learn and a "problem", in place of raising, when a picture
            can't be opened: an error in a worker process would end in its traceback. See `heed_problems`.

    Raises:
        InputError: the file can't be used; as `model.data.rows.read_rows`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        processor: Callable[[Image.Image], torch.Tensor],
        tokenizer: Tokenizer,
        args: Any,
        rows: Rows | None = None,
        chosen: Iterable[int] | None = None,
        note_bad_pictures: bool = False,
    ):
        self.rows = read_rows(path) if rows is None else rows
        self.processor = processor
        self.tokenizer = tokenizer
        self.lengths = Lengths.from_args(args)
        self.note_bad_pictures = note_bad_pictures
        self.features: dict[str, torch.Tensor] = {}  # by picture path; see model.training.feature_cache
        self._samples = _samples(self.rows, chosen)

    def __len__(self) -> int:
        return len(self.rows) if self._samples is None else len(self._samples[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `input_ids` and `labels` list[int] of equal length, `image` float32[3, H, W] or None, or once they
        are known its `image_features` [queries, width], `pre_image`, `image_length` and `pad_token_id` int.

        Raises:
            InputError: the row's picture can't be opened, or the lengths leave no room.
        """
        row, problem = self._turn(index), None
        try:
            picture = self._picture(row)
        except InputError as error:
            if not self.note_bad_pictures:
                raise
            picture, problem = {"image": None}, f"{row.where}: {error}"
            row = replace(row, img=None)
        sample = sample_from_row(row, self.tokenizer, self.lengths)
        labels = sample.labels if problem is None else [IGNORE_INDEX] * len(sample.labels)
        return {
            **picture,
            "input_ids": sample.input_ids,
            "labels": labels,
            "pre_image": sample.pre_image,
            "image_length": self.lengths.image_length,
            "pad_token_id": self.tokenizer.pad_token_id,
            **({} if problem is None else {"problem": problem}),
        }

    def _turn(self, index: int) -> Row:
        if self._samples is None:
            return self.rows[index]
        rows, turns = self._samples
        return row_turns(self.rows[rows[index]])[turns[index]]

    def _picture(self, row: Row) -> dict[str, torch.Tensor | None]:
        if row.img is None:
            return {"image": None}
        if row.img in self.features:
            return {"image_features": self.features[row.img]}
        return {"image": self.processor(open_picture(row.img, getattr(self.processor, "image_size", None)))}

    def text_length(self, index: int) -> int:
        """About how many tokens a sample has: its characters, and its picture's slots."""
        row = self._turn(index)
        history = sum(len(question) + len(answer) for question, answer in row.history)
        source = history + len(row.prompt) + (self.lengths.image_length if row.img else 0)
        return min(source, self.lengths.max_source_length) + min(len(row.label), self.lengths.max_target_length)

    def pictures(self) -> list[str]:
        """The paths of all pictures that its samples have, each once."""
        rows = range(len(self.rows)) if self._samples is None else self._samples[0]
        paths = (self.rows[index].img for index in rows)
        return list(dict.fromkeys(path for path in paths if path is not None))


def _samples(rows: Rows, chosen: Iterable[int] | None) -> "tuple[array[int], array[int]] | None":
    """Row and turn of every sample; None where sample i is simply row i. Arrays, for a worker copies no page of them."""
    if chosen is None and max(rows.turns) == 1:
        return None
    row_of, turn_of = array("L"), array("L")
    for index in range(len(rows)) if chosen is None else chosen:
        for turn in range(rows.turns[index]):
            row_of.append(index)
            turn_of.append(turn)
    return row_of, turn_of


def data_collator(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of samples, a row each, padded on the right to the longest, rounded up to a multiple of PAD_MULTIPLE.

    input_ids          int64[batch, seq]               padding is the pad id
    labels             int64[batch, seq]               padding is IGNORE_INDEX
    image              float32[pictures, 3, H, W]      or image_features [pictures, queries, width]; [0, 3, 0, 0] without
    pre_image          int                             the same in every row with a picture: the length of <img>
    image_slots        int64[pictures, image_length]   where each picture goes in the flattened batch · seq
    answer_positions   int64[answers]                  which of the flattened batch · seq predict a supervised token
    answers            int64[answers]                  those tokens
    problems           list[str]                       of the samples that have one; absent otherwise
    """
    return _batch([[example] for example in examples])


def packed_collator(examples: Sequence[dict[str, Any]], capacity: int = PACKED_TOKENS) -> dict[str, Any]:
    """The same samples in as few rows as fit into capacity tokens each: data of mixed lengths needs less padding.

        row        <img> · · question gMASK sop answer | <img> · · question gMASK sop answer | padding
        segments     0   0 0    0       0    0    0        1   1 1    1       1    1    1      -1

    Besides what `data_collator` gives:

    segments       int64[batch, seq]      the sample that each token belongs to; none sees another's
    in_context     bool[batch, seq]       before <sop>
    position_ids   int64[batch, 2, seq]   each sample's own; see `model.masks.packed_position_ids`
    """
    rows: list[list[dict[str, Any]]] = []
    for example in sorted(examples, key=lambda example: -len(example["input_ids"])):  # first fit, the longest first
        length = len(example["input_ids"])
        row = next((row for row in rows if _length(row) + length <= capacity), None)
        if row is None:
            rows.append([example])
        else:
            row.append(example)
    batch = _batch(rows)
    segments = torch.full_like(batch["labels"], -1)
    in_context = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for number, row in enumerate(rows):
        for segment, (start, example) in enumerate(_with_starts(row)):
            labels = example["labels"]
            end = start + len(labels)
            context = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
            segments[number, start:end] = segment
            in_context[number, start : start + context] = True
    position_ids = packed_position_ids(segments, in_context)
    return {**batch, "segments": segments, "in_context": in_context, "position_ids": position_ids}


def _batch(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A batch of rows, each of one sample or several behind each other; see `data_collator`."""
    examples = [example for row in rows for example in row]
    seq = -(-max(map(_length, rows)) // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(rows), seq), examples[0]["pad_token_id"], dtype=torch.int64)
    labels = torch.full((len(rows), seq), IGNORE_INDEX, dtype=torch.int64)
    slots, pictures = [], []
    for number, row in enumerate(rows):
        for start, example in _with_starts(row):
            end = start + len(example["input_ids"])
            input_ids[number, start:end] = torch.tensor(example["input_ids"])
            labels[number, start:end] = torch.tensor(example["labels"])
            if _picture_of(example) is not None:
                first = number * seq + start + example["pre_image"]
                slots.append(torch.arange(first, first + example["image_length"]))
                pictures.append(example)
    kind = "image_features" if pictures and "image_features" in pictures[0] else "image"
    positions, answers = supervised_positions(labels, IGNORE_INDEX)
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        kind: torch.stack([example[kind] for example in pictures]) if pictures else torch.empty(0, 3, 0, 0),
        "pre_image": pictures[0]["pre_image"] if pictures else 0,
        "image_slots": torch.stack(slots) if slots else torch.empty(0, 0, dtype=torch.int64),
        "answer_positions": positions,
        "answers": answers,
    }
    problems = [example["problem"] for example in examples if "problem" in example]
    return {**batch, "problems": problems} if problems else batch


def _picture_of(example: dict[str, Any]) -> torch.Tensor | None:
    return example["image_features"] if "image_features" in example else example["image"]


def _length(row: Sequence[dict[str, Any]]) -> int:
    return sum(len(example["input_ids"]) for example in row)


def _with_starts(row: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each sample of a row with the position of its first token."""
    start = 0
    for example in row:
        yield start, example
        start += len(example["input_ids"])
