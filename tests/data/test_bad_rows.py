"""Bad rows: as many as a screen holds are listed, and all of them in a file."""

from pathlib import Path

import pytest

from model.data.bad_rows import MOST_PROBLEM_LINES, by_cause, cache_folder, first_lines, handle_bad_rows
from model.data.images import open_image
from model.errors import InputError, RowError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "visualglm"


def test_problems_that_a_screen_holds_are_listed_and_no_file_is_written(cache: Path) -> None:
    problems = [f"row {number}" for number in range(MOST_PROBLEM_LINES)]
    assert first_lines(problems) == problems
    assert not cache.exists()


def test_more_problems_are_counted_and_all_are_in_a_file(cache: Path) -> None:
    problems = [f"row {number}" for number in range(MOST_PROBLEM_LINES + 3)]
    *listed, last = first_lines(problems)
    assert listed == problems[:MOST_PROBLEM_LINES]
    assert last == f"… and 3 more; all are in {cache / 'bad-rows.txt'}."
    assert (cache / "bad-rows.txt").read_text().splitlines() == problems


@pytest.mark.parametrize(
    "content", [b"\0\0\0\x18ftypheic", b"<svg/>", b"<html>", b"version https://git-lfs.github.com/spec/v1"]
)
def test_pictures_that_are_the_same_other_thing_are_one_line(tmp_path: Path, content: bytes) -> None:
    problems = []
    for number in range(1, 7):
        (tmp_path / f"{number}.jpg").write_bytes(content)
        with pytest.raises(InputError) as problem:
            open_image(tmp_path / f"{number}.jpg")
        problems.append(f"rows.json row {number}: {problem.value}")
    assert by_cause(problems) == [problems[0].replace("row 1:", "row 1 and 5 more rows:")]


def test_pictures_that_are_addresses_are_one_line() -> None:
    problems = []
    for number in range(1, 7):
        with pytest.raises(InputError) as problem:
            open_image(f"http://a.example/{number}.jpg")
        problems.append(f"rows.json row {number}: {problem.value}")
    assert by_cause(problems) == [problems[0].replace("row 1:", "row 1 and 5 more rows:")]


def test_file_that_cant_be_written_is_named_with_the_reason(cache: Path) -> None:
    cache.write_text("a file, not a folder")
    assert "can't be listed in" in first_lines(["a problem"] * (MOST_PROBLEM_LINES + 1))[-1]


def test_cache_folder_follows_the_users_setting(cache: Path) -> None:
    assert cache_folder() == cache


def test_bad_row_stops_the_run_or_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    batch = {"problems": ["rows.json row 7: there is no file"]}
    with pytest.raises(RowError, match="row 7"):
        handle_bad_rows(batch, "error")
    handle_bad_rows(batch, "skip")
    handle_bad_rows(batch, "skip")
    assert capsys.readouterr().err == "Left out: rows.json row 7: there is no file\n"


def test_bad_row_that_was_drawn_twice_is_named_once() -> None:
    with pytest.raises(RowError) as refused:
        handle_bad_rows({"problems": ["row 3", "row 2", "row 3", "row 2"]}, "error")
    assert str(refused.value) == "row 3\nrow 2"


def test_batch_without_bad_rows_is_nothing_to_handle() -> None:
    handle_bad_rows({}, "error")
