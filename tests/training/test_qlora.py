"""QLoRA: 4-bit weights that are right forwards and backwards, never trained, and saved under ordinary names."""

import pytest
import torch
from conftest import load_model, run_python

from model.cli.flag_checks import flag_problems
from model.cli.options import parse
from model.frozen import Nf4Linear, dequantized, quantized
from model.lora import LoraLinear

QLORA = {"use_qlora": True, "lora_rank": 4}
INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


def nf4(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Nf4Linear:
    """An Nf4Linear with that weight."""
    out_features, in_features = weight.shape
    linear = Nf4Linear(in_features, out_features, None if bias is None else torch.nn.Parameter(bias), weight.dtype)
    linear.pack(weight)
    return linear


@pytest.fixture
def weight():
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def bias():
    return torch.randn(12, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint, "FineTuneVisualGLMModel", **QLORA)


# the linear


def test_packed_weight_is_near_the_original_and_takes_an_eighth_of_its_bytes(weight):
    linear = nf4(weight)
    # The widest gap of NF4's 16 levels, 0.3 of a block's largest number (Dettmers et al. 2023, appendix E), halved.
    assert (linear.weight_in_full() - weight).abs().max() <= 0.16 * weight.abs().max()
    assert linear.packed.numel() * 8 == weight.numel() * weight.element_size()


def test_packing_what_was_unpacked_changes_nothing(weight):
    once = dequantized(*quantized(weight), torch.float32)
    assert torch.equal(dequantized(*quantized(once), torch.float32), once)


def test_output_is_that_of_the_unpacked_linear(weight, bias):
    linear, x = nf4(weight, bias), torch.randn(2, 5, 64)
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight_in_full(), bias))


def test_gradient_of_the_input_is_that_of_the_unpacked_linear(weight, bias):
    linear = nf4(weight, bias)
    plain = linear.plain()
    x = torch.randn(2, 5, 64)
    gradients = []
    for module in (linear, plain):
        copy = x.clone().requires_grad_(True)
        module(copy).square().sum().backward()
        gradients.append(copy.grad)
    torch.testing.assert_close(*gradients)


def test_output_in_half_width_is_in_half_width(weight):
    linear = nf4(weight.bfloat16()).bfloat16()
    assert linear(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert linear.weight_in_full().dtype == torch.bfloat16


def test_half_keeps_the_scales_of_the_blocks_in_float32(weight):
    linear = nf4(weight)
    linear.half()
    assert linear.state.absmax.dtype == torch.float32
    assert linear.packed.dtype == torch.uint8


def test_saved_linear_is_a_plain_one_and_loads_into_both_kinds(weight, bias):
    saved = nf4(weight, bias).state_dict()
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == {"weight": [12, 64], "bias": [12]}
    torch.nn.Linear(64, 12).load_state_dict(saved)
    loaded = Nf4Linear(64, 12, torch.nn.Parameter(torch.zeros(12)), torch.float32)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.weight_in_full(), saved["weight"])
    assert torch.equal(loaded.bias, bias)


def test_weight_of_another_shape_is_refused_when_loaded(weight):
    with pytest.raises(RuntimeError, match=r"a weight of shape \[12, 64\], not \[64, 12\]"):
        Nf4Linear(12, 64, None, torch.float32).load_state_dict({"weight": weight})


def test_missing_weight_is_named_when_loaded():
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        Nf4Linear(64, 12, None, torch.float32).load_state_dict({})


def test_merged_lora_over_4_bits_is_a_plain_linear_of_the_unpacked_weight_and_the_change(weight, bias):
    lora = LoraLinear(torch.nn.Linear(64, 12), rank=2, parts=3, alpha=4.0)
    lora.original = nf4(weight, bias)
    for factor in lora.matrix_B:
        torch.nn.init.normal_(factor)
    x = torch.randn(5, 64)
    merged = lora.merged()
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), lora(x), rtol=1e-5, atol=1e-5)


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


def test_optimizer_steps_leave_the_packed_weights_as_they_are(model):
    model.disable_untrainable_params()
    packed = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(".packed")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=INPUT_IDS)[0].square().mean().backward()
        optimizer.step()
    assert len(packed) == 12
    assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in packed.items())


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
    code = (
        "import sys, model.frozen as a; print('bitsandbytes' in sys.modules); a.import_bitsandbytes(); "
        "print('bitsandbytes' in sys.modules)"
    )
    run = run_python("-c", code)
    assert run.stdout == "False\nTrue\n"
    assert run.stderr == ""
