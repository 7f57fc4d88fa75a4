"""What only a GPU can show; skipped without one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FakeTimers, golden_values, load_model

from model.data.dataset import data_collator
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
