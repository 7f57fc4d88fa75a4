"""`finetune_visualglm.main` three times in one process: stopped by a signal, whole, and whole in another thread.

main_after_a_signal.py FLAG …        flags for all three
"""

import signal
import sys
import threading
from typing import Any

import finetune_visualglm
from model.errors import ENDING_SIGNALS
from model.training.metrics import TrainingReport

step_line = TrainingReport.step


def step(self: Any, *values: Any) -> None:
    """Print the line, and ask this process to end at the third one."""
    if values[5] == 3:
        signal.raise_signal(signal.SIGTERM)
    step_line(self, *values)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in ENDING_SIGNALS]


TrainingReport.step = step  # type: ignore[method-assign]
before = handlers()
try:
    finetune_visualglm.main([*sys.argv[1:], "--train-iters", "9"])
except SystemExit as left:
    print(f"== {left.code}, the handlers are {'as before' if handlers() == before else 'others'}", flush=True)
finetune_visualglm.main([*sys.argv[1:], "--train-iters", "2"])
print("== in another thread", flush=True)
thread = threading.Thread(target=finetune_visualglm.main, args=([*sys.argv[1:], "--train-iters", "2"],))
thread.start()
thread.join()
