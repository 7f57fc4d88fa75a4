"""What oneDNN computes is what plain torch does: output, gradient and checkpoint. See training/test_qlora.py for 4 bits."""

import re
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, load_model

from model import cpu
from model.cpu import (
    FEW_ROWS,
    IDENTITY_WIDTH,
    PrepackedLinear,
    RowsLinear,
    can_pack,
    gelu,
    give_back_memory,
    in_onednn_order,
    keep_rows,
    onednn_linear,
    pack_linears,
)
from model.data.dataset import data_collator
from model.frozen import input_gradient, product
from model.lora import LoraLinear
from model.training.step import loss_sum

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def plain(dtype: torch.dtype = torch.float32, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(48, 20, bias=bias).to(dtype).requires_grad_(False)


def packed(dtype: torch.dtype = torch.float32, bias: bool = True) -> PrepackedLinear:
    return PrepackedLinear.of(plain(dtype, bias))


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
    PrepackedLinear.of(linear)
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
    assert torch.equal(again.weight, plain().weight)
    assert torch.equal(again.bias, plain().bias)


def test_lora_over_a_packed_linear_merges_into_a_plain_one() -> None:
    lora = LoraLinear(plain(), rank=2, alpha=4.0)
    torch.nn.init.normal_(lora.matrix_B[0])
    x = torch.randn(5, 48)
    expected = lora(x)
    lora.original = PrepackedLinear.of(lora.original)
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
    assert type(module["frozen"]) is PrepackedLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [(), (1,), (1, 1), (2, 7), (FEW_ROWS,), (2, FEW_ROWS)])
def test_rows_have_the_output_and_gradient_of_the_plain_linear_however_many_tokens(bias, tokens) -> None:
    x = torch.randn(*tokens, 48).bfloat16().requires_grad_()
    exact = torch.nn.functional.linear(x.double(), *(p.double() for p in plain(torch.bfloat16, bias).parameters()))
    output = RowsLinear.of(plain(torch.bfloat16, bias))(x)
    assert output.is_contiguous()
    torch.testing.assert_close(output, exact.bfloat16(), rtol=1e-2, atol=1e-2)
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, x, gradient)
    torch.testing.assert_close(found, input_gradient(plain(torch.bfloat16), gradient), rtol=1e-2, atol=1e-2)


def test_rows_are_kept_of_frozen_linears_in_bfloat16_alone_and_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    if not can_pack(plain(torch.bfloat16).weight):
        pytest.skip("this CPU has no instructions for that")
    frozen = plain(torch.bfloat16)
    place = frozen.weight.data_ptr()
    module = torch.nn.ModuleDict(
        {
            "learned": torch.nn.Linear(4, 4).bfloat16(),
            "wide": plain(),
            "in fp16": plain(torch.float16),
            "frozen": frozen,
        }
    )
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    keep_rows(module)
    kinds = {name: type(child) for name, child in module.items()}
    assert kinds == dict.fromkeys(("learned", "wide", "in fp16"), torch.nn.Linear) | {"frozen": RowsLinear}
    assert module["frozen"].weight_in_full().data_ptr() == place
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_that_cannot_be_packed_are_told_apart() -> None:
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float16))
    assert not can_pack(torch.zeros(2, 2, device="meta"))


@pytest.mark.parametrize("flags", [{"use_lora": True, "lora_rank": 2}, {"use_ptuning": True, "pre_seq_len": 2}])
def test_packed_model_has_the_loss_the_gradient_and_the_state_of_the_plain_one(
    upstream_checkpoint, flags, capsys
) -> None:
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

    def counted() -> list[str]:
        model.disable_untrainable_params()
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("Trainable")]

    (plain,) = counted()
    pack_linears(model.transformer.layers)
    pack_linears(model.get_mixin("chatglm-final"))
    assert counted() == [plain]  # as many parameters, in whichever form they are kept
    packed_loss, packed_gradients = loss_and_gradients()
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert any(gradient.norm() > 0 for gradient in gradients)
    for gradient, packed_gradient in zip(gradients, packed_gradients, strict=True):
        torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-6)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# the private operations


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_onednn_linear_of_each_kind_is_torchs(dtype, bias, activation) -> None:
    linear, x = plain(dtype, bias), torch.randn(7, 48).to(dtype)
    if not can_pack(linear.weight):
        pytest.skip("this CPU has no instructions for that")
    expected = linear(x)
    if activation == "gelu":
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    found = onednn_linear(x, in_onednn_order(linear.weight), linear.bias, activation)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weight_in_onednns_order_goes_back_to_what_it_was(dtype) -> None:
    weight = plain(dtype).weight
    assert torch.equal(in_onednn_order(weight).to_dense(), weight)


@pytest.mark.skipif(not can_pack(torch.empty(1, dtype=torch.bfloat16)), reason="needs a CPU with bfloat16 instructions")
def test_gelu_of_every_bfloat16_is_torchs_own_and_its_gradient_as_near_as_bfloat16_can_tell() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite() & (every.abs() < 2**13)].view(-1, IDENTITY_WIDTH).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, expected = gelu(x), torch.nn.functional.gelu(exact, approximate="tanh")
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-8, atol=1e-3)


def test_gelu_of_a_width_that_onednn_cant_be_asked_for_is_torchs_own() -> None:
    x = torch.randn(3, IDENTITY_WIDTH + 1).bfloat16()
    assert torch.equal(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))


@pytest.fixture
def without_private_operations(monkeypatch: pytest.MonkeyPatch):
    """A torch that has given its private operations other names."""
    monkeypatch.setattr(cpu, "PRIVATE_OPERATIONS", ("_no_such_operation",))
    cpu.has_onednn.cache_clear()
    yield
    cpu.has_onednn.cache_clear()


def test_linears_when_torch_lacks_the_private_operations_stay_plain(without_private_operations) -> None:
    module = torch.nn.ModuleDict({"frozen": plain()})
    pack_linears(module)
    assert type(module["frozen"]) is torch.nn.Linear


def test_gelu_when_torch_lacks_the_private_operations_is_torchs_own(without_private_operations) -> None:
    x = torch.randn(3, IDENTITY_WIDTH).bfloat16()
    assert torch.equal(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_private_operations_are_used_in_cpu_py_only() -> None:
    private = re.compile(r"torch\.ops\.|torch\._C\b|\._linear_pointwise|\._reorder_linear_weight")
    files = (PROJECT / "model").rglob("*.py")
    assert [path.name for path in files if private.search(path.read_text())] == ["cpu.py"]


def test_memory_that_the_c_library_keeps_is_given_back() -> None:
    def in_memory() -> int:
        return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]  # KiB

    give_back_memory()
    blocks = [torch.ones(2**14) for _ in range(1600)]  # 64 KiB each, in the heap
    between = blocks[1::2]
    before = in_memory()
    del blocks
    give_back_memory()
    assert in_memory() < before - 40 * 1024  # of 50
    assert len(between) == 800
