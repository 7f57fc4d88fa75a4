"""Convert a model of about 400 MiB there and back in a folder; print its size and how much this process's own memory grew.

Printed, in MiB: the size, the growth there, the growth back.
"""

import shutil
import sys
import threading
import time
from pathlib import Path

from model.convert.huggingface import convert
from model.data.tokenizer import VOCAB_FILE
from scripts.dev.write_random_model import write_random_model

folder = Path(sys.argv[1])
write_random_model(folder / "sat", hidden=768, layers=32, heads=12)


def anonymous() -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) // 1024


def growth(source: str, destination: str, layout: str) -> int:
    """By how much this process's own memory grows while it converts, at most."""
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous() - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert(str(folder / source), str(folder / destination), layout, max_shard_size=10**8)
    finally:
        done.set()
    watcher.join()
    return most


assert (folder / "sat" / VOCAB_FILE).is_file()
size = sum(path.stat().st_size for path in (folder / "sat").rglob("*.pt")) // 2**20
there, back = growth("sat", "hf", "hf"), growth("hf", "back", "sat")
shutil.rmtree(folder / "hf")
print(size, there, back)
