"""Prints, as JSON, by how many threads this process grows: for large sums, and for a picture; OMP_NUM_THREADS must be 2.

"here" is for a sum on the main thread, "apart" for one by `computed_apart`, "picture" for one that a thread prepares.
"""

import json
import os
import threading
import time

import torch
from PIL import Image

from model.data.image_processor import BlipImageEvalProcessor
from model.inference.serving import computed_apart


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def large_sum() -> float:
    return torch.ones(2**22).add(1).sum().item()


before, end = threads(), time.monotonic() + 5
assert computed_apart(large_sum) == 2**23
while threads() > before and time.monotonic() < end:  # a thread that has ended leaves a little later
    time.sleep(0.01)
grown = {"apart": threads() - before}


def prepare(done: threading.Event, left: threading.Event) -> None:
    BlipImageEvalProcessor(224)(Image.new("RGB", (300, 300), "red"))
    done.set()
    left.wait()


done, left = threading.Event(), threading.Event()
thread = threading.Thread(target=prepare, args=(done, left))
thread.start()
done.wait()
grown["picture"] = threads() - before - 1  # itself
left.set()
thread.join()
large_sum()
grown["here"] = threads() - before
print(json.dumps(grown))
