"""Files that are whole or not there, and checkpoints whose damage is found, named and passed over."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import write_tuned

from model.checkpoints.layout import Checkpoint, checkpoint_problem
from model.checkpoints.whole import (
    CHECKSUMS_FILE,
    DamagedCheckpoint,
    config_was_changed,
    damage,
    place_problem,
    put_in_place,
    remove_unfinished,
    write_whole,
)
from model.convert.merge_lora import merge
from model.errors import InputError
from model.inference.load import load_for_answering

WEIGHTS = "mp_rank_00_model_states.pt"
FLIPS = 20


def dies_midway(path: Path) -> None:
    path.write_bytes(b"half of it")
    raise KeyboardInterrupt


def test_write_whole_when_writing_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    write_whole(path, lambda unfinished: unfinished.write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, dies_midway)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_place_where_no_file_can_be_written_is_told_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    assert place_problem(file) is None
    assert place_problem(tmp_path) == "a folder; the name of a file is needed."
    assert place_problem(file / "below") == f"no folder {file}; one that is there is needed."
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert place_problem(file) == f"{tmp_path} can't be written to; another place is needed."


def test_put_in_place_replaces_the_folder_and_notes_what_is_in_it(tmp_path: Path) -> None:
    for name, content in (("1", b"old"), ("1.unfinished", b"new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(content)
    put_in_place(tmp_path / "1.unfinished", tmp_path / "1")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert (tmp_path / "1" / WEIGHTS).read_bytes() == b"new"
    sums = {"bytes": 3, "sha256": "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"}
    assert json.loads((tmp_path / "1" / CHECKSUMS_FILE).read_text()) == {"files": {WEIGHTS: sums}}


def test_remove_unfinished_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1.unfinished").symlink_to(tmp_path / "kept")
    remove_unfinished(tmp_path / "run")
    assert (tmp_path / "kept" / "file").exists()
    assert list((tmp_path / "run").iterdir()) == []


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(upstream_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the iterations 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    second = write_tuned(upstream_checkpoint, folder.with_name("other"), use_lora=True, lora_rank=2)
    write_tuned(upstream_checkpoint, folder, use_lora=True, lora_rank=2)
    (second / "1").rename(folder / "2")
    (folder / "latest").write_text("2")
    return folder


@pytest.fixture
def run(two: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two, tmp_path / "run"))


def flip(path: Path, share: float, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1 << bit
    path.write_bytes(content)


def test_whole_iterations_are_found_without_a_word(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert damage(run / "1") is damage(run / "2") is None
    assert Checkpoint.find(run).iteration == Checkpoint.at(run).iteration == "2"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("place", range(FLIPS))
def test_one_flipped_bit_is_found_and_the_iteration_before_is_used(
    run: Path, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "2" / WEIGHTS, place / FLIPS, place % 8)
    assert Checkpoint.find(run).iteration == "1"
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"WARNING: --from_pretrained {run}: iteration 2 is left out: {run}/2/{WEIGHTS} is damaged: its checksum isn't the "
        "one in checksums.json. Iteration 1 is used."
    )


DAMAGES = {
    "cut short": lambda run: (run / "2" / WEIGHTS).write_bytes((run / "2" / WEIGHTS).read_bytes()[:-1]),
    "gone": lambda run: (run / "2" / WEIGHTS).unlink(),
    "all gone": lambda run: shutil.rmtree(run / "2"),
    "checksums cut short": lambda run: (run / "2" / CHECKSUMS_FILE).write_bytes(b'{"files": '),
    "checksums of nothing": lambda run: (run / "2" / CHECKSUMS_FILE).write_bytes(b'{"files": {}}'),
    "checksums of other files": lambda run: (run / "2" / CHECKSUMS_FILE).write_text('{"files": {"../../x": 1}}'),
    "checksums not UTF-8": lambda run: (run / "2" / CHECKSUMS_FILE).write_bytes(b"\xff\xfe"),
}


def test_checksums_and_configuration_that_may_not_be_read_are_not_called_damaged_or_changed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (run / "model_config.json").write_text("{}")
    with monkeypatch.context() as patch:  # root may read every file
        patch.setattr("os.access", lambda path, mode: False)
        assert not config_was_changed(run / "2")
        patch.setattr(Path, "read_bytes", closed)
        assert damage(run / "2") == f"{run / '2' / CHECKSUMS_FILE} can't be read: Permission denied"


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_iteration_is_named_and_the_one_before_is_used(
    run: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[kind](run)
    assert Checkpoint.find(run).iteration == Checkpoint.at(run).iteration == "1"
    assert checkpoint_problem(run, ("latest",)) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("iteration 2 is left out: " in line and str(run / "2") in line for line in lines)


@pytest.mark.parametrize("part", ["2", f"2/{WEIGHTS}"])
def test_damaged_iteration_that_was_named_is_an_error(run: Path, part: str) -> None:
    flip(run / "2" / WEIGHTS, 0.5)
    with pytest.raises(
        DamagedCheckpoint, match=r"is damaged: .*; another iteration, or a copy of this one that is whole"
    ):
        Checkpoint.find(run / part)
    with pytest.raises(DamagedCheckpoint):
        Checkpoint.at(run, 2)


def test_unfinished_iteration_that_was_named_is_an_error(run: Path) -> None:
    (run / "2").rename(run / "3.unfinished")
    with pytest.raises(DamagedCheckpoint, match=r"3\.unfinished was never finished"):
        Checkpoint.find(run / "3.unfinished")


def test_run_without_a_whole_iteration_is_an_error(run: Path) -> None:
    for iteration in "12":
        flip(run / iteration / WEIGHTS, 0.5)
    with pytest.raises(DamagedCheckpoint, match=r"2/.* is damaged: .*; no iteration before it is whole"):
        Checkpoint.find(run)


def test_damaged_tokenizer_is_an_error(run: Path) -> None:
    flip(run / "ice_text.model", 0.5)
    with pytest.raises(DamagedCheckpoint, match=r"ice_text\.model is damaged"):
        Checkpoint.find(run)


def test_checkpoint_without_checksums_is_taken_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "2" / CHECKSUMS_FILE).unlink()
    flip(run / "2" / WEIGHTS, 0.5)
    assert Checkpoint.find(run).iteration == "2"
    assert capsys.readouterr().err == ""


def test_iteration_without_checksums_is_no_stand_in_for_a_damaged_one(run: Path) -> None:
    (run / "1" / CHECKSUMS_FILE).unlink()
    flip(run / "2" / WEIGHTS, 0.5)
    with pytest.raises(DamagedCheckpoint, match="no iteration before it is whole"):
        Checkpoint.find(run)


def test_configuration_that_was_edited_is_used_with_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "model_config.json").read_text()) | {"lora_alpha": 3.5}
    (run / "model_config.json").write_text(json.dumps(config))
    assert config_was_changed(run / "2")
    assert Checkpoint.find(run).config["lora_alpha"] == 3.5
    assert "model_config.json was changed after iteration 2 was saved" in capsys.readouterr().err


def test_damaged_base_is_named_and_not_called_missing(run: Path, tmp_path: Path) -> None:
    merged = merge(str(run), str(tmp_path / "merged"))
    adapter = write_tuned(merged, tmp_path / "again", use_lora=True)
    flip(merged / "1" / WEIGHTS, 0.5)
    with pytest.raises(InputError, match=r"merged/1/.* is damaged"):
        load_for_answering(str(adapter))


def test_chatting_and_merging_pass_over_a_damaged_iteration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "2" / WEIGHTS, 0.5)
    load_for_answering(str(run))
    merge(str(run), str(run.parent / "merged"))
    assert capsys.readouterr().err.count("Iteration 1 is used.") == 2
