"""Runs of the script whose output is read while they go on: what the tests of signals, launchers and lost ranks share."""

import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import GOLDEN, PROJECT, free_port
from warm_start import started_warm

SCRIPT = PROJECT / "finetune_visualglm.py"
MARK = "VISUALGLM_TEST_RUN"  # a variable that every process of a run inherits
FLAGS = (
    "--use_lora", "--mode", "finetune", "--answers", "0", "--train-data", "dataset.json", "--batch-size", "2",
    "--max_source_length", "64", "--max_target_length", "64", "--train-iters", "100000",
)  # fmt: skip
LAUNCHERS = {
    "deepspeed": (Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port"),
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"),
}


class Run:
    """A run of the script whose output is read while it goes on, in a session of its own; it starts warm where it can."""

    def __init__(self, *words: object, **environment: str) -> None:
        self.output = ""
        self.mark = uuid.uuid4().hex
        command, folder = [*map(str, words)], str(GOLDEN / "upstream")
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
        reading, writing = os.pipe()
        self.stdout = open(reading)  # noqa: SIM115  (the fixture closes it)
        with open(os.devnull) as nothing, open(writing, "wb") as out:
            streams = (nothing.fileno(), out.fileno(), out.fileno())
            warm = (
                None if _starts_more(command) else started_warm(command, folder, environment, streams, own_session=True)
            )
            self.process = warm or subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    def read_until(self, text: str) -> None:
        """Read lines until one has text."""
        for line in self.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    def send(self, number: int, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, seconds: float = 30) -> int:
        """Read what is left, and give the exit status; all processes of the run have ended by then."""
        limit = threading.Timer(seconds, self.kill)
        limit.start()
        try:
            self.output += self.stdout.read()
            return self.process.wait()
        finally:
            limit.cancel()
            self.kill()

    def kill(self) -> None:
        for pid in self.left_behind():
            os.kill(pid, signal.SIGKILL)

    def left_behind(self) -> list[int]:
        """The processes of the run that still are there."""
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if (started_with := _environment(pid))
            and (started_with.get(MARK) == self.mark or _session(pid) == self.process.pid)
        ]

    def rank(self, rank: int) -> int:
        """The number of the process of this rank that a launcher has started."""
        return min(pid for pid in self.left_behind() if _environment(pid).get("RANK") == str(rank))

    def launcher(self, word: str) -> int:
        """The number of the launcher's process whose command line has this word."""
        (found,) = (
            pid
            for pid in self.left_behind()
            if "RANK" not in _environment(pid) and word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        )
        return found

    def last_line(self) -> str:
        """The last line of the run itself, and not of a launcher."""
        return [line for line in self.output.splitlines() if not line.startswith("[")][-1]


def heed_signals() -> None:
    """Take signals that may be ignored around us, as in the background of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _starts_more(command: list[str]) -> bool:
    """Whether it starts further processes of Python's, which are told by the variables that they started with."""
    return not command[0].endswith(".py")


def _session(pid: int) -> int | None:
    """The session of a process; none of one that has ended."""
    with suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def _environment(pid: int) -> dict[str, str]:
    """The variables of a process; none of one that has ended."""
    try:
        words = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


@pytest.fixture
def run(upstream_checkpoint, tmp_path):
    """Starts the script with more flags; it is killed after the test."""
    started = []

    def start(*flags, launcher=(), **environment):
        words = (
            *launcher, SCRIPT, "--from_pretrained", upstream_checkpoint, *FLAGS, "--summary-dir", tmp_path,
            "--save", tmp_path / "saved", *flags,
        )  # fmt: skip
        started.append(Run(*words, **environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.process.wait()
        one.stdout.close()


@pytest.fixture
def ranks(run):
    """Starts a run of several processes over gloo without a launcher, which would pass signals on in its own way."""

    def start(*flags, processes=2, flags_of_last=()):
        common = {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common["WORLD_SIZE"] = common["LOCAL_WORLD_SIZE"]
        own = [()] * (processes - 1) + [flags_of_last]
        return [run(*flags, *more, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank, more in enumerate(own)]

    return start


@pytest.fixture
def launched(run):
    """Starts a run of two processes by a launcher, and reads until it trains."""

    def start(launcher, *flags, until="step      2/"):
        one = run(*flags, launcher=(*LAUNCHERS[launcher], free_port()))
        one.read_until(until)
        return one

    return start


def saved_steps(folder):
    """The iteration of every checkpoint in a --save folder."""
    return [int(path.parent.name) for path in folder.glob("*/*/mp_rank_00_model_states.pt")]


def last_step(output):
    """The number of the last step that a run printed, and how many were planned."""
    return tuple(map(int, re.findall(r"^step +(\d+)/(\d+) ", output, re.MULTILINE)[-1]))
