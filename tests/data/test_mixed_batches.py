"""Rows with a picture, without one, with history and in two languages share a batch, and each gives what it gives alone."""

import pytest
import torch
from conftest import GOLDEN, few_shot_dataset, load_model, write_rows

from model.data.dataset import data_collator
from model.loss import answer_loss
from model.training.step import loss_sum

ROWS = [
    {"prompt": "几点了？", "label": "三点。"},
    {"img": "images/0.png", "prompt": "这是什么？", "label": "天。"},
    {"prompt": "What time is it?", "label": "Three.", "lang": "en"},
    {"img": "images/1.png", "prompt": "还有呢？", "label": "云。", "history": [["这是什么？", "天。"]]},
]


@pytest.fixture(scope="module")
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    rows = [row | {"img": str(GOLDEN / "upstream" / row["img"])} if "img" in row else row for row in ROWS]
    path = write_rows(tmp_path_factory.mktemp("data"), rows)
    dataset = few_shot_dataset(path, 224, {"max_source_length": 96, "max_target_length": 32})
    return [dataset[index] for index in range(len(dataset))]


def logits(model, batch):
    with torch.no_grad():
        given = {name: batch[name] for name in ("input_ids", "image", "image_features", "image_slots") if name in batch}
        return model(**given)[0]


def test_each_row_of_a_mixed_batch_has_the_logits_it_has_alone(model, samples):
    together = logits(model, data_collator(samples))
    for row, sample in enumerate(samples):
        alone = logits(model, data_collator([sample]))[0]
        length = len(sample["input_ids"])
        assert torch.allclose(together[row, :length], alone[:length], atol=1e-4), row


def test_pictures_of_a_mixed_batch_are_seen_by_their_own_rows_only(model, samples):
    batch = data_collator(samples)
    other = batch | {"image": batch["image"].clone()}
    other["image"][1:] += 1.0  # of the last row, whose two turns are two samples
    changed = (logits(model, batch) - logits(model, other)).abs().amax(dim=(1, 2)) > 0
    assert changed.tolist() == [False, False, False, True, True]


def test_loss_of_a_batch_with_nothing_to_learn_is_zero(model, samples):
    batch = data_collator(samples)
    loss = answer_loss(logits(model, batch), torch.full_like(batch["labels"], -100))
    assert loss.item() == 0


def test_step_with_nothing_to_learn_has_no_loss_and_no_gradient(model, samples):
    batch = data_collator([sample | {"labels": [-100] * len(sample["labels"])} for sample in samples])
    weight = model.transformer.layers[0].attention.dense.weight
    loss = loss_sum(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.abs().max() == 0


def test_features_of_a_mixed_batch_have_the_loss_of_its_pictures(model, samples):
    eyes = model.get_mixin("eva").model
    with torch.no_grad():
        known = [
            {name: value for name, value in sample.items() if name != "image"}
            | {"image_features": eyes.features(sample["image"][None])[0]}
            if sample["image"] is not None
            else sample
            for sample in samples
        ]
        expected, found = (loss_sum(model, data_collator(some)) for some in (samples, known))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
