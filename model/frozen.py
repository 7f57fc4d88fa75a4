"""Linears that are never learned, with their weights kept in another form than rows of numbers.

    FrozenLinear      what they share: the gradient to their input, and ordinary checkpoints
    Nf4Linear         4 bits a number, for QLoRA: bitsandbytes' NF4 (Dettmers et al. 2023), in which a block of 64 numbers
                      shares a scale, and each number is one of 16 levels
    PrepackedLinear   in `model.cpu`: the order in which oneDNN reads a weight
    RowsLinear        in `model.cpu`: the weight as it is, for products with few rows

`state_dict` gives their weights in full width under ordinary names.
"""

import abc
import functools
import logging
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F

from model.errors import InputError
from model.sat_compat import import_sat, left_alone

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)

NF4_BLOCK = 64  # numbers that share a scale, as in the paper
# So many at once, while a weight is packed on a GPU: whole, it would take twice its size beside it.
ROWS_IN_FLOAT32 = 16 * NF4_BLOCK
SMALLEST_SCALE = 1e-38  # bitsandbytes' own, so that a block of zeros is not divided by 0
CELLS = 512  # of -1 to 1; NF4's levels lie further apart than one of them
NUMBERS_IN_CACHE = 2**16  # 256 KiB in float32
PLAIN_LINEARS = (torch.nn.Linear, mpu.ColumnParallelLinear, mpu.RowParallelLinear)


class FrozenLinear(torch.nn.Module, abc.ABC):
    """y = x W^T + b, with W in a form of the subclass's own.

    It holds no weight until `pack` is given one. `load_state_dict` packs one tensor at a time, on the module's device.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: torch.nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        """dtype is the weight's in full width. The bias is taken as it is."""
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.bias = bias
        self.split: str | None = None  # "rows" or "columns", where other model-parallel processes have the rest of W
        self.gathers = False  # of a part by rows: whether the other parts' outputs are put beside it, as the head does
        self.has_weight = False

    def pack(self, weight: torch.Tensor) -> None:
        """Keep weight [out, in].

        Raises:
            ValueError: it has another shape.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight of shape {list(weight.shape)}, not {[self.out_features, self.in_features]}")
        self._keep(weight)
        self.has_weight = True

    @abc.abstractmethod
    def _keep(self, weight: torch.Tensor) -> None:
        """Keep weight [out, in] in this class's form."""

    @abc.abstractmethod
    def weight_in_full(self) -> torch.Tensor:
        """The weight [out, in] as the model sees it."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b, [..., in] → [..., out], without a gradient."""
        return F.linear(x, self.weight_in_full(), self.own_bias)

    def input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """g W, [..., out] → [..., in]: the gradient with respect to x."""
        return gradient @ self.weight_in_full()

    @property
    def own_bias(self) -> torch.Tensor | None:
        """The bias that this process adds: where the products of several are summed up, one of them does."""
        return self.bias if self.split != "columns" or mpu.get_model_parallel_rank() == 0 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b, [..., in] → [..., out]; of a part by rows, out is its own, and of one by columns, in is."""
        if self.split == "rows":
            x = mpu.copy_to_model_parallel_region(x)
        product = _Product.apply(x, self) if torch.is_grad_enabled() else self.product(x)
        if self.split == "columns":
            return mpu.reduce_from_model_parallel_region(product)
        return mpu.gather_from_model_parallel_region(product) if self.gathers else product

    @classmethod
    def like(cls, linear: Any) -> Any:
        """One without a weight yet, in the place of a linear, whose bias it takes."""
        if isinstance(linear, FrozenLinear):
            frozen = cls(linear.in_features, linear.out_features, linear.bias, linear.dtype)
            frozen.split, frozen.gathers = linear.split, linear.gathers
            return frozen
        out_features, in_features = linear.weight.shape
        frozen = cls(in_features, out_features, linear.bias, linear.weight.dtype)
        frozen.split = split_of_linear(linear)
        frozen.gathers = frozen.split == "rows" and linear.gather_output
        return frozen

    @classmethod
    def of(cls, linear: Any) -> Any:
        """A plain linear's weight and bias; the plain one loses its weight, so that nobody holds it twice."""
        frozen = cls.like(linear)
        frozen.pack(linear.weight.detach())
        linear.weight.data = linear.weight.data.new_empty(0)
        return frozen

    def plain(self) -> torch.nn.Linear:
        """A plain linear with the same weight, in full width, and the same bias."""
        linear = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = torch.nn.Parameter(self.weight_in_full(), requires_grad=False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        others = {name: tensor for name, tensor in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, errors)
        if weight is None:
            missing.append(prefix + "weight")
            return
        try:
            self.pack(weight)
        except ValueError as problem:
            errors.append(f"{prefix}weight: {problem}")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.has_weight:
            destination[prefix + "weight"] = self.weight_in_full()
        super()._save_to_state_dict(destination, prefix, keep_vars)


class _Product(torch.autograd.Function):
    """A FrozenLinear's product, with a gradient to its input only. No copy of the weight is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenLinear) -> torch.Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.linear.input_gradient(grads[0]), None


def product(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """x W^T, [..., in] → [..., out], of a linear of any kind without a bias; no gradient."""
    return linear.product(x) if isinstance(linear, FrozenLinear) else F.linear(x, linear.weight)


def input_gradient(linear: Any, gradient: torch.Tensor) -> torch.Tensor:
    """g W, [..., out] → [..., in], of a linear of any kind."""
    return linear.input_gradient(gradient) if isinstance(linear, FrozenLinear) else gradient @ linear.weight


def plain_linears(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """(parent, name, linear) of every linear under module that is no FrozenLinear."""
    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, PLAIN_LINEARS)
    ]


def split_of_linear(linear: Any) -> str | None:
    """Along what a linear of SAT's is split: "rows", or "columns"; None if every process has all of it."""
    if not isinstance(linear, PLAIN_LINEARS[1:]) or mpu.get_model_parallel_world_size() == 1:
        return None
    return "rows" if isinstance(linear, mpu.ColumnParallelLinear) else "columns"


def make_plain(module: torch.nn.Module) -> None:
    """Replace every linear of SAT's under module, in place, by torch's own, which asks for no other process."""
    for parent, name, linear in plain_linears(module):
        out_features, in_features = linear.weight.shape
        plain = torch.nn.Linear(in_features, out_features, bias=linear.bias is not None, device="meta")
        plain.weight, plain.bias = linear.weight, linear.bias
        for parameter in plain.parameters():
            parameter.model_parallel = False  # type: ignore[attr-defined]
        setattr(parent, name, plain)


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@functools.cache
def import_bitsandbytes() -> Any:
    """`bitsandbytes.functional`. What it logs at import, about kernels that a machine lacks, is not shown.

    At import it has torch compile functions that nothing here needs, and torch tells its compiler to leave the others
    alone. Neither is done: that compiler would take 2 s and 0.1 GiB of every start.

    Raises:
        InputError: it isn't there, or can't be imported.
    """
    logging.disable(logging.WARNING)
    try:
        with ExitStack() as undo:
            for name in ("compile", "_disable_dynamo"):
                undo.callback(setattr, torch, name, getattr(torch, name))
                setattr(torch, name, left_alone)
            import bitsandbytes.functional

            return bitsandbytes.functional
    except Exception as error:  # a library that it looks for may be missing or broken, too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        needed = "pip install bitsandbytes" if isinstance(error, ModuleNotFoundError) else "one that works here"
        raise InputError(
            f"bitsandbytes, which keeps weights in 4 bits, can't be imported ({reason}); {needed} is needed."
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """weight [out, in] in NF4: uint8[out · in / 2, 1] and bitsandbytes' state to undo it.

    The scales stay in float32. Quantising the result of `dequantized` then gives the same numbers again, so that a model
    that was saved in full width loads as the one that was trained.
    """
    if weight.device.type == "cpu" and weight.numel() % NF4_BLOCK == 0:
        return _quantized_on_cpu(weight)
    quantize = functools.partial(import_bitsandbytes().quantize_4bit, quant_type="nf4", blocksize=NF4_BLOCK)
    parts = [quantize(rows.float().contiguous()) for rows in weight.split(ROWS_IN_FLOAT32)]
    state = parts[0][1]
    state.absmax, state.shape = torch.cat([part.absmax for _, part in parts]), weight.shape
    return torch.cat([packed for packed, _ in parts]), state


def _quantized_on_cpu(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """`quantized`, to the last bit what bitsandbytes 0.50 makes of it on a CPU, in a fifth of its time.

    bitsandbytes looks each number up among the 15 bounds between NF4's levels. Here its place among CELLS equal cells is
    computed: a cell holds one bound at most, so that one comparison is left. As many numbers at a time as fit into a cache.
    """
    functional = import_bitsandbytes()
    levels = functional.get_4bit_type("nf4", device="cpu")
    bounds = (levels[1:] + levels[:-1]) / 2
    cell_of_bound = _cells(bounds)
    codes_below = (torch.arange(CELLS + 1)[:, None] > cell_of_bound).sum(dim=1, dtype=torch.uint8)
    bound_in_cell = torch.full((CELLS + 1,), 2.0).scatter_(0, cell_of_bound.long(), bounds)  # 2: no number is above

    packed = torch.empty(weight.numel() // 2, 1, dtype=torch.uint8)
    scales = torch.empty(weight.numel() // NF4_BLOCK)
    at_once = NUMBERS_IN_CACHE // NF4_BLOCK
    blocks = weight.detach().reshape(-1, NF4_BLOCK)
    for some, scale, output in zip(
        blocks.split(at_once), scales.split(at_once), packed.split(NUMBERS_IN_CACHE // 2), strict=True
    ):
        numbers = some.float()
        scale.copy_(numbers.abs().amax(dim=1))
        scaled = (numbers * (1 / scale.clamp(min=SMALLEST_SCALE)).unsqueeze(1)).flatten()
        cells = _cells(scaled)
        codes = codes_below.index_select(0, cells)
        codes += scaled > bound_in_cell.index_select(0, cells)
        # Two codes, the first in the lower byte; in a packed byte it is in the upper half.
        pairs = codes.view(torch.int16)
        output[:, 0] = (pairs << 4) | (pairs >> 8)
    state = functional.QuantState(
        scales, weight.shape, levels, blocksize=NF4_BLOCK, quant_type="nf4", dtype=torch.float32
    )
    return packed, state


def _cells(numbers: torch.Tensor) -> torch.Tensor:
    """int32: the cells of numbers from -1 to 1, of CELLS that are equally wide. A NaN is in one of them too."""
    return torch.mul(numbers, CELLS / 2).add_(CELLS / 2).to(torch.int32).clamp_(0, CELLS)


def dequantized(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in dtype, from what `quantized` gave."""
    state.dtype = dtype  # what bitsandbytes unpacks to, without a copy in float32 on the way
    return import_bitsandbytes().dequantize_4bit(packed, state)


class Nf4Linear(FrozenLinear):
    """A linear whose weight is kept in NF4. It is unpacked for every product, and again for the gradient.

    On a GPU bitsandbytes takes for a product of few rows a kernel that unpacks as it goes; which are few depends on the GPU.
    """

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.packed: torch.Tensor
        self.register_buffer("packed", torch.empty(0, dtype=torch.uint8), persistent=False)
        self.state: Any = None

    def _keep(self, weight: torch.Tensor) -> None:
        device = weight.device if self.packed.is_meta else self.packed.device
        self.packed, self.state = quantized(weight.to(device))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cuda" or self.in_features % NF4_BLOCK:
            return super().product(x)
        from bitsandbytes import matmul_4bit  # which packing has imported

        product: torch.Tensor = matmul_4bit(x, self.packed, self._state_here(), bias=self.own_bias)
        return product

    def weight_in_full(self) -> torch.Tensor:
        return dequantized(self.packed, self._state_here(), self.dtype)

    def _state_here(self) -> Any:
        """bitsandbytes' state, on this linear's device."""
        if self.state.absmax.device != self.packed.device:
            self.state.to(self.packed.device)
        return self.state

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype  # .half() and its like
        return applied


def keep_in_4_bits(module: torch.nn.Module) -> None:
    """Replace every linear under module, in place, by an `Nf4Linear`, which gets its weight when a checkpoint is loaded."""
    for parent, name, linear in plain_linears(module):
        setattr(parent, name, Nf4Linear.like(linear))
