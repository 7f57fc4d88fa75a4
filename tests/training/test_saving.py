"""When a run saves, in a folder of its own; and that writing beside the training loses nothing, its errors neither."""

import os
import re
import signal
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GOLDEN, PROJECT, free_port, printed_losses, run_program, run_python

from model.checkpoints.layout import Checkpoint
from model.cli.options import parse
from model.errors import InputError
from model.training import sat_loop
from model.training.metrics import TrainingReport
from model.training.records import read_records
from model.training.sat_loop import LoopState
from model.training.saving import SECONDS_BETWEEN_SAVES, CheckpointSaver, TimedSaves

SCRIPT = PROJECT / "finetune_visualglm.py"
TRAINING = (
    "--use_lora", "--lora_rank", "2", "--mode", "finetune", "--train-data", GOLDEN / "upstream/dataset.json", "--batch-size",
    "2", "--num-workers", "0", "--auto_warmup_steps", "0", "--max_source_length", "80",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("process_group")


# --- beside the training ----------------------------------------------------------------------------------------------


class Disk:
    """A save_checkpoint whose disk works only when it is told to."""

    def __init__(self) -> None:
        self.works, self.written, self.threads = threading.Event(), [], set()
        self.error: Exception | None = None

    def save(self, iteration, model, optimizer, lr_scheduler, args, extra_files, publish) -> None:
        def wait_for_the_disk() -> None:
            self.works.wait(30)
            self.threads.add(threading.current_thread())
            if self.error is not None:
                raise self.error
            self.written.append((args.save, iteration))

        publish(wait_for_the_disk)


def save(saver: CheckpointSaver, iteration: int, folder: str = "run") -> None:
    saver.save(iteration, None, None, None, Namespace(save=folder))


def test_saver_does_not_wait_for_the_disk_but_for_the_save_before() -> None:
    disk = Disk()
    with CheckpointSaver(disk.save) as saver:
        save(saver, 1)
        assert disk.written == []
        disk.works.set()
        save(saver, 2)
        assert disk.written[0] == ("run", 1)
    assert disk.written == [("run", 1), ("run", 2)]
    assert threading.main_thread() not in disk.threads


def test_saver_saves_no_iteration_twice_into_the_same_folder() -> None:
    disk = Disk()
    disk.works.set()
    with CheckpointSaver(disk.save) as saver:
        for folder in ("run", "run/best", "run"):
            save(saver, 3, folder)
    assert disk.written == [("run", 3), ("run/best", 3)]


def failing() -> Disk:
    disk = Disk()
    disk.works.set()
    disk.error = InputError("the disk is full; room is needed.")
    return disk


def test_error_beside_the_training_ends_the_run_at_the_next_save() -> None:
    saver = CheckpointSaver(failing().save)
    save(saver, 1)
    with pytest.raises(InputError, match="the disk is full"):
        save(saver, 2)


def test_error_beside_the_training_ends_the_run_at_its_end() -> None:
    with pytest.raises(InputError, match="the disk is full"), CheckpointSaver(failing().save) as saver:
        save(saver, 1)


def test_saver_after_an_error_waits_for_the_disk_all_the_same() -> None:
    disk = Disk()
    threading.Timer(0.05, disk.works.set).start()

    def fails_after_a_save():
        with CheckpointSaver(disk.save) as saver:
            save(saver, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_after_a_save()
    assert disk.written == [("run", 1)]


# --- when -------------------------------------------------------------------------------------------------------------


class Saves:
    """Watches steps of so many seconds each, and keeps the iterations that were saved."""

    def __init__(self, seconds: float | None, seconds_a_step: float, **args: Any) -> None:
        self.now, self.saved = 0.0, []
        hooks = sat_loop.Hooks(lambda: 0, self.save, TrainingReport())
        watcher = TimedSaves(hooks, seconds, lambda: self.now)
        args = {"save": "run", "exit_interval": None, "device": "cpu", **args}
        state = LoopState("model", "optimizer", "scheduler", Namespace(iteration=0, **args))
        for _ in range(10):
            watcher.before_step(state)
            self.now += seconds_a_step
            watcher.after_step(state, torch.tensor(1.0), False)
            state.args.iteration += 1
            if state.args.exit_interval and state.args.iteration % state.args.exit_interval == 0:
                hooks.before_exit()

    def save(self, iteration: int, model: str, optimizer: str, scheduler: str, args: Namespace) -> None:
        assert (model, optimizer, scheduler, args.iteration) == ("model", "optimizer", "scheduler", iteration)
        self.saved.append(iteration)


@pytest.mark.parametrize(("seconds", "args", "saved"), [
    (300, {}, [3, 6, 9]),
    (None, {}, []),
    (300, {"save": None}, []),
    (None, {"exit_interval": 4}, [4, 8]),
    (None, {"exit_interval": 4, "save": None}, []),
])  # fmt: skip
def test_timed_saves_come_when_it_is_time_and_before_the_loop_leaves(seconds, args, saved) -> None:
    assert Saves(seconds, 100, **args).saved == saved


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_processes_save_before_the_same_step_by_the_clock_of_the_first(monkeypatch, order) -> None:
    store, saved = torch.distributed.HashStore(), []
    now = {"0": 0.0, "1": 0.0}

    def watcher_of(rank: str) -> TimedSaves:
        hooks = sat_loop.Hooks(lambda: 0, lambda step, *_: saved.append((rank, step)), TrainingReport())
        watcher = TimedSaves(hooks, 300, lambda: now[rank])
        watcher.last, watcher.store = 0.0, store
        return watcher

    watchers = {rank: watcher_of(rank) for rank in order}
    for step in range(8):
        now["0"] += 100
        for rank in order:  # whichever comes first to the next step
            monkeypatch.setenv("RANK", rank)
            args = Namespace(iteration=step, save="run", exit_interval=None, device="cpu")
            watchers[rank].before_step(LoopState("model", "optimizer", "scheduler", args))
    assert saved == [(rank, step) for step in (3, 7) for rank in order]


@pytest.mark.parametrize(("words", "seconds"), [
    ([], SECONDS_BETWEEN_SAVES),
    (["--epochs", "2"], None),
    (["--save-interval", "5000"], None),
    (["--save_full_model"], None),
])  # fmt: skip
def test_run_saves_every_five_minutes_unless_something_else_is_asked_for(words, seconds) -> None:
    hooks = sat_loop.Hooks(lambda: 0, lambda: None, TrainingReport())
    assert TimedSaves.of_run(hooks, parse(["--use_lora", "--train-data", "a", *words])).seconds == seconds


# --- whole runs -------------------------------------------------------------------------------------------------------


def train(checkpoint: Path, folder: Path, *words: str, launcher: tuple = (SCRIPT,)) -> Any:
    done = run_python(*launcher, "--from_pretrained", checkpoint, *TRAINING, *words, cwd=folder)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, saves=done.stdout.count("Saved "))


def iterations(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("checkpoints/*/[0-9]*")), key=int)


@pytest.mark.run
def test_run_without_save_is_saved_under_checkpoints_once(upstream_checkpoint: Path, tmp_path: Path) -> None:
    done = train(upstream_checkpoint, tmp_path, "--train-iters", "2", "--answers", "6")
    assert (done.code, done.saves) == (0, 1), done.err
    assert iterations(tmp_path) == ["2"]
    *_, saved, answers, page = done.out.splitlines()
    assert saved.startswith("Saved checkpoints/MyModel-")
    assert answers.startswith("Of ")
    assert page.startswith("Report: checkpoints/MyModel-")


@pytest.mark.run
def test_run_that_saves_nothing_says_so_loudly_and_has_the_same_losses(
    upstream_checkpoint: Path, tmp_path: Path
) -> None:
    often = train(
        upstream_checkpoint, tmp_path, "--train-iters", "4", "--save-interval", "1", "--save_total_limit", "2"
    )
    (tmp_path / "none").mkdir()
    workers = len(os.sched_getaffinity(0)) + 1  # of which torch would warn at each loader
    more = ["--num-workers", str(workers), "--profiling", "1"]
    none = train(upstream_checkpoint, tmp_path / "none", "--train-iters", "4", "--save", "none", *more)
    assert none.out.startswith("NOTHING IS SAVED (--save none)")
    assert f"--num-workers {workers}: {workers - 1} processor" in none.out
    assert "UserWarning" not in none.err
    assert "--profiling 1: it starts CUDA's profiler, and no GPU was found. Nothing is profiled." in none.out
    assert list((tmp_path / "none").glob("*")) == list((tmp_path / "none").glob("runs"))
    assert printed_losses(none.out) == printed_losses(often.out)
    assert often.saves == 4
    assert iterations(tmp_path) == ["3", "4"]


@pytest.mark.run
def test_run_of_epochs_is_saved_after_each(upstream_checkpoint: Path, tmp_path: Path) -> None:
    done = train(upstream_checkpoint, tmp_path, "--epochs", "2")
    assert (done.code, iterations(tmp_path)) == (0, ["3", "6"]), done.err


@pytest.mark.run
def test_run_that_leaves_at_an_exit_interval_has_saved(upstream_checkpoint: Path, tmp_path: Path) -> None:
    done = train(upstream_checkpoint, tmp_path, "--train-iters", "9", "--exit-interval", "3")
    assert (done.code, iterations(tmp_path)) == (0, ["3"]), done.err
    assert Checkpoint.find(next(tmp_path.glob("checkpoints/*"))).iteration == "3"
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert done.out.splitlines()[-1].startswith("--exit-interval 3: stopped after step 3 of 9. To go on: --resume ")
    assert done.out.count("Saved ") == 1
    assert folder.name in done.out.splitlines()[-1]


@pytest.mark.run
def test_run_whose_last_step_is_one_of_an_exit_interval_ends_as_others_do(
    upstream_checkpoint: Path, tmp_path: Path
) -> None:
    done = train(upstream_checkpoint, tmp_path, "--train-iters", "3", "--exit-interval", "3", "--holdout", "2")
    assert (done.code, iterations(tmp_path)) == (0, ["3"]), done.err
    assert "iteration 3: validation loss" in done.out
    assert "stopped" not in done.out
    assert "Report: " in done.out


@pytest.mark.run
def test_two_runs_of_the_same_minute_each_have_a_folder(upstream_checkpoint: Path, tmp_path: Path) -> None:
    def of_rank(rank: str) -> Any:
        return train(upstream_checkpoint, tmp_path, "--train-iters", "3", "--save-interval", "1", "--lora_rank", rank)

    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(of_rank, ("3", "5")))
    assert [run.code for run in runs] == [0, 0], runs
    for run, rank in zip(runs, (3, 5), strict=True):
        folder = tmp_path / re.findall(r"^Saved (\S+) ", run.out, re.MULTILINE)[-1]
        assert Checkpoint.find(folder).config["lora_rank"] == rank
        assert (
            torch.load(folder / "3/mp_rank_00_model_states.pt")["module"][
                "transformer.layers.0.attention.dense.matrix_A.0"
            ].shape[0]
            == rank
        )


@pytest.mark.run
def test_run_that_ends_before_it_saves_leaves_no_empty_folder(upstream_checkpoint: Path, tmp_path: Path) -> None:
    done = run_program("train_with_a_broken_step", "--from_pretrained", upstream_checkpoint, *TRAINING, cwd=tmp_path)
    assert "the step is broken" in done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.run
@pytest.mark.long
def test_two_processes_end_alike_when_their_disk_is_full(upstream_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    program = PROJECT / "tests/programs/train_onto_a_full_disk.py"
    done = train(
        upstream_checkpoint, tmp_path, "--train-iters", "4", "--save-interval", "1", launcher=(*launcher, program)
    )
    assert done.code != 0
    [error] = [line for line in done.err.splitlines() if line.startswith("finetune_visualglm.py: error: ")]
    assert "iteration 2 can't be saved (No space left on device)" in error
    assert iterations(tmp_path) == ["1"]
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.run
def test_run_that_goes_on_from_an_earlier_iteration_and_is_killed_goes_on_from_there_again(run, tmp_path):
    whole = run("--train-iters", "6", "--save-interval", "3")
    assert whole.end() == 0, whole.output
    (folder,) = (tmp_path / "saved").iterdir()
    before = [(one.kind, one.step, one.loss) for one in read_records(folder / "metrics.jsonl")]
    branch = run("--resume", folder / "3", "--train-iters", "100000", "--save-interval", "90000")
    branch.read_until("step      5/")
    branch.send(signal.SIGKILL)
    branch.end()
    assert (
        f"{folder}: iteration 3 is the latest from here on, 6 was; that one stays until it is saved anew."
        in branch.output
    )
    assert (folder / "latest").read_text() == "3"
    assert (folder / "6").is_dir()
    again = run("--resume", folder, "--train-iters", "6", "--save-interval", "3")
    assert again.end() == 0, again.output
    assert [(one.kind, one.step, one.loss) for one in read_records(folder / "metrics.jsonl")] == before
    assert (folder / "latest").read_text() == "6"
