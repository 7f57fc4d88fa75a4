"""A whole run; and the same run twice more, stopped by a signal after the first batch of its first evaluation, and resumed.

train_and_stop_evaluating.py FOLDER FLAG …

The signal comes in a line of Python, and in a callback, where an exception that it raises goes no further. Printed last, as
JSON: the records of the three, losses to the last digit.
"""

import json
import signal
import sys
from pathlib import Path

import finetune_visualglm
from model.training import step
from model.training.records import read_records

folder, flags = Path(sys.argv[1]), sys.argv[2:]
evaluation_step = step.evaluation_step


class Callback:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def stopping_once(stop):
    """evaluation_step, which calls stop() after its first batch."""
    stops = [stop]

    def stopping_step(*inputs):
        result = evaluation_step(*inputs)
        if stops:
            stops.pop()()
        return result

    return stopping_step


finetune_visualglm.main([*flags, "--save", str(folder / "whole")])
for name, stop in (("here", lambda: signal.raise_signal(signal.SIGTERM)), ("callback", Callback)):
    print("== stopped", flush=True)
    step.evaluation_step = stopping_once(stop)
    for again in ([], ["--resume", "auto"]):
        try:
            finetune_visualglm.main([*flags, "--save", str(folder / name), *again])
        except SystemExit as left:
            print("== left with", left.code)
files = [next((folder / name).glob("*/metrics.jsonl")) for name in ("whole", "here", "callback")]
print(json.dumps([[(one.kind, one.step, one.loss) for one in read_records(file)] for file in files]))
