"""Grouping by length changes who shares a batch, and nothing else: every sample once, the same order for the same seed."""

import json
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, PROJECT, printed_losses, run_python

from model.data import sampling as grouping
from model.data.dataset import FewShotDataset
from model.data.sampling import GroupedByLength, lengths_of
from model.data.tokenizer import ChatGLMTokenizer

# sat can be imported only after the model's modules have done so.
from model.sat_compat import import_sat  # isort: skip

import_sat()

from sat.data_utils import configure_data  # noqa: E402

LENGTHS = [7, 2, 9, 3, 8, 2, 7, 4, 1, 9, 5]


def grouped(batch: int, seed: int = 1) -> list[int]:
    dataset = GroupedByLength(LENGTHS, LENGTHS, batch, seed)
    return [dataset[index] for index in range(len(dataset))]


@pytest.fixture(autouse=True)
def windows_of_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "WINDOW_BATCHES", 2)


@pytest.mark.parametrize("batch", [1, 2, 3, 20])
def test_every_sample_comes_once(batch: int) -> None:
    assert sorted(grouped(batch)) == sorted(LENGTHS)


def test_batches_of_a_window_hold_its_shortest_and_its_longest() -> None:
    first_window = grouped(batch=2)[:4]
    assert sorted(map(sorted, (first_window[:2], first_window[2:]))) == [[2, 3], [7, 9]]


def test_batches_come_in_an_order_of_chance_that_follows_the_seed() -> None:
    orders = {tuple(grouped(batch=2, seed=seed)) for seed in range(8)}
    assert len(orders) > 1
    assert grouped(batch=2, seed=3) == grouped(batch=2, seed=3)


def test_order_is_the_same_for_whoever_starts_in_the_middle() -> None:
    dataset = GroupedByLength(LENGTHS, LENGTHS, 2, 1)
    assert [dataset[index] for index in reversed(range(11))] == grouped(batch=2)[::-1]


def test_samples_left_over_come_last() -> None:
    assert len(LENGTHS) % 4 == 3
    assert grouped(batch=2)[8:] == [1, 5, 9] or grouped(batch=2)[8:] == [1, 9, 5]


def few_shot(tmp_path, labels: list[str]) -> FewShotDataset:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "label": label} for label in labels]))
    sizes = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=8)
    return FewShotDataset(path, None, ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer"), sizes)


def test_text_length_counts_characters_up_to_the_flags_and_the_picture(tmp_path) -> None:
    dataset = few_shot(tmp_path, ["b", "b" * 100])
    assert [dataset.text_length(index) for index in range(2)] == [1 + 1, 1 + 8]
    path = tmp_path / "more.json"
    path.write_text(json.dumps([{"img": "x.png", "prompt": "ab", "label": "c", "history": [["de", "f"]]}]))
    more = FewShotDataset(path, None, dataset.tokenizer, SimpleNamespace(**vars(dataset.lengths)))
    assert [more.text_length(index) for index in range(2)] == [32 + 2 + 1, 32 + 3 + 2 + 1]


def test_lengths_go_through_the_wrappers_that_sat_puts_around_a_data_set(tmp_path) -> None:
    joined = configure_data.ConcatDataset(
        [few_shot(tmp_path, ["b", "bb"]), few_shot(tmp_path, ["bbbb"])], weights=[1, 2]
    )
    drawn = configure_data.RandomMappingDataset(joined, scale=3)
    lengths = lengths_of(drawn)
    assert [lengths[index] for index in range(len(drawn))] == [
        len(drawn[index]["labels"]) - drawn[index]["labels"].count(-100) - 2 + 1 for index in range(len(drawn))
    ]


@pytest.mark.run
def test_run_with_grouped_batches_is_the_same_twice_and_another_than_without(upstream_checkpoint, tmp_path) -> None:
    rows = [{"prompt": "a", "label": "b" * (1 if index % 2 else 40)} for index in range(16)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def losses(*flags: str) -> list[float]:
        run = run_python(
            PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, "--use_lora", "--mode",
            "finetune", "--train-data", "rows.json", "--batch-size", "2", "--train-iters", "6", "--hidden-dropout", "0",
            "--attention-dropout", "0", *flags, cwd=tmp_path,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return printed_losses(run.stdout)

    first, again, plain = losses("--group_by_length"), losses("--group_by_length"), losses()
    assert first == again
    assert first != plain
