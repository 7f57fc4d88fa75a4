"""Several rows in one sequence, and a loss that doesn't depend on how a batch is cut."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FakeTimers, golden_values, load_model

from model.data.dataset import data_collator, packed_collator
from model.data.prompt import answer_labels
from model.masks import packed_prefix_mask, prefix_mask
from model.training.step import forward_step, loss_sum, token_normalized_step

PAD, GMASK, SOP, EOP = 3, 86, 89, 90


def sample(words: int, answer: int) -> dict:
    """A row with a picture, a question of so many words and an answer of so many."""
    ids = [563, 775, 2685, *[PAD] * 32, *range(100, 100 + words), GMASK, SOP, *range(500, 500 + answer), EOP]
    image = torch.from_numpy(golden_values(f"picture {words} {answer}", [3, 224, 224]))
    return {"input_ids": ids, "labels": answer_labels(ids, SOP), "image": image, "pre_image": 3, "image_length": 32,
            "pad_token_id": PAD}  # fmt: skip


@pytest.fixture
def model(upstream_checkpoint):
    model = load_model(upstream_checkpoint).requires_grad_(False)
    model.transformer.layers[0].attention.dense.weight.requires_grad_(True)
    return model


def loss_and_gradient(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = loss_sum(model, batch)
    loss.backward()
    return loss.detach(), model.transformer.layers[0].attention.dense.weight.grad.clone()


def test_packed_rows_have_the_loss_and_gradient_of_rows_by_themselves(model):
    samples = [sample(5, 3), sample(20, 9), sample(2, 14), sample(9, 1)]
    loss, gradient = loss_and_gradient(model, data_collator(samples))
    packed_loss, packed_gradient = loss_and_gradient(model, packed_collator(samples, capacity=128))
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_packing_fills_rows_up_to_the_capacity():
    batch = packed_collator([sample(5, 3), sample(20, 9), sample(2, 14), sample(9, 1)], capacity=128)
    assert batch["input_ids"].shape == (2, 128)


def test_packing_when_a_row_is_longer_than_the_capacity_gives_it_a_row_of_its_own():
    assert packed_collator([sample(5, 3), sample(20, 9)], capacity=8)["input_ids"].shape[0] == 2


def test_packed_mask_lets_no_sample_see_another():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    in_context = torch.tensor([[True, True, False, True, False, False]])
    visible = packed_prefix_mask(segments, in_context)[0, 0].int()
    assert visible.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_packed_mask_of_one_sample_is_the_prefix_mask():
    segments, in_context = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[True, True, True, False, False]])
    alone = prefix_mask(torch.tensor([3]), torch.tensor([0]), 5)
    assert torch.equal(packed_prefix_mask(segments, in_context), alone)


def test_packed_positions_are_those_of_rows_by_themselves(model):
    short, long = sample(2, 3), sample(9, 5)
    packed = packed_collator([short, long], capacity=128)["position_ids"][0]
    first = len(long["input_ids"])
    _, alone = model.get_inputs(torch.tensor([long["input_ids"]]))
    assert torch.equal(packed[:, :first], alone[0])
    _, alone = model.get_inputs(torch.tensor([short["input_ids"]]))
    assert torch.equal(packed[:, first : first + len(short["input_ids"])], alone[0])


def gradient_of_step(model, step, batches) -> torch.Tensor:
    """What DeepSpeed makes of an optimizer step: the mean over its micro-batches."""
    model.zero_grad()
    args = SimpleNamespace(device="cpu", fp16=False, bf16=False, gradient_accumulation_steps=len(batches))
    timers = FakeTimers()
    batches_iterator = iter(batches)
    for _ in batches:
        loss, _ = step(batches_iterator, model, args, timers)
        (loss / len(batches)).backward()
    return model.transformer.layers[0].attention.dense.weight.grad.clone()


def test_token_normalization_gives_one_gradient_however_the_batch_is_cut(model):
    samples = [sample(5, 3), sample(20, 9), sample(2, 14), sample(9, 1)]
    whole = gradient_of_step(model, token_normalized_step(), [data_collator(samples)])
    cut = [data_collator(samples[:1]), data_collator(samples[1:])]
    torch.testing.assert_close(gradient_of_step(model, token_normalized_step(), cut), whole, rtol=1e-4, atol=1e-6)


def test_micro_batch_normalization_depends_on_the_cut_as_released(model):
    samples = [sample(5, 3), sample(20, 9), sample(2, 14), sample(9, 1)]
    whole = gradient_of_step(model, forward_step, [data_collator(samples)])
    cut = gradient_of_step(model, forward_step, [data_collator(samples[:1]), data_collator(samples[1:])])
    assert (cut - whole).norm() > 0.05 * whole.norm()
