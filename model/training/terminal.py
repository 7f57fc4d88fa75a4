"""What scrolls by while a model is trained.

    step  12/300  loss 1.9312  lr 1.00e-04  7.5 samples/s  38 s left

In a file or a pipe, a line comes every --log-interval steps. On a terminal one line renews itself with every step, and a
line is kept every half minute; --log-interval N on the command line keeps one every N steps there too, so that with 1 it
is a line a step.
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from model.chinese import in_ui_language
from model.cli.options import Options
from model.progress import duration, is_on_screen, renew, say
from model.training.records import Record, running_mean

RUNNING_STEPS = 20  # that the renewed line's loss is a mean of
SECONDS_BETWEEN_KEPT_LINES = 30.0
SECONDS_BETWEEN_RENEWALS = 0.1


class Terminal:
    """Prints steps and evaluations, on the first process."""

    def __init__(self, renews: bool = False, keeps_by_steps: bool = True) -> None:
        """renews: one line renews itself. keeps_by_steps: a line is kept every `lines_every` steps, not by the clock."""
        self.renews, self.keeps_by_steps = renews, keeps_by_steps
        self.lines_every = 1  # of the steps that are reported
        self.first_step: int | None = None
        self.started = time.monotonic()
        self._losses: list[float] = []  # of the last steps
        self._loss_sum = 0.0  # of the steps since the last line
        self._steps = 0  # how many these are
        self._seconds = 0.0  # of those of them that this process has taken, and not a run that it goes on with
        self._timed_steps = 0
        self._kept = self._renewed = -math.inf  # when

    @classmethod
    def of_run(cls, options: Options) -> "Terminal":
        """As a command line asks for, and as standard output is."""
        asked = "log_interval" in options.user_set
        on_screen = is_on_screen(sys.stdout)
        return cls(renews=on_screen and (not asked or options.log_interval > 1), keeps_by_steps=asked or not on_screen)

    def state_dict(self) -> dict[str, Any]:
        """What the next line needs."""
        return {"loss_sum": self._loss_sum, "summed_steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of another run's."""
        self._loss_sum, self._steps = state["loss_sum"], state["summed_steps"]

    def step(self, record: Record, last_step: int, skipped: int, empty_batches: int) -> None:
        """Show a step.

        Args:
            skipped, empty_batches: since the start.
        """
        assert record.seconds is not None
        assert record.samples_per_second is not None
        now = time.monotonic()
        if not record.has_no_rows:
            self._losses = [*self._losses[1 - RUNNING_STEPS :], record.loss]
            self._loss_sum, self._steps = self._loss_sum + record.loss, self._steps + 1
        self._seconds, self._timed_steps = self._seconds + record.seconds, self._timed_steps + 1
        seconds = self._seconds / self._timed_steps
        left = self._seconds_left(record.step, last_step, seconds, now)
        samples_per_second = record.samples_per_second * record.seconds / seconds
        trouble = _trouble(record.loss_scale, skipped, empty_batches)
        if self._is_kept(record.step, last_step, now):
            mean = self._loss_sum / self._steps if self._steps else None
            say(_line(record, last_step, mean, samples_per_second, left) + trouble)
            self._loss_sum, self._steps, self._seconds, self._timed_steps = 0.0, 0, 0.0, 0
            self._kept = self._renewed = now
        elif self.renews and now - self._renewed >= SECONDS_BETWEEN_RENEWALS:
            mean = running_mean(self._losses) if self._losses else None
            line = _line(record, last_step, mean, samples_per_second, left)
            memory = f"  {record.memory_bytes / 2**30:.1f} GiB" if record.memory_bytes else ""
            renew(in_ui_language(line, sys.stdout) + memory + trouble)
            self._renewed = now

    def _is_kept(self, step: int, last_step: int, now: float) -> bool:
        if self.keeps_by_steps:
            return step % self.lines_every == 0
        if self._kept == -math.inf:
            self._kept = now  # the first line comes when the run is at its speed
        return step >= last_step or now - self._kept >= SECONDS_BETWEEN_KEPT_LINES

    def _seconds_left(self, step: int, last_step: int, seconds_per_step: float, now: float) -> float:
        """From the mean of all steps but the first, which is slower than any other."""
        if self.first_step is None:
            self.first_step, self.started = step, now
            return seconds_per_step * (last_step - step)
        return (now - self.started) / (step - self.first_step) * (last_step - step)

    @staticmethod
    def evaluation(prefix: str, loss: float, perplexity: float, answers: Mapping[str, float]) -> None:
        """Show an evaluation, and the measures of its answers where there are any."""
        split = "test" if prefix.endswith("test data") else "validation"  # so SAT calls the last one of --test-data
        say(f"{prefix}: {split} loss {loss:.4f}, perplexity {perplexity:.2f}")
        if answers:
            say(
                f"{prefix}: {answers['rows']:.0f} rows answered, exact match {answers['exact_match']:.1%}, "
                f"ROUGE-L {answers['rouge_l']:.3f}, BLEU {answers['bleu']:.1f}"
            )


def _line(record: Record, last_step: int, loss: float | None, samples_per_second: float, seconds_left: float) -> str:
    return (
        f"step {record.step:>{len(str(last_step))}}/{last_step}  loss {'none' if loss is None else f'{loss:.4f}'}  lr {record.lr:.2e}"
        f"  {speed(samples_per_second)}  {duration(seconds_left)} left"
    )


def speed(samples_per_second: float) -> str:
    """How fast it goes; in seconds a sample where samples a second would be 0.0."""
    if samples_per_second >= 0.1:
        return f"{samples_per_second:.1f} samples/s"
    return f"{1 / samples_per_second:.1f} s/sample" if samples_per_second > 0 else "no speed yet"


def _trouble(loss_scale: float | None, skipped: int, empty_batches: int) -> str:
    """The end of a step's line: nothing, unless it is fp16 or something could not be used so far."""
    scale = "" if loss_scale is None else f"  loss scale {loss_scale:.12g}"
    return (
        scale
        + (f"  {skipped} skipped" if skipped else "")
        + (f"  {empty_batches} without a usable row" if empty_batches else "")
    )
