"""What a CPU computes faster than by torch's public operations: products with frozen weights, and GELU in bfloat16.

With oneDNN they are in full width, for training and answering; torch's own kernels for weights in 8 and 4 bits are for
answering only (`model.inference.quantize`, which has the plain product beside them).

torch has these operations for its compiler, under private names that a release may change. Its public mkldnn modules
copy every input and output. So the private names are used, in this file only, and `can_pack` is asked first. Where it
says no, `pack_linears` leaves plain linears as they are and `gelu` is torch's own: the same numbers, more slowly.

Given plain rows, oneDNN brings a weight into its own order at every product. With a few hundred tokens that takes up to
half of the time. A prepacked weight lies in that order from the start. For answers in bfloat16 on a CPU with AMX, whose
products mostly have one row of input, or a few, `RowsLinear` leaves the rows as they are, and takes public operations that
read them so.
"""

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from model.frozen import FrozenLinear, plain_linears

PRIVATE_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
LOW_BIT_OPERATIONS = ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")
TYPICAL_TOKENS = 256  # oneDNN asks how many rows a product will have; measured, packing for 64 or 1024 is as fast
IDENTITY_WIDTH = 32  # numbers in a row that `gelu` multiplies by the identity
# Numbers. torch's own GELU of fewer, as in a token of an answer, is done before oneDNN has begun.
WORTH_A_PRODUCT = 2**15
FEW_ROWS = 96  # of an input; from about 120 on, a plain product is the faster one, measured with AMX


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch has the private operations, and this CPU instructions of its own for dtype."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, op) for op in PRIVATE_OPERATIONS):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def has_amx() -> bool:
    """Whether this CPU has AMX, which oneDNN takes for products in bfloat16 of any size."""
    asked: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return asked is not None and asked()


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can be asked for products with weight, or for the GELU of a tensor like it."""
    return weight.device.type == "cpu" and has_onednn(weight.dtype)


def in_onednn_order(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] as `onednn_linear` reads it. `to_dense()` undoes it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS)


def onednn_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    """`F.linear(x, weight, bias)`, [..., in] → [..., out], of a weight `in_onednn_order`; it has no gradient.

    With activation "gelu" it is followed by `F.gelu(…, approximate="tanh")`.
    """
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "tanh")


class PrepackedLinear(FrozenLinear):
    """A linear on a CPU whose weight lies in oneDNN's order, once for the product and once for the gradient.

    The second is made when the first gradient comes: the layers below the lowest trained one never need it.
    """

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.packed: torch.Tensor  # not buffers: nothing of torch's can copy or convert them
        self.packed_transposed: torch.Tensor | None = None

    def _keep(self, weight: torch.Tensor) -> None:
        self.packed, self.packed_transposed = in_onednn_order(weight.to(self.dtype)), None

    def weight_in_full(self) -> torch.Tensor:
        return self.packed.to_dense()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return onednn_linear(x, self.packed, self.own_bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.packed_transposed is None:
            self.packed_transposed = in_onednn_order(self._transposed())
            give_back_memory()
        return onednn_linear(gradient.contiguous(), self.packed_transposed, None)

    def _transposed(self) -> torch.Tensor:
        """The weight [in, out] as rows; the plain one is let go of before this one is packed."""
        return self.weight_in_full().T.contiguous()


class RowsLinear(FrozenLinear):
    """A linear on a CPU with AMX in bfloat16, with its weight as it is, for products with one row of input, or a few.

    One row is multiplied by torch's product of a matrix and a vector; oneDNN takes a quarter longer, packed or not. With a
    few rows, oneDNN would bring the weight into its own order for every product. The other way round, W x^T, it brings
    only x into it. Without AMX a packed weight is the faster, on an AMD EPYC by 2.5 times.
    """

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.rows: torch.Tensor
        self.register_buffer("rows", torch.empty(0, dtype=self.dtype), persistent=False)

    def _keep(self, weight: torch.Tensor) -> None:
        self.rows = weight.to(self.dtype)

    def weight_in_full(self) -> torch.Tensor:
        return self.rows

    def product(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x.reshape(-1, self.in_features)
        if len(inputs) > FEW_ROWS:
            return F.linear(x, self.rows, self.own_bias)
        output = self.rows @ inputs[0] if len(inputs) == 1 else (self.rows @ inputs.T).T.contiguous()
        output = output.view(*x.shape[:-1], self.out_features)
        return output if self.own_bias is None else output + self.own_bias


def pack_linears(module: torch.nn.Module) -> None:
    """Replace every plain linear under module that can be packed and isn't learned, in place, by a `PrepackedLinear`."""
    _replace_plain(module, PrepackedLinear, (torch.float32, torch.bfloat16))
    give_back_memory()


def keep_rows(module: torch.nn.Module) -> None:
    """Replace every plain linear under module that a `RowsLinear` is faster than, in place; weights aren't copied."""
    if has_amx():
        _replace_plain(module, RowsLinear, (torch.bfloat16,))


def _replace_plain(module: torch.nn.Module, kind: type[FrozenLinear], dtypes: tuple[torch.dtype, ...]) -> None:
    for parent, name, linear in plain_linears(module):
        if linear.weight.dtype in dtypes and can_pack(linear.weight) and not linear.weight.requires_grad:
            setattr(parent, name, kind.of(linear))


def give_back_memory() -> None:
    """Give back to the system what was freed. glibc keeps it, below 32 MiB a piece; other C libraries aren't asked.

    A weight that is packed is there three times for a moment. Of a model of 2 GB, glibc would keep 1 GB for good.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def _packed_identity() -> torch.Tensor:
    return in_onednn_order(torch.eye(IDENTITY_WIDTH, dtype=torch.bfloat16))


def _onednn_gelu(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, IDENTITY_WIDTH)
    return onednn_linear(rows, _packed_identity(), None, activation="gelu").view(x.shape)


class _OnednnGelu(torch.autograd.Function):
    """`gelu` of bfloat16 on a CPU. torch works out its tanh number by number, which takes three times as long.

    oneDNN has this function only as what may follow a product, so the numbers are multiplied by the identity. Its
    gradient is that of the GELU by erf, which is all that oneDNN has. The two differ by 0.0009 at most, a quarter of the
    step from one bfloat16 to the next below 1.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _onednn_gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grads[0], *ctx.saved_tensors, approximate="none")


def gelu(x: torch.Tensor) -> torch.Tensor:
    """ChatGLM's GELU, the tanh approximation. SAT spells it out in seven operations, each of which keeps a copy."""
    if x.dtype == torch.bfloat16 and x.shape[-1] % IDENTITY_WIDTH == 0 and x.numel() >= WORTH_A_PRODUCT and can_pack(x):
        return _OnednnGelu.apply(x) if torch.is_grad_enabled() else _onednn_gelu(x)
    return F.gelu(x, approximate="tanh")


# --- weights in 8 and 4 bits ------------------------------------------------------------------------------------------


def has_low_bit_kernels() -> bool:
    """Whether this torch has the private operations for weights in 8 and 4 bits."""
    return all(hasattr(torch.ops.aten, name) for name in LOW_BIT_OPERATIONS)


def int8_linear(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, codes * scales[:, None])`, [rows, in] → [rows, out], of codes int8[out, in]; it has no gradient."""
    return torch.ops.aten._weight_int8pack_mm(x, codes, scales.to(x.dtype))


def in_int4_order(codes: torch.Tensor) -> torch.Tensor:
    """codes int32[out, in] of 0 to 15 as `int4_linear` reads them: uint8[out, in / 2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def int4_linear(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight)`, [rows, in] → [rows, out], of weight = (code - 8) · scale + zero; it has no gradient.

    Args:
        packed: the codes, `in_int4_order`.
        group: how many numbers of an output share a scale and a zero.
        scales: bfloat16[in / group, out, 2], scale and zero.
    """
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)
