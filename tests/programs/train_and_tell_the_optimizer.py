"""finetune_visualglm.py as if wandb and triton weren't installed; a line tells which optimizer trains, with what."""

import sys
from typing import Any

sys.modules["wandb"] = sys.modules["triton"] = None  # type: ignore[assignment]

import finetune_visualglm
from model.training import metrics

watch = metrics.TrainingReport.watch


def telling_watch(self: Any, scheduler: Any, optimizer: Any) -> None:
    inner = optimizer.optimizer
    group = inner.param_groups[0]
    module = type(inner).__module__.split(".")[0]
    print("optimizer", module, type(inner).__name__, *group["betas"], group["eps"], group["weight_decay"])
    watch(self, scheduler, optimizer)


metrics.TrainingReport.watch = telling_watch  # type: ignore[method-assign]
finetune_visualglm.main(sys.argv[1:])
