"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP end a run after the step in hand: it is saved, and a line says how to go on.

So does --exit-interval, with status 0.

    with StopAtSignal(hooks) as stop:
        …                                          # SAT's loop; its own final save saves the run
        stop.leave()                               # with status 128 + the signal's number, if one came

What a signal does depends on what the run is at:

    before the first step         it leaves at once, and says that nothing new was saved
    a step, saving                this is finished; then the run is saved
    evaluating                    the evaluation is given up, with several processes after the batch in hand; then the
                                  run is saved
    evaluating after the run      it leaves at once: the run has been saved

A second signal leaves at once in any case.

**Several processes** must take the same number of steps, or one waits for the others for ever; and a launcher may pass a
signal on to all of them or to one. The process that got it writes the number of the step that it is about to take into a
store that all share, and every process looks there after each step. No process can be further: a step ends with an exchange
that all take part in, so whoever finishes that step finds the number. So it is with the batches of an evaluation.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from model.chinese import in_ui_language
from model.distributed import is_first_process, store_of_run
from model.errors import STATUS_OF_A_SIGNAL, Leaving, end_now, handling, ignore_signals_from_now_on
from model.progress import say
from model.training.sat_loop import EvaluationGivenUp, Hooks, LoopState, StepWatcher

# Launchers pass on what the terminal has sent to their processes already (deepspeed's runner: SIGINT, then SIGTERM).
SECONDS_OF_ONE_SIGNAL = 2.0
STOPPING = "this step is finished, then the run stops. A second signal leaves at once."
BEFORE_ALL = "stopped before the first step; nothing new was saved."


class StopAtSignal(StepWatcher):
    """Ends SAT's loop after the step in which a signal came, to this process or another one, or at --exit-interval."""

    def __init__(self, hooks: Hooks) -> None:
        """Put this into SAT's loop by its hooks."""
        hooks.step_watchers.append(self)
        hooks.while_evaluating, hooks.exit = self.while_evaluating, self.stop_at_interval
        self.report = hooks.report
        self.number = 0  # of the signal that came to this process, or that the processes have agreed on
        self.is_at_interval = False  # --exit-interval has ended the loop before its last step
        self._came: float | None = None  # when this process got one, in seconds
        self._launched = "WORLD_SIZE" in os.environ
        self._args: argparse.Namespace | None = None  # SAT's, once the first step has begun
        self._evaluating = ""  # "val", or "test" after the run
        self._batch = 0  # of that evaluation, from 1
        self._processes = 1
        self._store: Any = None
        self._leaving = Leaving()
        self._handling: AbstractContextManager[None] = handling(self._receive, self._may_wait)

    def __enter__(self) -> "StopAtSignal":
        self._handling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._handling.__exit__(kind, error, where)
        self._leaving.end()
        if self._leaving.status:
            raise SystemExit(self._leaving.status) from None

    # --- what SAT's loop tells

    def before_step(self, state: LoopState) -> None:
        """Write down where to stop, if this process was asked to."""
        if self._args is None:
            self._begin(state.args)
        self._write_the_end(state.args.iteration + 1, 0)

    def after_step(self, state: LoopState, loss: Any, skipped: bool) -> None:
        """Stop here, if a process has written that."""
        if self._is_the_end(state.args.iteration + 1, 0):
            self._end_the_loop(state.args)

    def watching(self, evaluation_step: Callable[..., Any]) -> Callable[..., Any]:
        """evaluation_step, between whose batches the processes look whether one of them was asked to stop."""

        def step(*inputs: Any) -> Any:
            if self._evaluating == "val" and self._args is not None:
                if self._processes == 1 and self.number:
                    raise EvaluationGivenUp  # what the signal raised went no further than a callback of Python's
                if self._is_the_end(self._args.iteration, self._batch):
                    self._end_the_loop(self._args)
                    raise EvaluationGivenUp
                self._batch += 1
                self._write_the_end(self._args.iteration, self._batch)
            return evaluation_step(*inputs)

        return step

    def _write_the_end(self, step: int, batch: int) -> None:
        """Several processes: if this one was asked to stop, all do so after this step and this batch of its evaluation."""
        if self._store is not None and self.number:
            self._store.set("stop", f"{step} {batch} {self.number}")
            self._store.check(["stop"])  # the answer tells that it is there

    def _is_the_end(self, step: int, batch: int) -> bool:
        """Whether a process has written that all stop here."""
        if self._store is None or not self._store.check(["stop"]):
            return False
        last_step, last_batch, number = map(int, self._store.get("stop").split())
        if (last_step, last_batch) > (step, batch):
            return False
        self.number = number
        return True

    @contextmanager
    def while_evaluating(self, split: str) -> Iterator[None]:
        """What a signal does inside the block is what it does while this split ("val" or "test") is evaluated."""
        self._evaluating, self._batch = split, 0
        told = sys.unraisablehook
        sys.unraisablehook = lambda error: None if error.exc_type is EvaluationGivenUp else told(error)
        try:
            yield
        finally:
            self._evaluating, sys.unraisablehook = "", told

    def _begin(self, args: argparse.Namespace) -> None:
        import torch

        self._processes = torch.distributed.get_world_size()
        if self._processes > 1:
            self._store = store_of_run()
        self._args = args

    def _end_the_loop(self, args: argparse.Namespace) -> None:
        """SAT's loop ends after the step in hand, evaluates no more, and saves."""
        self.report.last_step = args.train_iters
        args.train_iters = args.iteration
        args.do_valid = args.do_test = False

    def stop_at_interval(self) -> None:
        """--exit-interval ends the run here as a signal does, unless all steps are done."""
        args = self._args
        if args is not None and args.iteration < args.train_iters:
            self.is_at_interval = True
            self._end_the_loop(args)

    def is_stopping(self) -> bool:
        """Whether --exit-interval, or a signal to this process or another one that has said so, has asked the run to stop."""
        return bool(self.number) or self.is_at_interval

    # --- what the system tells

    def _may_wait(self) -> bool:
        """Whether a signal waits for the step in hand; else the run leaves at once."""
        return self._args is not None and self._evaluating != "test"

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            if not self._launched or time.monotonic() - self._came > SECONDS_OF_ONE_SIGNAL:
                end_now(number)
            return
        self._came = time.monotonic()
        if self.number:  # another process was faster
            return
        self.number = number
        waits = self._may_wait()
        if is_first_process() and (waits or self._args is None):
            # The terminal may have gone; and printing isn't allowed where a signal interrupts it.
            with suppress(OSError):
                said = f"{signal.Signals(number).name}: {STOPPING if waits else BEFORE_ALL}"
                os.write(sys.stderr.fileno(), f"{in_ui_language(said, sys.stderr)}\n".encode())
        if not waits:
            self._leaving.begin(number)
        if self._processes == 1 and self._args is not None:
            self._end_the_loop(self._args)
            if self._evaluating:
                raise EvaluationGivenUp

    # --- afterwards

    def leave(self) -> None:
        """Leave, if a signal came, or --exit-interval; a line says where the run was stopped, and how to go on.

        Raises:
            SystemExit: with status 128 + the signal's number, or 0.
        """
        if not self.is_stopping() or self._args is None:
            return
        args = self._args
        name = signal.Signals(self.number).name if self.number else f"--exit-interval {args.exit_interval}"
        stopped = f"{name}: stopped after step {args.iteration} of {self.report.last_step or args.train_iters}."
        if args.save:
            say(f"{stopped} To go on: --resume {args.save}")
        else:
            say(f"{stopped} Nothing was saved (--save none).")
        ignore_signals_from_now_on()
        sys.exit(STATUS_OF_A_SIGNAL + self.number if self.number else 0)
