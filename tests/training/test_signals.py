"""Signals during a run: the step is finished, the run is saved, a line says how to go on; a second one leaves at once."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, PROJECT, free_port, run_program

SCRIPT = PROJECT / "finetune_visualglm.py"
SIGNALS = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"]
FLAGS = (
    "--use_lora", "--mode", "finetune", "--train-data", "dataset.json", "--batch-size", "2", "--max_source_length", "64",
    "--max_target_length", "64", "--train-iters", "100000",
)  # fmt: skip


class Run:
    """A run of the script whose output is read while it goes on."""

    def __init__(self, *words: object, **environment: str) -> None:
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=GOLDEN / "upstream",
            env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a group of its own: every process that it leaves behind is found
            preexec_fn=heed_signals,
        )

    def read_until(self, text: str) -> None:
        """Read lines until one has text."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    def send(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds: float = 30) -> int:
        """Read what is left, and give the exit status; all processes of the run have ended by then."""
        try:
            self.output += self.process.communicate(timeout=seconds)[0]
            return self.process.returncode
        finally:
            self.process.kill()

    def left_behind(self) -> list[int]:
        """The processes of its group that still are there."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return []
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _group(path) == self.process.pid]


def heed_signals() -> None:
    """Take signals that may be ignored around us, as in the background of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _group(process: Path) -> int:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[2]) if fields[0] != "Z" else 0


@pytest.fixture
def run(upstream_checkpoint, tmp_path):
    """Starts the script with more flags; it is killed after the test."""
    started = []

    def start(*flags, launcher=(), **environment):
        words = (
            *launcher,
            SCRIPT,
            "--from_pretrained",
            upstream_checkpoint,
            *FLAGS,
            "--summary-dir",
            tmp_path,
            "--save",
            tmp_path / "saved",
            *flags,
        )
        started.append(Run(*words, **environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.stdout.close()


def saved_steps(folder):
    """The iteration of every checkpoint in a --save folder."""
    return [int(path.parent.name) for path in folder.glob("*/*/mp_rank_00_model_states.pt")]


def last_step(output):
    """The number of the last step that a run printed, and how many were planned."""
    return tuple(map(int, re.findall(r"^step +(\d+)/(\d+) ", output, re.MULTILINE)[-1]))


@pytest.mark.run
@pytest.mark.parametrize("name", SIGNALS)
def test_signal_during_a_step_finishes_it_saves_and_says_how_to_go_on(run, tmp_path, name):
    one = run("--save", tmp_path / "saved")
    one.read_until("step      2/")
    one.send(signal.Signals[name])
    assert one.end() == 128 + signal.Signals[name]
    step, planned = last_step(one.output)
    assert planned == 100_000
    assert saved_steps(tmp_path / "saved") == [step]
    (folder,) = (tmp_path / "saved").iterdir()
    assert (folder / "latest").read_text() == str(step)
    assert one.output.splitlines()[-1] == f"{name}: stopped after step {step} of 100000. To go on: --resume {folder}"
    assert "Traceback" not in one.output
    assert one.left_behind() == []


@pytest.mark.run
def test_ctrl_c_of_a_terminal_reaches_all_processes_and_the_run_is_saved(run, tmp_path):
    one = run("--save", tmp_path / "saved", "--num-workers", "2")
    one.read_until("step      2/")
    one.send(signal.SIGINT, group=True)
    assert one.end() == 130
    assert saved_steps(tmp_path / "saved") == [last_step(one.output)[0]]
    assert "Traceback" not in one.output
    assert one.left_behind() == []


@pytest.mark.run
def test_sigterm_to_the_whole_group_lets_the_data_workers_finish_the_step(run, tmp_path):
    one = run("--save", tmp_path / "saved", "--num-workers", "2")
    one.read_until("step      2/")
    one.send(signal.SIGTERM, group=True)
    assert one.end() == 143
    assert saved_steps(tmp_path / "saved") == [last_step(one.output)[0]]
    assert "Traceback" not in one.output
    assert one.left_behind() == []


@pytest.mark.run
def test_signal_in_a_run_that_saves_nothing_says_so(run):
    one = run("--save", "none")
    one.read_until("step      1/")
    one.send(signal.SIGTERM)
    assert one.end() == 143
    assert one.output.splitlines()[-1].endswith("of 100000. Nothing was saved (--save none).")


@pytest.mark.run
def test_second_signal_leaves_at_once_and_leaves_no_process(run, tmp_path):
    one = run("--save", tmp_path / "saved", "--gradient-accumulation-steps", "100000", "--num-workers", "2")
    one.read_until("Trainable")
    time.sleep(1.5)  # in the midst of the first step, which takes hours
    one.send(signal.SIGTERM)
    one.read_until("A second signal leaves at once.")
    one.send(signal.SIGINT)
    assert one.end(5) == 130
    assert "Traceback" not in one.output
    assert saved_steps(tmp_path / "saved") == []
    assert one.left_behind() == []


@pytest.mark.run
def test_run_that_is_killed_leaves_no_data_worker_behind(run):
    one = run("--num-workers", "2")
    one.read_until("step      2/")
    one.send(signal.SIGKILL)
    one.end()
    deadline = time.monotonic() + 1
    while one.left_behind() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert one.left_behind() == []


@pytest.mark.run
def test_signal_in_an_evaluation_gives_it_up_and_saves_the_run(run, tmp_path):
    many = tmp_path / "many.json"
    row = '{"img": "images/1.png", "prompt": "?", "label": "a"}'
    many.write_text("[" + ", ".join([row] * 100_000) + "]")
    one = run("--save", tmp_path / "saved", "--eval-interval", "2", "--valid-data", many, "--check_seconds", "0")
    one.read_until("step      2/")
    time.sleep(0.5)
    sent = time.monotonic()
    one.send(signal.SIGTERM)
    assert one.end() == 143
    assert time.monotonic() - sent < 10
    assert saved_steps(tmp_path / "saved") == [2]
    assert "validation loss" not in one.output
    assert "Traceback" not in one.output


# --- two processes, without a launcher: it would pass signals on in its own way


@pytest.fixture
def two_ranks(run, tmp_path):
    """A run of two processes over gloo, in the midst of its first steps."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [run("--save", tmp_path / "saved", RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]
    ranks[0].read_until("step      2/")
    return ranks


@pytest.mark.run
@pytest.mark.parametrize(
    "signalled",
    [pytest.param((0,), marks=pytest.mark.long), (1,), (0, 1), pytest.param((1, 0), marks=pytest.mark.long)],
)
def test_two_processes_stop_after_the_same_step_whichever_got_the_signal(two_ranks, tmp_path, signalled):
    for rank in signalled:
        two_ranks[rank].send(signal.SIGUSR1)
    assert [one.end() for one in two_ranks] == [138, 138]
    step, planned = last_step(two_ranks[0].output)
    assert planned == 100_000
    assert saved_steps(tmp_path / "saved") == [step]
    assert f"SIGUSR1: stopped after step {step} of 100000. To go on: --resume " in two_ranks[0].output
    assert "Traceback" not in two_ranks[0].output + two_ranks[1].output


@pytest.mark.run
def test_second_signal_within_the_launchers_patience_counts_as_the_first(two_ranks, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):  # as deepspeed's runner passes Ctrl-C on
        for one in two_ranks:
            one.send(number)
        time.sleep(0.1)
    assert [one.end() for one in two_ranks] == [130, 130]
    assert saved_steps(tmp_path / "saved") == [last_step(two_ranks[0].output)[0]]


# --- what is around a run


@pytest.mark.run
@pytest.mark.long
def test_nohup_is_respected(run, tmp_path):
    one = run(
        "--train-iters", "40", "--save", tmp_path / "saved", launcher=(PROJECT / "tests/programs/ignoring_hangups.py",)
    )
    one.read_until("step  2/")
    one.send(signal.SIGHUP)
    assert one.end() == 0
    assert saved_steps(tmp_path / "saved") == [40]


@pytest.mark.run
@pytest.mark.long
def test_run_in_another_thread_and_after_a_stopped_one_trains_to_its_end(upstream_checkpoint, tmp_path):
    done = run_program(
        "main_after_a_signal", "--from_pretrained", upstream_checkpoint, *FLAGS[:-2], "--summary-dir", tmp_path, "--save", tmp_path,
        cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(?:step .*|==.*)", re.sub(r"  loss.*", "", done.stdout), re.MULTILINE) == [
        *(f"step {step}/9" for step in (1, 2, 3)),
        "== 143, the handlers are as before",
        *(f"step {step}/2" for step in (1, 2)),
        "== in another thread",
        *(f"step {step}/2" for step in (1, 2)),
    ]
