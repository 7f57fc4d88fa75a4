"""The page's server: what a browser sends it, what people who mean harm send it, and what it hands out."""

import base64
import io
import json
import re
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from conftest import GOLDEN, PICTURE, PROJECT, load_model, upstream_weights, write_checkpoint
from hostile_pictures import saved
from PIL import Image

from model.data.remote_images import Limits
from model.data.rows import Row
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.engine import Engine
from model.inference.sampling import GREEDY
from model.inference.serving import Service
from model.inference.talk import Speaker
from model.inference.web_guard import listening
from scripts.dev.fuzz_data import png_header
from scripts.web_demo import gradio_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs pip install -r requirements-web.txt"),
]

QUESTION = "这是什么？"
API = "/gradio_api"
# small limits, so that a test reaches them soon
LIMITS = Limits(most_bytes=2**19, most_pixels=2_000_000, seconds=5.0)
LENGTH = 2000  # tokens of a conversation
HOW = ["zh", 0, 0.4, 100, 12, ""]  # language, temperature, top_p, top_k, max_tokens, seed


@pytest.fixture(scope="module")
def serve(tmp_path_factory, upstream_config):
    """A function that serves a page of its own; every page has a model with one row, whose answers take seconds."""
    config = upstream_config | {"max_sequence_length": LENGTH}
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "long", config, upstream_weights())
    with ExitStack() as stack:
        tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
        model = load_model(checkpoint)
        service = stack.enter_context(Service(Engine(model, tokenizer, 1, LENGTH), 1))
        stack.enter_context(gradio_settings())
        from model.inference.web_page import Page, Settings, closed, launched

        row = Row(str(PICTURE), "描述这张图片。", "一只猫。", "held_out.json row 1", lang="zh")
        settings = Settings(GREEDY, None, LENGTH, 60.0, LIMITS, "auto", [row, row._replace(img="gone.png")])

        def served(auth=None, port=0, **limits):
            here = replace(settings, limits=replace(LIMITS, **limits))
            page = Page([Speaker("small", service, model, tokenizer)], here)
            if not port:
                with listening("127.0.0.1", 0) as found:
                    port = found.getsockname()[1]
            stack.callback(closed, page)
            [address] = launched(page, "127.0.0.1", port, auth, share=False)
            served.pages.append(page)
            return address.rstrip("/")

        served.pages = []

        yield served


@pytest.fixture(scope="module")
def address(serve):
    return serve()


class Visitor:
    """What the page's own JavaScript would send; each has a session of its own."""

    number = 0

    def __init__(self, address, language="en"):
        alone = httpx.Limits(max_keepalive_connections=0)  # after a fault the server closes a connection
        self.http = httpx.Client(
            base_url=address, headers={"accept-language": language}, timeout=30, limits=alone, verify=False
        )
        Visitor.number += 1
        self.session = f"visitor{Visitor.number}"
        self.functions = {one["api_name"]: one["id"] for one in self.http.get("/config").json()["dependencies"]}

    def send(self, name, *values):
        """The response to an event, as it is queued."""
        number = self.functions.get(name, name)
        body = {"data": [None, *values], "fn_index": number, "session_hash": self.session}
        return self.http.post(
            f"{API}/queue/join", content=json.dumps(body), headers={"content-type": "application/json"}
        )

    @contextmanager
    def hears(self):
        """The lines that this visitor's events send."""
        with self.http.stream("GET", f"{API}/queue/data", params={"session_hash": self.session}) as stream:
            yield stream.iter_lines()

    def asks(self, name, *values):
        """What an event leads to at its end: the message that the page gets."""
        sent = self.send(name, *values)
        assert sent.status_code == 200, sent.text
        with self.hears() as lines:
            for line in lines:
                message = json.loads(line.removeprefix("data: ")) if line else {"msg": ""}
                if message["msg"] == "process_completed":
                    return message
        raise AssertionError("the event has no end")

    def note(self, name, *values):
        """The note that an event leads to: that of the part `note`, or the message of an error."""
        message = self.asks(name, *values)
        told = [part for part in message["output"].get("data", ()) if isinstance(part, str) and part.startswith("<p>")]
        return told[0] if told else str(message["output"].get("error"))

    def upload(self, content, name="a.png"):
        return self.http.post(f"{API}/upload", files={"files": (name, content)})

    def looks(self, content):
        """The note on an uploaded picture."""
        [path] = self.upload(content).json()
        return self.note("look", file(path))


def file(path, **more):
    """What the page sends of an uploaded picture."""
    return {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}, **more}


@pytest.fixture
def visitor(address):
    return Visitor(address)


# What a browser sends


def test_picture_and_questions_are_answered_turn_by_turn(visitor):
    assert "about this picture" in visitor.looks(PICTURE.read_bytes())
    visitor.asks("ask", QUESTION, *HOW)
    chat, *_ = visitor.asks("ask", "再说一次", *HOW)["output"]["data"]
    assert isinstance(chat, list)
    said = visitor.asks("undone")["output"]["data"]
    assert [one["role"] for one in said[0]] == ["user", "assistant"]
    assert said[2] == "再说一次"


def test_same_seed_gives_the_same_answer_again_and_a_word_is_no_seed(visitor):
    how = ["zh", 1.5, 1, 100, 12]

    def answer(seed):
        visitor.asks("cleared")
        visitor.asks("ask", QUESTION, *how, seed)
        visitor.asks("ask", "b", *how, seed)
        (question, answer), *_ = visitor.asks("undone")["output"]["data"]
        assert question["content"][0]["text"] == QUESTION
        return answer["content"][0]["text"]

    one, same, other = answer("5"), answer("5"), answer("6")
    assert one == same != other
    assert "seed five: a whole number is needed" in visitor.note("ask", QUESTION, *how, "five")


def test_example_comes_with_its_picture_its_question_and_its_right_answer(visitor):
    language, picture, chat, note, question, *_ = visitor.asks("chosen", 0)["output"]["data"]
    assert (language, chat, note, question) == ("zh", [], "<p>Right answer: 一只猫。</p>", "描述这张图片。")
    shown = Image.open(io.BytesIO(visitor.http.get(picture["url"]).content))
    assert shown.convert("RGB").tobytes() == Image.open(PICTURE).convert("RGB").tobytes()
    assert "Right answer: 一只猫。" in visitor.note("ask", question, *HOW)


@pytest.fixture
def pictures():
    """The address of a folder that has a.png, and pages under all other names."""

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE.read_bytes() if self.path == "/a.png" else b"<html>no picture</html>")

    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_address_of_no_picture_leaves_the_conversation_as_it_is(serve, pictures):
    def answer():
        chat, *_ = visitor.asks("ask", QUESTION, *HOW)["output"]["data"]
        assert isinstance(chat, list)
        said = visitor.asks("undone")["output"]["data"][2]
        assert said == QUESTION
        return chat

    visitor = Visitor(serve(private_networks=True))
    visitor.asks("fetched", f"{pictures}/a.png")
    visitor.asks("ask", "再说一次", *HOW)
    before = answer()
    assert "isn&#x27;t a picture" in visitor.note("fetched", f"{pictures}/a.html")
    assert answer() == before


def test_picture_of_an_address_is_shown_and_asked_about(serve, pictures):
    visitor = Visitor(serve(private_networks=True))
    message = visitor.asks("fetched", f"{pictures}/a.png")
    picture, *_ = message["output"]["data"]
    shown = Image.open(io.BytesIO(visitor.http.get(picture["url"]).content))
    assert shown.convert("RGB").tobytes() == Image.open(PICTURE).convert("RGB").tobytes()
    assert "<p>" in visitor.note("ask", QUESTION, *HOW)


def test_example_without_its_picture_is_left_out(visitor):
    config = visitor.http.get("/config").json()
    [table] = [one for one in config["components"] if one["type"] == "dataset"]
    assert len(table["props"]["samples"]) == 1


@pytest.mark.parametrize(("language", "first", "told"), [
    ("zh-CN,zh;q=0.9", ["zh", "描述这张图片。"], "请先输入问题。"), ("de", ["en", "Describe the image."], "Type a question first."),
])  # fmt: skip
def test_page_speaks_the_language_of_the_browser(address, language, first, told):
    visitor = Visitor(address, language)
    assert visitor.asks("welcome")["output"]["data"][1:] == first
    assert told in visitor.note("ask", " ", *HOW)


def test_text_is_shown_as_it_is_and_never_as_html(visitor):
    for question in ("<img src=//a.example/b.png> isn't", "b"):
        visitor.asks("ask", question, *HOW)
    (question, _), *_ = visitor.asks("undone")["output"]["data"]
    assert question["content"][0]["text"] == "&lt;img src=//a.example/b.png&gt; isn't"


def test_page_names_nothing_outside_this_machine_that_a_browser_fetches(visitor):
    page = visitor.http.get("/").text
    fetched = re.findall(r"""(?:src|<link[^>]*href)=["'](https?:)?//[^"']*""", page)
    assert fetched == []


# Hostile


IN_BASE64 = base64.b64encode(PICTURE.read_bytes()).decode()
HOSTILE = {
    "PNG bomb": (lambda one: one.looks(png_header(40_000, 40_000)), "more than 2 million pixels"),
    "WebP bomb": (lambda one: one.looks(saved("WEBP")), "more than 2 million pixels"),
    "JPEG-2000 bomb": (lambda one: one.looks(saved("JPEG2000")), "JPEG, PNG, WebP, GIF, BMP or AVIF"),
    "no picture": (lambda one: one.looks(b"%!PS-Adobe-3.0 EPSF-3.0"), "isn&#x27;t a picture"),
    "empty file": (lambda one: one.looks(b""), "isn&#x27;t a picture|not.*upload"),
    "this machine": (lambda one: one.note("fetched", "http://localhost:22/a.png"), "a public address is needed"),
    "this machine in other words": (lambda one: one.note("fetched", "http://[::ffff:7f00:1]/"), "a public address is needed"),
    "a cloud's metadata": (lambda one: one.note("fetched", "http://169.254.169.254/latest"), "a public address is needed"),
    "file address": (lambda one: one.note("fetched", "file:///etc/passwd"), "http or https is needed|can&#x27;t be fetched"),
    "path as an address": (lambda one: one.note("fetched", "/etc/passwd"), "can&#x27;t be fetched"),
    "path as an upload": (lambda one: one.note("look", file("/etc/passwd")), "None"),
    "path of the project": (lambda one: one.note("look", file(str(PICTURE))), "None"),
    "path out of the uploads": (lambda one: one.note("look", file("../../etc/passwd")), "None"),
    "address as an upload": (lambda one: one.note("look", file("http://93.184.215.14/a.png")), "an address isn't an upload"),
    "own address as an upload": (lambda one: one.note("look", file("http://127.0.0.1/a.png")), "an address isn't an upload"),
    "data as an upload": (
        lambda one: one.note("look", file(None, url=f"data:image/png;base64,{IN_BASE64}")), "None|was uploaded here",
    ),
    "text as an upload": (lambda one: one.note("look", "/etc/passwd"), "None|was uploaded here"),
    "100,000 tokens": (lambda one: one.note("ask", "猫 " * 100_000, *HOW), "characters; there is room for 2000 tokens"),
    "2,000 tokens": (lambda one: one.note("ask", "猫 " * 2_000, *HOW), r"take \d+ tokens"),
    "half a character": (lambda one: one.note("ask", "\ud800", *HOW), "cut off at its greatest length"),
    "wrong types": (lambda one: one.note("ask", 5, {}, [], "a", None, "b", 7), "not in the list of choices"),
    "endless warmth": (lambda one: one.note("ask", "a", "zh", 1e9, 0.4, 100, 12, ""), "greater than|at most|maximum|less"),
    "seed of many digits": (lambda one: one.note("ask", "a", "zh", 1, 0.4, 100, 12, "9" * 9999), "a whole number is needed"),
    "example that isn't there": (lambda one: one.note("chosen", 99), "None"),
    "event that isn't there": (lambda one: str(one.send(999).status_code), "[45]\\d\\d"),
    "too few values": (lambda one: one.note("ask", "a"), "None|[Nn]eeded|inputs"),
    "large upload": (lambda one: str(one.upload(bytes(600_000)).status_code), "413"),
    "larger upload": (lambda one: str(one.upload(bytes(2_000_000)).status_code), "413"),
    "large body": (lambda one: str(one.send("ask", "a" * 1_000_000, *HOW).status_code), "413"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_event_gets_a_sentence_and_the_page_lives(address, name):
    visitor = Visitor(address)
    act, words = HOSTILE[name]
    told = act(visitor)
    assert re.search(words, told), told
    assert not {"root:", "Traceback"} & set(told.split())
    assert "Type a question first." in visitor.note("ask", "", *HOW)


@pytest.mark.parametrize("path", [
    f"{API}/file=/etc/passwd", f"{API}/file={PICTURE}", f"{API}/file={PROJECT}/README.md", f"{API}/file=../../etc/passwd",
    f"{API}/file=http://127.0.0.1/", f"{API}/file=/tmp/../etc/passwd", f"{API}/proxy=http://127.0.0.1/", "/file=/etc/passwd",
    "/assets/../../../../../../etc/passwd", "/static/..%2f..%2f..%2f..%2fetc/passwd", "/monitoring", f"{API}/openapi.json",
    f"{API}/runs", f"{API}/run/ask", f"{API}/call/ask", f"{API}/component_server", f"{API}/vibe-code", "/docs",
])  # fmt: skip
def test_file_of_this_machine_or_a_route_that_the_page_lacks_is_refused(visitor, path):
    answered = visitor.http.get(httpx.URL(visitor.http.base_url, raw_path=path.encode()))
    assert answered.status_code in (403, 404), answered.text
    assert visitor.http.post(httpx.URL(visitor.http.base_url, raw_path=path.encode())).status_code in (403, 404, 405)


def test_other_visitors_conversation_stays_theirs(address):
    one, other = Visitor(address), Visitor(address)
    one.asks("ask", QUESTION, *HOW)
    assert "Nothing has been asked yet." in other.note("undone")
    assert other.asks("cleared")["output"]["data"][0] == []
    assert one.asks("undone")["output"]["data"][2] == QUESTION


def test_uploads_are_deleted_after_a_while_and_examples_stay(serve, visitor):
    from gradio.route_utils import delete_files_created_by_app

    [path] = visitor.upload(PICTURE.read_bytes()).json()
    example = visitor.asks("chosen", 0)["output"]["data"][1]["path"]
    delete_files_created_by_app(serve.pages[0].blocks, 0)
    assert not Path(path).exists()
    assert Path(example).exists()


# Places


def test_queue_says_who_waits_and_who_finds_no_room(address):
    first, second, third = (Visitor(address) for _ in range(3))
    how = [*HOW[:4], LENGTH, ""]
    first.send("ask", QUESTION, *how)
    with first.hears() as answer:
        assert any('"append"' in line for line in answer)  # it has a row
        second.send("ask", QUESTION, *how)
        with second.hears() as waiting:
            assert any("Waiting for a free place; 1 ask before you." in line for line in waiting)
            *_, note, box, send, stop = third.asks("ask", QUESTION, *how)["output"]["data"]
    assert note == "<p>Too many are asking now. Try again in a moment.</p>"
    assert box == QUESTION  # it isn't lost
    assert (send["visible"], stop["visible"]) == (True, False)
    for visitor in (first, second):
        visitor.send("stopped")


def test_port_that_another_program_took_meanwhile_is_told(serve):
    with listening("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: can't be listened to"):
            serve(port=port)


# A password


def test_visitor_without_the_password_sees_nothing(serve):
    visitor = httpx.Client(base_url=serve(auth="me:a:secret"), timeout=30)
    for path in (f"{API}/queue/data?session_hash=a", f"{API}/file=/tmp", "/config"):
        assert visitor.get(path).status_code == 401
    assert visitor.post(f"{API}/upload", files={"files": ("a.png", b"a")}).status_code == 401
    assert visitor.post("/login", data={"username": "me", "password": "a"}).status_code == 400
    assert visitor.post("/login", data={"username": "me", "password": "a:secret"}).status_code == 200
    assert visitor.get("/config").status_code == 200
