"""What only a GPU can decide: every measurement runs here too, at sizes at which its numbers mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from scripts.dev import gpu_choices

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


@pytest.mark.long
def test_table_has_a_line_for_each_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_choices.main([str(tmp_path), "--shape", "mini"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 + 4 + 1 + (4 if torch.cuda.is_available() else 0)
