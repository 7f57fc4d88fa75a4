"""finetune_visualglm.py, whose rank RANK has no memory left when rows are answered: answer_without_room.py RANK FLAG …"""

import os
import sys

import torch

import finetune_visualglm
from model.training.answers import RowAnswers

_, failing, *flags = sys.argv
answer_rows = RowAnswers._results


def without_room(self, module, args):
    if os.environ["RANK"] == failing:
        raise torch.OutOfMemoryError("out of memory on this rank")
    return answer_rows(self, module, args)


RowAnswers._results = without_room
finetune_visualglm.main(flags)
