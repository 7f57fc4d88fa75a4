"""What a run reports: each step and each evaluation becomes a `Record`, which goes wherever it is shown or kept.

SAT's loop → TrainingReport → Record → the terminal, TensorBoard, Weights & Biases
                                     → report.sinks: metrics.jsonl, loss.png (`model.training.run_folder`)
"""

import argparse
import math
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from model.distributed import has_gpu, is_first_process
from model.progress import warn
from model.training.records import EVALUATION, STEP, VALIDATION, Record
from model.training.terminal import Terminal

ANSWER_MEASURES = {"exact": "exact_match", "rouge_l": "rouge_l"}  # of --keep_best, by their names in a summary
SECONDS_BETWEEN_FLUSHES = 10.0  # of TensorBoard's file
SECONDS_BETWEEN_MEMORY = 1.0  # asking a GPU's allocator takes a tenth of a millisecond


class TrainingReport:
    """Makes records of what SAT hands over: `model.training.sat_loop` puts its methods in the place of SAT's own."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self.terminal = terminal or Terminal()
        self.sinks: list[Callable[[Record], None]] = []  # called on the first process, with every record
        self.learning_rate = 0.0
        self.evaluation_loss = math.inf  # of the last evaluation, on the first data-parallel rank
        self.evaluated_at = -1  # the step after which the last evaluation of this start was made, on every process
        self.split = VALIDATION  # which evaluation is made
        self.answers: dict[str, float] = {}  # the measures of its answers (`model.inference.scores.summary`)
        self.skipped_steps = 0  # since the start; `model.training.trouble` counts them
        self.empty_batches = 0  # micro-batches of this process in which no row could be used, since the start
        self.last_step: int | None = None  # where SAT is told another one than the person: the run is being stopped
        self.epoch: Callable[[], float | None] = lambda: None
        self.steps_done = 0
        self._counted = (0, 0)  # skipped steps and empty batches that are in a record
        self._memory: int | None = None
        self._memory_asked = -math.inf

    def state_dict(self) -> dict[str, Any]:
        """What the next line needs, and the last evaluation."""
        return {**self.terminal.state_dict(), "evaluation_loss": self.evaluation_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of another report."""
        self.terminal.load_state_dict(state)
        self.evaluation_loss = state["evaluation_loss"]

    def watch(self, scheduler: Any, optimizer: Any) -> None:
        """Note the learning rate that each step uses: SAT reports the one that the next step will use."""
        advance = scheduler.step

        def step(step_number: int | None = None) -> None:
            self.learning_rate = optimizer.param_groups[0]["lr"]
            advance(step_number)

        scheduler.step = step

    def step(
        self,
        summary_writer: Any,
        optimizer: Any,
        next_learning_rate: float,
        loss: float,
        milliseconds: float,
        step: int,
        last_step: int,
        args: argparse.Namespace,
        metrics: dict[str, float],
    ) -> None:
        """A step is done. SAT calls this every args.log_interval steps, with the mean loss and time of a step since.

        In a run of ours it is called after every step; `Terminal` knows which of them get a line.
        """
        ranks, seconds = args.world_size // args.model_parallel_size, milliseconds / 1000
        counted = (self.skipped_steps, self.empty_batches)
        skipped, empty = (now - before for now, before in zip(counted, self._counted, strict=True))
        self._counted, self.steps_done = counted, step
        record = Record(
            STEP, step, self._loss_of_usable_rows(loss, empty, args), time.time(), self.epoch(),
            lr=self.learning_rate,
            seconds=seconds,
            samples_per_second=args.batch_size * args.gradient_accumulation_steps * ranks / seconds,
            loss_scale=optimizer.loss_scale if getattr(args, "fp16", False) else None,
            memory_bytes=self._memory_bytes(),
            skipped=skipped,
            empty_batches=empty,
        )  # fmt: skip
        self.terminal.step(record, self.last_step or last_step, *counted)
        self._hand_on(record, summary_writer, args)

    @staticmethod
    def _loss_of_usable_rows(loss: float, empty: int, args: argparse.Namespace) -> float:
        """A step's loss without its empty micro-batches, of which SAT counts 0; NaN if all were empty.

        Of several processes only the first one's are known.
        """
        batches, is_alone = args.gradient_accumulation_steps, args.world_size == args.model_parallel_size
        if empty >= batches and (is_alone or loss == 0):
            return math.nan
        is_mean_of_batches = getattr(args, "loss_normalization", None) != "token"
        return loss * batches / (batches - empty) if 0 < empty < batches and is_alone and is_mean_of_batches else loss

    def evaluation(
        self,
        summary_writer: Any,
        prefix: str,
        loss: float,
        perplexity: float,
        step: int | None,
        args: argparse.Namespace,
        metrics: dict[str, Any],
    ) -> None:
        """An evaluation on held-out rows is done. SAT calls this on the first data-parallel rank.

        SAT's loss is the mean of this rank's batches; metrics has the mean over the tokens of all.
        """
        if "loss" in metrics:
            # No row could be used: that must not pass for the best evaluation.
            loss = float(metrics["loss"]) if metrics.get("tokens", 1) else math.nan
            perplexity = math.exp(min(loss, 20.0))  # NaN stays NaN
        self.evaluation_loss = loss
        self.terminal.evaluation(prefix, loss, perplexity, self.answers)
        record = Record(
            EVALUATION, self.steps_done if step is None else step, loss, time.time(), self.epoch(),
            perplexity=perplexity,
            split=self.split,
            answered=int(self.answers["rows"]) if self.answers else None,
            exact=self.answers.get("exact_match"),
            rouge_l=self.answers.get("rouge_l"),
            bleu=self.answers.get("bleu"),
        )  # fmt: skip
        self._hand_on(record, summary_writer, args)

    @property
    def measures(self) -> dict[str, float]:
        """Those of the last evaluation, on the first process: the loss, and with --eval_answers exact and rouge_l."""
        answers = {name: self.answers[key] for name, key in ANSWER_MEASURES.items()} if self.answers else {}
        return {"loss": self.evaluation_loss, **answers}

    def _hand_on(self, record: Record, summary_writer: Any, args: argparse.Namespace) -> None:
        if not is_first_process():
            return
        for sink in self.sinks:
            sink(record)
        # TensorBoard can't draw other numbers, and its writer prints a line for each.
        scalars = {name: value for name, value in scalars_of(record).items() if math.isfinite(value)}
        if summary_writer is not None:
            for name, value in scalars.items():
                summary_writer.add_scalar(name, value, record.step)
        if args.wandb:
            # Without commit: what comes later for the same step, such as its evaluation, would be refused then.
            sys.modules["wandb"].log(scalars, step=record.step)

    def _memory_bytes(self) -> int | None:
        """The most that was in use of this process's GPU; without one, what this process has now. Asked once a second."""
        if time.monotonic() - self._memory_asked >= SECONDS_BETWEEN_MEMORY:
            self._memory_asked = time.monotonic()
            if has_gpu():
                import torch

                self._memory = torch.cuda.max_memory_allocated()
            else:
                self._memory = psutil.Process().memory_info().rss
        return self._memory


def scalars_of(record: Record) -> dict[str, float]:
    """A record's numbers under the names that TensorBoard and Weights & Biases show them by: SAT's, where it has one."""
    if record.kind == STEP:
        named = {
            "Train/lr": record.lr,
            "Train/train_loss": record.loss,
            "Train/samples_per_second": record.samples_per_second,
            "Train/loss_scale": record.loss_scale,
        }
    else:
        kind = "valid" if record.split == VALIDATION else "test"
        named = {f"Train/{kind}_loss": record.loss, f"Train/{kind}_ppl": record.perplexity}
        named |= {f"Train/{kind}_{name}": getattr(record, name) for name in ("exact", "rouge_l", "bleu")}
    return {name: value for name, value in named.items() if value is not None}


class TensorBoardFile:
    """TensorBoard's file of one run, in the place of SAT's writer.

    That one writes from a thread. On a full disk the thread dies, and the training loop waits for it for ever. Here the
    first error is a line, and training goes on without the file.
    """

    def __init__(self, folder: Path, iteration: int = 0) -> None:
        """A new file in folder. iteration: the steps that are done already."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._flushed = Event, scalar, time.monotonic()
        self._file: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
            # When SAT's loop lets go of it, for another run may follow.
            self._closing = weakref.finalize(self, _close, self._file)
        except OSError as error:
            self._give_up(error)
        # It hides later steps of a run before.
        self._write(step=iteration, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def add_scalar(self, name: str, value: float, step: int | None) -> None:
        """Write one number of a step."""
        self._write(step=step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Force what was written to the disk."""
        self._flushed = time.monotonic()
        try:
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _write(self, **content: Any) -> None:
        try:
            if self._file is not None:
                self._file.write_event(self._event(wall_time=time.time(), **content))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._file is not None:
            self._closing.detach()  # it would fail again
        self._file = None
        warn(
            f"TensorBoard's file can't be written ({error}); training goes on without it. --summary-dir names its folder."
        )


def _close(file: Any) -> None:
    try:
        file.close()
    except OSError as error:
        warn(f"TensorBoard's file lacks its end ({error}).")
