"""Parts as SAT itself splits a model are put together again."""

import json
from pathlib import Path

import pytest
import torch
from conftest import load_model, upstream_weights, write_checkpoint

from model.checkpoints.weights import read_weights
from model.convert.huggingface import convert
from model.convert.model_parallel import joined
from model.sat_compat import import_sat

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
    whole = joined(parts, upstream_config)
    expected = upstream_weights()
    split = [name for name in expected if parts[0][name].shape != expected[name].shape]
    assert len(split) > 20
    assert whole.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(whole[name], tensor), name
        assert whole.entries[name].shape == tuple(tensor.shape), name


@pytest.mark.parametrize("layout", ["sat", "hf"])
def test_parts_on_the_disk_are_converted_as_one_model(
    parts: list[dict], upstream_config: dict, upstream_checkpoint: Path, tmp_path: Path, layout: str
):
    folder = write_checkpoint(tmp_path / "parts", upstream_config | {"model_parallel_size": 2}, parts[0])
    torch.save({"module": parts[1]}, folder / "1" / "mp_rank_01_model_states.pt")
    out = convert(str(folder), str(tmp_path / "out"), layout)
    if layout == "hf":
        out = convert(str(out), str(tmp_path / "back"), "sat")
    found = read_weights(out / "1" / "mp_rank_00_model_states.pt")
    assert found.keys() == upstream_weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in upstream_weights().items())
    assert json.loads((out / "model_config.json").read_text())["model_parallel_size"] == 1
