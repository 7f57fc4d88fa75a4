"""Kinds of checkpoints: what they say of themselves, what they load, and how training goes on from them."""

import argparse
import json
import shutil

import pytest
import torch
from conftest import GOLDEN, PROJECT, load_model, run_program, write_tuned

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import with_base
from model.checkpoints.weights import fingerprint, read_weights
from model.cli.flag_checks import config_problems
from model.cli.options import parse
from model.convert.merge_lora import merge
from model.cpu import pack_linears
from model.errors import InputError
from model.finetune import FineTuneVisualGLMModel
from model.inference.flags import found_checkpoint
from model.inference.load import load_for_answering

WEIGHTS = "1/mp_rank_00_model_states.pt"
LORA = {"use_lora": True, "lora_rank": 3, "layer_range": [0, 2]}
PTUNING = {"use_ptuning": True, "pre_seq_len": 4}
INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


@pytest.fixture(scope="module")
def lora(upstream_checkpoint, tmp_path_factory):
    return write_tuned(upstream_checkpoint, tmp_path_factory.mktemp("tuned") / "lora", lora_alpha=6.0, **LORA)


@pytest.fixture(scope="module")
def full_lora(upstream_checkpoint, tmp_path_factory):
    return write_tuned(upstream_checkpoint, tmp_path_factory.mktemp("tuned") / "full", full=True, **LORA)


@pytest.fixture(scope="module")
def ptuning(upstream_checkpoint, tmp_path_factory):
    return write_tuned(upstream_checkpoint, tmp_path_factory.mktemp("tuned") / "ptuning", **PTUNING)


def config_of(folder):
    return json.loads((folder / "model_config.json").read_text())


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=INPUT_IDS)[0]


def start_from(folder, **flags):
    """The model that training would start with, frozen as SAT has it frozen."""
    model, args = FineTuneVisualGLMModel.from_pretrained(str(folder), FineTuneVisualGLMModel.get_args(**flags))
    model.freeze()
    return model, args


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# what it says of itself


def test_adapter_describes_its_method_its_base_and_the_versions(lora, upstream_checkpoint):
    described = config_of(lora)["finetuning"]
    assert described["contents"] == "adapter"
    assert described["methods"] == ["lora"]
    assert described["lora"] == {
        "rank": 3, "alpha": 6.0, "dropout": 0.0, "layers": [0, 2], "targets": ["query_key_value", "dense"],
    }  # fmt: skip
    assert described["base"]["path"] == str(upstream_checkpoint / WEIGHTS)
    assert described["base"]["fingerprint"] == fingerprint(read_weights(upstream_checkpoint / WEIGHTS))
    assert {"torch", "SwissArmyTransformer"} <= described["versions"].keys()


def test_methods_flags_stand_where_the_released_script_looks_for_them(lora):
    assert {key: config_of(lora)[key] for key in LORA} == LORA


@pytest.mark.run
def test_saved_configs_are_byte_for_byte_those_of_the_releases_before(tmp_path):
    run = run_program("write_saved_configs", tmp_path, PYTHONPATH=f"{PROJECT}:{PROJECT / 'tests'}")
    assert run.returncode == 0, run.stderr
    golden = {path.name: path.read_bytes() for path in (GOLDEN / "saved_configs").glob("*.json")}
    assert len(golden) == 6
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json")} == golden


# fingerprints


def test_fingerprint_of_a_full_checkpoint_is_its_bases(full_lora, upstream_checkpoint):
    found = [fingerprint(read_weights(folder / WEIGHTS)) for folder in (full_lora, upstream_checkpoint)]
    # The full one has SAT's buffer in the width it is kept in; the others are compared.
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights | {"a": weights["a"] + 1e-3},
        lambda weights: weights | {"a": weights["a"].double()},
        lambda weights: weights | {"a": weights["a"].view(50, 20)},
        lambda weights: {"b": weights["a"]},
    ],
)
def test_fingerprint_changes_with_values_width_shape_and_names(change):
    weights = {"a": torch.arange(1000.0).view(20, 50)}
    assert fingerprint(change(weights)) != fingerprint(weights)


# loading


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "1", WEIGHTS])
def test_adapter_is_loaded_from_a_folder_an_iterations_folder_or_its_weights_file(lora, part):
    model, _ = load_for_answering(str(lora / part))
    expected, _ = load_for_answering(str(lora))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.slow
def test_adapter_and_full_checkpoint_of_the_same_tuning_give_the_same_logits(upstream_checkpoint, tmp_path):
    both = []
    for name, full in (("adapter", False), ("full", True)):
        torch.manual_seed(5)
        both.append(write_tuned(upstream_checkpoint, tmp_path / name, full=full, train_parts=["qformer"], **LORA))
    one, other = (logits(load_for_answering(str(folder))[0]) for folder in both)
    assert torch.equal(one, other)


def moved(upstream_checkpoint, tmp_path, change=0.0):
    """The base at another place, all its weights changed by that much."""
    folder = shutil.copytree(upstream_checkpoint, tmp_path / "moved")
    weights = torch.load(folder / WEIGHTS)["module"]
    torch.save({"module": {name: tensor + change for name, tensor in weights.items()}}, folder / WEIGHTS)
    return folder


@pytest.fixture
def orphan(lora, tmp_path):
    """An adapter whose base is not where it was."""
    folder = shutil.copytree(lora, tmp_path / "orphan")
    config = config_of(folder)
    config["finetuning"]["base"] |= {"name": "gone", "path": "/gone/1/mp_rank_00_model_states.pt"}
    (folder / "model_config.json").write_text(json.dumps(config))
    return folder


def test_base_that_is_not_there_is_a_sentence_with_its_name(orphan):
    with pytest.raises(InputError, match=r"its base gone is not there, nor at /gone/1/.*--base .* is needed"):
        load_for_answering(str(orphan))


@pytest.mark.slow
def test_base_that_was_moved_is_given(orphan, lora, upstream_checkpoint, tmp_path):
    model, _ = load_for_answering(str(orphan), base=str(moved(upstream_checkpoint, tmp_path)))
    assert torch.equal(logits(model), logits(load_for_answering(str(lora))[0]))


@pytest.mark.slow
def test_full_checkpoint_of_the_base_serves_as_the_base(orphan, lora, full_lora):
    model, _ = load_for_answering(str(orphan), base=str(full_lora))
    assert torch.equal(logits(model), logits(load_for_answering(str(lora))[0]))


def test_other_base_is_refused_and_can_be_forced(orphan, upstream_checkpoint, tmp_path):
    other = moved(upstream_checkpoint, tmp_path, change=0.01)
    with pytest.raises(InputError, match=r"trained on other weights .* --force_base"):
        load_for_answering(str(orphan), base=str(other))
    model, _ = load_for_answering(str(orphan), base=str(other), force_base=True)
    assert torch.equal(model.transformer.word_embeddings.weight, read_weights(other / WEIGHTS)[
        "transformer.word_embeddings.weight"
    ])  # fmt: skip


def test_base_of_other_sizes_is_refused_by_its_sizes_even_if_forced(orphan, upstream_checkpoint, tmp_path):
    other = moved(upstream_checkpoint, tmp_path)
    config = config_of(other)
    sizes = config["hidden_size"]
    (other / "model_config.json").write_text(json.dumps(config | {"hidden_size": 240, "num_layers": 9}))
    with pytest.raises(InputError, match=f"--base {other}: .*num_layers 9, not .*; hidden_size 240, not {sizes}"):
        load_for_answering(str(orphan), base=str(other), force_base=True)
    with pytest.raises(InputError, match="hidden_size 240"):
        merge(str(orphan), str(tmp_path / "merged"), base=str(other), force_base=True)


def test_base_of_a_checkpoint_that_needs_none_is_refused(upstream_checkpoint, full_lora, tmp_path):
    for name in (upstream_checkpoint, full_lora):
        options = argparse.Namespace(from_pretrained=str(name), revision=None, base="gone")
        with pytest.raises(InputError, match=f"--base gone: {name} is no adapter and has all its weights"):
            found_checkpoint(options)
    with pytest.raises(InputError, match="leave --base out"):
        merge(str(full_lora), str(tmp_path / "merged"), base="gone")


def test_adapter_is_no_base(orphan, ptuning):
    with pytest.raises(InputError, match="an adapter checkpoint too"):
        load_for_answering(str(orphan), base=str(ptuning))


def test_base_is_found_before_torch_is_needed(lora, upstream_checkpoint):
    assert with_base(Checkpoint.find(lora)).base.weights_file() == upstream_checkpoint / WEIGHTS


def test_another_model_in_this_folder_with_the_bases_relative_name_is_not_taken_for_it(
    lora, upstream_checkpoint, tmp_path, monkeypatch
):
    folder = shutil.copytree(lora, tmp_path / "tuned")
    config = config_of(folder)
    config["finetuning"]["base"]["name"] = "mybase"
    (folder / "model_config.json").write_text(json.dumps(config))
    shutil.copytree(upstream_checkpoint, tmp_path / "mybase")
    monkeypatch.chdir(tmp_path)
    assert with_base(Checkpoint.find(folder)).base.folder == upstream_checkpoint


def test_base_is_looked_for_by_its_name_where_a_model_of_other_sizes_lies_in_its_place(
    orphan, upstream_checkpoint, tmp_path, monkeypatch
):
    shutil.copytree(upstream_checkpoint, tmp_path / "gone")
    other = shutil.copytree(upstream_checkpoint, tmp_path / "other")
    (other / "model_config.json").write_text(json.dumps({**config_of(other), "num_layers": 9}))
    config = config_of(orphan)
    config["finetuning"]["base"]["path"] = str(other)
    (orphan / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="num_layers 9, not"):
        with_base(Checkpoint.find(orphan))
    monkeypatch.chdir(tmp_path)
    assert with_base(Checkpoint.find(orphan)).base.name == "gone"


def test_base_that_was_moved_is_found_by_its_name(orphan, upstream_checkpoint, tmp_path, monkeypatch):
    shutil.copytree(upstream_checkpoint, tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    assert with_base(Checkpoint.find(orphan)).base.name == "gone"


# going on


def test_going_on_from_an_adapter_keeps_the_bases_dropout(upstream_checkpoint, tmp_path):
    base = shutil.copytree(upstream_checkpoint, tmp_path / "base")
    config = {**config_of(base), "hidden_dropout": 0.25}
    (base / "model_config.json").write_text(json.dumps(config))
    tuned = write_tuned(base, tmp_path / "tuned", **LORA)
    assert "hidden_dropout" not in config_of(tuned)
    assert with_base(Checkpoint.find(tuned)).config["hidden_dropout"] == 0.25


@pytest.mark.slow
def test_going_on_with_the_same_method_starts_from_its_factors(lora):
    model, args = start_from(lora, use_lora=True)
    assert (args.lora_rank, args.lora_alpha, args.layer_range) == (3, 6.0, [0, 2])
    assert trained(model) == set(read_weights(lora / WEIGHTS))
    pack_linears(model)  # as a model that answers has them
    assert torch.equal(logits(model), logits(load_for_answering(str(lora))[0]))


@pytest.mark.slow
def test_going_on_with_another_method_keeps_the_adapter_and_trains_the_new_one_alone(lora, tmp_path):
    both = write_tuned(lora, tmp_path / "both", **PTUNING)
    assert trained(start_from(lora, **PTUNING)[0]) == {f"mixins.ptuning.prefix.{layer}" for layer in range(3)}
    names = set(read_weights(both / WEIGHTS))
    assert set(read_weights(lora / WEIGHTS)) < names
    assert config_of(both)["finetuning"]["methods"] == ["lora", "ptuning"]
    assert config_of(both)["finetuning"]["base"] == config_of(lora)["finetuning"]["base"]
    model, _ = load_for_answering(str(both))
    kept = read_weights(lora / WEIGHTS)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.slow
def test_going_on_over_4_bits_keeps_the_factors(lora):
    model, args = start_from(lora, use_qlora=True)
    assert (args.use_lora, args.use_qlora) == (False, True)
    kept = read_weights(lora / WEIGHTS)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.slow
def test_going_on_from_a_merged_model_takes_the_typed_sizes(lora, tmp_path):
    merged = merge(str(lora), str(tmp_path / "merged"))
    model, args = start_from(merged, use_lora=True, lora_rank=5)
    assert (args.lora_rank, args.layer_range) == (5, None)
    torch.testing.assert_close(logits(model), logits(load_for_answering(str(lora))[0]), rtol=1e-5, atol=1e-5)


def test_sizes_in_a_config_without_that_method_say_nothing():
    config = {"use_lora": False, "lora_rank": 99, "layer_range": [], "pre_seq_len": 99}
    asked = AdapterConfig(methods=("lora",), rank=4, layers=(1,), prefix_length=8)
    resumed = asked.resumed_from(config)
    assert (resumed.rank, resumed.layers, resumed.prefix_length) == (4, (1,), 8)


@pytest.mark.parametrize("words", [["--lora_rank", "4"], ["--layer_range", "0", "1"], ["--lora_target", "dense"]])
def test_other_sizes_than_the_checkpoints_are_refused_with_a_way_out(lora, words):
    options = parse(["--use_lora", "--from_pretrained", str(lora), "--train-data", "rows.json", *words])
    [sentence] = [s for s in config_problems(options, config_of(lora)) if s.startswith(words[0])]
    assert "already has adapters" in sentence
    assert "scripts/merge_lora.py" in sentence


def test_same_sizes_typed_again_are_taken(lora):
    words = ["--lora_rank", "3", "--layer_range", "2", "0", "--lora_target", "dense", "query_key_value"]
    options = parse(["--use_lora", "--from_pretrained", str(lora), "--train-data", "rows.json", *words])
    assert not [s for s in config_problems(options, config_of(lora)) if "already has adapters" in s]


# LoRA's own options


@pytest.mark.parametrize(
    ("targets", "linears"),
    [
        (None, {"attention.query_key_value", "attention.dense"}),
        (["dense_4h_to_h"], {"mlp.dense_4h_to_h"}),
        (["dense", "dense_h_to_4h"], {"attention.dense", "mlp.dense_h_to_4h"}),
    ],
)
def test_lora_target_chooses_the_linears(upstream_checkpoint, targets, linears):
    model = load_model(
        upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2, layer_range=[1], lora_target=targets
    )
    model.freeze()
    assert {name.split("layers.1.")[1].split(".matrix")[0] for name in trained(model)} == linears


def test_lora_dropout_blurs_the_change_in_training_only(upstream_checkpoint):
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2, lora_dropout=0.5)
    lora, x = model.transformer.layers[0].attention.dense, torch.randn(5, 64)
    assert torch.equal(lora.train()(x), lora.original(x))  # B is zero: nothing but the change could be dropped
    torch.nn.init.ones_(lora.matrix_B[0])
    assert not torch.equal(lora(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))


# parts of the vision


def test_train_parts_trains_those_parts_beside_the_adapters(upstream_checkpoint):
    model, _ = start_from(upstream_checkpoint, use_ptuning=True, train_parts=["qformer=0.25", "glm_proj"], lr=1.0)
    assert {name.split(".")[3] for name in trained(model) if name.startswith("mixins.eva")} == {"qformer", "glm_proj"}
    scales = {
        name.split(".")[3]: getattr(parameter, "lr_scale", None)
        for name, parameter in model.named_parameters()
        if name.startswith("mixins.eva")
    }
    assert scales == {"vit": None, "qformer": 0.25, "glm_proj": None}


def test_parts_that_are_not_trained_stay_in_eval_mode(upstream_checkpoint):
    model, _ = start_from(upstream_checkpoint, use_lora=True, train_parts=["qformer"])
    vision = model.train().get_mixin("eva").model
    assert {name: part.training for name, part in vision.named_children()} == {
        "vit": False, "qformer": True, "glm_proj": False,
    }  # fmt: skip


@pytest.mark.slow
def test_train_parts_in_an_adapter_are_kept_when_something_else_is_trained(upstream_checkpoint, tmp_path):
    first = write_tuned(upstream_checkpoint, tmp_path / "first", train_parts=["glm_proj"], **LORA)
    second = write_tuned(first, tmp_path / "second", use_lora=True)
    name = "mixins.eva.model.glm_proj.weight"
    assert torch.equal(read_weights(second / WEIGHTS)[name], read_weights(first / WEIGHTS)[name])
