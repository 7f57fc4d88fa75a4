"""What is around the API: places and counts. tests/scripts/test_api.py asks a real server for the rest."""

import asyncio
import json

from model.inference.web_guard import Guard

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
    assert answered(guard, POST | {"method": "GET", "path": "/health"})[0] == 200
