"""Asking a VisualGLM about an image.

picture, question, past turns → context ids … [gMASK] <sop> → one token after another until <eop> → answer
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.data.image_processor import BlipImageEvalProcessor
from model.data.images import image_file, open_image
from model.data.prompt import context_ids
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.load import image_size
from model.masks import first_position, mask_and_positions
from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel

import_sat()

from sat.generation.autoregressive_sampling import stream_filling_sequence  # noqa: E402  (sat only after import_sat)
from sat.generation.sampling_strategies import BaseStrategy  # noqa: E402
from sat.model.cached_autoregressive_model import CachedAutoregressiveMixin  # noqa: E402

Turn = tuple[str, str]  # question, answer

FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = r"[\u4e00-\u9fff]"


@contextmanager
def key_value_cache(model: VisualGLMModel) -> Iterator[None]:
    """Let the model keep its keys and values inside the block. Each new token then costs one position instead of all."""
    name = "auto-regressive"
    if name in model.mixins:
        yield
        return
    model.add_mixin(name, CachedAutoregressiveMixin())
    try:
        yield
    finally:
        model.del_mixin(name)


def chat(
    image_path: str | Path | Any | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[Turn] | None = None,
    image: torch.Tensor | None = None,
    max_length: int = 1024,
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
        image: [1, 3, H, W], in place of image_path, as an earlier call returned it.
        max_length: tokens of context and answer together.
        top_p, top_k, temperature: how to sample; temperature 0 always takes the likeliest token.
        repetition_penalty: divides the scores of tokens that the answer already has.
        invalid_slices: ranges of token ids that must not be answered.
        english: frame the question as `Q:…\\nA:` in place of `问：…\\n答：`.

    Raises:
        InputError: the picture can't be opened, or the context leaves no room within max_length.
    """
    history = list(history or [])
    if image is None and image_path:
        image = image_tensor(image_path, model)
    *_, response = answer_so_far(
        image,
        model,
        tokenizer,
        query,
        history,
        max_length=max_length,
        top_p=top_p,
        top_k=top_k,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        invalid_slices=invalid_slices,
        english=english,
    )
    return response, [*history, (query, response)], image


def image_tensor(source: str | Path | Any, model: VisualGLMModel) -> torch.Tensor:
    """A path, a URL or an open PIL image as a tensor [1, 3, H, W] of the model's image size, on its device.

    Raises:
        InputError: it can't be fetched or opened.
    """
    edge = image_size(model)
    pixels = BlipImageEvalProcessor(edge)(open_image(image_file(source), edge))
    return pixels.unsqueeze(0).to(model.transformer.word_embeddings.weight.device)


@torch.no_grad()
def answer_so_far(
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    query: str,
    history: Sequence[Turn] = (),
    *,
    max_length: int = 1024,
    top_p: float = 0.7,
    top_k: int = 30,
    temperature: float = 0.95,
    repetition_penalty: float = 1.2,
    invalid_slices: Sequence[slice] = (),
    english: bool = False,
) -> Iterator[str]:
    """The answer to query as it grows, once for each of its tokens. The arguments are `chat`'s.

    Raises:
        InputError: the context leaves no room within max_length.
    """
    ids, pre_image = context_ids(query, history, image is not None, tokenizer, model.image_length, english)
    if len(ids) >= max_length:
        raise InputError(
            f"the question and its history take {len(ids)} tokens; --max_length must be more, not {max_length}."
        )
    greedy = temperature == 0
    strategy = BaseStrategy(
        temperature=1.0 if greedy else temperature,
        top_p=0.0 if greedy else top_p,
        top_k=1 if greedy else top_k,
        end_tokens=[tokenizer.eos_token_id],
        invalid_slices=list(invalid_slices),
        repetition_penalty=repetition_penalty,
    )
    device = model.transformer.word_embeddings.weight.device
    with key_value_cache(model):
        for tokens, _ in stream_filling_sequence(
            model,
            torch.tensor(ids + [-1] * (max_length - len(ids)), device=device),
            batch_size=1,
            strategy=strategy,
            get_masks_and_position_ids=masks_and_position_ids(tokenizer),
            image=image,
            pre_image=pre_image,
        ):
            yield answer_text(tokens[0, len(ids) :].tolist(), tokenizer, english)


def answer_text(ids: list[int], tokenizer: ChatGLMTokenizer, english: bool = False) -> str:
    """The answer that token ids spell, up to <eop> if it is there."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return tidied(tokenizer.decode(ids), english)


def masks_and_position_ids(tokenizer: ChatGLMTokenizer) -> Any:
    """The function that SAT's filling_sequence takes under this name.

    It gets one sequence int64[seq], whose tokens after the context are still -1. It gives the sequence as a batch of one,
    its mask and its positions.
    """

    def of_sequence(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        context_length = first_position(tokens.unsqueeze(0) == tokenizer.bos_token_id)
        mask, positions = mask_and_positions(context_length, torch.zeros_like(context_length), len(tokens))
        return tokens.unsqueeze(0), mask.float(), positions

    return of_sequence


def tidied(response: str, english: bool = False) -> str:
    """An answer as the released demo shows it, with full-width punctuation beside Chinese characters."""
    response = response.strip().replace("[[训练时间]]", "2023年")
    for half, full in FULL_WIDTH.items():
        response = re.sub(rf"({CHINESE}){re.escape(half)}", rf"\1{full}", response)
        response = re.sub(rf"{re.escape(half)}({CHINESE})", rf"{full}\1", response)
    return response.split("A:" if english else "答：")[-1].strip()
