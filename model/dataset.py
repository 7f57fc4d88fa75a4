"""Rows become training batches: pictures are opened when asked for, and padding ends with the batch's longest row.

Shapes: batch rows, pictures those of them that have one, seq tokens, image[3, H, W].
"""

import functools
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from model.errors import InputError, RowError
from model.progress import warn_from_any_process
from model.prompt import IGNORE_INDEX, Lengths, Row, Tokenizer, row_turns, sample_from_row
from model.rows import Rows, open_picture, read_rows

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
        InputError: the file can't be used; as `model.rows.read_rows`.
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
        self._samples = _samples(self.rows, chosen)

    def __len__(self) -> int:
        return len(self.rows) if self._samples is None else len(self._samples[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `input_ids` and `labels` list[int] of equal length, `image` float32[3, H, W] or None, `pre_image`
        and `pad_token_id` int.

        Raises:
            InputError: the row's picture can't be opened, or the lengths leave no room.
        """
        row = self._turn(index)
        try:
            image = self._image(row)
            problem = None
        except InputError as error:
            if not self.note_bad_pictures:
                raise
            image, problem = None, f"{row.where}: {error}"
            row = replace(row, img=None)
        sample = sample_from_row(row, self.tokenizer, self.lengths)
        labels = sample.labels if problem is None else [IGNORE_INDEX] * len(sample.labels)
        return {
            "input_ids": sample.input_ids,
            "labels": labels,
            "image": image,
            "pre_image": sample.pre_image,
            "pad_token_id": self.tokenizer.pad_token_id,
            **({} if problem is None else {"problem": problem}),
        }

    def _turn(self, index: int) -> Row:
        if self._samples is None:
            return self.rows[index]
        rows, turns = self._samples
        return row_turns(self.rows[rows[index]])[turns[index]]

    def _image(self, row: Row) -> torch.Tensor | None:
        if row.img is None:
            return None
        return self.processor(open_picture(row.img, getattr(self.processor, "image_size", None)))


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
    """One batch of samples, padded on the right to the longest, rounded up to a multiple of PAD_MULTIPLE.

    input_ids   int64[batch, seq]           padding is the pad id
    labels      int64[batch, seq]           padding is IGNORE_INDEX
    image       float32[pictures, 3, H, W]  in the order of the rows that have one; [0, 3, 0, 0] when none has
    pre_image   int                         the same in every row with a picture: the length of <img>; 0 when none has
    problems    list[str]                   of the samples that have one; absent otherwise
    """
    longest = max(len(example["input_ids"]) for example in examples)
    seq = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    seen = [example for example in examples if example["image"] is not None]
    pre_image = seen[0]["pre_image"] if seen else 0
    assert all(example["pre_image"] == pre_image for example in seen), "image slots differ within a batch"
    batch = {
        "input_ids": torch.stack([_padded(ex["input_ids"], seq, ex["pad_token_id"]) for ex in examples]),
        "labels": torch.stack([_padded(example["labels"], seq, IGNORE_INDEX) for example in examples]),
        "image": torch.stack([example["image"] for example in seen]) if seen else torch.empty(0, 3, 0, 0),
        "pre_image": pre_image,
    }
    problems = [example["problem"] for example in examples if "problem" in example]
    return {**batch, "problems": problems} if problems else batch


def heed_problems(batch: dict[str, Any], bad_rows: str) -> None:
    """Do what --bad_rows says about rows of a batch whose pictures could no longer be opened.

    "skip" tells each of them once: nothing is learned from it, and no other row takes its place, so that all processes stay
    in step. "error" stops the run.

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


def _padded(ids: list[int], seq: int, padding: int) -> torch.Tensor:
    """ids with padding on the right: int64[seq]."""
    return torch.tensor(ids + [padding] * (seq - len(ids)), dtype=torch.int64)
