"""The rehearsal of the 6B, at the smallest shape that it knows."""

import itertools
import json
from pathlib import Path

import pytest

from scripts.dev import rehearse_6b
from scripts.dev.rehearse_6b import stages

REPORT = """\
  all while training         13.83
  all while loading          14.10
"""


def test_estimated_peak_is_the_larger_one() -> None:
    assert rehearse_6b.estimated_peak(REPORT) == 14.10


def test_first_rows_have_whole_paths_of_pictures(tmp_path: Path) -> None:
    from model.data.rows import read_rows

    rows = list(read_rows(rehearse_6b.first_rows(tmp_path)))
    assert len(rows) == rehearse_6b.ROWS
    assert all(row.img is not None and Path(row.img).is_file() for row in rows)


def test_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        rehearse_6b.main([str(tmp_path / "file"), "--shape", "mini"])
    assert ended.value.code == 2
    assert "is a file; a folder is needed" in capsys.readouterr().err


def test_failing_command_is_told_with_its_reason() -> None:
    with pytest.raises(rehearse_6b.InputError, match=r"merge_lora.py nowhere out: status 2 \(.*nowhere"):
        rehearse_6b.run("scripts/merge_lora.py", "nowhere", "out")


def table(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("|")][2:]


def test_rehearsal_goes_on_after_an_end_says_where_it_is_and_removes_the_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measuring(script: str, *words: str) -> tuple[str, float, float]:
        if len(measured) == 2:
            measured.append("the end")
            raise rehearse_6b.InputError("stopped")
        measured.append(script)
        if "--save" in words and "--dry_run" not in words:
            (tmp_path / "mini-lora" / "run" / "4").mkdir(parents=True)
        return REPORT, 61.0, 1.25

    monkeypatch.setattr(rehearse_6b, "run", measuring)
    monkeypatch.setattr(rehearse_6b, "stages", lambda *given: itertools.islice(stages(*given), 3))
    with pytest.raises(SystemExit):
        rehearse_6b.main([str(tmp_path), "--shape", "mini"])
    (tmp_path / "model-mini").mkdir()
    rehearse_6b.main([str(tmp_path), "--shape", "mini"])
    said = capsys.readouterr()
    assert [name for name in measured if "write" in name] == ["scripts/dev/write_random_model.py"]
    assert table(said.out)[-3:] == [
        "| write random weights | 61 | 1.25 |  |",
        "| lora: train 4 steps, save | 61 | 1.25 | 14.10 |",
        "| lora: resume at step 3 | 61 | 1.25 |  |",
    ]
    assert "lora: train 4 steps, save …" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["measured-mini.json"]


def test_memory_of_a_gpu_stands_beside_what_was_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"kind": "step", "memory_bytes": 2**30},
        {"kind": "evaluation"},
        {"kind": "step", "memory_bytes": 3 * 2**30},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert rehearse_6b.peak_of_gpu(tmp_path) == 3
    trained, written = rehearse_6b.Measured(61, 1.25, 3.5, 3.0), rehearse_6b.Measured(14, 1.5)
    assert (trained.columns(), written.columns()) == ("61 | 1.25 | 3.50", "14 | 1.50 | ")
    monkeypatch.setattr(rehearse_6b, "has_gpu", lambda: True)
    assert (trained.columns(), written.columns()) == ("61 | 1.25 | 3.00 | 3.50", "14 | 1.50 |  | ")


@pytest.mark.long
def test_rehearsal_of_the_mini_shape_measures_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearse_6b.main([str(tmp_path), "--shape", "mini"])
    assert len(table(capsys.readouterr().out)) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"measured-mini.json", "rows.json"}
