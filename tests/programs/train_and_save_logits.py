"""finetune_visualglm.py, which saves the logits of one input beside each checkpoint, from the model that is saved.

train_and_save_logits.py LOGITS FLAG …
"""

import sys

import torch

import finetune_visualglm
from model.training import run

save_checkpoint = run.save_checkpoint


def recording_save(iteration, model, optimizer, lr_scheduler, args, *_, **__):
    model.module.eval()
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([[859, 775, 2685, 86, 89, 554]]))[0]
    torch.save(logits, sys.argv[1])
    save_checkpoint(iteration, model, optimizer, lr_scheduler, args)


run.save_checkpoint = recording_save
finetune_visualglm.main(sys.argv[2:])
