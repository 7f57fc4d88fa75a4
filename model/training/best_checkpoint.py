"""Evaluation while training: the mean loss over all held-out rows, and the checkpoint that had the lowest."""

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from model.distributed import from_first_process, is_first_process
from model.progress import say

BEST_FOLDER = "best"  # in the experiment's folder, beside the iterations
BEST_FILE = "evaluation.json"  # in the folder of the iteration: the two are there together, or neither is


def mean_over_tokens(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean loss of an evaluation, over supervised tokens rather than batches, as {"loss": scalar}.

    Args:
        metrics: "loss_sum" and "tokens" of every batch of every process, float[batches] each (`evaluation_step`).
    """
    return {"loss": metrics["loss_sum"].double().sum() / metrics["tokens"].double().sum().clamp(min=1)}


class BestCheckpoint:
    """Keeps the checkpoint with the lowest evaluation loss in `<save>/<experiment>/best`, itself a checkpoint folder."""

    def __init__(self, save_checkpoint: Callable[..., None]) -> None:
        """save_checkpoint is that of `model.checkpoints.weights`, or of `CheckpointSaver`."""
        self.save_checkpoint = save_checkpoint
        self.best: float | None = None  # not read yet

    def consider(self, model: torch.nn.Module, args: argparse.Namespace, iteration: int, loss: float) -> None:
        """Save model if loss is lower than that of the best so far. Every process calls this with the same loss."""
        folder = Path(args.save, BEST_FOLDER)
        if self.best is None:
            self.best = from_first_process(best_loss(folder))
        if not loss < self.best:
            return
        best_args = copy.copy(args)
        best_args.save, best_args.save_total_limit = str(folder), 1
        text = json.dumps({"iteration": iteration, "loss": loss}) + "\n"
        note = {BEST_FILE: lambda path: path.write_text(text, encoding="utf-8")} if is_first_process() else {}
        self.save_checkpoint(iteration, model, None, None, best_args, note)
        self.best = loss
        say(f"Best evaluation so far, kept in {folder}.")


def best_loss(folder: Path) -> float:
    """The evaluation loss of the checkpoint kept in folder; infinite when there is none."""
    try:
        iteration = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        file = iteration / BEST_FILE if (iteration / BEST_FILE).is_file() else folder / BEST_FILE
    except (OSError, ValueError):
        file = folder / BEST_FILE  # where earlier versions had it
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf  # none yet, or one whose saving was interrupted
