"""The one place where answers are made: many rows at once, of any kind, one token after another.

    engine = Engine(model, tokenizer, rows=16)
    for number, answer in engine.answers(questions):      all of them; a row that is done makes room for the next
        ...

    answer = engine.submit(question)                      or step by step, as a server needs it:
    while not answer.finished:                            submit and cancel may be called from any thread,
        for changed in engine.step():                     step from one
            ...

Each step is one pass of the model: over the contexts of new rows, padded on the right, or over one token of every row in
hand. Keys and values stay in `model.inference.cache`. Contexts go through the model as in training, tokens through a
shorter way to the same numbers, `model.inference.token_pass`.

Shapes: rows = answers in the making, seq = tokens of the longest context, vocab = entries of the vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch

from model.checkpoints.metadata import answer_length
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.cache import KeyValueCache
from model.inference.cuda_graph import TokenGraphs, can_be_recorded
from model.inference.sampling import GREEDY, Sampling, next_tokens
from model.inference.seen_images import SeenImages
from model.inference.token_pass import TokenPass
from model.masks import glm_position_ids
from model.visualglm import VisualGLMModel

PREFILL_TOKENS = 4096  # of contexts that are read in one pass; more would take memory, and gain nothing


@dataclass(frozen=True)
class Question:
    """A context, and how it is to be answered.

    Args:
        input_ids: the context, ending in [gMASK] <sop> (`prompt.context_ids`).
        pre_image: where the image's slots begin.
        image: [1, 3, H, W], or else
        image_features: [1, queries, width] (`seen_images`), or None for no picture.
        max_length: tokens of context and answer together; None is as many as the engine has room for.
        sampling: how tokens are chosen.
    """

    input_ids: list[int]
    pre_image: int = 0
    image: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    max_length: int | None = None
    sampling: Sampling = GREEDY


@dataclass(eq=False)
class Answer:
    """What has been answered so far: token ids, without <eop>.

    finished says why no more will come: "stop" at <eop>, "length" at the question's max_length, "cancelled"; until then it
    is empty.
    """

    question: Question
    max_length: int
    generator: torch.Generator | None = None
    ids: list[int] = field(default_factory=list)
    finished: str = ""
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Ask for no more tokens; the engine's next step finishes it. From any thread."""
        self.is_cancelled = True

    @property
    def length(self) -> int:
        """Tokens of context and answer."""
        return len(self.question.input_ids) + len(self.ids)


class Engine:
    """A model that answers, with room for a number of rows at once."""

    def __init__(
        self, model: VisualGLMModel, tokenizer: ChatGLMTokenizer, rows: int = 1, positions: int | None = None
    ) -> None:
        """Make room for as many rows, of as many tokens as positions each: the model's own number if None.

        Raises:
            InputError: the model has fewer positions.
        """
        self.model, self.eos_id, self.pad_id = model, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.positions = answer_length(model_positions(model), positions)
        self.device = model.transformer.word_embeddings.weight.device
        self.rows = rows
        self.cache = KeyValueCache(model, rows, self.positions)
        self.token_pass = TokenPass(model, self.cache)
        self.graphs = TokenGraphs(self.cache, self.token_pass) if can_be_recorded(model) else None
        self.seen = SeenImages(model)
        self.head = model.get_mixin("chatglm-final").lm_head
        self.waiting: deque[Answer] = deque()
        self.active: list[Answer] = []  # row n of the cache is that of answer n

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.active)

    def submit(self, question: Question) -> Answer:
        """The answer, still empty, which grows with each `step` once there is a free row. From any thread.

        Raises:
            InputError: the context leaves no room for an answer, or max_length is more than the engine has.
        """
        max_length = self.positions if question.max_length is None else question.max_length
        if max_length > self.positions:
            raise InputError(
                f"--max_length {max_length}: there is room for {self.positions} tokens, so less is needed."
            )
        taken = len(question.input_ids)
        if taken >= max_length:
            raise InputError(
                f"the question and its history take {taken} tokens; --max_length must be more, not {max_length}."
                if max_length < model_positions(self.model)
                else f"the question and its history take {taken} tokens, and this model {max_length} with the answer; less "
                "text is needed."
            )
        seed = question.sampling.seed
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        answer = Answer(question, max_length, generator)
        self.waiting.append(answer)
        return answer

    @torch.no_grad()
    def step(self) -> list[Answer]:
        """Those answers that are a token longer now, or finished; empty if there is nothing to do.

        New rows come first: one pass reads their contexts, and gives each its first token. After an error, the answers in
        hand are to be given up: nothing of what the cache holds is used again.
        """
        try:
            return self._step()
        except BaseException:
            self.cache.forget()
            raise

    def _step(self) -> list[Answer]:
        cancelled = self._cancelled()
        started = self._start()
        if not (started or self.active):
            return cancelled
        first, scores = self._read_contexts(started) if started else (0, self._read_tokens())
        answers = self.active[first:]
        tokens = next_tokens(
            scores,
            [answer.question.sampling for answer in answers],
            [answer.ids for answer in answers],
            [answer.generator for answer in answers],
        )
        for answer, token in zip(answers, tokens, strict=True):
            if token == self.eos_id:
                answer.finished = "stop"
                continue
            answer.ids.append(token)
            answer.finished = "length" if answer.length >= answer.max_length else ""
        self._free_rows()
        return cancelled + answers

    def answers(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer]]:
        """Each question's number and its whole answer, in the order in which they are finished.

        A question is taken from the iterable when there is a row for it.
        """
        waiting, numbers = enumerate(questions), dict[Answer, int]()
        while True:
            free = self.rows - len(self.active) - len(self.waiting)
            numbers |= {self.submit(question): number for number, question in islice(waiting, free)}
            if not self.busy:
                return
            for answer in self.step():
                if answer.finished:
                    yield numbers.pop(answer), answer

    def _cancelled(self) -> list[Answer]:
        """Finish what was cancelled, and give it."""
        cancelled = [answer for answer in (*self.active, *tuple(self.waiting)) if answer.is_cancelled]
        for answer in cancelled:
            answer.finished = "cancelled"
            if answer in self.waiting:
                self.waiting.remove(answer)
        self._free_rows()
        return cancelled

    def _free_rows(self) -> None:
        """Forget finished answers. The last row in hand moves to each row that becomes free."""
        for row in reversed(range(len(self.active))):
            if self.active[row].finished:
                last = self.active.pop()
                if row < len(self.active):
                    self.active[row] = last
                    self.cache.move(len(self.active), row, last.length - 1)  # the last token isn't read yet

    def _start(self) -> list[Answer]:
        """Take new answers into free rows: as many as there are, and as one pass reads."""
        started: list[Answer] = []
        longest = 0
        while self.waiting and len(self.active) < self.rows:
            longest = max(longest, len(self.waiting[0].question.input_ids))
            if started and longest * (len(started) + 1) > PREFILL_TOKENS:
                break
            started.append(self.waiting.popleft())
            self.active.append(started[-1])
        return started

    def _read_contexts(self, answers: list[Answer]) -> tuple[int, torch.Tensor]:
        """The first of these answers' rows, and the scores [rows, vocab] of their first tokens."""
        questions, first = [answer.question for answer in answers], len(self.active) - len(answers)
        lengths = [len(question.input_ids) for question in questions]
        seq = max(lengths)
        rows = [question.input_ids + [self.pad_id] * (seq - len(question.input_ids)) for question in questions]
        self.cache.start(first, lengths)
        context_length = torch.tensor(lengths, device=self.device) - 1
        last = torch.tensor([row * seq + length - 1 for row, length in enumerate(lengths)], device=self.device)
        hidden = self.model(
            input_ids=torch.tensor(rows, device=self.device),
            position_ids=glm_position_ids(context_length, context_length - 1, torch.zeros_like(context_length), seq),
            answer_positions=last,
            cache=self.cache,
            **self._images(questions, seq),
        )[0]
        return first, self.head(hidden.unsqueeze(1))[:, 0]

    def _images(self, questions: list[Question], seq: int) -> dict[str, torch.Tensor]:
        """The features of the questions' images, and their slots in the flattened rows · seq; nothing if there are none."""
        computed = iter(self.seen.features([question.image for question in questions if question.image is not None]))
        features, slots = [], []
        for row, question in enumerate(questions):
            if question.image is None and question.image_features is None:
                continue
            features.append(next(computed) if question.image_features is None else question.image_features[0])
            slots.append(torch.arange(self.model.image_length) + row * seq + question.pre_image)
        if not features:
            return {}
        return {"image_features": torch.stack(features), "image_slots": torch.stack(slots).to(self.device)}

    def _read_tokens(self) -> torch.Tensor:
        """The scores [rows, vocab] of the next token of every row in hand."""
        positions = [answer.length - 1 for answer in self.active]
        context_lengths = [len(answer.question.input_ids) - 1 for answer in self.active]
        numbers = [context_lengths, positions, [answer.ids[-1] for answer in self.active]]
        if self.graphs:
            return self.graphs.scores(numbers)
        self.cache.advance(positions)
        return self.token_pass(torch.tensor(numbers, device=self.device))


def model_positions(model: VisualGLMModel) -> int:
    """How many tokens the model takes, context and answer together."""
    return model.get_mixin("chatglm-attn").max_sequence_length
