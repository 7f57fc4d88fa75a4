"""Trouble while training: steps that learn nothing are skipped, counted and shown, and stop the run when they go on.

    batches = watched(hooks, options)              # the loaders tell it of each batch that they hand out
    with told_in_a_sentence(batches, options):     # no memory left, or a worker process that died
        …

Traded away: a step's loss is read from the device only when the step was skipped. Whether any row could be used is asked
of the other processes once in `most` steps.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.save import make_latest
from model.cli.options import Options
from model.distributed import done_by_first_process, from_all_processes
from model.errors import InputError, RowError
from model.progress import warn
from model.training.metrics import TrainingReport
from model.training.sat_loop import Hooks, LoopState, StepWatcher
from model.training.worker_samples import dead_workers_named

MOST_ROWS = 8  # named in one line, the longest first

RowAtHand = tuple[str, int]  # where it is from, and its tokens
Save = Callable[[int, Any, Any, Any, argparse.Namespace], None]


def watched(
    hooks: Hooks, options: Options, wait_for_saves: Callable[[], None] = lambda: None, resumed_at: int = 0
) -> "BatchesAtHand":
    """Let the steps of hooks be watched, and what it saves be guarded. The batches that are worked on, for the loaders.

    Args:
        wait_for_saves: returns once no checkpoint is being written.
        resumed_at: the iteration of --save that the run goes on from; 0 for a new one.
    """
    batches = BatchesAtHand(read_together=options.loss_normalization == "token")
    skipped = SkippedSteps(hooks.report, batches, options.max_skipped_steps, wait_for_saves, resumed_at)
    hooks.step_watchers += [batches, skipped]
    hooks.save_checkpoint = skipped.guarding(hooks.save_checkpoint)
    return batches


# --- which rows are at hand -------------------------------------------------------------------------------------------


class BatchesAtHand(StepWatcher):
    """What this process works on now, and the rows of the batches for it."""

    def __init__(self, read_together: bool = False) -> None:
        """read_together: the micro-batches of a step are all read before the first is computed."""
        self.read_together = read_together
        self.work = "before the first step"
        self.openers: list[Callable[[int], tuple[str, bool] | None]] = []  # of each loader; see `opened_by`
        self.batches: list[list[RowAtHand]] = []  # of this step, and of an evaluation after it
        self.empty = 0  # batches of this step in which no row could be used

    def note(self, batch: dict[str, Any]) -> None:
        """A loader hands out batch; see `model.data.dataset.data_collator`."""
        self.batches.append(batch.get("rows", []))
        self.empty += "answers" in batch and len(batch["answers"]) == 0

    def opened_by(self, pid: int) -> tuple[str, bool] | None:
        """The row that a worker process of a loader opened last, and whether it still was at it; None if not known."""
        return next((found for opener in self.openers if (found := opener(pid)) is not None), None)

    def before_step(self, state: LoopState) -> None:
        self.work = f"in step {state.args.iteration + 1}"
        self.batches, self.empty = [], 0

    def after_step(self, state: LoopState, loss: Any, skipped: bool) -> None:
        self.work = f"after step {state.args.iteration + 1}"

    def at_hand(self) -> list[RowAtHand]:
        """The rows of the batch that is computed now, or those among which it is."""
        is_any_of_step = self.read_together and self.work.startswith("in ")
        return self.of_step() if is_any_of_step else (self.batches or [[]])[-1]

    def named(self) -> str:
        """These rows as a person reads them, and "" where there are none."""
        rows = self.at_hand()
        return longest(rows) if rows else ""

    def of_step(self) -> list[RowAtHand]:
        """The rows of this step's micro-batches so far."""
        return [row for batch in self.batches for row in batch]


def longest(rows: Iterable[RowAtHand]) -> str:
    """The MOST_ROWS longest rows, as a person reads them."""
    in_order = sorted(rows, key=lambda row: -row[1])
    named = ", ".join(f"{where} ({tokens} tokens)" for where, tokens in in_order[:MOST_ROWS])
    more = len(in_order) - MOST_ROWS
    return (named or "not known") + (f" and {more} more" if more > 0 else "")


# --- steps in which nothing is learned --------------------------------------------------------------------------------


class SkippedSteps(StepWatcher):
    """Shows the steps that are skipped, and stops the run when nothing is learned any more."""

    def __init__(
        self,
        report: TrainingReport,
        batches: BatchesAtHand,
        most: int,
        wait_for_saves: Callable[[], None] = lambda: None,
        resumed_at: int = 0,
    ) -> None:
        """most is how many steps in a row may be skipped (--max_skipped_steps)."""
        self.report, self.batches, self.most, self.wait_for_saves = report, batches, most, wait_for_saves
        self.resumed_at = resumed_at
        self.in_a_row = 0
        self.last_applied = 0  # number of the last step that changed the weights, from 1
        self.lost = False  # the weights give a loss that isn't finite
        self.learned_batches = 0  # with a usable row, of this process, since the processes last asked each other
        self.steps_since = 0  # they did so
        self.first: int | None = None  # number of the first step here; a run that goes on had others before
        self.has_learned = False  # whether one of the steps here had a usable row
        self.saved: list[int] = []  # iterations

    def after_step(self, state: LoopState, loss: Any, skipped: bool) -> None:
        """Count a skipped step and say so.

        Raises:
            InputError: the last `most` steps were skipped or had no usable row, or training ends with such a loss.
        """
        number = state.args.iteration + 1
        self.report.empty_batches += self.batches.empty
        self.learned_batches += len(self.batches.batches) - self.batches.empty
        if skipped:
            self._count_skipped(number, state, float(loss))
        else:
            self.in_a_row, self.last_applied, self.lost = 0, number, False
        ends = number == state.args.train_iters
        if self.in_a_row >= self.most or (ends and self.lost):
            self._stop(number, state)
        self.steps_since += 1
        if self.first is None:
            self.first = number
        if ends or self.steps_since == self.most:
            self._stop_without_usable_rows(number, state)

    def _count_skipped(self, number: int, state: LoopState, loss: float) -> None:
        self.in_a_row += 1
        self.report.skipped_steps += 1
        self.lost = not math.isfinite(loss)
        if state.args.fp16 and not self.lost:
            scale = f"{state.optimizer.loss_scale:.12g}"
            warn(f"Step {number} skipped: fp16's gradients overflowed; the loss scale is {scale} now.")
            return
        what = f"the loss is {loss}" if self.lost else f"the gradient isn't finite, at a loss of {loss:.4f}"
        rows = [row for part in from_all_processes(self.batches.of_step()) for row in part]
        warn(f"Step {number} skipped: {what}. Its longest rows: {longest(rows)}.")

    def _stop(self, number: int, state: LoopState) -> None:
        what = "loss" if self.lost else "gradient"
        steps = "step was" if self.in_a_row == 1 else f"{self.in_a_row} steps were"
        precision = ", --bf16 in place of --fp16" if state.args.fp16 else ""
        raise InputError(
            f"stopped after step {number}: the last {steps} skipped, because the {what} is not finite. Needed is a lower "
            f"--lr than {state.args.lr:g}{precision}, a longer --warmup, or a smaller gradient_clipping in a "
            f"--deepspeed_config. {self._last_good_checkpoint(state.args)}"
        )

    def _last_good_checkpoint(self, args: argparse.Namespace) -> str:
        """A sentence that names it. A checkpoint of weights whose loss isn't finite is not the last one any more."""
        there = [self.resumed_at, *self.saved] if self.resumed_at else self.saved
        good = [iteration for iteration in there if not self.lost or iteration < self.last_applied]
        bad = [iteration for iteration in self.saved if iteration not in good]  # what the run goes on from stays
        self.wait_for_saves()
        last = done_by_first_process(lambda: _last_of(Path(args.save), good, bad)) if there else None
        return f"The last good checkpoint: {'none' if last is None else Path(args.save, str(last))}."

    def _stop_without_usable_rows(self, number: int, state: LoopState) -> None:
        learned = torch.tensor(float(self.learned_batches), device=state.args.device)
        torch.distributed.all_reduce(learned)
        steps, self.learned_batches, self.steps_since = self.steps_since, 0, 0
        self.has_learned = self.has_learned or bool(learned.item())
        # The last steps of a run may be few: what it learned before is not lost for them.
        learned_before = self.has_learned or (self.first or 1) > 1
        if not learned.item() and (steps == self.most or not learned_before):
            raise InputError(
                f"stopped after step {number}: no row of the last {steps} steps could be used, so nothing was learned. "
                "Needed are rows whose pictures can be opened; those that can't are named above."
            )

    def guarding(self, save_checkpoint: Save) -> Save:
        """save_checkpoint, which leaves out weights whose loss isn't finite."""

        def save(iteration: int, model: Any, optimizer: Any, scheduler: Any, args: argparse.Namespace) -> None:
            if self.lost:
                warn(f"Not saved at iteration {iteration}: the loss is not finite.")
                return
            save_checkpoint(iteration, model, optimizer, scheduler, args)
            self.saved.append(iteration)

        return save


def _last_of(folder: Path, good: Sequence[int], bad: Sequence[int]) -> int | None:
    """The last of the good iterations that folder still has (--save_total_limit); bad ones are no checkpoints from now on."""
    last = next((iteration for iteration in reversed(good) if (folder / str(iteration)).is_dir()), None)
    try:
        if bad:
            _set_aside(folder, bad[-1], last)
    except OSError as error:
        warn(f"{folder / str(bad[-1])}: can't be set aside ({error.strerror}); its weights have diverged.")
    return last


def _set_aside(folder: Path, bad: int, good: int | None) -> None:
    """Make good the last checkpoint of folder, or none, and rename the folder of bad to `<bad>-diverged`, or that and a number."""
    if good is None:
        (folder / "latest").unlink(missing_ok=True)
    else:
        make_latest(folder, good)
    aside = chain([f"{bad}-diverged"], (f"{bad}-diverged-{number}" for number in count(2)))
    (folder / str(bad)).rename(next(folder / name for name in aside if not (folder / name).exists()))


# --- what ends a run at once ------------------------------------------------------------------------------------------

_NO_MEMORY = re.compile("out of memory|can't allocate memory|Cannot allocate memory|not enough memory|ALLOC_FAILED")


@contextmanager
def told_in_a_sentence(batches: BatchesAtHand, options: Options) -> Iterator[None]:
    """Tell an error of torch's about memory or a worker process in a sentence with the rows that were at hand.

    Raises:
        RowError: in place of that error.
    """
    try:
        with dead_workers_named(batches.opened_by):
            yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(text):
            raise RowError(_no_memory(text, batches, options)) from None
        raise


def _no_memory(text: str, batches: BatchesAtHand, options: Options) -> str:
    found = f"out of memory {batches.work} ({(text.strip() or 'no more is given').splitlines()[0].rstrip('.')}). "
    if not batches.batches:
        return found + (
            "Needed is more memory, or less to hold: --use_qlora (the language model in 4 bits), or --bf16 or --fp16 in "
            "place of float32."
        )
    evaluates = batches.work.startswith("after ")
    smaller = (
        f"a smaller --eval-batch-size than {options.eval_batch_size or options.batch_size}"
        if evaluates
        else f"a smaller --batch-size than {options.batch_size} with more --gradient-accumulation-steps than "
        f"{options.gradient_accumulation_steps}, --checkpoint-activations"
    )
    return (
        f"{found}The longest rows of the batch: {longest(batches.at_hand())}. Needed is {smaller}, or a smaller "
        f"--max_source_length or --max_target_length."
    )
