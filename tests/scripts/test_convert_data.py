"""convert_data.py turns other tools' conversations into rows, and names those that can't be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, run_python

from model.data.rows import read_rows
from model.errors import InputError
from scripts.convert_data import main, row_of


def llava(*texts: str, **more: object) -> dict:
    """A conversation of questions and answers by turns."""
    speakers = ("human", "gpt")
    return {"conversations": [{"from": speakers[i % 2], "value": text} for i, text in enumerate(texts)], **more}


def test_row_of_a_conversation_has_its_last_turn_and_history() -> None:
    row = row_of(llava("<image>\nWhat?", "A cat.", "Where?", "Here.", image="a.jpg"), "", images="pictures")
    assert row == {
        "img": "pictures/a.jpg",
        "prompt": "Where?",
        "label": "Here.",
        "history": [["What?", "A cat."]],
    }


def test_row_of_a_conversation_without_picture_has_none() -> None:
    assert row_of(llava("What?", "That."), "", lang="en") == {"prompt": "What?", "label": "That.", "lang": "en"}


@pytest.mark.parametrize("images", [None, "", [], [""], ["a.jpg"], "a.jpg"])
def test_row_of_a_conversation_has_its_picture_whatever_is_under_the_other_key(images: object) -> None:
    assert row_of(llava("What?", "A cat.", image="a.jpg", images=images), "")["img"] == "a.jpg"
    assert row_of(llava("What?", "A cat.", image="", images="a.jpg"), "")["img"] == "a.jpg"


def test_row_of_messages_has_what_the_system_says_before_the_question() -> None:
    roles = ("system", "user", "assistant")
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, ("Be brief.", "<image>What?", "No."), strict=True)
    ]
    assert row_of({"messages": messages, "images": ["a.png"]}, "") == {
        "img": "a.png",
        "prompt": "Be brief.\nWhat?",
        "label": "No.",
    }


@pytest.mark.parametrize(
    ("parts", "said"),
    [([], "Be brief.\n"), ([{"from": "system", "value": "Be kind."}], "Be brief.\nBe kind.\n")],
)
def test_row_of_a_conversation_has_what_its_system_key_says_before_the_first_question(parts: list, said: str) -> None:
    entry = llava("<image>\nWhat?", "A cat.", "Where?", "Here.", image="a.jpg", system=" Be brief. ")
    entry["conversations"] = parts + entry["conversations"]
    row = row_of(entry, "")
    assert (row["history"], row["prompt"]) == ([[f"{said}What?", "A cat."]], "Where?")


@pytest.mark.parametrize("system", [None, "", " "])
def test_row_of_a_conversation_with_an_empty_system_key_is_as_without(system: str | None) -> None:
    assert row_of(llava("What?", "That.", system=system), "") == {"prompt": "What?", "label": "That."}


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (7, "no object"),
        ({}, 'no "conversations" nor "messages"'),
        (llava("What?"), "the last question has no answer"),
        (llava("What?", "", image="a.jpg"), '"label" is empty'),
        (llava("<image><image>?", "!", image="a.jpg"), "2 pictures; one at most is needed"),
        (llava("?", "!", images=["a.jpg", "b.jpg"]), "2 pictures; one at most is needed"),
        (llava("?", "!", images=["a.jpg"], image="b.jpg"), "2 pictures; one at most is needed"),
        (llava("<image>?", "!"), '<image> in a question, but no "image"'),
        (llava("?", "!", image=3), '"image" is no text'),
        (llava("?", "!", system=["Be brief."]), '"system" is no text; what the system says is needed'),
        (llava("?", "!", system=False), '"system" is no text'),
        ({"conversations": [{"from": "gpt", "value": "!"}]}, "part 1: answer out of turn"),
        ({"conversations": [{"from": "cat", "value": "!"}]}, 'part 1: spoken by "cat"'),
        ({"conversations": [{"from": "human", "value": 3}]}, 'part 1: "value" is no text'),
        ({"conversations": ["?"]}, "part 1: no object"),
    ],
)
def test_row_of_a_bad_conversation_is_refused_with_a_sentence(entry: object, found: str) -> None:
    with pytest.raises(InputError) as error:
        row_of(entry, "in.json row 2")
    assert str(error.value).startswith("in.json row 2")
    assert found in str(error.value)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_written_rows_can_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.json").write_text(json.dumps([llava("?", "!", "??", "!!", image="a.jpg"), llava("?", "!")]))
    main([str(tmp_path / "in.json"), str(tmp_path / name), "--images", "x"])
    assert [(row.img, row.label) for row in read_rows(tmp_path / name)] == [("x/a.jpg", "!!"), (None, "!")]


def test_standard_output_gets_the_rows_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.json").write_text(json.dumps([llava("?", "猫"), llava("?")]))
    main(["in.json", "-", "--bad_rows", "skip"])
    told = capfd.readouterr()
    assert json.loads(told.out) == [{"prompt": "?", "label": "猫"}]
    assert told.err.startswith("-: 1 row, 1 turn\nLeft out, 1 bad conversation ")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_bad_conversations_are_left_out_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(llava("?", "!")), "{", json.dumps(llava("?"))]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.json"), "--bad_rows", "skip"])
    assert len(read_rows(tmp_path / "out.json")) == 1
    assert "Left out, 2 bad conversations" in capfd.readouterr().out


@pytest.mark.run
def test_command_with_bad_conversations_names_them_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([llava("?", "!"), llava("?")]))
    done = run_python(PROJECT / "scripts/convert_data.py", "in.json", "out.json", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "out.json").exists()) == (2, False)
    assert done.stderr.startswith("convert_data.py: error: in.json row 2: the last question has no answer")


def test_image_beside_the_conversations_is_found_from_rows_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "out/rows"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "in/a.jpg").write_text("one")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    (tmp_path / "in/talk.json").write_text(
        json.dumps([{"image": name, "conversations": turns} for name in ("a.jpg", "gone.jpg")])
    )
    main(["in/talk.json", "in/rows.json"])
    main(["in/talk.json", "out/rows/rows.json"])
    images = [[row.img for row in read_rows(file)] for file in ("in/rows.json", "out/rows/rows.json")]
    assert images == [["in/a.jpg", "gone.jpg"], [str(tmp_path / "in/a.jpg"), "gone.jpg"]]
    (tmp_path / "a.jpg").write_text("another one")
    with pytest.raises(SystemExit):
        main(["in/talk.json", "in/rows.json"])


def test_file_that_is_there_is_replaced_when_asked_and_the_conversations_never(tmp_path: Path) -> None:
    conversations, rows = tmp_path / "c.json", tmp_path / "rows.json"
    conversations.write_text(json.dumps([llava("?", "!")]))
    rows.write_text("mine")
    for out, flags, found in ((rows, [], "there is such a file; another name or --overwrite is needed"),
                              (conversations, ["--overwrite"], "the same file as IN")):  # fmt: skip
        before = out.read_text()
        with pytest.raises(SystemExit, match="2"):
            main([str(conversations), str(out), *flags])
        assert out.read_text() == before, found
    main([str(conversations), str(rows), "--overwrite"])
    assert [row.label for row in read_rows(rows)] == ["!"]


def test_rows_that_were_there_stay_where_the_new_ones_can_not_be_written(tmp_path: Path) -> None:
    conversations, rows = tmp_path / "c.json", tmp_path / "rows.json"
    conversations.write_text(json.dumps([llava("?", "!" * 100)] * 100))
    rows.write_text("mine")
    command = f"ulimit -f 4; {sys.executable} {PROJECT}/scripts/convert_data.py {conversations} {rows} --overwrite"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, rows.read_text()) == (2, "mine")
    assert f"{rows}: File too large; a place to write to is needed." in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"c.json", "rows.json"}


def test_rows_are_not_written_over_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps([llava("?", "!")]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "c.json"), "/dev/null", "--overwrite"])
    assert "/dev/null: not a file; the name of one is needed." in capsys.readouterr().err


def test_conversations_of_which_none_can_be_a_row_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversations = tmp_path / "c.json"
    conversations.write_text(json.dumps([{"conversations": []}, {"messages": [{"role": "user", "content": 3}]}]))
    with pytest.raises(SystemExit, match="2"):
        main([str(conversations), str(tmp_path / "rows.json"), "--bad_rows", "skip"])
    told = capsys.readouterr().err
    assert 'row 1: "conversations" is no list with something in it' in told
    assert 'row 2 part 1: "content" is no text' in told
    assert "no conversation in it that can be a row" in told


def test_folder_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text(json.dumps([llava("?", "!")]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "c.json"), str(tmp_path / "mistyped/rows.json")])
    assert f"no folder {tmp_path / 'mistyped'}; one that is there is needed." in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of_table(folder: Path, content: bytes, *flags: str, name: str = "in.csv") -> list[dict]:
    """What the command makes of a table."""
    (folder / name).write_bytes(content)
    main([str(folder / name), str(folder / "out.json"), *flags])
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def refusal_of_table(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, name: str = "in.csv") -> str:
    with pytest.raises(SystemExit) as stopped:
        rows_of_table(folder, content, name=name)
    assert (stopped.value.code, (folder / "out.json").exists()) == (2, False)
    return capsys.readouterr().err.replace(f"{folder}/", "")


def test_table_with_other_names_of_the_columns_becomes_rows(tmp_path: Path) -> None:
    content = (
        '\ufeffImage, Question ,answer,lang,id\r\na.jpg,"What, ""where""?\nAnd?",猫,zh,1\r\n\r\n,,,,\r\n,Hi,Ho,,2\r\n'
    )
    assert rows_of_table(tmp_path, content.encode(), "--images", "x") == [
        {"img": "x/a.jpg", "prompt": 'What, "where"?\nAnd?', "label": "猫", "lang": "zh"},
        {"prompt": "Hi", "label": "Ho"},
    ]


def test_table_with_tabs_becomes_rows_and_keeps_history(tmp_path: Path) -> None:
    content = b'img\tprompt\tlabel\thistory\na.jpg\tWhere?\tHere.\t"[[""What?"", ""A cat.""]]"\n\t?\t!\t\n'
    assert rows_of_table(tmp_path, content, "--lang", "en", name="in.tsv") == [
        {"img": "a.jpg", "prompt": "Where?", "label": "Here.", "history": [["What?", "A cat."]], "lang": "en"},
        {"prompt": "?", "label": "!", "lang": "en"},
    ]


def test_table_without_labels_becomes_rows_to_answer_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows_of_table(tmp_path, b"img,prompt\na.jpg,?\n") == [{"img": "a.jpg", "prompt": "?"}]
    assert 'in.csv: no column "label" or "answer"; predict.py can answer its rows' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "in.csv: no line that names the columns"),
        (b"img,text\na.jpg,!\n", 'in.csv: no column "prompt" or "question" among "img", "text"; it is needed.'),
        (b"img,image,prompt\na,b,c\n", 'in.csv: the columns "img", "image" mean the same; one of them is needed.'),
        (b"prompt,label\n?,!\n?, \n", 'in.csv row 2: "label" is empty; it is the answer to learn.'),
        (b"prompt,label\n?,!,and more\n", "in.csv row 1: 3 cells; as many as there are columns are needed, 2."),
        (b"prompt,label\n?\n", "in.csv row 1: 1 cell; as many as there are columns are needed, 2."),
        (b"prompt,label,history\n?,!,what\n", 'in.csv row 1: "history" is a text; a list of [question, answer]'),
        ("prompt,label\n猫？,猫。\n".encode("gbk"), "isn't UTF-8; save the file as UTF-8."),
        (
            b'prompt,label\n?,!\n?,"!\n?,!\n',
            "in.csv line 4: a cell that can't be read (unexpected end of data); a quote opens",
        ),
        (b'prompt,label\n?,!\n?,"!" a\n', "in.csv line 3: a cell that can't be read ("),
        (b"prompt,label\n", "in.csv: no row in it that can be used; at least one is needed."),
    ],
)
def test_table_that_can_not_be_rows_is_refused_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, found: str
) -> None:
    assert found in refusal_of_table(tmp_path, capsys, content)


def test_workbook_is_to_be_saved_as_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "once it is saved as CSV" in refusal_of_table(tmp_path, capsys, b"PK\x03\x04\xff", "in.xlsx")
