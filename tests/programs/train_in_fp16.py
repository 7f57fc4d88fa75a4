"""Runs of finetune_visualglm.py in real fp16 on a CPU, which DeepSpeed refuses and our script turns into float32.

train_in_fp16.py FLAG,…[;FLAG,…] FLAG …

A run for each part between semicolons. Printed for each, as JSON: dtype of the trained weights, losses, the loss scale of
every step, and the optimizer's class.
"""

import json
import sys
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import finetune_visualglm
from model.training import metrics, sat_args

accelerator = type(get_accelerator())
accelerator.is_fp16_supported = lambda self: True
accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
settings, report_step = sat_args._settings, metrics.TrainingReport.step
seen: dict[str, Any] = {}


def settings_with_fp16(options: Any, fp16: bool) -> dict[str, Any]:
    """What a machine with a GPU would get."""
    made = settings(options, options.fp16)
    return made | {"fp16": made["fp16"] | {"enabled": options.fp16}}


def recording_step(report: Any, writer: Any, optimizer: Any, rate: float, loss: float, *rest: Any) -> None:
    # At ZeRO stage 3 they hold no parameters between steps.
    parameter = (optimizer.param_groups[0]["params"] or optimizer.fp16_groups[0])[0]
    seen["losses"].append(loss)
    seen["scales"].append(getattr(optimizer, "loss_scale", None))
    seen.update(dtype=str(parameter.dtype), optimizer=type(optimizer).__name__)
    report_step(report, writer, optimizer, rate, loss, *rest)


sat_args._settings = settings_with_fp16
metrics.TrainingReport.step = recording_step  # type: ignore[method-assign]
for run in sys.argv[1].split(";"):
    seen |= {"losses": [], "scales": []}
    finetune_visualglm.main([*sys.argv[2:], *run.split(",")])
    print("RESULT", json.dumps(seen))
