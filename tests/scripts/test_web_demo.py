"""The page in a real browser: a picture, words that come, stop, retry, undo, two models side by side; flags, and the end."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from conftest import PICTURE, PROJECT, run_python, upstream_weights, write_checkpoint

from model.checkpoints.layout import Checkpoint
from scripts.web_demo import first_language, main, tell

pytestmark = pytest.mark.run

QUESTION = "#question textarea"
# One row, and one place to wait, so that a third visitor finds no room. The models of random numbers never end an answer.
FLAGS = ("--rows", 1, "--queue", 1, "--temperature", 0, "--port", 0, "--max_length", 1000, "--max_pixels", 2)
is_there = "document.querySelector({!r})?.checkVisibility()".format
PASTE = """(() => {
    const bytes = Uint8Array.from(atob("%s"), letter => letter.charCodeAt(0)), data = new DataTransfer();
    data.items.add(new File([bytes], "a.png", {type: "image/png"}));
    document.activeElement.dispatchEvent(new ClipboardEvent("paste", {bubbles: true, clipboardData: data}));
})()"""
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, upstream_config):
    """Two, before and after a run; the second's run has held rows out."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config, weights = upstream_config | {"max_sequence_length": 2048}, upstream_weights()
    before = write_checkpoint(folder / "before", config, weights)
    head = "mixins.chatglm-final.lm_head.weight"
    after = write_checkpoint(folder / "after", config, weights | {head: weights[head].flip(0)})
    rows = [
        {"img": str(PICTURE), "prompt": "What is this?", "label": "A cat.", "lang": "en"},
        *[{"img": str(PICTURE), "prompt": "Uncharacteristically?", "label": "Incomprehensibilities.", "lang": "en"}]
        * 6,
    ]  # one more than a page of examples has
    (after / "held_out.json").write_text(json.dumps(rows))
    return before, after


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """Where the server keeps uploads."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def server(checkpoints, temporary):
    """The process of a server, and its address."""
    pytest.importorskip("gradio", reason="the page needs pip install -r requirements-web.txt")
    before, after = checkpoints
    command = [sys.executable, PROJECT / "scripts/web_demo.py", "--from_pretrained", before, "--compare", after, *FLAGS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=os.environ | {"TMPDIR": str(temporary)}, **pipes)
    try:
        started = process.stdout.readline()
        found = re.fullmatch(r"The page is at (http://127\.0\.0\.1:\d+)/\n", started)
        assert found, (started, process.stderr.read())
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def opened(browser, address, **window):
    """The page, once it can be used."""
    page = browser.open(address, **window)
    page.until(f"document.querySelector({QUESTION!r})?.value")
    return page


def send_and_stop(page):
    """Ask what stands there, or what is asked of a new picture, and end the answer."""
    page.click("#send")
    page.until(is_there("#stop"))
    page.click("#stop")
    page.until(is_there("#send"))


def chats(page):
    """What the two conversations show, without their names."""
    return [page.text_of(f"#chat{number}").partition("\n")[2].strip() for number in (0, 1)]


def until_both_have_grown_apart(page):
    """Wait until both answers have come in steps, each its own way."""
    lengths: tuple[set[int], set[int]] = set(), set()
    first, second = "", ""
    end = time.monotonic() + 30
    while min(map(len, lengths)) < 3 or first.startswith(second) or second.startswith(first):
        assert time.monotonic() < end, (lengths, first, second)
        first, second = chats(page)
        lengths[0].add(len(first))
        lengths[1].add(len(second))


@in_browser
def test_visitor_uploads_asks_sees_words_come_stops_retries_and_undoes(server, browser, tmp_path):
    page = opened(browser, server[1])
    file = tmp_path / "a.png"
    file.write_bytes(b"no picture")
    page.upload("#picture input[type=file]", file)
    page.until("""document.querySelector('#note').innerText.includes("isn't a picture")""")
    page.until("!document.querySelector('#picture img')")

    page.upload("#picture input[type=file]", PICTURE)
    page.until("document.querySelector('#note').innerText.includes('about this picture')")
    page.type(QUESTION, "What is <b>this</b>?")
    page.press("Enter", 13)
    until_both_have_grown_apart(page)
    page.click("#stop")
    page.until("document.querySelector('#note').innerText == 'Stopped.'")
    page.until(is_there("#send"))
    stopped = chats(page)
    assert all(text.startswith("What is <b>this</b>?\n") for text in stopped)
    assert stopped[0] != stopped[1]
    time.sleep(0.3)
    assert chats(page) == stopped

    page.click("#retry")
    page.until(is_there("#stop"))
    page.type(QUESTION, "And then?")  # while the answer comes
    page.click("#stop")
    page.until(is_there("#send"))
    assert page.js(f"document.querySelector({QUESTION!r}).value") == "And then?"
    again = chats(page)
    assert all(text.count("What is <b>this</b>?") == 1 for text in again)
    page.click("#undo")
    page.until(f"document.querySelector({QUESTION!r}).value == 'What is <b>this</b>?'")
    assert all("<b>" not in text for text in chats(page))

    assert [url for url in page.requested if not url.startswith(server[1])] == []
    errors = [one for one in page.events if one["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert errors == []
    page.close()


@in_browser
def test_file_that_gradio_refuses_leaves_no_picture_in_the_box_and_none_to_ask_about(server, browser, tmp_path):
    page = opened(browser, server[1])
    page.upload("#picture input[type=file]", PICTURE)
    page.until("document.querySelector('#note').innerText.includes('about this picture')")
    send_and_stop(page)
    file = tmp_path / "a.png"
    file.write_bytes(bytes(10 * 2**20 + 1))  # --max_image is 10 MiB
    page.upload("#picture input[type=file]", file)
    page.until("document.querySelector('#note').innerText.startsWith('No picture:')")
    page.until("!document.querySelector('#picture img')")
    assert "Describe" not in chats(page)[0]
    page.upload("#picture input[type=file]", PICTURE)
    page.until("document.querySelector('#note').innerText.includes('about this picture')")
    page.click("#picture button[aria-label='Remove Image']")
    page.until("document.querySelector('#note').innerText.startsWith('No picture:')")
    page.close()


@in_browser
def test_example_on_a_phone_in_chinese_by_keyboard(server, browser):
    page = opened(browser, server[1], width=390, height=844, phone=True, dark=True, language="zh-CN")
    assert page.js(f"document.querySelector({QUESTION!r}).value") == "描述这张图片。"
    assert {"发送", "重试", "设置"} <= set(page.text.split())
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    assert page.js("(table => table.scrollWidth <= table.clientWidth)(document.querySelector('#examples .table-wrap'))")
    assert page.js("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    page.js("document.querySelector('#examples td').focus()")
    page.press("Enter", 13)
    page.until("document.querySelector('#note').innerText.includes('标准答案：A cat.')")
    assert page.js(f"document.querySelector({QUESTION!r}).value") == "What is this?"
    page.focus(QUESTION)
    page.js(PASTE % base64.b64encode(PICTURE.read_bytes()).decode())
    page.until("document.querySelector('#note').innerText.includes('现在开始谈这张图片。')")
    page.press("Enter", 13)
    page.until(is_there("#stop"))
    page.js("document.querySelector('#stop').focus()")
    page.press("Enter", 13)
    page.until("document.querySelector('#note').innerText.includes('已停止。')")
    page.close()


@in_browser
def test_keyboards_focus_goes_to_the_button_that_takes_the_place_of_the_one_pressed(server, browser):
    page = opened(browser, server[1])
    page.focus("#send")
    page.press("Enter", 13)
    page.until("document.activeElement.id == 'stop'")
    page.press("Enter", 13)
    page.until("document.activeElement.id == 'send'")
    page.type(QUESTION, "And then?")
    page.press("Enter", 13)
    page.until(is_there("#stop"))
    page.js("document.querySelector('#stop').click()")
    page.until(is_there("#send"))
    assert page.js(f"document.activeElement.matches({QUESTION!r})")
    page.close()


CONTRAST = """(() => {
    const light = color => {
        const parts = color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255);
        const [r, g, b] = parts.map(part => part > 0.04045 ? ((part + 0.055) / 1.055) ** 2.4 : part / 12.92);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = found => {
        const color = getComputedStyle(found).backgroundColor;
        return color == "rgba(0, 0, 0, 0)" ? behind(found.parentElement) : color;
    };
    const contrast = (found, pseudo) => {
        const [dark, bright] = [getComputedStyle(found, pseudo).color, behind(found)].map(light).sort((a, b) => a - b);
        return (bright + 0.05) / (dark + 0.05);
    };
    const texts = [...document.querySelectorAll("#settings *, button")].filter(
        found => [...found.childNodes].some(node => node.nodeType == 3 && node.data.trim()));
    return Object.fromEntries([
        ...texts.map(found => [found.innerText, contrast(found)]),
        ...[...document.querySelectorAll("#url input, #url textarea")].map(found => ["placeholder", contrast(found, "::placeholder")]),
    ]);
})()"""


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_what_is_behind_them(server, browser, dark):
    page = opened(browser, server[1], dark=dark)
    page.js(
        "document.body.append(Object.assign(document.createElement('style'), {textContent: '*{transition:none!important}'}))"
    )
    page.click("#settings button")
    page.until("document.querySelector('#settings').innerText.includes('likeliest')")
    page.js("document.querySelector('#send').click()")
    page.until(is_there("#stop"))
    contrasts = page.js(CONTRAST)
    page.js("document.querySelector('#stop').click()")
    page.until(is_there("#send"))
    contrasts |= page.js(CONTRAST)
    assert {"Send", "Stop", "placeholder", "0 always takes the likeliest token", "200"} <= contrasts.keys()
    assert {name: contrast for name, contrast in contrasts.items() if contrast < 4.5} == {}
    page.close()


@in_browser
def test_what_gradio_says_in_english_only_is_chinese_too_and_pictures_have_a_name(server, browser, tmp_path):
    page = opened(browser, server[1], language="zh-CN")
    file = tmp_path / "web.log"
    file.write_text("a")
    page.upload("#picture input[type=file]", file)
    page.until("document.body.innerText.includes('“web.log”不是图片；请选择图片文件。')")
    assert "出错了" in page.text
    file = tmp_path / "a.png"
    file.write_bytes(bytes(10 * 2**20 + 1))  # --max_image is 10 MiB
    page.upload("#picture input[type=file]", file)
    page.until("document.body.innerText.includes('“a.png”太大，上限为 10.0 MB。')")
    assert "页：\n1\n2" in page.text_of("#examples")
    page.upload("#picture input[type=file]", PICTURE)
    page.until("document.querySelector('#picture img')")
    send_and_stop(page)
    labels = page.js("[...document.querySelectorAll('[aria-label]')].map(found => found.getAttribute('aria-label'))")
    assert {"复制对话", "从剪贴板粘贴", "上传文件", "关闭", "移除图片", "全屏"} <= set(labels)
    assert [label for label in labels if not re.search("[\u4e00-\u9fff]", label)] == []
    assert set(page.js("[...document.images].map(image => image.alt)")) == {"图片"}
    page.close()
    page = opened(browser, server[1])
    assert page.js("document.querySelector(\"[aria-label='Upload file']\") != null")
    assert set(page.js("[...document.images].map(image => image.alt)")) == {"Picture"}
    page.close()


@in_browser
@pytest.mark.long
def test_queue_says_who_waits_and_who_finds_no_room_and_a_closed_tab_makes_room(server, browser):
    pages = [opened(browser, server[1]) for _ in range(3)]
    note = "document.querySelector('#note').innerText == {!r}".format
    answers, waits, refused = pages
    answers.click("#send")
    answers.until("document.querySelector('#chat0').innerText.length > 60")
    waits.click("#send")
    waits.until(note("Waiting for a free place; 1 ask before you."))
    refused.click("#send")
    refused.until(note("Too many are asking now. Try again in a moment."))
    assert refused.js(f"document.querySelector({QUESTION!r}).value") == "Describe the image."  # it isn't lost
    answers.close()
    waits.close()
    end = time.monotonic() + 10
    while "Describe" not in chats(refused)[0] and time.monotonic() < end:
        if refused.js(is_there("#send")):
            refused.click("#send")
        time.sleep(0.3)
    assert "Describe" in chats(refused)[0]
    refused.click("#stop")
    refused.until(is_there("#send"))
    refused.close()


def test_port_in_use_is_told(server, checkpoints, capsys):
    port = server[1].rpartition(":")[2]
    with pytest.raises(SystemExit) as end:
        main(["--from_pretrained", str(checkpoints[0]), "--port", port])
    assert end.value.code == 2
    assert f"--port {port}: can't be listened to (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--rows", "0", "--queue", "-1"], "--rows 0: more than 0 is needed.\n--queue -1: 0 or more is needed."),
    (["--port", "70000"], "--port 70000: a number from 0 to 65535 is needed."),
    (["--auth", "secret"], "--auth: no NAME:PASSWORD; a name, a colon and a password are needed, or no --auth."),
    (["--max_length", "100000"], "--max_length 100000: this model takes"),
    (["--compare", "no/such/checkpoint"], "--compare no/such/checkpoint: no such folder"),
    (["--from_pretrained", "model/tiny", "--compare", "./model/tiny"],
     "--compare ./model/tiny: the same as --from_pretrained; another checkpoint is needed."),
    (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 7860: can't be listened to"),
])  # fmt: skip
def test_bad_flag_is_told_before_a_model_is_loaded(checkpoints, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        main(["--from_pretrained", str(checkpoints[0]), *flags])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("auth", ["", "secret"])
def test_bad_password_in_the_environment_is_told_by_the_variables_name(checkpoints, capsys, monkeypatch, auth):
    monkeypatch.setenv("VISUALGLM_WEB_AUTH", auth)
    with pytest.raises(SystemExit):
        main(["--from_pretrained", str(checkpoints[0])])
    found = "no NAME:PASSWORD; a name, a colon and a password are needed, or no $VISUALGLM_WEB_AUTH."
    assert capsys.readouterr().err == f"web_demo.py: error: $VISUALGLM_WEB_AUTH: {found}\n"


def test_process_of_several_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["--from_pretrained", "no/such/checkpoint"])
    assert end.value.code == 2
    assert "WORLD_SIZE=2: web_demo.py runs in one process; a start without" in capsys.readouterr().err


def test_missing_package_is_told(checkpoints):
    code = "import sys; sys.modules['gradio'] = None; from scripts.web_demo import main; main(sys.argv[1:])"
    done = run_python("-c", code, "--from_pretrained", str(checkpoints[0]))
    assert done.returncode == 2
    assert done.stderr == "web_demo.py: error: gradio isn't installed; needed is pip install -r requirements-web.txt\n"


def test_help_says_plainly_what_share_opens():
    done = run_python("scripts/web_demo.py", "--help")
    words = " ".join(done.stdout.split())
    assert "public https address" in words
    assert "whoever has it can use the page" in words


@pytest.mark.parametrize(("host", "public", "share", "auth", "told"), [
    ("127.0.0.1", [], False, None, []),
    ("0.0.0.0", [], False, None, ["--host 0.0.0.0: whoever", "Nobody is asked"]),
    ("127.0.0.1", ["https://a.example"], True, None, ["--share: https://a.example is open", "Nobody is asked"]),
    ("127.0.0.1", ["https://a.example"], True, "me:secret", ["--share: https://a.example is open"]),
    ("127.0.0.1", [], True, None, ["--share: no public address"]),
])  # fmt: skip
def test_who_can_use_the_page_is_told(capsys, host, public, share, auth, told):
    tell(["http://127.0.0.1:7860/", *public], Namespace(host=host, share=share, auth=auth))
    out, err = capsys.readouterr()
    assert out == "The page is at http://127.0.0.1:7860/\n"
    lines = err.splitlines()
    assert len(lines) == len(told)
    assert all(map(str.startswith, lines, told)), lines


@pytest.mark.parametrize(("configs", "flag", "english"), [
    ([{}], False, None), ([{}], True, True), ([{}, {"finetuning": {"asked_as": {"lang": "en"}}}], False, True),
    ([{"finetuning": {}}], False, False), ([{"finetuning": {"asked_as": None}}], True, True),
])  # fmt: skip
def test_tuned_model_is_asked_as_it_was_trained(configs, flag, english):
    checkpoints = [Checkpoint("a", Path("a"), "1", config) for config in configs]
    assert first_language(checkpoints, Namespace(english=flag)) is english


def test_sigterm_ends_it_within_two_seconds_and_leaves_nothing(server, temporary):
    process, _ = server
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began < 2
    assert "Traceback" not in errors, errors
    assert list(temporary.glob("visualglm-*")) == []  # uploads are gone
