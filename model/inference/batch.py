"""Many questions at once: greedy answers in batches, and how likely the model finds the right ones.

Shapes: batch = questions, seq = tokens of the longest context, vocab = entries of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from model.data.prompt import IGNORE_INDEX, Sample
from model.data.tokenizer import ChatGLMTokenizer
from model.inference.chat import answer_text, key_value_cache
from model.loss import losses_by_row
from model.masks import mask_and_positions
from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel

import_sat()

from sat.generation.autoregressive_sampling import update_mems  # noqa: E402  (sat only after import_sat)


@torch.no_grad()
def greedy_answers(
    contexts: Sequence[tuple[list[int], int]],
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    max_length: int,
    english: bool = False,
) -> list[str]:
    """The likeliest answer to each context, as `chat` gives it alone at temperature 0 without repetition penalty.

        · · <img> … question gMASK sop  a  b  eop
        <img> … longer question gMASK sop  c  eop ·

    The contexts end at the same place, with padding on the left, so that all answers grow together.

    Args:
        contexts: token ids that end in [gMASK] <sop>, and where the image's slots begin (`prompt.context_ids`).
        image: [batch, 3, H, W] on the model's device, or None where no context has a picture.
        max_length: tokens of context and answer together, in each row.
    """
    tokens, pad_length, image_slots = padded_on_the_left(contexts, model, tokenizer)
    room = torch.tensor([max_length - len(ids) for ids, _ in contexts], device=tokens.device)
    context_end = tokens.shape[1]
    longest = context_end + max(0, int(room.max()))
    # Both hold for the contexts with the longest answers that there is room for; each pass takes its own part.
    mask, positions = mask_and_positions(torch.full_like(pad_length, context_end - 1), pad_length, longest)
    dtype = model.transformer.word_embeddings.weight.dtype
    start, end, mems = 0, context_end, None
    finished = room <= 0
    with key_value_cache(model):
        while not finished.all():
            logits, *outputs = model(
                input_ids=tokens[:, start:],
                position_ids=positions[:, :, start:end],
                attention_mask=mask[:, :, start:end, :end].to(dtype),
                mems=mems,
                image=image if start == 0 else None,
                image_slots=image_slots,
            )
            mems = update_mems([output["mem_kv"] for output in outputs], mems, max_memory_length=longest)
            likeliest = logits[:, -1].argmax(dim=-1).masked_fill(finished, tokenizer.eos_token_id)
            tokens = torch.cat((tokens, likeliest[:, None]), dim=1)
            start, end = end, end + 1
            finished |= (likeliest == tokenizer.eos_token_id) | (tokens.shape[1] - context_end >= room)
    return [
        answer_text(ids[: max(0, left)], tokenizer, english)
        for ids, left in zip(tokens[:, context_end:].tolist(), room.tolist(), strict=True)
    ]


def padded_on_the_left(
    contexts: Sequence[tuple[list[int], int]], model: VisualGLMModel, tokenizer: ChatGLMTokenizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The contexts as one batch that ends at the same place, on the model's device.

    Tokens int64[batch, seq], their padding int64[batch], and the image's slots int64[batch, image_length] in the
    flattened batch · seq.
    """
    device = model.transformer.word_embeddings.weight.device
    seq = max(len(ids) for ids, _ in contexts)
    paddings = [seq - len(ids) for ids, _ in contexts]
    rows = [[tokenizer.pad_token_id] * padding + ids for padding, (ids, _) in zip(paddings, contexts, strict=True)]
    first_slots = [
        row * seq + padding + pre_image
        for row, (padding, (_, pre_image)) in enumerate(zip(paddings, contexts, strict=True))
    ]
    image_slots = torch.tensor(first_slots)[:, None] + torch.arange(model.image_length)
    return torch.tensor(rows, device=device), torch.tensor(paddings, device=device), image_slots.to(device)


@torch.no_grad()
def label_losses(
    samples: Sequence[Sample], image: torch.Tensor | None, model: VisualGLMModel, tokenizer: ChatGLMTokenizer
) -> list[tuple[float, int]]:
    """Each sample's summed cross entropy, in nats, and its number of supervised tokens.

    image is [batch, 3, H, W] on the model's device, or None where no sample has a picture.
    """
    device = model.transformer.word_embeddings.weight.device
    ids, labels = ([torch.tensor(getattr(sample, name)) for sample in samples] for name in ("input_ids", "labels"))
    input_ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
    logits = model(input_ids=input_ids, image=image, pre_image=samples[0].pre_image)[0]
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device)
    totals, counts = losses_by_row(logits, padded_labels)
    return list(zip(totals.tolist(), counts.tolist(), strict=True))
