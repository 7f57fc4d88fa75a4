"""Tensors under SAT's names: each is read when it is asked for, and at no other time."""

import torch

from model.checkpoints.tensors import LazyTensor, LazyTensors, by_layer, shapes, size_in_bytes


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
