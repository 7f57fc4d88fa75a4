"""Evaluation while training: the mean loss over all held-out rows, and which evaluation was the best."""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.distributed import from_first_process, is_first_process
from model.progress import say

BEST_FOLDER = "best"  # in the experiment's folder, beside the iterations
BEST_FILE = "evaluation.json"  # in the folder of the iteration: the two are there together, or neither is


def mean_over_tokens(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean loss of an evaluation, over supervised tokens rather than batches, as {"loss": scalar, "tokens": scalar}.

    Args:
        metrics: "loss_sum" and "tokens" of every batch of every process, float32[batches] each (`evaluation_step`).
    """
    tokens = metrics["tokens"].double().sum()
    return {"loss": metrics["loss_sum"].double().sum() / tokens.clamp(min=1), "tokens": tokens}


class BestEvaluation:
    """The best evaluation so far, by a measure of --keep_best; of two with equal answers, the one with the lower loss.

    Its checkpoint is kept in `<save>/<experiment>/best`, itself a checkpoint folder. After so many evaluations in a row that
    were no better, the run is to end.
    """

    def __init__(
        self, save_checkpoint: Callable[..., None] | None, by: str = "loss", patience: int | None = None
    ) -> None:
        """save_checkpoint is that of `model.checkpoints.save`, or of `CheckpointSaver`; None keeps no checkpoint."""
        self.save_checkpoint, self.by, self.patience = save_checkpoint, by, patience
        self.values: list[float] | None = None  # of the best, each the higher the better; None without one
        self.since = 0  # evaluations in a row that were no better
        self.resumed_at: int | None = None  # the iteration that a run goes on from
        self._is_known = False  # else the folder may have a better one
        self._found_at: int | None = None  # the iteration of that one

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to know."""
        return {"by": self.by, "values": self.values, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of another run's, if it looked for the best by the same measure."""
        if state.get("by") == self.by:
            self.values, self.since = state["values"], state["since"]

    @property
    def is_over(self) -> bool:
        """Whether as many evaluations in a row as --early_stopping allows were no better."""
        return self.patience is not None and self.since >= self.patience

    def consider(
        self, model: torch.nn.Module, args: argparse.Namespace, iteration: int, measures: Mapping[str, float]
    ) -> bool:
        """Save model if this evaluation is the best. Whether the run is to end. Every process calls this alike."""
        if not self._is_known:
            self._find(args)
        if iteration == self._found_at:  # made again where the run goes on: it is the one that was found
            return False
        values = self._values(measures)
        is_better = self._are_better(values)
        self.since = 0 if is_better else self.since + 1
        if is_better:
            self.values = values
            if self.save_checkpoint is not None:
                self._keep(model, args, iteration, measures)
        ends = self.is_over and args.iteration < args.train_iters
        if ends:
            if self.since == 1:
                say(f"The last evaluation was no better: the run ends (--early_stopping {self.patience}).")
            else:
                say(
                    f"The last {self.since} evaluations were no better: the run ends (--early_stopping {self.patience})."
                )
        return ends

    def _values(self, measures: Mapping[str, float]) -> list[float]:
        values = [] if self.by == "loss" else [measures.get(self.by, -math.inf)]
        return [*values, -measures["loss"]]

    def _are_better(self, values: Sequence[float]) -> bool:
        return all(map(math.isfinite, values)) and (self.values is None or list(values) > self.values)

    def _find(self, args: argparse.Namespace) -> None:
        """What the folder of a run that goes on has, if that is better: after the last step a run saves, and then evaluates."""
        self._is_known = True
        if self.resumed_at is None or not args.save:
            return
        kept = from_first_process(kept_measures(Path(args.save, BEST_FOLDER)))
        if kept.get("iteration", 0) <= self.resumed_at and "loss" in kept and self._are_better(self._values(kept)):
            self.values, self.since, self._found_at = self._values(kept), 0, int(kept["iteration"])

    def _keep(self, model: Any, args: argparse.Namespace, iteration: int, measures: Mapping[str, float]) -> None:
        assert self.save_checkpoint is not None
        folder = Path(args.save, BEST_FOLDER)
        best_args = copy.copy(args)
        best_args.save, best_args.save_total_limit = str(folder), 1
        text = json.dumps({"iteration": iteration, **measures}) + "\n"
        note = {BEST_FILE: lambda path: path.write_text(text, encoding="utf-8")} if is_first_process() else {}
        self.save_checkpoint(iteration, model, None, None, best_args, note)
        say(f"Best evaluation so far, kept in {folder}.")


def kept_measures(folder: Path) -> dict[str, float]:
    """The measures of the checkpoint kept in folder, and its iteration; nothing where there is none."""
    try:
        iteration = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        file = iteration / BEST_FILE if (iteration / BEST_FILE).is_file() else folder / BEST_FILE
    except (OSError, ValueError):
        file = folder / BEST_FILE  # where earlier versions had it
    try:
        return {name: float(value) for name, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # none yet, or one whose saving was interrupted
