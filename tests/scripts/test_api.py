"""The API: a real server, the real openai client, raw requests as curl sends them, and those of people who mean harm."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import openai
import pytest
from conftest import GOLDEN, PICTURE, PROJECT, load_model, run_python
from hostile_pictures import saved

from model.data.prompt import AskedAs
from model.data.tokenizer import ChatGLMTokenizer
from model.inference.api_formats import Asked
from model.inference.chat import chat
from model.inference.sampling import Sampling
from model.inference.serving import Growth
from model.inference.web_guard import listening
from scripts.api import Api, main
from scripts.dev.fuzz_data import png_header

pytestmark = pytest.mark.run

IN_BASE64 = base64.b64encode(PICTURE.read_bytes()).decode()
KEY = "a secret"
QUESTION = "这是什么？"
ROWS, QUEUE = 2, 6
# small limits, so that a test reaches them soon; the model of random numbers never ends an answer by itself
FLAGS = (
    "--rows", ROWS, "--queue", QUEUE, "--max_length", 300, "--temperature", 0, "--model_name", "small", "--port", 0,
    "--max_body", 1, "--max_image", 0.5, "--max_pixels", 2, "--body_seconds", 1,
)  # fmt: skip


class Server:
    """A running server, and clients that have its key; each of their requests has a connection of its own."""

    def __init__(self, process, url):
        self.process, self.url, self.port = process, url, int(url.rpartition(":")[2])
        alone = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {KEY}"}, verify=False, limits=alone, timeout=60
        )
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=self.http)

    def post(self, path, **request):
        return self.http.post(path, **request)

    @property
    def health(self):
        return self.http.get("/health").json()

    def metric(self, name):
        text = self.http.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def becomes_idle(self):
        """Whether no request is in hand within ten seconds."""
        for _ in range(200):
            if not self.metric("visualglm_requests_in_hand") and not self.metric('visualglm_rows{state="busy"}'):
                return True
            time.sleep(0.05)
        return False


@contextlib.contextmanager
def running(checkpoint, *flags):
    words = map(str, [*FLAGS, *flags])
    command = [sys.executable, PROJECT / "scripts/api.py", "--from_pretrained", checkpoint, *words]
    environment = os.environ | {"VISUALGLM_API_KEY": KEY}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        started = process.stdout.readline()
        url = re.fullmatch(r"small answers at (http://127\.0\.0\.1:\d+)/v1\n", started)[1]
        yield Server(process, url)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(upstream_checkpoint):
    with running(upstream_checkpoint) as server:
        yield server


@pytest.fixture(scope="module")
def expected(upstream_checkpoint):
    """What `chat` answers: a function of the query and the history."""
    model, tokenizer = load_model(upstream_checkpoint), ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")

    def answer(query, history=(), **options):
        return chat(PICTURE, model, tokenizer, query, list(history), temperature=0, repetition_penalty=1, **options)[0]

    return answer


def said(text, image=True):
    """A message with a question and the picture."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IN_BASE64}"}}
    return {"role": "user", "content": [part, {"type": "text", "text": text}] if image else text}


def completion(server, messages, **options):
    return server.openai.chat.completions.create(model="small", messages=messages, **options)


# The released API


def test_released_example_request_is_answered_as_chat_does(server, expected):
    content = f'{{"image":"{IN_BASE64}","text":"{QUESTION}","history":[],"max_length":80}}'  # what its README sends
    answered = server.post("/", content=content, headers={"content-type": "application/json"})
    assert answered.status_code == 200
    answer = answered.json()
    assert answer["result"] == answer["response"] == expected(QUESTION, max_length=80)
    assert answer["history"] == [[QUESTION, answer["result"]]]
    assert answer["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", answer["time"])


def test_released_history_is_taken_back(server, expected):
    request = {"image": IN_BASE64, "text": "再说一次", "history": [["你好", "好"]], "max_length": 80, "min_length": 50}
    answer = server.post("/", json=request).json()
    assert answer["result"] == expected("再说一次", [("你好", "好")], max_length=80)
    assert answer["history"][0] == ["你好", "好"]


@pytest.mark.parametrize(
    ("asked_as", "lang"),
    [(AskedAs(), "en"), (AskedAs("zh", max_source_length=64), None), (AskedAs("en", max_source_length=64), None)],
)
def test_question_without_chinese_is_in_english_unless_the_model_was_tuned(asked_as, lang):
    """None is the frame of training."""
    api = SimpleNamespace(model=SimpleNamespace(asked_as=asked_as))
    assert Api.lang(api, Asked("What?", [], None, Sampling())) == lang


# OpenAI's


def test_openai_client_finds_the_model(server):
    assert [model.id for model in server.openai.models.list()] == ["small"]


def test_openai_client_finds_the_model_by_its_name_and_no_other(server):
    assert server.openai.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match='there is no model "large" here'):
        server.openai.models.retrieve("large")


def test_openai_client_gets_the_answer_and_its_counts(server, expected):
    answer = completion(server, [said(QUESTION)], max_tokens=20)
    [choice] = answer.choices
    taken = answer.usage.prompt_tokens
    assert choice.message.content == expected(QUESTION, max_length=taken + 20)
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 20)
    assert answer.usage.total_tokens == taken + 20


def test_messages_are_the_history_and_the_system_speaks_before_the_first_question(server, expected):
    talk = [
        {"role": "system", "content": "简短"},
        said("你好"),
        {"role": "assistant", "content": "好"},
        said("再说一次", image=False),
    ]
    answer = completion(server, talk, max_tokens=20)
    assert answer.choices[0].message.content == expected(
        "再说一次", [("简短\n你好", "好")], max_length=answer.usage.total_tokens
    )


def test_stream_is_the_answer_in_pieces_with_its_counts(server):
    whole = completion(server, [said(QUESTION)], max_tokens=40)
    chunks = list(
        completion(server, [said(QUESTION)], max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 5
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_answer_ends_before_a_stop(server, stream):
    whole = completion(server, [said(QUESTION)], max_tokens=40).choices[0].message.content
    stop = whole[10:13]
    answer = completion(server, [said(QUESTION)], max_tokens=40, stop=stop, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text, finished = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        text, finished = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finished) == (whole[: whole.index(stop)], "stop")


def test_same_seed_gives_the_same_answer(server):
    one, same, other = (
        completion(server, [said(QUESTION)], max_tokens=20, temperature=1.5, top_p=1, seed=seed) for seed in (5, 5, 6)
    )
    assert one.choices[0].message.content == same.choices[0].message.content != other.choices[0].message.content


def test_requests_that_come_together_are_answered_as_each_alone(server, expected):
    queries = [f"{number}是什么？" for number in range(ROWS + QUEUE)]
    with ThreadPoolExecutor(len(queries)) as pool:
        answers = list(pool.map(lambda query: completion(server, [said(query)], max_tokens=20), queries))
    for query, answer in zip(queries, answers, strict=True):
        assert answer.choices[0].message.content == expected(query, max_length=answer.usage.total_tokens)


# Places


def test_more_requests_than_places_are_sent_away_for_a_while_and_leaving_frees_a_place(server):
    with ThreadPoolExecutor(ROWS + QUEUE) as pool:
        streams = list(pool.map(lambda _: LongStream(server), range(ROWS + QUEUE)))
    with pytest.raises(openai.RateLimitError) as refused:
        completion(server, [said(QUESTION)], max_tokens=1)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    assert server.becomes_idle()
    assert completion(server, [said(QUESTION)], max_tokens=1).usage.completion_tokens == 1


class LongStream:
    """A request for a long answer, sent, with its body or without; nothing of the answer is read."""

    def __init__(self, server, with_body=True, message=None):
        body = json.dumps({"model": "small", "messages": [message or said(QUESTION)], "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.sendall(head.encode() + (body if with_body else b""))

    def close(self):
        self.socket.close()


# Hostile


def uri(content):
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def picture(source, **more):
    """A request to / with this picture."""
    return "/", {"json": {"image": source, "text": QUESTION, "history": [], **more}}


def text(content, **more):
    """A request of OpenAI's form with this text."""
    return "/v1/chat/completions", {
        "json": {"model": "small", "messages": [{"role": "user", "content": content}], **more}
    }


def raw(content, **headers):
    return "/", {"content": content, "headers": {"content-type": "application/json"} | headers}


HOSTILE = {
    "PNG bomb": (picture(uri(png_header(40_000, 40_000))), 400, "more than 2 million pixels"),
    "JPEG-2000 bomb": (picture(uri(saved("JPEG2000"))), 400, "JPEG, PNG, WebP, GIF, BMP or AVIF"),
    "WebP bomb": (picture(uri(saved("WEBP"))), 400, "more than 2 million pixels"),
    "large picture file": (picture(uri(bytes(600_000))), 400, "more than 0.5 MiB"),
    "no picture": (picture(uri(b"%!PS-Adobe-3.0 EPSF-3.0")), 400, "isn't a picture"),
    "this machine": (picture("http://localhost:22/a.png"), 400, "a public address is needed"),
    "this machine in other words": (picture("http://[::ffff:7f00:1]/a.png"), 400, "a public address is needed"),
    "a cloud's metadata": (picture("http://169.254.169.254/latest/meta-data"), 400, "a public address is needed"),
    "file address": (picture("file:///etc/passwd"), 400, "neither base64 nor an address"),
    "local path": (picture(str(PICTURE)), 400, "neither base64 nor an address"),
    "gopher": (picture("gopher://127.0.0.1:6379/_FLUSHALL"), 400, "neither base64 nor an address"),
    "line break in an address": (picture("http://127.0.0.1/\r\nHost: b"), 400, "can't be fetched|public address"),
    "100,000 tokens": (text("猫 " * 100_000), 400, "characters; there is room for 300 tokens"),
    "2,000 tokens": (text("猫 " * 2_000), 400, "take \\d+ tokens"),
    "1,001 messages": (
        ("/v1/chat/completions", {"json": {"model": "small", "messages": [{"role": "user", "content": "a"}] * 1001}}),
        400, "at most 1000 items",
    ),
    "half a character": (raw(b'{"text": "\\ud800"}'), 400, "lone surrogate"),
    "no JSON": (raw(b"{"), 400, "JSON"),
    "deep JSON": (raw(b'{"text":' + b"[" * 400_000), 400, "body"),
    "a number of 100,000 digits": (raw(b'{"text": ' + b"1" * 100_000 + b"}"), 400, ""),
    "wrong types": (("/v1/chat/completions", {"json": {"model": 5, "messages": "a"}}), 400, "model: .*; messages: "),
    "a list": (raw(b"[1, 2]"), 400, "object"),
    "no text": (raw(b'{"image": null}'), 400, "text: Field required"),
    "two pictures": (
        ("/v1/chat/completions", {"json": {"model": "small", "messages": [said("a"), said("b")]}}), 400, "one a conversation",
    ),
    "nan": (raw(b'{"text": "a", "temperature": NaN}'), 400, "temperature nan: 0 or more is needed"),
    "endless warmth": (raw(b'{"text": "a", "temperature": 1e400}'), 400, "temperature inf: 0 or more is needed"),
    "negative length": (text("a", max_tokens=-1), 400, "max_tokens"),
    "many answers": (text("a", n=1000), 400, "n isn't offered"),
    "half a character as a field": (raw(b'{"text": "a", "\\ud800": 1}'), 400, ""),
    "picture under another name": (raw(b'{"text": "a", "img": "zzz"}'), 400, "img isn't known here; .*image, history"),
    "five stops": (text("a", stop=["a", "b", "c", "d", "e"]), 400, "up to 4"),
    "other model": (("/v1/chat/completions", {"json": {"model": "../x", "messages": [said("a")]}}), 404, 'no model "../x"'),
    "a form, as a web page may send it": (
        ("/", {"content": b'{"text": "a"}', "headers": {"content-type": "text/plain"}}), 400,
        'Content-Type: application/json is needed; "text/plain" found',
    ),
    "half a text": (raw(b'{"text":'), 400, r"^the request: not JSON at character 9 \(Expecting value\)"),
    "unknown part": (
        ("/v1/chat/completions", {"json": {"model": "small", "messages": [{"role": "user", "content": [{"type": "b"}]}]}}), 400,
        r"messages\[0\]\.content\[0\]\.type: ",
    ),
    "empty picture": (
        text([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": ""}}]), 400, '"image_url" is empty',
    ),
    "large body": (raw(bytes(1_100_000)), 413, "more than 1 MiB"),
    "large body without a length": (raw(iter([bytes(100_000)] * 20)), 413, "more than 1 MiB"),
    "path trick": (("/..%2f..%2fetc/passwd", {"json": {}}), 404, "Not Found"),
    "half a character as the model": (
        ("/v1/chat/completions", {"content": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
                                  "headers": {"content-type": "application/json"}}), 404, "no model",
    ),
    "half a character as the picture": (raw(b'{"text": "a", "image": "data:image/png,\\ud800"}'), 400, "half a character"),
    "no warmth": (text("a", temperature=1e-300), 200, ""),
    "tiny penalty": (text("a", repetition_penalty=1e-300), 400, "repetition_penalty 1e-300: a number above 0, from 0.01"),
    "wrong key": (raw(b"{}", authorization="Bearer another"), 401, "API key is missing or wrong"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_request_gets_a_sentence_and_the_server_lives(server, name):
    (path, request), status, words = HOSTILE[name]
    answered = server.post(path, **request)
    assert answered.status_code == status, answered.text
    if status == 200:
        return
    assert answered.json()["status"] == status
    assert re.search(words, answered.json()["error"]["message"]), answered.text
    assert "Traceback" not in answered.text
    assert server.health == {"status": "ok"}


HEAD = f"POST / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize(("sent", "answer"), [
    (HEAD + b"Content-Length: 100\r\n\r\n{", b"408 Request Timeout"),  # and never the rest
    (HEAD + b"Content-Length: -1\r\n\r\n{}", b"400 Bad Request"),
    (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: nonsense\r\n\r\n{}", b""),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" * 10 + b"\r\n\r\n", b"400 Bad Request"),
    (b"GET / HTTP/1.1\r\nA: " + b"b" * 200_000 + b"\r\n\r\n", b"400 Bad Request"),
    (b"GET /", b""),  # and never the rest: the connection is closed
], ids=["slow body", "negative length", "unknown encoding", "TLS", "large header", "slow header"])  # fmt: skip
def test_bytes_that_are_no_whole_request_are_answered_or_dropped_and_the_server_lives(server, sent, answer):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        with_rest = b""
        try:
            connection.sendall(sent)
            while piece := connection.recv(2**16):
                with_rest += piece
        except ConnectionError:  # closed before all was sent
            pass
    assert answer in with_rest
    assert server.health == {"status": "ok"}


def test_headers_of_a_second_request_have_to_come_in_time_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        while not answer.endswith(b'{"status":"ok"}'):  # its body may come by itself
            answer += connection.recv(65536)
        connection.sendall(b"POST / HTTP/1.1\r\nX-A: ")
        started = time.monotonic()
        for _ in range(4):  # a byte now and then gives no more time
            time.sleep(0.3)
            with contextlib.suppress(OSError):
                connection.sendall(b"b")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(65536) == b""
        assert time.monotonic() - started < 10
    assert server.health == {"status": "ok"}


def test_stream_that_takes_another_turn_ends_with_the_whole_answer():
    async def growths():
        for text, finished in (("图中", ""), ("图中有问题。答", ""), ("一只猫", ""), ("一只猫在桌上", "stop")):
            yield Growth(text, finished, 3, 5)

    async def streamed():
        rest = growths()
        api = SimpleNamespace(options=SimpleNamespace(model_name="small"))
        events = [event async for event in Api.events(api, await anext(rest), rest, "id", False)]
        parts = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
        return [part["content"] for part in parts if part.get("content")]

    assert asyncio.run(streamed())[-1] == "\n一只猫在桌上"


def test_health_is_told_to_anybody_also_to_a_checker_that_reads_no_body(server):
    told, head = httpx.get(f"{server.url}/health"), httpx.head(f"{server.url}/health")
    assert told.json() == {"status": "ok"}
    assert (head.status_code, head.content) == (told.status_code, b"") == (200, b"")
    assert head.headers["content-length"] == told.headers["content-length"]


def test_openai_client_without_the_key_is_told(server):
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_hundred_streams_that_are_broken_off_leave_every_row_free(server):
    for _ in range(25):
        streams = [LongStream(server) for _ in range(4)]
        for stream in streams:
            stream.close()
    assert server.becomes_idle()
    assert completion(server, [said(QUESTION)], max_tokens=1).usage.completion_tokens == 1


# Flags, and the end


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--rows", "0", "--queue", "-1"], "--rows 0: more than 0 is needed.\n--queue -1: 0 or more is needed."),
    (["--port", "70000"], "--port 70000: a number from 0 to 65535 is needed."),
    (["--max_length", "100000"], "--max_length 100000: this model takes"),
    (["--max_length", "1"], "--max_length 1: no room for a single token of text; at least "),
    (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8080: can't be listened to"),
])  # fmt: skip
def test_bad_flag_is_told_before_the_model_is_loaded(upstream_checkpoint, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        main(["--from_pretrained", str(upstream_checkpoint), *flags])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("key", "found"), [
    ("", "it is empty; a key is needed, or no $VISUALGLM_API_KEY."),
    ("s3\r\n", "it begins or ends with a blank, which HTTP drops; a key without is needed."),
])  # fmt: skip
def test_bad_key_in_the_environment_is_told_by_the_variables_name(upstream_checkpoint, capsys, monkeypatch, key, found):
    monkeypatch.setenv("VISUALGLM_API_KEY", key)
    with pytest.raises(SystemExit):
        main(["--from_pretrained", str(upstream_checkpoint), "--host", "0.0.0.0"])
    assert capsys.readouterr().err == f"api.py: error: $VISUALGLM_API_KEY: {found}\n"


def test_port_in_use_is_told(server, upstream_checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["--from_pretrained", str(upstream_checkpoint), "--port", str(server.port)])
    assert f"--port {server.port}: can't be listened to (Address already in use)" in capsys.readouterr().err


def test_process_of_several_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["--from_pretrained", "no/such/checkpoint"])
    assert end.value.code == 2
    assert "WORLD_SIZE=2: api.py runs in one process; a start without" in capsys.readouterr().err


def test_missing_package_is_told():
    code = "import sys; sys.modules['fastapi'] = None; import scripts.api"
    done = run_python("-c", code)
    assert done.returncode == 2
    assert done.stderr == "api.py: error: fastapi isn't installed; needed is pip install -r requirements-web.txt\n"


FINISHING = "Finishing the answers in hand (1); a second signal ends at once.\n"


def test_second_signal_ends_at_once(upstream_checkpoint):
    flags = "--private_images", "--body_seconds", 60  # so long the request is in hand
    with listening("127.0.0.1", 0) as silent, running(upstream_checkpoint, *flags) as server:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        asked = {"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "a"}]}
        with contextlib.closing(LongStream(server, message=asked)):
            while not server.metric("visualglm_requests_in_hand"):
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.stdout.readline() == FINISHING
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(20) == 128 + signal.SIGINT  # 128 + SIGTERM once the answer is finished


def test_request_that_is_not_whole_does_not_hold_up_the_end(upstream_checkpoint):
    with running(upstream_checkpoint, "--body_seconds", 60) as server:
        stalls = LongStream(server, with_body=False)
        while not server.metric("visualglm_requests_in_hand"):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.communicate(timeout=10) == ("", None)
        answer = stalls.socket.recv(2**16).decode()
        assert answer.startswith("HTTP/1.1 503")
        assert server.process.returncode == 128 + signal.SIGTERM


def test_signal_without_an_answer_in_hand_ends_it_without_a_word(upstream_checkpoint):
    with running(upstream_checkpoint) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.communicate(timeout=20) == ("", None)


def test_sigterm_finishes_the_answers_in_hand_and_takes_no_more(server):
    stream = completion(server, [said(QUESTION)], max_tokens=100, stream=True)
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert server.process.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")
