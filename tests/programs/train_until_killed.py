"""finetune_visualglm.py, killed with -9 after some steps, when the thread that writes a checkpoint has done so.

train_until_killed.py STEPS FLAG …
"""

import os
import signal
import sys
import threading

import finetune_visualglm
from model.training import metrics

steps_left = int(sys.argv[1])
report_step = metrics.TrainingReport.step


def counting_step(self, *reported):
    global steps_left
    report_step(self, *reported)
    steps_left -= 1
    if steps_left == 0:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        os.kill(os.getpid(), signal.SIGKILL)


metrics.TrainingReport.step = counting_step
finetune_visualglm.main(sys.argv[2:])
