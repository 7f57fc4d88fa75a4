"""finetune_visualglm.py, whose rank RANK raises an error in its third step: train_with_a_broken_rank.py RANK SCRIPT FLAG …"""

import os
import sys
import time

import finetune_visualglm
from model.training import step

_, failing, _, *flags = sys.argv
whole_step, steps = step.forward_step, 0


def broken_step(*inputs):
    global steps
    steps += 1
    loss = whole_step(*inputs)
    if os.environ["RANK"] == failing and steps == 3:
        time.sleep(0.5)  # the other prints its second step
        raise ZeroDivisionError("the step is broken")
    return loss


step.forward_step = broken_step
finetune_visualglm.main(flags)
