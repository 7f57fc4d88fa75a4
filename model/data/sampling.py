"""Which sample comes n-th in a run, told by the seed and the sizes alone.

Seed 1234's draws, the first epoch and the split are SwissArmyTransformer's. Other seeds have draws of their own, and so has
every epoch its permutation. Standard library and numpy only, and numpy not before the first sample is asked for.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, TypeVar

RELEASED_SEED = 1234  # SAT's default of --seed; its draws are those of the released script
LEAST_REPEATS = 200  # SAT makes an order of draws at least so many times as long as the data
WINDOW_BATCHES = 64  # whose samples are sorted together; more would group hardly better

Made = TypeVar("Made")


class _Latest(Generic[Made]):
    """What was made for the number asked for last, so that places that follow each other share it."""

    def __init__(self) -> None:
        self._latest: tuple[int, Made] | None = None

    def get(self, number: int, make: Callable[[int], Made]) -> Made:
        """make(number), called only if number is another one than last time."""
        latest = self._latest
        if latest is None or latest[0] != number:
            latest = self._latest = number, make(number)
        return latest[1]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()  # a copy for another process starts without it: it can be made again there


@dataclass(frozen=True)
class SampleOrder:
    """The samples of a run in their order: `order[n]` is the number of the n-th, `len(order)` how many there are.

    A sample's number is its index in all files' samples, one file after the other. Chance chooses among positions, where
    a file takes as many turns as its weight says:

        counts (3, 2), weights (2, 1)

        position   0 1 2 3 4 5 | 6 7
        sample     0 1 2 0 1 2 | 3 4

    With `draws`, each place in the order draws one position by chance. With `epochs`, each epoch is a permutation of all
    positions. With neither, all positions come once and as they are: the order of an evaluation.

    With `lengths`, samples of one batch are about equally long. Every sample comes as often as without:

        drawn      7 2 9 3 | 8 2 7 4 …       lengths in a window of WINDOW_BATCHES batches
        grouped    7 7 8 9 | 2 2 3 4 …       sorted, cut into batches, the batches in an order of chance

    What order[n] is depends on n and the fields alone, not on what was asked before. Lengths are asked for one window at
    a time, and one epoch's permutation is kept at a time. An order can be pickled if `lengths` can be.

    Raises:
        ValueError: epochs and draws are both given.
    """

    counts: tuple[int, ...]  # samples of each file
    seed: int
    epochs: int | None = None
    draws: int | None = None  # that are needed; the order is longer, see __len__
    weights: tuple[int, ...] | None = None  # of each file; None for 1 each
    shares: tuple[float, ...] = (1.0,)  # of --split for training, evaluation and test, adding up to 1
    part: int = 0  # which of them these samples are; of a whole, the one part has every sample
    block_size: int = 10_000  # samples of a file that --split deals out at a time
    lengths: Callable[[int], int] | None = None  # of the sample of a number, in any unit; None leaves them ungrouped
    batch: int = 1  # samples of one micro-batch of all processes together
    _epoch: _Latest[Any] = field(default_factory=_Latest, init=False, repr=False, compare=False)
    _window: _Latest[list[int]] = field(default_factory=_Latest, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.epochs is not None and self.draws is not None:
            raise ValueError(f"epochs {self.epochs} and draws {self.draws}: only one is needed")

    def __len__(self) -> int:
        """Samples in all: those of all epochs, or more draws than are needed.

        The number of draws is a multiple of the positions, as in SAT. Grouping sorts the last window by it.
        """
        if self.draws is not None:
            return self._positions * max(LEAST_REPEATS, 1 + self.draws // self._positions)
        return self._positions * (1 if self.epochs is None else self.epochs)

    def __getitem__(self, place: int) -> int:
        """The number of the sample at a place in the order, counted from 0.

        Raises:
            IndexError: the order has no such place.
        """
        if not 0 <= place < len(self):
            raise IndexError(f"place {place}: the order has {len(self)} samples")
        if self.lengths is None:
            return self._ungrouped(place)
        window, place = divmod(place, WINDOW_BATCHES * self.batch)
        return self._window.get(window, self._grouped)[place]

    @property
    def is_drawn(self) -> bool:
        """Whether chance chooses: else all samples come once, in the order of an evaluation."""
        return self.draws is not None or self.epochs is not None

    @property
    def batch_count(self) -> int:
        """Micro-batches in all, a short one at the end included."""
        return -(-len(self) // self.batch)

    def batches(self, rank: int = 0, ranks: int = 1, start: int = 0) -> Iterator[list[int]]:
        """This rank's samples of each micro-batch, from micro-batch number start on. Those before it are not made.

            batch 8, 10 samples      rank 0      rank 1
            micro-batch 0            0 1 2 3     4 5 6 7
            micro-batch 1            8 9         8            a rank without samples gets the first one, not none

        The last micro-batch may be short. All ranks have equally many, so that they stay in step.
        """
        first, end = rank * self.batch // ranks, (rank + 1) * self.batch // ranks
        for number in range(start, self.batch_count):
            places = range(number * self.batch, min((number + 1) * self.batch, len(self)))
            yield [self[place] for place in places[first:end] or places[:1]]

    def _ungrouped(self, place: int) -> int:
        if self.draws is not None:
            return self._sample(_draw(place, self._positions, self.seed))
        if self.epochs is None:
            return self._sample(place)
        epoch, place = divmod(place, self._positions)
        return self._sample(int(self._epoch.get(epoch, self._permutation)[place]))

    def _permutation(self, epoch: int) -> Any:
        """int64[positions]: the positions in an epoch's order."""
        import numpy

        # numpy fills keys up with zeros: the first epoch's is the seed alone, as in SAT.
        return numpy.random.default_rng([self.seed, epoch]).permutation(self._positions)

    def _grouped(self, window: int) -> list[int]:
        """The samples of a window. Those that make no whole batch stay at the end, where the last batch is a short one."""
        assert self.lengths is not None
        size = WINDOW_BATCHES * self.batch
        samples = [self._ungrouped(place) for place in range(window * size, min((window + 1) * size, len(self)))]
        samples.sort(key=self.lengths)
        batches = [samples[start : start + self.batch] for start in range(0, len(samples), self.batch)]
        whole = len(samples) // self.batch
        shuffled = batches[:whole]
        random.Random(f"{self.seed} {window}").shuffle(shuffled)
        return [sample for batch in shuffled + batches[whole:] for sample in batch]

    def _sample(self, position: int) -> int:
        """The number of the sample at a position."""
        file = bisect_right(self._ends, position)
        index = (position - (self._ends[file - 1] if file else 0)) % self._sizes[file]
        if self._dealt is not None:
            block, place = divmod(index, len(self._dealt))
            index = block * self.block_size + self._dealt[place]
        return sum(self.counts[:file]) + index

    @property
    def _positions(self) -> int:
        return self._ends[-1]

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Where the positions of each file end."""
        weights = self.weights or (1,) * len(self.counts)
        return tuple(accumulate(size * weight for size, weight in zip(self._sizes, weights, strict=True)))

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        """Samples of each file in this part of the split."""
        if self._dealt is None:
            return self.counts
        blocks = (divmod(count, self.block_size) for count in self.counts)
        return tuple(whole * len(self._dealt) + bisect_right(self._dealt, rest - 1) for whole, rest in blocks)

    @cached_property
    def _dealt(self) -> list[int] | None:
        """Which samples of each block of a file this part gets; None if it gets all."""
        if self.shares[self.part] == sum(self.shares):
            return None
        return _dealt_out(self.shares, self.part, self.block_size, self.seed)


def _draw(place: int, positions: int, seed: int) -> int:
    """A position by chance, below positions, that follows from the place in the order and the seed."""
    import numpy

    # SAT draws by the place alone. Places stay below 2**64, so every other seed has places of its own.
    key = random.Random(place if seed == RELEASED_SEED else place + (seed << 64))
    state = numpy.random.RandomState([key.randint(0, 2**32 - 1) for _ in range(16)])
    return int(state.randint(positions))


def _dealt_out(shares: Sequence[float], part: int, block_size: int, seed: int) -> list[int]:
    """Which of block_size samples go to a part of --split, ascending. What is rounded off goes to a later part.

    A part with a share gets one sample at least, even if that is another part's too.
    """
    import numpy

    shuffled = numpy.random.default_rng(seed).permutation(block_size).tolist()
    start, rounded_off = 0, 0.0
    for share in shares[:part]:
        size, rounded_off = _whole_samples(block_size * (share / sum(shares)), rounded_off)
        start += size
    size, _ = _whole_samples(block_size * (shares[part] / sum(shares)), rounded_off)
    least = 1 if shares[part] else 0
    return sorted(shuffled[start : start + max(size, least)])


def _whole_samples(exact: float, rounded_off: float) -> tuple[int, float]:
    """The whole number of samples for an exact one and what was rounded off before, and what is rounded off then."""
    # Added in SAT's order: rounding errors decide about a whole sample.
    rounded_off += exact % 1
    return int(int(exact) + rounded_off), rounded_off % 1
