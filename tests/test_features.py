"""Features of a picture stand for the picture: the same loss and gradient, computed once."""

from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, load_model

from model import features
from model.dataset import FewShotDataset, data_collator
from model.errors import InputError
from model.features import FeatureCache, picture_features
from model.image import BlipImageEvalProcessor
from model.step import loss_sum
from model.tokenizer import ChatGLMTokenizer

LENGTHS = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=64)


@pytest.fixture
def model(upstream_checkpoint):
    """The golden model with its eyes frozen and one linear of the language model trained."""
    model = load_model(upstream_checkpoint).requires_grad_(False)
    model.transformer.layers[0].attention.dense.weight.requires_grad_(True)
    return model


@pytest.fixture
def eyes(model):
    return model.get_mixin("eva").model


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.chdir(GOLDEN / "upstream")
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    return FewShotDataset("dataset.json", BlipImageEvalProcessor(224), tokenizer, LENGTHS)


def loss_and_gradient(model, dataset):
    model.zero_grad()
    loss = loss_sum(model, data_collator([dataset[index] for index in range(3)]))
    loss.backward()
    return loss.item(), model.transformer.layers[0].attention.dense.weight.grad.clone()


def test_step_on_features_has_the_loss_and_gradient_of_the_pictures(model, eyes, dataset):
    loss, gradient = loss_and_gradient(model, dataset)
    dataset = FeatureCache(eyes, lambda rows: 2 * rows).given_to(dataset)
    assert "image" not in dataset[0]
    other_loss, other_gradient = loss_and_gradient(model, dataset)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_gradient, gradient)


def test_features_are_kept_per_picture_in_the_q_formers_width(eyes, dataset):
    kept = picture_features([row.img for row in dataset.rows], dataset.processor, eyes)
    assert len(kept) == 6
    assert {tuple(tensor.shape) for tensor in kept.values()} == {(32, 48)}


def test_features_in_a_file_equal_those_in_memory(eyes, dataset, monkeypatch):
    paths = [row.img for row in dataset.rows]
    in_memory = picture_features(paths, dataset.processor, eyes)
    monkeypatch.setattr(features, "MEMORY_SHARE", 0.0)
    in_file = picture_features(paths, dataset.processor, eyes)
    for path in paths:
        torch.testing.assert_close(in_file[path], in_memory[path])


def test_features_leave_the_eyes_mode_as_it_was(eyes, dataset):
    eyes.train()
    picture_features([dataset.rows[0].img], dataset.processor, eyes)
    assert eyes.training


def test_rows_that_training_meets_once_keep_their_pixels(eyes, dataset):
    assert "image" in FeatureCache(eyes, lambda rows: 2 * rows - 1).given_to(dataset)[0]


def test_rows_keep_their_pixels_when_a_part_of_the_eyes_is_trained(eyes, dataset):
    eyes.qformer.requires_grad_(True)
    assert "image" in FeatureCache(eyes, lambda rows: 100 * rows).given_to(dataset)[0]


def test_rows_have_features_when_only_the_projection_is_trained(eyes, dataset):
    eyes.glm_proj.requires_grad_(True)
    assert "image_features" in FeatureCache(eyes, lambda rows: 100 * rows).given_to(dataset)[0]


def test_eyes_stay_when_a_data_set_still_needs_them(eyes, dataset, monkeypatch):
    sent = []
    monkeypatch.setattr(eyes.vit, "cpu", lambda: sent.append("vit"))
    cache = FeatureCache(eyes, lambda rows: 0)
    cache.given_to(dataset)
    cache.send_eyes_away()
    assert sent == []


def test_eyes_leave_when_every_data_set_has_its_features(eyes, dataset, monkeypatch):
    sent = []
    monkeypatch.setattr(eyes.vit, "cpu", lambda: sent.append("vit"))
    monkeypatch.setattr(eyes.qformer, "cpu", lambda: sent.append("qformer"))
    cache = FeatureCache(eyes, lambda rows: 2 * rows)
    cache.given_to(dataset)
    cache.send_eyes_away()
    assert sent == ["vit", "qformer"]


def test_features_of_a_picture_that_cannot_be_opened_are_left_out(eyes, dataset):
    good = dataset.rows[0].img
    assert list(picture_features(["gone.png", good], dataset.processor, eyes)) == [good]


def test_row_whose_picture_cannot_be_opened_still_tells_when_it_is_asked_for(eyes, dataset):
    dataset.features = picture_features([dataset.rows[1].img, "gone.png"], dataset.processor, eyes)
    dataset.processor = lambda image: (_ for _ in ()).throw(InputError("gone"))
    with pytest.raises(InputError, match="gone"):
        dataset[0]
