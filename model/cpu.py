"""What oneDNN does better than torch's own kernels on a CPU, each with the plain torch way beside it."""

import functools
from typing import Any

import torch

from model.frozen import FrozenLinear, plain_linears

ONE_WIDTH = 32  # numbers of a row that is multiplied by one


TYPICAL_TOKENS = 256  # oneDNN asks how many rows a product will have; measured, packing for 64 or 1024 is as fast


def in_onednn_order(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] as `onednn_product` reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS)


def onednn_product(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, then: str = "none"
) -> torch.Tensor:
    """x W^T + b, [..., in] → [..., out], without a gradient; `then` "gelu" gives its GELU, by tanh."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], "tanh")


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies by weight on this machine, with instructions of the CPU's own for its dtype."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


class PackedLinear(FrozenLinear):
    """A linear on a CPU whose weight lies in oneDNN's order, once for the product and once for the gradient.

    The second is made when the first gradient comes: the layers below the lowest trained one never need it.
    """

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.packed: torch.Tensor  # not buffers: nothing of torch's can copy or convert them
        self.packed_transposed: torch.Tensor | None = None

    @classmethod
    def of(cls, linear: Any) -> "PackedLinear":
        """A plain linear's weight and bias; the plain one loses its weight, so that nobody holds it twice."""
        packed = cls(*reversed(linear.weight.shape), linear.bias, linear.weight.dtype)
        packed.pack(linear.weight.detach())
        linear.weight.data = linear.weight.data.new_empty(0)
        return packed

    def _keep(self, weight: torch.Tensor) -> None:
        self.packed, self.packed_transposed = in_onednn_order(weight.to(self.dtype)), None

    def weight_in_full(self) -> torch.Tensor:
        return self.packed.to_dense()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return onednn_product(x, self.packed, self.bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.packed_transposed is None:
            self.packed_transposed = in_onednn_order(self.weight_in_full().T)
        return onednn_product(gradient.contiguous(), self.packed_transposed, None)


def pack_linears(module: torch.nn.Module) -> None:
    """Replace every plain linear under module that isn't learned, in place, by a `PackedLinear`."""
    for parent, name, linear in plain_linears(module):
        if not linear.weight.requires_grad:
            setattr(parent, name, PackedLinear.of(linear))


@functools.cache
def _packed_one() -> torch.Tensor:
    return in_onednn_order(torch.eye(ONE_WIDTH, dtype=torch.bfloat16))


class _OnednnGelu(torch.autograd.Function):
    """`gelu` of bfloat16 on a CPU. torch works out its tanh number by number, which takes three times as long.

    oneDNN has this function as what may follow a product, so the numbers are multiplied by one. It has a gradient for the
    GELU by erf only: that differs by 0.0009 at most, a quarter of the step from one bfloat16 to the next below 1.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return onednn_product(x.reshape(-1, ONE_WIDTH), _packed_one(), None, then="gelu").view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grads[0], *ctx.saved_tensors, approximate="none")


def gelu(x: torch.Tensor) -> torch.Tensor:
    """ChatGLM's GELU, the tanh approximation: SAT spells it out in seven operations, each of which keeps a copy."""
    if x.dtype == torch.bfloat16 and x.shape[-1] % ONE_WIDTH == 0 and can_pack(x):
        return _OnednnGelu.apply(x)
    return torch.nn.functional.gelu(x, approximate="tanh")
