"""The key/value cache: attention as over all tokens at once, in place, and rows that move."""

import pytest
import torch
from conftest import load_model

from model.inference.cache import CLEARED_AHEAD, KeyValueCache

LENGTHS = [5, 3]


def random(model, rows, seq, seed):
    """Query, key and value of one pass."""
    attention = model.transformer.layers[0].attention
    generator = torch.Generator().manual_seed(seed)
    sizes = rows, attention.num_attention_heads, seq, attention.hidden_size_per_attention_head
    return [torch.randn(sizes, generator=generator) for _ in range(3)]


def attended(query, keys, values):
    """softmax(q kᵀ / √head_dim) v in float64."""
    scores = query.double() @ keys.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ values.double()).float()


@pytest.fixture(params=[{}, {"use_ptuning": True, "pre_seq_len": 4}])
def model(request, upstream_checkpoint):
    return load_model(
        upstream_checkpoint, "FineTuneVisualGLMModel" if request.param else "VisualGLMModel", **request.param
    )


@torch.no_grad()
def test_tokens_see_their_own_row_and_the_prefix_and_what_came_before(model):
    cache, layer = KeyValueCache(model, 3, 200), 1
    prefix = model.mixins["ptuning"].prefix[layer] if "ptuning" in model.mixins else None
    for kept in cache.layers:
        kept[:, :, :, cache.prefix_length :] = float("nan")  # memory may hold anything
    query, key, value = random(model, 2, 5, seed=1)
    cache.start(0, LENGTHS)
    cache.attend(layer, query, key, value)
    rows = [[key[row, :, :length], value[row, :, :length]] for row, length in enumerate(LENGTHS)]
    for step in range(CLEARED_AHEAD + 3):
        query, key, value = random(model, 2, 1, seed=2 + step)
        cache.advance([length + step for length in LENGTHS])
        found = cache.attend(layer, query, key, value)
        for row in range(2):
            rows[row] = [torch.cat((old, new[row]), dim=1) for old, new in zip(rows[row], (key, value), strict=True)]
            keys, values = rows[row]
            if prefix is not None:
                keys, values = torch.cat((prefix[0], keys), dim=1), torch.cat((prefix[1], values), dim=1)
            assert torch.allclose(found[row], attended(query[row], keys, values), atol=1e-5)


@torch.no_grad()
def test_row_that_moves_is_the_same_row(model):
    cache = KeyValueCache(model, 3, 20)
    cache.start(0, [5, 3, 5])
    cache.attend(0, *random(model, 3, 5, seed=1))
    cache.move(2, 0, 5)
    query, key, value = random(model, 1, 1, seed=2)
    cache.advance([5, 3, 5])
    found = cache.attend(0, *(tensor.expand(3, -1, -1, -1) for tensor in (query, key, value)))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])


@torch.no_grad()
def test_nothing_is_allocated_after_the_beginning(model):
    cache = KeyValueCache(model, 2, 20)
    places = [layer.data_ptr() for layer in cache.layers]
    cache.start(0, LENGTHS)
    cache.attend(0, *random(model, 2, 5, seed=1))
    cache.advance(LENGTHS)
    cache.attend(0, *random(model, 2, 1, seed=1))
    cache.move(1, 0, 4)
    assert [layer.data_ptr() for layer in cache.layers] == places
