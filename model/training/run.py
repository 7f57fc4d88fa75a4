"""What stands around a run's training: whatever happens to it, it is saved, shown, told in a sentence, and can go on.

    with guarded_run(line, inputs) as run:
        args = …                          # SAT's, and with them the process group
        run.watchdog.start(…)
        model, args = …
        run.begin(model, args)
        …                                 # SAT's loop

Each part has a module of its own, which says what it does and what it asks of SAT's loop.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from model.checkpoints.metadata import VISION
from model.checkpoints.running import Running
from model.checkpoints.save import save_checkpoint
from model.checkpoints.weights import load_checkpoint
from model.cli.preflight import Inputs, samples_per_step
from model.cli.resuming import CommandLine
from model.distributed import from_first_process, has_gpu, launcher_environment
from model.training.answers import RowAnswers
from model.training.best_checkpoint import BestEvaluation
from model.training.deepspeed_config import zero_stage
from model.training.dry_run import batch_of, longest_of_data
from model.training.feature_cache import FeatureCache
from model.training.find_lr import RateSweep
from model.training.loaders import make_loaders
from model.training.memory import Setup, fit_into_memory
from model.training.metrics import TrainingReport
from model.training.run_folder import RunFolder
from model.training.run_state import RunState
from model.training.sat_loop import EvaluationGivenUp, Hooks, LoopState, adapted
from model.training.saving import CheckpointSaver, TimedSaves
from model.training.signals import StopAtSignal
from model.training.terminal import Terminal
from model.training.trouble import BatchesAtHand, told_in_a_sentence, watched
from model.training.watchdog import Watchdog

A_WEEK = 7 * 24 * 3600  # seconds, for --check_seconds inf


@dataclass(frozen=True)
class Run:
    """The parts of a run that its training has to do with."""

    line: CommandLine
    inputs: Inputs
    hooks: Hooks
    state: RunState
    saver: CheckpointSaver
    batches: BatchesAtHand
    stop: StopAtSignal
    folder: RunFolder
    watchdog: Watchdog
    answers: RowAnswers
    sweep: RateSweep | None  # --find_lr

    def begin(self, model: Any, args: argparse.Namespace) -> None:
        """Hand SAT's loop what depends on the model: loaders, the cache of image features, the state to go on with.

        Raises:
            InputError: the data files or the feature cache can't be read.
        """
        options, selection, hooks = self.line.options, self.inputs.selection, self.hooks
        features = FeatureCache.of_run(model, args, samples_per_step(options), options.feature_cache)
        # The others count rows that it has left out, too; on another machine a picture may be another one.
        left_out, held_out, steps = from_first_process((selection.left_out, selection.held_out, self.inputs.steps))
        selection.left_out, selection.held_out = left_out, held_out
        self.state.watch(hooks, self.line, self.inputs)
        hooks.make_loaders = partial(
            make_loaders, selection=selection, features=features, batches=self.batches,
            steps=(steps, self.line.steps_done) if self.line.resumed else None,
        )  # fmt: skip
        hooks.get_model = partial(self._complete, model, args, features)
        if options.keep_best or options.early_stopping:
            save = self.saver.save if options.keep_best else None
            self.state.watch_for_the_best(BestEvaluation(save, options.keep_best or "loss", options.early_stopping))
        if self.sweep is not None:
            return
        hooks.before_first_step = lambda state, train, valid: self.answers.begin(state.model, args, train, valid)
        hooks.answers = self.answers.at_evaluation
        hooks.after_last_step = self._finish

    def _finish(self, state: LoopState) -> None:
        """All steps are done: answer the rows again, unless the run was asked to stop."""
        if self.stop.is_stopping():
            return
        with suppress(EvaluationGivenUp), self.hooks.while_evaluating("val"):
            self.answers.finish(state.model, state.args)

    def _complete(self, model: Any, args: argparse.Namespace, features: FeatureCache) -> Any:
        """The whole model. All pictures have been looked at, so the vision part makes room for the language model first."""
        is_tuned = any(name.startswith(VISION) for name in model.tuned_names)
        features.offload_vision(is_saved=bool(self.state.saves_every_weight(args) or args.load or is_tuned))
        model.finish_loading()
        model.freeze()
        setup = Setup.of_run(args, self.inputs.checkpoint.config, zero_stage(args.deepspeed_config), has_gpu())
        options, rows = self.line.options, args.batch_size
        batch = partial(batch_of, options, rows, rows if features.vision_is_needed else 0)
        at_most = batch(rows * [args.max_source_length + args.max_target_length], args.max_target_length)
        fit_into_memory(model, setup, at_most, lambda: batch(*longest_of_data(options, self.inputs, rows)))
        return model


@contextmanager
def guarded_run(line: CommandLine, inputs: Inputs) -> Iterator[Run]:
    """Train in the block. SAT's loop is adapted inside, and as it was before afterwards.

    Raises:
        InputError: what was met can be told in a sentence.
        SystemExit: a signal came, or it was time (--exit-interval); the run has been saved.
    """
    options, saver = line.options, CheckpointSaver(save_checkpoint, line.resumed)
    state = RunState(TrainingReport(Terminal.of_run(options)), line.resumed, saver.begin)
    hooks = Hooks(load_checkpoint, state.saving(saver.save), state.report, options.auto_warmup_steps)
    hooks.step_watchers.append(TimedSaves.of_run(hooks, options))
    batches = watched(hooks, options, saver.wait, line.steps_done)
    # Pictures are checked before the processes meet, on each machine for so long at most, and in no time where they are known.
    hooks.longest_wait += timedelta(seconds=min(options.check_seconds, A_WEEK))
    stop = StopAtSignal(hooks)
    sweep = RateSweep(options, hooks) if options.find_lr else None
    answers = RowAnswers(options, inputs.tokenizer, line.resumed is not None, inputs.selection.also_trained_on)
    with Running() as running:
        folder = RunFolder(line, inputs, state, hooks, stop.is_stopping, running)
        with stop, launcher_environment(), adapted(hooks):
            watchdog = Watchdog.of_run(options, batches, saver, stop)
            with watchdog, saver, folder, told_in_a_sentence(batches, options):
                yield Run(line, inputs, hooks, state, saver, batches, stop, folder, watchdog, answers, sweep)
            stop.leave()
        if sweep is not None:
            sweep.tell()
        folder.tell_what_was_learned()
        folder.wait_for_picture()
        folder.note_end()
