"""The images of many rows: each is opened once, remembered until it changes, and named when it is bad."""

import os
import re
import time
from pathlib import Path

import pytest
from conftest import GOLDEN
from PIL import Image

from model import progress
from model.data import image_check
from model.data.bad_rows import first_lines
from model.data.image_check import CheckedImages, check_rows, checked_images_file
from model.data.rows import Row


def row_of(path: str | Path | None, number: int) -> Row:
    return Row(None if path is None else str(path), "?", "!", f"data.json row {number}")


def picture(folder: Path, name: str = "a.png") -> Path:
    Image.new("RGB", (2, 2)).save(folder / name)
    return folder / name


def test_check_pictures_when_all_are_good_finds_nothing() -> None:
    assert not check_rows([row_of(path, 1) for path in sorted((GOLDEN / "upstream/images").iterdir())]).problems


def test_check_pictures_when_some_are_bad_names_each_row(tmp_path: Path) -> None:
    good, empty = picture(tmp_path), tmp_path / "empty.png"
    empty.touch()
    check = check_rows([row_of(good, 1), row_of(empty, 2), row_of(tmp_path, 3), row_of(empty, 4)])
    assert [line.split(":")[0] for line in check.problems.values()] == [
        "data.json row 2",
        "data.json row 3",
        "data.json row 4",
    ]


def test_check_pictures_when_very_many_are_bad_in_one_way_tells_the_way_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = (
        r"^data.json row 0 and 24 more rows: there is no file \S+0.png; .*\n25 in all; all are in \S+/bad-rows\.txt\.$"
    )
    check = check_rows([row_of(tmp_path / f"{number}.png", number) for number in range(25)])
    assert re.search(expected, "\n".join(first_lines([*check.problems.values()])))


def test_picture_problems_when_very_many_are_bad_are_all_there(tmp_path: Path) -> None:
    assert len(check_rows([row_of(tmp_path / "no.png", number) for number in range(25)]).problems) == 25


def test_check_of_rows_opens_a_shared_picture_once_and_none_for_rows_without(tmp_path: Path) -> None:
    one, other = picture(tmp_path), picture(tmp_path, "b.png")
    assert check_rows([row_of(one, 1), row_of(None, 2), row_of(other, 3), row_of(one, 4)]).opened == 2


# Memory


def test_pictures_that_were_whole_are_not_opened_again(tmp_path: Path) -> None:
    rows, file = [row_of(picture(tmp_path), 1)], tmp_path / "cache/pictures"
    first = check_rows(rows, CheckedImages(file))
    second = check_rows(rows, CheckedImages(file))
    assert [(check.opened, check.remembered) for check in (first, second)] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("change", ["time", "size"])
def test_picture_that_changed_is_opened_again(tmp_path: Path, change: str) -> None:
    path, file = picture(tmp_path), tmp_path / "pictures"
    check_rows([row_of(path, 1)], CheckedImages(file))
    if change == "time":
        os.utime(path, (1, 1))
    else:
        path.write_bytes(b"text")
    assert check_rows([row_of(path, 1)], CheckedImages(file)).opened == 1


def test_pictures_that_are_bad_are_not_remembered(tmp_path: Path) -> None:
    path, file = tmp_path / "a.png", tmp_path / "pictures"
    path.write_text("text")
    for _ in range(2):
        assert len(check_rows([row_of(path, 1)], CheckedImages(file)).problems) == 1


def test_memory_that_cannot_be_written_or_is_damaged_costs_nothing(tmp_path: Path) -> None:
    rows = [row_of(picture(tmp_path), 1)]
    (tmp_path / "file").write_bytes(b"123")
    assert check_rows(rows, CheckedImages(tmp_path / "file/pictures")).opened == 1
    assert check_rows(rows, CheckedImages(tmp_path / "file")).opened == 1


def test_memory_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checked_images_file() == tmp_path / "visualglm/pictures-1"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert checked_images_file() == Path("/home/x/.cache/visualglm/pictures-1")


# Time


def test_check_of_rows_without_time_looks_for_files_and_counts_the_unopened(tmp_path: Path) -> None:
    check = check_rows([row_of(picture(tmp_path), 1), row_of(tmp_path / "no.png", 2)], seconds=-1)
    assert (check.opened, check.unopened, list(check.problems)) == (0, 1, [1])


def test_check_of_rows_opens_pictures_for_half_the_time_although_looking_for_them_took_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    monkeypatch.setattr(image_check, "checked_file", lambda path: (time.sleep(0.2), os.stat(path))[1])
    monkeypatch.setattr(image_check, "problems_by_path", lambda paths, seconds: times.append(seconds) or [])
    for seconds in (0.1, 60.2):
        check_rows([row_of(picture(tmp_path), 1)], seconds=seconds)
    assert times[0] == 0.05
    assert 59 < times[1] <= 60


def test_check_pictures_when_it_is_quick_shows_no_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_rows([row_of(picture(tmp_path), 1)])
    assert capfd.readouterr() == ("", "")


def test_check_pictures_when_it_takes_longer_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    check_rows([row_of(picture(tmp_path), 1)])
    assert capfd.readouterr().err == "Checking pictures: 1 of 1, 0 s left\n"


def test_pictures_are_opened_in_threads_that_end(tmp_path: Path) -> None:
    assert list(image_check.problems_by_path([], 1.0)) == []
    assert [problem for _, problem in image_check.problems_by_path([str(picture(tmp_path))] * 50, 60.0)] == [None] * 50
