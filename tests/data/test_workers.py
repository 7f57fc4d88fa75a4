"""Work in forked processes: its results or its problem come back, and no process is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import PROJECT

from model.data import workers as module
from model.data.workers import begin_in_processes, hush_threads, run_in_subprocess
from model.errors import InputError

LARGE = 2**20  # bytes: more than a pipe holds


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)


def test_task_that_is_done_in_a_moment_is_waited_for():
    calls = []
    assert run_in_subprocess(lambda: 7, lambda: calls.append("meanwhile")) == 7
    assert calls == []


def test_task_that_takes_longer_is_done_in_another_process_while_meanwhile_is_done_in_this_one(impatient):
    calls = []

    def task():
        time.sleep(0.2)
        return os.getpid(), bytes(LARGE)

    process, content = run_in_subprocess(task, lambda: calls.append(os.getpid()))
    assert (calls, len(content)) == ([os.getpid()], LARGE)
    assert process != os.getpid()


def test_problem_of_the_task_is_raised():
    def task():
        raise InputError("rows.json row 1: …")

    with pytest.raises(InputError, match=r"^rows\.json row 1: …$"):
        run_in_subprocess(task, lambda: None)


def test_path_that_the_system_refuses_the_task_is_a_problem_of_the_task(impatient):
    def task():
        time.sleep(0.1)
        os.stat("a" * 300)

    with pytest.raises(InputError, match="aaa: File name too long; "):
        run_in_subprocess(task, lambda: None)


def test_task_whose_process_dies_is_told_in_a_sentence():
    with pytest.raises(InputError, match=r"^The process that checks the data died \(status -9; no memory left\?\)\.$"):
        run_in_subprocess(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None)


def test_meanwhile_that_fails_ends_the_task(impatient):
    def meanwhile():
        raise KeyError("meanwhile")

    with pytest.raises(KeyError, match="meanwhile"):
        run_in_subprocess(lambda: (time.sleep(0.2), bytes(LARGE)), meanwhile)


def test_task_whose_parent_is_killed_ends_by_itself():
    program = [sys.executable, str(PROJECT / "tests/programs/parent_of_a_task.py")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() != ""
        parent.kill()
        parent.communicate(timeout=30)  # until the last of both processes has closed what it prints to


# Parts


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)


def test_parts_are_worked_on_in_other_processes_and_their_results_are_in_order(two_processes):
    found = begin_in_processes(lambda part: (part, os.getpid()), range(7), "A process")()
    assert [part for part, _ in found] == list(range(7))
    assert len({process for _, process in found} - {os.getpid()}) == 2


def test_parts_are_worked_on_before_their_results_are_waited_for(two_processes, tmp_path):
    wait = begin_in_processes(lambda part: (tmp_path / part).touch(), ["one"], "A process")
    deadline = time.monotonic() + 30
    while not (tmp_path / "one").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "one").exists()
    assert wait() == [None]


def test_parts_and_what_the_task_holds_need_not_be_picklable(two_processes):
    assert begin_in_processes(lambda part: part(), [lambda: 1, lambda: 2], "A process")() == [1, 2]


def test_problem_with_a_part_is_raised_and_no_process_is_left(two_processes):
    def task(part):
        if part == 1:
            raise InputError("rows.json: …")
        time.sleep(60)

    with pytest.raises(InputError, match=r"^rows\.json: …$"):
        begin_in_processes(task, [1, 2], "A process")()
    assert multiprocessing.active_children() == []


def test_process_of_a_part_that_dies_is_told_in_a_sentence(two_processes):
    wait = begin_in_processes(lambda part: os.kill(os.getpid(), signal.SIGKILL), [1], "A process that counts")
    with pytest.raises(InputError, match=r"^A process that counts died \(status -9; no memory left\?\)\.$"):
        wait()


@pytest.mark.parametrize("parts", [[], [3]])
def test_parts_where_processes_cannot_be_forked_are_worked_on_here(monkeypatch, parts):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert begin_in_processes(lambda part: (part, os.getpid()), parts, "A process")() == [
        (part, os.getpid()) for part in parts
    ]


def test_threads_of_a_worker_print_no_traceback_and_its_main_thread_does(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: printed.append(str(error[1])))
    hush_threads()
    thread = threading.Thread(target=lambda: sys.excepthook(EOFError, EOFError("of a thread"), None))
    thread.start()
    thread.join()
    sys.excepthook(ValueError, ValueError("of the main thread"), None)
    assert printed == ["of the main thread"]
