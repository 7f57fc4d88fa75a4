"""Loading, training, saving and answering rehearsed on a GPU that isn't there (`fake_gpu`), and its memory counted.

What a rehearsal can find is planted: fifteen mistakes, each of which must be found.
"""

import argparse
import copy
import itertools
import json
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GOLDEN, PROJECT, FakeTimers, write_checkpoint
from fake_gpu import CUDA, GIB, FakeRecorder, Memory, fake_gpu, fake_tensor, fused_attention, with_numbers

from model import attention
from model.adapter_config import AdapterConfig
from model.blip2 import BLIP2, BlipImageEvalProcessor
from model.checkpoints import save, weights
from model.checkpoints.layout import Checkpoint, ModelConfig
from model.checkpoints.metadata import VISION, Base
from model.checkpoints.tensors import LazyTensor, LazyTensors
from model.data.dataset import data_collator, packed_collator
from model.data.lengths import packed_shape
from model.finetune import FineTuneVisualGLMModel
from model.frozen import Nf4Linear, dequantized, quantized
from model.inference import cuda_graph, load, seen_images, token_pass
from model.inference import engine as engine_module
from model.inference.cuda_graph import TokenGraphs
from model.inference.engine import Engine, Question
from model.inference.sampling import Sampling, drawn_tokens
from model.lora import LoraLinear
from model.loss import head_loss
from model.training import sat_loop
from model.training import step as step_module
from model.training.memory import CUDA_ITSELF, Batch, Setup, estimate, optimizer_bytes
from model.training.metrics import TrainingReport
from model.training.step import forward_step
from model.visualglm import VisualGLMModel, without_memory
from scripts.dev.shapes import SHAPES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METHODS = {
    "lora": {"use_lora": True, "layer_range": [0], "lora_rank": 4, "lora_dropout": 0.1},
    "lora everywhere": {
        "use_lora": True,
        "lora_target": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    },
    "qlora": {"use_qlora": True, "layer_range": [0], "lora_rank": 4},
    "ptuning": {"use_ptuning": True, "pre_seq_len": 4},
    "lora and vision": {"use_lora": True, "train_parts": ["vit=1e-5", "qformer", "glm_proj"]},
}
KINDS = ("images", "features", "no images", "some images", "packed")

pytestmark = pytest.mark.usefixtures("process_group")  # a real run has made it before it builds a model


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory, upstream_config: dict, process_group: None) -> Path:
    """A checkpoint with as few layers as show everything: fake tensors take Python's time, operation by operation."""
    config = copy.deepcopy(upstream_config) | {"num_layers": 2}
    config["eva_args"]["num_layers"] = 1
    config["qformer_args"] |= {"num_layers": 2, "is_decoder": [True, False]}
    like = tensors_of(config)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in like.items()}
    return write_checkpoint(tmp_path_factory.mktemp("smallest") / "smallest", config, weights)


def config_in(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "model_config.json").read_text())


def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors of a base with this config, on the meta device."""
    args = argparse.Namespace(**{**vars(VisualGLMModel.get_args()), **copy.deepcopy(config)})
    with without_memory():
        return VisualGLMModel(args, params_dtype=torch.float32).state_dict()


def on_gpu(checkpoint: Path | Checkpoint, dtype: str, complete: bool = True, **flags: Any) -> tuple[Any, Any]:
    """A checkpoint's model loaded onto the fake GPU as a run loads it, and SAT's namespace."""
    args = FineTuneVisualGLMModel.get_args(skip_init=True, hidden_dropout=0.1, attention_dropout=0.1, lr=1e-4, **flags)
    vars(args).update(device="cuda:0", mode="finetune", fp16=dtype == "fp16", bf16=dtype == "bf16", bad_rows="error")
    model, args = FineTuneVisualGLMModel.from_pretrained(checkpoint, args, language_later=True)
    if complete:
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


def step(model: Any, args: Any, kind: str, memory: Memory) -> None:
    """One forward and backward pass without a wait; each trained tensor has a gradient of its own device and dtype."""
    dtype = model.transformer.word_embeddings.weight.dtype
    memory.refuses_waits = True
    loss, _ = forward_step(iter([fake(batch_of(kind, config_of(args), dtype))]), model, args, FakeTimers())
    assert (loss.device, loss.dtype) == (CUDA, torch.float32)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(VISION):
            assert parameter.grad is not None, name
        if parameter.grad is not None:
            assert (parameter.grad.device, parameter.grad.dtype) == (CUDA, dtype), name
        parameter.grad = None
    memory.refuses_waits = False


def config_of(args: Any) -> ModelConfig:
    return vars(args)  # type: ignore[return-value]


def answer(model: Any, args: Any) -> None:
    """Two questions, one with a picture, in the engine: both contexts, then three tokens more of each, the last from a graph."""
    tokenizer = SimpleNamespace(eos_token_id=90, pad_token_id=3)
    engine = Engine(model.eval(), tokenizer, rows=2, positions=80)  # type: ignore[arg-type]
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    assert (engine.graphs is None) == is_trained
    engine.graphs = TokenGraphs(engine.cache, engine.token_pass)
    side = args.eva_args["image_size"][0]
    context = sample(config_of(args), 42, 0)["input_ids"]
    for image in (torch.zeros(1, 3, side, side, device=CUDA), None):
        engine.submit(Question(context[: 40 + 2 * (image is None)], 3, image))
    for _ in range(4):
        engine.step()
    assert [len(row.ids) for row in engine.active] == [4, 4]
    assert not engine.graphs.refused


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """The fake GPU, with the attention that torch takes on a real one.

    The engine is told what it waits for: each token, and which picture it sees.
    """
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(engine_module, "next_tokens", lambda scores, *_: [7] * len(scores))
    monkeypatch.setattr(seen_images, "digest", lambda _: b"a picture")
    with fake_gpu() as memory:
        monkeypatch.setattr(cuda_graph, "Recorder", partial(FakeRecorder, memory))
        yield memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype"),
    [case for case in itertools.product(METHODS, DTYPES) if case[0] != "lora everywhere" or case[1] == "fp16"],
)
def test_model_is_loaded_trained_saved_and_asked_on_a_gpu(gpu: Memory, smallest: Path, method: str, dtype: str) -> None:
    model, args = on_gpu(smallest, dtype, **METHODS[method])
    assert {(p.device, p.dtype) for p in model.parameters()} == {(CUDA, DTYPES[dtype])}
    assert all(buffer.device == CUDA for buffer in model.buffers())
    for kind in KINDS:
        step(model, args, kind, gpu)
    model.transformer.checkpoint_activations = True
    step(model, args, "features", gpu)
    model.transformer.checkpoint_activations = False
    saved = save.weights_to_save(model, full=False)
    assert saved
    assert all(tensor.device.type == "cpu" for tensor in saved.values())
    answer(model, args)
    if "train_parts" not in METHODS[method]:
        model.get_mixin("eva").model.send_away(is_kept=True)
        assert not any(p.device == CUDA for p in model.get_mixin("eva").model.vit.parameters())
        model.to(CUDA)  # DeepSpeed does that
        assert not any(p.device == CUDA for p in model.get_mixin("eva").model.vit.parameters())
        step(model.train(), args, "features", gpu)


def test_drawing_tokens_does_not_wait_for_the_device() -> None:
    samplings = [Sampling(), Sampling(top_k=0), Sampling(temperature=0, invalid_slices=(slice(0, 9),))]
    with fake_gpu() as memory:
        memory.refuses_waits = True
        answers, by_chance = [[5, 7], []], [None, None]
        drawn = [drawn_tokens(torch.randn(2, 100, device=CUDA), sampling, answers, by_chance) for sampling in samplings]
        assert [(tokens.shape, tokens.dtype, tokens.device) for tokens in drawn] == [((2,), torch.int64, CUDA)] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("lora", "fp32"), ("qlora", "fp16"), ("ptuning", "fp16")])
def test_script_in_the_manner_of_2023_trains_on_a_gpu(
    gpu: Memory, smallest: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    """Its own model, batch and forward step; SAT's and DeepSpeed's part is as in our runs."""
    monkeypatch.setattr(sat_loop, "stay_adapted", lambda: None)  # until this test ends only
    monkeypatch.chdir(GOLDEN / "upstream")
    hooks = sat_loop.Hooks(weights.load_checkpoint, save.save_checkpoint, TrainingReport())
    with sat_loop.adapted(hooks):
        script = SimpleNamespace(**runpy.run_path(str(PROJECT / "tests" / "programs" / "script_of_2023.py")))
        monkeypatch.setattr(script.mpu, "broadcast_data", sent_to_the_gpu)
        lengths = {"max_source_length": 64, "max_target_length": 64}
        args = FineTuneVisualGLMModel.get_args(skip_init=True, **lengths, **METHODS[method])
        vars(args).update(device="cpu", mode="finetune", fp16=dtype == "fp16")
        model, args = script.MyModel.from_pretrained(smallest, args)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        model = model.to(CUDA).train()
        model.disable_untrainable_params()
        processor = BlipImageEvalProcessor(args.eva_args["image_size"][0])
        rows = with_numbers(script.Rows)("dataset.json", processor, tokenizer, args)
        batch = with_numbers(script.data_collator)(rows[:2])
        loss, _ = script.forward_step(iter([batch]), model, args, FakeTimers())
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert len(gradients) == (2 if method == "ptuning" else 8)
    assert {(gradient.device, gradient.dtype) for gradient in gradients} == {(CUDA, DTYPES[dtype])}


def sent_to_the_gpu(keys: Sequence[str], data: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """SAT's `broadcast_data` to one process: it reads sizes back from the GPU, of which a fake one has none."""
    assert {data[key].dtype for key in keys} == {dtype}
    return {key: fake_tensor(data[key]).to(CUDA) for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quant"), [("fp16", None), ("bf16", 8), ("fp16", 4)])
def test_checkpoint_is_loaded_to_answer_on_a_gpu_in_every_number_format(
    gpu: Memory, smallest: Path, dtype: str, quant: int | None
) -> None:
    model, _ = load.load_for_answering(smallest, quant=quant, dtype=dtype)
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {CUDA}
    assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
    answer(model, SimpleNamespace(**config_in(smallest)))


def test_what_was_trained_in_nf4_is_rounded_to_it_on_the_gpu(
    gpu: Memory, smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.find(smallest)
    tuned = {"use_qlora": True, "lora_rank": 4, "layer_range": [0]}
    checkpoint = replace(base, config={**base.config, **tuned})  # type: ignore[typeddict-item]
    model, _ = load.empty_model(checkpoint, None, False)
    name, linear = next((name, part) for name, part in model.named_modules() if isinstance(part, Nf4Linear))
    convert = load.conversion(model, load.NumberFormat("fp16", 4), CUDA)
    rounded: list[torch.device] = []
    monkeypatch.setattr(load, "quantized", lambda weight: rounded.append(weight.device) or quantized(weight))
    weight = fake_tensor(torch.zeros(linear.out_features, linear.in_features, dtype=torch.float16))
    assert convert(f"{name}.weight", weight).device == CUDA
    assert rounded == [CUDA]


# --- the true 6B ------------------------------------------------------------------------------------------------------


@pytest.fixture
def of_the_6b(gpu: Memory, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """The base of the 6B shape, in fp16, without numbers, as if it lay on a disk."""
    config = copy.deepcopy(SHAPES["6b"])
    like = tensors_of(config)
    lazy = LazyTensors(
        {
            name: LazyTensor(
                tuple(tensor.shape), torch.float16, partial(torch.empty, tensor.shape, dtype=torch.float16)
            )
            for name, tensor in sorted(like.items(), key=lambda entry: -entry[1].numel())
        }
    )
    monkeypatch.setattr(weights, "whole_weights", lambda *_: (lazy, Base("6b", "6b", ""), set()))
    monkeypatch.setattr(weights, "read_one_by_one", lambda given, *_: given)
    return Checkpoint("6b", Path("6b"), "1", config)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counted:
    """A step whose memory is counted: rows of so many tokens, of which few are supervised or all but a short question's."""

    rows: int
    tokens: int
    learned: int = 13
    recomputed: bool = False
    packed: bool = False

    @property
    def batch(self) -> Batch:
        packs, seq = packed_shape([self.tokens] * self.rows) if self.packed else (0, self.tokens)
        return Batch(self.rows, seq, self.rows * self.learned, images=0, packs=packs)


LONG = 320 - 40  # tokens of a row's answer, beside the picture and a short question
COUNTED = [Counted(1, 56), Counted(4, 320, LONG), Counted(4, 320, LONG, True), Counted(70, 56, packed=True)]
COUNTED_BESIDES = [Counted(1, 320, LONG), Counted(4, 56)]
RECIPE = {"lora_rank": 10, "layer_range": [0, 14], "pre_seq_len": 4, "lora_dropout": 0.1}
GIB_AT_MOST = {"lora": 13.0, "qlora": 5.3, "ptuning": 13.0}  # for the first of them: a T4 has 15, small cards have 6


def with_features(config: ModelConfig, case: Counted) -> dict[str, Any]:
    """The batch of a case, whose pictures have been looked at."""
    row = with_numbers(sample)(config, case.tokens, case.learned, "image_features", torch.float16)
    return fake(with_numbers(packed_collator if case.packed else data_collator)([row] * case.rows))


def loaded_as_in_a_run(memory: Memory, base: Checkpoint, **flags: Any) -> tuple[Any, Any]:
    """Vision first, which leaves when it has looked at all pictures; then the language model."""
    model, args = on_gpu(base, "fp16", complete=False, **flags)
    vision = model.get_mixin("eva").model
    with torch.no_grad():
        vision.features(
            torch.zeros(16, 3, 224, 224, device=CUDA, dtype=torch.float16)
        )  # as many as are looked at at once
    assert 1.9 < memory.now / GIB < 2.2
    vision.send_away(is_kept=False)
    model.finish_loading()
    model.freeze()
    return model.train(), args


def trained_step(model: Any, args: Any, batch: dict[str, Any]) -> None:
    loss, _ = forward_step(iter([batch]), model, args, FakeTimers())
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def largest_beside(memory: Memory, tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes on the device beside what is there, at most, while each of the tensors is asked for, as a save does."""
    memory.reset()
    before = memory.now
    for name in tensors:
        assert tensors[name].device == CUDA or name.startswith(VISION)  # which has left
    return memory.peak - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "cases"),
    [
        ("qlora", COUNTED),
        *(
            pytest.param(method, [*COUNTED, *COUNTED_BESIDES], marks=pytest.mark.long)
            for method in ("lora", "qlora", "ptuning")
        ),
    ],
)
def test_6b_fits_small_gpus_and_its_memory_is_estimated_within_a_tenth(
    gpu: Memory, of_the_6b: Checkpoint, method: str, cases: list[Counted]
) -> None:
    config = of_the_6b.config
    config.update(hidden_dropout=0.1, attention_dropout=0.1)
    flags = {f"use_{method}": True, **RECIPE}
    setup = Setup(config, AdapterConfig.from_options(SimpleNamespace(**flags)), "fp16")
    model, args = loaded_as_in_a_run(gpu, of_the_6b, **flags)
    loaded, while_loading = gpu.now, gpu.peak
    whole = sum(tensor.numel() * 2 for tensor in tensors_of(of_the_6b.config).values())
    assert gpu.host_peak <= 0.2 * whole
    print(
        f"\n{method}, GiB: {loaded / GIB:.2f} loaded, {while_loading / GIB:.2f} while loading, {gpu.host_peak / whole:.2f} of the checkpoint in host memory"
    )
    peaks = []
    for case in cases:
        setup = replace(setup, recomputed=case.recomputed)
        told = estimate(setup, case.batch)
        gpu.reset()
        model.transformer.checkpoint_activations = case.recomputed
        trained_step(model, args, with_features(config, case))
        counted = gpu.peak + optimizer_bytes(setup)[1]
        estimated = sum(told.training.values()) - CUDA_ITSELF
        peaks.append((case, counted, estimated))
        print(f"{case}: {counted / GIB:.2f} counted, {estimated / GIB:.2f} estimated")
    assert max(while_loading, peaks[0][1]) / GIB <= GIB_AT_MOST[method]
    if method == "qlora":
        assert largest_beside(gpu, save.weights_to_save(model, full=True)) < 0.2 * GIB  # of 10.5 in full width
    assert 0.9 < (told.loading - CUDA_ITSELF) / while_loading < 1.1
    for case, counted, estimated in peaks:
        assert 0.9 < estimated / counted < 1.1, case
        assert estimated - loaded > 0.75 * (counted - loaded), case  # a step's share, too


@pytest.mark.parametrize("train_parts", [[], ["vit", "qformer", "glm_proj"]])
@pytest.mark.parametrize("method", ["lora", "qlora", "ptuning"])
def test_parameters_are_those_of_the_real_model(smallest: Path, method: str, train_parts: list[str]) -> None:
    flags = {**METHODS["lora everywhere"], "use_lora": False, f"use_{method}": True, "train_parts": train_parts}
    checkpoint = Checkpoint.find(smallest)
    given = {**flags, "lr": 1e-4, "skip_init": True}
    args = argparse.Namespace(**{**vars(FineTuneVisualGLMModel.get_args()), **given, **checkpoint.config})
    with without_memory():
        model = FineTuneVisualGLMModel(args, params_dtype=torch.float32)
    model.freeze()
    adapters = AdapterConfig.from_options(
        SimpleNamespace(**flags, lora_rank=args.lora_rank, pre_seq_len=args.pre_seq_len)
    )
    told = estimate(Setup(checkpoint.config, adapters), Batch(1, 50, 8, 0))
    linears = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    in_4_bits = sum(linear.in_features * linear.out_features for linear in linears)
    assert told.in_4_bits == in_4_bits
    assert told.parameters == sum(p.numel() for p in model.parameters()) + in_4_bits
    assert told.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- planted mistakes -------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def changed(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A mistake: what owner.name gives is changed."""

    def plant(patch: Patch) -> None:
        right = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **named: change(right(*args, **named)))

    return plant


def given(owner: Any, name: str, number: int, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """A mistake: what owner.name is given at a place, counted from 0, is changed."""

    def plant(patch: Patch) -> None:
        right = getattr(owner, name)

        def wrong(*args: Any, **named: Any) -> Any:
            return right(*args[:number], change(args[number]), *args[number + 1 :], **named)

        patch.setattr(owner, name, wrong)

    return plant


def state_left_behind(patch: Patch) -> None:
    def weight_in_full(linear: Nf4Linear) -> torch.Tensor:
        linear.state.absmax = linear.state.absmax.cpu()
        return dequantized(linear.packed, linear.state, linear.dtype)

    patch.setattr(Nf4Linear, "weight_in_full", weight_in_full)


def drawn_in_float32(patch: Patch) -> None:
    right = LoraLinear.draw

    def draw(linear: LoraLinear, device: torch.device) -> None:
        right(linear, device)
        linear.matrix_A.float()

    patch.setattr(LoraLinear, "draw", draw)


def drawn_on_the_cpu(owner: Any) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        right = owner.draw
        patch.setattr(owner, "draw", lambda module, device: right(module, torch.device("cpu")))

    return plant


def answers_left_on_the_cpu(patch: Patch) -> None:
    right = step_module.on_device
    patch.setattr(step_module, "on_device", lambda batch, args: right(batch, args) | {"answers": batch["answers"]})


def looks_at_the_mask(patch: Patch) -> None:
    right = attention.FusedAttentionMixin.bias

    def bias(mixin: Any, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        return None if mask.all() else right(mixin, mask, dtype)

    patch.setattr(attention.FusedAttentionMixin, "bias", bias)


def finds_positions_on_the_device(patch: Patch) -> None:
    patch.setattr(
        step_module, "head_loss", lambda hidden, head, answers: head_loss(hidden, head, answers[answers >= 0])
    )


def vision_sent_away(patch: Patch) -> None:
    right = FineTuneVisualGLMModel.freeze

    def freeze(model: Any) -> None:
        right(model)
        model.get_mixin("eva").model.send_away(is_kept=True)

    patch.setattr(FineTuneVisualGLMModel, "freeze", freeze)


def a_query_too_many(batch: dict[str, Any]) -> dict[str, Any]:
    return batch | {"image_features": torch.cat([batch["image_features"], batch["image_features"][:, :1]], dim=1)}


MISTAKES: dict[str, tuple[str, str, Callable[[Patch], None], str]] = {  # method, kind of batch, mistake, what is found
    "the mask stays on the CPU": (
        "lora", "features", changed(VisualGLMModel, "get_inputs", lambda got: (got[0].cpu(), got[1])), "waits",
    ),
    "the positions stay on the CPU": (
        "lora", "features", changed(VisualGLMModel, "get_inputs", lambda got: (got[0], torch.zeros(got[1].shape).long())),
        "device",
    ),
    "the loss is read": ("lora", "features", changed(step_module, "head_loss", lambda loss: loss * loss.item()), "item|scalar"),
    "the loss is copied": ("lora", "features", changed(step_module, "head_loss", lambda loss: loss + loss.cpu()), "waits"),
    "attention looks at the mask": ("lora", "features", looks_at_the_mask, "scalar"),
    "positions are searched for on the device": ("lora", "features", finds_positions_on_the_device, "nonzero"),
    "images stay in float32": ("lora", "images", given(BLIP2, "features", 1, lambda image: image.float()), "type"),
    "angles stay in float32": (
        "lora", "features", changed(attention, "rotary_rows", lambda rows: tuple(row.float() for row in rows)), "dtype",
    ),
    "the bias of the mask stays in float32": (
        "lora", "features", changed(attention, "score_bias", lambda bias: bias.float()), "dtype",
    ),
    "a layer norm gets float32": (
        "lora", "features", given(torch.nn.functional, "layer_norm", 0, lambda x: x.float()), "dtype",
    ),
    "factors are drawn in float32": ("lora", "features", drawn_in_float32, "dtype"),
    "factors stay on the CPU": ("lora", "features", drawn_on_the_cpu(LoraLinear), "device"),
    "a prefix stays on the CPU": ("ptuning", "features", drawn_on_the_cpu(attention.PrefixMixin), "device"),
    "the scales of 4 bits stay on the CPU": ("qlora", "features", state_left_behind, "devices|waits"),
    "the answers stay on the CPU": ("lora", "features", answers_left_on_the_cpu, "device"),
    "the vision part is away": ("lora", "images", vision_sent_away, "device"),
    "a picture has a query too many": ("lora", "features", changed(step_module, "on_device", a_query_too_many), "shape|size"),
}  # fmt: skip


BEFORE_LOADING = (drawn_in_float32, vision_sent_away)  # and all that is drawn on the CPU
LOADED: dict[str, tuple[Memory, Any, Any]] = {}  # by method: mistakes of a step share one


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistake_is_found(smallest: Path, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, kind, plant, found = MISTAKES[mistake]
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", fused_attention)
    is_of_a_step = plant not in BEFORE_LOADING and "drawn_on_the_cpu" not in plant.__qualname__
    if is_of_a_step:
        if method not in LOADED:
            with fake_gpu() as memory:
                LOADED[method] = memory, *on_gpu(smallest, "fp16", **METHODS[method])
        memory, model, args = LOADED[method]
    plant(monkeypatch)
    with fake_gpu(memory if is_of_a_step else None) as gpu:
        if not is_of_a_step:
            model, args = on_gpu(smallest, "fp16", **METHODS[method])
        with pytest.raises((RuntimeError, ValueError), match=found):
            step(model, args, kind, gpu)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [lambda ids: ids + torch.zeros(ids.shape, device="cpu").to(CUDA).long(), lambda ids: ids * ids.max().item()],
)
def test_mistake_in_a_recorded_pass_is_found(
    gpu: Memory, smallest: Path, mistake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = on_gpu(smallest, "fp16", **METHODS["lora"])
    monkeypatch.setattr(token_pass, "answer_position_ids", lambda *_: mistake(torch.ones(2, 2, 1, device=CUDA).long()))
    with pytest.raises((AssertionError, RuntimeError), match=r"refused|scalar|item"):
        answer(model, args)
