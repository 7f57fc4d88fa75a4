"""The rehearsal of the 6B, at the smallest shape that it knows."""

from pathlib import Path

import pytest

from scripts.dev import rehearse_6b

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


@pytest.mark.long
def test_rehearsal_of_the_mini_shape_measures_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearse_6b.main([str(tmp_path), "--shape", "mini"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 8
    assert not list(tmp_path.glob("*-merged"))
