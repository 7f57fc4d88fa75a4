"""What only a GPU can show: `scripts/test.sh --gpu` runs it, where there is one."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, FakeTimers, golden_values, load_model, printed_losses, run_python

from model.cli.options import parse
from model.data.dataset import data_collator
from model.data.tokenizer import ChatGLMTokenizer
from model.finetune import FineTuneVisualGLMModel
from model.frozen import Nf4Linear
from model.inference.engine import Engine, Question
from model.inference.load import load_for_answering
from model.inference.quantize import Int8Linear
from model.training.dry_run import device_of
from model.training.memory import Batch, Setup, activation_bytes
from model.training.step import forward_step, get_batch, loss_sum, next_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="scripts/test.sh --gpu runs it, on a GPU"),
]

TINY = PROJECT / "model/tiny"
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


@pytest.mark.parametrize("rows", [1, 3, 16, 300])
@pytest.mark.parametrize("kind", [Nf4Linear, Int8Linear])
def test_product_with_a_packed_weight_is_that_with_the_unpacked_one(kind: Any, rows: int) -> None:
    weight, bias = torch.randn(1000, 256, device="cuda"), torch.randn(1000, device="cuda", dtype=torch.float16)
    linear = kind(256, 1000, bias, torch.float16).to("cuda")
    linear.pack(weight)
    x = torch.randn(2, rows, 256, device="cuda", dtype=torch.float16)
    expected = x.float() @ linear.weight_in_full().float().T + bias.float()
    with torch.no_grad():
        difference = linear(x).float() - expected
    assert difference.norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize(
    "flags", [{"dtype": name} for name in DTYPES] + [{"dtype": "fp16", "quant": bits} for bits in (8, 4)]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_recorded_pass_gives_the_scores_of_a_plain_one(flags: dict[str, Any], rows: int) -> None:
    """From 128 keys on to 256, with rows of several lengths."""
    model, tokenizer = load_for_answering(TINY, **flags)
    ids = tokenizer.encode("问：背景里有什么内容？\n答：")
    questions = [Question(ids[:1] * (90 - 7 * row) + ids) for row in range(rows)]
    recording, plain = Engine(model, tokenizer, rows, 300), Engine(model, tokenizer, rows, 300)
    assert recording.graphs
    plain.graphs = None
    with torch.no_grad():
        for engine in (recording, plain):
            for question in questions:
                engine.submit(question)
            engine._read_contexts(engine._start())
        for token in range(100, 150):
            for answer in (*recording.active, *plain.active):
                answer.ids.append(token)
            found, expected = recording._read_tokens().float(), plain._read_tokens().float()
            assert (found - expected).norm() < (3e-2 if flags["dtype"] == "bf16" else 1e-2) * expected.norm()
    assert not recording.graphs.refused
    assert len(recording.graphs.met) == 2
    assert all(recording.graphs.met.values())


def test_recorded_passes_answer_as_plain_ones(upstream_checkpoint: Path) -> None:
    """Rows that come, go and move, in float32, token by token."""
    model = load_model(upstream_checkpoint).to("cuda").requires_grad_(False)
    tokenizer = ChatGLMTokenizer.from_pretrained(upstream_checkpoint)
    context = [563, 775, 2685, *[3] * 32, 859, 86, 88, 89]
    questions = [Question(context, max_length=len(context) + 5 + 9 * (row % 4)) for row in range(12)]
    recording, plain = Engine(model, tokenizer, 4, 128), Engine(model, tokenizer, 4, 128)
    plain.graphs = None
    answers = [{number: answer.ids for number, answer in engine.answers(questions)} for engine in (recording, plain)]
    assert answers[0] == answers[1]
    assert recording.graphs
    assert not recording.graphs.refused
    assert any(recording.graphs.met.values())


# --- whole commands ---------------------------------------------------------------------------------------------------

HELD_OUT = ("--data", PROJECT / "fewshot-data/heldout.json")


def trained(folder: Path, *flags: str) -> Any:
    """A run over the few-shot rows from the small model that ships with the project."""
    done = run_python(
        PROJECT / "finetune_visualglm.py", "--from_pretrained", TINY, "--mode", "finetune", "--train-data",
        PROJECT / "fewshot-data/dataset.json", "--auto_warmup_steps", "0", "--lr", "0.01", "--save", folder, *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.run
@pytest.mark.parametrize(
    "flags",
    [
        "--use_lora",
        *(f"--use_lora --fp16 --zero-stage {stage}" for stage in range(4)),
        "--use_lora --bf16 --zero-stage 3 --checkpoint-activations",
        "--use_lora --fp16 --train_parts qformer=0.0001 --lora_dropout 0.1",
        "--use_qlora --fp16 --zero-stage 1",
        "--use_qlora --bf16 --packing --gradient-accumulation-steps 2",
    ],
)
def test_run_learns_and_its_checkpoint_answers(flags: str, tmp_path: Path) -> None:
    done = trained(tmp_path, *flags.split(), "--train-iters", "60", "--answers", "0")
    losses = printed_losses(done.stdout)
    assert losses[0] > 2
    assert statistics.mean(losses[-5:]) < 0.1
    assert "Warning" not in done.stderr
    answers = run_python(PROJECT / "scripts/evaluate.py", "--from_pretrained", *tmp_path.iterdir(), *HELD_OUT)
    assert answers.returncode == 0, answers.stderr
    right = int(answers.stdout.splitlines()[-1].removeprefix("answers right: ").removesuffix("/50"))
    assert right >= 48


@pytest.mark.run
def test_p_tuning_in_fp16_learns(tmp_path: Path) -> None:
    losses = printed_losses(trained(tmp_path, "--use_ptuning", "--fp16", "--lr", "0.1", "--train-iters", "60").stdout)
    assert losses[0] > 2
    assert statistics.mean(losses[-5:]) < 0.1


@pytest.mark.run
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_run_in_fp16_that_goes_on_has_the_losses_of_the_whole_run(method: str, tmp_path: Path) -> None:
    flags = (f"--use_{method}", "--fp16", "--zero-stage", "1", "--answers", "0")
    whole = trained(tmp_path, *flags, "--train-iters", "6", "--save-interval", "3")
    [checkpoint] = tmp_path.iterdir()
    (checkpoint / "latest").write_text("3")  # as if it had been killed after its first save
    cut = run_python(PROJECT / "finetune_visualglm.py", "--resume", checkpoint)
    assert cut.returncode == 0, cut.stderr
    assert printed_losses(cut.stdout) == pytest.approx(printed_losses(whole.stdout)[3:], rel=1e-3)
    assert "loss scale 65536" in cut.stdout


@pytest.mark.run
def test_answers_are_those_of_the_cpu_in_every_number_format(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run"
    trained(checkpoint, "--use_lora", "--train-iters", "60", "--answers", "0")

    def results(name: str, *flags: str, **environment: str) -> dict[str, Any]:
        command = (PROJECT / "scripts/evaluate.py", "--from_pretrained", *checkpoint.iterdir(), *HELD_OUT)
        done = run_python(*command, *flags, "--out", tmp_path / name, **environment)
        assert done.returncode == 0, done.stderr
        assert "more slowly" not in done.stderr
        return json.loads((tmp_path / name).read_text())

    on_cpu = results("cpu", "--dtype", "fp32", CUDA_VISIBLE_DEVICES="")
    on_gpu = results("gpu", "--dtype", "fp32")
    assert [row["answer"] for row in on_gpu["results"]] == [row["answer"] for row in on_cpu["results"]]
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], abs=1e-4)
    for flags in (("--dtype", "fp16"), ("--dtype", "bf16"), ("--quant", "8"), ("--quant", "4")):
        assert results("-".join(flags), *flags)["loss"] == pytest.approx(on_cpu["loss"], abs=0.05)
