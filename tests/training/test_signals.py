"""Signals during a run: the step is finished, the run is saved, a line says how to go on; a second one leaves at once."""

import re
import shlex
import signal
import subprocess
import time

import pytest
from conftest import GOLDEN, PROJECT, run_program
from live_runs import FLAGS, last_step, saved_steps
from warm_start import commands

from model.progress import GOES_ON

SIGNALS = ["SIGTERM", *(pytest.param(name, marks=pytest.mark.long) for name in ("SIGINT", "SIGUSR1", "SIGHUP"))]


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
    one = run(
        "--save", tmp_path / "saved", "--gradient-accumulation-steps", "100000", "--num-workers", "2", "--answers", "0"
    )
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
    many.write_text("[" + ", ".join([row] * 20_000) + "]")
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
def two_ranks(ranks):
    """A run of two processes over gloo, in the midst of its first steps."""
    both = ranks()
    both[0].read_until("step      2/")
    return both


@pytest.mark.run
@pytest.mark.parametrize(
    "signalled",
    [
        pytest.param((0,), marks=pytest.mark.long),
        (1,),
        pytest.param((0, 1), marks=pytest.mark.long),
        pytest.param((1, 0), marks=pytest.mark.long),
    ],
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
@pytest.mark.long
@pytest.mark.parametrize("signalled", [(2,), (0, 1, 2, 3)])
def test_four_processes_stop_after_the_same_step(ranks, tmp_path, signalled):
    four = ranks(processes=4)
    four[0].read_until("step      2/")
    for rank in signalled:
        four[rank].send(signal.SIGTERM)
    assert [one.end(60) for one in four] == [143] * 4
    assert saved_steps(tmp_path / "saved") == [last_step(four[0].output)[0]]


@pytest.mark.long
@pytest.mark.run
def test_second_signal_within_the_launchers_patience_counts_as_the_first(two_ranks, tmp_path):
    for number in (signal.SIGINT, signal.SIGTERM):  # as deepspeed's runner passes Ctrl-C on
        for one in two_ranks:
            one.send(number)
        time.sleep(0.1)
    assert [one.end() for one in two_ranks] == [130, 130]
    assert saved_steps(tmp_path / "saved") == [last_step(two_ranks[0].output)[0]]


@pytest.fixture
def many_rows(tmp_path):
    """A data file whose evaluation takes minutes."""
    many = tmp_path / "many.json"
    row = '{"img": "images/1.png", "prompt": "?", "label": "a"}'
    many.write_text("[" + ", ".join([row] * 40_000) + "]")
    return many


@pytest.mark.long
@pytest.mark.run
@pytest.mark.parametrize("signalled", [(1,), pytest.param((0, 1), marks=pytest.mark.long)])
def test_signal_in_an_evaluation_of_two_processes_gives_it_up_and_saves_the_run(ranks, many_rows, tmp_path, signalled):
    both = ranks("--eval-interval", "2", "--valid-data", many_rows, "--check_seconds", "0")
    both[0].read_until("step      2/")
    time.sleep(1.5)
    for rank in signalled:
        both[rank].send(signal.SIGTERM)
    assert [one.end(60) for one in both] == [143, 143]
    assert saved_steps(tmp_path / "saved") == [2]
    assert "SIGTERM: stopped after step 2 of 100000. To go on: --resume " in both[0].output
    assert "validation loss" not in both[0].output
    assert "Traceback" not in both[0].output + both[1].output


@pytest.mark.run
@pytest.mark.long
def test_run_of_two_processes_that_a_signal_stopped_in_an_evaluation_is_resumed_exactly(ranks, tmp_path):
    flags = ("--eval-interval", "2", "--valid-data", "dataset.json", "--train-iters", "6", "--lr", "0.05")
    flags += ("--auto_warmup_steps", "0", "--num-workers", "0")
    whole = ranks(*flags, "--save", tmp_path / "whole")
    assert [one.end(60) for one in whole] == [0, 0]
    stopped = ranks(*flags)
    stopped[0].read_until("step 2/6")  # the evaluation begins
    stopped[1].send(signal.SIGTERM)
    assert [one.end(60) for one in stopped] == [143, 143]
    (folder,) = (tmp_path / "saved").iterdir()
    resumed = ranks(*flags, "--resume", folder)
    assert [one.end(60) for one in resumed] == [0, 0]
    shown = [re.sub(r"  \S+ samples/s.*", "", line) for line in lines_of_losses(whole[0])]
    both_parts = lines_of_losses(stopped[0]) + lines_of_losses(resumed[0])
    assert [re.sub(r"  \S+ samples/s.*", "", line) for line in both_parts] == shown


def lines_of_losses(one):
    return [line for line in one.output.splitlines() if line.startswith("step ") or "validation loss" in line]


@pytest.mark.run
def test_run_that_is_killed_in_its_last_evaluation_has_saved_its_last_step(run, many_rows, tmp_path):
    one = run("--train-iters", "2", "--eval-interval", "2", "--valid-data", many_rows, "--check_seconds", "0")
    one.read_until("Saved")
    one.send(signal.SIGKILL)
    one.end()
    assert "validation loss" not in one.output
    assert saved_steps(tmp_path / "saved") == [2]


# --- what is around a run


@pytest.mark.run
@pytest.mark.parametrize("pipe", ["|", pytest.param("2>&1 |", marks=pytest.mark.long)])
def test_run_goes_on_and_is_saved_where_nobody_reads_its_output_any_more(upstream_checkpoint, tmp_path, pipe):
    words = [
        commands() / "python", PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, *FLAGS[:-2],
        "--train-iters", "3", "--save", tmp_path / "saved",
    ]  # fmt: skip
    shell = f"{shlex.join(map(str, words))} {pipe} head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=GOLDEN / "upstream", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert saved_steps(tmp_path / "saved") == [3]
    assert (GOES_ON in done.stderr) == (pipe == "|")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


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
