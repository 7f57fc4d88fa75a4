"""finetune_visualglm.py on a disk that is full from the second checkpoint on: found out by the thread that waits for it."""

import errno
import os
import sys

import finetune_visualglm
from model.checkpoints import save

put_in_place = save.put_in_place


def full_at_the_second(unfinished, folder, shared=()):
    if folder.name == "2":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    put_in_place(unfinished, folder, shared)


save.put_in_place = full_at_the_second
finetune_visualglm.main(sys.argv[1:])
