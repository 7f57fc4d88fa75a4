"""Activation checkpointing is turned on where memory asks for it, and weights are packed where there is room for them."""

import argparse
import copy

import pytest
import torch
from conftest import load_model

from model.cpu import PrepackedLinear
from model.training import memory
from model.training.memory import activation_bytes, fit_into_memory
from model.visualglm import VisualGLMModel, without_memory
from scripts.dev.benchmark import SHAPES


@pytest.fixture(scope="module")
def of_the_6b(upstream_checkpoint):
    """A model of the 6B shape in fp16, without memory."""
    load_model(upstream_checkpoint)  # makes SAT's model-parallel groups
    args = argparse.Namespace(**{**vars(VisualGLMModel.get_args()), **copy.deepcopy(SHAPES["6b"])})
    with without_memory():
        return VisualGLMModel(args, params_dtype=torch.float16).half()


@pytest.fixture
def model(of_the_6b):
    def with_checkpointing(is_typed=False):
        of_the_6b.transformer.checkpoint_activations = is_typed
        return of_the_6b

    return with_checkpointing


@pytest.fixture
def free(monkeypatch):
    return lambda gib: monkeypatch.setattr(memory, "free_bytes", lambda device: int(gib * 2**30))


def test_activations_of_the_released_recipe_take_less_than_three_gib(model):
    """tests/test_gpu_rehearsal.py holds this number against what is counted."""
    assert activation_bytes(model(), tokens=4 * 320) / 2**30 == pytest.approx(2.73, abs=0.01)


def test_activations_that_fit_are_kept(free, capsys, model):
    free(40)
    kept = model()
    fit_into_memory(kept, 4 * 320)
    assert not kept.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_activations_that_do_not_fit_are_recomputed_and_it_is_said(free, capsys, model):
    free(4)
    recomputed = model()
    fit_into_memory(recomputed, 4 * 320)
    assert recomputed.transformer.checkpoint_activations
    assert "3.4 GiB, 3.2 GiB can be used" in capsys.readouterr().out


def test_activations_when_checkpointing_was_typed_stay_recomputed_in_silence(free, capsys, model):
    free(1000)
    typed = model(is_typed=True)
    fit_into_memory(typed, 1)
    assert typed.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_free_memory_of_the_cpu_is_what_the_system_has():
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50


def test_free_memory_of_the_cpu_is_shared_by_the_processes_on_it(monkeypatch):
    alone = memory.free_bytes(torch.device("cpu"))
    monkeypatch.setattr(memory, "processes_here", lambda: (0, 4))
    assert 0.2 < memory.free_bytes(torch.device("cpu")) / alone < 0.3


@pytest.fixture
def lora(upstream_checkpoint):
    """The golden model with LoRA, frozen as for training."""
    tuned = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2, layer_range=[0])
    tuned.freeze()
    return tuned


def packed_linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, PrepackedLinear)]


def test_frozen_linears_of_the_language_model_are_packed_where_there_is_room(lora, free):
    free(40)
    fit_into_memory(lora, 64)
    packed = packed_linears(lora)
    assert len(packed) == 3 * 4 + 1  # every layer's linears, and the head
    assert "transformer.layers.0.attention.query_key_value.original" in packed
    assert "mixins.chatglm-final.lm_head" in packed


def test_frozen_linears_stay_plain_where_their_second_copy_has_no_room(lora, free, capsys):
    weights = sum(p.nbytes for p in lora.parameters() if not p.requires_grad and p.dim() == 2)
    free(weights / 4 / 2**30)
    fit_into_memory(lora, 1)
    assert packed_linears(lora) == []
    assert not lora.transformer.checkpoint_activations
