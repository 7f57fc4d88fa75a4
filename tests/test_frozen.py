"""A packed linear is the plain one: same output, same gradient, same checkpoint. See test_qlora.py for 4 bits."""

import pytest
import torch
from conftest import load_model

from model.cpu import PackedLinear, can_pack, pack_linears
from model.data.dataset import data_collator
from model.frozen import input_gradient, product
from model.lora import LoraLinear
from model.training.step import loss_sum

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def plain(dtype: torch.dtype = torch.float32, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(48, 20, bias=bias).to(dtype).requires_grad_(False)


def packed(dtype: torch.dtype = torch.float32, bias: bool = True) -> PackedLinear:
    return PackedLinear.of(plain(dtype, bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(1,), (2, 7), (300,)])
def test_packed_linear_has_the_output_and_gradient_of_the_plain_one(dtype, bias, tokens) -> None:
    if not can_pack(plain(dtype).weight):
        pytest.skip("this CPU has no instructions for that")
    x = torch.randn(*tokens, 48).to(dtype)
    outputs, gradients = [], []
    for linear in (plain(dtype, bias), packed(dtype, bias)):
        leaf = x.clone().requires_grad_()
        outputs.append(linear(leaf))
        outputs[-1].square().sum().backward()
        gradients.append(leaf.grad)
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=bound, atol=bound)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=bound, atol=10 * bound)


def test_gradient_that_is_not_contiguous_goes_through() -> None:
    gradient = torch.randn(20, 5).T
    torch.testing.assert_close(packed().input_gradient(gradient), gradient @ plain().weight)


def test_plain_linear_that_was_packed_holds_its_weight_no_more() -> None:
    linear = plain()
    PackedLinear.of(linear)
    assert linear.weight.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_a_packed_linear_is_the_plain_ones_and_goes_back_in(dtype) -> None:
    saved, expected = packed(dtype).state_dict(), plain(dtype).state_dict()
    assert list(saved) == ["weight", "bias"] or list(saved) == ["bias", "weight"]
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    other = packed(dtype)
    other.input_gradient(torch.randn(1, 20).to(dtype))
    doubled = {"weight": 2 * saved["weight"], "bias": saved["bias"]}
    other.load_state_dict(doubled)
    assert torch.equal(other.weight_in_full(), doubled["weight"])
    ones = torch.ones(1, 20).to(dtype)
    torch.testing.assert_close(other.input_gradient(ones), ones @ doubled["weight"], rtol=1e-2, atol=1e-2)


def test_plain_linear_of_a_packed_one_is_what_it_was() -> None:
    again = packed().plain()
    assert type(again) is torch.nn.Linear
    assert torch.equal(again.weight, plain().weight) and torch.equal(again.bias, plain().bias)


def test_lora_over_a_packed_linear_merges_into_a_plain_one() -> None:
    lora = LoraLinear(plain(), rank=2, alpha=4.0)
    torch.nn.init.normal_(lora.matrix_B[0])
    x = torch.randn(5, 48)
    expected = lora(x)
    lora.original = PackedLinear.of(lora.original)
    merged = lora.merged()
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


def test_product_and_gradient_are_the_same_for_a_plain_linear_and_a_packed_one() -> None:
    x, gradient = torch.randn(3, 48), torch.randn(3, 20)
    torch.testing.assert_close(product(packed(bias=False), x), product(plain(bias=False), x))
    torch.testing.assert_close(input_gradient(packed(), gradient), input_gradient(plain(), gradient))


def test_linear_that_is_learned_stays_plain() -> None:
    module = torch.nn.ModuleDict({"learned": torch.nn.Linear(4, 4), "frozen": plain()})
    pack_linears(module)
    assert type(module["learned"]) is torch.nn.Linear
    assert type(module["frozen"]) is PackedLinear


def test_weights_that_cannot_be_packed_are_told_apart() -> None:
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float16))
    assert not can_pack(torch.zeros(2, 2, device="meta"))


@pytest.mark.parametrize("flags", [{"use_lora": True, "lora_rank": 2}, {"use_ptuning": True, "pre_seq_len": 2}])
def test_packed_model_has_the_loss_the_gradient_and_the_state_of_the_plain_one(upstream_checkpoint, flags) -> None:
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", **flags)
    model.freeze()
    ids = [5, 6, 7, 86, 89, 8, 9, 90]
    rows = [{"input_ids": ids, "labels": [*[-100] * 4, *ids[4:]], "image": None, "pre_image": 0, "image_length": 32,
             "pad_token_id": 3}]  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def loss_and_gradients() -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = loss_sum(model, data_collator(rows))
        loss.backward()
        return loss.item(), [p.grad for p in model.parameters() if p.requires_grad]

    loss, gradients = loss_and_gradients()
    pack_linears(model.transformer.layers)
    pack_linears(model.get_mixin("chatglm-final"))
    packed_loss, packed_gradients = loss_and_gradients()
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert any(gradient.norm() > 0 for gradient in gradients)
    for gradient, packed_gradient in zip(gradients, packed_gradients, strict=True):
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-6)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
