"""What only a GPU can show; skipped without one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FakeTimers, golden_values, load_model

from model.cli.options import parse
from model.data.dataset import data_collator
from model.finetune import FineTuneVisualGLMModel
from model.training.dry_run import device_of
from model.training.memory import Batch, Setup, activation_bytes
from model.training.step import forward_step, get_batch, loss_sum, next_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def sat_args(dtype: str) -> SimpleNamespace:
    return SimpleNamespace(device=0, fp16=dtype == "fp16", bf16=dtype == "bf16")


def tuned(checkpoint: Path, dtype: str) -> Any:
    """The golden model with LoRA, on the GPU, ready to be trained."""
    model = load_model(checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=4, layer_range=[0, 2])
    model.freeze()
    return model.to("cuda", DTYPES[dtype]).train()


def batch(kind: str = "image", shape: tuple[int, ...] = (3, 224, 224)) -> dict[str, Any]:
    """What the collator makes of two rows of different lengths with a picture each, or with its "image_features"."""
    pictures = torch.from_numpy(golden_values("an image", [2, *shape]))
    context = [563, 775, 2685, *[3] * 32, 859, 86]
    return data_collator(
        [
            {
                "input_ids": [*context, *answer],
                "labels": [*[-100] * len(context), *answer],
                kind: picture,
                "pre_image": 3,
                "image_length": 32,
                "pad_token_id": 3,
            }
            for answer, picture in zip(([89, 554, 90], [89, 17, 554, 90]), pictures, strict=True)
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_asks_the_device_for_nothing(upstream_checkpoint: Path, dtype: str) -> None:
    model = tuned(upstream_checkpoint, dtype)
    with_features = batch("image_features", (32, 48))  # queries, width of the golden model's Q-Former
    on_gpu = next_batch(iter([with_features]), sat_args(dtype), FakeTimers())
    loss_sum(model, on_gpu).backward()  # the first step makes tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_sum(model, on_gpu).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_first_loss_is_finite(upstream_checkpoint: Path, dtype: str) -> None:
    model = tuned(upstream_checkpoint, dtype)
    loss, _ = forward_step(iter([batch()]), model, sat_args(dtype), FakeTimers())
    loss.backward()
    assert loss.isfinite()


def test_batch_lands_on_the_gpu_in_the_models_dtype(upstream_checkpoint: Path) -> None:
    load_model(upstream_checkpoint)  # makes SAT's model-parallel groups
    input_ids, labels, image, pre_image = get_batch(iter([batch()]), sat_args("fp16"), FakeTimers())
    assert (input_ids.device.type, labels.device.type, image.dtype) == ("cuda", "cuda", torch.float16)
    assert pre_image == 3


@pytest.mark.parametrize("method", ["lora", "ptuning", "qlora"])
@pytest.mark.parametrize("seq", [64, 192, 320])
def test_gradients_are_finite_at_the_lengths_at_which_cudnns_are_not(
    upstream_checkpoint: Path, method: str, seq: int
) -> None:
    """In fp16, with a mask, in batches of different lengths."""
    flags = {f"use_{method}": True, "lora_rank": 4, "layer_range": [0], "pre_seq_len": 4}
    args = FineTuneVisualGLMModel.get_args(skip_init=True, device=0, mode="finetune", fp16=True, bf16=False, **flags)
    model, _ = FineTuneVisualGLMModel.from_pretrained(upstream_checkpoint, args)
    model.freeze()
    samples = [row_of(seq), row_of(seq - 9)]
    on_gpu = next_batch(iter([data_collator(samples)]), sat_args("fp16"), FakeTimers())
    loss_sum(model.train(), on_gpu).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def row_of(tokens: int) -> dict[str, Any]:
    """A sample of so many tokens, whose picture has been looked at."""
    context = [563, 775, 2685, *[3] * 32, 859, 86]
    answer = [89, *[17] * (tokens - len(context) - 2), 90]
    return {
        "input_ids": [*context, *answer], "labels": [*[-100] * len(context), *answer], "pre_image": 3, "image_length": 32,
        "pad_token_id": 3, "image_features": torch.from_numpy(golden_values("features", [32, 48])),
    }  # fmt: skip


def test_vision_part_that_is_sent_away_frees_its_memory(upstream_checkpoint: Path) -> None:
    model = tuned(upstream_checkpoint, "fp16")
    before = torch.cuda.memory_allocated()
    model.get_mixin("eva").model.send_away(is_kept=False)
    assert torch.cuda.memory_allocated() < before


def test_peak_of_a_step_is_as_estimated(upstream_checkpoint: Path, upstream_config: dict) -> None:
    """At a width at which a step takes some MiB, blocks of the allocator count: a third of it may be theirs."""
    model = tuned(upstream_checkpoint, "fp16")
    model.get_mixin("eva").model.send_away(is_kept=False)
    on_gpu = next_batch(iter([data_collator([row_of(320)] * 64)]), sat_args("fp16"), FakeTimers())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_sum(model, on_gpu).backward()
    measured = torch.cuda.max_memory_allocated() - before
    setup = Setup(upstream_config, model.adapters, "fp16", hidden_dropout=0.0, attention_dropout=0.0)
    estimated = activation_bytes(setup, Batch(64, 320, 64 * (320 - 37), images=0))
    assert 2 / 3 < estimated / measured < 3 / 2


def test_dry_run_names_the_gpu_that_is_there() -> None:
    device = device_of(parse([]))
    assert device.on_gpu
    assert torch.cuda.get_device_name() in device.name or torch.cuda.device_count() > 1
