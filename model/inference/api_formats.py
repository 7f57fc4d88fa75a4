"""What clients of scripts/api.py send, and what they are sent: OpenAI's chat completions, and the form released in 2023.

    ChatRequest, ReleasedRequest  →  Asked: query, history, image, how to answer  →  completion, completion_chunk, …

A field that isn't known here is refused: it would change the answer elsewhere, or misspells one that would here. Those that
change no answer are IGNORED.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, Field

from model.errors import InputError, raise_problems
from model.inference.sampling import Sampling
from model.inference.serving import Growth

MOST_STOPS = 4  # OpenAI's own limit
MOST_MESSAGES = 1000
CHINESE = re.compile("[\u4e00-\u9fa5]")  # the released API frames a question without these in English
LONGEST_TOKEN = 80  # characters; <|blank_80|> spells as many spaces
SHOWN_NAMES = 10  # of fields that are refused; a request has room for thousands

# OpenAI's fields that change no answer here, of requests, messages and their parts; and names that clients give things.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "prediction", "name", "refusal", "annotations", "detail", "cache_control", "id", "user_id",
    "session_id", "request_id", "timestamp", "created_at", "priority", "keep_alive",
    "reasoning", "reasoning_effort", "reasoning_content", "thinking",  # this model does none
)  # fmt: skip
# OpenAI's and other servers' fields that aren't offered, and what asks for nothing in each, besides null and what is empty.
NOT_OFFERED: dict[str, tuple[Any, ...]] = dict.fromkeys((
    "tools", "functions", "tool_calls", "logprobs", "top_logprobs", "logit_bias", "audio", "frequency_penalty",
    "presence_penalty", "web_search_options", "min_p", "min_tokens", "stop_token_ids", "guided_choice", "guided_json",
    "guided_regex", "guided_grammar", "structured_outputs", "bad_words", "ignore_eos", "echo", "use_beam_search",
    "max_new_tokens", "no_repeat_ngram_size", "stop_sequences", "system", "image", "images",
), (0,)) | {
    "n": (1,), "best_of": (1,), "num_beams": (1,), "length_penalty": (0, 1), "max_length": (), "modalities": (["text"],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "verbosity": ("medium",), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "do_sample": (True,),
}  # fmt: skip

Turn = tuple[str, str]


class Fields(BaseModel, extra="allow"):
    """Fields of which none is dropped without a word."""

    def not_offered(self, where: str = "") -> Iterator[str]:
        """A sentence for each field that isn't known here, or isn't offered, and asks for something."""
        for name, value in (self.model_extra or {}).items():
            nothing = NOT_OFFERED.get(name)
            asks = value is not False if nothing is None else value not in nothing
            if not asks or value in (None, "", [], {}) or name in IGNORED:
                continue
            if name in NOT_OFFERED:
                yield f"{where}{name} isn't offered; leave it out."
            else:
                yield f"{where}{name[:50]} isn't known here; {', '.join(type(self).model_fields)} are."


class Url(BaseModel):
    """An image's address or data URI."""

    url: str


class Part(Fields):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Url | str | None = None


class Message(Fields):
    """What one side said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    include_usage: bool = False


class SamplingFields(Fields):
    """How to answer; None is the server's own setting."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=1)
    repetition_penalty: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    def sampling(self, default: Sampling) -> Sampling:
        """The server's settings, and those of this request in their place.

        Raises:
            InputError: a number is out of bounds.
        """
        temperature = default.temperature if self.temperature is None else self.temperature
        penalty = 1.0 if temperature == 0 else default.repetition_penalty if default.temperature else 1.2
        try:
            return Sampling(
                temperature,
                default.top_p if self.top_p is None else self.top_p or 1e-6,  # OpenAI allows 0: the likeliest token
                default.top_k if self.top_k is None else self.top_k,
                penalty if self.repetition_penalty is None else self.repetition_penalty,
                default.invalid_slices,
                default.seed if self.seed is None else self.seed % 2**63,
            )
        except InputError as problem:
            raise InputError(str(problem).replace("--", "")) from None


class ChatRequest(SamplingFields):
    """A request to /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def asked(self, default: Sampling) -> "Asked":
        """What the request asks.

        Raises:
            InputError: it asks for something that isn't offered, or can't be understood.
        """
        raise_problems(islice(self._refused(), SHOWN_NAMES))
        query, history, image = conversation(self.messages)
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stops) > MOST_STOPS or "" in stops:
            raise InputError(f"stop: {len(stops)} texts; up to {MOST_STOPS} are needed, and none empty.")
        most = [number for number in (self.max_tokens, self.max_completion_tokens) if number is not None]
        return Asked(query, history, image, self.sampling(default), tuple(stops), min(most, default=None))

    def _refused(self) -> Iterator[str]:
        """`not_offered` of the request, its messages and their parts."""
        yield from self.not_offered()
        for number, message in enumerate(self.messages):
            yield from message.not_offered(f"messages[{number}].")
            for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
                yield from part.not_offered(f"messages[{number}].content[{place}].")


class ReleasedRequest(SamplingFields):
    """A request to / as the API of 2023 took it."""

    text: str
    image: str | None = None
    history: list[tuple[str, str]] | Literal[""] | None = Field(None, max_length=MOST_MESSAGES)
    max_length: int | None = Field(None, ge=1)
    min_length: Any = None  # did nothing there either

    def asked(self, default: Sampling) -> "Asked":
        """What the request asks.

        Raises:
            InputError: there is no question, a field isn't known, or a number is out of bounds.
        """
        raise_problems(islice(self.not_offered(), SHOWN_NAMES))
        if not self.text.strip():
            raise InputError("text: it is empty; a question is needed.")
        return Asked(
            self.text, self.history or [], self.image or None, self.sampling(default), max_length=self.max_length
        )


@dataclass(frozen=True)
class Asked:
    """A question with what was said before, and how it is to be answered.

    Args:
        image: an address, a data URI or base64.
        stops: texts before which the answer ends.
        max_tokens: of the answer. max_length: of context and answer together.
    """

    query: str
    history: list[Turn]
    image: str | None
    sampling: Sampling
    stops: tuple[str, ...] = ()
    max_tokens: int | None = None
    max_length: int | None = None

    @property
    def lang(self) -> str:
        """The language of the question, as the released API tells it."""
        return "zh" if CHINESE.search(self.query) else "en"

    def refuse_text(self, positions: int) -> None:
        """Raise an error on text that can't be tokens, or that is too long whatever its tokens are.

        Raises:
            InputError: as said.
        """
        texts = [self.query, *(text for turn in self.history for text in turn), *self.stops]
        if sum(map(len, texts)) > positions * LONGEST_TOKEN:
            raise InputError(
                f"the question and its history have {sum(map(len, texts))} characters; there is room for {positions} tokens, "
                "so less is needed."
            )
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise InputError("the text holds half a character (a lone surrogate); Unicode text is needed.") from None


def conversation(messages: Sequence[Message]) -> tuple[str, list[Turn], str | None]:
    """The last question, the turns before it, and the picture's address or data, or None.

    Texts of one side that follow each other are one, a line each. So the system's stand before the first question: the model
    was taught no system prompt.

    Raises:
        InputError: the last message isn't the user's, the question has no text, or there are several pictures.
    """
    if messages[-1].role != "user":
        raise InputError(
            f'messages: the last one is of role "{messages[-1].role}"; a question of role "user" is needed.'
        )
    said: list[tuple[bool, list[str]]] = []  # (whether the assistant said it, its texts)
    question: list[str] = []  # the user's part of the last question
    images: list[str] = []
    for number, message in enumerate(messages):
        text, found = _content(message, f"messages[{number}]")
        images += found
        is_answer = message.role == "assistant"
        if is_answer:
            question = []
        elif message.role == "user":
            question.append(text)
        if not said and is_answer:
            said.append((False, []))
        if said and said[-1][0] == is_answer:
            said[-1][1].append(text)
        else:
            said.append((is_answer, [text]))
    if len(images) > 1:
        raise InputError(f"messages: {len(images)} pictures; the model takes one a conversation.")
    if not "".join(question).strip():
        raise InputError('messages: the last question has no text; a text in its "content" is needed.')
    lines = ["\n".join(text for text in texts if text) for _, texts in said]
    return lines[-1], list(zip(lines[:-1:2], lines[1::2], strict=True)), images[0] if images else None


def _content(message: Message, where: str) -> tuple[str, list[str]]:
    """A message's text, and its pictures."""
    if not isinstance(message.content, list):
        return message.content or "", []
    texts, images = [], []
    for part in message.content:
        found = part.text if part.type == "text" else part.image_url
        if found is None:
            raise InputError(f'{where}: a part of type "{part.type}" without "{part.type}"; it is needed.')
        if part.text and part.image_url:
            raise InputError(f'{where}: a part with "text" and "image_url"; a part for each is needed.')
        if part.type == "text":
            texts.append(str(found))
            continue
        url = found.url if isinstance(found, Url) else str(found)
        if not url.strip():
            raise InputError(f'{where}: "image_url" is empty; an address or a data URI is needed, or no such part.')
        images.append(url)
        if message.role != "user":
            raise InputError(f'{where}: a picture in a message of role "{message.role}"; "user" is needed.')
    return "\n".join(texts), images


# --- answers ----------------------------------------------------------------------------------------------------------


def usage(growth: Growth) -> dict[str, int]:
    """How many tokens it took."""
    return {
        "prompt_tokens": growth.prompt_tokens,
        "completion_tokens": growth.tokens,
        "total_tokens": growth.prompt_tokens + growth.tokens,
    }


def completion(growth: Growth, identity: str, model: str) -> dict[str, Any]:
    """OpenAI's answer, whole."""
    message = {"role": "assistant", "content": growth.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": growth.finished, "logprobs": None}
    return {**_head(identity, model, "chat.completion"), "choices": [choice], "usage": usage(growth)}


def completion_chunk(delta: dict[str, str], finished: str, identity: str, model: str) -> dict[str, Any]:
    """A piece of OpenAI's answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finished or None, "logprobs": None}
    return {**_head(identity, model, "chat.completion.chunk"), "choices": [choice]}


def usage_chunk(growth: Growth, identity: str, model: str) -> dict[str, Any]:
    """The last piece, where usage was asked for."""
    return {**_head(identity, model, "chat.completion.chunk"), "choices": [], "usage": usage(growth)}


def _head(identity: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


def released_answer(growth: Growth, asked: Asked) -> dict[str, Any]:
    """The answer as the API of 2023 gave it; some of its versions called the text result, others response."""
    return {
        "result": growth.text,
        "response": growth.text,
        "history": [*asked.history, (asked.query, growth.text)],
        "status": 200,
        "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
    }


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """What is said instead of an answer, as OpenAI says it, with the released form's status beside."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}, "status": status}
