"""What stands around a run's training: SAT is as before afterwards, whatever the block ends with."""

import importlib
import os
import signal
from datetime import timedelta

import pytest
from conftest import run_program, write_rows

from model import sat_compat
from model.cli.preflight import preflight
from model.cli.resuming import command_line
from model.errors import InputError
from model.training.run import guarded_run


@pytest.fixture
def parts(upstream_checkpoint, tmp_path):
    """A command line that can be run, and what its checks found."""
    rows = write_rows(tmp_path, [{"prompt": "?", "label": label} for label in "abcd"])
    flags = ["--from_pretrained", upstream_checkpoint, "--use_lora", "--train-data", rows, "--save", tmp_path / "saved"]
    line = command_line([*map(str, flags), "--keep_best", "--holdout", "1", "--eval-interval", "2"])
    return line, preflight(line.options)


def saves():
    """SAT's own function, or what a run has put in its place."""
    return importlib.import_module("sat.training.deepspeed_training").save_checkpoint


@pytest.mark.parametrize(
    ("seconds", "wait"), [("20", timedelta(hours=1, seconds=20)), ("inf", timedelta(days=7, hours=1))]
)
def test_processes_wait_for_one_that_checks_pictures_longer(parts, seconds, wait):
    line, inputs = parts
    line.options.check_seconds = float(seconds)
    with guarded_run(line, inputs) as run:
        assert run.hooks.longest_wait == wait


def out_of_memory():
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory")


def test_sat_is_replaced_in_the_block_and_as_before_after_an_error(parts, tmp_path):
    sat_compat.import_sat(training=True)
    before, within = saves(), []

    def train():
        with guarded_run(*parts) as run:
            within.append(saves() == run.hooks.save_checkpoint != before)
            out_of_memory()

    with pytest.raises(InputError, match="memory"):
        train()
    assert within == [True]
    assert saves() is before
    assert not (tmp_path / "saved").exists()  # not a step was taken


def test_signal_in_the_block_before_a_step_ends_it_with_the_signals_status_and_a_line(parts, capfd):
    def train():
        with guarded_run(*parts):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        train()
    assert left.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err.splitlines()[-1] == "SIGTERM: stopped before the first step; nothing new was saved."


@pytest.mark.run
@pytest.mark.parametrize(
    ("flags", "zero_stages", "imported"),
    [
        (["--use_lora"], "1,3", []),
        (["--use_qlora", "--save_full_model"], "1", []),
        *(
            pytest.param(flags, stages, imported, marks=pytest.mark.long)
            for flags, stages, imported in (
                (["--use_lora"], "0", []),
                (["--use_lora", "--checkpoint-activations"], "0,3", ["sympy"]),  # a backward pass inside another one
                (["--use_qlora"], "0", []),
                (["--use_ptuning"], "0,1,3", []),
            )
        ),
    ],
)
def test_run_imports_none_of_the_slow_modules_that_it_does_not_need(
    upstream_checkpoint, tmp_path, flags, zero_stages, imported
):
    rows = write_rows(tmp_path, [{"prompt": "?", "label": "a"}] * 2)
    done = run_program(
        "imported_by_a_run", zero_stages, "--from_pretrained", upstream_checkpoint, *flags, "--train-data", rows,
        "--train-iters", "1", "--save", tmp_path / "saved",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(imported)
    folders = [*(tmp_path / "saved").iterdir()]
    assert len(folders) == len(zero_stages.split(","))
    assert not any((folder / "loss.png").exists() for folder in folders)  # one step makes no curve
