"""Run the script, and save what it trained as an adapter, as a full checkpoint, and as logits.

train_and_save_both_kinds.py FOLDER WORDS…
"""

import sys
from argparse import Namespace

import torch
from question import QUESTION

import finetune_visualglm
from model.checkpoints import save as checkpoint

folder, *argv = sys.argv[1:]
save_checkpoint = checkpoint.save_checkpoint


def save_both_kinds(iteration, model, optimizer, lr_scheduler, args, *_, **__):
    with torch.no_grad():
        logits = model.module.eval()(**QUESTION)[0]
    for kind in ("adapter", "full"):
        kind_args = Namespace(**vars(args) | {"save": f"{folder}/{kind}", "save_full_model": kind == "full"})
        save_checkpoint(iteration, model, optimizer, lr_scheduler, kind_args)
    torch.save(logits, f"{folder}/logits.pt")


checkpoint.save_checkpoint = save_both_kinds
finetune_visualglm.main(argv)
