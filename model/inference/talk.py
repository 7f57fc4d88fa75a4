"""A visitor's conversation about one picture, which one model answers or several side by side; for the page.

talk = Talk()
talk.look(content, speakers, limits)                     a picture's file; the conversation begins anew
async for _ in talk.asked(question, speakers, wish):     after each token; talk.turns has the answers so far
    show(talk.turns)
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.data.remote_images import Limits, opened
from model.data.rows import Row, scan_rows
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.api_formats import Asked
from model.inference.sampling import Sampling
from model.inference.serving import Growth, Service, growing

if TYPE_CHECKING:  # flags are checked before torch is loaded
    import torch

    from model.visualglm import VisualGLMModel


SECONDS_BETWEEN_LOOKS = 0.05  # whether a picture is there


@dataclass(frozen=True)
class Speaker:
    """A model that answers, under a name."""

    name: str
    service: Service
    model: "VisualGLMModel"
    tokenizer: ChatGLMTokenizer


@dataclass(frozen=True)
class Wish:
    """How to answer.

    Args:
        english: frame questions in English, as `chat_question`.
        max_length: tokens of the whole conversation. max_tokens: of the answer, or None.
        seconds: for an answer; then it is cut off.
    """

    sampling: Sampling
    english: bool
    max_length: int
    max_tokens: int | None = None
    seconds: float = 120.0


@dataclass(eq=False)
class Turn:
    """A question, and each speaker's answer so far. finished says why one has ended, as `Growth`'s."""

    question: str
    answers: list[str]
    finished: list[str]
    is_stopped: bool = False  # the answers are to end where they are


@dataclass
class Talk:
    """What was said about a picture.

    images has it as each speaker takes it, and is empty without a picture. right_answers has those of an example, by question.
    """

    turns: list[Turn] = field(default_factory=list)
    images: list["torch.Tensor"] = field(default_factory=list)
    right_answers: dict[str, str] = field(default_factory=dict)
    changes: int = 0  # pictures that are on their way; questions wait for them

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside the block another picture is got; what is asked meanwhile is asked about that one."""
        self.changes += 1
        try:
            yield
        finally:
            self.changes -= 1

    def stop(self) -> None:
        """Let the answers in hand end where they are, within half a second. From any thread."""
        if self.turns and not all(self.turns[-1].finished):
            self.turns[-1].is_stopped = True

    def look(self, content: bytes | None, speakers: Sequence[Speaker], limits: Limits) -> None:
        """Begin a new conversation about the picture in a file of this content, or about none.

        Raises:
            InputError: it can't be opened; then there is no picture.
        """
        from model.inference.chat import image_tensor
        from model.inference.load import image_size

        self.stop()
        self.turns, self.images, self.right_answers = [], [], {}
        if content is not None:
            self.images = [
                image_tensor(opened(content, image_size(speaker.model), limits), speaker.model) for speaker in speakers
            ]

    async def asked(self, question: str, speakers: Sequence[Speaker], wish: Wish) -> AsyncGenerator[Turn, None]:
        """The new turn, which is the last of turns: once before it has an answer, and whenever one has grown.

        `stop` ends them, and so does whoever leaves early. A question that can't be asked leaves no turn.

        Raises:
            BusyError, FailedError, InputError: as `growing`; the conversation is too long.
        """
        while self.changes:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        past = list(self.turns)
        questions = [
            await asyncio.to_thread(self._question, question, past, number, speaker, wish)
            for number, speaker in enumerate(speakers)
        ]
        turn = Turn(question, [""] * len(speakers), [""] * len(speakers))

        async def is_stopped() -> bool:
            return turn.is_stopped

        streams = [
            growing(one.service, asks, one.tokenizer, english=wish.english, seconds=wish.seconds, is_gone=is_stopped)
            for one, asks in zip(speakers, questions, strict=True)
        ]
        self.turns.append(turn)
        try:
            yield turn
            async with aclosing(together(streams)) as news:
                async for number, growth in news:
                    turn.answers[number], turn.finished[number] = growth.text, growth.finished
                    yield turn
        finally:
            is_answered = any(turn.answers) or any(turn.finished) or turn.is_stopped
            if not is_answered and turn in self.turns:
                self.turns.remove(turn)

    def _question(self, question: str, past: Sequence[Turn], number: int, speaker: Speaker, wish: Wish) -> Any:
        from model.inference.chat import checked_question

        history = [(turn.question, turn.answers[number]) for turn in past]
        asks = Asked(question, history, None, wish.sampling, max_tokens=wish.max_tokens)
        image = self.images[number] if self.images else None
        lang = "en" if wish.english else "zh"
        return checked_question(asks, image, speaker.model, speaker.tokenizer, wish.max_length, lang=lang)


async def together(streams: Sequence[AsyncIterator[Growth]]) -> AsyncGenerator[tuple[int, Growth], None]:
    """What several streams yield, as it comes, each with its stream's number. Leaving ends them all.

    Raises:
        Exception: the first that one of them raises.
    """
    news: asyncio.Queue[tuple[int, Growth | Exception | None]] = asyncio.Queue()

    async def passed_on(number: int, stream: AsyncIterator[Growth]) -> None:
        try:
            async for growth in stream:
                news.put_nowait((number, growth))
            news.put_nowait((number, None))
        except Exception as problem:
            news.put_nowait((number, problem))

    tasks = [asyncio.create_task(passed_on(*numbered)) for numbered in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            number, growth = await news.get()
            if isinstance(growth, Exception):
                raise growth
            if growth is None:
                left -= 1
            else:
                yield number, growth
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def held_out_rows(file: Path, most: int) -> list[Row]:
    """Rows that a run held out of training, and whose pictures are still there, at most so many; none without the file."""
    if not file.is_file():
        return []
    try:
        rows, _ = scan_rows(file)
    except InputError:  # damaged; the page works without examples
        return []
    return list(islice((row for row in rows if row.img and Path(row.img).is_file()), most))
