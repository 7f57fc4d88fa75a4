"""When a run saves, and what of it happens beside the training.

    each epoch with --epochs, else every five minutes, or as --save-interval says       SAT's loop, `TimedSaves`
    before --exit-interval ends the run, and before the evaluation after the last step  `TimedSaves`
    after the last step                                                                 SAT's loop

`CheckpointSaver` stands between them and `save_checkpoint`. It saves no iteration twice. The files are written at once,
which takes milliseconds for an adapter; a thread then waits for the disk, and gives the checkpoint its name. There is one
such thread at most, on the first process. Its error ends the run when the next checkpoint comes, or at the end. The thread
asks nothing of torch and nothing of other processes, so that it can't come between their messages.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from model.checkpoints.resume import Resumed
from model.checkpoints.save import NO_FILES, on_every_process
from model.cli.options import Options
from model.distributed import is_first_process, store_of_run
from model.training.sat_loop import Hooks, LoopState, StepWatcher, save_beside_earlier_runs

SECONDS_BETWEEN_SAVES = 300.0


class CheckpointSaver:
    """Saves a run's checkpoints. As a context manager, it waits for the last one when its block ends."""

    def __init__(self, save_checkpoint: Callable[..., None], resumed: Resumed | None = None) -> None:
        """save_checkpoint is that of `model.checkpoints.save`. A run that is resumed has saved where it goes on from."""
        self.save_checkpoint = save_checkpoint
        self.saved: dict[str, int] = {}  # the last iteration, by folder
        if resumed is not None:
            self.saved[str(resumed.checkpoint.folder)] = resumed.record.iteration
        self.folder: Path | None = None
        self.thread: Thread | None = None
        self.problem: Exception | None = None  # of the thread

    def begin(self, args: argparse.Namespace, model: Any) -> None:
        """Make the run's own folder. SAT calls this on every process before training (its `init_function`)."""
        save_beside_earlier_runs(args, model)
        self.folder = Path(args.save) if args.save else None

    def save(
        self,
        iteration: int,
        model: torch.nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        args: argparse.Namespace,
        extra_files: Mapping[str, Callable[[Path], Any]] = NO_FILES,
    ) -> None:
        """Save a checkpoint as `save_checkpoint` does, but for the wait. Every process calls this.

        Raises:
            InputError: this checkpoint can't be written, or the one before couldn't be. Every process raises it.
        """
        if self.saved.get(args.save) == iteration:
            return
        on_every_process(self.wait)
        self.save_checkpoint(iteration, model, optimizer, lr_scheduler, args, extra_files, publish=self._publish)
        self.saved[args.save] = iteration

    def _publish(self, publish: Callable[[], None]) -> None:
        def noting_its_error() -> None:
            try:
                publish()
            except Exception as error:
                self.problem = error

        if is_first_process():  # elsewhere there is nothing to do
            self.thread = Thread(target=noting_its_error)
            self.thread.start()

    def finish(self, seconds: float) -> None:
        """Wait so long at most for the thread, from any other one, before this process is ended."""
        if self.thread is not None:
            self.thread.join(seconds)

    def wait(self) -> None:
        """Wait for the thread.

        Raises:
            InputError: it could not write the checkpoint.
        """
        if self.thread is not None:
            self.thread.join()
        self.thread, problem, self.problem = None, self.problem, None
        if problem is not None:
            raise problem

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the last checkpoint; remove the run's folder if nothing has come into it.

        Raises:
            InputError: it could not be written. After an error the other processes may be gone, and aren't asked.
        """
        try:
            if kind is None and self.saved:
                on_every_process(self.wait)
            else:
                self.wait()
        finally:
            if (
                self.folder is not None
                and is_first_process()
                and self.folder.is_dir()
                and not any(self.folder.iterdir())
            ):
                os.rmdir(self.folder)


class TimedSaves(StepWatcher):
    """Saves when so many seconds have passed since the run, or the last such save, began; and before --exit-interval.

    With several processes the first one's clock decides, for clocks differ. It writes into a store that all save before the
    next step; they look there before each. A step ends with an exchange that all take part in, so that all find it.
    """

    def __init__(self, hooks: Hooks, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """hooks.save_checkpoint saves. seconds is None where SAT's loop counts steps or epochs."""
        self.hooks, self.seconds, self.clock = hooks, seconds, clock
        self.last: float | None = None
        self.state: LoopState | None = None
        self.store: Any = None  # that several processes share
        hooks.before_exit = hooks.before_last_evaluation = self.save_what_is_there

    @classmethod
    def of_run(cls, hooks: Hooks, options: Options) -> "TimedSaves":
        """With the five minutes, where nothing else is asked for. All weights take gigabytes: they are left to SAT."""
        by_steps = options.epochs or options.save_full_model or "save_interval" in options.user_set
        return cls(hooks, None if by_steps else SECONDS_BETWEEN_SAVES)

    def before_step(self, state: LoopState) -> None:
        """Save what is there when it is time."""
        if self.seconds is None or not state.args.save:
            return
        now = self.clock()
        if self.last is None:
            self.last = now
            self.store = store_of_run() if torch.distributed.get_world_size() > 1 else None
        if self._all_save(state.args.iteration, now - self.last >= self.seconds):
            self.hooks.save_checkpoint(state.args.iteration, *state[:3], state.args)
            self.last = self.clock()

    def _all_save(self, step: int, is_time: bool) -> bool:
        """Whether all processes save before this step."""
        if self.store is None:
            return is_time
        saves = bool(self.store.check([f"save before {step}"]))
        if is_first_process() and is_time and not saves:
            self.store.set(f"save before {step + 1}", "")
            self.store.check([f"save before {step + 1}"])  # the answer tells that it is there
        return saves

    def after_step(self, state: LoopState, loss: Any, skipped: bool) -> None:
        """Remember what there is to save."""
        self.state = state

    def save_what_is_there(self) -> None:
        """Save, for SAT's loop is about to leave, or to evaluate for long after the last step."""
        if self.state is not None and self.state.args.save:
            self.hooks.save_checkpoint(self.state.args.iteration, *self.state[:3], self.state.args)
