"""A command that both processes of a launcher refuse, the first one a second later than the other."""

import os
import time

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()
    with command("x.py"):
        if os.environ["RANK"] == "0":
            time.sleep(1)
        raise InputError("no file.")
