"""Rows become training batches: pictures are opened when asked for, and padding ends with the batch's longest row.

Shapes: batch rows, seq tokens, image[3, H, W].
"""

import os
from collections.abc import Callable, Sequence
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
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _pixels(self, path: str) -> dict[str, torch.Tensor]:
        return {"image": self.processor(open_picture(path))}


def data_collator(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of samples, padded on the right to the longest, rounded up to a multiple of PAD_MULTIPLE.

    input_ids   int64[batch, seq]         padding is the pad id
    labels      int64[batch, seq]         padding is IGNORE_INDEX
    image       float32[batch, 3, H, W]   or image_features [batch, queries, width], where a row has those instead
    pre_image   int                       the same in every row: the length of <img>
    """
    longest = max(len(example["input_ids"]) for example in examples)
    seq = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    pre_image = examples[0]["pre_image"]
    assert all(example["pre_image"] == pre_image for example in examples), "image slots differ within a batch"
    labels = torch.stack([_padded(example["labels"], seq, IGNORE_INDEX) for example in examples])
    picture = "image_features" if "image_features" in examples[0] else "image"
    return {
        "input_ids": torch.stack([_padded(ex["input_ids"], seq, ex["pad_token_id"]) for ex in examples]),
        "labels": labels,
        picture: torch.stack([example[picture] for example in examples]),
        "pre_image": pre_image,
        **answers(labels),
    }


def answers(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where a batch is supervised, found here so that the device need not be asked.

    answer_positions   int64[answers]   in the flattened batch · seq: the position that predicts a supervised token
    answers            int64[answers]   that token
    """
    predicted = torch.full_like(labels, IGNORE_INDEX)
    predicted[:, :-1] = labels[:, 1:]
    positions = (predicted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    return {"answer_positions": positions, "answers": predicted.flatten()[positions]}


def _padded(ids: list[int], seq: int, padding: int) -> torch.Tensor:
    """ids with padding on the right: int64[seq]."""
    return torch.tensor(ids + [padding] * (seq - len(ids)), dtype=torch.int64)
