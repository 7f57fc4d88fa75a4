"""The table of Chinese sentences: it is used where Chinese is asked for only, and it fits what the commands print."""

import ast
import contextlib
import errno
import functools
import http.server
import io
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT, run_python, write_rows
from PIL import Image
from warm_start import commands

import finetune_visualglm
from model import chinese, progress
from model.adapter_config import AdapterConfig
from model.chinese import SENTENCES, choose_ui_language, in_ui_language, pattern_of
from model.cli.options import parse
from model.cli.preflight import epochs_note, preflight, rate_notes
from model.cli.resuming import command_line, finished_note
from model.data.image_check import check_rows
from model.data.remote_images import STRANGERS, downloaded, opened
from model.data.rows import ROW_NEEDS, Row, read_rows
from model.errors import InputError, exit_on_input_error
from model.finetune import by_kind
from model.inference import page
from model.inference.api_formats import Asked
from model.inference.chat import checked_question
from model.inference.load import load_for_answering
from model.inference.sampling import GREEDY
from model.inference.scores import Result, summary
from model.progress import DISK_IS_FULL, GOES_ON, say
from model.training import dry_run, report
from model.training.answers import Answered
from model.training.best_checkpoint import BestEvaluation
from model.training.find_lr import RateSweep
from model.training.memory import Batch, Setup
from model.training.records import EVALUATION, STEP, VALIDATION, Record
from model.training.signals import BEFORE_ALL, STOPPING, StopAtSignal
from model.training.terminal import Terminal
from model.training.trouble import BatchesAtHand, SkippedSteps, _no_memory
from model.training.verdict import verdict
from scripts import api, check_data, cli_demo, evaluate, merge_lora, predict, web_demo
from scripts.dev.shapes import SHAPES

DATA = "fewshot-data/dataset.json"
RUN = ("finetune_visualglm.py", "--from_pretrained", "model/tiny", "--use_lora", "--mode", "finetune")
ROW = {"img": str(PROJECT / "fewshot-data/images/train00.png"), "prompt": "背景？", "label": "雪地。"}


@pytest.fixture(autouse=True)
def language_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No language is asked for but the one that a test asks for."""
    for name in chinese.LANGUAGE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    choose_ui_language("auto")
    yield
    choose_ui_language("auto")


# --- which language ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "is_chinese"),
    [
        ({}, False),
        ({"LANG": "C.UTF-8"}, False),
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_TW.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, False),
        ({"LANG": "en_US.UTF-8", "LC_ALL": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, True),
        ({"LC_ALL": "zh_CN.UTF-8", "VISUALGLM_UI_LANG": "en"}, False),
        ({"LC_ALL": "C", "VISUALGLM_UI_LANG": "zh"}, True),
    ],
)
def test_first_variable_that_is_set_decides(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_chinese: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert chinese.speaks_chinese() is is_chinese


@pytest.mark.parametrize(
    ("words", "is_chinese"),
    [
        ([], False),
        (["--ui_lang", "zh"], True),
        (["--ui_lang=en"], False),
        (["--ui_lan", "zh"], True),
        (["--ui=zh"], True),
    ],
)
def test_flag_wins_over_the_environment_and_ends_with_its_command_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], is_chinese: bool
) -> None:
    monkeypatch.setenv("LANG", "C" if is_chinese or not words else "zh_CN.UTF-8")
    parse(words)
    assert chinese.speaks_chinese() is is_chinese
    monkeypatch.setenv("LANG", "C")
    parse([])
    assert chinese.speaks_chinese() is False


def test_error_of_another_flag_is_told_in_the_language_of_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--lr", "fast", "--ui_lang", "zh"])
    assert capsys.readouterr().err == "finetune_visualglm.py：错误：--lr fast：需要一个数。\n"


def test_unknown_language_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--ui_lang", "fr"])
    assert (
        capsys.readouterr().err == "finetune_visualglm.py: error: --ui_lang fr: one of 'auto', 'en', 'zh' is needed.\n"
    )


# --- a text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("english", "translated"),
    [
        ("Saved runs/a-11-24-12-00 (iteration 300).", "已保存 runs/a-11-24-12-00（第 300 步）。"),
        ('my.json row 7: "label" is empty; it is the answer to learn.', "my.json 第 7 条：label 是空的；它是模型要学的回答。"),
        (
            f'my.json row 1: no "prompt" and no "label"; {ROW_NEEDS}.',
            "my.json 第 1 条：缺少 prompt 和 label；每条数据是一个对象，要有文本 prompt 和 label；有图片时还要有 img。",
        ),
        ("  answers right: 3/50", "  答对：3/50"),
        (  # one question on the command line has no `clear`
            "the question and its history take 32 tokens; --max_length must be more, not 30.",
            "问题和对话历史共 32 个 token；--max_length 须大于它，而不是 30。",
        ),
        ("my.json: 1 row", "my.json：1 条数据"),
        (
            'my.json row 7 and 3 more rows: "label" is empty; it is the answer to learn.',
            "my.json 第 7 等 4 条：label 是空的；它是模型要学的回答。",
        ),
        ("x.py: error: --lr -1.0: a number greater than 0 is needed.\n--lrr: unknown", "x.py：错误：--lr -1.0：需要大于 0 的数。\n--lrr: unknown"),
        (
            "Of 4 held-out rows, answers right: before 0/4, after 4/4; ROUGE-L 0.179, then 1.000; 4 changed.",
            "4 条留出的数据：训练前答对 0/4，训练后答对 4/4；ROUGE-L 从 0.179 到 1.000；4 个回答改变了。",
        ),
        (
            "Of 4 turns of 1 held-out row, answers right: 4/4; ROUGE-L 1.000.",
            "1 条留出的数据中的 4 轮对话，答对 4/4；ROUGE-L 1.000。",
        ),
        ("Of 1 training row, answers right: 1/1; ROUGE-L 1.000.", "1 条训练数据，答对 1/1；ROUGE-L 1.000。"),
        ("Likely: LoRA is in 2 layers only (--layer_range); without that flag it is in all.",
         "可能的原因：只有 2 层有 LoRA（--layer_range）；不给这个参数则每一层都有。"),
        ("Likely: --lr 0.5 is too high; try 0.17, or --find_lr, which proposes a rate. With --holdout, --keep_best keeps the best checkpoint.",
         "可能的原因：--lr 0.5 太大；请试 0.17，或用 --find_lr 得到建议的学习率。有 --holdout 时，--keep_best 会保留最好的检查点。"),
        (
            "Largest batch: 4 rows in 1 pack of 272 tokens, 56 of them learned; features of the pictures. Batches a step: 1, "
            "processes that share the rows: 1.",
            "最大的批：4 条数据拼成 1 条序列，每条 272 个 token，其中要学的共 56 个；图片用已算好的特征。每步 1 批，1 个进程分担数据。",
        ),
        (
            "x.py: error: --from_pretrained run/2: run/2/a.pt is damaged: its checksum isn't the one in checksums.json; another"
            " iteration, or a copy of this one that is whole, is needed.",
            "x.py：错误：--from_pretrained run/2：run/2/a.pt 已损坏：校验和与 checksums.json 中记录的不同；"
            "需要另一个检查点，或这个检查点的完好副本。",
        ),
        (
            "a.pt is damaged: its checksum isn't the one in checksums.json; something else is needed.",
            "a.pt is damaged: its checksum isn't the one in checksums.json; something else is needed.",
        ),
        ("A sentence that the table lacks.", "A sentence that the table lacks."),
        ('{"answers right: 3/50": 1}', '{"answers right: 3/50": 1}'),
        ("", ""),
    ],
)  # fmt: skip
def test_text_is_translated_line_by_line_and_json_is_not(english: str, translated: str) -> None:
    choose_ui_language("zh")
    assert in_ui_language(english) == translated


def test_stream_without_chinese_characters_gets_english() -> None:
    choose_ui_language("zh")
    assert in_ui_language("answers right: 3/50", io.TextIOWrapper(io.BytesIO(), "ascii")) == "answers right: 3/50"
    assert in_ui_language("answers right: 3/50", io.TextIOWrapper(io.BytesIO(), "gb2312")) == "答对：3/50"


@pytest.mark.parametrize("english", SENTENCES)
def test_sentence_stays_as_it_is_where_chinese_is_not_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, english: str
) -> None:
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    sentence = re.sub(r"\{\w+(:d)?\}", "7", english)
    progress.say(sentence)
    progress.warn(sentence)
    assert capsys.readouterr() == (f"{sentence}\n", f"{sentence}\n")
    choose_ui_language("zh")
    assert in_ui_language(sentence) != sentence


@pytest.mark.parametrize("english", SENTENCES)
def test_chinese_has_the_fields_of_the_english(english: str) -> None:
    def names(text: str) -> list[str]:
        return sorted(set(re.findall(r"\{(\w+)(?::d)?\}", text)))

    assert names(SENTENCES[english]) == names(english)
    assert re.search("[\u4e00-\u9fff]", SENTENCES[english])


@pytest.mark.parametrize(("number", "english"), enumerate(SENTENCES))
def test_sentence_is_not_taken_for_a_more_general_one_before_it(number: int, english: str) -> None:
    filled = re.sub(r"\{\w+\}", "a text", re.sub(r"\{\w+:d\}", "7", english))
    fitting = [place for place, (pattern, _) in enumerate(chinese._patterns()) if pattern.fullmatch(filled)]
    assert fitting[0] == number


# --- the table against the commands -----------------------------------------------------------------------------------


def printed_by(function: object, *arguments: object) -> str:
    """What a call prints on both streams, whether it ends the program or not."""
    with io.StringIO() as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        with contextlib.suppress(SystemExit):
            function(*arguments)  # type: ignore[operator]
        return stream.getvalue()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server that has a folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def check(words: list[str]) -> None:
    """What the script does before it loads SAT and a model."""
    options = parse(words)
    with exit_on_input_error("finetune_visualglm.py"):
        inputs = preflight(options)
        for note in (*inputs.notes, *rate_notes(options, inputs.steps, 0)):
            say(note)


def enter_closed_folder() -> None:
    """What a command does where it may not go; root may go everywhere."""
    with exit_on_input_error("x.py"):
        raise PermissionError(errno.EACCES, "Permission denied", "closed")


def wrong_command_lines(folder: Path) -> Iterator[list[str]]:
    """Command lines that are refused before a model is loaded."""
    good = ["--use_lora", "--from_pretrained", "model/tiny", "--train-data", DATA]
    yield ["--lrr", "1", "--zzzzzz"]
    yield ["--batch-size", "few"]
    yield ["--lr", "fast"]
    yield ["--mode", "sleep"]
    yield ["--lr"]
    yield [*good, "--batch-size", "0", "--lr", "-1", "--weight-decay", "inf"]
    yield ["--keep_best", "--save", "x"]
    yield [*good, "--use_qlora", "--train-iters", "3", "--epochs", "3", "--holdout", "4", "--valid-data", DATA]
    yield [*good, "--keep_best", "--save", "x"]
    yield [*good, "--layer_range", "0", "99"]
    yield [*good, "--max_source_length", "36"]
    yield [*good[:-1], "gone.json"]
    yield [*good, "--image_folder", "gone"]
    yield ["--use_lora", "--train-data", DATA, "--from_pretrained", "gone"]
    for name in ("broken", "nothing", "empty", "bad", "gone-picture", "two/files"):
        yield [*good[:-1], str(folder / f"{name}.json")]
    for name in ("table.csv", "table.xlsx"):
        yield [*good[:-1], str(folder / name)]


def good_command_lines(folder: Path) -> Iterator[list[str]]:
    """Command lines of which much is said before a model is loaded."""
    good = ["--use_lora", "--mode", "finetune", "--from_pretrained", "model/tiny", "--train-data"]
    yield [*good, DATA, "--holdout", "4", "--epochs", "2", "--save", "none"]
    yield [*good, DATA, "--train-iters", "5", "--valid-data", DATA]
    yield [*good, DATA, "--train-iters", "12", "--auto_warmup_steps", "0", "--lr-decay-iters", "5"]
    yield [*good, DATA, "--train-iters", "5", "--valid-data", str(PROJECT / DATA)]
    yield [*good, str(folder / "talk.json"), "--train-iters", "5", "--valid-data", str(folder / "talk-and-more.json")]
    yield [*good, DATA, "--max_source_length", "50", "--max_target_length", "8"]
    yield [*good, DATA, "--eval-interval", "5"]
    yield [*good, DATA, "--find_lr"]
    yield [*good, str(folder / "thai.json")]
    yield [*good, str(folder / "talk.json"), "--max_source_length", "200"]
    yield [*good, str(folder / "talk.json"), "--max_source_length", "60", "--max_target_length", "8"]
    for name in ("many-bad", "otherwise-bad"):
        yield [*good, str(folder / f"{name}.json"), "--bad_rows", "skip"]


def told_to_visitors() -> Iterator[str]:
    """What the page says of pictures and questions that can't be used."""
    large = io.BytesIO()
    Image.new("1", (8000, 8000)).save(large, "PNG")
    model, tokenizer = load_for_answering("model/tiny")
    asked = Asked("?", [], None, GREEDY)
    for act in (
        lambda: opened(b"no picture"),
        lambda: opened(INSTEAD_OF_PICTURES["phone.jpg"]),
        lambda: opened(INSTEAD_OF_PICTURES["page.jpg"]),
        lambda: opened(b"II*\0"),
        lambda: opened(large.getvalue()),
        lambda: downloaded("http://127.0.0.1/a.png", STRANGERS),
        lambda: checked_question(asked, None, model, tokenizer, 5, lang="zh"),
    ):
        with pytest.raises(InputError) as problem:
            act()
        yield f"{problem.value}\n"


INSTEAD_OF_PICTURES = {
    "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "pointer.png": b"version https://git-lfs.github.com/spec/v1\n",
    "page.jpg": b"<!DOCTYPE html><title>Sign in</title>",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data files, of which most are wrong."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "broken.json").write_text("[{]")
    (folder / "nothing.json").touch()
    (folder / "table.csv").write_text("img,prompt,label")
    (folder / "table.xlsx").write_bytes(b"PK\3\4")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((PROJECT / "fewshot-data/images/train00.png").read_bytes()[:1000])
    for name, content in INSTEAD_OF_PICTURES.items():
        (folder / name).write_bytes(content)
    no_label = {"img": ROW["img"], "prompt": "背景？"}
    files = {
        "empty": [],
        "bad": [
            no_label,
            ROW | {"label": " "},
            {"image": "a.png", "prompt": "背景？", "label": "雪地。"},
            {"label": "雪地。"},
            {"text": "雪地。"},
        ],
        "gone-picture": [
            ROW | {"img": name}
            for name in ("gone.png", "http://a.example/b.png", "text.png", "cut.png", *INSTEAD_OF_PICTURES)
        ],
        "many-bad": [ROW, *[no_label] * 25],
        "thai": [{"prompt": "ภาพนี้คืออะไร", "label": "ภาษาไทย"}],
    }
    files["otherwise-bad"] = [ROW, *(ROW | {"lang": f"{number}"} for number in range(25))]
    files["talk"] = [ROW | {"history": [["背景里有什么？", "雪地。"]] * 2}]
    files["talk-and-more"] = [*files["talk"], ROW]
    (folder / "two").mkdir()
    (folder / "two/README.md").write_text("another one than the working directory's")
    files["two/files"] = [ROW | {"img": "README.md"}]
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def checked(data: Path) -> list[str]:
    """The lines that checks print, without a model."""
    text = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        patch.setenv("VISUALGLM_UI_LANG", "en")
        patch.setattr(progress, "QUIET_SECONDS", 0.0)
        text += printed_by(enter_closed_folder)
        for words in [*wrong_command_lines(data), *good_command_lines(data)]:
            text += printed_by(check, words)
        text += printed_by(finetune_visualglm.main, [*RUN[1:], "--train-data", DATA, "--dry_run"])
        text += printed_by(
            finetune_visualglm.main, [*RUN[1:], "--train-data", DATA, "--dry_run", "--gpu_memory", "24GB"]
        )
        text += printed_by(check_data.main, [DATA, "--from_pretrained", "model/tiny"])
        text += printed_by(check_data.main, [str(data / "bad.json")])
        text += printed_by(check_data.main, [DATA, "--valid", DATA])
        long = str(write_rows(data, [{"prompt": "背景里有什么？" * 99, "label": "雪地。" * 199}], "long.json"))
        for file in (long, str(data / "thai.json")):
            text += printed_by(check_data.main, [file, "--from_pretrained", "model/tiny"])
        asked = [
            "--from_pretrained",
            "model/tiny",
            "--data",
            str(data / "bad.json"),
            "--out",
            str(data / "answers.jsonl"),
        ]
        no_folder, no_answers = str(data / "no folder/answers.jsonl"), str(data / "text.png")
        for words in (
            asked,
            asked,
            [*asked, "--seed", "3"],
            [],
            asked[:4],
            [*asked[:-1], no_folder],
            [*asked[:-1], no_answers],
        ):
            text += printed_by(predict.main, words)
        with pytest.MonkeyPatch.context() as launched:
            launched.setenv("WORLD_SIZE", "2")
            text += printed_by(api.main, ["--from_pretrained", "model/tiny"]) + printed_by(
                merge_lora.main, ["gone", "new"]
            )
        demo = ["--from_pretrained", "model/tiny", "--image"]
        for words in (["--temperature", "-1"], ["--top_p", "2"], ["--max_length", "9999"], ["--compare", "model/tiny"]):
            text += printed_by(cli_demo.main, [*demo[:2], *words])
        text += printed_by(cli_demo.main, [*demo, "gone.png"]) + printed_by(cli_demo.main, [*demo, "model"])
        text += printed_by(cli_demo.main, [*demo, "http://127.0.0.1:9/a.png"])
        with serving(data) as url:
            text += printed_by(cli_demo.main, [*demo, f"{url}/gone.png"])
        text += printed_by(cli_demo.main, [*demo[:2], "--query", "?", "--max_length", "5"])
        text += printed_by(cli_demo.main, [*demo[:2], "--query", "背景里有什么？" * 999])
        text += "".join(told_to_visitors())
        here, public = "http://127.0.0.1:7860/", "https://a.example"
        for host, addresses in (("0.0.0.0", [here]), ("127.0.0.1", [here, public]), ("127.0.0.1", [here])):
            flags = SimpleNamespace(host=host, share=True, auth=None)
            text += printed_by(web_demo.tell, addresses, flags)
        text += printed_by(web_demo.main, [*demo[:2], "--auth", "secret"])
        text += printed_by(check_rows, read_rows(DATA))  # which preflight calls, in a process of its own
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        text += printed_by(check, [*RUN[1:], "--train-data", DATA, "--save", str(data / "runs")])
    return text.splitlines() + told_of_runs() + told_of_plans() + told_on_pages(data)


def told_of_runs() -> list[str]:
    """The lines on what runs have learned, of runs that need not be made for that."""
    still, falling = [2.5, 2.4] * 10, [2.5 - 0.1 * step for step in range(20)]
    low = {
        "mode": "finetune",
        "auto_warmup_steps": 20,
        "lr": 1e-4,
        "use_lora": True,
        "lora_rank": 10,
        "layer_range": [0, 14],
    }
    cut = {"a.json": {"rows": 20, "trained_on": 20, "cut_labels": 17}}
    before, after, same = (
        Answered(step, [Result("", "?", "yes", text, False, False, 0.0, 1.0, 1)] * 2)
        for step, text in ((0, "no"), (9, "yes"), (9, "no"))
    )
    worse = Answered(9, [Result("", "?", "yes", "no", False, False, 0.0, 9.0, 1)] * 2)
    evaluations = [Record(EVALUATION, step, loss, 0.0, split=VALIDATION) for step, loss in ((10, 0.5), (20, 1.5))]
    lines = []
    for losses, flags, more, answers in (
        (still, low, [], {"before": before, "after": same}),
        (still, {"lr": 0.1}, [], {"after": after}),
        (falling[::-1], {"lr": 0.1}, [], {}),
        (falling[::-1], {"lr": 0.1, "save": "none"}, [], {}),
        (
            falling[::-1],
            low | {"max_target_length": 448},
            [],
            {"before": before, "after": same},
        ),
        ([0.1, *falling], {"lr": 0.1}, [], {"before": before, "after": worse}),
        (falling, {}, evaluations, {"before": before, "after": after, "held_out": True}),
        (falling, {"keep_best": "loss", "early_stopping": 3}, evaluations, {}),
        (falling, {}, [], {"after": after, "rows": 1}),
        (falling, {}, [], {"after": after, "rows": 1, "held_out": True}),
    ):
        steps = [Record(STEP, number, loss, 0.0) for number, loss in enumerate(losses, 1)]
        lines += verdict(
            {"flags": flags, "steps": 20, "data": cut if "mode" in flags else {}, "positions": 448},
            [*steps, *more],
            answers,
        )
    best = BestEvaluation(None, patience=2)
    for loss in (1.0, 2.0, 2.0):
        lines += printed_by(
            best.consider, None, SimpleNamespace(save=None, iteration=1, train_iters=9), 1, {"loss": loss}
        ).splitlines()
    lines += printed_by(
        Terminal.evaluation, "iteration 5", 1.0, 2.0, {"rows": 2, "exact_match": 1, "rouge_l": 1, "bleu": 1}
    ).splitlines()
    lines += printed_by(Terminal.evaluation, "the end of training for test data", 1.0, 2.0, {}).splitlines()
    for losses in (falling * 3, still * 3):
        sweep = SimpleNamespace(losses=losses, place=None)
        lines += printed_by(RateSweep.tell, sweep).splitlines()
    args = SimpleNamespace(iteration=3, train_iters=9, save=None, lr=0.1, fp16=False)
    stopped = SimpleNamespace(
        number=signal.SIGTERM, _args=args, report=SimpleNamespace(last_step=9), is_stopping=lambda: True
    )
    lines += printed_by(StopAtSignal.leave, stopped).splitlines()
    for in_a_row in (1, 20):
        skipped = SkippedSteps(SimpleNamespace(), BatchesAtHand(), 20)  # type: ignore[arg-type]
        skipped.in_a_row = in_a_row
        with pytest.raises(InputError) as refused:
            skipped._stop(20, SimpleNamespace(args=args))  # type: ignore[arg-type]
        lines.append(str(refused.value))
    batches, options = BatchesAtHand(), SimpleNamespace(batch_size=4, gradient_accumulation_steps=1)
    batches.note({"rows": [("a.json row 1", 90)]})
    lines += [_no_memory("too much", batches, options), *by_kind({"t.layers.1.a.0": [2, 3], "t.layers.3.a.0": [2, 3]})]  # type: ignore[arg-type]
    return [*lines, f"SIGTERM: {STOPPING}", f"SIGTERM: {BEFORE_ALL}", GOES_ON, DISK_IS_FULL]


def told_of_plans() -> list[str]:
    """What --dry_run says of runs of the 6B, on a CPU and on GPUs that aren't here."""
    lines = []
    adapters = AdapterConfig(("lora",), layers=(0, 14))
    for on_gpu, packed, methods in ((True, False, ("lora",)), (False, True, ("lora",)), (False, True, ("qlora",))):
        adapters = replace(adapters, methods=methods)
        setup = Setup(SHAPES["6b"], adapters, "fp32", on_gpu=on_gpu, packed=packed, data_parallel=2)
        for images, packs in ((0, 0), (4, 0), (0, 1), (0, 2)):
            plan = dry_run.Plan(setup, Batch(4, 320, 1024, images, packs), 2)
            told: list[str] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dry_run, "plan_of", lambda *_, plan=plan: plan)
                patch.setattr(dry_run, "checkpoint_size", lambda *_: 1)
                patch.setattr(dry_run, "measured_rate", lambda *_: 1e9)
                patch.setattr(dry_run, "measured_unpacking", lambda *_: 1e9)
                patch.setattr(dry_run, "has_gpu", lambda on_gpu=on_gpu: on_gpu)
                patch.setattr("torch.cuda.device_count", lambda: 2)
                found = SimpleNamespace(name="A", total_memory=31 * 2**30)
                patch.setattr("torch.cuda.get_device_properties", lambda _, found=found: found)
                patch.setattr(dry_run, "in_column", lambda text, _, told=told: told.append(text) or text)
                report = dry_run.dry_run_report(
                    SimpleNamespace(gpu_memory=None, distributed_backend="nccl"), SimpleNamespace(checkpoint=None)
                )  # type: ignore[arg-type]
            lines += [*report.splitlines(), *told, *(cost for _, cost, _ in dry_run.ways_to_fit(plan))]
    return lines + told_of_batches_that_changed()


def told_of_batches_that_changed() -> list[str]:
    """How many samples a run sees that goes on with another --batch-size."""
    selection: Any = SimpleNamespace(sample_count=lambda file: 20)
    resumed: Any = SimpleNamespace(record=SimpleNamespace(iteration=3, samples=18))
    words = ["--train-data", DATA, "--batch-size", "4"]
    return [
        epochs_note(parse([*words, *length]), selection, 9, resumed)
        for length in (["--epochs", "2"], ["--train-iters", "9"])
    ]


def told_on_pages(folder: Path) -> list[str]:
    """What is told on the pages of runs that need not be made for that, and of an evaluation."""
    told: list[str] = []
    folder = folder / "told"
    lora = {
        "from_pretrained": "base",
        "use_lora": True,
        "lora_rank": 10,
        "lora_alpha": 1.0,
        "lr": 0.01,
        "train_data": ["a.json"],
    }
    both = {"use_qlora": True, "use_ptuning": True, "pre_seq_len": 4, "layer_range": [0, 14], "train_parts": ["vit"]}
    data = {"rows": 30, "trained_on": 20, "held_out": 4, "left_out": 6, "cut_labels": 2}
    result = Result("gone.png", "?", "yes", "", False, False, 0.0, 1.0, 1)
    for name, flags, held_out in (("one", lora, True), ("two", lora | both, False)):
        run = folder / name
        run.mkdir(parents=True)
        settings = {"flags": flags, "steps": 20, "samples_per_step": 4, "data": {"a.json": data}}
        starts = [{"time": 1e9, "machine": {"cpus": 2}}]
        records = [Record(STEP, step, 2.5 - 0.1 * step, 0.0, epoch=0.1, lr=0.1, seconds=1.0) for step in range(20)]
        records.append(Record(EVALUATION, 20, 0.5, 0.0, split=VALIDATION))
        answered = {name: Answered(step, [result]).to_json() for name, step in (("before", 0), ("after", 20))}
        (run / "settings.json").write_text(json.dumps(settings | {"starts": starts}))
        (run / "metrics.jsonl").write_text("".join(record.to_line() for record in records))
        (run / "answers.json").write_text(json.dumps({"held_out": held_out, **answered}))
        (run / "latest").write_text("20")
        if held_out:
            (run / "held_out.json").write_text("[]")
    with pytest.MonkeyPatch.context() as patch:
        for module in (chinese, page, report, evaluate):
            patch.setattr(module, "in_ui_language", lambda text: told.append(text) or text)
        patch.setattr(evaluate, "in_column", lambda text, _: told.append(text) or text)
        evaluate.row_in_words(Row(None, "?", "yes", "a.json row 1"), {"one": "no"})
        evaluate.page_of({"one": [result]}, {"one": summary([result])})
        for runs in ([folder / "one"], [folder / "two"], [folder / "one", folder / "two"]):
            report.report(runs)
    return told


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines that a short training run prints, and an evaluation and a merge of what it saved."""
    runs = tmp_path_factory.mktemp("runs")
    words = [
        "--train-data",
        DATA,
        "--train-iters",
        "2",
        "--eval-interval",
        "2",
        "--holdout",
        "4",
        "--keep_best",
        "--fp16",
        "--answers",
        "2",
    ]
    environment = {"VISUALGLM_UI_LANG": "en", "CUDA_VISIBLE_DEVICES": ""}
    done = [run_python(*RUN, *words, "--save", runs, **environment)]
    [tuned] = runs.iterdir()
    evaluation = [
        "scripts/evaluate.py",
        "--from_pretrained",
        runs / "MyModel",
        "--data",
        DATA,
        "--max_length",
        "70",
        "--compare",
        "model/tiny",
    ]
    done.append(run_python(*evaluation, **environment))
    done.append(run_python("scripts/merge_lora.py", tuned, runs / "merged", **environment))
    assert [one.returncode for one in done] == [0, 0, 0], done[-1].stderr
    again = [str(word) for word in ("--resume", tuned, "--lr", "0.001", "--train-iters", "99999")]
    stopped = stopped_by_sigterm(["finetune_visualglm.py", *again], environment)
    resumed = lines_of_resuming(tuned, again)
    return [*[line for one in done for line in (one.stdout + one.stderr).splitlines()], *stopped, *resumed]


def stopped_by_sigterm(words: list[str], environment: dict[str, str]) -> list[str]:
    """The lines that a run prints which is told to stop after a step."""
    command = [commands() / "python", *words]
    with subprocess.Popen(
        command, cwd=PROJECT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        lines: list[str] = []
        for line in run.stdout:
            if line.startswith("step ") and not any(line.startswith("step ") for line in lines):
                run.send_signal(signal.SIGTERM)
            lines.append(line)
    assert run.returncode == 143, lines
    return "".join(lines).splitlines()


def lines_of_resuming(run: Path, again: list[str]) -> list[str]:
    """What is said of going on with a run, or of taking its weights, without doing it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        notes = list(command_line(again).notes)
        for flag in (
            ["--lora_rank", "3"],
            ["--seed", "3"],
            ["--save", "x"],
            ["--save_full_model"],
            ["--valid-data", DATA],
        ):
            with pytest.raises(InputError) as refused:
                command_line(["--resume", str(run), *flag])
            notes += str(refused.value).splitlines()
        notes += command_line(
            [*RUN[1:], "--resume", "auto", "--save", str(run / "nowhere"), "--train-data", DATA]
        ).notes
        notes += command_line([*RUN[1:], "--load", str(run), "--train-data", DATA]).notes
        notes.append(str(finished_note(command_line(["--resume", str(run)]), 1)))
    return notes


# Those of a run; the others are told by checks.
OF_A_RUN = (
    "No GPU found", "Trainable, ", "step {step}", "iteration {step:d}: validation", "Best evaluation", "Saved ", "Merged ", "exact match ",
    "answers right", "Answering {rows}, and", "{name}: {count:d} tensors {shape}, layers {first", "{flag} {name}: the newest run",
    "Going on with", "{signal}: stopped after step {step:d} of {last:d}. To", "{flag} from here on", "{flag}: the run has",
    "--resume auto", "{folder}: iteration", "--load", "--mode {mode}: iter", "Report: ",
    "right ", "{count:d} held-out", "the adapters are", "the place in the data", "a run goes on", "the checkpoint has its weights",
)  # fmt: skip
OF_SLOW_ANSWERS = "Answering, tokens at most"  # tests/training/test_answers.py has it printed
# Those that only what is rare or takes long prints: they are held against the text in the code.
OF_THE_CODE = (
    "Step {step:d} skipped", "the loss is {loss}", "the gradient isn't finite", "The losses over the rates", "{name} answers at",
    "--host {host} without", "WARNING: {name}: iteration", "{file} is damaged: its", "{flag}: {problem}; ", "It does not fit",
    "1 answer was cut", "{count:d} answers were cut", "Shortened as in training", "Shortened to --max_length", "{folder}: the run ended", "The last evaluation was",
    "Starting a step's kernels", "The answer was cut off", "Rounded to {dtype}", "--out {file}: {reason}", "Finishing the answers in hand",
)  # fmt: skip


def untranslated(sentences: list[str], lines: list[str]) -> list[str]:
    """Which sentences of the table no line is like, nor a field of one."""
    told = [match["text"] for line in lines if (match := chinese._LINE.fullmatch(line))]
    parts = {part for text in told for part in with_fields(text)}
    return [sentence for sentence in sentences if not any(map(pattern_of(sentence).fullmatch, parts))]


def with_fields(text: str) -> Iterator[str]:
    """A text, and the fields of the sentence that it is, if they are sentences themselves."""
    yield text
    match = next((found for pattern, _ in chinese._patterns() if (found := pattern.fullmatch(text))), None)
    for field in match.groupdict().values() if match else ():
        if " " in field:
            yield from with_fields(field)


@functools.cache
def templates_in_the_code() -> set[str]:
    """Every text in the code, with {} in place of what is filled in."""
    return {
        re.sub(r"[{]\w*[}]", "{}", "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts))
        for folder in ("model", "scripts")
        for file in (PROJECT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
        for parts in [node.values]
    }


@pytest.mark.slow
@pytest.mark.parametrize("start", OF_THE_CODE)
def test_sentence_that_is_rarely_printed_stands_in_the_code(start: str) -> None:
    templates = templates_in_the_code()
    sentences = [sentence for sentence in SENTENCES if sentence.startswith(start)]
    assert sentences
    for sentence in sentences:
        template = re.sub(r"[{]\w+(:d)?[}]", "{}", sentence)
        assert template in templates, template


@pytest.mark.slow
def test_checks_print_every_sentence_of_theirs(checked: list[str]) -> None:
    of_checks = [
        sentence for sentence in SENTENCES if not sentence.startswith((*OF_A_RUN, *OF_THE_CODE, OF_SLOW_ANSWERS))
    ]
    assert untranslated(of_checks, checked) == []


@pytest.mark.run
def test_run_prints_every_sentence_of_its_own(ran: list[str]) -> None:
    of_a_run = [sentence for sentence in SENTENCES if sentence.startswith(OF_A_RUN)]
    assert all(any(sentence.startswith(start) for sentence in SENTENCES) for start in OF_A_RUN)
    assert untranslated(of_a_run, ran) == []


@pytest.mark.run
def test_run_in_a_chinese_locale_is_in_chinese_and_in_another_one_in_english() -> None:
    words = ["scripts/check_data.py", DATA]
    without = dict.fromkeys(chinese.LANGUAGE_VARIABLES, "")
    in_chinese = run_python(*words, **without | {"LANG": "zh_CN.UTF-8"}).stdout.splitlines()
    in_english = run_python(*words, **without | {"LANG": "C.UTF-8"}).stdout.splitlines()
    assert (in_chinese[0], in_chinese[-1]) == (f"{DATA}：20 条数据，0 条有问题", "20 条数据：没有问题。")
    assert (in_english[0], in_english[-1]) == (f"{DATA}: 20 rows, 0 bad", "20 rows: all is well.")
