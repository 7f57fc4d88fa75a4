"""Many questions at once: greedy answers, and how likely the model finds the right ones.

Shapes: batch = questions, images = those of them that have one, seq = tokens of the longest sample, answers = supervised
tokens of all samples.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from model.data.prompt import IGNORE_INDEX, Sample
from model.data.tokenizer import ChatGLMTokenizer
from model.inference.engine import Engine, Question, model_positions
from model.inference.text import answer_text
from model.loss import head_losses
from model.masks import supervised_positions
from model.visualglm import VisualGLMModel


def greedy_answers(
    contexts: Sequence[tuple[list[int], int]],
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    max_length: int,
) -> list[str]:
    """The likeliest answer to each context, as `chat` gives it alone at temperature 0 without repetition penalty.

    Args:
        contexts: token ids that end in [gMASK] <sop>, and where the image's slots begin (`prompt.context_ids`).
        image: [batch, 3, H, W] on the model's device, or None where no context has a picture.
        max_length: tokens of context and answer together, in each row. A context that fills it gets no answer.
    """
    questions = (
        Question(ids, pre_image, None if image is None else image[row : row + 1])
        for row, (ids, pre_image) in enumerate(contexts)
    )
    answers = dict(answers_as_they_finish(questions, model, tokenizer, max_length, rows=len(contexts)))
    return [answer_text(answers[number], tokenizer) for number in range(len(contexts))]


def answers_as_they_finish(
    questions: Iterable[Question], model: VisualGLMModel, tokenizer: ChatGLMTokenizer, max_length: int, rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Each question's number and its answer's token ids, rows of them in hand at a time; [] if there is no room for any.

    Raises:
        InputError: max_length is more than the model takes.
    """
    numbers: list[int] = []
    too_long: list[int] = []

    def with_room() -> Iterator[Question]:
        for number, question in enumerate(questions):
            if len(question.input_ids) < max_length:
                numbers.append(number)
                yield question
            else:
                too_long.append(number)

    for place, answer in Engine(model, tokenizer, rows, max_length).answers(with_room()):
        yield numbers[place], answer.ids
    yield from ((number, []) for number in too_long)


@torch.no_grad()
def label_losses(
    samples: Sequence[Sample],
    image: torch.Tensor | None,
    model: VisualGLMModel,
    tokenizer: ChatGLMTokenizer,
    image_features: torch.Tensor | None = None,
) -> list[tuple[float, int]]:
    """Each sample's summed cross entropy, in nats, and its number of supervised tokens.

    A sample may be longer than the model's positions, which its question and its label each have to themselves.

    Args:
        image: [images, 3, H, W] on the model's device, of the samples that have one, or else
        image_features: [images, queries, width]; None if no sample has a picture.
    """
    device = model.transformer.word_embeddings.weight.device
    ids, labels = ([torch.tensor(getattr(sample, name)) for sample in samples] for name in ("input_ids", "labels"))
    input_ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    positions, targets = supervised_positions(padded_labels, IGNORE_INDEX)
    seq = input_ids.shape[1]
    first_slots = torch.tensor([row * seq + one.pre_image for row, one in enumerate(samples) if one.pre_image])
    image_slots = first_slots[:, None] + torch.arange(model.image_length)
    input_ids = input_ids.to(device)
    attention_mask, position_ids = model.get_inputs(input_ids)
    position_ids.clamp_(max=model_positions(model) - 1)  # of padding and of an <eop>, which no token sees
    hidden = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        image=image,
        image_features=image_features,
        image_slots=image_slots.to(device),
        answer_positions=positions.to(device),
    )[0]
    losses = head_losses(hidden, model.get_mixin("chatglm-final").lm_head, targets.to(device)).cpu()
    rows = positions // seq
    totals = torch.zeros(len(samples)).index_add(0, rows, losses)
    counts = torch.bincount(rows, minlength=len(samples))
    return list(zip(totals.tolist(), counts.tolist(), strict=True))
