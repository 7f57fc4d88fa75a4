"""A linear in 4 bits is right forwards and backwards, and its checkpoint is an ordinary one."""

import pytest
import torch

from model.frozen import NF4_BLOCK, Nf4Linear, dequantized, import_bitsandbytes, quantized
from model.lora import LoraLinear


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


def test_packed_weight_is_near_the_original_and_takes_an_eighth_of_its_bytes(weight):
    linear = nf4(weight)
    # The widest gap of NF4's 16 levels, 0.3 of a block's largest number (Dettmers et al. 2023, appendix E), halved.
    assert (linear.weight_in_full() - weight).abs().max() <= 0.16 * weight.abs().max()
    assert linear.packed.numel() * 8 == weight.numel() * weight.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["drawn", "a block of zeros", "every bound, and its neighbours", "an infinite number"])
def test_packing_on_a_cpu_gives_what_bitsandbytes_gives_to_the_last_bit(dtype: torch.dtype, kind: str) -> None:
    weight = torch.randn(300, 4 * NF4_BLOCK, generator=torch.Generator().manual_seed(1)).to(dtype)
    if kind == "a block of zeros":
        weight[7, :NF4_BLOCK] = 0
    elif kind == "every bound, and its neighbours":
        levels = import_bitsandbytes().get_4bit_type("nf4", device="cpu")
        bounds = (levels[1:] + levels[:-1]) / 2
        near = [torch.nextafter(bounds, torch.tensor(to)) for to in (-9.0, 9.0)]
        weight[0, : 4 * NF4_BLOCK : 4] = 1.0
        weight[0, 1:46] = torch.cat([bounds, *near])
    elif kind == "an infinite number":
        weight[0, 0] = torch.inf
    packed, state = quantized(weight)
    expected, expected_state = import_bitsandbytes().quantize_4bit(weight.float(), quant_type="nf4", blocksize=64)
    finite = slice(NF4_BLOCK // 2, None) if kind == "an infinite number" else slice(None)  # 0 · inf has no code
    assert torch.equal(packed[finite], expected[finite])
    assert torch.equal(state.absmax, expected_state.absmax)
    assert torch.equal(dequantized(packed, state, dtype)[1:], dequantized(expected, expected_state, dtype)[1:])
    assert (state.shape, state.blocksize, state.quant_type) == (weight.shape, 64, "nf4")


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
