"""The cross entropy of supervised tokens as it is computed by hand, whole and in chunks."""

import math

import pytest
import torch

from model import frozen
from model import loss as loss_module
from model.loss import answer_loss, head_loss, head_losses, losses_by_row

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


def test_loss_without_a_supervised_token_is_0():
    assert answer_loss(torch.randn(1, 3, 5), torch.full((1, 3), -100)).item() == 0


# losses_by_row


def test_losses_by_row_are_sums_of_minus_log_p_and_counts():
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[-100, 1, -100, -100], [-100, 4, 5, 6]])
    log_p = logits.log_softmax(-1)
    totals, counts = losses_by_row(logits, labels)
    by_hand = torch.stack((-log_p[0, 0, 1], -(log_p[1, 0, 4] + log_p[1, 1, 5] + log_p[1, 2, 6])))
    torch.testing.assert_close(totals, by_hand)
    assert counts.tolist() == [1, 3]


# head_loss


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


def test_head_losses_of_an_evaluation_hold_no_more_scores_at_once_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 2 * 11)
    head, asked = torch.nn.Linear(5, 11, bias=False), []
    head.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    hidden, targets = torch.randn(7, 5), torch.arange(7)
    found = head_losses(hidden, head, targets)
    assert asked == [2, 2, 2, 1]
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, expected)


def test_head_loss_in_fp16_takes_a_gradient_above_the_largest_fp16_number():
    head = torch.nn.Linear(5, 11, bias=False).half()
    hidden = torch.full((1, 5), 1e-3, dtype=torch.float16, requires_grad=True)
    head_loss(hidden, head, torch.zeros(1, dtype=torch.int64)).backward(torch.tensor(65536.0))
    scaled, hidden.grad = hidden.grad, None
    head_loss(hidden, head, torch.zeros(1, dtype=torch.int64)).backward()
    assert scaled.isfinite().all()
    assert torch.equal(scaled, hidden.grad * 2.0**16)
