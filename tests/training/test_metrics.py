"""The record of a step and of an evaluation: what is printed of it, and where else it goes."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.training import metrics as module
from model.training.metrics import TrainingReport

ARGS = SimpleNamespace(batch_size=4, gradient_accumulation_steps=2, world_size=6, model_parallel_size=2, wandb=False)


class Writer:
    """A TensorBoard writer that keeps what it is given."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value


def step(report, number, last=20, loss=1.5, milliseconds=2000.0, writer=None, args=ARGS):
    report.step(writer, None, 9.9, loss, milliseconds, number, last, args, {"loss": loss})


def scheduled(report, rates):
    """SAT's scheduler and optimizer as report watches them: the rate is rates[n] in step n."""
    optimizer = SimpleNamespace(param_groups=[{"lr": rates[0]}])
    upcoming = iter(rates[1:])

    class Scheduler:
        def step(self, step_number=None):
            optimizer.param_groups[0]["lr"] = next(upcoming)

    scheduler = Scheduler()
    report.watch(scheduler, optimizer)
    return scheduler, optimizer


def test_line_of_a_step_has_loss_rate_speed_and_time_left(clock, capsys):
    report = TrainingReport()
    scheduled(report, [1e-4, 2e-4])[0].step()
    step(report, 1, loss=8.31917)
    # 4 rows · 2 accumulated · 3 data-parallel groups in 2 s
    assert capsys.readouterr().out == "step  1/20  loss 8.3192  lr 1.00e-04  12.0 samples/s  38 s left\n"


def test_rate_of_a_step_is_the_one_it_used_not_the_next(clock, capsys):
    report = TrainingReport()
    scheduler, optimizer = scheduled(report, [5e-6, 1e-4, 2e-4])
    for number in (1, 2):
        scheduler.step()
        step(report, number)
    assert [line.split("lr ")[1].split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "5.00e-06",
        "1.00e-04",
    ]
    assert optimizer.param_groups[0]["lr"] == 2e-4


def test_watched_scheduler_takes_a_step_number_as_before():
    seen = []
    scheduler = SimpleNamespace(step=lambda number=None: seen.append(number))
    TrainingReport().watch(scheduler, SimpleNamespace(param_groups=[{"lr": 1.0}]))
    scheduler.step()
    scheduler.step(7)
    assert seen == [None, 7]


def test_time_left_leaves_the_slow_first_step_out(clock, capsys):
    report = TrainingReport()
    clock.now = 60.0  # the first step took a minute
    step(report, 1, last=101, milliseconds=60_000)
    clock.now = 62.0
    step(report, 2, last=101, milliseconds=2000)
    clock.now = 64.0
    step(report, 3, last=101, milliseconds=2000)
    left = [line.split("samples/s  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["1 h 40 min left", "3 min 18 s left", "3 min 16 s left"]


def test_last_step_has_no_time_left(clock, capsys):
    report = TrainingReport()
    step(report, 19)
    step(report, 20)
    assert capsys.readouterr().out.splitlines()[-1].endswith("  0 s left")


def test_step_numbers_stand_under_each_other(clock, capsys):
    report = TrainingReport()
    for number in (9, 10, 300):
        step(report, number, last=300)
    assert [line[:12] for line in capsys.readouterr().out.splitlines()] == [
        "step   9/300",
        "step  10/300",
        "step 300/300",
    ]


def test_line_of_an_evaluation_has_its_loss_and_perplexity(clock, capsys):
    TrainingReport().evaluation(None, "iteration 300", 1.5, 4.4817, 300, ARGS, {})
    assert capsys.readouterr().out == "iteration 300: validation loss 1.5000, perplexity 4.48\n"


def test_line_of_the_evaluation_on_test_data_calls_its_loss_that(clock, capsys):
    TrainingReport().evaluation(None, "the end of training for test data", 1.5, 4.4817, 300, ARGS, {})
    assert capsys.readouterr().out == "the end of training for test data: test loss 1.5000, perplexity 4.48\n"


def test_other_processes_report_nothing(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    step(TrainingReport(), 1)
    TrainingReport().evaluation(None, "iteration 300", 1.5, 4.48, 300, ARGS, {})
    assert capsys.readouterr().out == ""


def test_tensorboard_gets_what_is_printed(clock):
    report, writer = TrainingReport(), Writer()
    scheduled(report, [1e-4, 2e-4])[0].step()
    step(report, 1, writer=writer)
    report.evaluation(writer, "iteration 1", 1.25, 3.49, 1, ARGS, {})
    assert writer.scalars == {
        ("Train/lr", 1): 1e-4,
        ("Train/train_loss", 1): 1.5,
        ("Train/samples_per_second", 1): 12.0,
        ("Train/valid_loss", 1): 1.25,
        ("Train/valid_ppl", 1): 3.49,
    }


@pytest.mark.parametrize(("rank", "messages"), [("0", 1), ("1", 0)])
def test_wandb_when_asked_for_gets_the_step_from_the_first_process(clock, monkeypatch, rank, messages):
    logged = []
    fake = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    monkeypatch.setitem(module.sys.modules, "wandb", fake)
    monkeypatch.setenv("RANK", rank)
    step(TrainingReport(), 1, args=SimpleNamespace(**vars(ARGS) | {"wandb": True}))
    values = {"Train/lr": 0.0, "Train/train_loss": 1.5, "Train/samples_per_second": 12.0}
    assert logged == [(values, 1)] * messages


def test_line_shows_skipped_steps_and_batches_without_a_usable_row_once_there_are_some(clock, capsys):
    report = TrainingReport()
    step(report, 1)
    report.skipped_steps, report.empty_batches = 2, 5
    step(report, 2)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" left")
    assert second.endswith(" left  2 skipped  5 without a usable row")


@pytest.mark.parametrize(("empty", "loss", "processes", "expected"), [
    (2, 0.0, 1, math.nan),  # no row of the step
    (1, 0.7, 1, 1.4),  # of two micro-batches one, which counts 0 in SAT's mean
    (0, 0.7, 1, 0.7), (2, 0.7, 3, 0.7), (2, 0.0, 3, math.nan),
])  # fmt: skip
def test_rows_that_could_not_be_used_do_not_count_as_no_loss(clock, capsys, empty, loss, processes, expected):
    report, records = TrainingReport(), []
    report.sinks.append(records.append)
    args = SimpleNamespace(**vars(ARGS) | {"world_size": processes, "model_parallel_size": 1})
    report.empty_batches = empty
    step(report, 1, loss=loss, args=args)
    assert records[0].loss == pytest.approx(expected, nan_ok=True)
    assert records[0].has_no_rows == math.isnan(expected)
    step(report, 2, loss=1.5, args=args)
    shown = [line.split("loss ")[1].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["none" if math.isnan(expected) else f"{expected:.4f}", "1.5000"]


def test_line_of_an_fp16_step_shows_the_loss_scale(clock, capsys):
    args = SimpleNamespace(**vars(ARGS) | {"fp16": True})
    TrainingReport().step(None, SimpleNamespace(loss_scale=65536.0), 9.9, 1.5, 2000.0, 1, 20, args, {})
    assert capsys.readouterr().out.endswith(" left  loss scale 65536\n")


def test_loss_that_isnt_finite_is_not_sent_to_tensorboard(clock):
    writer = Writer()
    step(TrainingReport(), 1, loss=float("nan"), writer=writer)
    assert ("Train/train_loss", 1) not in writer.scalars
    assert ("Train/lr", 1) in writer.scalars


def events(file):
    """The events of a TensorBoard file: each stands between its length, 8 bytes, and checksums of 4."""
    from tensorboardX.proto.event_pb2 import Event

    content, found = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_tensorboard_file_holds_the_numbers_of_each_step(tmp_path):
    written = module.TensorBoardFile(tmp_path / "runs/a-run", 4)
    written.add_scalar("Train/lr", 0.5, 5)
    written.add_scalar("Train/train_loss", 0.25, 5)
    written.flush()
    (file,) = (tmp_path / "runs/a-run").iterdir()
    version, start, *steps = events(file)
    assert (version.file_version, start.step, start.session_log.status) == ("brain.Event:2", 4, 1)
    values = [(event.step, value.tag, value.simple_value) for event in steps for value in event.summary.value]
    assert values == [(5, "Train/lr", 0.5), (5, "Train/train_loss", 0.25)]


def test_tensorboard_file_is_closed_whole_when_its_run_lets_go_of_it(tmp_path):
    written = module.TensorBoardFile(tmp_path / "runs/a-run")
    written.add_scalar("Train/lr", 0.5, 1)
    (file,) = (tmp_path / "runs/a-run").iterdir()
    assert str(file) in open_files()
    del written
    assert str(file) not in open_files()
    assert events(file)[-1].step == 1


def open_files():
    return [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]


def test_tensorboard_file_that_cant_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "runs").write_text("a file, not a folder")
    written = module.TensorBoardFile(tmp_path / "runs/a-run")
    written.add_scalar("Train/lr", 0.5, 1)
    written.flush()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorBoard's file can't be written ([Errno 20] Not a directory")


def test_line_after_a_run_went_on_has_the_mean_loss_with_the_steps_before_it(clock, capsys):
    before, after = TrainingReport(), TrainingReport()
    before.terminal.lines_every = after.terminal.lines_every = 3
    for number, loss in enumerate((4.0, 2.0), 1):
        step(before, number, loss=loss)
    after.load_state_dict(before.state_dict())
    step(after, 3, loss=9.0, milliseconds=3000.0)
    (line,) = capsys.readouterr().out.splitlines()
    assert "loss 5.0000" in line
    assert "8.0 samples/s" in line  # 24 samples in the three seconds that the one step took


def test_next_line_after_that_has_its_own_steps_loss_again(clock, capsys):
    report = TrainingReport()
    report.load_state_dict({"loss_sum": 4.0, "summed_steps": 1, "evaluation_loss": 0.5})
    assert report.evaluation_loss == 0.5
    for number in (1, 2):
        step(report, number, loss=2.0)
    assert ["loss 3.0000" in line for line in capsys.readouterr().out.splitlines()] == [True, False]


def test_evaluation_in_which_no_row_could_be_used_has_no_loss(capsys):
    report, seen = TrainingReport(), []
    report.sinks.append(seen.append)
    report.evaluation(None, "iteration 1", 0.0, 1.0, 1, ARGS, {"loss": 0.0, "tokens": 0.0})
    assert capsys.readouterr().out == "iteration 1: validation loss nan, perplexity nan\n"
    assert [json.loads(one.to_line())["loss"] for one in seen] == [None]
    assert math.isnan(report.measures["loss"])


def test_sinks_get_a_record_of_each_step_and_evaluation(clock, monkeypatch):
    report, records = TrainingReport(), []
    report.sinks.append(records.append)
    report.epoch = lambda: 0.5
    step(report, 1)
    report.skipped_steps, report.empty_batches, report.split = 3, 2, "test"
    step(report, 2, loss=0.25)
    report.evaluation(None, "the end", 1.25, 3.49, None, ARGS, {})
    found = [(one.kind, one.step, one.loss, one.epoch, one.skipped, one.empty_batches, one.split) for one in records]
    assert found == [
        ("step", 1, 1.5, 0.5, 0, 0, None),
        ("step", 2, 0.25, 0.5, 3, 2, None),
        ("evaluation", 2, 1.25, 0.5, None, None, "test"),
    ]
    assert records[0].memory_bytes > 2**20
    monkeypatch.setenv("RANK", "1")
    step(report, 3)
    assert len(records) == 3
