"""Asking a VisualGLM about an image.

picture, question, past turns → context ids … [gMASK] <sop> → one token after another until <eop> → answer
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.checkpoints.metadata import answer_length
from model.data.image_processor import BlipImageEvalProcessor
from model.data.images import open_image
from model.data.prompt import context_ids
from model.data.remote_images import image_file, is_url
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.engine import Answer, Engine, Question, model_positions
from model.inference.load import image_size
from model.inference.sampling import Sampling
from model.inference.text import GrowingText
from model.visualglm import VisualGLMModel

if TYPE_CHECKING:  # it needs pydantic, which only servers need
    from model.inference.api_formats import Asked

Turn = tuple[str, str]  # question, answer

RELEASED_LENGTH = 1024  # tokens of context and answer together, of the released `chat`


def chat(
    image_path: str | Path | Any | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    image: Any | None = None,
    max_length: int | None = None,
    top_p: float = 0.7,
    top_k: int = 30,
    temperature: float = 0.95,
    repetition_penalty: float = 1.2,
    invalid_slices: Sequence[slice] = (),
    english: bool = False,
) -> tuple[str, list[Turn], torch.Tensor | None]:
    """The model's answer to query, the history with it, and the picture as a tensor for the next turn.

    Args:
        image_path: a path, a URL, an open PIL image, or None for no picture.
        history: earlier turns, oldest first.
        image: in place of image_path: [1, 3, H, W], as an earlier call returned it, or what image_path takes.
        max_length: tokens of context and answer together; by default 1024, or as many as a smaller model takes.
        top_p, top_k, temperature, repetition_penalty, invalid_slices: how to sample, see `Sampling`.
        english: frame the question as `Q:…\\nA:` in place of `问：…\\n答：`; without it the frame is the one of training.

    Raises:
        InputError: the picture can't be opened, the context leaves no room within max_length, or that is more than the
            model takes.
    """
    history = list(history or [])
    if image is None:
        image = image_path or None
    if image is not None and not isinstance(image, torch.Tensor):
        image = image_tensor(image, model)
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, tuple(invalid_slices))
    *_, response = answer_so_far(
        image,
        model,
        tokenizer,
        query,
        history,
        max_length=max_length,
        sampling=sampling,
        lang="en" if english else None,
    )
    return response, [*history, (query, response)], image


def image_tensor(source: str | Path | Any, model: VisualGLMModel) -> torch.Tensor:
    """A path, a URL or an open PIL image as a tensor [1, 3, H, W] of the model's image size, on its device.

    Raises:
        InputError: it can't be fetched or opened.
    """
    edge = image_size(model)
    image = open_image(image_file(source), edge, address=str(source) if is_url(source) else None)
    pixels = BlipImageEvalProcessor(edge)(image)
    return pixels.unsqueeze(0).to(model.transformer.word_embeddings.weight.device)


def chat_question(
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[Turn] = (),
    *,
    max_length: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    lang: str | None = None,
) -> Question:
    """A turn of a conversation as the engine takes it. The arguments are `chat`'s.

    Args:
        lang: "zh" or "en", whose frame is taken; None takes the one that the model was trained with.

    Raises:
        InputError: max_length is more than the model takes.
    """
    prefix, english = model.asked_as.source_prefix, model.asked_as.is_english(lang)
    past = [(prefix + question, answer) for question, answer in history]
    ids, pre_image = context_ids(prefix + query, past, image is not None, tokenizer, model.image_length, english)
    length = answer_length(model_positions(model), max_length, RELEASED_LENGTH)
    return Question(ids, pre_image, image, max_length=length, sampling=sampling)


def checked_question(
    asked: "Asked",
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    max_length: int,
    *,
    lang: str | None,
) -> Question:
    """What a stranger asks, as the engine takes it: a text of any length is refused before it takes long.

    Args:
        image: [1, 3, H, W], or None; in place of asked.image.
        max_length: tokens of context and answer together, at most.
        lang: as `chat_question` takes it.

    Raises:
        InputError: the text is too long, or no text.
    """
    room = min(max_length, asked.max_length or max_length)
    asked.refuse_text(room)
    question = chat_question(
        image,
        model,
        tokenizer,
        asked.query,
        asked.history,
        max_length=room,
        sampling=asked.sampling,
        lang=lang,
    )
    taken = len(question.input_ids)
    if taken >= room:
        raise InputError(
            f"the question and its history take {taken} tokens, the answer not counted; fewer than {room} are needed."
        )
    return replace(question, max_length=room if asked.max_tokens is None else min(room, taken + asked.max_tokens))


def answer_so_far(
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[Turn] = (),
    *,
    max_length: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    lang: str | None = None,
    engine: Engine | None = None,
) -> Generator[str, None, str]:
    """The answer to query as it grows, once for each of its tokens. The other arguments are `chat_question`'s.

    What it returns in the end is why there are no more tokens, as `Answer.finished`. A question is refused at once, not
    only when the first token is asked for.

    Args:
        engine: that of the turns before, which has seen the picture; None makes one.

    Raises:
        InputError: the context leaves no room within max_length, or that is more than the model takes.
    """
    question = chat_question(
        image, model, tokenizer, query, history, max_length=max_length, sampling=sampling, lang=lang
    )
    engine = engine or Engine(model, tokenizer, rows=1, positions=question.max_length)
    return _texts_of(engine.submit(question), engine, GrowingText(tokenizer, model.asked_as.is_english(lang)))


def _texts_of(answer: Answer, engine: Engine, text: GrowingText) -> Generator[str, None, str]:
    try:
        while not answer.finished:
            engine.step()
            yield text.of(answer.ids, finished=bool(answer.finished))
        return answer.finished
    finally:
        answer.cancel()  # if it failed, or nobody wants more of it, the next turn doesn't wait for its end
