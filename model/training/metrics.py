"""What scrolls by while a model is trained: one line for every step, and one for every evaluation."""

import argparse
import math
import sys
import time
from typing import Any

from model.distributed import is_first_process
from model.progress import duration, say


class TrainingReport:
    """Prints what SAT hands over: `model.training.sat_loop` puts its methods in the place of SAT's own."""

    def __init__(self) -> None:
        self.learning_rate = 0.0
        self.evaluation_loss = math.inf  # of the last evaluation, on the first data-parallel rank
        self.started = time.monotonic()
        self.first_step: int | None = None
        self.last_step: int | None = None  # where SAT is told another one than the person: the run is being stopped

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
        """One line for a step. SAT calls this every --log-interval steps, with the mean time of a step since."""
        seconds, last_step = milliseconds / 1000, self.last_step or last_step
        ranks = args.world_size // args.model_parallel_size
        samples_per_second = args.batch_size * args.gradient_accumulation_steps * ranks / seconds
        line = f"step {step:>{len(str(last_step))}}/{last_step}  loss {loss:.4f}  lr {self.learning_rate:.2e}"
        line += f"  {samples_per_second:.1f} samples/s  {duration(self._seconds_left(step, last_step, seconds))} left"
        say(line)
        if summary_writer is not None:
            for name, value in (
                ("lr", self.learning_rate),
                ("train_loss", loss),
                ("samples_per_second", samples_per_second),
            ):
                summary_writer.add_scalar(f"Train/{name}", value, step)
        self._send_to_wandb(args, {"Train/lr": self.learning_rate, "Train/train_loss": loss}, step)

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
