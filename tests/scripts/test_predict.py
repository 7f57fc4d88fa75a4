"""Answers for the rows of a data file: each in its place, whatever stopped the command before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, PROJECT, free_port, load_model, run_here, run_python, write_rows, write_tuned
from warm_start import commands

from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.chat import chat
from scripts.predict import lines_in_order, main

COMMAND = PROJECT / "scripts/predict.py"
PICTURES = [str(GOLDEN / f"upstream/images/{number}.png") for number in range(3)]
ROWS = [
    {"img": PICTURES[0], "prompt": "背景里有什么？"},
    {"id": 7, "prompt": "你好", "history": [["一", "二"]]},
    {"img": PICTURES[1], "prompt": "Describe the image.", "lang": "en", "label": "A cat."},
    {"prompt": "你好"},
    {"img": PICTURES[2], "prompt": ""},
]
BAD = [{"img": "gone.png", "prompt": "你好"}, {"label": "没有问题"}, 5, {"prompt": "\ud800"}]


@pytest.fixture
def predict(upstream_checkpoint, capsys):
    """Runs the command with these words after --from_pretrained."""

    def run(*words, checkpoint=upstream_checkpoint):
        return run_here(main, capsys, "--from_pretrained", checkpoint, "--max_length", "70", *words)

    return run


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


# answers


@pytest.mark.slow
def test_answers_of_rows_of_any_kind_are_those_of_chat_in_the_files_order(predict, tmp_path, upstream_checkpoint):
    out = tmp_path / "answers.jsonl"
    run = predict("--data", write_rows(tmp_path, ROWS), "--out", out, "--batch-size", "2")
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{out}: 5 of 5 rows answered.\n"
    model, tokenizer = load_model(upstream_checkpoint), ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    answers = [
        chat(
            row.get("img"), model, tokenizer, row["prompt"], [tuple(turn) for turn in row.get("history", [])],
            max_length=70, temperature=0, repetition_penalty=1.0, english=row.get("lang") == "en",
        )[0]
        for row in ROWS
    ]  # fmt: skip
    assert [line["answer"] for line in lines_of(out)] == answers
    assert [line["row"] for line in lines_of(out)] == [1, 2, 3, 4, 5]
    assert all(row.items() <= line.items() for row, line in zip(ROWS, lines_of(out), strict=True))


def test_answer_that_was_cut_off_is_marked(predict, tmp_path):
    out = tmp_path / "answers.jsonl"
    predict("--data", write_rows(tmp_path, [{"prompt": "你好"}]), "--out", out, "--max_length", "12")
    assert lines_of(out)[0]["cut"] is True


@pytest.mark.slow
def test_bad_rows_keep_their_places_with_the_reason(predict, tmp_path):
    too_long = {"prompt": "很长的问题" * 100}
    data, out = tmp_path / "rows.json", tmp_path / "answers.jsonl"
    data.write_text(json.dumps([BAD[0], ROWS[0], *BAD[1:], too_long, ROWS[3]]))
    run = predict("--data", data, "--out", out)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{out}: 2 of 7 rows answered.\n"
    lines = lines_of(out)
    assert ["answer" in line for line in lines] == [False, True, False, False, False, False, True]
    parts = ["there is no file gone.png", 'no "prompt"; every row', "a number instead of an object", "half a character"]
    for line, part in zip([lines[0], *lines[2:5]], parts, strict=True):
        assert part in line["error"]
        assert part in run.stderr
    assert "--max_length must be more, not 70" in lines[5]["error"]
    assert lines[4]["prompt"] == "\ud800"


@pytest.mark.slow
def test_jsonl_with_a_broken_line_keeps_its_place(predict, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text('{"prompt": "你好"}\n{"prompt": \n{"prompt": "你好"}\n', encoding="utf-8")
    assert predict("--data", data, "--out", out).returncode == 0
    one, broken, other = lines_of(out)
    assert one["answer"] == other["answer"]
    assert "not JSON" in broken["error"]


@pytest.mark.slow
def test_picture_that_goes_while_rows_are_answered_is_an_error_in_its_place(predict, tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.predict.CHECK_SECONDS", 0.0)
    picture = tmp_path / "cut.png"
    picture.write_bytes(Path(PICTURES[0]).read_bytes()[:-30])
    out = tmp_path / "answers.jsonl"
    data = write_rows(tmp_path, [{"img": str(picture), "prompt": "一"}, {"prompt": "一"}])
    monkeypatch.setattr("scripts.predict.check_rows", lambda *_: type("Check", (), {"problems": {}}))
    assert predict("--data", data, "--out", out).returncode == 0
    bad, good = lines_of(out)
    assert "damaged or cut short" in bad["error"]
    assert "answer" in good


def test_data_file_that_grows_meanwhile_is_told(tmp_path):
    data, known = write_rows(tmp_path, ROWS[:2]), {1: {"answer": "一"}}
    lines = lines_in_order(data, 0, known, iter(()))
    assert next(lines)[1] == {"answer": "一"}
    with pytest.raises(InputError, match="it has changed since this command began"):
        next(lines)


# sampling


@pytest.mark.slow
def test_drawn_answer_depends_on_the_seed_and_the_row_not_on_its_neighbours(predict, tmp_path):
    data = write_rows(tmp_path, [{"prompt": "你好"}] * 3)

    def answers(*words):
        out = tmp_path / "answers.jsonl"
        predict("--data", data, "--out", out, "--overwrite", "--temperature", "5", "--top_p", "1", *words)
        return [line["answer"] for line in lines_of(out)]

    first = answers("--seed", "1")
    assert answers("--seed", "1", "--batch-size", "1") == first
    assert answers("--seed", "2") != first
    assert len(set(first)) > 1


# going on


@pytest.mark.slow
@pytest.mark.parametrize("seed", [[], ["--seed", "1"]])
def test_drawn_answers_of_a_command_that_goes_on_are_those_of_one_that_was_not_stopped(predict, tmp_path, seed):
    out = tmp_path / "answers.jsonl"
    words = ["--data", write_rows(tmp_path, [{"prompt": "你好"}] * 3), "--out", out, "--temperature", "5", *seed]
    predict(*words)
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n") + 1])
    predict(*words)
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_half_a_line_is_dropped_and_the_same_command_goes_on(predict, tmp_path):
    words = ["--data", write_rows(tmp_path, [*ROWS, BAD[0]]), "--out", tmp_path / "answers.jsonl"]
    predict(*words)
    whole = words[-1].read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for kept in (10, ends[0] + 1, ends[2] + 5, len(whole) - 1):
        words[-1].write_bytes(whole[:kept])
        run = predict(*words, "--batch-size", "2")
        assert run.returncode == 0, run.stderr
        assert words[-1].read_bytes() == whole
        assert run.stdout.endswith(": 5 of 6 rows answered.\n")


@pytest.mark.slow
def test_answers_that_are_all_there_need_no_model(predict, tmp_path, monkeypatch):
    words = ["--data", write_rows(tmp_path, ROWS), "--out", tmp_path / "answers.jsonl"]
    predict(*words)
    monkeypatch.setattr("model.inference.load.load_for_answering", None)
    run = predict(*words)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == f"{words[-1]}: 5 of 5 rows are done already."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (["--temperature", "1"], "--temperature 0.0, now 1.0"),
        (["--quant", "8"], "--quant not given, now 8"),
        ("data", "the data file's content"),
        ("weights", "the checkpoint's weights"),
        ("config", "(the checkpoint's config)"),
        ("answers", "not the line of row 2"),
        ("settings", "not of predict.py"),
    ],
)
def test_something_else_than_before_is_refused_unless_it_may_be_overwritten(
    predict, tmp_path, upstream_checkpoint, changed, part
):
    data, out, checkpoint = write_rows(tmp_path, ROWS[:2]), tmp_path / "answers.jsonl", upstream_checkpoint
    if changed == "config":
        checkpoint = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    predict("--data", data, "--out", out, checkpoint=checkpoint)
    if changed == "data":
        write_rows(tmp_path, ROWS[1:3])
    elif changed == "weights":
        checkpoint = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    elif changed == "config":
        config = json.loads((checkpoint / "model_config.json").read_text())
        (checkpoint / "model_config.json").write_text(json.dumps(config | {"lora_alpha": 40}))
    elif changed == "answers":
        out.write_text("".join(out.read_text().splitlines(keepends=True)[:1] * 2))
    elif changed == "settings":
        (tmp_path / "answers.jsonl.settings.json").unlink()
    before, words = out.read_bytes(), changed if isinstance(changed, list) else []
    run = predict("--data", data, "--out", out, *words, checkpoint=checkpoint)
    assert run.returncode == 2
    assert part in run.stderr
    assert "--overwrite" in run.stderr
    assert out.read_bytes() == before
    assert predict("--data", data, "--out", out, *words, "--overwrite", checkpoint=checkpoint).returncode == 0
    assert [line["row"] for line in lines_of(out)] == [1, 2]


@pytest.mark.slow
def test_answers_of_an_older_program_that_noted_no_config_are_gone_on_with(predict, tmp_path):
    words = ("--data", write_rows(tmp_path, ROWS[:2]), "--out", tmp_path / "answers.jsonl")
    predict(*words)
    settings = tmp_path / "answers.jsonl.settings.json"
    noted = json.loads(settings.read_text())
    del noted["the checkpoint's config"]
    settings.write_text(json.dumps(noted))
    assert "2 of 2 rows are done already" in predict(*words).stdout


@pytest.mark.slow
def test_file_of_somebody_else_in_the_place_of_the_settings_is_not_replaced(predict, tmp_path):
    rows = write_rows(tmp_path, ROWS[:2]).rename(tmp_path / "answers.jsonl.settings.json")
    before = rows.read_bytes()
    run = predict("--data", rows, "--out", tmp_path / "answers.jsonl", "--overwrite")
    assert run.returncode == 2
    assert f"{rows} is somebody else's; another name is needed." in run.stderr
    assert rows.read_bytes() == before


@pytest.mark.run
def test_ctrl_c_at_a_terminal_ends_its_line(upstream_checkpoint, tmp_path):
    out, (keyboard, screen) = tmp_path / "answers.jsonl", os.openpty()
    words = ["--from_pretrained", upstream_checkpoint, "--data", write_rows(tmp_path, ROWS * 200), "--out", out]
    process = subprocess.Popen(
        [commands() / "python", COMMAND, *words], stdout=screen, stderr=screen,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (out.is_file() and out.stat().st_size):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    os.write(screen, b"$ ")
    shown = b""
    while not shown.endswith(b"$ "):
        shown += os.read(keyboard, 65536)
    assert shown.endswith(b"\n$ "), shown
    os.close(keyboard)
    os.close(screen)


@pytest.mark.run
def test_killed_command_goes_on_to_the_answers_of_one_that_was_not(predict, upstream_checkpoint, tmp_path):
    data, out = write_rows(tmp_path, ROWS * 3), tmp_path / "answers.jsonl"
    words = ["--data", data, "--out", out, "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, COMMAND, "--from_pretrained", upstream_checkpoint, "--max_length", "70", *words]
    )
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = out.read_bytes()
    assert predict(*words).returncode == 0
    assert out.read_bytes().startswith(stopped)
    answers = [line["answer"] for line in lines_of(out)]
    assert answers == answers[:5] * 3


@pytest.mark.run
def test_file_that_another_process_writes_into_is_refused(predict, tmp_path):
    data, out = write_rows(tmp_path, ROWS[:1]), tmp_path / "answers.jsonl"
    hold = "import sys\nfrom pathlib import Path\nfrom scripts.predict import held\nwith held(Path(sys.argv[1])):\n print(1, flush=True)\n input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, out], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"1\n"
        run = predict("--data", data, "--out", out)
        assert run.returncode == 2
        assert f"--out {out}: another process is writing into it" in run.stderr
        other.communicate(b"\n")
    assert not out.exists()  # nothing came into it
    assert predict("--data", data, "--out", out).returncode == 0


def test_answers_that_are_there_stay_until_the_model_that_is_to_replace_them_is(predict, tmp_path):
    data, out = write_rows(tmp_path, ROWS[:1]), tmp_path / "answers.jsonl"
    predict("--data", data, "--out", out)
    before = out.read_bytes()
    assert predict("--data", data, "--out", out, "--overwrite", "--tokenizer", tmp_path / "none").returncode == 2
    assert out.read_bytes() == before


def test_command_that_answers_nothing_has_failed(predict, tmp_path):
    data, out = write_rows(tmp_path, ROWS[:2]), tmp_path / "answers.jsonl"
    run = predict("--data", data, "--out", out, "--max_length", "4")
    assert run.returncode == 2
    assert "no row could be answered" in run.stderr
    assert all("error" in line for line in lines_of(out))


# standard output


@pytest.mark.slow
def test_standard_output_gets_the_lines_alone(predict, tmp_path):
    run = predict("--data", write_rows(tmp_path, ROWS), "--out", "-")
    assert [json.loads(line)["row"] for line in run.stdout.splitlines()] == [1, 2, 3, 4, 5]
    assert run.stderr == "-: 5 of 5 rows answered.\n"


@pytest.mark.run
def test_reader_that_goes_ends_the_command_quietly(upstream_checkpoint, tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [commands() / "python", COMMAND, "--from_pretrained", upstream_checkpoint, "--out", "-", "--max_length", "70",
         "--data", write_rows(tmp_path, ROWS)],
        stdout=write, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


# what is refused


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--out", "a.jsonl", "--batch-size", "0"], "--batch-size 0: 1 or more is needed"),
        (
            ["--out", "a.jsonl", "--bad_rows", "skip"],
            "--bad_rows: skip found; keep is needed, which writes the reason in the answer's place, or error",
        ),
        (["--out", "a.jsonl", "--top_p", "2"], "--top_p 2.0: a number above 0"),
        (["--out", "a.jsonl", "--max_length", "100000"], "this model takes"),
        (["--out", "rows.json"], "the same file as --data"),
        (["--out", "no/such/folder/a.jsonl", "--data", "all-bad.json"], "--out no/such/folder/a.jsonl: no folder "),
        (["--out", "taken", "--data", "all-bad.json"], "--out taken: a folder; the name of a file is needed."),
        (["--out", "/dev/null"], "--out /dev/null: not a file"),
        (["--out", "a.jsonl", "--data", "pipe"], "--data pipe: not a file; one is needed, for it is read twice"),
        (["--out", "a.jsonl", "--data", "gone.json"], "gone.json: No such file or directory"),
        (["--out", "a.jsonl", "--data=~/gone.json"], "/home/nobody/gone.json: No such file or directory"),
        (
            ["--out", "a.jsonl", "--data", "bad.json", "--bad_rows", "error"],
            "bad.json row 2: there is no file gone.png",
        ),
        (["--out", "a.jsonl", "--data", "all-bad.json"], "all-bad.json row 1: there is no file gone.png"),
    ],
)
def test_something_wrong_is_a_sentence_and_status_2_and_nothing_is_written(predict, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/nobody")
    monkeypatch.setattr("model.inference.load.load_for_answering", None)  # nothing is loaded before
    for name, rows in (("rows", ROWS), ("bad", [ROWS[0], BAD[0]]), ("all-bad", [BAD[0]])):
        write_rows(tmp_path, rows, f"{name}.json")
    os.mkfifo("pipe")
    os.mkdir("taken")
    before = sorted(os.listdir())
    run = predict("--data", "rows.json", *words)
    assert run.returncode == 2
    assert part in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(os.listdir()) == before


# several processes


@pytest.mark.run
@pytest.mark.parametrize(
    ("processes", "parts"),
    [(2, 1), pytest.param(4, 2, marks=pytest.mark.long), pytest.param(2, 2, marks=pytest.mark.long)],
)
def test_processes_that_share_rows_or_a_model_write_the_file_of_one(upstream_checkpoint, tmp_path, processes, parts):
    (tmp_path / "broken.png").write_bytes(Path(PICTURES[0]).read_bytes()[:99])  # the first process alone sees that
    broken = {"img": str(tmp_path / "broken.png"), "prompt": "一"}
    data = write_rows(tmp_path, [broken, *ROWS, {"prompt": "很长的问题" * 100}, *ROWS, BAD[1]])

    def answers(name, *launcher, model_parallel=1):
        words = (*launcher, COMMAND, "--from_pretrained", upstream_checkpoint, "--data", data, "--max_length", "70")
        words += ("--batch-size", "2", "--temperature", "0.8", "--out", tmp_path / name)
        done = run_python(*words, "--model-parallel-size", model_parallel, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.removeprefix(f"{tmp_path}/")

    def launcher():
        return "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()

    assert answers("one.jsonl") == "one.jsonl: 10 of 13 rows answered.\n"
    assert answers("all.jsonl", *launcher(), model_parallel=parts) == "all.jsonl: 10 of 13 rows answered.\n"
    whole = (tmp_path / "one.jsonl").read_bytes()
    assert (tmp_path / "all.jsonl").read_bytes() == whole
    (tmp_path / "all.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    assert answers("all.jsonl", *launcher(), model_parallel=parts).startswith(
        "all.jsonl: 7 of 13 rows are done already."
    )
    assert (tmp_path / "all.jsonl").read_bytes() == whole


@pytest.mark.run
def test_processes_find_nothing_left_to_answer(upstream_checkpoint, tmp_path):
    words = (COMMAND, "--from_pretrained", upstream_checkpoint, "--data", write_rows(tmp_path, [{"prompt": "你好"}]))
    words += ("--max_length", "20", "--out", tmp_path / "answers.jsonl")
    assert run_python(*words).returncode == 0
    together = run_python("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), *words)
    assert together.returncode == 0, together.stderr
    assert together.stdout == f"{words[-1]}: 1 of 1 rows are done already.\n{words[-1]}: 1 of 1 rows answered.\n"


def test_processes_that_cannot_share_models_are_refused_before_anything_is_read(predict, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = ("--data", tmp_path / "none.json", "--out", "-", "--model-parallel-size", "2")
    run = predict(*words, checkpoint="no/such/checkpoint")
    assert run.returncode == 2
    assert run.stderr == (
        "predict.py: error: --model-parallel-size 2: 3 processes found; a divisor of them is needed.\n"
    )
