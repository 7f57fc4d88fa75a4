"""The order of samples: the one recorded from SAT, the same wherever one starts, and what grouping keeps."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
from conftest import GOLDEN

from model.data import sampling
from model.data.sampling import WINDOW_BATCHES, SampleOrder

RECORDED = json.loads((GOLDEN / "sample_orders.json").read_text())
CASES = {case["name"]: RECORDED["defaults"] | case for case in RECORDED["cases"]}
TEXT_LENGTHS = RECORDED["text_lengths"]


def order_of(case: dict) -> SampleOrder:
    """The order of a recorded case, by its flags."""
    batch = case["batch_size"] if case["loader"] == "train" else case["eval_batch_size"]
    return SampleOrder(
        counts=tuple(case["files"]),
        seed=case["seed"],
        epochs=case["epochs"],
        draws=None if ends(case) else draws_of(case),
        weights=tuple(case["weights"]) if case["weights"] else None,
        shares=tuple(case["shares"]),
        part={"train": 0, "valid": 1, "valid-data": 0, "test": 2}[case["loader"]],
        block_size=case["block_size"],
        lengths=TEXT_LENGTHS.__getitem__ if case["group_by_length"] else None,
        batch=batch * case["ranks"],
    )


def ends(case: dict) -> bool:
    """Whether every sample comes equally often, and all of the order is recorded."""
    return case["epochs"] is not None or case["loader"] == "valid-data"


def draws_of(case: dict) -> int:
    """The draws that SAT thinks are needed: with --split it forgets accumulation, of the test part it needs none."""
    if case["loader"] == "test":
        return 0
    steps = case["train_iters"] * case["batch_size"]
    if case["loader"] == "valid":
        evaluations = 1 + case["train_iters"] // case["eval_interval"]
        steps = evaluations * case["eval_iters"] * case["eval_batch_size"]
    forgotten = case["loader"] == "train" and case["shares"][0] < 1
    return steps * case["ranks"] * (1 if forgotten else case["accumulation"])


def named(*beginnings: str) -> list[str]:
    return [name for name in CASES if name.startswith(beginnings)]


def assert_as_recorded(name: str) -> None:
    case = CASES[name]
    order = order_of(case)
    assert (len(order), order.batch_count) == (case["samples"], case["micro_batches"])
    for part in case["parts"]:
        given = order.batches(part["rank"], case["ranks"], part["start"])
        assert [batch for batch, _ in zip(given, part["batches"], strict=False)] == part["batches"]
        if ends(case):
            assert next(given, None) is None


# --- the recorded orders


@pytest.mark.slow
@pytest.mark.parametrize("name", named("drawn"))
def test_samples_drawn_by_chance_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.parametrize("name", named("epochs"))
def test_samples_of_epochs_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", named("files"))
def test_samples_of_several_weighted_files_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.parametrize("name", named("accumulation"))
def test_samples_and_steps_with_accumulation_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)
    case = CASES[name]
    if case["epochs"]:
        assert max(1, order_of(case).batch_count // case["accumulation"]) == case["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("name", named("split"))
def test_samples_of_a_split_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", named("ranks"))
def test_samples_of_each_rank_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.parametrize("name", named("valid-data"))
def test_samples_of_an_evaluation_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", named("valid part", "test part"))
def test_samples_drawn_from_the_parts_held_out_by_a_split_are_those_recorded(name: str) -> None:
    assert_as_recorded(name)


def test_every_recorded_case_is_compared() -> None:
    kinds = named("drawn"), named("epochs"), named("files"), named("accumulation"), named("split"), named("ranks")
    assert sum(map(len, kinds)) + len(named("valid", "test")) == len(CASES) == len(RECORDED["cases"])


# --- where one starts, and what was asked before

SEVERAL = [
    "epochs 3 seed 1 of 203",
    "epochs 3 seed 1 of 203 grouped",
    "files epochs 3 seed 1 weights [2, 1, 3] grouped",
    "files drawn seed 1 weights [2, 1, 3] grouped",
    "drawn seed 4294967295 of 7",
    "split block 20 files weights [2, 1, 3] grouped",
    "ranks 4 epochs 3 of 203",
    "ranks 2 files epochs 3 grouped",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_starting_at_a_batch_equals_skipping_those_before(name: str) -> None:
    case = CASES[name]
    order = order_of(case)
    count = min(order.batch_count, 160)
    for rank in range(case["ranks"]):
        whole = [batch for _, batch in zip(range(count), order.batches(rank, case["ranks"]), strict=False)]
        per_epoch = order.batch_count // (case["epochs"] or order.batch_count)
        for start in {0, 1, per_epoch // 2, per_epoch, per_epoch + 1, 2 * per_epoch + 3, 65, count - 1}:
            if start < count:
                resumed = order_of(case).batches(rank, case["ranks"], start)
                assert [next(resumed) for _ in range(count - start)] == whole[start:]


@pytest.mark.parametrize("start", [25, 26, 1000])
def test_starting_at_the_end_gives_no_batch(start: int) -> None:
    order = SampleOrder((33,), seed=1, epochs=3, batch=4)
    assert order.batch_count == 25
    assert list(order.batches(start=start)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_order_does_not_depend_on_what_was_asked_before(name: str) -> None:
    order = order_of(CASES[name])
    places = list(range(min(len(order), 700)))
    forwards = [order[place] for place in places]
    assert [order[place] for place in reversed(places)] == forwards[::-1]
    scattered = sorted(places[::9], key=lambda place: place * 7919 % 701)
    assert [order[place] for place in scattered] == [forwards[place] for place in scattered]
    assert [order_of(CASES[name])[place] for place in places[::97]] == forwards[::97]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVERAL)
def test_pickled_order_is_the_same_and_small(name: str) -> None:
    order = order_of(CASES[name])
    fresh = len(pickle.dumps(order))
    places = range(0, min(len(order), 700), 13)
    asked = [order[place] for place in places]
    copy = pickle.loads(pickle.dumps(order))
    assert len(copy) == len(order)
    assert [copy[place] for place in places] == asked
    assert len(pickle.dumps(order)) < fresh + 1000


@pytest.mark.parametrize("place", [-1, 21])
def test_place_outside_is_refused(place: int) -> None:
    with pytest.raises(IndexError, match="the order has 21 samples"):
        SampleOrder((7,), seed=1, epochs=3)[place]


def test_epochs_and_draws_together_are_refused() -> None:
    with pytest.raises(ValueError, match="only one is needed"):
        SampleOrder((7,), seed=1, epochs=3, draws=10)


# --- epochs, evaluation, split


@pytest.mark.parametrize("lengths", [None, TEXT_LENGTHS.__getitem__], ids=["plain", "grouped"])
@pytest.mark.parametrize("batch", [1, 4, 300])
def test_every_sample_comes_once_per_epoch(batch: int, lengths: object) -> None:
    order = SampleOrder((7, 20, 176), seed=3, epochs=3, lengths=lengths, batch=batch)
    samples = [order[place] for place in range(len(order))]
    assert Counter(samples) == dict.fromkeys(range(203), 3)
    if lengths is None:  # a window of grouped samples may reach into the next epoch
        assert all(sorted(samples[start : start + 203]) == list(range(203)) for start in (0, 203, 406))


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = SampleOrder((203,), seed=3, epochs=3)
    epochs = {tuple(order[place] for place in range(start, start + 203)) for start in (0, 203, 406)}
    assert len(epochs) == 3


def test_weights_say_how_often_a_sample_comes_per_epoch() -> None:
    order = SampleOrder((3, 2, 4), seed=1, epochs=1, weights=(2, 1, 0))
    assert Counter(order[place] for place in range(len(order))) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}


def test_without_epochs_and_draws_all_samples_come_in_order() -> None:
    order = SampleOrder((7, 20), seed=1, batch=8)
    assert [order[place] for place in range(len(order))] == list(range(27))
    assert [list(order.batches(rank, 2)) for rank in (0, 1)] == [
        [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19], [24, 25, 26]],
        [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23], [24]],
    ]


@pytest.mark.parametrize("block_size", [10, 20, 45])
def test_parts_of_a_split_hold_every_sample_once(block_size: int) -> None:
    parts = [SampleOrder((203, 45), 1, shares=(0.8, 0.1, 0.1), part=part, block_size=block_size) for part in range(3)]
    samples = [part[place] for part in parts for place in range(len(part))]
    assert sorted(samples) == list(range(248))


def test_part_without_a_share_is_empty() -> None:
    assert len(SampleOrder((203,), 1, shares=(0.9, 0.1, 0.0), part=2, block_size=10)) == 0


# --- grouping by length, with windows of two batches

LENGTHS = [7, 2, 9, 3, 8, 2, 7, 4, 1, 9, 5]


@pytest.fixture
def windows_of_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WINDOW_BATCHES", 2)


def grouped(batch: int, seed: int = 1) -> list[int]:
    """The lengths of samples in their order, of samples that come in order when they are not grouped."""
    order = SampleOrder((len(LENGTHS),), seed, lengths=LENGTHS.__getitem__, batch=batch)
    return [LENGTHS[order[place]] for place in range(len(order))]


@pytest.mark.usefixtures("windows_of_two_batches")
@pytest.mark.parametrize("batch", [1, 2, 3, 20])
def test_every_sample_comes_once_when_grouped(batch: int) -> None:
    order = SampleOrder((len(LENGTHS),), 1, lengths=LENGTHS.__getitem__, batch=batch)
    assert sorted(order[place] for place in range(len(order))) == list(range(11))
    assert sorted(grouped(batch)) == sorted(LENGTHS)


@pytest.mark.usefixtures("windows_of_two_batches")
def test_batches_of_a_window_hold_its_shortest_and_its_longest() -> None:
    first_window = grouped(batch=2)[:4]
    assert sorted(map(sorted, (first_window[:2], first_window[2:]))) == [[2, 3], [7, 9]]


@pytest.mark.usefixtures("windows_of_two_batches")
def test_batches_come_in_an_order_of_chance_that_follows_the_seed() -> None:
    orders = {tuple(grouped(batch=2, seed=seed)) for seed in range(8)}
    assert len(orders) > 1
    assert grouped(batch=2, seed=3) == grouped(batch=2, seed=3)


@pytest.mark.usefixtures("windows_of_two_batches")
def test_grouped_order_is_the_same_for_whoever_starts_in_the_middle() -> None:
    order = SampleOrder((len(LENGTHS),), 1, lengths=LENGTHS.__getitem__, batch=2)
    assert [LENGTHS[order[place]] for place in reversed(range(11))] == grouped(batch=2)[::-1]


@pytest.mark.usefixtures("windows_of_two_batches")
def test_samples_left_over_come_last() -> None:
    assert len(LENGTHS) % 4 == 3
    assert grouped(batch=2)[8:] == [1, 5, 9] or grouped(batch=2)[8:] == [1, 9, 5]


# --- many samples


def test_scattered_places_of_many_samples_are_those_of_their_epochs_permutations() -> None:
    order = SampleOrder((300_000,), seed=5, epochs=3)
    for epoch, key in enumerate((5, [5, 1], [5, 2])):
        permutation = numpy.random.default_rng(key).permutation(300_000)
        for place in (0, 1, 149_999, 299_999):
            assert order[epoch * 300_000 + place] == permutation[place]
    assert len(pickle.dumps(order)) < 1000


def test_lengths_are_asked_for_one_window_only() -> None:
    asked = []

    def length(sample: int) -> int:
        asked.append(sample)
        return sample % 50

    order = SampleOrder((300_000,), seed=5, epochs=3, lengths=length, batch=4)
    batch = next(order.batches(start=100_000))
    assert len({sample % 50 for sample in batch}) <= 2
    assert len(asked) == WINDOW_BATCHES * 4
    assert set(batch) <= set(asked)
    next(order.batches(start=100_001))
    assert len(asked) == WINDOW_BATCHES * 4


@pytest.mark.run
def test_importing_brings_neither_numpy_nor_torch() -> None:
    project = Path(sampling.__file__).parents[2]
    code = "import sys, model.data.sampling; print(*{'numpy', 'torch', 'sat'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
