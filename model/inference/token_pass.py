"""A pass over one token of every row in hand: the layers of `model.visualglm`, in as few steps as they take.

A token of a small model takes some milliseconds. A fifth of them would go into SAT's hooks, which ask for every part of
every layer whose function it has, and into what only longer inputs need. Here all that can be known before is looked up
once, when the engine is made. The linears and the cache are the same, and so are the numbers, to rounding.

Shapes: rows = answers in the making, hidden = the language model's width, heads, head_dim, vocab.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from model.attention import apply_rotary
from model.inference.cache import KeyValueCache
from model.masks import answer_position_ids
from model.visualglm import VisualGLMModel, residual_dtype

Function = Callable[[torch.Tensor], torch.Tensor]


class LayerParts(NamedTuple):
    """What a layer consists of."""

    norm: Function
    query_key_value: Function
    dense: Function
    second_norm: Function
    dense_h_to_4h: Function
    activation: Function
    dense_4h_to_h: Function


class TokenPass:
    """Reads tokens with a model's weights as they are when this is made; of norms that change later it may not know.

    Args:
        cache: where the model's keys and values are.
    """

    def __init__(self, model: VisualGLMModel, cache: KeyValueCache) -> None:
        layers, embeddings = model.transformer.layers, model.transformer.word_embeddings.weight
        self.cache, self.head = cache, model.get_mixin("chatglm-final").lm_head
        self.embed = model.get_mixin("eva").word_embedding_forward
        self.cos_sin = model.get_mixin("chatglm-attn").cos_sin
        self.heads = layers[0].attention.num_attention_heads_per_partition
        self.alpha = (2 * len(layers)) ** 0.5  # DeepNorm's scale of the residual
        self.dtype, self.wide = embeddings.dtype, residual_dtype(embeddings)
        self.layers = [self._parts(layer) for layer in layers]
        self.last_norm = (
            model.transformer.final_layernorm if model.transformer.use_final_layernorm else torch.nn.Identity()
        )

    def _parts(self, layer: Any) -> LayerParts:
        attention, mlp = layer.attention, layer.mlp
        return LayerParts(
            self._norm(layer.input_layernorm), attention.query_key_value, attention.dense,
            self._norm(layer.post_attention_layernorm), mlp.dense_h_to_4h, mlp.activation_func, mlp.dense_4h_to_h,
        )  # fmt: skip

    def _norm(self, norm: torch.nn.LayerNorm) -> Function:
        weight, bias = norm.weight.to(self.wide), norm.bias.to(self.wide)
        return partial(F.layer_norm, normalized_shape=norm.normalized_shape, weight=weight, bias=bias, eps=norm.eps)

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        """The scores [rows, vocab] of the tokens that come next, without a gradient. The cache has been told of the rows.

        Args:
            numbers: int64[3, rows]: the length of each row's context without <sop>, its newest token's position, that token.
        """
        context_lengths, positions, tokens = numbers
        cos, sin = self.cos_sin(answer_position_ids(context_lengths, positions), self.dtype)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(2)  # for query and key alike
        hidden = self.embed(tokens).to(self.wide)
        for number, layer in enumerate(self.layers):
            residual = layer.norm(hidden)
            stacked = layer.query_key_value(residual.to(self.dtype)).unflatten(-1, (3, self.heads, -1))
            query, key = apply_rotary(stacked[:, :2], cos, sin).unsqueeze(3).unbind(1)
            attended = self.cache.attend(number, query, key, stacked[:, 2].unsqueeze(2)).flatten(1)
            residual = layer.second_norm(torch.add(layer.dense(attended), residual, alpha=self.alpha))
            inner = layer.activation(layer.dense_h_to_4h(residual.to(self.dtype)))
            hidden = torch.add(layer.dense_4h_to_h(inner), residual, alpha=self.alpha)
        scores: torch.Tensor = self.head(self.last_norm(hidden.to(self.dtype)).unsqueeze(1))[:, 0]
        return scores
