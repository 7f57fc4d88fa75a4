"""finetune_visualglm.py, which saves the logits of one input beside each checkpoint, from the model that is saved.

train_and_save_logits.py LOGITS FLAG …
"""

import sys

import torch

import finetune_visualglm
from model.checkpoints import weights as checkpoint

save_checkpoint = checkpoint.save_checkpoint


def recording_save(iteration, model, optimizer, lr_scheduler, args, **files):
    model.module.eval()
    with torch.no_grad():
        logits = model.module(input_ids=torch.tensor([[859, 775, 2685, 86, 89, 554]]))[0]
    torch.save(logits, sys.argv[1])
    save_checkpoint(iteration, model, optimizer, lr_scheduler, args, **files)


checkpoint.save_checkpoint = recording_save
finetune_visualglm.main(sys.argv[2:])
