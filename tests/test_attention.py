"""One kernel in place of SAT's separate operations, with the same numbers."""

import pytest
import torch
from conftest import golden_values, load_model

from model import attention
from model.attention import FusedAttentionMixin, PrefixMixin, apply_rotary, rotary_rows, rotated_query_key_value
from model.masks import prefix_mask

# sat can be imported only after the model's modules have done so.
from sat.model.finetune import PTuningV2Mixin  # isort: skip
from sat.model.official.chatglm_model import ChatGLMAttnMixin  # isort: skip
from sat.transformer_defaults import standard_attention  # isort: skip


def heads(name: str, keys: int = 6) -> torch.Tensor:
    return torch.from_numpy(golden_values(name, [2, 3, keys, 8])) * 20


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_fused_attention_under_the_prefix_mask_equals_sats() -> None:
    mask = prefix_mask(lengths(3, 5), lengths(0, 0), 6).float()
    query, key, value = heads("q"), heads("k"), heads("v")
    fused = FusedAttentionMixin().attention_fn(query, key, value, mask)
    torch.testing.assert_close(fused, standard_attention(query, key, value, mask))


@pytest.mark.parametrize("short", [0, 256])
def test_fused_attention_equals_sats_for_few_keys_and_for_many(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SHORT_ON_CPU", short)
    mask = prefix_mask(lengths(3, 5), lengths(0, 0), 6).float()
    query, key, value = heads("q"), heads("k"), heads("v")
    found = FusedAttentionMixin().attention_fn(query, key, value, mask)
    torch.testing.assert_close(found, standard_attention(query, key, value, mask))


@pytest.mark.parametrize("keys", [1, 6, 400])
@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_of_one_query_in_a_longer_cache_is_that_of_float64(
    dtype: torch.dtype, tolerance: float, hidden: int, keys: int
) -> None:
    cache = torch.randn(2, 3, 4, keys + 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    key, value = cache[..., :keys, :]  # as a row's keys lie: with room behind them
    query = torch.randn(3, 4, 1, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    seen = torch.arange(keys)[None] < torch.tensor([keys, max(1, keys - hidden), keys])[:, None]
    bias = attention.score_bias(seen[:, None, None].to(dtype), dtype) if hidden else None
    found = attention.attention(query, key, value, bias)
    scores = (query.double() @ key.double().mT / 4).masked_fill(~seen[:, None, None], -1e9)
    expected = scores.softmax(-1) @ value.double()
    assert found.dtype == dtype
    assert (found.double() - expected).norm() < tolerance * expected.norm()


def test_fused_attention_when_everything_is_seen_equals_sats() -> None:
    mask = torch.ones(1, 1)
    query, key, value = heads("q", keys=2), heads("k"), heads("v")
    fused = FusedAttentionMixin().attention_fn(query, key, value, mask)
    torch.testing.assert_close(fused, standard_attention(query, key, value, mask))


def test_fused_attention_of_a_position_that_sees_nothing_is_finite() -> None:
    mask = prefix_mask(lengths(4, 5), lengths(2, 0), 6).float()
    fused = FusedAttentionMixin().attention_fn(heads("q"), heads("k"), heads("v"), mask)
    assert mask[0, 0, 0].sum() == 0
    assert fused.isfinite().all()


def test_fused_attention_when_not_training_drops_nothing() -> None:
    dropout = torch.nn.Dropout(0.9).eval()
    mask = torch.ones(1, 1)
    with_dropout = FusedAttentionMixin().attention_fn(heads("q"), heads("k"), heads("v"), mask, dropout)
    torch.testing.assert_close(
        with_dropout, FusedAttentionMixin().attention_fn(heads("q"), heads("k"), heads("v"), mask)
    )


def test_fused_attention_when_training_drops() -> None:
    mask = torch.ones(1, 1)
    plain = FusedAttentionMixin().attention_fn(heads("q"), heads("k"), heads("v"), mask)
    dropped = FusedAttentionMixin().attention_fn(
        heads("q"), heads("k"), heads("v"), mask, torch.nn.Dropout(0.5).train()
    )
    assert not torch.allclose(plain, dropped)


def test_apply_rotary_of_a_quarter_turn_swaps_each_half() -> None:
    a_quarter = rotary_rows(torch.zeros(1, 2, 8), torch.ones(1, 2, 8))
    x = torch.arange(1.0, 17).view(1, 1, 16)
    rotated = apply_rotary(x, *a_quarter)
    assert rotated.flatten().tolist() == [-3, -4, 1, 2, -7, -8, 5, 6, -11, -12, 9, 10, -15, -16, 13, 14]
    assert torch.equal(apply_rotary(rotated, *a_quarter, inverse=True), x)


def test_rotated_query_key_value_has_the_gradient_of_the_formula() -> None:
    stacked = torch.randn(2, 3, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(2, 3, 2, 1, 2, dtype=torch.float64).expand(-1, -1, -1, 2, -1) for _ in range(2))
    rows = rotary_rows(cos.flatten(-3), sin.flatten(-3))
    assert torch.autograd.gradcheck(lambda x: rotated_query_key_value(x, *rows), stacked)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_layers_attention_equals_sats_own(upstream_checkpoint, dtype: torch.dtype, tolerance: float) -> None:
    model = load_model(upstream_checkpoint).to(dtype).eval()
    ours = model.get_mixin("chatglm-attn")
    hidden = torch.from_numpy(golden_values("hidden", [2, 7, 64])).to(dtype) * 10
    rows = torch.tensor([[5, 6, 7, 86, 89, 8, 90], [5, 86, 89, 6, 7, 8, 90]])
    mask, position_ids = model.get_inputs(rows)
    model.transformer.hooks.update(model.hooks)

    sats = ChatGLMAttnMixin(64, 4)
    sats.rotary_emb.inv_freq = ours.rotary_emb.inv_freq
    object.__setattr__(sats, "transformer", model.transformer)
    keywords = {"position_ids": position_ids, "layer_id": 1, "output_this_layer": {}}
    with torch.no_grad():
        expected = sats.attention_forward(hidden, mask, **keywords)
        found = ours.attention_forward(hidden, mask, **keywords)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_rotary_table_when_the_numbers_change_is_made_anew(upstream_checkpoint) -> None:
    mixin = load_model(upstream_checkpoint).get_mixin("chatglm-attn")
    position_ids = torch.zeros(1, 2, 3, dtype=torch.int64)
    assert mixin.cos_sin(position_ids, torch.float32)[0].dtype == torch.float32
    assert mixin.cos_sin(position_ids, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_angles_of_a_model_in_half_width_are_those_of_float32(upstream_checkpoint, dtype: torch.dtype) -> None:
    position_ids = torch.full((1, 2, 1), 300)
    (model, narrow) = (load_model(upstream_checkpoint).get_mixin("chatglm-attn") for _ in range(2))
    narrow.to(dtype)
    assert narrow.rotary_emb.inv_freq.dtype == dtype
    for found, exact in zip(
        narrow.cos_sin(position_ids, dtype), model.cos_sin(position_ids, torch.float32), strict=True
    ):
        assert torch.equal(found, exact.to(dtype))


def test_no_attention_is_left_to_cudnn_and_torchs_choice_is_as_before_afterwards(monkeypatch) -> None:
    enabled = []

    def recorded(*args, **named):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*args, **named)

    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    long = attention.SHORT_ON_CPU + 1
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        attention.attention(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, long, 8), torch.zeros(1, 1, long, 8), None)
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert enabled == [False, False]


def test_value_is_kept_without_the_query_and_key_as_they_were_before_the_rotation() -> None:
    stacked = torch.randn(2, 6, 3, 2, 8, requires_grad=True)
    rows = rotary_rows(torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    query, key, value = rotated_query_key_value(stacked, *rows)
    kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in (query, key, value)}
    assert sum(kept.values()) == stacked.nbytes


def prefix_mixin(mixin: type) -> torch.nn.Module:
    made = mixin(2, 8, 3, 4)
    for layer, parameter in enumerate(made.prefix):
        parameter.data = torch.from_numpy(golden_values(f"prefix {layer}", [2, 3, 4, 8]))
    return made


@pytest.mark.parametrize("kind", ["prefix mask", "one 1"])
def test_prefix_is_seen_as_with_sats_mixin(kind: str) -> None:
    mask = prefix_mask(lengths(3, 5), lengths(1, 0), 6).float() if kind == "prefix mask" else torch.ones(1, 1)
    parts = heads("q"), heads("k"), heads("v")
    named = {"layer_id": 1, "old_impl": FusedAttentionMixin().attention_fn}
    found, expected = (
        prefix_mixin(mixin).attention_fn(*parts, mask, None, **named) for mixin in (PrefixMixin, PTuningV2Mixin)
    )
    torch.testing.assert_close(found, expected)


def test_mask_of_a_prefix_and_its_bias_are_made_once_for_all_layers(monkeypatch) -> None:
    biases = []
    monkeypatch.setattr(attention, "score_bias", lambda mask, dtype: biases.append(mask) or torch.zeros_like(mask))
    mixin, fused = prefix_mixin(PrefixMixin), FusedAttentionMixin()
    mask = prefix_mask(lengths(3, 5), lengths(0, 0), 6).float()
    for layer in range(2):
        mixin.attention_fn(heads("q"), heads("k"), heads("v"), mask, None, layer_id=layer, old_impl=fused.attention_fn)
    assert len(biases) == 1
    assert mixin.with_prefix(mask) is biases[0]
