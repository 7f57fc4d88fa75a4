"""Rows as batches: equal to the released script's first batch, padded no further than needed, pictures opened late."""

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, few_shot_dataset, write_rows
from PIL import Image
from torch.utils.data import DataLoader

from model.data.bad_rows import handle_bad_rows
from model.data.dataset import FewShotDataset, collator_of_2023, data_collator
from model.data.lengths import PAD_MULTIPLE
from model.data.prompt import IGNORE_INDEX
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError, RowError

FIRST_BATCH = json.loads((GOLDEN / "upstream/expected_lora.json").read_text())["first_batch"]
PAD, EOP = 3, 90


@pytest.fixture(scope="module")
def dataset():
    return few_shot_dataset(GOLDEN / "upstream/dataset.json", image_size=224)


@pytest.fixture(scope="module")
def first_batch(dataset):
    """Ours, of the rows that the released script drew first."""
    samples = [dataset[index] for index in range(len(dataset))]
    wanted = [ids[: ids.index(EOP) + 1] for ids in FIRST_BATCH["input_ids"]]
    return data_collator([next(one for one in samples if one["input_ids"] == ids) for ids in wanted])


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_first_batch_equals_the_released_one_but_for_padding(first_batch, name):
    seq = first_batch[name].shape[1]
    assert first_batch[name].tolist() == [ids[:seq] for ids in FIRST_BATCH[name]]


def test_first_batch_leaves_out_nothing_but_padding(first_batch):
    seq = first_batch["labels"].shape[1]
    assert {label for ids in FIRST_BATCH["labels"] for label in ids[seq:]} == {IGNORE_INDEX}


def test_first_batch_has_the_released_image_means(first_batch):
    means = first_batch["image"].mean(dim=(1, 2, 3)).tolist()
    assert means == pytest.approx(FIRST_BATCH["image_mean"], abs=1e-6)


def test_first_batch_has_the_released_pre_image(first_batch):
    assert first_batch["pre_image"] == FIRST_BATCH["pre_image"]


def test_dataset_has_as_many_samples_as_rows(dataset):
    assert len(dataset) == 6


def test_sample_image_is_what_the_model_takes(dataset):
    image = dataset[0]["image"]
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (3, 224, 224))


def test_sample_names_the_pad_id(dataset):
    assert dataset[0]["pad_token_id"] == PAD


def test_dataset_opens_no_picture_before_a_row_is_asked_for(tmp_path):
    shutil.copy(GOLDEN / "upstream/dataset.json", tmp_path)
    assert len(few_shot_dataset(tmp_path / "dataset.json")) == 6


def test_sample_when_its_picture_is_gone_is_an_error(tmp_path):
    shutil.copy(GOLDEN / "upstream/dataset.json", tmp_path)
    with pytest.raises(InputError, match=r"there is no file images/0\.png"):
        few_shot_dataset(tmp_path / "dataset.json")[0]


def test_dataset_when_pickled_gives_the_same_sample(dataset):
    assert pickle.loads(pickle.dumps(dataset))[3]["input_ids"] == dataset[3]["input_ids"]


def test_dataset_in_a_worker_process_gives_the_same_batches(dataset):
    loaded = [
        next(iter(DataLoader(dataset, batch_size=3, collate_fn=data_collator, num_workers=workers)))
        for workers in (0, 1)
    ]
    assert torch.equal(loaded[0]["input_ids"], loaded[1]["input_ids"])


def test_dataset_with_the_optional_flags_uses_them():
    flags = {"source_prefix": "图", "ignore_pad_token_for_loss": False}
    assert len(few_shot_dataset(GOLDEN / "upstream/dataset.json", flags=flags)[0]["labels"]) == 128


# As the 2023 script's users know it


def test_dataset_attributes_have_one_entry_for_every_sample(dataset):
    assert len(dataset.images) == len(dataset.input_ids) == len(dataset.labels) == 6


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_dataset_attribute_holds_what_the_samples_hold(dataset, name):
    assert list(getattr(dataset, name)) == [sample[name] for sample in dataset]


def test_dataset_images_are_what_the_samples_hold(dataset):
    assert all(torch.equal(image, sample["image"]) for image, sample in zip(dataset.images, dataset, strict=True))
    assert (dataset.images[0].dtype, tuple(dataset.images[0].shape)) == (torch.float32, (3, 224, 224))


def test_dataset_pre_image_is_that_of_every_sample(dataset):
    assert {sample["pre_image"] for sample in dataset} == {dataset.pre_image} == {3}


def test_dataset_attributes_take_indices_from_the_end_and_slices(dataset):
    assert dataset.labels[-1] == dataset.labels[5]
    assert dataset.labels[1:3] == [dataset.labels[1], dataset.labels[2]]
    with pytest.raises(IndexError):
        dataset.labels[6]


def test_dataset_attributes_open_no_image_but_the_one_that_is_asked_for(tmp_path):
    shutil.copy(GOLDEN / "upstream/dataset.json", tmp_path)
    dataset = few_shot_dataset(tmp_path / "dataset.json")  # its images are not there
    assert len(dataset.images) == 6
    assert len(dataset.input_ids[0]) == len(dataset.labels[0])
    with pytest.raises(InputError, match=r"there is no file images/0\.png"):
        dataset.images[0]


def test_dataset_takes_args_of_three_fields_and_a_processor_that_is_any_function(tmp_path):
    modes = []

    def processor(image):
        modes.append(image.mode)
        return torch.zeros(3, 28, 28)

    Image.new("L", (5, 5)).save(tmp_path / "grey.png")
    rows = [{"img": str(tmp_path / "grey.png"), "prompt": "?", "label": "!"}, {"prompt": "?", "label": "!"}]
    path, tokenizer = write_rows(tmp_path, rows), ChatGLMTokenizer(GOLDEN / "tokenizer/ice_text.model")
    args = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=64)
    dataset = FewShotDataset(path, processor, tokenizer, args)
    assert (tuple(dataset[0]["image"].shape), modes) == ((3, 28, 28), ["RGB"])
    assert dataset.images[1] is None


# Rows of other shapes


def dataset_with(folder, rows, **options):
    return few_shot_dataset(write_rows(folder, rows, "dataset.json"), **options)


def answers(dataset):
    return [dataset.tokenizer.decode(one["labels"][one["labels"].index(89) + 1 : -1]) for one in dataset]


TALK = {"prompt": "三？", "label": "丙", "history": [["一？", "甲"], ["二？", "乙"]]}


def test_dataset_of_rows_with_history_has_a_sample_for_every_turn(tmp_path):
    assert answers(dataset_with(tmp_path, [TALK, {"prompt": "四？", "label": "丁"}])) == ["甲", "乙", "丙", "丁"]


def test_dataset_of_chosen_rows_has_all_their_turns_and_no_others(tmp_path):
    rows = [{"prompt": "四？", "label": "丁"}, TALK, {"prompt": "五？", "label": "戊"}]
    assert answers(dataset_with(tmp_path, rows, chosen=[1, 2])) == ["甲", "乙", "丙", "戊"]


def test_sample_of_a_row_without_picture_has_no_image(tmp_path):
    assert dataset_with(tmp_path, [{"prompt": "四？", "label": "丁"}])[0]["image"] is None


def test_sample_whose_picture_breaks_is_noted_and_has_nothing_to_learn(tmp_path):
    dataset = dataset_with(tmp_path, [{"img": "no.png", "prompt": "?", "label": "!"}], note_bad_images=True)
    assert "dataset.json row 1: there is no file no.png" in dataset[0]["problem"]
    assert set(dataset[0]["labels"]) == {IGNORE_INDEX}
    assert dataset[0]["image"] is None


# Batches


def example(length, image=0.0):
    return {
        "input_ids": [7] * length,
        "labels": [8] * length,
        "image": torch.full((3, 2, 2), image),
        "pre_image": 3,
        "image_length": 0,
        "pad_token_id": PAD,
    }


@pytest.mark.parametrize(("longest", "seq"), [(1, 8), (8, 8), (9, 16), (16, 16)])
def test_batch_is_as_long_as_its_longest_row_in_eights(longest, seq):
    assert PAD_MULTIPLE == 8
    assert data_collator([example(1), example(longest)])["input_ids"].shape == (2, seq)


def test_batch_is_padded_on_the_right_with_the_pad_id():
    assert data_collator([example(6), example(8)])["input_ids"][0].tolist() == [7] * 6 + [PAD] * 2


def test_labels_are_padded_on_the_right_with_the_ignored_index():
    assert data_collator([example(6), example(8)])["labels"][0].tolist() == [8] * 6 + [IGNORE_INDEX] * 2


@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_batch_ids_are_int64(name):
    assert data_collator([example(6)])[name].dtype == torch.int64


def test_batch_images_are_stacked_in_order():
    assert data_collator([example(1, 1.0), example(1, 2.0)])["image"][:, 0, 0, 0].tolist() == [1.0, 2.0]


def test_batch_has_one_pre_image():
    assert data_collator([example(1), example(2)])["pre_image"] == 3


def test_batch_does_not_change_its_examples():
    one = example(5)
    data_collator([one])
    assert one["input_ids"] == [7] * 5


def test_batch_of_mixed_rows_has_the_pictures_of_those_that_have_one():
    text_only = example(4) | {"image": None, "pre_image": 0}
    batch = data_collator([text_only, example(8, 1.0), text_only, example(5, 2.0)])
    assert (batch["image"][:, 0, 0, 0].tolist(), batch["pre_image"]) == ([1.0, 2.0], 3)


def test_batch_without_pictures_has_an_empty_image():
    batch = data_collator([example(4) | {"image": None, "pre_image": 0}])
    assert (batch["image"].shape, batch["pre_image"]) == ((0, 3, 0, 0), 0)


def stacked(examples):
    """The released script's collator, which each script of 2023 has a copy of."""
    for example in examples:
        example["input_ids"] = torch.tensor(example["input_ids"], dtype=torch.long)
        example["labels"] = torch.tensor(example["labels"], dtype=torch.long)
    return {
        "input_ids": torch.stack([example["input_ids"] for example in examples]),
        "labels": torch.stack([example["labels"] for example in examples]),
        "image": torch.stack([example["image"] for example in examples]),
        "pre_image": example["pre_image"],
    }


def test_collator_of_2023_gets_samples_of_equal_length_and_makes_the_batch_that_ours_does(dataset):
    samples = [dataset[index] for index in range(3)]
    assert len({len(sample["input_ids"]) for sample in samples}) > 1
    ours, theirs = data_collator(samples), collator_of_2023(stacked)(samples)
    for name in ("input_ids", "labels", "image"):
        assert torch.equal(theirs[name], ours[name]), name
    assert theirs["pre_image"] == ours["pre_image"]
    assert isinstance(samples[0]["input_ids"], list)


def test_collator_of_2023_gets_other_data_sets_samples_as_they_are():
    others = [{"input_ids": [7]}, {"input_ids": [7, 8]}]
    assert collator_of_2023(list)(others) == others
    tensors = [{"input_ids": torch.tensor([7]), "labels": torch.tensor([8]), "pad_token_id": PAD}]
    assert collator_of_2023(list)(tensors)[0] is tensors[0]
    assert collator_of_2023(list)([1, (2,)]) == [1, (2,)]


def test_problems_of_a_batch_stop_the_run_or_are_told_once(capfd):
    batch = data_collator([example(4), example(4) | {"image": None, "problem": "a.json row 3: no"}])
    with pytest.raises(RowError, match=r"^a\.json row 3: no$"):
        handle_bad_rows(batch, "error")
    handle_bad_rows(batch, "skip")
    handle_bad_rows(batch, "skip")
    assert capfd.readouterr().err == "Left out: a.json row 3: no\n"


def test_batch_without_problems_is_heeded_in_silence(capfd):
    handle_bad_rows(data_collator([example(4)]), "error")
    assert capfd.readouterr() == ("", "")
