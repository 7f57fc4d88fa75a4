"""Asking a VisualGLM about a picture.

picture, question, past turns → context ids … [gMASK] <sop> → one token after another until <eop> → answer
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.errors import InputError
from model.files import find_checkpoint, read_json_object
from model.image import BlipImageEvalProcessor
from model.prompt import context_ids
from model.rows import open_picture
from model.sat_compat import import_sat, quieten
from model.tokenizer import ChatGLMTokenizer, check_special_ids, find_tokenizer
from model.visualglm import VisualGLMModel, glm_position_ids, prefix_mask

import_sat()

from sat.generation.autoregressive_sampling import filling_sequence  # noqa: E402  (sat only after import_sat)
from sat.generation.sampling_strategies import BaseStrategy  # noqa: E402
from sat.model.cached_autoregressive_model import CachedAutoregressiveMixin  # noqa: E402

Turn = tuple[str, str]  # question, answer

FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
CHINESE = r"[\u4e00-\u9fff]"


def load_for_answering(checkpoint: str, tokenizer_path: str | None = None) -> tuple[VisualGLMModel, ChatGLMTokenizer]:
    """A checkpoint's model, in eval mode, and its tokenizer: a base model, or one with adapters.

    The model is on the GPU in float16 where there is one, else on the CPU in float32.

    Args:
        checkpoint: a folder, or a name in $SAT_HOME.
        tokenizer_path: where to find the tokenizer if the folder has none.

    Raises:
        InputError: no such checkpoint, or one that can't be used.
    """
    from model.adapters import FineTuneVisualGLMModel

    quieten()
    folder = find_checkpoint(checkpoint)
    config = read_json_object(folder / "model_config.json", "The checkpoint's configuration")
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(folder, tokenizer_path))
    check_special_ids(tokenizer, config)
    adapted = any(config.get(flag) for flag in ("use_lora", "use_qlora", "use_ptuning"))
    model_class = FineTuneVisualGLMModel if adapted else VisualGLMModel
    args = model_class.get_args(skip_init=True, fp16=torch.cuda.is_available())
    model, _ = model_class.from_pretrained(str(folder), args)
    return model.eval(), tokenizer


def image_size(model: VisualGLMModel) -> int:
    """Height and width, in pixels, of the pictures that the model takes."""
    return model.get_mixin("eva").model.vit.transformer.property.image_size[0]


@contextmanager
def key_value_cache(model: VisualGLMModel) -> Iterator[None]:
    """Let the model keep its keys and values inside the block: each new token then costs one position, not all."""
    name = "auto-regressive"
    if name in model.mixins:
        yield
        return
    model.add_mixin(name, CachedAutoregressiveMixin())
    try:
        yield
    finally:
        model.del_mixin(name)


@torch.no_grad()
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
    device = model.transformer.word_embeddings.weight.device
    if image is None and image_path:
        edge = image_size(model)
        image = BlipImageEvalProcessor(edge)(open_picture(image_path, edge)).unsqueeze(0).to(device)
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
    with key_value_cache(model):
        tokens = filling_sequence(
            model,
            torch.tensor(ids + [-1] * (max_length - len(ids)), device=device),
            batch_size=1,
            strategy=strategy,
            get_masks_and_position_ids=masks_and_position_ids(tokenizer),
            image=image,
            pre_image=pre_image,
        )[0]
    answer = tokens[0, len(ids) :].tolist()
    if answer and answer[-1] == tokenizer.eos_token_id:
        answer.pop()
    response = tidied(tokenizer.decode(answer), english)
    return response, [*history, (query, response)], image


def masks_and_position_ids(tokenizer: ChatGLMTokenizer) -> Any:
    """What SAT's filling_sequence asks for one sequence int64[seq], whose tokens after the context are still -1."""

    def of_sequence(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sop = tokens.tolist().index(tokenizer.bos_token_id)
        context_length, gmask_position, no_padding = tokens.new_tensor([[sop], [sop - 1], [0]]).unbind()
        mask = prefix_mask(context_length, no_padding, len(tokens)).float()
        positions = glm_position_ids(context_length, gmask_position, no_padding, len(tokens))
        return tokens.unsqueeze(0), mask, positions

    return of_sequence


def tidied(response: str, english: bool = False) -> str:
    """An answer as it is shown: as the released demo does, with full-width punctuation beside Chinese characters."""
    response = response.strip().replace("[[训练时间]]", "2023年")
    for half, full in FULL_WIDTH.items():
        response = re.sub(rf"({CHINESE}){re.escape(half)}", rf"\1{full}", response)
        response = re.sub(rf"{re.escape(half)}({CHINESE})", rf"{full}\1", response)
    return response.split("A:" if english else "答：")[-1].strip()
