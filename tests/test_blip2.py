"""The vision part: sizes from the config, nothing of a classifier left, and pictures that don't mix within a batch."""

import warnings

import pytest
import torch
from conftest import golden_values, load_model

from model.blip2 import BLIP2


@pytest.fixture
def blip2(upstream_checkpoint):
    return load_model(upstream_checkpoint).get_mixin("eva").model


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(golden_values("an image", [2, 3, 224, 224]))


def built(config, hidden_size=64, eva=None, qformer=None):
    sat_flags = {"skip_init": False, "model_parallel_size": 1}
    eva_args = config["eva_args"] | sat_flags | (eva or {})
    return BLIP2(eva_args, config["qformer_args"] | sat_flags | (qformer or {}), hidden_size).eval()


@torch.no_grad()
def test_features_of_a_picture_are_one_per_patch_and_one_for_the_class_token(blip2, image):
    assert blip2.vit(image).shape == (2, 1 + 16 * 16, 64)


@torch.no_grad()
def test_embeddings_of_a_picture_are_one_per_query_in_the_language_models_width(blip2, image):
    assert blip2(image).shape == (2, 32, 64)


@torch.no_grad()
def test_every_size_comes_from_the_config(upstream_config):
    small = {"image_size": [28, 28], "max_sequence_length": 5, "hidden_size": 24, "num_attention_heads": 2}
    other = built(
        upstream_config,
        hidden_size=40,
        eva=small,
        qformer={"hidden_size": 32, "vocab_size": 7, "cross_attn_hidden_size": 24},
    )
    assert other.vit(torch.zeros(1, 3, 28, 28)).shape == (1, 5, 24)
    assert other(torch.zeros(1, 3, 28, 28)).shape == (1, 7, 40)


@torch.no_grad()
def test_picture_in_a_batch_gives_what_it_gives_alone(blip2, image):
    torch.testing.assert_close(blip2(image)[1:], blip2(image[1:]))


@torch.no_grad()
def test_features_of_the_tower_end_in_a_layer_norm_with_torchs_eps(blip2, image):
    seen = []
    blip2.vit.mixins["cls"].ln_vision.register_forward_hook(lambda *seen_now: seen.append(seen_now))
    features = blip2.vit(image)
    ((norm, (before,), after),) = seen
    assert norm.eps == 1e-5
    assert features is after
    centred = before - before.mean(-1, keepdim=True)
    by_hand = centred / (before.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(features, by_hand)


def test_class_head_is_gone(blip2):
    assert [name for name, _ in blip2.vit.named_parameters() if "cls" in name] == [
        "mixins.cls.ln_vision.weight",
        "mixins.cls.ln_vision.bias",
    ]


def test_building_with_no_classes_in_the_config_warns_of_nothing(upstream_config):
    assert upstream_config["eva_args"]["num_classes"] == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*zero-element.*")
        built(upstream_config)


def test_q_former_looks_at_the_features_in_its_decoder_layers_only(blip2):
    names = [name for name, _ in blip2.qformer.named_parameters()]
    assert any("layers.0.cross_attention" in name for name in names)
    assert not any("layers.1.cross_attention" in name for name in names)
    assert not any("position_embeddings" in name for name in names)


@torch.no_grad()
def test_q_former_answers_of_swapped_queries_are_swapped(blip2):
    features = torch.from_numpy(golden_values("features", [1, 5, 64]))
    answers = blip2.qformer(features)
    queries = blip2.qformer.transformer.word_embeddings.weight
    queries.copy_(queries.flip(0))
    torch.testing.assert_close(blip2.qformer(features), answers.flip(1))


@torch.no_grad()
def test_q_former_answers_depend_on_the_features(blip2):
    one = blip2.qformer(torch.from_numpy(golden_values("features", [1, 5, 64])))
    other = blip2.qformer(torch.from_numpy(golden_values("other features", [1, 5, 64])))
    assert (one - other).abs().max() > 1e-4


@torch.no_grad()
def test_width_of_numbers_is_the_callers(upstream_config):
    sat_flags = {"skip_init": False, "model_parallel_size": 1}
    half = BLIP2(
        upstream_config["eva_args"] | sat_flags,
        upstream_config["qformer_args"] | sat_flags,
        64,
        params_dtype=torch.bfloat16,
    )
    assert half.vit.transformer.layers[0].attention.dense.weight.dtype == torch.bfloat16
    assert half.qformer.transformer.layers[0].attention.dense.weight.dtype == torch.bfloat16


def test_is_trained_when_one_weight_is_to_be_learned_is_true(blip2):
    for parameter in blip2.parameters():
        parameter.requires_grad_(False)
    assert not blip2.is_trained()
    blip2.qformer.transformer.layers[1].mlp.dense_4h_to_h.bias.requires_grad_(True)
    assert blip2.is_trained()
