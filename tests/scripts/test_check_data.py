"""check_data.py tells what is wrong with data files before a long run, and says so with its exit status."""

import json
from pathlib import Path

import pytest
from conftest import GOLDEN, PROJECT, run_python, write_rows
from PIL import Image

from scripts.check_data import command_line, data_report, main, padding_shares, report_lines

TOKENIZER = str(GOLDEN / "tokenizer")


def picture(folder: Path, name: str, colour: str = "red") -> Path:
    Image.new("RGB", (4, 3), colour).save(folder / name)
    return folder / name


def report_of(*words: str) -> dict:
    return data_report(command_line().parse_args(words))


@pytest.fixture
def row(tmp_path: Path) -> dict:
    picture(tmp_path, "a.png")
    return {"img": "a.png", "prompt": "?", "label": "!"}


def test_report_of_good_rows_has_nothing_wrong(tmp_path: Path, row: dict) -> None:
    report = report_of(str(write_rows(tmp_path, [row, {"prompt": "?", "label": "!"}])))
    (file,) = report["files"]
    assert (file["rows"], file["without_picture"], report["problems"], report["wrong"]) == (2, 1, 0, False)
    assert report_lines(report)[-1] == "2 rows: all is well."


def test_report_names_every_bad_row_and_picture(tmp_path: Path, row: dict) -> None:
    (tmp_path / "b.jpg").write_text("text")
    rows = [row, {}, row | {"img": "b.jpg"}, row | {"img": "no.png"}]
    report = report_of(str(write_rows(tmp_path, rows)))
    assert [problem.split(":")[0][-5:] for problem in report["files"][0]["problems"]] == ["row 2", "row 3", "row 4"]
    assert (report["pictures"]["bad"], report["wrong"]) == (2, True)


def test_report_lists_all_bad_rows_however_many(tmp_path: Path, row: dict) -> None:
    otherwise = [row | {"lang": str(number)} for number in range(30)]
    lines = report_lines(report_of(str(write_rows(tmp_path, [row, *otherwise]))))
    assert sum("row " in line and '"lang" is' in line for line in lines) == 30


def test_report_tells_a_cause_of_many_rows_in_one_line(tmp_path: Path, row: dict) -> None:
    path = write_rows(tmp_path, [row, *[{}] * 30])
    lines = [line for line in report_lines(report_of(str(path))) if ": no " in line]
    assert len(lines) == 1
    assert lines[0].startswith(f'  {path} row 2 and 29 more rows: no "prompt" and no "label"')


def test_report_finds_pictures_of_the_same_content_and_their_sizes(tmp_path: Path, row: dict) -> None:
    picture(tmp_path, "b.png")
    picture(tmp_path, "c.png", "blue")
    rows = [row | {"img": name} for name in ("a.png", "b.png", "c.png", "a.png")]
    found = report_of(str(write_rows(tmp_path, rows)))["pictures"]
    assert (found["distinct"], found["same_content"], found["largest"]) == (3, 1, (4, 3))


def test_report_finds_rows_that_say_the_same_and_contradictions(tmp_path: Path, row: dict) -> None:
    found = report_of(str(write_rows(tmp_path, [row, row, row | {"label": "other"}, row | {"prompt": "other"}])))[
        "repeated"
    ]
    assert found == {"rows": 1, "same_question_other_answer": 1}


def test_report_finds_rows_of_another_file_that_say_the_same(tmp_path: Path, row: dict) -> None:
    files = [str(write_rows(tmp_path, rows, f"{len(rows)}.json")) for rows in ([row], [row, row | {"label": "other"}])]
    assert report_of(*files)["repeated"] == {"rows": 1, "same_question_other_answer": 1}


def test_report_finds_what_evaluation_shares_with_training(tmp_path: Path, row: dict) -> None:
    picture(tmp_path, "b.png", "blue")
    valid = [row, row | {"img": "b.png"}, row | {"prompt": "new", "label": "new"}]
    report = report_of(str(write_rows(tmp_path, [row])), "--valid", str(write_rows(tmp_path, valid, "valid.json")))
    assert report["overlap"] == {"rows": 1, "prompts": 2, "pictures": 2, "of": 3}
    assert report["wrong"]


@pytest.mark.parametrize("flag", ["--valid", "--valid-data"])
def test_rows_for_evaluation_are_named_as_in_training_too(flag: str) -> None:
    assert command_line().parse_args(["a.json", flag, "b.json"]).valid == ["b.json"]


def test_report_of_tokens_says_what_is_cut_and_what_would_not_be(tmp_path: Path, row: dict) -> None:
    rows = [row, row | {"label": "一二三四五六七八九十" * 3}, row | {"prompt": "一二三四五六七八九十" * 9}]
    words = (str(write_rows(tmp_path, rows)), "--tokenizer", TOKENIZER, "--max_target_length", "20")
    tokens = report_of(*words)["tokens"]
    assert tokens["cut"] == {"prompts": 1, "labels": 1, "histories": 0}
    lines = report_lines(report_of(*words))
    assert lines[-1].startswith("3 rows: texts that are cut")
    assert any(line.endswith("cut 1 prompt, 1 label and the oldest turns of 0 samples") for line in lines)
    enough = [word for flag, length in tokens["cuts_nothing"].items() for word in (f"--{flag}", str(length))]
    again = report_of(*words[:3], *enough)["tokens"]
    assert again["cut"] == {"prompts": 0, "labels": 0, "histories": 0}
    assert (tokens["source"]["most"], tokens["target"]["most"]) == tuple(tokens["cuts_nothing"].values())
    assert sum(tokens["source"]["up_to"].values()) == 3


def test_lengths_of_no_good_row_are_not_advised(tmp_path: Path) -> None:
    lines = report_lines(
        report_of(str(write_rows(tmp_path, [{}, {}])), "--from_pretrained", str(PROJECT / "model/tiny"))
    )
    assert lines[-2:] == [
        "token lengths: not counted; a row without a problem is needed for that",
        "2 rows: 2 bad rows.",
    ]


def test_characters_that_become_bytes_are_not_well(tmp_path: Path) -> None:
    data = str(write_rows(tmp_path, [{"prompt": "ภาพนี้คืออะไร", "label": "ภาษาไทย"}] * 5))
    report = report_of(data, "--tokenizer", TOKENIZER)
    assert report_lines(report)[-2].startswith("tokens: 100 % of the characters have no token, as in “ภาพนี้คืออะไร”;")
    assert (report_lines(report)[-1], report["wrong"]) == ("5 rows: characters without a token.", False)


def test_lengths_that_are_auto_are_what_the_data_needs(tmp_path: Path, row: dict) -> None:
    rows = [row, row | {"label": "一二三四五六七八九十" * 3}, row | {"prompt": "一二三四五六七八九十" * 9}]
    words = (str(write_rows(tmp_path, rows)), "--tokenizer", TOKENIZER)
    tokens = report_of(*words, "--max_source_length", "auto", "--max_target_length", "auto")["tokens"]
    assert tokens["cut"] == {"prompts": 0, "labels": 0, "histories": 0}
    assert tokens["lengths"] == tokens["cuts_nothing"]
    tokens = report_of(*words, "--max_target_length", "auto")["tokens"]
    assert tokens["cut"] == {"prompts": 1, "labels": 0, "histories": 0}
    assert tokens["lengths"] == tokens["cuts_nothing"] | {"max_source_length": 64}
    none_good = str(write_rows(tmp_path, [{"prompt": "?"}]))
    assert report_of(none_good, *words[1:], "--max_source_length", "auto")["problems"] == 1


def test_lengths_that_training_refuses_are_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--max_source_length", "-5", "--max_target_length", "0")
    with pytest.raises(SystemExit, match="2"):
        main([str(PROJECT / "fewshot-data/dataset.json"), "--tokenizer", TOKENIZER, *lengths])
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "check_data.py: error: --max_source_length -5: no room for a single token of text; at least "
    )
    assert second == "--max_target_length 0: no room for a single token of text; at least 3 is needed."


def test_report_in_processes_is_the_same(tmp_path: Path, row: dict) -> None:
    names = [picture(tmp_path, f"{number}.png").name for number in range(120)]
    data = str(write_rows(tmp_path, [row | {"img": name} for name in [*names, "no.png"]]))
    assert report_of(data, "--workers", "2") == report_of(data, "--workers", "1")


def test_all_bad_rows_stand_in_a_file_where_the_report_counts_some(
    tmp_path: Path, row: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row, *(row | {"img": f"no{number}.png"} for number in range(7))]
    with pytest.raises(SystemExit, match="1"):
        main([str(write_rows(tmp_path, rows))])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "all are in" in line]
    listed = Path(line.split("all are in ")[1].removesuffix(".")).read_text(encoding="utf-8").splitlines()
    assert line.startswith("7 bad rows; ")
    assert [name for name in map(str, range(7)) if f"no{name}.png" not in "".join(listed)] == []


@pytest.mark.parametrize(("rows", "status"), [([{"prompt": "?", "label": "!"}], 0), ([{}], 1)])
def test_exit_status_says_whether_something_is_wrong(
    tmp_path: Path, rows: list, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(write_rows(tmp_path, rows)), "--json"])
    assert left.value.code == status
    assert json.loads(capfd.readouterr().out)["wrong"] == bool(status)


@pytest.mark.run
def test_command_when_a_file_is_missing_says_so_in_a_sentence() -> None:
    done = run_python("scripts/check_data.py", "no.json")
    assert done.returncode == 2
    assert done.stderr == "check_data.py: error: no.json: No such file or directory; a JSON file of rows is needed.\n"


def test_padding_is_none_for_rows_of_one_length_and_less_when_they_are_grouped() -> None:
    assert padding_shares([7] * 9) == {"by_chance": 0.0, "group_by_length": 0.0}
    assert padding_shares([]) == {"by_chance": 0.0, "group_by_length": 0.0}
    shares = padding_shares([10, 100] * 40)
    assert shares["group_by_length"] == 0.0
    assert 0.3 < shares["by_chance"] < 0.45  # a batch of four has a long one in 15 of 16 cases: 1 - 55 / 94
