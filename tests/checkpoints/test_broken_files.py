"""What a file is that should hold weights: told from its first bytes and its end."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoints.broken_files import what_it_is_instead
from model.checkpoints.tensors import load_tensors, open_safetensors
from model.errors import InputError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1963411352\n"


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("content", "told"), [
    (b"<!DOCTYPE html><html><title>Sign in</title>", "it is a web page"),
    (b"\n <HTML><body>404", "it is a web page"),
    (POINTER, "it is a pointer of git-lfs"),
    (b"", "it is empty"),
])  # fmt: skip
def test_file_that_holds_no_weights_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, told: str):
    path = tmp_path / name
    path.write_bytes(content)
    assert told in what_it_is_instead(path)
    with pytest.raises(InputError) as error:
        (open_safetensors if path.suffix == ".safetensors" else load_tensors)(path)
    assert str(error.value).startswith(f"{path}: can't be read as weights ({told}")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_half_a_download_of_torchs_file_is_recognised(tmp_path: Path, share: float):
    path = tmp_path / "weights.pt"
    torch.save({"module": {"a": torch.zeros(1000)}}, path)
    assert what_it_is_instead(path) is None
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert what_it_is_instead(path) == "its end is missing, as after half a download"


def test_half_a_download_of_safetensors_tells_how_much_is_there(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    assert what_it_is_instead(path) is None
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:2000])
    assert what_it_is_instead(path) == f"2,000 of {size:,} bytes are there, as after half a download"
    path.write_bytes(path.read_bytes()[:20])
    assert what_it_is_instead(path) == "its end is missing, as after half a download"


@pytest.mark.parametrize("header", [b"[1]", b"not json", json.dumps({"a": {"data_offsets": []}}).encode()])
def test_safetensors_with_a_broken_header_are_told(tmp_path: Path, header: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert what_it_is_instead(path) == "it doesn't begin as safetensors do"


class Other:
    pass


def test_file_that_asks_for_a_class_is_refused_without_advice_to_run_it(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save({"module": {}, "rng": Other()}, path)
    with pytest.raises(InputError) as error:
        load_tensors(path)
    assert "which is no tensor and could run code" in str(error.value)
    assert "weights_only" not in str(error.value)


def test_file_of_text_is_no_file_of_tensors(tmp_path: Path):
    path = tmp_path / "weights.pt"
    path.write_text("hello, these are no weights")
    with pytest.raises(InputError) as error:
        load_tensors(path)
    assert "it isn't a file of tensors that torch wrote" in str(error.value)
