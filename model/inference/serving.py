"""An engine that many callers ask at once: one thread steps it, and each answer is told when it has grown.

    with Service(engine, queue=32) as service:
        answer = service.submit(question, on_change)        from any thread; on_change is called from the engine's
        async for growth in growing(service, question, …):  or from an event loop

A step that fails (no memory, damaged weights) fails the answers that were in it. Those that wait are tried after it.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from model.data.tokenizer import ChatGLMTokenizer
from model.inference.text import GrowingText
from model.progress import count_of, printable, warn

if TYPE_CHECKING:  # flags are checked before torch is loaded
    from model.inference.engine import Answer, Engine, Question

Result = TypeVar("Result")

SECONDS_BETWEEN_LOOKS = 0.5  # whether the client is still there, while its answer waits


def computed_apart(compute: Callable[..., Result], *arguments: object) -> Result:
    """What compute returns for the arguments. It runs in a thread that ends then, and with it the helpers that OpenMP gave this thread.

    The engine's thread has helpers of its own. GNU's OpenMP counts those of all threads, and if they are more than the
    processors, they go to sleep after each operation in place of waiting for the next: on a CPU each token would take
    up to twice as long. So a server loads its model in here.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute, *arguments).result()


class BusyError(Exception):
    """As many questions wait as may; later there is room again."""


class FailedError(Exception):
    """There is no answer, for a reason that isn't the question's. Its text says which."""


class Service:
    """The thread around an engine. Entering starts it; leaving lets it finish what it has, and ends it."""

    def __init__(self, engine: "Engine", queue: int) -> None:
        """Let at most so many questions wait for a free row."""
        self.engine, self.queue = engine, queue
        self.steps, self.tokens = 0, 0  # since the start
        self._closing = False
        self._changed = threading.Condition()
        self._listeners: dict[Answer, Callable[[], object]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Service":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            if kind is not None:  # nobody waits for the answers any more
                for answer in self._listeners:
                    answer.cancel()
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._closing

    @property
    def before_a_new_one(self) -> int:
        """How many of the questions in hand have to be answered until a new one has a row."""
        return max(0, self._in_hand() - self.engine.rows + 1)

    def _in_hand(self) -> int:
        """How many questions are waited for. What was cancelled leaves at the next step, and takes nobody's place till then."""
        return sum(not answer.is_cancelled for answer in tuple(self._listeners))

    def submit(self, question: "Question", on_change: Callable[[], object]) -> "Answer":
        """The answer, still empty; on_change is called after each of its tokens and when it is finished.

        Raises:
            BusyError: too many wait already.
            InputError: as `Engine.submit`.
        """
        with self._changed:
            if self._in_hand() >= self.engine.rows + self.queue:
                raise BusyError
            answer = self.engine.submit(question)
            self._listeners[answer] = on_change
            self._changed.notify()
        return answer

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.engine.busy or self._closing)
                if not self.engine.busy:
                    return
            try:
                changed = self.engine.step()
            except Exception as error:  # whatever it is, the server lives on
                changed = self._failed(error)
            self.steps += 1
            self.tokens += sum(answer.finished in ("", "length") for answer in changed)
            with self._changed:
                listeners = [self._listeners[answer] for answer in changed]
                for answer in changed:
                    if answer.finished:
                        del self._listeners[answer]
            for on_change in listeners:
                with suppress(RuntimeError):  # its event loop has ended
                    on_change()

    def _failed(self, error: Exception) -> "list[Answer]":
        """The answers in hand, given up, and those that the step had finished before it failed."""
        failed = list(self.engine.active)
        self.engine.active.clear()
        for answer in failed:
            answer.finished = "failed"
        warn(f"{count_of(len(failed), 'answer')} failed: {printable(str(error) or type(error).__name__)}")
        return [answer for answer in tuple(self._listeners) if answer.finished]


@dataclass(frozen=True)
class Growth:
    """An answer so far. finished is "stop" or "length" at its end; until then it is empty, and text may still change."""

    text: str
    finished: str
    prompt_tokens: int
    tokens: int


async def growing(
    service: Service,
    question: "Question",
    tokenizer: ChatGLMTokenizer,
    *,
    english: bool = False,
    stops: Sequence[str] = (),
    seconds: float = 120.0,
    is_gone: Callable[[], Awaitable[bool]] | None = None,
) -> AsyncIterator[Growth]:
    """The answer to a question as it grows; it ends before the first of stops, and at the latest after so many seconds.

    Whoever leaves early frees the answer's row.

    Args:
        is_gone: whether nobody waits for the answer any more; it then ends without a last growth.

    Raises:
        BusyError, InputError: as `Service.submit`.
        FailedError: the engine couldn't go on, or had no row for it in time.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    end = time.monotonic() + seconds
    answer = service.submit(question, lambda: loop.call_soon_threadsafe(changed.set))
    text = GrowingText(tokenizer, english)
    try:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), min(SECONDS_BETWEEN_LOOKS, max(0.0, end - time.monotonic())))
            changed.clear()
            if is_gone is not None and await is_gone():
                return
            is_late = time.monotonic() >= end
            finished = answer.finished or ("length" if is_late else "")  # read before the tokens: these are then all
            ids = list(answer.ids)
            if finished in ("failed", "cancelled"):
                raise FailedError("the model couldn't go on with this answer; the server's own output says why.")
            if is_late and not ids:
                raise FailedError(f"no row was free within {seconds:.0f} seconds; try again later.")
            so_far, is_stopped = before_stop(text.of(ids, bool(finished)), stops, bool(finished))
            finished = "stop" if is_stopped else finished
            if ids or finished:
                yield Growth(so_far, finished, len(question.input_ids), len(ids))
            if finished:
                return
    finally:
        answer.cancel()


def before_stop(text: str, stops: Sequence[str], finished: bool = False) -> tuple[str, bool]:
    """text up to the first of stops, and whether there is one. Until finished, the beginning of one is held back."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    if places:
        return text[: min(places)], True
    begun = 0
    for stop in () if finished else stops:
        begun = max([begun, *(length for length in range(1, len(stop)) if text.endswith(stop[:length]))])
    return text[: len(text) - begun], False
