"""The keys and values of all tokens so far, in memory that is allocated once and written in place.

    slot 0   prefix  k0 k1 k2 k3 ·  ·  ·
    slot 1   prefix  k0 k1 ·  ·  ·  ·  ·        one row of the batch; what lies behind its last token is never seen

A prefix of P-Tuning is the same in every row. It stands in front, so that each token finds it there.

Shapes: rows = answers in the making, seq, keys = tokens of the longest row, heads, head_dim.
"""

from collections.abc import Sequence
from typing import Any

import torch

from model.attention import attention, score_bias
from model.masks import prefix_mask

CLEARED_AHEAD = 64  # positions that are set to zero at once


class KeyValueCache:
    """Keys and values of every layer, [2, slots, heads, prefix + positions, head_dim] each, in the model's number format.

    `start` and `advance` say which tokens come next. The model's layers then call `attend`, each once.
    """

    def __init__(self, model: Any, slots: int, positions: int) -> None:
        """Room for as many rows as slots, of as many tokens as positions each."""
        layers, embeddings = model.transformer.layers, model.transformer.word_embeddings.weight
        heads = layers[0].attention.num_attention_heads_per_partition
        head_dim = layers[0].attention.hidden_size_per_attention_head
        prefixes = list(model.mixins["ptuning"].prefix) if "ptuning" in model.mixins else []
        self.prefix_length = prefixes[0].shape[2] if prefixes else 0
        self.slots, self.most_keys, self.device = slots, self.prefix_length + positions, embeddings.device
        self.layers = [embeddings.new_empty(2, slots, heads, self.most_keys, head_dim) for _ in layers]
        for layer, prefix in zip(self.layers, prefixes, strict=False):
            layer[:, :, :, : self.prefix_length] = prefix.detach().unsqueeze(1)
        self.cleared = self.prefix_length  # what isn't seen must be numbers all the same: 0 · nan is nan
        # Where the tokens of this pass are written, how many keys are there then, and which are seen.
        self.rows, self.places, self.keys = slice(0), (slice(0), slice(0)), 0
        self.bias: torch.Tensor | None = None

    def start(self, first_row: int, lengths: Sequence[int]) -> None:
        """Let the next pass bring whole contexts of these lengths, <sop> included, padded on the right."""
        seq, first = max(lengths), self.prefix_length
        self.rows = slice(first_row, first_row + len(lengths))
        self.keys = first + seq
        self.clear(self.keys)
        self.places = self.rows, slice(first, self.keys)
        dtype = self.layers[0].dtype
        context_length = torch.tensor(lengths, device=self.device) - 1
        mask = prefix_mask(context_length, torch.zeros_like(context_length), seq).to(dtype)
        self.bias = score_bias(torch.nn.functional.pad(mask, (first, 0), value=1), dtype)

    def keys_at(self, positions: Sequence[int]) -> int:
        """How many keys there are when the furthest row has a token at its position, the prefix included."""
        return self.prefix_length + max(positions) + 1

    def advance(self, positions: Sequence[int]) -> None:
        """Let the next pass bring one token for each of the first rows, at these positions, [rows]."""
        keys = self.keys_at(positions)
        self.clear(keys)
        if min(positions) != max(positions):
            self.advance_each(torch.tensor(positions, device=self.device), keys)
            return
        self.rows, self.keys, self.bias = slice(len(positions)), keys, None
        self.places = self.rows, slice(keys - 1, keys)

    def advance_each(self, positions: torch.Tensor, keys: int) -> None:
        """The same for positions int64[rows] on the device, none of which is asked for: keys are all that may be seen.

        So many keys have to be clear (`clear`).
        """
        rows, dtype = len(positions), self.layers[0].dtype
        places = positions + self.prefix_length
        self.rows, self.keys = slice(rows), keys
        self.places = torch.arange(rows, device=self.device), places  # type: ignore[assignment]
        seen = torch.arange(keys, device=self.device) <= places[:, None]
        self.bias = score_bias(seen[:, None, None].to(dtype), dtype)

    def clear(self, keys: int) -> None:
        """Set to zero what rows that are shorter than so many keys have behind their last token."""
        if keys > self.cleared:
            until = keys + CLEARED_AHEAD
            for layer in self.layers:
                layer[:, :, :, self.cleared : until] = 0
            self.cleared = until

    def forget(self) -> None:
        """Let everything be set to zero anew before it is seen: it may hold nan, and 0 · nan is nan."""
        self.cleared = self.prefix_length

    def attend(self, layer_id: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One layer's attention for the tokens of this pass, which are written: all [rows, heads, seq, head_dim]."""
        rows, places = self.places
        if isinstance(places, torch.Tensor):
            key, value = key.squeeze(2), value.squeeze(2)
        for kept, new in zip(self.layers[layer_id], (key, value), strict=True):
            kept[rows, :, places] = new
        keys, values = self.layers[layer_id][:, self.rows, :, : self.keys]
        return attention(query, keys, values, self.bias)

    def move(self, source: int, target: int, length: int) -> None:
        """Let row target be what row source is: its first tokens, as many as length."""
        kept = slice(self.prefix_length, self.prefix_length + length)
        for layer in self.layers:
            layer[:, target, :, kept] = layer[:, source, :, kept]
