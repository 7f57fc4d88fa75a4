"""finetune_visualglm.py, whose first step is bad input.

fail_in_the_first_step.py FLAG …
"""

import sys

import finetune_visualglm
from model.errors import InputError
from model.training import step


def failing(*args, **named):
    raise InputError("the first step fails")


step.next_batch = failing
finetune_visualglm.main(sys.argv[1:])
