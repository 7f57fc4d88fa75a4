"""Files that a command line names: checkpoints, JSON objects, places to save."""

import os
from pathlib import Path

import pytest

from model.checkpoints.layout import find_checkpoint, find_weights, read_json_object
from model.cli.flag_checks import save_problems
from model.cli.options import Options, parse
from model.errors import InputError

WEIGHTS = "mp_rank_00_model_states.pt"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SAT_HOME"):
        monkeypatch.delenv(name, raising=False)


def good(*words: str) -> Options:
    """A command line without a problem, and more words after it."""
    return parse(["--use_lora", "--train-data", "rows.json", *words])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, parts", [
    (b'{"a": 1,\n "b" 2}', ["line 2, column 6", "an object {…} is needed"]),
    (b"[1]", ["a list found; an object {…} is needed"]),
    (b"3", ["3 found; an object {…} is needed"]),
    (b"\xff{}", ["byte 0 is not UTF-8"]),
])  # fmt: skip
def test_read_json_object_when_the_file_is_broken_says_where(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json_object(path, "--deepspeed_config")
    assert str(error.value).startswith(f"--deepspeed_config {path}: ")
    for part in parts:
        assert part in str(error.value)


def test_read_json_object_when_the_file_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ds\.json: no such file; a JSON file is needed"):
        read_json_object(tmp_path / "ds.json", "--deepspeed_config")


def test_read_json_object_when_the_path_is_a_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory; a JSON file is needed"):
        read_json_object(tmp_path, "--deepspeed_config")


def test_read_json_object_returns_the_object(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"文": [1]}', encoding="utf-8")
    assert read_json_object(path, "--deepspeed_config") == {"文": [1]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "visualglm-6b"
    (folder / "300").mkdir(parents=True)
    (folder / "300" / WEIGHTS).touch()
    (folder / "latest").write_text("300\n")
    (folder / "model_config.json").write_text("{}")
    return folder


def checkpoint_error(name: Path | str) -> str:
    with pytest.raises(InputError) as error:
        find_checkpoint(str(name))
    return str(error.value)


def test_find_checkpoint_when_a_folder_is_given_returns_it(checkpoint: Path) -> None:
    assert find_checkpoint(str(checkpoint)) == checkpoint


def test_find_checkpoint_when_a_name_is_given_looks_in_sat_home(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAT_HOME", str(checkpoint.parent))
    assert find_checkpoint("visualglm-6b") == checkpoint


def test_find_checkpoint_when_sat_home_is_unset_looks_in_the_home_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    checkpoint.parent.joinpath(".sat_models").symlink_to(checkpoint.parent)
    assert find_checkpoint("visualglm-6b") == checkpoint.parent / ".sat_models" / "visualglm-6b"


@pytest.mark.parametrize("part", ["300", f"300/{WEIGHTS}"])
def test_find_checkpoint_when_a_part_is_given_returns_the_whole(checkpoint: Path, part: str) -> None:
    assert find_checkpoint(str(checkpoint / part)) == checkpoint


def test_find_checkpoint_when_weights_are_a_release_returns_the_folder(checkpoint: Path) -> None:
    (checkpoint / "300").rename(checkpoint / "release")
    (checkpoint / "latest").write_text("release")
    assert find_checkpoint(str(checkpoint)) == checkpoint


@pytest.mark.parametrize("part", ["200", f"200/{WEIGHTS}"])
def test_find_weights_when_an_iteration_is_meant_takes_it_in_place_of_the_latest(checkpoint: Path, part: str) -> None:
    (checkpoint / "200").mkdir()
    (checkpoint / "200" / WEIGHTS).touch()
    assert find_weights(str(checkpoint)) == checkpoint / "300" / WEIGHTS
    assert find_weights(str(checkpoint / part)) == checkpoint / "200" / WEIGHTS


def test_find_weights_names_the_flag_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--base nowhere: no such folder"):
        find_weights("nowhere", "--base")


def test_find_checkpoint_when_nothing_is_there_says_where_it_looked_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert checkpoint_error("visualglm-6b") == (
        f"--from_pretrained visualglm-6b: no such folder, neither {tmp_path}/visualglm-6b nor "
        f"{tmp_path}/home/visualglm-6b; give --from_pretrained FOLDER, or unpack the checkpoint to "
        f"{tmp_path}/home/visualglm-6b."
    )


@pytest.mark.parametrize("file", ["latest", "model_config.json"])
def test_find_checkpoint_when_a_file_is_missing_names_it(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    assert f'no "{file}" in {checkpoint}' in checkpoint_error(checkpoint)


def test_find_checkpoint_when_the_weights_are_missing_names_them(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("400")
    assert f"no {checkpoint / '400' / WEIGHTS}; the weights" in checkpoint_error(checkpoint)


def test_find_checkpoint_when_latest_is_no_iteration_says_what_it_holds(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("global_step3")
    assert f'"global_step3" found in {checkpoint / "latest"}' in checkpoint_error(checkpoint)


def test_find_checkpoint_when_the_folder_above_is_given_names_a_checkpoint_inside(checkpoint: Path) -> None:
    assert f"is needed, such as {checkpoint}." in checkpoint_error(checkpoint.parent)


def test_find_checkpoint_when_it_is_hugging_faces_layout_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert "looks like a Hugging Face checkpoint, and one in SAT's layout is needed" in checkpoint_error(tmp_path)


def test_find_checkpoint_when_a_file_is_given_needs_a_folder(checkpoint: Path) -> None:
    assert "is a file; a checkpoint folder is needed." in checkpoint_error(checkpoint / "model_config.json")


def test_save_problems_when_nothing_is_saved_is_empty() -> None:
    assert save_problems(good(), 2**60) == []


def test_save_problems_when_there_is_room_is_empty_and_makes_no_folder(tmp_path: Path) -> None:
    assert save_problems(good("--save", str(tmp_path / "a" / "b")), 1) == []
    assert list(tmp_path.iterdir()) == []


def test_save_problems_when_there_is_no_room_says_what_was_found_and_needed(tmp_path: Path) -> None:
    [sentence] = save_problems(good("--save", str(tmp_path / "a")), 2**60)
    assert "free on its disk; 1073741824.0 GiB are needed." in sentence


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_save_problems_when_a_file_is_in_the_way_names_it(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    [sentence] = save_problems(good("--save", str(file / below)), 1)
    assert f"{file} is a file; a folder is needed." in sentence


def test_save_problems_when_the_folder_is_not_writable_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, so permissions alone don't tell
    [sentence] = save_problems(good("--save", str(tmp_path)), 1)
    assert f"{tmp_path} can't be written to" in sentence
