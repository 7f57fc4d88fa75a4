"""Attention under the prefix mask, with ChatGLM's two rotary positions; fused where that pays.

SAT takes its fused path for full and causal masks only. To find out which mask it has, it waits for the device twice in
every layer, and once more in its rotary embedding. Here nothing waits, and the numbers are the same.

Shapes: batch, heads, seq, head_dim. keys is seq, plus what a cache or a prefix adds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from model.sat_compat import import_sat, model_parallel

import_sat()

from sat.model import BaseMixin  # noqa: E402  (sat can be imported only after import_sat)
from sat.model.base_model import non_conflict  # noqa: E402
from sat.model.finetune import PTuningV2Mixin  # noqa: E402
from sat.model.official.chatglm_model import ChatGLMAttnMixin  # noqa: E402

ROTARY_BASE = 10_000.0  # SAT's ChatGLMAttnMixin
PREFIX_SCALE = 0.01  # SAT's PrefixTuningMixin
# Keys; up to so many, torch's fused CPU kernel is several times slower than its parts where there is a gradient (torch
# 2.13). For one token of an answer it is the faster in float32; in bfloat16 it takes two to three times as long as they do.
SHORT_ON_CPU = 256
# Keys of all heads and rows that one token of each row sees; up to so many, the fused kernel in float32 takes less time,
# with bringing them into float32, than products in bfloat16, which oneDNN prepares anew for each number of keys.
FEW_ON_CPU = 4096
# SAT's score of a position that isn't seen; finite, so that padding, which sees nothing, is finite.
INVISIBLE = -10_000.0


def score_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: 0 where mask holds 1, and the key is seen; INVISIBLE where it holds 0."""
    return ((mask - 1) * -INVISIBLE).to(dtype)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Let torch take no attention of cuDNN's inside the block.

    On H100 and newer it is torch's first choice. With a mask its gradients are reported NaN at lengths of 64, 192, 320
    (pytorch issue 196678), and each new batch and length costs it a plan of 23 to 37 ms. Here nearly every batch is new.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, dropped: float = 0.0
) -> torch.Tensor:
    """softmax(q kᵀ / √head_dim + bias) v, [batch, heads, seq, head_dim], in one kernel where that pays.

    bias is `score_bias` of [batch, 1, seq, keys], or None. dropped is the probability that a weight is left out.
    """
    is_alone, is_short = query.shape[-2] == 1, key.shape[-2] <= SHORT_ON_CPU
    if query.device.type == "cpu" and (query.dtype == torch.bfloat16 if is_alone else is_short):
        if is_alone and key.shape[:-1].numel() <= FEW_ON_CPU:
            wide = query.float(), key.float(), value.float(), None if bias is None else bias.float()
            return F.scaled_dot_product_attention(*wide, dropout_p=dropped).to(query.dtype)
        scale = query.shape[-1] ** -0.5
        # oneDNN brings the second factor of a product into an order of its own: a single query, rather than all keys.
        scores = (key @ query.mT).mT if is_alone else query @ key.mT
        weights = (scores * scale if bias is None else torch.add(bias, scores, alpha=scale)).softmax(dim=-1)
        return F.dropout(weights, dropped, training=dropped > 0) @ value
    with without_cudnn():  # the kernel that is chosen here makes the gradient too
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropped)


class FusedAttentionMixin(BaseMixin):
    """SAT's hook `attention_fn`: `attention` under a mask. The mixin of P-Tuning calls it with longer keys."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Any, Any] = (None, None)  # a mask and its bias; every layer has the same mask

    def bias(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores under this mask of `attention_fn`; None if the mask hides nothing."""
        if mask.numel() == 1:
            return None
        if self.last[0] is not mask:
            self.last = mask, score_bias(mask, dtype)
        return self.last[1]

    def attention_fn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        dropout: torch.nn.Dropout | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Context [batch, heads, seq, head_dim]; mask [batch, 1, seq, keys] holds 1 where a key is seen, or is one 1."""
        dropped = dropout.p if dropout is not None and dropout.training else 0.0
        return attention(query, key, value, self.bias(mask, query.dtype), dropped)


class PrefixMixin(PTuningV2Mixin):
    """P-Tuning v2 (Liu et al. 2021): in every layer, trained keys and values that each token sees.

    A prefix is [2, heads, length, head_dim], of this model-parallel process's heads.
    SAT's makes another mask in each layer, and `FusedAttentionMixin` another bias for each of them. Here all layers have
    one of both.
    """

    def __init__(self, num_layers: int, head_dim: int, heads: int, length: int) -> None:
        """A prefix for each of num_layers layers: its length in tokens, for all heads of the model."""
        super(PTuningV2Mixin, self).__init__()  # SAT's own would draw the prefix of all heads, whatever the device
        self.prefix_len = length
        self.last: tuple[Any, Any] = (None, None)  # a mask, and the same one with the prefix
        sizes = (2, heads // model_parallel().ranks, length, head_dim)
        self.prefix = torch.nn.ParameterList(torch.nn.Parameter(torch.empty(sizes)) for _ in range(num_layers))
        self.draw(self.prefix[0].device)

    @torch.no_grad()
    def draw(self, device: torch.device) -> None:
        """Put a fresh prefix on the device, in place of the one that is there, drawn as SAT draws it.

        On the meta device, which has no numbers, it stays.
        """
        rank, ranks, _ = model_parallel()
        for layer, old in enumerate(self.prefix):
            if device.type != "meta":
                kinds, heads, *sizes = old.shape
                whole = torch.randn(kinds, heads * ranks, *sizes) * PREFIX_SCALE
                own = whole.chunk(ranks, 1)[rank].clone().to(device, old.dtype)
                self.prefix[layer] = torch.nn.Parameter(own, requires_grad=old.requires_grad)
            self.prefix[layer].model_parallel = ranks > 1  # SAT's mark of a part

    def with_prefix(self, mask: torch.Tensor) -> torch.Tensor:
        """mask [batch, 1, seq, seq], in which the prefix is seen too: [batch, 1, seq, seq + prefix]."""
        if self.last[0] is not mask:
            self.last = mask, F.pad(mask, (0, self.prefix_len), value=1)
        return self.last[1]

    @non_conflict
    def attention_fn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        *rest: Any,
        layer_id: Any,
        old_impl: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """SAT's hook: what stood here before, with this layer's prefix behind keys and values."""
        # [2, batch, heads, prefix, head_dim]
        prefix = self.prefix[layer_id].unsqueeze(1).expand(-1, len(key), -1, -1, -1)
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), prefix, strict=True))
        mask = self.with_prefix(mask) if mask.numel() > 1 else mask
        return old_impl(query, key, value, mask, *rest, layer_id=layer_id, **kwargs)


def rotary_rows(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [batch, seq, head_dim] in the form in which `apply_rotary` takes them.

    cos becomes [batch, 1, seq · head_dim]. sin becomes two such rows, each shorter by step = head_dim / 4, as [2, batch,
    1, seq · head_dim - step]: one for the first number of each pair, where the second lies step further on, and one for
    the second number of each pair, where the first lies step back.
    """
    step = cos.shape[-1] // 4
    is_first = torch.arange(cos.shape[-1], device=cos.device) // step % 2 == 0
    cos, sin_first, sin_second = (rows.flatten(1).unsqueeze(1) for rows in (cos, sin * is_first, sin * ~is_first))
    return cos, torch.stack((sin_first[..., :-step], sin_second[..., step:]))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """x [..., heads, seq · head_dim] rotated by its positions (rotary embedding, Su et al. 2021), or back if inverse.

    ChatGLM rotates one half of a token's head_dim by the first of its two positions, the other half by the second:

        head_dim   a1 a2 | b1 b2
        rotated    a1·cos - a2·sin, a2·cos + a1·sin | the same for b

    All tokens of a head are one long row here. Each number's partner lies head_dim / 4 further on or back, so that the
    whole row is rotated in three operations. Token by token, most of the time would go into starting the next one.

    Args:
        cos, sin: from `rotary_rows`.
    """
    step, (sin_first, sin_second) = x.shape[-1] - sin.shape[-1], sin.unbind()
    sign = -1 if inverse else 1
    rotated = x * cos
    rotated[..., :-step].addcmul_(x[..., step:], sin_first, value=-sign)
    rotated[..., step:].addcmul_(x[..., :-step], sin_second, value=sign)
    return rotated


def _rotated(stacked: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts = stacked.permute(2, 0, 3, 1, 4)  # [3, batch, heads, seq, head_dim]
    query, key = apply_rotary(parts[:2].flatten(-2), cos, sin).view_as(parts[:2])
    return query, key, parts[2].contiguous()  # by itself: attention keeps it, and would keep all three


class _RotatedQueryKeyValue(torch.autograd.Function):
    """`rotated_query_key_value`. Its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, stacked: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _rotated(stacked, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        batch, heads, seq, head_dim = grads[0].shape
        gradient = grads[0].new_empty(batch, seq, 3, heads, head_dim)
        parts = gradient.permute(2, 0, 3, 1, 4)
        for part, grad in zip(parts[:2], grads[:2], strict=True):
            part.copy_(apply_rotary(grad.flatten(-2), cos, sin, inverse=True).view_as(part))
        parts[2].copy_(grads[2])
        return gradient, None, None


def rotated_query_key_value(stacked: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query and key, rotated by their positions, and value as it is: [batch, heads, seq, head_dim] each.

    Args:
        stacked: all three, [batch, seq, 3, heads, head_dim]. cos, sin: from `rotary_rows`.
    """
    if not torch.is_grad_enabled():  # asking autograd first takes as long as the rotation of one token
        return _rotated(stacked, cos, sin)
    return _RotatedQueryKeyValue.apply(stacked, cos, sin)


class PrefixAttentionMixin(ChatGLMAttnMixin):
    """ChatGLM's self-attention. Its only tensor is SAT's buffer `rotary_emb.inv_freq`."""

    def __init__(self, hidden_size: int, num_heads: int, max_sequence_length: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.max_sequence_length = max_sequence_length
        self.rotary_dim = hidden_size // (num_heads * 2)  # half of a head's numbers, for each of the two positions
        self.table: tuple[torch.Tensor, torch.Tensor] | None = None
        self.last: tuple[Any, Any] = (None, None)  # position_ids and their rows; every layer has the same positions

    def cos_sin(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`rotary_rows` of position_ids, int64[batch, 2, seq], all below max_sequence_length."""
        if self.table is None or self.table[0].dtype != dtype or self.table[0].device != position_ids.device:
            device = position_ids.device
            # Not the buffer inv_freq: in bfloat16 it is rounded, and far positions would be off by a tenth of a radian.
            frequencies = 1 / ROTARY_BASE ** (torch.arange(0, self.rotary_dim, 2, device=device) / self.rotary_dim)
            positions = torch.arange(self.max_sequence_length, device=device, dtype=torch.float32)
            angles = (positions[:, None] * frequencies).repeat(1, 2)
            self.table = angles.cos().to(dtype), angles.sin().to(dtype)
            self.last = None, None
        if self.last[0] is not position_ids:
            cos, sin = (F.embedding(position_ids, table).transpose(1, 2).flatten(2) for table in self.table)
            self.last = position_ids, rotary_rows(cos, sin)
        return self.last[1]

    def attention_forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        position_ids: torch.Tensor,
        layer_id: Any,
        answer_positions: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer's attention, [batch, seq, hidden] → [batch, seq, hidden].

        With answer_positions, int64[answers] into the flattened batch · seq, only theirs: → [answers, hidden].
        With cache, a `model.inference.cache.KeyValueCache`, it says what is seen in place of the mask: earlier keys too.
        """
        attention = self.transformer.layers[layer_id].attention
        heads, head_dim = attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head
        stacked = attention.query_key_value(hidden_states).unflatten(-1, (3, heads, head_dim))
        query, key, value = rotated_query_key_value(stacked, *self.cos_sin(position_ids, stacked.dtype))
        if cache is not None:
            context = cache.attend(int(layer_id), query, key, value)
        else:
            dropout = attention.attention_dropout if attention.training else None
            context = self.transformer.hooks["attention_fn"](
                query, key, value, mask, dropout, layer_id=layer_id, position_ids=position_ids, **kwargs,
            )  # fmt: skip
        context = context.transpose(1, 2).flatten(2)
        if answer_positions is not None:
            context = context.flatten(0, 1).index_select(0, answer_positions)
        output = attention.dense(context)
        return attention.output_dropout(output) if attention.training else output
