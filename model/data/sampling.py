"""Which samples share a batch: with --group_by_length, those that are about equally long, so that little is padded."""

import copy
import random
from typing import Any

from torch.utils.data import Dataset

from model.data.dataset import FewShotDataset

WINDOW_BATCHES = 64  # whose samples are sorted together; more would group hardly better


class GroupedByLength(Dataset[Any]):
    """The samples of another data set, reordered so that those of one batch are about equally long.

        drawn      7 2 9 3 | 8 2 7 4 …       lengths of a window of WINDOW_BATCHES batches
        grouped    7 7 8 9 | 2 2 3 4 …       sorted, cut into batches, the batches in an order of chance

    Every sample comes once, as in dataset. The order depends on the seed and the place alone: it is the same in every
    process, and for a run that starts in the middle.
    """

    def __init__(self, dataset: Any, lengths: Any, batch: int, seed: int) -> None:
        """lengths holds each sample's length, in any unit. batch is that of all processes together, in samples."""
        self.dataset, self.lengths, self.batch, self.seed = dataset, lengths, batch, seed
        self._window: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        window, place = divmod(index, WINDOW_BATCHES * self.batch)
        if window != self._window[0]:
            self._window = window, self._order(window)
        return self.dataset[self._window[1][place]]

    def _order(self, window: int) -> list[int]:
        size = WINDOW_BATCHES * self.batch
        places = range(window * size, min((window + 1) * size, len(self.dataset)))
        ordered = sorted(places, key=lambda place: self.lengths[place])
        batches = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        whole = len(ordered) // self.batch  # what is left over stays at the end, where the last batch is a small one
        first = batches[:whole]
        random.Random(f"{self.seed} {window}").shuffle(first)
        return [place for batch in first + batches[whole:] for place in batch]


class TextLengths(Dataset[int]):
    """The text length of every sample of a FewShotDataset, counted when it is asked for."""

    def __init__(self, dataset: FewShotDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        return self.dataset.text_length(index)


def lengths_of(dataset: Any) -> Any:
    """A data set like dataset that gives each sample's length in its place: wrappers around a FewShotDataset, which draw,
    repeat or join its samples, are kept.
    """
    if isinstance(dataset, FewShotDataset):
        return TextLengths(dataset)
    twin = copy.copy(dataset)
    for name, inner in vars(dataset).items():
        if isinstance(inner, Dataset):
            setattr(twin, name, lengths_of(inner))
        elif name == "datasets":
            setattr(twin, name, [lengths_of(one) for one in inner])
    return twin
