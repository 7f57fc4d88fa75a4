"""VisualGLM: ChatGLM with a picture among its word embeddings.

    input_ids    <img> · · · · </img> question gMASK sop  answer
    embeddings   word  picture word   …        word  word word
                       └ image_length positions from pre_image on

Shapes: batch = samples, seq = tokens of the longest one, hidden = the language model's width.
"""

import argparse
from typing import Any

import torch

from model.blip2 import BLIP2
from model.options import add_model_flags
from model.sat_compat import import_sat, parallel_output_once

import_sat()

from sat.model import BaseMixin, ChatGLMModel  # noqa: E402  (sat can be imported only after import_sat)


def first_position(found: torch.Tensor) -> torch.Tensor:
    """int64[batch]: where each row of bool[batch, seq] is first true (0 if nowhere)."""
    return found.int().argmax(dim=1)


def prefix_mask(context_length: torch.Tensor, pad_length: torch.Tensor, seq_length: int) -> torch.Tensor:
    """bool[batch, 1, seq, seq]: which position (row) sees which (column).

    The context sees all of itself, the answer is causal, padding on the left neither sees nor is seen:

                  · c c a a
        padding · 0 0 0 0 0
        context c 0 1 1 0 0
        context c 0 1 1 0 0
        answer  a 0 1 1 1 0
        answer  a 0 1 1 1 1

    Args:
        context_length: int64[batch], tokens before <sop>, padding on the left included.
        pad_length: int64[batch], tokens of padding on the left.
        seq_length: tokens in all.
    """
    position = torch.arange(seq_length, device=context_length.device)
    row, column = position[None, :, None], position[None, None, :]
    visible = (column <= row) | (column < context_length[:, None, None])
    padding = pad_length[:, None, None]
    return (visible & (row >= padding) & (column >= padding)).unsqueeze(1)


def glm_position_ids(
    context_length: torch.Tensor, mask_position: torch.Tensor, pad_length: torch.Tensor, seq_length: int
) -> torch.Tensor:
    """int64[batch, 2, seq]: ChatGLM's two positions of each token.

        tokens   ·  c  c  gMASK sop a  a
        first    0  0  1  2     2   2  2     counts the context, then stays where [gMASK] is
        second   0  0  0  0     1   2  3     counts the answer, <sop> first

    Args:
        context_length: int64[batch], tokens before <sop>, padding on the left included.
        mask_position: int64[batch], index of [gMASK] (or [MASK]).
        pad_length: int64[batch], tokens of padding on the left.
        seq_length: tokens in all.
    """
    position = torch.arange(seq_length, device=context_length.device).expand(len(context_length), -1)
    start, pad = context_length[:, None], pad_length[:, None]
    in_answer = position >= start
    first = torch.where(in_answer, mask_position[:, None] - pad, (position - pad).clamp(min=0))
    second = torch.where(in_answer, position - start + 1, 0)
    return torch.stack((first, second), dim=1)


def pictures_in_rows(pictures: torch.Tensor, slot_ids: torch.Tensor, words: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Embeddings [batch, image_length, hidden]: of the pictures in the rows that have one, else of the words there.

    A row has a picture where all its slots are pad ids: a row of text only is longer than <img>, and holds words there.

    Args:
        pictures: [pictures, image_length, hidden], in the order of those rows.
        slot_ids: int64[batch, image_length], the token ids where the slots would be; words: their embeddings.
    """
    has_picture = (slot_ids == pad_id).all(dim=1)
    number = (has_picture.cumsum(0) - 1).clamp(min=0)
    return torch.where(has_picture[:, None, None], pictures[number], words)


class ImageMixin(BaseMixin):
    """Puts the picture's embeddings where the image slots are."""

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.image_length = args.image_length
        self.pad_id = args.pad_token_id
        sat_flags = {"skip_init": args.skip_init, "model_parallel_size": args.model_parallel_size}
        self.model = BLIP2(
            {**args.eva_args, **sat_flags}, {**args.qformer_args, **sat_flags}, args.hidden_size, **kwargs
        )

    def train(self, mode: bool = True) -> "ImageMixin":
        """Frozen eyes don't blink: dropout in a part that learns nothing would only blur the picture."""
        return super().train(mode and self.model.is_trained())

    def word_embedding_forward(
        self,
        input_ids: torch.Tensor,
        image: torch.Tensor | None = None,
        pre_image: int = 0,
        **_: Any,
    ) -> torch.Tensor:
        """Embeddings [batch, seq, hidden] of input_ids int64[batch, seq], with image [pictures, 3, H, W] in its slots.

        With fewer pictures than rows, they belong to the rows that have slots. Without an image, or when the tokens end before the slots do (one token at a time, from the cache), the words
        alone are embedded.
        """
        words = self.transformer.word_embeddings(input_ids)
        after_image = pre_image + self.image_length
        if image is None or not len(image) or input_ids.shape[1] < after_image:
            return words
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.model.is_trained()):
            picture = self.model(image.to(words.dtype)).to(words.dtype)
        if len(picture) < len(words):
            slots = slice(pre_image, after_image)
            picture = pictures_in_rows(picture, input_ids[:, slots], words[:, slots], self.pad_id)
        return torch.cat((words[:, :pre_image], picture, words[:, after_image:]), dim=1)


class VisualGLMModel(ChatGLMModel):
    """ChatGLM-6B (or a smaller one of its kind) that sees: parameter names are those of the released checkpoints."""

    def __init__(self, args: Any, transformer: torch.nn.Module | None = None, **kwargs: Any) -> None:
        """Build the model that args, SAT's namespace, describes; kwargs are SAT's (params_dtype, parallel_output …)."""
        kwargs = parallel_output_once(args, kwargs)
        super().__init__(args, transformer=transformer, **kwargs)
        self.image_length = args.image_length
        # Only the width of numbers is shared with the eyes; a transformer or its options are the language model's.
        vision_kwargs = {name: kwargs[name] for name in ("params_dtype",) if name in kwargs}
        self.add_mixin("eva", ImageMixin(args, **vision_kwargs))

    def get_inputs(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention mask [batch, 1, seq, seq] (1 = visible) and positions int64[batch, 2, seq] of input_ids.

        SAT makes both in Python lists, token by token; the values are the same.
        """
        seq_length = input_ids.shape[1]
        is_gmask = input_ids == self.gmask_token_id
        mask_position = first_position(torch.where(is_gmask.any(), is_gmask, input_ids == self.mask_token_id))
        context_length = first_position(input_ids == self.bos_token_id)
        pad_length = first_position(input_ids != self.pad_token_id)
        if attention_mask is None:
            dtype = self.transformer.word_embeddings.weight.dtype
            attention_mask = prefix_mask(context_length, pad_length, seq_length).to(dtype)
        if position_ids is None:
            position_ids = glm_position_ids(context_length, mask_position, pad_length, seq_length)
        return attention_mask, position_ids

    @classmethod
    def add_model_specific_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Declare what `model_config.json` says of the eyes, so that SAT writes it into every checkpoint."""
        add_model_flags(parser)  # ChatGLM's token ids are among them
        return parser
