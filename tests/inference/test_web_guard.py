"""What is around the API and the page: places, counts, paths. The tests of both ask real servers for the rest."""

import asyncio
import json
import socket
from types import SimpleNamespace

import pytest

from model.errors import InputError
from model.inference.web_guard import Guard, OnlyPaths, listening

POST = {"type": "http", "method": "POST", "path": "/", "headers": []}


def answered(guard, scope):
    """(status, content) of a request without a body."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def run():
        await guard(scope, receive, send)

    asyncio.run(run())
    return sent[0]["status"], sent[-1]["body"]


async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"good"})


def test_request_is_let_in_and_counted():
    guard = Guard(app, None, places=1, most_bytes=10, seconds=1)
    assert answered(guard, POST) == (200, b"good")
    assert guard.in_hand == 0
    assert 'visualglm_requests_total{path="other",status="200"} 1' in guard.metrics()
    assert "visualglm_request_seconds_count 1" in guard.metrics()


def test_request_beyond_the_places_is_sent_away_before_its_body_is_read_and_health_is_not():
    guard = Guard(app, None, places=0, most_bytes=10, seconds=1)
    status, content = answered(guard, POST)
    assert status == 429
    assert json.loads(content)["error"]["type"] == "rate_limit_error"
    assert answered(guard, POST | {"method": "GET", "path": "/health"})[0] == 200


def test_place_is_free_again_after_a_fault_of_the_application():
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    guard = Guard(broken, None, places=1, most_bytes=10, seconds=1)
    try:
        answered(guard, POST)
    except ZeroDivisionError:
        assert guard.in_hand == 0


def test_key_is_asked_for_everywhere_but_for_health():
    guard = Guard(app, "key", places=1, most_bytes=10, seconds=1)
    assert answered(guard, POST)[0] == 401
    assert answered(guard, POST | {"headers": [(b"authorization", b"Bearer key")]})[0] == 200
    assert answered(guard, POST | {"headers": [(b"authorization", b"bearer key")]})[0] == 200
    assert answered(guard, POST | {"method": "GET", "path": "/health"})[0] == 200


@pytest.mark.parametrize(("path", "status"), [
    ("/", 200), ("/config", 200), ("/assets/a.js", 200), ("/file=/folder/a", 200), ("/config/", 404), ("/configs", 404),
    ("/assets", 404), ("/file=http://a", 404), ("/monitoring", 404), ("//", 404), ("", 404),
])  # fmt: skip
def test_only_the_paths_that_are_named_are_answered(path, status):
    only = OnlyPaths(app, ["/", "/config", "/assets/", "/file=/"])
    for method in ("GET", "POST"):
        assert answered(only, POST | {"method": method, "path": path})[0] == status


def test_small_writes_to_a_client_are_sent_at_once():
    delays = []

    async def noted(_, writer):
        client = writer.get_extra_info("socket")
        delays.append(not client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def run():
        with listening("127.0.0.1", 0) as found:
            async with await asyncio.start_server(noted, sock=found):
                reader, writer = await asyncio.open_connection(*found.getsockname()[:2])
                await reader.read()
                writer.close()

    asyncio.run(run())
    assert delays == [False]


def test_address_that_is_taken_is_refused():
    with listening("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: can't be listened to"):
            listening("127.0.0.1", port)


def test_client_that_comes_while_a_model_is_loaded_is_answered_afterwards():
    async def answer(reader, writer):
        writer.write(await reader.readline())
        writer.close()

    async def run():
        with listening("127.0.0.1", 0) as found:
            reader, writer = await asyncio.open_connection(*found.getsockname()[:2])
            writer.write(b"early\n")
            async with await asyncio.start_server(answer, sock=found):
                assert await reader.read() == b"early\n"
                writer.close()

    asyncio.run(run())


def test_request_that_is_refused_is_counted_by_its_path_if_there_is_such_a_path():
    async def with_routes(scope, receive, send):
        await app(scope, receive, send)

    with_routes.routes = [SimpleNamespace(path="/v1/chat/completions")]
    guard = Guard(with_routes, "key", places=1, most_bytes=10, seconds=1)
    for path in ("/v1/chat/completions", "/random/1", "/random/2"):
        assert answered(guard, POST | {"path": path})[0] == 401
    counted = [line for line in guard.metrics() if line.startswith("visualglm_requests_total")]
    assert counted == [
        'visualglm_requests_total{path="/v1/chat/completions",status="401"} 1',
        'visualglm_requests_total{path="other",status="401"} 2',
    ]
