"""finetune_visualglm.py, whose data workers raise what no code of ours expects.

train_with_a_bug.py FLAG …
"""

import sys

import finetune_visualglm
from model.data import dataset


def failing(rows):
    raise KeyError("a bug")


dataset._batch = failing
finetune_visualglm.main(sys.argv[1:])
