"""Runs a task in a subprocess, which prints its process id, and then waits to be killed; see test_workers.py."""

import os
import time

from model.data.workers import run_in_subprocess

LARGE = 2**20  # bytes: more than a pipe holds


def task() -> bytes:
    print(os.getpid(), flush=True)
    time.sleep(1)
    return bytes(LARGE)


if __name__ == "__main__":
    run_in_subprocess(task, lambda: time.sleep(60))
