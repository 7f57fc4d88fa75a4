"""Which rows are trained on, held out and left out: the same ones everywhere, none in two places."""

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, write_rows

from model.data import split
from model.data.image_check import ImageCheck
from model.data.split import find_trained_rows, hold_out, read_selection, same_file_warnings, scan_files
from model.errors import InputError

PICTURE = str(GOLDEN / "upstream/images/0.png")


def texts(number: int) -> list[dict]:
    return [{"prompt": f"{i}?", "label": f"{i}!"} for i in range(number)]


def selection_of(folder: Path, rows: list, bad_rows: str = "error", seconds: float = 60.0):
    return read_selection([str(write_rows(folder, rows))], bad_rows, seconds)


# Bad rows


def test_selection_of_good_rows_leaves_nothing_out(tmp_path: Path) -> None:
    selection, notes = selection_of(tmp_path, texts(3))
    (file,) = selection.rows
    assert (selection.chosen(file, training=True), selection.sample_count(file), notes) == (None, 3, [])


def test_selection_when_skipping_leaves_bad_pictures_out_and_says_so(tmp_path: Path) -> None:
    bad = {"img": "no.png", "prompt": "?", "label": "!"}
    selection, notes = selection_of(
        tmp_path, [{}, texts(1)[0], bad, {"img": PICTURE, "prompt": "?", "label": "!"}], "skip"
    )
    (file,) = selection.rows
    assert [selection.rows[file][index].where[-5:] for index in selection.chosen(file, True) or ()] == [
        "row 2",
        "row 4",
    ]
    assert notes[0] == "Left out, 2 bad rows (--bad_rows skip):"
    assert len(notes) == 3


def test_image_folder_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    row = {"img": "0.png", "prompt": "?", "label": "!"}
    files = [str(write_rows(tmp_path, [row] * 3, name)) for name in ("a.json", "b.json")]
    with pytest.raises(InputError) as refused:
        scan_files(files, "error", "gone")
    assert str(refused.value) == "--image_folder gone: no such folder; the one that the pictures are in is needed."
    selection, problems = scan_files(files, "skip", "")  # the folder that one is in, as an empty variable has it
    assert [len(rows) for rows in selection.rows.values()] == [3, 3]
    assert problems == []


def test_selection_when_every_row_is_bad_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every row is bad; the first: .* row 1: no"):
        selection_of(tmp_path, [{}, {}], "skip")


def test_selection_without_time_says_what_was_not_opened(tmp_path: Path) -> None:
    new = shutil.copy(PICTURE, tmp_path)
    _, notes = selection_of(tmp_path, [{"img": new, "prompt": "?", "label": "!"}], seconds=-1)
    assert notes[0].startswith("1 pictures have not been opened yet")


def test_selection_of_several_files_shares_the_time_among_them(tmp_path: Path, monkeypatch) -> None:
    seconds: list[float] = []

    def slow_check(rows, memory, left):
        seconds.append(left)
        time.sleep(0.2)
        return ImageCheck()

    monkeypatch.setattr(split, "check_rows", slow_check)
    read_selection([str(write_rows(tmp_path, texts(1), name)) for name in ("a.json", "b.json")], "error", 5.0)
    assert 4.5 < seconds[0] <= 5
    assert seconds[1] <= 4.8


def test_selection_on_another_process_opens_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    selection, _ = selection_of(tmp_path, [{"img": "no.png", "prompt": "?", "label": "!"}])
    assert selection.left_out == {}


# Held-out rows


@pytest.mark.parametrize(("share", "number"), [(2, 2), (0.25, 5), (0.01, 1)])
def test_held_out_rows_are_as_many_as_asked_and_never_trained_on(tmp_path: Path, share: float, number: int) -> None:
    selection, _ = selection_of(tmp_path, texts(20))
    (file,) = selection.rows
    hold_out(selection, [file], share, seed=1)
    held, trained = selection.chosen(file, training=False) or [], selection.chosen(file, training=True) or []
    assert len(held) == number
    assert sorted(held + trained) == list(range(20))


def test_held_out_rows_follow_the_seed(tmp_path: Path) -> None:
    held = []
    for seed in (1, 1, 2):
        selection, _ = selection_of(tmp_path, texts(50))
        hold_out(selection, list(selection.rows), 10, seed)
        held.append(selection.held_out)
    assert held[0] == held[1] != held[2]


def test_held_out_rows_are_the_same_ones_whether_or_not_others_are_left_out(tmp_path: Path) -> None:
    selection, _ = selection_of(tmp_path, texts(20))
    (file,) = selection.rows
    hold_out(selection, [file], 5, seed=1)
    held = selection.chosen(file, training=False) or []
    selection.left_out = {file: [held[0]]}
    assert selection.chosen(file, training=False) == held[1:]
    assert held[0] not in (selection.chosen(file, training=True) or [])


def test_holding_out_rows_of_which_none_can_be_used_is_refused(tmp_path: Path) -> None:
    selection, _ = selection_of(tmp_path, texts(20))
    (file,) = selection.rows
    hold_out(selection, [file], 2, seed=1)
    selection.left_out, selection.held_out = {file: selection.held_out[file]}, {}
    with pytest.raises(InputError) as error:
        hold_out(selection, [file], 2, seed=1)
    assert str(error.value) == (
        "--holdout 2 takes 2 rows, all of them bad (--bad_rows skip), so nothing would be left to evaluate on; more rows, or "
        "others by another --seed, are needed."
    )


def shared(*pictures: str) -> list[dict]:
    return [{"img": picture, "prompt": f"{i}?", "label": "!"} for i, picture in enumerate(pictures)]


def write_picture(path: Path, end: str) -> None:
    """A picture that is another one with another end, of as many bytes."""
    path.write_bytes(Path(PICTURE).read_bytes() + end.encode())


@pytest.mark.parametrize(("share", "number"), [(0.1, 3), (1, 3), (4, 3), (5, 6), (8, 9), (29, 27)])
def test_held_out_rows_share_no_picture_with_those_trained_on(tmp_path: Path, share: float, number: int) -> None:
    rows = shared(*(f"{i % 10}.png" for i in range(30)))  # three rows for each of ten pictures
    selection, _ = scan_files([str(write_rows(tmp_path, rows))], "error")
    (file,) = selection.rows
    hold_out(selection, [file], share, seed=1)
    held = {rows[index]["img"] for index in selection.chosen(file, training=False) or []}
    trained = {rows[index]["img"] for index in selection.chosen(file, training=True) or []}
    assert len(selection.held_out[file]) == number
    assert held
    assert trained
    assert not held & trained


def test_held_out_rows_are_as_many_as_asked_where_small_groups_fill_up(tmp_path: Path) -> None:
    rows = [*shared(*["large.png"] * 50), *texts(50)]
    for seed in range(5):
        selection, _ = scan_files([str(write_rows(tmp_path, rows))], "error")
        hold_out(selection, list(selection.rows), 20, seed)
        assert [len(held) for held in selection.held_out.values()] == [20]


def test_held_out_picture_is_the_same_in_another_file_and_under_another_spelling(tmp_path: Path) -> None:
    for name in "ab":
        write_picture(tmp_path / f"{name}.png", name)
    one = str(write_rows(tmp_path, shared("a.png", "b.png")))
    other = str(write_rows(tmp_path, shared(str(tmp_path / "a.png"), "./b.png"), "other.json"))
    selection, _ = scan_files([one, other], "error")
    hold_out(selection, [one, other], 2, seed=1)
    assert selection.held_out[one] == selection.held_out[other]
    assert len(selection.held_out[one]) == 1


def test_held_out_picture_is_the_same_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for number in range(8):
        write_picture(tmp_path / f"real/{number}.png", str(number))
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "7.png").symlink_to(tmp_path / "real/7.png")
    one = str(write_rows(tmp_path, shared(*(f"real/{number}.png" for number in range(8)))))
    others = [f"linked/{number}.png" for number in range(7)] + ["7.png"]
    other = str(write_rows(tmp_path, shared(*others), "other.json"))
    selection, _ = scan_files([one, other], "error")
    hold_out(selection, [one, other], 6, seed=1)
    assert selection.held_out[one] == selection.held_out[other]


@pytest.mark.parametrize("seed", range(1, 9))
def test_held_out_picture_is_the_same_by_a_link_to_it_alone(tmp_path: Path, seed: int) -> None:
    (tmp_path / "real").mkdir()
    for number in range(4):
        write_picture(tmp_path / f"real/{number}.png", str(number))
        (tmp_path / f"link{number}.png").symlink_to(tmp_path / f"real/{number}.png")
    one = str(write_rows(tmp_path, shared(*(f"real/{number}.png" for number in range(4)))))
    other = str(write_rows(tmp_path, shared(*(f"link{number}.png" for number in range(4))), "other.json"))
    selection, _ = scan_files([one, other], "error")
    hold_out(selection, [one, other], 2, seed)
    assert selection.held_out[one] == selection.held_out[other]


@pytest.mark.parametrize("seed", range(1, 5))
def test_held_out_picture_is_the_same_under_another_name(tmp_path: Path, seed: int) -> None:
    for number in range(6):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_picture(tmp_path / f"{folder}/{number}.png", f"{number}{number % 2 * split.END_BYTES * '.'}")
    rows = shared(*(f"{folder}/{number}.png" for number in range(6) for folder in "ab"), "gone.png", "gone too.png")
    file = str(write_rows(tmp_path, rows))
    selection, _ = scan_files([file], "error")
    hold_out(selection, [file], 4, seed)
    held = [Path(rows[index]["img"]).name for index in selection.held_out[file]]
    assert len(held) == 4
    assert all(held.count(name) == 2 for name in held if "gone" not in name)


def test_held_out_row_of_text_is_the_same_in_another_file(tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path, texts(10), name)) for name in ("a.json", "b.json")]
    selection, _ = scan_files(files, "error")
    hold_out(selection, files, 4, seed=1)
    assert selection.held_out[files[0]] == selection.held_out[files[1]]
    assert len(selection.held_out[files[0]]) == 2


def test_held_out_rows_of_different_texts_and_pictures_are_those_that_they_always_were(tmp_path: Path) -> None:
    for number in range(10):
        write_picture(tmp_path / f"{number}.png", str(number))
    same = {"prompt": "?", "label": "!"}
    of_text = [same, {**same, "history": [["?", "!"]]}, {**same, "label": "."}, {**same, "prompt": "??"}, *texts(6)]
    rows = [*of_text, *shared(*(f"{number}.png" for number in range(10)))]
    file = str(write_rows(tmp_path, rows))
    selection, _ = scan_files([file], "error")
    hold_out(selection, [file], 6, seed=1234)
    assert selection.held_out[file] == [1, 11, 12, 14, 15, 19]


def test_holding_out_where_all_rows_are_the_same_text_is_an_error(tmp_path: Path) -> None:
    selection, _ = scan_files([str(write_rows(tmp_path, texts(1) * 3))], "error")
    with pytest.raises(InputError) as refused:
        hold_out(selection, list(selection.rows), 1, seed=1)
    assert str(refused.value) == (
        "--holdout 1: all 3 rows in --train-data are the same, so none would be left to learn; other rows are needed, or "
        "--valid-data."
    )


def test_holding_out_where_all_rows_share_a_picture_is_an_error(tmp_path: Path) -> None:
    selection, _ = scan_files([str(write_rows(tmp_path, shared("a.png", "a.png", "a.png")))], "error")
    with pytest.raises(InputError, match="--holdout 1: all 3 rows in --train-data have the same picture"):
        hold_out(selection, list(selection.rows), 1, seed=1)


def test_holding_everything_out_is_an_error(tmp_path: Path) -> None:
    selection, _ = selection_of(tmp_path, texts(3))
    with pytest.raises(InputError, match="--holdout 3: 3 rows in --train-data, so none would be left to learn"):
        hold_out(selection, list(selection.rows), 3, seed=1)


@pytest.mark.parametrize("how", ["itself", "link", "copy"])
def test_same_file_for_both_is_warned_about(tmp_path: Path, how: str) -> None:
    file = str(write_rows(tmp_path, texts(1)))
    other = {
        "itself": file,
        "link": str(tmp_path / "link.json"),
        "copy": str(write_rows(tmp_path, texts(1), "copy.json")),
    }[how]
    if how == "link":
        os.symlink(file, other)
    assert same_file_warnings([file], [other])[0].startswith(
        f"WARNING: {other} is given for training and for evaluation"
        + (": the evaluation will" if other == file else f" (for training as {file}): the evaluation will")
    )
    assert same_file_warnings([file], [str(write_rows(tmp_path, texts(2), "other.json"))]) == []


def test_other_rows_in_as_many_bytes_are_not_the_same_file(tmp_path: Path) -> None:
    one, other = (
        str(write_rows(tmp_path, [{"prompt": prompt, "label": "!"}], f"{prompt}.json")) for prompt in ("a", "b")
    )
    assert os.path.getsize(one) == os.path.getsize(other)
    assert same_file_warnings([one], [other]) == []


def test_rows_for_evaluation_that_are_also_trained_on_are_counted(tmp_path: Path) -> None:
    os.symlink(PICTURE, tmp_path / "link.png")
    row = {"img": PICTURE, "prompt": "?", "label": "!"}
    train = str(write_rows(tmp_path, [row, *texts(3)]))
    others = [row | {"label": "other"}, row | {"img": None}, row | {"history": [["?", "!"]]}]
    some = str(write_rows(tmp_path, [*others, row | {"img": "link.png"}, *texts(2)], "some.json"))
    none = str(write_rows(tmp_path, others, "none.json"))
    copy = str(write_rows(tmp_path, [row, *texts(3)], "copy.json"))
    selection, _ = read_selection([train, some, none, copy], "error", 60.0)
    warning, of_copy = find_trained_rows(selection, [train], [some, none, copy])
    assert warning.startswith(
        f"WARNING: 3 of 6 rows of {some} are also trained on: of these, the evaluation will only say"
    )
    assert [of_copy] == same_file_warnings([train], [copy])
    assert selection.also_trained_on == {
        f"{file} row {number}"
        for file, first, last in ((some, 4, 6), (copy, 1, 4))
        for number in range(first, last + 1)
    }


def test_rows_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    train = str(write_rows(tmp_path, texts(4)))
    test = str(write_rows(tmp_path, texts(3), "test.json"))
    selection, _ = read_selection([train, test], "error", 60.0)
    selection.held_out[train] = [0, 1, 2]
    assert find_trained_rows(selection, [train], [test]) == []
