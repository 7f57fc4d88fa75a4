"""Rows become training batches: pictures are opened when asked for, and padding ends with the batch's longest row.

Shapes: batch rows, seq tokens, image[3, H, W].
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from model.prompt import IGNORE_INDEX, Lengths, Tokenizer, sample_from_row
from model.rows import open_picture, read_rows

PAD_MULTIPLE = 8  # tokens; half-precision matrix units work in tiles of 8


class FewShotDataset(Dataset[dict[str, Any]]):
    """The rows of one data file as samples: texts in memory, pictures on disk until a row is asked for.

    processor turns a Pillow image into float32[3, H, W]. args is any object with `image_length`, `max_source_length`,
    `max_target_length` and, if wanted, `source_prefix` and `ignore_pad_token_for_loss`.

    Raises:
        InputError: the file can't be used; as `model.rows.read_rows`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        processor: Callable[[Image.Image], torch.Tensor],
        tokenizer: Tokenizer,
        args: Any,
    ):
        self.rows = read_rows(path)
        self.processor = processor
        self.tokenizer = tokenizer
        self.lengths = Lengths.from_args(args)
        self.features: dict[str, torch.Tensor] = {}  # by picture path; see model.features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `input_ids` and `labels` list[int] of equal length, `image` float32[3, H, W] (or its
        `image_features` [queries, width], once they are known), `pre_image` and `pad_token_id` int.

        Raises:
            InputError: the row's picture can't be opened, or the lengths leave no room.
        """
        row = self.rows[index]
        sample = sample_from_row(row, self.tokenizer, self.lengths)
        picture = {"image_features": self.features[row.img]} if row.img in self.features else self._pixels(row.img)
        return {
            **picture,
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "pre_image": sample.pre_image,
            "image_length": self.lengths.image_length,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _pixels(self, path: str) -> dict[str, torch.Tensor]:
        return {"image": self.processor(open_picture(path))}


def data_collator(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of samples, a row each, padded on the right to the longest, rounded up to a multiple of PAD_MULTIPLE.

    input_ids          int64[batch, seq]               padding is the pad id
    labels             int64[batch, seq]               padding is IGNORE_INDEX
    image              float32[pictures, 3, H, W]      or image_features [pictures, queries, width]
    pre_image          int                             the same in every row: the length of <img>
    image_slots        int64[pictures, image_length]   where each picture goes in the flattened batch · seq
    answer_positions   int64[answers]                  which of the flattened batch · seq predict a supervised token
    answers            int64[answers]                  those tokens
    """
    return _batch([[example] for example in examples])


def packed_collator(examples: Sequence[dict[str, Any]], capacity: int) -> dict[str, Any]:
    """The same samples in as few rows as fit into capacity tokens each: data of mixed lengths needs less padding.

        row        <img> · · question gMASK sop answer | <img> · · question gMASK sop answer | padding
        segments     0   0 0    0       0    0    0        1   1 1    1       1    1    1      -1

    Besides what `data_collator` gives:

    segments       int64[batch, seq]      the sample that each token belongs to; none sees another's
    in_context     bool[batch, seq]       before <sop>
    position_ids   int64[batch, 2, seq]   each sample's own; see `model.visualglm.glm_position_ids`
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
    position_ids = torch.zeros(len(rows), 2, segments.shape[1], dtype=torch.int64)
    for number, row in enumerate(rows):
        for segment, (start, example) in enumerate(_with_starts(row)):
            context = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
            end = start + len(example["input_ids"])
            segments[number, start:end] = segment
            in_context[number, start : start + context] = True
            position_ids[number, 0, start : start + context] = torch.arange(context)
            position_ids[number, 0, start + context : end] = context - 1
            position_ids[number, 1, start + context : end] = torch.arange(end - start - context) + 1
    return {**batch, "segments": segments, "in_context": in_context, "position_ids": position_ids}


def _batch(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A batch of rows, each of one sample or several behind each other; see `data_collator`."""
    examples = [example for row in rows for example in row]
    seq = -(-max(map(_length, rows)) // PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full((len(rows), seq), examples[0]["pad_token_id"], dtype=torch.int64)
    labels = torch.full((len(rows), seq), IGNORE_INDEX, dtype=torch.int64)
    slots = []
    for number, row in enumerate(rows):
        for start, example in _with_starts(row):
            end = start + len(example["input_ids"])
            input_ids[number, start:end] = torch.tensor(example["input_ids"])
            labels[number, start:end] = torch.tensor(example["labels"])
            slots.append(number * seq + start + example["pre_image"] + torch.arange(example["image_length"]))
    picture = "image_features" if "image_features" in examples[0] else "image"
    predicted = torch.full_like(labels, IGNORE_INDEX)
    predicted[:, :-1] = labels[:, 1:]
    positions = (predicted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return {
        "input_ids": input_ids,
        "labels": labels,
        picture: torch.stack([example[picture] for example in examples]),
        "pre_image": examples[0]["pre_image"],
        "image_slots": torch.stack(slots),
        "answer_positions": positions,
        "answers": predicted.flatten()[positions],
    }


def _length(row: Sequence[dict[str, Any]]) -> int:
    return sum(len(example["input_ids"]) for example in row)


def _with_starts(row: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each sample of a row with the position of its first token."""
    start = 0
    for example in row:
        yield start, example
        start += len(example["input_ids"])
