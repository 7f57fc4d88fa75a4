"""Sampling: the tokens that SAT's BaseStrategy leaves, with its probabilities; and what may not be asked for."""

import pytest
import torch

from model.errors import InputError
from model.inference.sampling import GREEDY, Sampling, drawn_alike, drawn_tokens, next_tokens, token_probabilities
from model.sat_compat import import_sat

import_sat()

from sat.generation.sampling_strategies import base_strategy  # noqa: E402

VOCABULARY = 300
ANSWER = [5, 17, 5, 200]


pytestmark = pytest.mark.usefixtures("process_group")  # a strategy of SAT's asks for it


def sat_probabilities(monkeypatch, sampling, scores):
    """float32[vocab]: what BaseStrategy draws from."""
    drawn_from = []

    def draw(probabilities, num_samples):
        drawn_from.append(probabilities)
        return torch.zeros(1, 1, dtype=torch.int64)

    monkeypatch.setattr(base_strategy.torch, "multinomial", draw)
    strategy = base_strategy.BaseStrategy(
        invalid_slices=list(sampling.invalid_slices), temperature=sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p, repetition_penalty=sampling.repetition_penalty,
    )  # fmt: skip
    strategy.context_length = 2
    strategy.forward(scores[None].clone(), torch.tensor([[1, 2, *ANSWER]]), None)
    return drawn_from[0][0]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.8, top_p=0.4, top_k=100),
        Sampling(temperature=2.5, top_p=1.0, top_k=VOCABULARY, repetition_penalty=1.7),
        Sampling(top_k=0),
        Sampling(top_k=1000),
        Sampling(invalid_slices=(slice(0, 100), slice(250, None))),
    ],
)
def test_probabilities_equal_those_of_sats_strategy(monkeypatch, sampling):
    scores = 4 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1))
    if sampling.top_k > VOCABULARY:
        expected = sat_probabilities(monkeypatch, Sampling(top_k=VOCABULARY), scores)
    else:
        expected = sat_probabilities(monkeypatch, sampling, scores)
    others = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(2))
    rows = torch.stack([others[0], scores, others[1]])
    probabilities, tokens = token_probabilities(rows, sampling, [[], ANSWER, [9]])
    found = torch.zeros(VOCABULARY).index_put((tokens[1],), probabilities[1])
    assert torch.allclose(found, expected / expected.sum(), atol=1e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([0.0, 1.0, 2.0, -1e4])
    sampling = Sampling(temperature=1, top_p=1, top_k=4, repetition_penalty=1)
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(4)
    for _ in range(4000):
        [token] = drawn_tokens(scores[None].clone(), sampling, [[]], [generator])
        counts[token] += 1
    assert torch.allclose(counts / 4000, scores.softmax(dim=0), atol=0.03)


def test_rows_that_are_drawn_together_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[0.0, 1.0, 2.0, -1e4], [2.0, -1e4, 0.0, 2.0]])
    sampling = Sampling(temperature=1, top_p=1, top_k=4, repetition_penalty=1)
    many = scores.repeat(4000, 1)
    torch.manual_seed(1)
    tokens = drawn_tokens(many.clone(), sampling, [[]] * len(many), [None] * len(many)).view(-1, 2)
    for row in range(2):
        counts = tokens[:, row].bincount(minlength=4)
        assert torch.allclose(counts / 4000, scores[row].softmax(dim=0), atol=0.03)


def test_rows_whose_samplings_differ_in_their_seeds_alone_are_drawn_together():
    samplings = [Sampling(), GREEDY, Sampling(seed=1), Sampling(top_k=5), Sampling(seed=2), Sampling(top_k=5, seed=3)]
    assert drawn_alike(samplings) == [[0, 2, 4], [3, 5]]


def test_row_with_a_seed_is_drawn_alike_whatever_stands_beside_it():
    scores = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=3, top_p=1, top_k=VOCABULARY)

    def generator():
        return torch.Generator().manual_seed(5)

    alone = drawn_tokens(scores[1:2].clone(), sampling, [[]], [generator()])
    for others in (None, torch.Generator().manual_seed(6)):
        together = drawn_tokens(scores.clone(), sampling, [[], [], []], [others, generator(), None])
        assert together[1] == alone[0]


def test_each_row_is_drawn_its_own_way():
    scores = torch.tensor([[0.0, 9.0, 8.0]]).expand(4, -1)
    penalised = Sampling(temperature=0, repetition_penalty=1.2)
    forbidding = Sampling(temperature=0, repetition_penalty=1, invalid_slices=(slice(1, 3),))
    sure = Sampling(top_k=1)
    answers = [[1], [1], [1], []]
    assert next_tokens(scores, [GREEDY, penalised, forbidding, sure], answers, [None] * 4) == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"temperature": -1}, "--temperature -1: 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top_k -1: 0 or more"),
        ({"top_p": 0}, "--top_p 0: a number above 0"),
        ({"top_p": 2}, "--top_p 2: a number above 0"),
        ({"repetition_penalty": 0}, "--repetition_penalty 0: a number above 0"),
    ],
)
def test_number_out_of_bounds_is_a_sentence(options, part):
    with pytest.raises(InputError, match=part):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-46, 1e-40, 9e-5, 1e-4])
def test_cold_draws_take_the_likeliest_token_and_never_fail(temperature):
    scores = torch.tensor([[900.0, -900.0, 901.0, 3e4, -3e4], [1.0, 2.0, 0.0, -1.0, 1.9]])
    samplings = [Sampling(temperature, 1, 5, penalty) for penalty in (0.01, 100)]
    assert next_tokens(scores, samplings, [[0, 1], [1]], [None, None]) == [0, 4]


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 0.0099, 101, float("inf"), float("nan")])
def test_penalty_that_makes_scores_infinite_is_refused(penalty):
    with pytest.raises(InputError, match=r"--repetition_penalty .*: a number above 0, from 0\.01 to 100, is needed"):
        Sampling(repetition_penalty=penalty)
