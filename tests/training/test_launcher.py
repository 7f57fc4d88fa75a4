"""A launcher that is killed leaves no orphans, and what was learned is saved."""

import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest
from live_runs import LAUNCHERS, last_step, saved_steps

from model.training.launcher import DEEPSPEED_LAUNCH, Launcher

RUNNER, AGENT = "--num_gpus", "torch.distributed.run"  # words of their command lines


def test_process_that_no_launcher_has_started_has_none():
    assert Launcher().line == []
    assert not Launcher().is_gone()


@pytest.mark.run
@pytest.mark.parametrize(
    ("launcher", "word", "number"),
    [
        ("deepspeed", DEEPSPEED_LAUNCH, signal.SIGKILL),
        pytest.param("deepspeed", RUNNER, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("deepspeed", RUNNER, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("deepspeed", DEEPSPEED_LAUNCH, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("torchrun", AGENT, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("torchrun", AGENT, signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_run_whose_launcher_is_killed_is_saved_and_leaves_no_process(
    launched,
    tmp_path,
    launcher,
    word,
    number,
):
    one = launched(launcher)
    assert len(one.left_behind()) >= 3
    os.kill(one.launcher(word), number)
    one.end(90)
    assert wait_for_no_process(one) == []
    step, planned = last_step(one.output)
    assert planned == 100_000
    assert saved_steps(tmp_path / "saved") == [step]
    assert f"SIGTERM: stopped after step {step} of 100000. To go on: --resume " in one.output


@pytest.mark.run
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_launcher_that_is_killed_before_the_processes_know_each_other_leaves_none(launched, launcher):
    one = launched(launcher, until=" rows")
    os.kill(one.launcher(AGENT if launcher == "torchrun" else DEEPSPEED_LAUNCH), signal.SIGKILL)
    one.end(60)
    assert "The launcher of this run has gone." in one.output
    assert wait_for_no_process(one) == []
    assert "step      1/" not in one.output


@pytest.mark.run
@pytest.mark.long
def test_second_run_of_deepspeed_on_a_machine_finds_another_port(run):
    with socket.create_server(("", 0)) as other_run:
        port = other_run.getsockname()[1]
        one = run("--train-iters", "2", launcher=(*LAUNCHERS["deepspeed"], port))
        assert one.end(90) == 0, one.output
    assert f"MASTER_PORT {port}: another program listens on it; " in one.output
    assert last_step(one.output) == (2, 2)
    assert not list(Path(tempfile.gettempdir()).glob(f"visualglm-port-{os.getuid()}-{one.process.pid}-*"))


def wait_for_no_process(one):
    """The processes of a run that are left once there has been time for all to end."""
    deadline = time.monotonic() + 30
    while one.left_behind() and time.monotonic() < deadline:
        time.sleep(0.1)
    return one.left_behind()
