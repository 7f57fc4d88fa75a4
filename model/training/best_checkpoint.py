"""Evaluation while training: the mean loss over all held-out rows, and the checkpoint that had the lowest."""

import argparse
import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from model.progress import say

BEST_FOLDER = "best"  # in the experiment's folder, beside the iterations
BEST_FILE = "evaluation.json"


def mean_over_tokens(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean loss of an evaluation, over supervised tokens rather than batches, as {"loss": scalar}.

    Args:
        metrics: "loss_sum" and "tokens" of every batch of every process, float[batches] each (`evaluation_step`).
    """
    return {"loss": metrics["loss_sum"].double().sum() / metrics["tokens"].double().sum().clamp(min=1)}


class BestCheckpoint:
    """Keeps the checkpoint with the lowest evaluation loss in `<save>/<experiment>/best`, itself a checkpoint folder."""

    def __init__(self, save_checkpoint: Callable[..., None]) -> None:
        self.save_checkpoint = save_checkpoint

    def consider(self, model: torch.nn.Module, args: argparse.Namespace, iteration: int, loss: float) -> None:
        """Save model if loss is lower than that of the best so far. Every process calls this with the same loss."""
        folder = Path(args.save, BEST_FOLDER)
        best = best_loss(folder)
        torch.distributed.barrier()  # all have read before one writes
        if not loss < best:
            return
        best_args = copy.copy(args)
        best_args.save = str(folder)
        self.save_checkpoint(iteration, model, None, None, best_args)
        if torch.distributed.get_rank() == 0:
            text = json.dumps({"iteration": iteration, "loss": loss})
            (folder / BEST_FILE).write_text(text + "\n", encoding="utf-8")
            for older in folder.glob("[0-9]*"):
                if older.name != str(iteration):
                    shutil.rmtree(older)
            say(f"Best evaluation so far, kept in {folder}.")
        torch.distributed.barrier()


def best_loss(folder: Path) -> float:
    """The evaluation loss of the checkpoint kept in folder; infinite when there is none."""
    try:
        return float(json.loads((folder / BEST_FILE).read_text(encoding="utf-8"))["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf  # none yet, or one whose saving was interrupted
