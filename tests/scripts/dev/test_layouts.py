"""Layouts of processes beside one process: the same losses, gradient norms and rows, also where another one goes on.

The quick launches train the released script's small model, whose vocabulary is large enough to be split.
"""

import json
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from warm_start import commands

from model.checkpoints.weights import read_weights
from scripts.dev import layouts
from scripts.dev.layouts import SAVED_AT, Layout, Record, compared, recorded

ALONE = Layout("LoRA, ZeRO", 1, "LoRA, ZeRO", ("--zero-stage", "1"))
AT_ZERO_3 = Layout("2 processes, ZeRO 3", 2, "LoRA, ZeRO", ("--zero-stage", "3"))
IN_PARTS = Layout("2 parts, ZeRO 2", 2, "LoRA, ZeRO", ("--zero-stage", "2"), model_parallel=2)
PREFIXES_IN_PARTS = Layout("2 parts", 2, "P-Tuning", ("--checkpoint-activations",), model_parallel=2)
# What is launched one after another, those of a list at the same time.
LAUNCHES = [
    [ALONE],
    [AT_ZERO_3, IN_PARTS],
    [
        Layout("ZeRO 3 → 1", 1, "LoRA, ZeRO", ("--zero-stage", "1"), accumulation=2, resumes=AT_ZERO_3.name),
        Layout("parts → 1", 1, "LoRA, ZeRO", ("--zero-stage", "1"), resumes=IN_PARTS.name),
    ],
    [Layout("parts → parts, ZeRO 3", 2, "LoRA, ZeRO", ("--zero-stage", "3"), model_parallel=2, resumes=IN_PARTS.name)],
]
FURTHER_LAUNCHES = [
    [Layout("P-Tuning", 1, "P-Tuning"), Layout(layouts.VISION, 1, layouts.VISION)],
    [PREFIXES_IN_PARTS, Layout("a trained Q-Former in 2 parts", 2, layouts.VISION, model_parallel=2)],
    [Layout("prefixes in parts → 1", 1, "P-Tuning", resumes=PREFIXES_IN_PARTS.name)],
]


def records_of(launches: list[list[Layout]], folder: Path, base: Path) -> dict[str, list[Record]]:
    records: dict[str, list[Record]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(commands() / "python"))
        for launch in launches:
            records |= recorded(launch, folder, str(base))
    return records


@pytest.fixture(scope="module")
def runs(tmp_path_factory, upstream_checkpoint):
    """The records of the layouts above, and the folder with the runs."""
    folder = tmp_path_factory.mktemp("layouts")
    return folder, records_of(LAUNCHES, folder, upstream_checkpoint)


@pytest.fixture(scope="module")
def further_records(tmp_path_factory, upstream_checkpoint):
    """The records of the further ones."""
    return records_of(FURTHER_LAUNCHES, tmp_path_factory.mktemp("further"), upstream_checkpoint)


@pytest.mark.run
@pytest.mark.parametrize("layout", [*chain(*LAUNCHES)], ids=lambda layout: layout.name)
def test_layout_has_the_losses_norms_and_rows_of_one_process(runs, layout):
    _, records = runs
    line, equal = compared(layout, records[layout.name], records[layout.like][0])
    assert equal, line


@pytest.mark.run
@pytest.mark.long
@pytest.mark.parametrize("layout", [*chain(*FURTHER_LAUNCHES)], ids=lambda layout: layout.name)
def test_layout_of_prefixes_or_trained_vision_has_those_of_one_process(further_records, layout):
    line, equal = compared(layout, further_records[layout.name], further_records[layout.like][0])
    assert equal, line


@pytest.mark.run
def test_checkpoint_of_a_run_in_parts_is_one_file_of_whole_tensors(runs):
    folder, _ = runs
    ((one, config), (parts, config_of_parts)) = (saved(folder, name) for name in ("LoRA, ZeRO", IN_PARTS.name))
    assert config == config_of_parts
    assert {name: tensor.shape for name, tensor in parts.items()} == {n: tensor.shape for n, tensor in one.items()}
    assert [name for name, tensor in one.items() if (parts[name] - tensor).norm() > 1e-3 * tensor.norm()] == []


def saved(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights of a run's last checkpoint, and the number of parts that its configuration speaks of."""
    (latest,) = (folder / name).glob("*/latest")
    (weights,) = (latest.parent / latest.read_text()).glob("mp_rank_*")
    config = json.loads((latest.parent / "model_config.json").read_text())
    return read_weights(weights), {"parts": config["model_parallel_size"]}


@pytest.mark.run
def test_step_exchanges_only_its_loss_and_its_number_of_tokens_besides_what_deepspeed_does(runs):
    _, records = runs
    for record in records[AT_ZERO_3.name]:
        assert record.ours[1] == ["step.py step", "step.py optimizer_step"]  # the first is --loss_normalization's


@pytest.mark.run
def test_another_loss_another_norm_and_other_rows_are_told(runs):
    _, records = runs
    (like,) = records[ALONE.name]
    for change in (
        {"losses": [loss * 1.0001 for loss in like.losses]},
        {"norms": [norm * 1.0001 for norm in like.norms]},
        {"rows": like.rows[::-1]},
        {"problem": "it ended early"},
    ):
        assert not compared(ALONE, [Record(**{**vars(like), **change})], like)[1]
    assert compared(ALONE, [like], like)[1]


# --- further settings


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A model whose configuration leaves dropout to the flags."""
    return layouts.random_model(tmp_path_factory.mktemp("random"))


@pytest.mark.run
@pytest.mark.long
def test_same_layout_that_goes_on_draws_the_same_dropout_to_the_last_bit(random_model, tmp_path):
    flags = ("--hidden-dropout", "0.2", "--attention-dropout", "0.2", "--lora_dropout", "0.1")
    whole = Layout("whole", 2, "LoRA", flags, model_parallel=2)
    alone = Layout("two processes", 2, "LoRA", (*flags, "--zero-stage", "3"))
    again = [
        Layout(f"{run.name} again", 2, "LoRA", run.flags, run.model_parallel, resumes=run.name)
        for run in (whole, alone)
    ]
    records = recorded([whole, alone], tmp_path, random_model) | recorded(again, tmp_path, random_model)
    for run in (whole, alone):
        for rank in range(2):
            assert records[f"{run.name} again"][rank].losses == records[run.name][rank].losses[SAVED_AT:]


@pytest.mark.run
@pytest.mark.long
def test_every_layout_equals_one_process():
    assert layouts.main([]) == 0
