"""Linears in 8 or 4 bits, for answering: smaller than bfloat16, and as much faster as reading them takes less time.

    Int8Linear        one scale for each output: 1 byte a number. Any device; torch's own kernel on a CPU
    Int8Embedding     the same for the words' embeddings: a row is looked up and put back in full width
    Int4Linear        a scale and a zero point for each 64 inputs of an output: 0.5625 byte a number. CPU only
    Nf4Linear         in `model.frozen`: 4 bits on a GPU, and what QLoRA was trained on

torch's CPU kernels (`model.cpu`) are fast in bfloat16 alone (in float32 ten times slower than a plain product), so that
an input of another dtype is rounded to it. They read the weights again for every row of the input. From `KERNEL_ROWS`
on, some of the weights at a time are put in full width for a plain product.

Traded away: a search for better scales, which would make loading several times longer; and 4 bits for the head, the
embeddings and the vision part, which are a quarter of the 6B's weights and lose more than the layers do.
"""

import abc
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F

from model.cpu import has_onednn, in_int4_order, int4_linear, int8_linear
from model.frozen import FrozenLinear, Nf4Linear, plain_linears
from model.sat_compat import model_parallel

# From so many rows of the input on, a plain product with weights put in full width for it is faster: measured with
# avx512_bf16, 4096 × 4096, by the CPU time of one thread.
KERNEL_ROWS = {8: 24, 4: 128}
GROUP = 64  # numbers that share a scale in 4 bits; 32 is as fast and its error a tenth smaller, but takes 0.33 GiB more on the 6B
BLOCK = 64  # outputs that torch's 4-bit kernel takes at a time; a weight is filled up to a multiple of them
BYTES_IN_4_BITS = 0.5 + 4 / GROUP  # of a number, with its share of scale and zero; about the same in NF4
ROWS_AT_A_TIME = 512  # of a weight: what is kept of them in full width fits into a core's cache
POWER_OF_FLOAT16 = 2**9  # that an input is divided by: sums of codes, up to 127 each, would exceed what float16 holds
PACKED_AT_A_TIME = 2**20  # numbers of a weight that are brought into fewer bits
NUMBERS_AT_A_TIME = 2**26  # of a weight, on a GPU: the largest of a 6B's layer at once, and its head in eight parts


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a plain product with x: bfloat16 on a CPU that has instructions for it, else x's own."""
    return torch.bfloat16 if x.device.type == "cpu" and has_onednn(torch.bfloat16) else x.dtype


def quantize_linears(model: Any, bits: int, device: torch.device) -> None:
    """Replace the linears of a VisualGLM on the meta device, in place, by ones that quantise the weight they are given.

    The language model's layers get that many bits; the head, the words' embeddings and the vision part always 8. LoRA
    factors stay as they are, beside a quantised linear: merged first, they would be rounded with its weight.

    Args:
        device: where the model is going to be.
    """
    transformer = model.transformer
    in_4_bits = Nf4Linear if device.type == "cuda" else Int4Linear
    for part in (transformer.layers, model.get_mixin("chatglm-final"), model.get_mixin("eva")):
        made = in_4_bits if bits == 4 and part is transformer.layers else Int8Linear
        for parent, name, linear in [*plain_linears(part), *nf4_linears(part)]:
            setattr(parent, name, made.like(linear))
    transformer.word_embeddings = Int8Embedding.like(transformer.word_embeddings)


def nf4_linears(module: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """(parent, name, linear) of every linear under module that is kept in NF4."""
    children = ((parent, name, child) for parent in module.modules() for name, child in parent.named_children())
    return [found for found in children if isinstance(found[2], Nf4Linear)]


def sizes_of(linear: Any) -> tuple[int, int]:
    """How many numbers a linear takes and gives; of embeddings, their width and how many there are."""
    if isinstance(linear, FrozenLinear):
        return linear.in_features, linear.out_features
    out_features, in_features = linear.weight.shape
    return in_features, out_features


def bytes_of(model: Any, dtype: torch.dtype, bits: int | None) -> int:
    """How many bytes the model's weights take in a number format; bits as for `quantize_linears`, or None."""
    in_layers = [*plain_linears(model.transformer.layers), *nf4_linears(model.transformer.layers)]
    layers = sum(math.prod(sizes_of(linear)) for _, _, linear in in_layers)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    in_nf4 = bool(nf4_linears(model.transformer.layers))
    others = numbers if in_nf4 else numbers - layers
    if bits is None:
        return int(layers * (BYTES_IN_4_BITS if in_nf4 else dtype.itemsize)) + others * dtype.itemsize
    return int(layers * (BYTES_IN_4_BITS if bits == 4 else 1)) + others


class QuantizedLinear(FrozenLinear):
    """What both widths share: an input of any dtype and number of rows; the sum with the bias in the input's dtype."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if x.device.type == "cpu" and self._takes_kernel(len(rows)):
            output = self._kernel(rows.bfloat16().contiguous())
        else:
            wide = rows.to(wide_dtype(x))
            some_rows = ROWS_AT_A_TIME if x.device.type == "cpu" else NUMBERS_AT_A_TIME // self.in_features
            starts = range(0, self.out_features, some_rows)
            output = torch.cat([self._wide_product(wide, slice(start, start + some_rows)) for start in starts], 1)
        output = output.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() > 1 else output[0].to(x.dtype)
        bias = self.own_bias
        return output if bias is None else output + bias.to(x.dtype)

    @abc.abstractmethod
    def _takes_kernel(self, rows: int) -> bool:
        """Whether torch's kernel is right for an input of so many rows, or else the plain product."""

    @abc.abstractmethod
    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, bfloat16[rows, in] → bfloat16[rows, out], by torch's own kernel."""

    @abc.abstractmethod
    def _rows(self, some: slice, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the weight in full width, [some, in]."""

    def _wide_product(self, x: torch.Tensor, some: slice) -> torch.Tensor:
        """x W^T of some rows of the weight, [rows, in] → [rows, some]."""
        return F.linear(x, self._rows(some, x.dtype))

    def weight_in_full(self) -> torch.Tensor:
        starts = range(0, self.out_features, ROWS_AT_A_TIME)
        return torch.cat([self._rows(slice(start, start + ROWS_AT_A_TIME), self.dtype) for start in starts])


class Int8Linear(QuantizedLinear):
    """A linear with 8 bits a number. Its rows' largest numbers become 127; none is off by more than half a step."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("codes", torch.empty(0, dtype=torch.int8), persistent=False)
        self.register_buffer("scales", torch.empty(0, dtype=torch.float32), persistent=False)

    def _keep(self, weight: torch.Tensor) -> None:
        device = weight.device
        self.codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
        self.scales = torch.empty(len(weight), dtype=torch.float32, device=device)
        for some in packed_at_a_time(*weight.shape):
            rows = weight[some].to(device, torch.float32)
            # The scales are rounded first, to what the kernel takes, so that the numbers are rounded once.
            scales = (rows.abs().amax(dim=1) / 127).bfloat16().float().clamp(min=torch.finfo(torch.float32).tiny)
            self.codes[some] = (rows / scales[:, None]).round_().clamp_(-127, 127)
            self.scales[some] = scales

    def _takes_kernel(self, rows: int) -> bool:
        # Of a width that is no multiple of 16, torch 2.13.0's kernel reads past the end.
        return rows < KERNEL_ROWS[8] and self.in_features % 16 == 0

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        return int8_linear(x, self.codes, self.scales)

    def _rows(self, some: slice, dtype: torch.dtype) -> torch.Tensor:
        return (self.codes[some] * self.scales[some, None]).to(dtype)

    def _wide_product(self, x: torch.Tensor, some: slice) -> torch.Tensor:
        # The codes are exact in every dtype. Scaling the output takes less than scaling them.
        scales = self.scales[some]
        if x.dtype == torch.float16:
            x, scales = x / POWER_OF_FLOAT16, scales * POWER_OF_FLOAT16
        return F.linear(x, self.codes[some].to(x.dtype)) * scales.to(x.dtype)


class Int8Embedding(Int8Linear):
    """Words' embeddings [vocab, hidden] in 8 bits. `weight` has no rows; it says the dtype and the device."""

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.first_word = 0  # that this model-parallel process has
        self.weight: torch.Tensor
        self.register_buffer("weight", torch.empty(0, self.in_features, dtype=self.dtype), persistent=False)

    def _keep(self, weight: torch.Tensor) -> None:
        super()._keep(weight)
        self.weight = self.weight.to(weight.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The rows of input_ids int64[…], in full width: [..., hidden]."""
        if self.split is None:
            return self._looked_up(input_ids)
        places = input_ids - self.first_word
        is_own = (places >= 0) & (places < self.out_features)
        rows = self._looked_up(places.where(is_own, 0)) * is_own.unsqueeze(-1)
        torch.distributed.all_reduce(rows, group=model_parallel().group)
        return rows

    def _looked_up(self, places: torch.Tensor) -> torch.Tensor:
        return (self.codes[places] * self.scales[places].unsqueeze(-1)).to(self.weight.dtype)

    @classmethod
    def like(cls, embeddings: Any) -> Any:
        """Some without a weight yet, in the place of plain embeddings."""
        count, width = embeddings.weight.shape
        packed = cls(width, count, None, embeddings.weight.dtype)
        if count < embeddings.num_embeddings:  # the others' words are on other model-parallel processes
            packed.split, packed.first_word = "rows", embeddings.vocab_start_index
        return packed


class Int4Linear(QuantizedLinear):
    """A linear with 4 bits a number on a CPU: w = (code - 8) · scale + zero, with a scale and a zero for each group.

    The levels reach from a group's smallest number to its largest; none is off by more than half a step.
    """

    def __init__(self, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.width = -(-self.in_features // GROUP) * GROUP  # filled up with zeros
        self.height = -(-self.out_features // BLOCK) * BLOCK
        self.packed: torch.Tensor  # uint8[height, width / 2], in the kernel's order; not buffers: for a CPU only
        self.scales: torch.Tensor  # bfloat16[width / GROUP, height, 2]: scale, zero

    def _keep(self, weight: torch.Tensor) -> None:
        self.packed = torch.empty(self.height, self.width // 2, dtype=torch.uint8)
        self.scales = torch.empty(self.width // GROUP, self.height, 2, dtype=torch.bfloat16)
        for some in packed_at_a_time(self.height, self.width):
            rows = weight[some].to("cpu", torch.float32)
            missing = (0, self.width - self.in_features, 0, some.stop - some.start - len(rows))
            codes, scales, zeros = grouped_codes(F.pad(rows, missing) if any(missing) else rows)
            self.packed[some] = in_int4_order(codes)
            self.scales[:, some, 0], self.scales[:, some, 1] = scales.T, zeros.T

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, self.width - self.in_features)) if self.width > self.in_features else x
        output = int4_linear(x, self.packed, GROUP, self.scales)
        return output[:, : self.out_features]

    def _takes_kernel(self, rows: int) -> bool:
        return rows < KERNEL_ROWS[4] or not lies_in_halves()

    def weight_in_full(self) -> torch.Tensor:
        if lies_in_halves():
            return super().weight_in_full()
        return self._kernel(torch.eye(self.in_features, dtype=torch.bfloat16)).T.to(self.dtype).contiguous()

    def _rows(self, some: slice, dtype: torch.dtype) -> torch.Tensor:
        some = slice(some.start, min(some.stop, self.height))
        scales, zeros = self.scales[:, some].to(dtype).transpose(0, 1).unsqueeze(-1).unbind(2)
        rows = self._codes(some).to(dtype).view(-1, self.width // GROUP, GROUP).mul_(scales).add_(zeros).flatten(1)
        return rows[: self.out_features - some.start, : self.in_features]

    def _codes(self, some: slice) -> torch.Tensor:
        """The codes of some rows of the weight less 8, int8[some, width], from the kernel's order."""
        # 64 rows at a time, input by input. Bytes are brought in the other order faster than numbers.
        packed = self.packed[some].view(-1, self.width, BLOCK // 2).transpose(1, 2).contiguous()
        return torch.stack((packed & 15, packed >> 4), 1).view(torch.int8).sub_(8).view(-1, self.width)


def packed_at_a_time(height: int, width: int) -> list[slice]:
    """The rows of a weight [height, width] that are brought into fewer bits at once.

    What is made of them on the way stays in a CPU's cache, and in memory that is taken again for the next ones.
    """
    rows = max(PACKED_AT_A_TIME // width // BLOCK, 1) * BLOCK
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def grouped_codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows float32[rows, width] in 4 bits: codes int32[rows, width] of 0 to 15; scales and zeros [rows, width / GROUP].

    Scales and zeros are rounded to bfloat16 first, so that the numbers are rounded to levels that the kernel has.
    """
    groups = rows.unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=2), groups.amax(dim=2)  # several times faster than both at once by aminmax
    scales = ((high - low) / 15).bfloat16().float().clamp(min=torch.finfo(torch.float32).tiny)
    zeros = (low + 8 * scales).bfloat16().float()
    codes = (groups - zeros[..., None]).div_(scales[..., None]).round_().add_(8).clamp_(0, 15)
    return codes.flatten(1).int(), scales, zeros


@functools.cache
def lies_in_halves() -> bool:
    """Whether the kernel's order on this CPU is the one of AVX-512, which `Int4Linear` can unpack.

    For each input, 32 bytes hold 64 rows: the first 32 in their lower halves, the others in the upper ones. The order is
    found by packing the rows' own numbers.
    """
    rows = torch.arange(BLOCK, dtype=torch.int32)[:, None].expand(BLOCK, GROUP)
    expected = torch.arange(BLOCK // 2)
    for codes in (rows % 16, rows // 16):
        packed = in_int4_order(codes.contiguous()).view(GROUP, BLOCK // 2)
        lower, upper = codes[expected, 0], codes[expected + BLOCK // 2, 0]
        if not torch.equal(packed, (lower + 16 * upper).to(torch.uint8).expand_as(packed)):
            return False
    return True
