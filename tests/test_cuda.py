"""What only a GPU can show; skipped without one."""

from types import SimpleNamespace

import pytest
import torch
from test_benchmark import SHAPE

from model.data.dataset import data_collator
from model.training.step import get_batch
from scripts.dev.benchmark import SAVINGS, Bench, Way, parsed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_step_asks_the_device_for_nothing(dtype: str) -> None:
    small = Bench(parsed(["--shape", str(SHAPE), "--batch-size", "2", "--steps", "1", "--dtype", dtype]))
    way = Way(list(SAVINGS), small.options)
    small.step(way, small.model, small.dtype, small.batches[0])
    batch = way.batch(small.batches[0], small.features, small.device, small.dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        way.loss(small.model, batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_first_loss_is_finite(dtype: str) -> None:
    small = Bench(parsed(["--shape", str(SHAPE), "--batch-size", "2", "--steps", "1", "--dtype", dtype]))
    way = Way(list(SAVINGS), small.options)
    assert torch.tensor(small.step(way, small.model, small.dtype, small.batches[0])).isfinite()


def test_batch_lands_on_the_gpu_in_the_models_dtype() -> None:
    small = Bench(parsed(["--shape", str(SHAPE), "--batch-size", "2", "--steps", "1"]))
    args = SimpleNamespace(device=0, fp16=True, bf16=False)
    timers = lambda name: SimpleNamespace(start=lambda: None, stop=lambda: None)  # noqa: E731
    input_ids, labels, image, pre_image = get_batch(iter([data_collator(small.batches[0])]), args, timers)
    assert (input_ids.device.type, labels.device.type, image.dtype) == ("cuda", "cuda", torch.float16)
    assert pre_image == 3
