"""The torture command at its smallest: two kills, each followed by a resumption."""

import random

import pytest

from scripts.dev import torture


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    life = torture.whole_life(folder)
    assert life.status == 0, life.err
    return torture.Reference(life.losses, torture.weights_of(folder))


@pytest.mark.run
@pytest.mark.long
def test_killed_runs_are_resumed_exactly_and_lose_nothing(reference, tmp_path):
    score, lost = torture.kills(2, reference, tmp_path, random.Random(3))
    assert (score.tried, score.good, lost, score.problems) == (2, 2, 0, [])


@pytest.mark.run
@pytest.mark.long
def test_life_with_another_loss_is_told_apart(reference):
    losses = {step: loss for step, loss in reference.losses.items() if step > 3}
    like = torture.Life(0, losses, "", "")
    assert torture.unlike(reference, like, 3) is None
    assert torture.unlike(reference, torture.Life(0, losses | {7: "0x0p+0"}, "", ""), 3) == "step 7 has another loss"
    assert torture.unlike(reference, like, 20) == "began at step 4 although iteration 20 was saved"
