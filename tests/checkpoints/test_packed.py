"""QLoRA checkpoints as the script of 2023 saved them load as the model that bitsandbytes unpacks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tuned

from model.checkpoints.weights import read_weights
from model.convert.merge_lora import is_packed_in_qlora, merge
from model.errors import InputError
from model.frozen import import_bitsandbytes
from model.inference.load import load_for_answering

WEIGHTS = "1/mp_rank_00_model_states.pt"


def as_list(state: Any) -> list[Any]:
    """The state as bitsandbytes 0.39 kept it."""
    inner = state.state2
    nested = inner and [state.offset, [inner.absmax, inner.code, inner.blocksize, False, inner.dtype, None, None]]
    return [state.absmax, state.shape, state.dtype, state.blocksize, nested, "nf4"]


def as_it_is(state: Any) -> Any:
    """The object of later versions."""
    return state


@pytest.fixture(scope="module")
def tuned(upstream_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """QLoRA in full width."""
    folder = tmp_path_factory.mktemp("tuned") / "qlora"
    write_tuned(upstream_checkpoint, folder, full=True, use_qlora=True, lora_rank=2, layer_range=[0, 2])
    (folder / "1/checksums.json").unlink()
    return folder


def pack(folder: Path, kept: Callable[[Any], Any], nested: bool = True) -> dict[str, torch.Tensor]:
    """Pack a checkpoint's linears in its file as the script of 2023 did; gives what bitsandbytes unpacks."""
    functional = import_bitsandbytes()
    content = torch.load(folder / WEIGHTS)
    module, expected = {}, {}
    for name, tensor in content["module"].items():
        module[name] = expected[name] = tensor
        if is_packed_in_qlora(name, tensor):
            module[name], state = functional.quantize_4bit(tensor.half(), quant_type="nf4", compress_statistics=nested)
            module[name.removesuffix("weight") + "quant_state"] = kept(state)
            expected[name] = functional.dequantize_4bit(module[name], state)
            if kept is as_it_is:
                module[f"{name}.absmax"] = state.absmax  # the same once more, as it saves it
    torch.save({**content, "module": module}, folder / WEIGHTS)
    return expected


@pytest.fixture
def folder(tuned: Path, tmp_path: Path) -> Path:
    """A copy of it, to be packed."""
    return Path(shutil.copytree(tuned, tmp_path / "packed"))


@pytest.mark.parametrize(("kept", "nested"), [(as_list, True), (as_list, False), (as_it_is, True)])
def test_weights_are_those_that_bitsandbytes_unpacks(folder: Path, kept: Callable[[Any], Any], nested: bool):
    expected = pack(folder, kept, nested)
    found = read_weights(folder / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-6)  # to half precision


@torch.no_grad()
def test_packed_checkpoint_is_loaded_and_merged_as_the_unpacked_one(folder: Path, tuned: Path, tmp_path: Path):
    expected = pack(folder, as_list)
    input_ids = torch.tensor([[10, 20, 86, 89, 30]])
    before, after = (load_for_answering(str(place))[0](input_ids=input_ids)[0] for place in (tuned, folder))
    torch.testing.assert_close(after, before, rtol=0, atol=0.02 * before.abs().max().item())
    merged = read_weights(merge(str(folder), str(tmp_path / "merged")) / WEIGHTS)
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    torch.testing.assert_close(merged[name].float(), expected[name].float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "state",
    [None, [1, 2], [1.0, (2, 2), torch.half, 64, None, "nf4"], [torch.zeros(1), (2, 2), torch.half, 64, None, "fp4"]],
)
def test_weights_that_are_packed_otherwise_are_refused(folder: Path, state: Any):
    content = torch.load(folder / WEIGHTS)
    content["module"]["transformer.layers.1.mlp.dense_h_to_4h.quant_state"] = state
    torch.save(content, folder / WEIGHTS)
    with pytest.raises(
        InputError, match=r"mp_rank_00_model_states\.pt: weights of QLoRA that bitsandbytes packed otherw"
    ):
        read_weights(folder / WEIGHTS)
