"""Many answers at once: as one by one, and the loss of each label as in training."""

import pytest
import torch
from conftest import golden_values, load_model

from model.data.prompt import Lengths, context_ids, sample_from_row
from model.data.rows import Row
from model.inference.batch import greedy_answers, label_losses
from model.inference.chat import chat
from model.inference.engine import model_positions
from model.loss import answer_loss

QUESTIONS = ("这张图片的背景里有什么内容？", "What is in the background?", "你好")
LENGTHS = Lengths(32, 96, 64)


@pytest.fixture(scope="module")
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint).eval()


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(golden_values("pictures", [len(QUESTIONS), 3, 224, 224])) * 20


def test_answers_at_once_are_those_one_by_one(model, tokenizer, image):
    contexts = [context_ids(question, None, True, tokenizer, 32) for question in QUESTIONS]
    together = greedy_answers(contexts, image, model, tokenizer, max_length=80)
    for index, question in enumerate(QUESTIONS):
        alone, _, _ = chat(
            None, model, tokenizer, question, image=image[index : index + 1], max_length=80, temperature=0,
            repetition_penalty=1.0,
        )  # fmt: skip
        assert together[index] == alone


def test_label_losses_are_those_of_training(model, tokenizer, image):
    rows = [
        Row("a.png", question, answer, "row")
        for question, answer in zip(QUESTIONS, ("蓝天", "A street.", "好"), strict=True)
    ]
    samples = [sample_from_row(row, tokenizer, LENGTHS) for row in rows]
    for index, (total, tokens) in enumerate(label_losses(samples, image, model, tokenizer)):
        sample = samples[index]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([sample.input_ids]), image=image[index : index + 1], pre_image=sample.pre_image
            )[0]
        assert total / tokens == pytest.approx(answer_loss(logits, torch.tensor([sample.labels])).item(), rel=1e-5)


def test_label_losses_of_rows_that_fill_the_models_positions_do_not_depend_on_their_neighbours(model, tokenizer):
    positions = model_positions(model)
    rows = [Row(None, "你好" * positions, "天" * positions, "long"), Row(None, "你好", "你好", "short")]
    samples = [sample_from_row(row, tokenizer, Lengths(32, positions, positions)) for row in rows]
    assert len(samples[0].input_ids) > positions
    alone = [label_losses([sample], None, model, tokenizer)[0] for sample in samples]
    together = label_losses(samples, None, model, tokenizer)
    assert [count for _, count in together] == [count for _, count in alone]
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], rel=1e-5)


def test_label_whose_eop_is_the_first_beyond_the_models_positions_has_its_loss(model, tokenizer):
    positions = model_positions(model)
    row = Row(None, "你好", "天" * (positions - len(("<sop>", "▁", "<eop>"))), "row")
    sample = sample_from_row(row, tokenizer, Lengths(32, positions, positions))
    [(total, tokens)] = label_losses([sample], None, model, tokenizer)
    assert tokens == positions
    assert total > 0
