"""How the next token is chosen from the model's scores: always the likeliest, or drawn as the released demo draws.

Shapes: rows = answers, vocab = entries of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from model.errors import InputError, raise_problems

if TYPE_CHECKING:  # commands check their flags before torch is loaded
    import torch

CHINESE_TOKENS = slice(63823, 130000)  # of ChatGLM-6B's vocabulary; forbidden where English is asked for
COLD = 1e-4  # a temperature; at 1e-4 the likeliest of two tokens whose scores are 0.01 apart has all the probability
LEAST_PENALTY, MOST_PENALTY = 0.01, 100.0  # scores that are divided by others may be infinite
FORBIDDEN = -65504.0  # SAT's score of a token that must not be answered


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. The defaults are those of the released `chat`; the strategy is SAT's BaseStrategy.

    Args:
        temperature: divides the scores; 0, or less than COLD, always takes the likeliest token.
        top_p: draw from the likeliest tokens of this total probability.
        top_k: draw from this many likeliest tokens; 0 draws from all, whatever top_p is.
        repetition_penalty: divides the scores of tokens that the answer already has.
        invalid_slices: ranges of token ids that must not be answered.
        seed: the same one gives the same answer; None draws from torch's own random numbers.

    Raises:
        InputError: a number is out of bounds.
    """

    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 30
    repetition_penalty: float = 1.2
    invalid_slices: tuple[slice, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"--temperature {self.temperature}: 0 or more is needed.")
        if self.top_k < 0:
            problems.append(f"--top_k {self.top_k}: 0 or more is needed.")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p {self.top_p}: a number above 0, up to 1, is needed.")
        if not LEAST_PENALTY <= self.repetition_penalty <= MOST_PENALTY:
            problems.append(
                f"--repetition_penalty {self.repetition_penalty}: a number above 0, from {LEAST_PENALTY:g} to {MOST_PENALTY:g}, is needed."
            )
        raise_problems(problems)

    @property
    def is_cold(self) -> bool:
        """Whether only the likeliest token has a chance. Scores that are divided by less than that may be infinite."""
        return self.temperature < COLD

    @cached_property
    def but_for_the_seed(self) -> str:
        """The same for samplings that differ in nothing but their seeds, and for no others. Asked for at every token."""
        return repr(replace(self, seed=None))

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the scores as they are decide."""
        return self.is_cold and self.repetition_penalty == 1 and not self.invalid_slices


GREEDY = Sampling(temperature=0, repetition_penalty=1)


def next_tokens(
    scores: "torch.Tensor",
    samplings: Sequence[Sampling],
    answers: Sequence[list[int]],
    generators: Sequence["torch.Generator | None"],
) -> list[int]:
    """The next token of each row, int[rows], from scores [rows, vocab]; answers holds the token ids that each has so far.

    Raises:
        InputError: a score is nan.
    """
    best, tokens = scores.max(dim=-1)  # nan is above all numbers here
    if any(map(math.isnan, best.tolist())):
        raise InputError("the model's scores hold nan: its weights are damaged, or too large for its number format.")
    for rows in drawn_alike(samplings):
        answered, numbers = [answers[row] for row in rows], [generators[row] for row in rows]
        tokens[rows] = drawn_tokens(scores[rows].float(), samplings[rows[0]], answered, numbers)
    return tokens.tolist()


def drawn_alike(samplings: Sequence[Sampling]) -> list[list[int]]:
    """The rows that are drawn, those together whose samplings differ in nothing but their seeds."""
    groups: dict[str, list[int]] = {}
    for row, sampling in enumerate(samplings):
        if not sampling.takes_the_likeliest:
            groups.setdefault(sampling.but_for_the_seed, []).append(row)
    return list(groups.values())


def drawn_tokens(
    scores: "torch.Tensor",
    sampling: Sampling,
    answers: Sequence[list[int]],
    generators: Sequence["torch.Generator | None"],
) -> "torch.Tensor":
    """A token of each row, int64[rows], by `token_probabilities`. They stay on the device, for which nothing here waits.

    A row with a generator draws from it alone, so that its answer is the same whatever is asked beside it.
    """
    import torch

    probabilities, tokens = token_probabilities(scores, sampling, answers)
    if any(generators):
        each = zip(probabilities, generators, strict=True)
        chosen = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in each])
    else:
        chosen = torch.multinomial(probabilities, 1)
    return tokens.gather(1, chosen).squeeze(1)


def token_probabilities(
    scores: "torch.Tensor", sampling: Sampling, answers: Sequence[list[int]]
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Which tokens may come next, int64[rows, tokens], the likeliest first, and their probabilities, of the same shape.

    SAT sorts the whole vocabulary at every token. The same tokens are left if it is only asked for the top_k.

    Args:
        scores: float32[rows, vocab], which are changed. answers: the token ids that each row has so far.
    """
    import torch

    if sampling.repetition_penalty != 1:
        places = [[row for row, answer in enumerate(answers) for _ in answer], [*chain.from_iterable(answers)]]
        rows, said = torch.tensor(places, dtype=torch.int64, device=scores.device)
        scores[rows, said] = scores[rows, said] / sampling.repetition_penalty
    scores /= 1 if sampling.is_cold else sampling.temperature
    for forbidden in sampling.invalid_slices:
        scores[:, forbidden] = FORBIDDEN
    if sampling.is_cold:
        best, token = scores.max(dim=1, keepdim=True)
        return best.new_ones(len(best), 1), token
    vocab = scores.shape[1]
    kept, tokens = scores.topk(min(sampling.top_k or vocab, vocab))
    probabilities = kept.softmax(dim=1)
    if sampling.top_k:
        before = probabilities.cumsum(dim=1) - probabilities  # a token stays while those before it are too unlikely
        probabilities = probabilities.masked_fill(before > sampling.top_p, 0)
    return probabilities / probabilities.sum(dim=1, keepdim=True), tokens
