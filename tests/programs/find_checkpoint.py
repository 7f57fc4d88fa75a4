"""Find a checkpoint by its name and print its folder, and the seconds that it took on a line of its own; or the sentence."""

import sys
import time

from model.checkpoints.layout import Checkpoint
from model.errors import exit_on_input_error

start = time.monotonic()
try:
    with exit_on_input_error("find_checkpoint.py"):
        found = Checkpoint.find(sys.argv[1])
        print(found.folder)
        print(found.name)
finally:
    print(f"{time.monotonic() - start:.2f}")
