"""Answer questions about pictures over HTTP: as OpenAI's API does, and as the API released in 2023 did.

python scripts/api.py --from_pretrained model/tiny
python scripts/api.py --from_pretrained checkpoints/MyModel --quant 4 --port 8080 --api_key SECRET

    POST /v1/chat/completions   OpenAI's: pictures as http(s) address or data URI, stream, stop, seed, max_tokens, …
    GET  /v1/models             the one model that answers
    POST /                      {"image": base64, "text": "…", "history": []}  →  {"result": …, "response": …, "history": …}
    GET  /health, /metrics      whether it answers; counts for Prometheus

Requests that come together are answered together, --rows at a time. --queue more may wait; further ones get status 429. Only
this machine is listened to unless --host says otherwise. SIGTERM and Ctrl-C let the answers in hand be finished.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import asyncio
import json
import re
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType
from typing import Any

from model.checkpoints.layout import Checkpoint
from model.cli.flag_parser import FlagParser
from model.errors import (
    STATUS_OF_BAD_INPUT,
    InputError,
    command,
    end_now,
    handling,
    raise_problems,
)
from model.inference.flags import (
    CONVERSATION_LENGTH,
    add_checkpoint_flags,
    add_number_format_flags,
    add_sampling_flags,
    add_serving_flags,
    found_checkpoint,
    image_limits,
    loaded,
    max_length_of,
    refuse_launcher,
    sampling_of,
    secret_of,
    serving_problems,
)
from model.progress import say, warn

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    print(
        f"api.py: error: {missing.name} isn't installed; needed is pip install -r requirements-web.txt", file=sys.stderr
    )
    sys.exit(STATUS_OF_BAD_INPUT)

from model.data.prompt import AskedAs, least_conversation_length
from model.data.remote_images import opened
from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer
from model.inference.api_formats import (
    Asked,
    ChatRequest,
    ReleasedRequest,
    completion,
    completion_chunk,
    error_body,
    released_answer,
    usage_chunk,
)
from model.inference.serving import BusyError, FailedError, Growth, Service, computed_apart, growing
from model.inference.text import new_text
from model.inference.web_guard import Guard, listening

KEY_VARIABLE = "VISUALGLM_API_KEY"
MOST_CONNECTIONS = 512  # further ones are refused, so that there are files left to open
IDLE_SECONDS = 5  # that a connection is kept without a request
SHOWN_PROBLEMS = 3  # of a request
JSON_KIND = re.compile(r"\s*application/([\w.-]+\+)?json\b", re.IGNORECASE)


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, default="visualglm-6b")
    add_serving_flags(parser, port=8080, queue=32, seconds=120.0, protected_by="an --api_key")
    add = parser.add_argument
    # fmt: off
    add("--api_key", metavar="KEY",
        help=f"clients have to send it (default: ${KEY_VARIABLE}, which other users of the machine can't see)")
    add("--model_name", metavar="NAME", help="what clients call the model (default: the checkpoint's name)")
    add("--body_seconds", type=float, default=20.0, metavar="X",
        help="in which a request, or the picture that it names, has to be there (default %(default)s)")
    add("--max_body", type=float, default=16.0, metavar="MIB", help="of a request (default %(default)s)")
    # fmt: on
    add_sampling_flags(parser, temperature=0.8)
    add_number_format_flags(parser)
    return parser


def check(options: argparse.Namespace) -> Checkpoint:
    """Check the flags, and find the checkpoint, before torch is loaded.

    Raises:
        InputError: it isn't there, or a number is out of bounds.
    """
    refuse_launcher("api.py")
    problems = serving_problems(options, positive=("body_seconds", "max_body"))
    source, options.api_key = secret_of("--api_key", options.api_key, KEY_VARIABLE)
    if options.api_key is not None and not options.api_key.strip():
        problems.append(f"{source}: it is empty; a key is needed, or no {source}.")
    elif options.api_key is not None and options.api_key != options.api_key.strip():
        problems.append(f"{source}: it begins or ends with a blank, which HTTP drops; a key without is needed.")
    raise_problems(problems)
    options.sampling = replace(sampling_of(options), seed=options.seed)
    checkpoint = found_checkpoint(options)
    options.max_length = max_length_of(options, [checkpoint], CONVERSATION_LENGTH)
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder, options.tokenizer))
    least = least_conversation_length(tokenizer, checkpoint.asked_as)
    if options.max_length < least:
        raise InputError(
            f"--max_length {options.max_length}: no room for a single token of text; at least {least} is needed."
        )
    options.model_name = options.model_name or Path(checkpoint.name).name or checkpoint.folder.resolve().name
    return checkpoint


class Api:
    """The routes, around a model that answers."""

    def __init__(self, service: Service, model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
        self.service, self.model, self.tokenizer, self.options = service, model, tokenizer, options
        self.limits = image_limits(options, options.body_seconds)
        places = options.rows + options.queue
        self.fetching = ThreadPoolExecutor(places, "pictures")
        app = FastAPI(title="VisualGLM", docs_url=None, redoc_url=None)
        app.post("/")(self.released)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}", response_model=None)(self.one_model)
        app.get("/health")(self.health)
        app.head("/health")(self.health)
        app.get("/metrics")(self.metrics)
        for kind, handler in (
            (RequestValidationError, on_bad_fields),
            (InputError, on_input_error),
            (BusyError, on_busy),
            (FailedError, on_failed),
            (HTTPException, on_http_error),
            (Exception, on_fault),
        ):
            app.add_exception_handler(kind, handler)
        self.guard = Guard(app, options.api_key, places, int(options.max_body * 2**20), options.body_seconds)

    async def released(self, body: ReleasedRequest, request: Request) -> Response:
        """The API of 2023."""
        asked = body.asked(self.options.sampling)
        growth = await self.last_growth(asked, request)
        return JSONResponse(released_answer(growth, asked))

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        """OpenAI's."""
        another = self.no_model(body.model)
        if another is not None:
            return another
        asked = body.asked(self.options.sampling)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        if not body.stream:
            return JSONResponse(completion(await self.last_growth(asked, request), identity, self.options.model_name))
        growths = await self.growths(asked, request)
        # What can be wrong is told with a status of its own, before the stream begins.
        first = await anext(growths, None)
        tells_usage = body.stream_options is not None and body.stream_options.include_usage
        events = self.events(first, growths, identity, tells_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def models(self) -> dict[str, Any]:
        """The models that there are: one."""
        return {"object": "list", "data": [self.model_entry()]}

    async def one_model(self, name: str) -> Response:
        """A model by its name."""
        return self.no_model(name) or JSONResponse(self.model_entry())

    def model_entry(self) -> dict[str, Any]:
        """The model, as OpenAI lists them."""
        return {"id": self.options.model_name, "object": "model", "created": 0, "owned_by": "visualglm"}

    def no_model(self, name: str) -> Response | None:
        """What is said of another name than the model's."""
        if name == self.options.model_name:
            return None
        named = name[:100].encode(errors="backslashreplace").decode()
        message = f'there is no model "{named}" here; "{self.options.model_name}" is needed.'
        return JSONResponse(error_body(404, message, "model_not_found"), 404)

    async def health(self) -> Response:
        """Whether questions are answered."""
        alive = self.service.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def metrics(self) -> Response:
        """Counts for Prometheus."""
        engine = self.service.engine
        lines = [
            *self.guard.metrics(),
            "# TYPE visualglm_answer_tokens_total counter",
            f"visualglm_answer_tokens_total {self.service.tokens}",
            "# TYPE visualglm_steps_total counter",
            f"visualglm_steps_total {self.service.steps}",
            "# TYPE visualglm_rows gauge",
            f'visualglm_rows{{state="busy"}} {len(engine.active)}',
            f'visualglm_rows{{state="all"}} {engine.rows}',
            "# TYPE visualglm_waiting gauge",
            f"visualglm_waiting {len(engine.waiting)}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def last_growth(self, asked: Asked, request: Request) -> Growth:
        """The whole answer."""
        last = None
        async for growth in await self.growths(asked, request):
            last = growth
        if last is None or not last.finished:
            raise HTTPException(499, "the client has gone.")  # nobody reads it
        return last

    async def growths(self, asked: Asked, request: Request) -> AsyncIterator[Growth]:
        """The answer as it grows, once its picture is there."""
        question = await asyncio.get_running_loop().run_in_executor(self.fetching, self.question, asked)
        return growing(
            self.service,
            question,
            self.tokenizer,
            english=self.model.asked_as.is_english(self.lang(asked)),
            stops=asked.stops,
            seconds=self.options.seconds,
            is_gone=request.is_disconnected,
        )

    def lang(self, asked: Asked) -> str | None:
        """Whose frame the question gets: of a base the released API's choice, of a tuned model the one of training."""
        return asked.lang if self.model.asked_as == AskedAs() else None

    def question(self, asked: Asked) -> Any:
        """What the engine is asked.

        Raises:
            InputError: the picture can't be had, or the text is too long.
        """
        from model.inference.chat import checked_question, image_tensor
        from model.inference.load import image_size

        asked.refuse_text(self.options.max_length)  # before its picture is fetched
        image = None
        if asked.image is not None:
            image = image_tensor(opened(asked.image, image_size(self.model), self.limits), self.model)
        return checked_question(
            asked, image, self.model, self.tokenizer, self.options.max_length, lang=self.lang(asked)
        )

    async def events(
        self, first: Growth | None, growths: AsyncIterator[Growth], identity: str, tells_usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events: the answer in pieces, and [DONE]."""
        name, shown, growth = self.options.model_name, "", first
        try:
            yield event(completion_chunk({"role": "assistant", "content": ""}, "", identity, name))
            while growth is not None:
                piece = new_text(growth.text, shown, bool(growth.finished))
                if growth.finished and not growth.text.startswith(shown):
                    piece = f"\n{growth.text}"  # text that was sent can't be taken back
                shown += piece
                if piece:
                    yield event(completion_chunk({"content": piece}, "", identity, name))
                if growth.finished:
                    yield event(completion_chunk({}, growth.finished, identity, name))
                    if tells_usage:
                        yield event(usage_chunk(growth, identity, name))
                growth = await anext(growths, None)
        except FailedError as problem:
            yield event(error_body(503, str(problem)))
        finally:
            await growths.aclose()  # type: ignore[attr-defined]  # a generator; its row becomes free at once
        yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def on_bad_fields(request: Request, error: Any) -> Response:
    """Fields that are missing or of a wrong type, or no JSON."""
    kind = request.headers.get("content-type", "")
    if not JSON_KIND.match(kind):  # any web page that somebody looks at may send others to a server on this machine
        found = f'"{kind[:50]}" found' if kind else "it is missing"
        message = f"the header Content-Type: application/json is needed; {found}."
        return JSONResponse(error_body(400, message), 400)
    found = error.errors()
    lines = [f"{place_in_request(one)}: {what_is_wrong(one)}" for one in found]
    more = [f"{len(lines) - SHOWN_PROBLEMS} more"] if len(lines) > SHOWN_PROBLEMS else []
    return JSONResponse(error_body(400, "; ".join(lines[:SHOWN_PROBLEMS] + more)), 400)


def place_in_request(problem: dict[str, Any]) -> str:
    """Where pydantic found something, as `messages[0].content[1].type`, without its names of types."""
    parts = [part for part in problem["loc"][1:] if isinstance(part, int) or re.fullmatch(r"[a-z_]+", part)]
    if problem["type"] == "json_invalid" or not parts:
        return "the request"
    if parts[-1] == "str" and len(parts) > 1:
        parts.pop()
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def what_is_wrong(problem: dict[str, Any]) -> str:
    """A sentence's end, of what pydantic found."""
    if problem["type"] == "json_invalid":
        return f"not JSON at character {problem['loc'][-1] + 1} ({problem['ctx']['error']})"
    return str(problem["msg"])


async def on_input_error(request: Request, error: Exception) -> Response:
    """A picture, text or number that can't be used."""
    return JSONResponse(error_body(400, str(error)), 400)


async def on_busy(request: Request, error: Exception) -> Response:
    """No room."""
    return JSONResponse(error_body(429, "too many requests wait; try again later."), 429, {"retry-after": "1"})


async def on_failed(request: Request, error: Exception) -> Response:
    """No answer."""
    return JSONResponse(error_body(503, str(error)), 503, {"retry-after": "1"})


async def on_http_error(request: Request, error: Any) -> Response:
    """No such path, or not in this way."""
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)


async def on_fault(request: Request, error: Exception) -> Response:
    """A fault of ours; uvicorn prints its traceback."""
    return JSONResponse(error_body(500, "a fault in the server; its own output says more."), 500)


class Impatient(H11Protocol):
    """uvicorn's HTTP, for clients that send their headers in time: uvicorn itself waits without end.

    Headers have as long as an idle connection is kept, the first ones and those of each request after it.
    """

    limit: asyncio.TimerHandle | None = None  # until the headers that have begun are whole

    def connection_made(self, transport: Any) -> None:
        """Somebody is there, and has to begin a request."""
        super().connection_made(transport)
        self.wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come: bytes alone don't give it more time."""
        super().data_received(data)
        self.wait_for_headers()

    def wait_for_headers(self) -> None:
        """Close the connection if no request is in hand when the time is over."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self.limit is None:
            self.limit = self.loop.call_later(self.config.timeout_keep_alive, self.transport.close)
        elif not is_waiting and self.limit is not None:
            self.limit.cancel()
            self.limit = None


class Server(uvicorn.Server):
    """uvicorn's: it lets the answers in hand be finished at a signal. A second one ends it at once, as it ends all commands."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self.should_exit:
            end_now(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say what is still done, and do it."""
        guard: Guard = self.config.app  # type: ignore[assignment]  # any application, for uvicorn
        guard.refuse_unread()
        if count := guard.in_hand - len(guard.unread):
            say(f"Finishing the answers in hand ({count}); a second signal ends at once.")
        await super().shutdown(sockets)


def serve(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Load the model, and answer until a signal comes."""
    found = listening(options.host, options.port)
    from model.inference.engine import Engine

    model, tokenizer = computed_apart(loaded, checkpoint, options)
    with Service(Engine(model, tokenizer, options.rows, options.max_length), options.queue) as service:
        api = Api(service, model, tokenizer, options)
        config = uvicorn.Config(
            api.guard,
            http=Impatient,
            loop="asyncio",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=max(1, min(IDLE_SECONDS, round(options.body_seconds))),
        )
        host, port = found.getsockname()[:2]
        if options.api_key is None and not host.startswith("127.") and host != "::1":
            warn(f"--host {options.host} without --api_key: whoever reaches this machine may ask.")
        say(f"{options.model_name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        server = Server(config)
        with handling(server.handle_exit):  # uvicorn itself knows SIGINT and SIGTERM only
            server.run([found])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("api.py"):
        options = command_line().parse_args(argv)
        serve(options, check(options))


if __name__ == "__main__":
    main()
