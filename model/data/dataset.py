"""Rows become training batches. Images are opened when asked for; padding ends with the batch's longest row.

    dataset = FewShotDataset("rows.json", processor, tokenizer, args)
    batch = data_collator([dataset[0], dataset[1]])

Shapes: batch rows, images those of them that have one, seq tokens, image[3, H, W].
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import torch
from PIL import Image
from torch.utils.data import Dataset

from model.data.images import open_image
from model.data.lengths import PACKED_TOKENS, estimated_length, packs, padded
from model.data.prompt import IGNORE_INDEX, Lengths, Sample, Tokenizer, pre_image, sample_from_row
from model.data.rows import Row, Rows, read_rows, row_turns
from model.errors import InputError
from model.masks import packed_position_ids, supervised_positions

Entry = TypeVar("Entry")


class FewShotDataset(Dataset[dict[str, Any]]):
    """The rows of one data file as samples. Texts are in memory; images stay on disk until a sample is asked for.

    A row with history makes one sample of every turn. The first four arguments are those of the 2023 script, and so are
    the attributes `images`, `input_ids`, `labels` and `pre_image`.

    Args:
        processor: a Pillow image in mode RGB becomes float32[3, H, W].
        args: any object with `image_length`, `max_source_length`, `max_target_length` and, if wanted, `source_prefix`,
            `ignore_pad_token_for_loss`, `lang` and `image_folder`.
        rows: those of the file at path, if they have been read already.
        chosen: which rows are used, counted from 0; all if absent.
        note_bad_images: an image that can't be opened raises no error, which would show a worker process's traceback.
            Its sample has nothing to learn, and a "problem", a sentence for `model.data.bad_rows.handle_bad_rows`.

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
        note_bad_images: bool = False,
    ):
        self.rows = read_rows(path, getattr(args, "image_folder", None)) if rows is None else rows
        self.processor = processor
        self.tokenizer = tokenizer
        self.lengths = Lengths.from_args(args)
        self.note_bad_images = note_bad_images
        # By image path, if all images that could be opened have been looked at; see model.training.feature_cache.
        self.features: dict[str, torch.Tensor] | None = None
        self._samples = _samples(self.rows, chosen)

    def __len__(self) -> int:
        return len(self.rows) if self._samples is None else len(self._samples[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, as a dict:

            input_ids, labels                        list[int] of equal length
            image                                    float32[3, H, W]; None in a row of text only
            image_features                           [queries, width], in place of image once they are known; None as well
            pre_image, image_length, pad_token_id    int
            where                                    str; names the row for a person
            problem                                  str; only with note_bad_images, if the image can't be opened

        Raises:
            InputError: the row's image can't be opened, or the lengths leave no room.
        """
        row, problem = self.turn(index), None
        try:
            image = self._image_or_features(row)
        except InputError as error:
            if not self.note_bad_images:
                raise
            row, problem = row._replace(img=None), f"{row.where}: {error}"
            image = self._image_or_features(row)
        sample = sample_from_row(row, self.tokenizer, self.lengths)
        labels = sample.labels if problem is None else [IGNORE_INDEX] * len(sample.labels)
        return {
            **image,
            "input_ids": sample.input_ids,
            "labels": labels,
            "pre_image": sample.pre_image,
            "image_length": self.lengths.image_length,
            "pad_token_id": self.tokenizer.pad_token_id,
            "where": row.where,
            **({} if problem is None else {"problem": problem}),
        }

    def turn(self, index: int) -> Row:
        """The row of a sample, with the turns before it as its history."""
        if self._samples is None:
            return self.rows[index]
        rows, turns = self._samples
        return row_turns(self.rows[rows[index]])[turns[index]]

    def _image(self, row: Row) -> torch.Tensor | None:
        if row.img is None:
            return None
        return self.processor(open_image(row.img, getattr(self.processor, "image_size", None)))

    def _image_or_features(self, row: Row) -> dict[str, torch.Tensor | None]:
        if self.features is None:
            return {"image": self._image(row)}
        if row.img is None:  # so that each process knows what the others' batches hold
            return {"image_features": None}
        if row.img not in self.features:
            self._image(row)  # tells why not
            raise InputError(f"{row.img} could not be opened when all pictures were looked at, and can be now.")
        return {"image_features": self.features[row.img]}

    @property
    def images(self) -> "Sequence[torch.Tensor | None]":
        """float32[3, H, W] of every sample, None of one of text only; each is opened when it is asked for."""
        return _MadeWhenAsked(len(self), lambda index: self._image(self.turn(index)))

    @property
    def input_ids(self) -> Sequence[list[int]]:
        """Token ids of every sample, without padding; each is made when it is asked for."""
        return _MadeWhenAsked(len(self), lambda index: self._sample(index).input_ids)

    @property
    def labels(self) -> Sequence[list[int]]:
        """Labels of every sample, as long as its input_ids; each is made when it is asked for."""
        return _MadeWhenAsked(len(self), lambda index: self._sample(index).labels)

    @property
    def pre_image(self) -> int:
        """Position of the first image slot in samples with an image."""
        return pre_image(self.tokenizer)

    def _sample(self, index: int) -> Sample:
        return sample_from_row(self.turn(index), self.tokenizer, self.lengths)

    def text_length(self, index: int) -> int:
        """About how many tokens a sample has; see `model.data.lengths.estimated_length`."""
        return estimated_length(self.turn(index), self.lengths)

    def where(self, index: int) -> str:
        """Names the row of a sample for a person: `fewshot-data/dataset.json row 3`."""
        return self.turn(index).where

    def image_paths(self) -> list[str]:
        """The paths of all images that its samples have, each once."""
        rows = range(len(self.rows)) if self._samples is None else self._samples[0]
        paths = (self.rows[index].img for index in rows)
        return list(dict.fromkeys(path for path in paths if path is not None))


def _samples(rows: Rows, chosen: Iterable[int] | None) -> "tuple[array[int], array[int]] | None":
    """The row and the turn of every sample, by index; None if sample i is simply row i.

    They are arrays because worker processes share an array's memory, and copy a list's as they read it.
    """
    if chosen is None and max(rows.turns) == 1:
        return None
    row_of, turn_of = array("L"), array("L")
    for index in range(len(rows)) if chosen is None else chosen:
        for turn in range(rows.turns[index]):
            row_of.append(index)
            turn_of.append(turn)
    return row_of, turn_of


class _MadeWhenAsked(Sequence[Entry]):
    """A sequence of so many entries, each made from its index whenever it is asked for."""

    def __init__(self, length: int, entry: Callable[[int], Entry]) -> None:
        self._indices, self._entry = range(length), entry

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self._entry(one) for one in self._indices[index]]
        return self._entry(self._indices[index])


def data_collator(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of samples, a row each, padded on the right to the longest, rounded up by `padded`.

    input_ids          int64[batch, seq]               padding is the pad id
    labels             int64[batch, seq]               padding is IGNORE_INDEX
    image              float32[images, 3, H, W]        or image_features [images, queries, width]; empty without
    pre_image          int                             the same in every row with an image: the length of <img>
    image_slots        int64[images, image_length]     where each image goes in the flattened batch · seq
    answer_positions   int64[answers]                  which of the flattened batch · seq predict a supervised token
    answers            int64[answers]                  those tokens
    rows               list[tuple[str, int]]           where each sample is from, and its tokens; stays on the CPU
    problems           list[str]                       of the samples that have one; absent if none has
    """
    return _batch([[example] for example in examples])


def packed_collator(examples: Sequence[dict[str, Any]], capacity: int = PACKED_TOKENS) -> dict[str, Any]:
    """One batch in which samples share rows of up to capacity tokens: samples of mixed lengths then need less padding.

        row        <img> · · question gMASK sop answer | <img> · · question gMASK sop answer | padding
        segments     0   0 0    0       0    0    0        1   1 1    1       1    1    1      -1

    It holds what `data_collator` gives, and:

    segments       int64[batch, seq]      the sample that each token belongs to; none sees another's
    in_context     bool[batch, seq]       before <sop>
    position_ids   int64[batch, 2, seq]   each sample's own; see `model.masks.packed_position_ids`
    """
    packed = packs([len(example["input_ids"]) for example in examples], capacity)
    rows = [[examples[index] for index in row] for row in packed]
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


def collator_of_2023(collate_fn: Callable[[Sequence[Any]], Any]) -> Callable[[Sequence[Any]], Any]:
    """A script's own collate_fn, which stacks samples: those of a `FewShotDataset` are padded first, as above.

    Samples of other data sets are handed on as they are.
    """

    def collate(examples: Sequence[Any]) -> Any:
        if not all(_has_lists_to_pad(example) for example in examples):
            return collate_fn(examples)
        seq = padded(max(len(example["input_ids"]) for example in examples))
        return collate_fn([_padded_to(seq, example) for example in examples])

    return collate


def _has_lists_to_pad(example: Any) -> bool:
    return isinstance(example, dict) and "pad_token_id" in example and isinstance(example.get("input_ids"), list)


def _padded_to(seq: int, example: dict[str, Any]) -> dict[str, Any]:
    padding = seq - len(example["input_ids"])
    input_ids = example["input_ids"] + [example["pad_token_id"]] * padding
    return {**example, "input_ids": input_ids, "labels": example["labels"] + [IGNORE_INDEX] * padding}


def _batch(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A batch of rows, each of one sample, or of several one after another; see `data_collator`."""
    examples = [example for row in rows for example in row]
    seq = padded(max(map(_length, rows)))
    input_ids = torch.full((len(rows), seq), examples[0]["pad_token_id"], dtype=torch.int64)
    labels = torch.full((len(rows), seq), IGNORE_INDEX, dtype=torch.int64)
    slots, with_image = [], []
    for number, row in enumerate(rows):
        for start, example in _with_starts(row):
            end = start + len(example["input_ids"])
            input_ids[number, start:end] = torch.tensor(example["input_ids"])
            labels[number, start:end] = torch.tensor(example["labels"])
            if _image_of(example) is not None:
                first = number * seq + start + example["pre_image"]
                slots.append(torch.arange(first, first + example["image_length"]))
                with_image.append(example)
    kind = "image_features" if "image_features" in (with_image or examples)[0] else "image"
    positions, answers = supervised_positions(labels, IGNORE_INDEX)
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        kind: torch.stack([example[kind] for example in with_image]) if with_image else torch.empty(0, 3, 0, 0),
        "pre_image": with_image[0]["pre_image"] if with_image else 0,
        "image_slots": torch.stack(slots) if slots else torch.empty(0, 0, dtype=torch.int64),
        "answer_positions": positions,
        "answers": answers,
        "rows": [(example["where"], len(example["input_ids"])) for example in examples if "where" in example],
    }
    problems = [example["problem"] for example in examples if "problem" in example]
    return {**batch, "problems": problems} if problems else batch


def _image_of(example: dict[str, Any]) -> torch.Tensor | None:
    return example["image_features"] if "image_features" in example else example["image"]


def _length(row: Sequence[dict[str, Any]]) -> int:
    return sum(len(example["input_ids"]) for example in row)


def _with_starts(row: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each sample of a row with the position of its first token."""
    start = 0
    for example in row:
        yield start, example
        start += len(example["input_ids"])
