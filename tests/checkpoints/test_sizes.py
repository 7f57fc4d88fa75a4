"""What a checkpoint takes on the disk, and whether there is room for it."""

import os
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, write_tuned
from safetensors.torch import save_file

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import Checkpoint
from model.checkpoints.sizes import adapter_size, folder_problems, full_size
from model.cli.flag_checks import save_problems
from model.cli.options import Options, parse

EVERY_LINEAR = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
MIB = 2**20


def good(*words: str) -> Options:
    """A command line without a problem, and more words after it."""
    return parse(["--use_lora", "--train-data", "rows.json", *words])


def test_save_problems_when_nothing_is_saved_is_empty() -> None:
    assert save_problems(good("--save", "none"), 2**60) == []


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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_folder_where_the_rights_say_yes_and_the_system_says_no_is_a_problem() -> None:
    [sentence] = folder_problems("--save", "/proc/self/saved")
    assert "can't be written to; a folder of your own is needed." in sentence


def test_folder_problems_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [sentence] = folder_problems("--feature_cache", str(tmp_path / "file"))
    assert sentence.startswith(f"--feature_cache {tmp_path / 'file'}: ")


def test_link_that_leads_nowhere_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    for folder in (tmp_path / "link", tmp_path / "link/below"):
        [sentence] = folder_problems("--save", str(folder))
        assert (
            sentence
            == f"--save {folder}: {tmp_path / 'link'} is a link to gone, which isn't there; a folder is needed."
        )


@pytest.mark.parametrize(("adapters", "numbers"), [
    (AdapterConfig(), 0),
    (AdapterConfig(methods=("lora",), rank=2, layers=(0,)), 2 * (6 * 64 + 2 * 64)),
    (AdapterConfig(methods=("qlora",), rank=1, targets=("dense_h_to_4h",)), 3 * (64 + 256)),
    (AdapterConfig(methods=("ptuning",), prefix_length=5), 3 * 2 * 64 * 5),
])  # fmt: skip
def test_adapter_size_is_that_of_its_numbers_in_float32_and_a_mib(adapters: AdapterConfig, numbers: int) -> None:
    config = {"num_layers": 3, "hidden_size": 64, "inner_hidden_size": 256}
    assert adapter_size(adapters, config) == 4 * numbers + MIB


def test_adapter_size_is_at_least_what_a_saved_adapter_takes(upstream_checkpoint: Path, tmp_path: Path) -> None:
    flags = {"use_lora": True, "lora_rank": 300, "lora_target": list(EVERY_LINEAR), "use_ptuning": True}
    saved = Checkpoint.find(write_tuned(upstream_checkpoint, tmp_path / "tuned", **flags))
    needed = adapter_size(AdapterConfig.from_json(saved.config), saved.config)
    tensors = torch.load(saved.weights_file())["module"].values()
    assert needed - MIB <= sum(4 * tensor.numel() for tensor in tensors) < saved.weights_file().stat().st_size < needed


TINY = PROJECT / "model/tiny/1/mp_rank_00_model_states.pt"


def test_full_size_of_a_half_precision_base_is_what_is_saved_in_float32(tmp_path: Path) -> None:
    saved = write_tuned(
        PROJECT / "model/tiny", tmp_path / "full", full=True, use_lora=True, lora_rank=1, layer_range=[0]
    )
    found = (saved / "1/mp_rank_00_model_states.pt").stat().st_size
    assert found > 1.9 * TINY.stat().st_size
    assert found == pytest.approx(full_size(TINY, 4), rel=0.01)


def test_full_size_runs_no_code_of_the_file(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path}/was-here",)

    torch.save({"module": {"a": torch.zeros(100)}, "more": Command()}, tmp_path / "weights.pt")
    assert full_size(tmp_path / "weights.pt", 8) == (tmp_path / "weights.pt").stat().st_size + 400
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04"])
def test_full_size_of_something_else_is_its_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pt").write_bytes(content)
    assert full_size(tmp_path / "weights.pt", 4) == len(content)


@pytest.mark.parametrize("width", [2, 4])
def test_full_size_of_safetensors_counts_their_numbers(tmp_path, width):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10, 30, dtype=torch.float16), "b": torch.zeros(7)}, path)
    assert full_size(path, width) == 307 * width


def test_full_size_of_broken_safetensors_is_that_of_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"half a download")
    assert full_size(path, 2) == 15
