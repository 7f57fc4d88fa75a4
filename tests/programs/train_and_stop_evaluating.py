"""A whole run; and the same run that a signal stops after the first batch of its first evaluation, and that goes on.

train_and_stop_evaluating.py FOLDER WHERE FLAG …

WHERE is "here" or "callback"; an exception that is raised in the latter goes no further than that.

Printed last, as JSON: [the losses of the one, the losses of the other], to the last digit.
"""

import json
import signal
import sys
from pathlib import Path

import finetune_visualglm
from model.training import step
from model.training.records import read_records

folder, where, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
evaluation_step, batches = step.evaluation_step, 0


class Callback:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def stopping_step(*inputs):
    global batches
    batches += 1
    result = evaluation_step(*inputs)
    if batches == 1 and where == "callback":
        Callback()
    elif batches == 1:
        signal.raise_signal(signal.SIGTERM)
    return result


finetune_visualglm.main([*flags, "--save", str(folder / "whole")])
step.evaluation_step = stopping_step
print("== cut off")
for again in ([], ["--resume", "auto"]):
    try:
        finetune_visualglm.main([*flags, "--save", str(folder / "cut"), *again])
    except SystemExit as left:
        print("left with", left.code)
files = [next((folder / name).glob("*/metrics.jsonl")) for name in ("whole", "cut")]
print(json.dumps([[(one.kind, one.step, one.loss) for one in read_records(file)] for file in files]))
