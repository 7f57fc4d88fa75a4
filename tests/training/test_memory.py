"""Activation checkpointing is turned on where memory asks for it, and weights are packed where there is room for them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import load_model

from model import attention, loss
from model.adapter_config import AdapterConfig
from model.cpu import PrepackedLinear
from model.errors import InputError
from model.training import feature_cache, memory
from model.training.memory import (
    Batch,
    Setup,
    activation_bytes,
    estimate,
    fit_into_memory,
    has_room_to_pack,
    holes_bytes,
    optimizer_bytes,
    second_order_bytes,
    weight_bytes,
)
from scripts.dev.shapes import SHAPES

SETUP = Setup(SHAPES["6b"], AdapterConfig(("lora",), layers=(0, 14), dropout=0.1), "fp16")
RELEASED = Batch(rows=4, seq=320, answers=4 * 256, images=0)


def of_golden_model(checkpoint):
    config = json.loads((checkpoint / "model_config.json").read_text())
    return Setup(config, AdapterConfig(("lora",), rank=2, layers=(0,)), on_gpu=False)


def not_asked():
    raise AssertionError("the data was counted, which takes seconds, although the longest rows of all fit")


def model(checkpointing=False):
    transformer = SimpleNamespace(
        word_embeddings=SimpleNamespace(weight=torch.zeros(1, dtype=torch.float16)),
        checkpoint_activations=checkpointing,
        layers=[None] * 28,
        hidden_size=4096,
    )
    return SimpleNamespace(transformer=transformer)


@pytest.fixture
def free(monkeypatch):
    return lambda gib: monkeypatch.setattr(memory, "free_memory", lambda device: int(gib * 2**30))


def test_activations_of_the_released_recipe_take_as_much_as_is_counted():
    """tests/test_gpu_rehearsal.py holds the estimate against the count."""
    assert activation_bytes(SETUP, RELEASED) / 2**30 == pytest.approx(3.45, abs=0.1)


def test_fewer_layers_that_are_trained_keep_less():
    top = replace(SETUP, adapters=AdapterConfig(("lora",), layers=(26, 27)))
    assert activation_bytes(top, RELEASED) < activation_bytes(SETUP, RELEASED) / 3


@pytest.mark.parametrize(("is_decoder", "layers"), [(True, 12), (False, 0), ([True, False] * 6, 6)])
def test_layers_that_attend_to_the_image_are_counted_in_each_form(is_decoder, layers):
    config = SHAPES["6b"] | {"qformer_args": SHAPES["6b"]["qformer_args"] | {"is_decoder": is_decoder}}
    setup = replace(SETUP, config=config, adapters=AdapterConfig(("lora",), train_parts=("qformer",)))
    without = replace(setup, config=config | {"qformer_args": config["qformer_args"] | {"is_decoder": []}})
    a_layers = 257 * 2 * 768 * 2  # keys and values of the image's positions, in half precision
    batch = replace(RELEASED, images=1)
    assert (
        memory.vision_activation_bytes(setup, batch) - memory.vision_activation_bytes(without, batch)
        == layers * a_layers
    )


def test_two_model_parallel_processes_halve_the_language_model_only():
    whole, half = weight_bytes(SETUP), weight_bytes(replace(SETUP, model_parallel=2))
    assert half["language"] == pytest.approx(whole["language"] / 2, rel=0.01)
    assert half["vision"] == whole["vision"]


def test_zero_shares_the_optimizer_and_from_stage_2_the_gradients():
    alone = optimizer_bytes(SETUP)
    assert optimizer_bytes(replace(SETUP, zero_stage=1, data_parallel=4)) == (alone[0], alone[1] // 4)
    assert optimizer_bytes(replace(SETUP, zero_stage=2, data_parallel=4)) == (alone[0] // 4, alone[1] // 4)


def test_activations_that_fit_are_kept(free, capsys):
    free(40)
    kept = model()
    fit_into_memory(kept, SETUP, RELEASED, not_asked)
    assert not kept.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_activations_that_do_not_fit_are_recomputed_and_it_is_said(free, capsys):
    free(3.6)
    recomputed = model()
    fit_into_memory(recomputed, SETUP, RELEASED, lambda: RELEASED)
    assert recomputed.transformer.checkpoint_activations
    assert "3.5 GiB, 3.2 GiB can be used" in capsys.readouterr().out


def test_batch_that_a_cpu_has_no_room_for_either_way_is_refused(free, monkeypatch):
    free(3.6)
    monkeypatch.setattr(memory, "free_host_memory", lambda: 0)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=2**29))
    sentence = r"--batch-size 4: a step of \d+ tokens takes about [\d.]+ GiB, 0.5 GiB are free; a smaller one is needed"
    with pytest.raises(InputError, match=sentence):
        fit_into_memory(model(), SETUP, RELEASED, lambda: RELEASED)


def test_activations_that_fit_with_the_rows_of_the_data_are_kept(free, capsys):
    free(3.6)
    kept = model()
    fit_into_memory(kept, SETUP, RELEASED, lambda: Batch(rows=4, seq=72, answers=4 * 20, images=0))
    assert not kept.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_activations_when_checkpointing_was_typed_stay_recomputed_in_silence(free, capsys):
    free(1000)
    typed = model(checkpointing=True)
    fit_into_memory(typed, SETUP, RELEASED, not_asked)
    assert typed.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_numbers_that_are_told_without_torch_are_those_of_the_code_that_takes_the_memory():
    assert memory.CHUNK_SCORES == loss.CHUNK_LOGITS
    assert memory.SHORT_ON_CPU == attention.SHORT_ON_CPU
    assert memory.IMAGES_AT_ONCE == feature_cache.IMAGES_AT_ONCE


@pytest.fixture
def lora(upstream_checkpoint):
    """The golden model with LoRA, frozen as for training."""
    tuned = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2, layer_range=[0])
    tuned.freeze()
    return tuned


def packed_linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, PrepackedLinear)]


def test_frozen_linears_of_the_language_model_are_packed_where_there_is_room(lora, upstream_checkpoint, free):
    free(40)
    fit_into_memory(lora, of_golden_model(upstream_checkpoint), Batch(1, 64, 8, 0), not_asked)
    packed = packed_linears(lora)
    assert len(packed) == 3 * 4 + 1  # every layer's linears, and the head
    assert "transformer.layers.0.attention.query_key_value.original" in packed
    assert "mixins.chatglm-final.lm_head" in packed


def test_frozen_linears_stay_plain_where_their_second_copy_has_no_room(lora, upstream_checkpoint, free):
    weights = sum(p.nbytes for p in lora.parameters() if not p.requires_grad and p.dim() == 2)
    free(weights / 4 / 2**30)
    fit_into_memory(lora, of_golden_model(upstream_checkpoint), Batch(1, 1, 1, 0), lambda: Batch(1, 1, 1, 0))
    assert packed_linears(lora) == []
    assert not lora.transformer.checkpoint_activations


def test_room_for_a_second_order_is_told_before_loading(upstream_checkpoint):
    setup, batch = of_golden_model(upstream_checkpoint), Batch(1, 64, 8, 0)
    plain = estimate(setup, batch)
    taken = plain.training["weights"] + plain.training["Python and its libraries"]
    needed = int((sum(plain.training.values()) - taken + weight_bytes(setup)["language"]) / memory.USABLE) + taken
    assert has_room_to_pack(setup, batch, needed)
    assert not has_room_to_pack(setup, batch, needed - weight_bytes(setup)["language"])


def test_qlora_has_a_second_order_of_the_head_alone_and_lora_of_the_layers_too():
    head = 130528 * 4096 * 2
    qlora = replace(SETUP, adapters=AdapterConfig(("qlora",), layers=(0, 14)))
    assert second_order_bytes(qlora) == (0, head)
    assert second_order_bytes(SETUP) == (28 * 12 * 4096 * 4096 * 2, head)
    on_cpu = [replace(setup, dtype="bf16", on_gpu=False, packed=True) for setup in (qlora, SETUP)]
    assert [estimate(setup, RELEASED).training["packing the head"] for setup in on_cpu] == [head, 0]


def test_unpacked_weights_leave_holes_in_the_heap_of_a_cpu_if_they_are_small():
    """Those of the 6B take 32 MiB and more, which the C library maps by themselves."""
    qlora = replace(SETUP, adapters=AdapterConfig(("qlora",), layers=(0, 14)), dtype="bf16", on_gpu=False)
    narrow = replace(qlora, config=SETUP.config | {"hidden_size": 1024, "inner_hidden_size": 4096})

    short = replace(RELEASED, seq=200)  # whose attention weights are in the heap too

    def of_weights(setup):
        return holes_bytes(setup, short) - memory.HOLES_OF_ACTIVATIONS * activation_bytes(setup, short)

    assert of_weights(qlora) == pytest.approx(0, abs=1)
    assert of_weights(narrow) == pytest.approx(memory.HOLES_OF_UNPACKED * 28 * 3 * 1024 * 1024 * 2, rel=1e-6)
    assert holes_bytes(replace(narrow, on_gpu=True), RELEASED) == 0
    assert of_weights(replace(narrow, adapters=SETUP.adapters)) == pytest.approx(0, abs=1)


def test_large_attention_weights_leave_no_holes_in_the_heap_of_a_cpu():
    setup = replace(SETUP, dtype="fp32", on_gpu=False)
    weights = 28 * 3 * 32 * 4 * 320 * 320 * 4  # layers, what dropout keeps, heads
    of_all = memory.HOLES_OF_ACTIVATIONS * activation_bytes(setup, RELEASED)
    assert of_all - holes_bytes(setup, RELEASED) >= memory.HOLES_OF_ACTIVATIONS * weights


def test_process_on_a_cpu_takes_more_where_torch_is_built_for_gpus(tmp_path, monkeypatch):
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: found)
    for_cpus = memory.process_bytes()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libtorch_cuda.so").touch()
    assert memory.process_bytes() - for_cpus == pytest.approx(360e6, rel=0.05)  # measured with torch 2.13.0+cu130
