"""What scrolls by while a model is trained: one line for every step, and one for every evaluation."""

import argparse
import atexit
import math
import sys
import time
from pathlib import Path
from typing import Any

from model.distributed import is_first_process
from model.progress import duration, say, warn

SECONDS_BETWEEN_FLUSHES = 10.0  # of TensorBoard's file


class TrainingReport:
    """Prints what SAT hands over: `model.training.sat_loop` puts its methods in the place of SAT's own."""

    def __init__(self) -> None:
        self.learning_rate = 0.0
        self.evaluation_loss = math.inf  # of the last evaluation, on the first data-parallel rank
        self.started = time.monotonic()
        self.first_step: int | None = None
        self.loss_sum: Any = 0.0  # of the steps since the last line, scalar float32
        self.summed_steps = 0  # how many these are
        self.timed_steps = 0  # those of them that this process has taken, and not a run that it goes on with
        self.skipped_steps = 0  # since the start; `model.training.trouble` counts them
        self.empty_batches = 0  # micro-batches of this process in which no row could be used, since the start

        self.last_step: int | None = None  # where SAT is told another one than the person: the run is being stopped

    def add(self, loss: Any) -> None:
        """Note the loss of a step, scalar float32, for the next line."""
        self.loss_sum = self.loss_sum + loss.detach().float()
        self.summed_steps, self.timed_steps = self.summed_steps + 1, self.timed_steps + 1

    def state_dict(self) -> dict[str, Any]:
        """What the next line needs, and the last evaluation."""
        return {
            "loss_sum": float(self.loss_sum),
            "summed_steps": self.summed_steps,
            "evaluation_loss": self.evaluation_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of another report."""
        self.loss_sum, self.summed_steps = state["loss_sum"], state["summed_steps"]
        self.evaluation_loss = state["evaluation_loss"]

    def watch(self, scheduler: Any, optimizer: Any) -> None:
        """Note the learning rate that each step uses: SAT reports the one that the next step will use."""
        advance = scheduler.step

        def step(step_number: int | None = None) -> None:
            self.learning_rate = optimizer.param_groups[0]["lr"]
            advance(step_number)

        scheduler.step = step
        self.started = time.monotonic()

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
        """One line for a step. SAT calls this every --log-interval steps, with the mean loss and time of a step since.

        SAT knows nothing of the steps before a run went on; where those count, the loss is the one summed up here.
        """
        seconds, last_step = milliseconds / 1000, self.last_step or last_step
        if self.timed_steps < self.summed_steps:
            loss = float(self.loss_sum) / self.summed_steps
            seconds *= args.log_interval / self.timed_steps
        self.loss_sum, self.summed_steps, self.timed_steps = 0.0, 0, 0
        ranks = args.world_size // args.model_parallel_size
        samples_per_second = args.batch_size * args.gradient_accumulation_steps * ranks / seconds
        line = f"step {step:>{len(str(last_step))}}/{last_step}  loss {loss:.4f}  lr {self.learning_rate:.2e}"
        line += f"  {samples_per_second:.1f} samples/s  {duration(self._seconds_left(step, last_step, seconds))} left"
        loss_scale = optimizer.loss_scale if getattr(args, "fp16", False) else None
        say(line + self._trouble(loss_scale))
        if summary_writer is not None:
            for name, value in (
                ("lr", self.learning_rate),
                ("train_loss", loss),
                ("samples_per_second", samples_per_second),
            ):
                if math.isfinite(value):  # TensorBoard can't draw others, and its writer prints a line for each
                    summary_writer.add_scalar(f"Train/{name}", value, step)
        self._send_to_wandb(args, {"Train/lr": self.learning_rate, "Train/train_loss": loss}, step)

    def _trouble(self, loss_scale: float | None) -> str:
        """The end of a step's line: nothing, unless it is fp16 or something could not be used so far."""
        scale = "" if loss_scale is None else f"  loss scale {loss_scale:.12g}"
        skipped = f"  {self.skipped_steps} skipped" if self.skipped_steps else ""
        return scale + skipped + (f"  {self.empty_batches} without a usable row" if self.empty_batches else "")

    def _seconds_left(self, step: int, last_step: int, seconds_per_step: float) -> float:
        """From the mean of all steps but the first, which is slower than any other."""
        now = time.monotonic()
        if self.first_step is None:
            self.first_step, self.started = step, now
            return seconds_per_step * (last_step - step)
        return (now - self.started) / (step - self.first_step) * (last_step - step)

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
        """One line for an evaluation on held-out rows. SAT calls this on the first data-parallel rank.

        SAT's loss is the mean of this rank's batches; metrics has the mean over the tokens of all.
        """
        if "loss" in metrics:
            loss = float(metrics["loss"])
            perplexity = math.exp(min(20.0, loss))
        self.evaluation_loss = loss
        say(f"{prefix}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")
        if summary_writer is not None:
            summary_writer.add_scalar("Train/valid_loss", loss, step)
            summary_writer.add_scalar("Train/valid_ppl", perplexity, step)
        self._send_to_wandb(args, {"Train/valid_loss": loss, "Train/valid_ppl": perplexity}, step)

    @staticmethod
    def _send_to_wandb(args: argparse.Namespace, values: dict[str, float], step: int | None) -> None:
        if args.wandb and is_first_process():
            sys.modules["wandb"].log(values, step=step, commit=True)


class TensorBoardFile:
    """TensorBoard's file of one run, in the place of SAT's writer.

    That one writes from a thread. On a full disk the thread dies, and the training loop waits for it for ever. Here the
    first error is a line, and training goes on without the file.
    """

    def __init__(self, name: str, base: str = "..", iteration: int = 0) -> None:
        """The file goes into base/runs/name, as SAT's does. iteration: the steps that are done already."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar, self._flushed = Event, scalar, time.monotonic()
        self._file: Any = None
        folder = Path(base, "runs", name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
        except OSError as error:
            self._give_up(error)
        self._write(
            step=iteration, session_log=SessionLog(status=SessionLog.START)
        )  # hides later steps of a run before
        self.flush()
        atexit.register(self.flush)

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
        self._file = None
        warn(
            f"TensorBoard's file can't be written ({error}); training goes on without it. --summary-dir names its folder."
        )
