"""Many questions at once: greedy answers in batches, and how likely the model finds the right ones.

Shapes: batch = questions, seq = tokens of the longest context, vocab = entries of the vocabulary.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from model.data.prompt import IGNORE_INDEX, Sample
from model.data.tokenizer import ChatGLMTokenizer
from model.inference.chat import answer_text, key_value_cache
from model.masks import glm_position_ids, prefix_mask
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
    device = model.transformer.word_embeddings.weight.device
    seq = max(len(ids) for ids, _ in contexts)
    pad_length = torch.tensor([seq - len(ids) for ids, _ in contexts], device=device)
    rows = [[tokenizer.pad_token_id] * (seq - len(ids)) + ids for ids, _ in contexts]
    tokens = torch.tensor(rows, device=device)
    sop_position = torch.full_like(pad_length, seq - 1)
    first_slot = torch.tensor([begin for _, begin in contexts], device=device) + pad_length
    first_slot += torch.arange(len(contexts), device=device) * seq  # in the flattened batch · seq
    image_slots = first_slot[:, None] + torch.arange(model.image_length, device=device)
    # Padding sees itself, since attention to nothing is not a number; nobody sees padding.
    visible = prefix_mask(sop_position, pad_length, seq) | torch.eye(seq, dtype=torch.bool, device=device)
    positions = glm_position_ids(sop_position, sop_position - 1, pad_length, seq)
    last_position = positions[:, :, -1:]
    dtype = model.transformer.word_embeddings.weight.dtype
    room = torch.tensor([max_length - len(ids) for ids, _ in contexts], device=device)
    answers = tokens.new_empty((len(contexts), 0))
    finished = room <= 0
    new_tokens, mems = tokens, None
    with key_value_cache(model):
        while not finished.all():
            logits, *outputs = model(
                input_ids=new_tokens,
                position_ids=positions,
                attention_mask=visible.to(dtype),
                mems=mems,
                image=image,
                image_slots=image_slots,
            )
            mems = update_mems([output["mem_kv"] for output in outputs], mems, max_memory_length=seq + max_length)
            likeliest = logits[:, -1].argmax(dim=-1).masked_fill(finished, tokenizer.eos_token_id)
            answers = torch.cat((answers, likeliest[:, None]), dim=1)
            finished |= (likeliest == tokenizer.eos_token_id) | (answers.shape[1] >= room)
            new_tokens, image = likeliest[:, None], None
            columns = torch.arange(seq + answers.shape[1], device=device)
            visible = (columns >= pad_length[:, None])[:, None, None]
            positions = last_position + torch.tensor([[0], [answers.shape[1]]], device=device)
    return [
        answer_text(ids[: max(0, left)], tokenizer, english)
        for ids, left in zip(answers.tolist(), room.tolist(), strict=True)
    ]


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
    expected = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:].to(device)
    logits = model(input_ids=input_ids, image=image, pre_image=samples[0].pre_image)[0]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), expected, ignore_index=IGNORE_INDEX, reduction="none"
    )
    return list(zip(losses.sum(dim=1).tolist(), (expected != IGNORE_INDEX).sum(dim=1).tolist(), strict=True))
