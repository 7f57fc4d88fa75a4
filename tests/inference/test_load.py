"""Loading a checkpoint of any kind to ask it."""

from pathlib import Path

import pytest
import torch
from conftest import write_tuned

from model.checkpoints.layout import Checkpoint
from model.convert.merge_lora import merge
from model.errors import InputError
from model.inference.load import image_size, load_for_answering

INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


def test_load_for_answering_of_a_base_gives_a_plain_model_in_eval_mode(upstream_checkpoint: Path) -> None:
    model, tokenizer = load_for_answering(str(upstream_checkpoint))
    assert type(model).__name__ == "VisualGLMModel"
    assert not model.training
    assert tokenizer.vocab_file == str(upstream_checkpoint / "ice_text.model")


@torch.no_grad()
def test_load_for_answering_takes_a_checkpoint_that_was_found_before(upstream_checkpoint: Path, tmp_path: Path) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    found, _ = load_for_answering(Checkpoint.find(tuned))
    by_name, _ = load_for_answering(str(tuned))
    assert torch.equal(found(input_ids=INPUT_IDS)[0], by_name(input_ids=INPUT_IDS)[0])


@pytest.mark.parametrize("full", [False, True])
def test_load_for_answering_of_an_adapter_or_full_checkpoint_gives_a_model_with_adapters(
    upstream_checkpoint: Path, tmp_path: Path, full: bool
) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", full=full, use_lora=True, lora_rank=2)
    assert type(load_for_answering(str(tuned))[0]).__name__ == "FineTuneVisualGLMModel"


def test_load_for_answering_of_a_merged_checkpoint_gives_a_plain_model(
    upstream_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    merged = merge(str(tuned), str(tmp_path / "merged"))
    assert type(load_for_answering(merged)[0]).__name__ == "VisualGLMModel"


def test_load_for_answering_when_nothing_is_there_says_where_it_looked() -> None:
    with pytest.raises(InputError, match=r"^--from_pretrained nowhere: no such folder"):
        load_for_answering("nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is possible")
def test_quant_without_a_gpu_is_refused_in_a_sentence(upstream_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"--quant 4: .* NVIDIA GPU only"):
        load_for_answering(str(upstream_checkpoint), quant=4)


def test_image_size_is_that_of_the_vision_tower(upstream_checkpoint: Path) -> None:
    assert image_size(load_for_answering(str(upstream_checkpoint))[0]) == 224
