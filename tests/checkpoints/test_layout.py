"""Where a checkpoint's files lie: found once from what was given, and read once."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN, PROJECT, run_program, write_huggingface

from model.checkpoints.layout import Checkpoint, read_json_object
from model.errors import InputError

WEIGHTS = "mp_rank_00_model_states.pt"

pytestmark = pytest.mark.usefixtures("no_launcher")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "parts"), [
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
        Checkpoint.find(str(name))
    return str(error.value)


def test_find_when_a_folder_is_given_returns_it(checkpoint: Path) -> None:
    assert Checkpoint.find(str(checkpoint)).folder == checkpoint


def test_find_when_a_name_is_given_looks_in_sat_home(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAT_HOME", str(checkpoint.parent))
    assert Checkpoint.find("visualglm-6b").folder == checkpoint


def test_find_when_sat_home_is_unset_looks_in_the_home_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    checkpoint.parent.joinpath(".sat_models").symlink_to(checkpoint.parent)
    assert Checkpoint.find("visualglm-6b").folder == checkpoint.parent / ".sat_models" / "visualglm-6b"


@pytest.mark.parametrize("part", ["300", f"300/{WEIGHTS}"])
def test_find_when_a_part_is_given_returns_the_whole(checkpoint: Path, part: str) -> None:
    assert Checkpoint.find(str(checkpoint / part)).folder == checkpoint


def test_find_when_weights_are_a_release_returns_the_folder(checkpoint: Path) -> None:
    (checkpoint / "300").rename(checkpoint / "release")
    (checkpoint / "latest").write_text("release")
    assert Checkpoint.find(str(checkpoint)).folder == checkpoint


@pytest.mark.parametrize("part", ["200", f"200/{WEIGHTS}"])
def test_find_when_an_iteration_is_meant_takes_it_in_place_of_the_latest(checkpoint: Path, part: str) -> None:
    (checkpoint / "200").mkdir()
    (checkpoint / "200" / WEIGHTS).touch()
    assert Checkpoint.find(str(checkpoint)).weights_file() == checkpoint / "300" / WEIGHTS
    assert Checkpoint.find(str(checkpoint / part)).weights_file() == checkpoint / "200" / WEIGHTS


@pytest.mark.parametrize("part", ["300", f"300/{WEIGHTS}"])
def test_find_when_an_iteration_holds_a_copy_of_the_configuration_returns_the_whole(
    checkpoint: Path, part: str
) -> None:
    shutil.copy(checkpoint / "model_config.json", checkpoint / "300")
    assert Checkpoint.find(str(checkpoint / part)).folder == checkpoint


def test_find_names_the_flag_that_was_meant() -> None:
    with pytest.raises(InputError, match=r"^--base nowhere: no such folder"):
        Checkpoint.find("nowhere", "--base")


def test_find_when_nothing_is_there_says_where_it_looked_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert checkpoint_error("visualglm-6b").splitlines() == [
        "--from_pretrained visualglm-6b: no such folder. Tried:",
        f"  no folder {tmp_path}/visualglm-6b",
        f"  no folder {tmp_path}/home/visualglm-6b ($SAT_HOME)",
        "  SAT's download: HF_HUB_OFFLINE is set",
        "Needed is --from_pretrained FOLDER, OWNER/NAME of the Hugging Face hub, or the checkpoint unpacked to "
        f"{tmp_path}/home/visualglm-6b.",
    ]


def test_find_when_an_absolute_path_leads_nowhere_does_not_place_it_in_sat_home(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Checkpoint.find(tmp_path / "gone", "SRC")
    assert str(error.value) == (
        f"SRC {tmp_path}/gone: no such folder. Tried:\n  no folder {tmp_path}/gone\n"
        f"Needed is a folder, OWNER/NAME of the Hugging Face hub, or the checkpoint unpacked to {tmp_path}/gone."
    )


@pytest.mark.parametrize("file", ["latest", "model_config.json"])
def test_find_when_a_file_is_missing_names_it(checkpoint: Path, file: str) -> None:
    (checkpoint / file).unlink()
    assert f'no "{file}" in {checkpoint}' in checkpoint_error(checkpoint)


def test_find_when_the_weights_are_missing_names_them(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("400")
    assert f"no {checkpoint / '400' / WEIGHTS}; the weights" in checkpoint_error(checkpoint)


@pytest.mark.parametrize("part", ["", WEIGHTS])
def test_find_when_the_weights_lie_beside_the_configuration_says_where_they_belong(checkpoint: Path, part: str) -> None:
    (checkpoint / "300" / WEIGHTS).rename(checkpoint / WEIGHTS)
    shutil.copytree(checkpoint, checkpoint.parent / "another")
    assert checkpoint_error(checkpoint / part) == (
        f"--from_pretrained {checkpoint / part}: no {checkpoint / '300' / WEIGHTS}, but {checkpoint / WEIGHTS}; the weights of "
        "the iteration that latest names are needed."
    )


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin.index.json"])
def test_find_when_hugging_faces_configuration_is_missing_names_it(tmp_path: Path, file: str) -> None:
    (tmp_path / file).touch()
    assert checkpoint_error(tmp_path) == (
        f'--from_pretrained {tmp_path}: no "model_config.json" in {tmp_path}; beside weights in Hugging Face\'s layout '
        "config.json is needed."
    )


def test_find_when_a_folder_of_hugging_faces_cache_is_given_names_a_snapshot_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--model"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/config.json").touch()
    assert checkpoint_error(folder).endswith(f"a snapshot is needed, such as {folder / 'snapshots/abc'}.")


def test_find_when_latest_is_no_iteration_says_what_it_holds(checkpoint: Path) -> None:
    (checkpoint / "latest").write_text("global_step3")
    assert f'"global_step3" found in {checkpoint / "latest"}' in checkpoint_error(checkpoint)


@pytest.mark.parametrize("content", [b"\xff\x00", b"\x1b[31mred", b"9" * 5000, b"", b"-1", b"0"])
def test_find_when_latest_is_damaged_shows_it_without_what_a_terminal_obeys(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "latest").write_bytes(content)
    text = checkpoint_error(checkpoint)
    assert f"found in {checkpoint / 'latest'}; the number of the iteration to load is needed." in text
    assert text.isprintable()
    assert len(text) < 400


def test_find_when_the_folder_above_is_given_names_a_checkpoint_inside(checkpoint: Path) -> None:
    assert f"is needed, such as {checkpoint}." in checkpoint_error(checkpoint.parent)


def test_find_when_it_is_hugging_faces_config_of_another_model_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert f'{tmp_path}/config.json: no "num_layers"' in checkpoint_error(tmp_path)


def test_find_when_it_is_an_adapter_of_pefts_says_how_it_is_converted(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    assert f"convert_checkpoint.py {tmp_path} DST --to sat converts it." in checkpoint_error(tmp_path)


def test_find_when_a_file_is_given_needs_a_folder(checkpoint: Path) -> None:
    assert "is a file; a checkpoint folder is needed." in checkpoint_error(checkpoint / "model_config.json")


def test_find_reads_the_configuration_and_keeps_the_name_as_it_was_given(checkpoint: Path) -> None:
    (checkpoint / "model_config.json").write_text('{"num_layers": 28}')
    found = Checkpoint.find(str(checkpoint / "300"))
    assert found.config == {"num_layers": 28}
    assert (found.name, found.iteration) == (str(checkpoint / "300"), "300")


def test_find_when_it_is_found_already_gives_it_back(checkpoint: Path) -> None:
    found = Checkpoint.find(checkpoint)
    assert Checkpoint.find(found) is found


def test_find_when_the_configuration_is_no_json_says_where(checkpoint: Path) -> None:
    (checkpoint / "model_config.json").write_text("{,}")
    assert "model_config.json: not JSON at line 1, column 2" in checkpoint_error(checkpoint)


def test_weights_file_is_that_of_the_model_parallel_rank(checkpoint: Path) -> None:
    assert Checkpoint.find(checkpoint).weights_file(3) == checkpoint / "300" / "mp_rank_03_model_states.pt"


def test_at_takes_a_folder_without_a_configuration(checkpoint: Path) -> None:
    (checkpoint / "model_config.json").unlink()
    assert Checkpoint.at(checkpoint).config == {}


def test_at_when_an_iteration_is_asked_for_takes_it_in_place_of_the_latest(checkpoint: Path) -> None:
    assert Checkpoint.at(checkpoint, 200).weights_file() == checkpoint / "200" / WEIGHTS


@pytest.mark.run
def test_a_plain_start_reads_model_config_json_once(upstream_checkpoint: Path, tmp_path: Path) -> None:
    run = run_program(
        "count_config_reads", "--from_pretrained", upstream_checkpoint, "--use_lora", "--mode", "finetune",
        "--train-data", GOLDEN / "upstream/dataset.json", "--train-iters", "1", "--batch-size", "1", "--num-workers", "0",
        "--max_source_length", "80", "--summary-dir", tmp_path, "--save", "none", cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-2:] == [str(upstream_checkpoint / "model_config.json"), "1"]


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_checkpoint_runs(checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of one name, the older one first."""
    runs = [tmp_path / "checkpoints" / f"MyModel-11-26-13-0{minute}" for minute in (0, 1)]
    for time, run in enumerate(runs):
        shutil.copytree(checkpoint, run)
        os.utime(run / "latest", (time, time))
    return runs[0], runs[1]


def test_name_of_runs_without_their_time_is_the_newest_of_them(small_checkpoint_runs: tuple[Path, Path]) -> None:
    older, newer = small_checkpoint_runs
    assert Checkpoint.find(older.parent / "MyModel").folder == newer
    os.utime(older / "latest", (2e9, 2e9))
    assert Checkpoint.find(older.parent / "MyModel").folder == older
    assert Checkpoint.find(older).folder == older


def test_part_of_the_newest_run_is_found_by_its_name(small_checkpoint_runs: tuple[Path, Path]) -> None:
    older, newer = small_checkpoint_runs
    shutil.copytree(older, older / "best")
    assert Checkpoint.find(older.parent / "MyModel/best").folder == older / "best"
    assert Checkpoint.find(older.parent / "MyModel/300").folder == newer


def test_run_of_a_longer_name_is_not_taken(small_checkpoint_runs: tuple[Path, Path]) -> None:
    older, newer = small_checkpoint_runs
    newer.rename(older.parent / "MyModel-large-11-26-13-01")
    assert Checkpoint.find(older.parent / "MyModel").folder == older


def test_sizes_of_the_vision_part_that_the_config_leaves_to_sat_are_there_once_it_is_read(tmp_path: Path) -> None:
    """So that what counts memory has the sizes that SAT builds."""
    folder = shutil.copytree(PROJECT / "model/tiny", tmp_path / "tiny")
    config = json.loads((folder / "model_config.json").read_text())
    short = json.loads((folder / "model_config.json").read_text())
    for key in ("pre_len", "post_len", "in_channels"):
        del short["eva_args"][key]
    del short["qformer_args"]["cross_attn_hidden_size"]  # as wide as the Q-Former
    (folder / "model_config.json").write_text(json.dumps(short))
    assert Checkpoint.find(folder).config == config
    del short["eva_args"]["image_size"], short["eva_args"]["patch_size"], short["qformer_args"]["is_decoder"]
    (folder / "model_config.json").write_text(json.dumps(short))
    found = Checkpoint.find(folder).config
    assert (found["eva_args"]["image_size"], found["eva_args"]["patch_size"]) == ([224, 224], 16)
    assert found["qformer_args"]["is_decoder"] is False
    published = write_huggingface(tmp_path / "published", short, {})
    assert Checkpoint.find(published).config["eva_args"] == found["eva_args"]


def test_name_of_a_run_that_has_saved_nothing_yet_is_told_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "k3-11-26-13-01").mkdir()
    with pytest.raises(InputError) as refused:
        Checkpoint.find(tmp_path / "k3", "--resume")
    assert str(refused.value) == (
        f"--resume {tmp_path / 'k3'}: {tmp_path / 'k3-11-26-13-01'} has no checkpoint; a run that has saved one is needed, "
        "or auto."
    )
    with pytest.raises(InputError, match="no such folder; the folder of a run is needed, or auto"):
        Checkpoint.find(tmp_path / "k4", "--resume")
