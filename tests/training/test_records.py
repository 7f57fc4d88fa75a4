"""metrics.jsonl: what is written is what is read, whatever ended the run; and what a run that goes on keeps of it."""

import json
import math
import os

import pytest

from model.training.records import MetricsFile, Record, read_records, running_mean


def step(number, loss=1.5, **more):
    return Record("step", number, loss, 1795568570.25, lr=1e-4, skipped=0, **more)


def evaluation(number, loss=1.25):
    return Record("evaluation", number, loss, 1795568570.5, perplexity=math.exp(loss), split="val")


def written(path, *records):
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    file.close()


def test_records_that_are_written_are_read_again(tmp_path):
    records = [step(1, epoch=0.25, loss_scale=65536.0), step(2, memory_bytes=2**30), evaluation(2)]
    written(tmp_path / "metrics.jsonl", *records)
    assert read_records(tmp_path / "metrics.jsonl") == records


def test_line_has_no_fields_that_a_record_has_nothing_for():
    assert json.loads(evaluation(3, 0.0).to_line()) == {
        "kind": "evaluation", "step": 3, "loss": 0.0, "time": 1795568570.5, "perplexity": 1.0, "split": "val",
    }  # fmt: skip


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_loss_that_isnt_finite_is_null_for_every_reader_of_json_and_nan_again_for_ours(tmp_path, loss):
    line = step(1, loss).to_line()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    written(tmp_path / "metrics.jsonl", step(1, loss))
    assert math.isnan(read_records(tmp_path / "metrics.jsonl")[0].loss)


def test_lines_are_there_before_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(step(1))
    assert read_records(tmp_path / "metrics.jsonl") == [step(1)]
    file.close()


def test_line_that_a_kill_has_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, step(1), step(2))
    os.truncate(path, path.stat().st_size - 5)
    assert read_records(path) == [step(1)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[1]",
        '{"kind": "other", "step": 1}',
        '{"kind": "step"}',
        "\x00\xff",
        '{"kind": "step", "step": 1, "loss": 1, "more": 2}',
    ],
)
def test_lines_of_other_versions_and_programs_do_no_harm(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{line}\n{step(7).to_line()}")
    assert read_records(path)[-1] == step(7)
    assert len(read_records(path)) == 1 + ("more" in line)


def test_file_that_can_not_be_read_stays_as_it_is(tmp_path, monkeypatch, capsys):
    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(step(1).to_line().encode())
    monkeypatch.setattr("pathlib.Path.read_text", closed)  # root may read every file
    MetricsFile(path, keep=lambda record: True).write(step(2))
    assert path.read_bytes() == step(1).to_line().encode()
    assert "metrics.jsonl can't be written (Permission denied)" in capsys.readouterr().err


def test_file_that_goes_on_keeps_what_it_is_told_to_and_the_rest_comes_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, step(1), step(2), evaluation(2), step(3))
    file = MetricsFile(path, keep=lambda record: record.step <= 2)
    file.write(step(3, 9.0))
    file.close()
    assert read_records(path) == [step(1), step(2), evaluation(2), step(3, 9.0)]


def test_file_that_cant_be_written_is_one_line_and_no_error(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    written(tmp_path / "metrics.jsonl", step(1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("metrics.jsonl can't be written (Is a directory); training goes on without it.")


def test_running_mean_leaves_losses_out_that_are_not_finite():
    assert running_mean([1.0, math.nan, 3.0, math.inf]) == 2.0
    assert math.isnan(running_mean([math.nan]))
