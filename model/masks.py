"""ChatGLM's prefix mask, its two positions, and which position predicts which token.

Training, packing, chatting and evaluating all ask here. Nothing but torch is needed.

Shapes: batch = samples, seq = tokens of the longest one.
"""

import torch


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


def mask_and_positions(
    context_length: torch.Tensor, pad_length: torch.Tensor, seq_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prefix_mask` and `glm_position_ids` of prompts, in which [gMASK] is the last token before <sop>."""
    mask = prefix_mask(context_length, pad_length, seq_length)
    return mask, glm_position_ids(context_length, context_length - 1, pad_length, seq_length)


def packed_prefix_mask(segments: torch.Tensor, in_context: torch.Tensor) -> torch.Tensor:
    """bool[batch, 1, seq, seq]: the prefix masks of several samples in one row, none of which sees another.

    Args:
        segments: int64[batch, seq], the sample of each token; -1 is padding, which sees padding only.
        in_context: bool[batch, seq], before its sample's <sop>.
    """
    position = torch.arange(segments.shape[1], device=segments.device)
    visible = (position <= position[:, None]) | in_context[:, None, :]
    return (visible & (segments[:, :, None] == segments[:, None, :])).unsqueeze(1)


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


def answer_position_ids(context_length: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """int64[batch, 2, 1]: `glm_position_ids` of one token of each answer.

    Args:
        context_length: int64[batch], tokens before <sop>, no padding among them. position: int64[batch], where it stands.
    """
    return torch.stack((context_length - 1, position - context_length + 1), dim=1).unsqueeze(2)


def packed_position_ids(segments: torch.Tensor, in_context: torch.Tensor) -> torch.Tensor:
    """int64[batch, 2, seq]: `glm_position_ids` of several samples in one row, each counted by itself; padding has 0.

        tokens   c  c  gMASK sop a  | c  gMASK sop a  a
        first    0  1  2     2   2  | 0  1     1   1  1
        second   0  0  0     1   2  | 0  0     1   2  3

    Args:
        segments: int64[batch, seq], the sample of each token; -1 is padding.
        in_context: bool[batch, seq], before its sample's <sop>.
    """
    position = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    is_first = torch.ones_like(in_context)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(is_first, position, 0).cummax(dim=1).values
    context_end = torch.where(in_context, position, 0).cummax(dim=1).values  # the last context token so far
    both = torch.stack((torch.where(in_context, position, context_end) - start, position - context_end), dim=1)
    return both.masked_fill((segments < 0).unsqueeze(1), 0)


def next_labels(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """int64[batch, seq]: the label of the token that each position predicts, which is the next one.

        tokens        question gMASK sop  a   b   eop
        labels           -       -   sop  a   b   eop
        next labels      -      sop   a   b  eop   -

    Args:
        labels: int64[batch, seq], ignore_index where nothing is learned.
    """
    shifted = torch.full_like(labels, ignore_index)
    shifted[:, :-1] = labels[:, 1:]
    return shifted


def supervised_positions(labels: torch.Tensor, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of the flattened batch · seq predict a supervised token, and these tokens: int64[answers] each.

    On a GPU this waits for the device: call it where the batch is made.

    Args:
        labels: int64[batch, seq], ignore_index where nothing is learned.
    """
    targets = next_labels(labels, ignore_index).flatten()
    positions = (targets != ignore_index).nonzero().squeeze(1)
    return positions, targets[positions]
