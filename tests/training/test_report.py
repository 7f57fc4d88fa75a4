"""report.html: what it says of a run, and of several."""

import json
import re
import shutil

import pytest
from conftest import GOLDEN, PROJECT

from model.inference.scores import Result
from model.training.answers import Answered
from model.training.records import EVALUATION, STEP, VALIDATION, Record
from model.training.report import Story, next_commands, report
from scripts.report import main

EVIL = "</dd><script>alert(1)</script>"
SETTINGS = {
    "steps": 40, "samples_per_step": 4, "given": ["lr", "train_iters", "use_lora", "layer_range", "gone_since"],
    "flags": {"from_pretrained": "model/tiny", "use_lora": True, "lora_rank": 10, "lora_alpha": 1.0, "lr": 0.01,
              "train_data": ["rows.json"], "train_iters": 40, "layer_range": [], "gone_since": "x"},
    "data": {"rows.json": {"rows": 24, "trained_on": 20, "held_out": 4, "cut_labels": 2}},
    "starts": [{"time": 1e9, "versions": {"torch": "2.13.0"}, "machine": {"cpus": 2, "gpus": []}}],
}  # fmt: skip


def write_run(folder, answer, loss):
    folder.mkdir()
    image = str(GOLDEN / "upstream/images/0.png")
    rows = [("问", "雪地", answer), ("它's", "蓝天", "蓝天")]
    results = [Result(image, q, label, said, said == label, said == label, 0.5, 1.0, 1) for q, label, said in rows]
    records = [
        Record(STEP, step, 3.0 - loss * step, 0.0, epoch=step / 5, lr=0.01, seconds=1.5) for step in range(1, 41)
    ]
    records.append(Record(EVALUATION, 40, 1.25, 0.0, split=VALIDATION))
    (folder / "metrics.jsonl").write_text("".join(record.to_line() for record in records))
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    answers = {"held_out": True, "before": Answered(0, results).to_json(), "after": Answered(40, results).to_json()}
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "held_out.json").write_text("[]")
    (folder / "latest").write_text("40")
    return folder


@pytest.fixture
def runs(tmp_path):
    return [write_run(tmp_path / "one", EVIL, 0.05), write_run(tmp_path / "two", "雪地", 0.0)]


def test_page_tells_the_run_and_shows_the_worst_answer_first(runs):
    text = report(runs[:1])
    assert "The loss fell from" in text
    assert "24 rows, 20 trained on, 4 held out, 2 answers cut" in text
    assert "LoRA of rank 10, alpha 1, in all layers" in text
    assert "40 of 40, 4 samples each" in text
    assert text.index("&lt;/dd&gt;&lt;script") < text.index("它&#x27;s")
    assert "<script" not in text
    assert "1.2500 at step 40" in text


def test_lowest_evaluation_is_a_number_over_the_rows_that_the_run_evaluates_on_now(runs):
    losses = {10: 0.5, 20: float("nan"), 30: 1.5}
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.writelines(
            Record(EVALUATION, step, loss, 0.0, split=VALIDATION).to_line() for step, loss in losses.items()
        )
    lowest = "evaluation loss, lowest.*?([0-9.]+) at step"
    assert re.search(lowest, report(runs[:1]), re.DOTALL)[1] == "0.5000"
    starts = [{"after_step": step, "valid_data": [str(step)]} for step in (0, 15)]
    (runs[0] / "settings.json").write_text(json.dumps(SETTINGS | {"starts": starts}))
    assert re.search(lowest, report(runs[:1]), re.DOTALL)[1] == "1.2500"


def test_flags_stand_on_the_page_as_they_are_typed(runs):
    text = report(runs[:1])
    for flag, value in (("--lr", "0.01"), ("--train-iters", "40"), ("--use_lora", "✓"), ("--gone_since", "x")):
        assert f"<th>{flag}</th><td>{value}</td>" in text


def test_page_is_in_chinese_where_that_is_asked_for(runs, monkeypatch):
    monkeypatch.setenv("VISUALGLM_UI_LANG", "zh")
    text = report(runs)
    assert '<html lang="zh">' in text
    assert "<h2>学到了吗？</h2>" in text
    assert "损失从 " in text
    assert "<th>评估损失，最后一次</th><td>1.2500 （第 40 步）</td>" in text
    assert "24 条数据，20 条用于训练，4 条留出，2 个回答被截断" in text
    assert "LoRA，秩（rank）10，alpha 1，所有层" in text
    assert "one: 训练，" in text
    assert "<dt>训练后, two</dt>" in text
    assert "# 与它对话" in text
    assert not re.search("<(h2|dt|th)>[a-z ,]+</", re.sub("torch|one|two", "", text))


def test_what_users_name_like_our_words_is_shown_as_they_name_it(runs, monkeypatch):
    monkeypatch.setenv("VISUALGLM_UI_LANG", "zh")
    flags = SETTINGS["flags"] | {"from_pretrained": "base", "experiment_name": "time"}
    named = SETTINGS | {"flags": flags, "given": ["experiment_name"]}
    (runs[0] / "settings.json").write_text(json.dumps(named))
    text = report([runs[0].rename(runs[0].parent / "evaluation"), runs[1]])
    assert "<th>基座模型</th><td>base</td>" in text
    assert "<th>--experiment-name</th><td>time</td>" in text
    assert "</i>evaluation</span>" in text


def test_what_is_not_known_of_a_run_is_not_on_its_page(runs):
    known = {name: value for name, value in SETTINGS.items() if name not in ("samples_per_step", "starts")}
    (runs[0] / "settings.json").write_text(json.dumps(known | {"data": {"rows.json": {"trained_on": 20}}}))
    text = report(runs[:1])
    assert "<th>rows.json</th><td>20 trained on</td>" in text
    for name in ("machine", "steps", "started", "torch"):
        assert f"<th>{name}</th>" not in text


def test_page_of_two_runs_has_a_column_and_a_curve_for_each(runs):
    text = report(runs)
    assert "<th>one</th><th>two</th>" in text
    assert "one: training, mean over" in text
    assert "two: evaluation" in text
    assert "after, two" in text
    assert text.count("<svg") == 2  # losses and rates, both runs in each


def test_flag_that_one_run_was_given_is_shown_of_the_other_too(runs):
    other = SETTINGS["flags"] | {"lr": 0.0001, "use_lora": False}
    (runs[1] / "settings.json").write_text(json.dumps(SETTINGS | {"given": ["train_iters"], "flags": other}))
    text = report(runs)
    assert '<tr class="differs flag"><th>--lr</th><td>0.01</td><td>0.0001</td></tr>' in text
    assert '<tr class="differs flag"><th>--use_lora</th><td>✓</td><td></td></tr>' in text
    assert '<tr class="flag"><th>--train-iters</th><td>40</td><td>40</td></tr>' in text


def test_next_commands_are_filled_in_and_quoted(runs):
    commands = dict(next_commands(Story.of(runs[0])))
    folder = runs[0]
    assert (
        f"--from_pretrained {folder} --data {folder}/held_out.json" in commands["answer and measure every held-out row"]
    )
    assert commands["fold LoRA into an ordinary checkpoint"] == f"python scripts/merge_lora.py {folder} {folder}-merged"
    assert commands["train on, to twice as many steps"].endswith(f"--resume {folder} --train-iters 80")
    assert commands["talk to it"].endswith("--query '问'")


@pytest.mark.parametrize("missing", ["settings.json", "metrics.jsonl", "answers.json", "latest"])
def test_page_is_made_though_a_file_is_missing_or_broken(runs, missing):
    (runs[0] / missing).unlink()
    assert "<h1>one</h1>" in report(runs[:1])
    (runs[0] / missing).write_text("{")
    assert "<h1>one</h1>" in report(runs[:1])


def test_command_makes_the_page_of_a_run_in_its_folder_and_of_several_beside_the_first(runs, capsys):
    (runs[0] / "report.html").write_text(report(runs))  # an earlier page
    main([str(runs[0])])
    assert (runs[0] / "report.html").read_text().startswith("<!doctype html>")
    main([str(run) for run in runs])
    assert (runs[0].parent / "runs.html").exists()
    assert capsys.readouterr().out.splitlines() == [
        f"Report: {runs[0] / 'report.html'}", f"Report: {runs[0].parent / 'runs.html'}",
    ]  # fmt: skip


def test_run_that_is_given_twice_counts_once(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    main([str(runs[0]), runs[0].name])
    assert capsys.readouterr().out == f"Report: {runs[0].name}/report.html\n"


def test_what_is_no_run_and_given_twice_is_told_once(runs, capsys):
    (runs[0].parent / "empty").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([str(runs[0].parent / "empty")] * 2)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("empty: no metrics.jsonl and no settings.json; the folder of a run is needed.")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("metrics.jsonl", "metrics.jsonl: no line of a run in it; the file as the run wrote it is needed, or none."),
        ("settings.json", "settings.json: byte 0 is not UTF-8; JSON in UTF-8 is needed."),
        ("answers.json", "answers.json: byte 0 is not UTF-8; JSON in UTF-8 is needed."),
    ],
)
def test_page_stays_as_it_is_where_a_file_of_the_run_can_not_be_read(runs, capsys, name, told):
    main([str(runs[0])])
    page = (runs[0] / "report.html").read_text()
    (runs[0] / name).write_bytes(b"\xff\n\x00" * 9)
    with pytest.raises(SystemExit) as ended:
        main([str(runs[0])])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"{told}\n")
    assert (runs[0] / "report.html").read_text() == page
    main([str(run) for run in runs])
    assert capsys.readouterr().out.startswith("Left out: ")


def test_page_stays_as_it_is_where_a_file_of_the_run_is_closed(runs, capsys, monkeypatch):
    def closed(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", closed)  # root may read every file
    with pytest.raises(SystemExit) as ended:
        main([str(runs[0])])
    assert ended.value.code == 2
    assert "metrics.jsonl: Permission denied; " in capsys.readouterr().err
    assert not (runs[0] / "report.html").exists()


def test_what_is_no_run_among_runs_is_left_out(runs, capsys, tmp_path):
    picture = tmp_path / "MyModel-find_lr.png"
    picture.touch()
    main([str(runs[0]), str(picture), str(PROJECT / "model/tiny"), "--out", str(tmp_path / "page.html")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"Left out: {picture}: ")
    assert out[1].startswith(f"Left out: {PROJECT / 'model/tiny'}: no metrics.jsonl")
    assert out[2] == f"Report: {tmp_path / 'page.html'}"


def test_name_without_its_time_is_the_newest_run(runs, capsys, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "MyModel-01-02-03-04")
    (run / "latest").write_text("1")
    main([str(tmp_path / "MyModel")])
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["gone"], "gone: no such folder"),
        ([str(PROJECT / "model/tiny")], "no metrics.jsonl and no settings.json"),
        (["RUN", "--out", "gone/page.html"], "--out gone/page.html: no folder"),
        (
            ["RUN", "--out", "one/metrics.jsonl"],
            "one/metrics.jsonl: what is there is no page of report.py; --out with another",
        ),
        (["RUN", "--out", "-"], "--out -: standard output takes no page; the name of a file is needed."),
        (["RUN", "--out", "one"], "one: what is there is no page of report.py"),
    ],
)
def test_command_with_something_wrong_ends_with_a_sentence_and_status_2(
    runs, words, part, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([str(runs[0]) if word == "RUN" else word for word in words])
    assert left.value.code == 2
    assert part in capsys.readouterr().err


def test_page_that_can_not_be_made_does_not_fail_the_run(runs, capsys):
    from model.training.run_folder import RunFolder

    folder = RunFolder.__new__(RunFolder)
    folder.folder, folder.steps = runs[0], 40
    (runs[0] / "report.html").mkdir()  # in the page's place
    folder.tell_what_was_learned()
    told = capsys.readouterr()
    assert "The loss fell from" in told.out
    assert "report.html can't be made" in told.err
    shutil.rmtree(runs[0] / "report.html")
    folder.tell_what_was_learned()
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {runs[0] / 'report.html'}"


def test_verdict_that_can_not_be_given_does_not_fail_a_run_that_saves_nothing(capsys):
    from model.training.run_folder import RunFolder

    folder = RunFolder.__new__(RunFolder)
    folder.folder, folder.steps, folder.settings = None, 0, {}
    folder.records = [Record(STEP, step, "?", 0.0) for step in range(20)]
    folder.tell_what_was_learned()
    assert capsys.readouterr().err == (
        "What was learned can't be told (TypeError: must be real number, not str); the run itself is done.\n"
    )
