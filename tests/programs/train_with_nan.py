"""Runs of finetune_visualglm.py with a NaN in one micro-batch: what was skipped, and whether weights are finite.

train_with_nan.py WHAT:MICRO_BATCH[:FLAG…][,…] FLAG …

A run for each part between commas. WHAT is loss, gradient or nothing; MICRO_BATCH counts from 1. Printed for each, as JSON:
the rows of every step, the numbers of the skipped steps, and whether all weights were finite at the end.
"""

import json
import sys
from typing import Any

import torch

import finetune_visualglm
from model.finetune import FineTuneVisualGLMModel
from model.training import step, trouble

loss_sum, freeze, after_step = step.loss_sum, FineTuneVisualGLMModel.freeze, trouble.SkippedSteps.after_step
seen: dict[str, Any] = {}


def nan_in(what: str) -> float:
    """The factor of what in this micro-batch: NaN, or 1."""
    return float("nan") if (what, seen["count"]) == (seen["what"], seen["micro_batch"]) else 1.0


def counting_loss_sum(model: Any, batch: Any) -> torch.Tensor:
    seen["count"] += 1
    return loss_sum(model, batch) * nan_in("loss")


def freeze_with_a_hook(model: Any) -> None:
    freeze(model)
    seen["model"] = model
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: gradient * nan_in("gradient"))


def recording_after_step(watcher: Any, state: Any, loss: Any, skipped: bool) -> None:
    seen["rows"].append([where for where, _ in watcher.batches.of_step()])
    seen["skipped"] += [state.args.iteration + 1] if skipped else []
    after_step(watcher, state, loss, skipped)


step.loss_sum, FineTuneVisualGLMModel.freeze = counting_loss_sum, freeze_with_a_hook  # type: ignore[method-assign]
trouble.SkippedSteps.after_step = recording_after_step  # type: ignore[method-assign]
for run in sys.argv[1].split(","):
    what, number, *flags = run.split(":")
    seen |= {"what": what, "micro_batch": int(number), "count": 0, "rows": [], "skipped": []}
    finetune_visualglm.main([*sys.argv[2:], *flags])
    finite = all(parameter.isfinite().all() for parameter in seen["model"].parameters())
    print("RESULT", json.dumps({"rows": seen["rows"], "skipped": seen["skipped"], "finite": finite}))
