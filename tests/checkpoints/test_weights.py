"""The weights of a checkpoint: what is read, in which form, and what is refused without being run."""

import json
import math
import os
import pickle
import random
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import (
    load_model,
    upstream_weights,
    write_checkpoint,
    write_tuned,
)

from model.checkpoints.tensors import safe_checkpoint_types
from model.checkpoints.weights import load_checkpoint, read_weights
from model.convert.merge_lora import merge
from model.errors import InputError
from model.inference.load import load_for_answering
from model.visualglm import VisualGLMModel

WEIGHTS = "mp_rank_00_model_states.pt"


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


def stored(folder, content):
    """A checkpoint folder whose weights file holds content, or those bytes."""
    write_checkpoint(folder, {}, {})
    if isinstance(content, bytes):
        (folder / "1" / WEIGHTS).write_bytes(content)
    else:
        torch.save(content, folder / "1" / WEIGHTS)
    return folder


def refused(model, folder):
    """The text that loading folder into model ends with."""
    with pytest.raises(InputError) as error:
        load_checkpoint(model, Namespace(load=str(folder)))
    return str(error.value)


def test_load_path_wins_over_args(model, upstream_checkpoint):
    load_checkpoint(model, Namespace(load="nowhere"), load_path=str(upstream_checkpoint))


def test_prefix_takes_the_tensors_under_it_without_it(model, upstream_checkpoint):
    projection = model.get_mixin("eva").model.glm_proj
    golden = projection.weight.detach().clone()
    torch.nn.init.zeros_(projection.weight)
    load_checkpoint(projection, Namespace(load=str(upstream_checkpoint)), prefix="mixins.eva.model.glm_proj.")
    assert torch.equal(projection.weight, golden)


def test_adapters_that_the_file_lacks_keep_their_fresh_values(upstream_checkpoint):
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items() if "matrix_" in name}
    load_checkpoint(model, Namespace(load=str(upstream_checkpoint)))
    assert fresh
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in fresh.items())


def with_random_states(weights):
    """What SAT and the 2023 script wrote beside the weights."""
    return {
        "module": weights,
        "iteration": 300,
        "client_lr_scheduler": {"start_lr": 1e-4, "num_iters": 300, "decay_style": "cosine"},
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {},
    }


def test_old_checkpoint_with_random_states_is_read(model, tmp_path):
    folder = stored(tmp_path / "old", with_random_states(upstream_weights()))
    torch.nn.init.zeros_(model.transformer.word_embeddings.weight)
    load_checkpoint(model, Namespace(load=str(folder)))
    assert model.transformer.word_embeddings.weight.any()


def test_old_checkpoint_is_refused_by_torchs_own_default(tmp_path):
    folder = stored(tmp_path / "old", with_random_states({}))
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        torch.load(folder / "1" / WEIGHTS)


def test_old_checkpoint_as_numpy_1_and_an_early_torch_wrote_it_is_read(tmp_path):
    folder = stored(tmp_path / "old", with_random_states({"a": torch.tensor([1.0, 2.0])}))
    path = folder / "1" / WEIGHTS
    torch.save(with_random_states({"a": torch.tensor([1.0, 2.0])}), path, _use_new_zipfile_serialization=False)
    assert b"numpy._core" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    assert read_weights(path)["a"].tolist() == [1.0, 2.0]


def test_tensors_of_no_part_of_the_model_are_left_out_with_a_warning(model, tmp_path, capsys):
    folder = stored(tmp_path / "more", {"module": upstream_weights() | {"mixins.new.weight": torch.zeros(1)}})
    load_checkpoint(model, Namespace(load=str(folder)))
    warning = capsys.readouterr().err
    assert "1 tensors belong to no part of this model" in warning
    assert "mixins.new.weight" in warning


# what is refused


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_weights_that_would_run_a_command_are_refused_and_run_nothing(model, tmp_path, write):
    folder, trace = stored(tmp_path / "evil", b""), tmp_path / "was here"
    content = {"module": upstream_weights(), "np_rng_state": RunsACommand(f"touch '{trace}'")}
    write(content, folder / "1" / WEIGHTS)
    assert "can't be read as weights" in refused(model, folder)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_weights_cut_short_are_refused_with_the_files_name(model, upstream_checkpoint, tmp_path, share):
    whole = (upstream_checkpoint / "1" / WEIGHTS).read_bytes()
    folder = stored(tmp_path / "cut", whole[: int(len(whole) * share)])
    text = refused(model, folder)
    assert text.startswith(f"{folder / '1' / WEIGHTS}: can't be read as weights")
    assert "\n" not in text


@pytest.fixture(scope="module")
def adapter(upstream_checkpoint, tmp_path_factory):
    """An adapter as it was saved before there were checksums."""
    folder = write_tuned(
        upstream_checkpoint, tmp_path_factory.mktemp("old") / "run", train_parts=["glm_proj"],
        use_lora=True, lora_rank=2, layer_range=[1], use_ptuning=True, pre_seq_len=3,
    )  # fmt: skip
    (folder / "1/checksums.json").unlink()
    return folder


def merged(folder):
    """P-Tuning is never merged: only LoRA is left."""
    config = json.loads((folder / "model_config.json").read_text()) | {"use_ptuning": False}
    (folder / "model_config.json").write_text(json.dumps(config))
    merge(str(folder), f"{folder}-merged")


FACTOR, PREFIX, PART = (
    "transformer.layers.1.attention.dense.matrix_B.0", "mixins.ptuning.prefix.2", "mixins.eva.model.glm_proj.bias",
)  # fmt: skip


@pytest.mark.parametrize(("load", "name", "change", "text"), [
    (load_for_answering, FACTOR, None, f"1 tensor of its adapters is missing (the first: {FACTOR})"),
    (load_for_answering, PREFIX, None, f"1 tensor of its adapters is missing (the first: {PREFIX})"),
    (load_for_answering, PART, None, f"1 trained tensor is missing (the first: {PART})"),
    (load_for_answering, PREFIX, math.nan, f"{PREFIX} has numbers that are NaN or infinite"),
    (load_for_answering, PART, -math.inf, f"{PART} has numbers that are NaN or infinite"),
    (merged, FACTOR, None, f"1 tensor of its adapters is missing (the first: {FACTOR})"),
    (merged, PART, None, f"1 trained tensor is missing (the first: {PART})"),
    (merged, FACTOR, math.nan, f"{FACTOR} has numbers that are NaN or infinite"),
])  # fmt: skip
def test_adapter_that_is_not_whole_is_refused(adapter, tmp_path, load, name, change, text):
    folder = Path(shutil.copytree(adapter, tmp_path / "run"))
    content = torch.load(folder / "1" / WEIGHTS)
    if change is None:
        del content["module"][name]
    else:
        content["module"][name].view(-1)[0] = change
    torch.save(content, folder / "1" / WEIGHTS)
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder / '1' / WEIGHTS}: ")
    assert text in str(error.value)


def test_weights_of_another_model_are_refused_with_the_tensors_name(model, tmp_path):
    name = "mixins.eva.model.glm_proj.weight"
    folder = stored(tmp_path / "other", {"module": upstream_weights() | {name: torch.zeros(64, 768)}})
    text = refused(model, folder)
    assert "the weights are of another model" in text
    assert name in text


def test_weights_with_tensors_missing_are_refused_with_their_number_and_names(model, tmp_path):
    weights = upstream_weights()
    gone = [name for name in weights if name.startswith("mixins.eva.model.glm_proj")]
    assert len(gone) == 2
    folder = stored(tmp_path / "less", {"module": {k: v for k, v in weights.items() if k not in gone}})
    text = refused(model, folder)
    assert "2 tensors are missing" in text
    assert all(name in text for name in gone)


def test_adapter_with_a_tensor_missing_is_refused_and_keeps_no_fresh_value(upstream_checkpoint, tmp_path):
    folder = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=4)
    content = torch.load(folder / "1" / WEIGHTS)
    gone = next(name for name in content["module"] if "matrix_B" in name)
    del content["module"][gone]
    torch.save(content, folder / "1" / WEIGHTS)
    (folder / "1" / "checksums.json").unlink()  # as older checkpoints have none
    with pytest.raises(InputError, match=rf"1 tensor of its adapters is missing \(the first: {re.escape(gone)}\)"):
        load_model(folder, "FineTuneVisualGLMModel")


@pytest.fixture(scope="module")
def of_may_2023(upstream_checkpoint, tmp_path_factory):
    """LoRA in layers 0 and 2 as the first release saved it: no layer_range, no number where a linear has one part."""
    folder = write_tuned(
        upstream_checkpoint,
        tmp_path_factory.mktemp("may") / "run",
        True,
        use_lora=True,
        lora_rank=2,
        layer_range=[0, 2],
    )
    content = torch.load(folder / "1" / WEIGHTS)
    weights = {re.sub(r"(dense\.matrix_.)\.0$", r"\1", name): tensor for name, tensor in content["module"].items()}
    assert "transformer.layers.0.attention.dense.matrix_A" in weights
    torch.save({**content, "module": weights}, folder / "1" / WEIGHTS)
    (folder / "1" / "checksums.json").unlink()
    config = json.loads((folder / "model_config.json").read_text())
    for key in ("layer_range", "finetuning"):
        del config[key]
    (folder / "model_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("load", [load_for_answering, merged])
def test_layers_that_stood_in_the_code_of_may_2023_are_to_be_named(of_may_2023, tmp_path, load):
    folder = Path(shutil.copytree(of_may_2023, tmp_path / "run"))
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder / '1' / WEIGHTS}: LoRA is in layers 0, 2 only, which the script of May 2023 had in its code; "
        f'"layer_range": [0, 2] is needed in {folder / "model_config.json"}.'
    )
    content = torch.load(folder / "1" / WEIGHTS)
    del content["module"]["transformer.layers.0.attention.dense.matrix_B"]
    torch.save(content, folder / "1" / WEIGHTS)
    with pytest.raises(InputError, match="tensors of its adapters are missing"):
        load(folder)


def test_lora_of_may_2023_has_no_number_where_a_linear_has_one_part(of_may_2023, tmp_path):
    folder = Path(shutil.copytree(of_may_2023, tmp_path / "run"))
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps({**config, "layer_range": [0, 2]}))
    model, _ = load_for_answering(str(folder))
    stored = torch.load(folder / "1" / WEIGHTS)["module"]
    name = "transformer.layers.2.attention.dense.matrix_B"
    assert torch.equal(model.state_dict()[f"{name}.0"].float(), stored[name].float())
    with_lora = read_weights(merge(str(folder), str(tmp_path / "merged")) / "1" / WEIGHTS)
    dense = "transformer.layers.2.attention.dense"
    change = stored[name] @ stored[f"{dense}.matrix_A"] / 2
    torch.testing.assert_close(with_lora[f"{dense}.weight"], stored[f"{dense}.original.weight"] + change)


@pytest.mark.parametrize("content", [{"weights": {}}, [1], torch.zeros(1)])
def test_file_without_module_is_refused(model, tmp_path, content):
    assert 'no "module"' in refused(model, stored(tmp_path / "foreign", content))


@pytest.mark.parametrize("content", [{"note": "hello"}, [torch.zeros(1)], {1: torch.zeros(1)}])
def test_module_that_holds_something_else_than_tensors_is_refused(model, tmp_path, content):
    folder = stored(tmp_path / "more", {"module": content})
    assert refused(model, folder) == (
        f'{folder / "1" / WEIGHTS}: something else than tensors in its "module"; named tensors are needed there.'
    )


def test_folder_without_latest_is_refused(model, tmp_path):
    assert refused(model, tmp_path) == f"{tmp_path}: no file named latest; a checkpoint folder has one."


def test_missing_weights_file_is_refused_with_its_name(model, tmp_path):
    folder = stored(tmp_path / "gone", {})
    (folder / "1" / WEIGHTS).unlink()
    assert refused(model, folder).startswith(f"{folder / '1' / WEIGHTS}: no such file")


def test_base_models_class_reads_a_base_checkpoint_through_from_pretrained(upstream_checkpoint):
    model, args = VisualGLMModel.from_pretrained(str(upstream_checkpoint), VisualGLMModel.get_args(skip_init=True))
    assert args.image_length == 32
    assert not model.training


def test_safe_checkpoint_types_let_numpys_random_state_through(tmp_path):
    torch.save(numpy.random.get_state(), tmp_path / "state")
    with torch.serialization.safe_globals(safe_checkpoint_types()):
        name, keys, *_ = torch.load(tmp_path / "state", weights_only=True)
    assert name == "MT19937"
    assert numpy.array_equal(keys, numpy.random.get_state()[1])
