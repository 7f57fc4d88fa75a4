"""Parts as SAT itself splits a model are put together again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_model, upstream_weights, write_checkpoint

from model.checkpoints import model_parallel
from model.checkpoints.metadata import VISION
from model.checkpoints.model_parallel import joined, own_part, own_parts, whole, whole_shape
from model.checkpoints.weights import read_weights
from model.convert.huggingface import convert
from model.convert.merge_lora import merge
from model.errors import InputError
from model.sat_compat import import_sat
from scripts.dev.layouts import Layout, compared, recorded

import_sat()

from sat.mpu import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding  # noqa: E402

RANKS = 2


@pytest.fixture(scope="module")
def parts(upstream_checkpoint: Path) -> list[dict]:
    """The small model's tensors as SAT splits them between two processes."""
    model = load_model(upstream_checkpoint)
    whole = model.state_dict()
    parts: list[dict] = [dict(whole) for _ in range(RANKS)]
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding) and module.num_embeddings % RANKS:
            continue  # SAT can't split the vision tower's single word either
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            weights, biases = module.partition(RANKS)
            for part, weight in zip(parts, weights, strict=True):
                part[f"{name}.weight"] = weight.detach().clone()
            for part, bias in zip(parts, biases, strict=bool(biases)):
                part[f"{name}.bias"] = bias.detach().clone()
    return parts


def test_joined_parts_are_the_whole_model(parts: list[dict], upstream_config: dict):
    found = joined(parts, upstream_config)
    expected = upstream_weights()
    split = [name for name in expected if parts[0][name].shape != expected[name].shape]
    assert len(split) > 20
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found.entries[name].shape == tuple(tensor.shape), name


def test_whole_shape_of_a_part_is_that_of_the_whole_tensor(parts: list[dict], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_parallel, "model_parallel", lambda: SimpleNamespace(ranks=RANKS))
    for name, tensor in upstream_weights().items():
        here = tensor if name.startswith(VISION) else parts[0][name]  # the vision part is whole on every process
        assert whole_shape(name, here.shape) == list(tensor.shape), name
    assert whole_shape("transformer.word_embeddings.weight", [512, 64], is_split=False) == [512, 64]


@pytest.mark.slow
def test_part_without_a_tensor_of_the_first_one_is_refused(parts: list[dict], upstream_config: dict):
    less = {name: tensor for name, tensor in parts[1].items() if "lm_head" not in name}
    told = r"mp_rank_01_model_states\.pt: 1 tensors .* \(the first: mixins\.chatglm-final\.lm_head\.weight\)"
    with pytest.raises(InputError, match=told):
        joined([parts[0], less], upstream_config)


def test_own_parts_of_the_language_model_are_those_of_sat(parts: list[dict]):
    for rank, part in enumerate(parts):
        found = own_parts(upstream_weights(), rank, RANKS)
        for name, tensor in found.items():
            expected = upstream_weights()[name] if name.startswith("mixins.eva") else part[name]
            assert torch.equal(tensor, expected), name
            assert found.entries[name].shape == tuple(tensor.shape), name


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("transformer.layers.0.attention.query_key_value.matrix_A.1", (4, 8), (4, 8)),
        ("transformer.layers.0.attention.query_key_value.matrix_B.1", (8, 4), (4, 4)),
        ("transformer.layers.0.attention.query_key_value.original.weight", (24, 8), (12, 8)),
        ("transformer.layers.0.attention.dense.matrix_A.0", (4, 8), (4, 4)),
        ("transformer.layers.0.attention.dense.matrix_B.0", (8, 4), (8, 4)),
        ("transformer.layers.0.mlp.dense_4h_to_h.original.bias", (8,), (8,)),
        ("mixins.ptuning.prefix.0", (2, 4, 3, 8), (2, 2, 3, 8)),
        ("transformer.layers.0.input_layernorm.weight", (8,), (8,)),
        ("transformer.word_embeddings.weight", (896, 8), (896, 8)),
        ("transformer.word_embeddings.weight", (2000, 8), (1000, 8)),
    ],
)
def test_parts_of_adapters_follow_their_linears_and_make_the_whole_again(name: str, shape: tuple, part: tuple):
    tensor = torch.randn(shape)
    parts = [own_part(name, tensor, rank, RANKS) for rank in range(RANKS)]
    assert [tuple(one.shape) for one in parts] == [part] * RANKS
    if part != shape:
        assert torch.equal(whole(name, parts), tensor)


def test_checkpoint_in_parts_is_loaded_as_the_whole_model(
    parts: list[dict], upstream_config: dict, upstream_checkpoint: Path, tmp_path: Path
):
    folder = write_parts(tmp_path / "parts", upstream_config, parts)
    expected = load_model(upstream_checkpoint).state_dict()
    found = load_model(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def write_parts(folder: Path, config: dict, parts: list[dict]) -> Path:
    """A checkpoint in parts, as SAT writes it."""
    write_checkpoint(folder, config | {"model_parallel_size": RANKS}, parts[0])
    torch.save({"module": parts[1]}, folder / "1" / "mp_rank_01_model_states.pt")
    return folder


@pytest.mark.run
@pytest.mark.long
def test_checkpoint_in_parts_is_trained_on_one_process_and_on_two_as_the_whole_one_is(
    parts: list[dict], upstream_config: dict, upstream_checkpoint: Path, tmp_path: Path
):
    folder = write_parts(tmp_path / "parts", upstream_config, parts)
    (like,) = recorded([Layout("LoRA", 1, "LoRA")], tmp_path / "whole", str(upstream_checkpoint))["LoRA"]
    for processes in (1, 2):
        layout = Layout(f"parts on {processes}", processes, "LoRA", model_parallel=processes)
        line, equal = compared(layout, recorded([layout], tmp_path, str(folder))[layout.name], like)
        assert equal, line
        (adapter,) = (tmp_path / layout.name).iterdir()
        merged = merge(str(adapter), str(tmp_path / f"merged {processes}"))
        assert json.loads((merged / "model_config.json").read_text())["model_parallel_size"] == 1
        assert read_weights(merged / "1" / "mp_rank_00_model_states.pt").keys() == upstream_weights().keys()


@pytest.mark.parametrize("layout", ["sat", "hf"])
def test_parts_on_the_disk_are_converted_as_one_model(
    parts: list[dict], upstream_config: dict, tmp_path: Path, layout: str
):
    folder = write_parts(tmp_path / "parts", upstream_config, parts)
    out = convert(str(folder), str(tmp_path / "out"), layout)
    if layout == "hf":
        out = convert(str(out), str(tmp_path / "back"), "sat")
    found = read_weights(out / "1" / "mp_rank_00_model_states.pt")
    assert found.keys() == upstream_weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in upstream_weights().items())
    assert json.loads((out / "model_config.json").read_text())["model_parallel_size"] == 1
