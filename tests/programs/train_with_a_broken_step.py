"""finetune_visualglm.py, whose first step raises an error."""

import sys

import finetune_visualglm
from model.training import step


def broken_step(*_):
    raise ZeroDivisionError("the step is broken")


step.forward_step = broken_step
finetune_visualglm.main(sys.argv[1:])
