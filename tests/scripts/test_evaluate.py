"""Evaluation: batched answers equal single ones, and the measures are what they say."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, PROJECT, free_port, load_model, run_here, run_python, write_rows, write_tuned

from model.checkpoints.whole import is_replaceable
from model.data.prompt import Lengths, context_ids, sample_from_row
from model.data.rows import Row, row_from_json
from model.inference.batch import greedy_answers, label_losses
from model.inference.chat import chat, image_tensor
from model.inference.page import OWN_PAGE
from model.inference.scores import Result, result_of, summary
from model.progress import show
from scripts import cli_demo, evaluate, predict
from scripts.evaluate import comparison

ROWS = GOLDEN / "upstream/dataset.json"
PICTURES = [GOLDEN / f"upstream/images/{number}.png" for number in range(3)]
QUESTIONS = ["一", "这张图片的背景里有什么内容？", "描述这张图片。"]
COMMAND = PROJECT / "scripts/evaluate.py"


@pytest.fixture(params=[{}, {"use_lora": True, "lora_rank": 4}, {"use_ptuning": True, "pre_seq_len": 5}])
def model(request, upstream_checkpoint):
    model = load_model(
        upstream_checkpoint, "FineTuneVisualGLMModel" if request.param else "VisualGLMModel", **request.param
    )
    for name, parameter in model.named_parameters():
        if "matrix_B" in name or "ptuning" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def alone(picture, model, tokenizer, question, max_length):
    return chat(picture, model, tokenizer, question, max_length=max_length, temperature=0, repetition_penalty=1.0)[0]


# batches


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [50, 70])
def test_batched_answers_with_pictures_equal_those_one_by_one(model, tokenizer, max_length):
    image = torch.cat([image_tensor(picture, model) for picture in PICTURES])
    contexts = [context_ids(question, None, True, tokenizer, model.image_length) for question in QUESTIONS]
    assert len({len(ids) for ids, _ in contexts}) == 3
    answers = greedy_answers(contexts, image, model, tokenizer, max_length)
    assert answers == [
        alone(*pair, max_length) for pair in zip(PICTURES, [model] * 3, [tokenizer] * 3, QUESTIONS, strict=True)
    ]


@pytest.mark.slow
def test_batched_answers_without_pictures_equal_those_one_by_one(model, tokenizer):
    contexts = [context_ids(question, None, False, tokenizer, model.image_length) for question in QUESTIONS]
    answers = greedy_answers(contexts, None, model, tokenizer, 40)
    assert answers == [alone(None, model, tokenizer, question, 40) for question in QUESTIONS]


def test_batched_answers_end_each_at_its_own_eop(upstream_checkpoint, tokenizer):
    model = load_model(upstream_checkpoint)
    contexts = [context_ids(question, None, False, tokenizer, model.image_length) for question in QUESTIONS]
    step = 0

    def end_row_after(head, inputs, logits):
        nonlocal step
        logits[..., 554] = 1e4
        if step:
            place = {1: 0, 2: 1, 3: 0}[step]  # rows 0 1 2, then 2 1, then 2: the last one moves to where one has ended
            logits[place, :, tokenizer.eos_token_id] = 1e5
        step += 1

    model.get_mixin("chatglm-final").lm_head.register_forward_hook(end_row_after)
    answers = greedy_answers(contexts, None, model, tokenizer, 60)
    assert answers == [tokenizer.decode([554] * count).strip() for count in (1, 2, 3)]
    assert step == 4


def test_context_that_fills_max_length_gets_no_answer(upstream_checkpoint, tokenizer):
    model = load_model(upstream_checkpoint)
    context = context_ids("一", None, False, tokenizer, model.image_length)
    assert greedy_answers([context], None, model, tokenizer, len(context[0])) == [""]


def test_label_losses_in_a_batch_equal_those_one_by_one(model, tokenizer):
    rows = [
        row_from_json({"img": str(PICTURES[n]), "prompt": QUESTIONS[n], "label": "蓝天" * (n + 1)}, "")
        for n in range(3)
    ]
    samples = [sample_from_row(row, tokenizer, Lengths(32, 64, 64)) for row in rows]
    image = torch.cat([image_tensor(picture, model) for picture in PICTURES])
    batched = label_losses(samples, image, model, tokenizer)
    single = [label_losses([samples[n]], image[n : n + 1], model, tokenizer)[0] for n in range(3)]
    assert [count for _, count in batched] == [sum(label != -100 for label in sample.labels) for sample in samples]
    assert [loss for loss, _ in batched] == pytest.approx([loss for loss, _ in single], rel=1e-5)


def result(answer, label):
    return result_of(Row("a.png", "问", label, "a.json row 1"), answer, loss=1.0, tokens=1)


def test_comparison_counts_rows_that_one_alone_has_right():
    assert comparison([result("a", "a"), result("b", "a")], [result("b", "a"), result("b", "a")]) == (
        "right in the first only: 1, in the second only: 0"
    )


# the command


@pytest.mark.run
def test_command_compares_two_checkpoints_and_writes_every_row(upstream_checkpoint, tmp_path):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2)
    out = tmp_path / "results.json"
    run = run_python(
        COMMAND, "--from_pretrained", tuned, "--compare", upstream_checkpoint, "--data", ROWS, "--out", out,
        "--max_length", "80", "--batch-size", "4", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "answers right: 0/6"
    report = json.loads(out.read_text())
    assert [part["checkpoint"] for part in report] == [str(tuned), str(upstream_checkpoint)]
    assert [len(part["results"]) for part in report] == [6, 6]
    assert report[0]["results"][0].keys() == Result.__dataclass_fields__.keys()
    assert report[0]["loss"] != report[1]["loss"]


@pytest.mark.run
def test_command_puts_4_bits_beside_full_width(upstream_checkpoint, tmp_path):
    out = tmp_path / "results.json"
    run = run_python(
        COMMAND, "--from_pretrained", upstream_checkpoint, "--quant", "4", "--full_width", "--data", ROWS, "--out", out,
        "--max_length", "80", "--batch-size", "4", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    narrow, full = json.loads(out.read_text())
    assert full["checkpoint"] == f"{upstream_checkpoint} in full width"
    assert narrow["loss"] != full["loss"]
    assert narrow["loss"] == pytest.approx(full["loss"], rel=0.1)
    assert f"loss per token {full['loss']:.4f}" in run.stdout


def evaluate_here(*words):
    """The command in this process: it loads a small model in a second."""
    evaluate.main([str(word) for word in words])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"lang": "en", "source_prefix": "Look: "}, {"max_source_length": 46}, {}])
def test_question_is_asked_as_the_checkpoint_was_trained(flags, upstream_checkpoint, tmp_path):
    from model.inference.load import load_for_answering

    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2, **flags)
    model, tokenizer = load_for_answering(tuned)
    row = row_from_json({"img": str(PICTURES[0]), "prompt": QUESTIONS[1] * 3, "label": "雪地"}, "row 1")
    options = evaluate.command_line().parse_args(["--from_pretrained", "x", "--data", "x", "--max_length", "100"])
    facts = []
    (question,) = evaluate.asked([row], model, tokenizer, options, facts)
    lengths = {"max_source_length": 100, "max_target_length": 100} | flags
    trained = sample_from_row(row, tokenizer, Lengths.from_args(SimpleNamespace(image_length=32, **lengths)))
    assert question.input_ids == trained.input_ids[: len(question.input_ids)]
    assert trained.labels[len(question.input_ids) - 1] == tokenizer.bos_token_id
    assert [fact.room for fact in facts] == [100 - len(question.input_ids)]


def test_chat_asks_as_the_checkpoint_was_trained(upstream_checkpoint, tmp_path):
    from model.inference.chat import chat_question
    from model.inference.load import load_for_answering

    tuned = write_tuned(
        upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2, lang="en", source_prefix="Look: "
    )
    model, tokenizer = load_for_answering(tuned)
    turns = [("Look: 二", "三")]
    for lang, english in ((None, True), ("en", True), ("zh", False)):
        question = chat_question(None, model, tokenizer, "一", [("二", "三")], lang=lang)
        expected, _ = context_ids("Look: 一", turns, False, tokenizer, 32, english=english)
        assert question.input_ids == expected


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["zh", "en"])
def test_row_is_asked_in_its_own_language_else_in_that_of_training_by_every_command(
    trained, upstream_checkpoint, tmp_path, capsys
):
    rows = [{"prompt": "你好", "label": "雪地"} | lang for lang in ({}, {"lang": "zh"}, {"lang": "en"})]
    torch.manual_seed(0)
    tuned = write_tuned(
        upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2, lang=trained, max_source_length=64
    )
    words = ("--from_pretrained", tuned, "--data", write_rows(tmp_path, rows), "--max_length", "30", "--out")
    evaluate_here(*words, tmp_path / "results.json")
    predict.main([str(word) for word in (*words, tmp_path / "answers.jsonl")])
    evaluated = [one["answer"] for one in json.loads((tmp_path / "results.json").read_text())["results"]]
    predicted = [json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert predicted == evaluated
    chinese, english = evaluated[1:]
    assert chinese != english  # the model of random numbers answers each frame otherwise
    assert evaluated[0] == (english if trained == "en" else chinese)
    capsys.readouterr()
    cli_demo.main([str(word) for word in (*words[:2], "--query", "你好", "--max_length", "30", "--temperature", "0")])
    assert capsys.readouterr().out.strip() == evaluated[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "bound", "others"),
    [
        ({"max_source_length": 64}, "Shortened as in training, to --max_source_length 64", "ask them whole."),
        ({}, "Shortened to --max_length 90", "refuse what doesn't fit."),
    ],
)
def test_shortened_questions_are_counted(trained, bound, others, upstream_checkpoint, tmp_path, capsys):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2, **trained)
    rows = [{"prompt": "你好"}, {"prompt": "好" * 99}, {"prompt": "好", "history": [["问" * 50, "答" * 50]]}]
    data = write_rows(tmp_path, [row | {"label": "雪"} for row in rows])
    out = tmp_path / "results.json"
    evaluate_here("--from_pretrained", tuned, "--data", data, "--max_length", "90", "--out", out)
    assert f"{bound}: 2 of 3 questions; predict.py, cli_demo.py and the servers {others}" in capsys.readouterr().out
    assert [one["shortened"] for one in json.loads(out.read_text())["results"]] == [False, True, True]


def test_command_leaves_bad_rows_out_and_writes_a_page_the_worst_rows_first(upstream_checkpoint, tmp_path, capsys):
    rows = [
        {"img": str(PICTURES[0]), "prompt": "一", "label": "雪地"},
        {"img": "gone.png", "prompt": "二", "label": "三"},
    ]
    data = write_rows(tmp_path, [*rows, {"prompt": "三", "label": "<b>"}])
    page = tmp_path / "page.html"
    flags = ("--from_pretrained", upstream_checkpoint, "--data", data, "--max_length", "60", "--html", page)
    with pytest.raises(SystemExit):
        evaluate_here(*flags)
    assert "row 2" in capsys.readouterr().err
    evaluate_here(*flags, "--bad_rows", "skip")
    out = capsys.readouterr().out
    assert "Left out, 1 bad row (--bad_rows skip):" in out
    assert out.splitlines()[-1] == "answers right: 0/2"
    assert "(no picture)\n  asked  三\n" in out
    assert "2 answers were cut off (--max_length 60)." in out  # the model of random numbers never ends
    evaluate_here(*flags[:2], "--data", write_rows(tmp_path, rows[:1], "one.json"), "--max_length", "60")
    assert "1 answer was cut off (--max_length 60)." in capsys.readouterr().out
    assert "&lt;b&gt;" in page.read_text()
    assert page.read_text().count('class="row') == 2


def test_row_and_its_answers_are_shown_as_they_are_where_chinese_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("VISUALGLM_UI_LANG", "zh")
    row = Row(None, "1 row: all is well.", "answer B\nlabel\n3 rows: all is well.", "a.json row 1")
    show(evaluate.row_in_words(row, {"one": "no folder here", "two": "answers right: 1/2"}), "\n")
    assert capsys.readouterr().out == (
        "(no picture)\n  问题   1 row: all is well.\n  标签   answer B\nlabel\n3 rows: all is well.\n"
        "  回答   no folder here  (one)\n  回答   answers right: 1/2  (two)\n"
    )


def test_results_so_far_are_in_the_file_before_the_last_row_is_answered(tmp_path):
    path = tmp_path / "results.json"
    output = evaluate.Output(str(path), rows=3)
    one = Result("a.png", "问", "答", "答", True, True, 1.0, 0.5, 2)
    output.note("tuned", {1: one})
    so_far = json.loads(path.read_text())
    assert (so_far["unfinished"], len(so_far["results"])) == ("1 of 3 rows", 1)
    output.write({"tuned": [one] * 3}, {"tuned": summary([one] * 3)})
    assert "unfinished" not in json.loads(path.read_text())


@pytest.mark.parametrize("flag", ["--out", "--html"])
@pytest.mark.parametrize(
    "content", ['[{"prompt": "?", "label": "!"}]', '{"kind": "step", "loss": 3}', "<!doctype html>"]
)
def test_file_of_somebody_else_is_not_replaced(tmp_path, flag, content):
    (tmp_path / "file").write_text(content)
    options = evaluate.command_line().parse_args(
        ["--from_pretrained", "x", "--data", str(ROWS), flag, str(tmp_path / "file")]
    )
    assert evaluate.place_problems(options) == [
        f"{flag} {tmp_path / 'file'}: there is such a file, and not of evaluate.py; another name is needed."
    ]


def test_file_that_cant_be_read_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("something")

    def open_nothing(*_):
        raise PermissionError

    monkeypatch.setattr("builtins.open", open_nothing)
    assert not is_replaceable(tmp_path / "file", evaluate.OWN_RESULTS)


def test_page_of_an_older_program_is_replaced(tmp_path):
    (tmp_path / "page.html").write_text(
        "<!doctype html>\n<html><head><style>\n:root{color-scheme:light dark;--page:#fff"
    )
    assert is_replaceable(tmp_path / "page.html", OWN_PAGE)


def test_results_and_page_of_an_earlier_evaluation_are_replaced(tmp_path):
    out, html = str(tmp_path / "results.json"), str(tmp_path / "page.html")
    options = evaluate.command_line().parse_args(
        ["--from_pretrained", "x", "--data", str(ROWS), "--out", out, "--html", html]
    )
    one = Result("a.png", "问", "答", "答", True, True, 1.0, 0.5, 2)
    output, measures = evaluate.Output(out, rows=2), summary([one])
    evaluate.written(html, evaluate.page_of({"tuned": [one]}, {"tuned": measures}), "--html")
    for write in (
        lambda: output.note("tuned", {0: one}),
        lambda: output.write({"tuned": [one]}, {"tuned": measures}),
        lambda: output.write({"tuned": [one], "base": [one]}, {"tuned": measures, "base": measures}),
        lambda: (tmp_path / "results.json").write_text(""),
    ):
        write()
        assert evaluate.place_problems(options) == []


@pytest.mark.run
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--from_pretrained", "gone", "--data", str(ROWS)], "--from_pretrained gone: no such folder"),
        (["--from_pretrained", "BASE", "--data", "gone.json"], "gone.json"),
        (["--from_pretrained", "BASE", "--compare", "gone", "--data", str(ROWS)], "--compare gone: no such folder"),
        (["--from_pretrained", "BASE", "--compare", "BASE", "--data", str(ROWS)], "another checkpoint is needed"),
        (
            ["--from_pretrained", "model/tiny", "--compare", "./model/tiny", "--data", str(ROWS)],
            "--compare ./model/tiny: the same as --from_pretrained; another checkpoint is needed.",
        ),
        (["--from_pretrained", "BASE", "--data", str(ROWS), "--batch-size", "0"], "1 or more is needed"),
        (["--from_pretrained", "BASE", "--data", str(ROWS), "--full_width"], "--quant or --dtype is needed with it"),
        (["--from_pretrained", "BASE", "--data", str(ROWS), "--out", "gone/results.json"], "no folder"),
        (["--from_pretrained", "BASE", "--data", str(ROWS), "--html", "/"], "--html /: a folder"),
        (["--from_pretrained", "BASE", "--data", str(ROWS), "--out", str(ROWS)], "the same file as --data"),
        (
            ["--from_pretrained", "BASE", "--data", str(ROWS), "--max_length", "20"],
            "--max_length 20: no room for a question beside",
        ),
        (
            ["--from_pretrained", "BASE", "--data", str(ROWS), "--out", "x.json", "--html", "./x.json"],
            "the same file as --out",
        ),
    ],
)
def test_command_with_something_wrong_ends_with_a_sentence_and_status_2(upstream_checkpoint, capsys, words, part):
    run = run_here(evaluate.main, capsys, *[upstream_checkpoint if word == "BASE" else word for word in words])
    assert run.returncode == 2
    assert part in run.stderr
    assert "Traceback" not in run.stderr


# several processes


@pytest.mark.run
@pytest.mark.parametrize(
    ("processes", "parts"),
    [(2, 1), pytest.param(4, 2, marks=pytest.mark.long), pytest.param(2, 2, marks=pytest.mark.long)],
)
def test_processes_that_share_rows_or_a_model_have_the_results_of_one(upstream_checkpoint, tmp_path, processes, parts):
    (tmp_path / "broken.png").write_bytes(PICTURES[0].read_bytes()[:99])  # the first process alone sees that
    bad = {"img": str(tmp_path / "broken.png"), "prompt": "一", "label": "二"}
    data = write_rows(tmp_path, [bad, *json.loads(ROWS.read_text())])

    def evaluated(name, *launcher):
        out = tmp_path / f"{name}.json"
        words = ("--from_pretrained", upstream_checkpoint, "--data", data, "--max_length", "60", "--batch-size", "2")
        words += ("--bad_rows", "skip")
        done = run_python(
            *launcher, COMMAND, *words, "--out", out, "--model-parallel-size", 1 if name == "one" else parts,
            cwd=GOLDEN / "upstream",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout[done.stdout.index("images/0.png") :], json.loads(out.read_text())

    text, one = evaluated("one")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port())
    text_of_all, together = evaluated("together", *launcher)
    assert text_of_all == text
    for found, expected in zip(together.pop("results"), one.pop("results"), strict=True):
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        assert found == expected
    assert together.pop("checkpoint") == one.pop("checkpoint")
    assert together == pytest.approx(one, rel=1e-5)
