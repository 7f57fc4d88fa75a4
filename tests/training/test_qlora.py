"""QLoRA: a model whose linears are in 4 bits, never trained, and saved under ordinary names."""

import sys
import weakref

import pytest
import torch
from conftest import load_model, run_program, write_tuned

from model.checkpoints.save import save_checkpoint
from model.cli.flag_checks import flag_problems
from model.cli.options import parse
from model.convert.merge_lora import merge
from model.errors import InputError
from model.finetune import FineTuneVisualGLMModel
from model.frozen import Nf4Linear, import_bitsandbytes
from model.inference.load import load_for_answering
from model.sat_compat import import_sat

QLORA = {"use_qlora": True, "lora_rank": 4}
INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint, "FineTuneVisualGLMModel", **QLORA)


# the model


def test_every_linear_of_the_language_models_layers_is_in_4_bits_and_no_other(model):
    packed = {name.replace(".original", "") for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    assert packed == {
        f"transformer.layers.{layer}.{linear}"
        for layer in range(3)
        for linear in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    }


def test_trained_tensors_are_the_factors_and_nothing_else(model):
    model.disable_untrainable_params()
    factors = {
        f"transformer.layers.{layer}.attention.{factor}"
        for layer in range(3)
        for matrix in ("matrix_A", "matrix_B")
        for factor in (*(f"query_key_value.{matrix}.{part}" for part in range(3)), f"dense.{matrix}.0")
    }
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == factors
    model(input_ids=INPUT_IDS)[0].square().mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == factors


def test_model_has_no_parameter_of_the_packed_weights(model):
    names = [name for name, _ in model.named_parameters() if name.startswith("transformer.layers.0.mlp")]
    assert names == ["transformer.layers.0.mlp.dense_h_to_4h.bias", "transformer.layers.0.mlp.dense_4h_to_h.bias"]


@pytest.mark.slow
def test_optimizer_steps_leave_the_packed_weights_as_they_are(model):
    model.disable_untrainable_params()
    packed = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".packed")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=INPUT_IDS)[0].square().mean().backward()
        optimizer.step()
    assert len(packed) == 12
    assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in packed.items())


def test_full_save_unpacks_one_weight_at_a_time_and_writes_what_state_dict_has(model, tmp_path, monkeypatch, tokenizer):
    alive, most, unpack = weakref.WeakSet(), [], Nf4Linear.weight_in_full

    def counted(linear):
        alive.add(weight := unpack(linear))
        most.append(len(alive))
        return weight

    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(Nf4Linear, "weight_in_full", counted)
    import_sat().get_tokenizer(outer_tokenizer=tokenizer)
    args = FineTuneVisualGLMModel.get_args(save=str(tmp_path), save_full_model=True, lr=1.0, **QLORA)
    save_checkpoint(1, model, None, None, args)
    saved = torch.load(tmp_path / "1/mp_rank_00_model_states.pt")["module"]
    assert len(most) == 12
    assert max(most) <= 2  # that of the last, until the next is there
    assert list(saved) == list(expected)
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_logits_are_those_of_a_plain_model_with_the_unpacked_weights(model, upstream_checkpoint):
    plain = load_model(upstream_checkpoint)
    unpacked = {name.replace(".original", ""): tensor for name, tensor in model.state_dict().items()}
    plain.load_state_dict({name: tensor for name, tensor in unpacked.items() if "matrix_" not in name})
    torch.testing.assert_close(model(input_ids=INPUT_IDS)[0], plain(input_ids=INPUT_IDS)[0], rtol=1e-5, atol=1e-5)


def test_merged_model_has_the_base_models_names(model, upstream_checkpoint):
    model.get_mixin("lora").merge_lora()
    assert model.state_dict().keys() == load_model(upstream_checkpoint).state_dict().keys()


# bitsandbytes


def test_missing_bitsandbytes_is_one_sentence(monkeypatch):
    monkeypatch.setattr("model.cli.flag_checks._is_installed", lambda package: package != "bitsandbytes")
    [sentence] = flag_problems(parse(["--use_qlora", "--train-data", "rows.json"]))
    assert sentence == ("--use_qlora: the package bitsandbytes is not installed; pip install bitsandbytes is needed.")


@pytest.mark.run
def test_bitsandbytes_is_imported_without_a_word_and_only_when_it_is_needed():
    run = run_program("import_bitsandbytes")
    assert run.stdout == "False\nTrue\n"
    assert run.stderr == ""


def test_bitsandbytes_that_cannot_be_imported_is_one_sentence_before_a_model_is_built(
    upstream_checkpoint, tmp_path, monkeypatch
):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", **QLORA)
    import_bitsandbytes.cache_clear()
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("model.visualglm.VisualGLMModel.__init__", lambda *_, **__: pytest.fail("a model is built"))
    sentence = r"^bitsandbytes, which .*, can't be imported \(.*bitsandbytes.*\); pip install bitsandbytes is needed\.$"
    with pytest.raises(InputError, match=sentence):
        load_for_answering(tuned)
    with pytest.raises(InputError, match=sentence):
        merge(tuned, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(InputError, match=sentence):
        load_model(upstream_checkpoint, "FineTuneVisualGLMModel", **QLORA)
