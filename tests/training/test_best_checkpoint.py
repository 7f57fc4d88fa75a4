"""Evaluation while training: a mean over tokens, and the best checkpoint so far."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from model.training.best_checkpoint import BEST_FILE, BestEvaluation, kept_measures, mean_over_tokens


def best_loss(folder):
    return kept_measures(folder).get("loss", math.inf)


def test_mean_over_tokens_counts_every_token_alike():
    metrics = {"loss_sum": torch.tensor([10.0, 2.0]), "tokens": torch.tensor([5.0, 1.0])}
    assert mean_over_tokens(metrics)["loss"].item() == pytest.approx(2.0)


def test_mean_over_tokens_of_nothing_is_zero():
    metrics = {"loss_sum": torch.zeros(2), "tokens": torch.zeros(2)}
    assert mean_over_tokens(metrics)["loss"].item() == 0
    assert mean_over_tokens(metrics)["tokens"].item() == 0  # by which the report knows that this is no result


def test_best_loss_when_nothing_is_kept_is_infinite(tmp_path):
    assert best_loss(tmp_path) == math.inf


def test_best_loss_is_what_was_written(tmp_path):
    (tmp_path / BEST_FILE).write_text(json.dumps({"iteration": 4, "loss": 0.25}))
    assert best_loss(tmp_path) == 0.25


@pytest.mark.parametrize("text", ["", "{", "[]", '{"iteration": 4}', '{"loss": null}'])
def test_best_loss_when_its_file_was_cut_short_is_infinite(tmp_path, text):
    (tmp_path / BEST_FILE).write_text(text)
    assert best_loss(tmp_path) == math.inf


@pytest.mark.parametrize(
    ("iteration", "loss", "is_kept"), [(10, 1.7, True), (8, 1.7, True), (12, 1.7, False), (10, 1.9, False)]
)
def test_evaluation_behind_the_last_checkpoint_counts_for_the_run_that_goes_on(
    tmp_path, process_group, iteration, loss, is_kept
):
    """The last step is saved, and evaluated after that: the state of the run doesn't know of it."""
    folder = tmp_path / "best"
    (folder / str(iteration)).mkdir(parents=True)
    (folder / "latest").write_text(str(iteration))
    (folder / str(iteration) / BEST_FILE).write_text(json.dumps({"iteration": iteration, "loss": loss}))
    saved = []
    best = BestEvaluation(lambda *args: saved.append(args[0]))
    best.resumed_at = 10
    best.load_state_dict({"by": "loss", "values": [-1.83], "since": 0})
    args = SimpleNamespace(save=str(tmp_path), iteration=14, train_iters=20)
    best.consider(None, args, 14, {"loss": 1.8})
    assert saved == ([] if is_kept else [14])


def test_kept_evaluation_that_is_made_again_counts_once(tmp_path, process_group):
    """A run that goes on from the last save evaluates there again."""
    folder = tmp_path / "best"
    (folder / "20").mkdir(parents=True)
    (folder / "latest").write_text("20")
    (folder / "20" / BEST_FILE).write_text(json.dumps({"iteration": 20, "loss": 1.5}))
    saved = []
    best = BestEvaluation(lambda *args: saved.append(args[0]), patience=2)
    best.resumed_at = 20
    best.load_state_dict({"by": "loss", "values": [-1.8], "since": 1})
    ends = [
        best.consider(
            None, SimpleNamespace(save=str(tmp_path), iteration=iteration, train_iters=40), iteration, {"loss": loss}
        )
        for iteration, loss in ((20, 1.5), (24, 1.6), (28, 1.7))
    ]
    assert ends == [False, False, True]
    assert saved == []
