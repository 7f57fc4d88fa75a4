"""Activation checkpointing is turned on where memory asks for it, and nowhere else."""

from types import SimpleNamespace

import pytest
import torch

from model import memory
from model.memory import activation_bytes, recompute_where_needed


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
    return lambda gib: monkeypatch.setattr(memory, "free_bytes", lambda device: int(gib * 2**30))


def test_activations_of_the_released_recipe_take_about_six_gib():
    assert activation_bytes(28, 4096, tokens=4 * 320, bytes_per_number=2) / 2**30 == pytest.approx(5.8, abs=0.2)


def test_activations_that_fit_are_kept(free, capsys):
    free(40)
    kept = model()
    recompute_where_needed(kept, 4 * 320)
    assert not kept.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_activations_that_do_not_fit_are_recomputed_and_it_is_said(free, capsys):
    free(4)
    recomputed = model()
    recompute_where_needed(recomputed, 4 * 320)
    assert recomputed.transformer.checkpoint_activations
    assert "5.8 GiB, 4.0 GiB are free" in capsys.readouterr().out


def test_activations_when_checkpointing_was_typed_stay_recomputed_in_silence(free, capsys):
    free(1000)
    typed = model(checkpointing=True)
    recompute_where_needed(typed, 1)
    assert typed.transformer.checkpoint_activations
    assert capsys.readouterr().out == ""


def test_free_memory_of_the_cpu_is_what_the_system_has():
    assert 0 < memory.free_bytes(torch.device("cpu")) < 2**50
