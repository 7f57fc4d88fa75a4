"""One step: the batch on the device in the model's dtype, and the loss as it is computed by hand."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FakeTimers, golden_values

from model.data import lengths
from model.data.dataset import data_collator
from model.errors import RowError
from model.training.step import evaluation_step, forward_step, get_batch, token_normalized_step

CONTEXT = [563, 775, 2685, *[3] * 32, 859]  # <img>, image slots, </img>


pytestmark = pytest.mark.usefixtures("process_group")

ARGS_OF_2023 = SimpleNamespace(device="cpu", fp16=False)


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


def batch_of_2023():
    """The same rows as the released script's collator gives them."""
    return {name: value for name, value in batch().items() if name in ("input_ids", "labels", "image", "pre_image")}


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


@pytest.mark.slow
def test_loss_of_a_step_is_that_of_a_plain_computation(small_model):
    model, given, timers = small_model, batch(), FakeTimers()
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


def test_loss_of_a_step_when_the_rows_have_more_padding_is_the_same(small_model, monkeypatch):
    losses = []
    for multiple in (1, 64):
        monkeypatch.setattr(lengths, "PAD_MULTIPLE", multiple)
        losses.append(forward_step(iter([batch()]), small_model, sat_args(), FakeTimers())[0])
    torch.testing.assert_close(*losses)


def test_loss_of_a_step_in_bfloat16_is_float32(small_model):
    loss, _ = forward_step(iter([batch()]), small_model.bfloat16(), sat_args(bf16=True), FakeTimers())
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# what a script of 2023 hands over


def test_batch_with_the_args_of_2023_is_handed_on_in_float32():
    input_ids, _, image, _ = get_batch(iter([batch()]), ARGS_OF_2023, FakeTimers())
    assert torch.equal(input_ids, batch()["input_ids"])
    assert image.dtype == torch.float32


def test_batch_in_fp16_with_the_args_of_2023_is_float16():
    args = SimpleNamespace(device="cpu", fp16=True)
    assert get_batch(iter([batch()]), args, FakeTimers())[2].dtype == torch.float16


def test_batch_of_2023_is_handed_on_as_it_is():
    given = batch_of_2023()
    found = get_batch(iter([given]), ARGS_OF_2023, FakeTimers())
    assert all(
        torch.equal(tensor, given[name]) for tensor, name in zip(found, ("input_ids", "labels", "image"), strict=False)
    )
    assert found[3] == 3


@pytest.mark.parametrize("step", [forward_step, evaluation_step, token_normalized_step()])
def test_loss_of_a_batch_of_2023_is_that_of_our_collators(small_model, step):
    expected, _ = forward_step(iter([batch()]), small_model, sat_args(), FakeTimers())
    loss, _ = step(iter([batch_of_2023()]), small_model, ARGS_OF_2023, FakeTimers())
    torch.testing.assert_close(loss, expected)


def test_row_that_cannot_be_used_with_the_args_of_2023_is_an_error():
    with pytest.raises(RowError, match="row 3: gone"):
        get_batch(iter([batch() | {"problems": ["row 3: gone"]}]), ARGS_OF_2023, FakeTimers())
