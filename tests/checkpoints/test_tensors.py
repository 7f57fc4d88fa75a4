"""Tensors under SAT's names: each is read when it is asked for, and at no other time."""

import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from model.checkpoints import tensors
from model.checkpoints.tensors import (
    LazyTensor,
    LazyTensors,
    by_layer,
    load_tensors,
    on_device,
    one_by_one,
    open_pickle,
    open_safetensors,
    shapes,
    size_in_bytes,
)
from model.checkpoints.weights import fingerprint
from model.errors import InputError


def watched(reads: list[str], **sizes: int) -> LazyTensors:
    """Tensors of ones, float16, by name; reads notes each one that is read."""

    def entry(name: str, size: int) -> LazyTensor:
        return LazyTensor((size,), torch.float16, lambda: (reads.append(name), torch.ones(size).half())[1])

    return LazyTensors({name: entry(name, size) for name, size in sizes.items()})


def test_tensors_are_read_when_asked_for_and_each_time_anew() -> None:
    reads: list[str] = []
    weights = watched(reads, a=2, b=3)
    assert (list(weights), len(weights), reads) == (["a", "b"], 2, [])
    assert weights["b"].tolist() == [1, 1, 1]
    assert weights["b"].shape == (3,)
    assert reads == ["b", "b"]


def test_shapes_and_sizes_are_known_without_reading() -> None:
    reads: list[str] = []
    weights = watched(reads, a=2, b=3)
    found = shapes(weights)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == {
        "a": ((2,), torch.float16),
        "b": ((3,), torch.float16),
    }
    assert size_in_bytes(weights) == 10
    assert reads == []


def test_others_win_and_renamed_ones_can_be_left_out() -> None:
    reads: list[str] = []
    weights = watched(reads, a=2, b=3).with_others({"b": torch.zeros(1)})
    assert weights["b"].tolist() == [0]
    renamed = weights.renamed(lambda name: {"a": "first"}.get(name))
    assert list(renamed) == ["first"]
    assert reads == []


def test_by_layer_gives_every_tensor_once_and_one_layer_at_a_time() -> None:
    names = ["transformer.layers.0.a", "transformer.layers.0.b", "transformer.layers.1.a", "other"]
    lazy = LazyTensors({name: LazyTensor.of(torch.zeros(1)) for name in names})
    groups = [set(group) for group in by_layer(lazy)]
    assert sorted(name for group in groups for name in group) == sorted(names)
    assert {"transformer.layers.0.a", "transformer.layers.0.b"} in groups
    assert [set(group) for group in by_layer(dict(lazy))] == [set(names)]  # what is mapped already costs nothing


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of torch's with a matrix, a part of it, and one that lies the other way."""
    path, matrix = tmp_path / "weights.pt", torch.arange(600.0).reshape(20, 30)
    torch.save({"module": {"matrix": matrix, "part": matrix[3:5], "turned": matrix.bfloat16().clone().T}}, path)
    return path


def test_some_numbers_of_a_tensor_are_those_of_the_whole_one(file: Path) -> None:
    in_memory = LazyTensors({"matrix": LazyTensor.of(torch.arange(600.0).reshape(20, 30))})
    for opened in (one_by_one(file, load_tensors(file)["module"]), in_memory):
        assert isinstance(opened, LazyTensors)
        found = opened.entries["matrix"].some([0, 31, 598], 3)
        assert [numbers.tolist() for numbers in found] == [[0, 1, 2], [31, 32, 33], [598, 599]]


def test_fingerprint_of_tensors_read_in_places_is_that_of_the_mapped_ones(file: Path) -> None:
    mapped = load_tensors(file)["module"]
    assert fingerprint(one_by_one(file, mapped)) == fingerprint(mapped)


def test_fingerprint_of_a_file_reads_places_only(file: Path) -> None:
    opened = one_by_one(file, load_tensors(file)["module"])
    assert isinstance(opened, LazyTensors)
    assert opened.entries["matrix"].read_some is not None
    assert opened.entries["turned"].read_some is None  # its numbers aren't in its own order there


def test_file_that_was_written_anew_is_looked_into_anew(file: Path) -> None:
    one_by_one(file, load_tensors(file)["module"])
    file.unlink()
    torch.save({"module": {"other": torch.ones(2)}}, file)
    assert list(one_by_one(file, load_tensors(file)["module"])) == ["other"]


def test_large_tensor_is_read_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = load_tensors(file)["module"]
    monkeypatch.setattr(tensors, "BYTES_AT_A_TIME", 1000)  # of 2400
    assert torch.equal(one_by_one(file, mapped)["matrix"], torch.arange(600.0).reshape(20, 30))


def test_file_that_ends_within_a_tensor_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = one_by_one(file, load_tensors(file)["module"])
    file.write_bytes(file.read_bytes()[:500])
    for at_a_time in (1000, 2**20):
        monkeypatch.setattr(tensors, "BYTES_AT_A_TIME", at_a_time)
        with pytest.raises(InputError, match=r"weights\.pt: can't be read as weights \(it ends within a tensor\)"):
            opened["matrix"]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_tensor_that_goes_to_a_device_is_a_copy(dtype: torch.dtype | None) -> None:
    tensor = torch.arange(6.0)
    there = on_device(tensor, torch.device("cpu"), dtype)
    assert there.dtype == (dtype or torch.float32)
    tensor += 1
    assert there.tolist() == [0, 1, 2, 3, 4, 5]


def repacked(path: Path, **records: bytes) -> None:
    """Write a file of torch's anew as another program does: the same records, but for those given, in other places."""
    with zipfile.ZipFile(path) as archive:
        found = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{next(iter(found)).partition('/')[0]}/first", "!" * 777)
        for name, content in found.items():
            archive.writestr(name, records.get(name.rpartition("/")[2], content))


def test_file_that_another_program_wrote_anew_holds_the_same_tensors(tmp_path: Path) -> None:
    path, written = tmp_path / "pytorch_model.bin", {f"{n}": torch.full((10 + n,), float(n)) for n in range(5)}
    torch.save(written, path)
    assert all(tensor.read_some for tensor in open_pickle(path).values())  # in places
    repacked(path)
    opened = open_pickle(path)
    assert not any(tensor.read_some for tensor in opened.values())
    assert {name: tensor.read().tolist() for name, tensor in opened.items()} == {
        n: t.tolist() for n, t in written.items()
    }


def test_numbers_in_the_other_byte_order_are_not_read_as_they_lie(file: Path) -> None:
    assert tensors._is_read_as_it_lies(file)
    repacked(file, byteorder={"little": b"big", "big": b"little"}[sys.byteorder])
    assert not tensors._is_read_as_it_lies(file)


def test_file_of_torchs_without_check_sums_is_read(tmp_path: Path) -> None:
    path, crc = tmp_path / "weights.pt", torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"module": {"a": torch.ones(5)}}, path)
    finally:
        torch.serialization.set_crc32_options(crc)
    assert one_by_one(path, load_tensors(path)["module"])["a"].tolist() == [1] * 5


def test_safetensors_without_numbers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    written = {"a": torch.ones(2, 3).half(), "none": torch.empty(0, 5).half(), "scalar": torch.tensor(2.5)}
    safetensors.torch.save_file(written, path)
    opened = open_safetensors(path)
    assert {name: (tensor.read().tolist(), tensor.dtype) for name, tensor in opened.items()} == {
        name: (tensor.tolist(), tensor.dtype) for name, tensor in written.items()
    }
    assert [numbers.tolist() for numbers in opened["a"].some([1, 5], 2)] == [[1, 1], [1]]


def test_file_that_is_replaced_or_removed_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    opened = open_safetensors(path)
    safetensors.torch.save_file({"b": torch.zeros(100), "a": torch.zeros(4)}, other)
    other.replace(path)
    assert opened["a"].read().tolist() == [1, 1, 1, 1]
    path.unlink()
    assert opened["a"].read().tolist() == [1, 1, 1, 1]
