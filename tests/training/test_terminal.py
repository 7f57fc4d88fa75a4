"""The lines of a run on a terminal, which renew themselves, and in a file, where each stays."""

import os
import pty
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, PROJECT
from warm_start import commands

from model.cli.options import parse
from model.training.records import Record
from model.training.terminal import Terminal, speed


def steps(terminal, clock, count, seconds=1.0, **fields):
    """What count steps of so many seconds each, with losses 1, 2, 3, …, print."""
    for number in range(1, count + 1):
        clock.now += seconds
        record = Record(
            "step", number, float(number), 0.0, lr=1e-4, seconds=seconds, samples_per_second=4 / seconds, **fields
        )
        terminal.step(record, count, 0, 0)


def test_renewed_line_has_the_mean_of_the_last_steps_and_what_the_gpu_holds(clock, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    steps(Terminal(renews=True, keeps_by_steps=False), clock, 25, memory_bytes=3 * 2**30, loss_scale=1024.0)
    renewed = capsys.readouterr().out.split("\r")
    # the mean of 5 … 24
    assert (
        renewed[24] == "step 24/25  loss 14.5000  lr 1.00e-04  4.0 samples/s  1 s left  3.0 GiB  loss scale 1024\x1b[K"
    )


def test_a_line_is_kept_every_half_minute_and_at_the_end(clock, capsys):
    steps(Terminal(renews=True, keeps_by_steps=False), clock, 80)
    lines = capsys.readouterr().out.split("\n")
    kept = [re.search(r"step +(\d+)/80  loss (\S+)", line.split("\r")[-1]) for line in lines[:-1]]
    # the means of 1 … 31, of 32 … 61 and of 62 … 80
    assert [found.groups() for found in kept] == [("31", "16.0000"), ("61", "46.5000"), ("80", "71.0000")]


def test_line_is_renewed_ten_times_a_second_at_most(clock, capsys):
    steps(Terminal(renews=True, keeps_by_steps=False), clock, 101, seconds=0.01)
    assert len(re.findall(r"\r", capsys.readouterr().out)) <= 12


def test_in_a_file_every_so_many_steps_have_a_line_with_their_mean(clock, capsys):
    terminal = Terminal()
    terminal.lines_every = 2
    steps(terminal, clock, 5)
    assert re.findall(r"^step (\d)/5  loss (\S+)", capsys.readouterr().out, re.MULTILINE) == [
        ("2", "1.5000"),
        ("4", "3.5000"),
    ]


@pytest.mark.parametrize(("words", "on_screen", "renews", "by_steps"), [
    ([], False, False, True),
    ([], True, True, False),
    (["--log-interval", "1"], True, False, True),
    (["--log-interval", "10"], True, True, True),
])  # fmt: skip
def test_what_is_renewed_and_kept_follows_from_flag_and_terminal(monkeypatch, words, on_screen, renews, by_steps):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: on_screen))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal.of_run(parse(words))
    assert (terminal.renews, terminal.keeps_by_steps) == (renews, by_steps)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(12.04, "12.0 samples/s"), (0.25, "0.2 samples/s"), (0.04, "25.0 s/sample"), (0.0, "no speed yet")],
)
def test_speed_is_never_zero(rate, text):
    assert speed(rate) == text


def on_a_terminal(*command, cwd):
    """What a command shows on a terminal of its own."""
    shown = []

    def read(descriptor):
        shown.append(os.read(descriptor, 65536))
        return b""

    pid, descriptor = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execve(
            commands() / "python", ["python", *map(str, command)], {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        )
    while True:
        try:
            read(descriptor)
        except OSError:  # the other end is closed
            break
    assert os.waitpid(pid, 0)[1] == 0, b"".join(shown)
    return b"".join(shown).decode()


@pytest.mark.run
def test_run_on_a_terminal_keeps_what_it_says_and_the_last_step(upstream_checkpoint):
    shown = on_a_terminal(
        PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, "--use_lora", "--mode", "finetune",
        "--train-data", "dataset.json", "--train-iters", "8", "--holdout", "2", "--eval-interval", "4", "--num-workers", "0",
        "--save", "none", cwd=GOLDEN / "upstream",
    )  # fmt: skip
    kept = [line.rstrip("\r").split("\r")[-1].removeprefix("\x1b[K") for line in shown.split("\n")]
    told = [line for line in kept if line.startswith(("step", "iteration"))]
    assert [line.split(":")[0].split("  ")[0] for line in told] == ["iteration 4", "step 8/8", "iteration 8"]
    assert "\rstep 1/8  loss " in shown
    assert " GiB" in shown
