"""A command of two processes: the first ends with a sentence, while the other waits where Python can't take a signal."""

import ctypes
import os
import time

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()
    with command("x.py"):
        if os.environ["RANK"] == "0":
            time.sleep(1)
            raise InputError("no file.")
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second time for ever
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
