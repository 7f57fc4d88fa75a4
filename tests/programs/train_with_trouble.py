"""finetune_visualglm.py in which something goes wrong.

train_with_trouble.py killed PICTURE FLAG …       a data worker kills itself when it opens PICTURE
train_with_trouble.py moving FLAG …               no memory on the device that the model moves to
train_with_trouble.py {device|host} N FLAG …      no memory in the forward pass N, from 1: an error as CUDA's, or a real one
"""

import os
import signal
import sys
from typing import Any

import torch
from torch.utils.data import get_worker_info

import finetune_visualglm
from model.data import dataset
from model.finetune import FineTuneVisualGLMModel
from model.training import feature_cache

CUDAS_ERROR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB.\nSee memory_stats."
)
kind, *flags = sys.argv[1:]
forward, open_image = FineTuneVisualGLMModel.forward, dataset.open_image
passes = 0


def forward_without_memory(model: Any, *inputs: Any, **named: Any) -> Any:
    global passes
    passes += 1
    if passes == int(number):
        if kind == "device":
            raise torch.OutOfMemoryError(CUDAS_ERROR)
        torch.empty(2**50, dtype=torch.uint8)  # a pebibyte
    return forward(model, *inputs, **named)


def killing_open_image(source: Any, *rest: Any) -> Any:
    if str(source).endswith(picture) and get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return open_image(source, *rest)


def killing_checked_file(path: str) -> None:
    killing_open_image(path)


def move(model: Any, *_: Any) -> None:
    raise torch.OutOfMemoryError(CUDAS_ERROR)


if kind == "killed":
    picture, *flags = flags
    dataset.open_image, feature_cache.checked_file = killing_open_image, killing_checked_file
elif kind == "moving":
    FineTuneVisualGLMModel.to = move
else:
    number, *flags = flags
    FineTuneVisualGLMModel.forward = forward_without_memory
finetune_visualglm.main(flags)
