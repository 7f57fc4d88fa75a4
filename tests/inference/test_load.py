"""Loading a checkpoint of any kind to ask it."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import load_model, write_tuned

from model import cpu
from model.checkpoints.layout import Checkpoint
from model.convert.huggingface import convert
from model.convert.merge_lora import merge
from model.cpu import PrepackedLinear, RowsLinear, has_onednn, pack_linears
from model.errors import InputError
from model.frozen import FrozenLinear
from model.inference import load
from model.inference.load import DTYPES, NumberFormat, chosen_format, image_size, load_for_answering
from model.visualglm import VisualGLMModel, without_memory
from scripts.dev.shapes import SHAPES

INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


def test_load_for_answering_of_a_base_gives_a_plain_model_in_eval_mode(upstream_checkpoint: Path) -> None:
    model, tokenizer = load_for_answering(str(upstream_checkpoint))
    assert type(model).__name__ == "VisualGLMModel"
    assert not model.training
    assert tokenizer.vocab_file == str(upstream_checkpoint / "ice_text.model")


@pytest.mark.slow
@torch.no_grad()
def test_load_for_answering_takes_a_checkpoint_that_was_found_before(upstream_checkpoint: Path, tmp_path: Path) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    found, _ = load_for_answering(Checkpoint.find(tuned))
    by_name, _ = load_for_answering(str(tuned))
    assert torch.equal(found(input_ids=INPUT_IDS)[0], by_name(input_ids=INPUT_IDS)[0])


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_load_for_answering_of_an_adapter_or_full_checkpoint_gives_a_model_with_adapters(
    upstream_checkpoint: Path, tmp_path: Path, full: bool
) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", full=full, use_lora=True, lora_rank=2)
    assert type(load_for_answering(str(tuned))[0]).__name__ == "FineTuneVisualGLMModel"


@pytest.mark.slow
def test_load_for_answering_of_a_merged_checkpoint_gives_a_plain_model(
    upstream_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    merged = merge(str(tuned), str(tmp_path / "merged"))
    assert type(load_for_answering(merged)[0]).__name__ == "VisualGLMModel"


def test_load_for_answering_when_nothing_is_there_says_where_it_looked() -> None:
    with pytest.raises(InputError, match=r"^--from_pretrained nowhere: no such folder"):
        load_for_answering("nowhere")


FORMATS = [("fp32", None), ("bf16", None), ("fp16", None), ("fp32", 8), ("bf16", 8), ("fp32", 4), ("bf16", 4)]


def kinds_of(model: torch.nn.Module) -> set[str]:
    """Which kinds of FrozenLinear are in it, but for those at full width, in the form that the processor likes."""
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, FrozenLinear)}
    return kinds - {"PrepackedLinear", "RowsLinear"}


@torch.no_grad()
def scores(model: torch.nn.Module) -> torch.Tensor:
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    input_ids = torch.cat((INPUT_IDS[:, :1], torch.full((1, 32), 3), INPUT_IDS[:, 1:]), 1)
    return model(input_ids=input_ids, image=pixels, pre_image=1)[0].float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "base",
        "lora",
        "qlora",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("ptuning", "full", "huggingface")),
    ],
)
def test_every_number_format_of_every_checkpoint_is_near_full_width(
    upstream_checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    checkpoint = {
        "base": lambda: upstream_checkpoint,
        "lora": lambda: write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2),
        "ptuning": lambda: write_tuned(upstream_checkpoint, tmp_path / "tuned", use_ptuning=True, pre_seq_len=4),
        "full": lambda: write_tuned(upstream_checkpoint, tmp_path / "tuned", full=True, use_lora=True, lora_rank=2),
        "qlora": lambda: write_tuned(upstream_checkpoint, tmp_path / "tuned", use_qlora=True, lora_rank=2),
        "huggingface": lambda: convert(str(upstream_checkpoint), str(tmp_path / "hf"), "hf"),
    }[layout]()
    expected = scores(load_for_answering(checkpoint)[0])
    for dtype, quant in FORMATS:
        model, _ = load_for_answering(checkpoint, dtype=dtype, quant=quant)
        in_layers = {4: {"Int4Linear"}, 8: set(), None: {"Nf4Linear"} if layout == "qlora" else set()}[quant]
        assert kinds_of(model) == in_layers | ({"Int8Linear", "Int8Embedding"} if quant else set())
        assert {parameter.dtype for parameter in model.parameters()} == {DTYPES[dtype]}
        bound = {8: 0.03, 4: 0.2, None: 0.02}[quant]
        assert relative_error(scores(model), expected) < bound, (dtype, quant)


@pytest.mark.slow
def test_lora_in_4_bits_is_the_quantised_base_with_exact_factors_beside(
    upstream_checkpoint: Path, tmp_path: Path
) -> None:
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    whole, quantised = (load_for_answering(tuned, quant=quant)[0].state_dict() for quant in (None, 4))
    factors = [name for name in whole if "matrix_" in name]
    assert factors
    assert all(torch.equal(whole[name], quantised[name]) for name in factors)


@pytest.mark.slow
def test_float32_of_auto_has_the_numbers_of_the_checkpoint(upstream_checkpoint: Path) -> None:
    automatic, asked = (load_for_answering(upstream_checkpoint, dtype=dtype)[0] for dtype in ("auto", "fp32"))
    plain = load_model(upstream_checkpoint)
    pack_linears(plain.requires_grad_(False))
    for model in (automatic, asked):
        assert torch.equal(scores(model), scores(plain))


@pytest.mark.slow
@pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="about a CPU's bfloat16")
@pytest.mark.parametrize(("amx", "kind"), [(True, RowsLinear), (False, PrepackedLinear)])
def test_language_model_in_bfloat16_keeps_its_rows_where_there_is_amx_and_the_vision_part_is_packed(
    upstream_checkpoint: Path, tmp_path: Path, amx: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    model, _ = load_for_answering(tuned, dtype="bf16")
    vision = model.get_mixin("eva")
    kinds = {part: {type(module) for module in part.modules()} for part in (model.transformer, vision)}
    assert kinds[model.transformer] & {RowsLinear, PrepackedLinear} == {kind}
    assert kinds[vision] & {RowsLinear, PrepackedLinear} == {PrepackedLinear}
    assert type(model.get_mixin("chatglm-final").lm_head) is kind


def test_quant_without_the_kernels_is_refused_in_a_sentence(
    upstream_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "has_low_bit_kernels", lambda: False)
    with pytest.raises(InputError, match=r"--quant 4: torch .* lacks the kernels for it; torch 2\.13\.0 is needed"):
        load_for_answering(str(upstream_checkpoint), quant=4)


GIB = 2**30


@pytest.mark.parametrize(
    ("free", "found"),
    [
        (40 * GIB, NumberFormat("bf16")),
        (17 * GIB, NumberFormat("bf16")),
        (12 * GIB, NumberFormat("bf16", 8)),
        (7 * GIB, NumberFormat("bf16", 4)),
    ],
)
def test_auto_takes_the_widest_format_of_the_6b_that_fits_and_says_so(
    free: int, found: NumberFormat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "has_onednn", lambda dtype: True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert chosen_format(empty_6b(), "auto", None, torch.device("cpu")) == found
    assert capsys.readouterr().err.startswith(f"--dtype auto: {found}, which is fast here and fits: ")


def test_auto_without_memory_for_any_format_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * GIB))
    with pytest.raises(InputError, match=r"4\.0 GiB of memory free; 6\.\d GiB are needed for this model in 4 bits"):
        chosen_format(empty_6b(), "auto", None, torch.device("cpu"))


@functools.cache
def empty_6b() -> torch.nn.Module:
    """The 6B's shape without memory."""
    args = VisualGLMModel.get_args(**copy.deepcopy(SHAPES["6b"]), skip_init=True, device="meta")
    with without_memory():
        return VisualGLMModel(args)


def test_image_size_is_that_of_the_vision_tower(upstream_checkpoint: Path) -> None:
    assert image_size(load_for_answering(str(upstream_checkpoint))[0]) == 224
