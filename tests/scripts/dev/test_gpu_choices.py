"""What only a GPU can decide: every measurement runs here too, at sizes at which its numbers mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from scripts.dev import benchmark, gpu_choices

CPU = torch.device("cpu")


def test_attention_is_measured_at_every_length_and_the_setting_is_left_alone() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    found = list(gpu_choices.attention_choices(CPU, torch.float32, heads=1))
    assert [choice.what.split()[-3] for choice in found] == ["64", "192", "320"]
    assert all("gradients finite" in choice.found for choice in found)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.slow
def test_products_of_4_bits_are_measured_for_every_number_of_rows() -> None:
    found = list(gpu_choices.product_choices(CPU, torch.float32, hidden=64))
    assert len(found) == len(gpu_choices.ROWS_OF_PRODUCTS)


@pytest.mark.parametrize(("ours", "verdict"), [(0.5, "as it is"), (2.0, "slower than released")])
def test_rows_of_the_benchmark_are_read_and_judged(tmp_path: Path, ours: float, verdict: str) -> None:
    sides = {"released": {"seconds per step": 1.0}, "ours": {"seconds per step": ours, "GPU GiB": 12.5}}
    (tmp_path / "few-shot.json").write_text(json.dumps({**sides, "ratio": 1 / ours}))
    (tmp_path / "ablation.json").write_text(json.dumps({"all savings": 1.0}))
    [choice] = gpu_choices.speed_choices(tmp_path)
    assert choice.what == "step of few-shot"
    assert choice.verdict.startswith(verdict)


@pytest.mark.long
def test_compiling_is_measured() -> None:
    assert gpu_choices.compile_choice(CPU, torch.float32, hidden=64).what == "torch.compile (not used)"


def test_rows_have_only_flags_of_the_benchmark_and_one_model_a_method() -> None:
    rows = {name: words for rows in gpu_choices.ROWS.values() for name, words in rows.items()}
    assert {"few-shot", "ablation", "lora-batch-1", "full-batches", "ptuning", "qlora-batch-1"} == set(rows)
    for words in rows.values():
        options = benchmark.command_line().parse_args(["--shape", "6b", *words.split()])
        assert options.method == benchmark.command_line().get_default("method")  # it comes from the table's key
        assert options.shape == "6b"


@pytest.fixture
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MEASURED_SECONDS", 0.0)
    one = "--batch-size 1 --steps 1"
    rows = {"lora": {"few-shot": one, "lora-batch-1": one}, "ptuning": {"ptuning": one}}
    monkeypatch.setattr(gpu_choices, "ROWS", rows)


@pytest.mark.slow
@pytest.mark.usefixtures("short_rows")
def test_rows_of_a_method_are_measured_on_one_model(
    tmp_path: Path, upstream_config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    random_model = benchmark.random_model
    monkeypatch.setattr(benchmark, "random_model", lambda *args: made.append(random_model(*args)) or made[-1])
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(upstream_config))
    assert list(gpu_choices.row_choices(tmp_path, str(shape), "fp32", ["few-shot", "lora-batch-1", "ptuning"])) == []
    assert [model.adapters.methods for model in made] == [("lora",), ("ptuning",)]
    found = list(gpu_choices.speed_choices(tmp_path))
    assert [choice.what for choice in found] == ["step of few-shot", "step of lora-batch-1", "step of ptuning"]


@pytest.mark.usefixtures("short_rows")
def test_row_that_does_not_fit_is_a_line_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(gpu_choices, "Bench", no_memory)
    found = list(gpu_choices.row_choices(tmp_path, "mini", "fp32", ["few-shot", "ptuning"]))
    assert [choice[0::2] for choice in found] == [
        ("step of few-shot", "CUDA out of memory"),
        ("step of ptuning", "CUDA out of memory"),
    ]


@pytest.mark.long
def test_table_has_a_line_for_each_choice_and_stays_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_choices.main([str(tmp_path / "new"), "--shape", "mini", "--dtype", "fp32", "--only", "few-shot"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 6 + 1 + 1
    assert (tmp_path / "new/choices.md").read_text() == "\n".join(lines) + "\n"
