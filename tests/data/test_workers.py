"""A task beside another: its result or its problem comes back, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROJECT

from model.data import workers as module
from model.data.workers import done_beside
from model.errors import InputError

LARGE = 2**20  # bytes: more than a pipe holds


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)


def test_task_that_is_done_in_a_moment_is_waited_for():
    calls = []
    assert done_beside(lambda: 7, lambda: calls.append("meanwhile")) == 7
    assert calls == []


def test_task_that_takes_longer_is_done_in_another_process_while_meanwhile_is_done_in_this_one(impatient):
    calls = []

    def task():
        time.sleep(0.2)
        return os.getpid(), bytes(LARGE)

    process, content = done_beside(task, lambda: calls.append(os.getpid()))
    assert (calls, len(content)) == ([os.getpid()], LARGE) and process != os.getpid()


def test_problem_of_the_task_is_raised():
    def task():
        raise InputError("rows.json row 1: …")

    with pytest.raises(InputError, match=r"^rows\.json row 1: …$"):
        done_beside(task, lambda: None)


def test_task_whose_process_dies_is_told_in_a_sentence():
    with pytest.raises(InputError, match=r"^The process that checks the data died \(status -9; no memory left\?\)\.$"):
        done_beside(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None)


def test_meanwhile_that_fails_ends_the_task(impatient):
    def meanwhile():
        raise KeyError("meanwhile")

    with pytest.raises(KeyError, match="meanwhile"):
        done_beside(lambda: (time.sleep(0.2), bytes(LARGE)), meanwhile)


PARENT = f"""
import os, sys, time
from model.data.workers import done_beside

def task():
    print(os.getpid(), flush=True)
    time.sleep(1)
    return bytes({LARGE})

done_beside(task, lambda: time.sleep(60))
"""


def test_task_whose_parent_is_killed_ends_by_itself():
    with subprocess.Popen([sys.executable, "-c", PARENT], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() != ""
        parent.kill()
        parent.communicate(timeout=30)  # until the last of both processes has closed what it prints to
