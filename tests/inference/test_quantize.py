"""Linears in 8 and 4 bits: how far they are from float32, at every size, and what their checkpoints hold."""

import pytest
import torch

from model.cpu import LOW_BIT_OPERATIONS, has_low_bit_kernels
from model.inference import quantize
from model.inference.quantize import (
    GROUP,
    KERNEL_ROWS,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
)

WIDTHS = {Int8Linear: 8, Int4Linear: 4}
# of the largest number of a row, or of a group's range: half a step, and what bfloat16 rounds of scale and zero
HALF_A_STEP = {Int8Linear: 0.51 / 127, Int4Linear: 0.52 / 15}
SHAPES = [(160, 480), (128, 64), (64, 70), (100, 33), (40, 1), (8, 200), (1408, 130)]  # in, out


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    """float32[out, in] with numbers of the size that trained ones have."""
    return 0.02 * torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(1))


def packed(
    linear: type[Int8Linear] | type[Int4Linear],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Int8Linear | Int4Linear:
    made = linear(weight.shape[1], len(weight), None if bias is None else torch.nn.Parameter(bias), dtype)
    made.pack(weight)
    return made


def test_this_torch_has_the_private_operations() -> None:
    missing = [name for name in LOW_BIT_OPERATIONS if not hasattr(torch.ops.aten, name)]
    assert not missing, (
        f"torch {torch.__version__} lacks {missing}: pin torch==2.13.0, or mend model/inference/quantize.py"
    )
    assert has_low_bit_kernels()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("linear", WIDTHS)
def test_no_number_is_off_by_more_than_half_a_step(linear, shape) -> None:
    weight = weight_of(shape)
    off = (packed(linear, weight).weight_in_full() - weight).abs()
    if linear is Int8Linear:
        steps = weight.abs().amax(1, keepdim=True).expand_as(weight)
    else:
        groups = torch.nn.functional.pad(weight, (0, -shape[0] % GROUP)).unflatten(1, (-1, GROUP))
        steps = (groups.amax(2) - groups.amin(2)).repeat_interleave(GROUP, 1)[:, : shape[0]]
    assert (off <= HALF_A_STEP[linear] * steps + 1e-9).all()


@pytest.mark.parametrize("linear", WIDTHS)
def test_rows_are_packed_as_if_at_once_however_many_at_a_time(linear, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of((100, 300))
    at_once = packed(linear, weight).weight_in_full()
    monkeypatch.setattr(quantize, "PACKED_AT_A_TIME", 100 * 70)
    assert len(quantize.packed_at_a_time(300, 100)) == 5
    assert torch.equal(packed(linear, weight).weight_in_full(), at_once)


@pytest.mark.parametrize("rows", [1, 2, 7, 24, 127, 128, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("linear", WIDTHS)
def test_product_is_that_of_the_weight_in_full_whatever_the_number_of_rows(linear, shape, rows) -> None:
    bias = torch.randn(shape[1])
    module = packed(linear, weight_of(shape), bias)
    x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(rows))
    expected = torch.nn.functional.linear(x, module.weight_in_full())
    error = (module(x) - bias - expected).norm() / expected.norm()
    assert error < 0.01  # bfloat16 keeps 8 bits of x, of the sum, and of the levels


@pytest.mark.parametrize(("linear", "bound"), [(Int8Linear, 0.012), (Int4Linear, 0.1)])
def test_product_is_near_that_of_float32(linear, bound) -> None:
    weight, x = weight_of((1024, 256)), torch.randn(5, 1024)
    expected = x @ weight.T
    assert (packed(linear, weight)(x) - expected).norm() / expected.norm() < bound


@pytest.mark.parametrize("linear", WIDTHS)
def test_kernel_and_plain_product_agree(linear, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = packed(linear, weight_of((160, 200))), torch.randn(40, 160)
    outputs = []
    for rows in (0, 1000):
        monkeypatch.setattr(quantize, "KERNEL_ROWS", {8: rows, 4: rows})
        outputs.append(module(x))
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < 0.01


def test_four_bits_in_an_order_that_is_unknown_have_the_same_weight_and_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = packed(Int4Linear, weight_of((100, 70))), torch.randn(max(KERNEL_ROWS.values()) + 1, 100)
    outputs, weights = [], []
    for known in (True, False):
        monkeypatch.setattr(quantize, "lies_in_halves", lambda known=known: known)
        outputs.append(module(x))
        weights.append(module.weight_in_full())
    assert (outputs[0] - outputs[1]).norm() / outputs[1].norm() < 0.01
    torch.testing.assert_close(weights[0], weights[1], rtol=0.01, atol=1e-3 * weights[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", WIDTHS)
def test_output_has_the_inputs_dtype_and_shape(linear, dtype) -> None:
    module = packed(linear, weight_of((32, 48)), torch.zeros(48).to(dtype), dtype)
    for shape in ((32,), (2, 3, 32), (2, 60, 32)):
        output = module(torch.randn(shape).to(dtype))
        assert (output.dtype, output.shape) == (dtype, (*shape[:-1], 48))


@pytest.mark.parametrize("size", [0.02, 0.0005], ids=["weights of a usual size", "small ones"])
@pytest.mark.parametrize("large", [0.1, 30.0, 3000.0], ids=["small inputs", "large ones", "one that is very large"])
def test_product_in_float16_neither_overflows_nor_loses_digits(
    large: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: wide rows, with an input that the model's own float16 can have."""
    monkeypatch.setattr(quantize, "wide_dtype", lambda x: x.dtype)
    linear = packed(Int8Linear, size * torch.randn(64, 16384, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(KERNEL_ROWS[8], 16384, generator=torch.Generator().manual_seed(2))
    x[:, 5] = large
    if large == 30:
        x *= large
    expected = x.half().float() @ linear.weight_in_full().T
    assert expected.abs().max() < torch.finfo(torch.float16).max
    difference = linear.product(x.half()).float() - expected
    assert difference.norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("linear", WIDTHS)
def test_weights_that_are_all_equal_or_zero_stay_so(linear) -> None:
    for value in (0.0, 0.25, -0.25):
        full = packed(linear, torch.full((16, 64), value)).weight_in_full()
        torch.testing.assert_close(full, torch.full((16, 64), value), rtol=0.005, atol=0)


@pytest.mark.parametrize("linear", WIDTHS)
def test_state_dict_has_the_weight_under_its_ordinary_name_and_loads_again(linear) -> None:
    module = packed(linear, weight_of((64, 70)), torch.randn(70))
    assert set(module.state_dict()) == {"weight", "bias"}
    again = linear(64, 70, torch.nn.Parameter(torch.zeros(70)), torch.float32)
    again.load_state_dict(module.state_dict())
    x = torch.randn(3, 64)
    torch.testing.assert_close(again(x), module(x), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("linear", "bytes_a_number"), [(Int8Linear, 1.002), (Int4Linear, 0.5 + 4 / GROUP)])
def test_what_is_kept_takes_the_bytes_that_are_promised(linear, bytes_a_number) -> None:
    module = packed(linear, weight_of((2048, 128)))
    kept = [value for value in (*vars(module).values(), *module.buffers()) if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in kept) <= bytes_a_number * 2048 * 128


def test_embedding_gives_rows_in_full_width() -> None:
    weight = weight_of((64, 100))
    embedding = Int8Embedding(64, 100, None, torch.bfloat16)
    embedding.pack(weight)
    rows = embedding(torch.tensor([[3, 99], [0, 3]]))
    assert (rows.shape, rows.dtype) == ((2, 2, 64), torch.bfloat16)
    torch.testing.assert_close(rows[0].float(), weight[[3, 99]], rtol=0.01, atol=0.6 / 127 * 0.08)
    assert (embedding.weight.dtype, embedding.weight.device.type) == (torch.bfloat16, "cpu")
