"""What a step's products take: counted for the 6B, held against torch's own count on a real model, and measured."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FakeTimers, load_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model.adapter_config import AdapterConfig
from model.data.dataset import data_collator
from model.training import step_time
from model.training.memory import Batch, Setup, language_numbers
from model.training.step import forward_step
from model.training.step_time import measured_rate, step_operations, unpacked_numbers
from scripts.dev.shapes import SHAPES

SIX_B = Setup(SHAPES["6b"], AdapterConfig(("lora",), layers=(0,)), "bf16", on_gpu=False)
LONG = Batch(rows=1, seq=320, answers=320, images=0)


def test_step_of_the_6b_takes_4_operations_a_number_and_token_and_6_if_recomputed() -> None:
    numbers = language_numbers(SIX_B.config) - 130528 * 4096  # the words' embeddings are looked up
    layers = numbers - 130528 * 4096  # the head isn't computed again
    assert step_operations(SIX_B, LONG) / 320 == pytest.approx(4 * numbers, rel=0.02)
    recomputed = replace(SIX_B, recomputed=True)
    assert step_operations(recomputed, LONG) / 320 == pytest.approx(4 * numbers + 2 * layers, rel=0.02)


def test_gradients_that_stop_at_the_last_layer_spare_those_of_the_others() -> None:
    top = replace(SIX_B, adapters=AdapterConfig(("lora",), layers=(27,)))
    spared = step_operations(SIX_B, LONG) - step_operations(top, LONG)
    assert spared / 320 == pytest.approx(27 * 2 * 12 * 4096 * 4096, rel=0.05)  # attention comes on top


def test_qlora_unpacks_each_weight_for_its_product_and_for_the_gradient() -> None:
    qlora = replace(SIX_B, adapters=AdapterConfig(("qlora",), layers=(0,)))
    assert unpacked_numbers(qlora) == 2 * 28 * 12 * 4096 * 4096
    assert unpacked_numbers(replace(qlora, recomputed=True)) == 3 * 28 * 12 * 4096 * 4096
    assert unpacked_numbers(SIX_B) == 0


def batch_of(config: dict, rows: int, tokens: int, learned: int, with_images: bool) -> dict:
    """What the collator makes of rows of so many tokens, with their pictures or with features of them."""
    side, queries = config["eva_args"]["image_size"][0], config["qformer_args"]["vocab_size"]
    input_ids = [4, 4, 4, *[3] * 32, *[5] * (tokens - 35)]
    labels = [-100] * (tokens - learned) + input_ids[tokens - learned :]
    features = torch.zeros(queries, config["qformer_args"]["hidden_size"])
    picture = {"image": torch.zeros(3, side, side)} if with_images else {"image_features": features}
    row = {"input_ids": input_ids, "labels": labels, "pre_image": 3, "image_length": 32, "pad_token_id": 3, **picture}
    return data_collator([row] * rows)


@pytest.mark.parametrize("with_images", [False, True])
def test_operations_are_those_that_torch_counts_in_a_step_of_a_real_model(
    upstream_checkpoint: Path, upstream_config: dict, with_images: bool
) -> None:
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=1, layer_range=[0])
    model.freeze()
    setup = Setup(upstream_config, AdapterConfig(("lora",), rank=1, layers=(0,)), on_gpu=False)
    told = step_operations(setup, Batch(3, 80, 3 * 40, images=3 if with_images else 0))
    args = SimpleNamespace(device="cpu", fp16=False, bf16=False)
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch 2.13 doesn't count by itself

    def of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={on_cpu: of_attention}) as counter:
        loss, _ = forward_step(iter([batch_of(upstream_config, 3, 80, 40, with_images)]), model, args, FakeTimers())
        loss.backward()
    assert told == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_time_of_a_product_is_the_median_of_as_many_as_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, times = [0], iter([0.0, 0.05, 0.05, 0.25, 0.25, 0.31])  # 0.05, 0.2 and 0.06 s
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: next(times))
    assert step_time.typical_seconds(lambda: calls.append(1), "cpu") == pytest.approx(0.06)
    assert sum(calls) == 4


@pytest.mark.parametrize("packed", [False, True])
def test_rate_is_that_of_a_product_as_the_run_does_it(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    monkeypatch.setattr(step_time, "typical_seconds", lambda call, _: call().shape[0] / 1e6)
    narrow = replace(SIX_B, dtype="fp32", config=SIX_B.config | {"hidden_size": 64, "inner_hidden_size": 256})
    rate = measured_rate(replace(narrow, packed=packed), Batch(2, 8, 4, images=0), "cpu")
    assert rate == pytest.approx(2 * 16 * 64 * 256 / 16e-6)
