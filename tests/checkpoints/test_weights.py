"""Checkpoints: what is written and in which order, what is read back, and what is refused without being run."""

import json
import os
import pickle
import random
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import GOLDEN, load_model, upstream_weights, write_checkpoint, write_tuned

from model.checkpoints import weights as module
from model.checkpoints.weights import load_checkpoint, read_weights, save_checkpoint, write_whole
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.finetune import FineTuneVisualGLMModel
from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel

import_sat()

from sat import get_tokenizer  # noqa: E402
from sat.training import model_io  # noqa: E402

WEIGHTS = "mp_rank_00_model_states.pt"
FLAGS = {"use_lora": True, "lora_rank": 2, "layer_range": [1], "use_ptuning": True, "pre_seq_len": 3}


@pytest.fixture(scope="module", autouse=True)
def tokenizer():
    """The run's tokenizer, as the script hands it to SAT."""
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    get_tokenizer(outer_tokenizer=tokenizer)
    return tokenizer


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


@pytest.fixture(scope="module")
def tuned(upstream_checkpoint):
    """A model with LoRA and P-Tuning, and SAT's namespace for it."""
    args = FineTuneVisualGLMModel.get_args(skip_init=True, **FLAGS)
    tuned, args = FineTuneVisualGLMModel.from_pretrained(str(upstream_checkpoint), args, build_only=True)
    load_checkpoint(tuned, args, load_path=str(upstream_checkpoint))
    return tuned, args


def saved(tuned, folder, iteration=1):
    model, args = tuned
    save_checkpoint(
        iteration, model, None, None, Namespace(**vars(args) | {"save": str(folder), "save_full_model": True})
    )
    return folder


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


# what is written


def test_saved_checkpoint_has_the_released_layout(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run", iteration=300)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [f"300/{WEIGHTS}", "ice_text.model", "latest", "model_config.json"]
    assert (folder / "latest").read_text() == "300"
    assert (folder / "ice_text.model").read_bytes() == (GOLDEN / "tokenizer/ice_text.model").read_bytes()


def test_saved_full_weights_are_all_of_the_models_under_module(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    content = torch.load(folder / "1" / WEIGHTS)
    expected = tuned[0].state_dict()
    assert content.keys() == {"module", "iteration"}
    assert content["iteration"] == 1
    assert content["module"].keys() == expected.keys()
    assert all(content["module"][name].equal(tensor) for name, tensor in expected.items())


def test_saved_config_describes_the_base_model_and_its_adapters(tuned, upstream_config, tmp_path):
    config = json.loads((saved(tuned, tmp_path / "run") / "model_config.json").read_text())
    assert config["model_class"] == "FineTuneVisualGLMModel"
    assert config["eva_args"] == upstream_config["eva_args"]
    assert config["qformer_args"] == upstream_config["qformer_args"]
    sizes = ("num_layers", "hidden_size", "vocab_size", "image_length", "bos_token_id", "pad_token_id")
    assert {key: config[key] for key in sizes} == {key: upstream_config[key] for key in sizes}
    assert {key: config[key] for key in FLAGS} == FLAGS


def test_saving_says_where_in_one_line(tuned, tmp_path, capsys):
    folder = saved(tuned, tmp_path / "run", iteration=20)
    assert capsys.readouterr().out == f"Saved {folder} (iteration 20).\n"


def test_saved_checkpoint_is_read_by_sats_own_loader(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    args = FineTuneVisualGLMModel.get_args(skip_init=True, **FLAGS)
    loaded, _ = FineTuneVisualGLMModel.from_pretrained(str(folder), args, build_only=True)
    model_io.load_checkpoint(loaded, args, load_path=str(folder))
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in tuned[0].state_dict().items())


def test_saved_checkpoint_when_loaded_gives_the_same_logits(tuned, tmp_path):
    for name, parameter in tuned[0].named_parameters():
        if "matrix_B" in name or "ptuning" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    input_ids = torch.tensor([[859, 775, 86, 89, 554]])
    loaded = load_model(saved(tuned, tmp_path / "run"), "FineTuneVisualGLMModel")
    tuned[0].eval()
    assert torch.equal(loaded(input_ids=input_ids)[0], tuned[0](input_ids=input_ids)[0])


def test_model_inside_deepspeeds_engine_is_saved_under_its_own_names(tuned, tmp_path):
    engine = SimpleNamespace(module=tuned[0])
    folder = saved((engine, tuned[1]), tmp_path / "run")
    assert torch.load(folder / "1" / WEIGHTS)["module"].keys() == tuned[0].state_dict().keys()


def test_saving_writes_latest_last(tuned, tmp_path, monkeypatch):
    written = []

    def recording(path, write):
        write_whole(path, write)
        written.append(path.name)

    monkeypatch.setattr(module, "write_whole", recording)
    saved(tuned, tmp_path / "run")
    assert written[0] == WEIGHTS
    assert written[-1] == "latest"


def dies_midway(_, path):
    Path(path).write_bytes(b"half of the wei")
    raise KeyboardInterrupt


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("iteration", [1, 2])  # saved again, or saved next
def test_kill_while_weights_are_written_leaves_the_last_checkpoint_whole(tuned, tmp_path, monkeypatch, iteration):
    folder = saved(tuned, tmp_path / "run", iteration=1)
    before = (folder / "1" / WEIGHTS).read_bytes()
    monkeypatch.setattr(torch, "save", dies_midway)
    with pytest.raises(KeyboardInterrupt):
        saved(tuned, folder, iteration)
    assert (folder / "latest").read_text() == "1"
    assert (folder / "1" / WEIGHTS).read_bytes() == before
    assert not (folder / "2" / WEIGHTS).exists()


def test_kill_after_the_weights_leaves_latest_at_the_last_checkpoint(tuned, tmp_path, monkeypatch):
    folder = saved(tuned, tmp_path / "run", iteration=1)
    monkeypatch.setattr(ChatGLMTokenizer, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tuned, folder, iteration=2)
    assert (folder / "latest").read_text() == "1"
    assert load_checkpoint(tuned[0], Namespace(load=str(folder))) == 0


def test_write_whole_when_writing_fails_leaves_the_old_content(tmp_path):
    path = tmp_path / "new folder" / "file"
    write_whole(path, lambda unfinished: unfinished.write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, lambda unfinished: dies_midway(None, unfinished))
    assert path.read_text() == "old"


# what is read


def test_iteration_to_go_on_from_is_latests_in_pretrain_mode_and_0_else(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run", iteration=7)
    modes = ("pretrain", "finetune", "inference")
    assert [load_checkpoint(tuned[0], Namespace(load=str(folder), mode=mode)) for mode in modes] == [7, 0, 0]


def test_specific_iteration_is_read_in_place_of_latests(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run", iteration=3)
    saved(tuned, folder, iteration=6)
    args = Namespace(load=str(folder), mode="pretrain")
    assert load_checkpoint(tuned[0], args, specific_iteration=3) == 3


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
    with pytest.raises(InputError, match=rf"1 tensors are missing \(the first: {re.escape(gone)}\)"):
        load_model(folder, "FineTuneVisualGLMModel")


@pytest.mark.parametrize("content", [{"weights": {}}, [1], torch.zeros(1)])
def test_file_without_module_is_refused(model, tmp_path, content):
    assert 'no "module"' in refused(model, stored(tmp_path / "foreign", content))


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
    with torch.serialization.safe_globals(module.safe_checkpoint_types()):
        name, keys, *_ = torch.load(tmp_path / "state", weights_only=True)
    assert name == "MT19937"
    assert numpy.array_equal(keys, numpy.random.get_state()[1])
