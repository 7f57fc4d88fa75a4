"""One step: the batch on the device in the model's dtype, and the loss as it is computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeTimers, golden_values, load_model

from model import frozen
from model import loss as loss_module
from model.data import dataset
from model.data.dataset import data_collator
from model.loss import answer_loss, head_loss
from model.training.step import forward_step, get_batch

CONTEXT = [563, 775, 2685, *[3] * 32, 859]  # <img>, image slots, </img>


def sat_args(**flags):
    return SimpleNamespace(**({"device": "cpu", "fp16": False, "bf16": False} | flags))


def batch():
    """What the collator makes of two rows: one of three supervised tokens, one of four."""
    pictures = torch.from_numpy(golden_values("an image", [2, 3, 224, 224]))
    answers = ([89, 554, 90], [89, 17, 554, 90])
    return data_collator(
        [
            {
                "input_ids": [*CONTEXT, 86, *answer],
                "labels": [*[-100] * 37, *answer],
                "image": picture,
                "pre_image": 3,
                "image_length": 32,
                "pad_token_id": 3,
            }
            for answer, picture in zip(answers, pictures, strict=True)
        ]
    )


@pytest.fixture(autouse=True)
def process_group(upstream_checkpoint):
    """SAT's model-parallel groups, which loading a model sets up."""
    return load_model(upstream_checkpoint)


# answer_loss


def test_loss_of_uniform_logits_is_the_log_of_the_vocabulary():
    loss = answer_loss(torch.zeros(1, 4, 10), torch.tensor([[-100, 1, 2, 3]]))
    assert loss.item() == pytest.approx(math.log(10))


def test_loss_is_the_mean_of_minus_log_p_over_supervised_tokens():
    # vocabulary of 2; p(next is 1) at the three positions is 0.9, 0.5 and 0.2
    p = torch.tensor([0.9, 0.5, 0.2])
    logits = torch.stack(((1 - p).log(), p.log()), dim=-1).unsqueeze(0)
    loss = answer_loss(logits, torch.tensor([[-100, 1, 1]]))
    assert loss.item() == pytest.approx(-(math.log(0.9) + math.log(0.5)) / 2)


def test_loss_counts_every_supervised_token_alike_however_long_the_rows_are():
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[-100, 1, -100, -100], [-100, 4, 5, 6]])
    log_p = logits.log_softmax(-1)
    by_hand = -(log_p[0, 0, 1] + log_p[1, 0, 4] + log_p[1, 1, 5] + log_p[1, 2, 6]) / 4
    torch.testing.assert_close(answer_loss(logits, labels), by_hand)


def test_loss_supervises_sop_from_the_position_of_gmask():
    logits = torch.zeros(1, 3, 5)  # gMASK sop eop
    logits[0, 0, 3] = 100.0  # sop is 3
    assert answer_loss(logits, torch.tensor([[-100, 3, -100]])).item() == pytest.approx(0)
    assert answer_loss(logits, torch.tensor([[-100, 2, -100]])).item() == pytest.approx(100)


def test_loss_of_half_precision_logits_is_float32():
    logits = torch.randn(1, 4, 10).bfloat16()
    labels = torch.tensor([[-100, 1, 2, 3]])
    loss = answer_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, answer_loss(logits.float(), labels))


# get_batch


def test_batch_in_float32_is_handed_on_as_it_is():
    given = batch()
    input_ids, labels, image, pre_image = get_batch(iter([given]), sat_args(), FakeTimers())
    assert torch.equal(input_ids, given["input_ids"])
    assert torch.equal(labels, given["labels"])
    assert torch.equal(image, given["image"])
    assert pre_image == 3


@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_image_of_a_batch_gets_the_models_dtype(flag, dtype):
    input_ids, labels, image, _ = get_batch(iter([batch()]), sat_args(**{flag: True}), FakeTimers())
    assert image.dtype == dtype
    assert input_ids.dtype == labels.dtype == torch.int64


def test_batches_are_taken_one_after_another():
    first, second = batch(), batch() | {"pre_image": 4}
    batches = iter([first, second])
    assert [get_batch(batches, sat_args(), FakeTimers())[3] for _ in range(2)] == [3, 4]


def test_timers_are_stopped_again():
    timers = FakeTimers()
    get_batch(iter([batch()]), sat_args(), timers)
    assert timers.started == ["data loader"]
    assert not timers.running


# forward_step


def test_loss_of_a_step_is_that_of_a_plain_computation(process_group):
    model, given, timers = process_group, batch(), FakeTimers()
    loss, metrics = forward_step(iter([given]), model, sat_args(), timers)

    logits = model(input_ids=given["input_ids"], image=given["image"], pre_image=3)[0]
    log_p = logits.log_softmax(-1)
    supervised = [
        log_p[row, position - 1, given["labels"][row, position]]
        for row in range(2)
        for position in range(given["labels"].shape[1])
        if given["labels"][row, position] != -100
    ]
    assert len(supervised) == 7
    torch.testing.assert_close(loss, -torch.stack(supervised).mean())
    assert metrics == {"loss": loss}
    assert not timers.running


def test_loss_of_a_step_when_the_rows_have_more_padding_is_the_same(process_group, monkeypatch):
    losses = []
    for multiple in (1, 64):
        monkeypatch.setattr(dataset, "PAD_MULTIPLE", multiple)
        losses.append(forward_step(iter([batch()]), process_group, sat_args(), FakeTimers())[0])
    torch.testing.assert_close(*losses)


def test_loss_of_a_step_in_bfloat16_is_float32(process_group):
    loss, _ = forward_step(iter([batch()]), process_group.bfloat16(), sat_args(bf16=True), FakeTimers())
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize("chunk", [1, 3, 7, 2**26])
@pytest.mark.parametrize("cached", [1, 2**26])
def test_head_loss_in_chunks_is_the_cross_entropy_of_all_scores(chunk, cached, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk * 11)
    monkeypatch.setattr(loss_module, "CACHED_LOGITS", cached * 11)
    torch.manual_seed(1)
    head, targets = torch.nn.Linear(5, 11, bias=False), torch.randint(0, 11, (7,))
    hidden, plain = (torch.full((7, 5), 0.5).mul_(torch.arange(5)).requires_grad_() for _ in range(2))
    loss = head_loss(hidden, head, targets)
    expected = torch.nn.functional.cross_entropy(plain @ head.weight.T, targets, reduction="sum")
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_head_loss_holds_no_more_scores_at_once_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 2 * 11)
    asked, plain_product = [], frozen.product
    monkeypatch.setattr(loss_module, "product", lambda head, x: asked.append(len(x)) or plain_product(head, x))
    head_loss(torch.randn(7, 5), torch.nn.Linear(5, 11, bias=False), torch.zeros(7, dtype=torch.int64))
    assert asked == [2, 2, 2, 1]
