"""Loading, training, saving and answering rehearsed on a GPU that isn't there (`fake_gpu`), and its memory counted.

What a rehearsal can find is planted: fifteen mistakes, each of which must be found.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, FakeTimers
from fake_gpu import CUDA, Memory, fake_gpu, fake_tensor, fused_attention, with_numbers

from model import attention
from model.checkpoints import weights
from model.checkpoints.layout import Checkpoint, ModelConfig
from model.checkpoints.metadata import VISION
from model.data.dataset import data_collator, packed_collator
from model.finetune import FineTuneVisualGLMModel
from model.inference.engine import Engine, Question
from model.sat_compat import import_sat
from model.training.step import forward_step

TINY = PROJECT / "model/tiny"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METHODS = {
    "lora": {"use_lora": True, "layer_range": [0, 3], "lora_rank": 4, "lora_dropout": 0.1},
    "lora everywhere": {
        "use_lora": True,
        "lora_target": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    },
    "qlora": {"use_qlora": True, "layer_range": [0, 3], "lora_rank": 4},
    "ptuning": {"use_ptuning": True, "pre_seq_len": 4},
    "lora and vision": {"use_lora": True, "train_parts": ["vit=1e-5", "qformer", "glm_proj"]},
}
KINDS = ("images", "features", "no images", "some images", "packed")


@pytest.fixture(scope="module", autouse=True)
def model_parallel_groups() -> None:
    """SAT's, which a real run has made before it builds a model."""
    import_sat()
    FineTuneVisualGLMModel.from_pretrained(TINY, FineTuneVisualGLMModel.get_args(use_lora=True), build_only=True)


def on_gpu(checkpoint: Path | Checkpoint, dtype: str, keep_vision: bool = True, **flags: Any) -> tuple[Any, Any]:
    """A checkpoint's model loaded onto the fake GPU as a run loads it, and SAT's namespace."""
    args = FineTuneVisualGLMModel.get_args(skip_init=True, hidden_dropout=0.1, attention_dropout=0.1, lr=1e-4, **flags)
    vars(args).update(device="cuda:0", mode="finetune", fp16=dtype == "fp16", bf16=dtype == "bf16", bad_rows="error")
    model, args = FineTuneVisualGLMModel.from_pretrained(checkpoint, args, language_later=True)
    if not keep_vision:
        model.get_mixin("eva").model.send_away(is_kept=False)
    model.finish_loading()
    model.freeze()
    return model.train(), args


def sample(
    config: ModelConfig, tokens: int, learned: int, image: str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """A row of so many tokens, of which the last ones are learned, with its "image", its "image_features" or none."""
    side, queries = config["eva_args"]["image_size"][0], config["qformer_args"]["vocab_size"]
    width = config["qformer_args"]["hidden_size"]
    slots, question = (
        [config["pad_token_id"]] * config["image_length"],
        [5, config["gmask_token_id"], config["bos_token_id"]],
    )
    input_ids = [4, 4, 4, *slots, *question]
    input_ids += [5] * (tokens - len(input_ids))
    labels = [-100] * (tokens - learned) + input_ids[tokens - learned :]
    pictures = {
        "image": torch.zeros(3, side, side),
        "image_features": torch.zeros(queries, width, dtype=dtype),
    }
    return {
        "input_ids": input_ids, "labels": labels, "pre_image": 3, "image_length": config["image_length"],
        "pad_token_id": config["pad_token_id"], **({image: pictures[image]} if image else {"image": None}),
    }  # fmt: skip


@with_numbers
def batch_of(kind: str, config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What a loader hands over, on the CPU: rows of different lengths."""
    lengths = ((50, 8), (44, 3), (61, 12))
    pictures: dict[str, list[str | None]] = {
        "images": ["image"] * 3, "no images": [None] * 3, "some images": ["image", None, "image"],
    }  # fmt: skip
    images = pictures.get(kind, ["image_features"] * 3)
    samples = [sample(config, *length, image, dtype) for length, image in zip(lengths, images, strict=True)]
    return (packed_collator if kind == "packed" else data_collator)(samples)


def fake(batch: dict[str, Any]) -> dict[str, Any]:
    """batch with fake tensors, on the CPU."""
    return {name: fake_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def step(model: Any, args: Any, kind: str) -> None:
    """One forward and backward pass; each trained tensor that has a gradient has one of its device and dtype."""
    dtype = next(model.parameters()).dtype
    loss, _ = forward_step(iter([fake(batch_of(kind, config_of(args), dtype))]), model, args, FakeTimers())
    assert (loss.device, loss.dtype) == (CUDA, torch.float32)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(VISION):
            assert parameter.grad is not None, name
        if parameter.grad is not None:
            assert (parameter.grad.device, parameter.grad.dtype) == (CUDA, dtype), name
        parameter.grad = None


def config_of(args: Any) -> ModelConfig:
    return vars(args)  # type: ignore[return-value]


def answer(model: Any, args: Any) -> None:
    """Two questions, one with a picture, in the engine: both contexts, then two tokens more of each."""
    tokenizer = SimpleNamespace(eos_token_id=90, pad_token_id=3)
    engine = Engine(model.eval(), tokenizer, rows=2, positions=80)  # type: ignore[arg-type]
    side = args.eva_args["image_size"][0]
    context = sample(config_of(args), 42, 0)["input_ids"]
    for image in (torch.zeros(1, 3, side, side, device=CUDA), None):
        engine.submit(Question(context[: 40 + 2 * (image is None)], 3, image))
    for _ in range(3):
        engine.step()
    assert [len(row.ids) for row in engine.active] == [3, 3]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """The fake GPU, with the attention that torch takes on a real one; the engine is told each token that it waits for."""
    from model.inference import engine

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(engine, "next_tokens", lambda scores, *_: [7] * len(scores))
    with fake_gpu() as memory:
        yield memory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_model_is_loaded_trained_saved_and_asked_on_a_gpu(gpu: Memory, method: str, dtype: str) -> None:
    model, args = on_gpu(TINY, dtype, **METHODS[method])
    assert {(p.device, p.dtype) for p in model.parameters()} == {(CUDA, DTYPES[dtype])}
    assert all(buffer.device == CUDA for buffer in model.buffers())
    for kind in KINDS:
        step(model, args, kind)
    model.transformer.checkpoint_activations = True
    step(model, args, "features")
    model.transformer.checkpoint_activations = False
    saved = weights.trained_weights(model)
    assert saved
    assert all(tensor.device.type == "cpu" for tensor in saved.values())
    assert model.tensors()["transformer.layers.0.mlp.dense_h_to_4h.weight".replace(".weight", ".bias")].device == CUDA
    answer(model, args)
    if "train_parts" not in METHODS[method]:
        model.get_mixin("eva").model.send_away(is_kept=True)
        assert not any(p.device == CUDA for p in model.get_mixin("eva").model.vit.parameters())
        model.to(CUDA)  # DeepSpeed does that
        assert not any(p.device == CUDA for p in model.get_mixin("eva").model.vit.parameters())
        step(model.train(), args, "features")
