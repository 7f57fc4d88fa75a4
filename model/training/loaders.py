"""The data loaders of a run: which rows, in which order, in which batches of this process.

SAT's own draw rows by a hash of their place that no seed changes, repeat one permutation in every epoch, take one optimizer
step for every batch of --epochs, and fail with --split on shares of nothing. `model.data.sampling.SampleOrder` gives SAT's
order where that is the released one; batches are slices of it.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Sampler

from model.data.dataset import FewShotDataset
from model.data.rows import Row
from model.data.sampling import SampleOrder
from model.data.split import Selection
from model.distributed import has_gpu
from model.sat_compat import import_sat
from model.training.feature_cache import FeatureCache
from model.training.trouble import BatchesAtHand
from model.training.worker_samples import HandedOver, NotedSamples, begin_work, received, started

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.data_utils.configure_data import get_split  # noqa: E402

TRAINING, EVALUATION, TEST = range(3)  # the parts of --split


class OrderedBatches(Sampler[list[int]]):
    """This process's samples of each micro-batch of an order."""

    def __init__(self, order: SampleOrder, batches_per_step: int = 1, steps: tuple[int, int] | None = None) -> None:
        """batches_per_step is how many micro-batches an optimizer step takes.

        steps is how many there are, and how many of them are done; as many as the order has whole ones, if absent. A
        micro-batch of the last step for which no sample is left gets the step's first one, as a rank without samples does.
        """
        self.order, self.batches_per_step, self.steps = order, batches_per_step, steps
        self.start = 0  # micro-batches to leave out

    @property
    def start_iter(self) -> int:
        """Optimizer steps to leave out; SAT sets it with --resume-dataloader."""
        return self.start // self.batches_per_step

    @start_iter.setter
    def start_iter(self, steps: int) -> None:
        self.start = steps * self.batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        group = mpu.get_data_parallel_group()
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        batches = self.order.batches(rank, ranks, self.start)
        if self.steps is None:
            return batches
        steps, done = self.steps
        first = (steps - 1) * self.batches_per_step * self.order.batch
        missing = repeat([self.order[min(first, len(self.order) - 1)]])
        return islice(chain(batches, missing), max(0, steps - done) * self.batches_per_step)

    def __len__(self) -> int:
        return self.order.batch_count


class Loader:
    """A data loader that starts its worker processes when the first batch is asked for.

    SAT asks for an iterator of the evaluation's rows at the start of training and throws it away later. Its length is in
    optimizer steps: that is how SAT counts --epochs.
    """

    def __init__(
        self,
        samples: Any,
        order: SampleOrder,
        args: argparse.Namespace,
        collate_fn: Any,
        batches_per_step: int = 1,
        batches: BatchesAtHand | None = None,
        steps: tuple[int, int] | None = None,
    ) -> None:
        """batches is told of each batch that is handed out, and which rows the worker processes open."""
        self._told, self._samples = batches, NotedSamples(samples, args.num_workers)
        if batches is not None:
            batches.openers.append(self.opened_by)
        self.batch_sampler = OrderedBatches(order, batches_per_step, steps)
        self._taken = 0  # micro-batches of the order that are behind
        self._batches = DataLoader(
            self._samples,
            batch_sampler=self.batch_sampler,
            num_workers=args.num_workers,
            pin_memory=has_gpu(),
            collate_fn=HandedOver(collate_fn),
            prefetch_factor=args.prefetch_factor if args.num_workers > 0 else None,
            worker_init_fn=begin_work,
        )

    def __len__(self) -> int:
        sampler = self.batch_sampler
        return sampler.steps[0] if sampler.steps else max(1, len(sampler) // sampler.batches_per_step)

    def __iter__(self) -> Iterator[Any]:
        self._taken = self.batch_sampler.start
        random_state = torch.get_rng_state()
        batches = started(self._batches)  # torch draws a seed for the worker processes
        # The run that goes on here has drawn it at its beginning; and of model-parallel processes only one draws it.
        if self._taken or mpu.get_model_parallel_world_size() > 1:
            torch.set_rng_state(random_state)
        for handed_over in batches:
            batch = received(handed_over)
            if self._told is not None:
                self._told.note(batch)
            self._taken += 1
            yield batch

    @property
    def samples_taken(self) -> int:
        """Samples of the order, of all processes together, that have been given out or left out."""
        order = self.batch_sampler.order
        return min(self._taken * order.batch, len(order))

    def start_at_sample(self, samples: int) -> None:
        """Leave out so many samples of the order, of all processes together: the whole batches among them."""
        order = self.batch_sampler.order
        batches = order.batch_count if samples == len(order) else samples // order.batch
        self._taken = self.batch_sampler.start = batches

    def opened_by(self, pid: int) -> tuple[str, bool] | None:
        """The row that a worker process opened last, and whether it still was at it; None if that isn't known."""
        return self._samples.opened_by(pid, self._where)

    def spread(self, number: int) -> list[tuple[Row, dict[str, Any]]]:
        """Up to number samples with their rows, evenly over all that this loader gives out; opens their images."""
        order = self.batch_sampler.order
        there = range(len(self._samples.samples)) if order.is_drawn else order  # drawn ones come more than once
        places = dict.fromkeys(place * len(there) // number for place in range(number))
        found = (self._at(there[place]) for place in places)
        return [(dataset.turn(index), dataset[index]) for dataset, index in found]

    def _where(self, index: int) -> str:
        dataset, index = self._at(index)
        return dataset.where(index)

    def _at(self, index: int) -> tuple[FewShotDataset, int]:
        """The data set of a sample, and its number there."""
        for dataset in self._samples.samples.datasets:
            if index < len(dataset):
                return dataset, index
            index -= len(dataset)
        raise IndexError(index)


def make_loaders(
    args: argparse.Namespace,
    create_dataset_function: Callable[..., FewShotDataset],
    collate_fn: Any = None,
    *,
    selection: Selection,
    features: FeatureCache,
    batches: BatchesAtHand | None = None,
    steps: tuple[int, int] | None = None,
) -> tuple[Loader | None, Loader | None, Loader | None]:
    """The loaders of training, evaluation and test, as SAT's function of this name gives them.

    Notes in args what SAT asks of it later: `do_train` and its like, and how the ranks share an evaluation's last batch.

    Args:
        selection: the rows that were read, and which of them are held out. features: knows the vision part's output.
        batches: told of each batch that a loader hands out. steps: of a run that goes on, and how many are done.
    """

    def samples_of(files: Sequence[str], training: bool = True) -> list[FewShotDataset]:
        datasets = [
            create_dataset_function(file, args, selection.rows[file], selection.chosen(file, training))
            for file in files
        ]
        rows = sum(map(len, datasets))
        return [features.with_features(dataset, rows) for dataset in datasets]

    def loader_in_order(datasets: Sequence[FewShotDataset], part: int, split: str) -> Loader:
        order = SampleOrder(
            counts=tuple(map(len, datasets)), seed=args.seed, part=part, shares=shares if part else (1.0,), block_size=args.block_size,
            batch=eval_batch,
        )  # fmt: skip
        _note_last_batch(args, split, order, ranks)
        return Loader(ConcatDataset(datasets), order, args, collate_fn, batches=batches)

    ranks = torch.distributed.get_world_size(mpu.get_data_parallel_group())
    batch, eval_batch = args.batch_size * ranks, (args.eval_batch_size or args.batch_size) * ranks
    shares = tuple(get_split(args))
    training_rows = samples_of(args.train_data)
    order = training_order(args, training_rows, shares, batch)
    of_epochs = steps if args.epochs else None
    train = Loader(
        ConcatDataset(training_rows), order, args, collate_fn, args.gradient_accumulation_steps, batches, of_epochs
    )
    valid = test = None
    if args.valid_data is not None:
        valid = loader_in_order(samples_of(args.valid_data), 0, "val")
    elif selection.held_out:
        valid = loader_in_order(samples_of(list(selection.held_out), training=False), 0, "val")
    elif shares[EVALUATION]:
        valid = loader_in_order(training_rows, EVALUATION, "val")
    if args.test_data is not None:
        test = loader_in_order(samples_of(args.test_data), 0, "test")
    elif shares[TEST]:
        test = loader_in_order(training_rows, TEST, "test")
    args.do_train, args.do_valid, args.do_test = True, valid is not None, test is not None
    return train, valid, test


def training_order(
    args: argparse.Namespace, datasets: Sequence[FewShotDataset], shares: tuple[float, ...], batch: int
) -> SampleOrder:
    """The order of the training rows. batch is that of all processes, in samples."""
    lengths: ConcatDataset[int] = ConcatDataset([TextLengths(dataset) for dataset in datasets])
    return SampleOrder(
        counts=tuple(map(len, datasets)),
        seed=args.seed,
        epochs=args.epochs,
        draws=None if args.epochs else args.train_iters * batch * args.gradient_accumulation_steps,
        weights=tuple(args.train_data_weights) if args.train_data_weights else None,
        shares=shares,
        block_size=args.block_size,
        lengths=lengths.__getitem__ if args.group_by_length else None,
        batch=batch,
    )


class TextLengths(torch.utils.data.Dataset[int]):
    """The text length of every sample of a data set, counted when it is asked for."""

    def __init__(self, dataset: FewShotDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        return self.dataset.text_length(index)


def _note_last_batch(args: argparse.Namespace, split: str, order: SampleOrder, ranks: int) -> None:
    """Tell SAT how many samples each rank has of the last batch, where it is a short one, and how many ranks have none.

    A rank without samples evaluates one that is left out of the result.
    """
    left, share = len(order) % order.batch, order.batch // ranks
    shapes = [min(share, max(1, left - rank * share)) for rank in range(ranks)] if left else []
    setattr(args, f"{split}_last_shape", shapes)
    setattr(args, f"{split}_drop_number", sum(rank * share >= left for rank in range(ranks)) if left else 0)
