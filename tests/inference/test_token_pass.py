"""The pass over one token of each row: the numbers of the model's own way, for every kind of model."""

import pytest
import torch
from conftest import load_model

from model.inference.cache import KeyValueCache
from model.inference.load import arrange_weights
from model.inference.token_pass import TokenPass
from model.masks import answer_position_ids

KINDS = [
    {},
    {"use_lora": True, "lora_rank": 2},
    {"use_ptuning": True, "pre_seq_len": 4},
]
LENGTHS = [[7], [7, 7], [7, 4, 6]]  # of the rows' contexts


@pytest.mark.parametrize("flags", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_scores_are_those_of_the_models_own_way(upstream_checkpoint, flags, lengths, dtype, tolerance):
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel" if flags else "VisualGLMModel", **flags).to(dtype)
    for name, parameter in model.named_parameters():
        if "matrix_B" in name or "ptuning" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    arrange_weights(model.requires_grad_(False))
    generator = torch.Generator().manual_seed(1)
    cache = KeyValueCache(model, len(lengths), 20)
    for layer in cache.layers:
        layer.normal_(generator=generator)
    tokens = torch.randint(5, 80, (len(lengths),), generator=generator)
    context_lengths, positions = torch.tensor([length - 3 for length in lengths]), torch.tensor(lengths)
    cache.advance(lengths)
    hidden = model(
        input_ids=tokens.unsqueeze(1),
        position_ids=answer_position_ids(context_lengths, positions),
        answer_positions=torch.arange(len(lengths)),
        cache=cache,
    )[0]
    expected = model.get_mixin("chatglm-final").lm_head(hidden)
    found = TokenPass(model, cache)(torch.stack((context_lengths, positions, tokens)))
    assert found.dtype == expected.dtype == dtype
    assert torch.allclose(found, expected, rtol=0, atol=tolerance * expected.abs().max())
