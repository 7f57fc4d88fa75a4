"""ChatGLM-6B's computation on modules that have the names of Hugging Face's published code, written anew for tests.

It holds ours against PEFT: the library finds linears by their names. Only what a forward pass of one text needs is here. The
residuals are scaled by the config's number of layers, and rows of query_key_value are ordered (head, 3, head_dim).
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from model.masks import glm_position_ids, prefix_mask


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query_key_value(x).unflatten(-1, (self.heads, -1)).chunk(3, dim=-1)  # [b, s, heads, d]
        query, key = (self._rotated(part, positions) for part in (query, key))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(mask == 0, -10000.0).softmax(dim=-1)
        return self.dense(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The first half of each head rotated by the first position, the second half by the second one."""
        return torch.cat([_rotated(half, positions[:, row]) for row, half in enumerate(x.chunk(2, dim=-1))], dim=-1)


def _rotated(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    size = x.shape[-1]
    frequencies = 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
    angles = (position[..., None] * frequencies).repeat(1, 1, 2)[:, :, None]
    one, other = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-other, one), dim=-1) * angles.sin()


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, inner)
        self.dense_4h_to_h = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        hidden = config["hidden_size"]
        self.scale = math.sqrt(2 * config["num_layers"])
        self.input_layernorm = nn.LayerNorm(hidden, eps=config["layernorm_epsilon"])
        self.attention = Attention(hidden, config["num_attention_heads"])
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=config["layernorm_epsilon"])
        self.mlp = Mlp(hidden, config["inner_hidden_size"])

    def forward(self, x: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.input_layernorm(x)
        x = x * self.scale + self.attention(x, mask, positions)
        x = self.post_attention_layernorm(x)
        return x * self.scale + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_layers"]))
        self.final_layernorm = nn.LayerNorm(config["hidden_size"], eps=config["layernorm_epsilon"])


class Vision(nn.Module):
    """A linear of a name that the language model's linears have too."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)


class ChatGLM(nn.Module):
    """Logits [batch, seq, vocab] of input_ids int64[batch, seq] that have a <sop> each."""

    def __init__(self, config: dict):
        super().__init__()
        self.sizes = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.image_encoder = Vision()

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatGLM":
        """The language model of a folder in Hugging Face's layout, whose weights are in one file."""
        model = cls(json.loads((folder / "config.json").read_text()))
        weights = load_file(folder / "model.safetensors")
        language = {name: weights[name] for name in weights if "inv_freq" not in name and "image_encoder" not in name}
        missing, unexpected = model.load_state_dict(language, strict=False)
        assert (missing, unexpected) == (["image_encoder.dense.weight", "image_encoder.dense.bias"], [])
        return model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        context = (input_ids == self.sizes["bos_token_id"]).int().argmax(dim=1)
        gmask = (input_ids == self.sizes["gmask_token_id"]).int().argmax(dim=1)
        no_padding = torch.zeros_like(context)
        length = input_ids.shape[1]
        mask = prefix_mask(context, no_padding, length)
        positions = glm_position_ids(context, gmask, no_padding, length)
        x = self.transformer.word_embeddings(input_ids)
        for layer in self.transformer.layers:
            x = layer(x, mask, positions)
        return self.lm_head(self.transformer.final_layernorm(x))
