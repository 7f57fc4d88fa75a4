"""The two files that a run goes on from: what they hold, and that a bad one is told in a sentence."""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint

from model.checkpoints.resume import (
    RECORD_FILE,
    STATE_FILE,
    RunRecord,
    digest,
    newest_run,
    read_state,
    resumed_from,
    write_state,
)
from model.errors import InputError

RECORD = RunRecord(
    iteration=3,
    steps=7,
    words=["--use_lora", "--train-data", "rows.json"],
    experiment="animals",
    processes=1,
    data={"rows.json": "abc"},
    left_out={"rows.json": [2]},
    config={"hidden_dropout": 0.0},
    saved_at=100.0,
)


def write_run(folder: Path, iteration: int = 1, **changes: object) -> Path:
    """A run's folder with one checkpoint that can be resumed."""
    write_checkpoint(folder, {"num_layers": 2}, {"weight": torch.zeros(1)})
    RunRecord(**{**asdict(RECORD), "iteration": iteration, **changes}).write(folder / "1" / RECORD_FILE)
    write_state({"samples": 12}, folder / "1" / STATE_FILE)
    return folder


def test_record_that_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == RECORD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iteration", "3"), ("iteration", -1), ("steps", True), ("words", "--use_lora"), ("words", [1]), ("data", ["rows.json"]),
        ("data", {"rows.json": 1}), ("left_out", {"rows.json": 2}), ("left_out", {"rows.json": ["2"]}), ("experiment", None),
        ("saved_at", "now"), ("config", []), ("version", None),
    ],
)  # fmt: skip
def test_record_with_an_odd_value_is_refused_by_its_name(tmp_path: Path, name: str, value: object) -> None:
    (tmp_path / "record.json").write_text(json.dumps({**asdict(RECORD), name: value}))
    with pytest.raises(InputError, match=rf"record\.json: {name} can't be used; a record that a run wrote is needed"):
        RunRecord.read(tmp_path / "record.json")


def test_record_of_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({**asdict(RECORD), "version": 2}))
    with pytest.raises(InputError, match="of version 2; this program reads version 1"):
        RunRecord.read(tmp_path / "record.json")


def test_state_that_was_written_is_read_as_it_was(tmp_path: Path) -> None:
    write_state(
        {"parameters": {"a": {"exp_avg": torch.arange(3.0)}}, "random": [["python", 3, None]]}, tmp_path / "state.pt"
    )
    state = read_state(tmp_path / "state.pt")
    assert state["parameters"]["a"]["exp_avg"].tolist() == [0.0, 1.0, 2.0]
    assert state["random"] == [["python", 3, None]]


class RunsACommand:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_state_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"version": 1, "parameters": RunsACommand(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="can't be read as the state of a run"):
        read_state(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"<html></html>", pickle.dumps({"version": 1})[:10]])
def test_state_that_is_no_such_file_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"can't be read as the state of a run .*one that is whole is needed"):
        read_state(tmp_path / "state.pt")


def test_weights_in_place_of_a_state_are_refused(tmp_path: Path) -> None:
    torch.save({"module": {}}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="not a run's state of version 1"):
        read_state(tmp_path / "state.pt")


@pytest.mark.parametrize("place", ["", "1"])
def test_run_is_found_by_its_folder_and_by_an_iterations(tmp_path: Path, place: str) -> None:
    resumed = resumed_from(str(write_run(tmp_path / "run") / place))
    assert resumed.checkpoint.folder == tmp_path / "run"
    assert resumed.record.words == RECORD.words


def test_run_goes_on_with_the_settings_that_its_own_configuration_lacks(tmp_path: Path) -> None:
    resumed = resumed_from(str(write_run(tmp_path / "run", config={"hidden_dropout": 0.0, "num_layers": 9})))
    assert resumed.checkpoint.config == {"hidden_dropout": 0.0, "num_layers": 2}


@pytest.mark.parametrize("file", [RECORD_FILE, STATE_FILE])
def test_checkpoint_without_the_state_of_its_run_is_refused(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "1" / file).unlink()
    with pytest.raises(InputError, match=rf"--resume .*run: no .*{file}; .* --from_pretrained starts a new run"):
        resumed_from(str(folder))


def test_newest_run_is_the_one_saved_last_of_its_experiment(tmp_path: Path) -> None:
    for name, saved_at, experiment in (("a", 5.0, "animals"), ("b", 9.0, "animals"), ("c", 20.0, "plants")):
        write_run(tmp_path / name, saved_at=saved_at, experiment=experiment)
    newest, skipped = newest_run(tmp_path, "animals")
    assert newest is not None
    assert newest.checkpoint.folder.name == "b"
    assert skipped == []


@pytest.mark.parametrize(("latest", "taken"), [("4", "4"), ("2", "2"), (None, "4")])
def test_iteration_of_the_newest_run_is_the_latest_whatever_the_clocks_say(
    tmp_path: Path, latest: str | None, taken: str
) -> None:
    folder = write_run(tmp_path / "run")
    for iteration, saved_at in (("2", 9.0), ("4", 5.0)):
        shutil.copytree(folder / "1", folder / iteration)
        RunRecord(**{**asdict(RECORD), "iteration": int(iteration), "saved_at": saved_at}).write(
            folder / iteration / RECORD_FILE
        )
    (folder / "latest").unlink() if latest is None else (folder / "latest").write_text(latest)
    newest, skipped = newest_run(tmp_path, "animals")
    assert newest is not None
    assert (newest.checkpoint.iteration, skipped) == (taken, [])


@pytest.mark.parametrize("file", [STATE_FILE, "mp_rank_00_model_states.pt", "../model_config.json", RECORD_FILE])
def test_newest_checkpoint_that_is_not_whole_is_left_out_and_the_one_before_is_used(tmp_path: Path, file: str) -> None:
    write_run(tmp_path / "a", saved_at=5.0)
    damaged = write_run(tmp_path / "b", saved_at=9.0) / "1" / file
    damaged.write_text("") if file == RECORD_FILE else damaged.unlink()
    newest, skipped = newest_run(tmp_path, "animals")
    assert newest is not None
    assert newest.checkpoint.folder.name == "a"
    assert len(skipped) == 1
    assert str(tmp_path / "b") in skipped[0]


def test_newest_run_where_there_is_no_folder_is_none(tmp_path: Path) -> None:
    assert newest_run(tmp_path / "nothing", "animals") == (None, [])


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "it is empty"), (b"text", "it isn't a file that torch wrote"), (b"<html>", "it is a web page")]
)  # fmt: skip
def test_state_that_is_another_file_is_called_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(InputError, match=f"can't be read as the state of a run \\({reason}"):
        read_state(tmp_path / STATE_FILE)


def test_record_names_files_whose_names_are_not_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xce\xd2.json")  # as Windows writes Chinese
    record = RunRecord(1, 2, ["--train-data", name], "猫", 1, {name: "0"}, {name: [3]}, {})
    record.write(tmp_path / RECORD_FILE)
    assert RunRecord.read(tmp_path / RECORD_FILE) == record
    assert "猫" in (tmp_path / RECORD_FILE).read_text(encoding="utf-8")
