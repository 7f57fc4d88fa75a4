"""What stands between the network and the answers: the socket, the key, the places, limits on a request's body, the counts.

An ASGI application around another one, so that a request is refused before its body is read.

    Guard(app, key="…", places=36, most_bytes=16 * 2**20, seconds=20.0)
    OnlyPaths(app, ["/", "/config", "/assets/"])      for a page of a library that has more routes than it needs
"""

import asyncio
import hmac
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from model.errors import InputError
from model.inference.api_formats import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN_TO_ALL = ("/health",)
BEARER = re.compile(rb"^bearer +", re.IGNORECASE)
GONE = 499  # nginx's status of a client that went away before its answer
BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds, of the histogram


class Refused(Exception):
    """A request's body is too large or too slow."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """The application around `app`.

    Args:
        key: what a client has to know, or None.
        places: requests that are in hand at once, waiting ones included.
        most_bytes: of a request's body. seconds: in which it has to be there.
    """

    def __init__(self, app: App, key: str | None, places: int, most_bytes: int, seconds: float) -> None:
        self.app, self.key, self.places = app, key, places
        self.most_bytes, self.seconds = most_bytes, seconds
        self.paths = {str(getattr(route, "path", "")) for route in getattr(app, "routes", ())}
        self.in_hand = 0
        self.unread: set[asyncio.Timeout] = set()  # limits of requests whose body isn't whole
        self.is_ending = False
        self.answered: Counter[tuple[str, int]] = Counter()  # by path and status
        self.durations = [0] * (len(BUCKETS) + 1)
        self.total_seconds = 0.0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        asks = scope["method"] == "POST"
        try:
            problem = self._problem(scope)
            if problem:
                await refuse(counted, *problem)
                return
            self.in_hand += asks
            try:
                await self._let_in(scope, receive, counted)
            finally:
                self.in_hand -= asks
        finally:
            self._count(self._path(scope), status or GONE, time.monotonic() - started if asks else None)

    def _path(self, scope: MutableMapping[str, Any]) -> str:
        """The route of a request, for the metrics. Unknown paths are one: each would be a line."""
        return str(getattr(scope.get("route"), "path", scope["path"] if scope["path"] in self.paths else "other"))

    def _problem(self, scope: MutableMapping[str, Any]) -> tuple[int, str, dict[str, str]] | None:
        """Why a request isn't let in: status, sentence, headers."""
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in OPEN_TO_ALL:
            given = BEARER.sub(b"", headers.get(b"authorization", b""), 1)
            if not hmac.compare_digest(given, self.key.encode()):
                return 401, "the API key is missing or wrong; the header Authorization: Bearer KEY is needed.", {}
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self.most_bytes:
            return 413, self._too_large(), {}
        if scope["method"] == "POST" and self.in_hand >= self.places:
            wait = str(max(1, round(self.mean_seconds)))
            return 429, f"{self.in_hand} requests are in hand; try again in {wait} s.", {"retry-after": wait}
        return None

    def _too_large(self) -> str:
        return f"the request has more than {self.most_bytes / 2**20:.3g} MiB; a smaller one is needed."

    async def _let_in(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Hand a request on, and watch its body."""
        end, size, is_whole = asyncio.get_running_loop().time() + self.seconds, 0, False
        refusal: Refused | None = None

        async def limited() -> Message:
            nonlocal size, is_whole, refusal
            if is_whole:
                return await receive()
            limit = asyncio.timeout_at(0 if self.is_ending else end)
            self.unread.add(limit)
            try:
                async with limit:
                    message = await receive()
            except TimeoutError:
                late = f"the request isn't whole after {self.seconds:.0f} seconds; a faster client is needed."
                ending = "the server ends, and the request isn't whole; a later try is needed."
                refusal = Refused(503, ending) if self.is_ending else Refused(408, late)
                raise refusal from None
            finally:
                self.unread.discard(limit)
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > self.most_bytes:
                refusal = Refused(413, self._too_large())
                raise refusal
            return message

        async def unless_refused(message: Message) -> None:
            if refusal is None:  # else the application, which saw its reading fail, says less than we do
                await send(message)

        with suppress(Refused):
            await self.app(scope, limited, unless_refused)
        if refusal is not None:
            await refuse(send, refusal.status, str(refusal), {"connection": "close"})

    def refuse_unread(self) -> None:
        """Refuse the requests whose body isn't whole, those in hand and those to come: the server ends."""
        self.is_ending = True
        for limit in self.unread:
            if not limit.expired():
                limit.reschedule(0)

    def _count(self, path: str, status: int, seconds: float | None) -> None:
        self.answered[path, status] += 1
        if seconds is not None and status == 200:
            self.total_seconds += seconds
            self.durations[sum(seconds > bound for bound in BUCKETS)] += 1

    @property
    def mean_seconds(self) -> float:
        """How long an answered request took, on average."""
        return self.total_seconds / max(1, sum(self.durations))

    def metrics(self) -> list[str]:
        """The counts as lines of Prometheus' text format."""
        lines = ["# TYPE visualglm_requests_total counter"]
        for (path, status), number in sorted(self.answered.items()):
            lines.append(f'visualglm_requests_total{{path="{path}",status="{status}"}} {number}')
        lines.append("# TYPE visualglm_request_seconds histogram")
        total = 0
        for bound, number in zip((*BUCKETS, "+Inf"), self.durations, strict=True):
            total += number
            lines.append(f'visualglm_request_seconds_bucket{{le="{bound}"}} {total}')
        lines += [f"visualglm_request_seconds_sum {self.total_seconds:.6f}", f"visualglm_request_seconds_count {total}"]
        return [*lines, "# TYPE visualglm_requests_in_hand gauge", f"visualglm_requests_in_hand {self.in_hand}"]


class OnlyPaths:
    """An application around `app` that answers these paths alone, and 404 for others.

    Args:
        paths: each is a whole path, or, with a / or = at its end, the beginning of one.
    """

    def __init__(self, app: App, paths: Sequence[str]) -> None:
        self.app = app
        self.whole = {path for path in paths if path == "/" or path[-1] not in "/="}
        self.beginnings = tuple(path for path in paths if path not in self.whole)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope.get("path", "")
        if scope["type"] == "http" and not (path in self.whole or path.startswith(self.beginnings)):
            await refuse(send, 404, "Not Found", {})
        else:
            await self.app(scope, receive, send)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at that address, before a model is loaded: whoever comes from now on waits until it is.

    Raises:
        InputError: it can't be had.
    """
    try:
        of_host = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = of_host[0]
        # asyncio sends small pieces, such as an answer's tokens, at once only where the socket knows that it is TCP's. Else
        # each waits for the client's word that the one before has come, 40 ms as a rule.
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()  # until then another server may have the same address
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: can't be listened to ({error.strerror}); another one is needed."
        ) from None
    return found


async def refuse(send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    """Answer with an error."""
    content = json.dumps(error_body(status, message)).encode()
    every = {"content-type": "application/json", "content-length": str(len(content))} | headers
    encoded = [(name.encode(), value.encode()) for name, value in every.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": content})
