"""A command that the first of two processes refuses after a second; the other has done so, or waits for it.

refused_late_by_the_first.py refuses|waits
"""

import ctypes
import os
import sys
import time

from model.errors import InputError, command, interrupt_ends_quietly


def wait_for_ever() -> None:
    """Where Python can't take a signal: in a lock that is held already."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


if __name__ == "__main__":
    interrupt_ends_quietly()
    with command("x.py"):
        if os.environ["RANK"] == "0":
            time.sleep(1)
        elif sys.argv[1] == "waits":
            wait_for_ever()
        raise InputError("no file.")
