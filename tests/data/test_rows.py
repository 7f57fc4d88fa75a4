"""Data files: good rows are read, bad ones are refused one by one with a sentence."""

import gzip
import json
import os

import pytest
from conftest import PROJECT
from PIL import Image

from model.data.rows import Row, read_rows, rows_in_place, scan_rows
from model.errors import InputError

GOOD_ROW = {"img": "0.png", "prompt": "?", "label": "!"}


def written(folder, content, name="data.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


# Data files


def test_rows_of_a_good_file_hold_its_texts_and_count_from_one(tmp_path):
    path = written(tmp_path, [GOOD_ROW, GOOD_ROW | {"label": "…"}])
    assert read_rows(path)[1] == Row("0.png", "?", "…", f"{path} row 2")


def test_rows_when_the_file_begins_with_a_byte_order_mark_are_read(tmp_path):
    assert read_rows(written(tmp_path, b"\xef\xbb\xbf" + json.dumps([GOOD_ROW]).encode()))[0].label == "!"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "line 1 column 1: not JSON"),
        (b"", "the file is empty; at least one row is needed."),
        (b"\xef\xbb\xbf \r\n\t\n", "the file is empty; at least one row is needed."),
        (b'[{"img": "a.png",\n "prompt" "?"}]', "line 2 column 11: not JSON"),
        (b"{}", "not a JSON list"),
        (b'{"rows": []}', "not a JSON list"),
        (b'[{"img": "a.png", "prompt": "?", "label": "!"}', "line 1 column 47: not JSON (Expecting ',' delimiter)"),
        (b'[{"img": "a.png", "prompt": "?", "label": "!"}] []', "not JSON (Extra data)"),
        (b'[{"img": "a.png", "prompt": "?", "label": "!"} {}]', "not JSON"),
        (b'"text"', "not a JSON list"),
        (b'{"prompt": "?",\n "label": "!"}', "not a JSON list, and no JSON Lines"),
        (b'{"prompt": "?",\n "label": "!"}\n{"prompt": "?",\n "label": "!"}\n', "not a JSON list, and no JSON Lines"),
        (
            b'[{"conversations": [], "image": "a.png"}]',
            'no "prompt" and no "label", but "conversations"; convert_data.py',
        ),
        (b"[]", "the list is empty"),
        ('["你好"]'.encode("gbk"), "byte 3 isn't UTF-8"),
        (gzip.compress(b"[]", mtime=0), "compressed (gzip); the JSON file that is in it is needed."),
        (json.dumps([GOOD_ROW]).encode("utf-16"), "byte 1 isn't UTF-8"),
        (b"[" * 100_000, "JSON that can't be read"),
        (b"[" + b"9" * 10_000 + b"]", "JSON that can't be read"),
    ],
)
def test_rows_when_the_file_is_bad_names_it_and_what_was_found(tmp_path, content, found):
    path = written(tmp_path, content)
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert str(error.value).startswith(str(path))
    assert found in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("rows.csv", b"img,prompt,label\na.png,?,!\n", "a table, and no JSON; convert_data.py makes rows of it."),
        ("rows.TSV", b'"img"\t"prompt"\t"label"\n', "a table, and no JSON; convert_data.py makes rows of it."),
        ("rows.xlsx", b"PK\x03\x04\xff", "a workbook, and no JSON; convert_data.py makes rows of it once it is saved as CSV."),
    ],
)  # fmt: skip
def test_rows_when_the_file_is_a_table_names_the_command_that_makes_rows_of_it(tmp_path, name, content, found):
    path = written(tmp_path, content, name)
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert str(error.value) == f"{path}: {found}"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n"])
def test_rows_in_json_lines_are_read(tmp_path, line_end):
    lines = [json.dumps(GOOD_ROW | {"prompt": text}, ensure_ascii=False) for text in ("\u2028", "二", "😀")]
    path = written(tmp_path, ("\ufeff" + line_end.join([*lines, ""])).encode(), "data.jsonl")
    assert [row.prompt for row in read_rows(path)] == ["\u2028", "二", "😀"]
    assert read_rows(path)[2].where == f"{path} row 3"


def test_rows_of_one_line_are_json_lines(tmp_path):
    assert len(read_rows(written(tmp_path, GOOD_ROW))) == 1


def test_rows_when_a_line_is_no_json_names_that_line(tmp_path):
    path = written(tmp_path, (json.dumps(GOOD_ROW) + '\n{"img": \n' + json.dumps(GOOD_ROW)).encode())
    rows, problems = scan_rows(path)
    assert (len(rows), rows[1].where) == (2, f"{path} row 3")
    assert problems == [f"{path} line 2 column 9: not JSON (Expecting value); a row in one line is needed."]


def test_rows_when_some_are_bad_are_told_from_the_good_ones(tmp_path):
    rows, problems = scan_rows(written(tmp_path, [{}, GOOD_ROW, 7]))
    assert ([row.where[-5:] for row in rows], len(problems)) == (["row 2"], 2)


def test_rows_keep_history_and_language(tmp_path):
    entry = {"prompt": "?", "label": "!", "history": [["a", "b"]], "lang": "en"}
    path = written(tmp_path, [entry, GOOD_ROW])
    assert read_rows(path)[0] == Row(None, "?", "!", f"{path} row 1", (("a", "b"),), "en")
    assert list(read_rows(path).turns) == [2, 1]


def test_rows_are_a_sequence(tmp_path):
    rows = read_rows(written(tmp_path, [GOOD_ROW | {"prompt": text} for text in "abc"]))
    assert (rows[-1].prompt, [row.prompt for row in rows[1:]], len(list(rows))) == ("c", ["b", "c"], 3)
    with pytest.raises(IndexError):
        rows[3]


def test_rows_when_the_file_is_missing_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: No such file or directory; a JSON file of rows is needed"):
        read_rows(tmp_path / "nowhere.json")


def test_rows_when_the_file_is_a_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        read_rows(tmp_path)


def test_rows_when_several_are_bad_names_each_in_a_line(tmp_path):
    path = written(tmp_path, [{}, GOOD_ROW, 7])
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [f"{path} row 1", f"{path} row 3"]


EACH_OTHERWISE = [{"prompt": "?", "label": "!", "lang": str(number)} for number in range(25)]  # each bad in its own way


def test_rows_when_very_many_are_bad_names_twenty_and_the_file_that_has_them_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = written(tmp_path, EACH_OTHERWISE)
    with pytest.raises(InputError) as error:
        read_rows(path)
    lines = str(error.value).splitlines()
    listed = tmp_path / "visualglm/bad-rows.txt"
    assert (len(lines), lines[-1]) == (21, f"… and 5 more; all are in {listed}.")
    all_lines = listed.read_text().splitlines()
    assert all_lines[:20] == lines[:20]
    assert [line.split(":")[0] for line in all_lines[20:]] == [f"{path} row {number}" for number in range(21, 26)]


def test_rows_when_very_many_are_bad_and_no_file_can_be_written_say_so(tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    with pytest.raises(
        InputError, match=r"… and 5 more; they can't be listed in \S.*/bad-rows.txt: Not a directory\.$"
    ):
        read_rows(written(tmp_path, EACH_OTHERWISE))


def test_rows_when_very_many_are_bad_are_listed_by_the_first_process_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="… and 5 more; all are in"):
        read_rows(written(tmp_path, EACH_OTHERWISE))
    assert not (tmp_path / "visualglm").exists()


def test_rows_with_one_cause_are_one_sentence_with_their_count(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = written(
        tmp_path, [GOOD_ROW, *({"image": f"{number}.png", "prompt": "?", "label": "!"} for number in range(20))]
    )
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert str(error.value).splitlines() == [
        f'{path} row 2 and 19 more rows: no "img", but "image"; rename it, or convert the file (convert_data.py).',
        f"20 in all; all are in {tmp_path / 'visualglm/bad-rows.txt'}.",
    ]
    assert len((tmp_path / "visualglm/bad-rows.txt").read_text().splitlines()) == 20


def test_picture_that_is_two_different_files_makes_its_row_bad(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for number, folder in enumerate(("", "data")):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / folder / "0.png")
    path = written(tmp_path / "data", [GOOD_ROW])
    rows, problems = scan_rows(os.path.relpath(path))
    assert len(rows) == 0
    assert problems == [
        "data/data.json row 1: 0.png is two different files, 0.png and data/0.png; --image_folder FOLDER with the right one's "
        "folder is needed."
    ]
    assert scan_rows(path, str(tmp_path / "data"))[0][0].img == str(tmp_path / "data/0.png")


def test_picture_of_a_row_beside_the_file_is_found_there(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "0.png")
    assert read_rows(written(tmp_path, [GOOD_ROW]))[0].img == str(tmp_path / "0.png")


def test_picture_of_a_row_that_is_nowhere_stays_as_written(tmp_path):
    assert read_rows(written(tmp_path, [GOOD_ROW]))[0].img == "0.png"


def test_shipped_rows_find_their_pictures_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dataset.json", "heldout.json"):
        assert all(os.path.isfile(row.img) for row in read_rows(PROJECT / "fewshot-data" / name))


# Rows to be answered


def test_rows_that_need_no_label_may_have_anything_or_nothing_there(tmp_path):
    path = written(tmp_path, [{"prompt": "?"}, {"prompt": "?", "label": 5}, {"prompt": "?", "label": ""}])
    assert [row.label for row in rows_in_place(path, needs_label=False)] == ["", "", ""]


def test_bad_rows_in_place_say_what_a_row_without_a_label_needs(tmp_path):
    path = written(tmp_path, [{"label": "!"}, {"prompt": "?"}])
    bad, good = rows_in_place(path, needs_label=False)
    assert str(bad) == (
        f'{path} row 1: no "prompt"; every row is an object with the text "prompt", and "img" unless it has no picture.'
    )
    assert good.where == f"{path} row 2"


def test_numbers_of_rows_are_those_of_the_file(tmp_path):
    rows, problems = scan_rows(written(tmp_path, [GOOD_ROW, 5, GOOD_ROW]))
    assert list(rows.numbers) == [1, 3]
    assert len(problems) == 1
