"""The loaders of a run: which samples each process gets, when workers start, and what SAT is told of them."""

import json
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, printed_losses, run_python, write_rows

from model.data.dataset import FewShotDataset
from model.data.sampling import SampleOrder
from model.data.split import scan_files
from model.training import loaders as module
from model.training.loaders import Loader, OrderedBatches, make_loaders

pytestmark = pytest.mark.usefixtures("process_group")


def few_shot(folder, tokenizer, labels: list[str]) -> FewShotDataset:
    path = write_rows(folder, [{"prompt": "a", "label": label} for label in labels])
    sizes = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=8)
    return FewShotDataset(path, None, tokenizer, sizes)


def sat_args(**flags):
    defaults = {
        "train_data": ["train.json"], "valid_data": None, "test_data": None, "train_data_weights": None, "split": "1",
        "batch_size": 2, "eval_batch_size": 3, "gradient_accumulation_steps": 1, "epochs": None, "train_iters": 4,
        "seed": 1234, "block_size": 10, "group_by_length": False, "num_workers": 0, "prefetch_factor": None,
    }  # fmt: skip
    return SimpleNamespace(**(defaults | flags))


class NoFeatures:
    def with_features(self, dataset, rows):
        return dataset


def loaders_of(args, tmp_path, tokenizer, files: dict[str, int], held_out: dict[str, list[int]] | None = None):
    """The loaders of files of so many rows; a batch is the numbers that its rows' prompts say."""
    paths = {
        name: str(write_rows(tmp_path, [{"prompt": f"{number}", "label": "x"} for number in range(rows)], name))
        for name, rows in files.items()
    }
    for flag in ("train_data", "valid_data", "test_data"):
        if getattr(args, flag) is not None:
            setattr(args, flag, [paths[name] for name in getattr(args, flag)])
    selection, _ = scan_files(list(paths.values()), "error")
    selection.held_out = {paths[name]: rows for name, rows in (held_out or {}).items()}

    def dataset(path, args, rows, chosen):
        sizes = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=8)
        return FewShotDataset(path, None, tokenizer, sizes, rows, chosen)

    def prompts(samples):
        return ["".join(tokenizer.decode(sample["input_ids"]).split("问:")[-1].split("\n")[0]) for sample in samples]

    return make_loaders(args, dataset, prompts, selection=selection, features=NoFeatures())


def numbers(loader) -> list[list[int]]:
    return [[int("".join(filter(str.isdigit, prompt))) for prompt in batch] for batch in loader]


# --- batches


def test_batches_after_steps_left_out_are_the_rest_of_all_batches():
    order = SampleOrder(counts=(7,), seed=1, epochs=2, batch=2)
    whole = list(OrderedBatches(order))
    later = OrderedBatches(order, batches_per_step=3)
    later.start_iter = 1
    assert list(later) == whole[3:]
    assert len(whole) == len(later) == 7


def test_last_step_for_which_samples_are_short_takes_all_that_are_left():
    order = SampleOrder(counts=(11,), seed=1, epochs=1, batch=2)
    loader = Loader(range(11), order, sat_args(), list, batches_per_step=4, steps=(2, 0))
    samples = [order[place] for place in range(11)]
    assert len(loader) == 2
    assert list(loader)[4:] == [samples[8:10], samples[10:], samples[8:9], samples[8:9]]
    assert [one for batch in list(loader)[:4] for one in batch] == samples[:8]
    assert len(list(Loader(range(11), order, sat_args(), list, batches_per_step=4, steps=(1, 0)))) == 4


def test_loader_starts_its_workers_when_the_first_batch_is_asked_for():
    args = SimpleNamespace(num_workers=1, prefetch_factor=2)
    order = SampleOrder(counts=(4,), seed=1, batch=2)
    batches = iter(Loader([10, 11, 12, 13], order, args, list))
    assert multiprocessing.active_children() == []
    assert next(batches) == [10, 11]
    assert len(multiprocessing.active_children()) == 1
    assert list(batches) == [[12, 13]]


@pytest.mark.parametrize(("batches_per_step", "steps"), [(1, 5), (2, 2), (9, 1)])
def test_length_of_a_loader_is_in_optimizer_steps_and_one_at_least(batches_per_step, steps):
    args = SimpleNamespace(num_workers=0, prefetch_factor=None)
    order = SampleOrder(counts=(10,), seed=1, epochs=1, batch=2)
    assert len(Loader(range(10), order, args, list, batches_per_step)) == steps


# --- which rows


def test_training_goes_through_every_row_once_an_epoch(tmp_path, tokenizer):
    train, valid, test = loaders_of(sat_args(epochs=2, train_iters=None), tmp_path, tokenizer, {"train.json": 7})
    samples = [number for batch in numbers(train) for number in batch]
    assert sorted(samples[:7]) == sorted(samples[7:]) == list(range(7))
    assert (valid, test) == (None, None)


def test_held_out_rows_are_evaluated_in_order_and_never_trained_on(tmp_path, tokenizer):
    args = sat_args(epochs=1, train_iters=None)
    train, valid, _ = loaders_of(args, tmp_path, tokenizer, {"train.json": 7}, {"train.json": [1, 4, 5, 6]})
    assert numbers(valid) == [[1, 4, 5], [6]]
    assert sorted(number for batch in numbers(train) for number in batch) == [0, 2, 3]
    assert (args.do_train, args.do_valid, args.do_test) == (True, True, False)
    assert (args.val_last_shape, args.val_drop_number) == ([1], 0)


def test_valid_and_test_data_are_gone_through_in_order(tmp_path, tokenizer):
    args = sat_args(valid_data=["valid.json", "more.json"], test_data=["valid.json"])
    sizes = {"train.json": 5, "valid.json": 4, "more.json": 2}
    _, valid, test = loaders_of(args, tmp_path, tokenizer, sizes)
    assert numbers(valid) == [[0, 1, 2], [3, 0, 1]]
    assert numbers(test) == [[0, 1, 2], [3]]
    assert (args.val_last_shape, args.val_drop_number) == ([], 0)
    assert (args.test_last_shape, args.test_drop_number) == ([1], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "evaluated", "tested"), [("8,1,1", 2, 2), ("9,1", 2, 0), ("0.7", 6, 0), ("9,0,1", 0, 2)]
)
def test_split_deals_rows_out_and_each_part_is_gone_through_once(tmp_path, tokenizer, split, evaluated, tested):
    args = sat_args(split=split, train_iters=40)
    train, valid, test = loaders_of(args, tmp_path, tokenizer, {"train.json": 20})
    parts = [
        sorted({number for batch in numbers(loader) for number in batch}) if loader else []
        for loader in (train, valid, test)
    ]
    assert [len(part) for part in parts[1:]] == [evaluated, tested]
    assert sorted(number for part in parts for number in part) == list(range(20))
    if valid is not None:
        assert sum(map(len, numbers(valid))) == evaluated


@pytest.mark.parametrize(
    ("ranks", "samples", "shapes", "dropped"),
    [(2, 16, [], 0), (2, 15, [4, 3], 0), (2, 12, [4, 1], 1), (4, 21, [4, 1, 1, 1], 2), (4, 17, [1, 1, 1, 1], 3)],
)
def test_last_batch_of_an_evaluation_is_shared_as_sat_shares_it(ranks, samples, shapes, dropped):
    args = SimpleNamespace()
    module._note_last_batch(args, "val", SampleOrder(counts=(samples,), seed=1, batch=4 * ranks), ranks)
    assert (args.val_last_shape, args.val_drop_number) == (shapes, dropped)


# --- lengths


def test_text_length_counts_characters_up_to_the_flags_and_the_picture(tmp_path, tokenizer) -> None:
    dataset = few_shot(tmp_path, tokenizer, ["b", "b" * 100])
    assert [dataset.text_length(index) for index in range(2)] == [1 + 1, 1 + 8]
    path = tmp_path / "more.json"
    path.write_text(json.dumps([{"img": "x.png", "prompt": "ab", "label": "c", "history": [["de", "f"]]}]))
    more = FewShotDataset(path, None, dataset.tokenizer, SimpleNamespace(**vars(dataset.lengths)))
    assert [more.text_length(index) for index in range(2)] == [32 + 2 + 1, 32 + 3 + 2 + 1]


def test_lengths_of_an_order_are_those_of_the_samples_of_all_files(tmp_path, tokenizer) -> None:
    datasets = [few_shot(tmp_path, tokenizer, labels) for labels in (["b", "bb"], ["bbbb"])]
    order = module.training_order(sat_args(group_by_length=True), datasets, (1.0,), 2)
    assert order.lengths is not None
    assert [order.lengths(sample) for sample in range(3)] == [1 + 1, 1 + 2, 1 + 4]


@pytest.mark.run
@pytest.mark.long
def test_run_with_grouped_batches_is_the_same_twice_and_another_than_without(upstream_checkpoint, tmp_path) -> None:
    rows = [{"prompt": "a", "label": "b" * (1 if index % 2 else 40)} for index in range(16)]
    write_rows(tmp_path, rows)

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


def ten_samples(start: int = 0, batches_per_step: int = 1, **flags) -> Loader:
    """A loader of the numbers 0 to 9 in batches of 2, that leaves out start of them."""
    loader = Loader(list(range(10)), SampleOrder((10,), seed=1, batch=2), sat_args(**flags), list, batches_per_step)
    loader.start_at_sample(start)
    return loader


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_counts_the_samples_that_were_given_out_not_those_read_ahead(workers):
    batches = iter(loader := ten_samples(num_workers=workers, prefetch_factor=2 if workers else None))
    assert (next(batches), next(batches)) == ([0, 1], [2, 3])
    assert loader.samples_taken == 4


def test_loader_that_starts_at_a_sample_leaves_out_those_before_it():
    loader = ten_samples(start=6)
    assert list(loader) == [[6, 7], [8, 9]]
    assert loader.samples_taken == 10


def test_loader_that_starts_inside_a_batch_gives_that_batch_whole():
    assert next(iter(ten_samples(start=5))) == [4, 5]


def test_start_iter_of_sat_counts_optimizer_steps():
    loader = ten_samples(batches_per_step=2)
    loader.batch_sampler.start_iter = 2
    assert list(loader) == [[8, 9]]
    assert loader.batch_sampler.start_iter == 2


@pytest.mark.parametrize(("start", "draws"), [(0, True), (4, False)])
def test_loader_takes_a_random_number_at_the_beginning_of_the_order_only(start, draws):
    before = torch.get_rng_state()
    next(iter(ten_samples(start=start)))
    assert (not torch.equal(before, torch.get_rng_state())) == draws
