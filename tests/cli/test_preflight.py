"""What is checked before a model is loaded, the first problem first; and what is said of the data."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT, write_rows, write_tuned

from model.checkpoints import sizes
from model.checkpoints.layout import Checkpoint
from model.checkpoints.resume import Resumed, RunRecord, rows_of_use
from model.cli.options import Options, parse
from model.cli.preflight import (
    checkpoint_size,
    epoch_problems,
    epochs_note,
    preflight,
    rate_notes,
    steps_of_run,
    training_samples,
    training_steps,
    with_options,
)
from model.data.split import Selection, read_selection
from model.errors import InputError

ROWS = [{"prompt": "这是什么？", "label": f"一只{animal}。"} for animal in "狗牛羊象"]

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def good(upstream_checkpoint: Path, tmp_path: Path) -> Options:
    """A command line without a problem."""
    rows = write_rows(tmp_path, ROWS)
    words = ["--use_lora", "--train-data", str(rows), "--from_pretrained", str(upstream_checkpoint), "--epochs", "2"]
    return parse(words)


def refusal(options: Options) -> str:
    with pytest.raises(InputError) as error:
        preflight(options)
    return str(error.value)


# --- the order of the checks ------------------------------------------------------------------------------------------


def test_preflight_when_all_is_well_gives_what_the_run_needs(good: Options) -> None:
    inputs = preflight(good)
    assert inputs.checkpoint.name == good.from_pretrained
    assert inputs.lengths.max_source_length == 64
    assert inputs.notes == [
        f"{good.train_data[0]}: 4 rows",
        "Training on 4 samples: 2 steps of 4 see 8 samples, 2 epochs.",
    ]


def test_preflight_when_flags_and_everything_else_are_wrong_names_the_flags_alone(good: Options) -> None:
    good.fp16 = good.bf16 = True
    good.lr = 0.0
    good.from_pretrained, good.train_data = "nowhere", ["gone.json"]
    assert refusal(good) == "--fp16 and --bf16: only one is needed.\n--lr 0.0: a number greater than 0 is needed."


def test_preflight_when_deepspeeds_file_and_the_checkpoint_are_wrong_names_the_file(good: Options) -> None:
    good.deepspeed_config, good.from_pretrained = "gone.json", "nowhere"
    assert refusal(good) == "--deepspeed_config gone.json: no such file; a JSON file is needed."


def test_preflight_when_the_checkpoint_and_the_data_are_wrong_names_the_checkpoint(good: Options) -> None:
    good.from_pretrained, good.train_data = "nowhere", ["gone.json"]
    assert refusal(good).startswith("--from_pretrained nowhere: no such folder")


@pytest.mark.parametrize(
    ("name", "base"), [("owner/model", None), ("visualglm-6b", None), ("nowhere", "owner/model@main")]
)
def test_preflight_when_a_data_file_is_gone_says_so_before_a_checkpoint_is_downloaded(
    good: Options, name: str, base: str | None
) -> None:
    good.from_pretrained, good.base, good.valid_data = name, base, ["gone.json"]
    assert refusal(good) == "gone.json: No such file or directory; a JSON file of rows is needed."


def test_preflight_when_a_base_is_gone_says_so_before_the_rows_are_read(
    good: Options, upstream_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = write_tuned(shutil.copytree(upstream_checkpoint, tmp_path / "base"), tmp_path / "tuned", use_lora=True)
    shutil.rmtree(tmp_path / "base")
    good.from_pretrained, good.train_data = str(adapter), ["gone.json"]
    assert refusal(good).startswith(f"{adapter}: its base {tmp_path / 'base'} is not there")


def test_preflight_of_an_adapter_hands_its_base_on(good: Options, upstream_checkpoint: Path, tmp_path: Path) -> None:
    good.from_pretrained = str(write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True))
    base = preflight(good).checkpoint.base
    assert base is not None
    assert base.folder == upstream_checkpoint


def test_preflight_when_a_row_is_bad_names_it(good: Options, tmp_path: Path) -> None:
    write_rows(tmp_path, [*ROWS, {"prompt": "?"}])
    assert refusal(good).startswith(f"{good.train_data[0]} row 5: ")


# --- room on the disk -------------------------------------------------------------------------------------------------


def test_checkpoint_size_is_all_weights_and_adapters_when_every_weight_is_saved(
    good: Options, upstream_checkpoint: Path
) -> None:
    checkpoint = Checkpoint.find(upstream_checkpoint)
    adapters = checkpoint_size(good, checkpoint)
    good.save_full_model = True
    assert checkpoint_size(good, checkpoint) == checkpoint.weights_file().stat().st_size + adapters


def test_checkpoint_size_is_of_the_adapters_and_their_state_otherwise(good: Options, upstream_checkpoint: Path) -> None:
    good.lora_rank, good.layer_range = 2, [0]
    adapters, state = 4 * 2 * (6 * 64 + 2 * 64), 3 * 4 * 2 * (6 * 64 + 2 * 64)
    assert checkpoint_size(good, Checkpoint.find(upstream_checkpoint)) == adapters + state + 2**20


# --- rows and epochs --------------------------------------------------------------------------------------------------


def selection_with(folder: Path, **samples: int) -> Selection:
    """Files of so many rows."""
    for name, number in samples.items():
        (folder / name).write_text(json.dumps([{"prompt": "?", "label": "!"}] * number))
    return read_selection([str(folder / name) for name in samples], "error", 0)[0]


def test_epochs_note_counts_samples_over_files_weights_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    selection = selection_with(tmp_path, a=10, b=5)
    files = ["--train-data", str(tmp_path / "a"), str(tmp_path / "b"), "--train-data-weights", "1", "2"]
    words = [*files, "--batch-size", "2", "--gradient-accumulation-steps", "2"]
    assert epochs_note(parse(["--use_lora", *words, "--epochs", "2"]), selection) == (
        "Training on 20 samples: 5 steps of 8 see 40 samples, 2 epochs."
    )
    assert "25 steps of 8 see 200 samples, 10 epochs" in epochs_note(parse([*words, "--train-iters", "25"]), selection)


@pytest.mark.parametrize(
    ("processes", "words", "steps"),
    [
        (1, ["--gradient-accumulation-steps", "4"], 8),  # as it began
        (2, ["--gradient-accumulation-steps", "2"], 8),
        (4, ["--gradient-accumulation-steps", "2"], 5),  # of the 19 that are left, a step takes 8
        (1, ["--gradient-accumulation-steps", "1"], 22),  # and now one
        (1, ["--gradient-accumulation-steps", "4", "--epochs", "2"], 15),
    ],
)
def test_run_that_goes_on_on_other_processes_keeps_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, words: list[str], steps: int
) -> None:
    selection = selection_with(tmp_path, a=31)
    run = ["--train-data", str(tmp_path / "a"), "--batch-size", "1", "--epochs", "1"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    begun = training_steps(parse(run), selection)
    record = RunRecord(3, begun, run, "animals", 4, {}, {}, {}, samples=12)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    resumed = SimpleNamespace(record=record)
    assert begun == 8
    assert steps_of_run(parse([*run, *words]), selection, resumed) == steps  # type: ignore[arg-type]


@pytest.fixture
def resumed(good: Options) -> Resumed:
    """A run of these flags and --holdout 1 that is to go on; the row that is held out isn't the one of this --seed."""
    good.holdout = 1
    inputs = preflight(good)
    ((file, (taken,)),) = inputs.selection.held_out.items()
    record = RunRecord(
        1, 2, [], "animals", 1, {}, {}, {}, held_out={file: [(taken + 1) % 4]},
        rows={file: rows_of_use(inputs.selection.rows[file].numbers)},
    )  # fmt: skip
    return Resumed(Checkpoint.find(good.from_pretrained), record)


def test_run_that_goes_on_holds_out_the_rows_that_it_held_out(good: Options, resumed: Resumed) -> None:
    assert preflight(good, resumed=resumed).selection.held_out == resumed.record.held_out
    assert preflight(good).selection.held_out != resumed.record.held_out


def test_rows_that_a_run_held_out_are_not_asked_for_anew(good: Options, resumed: Resumed) -> None:
    (file,) = good.train_data or []
    resumed.record.held_out[file] = [1, 2]  # a former version may have kept others together
    good.holdout = 4  # which would be refused: none would be left to learn
    inputs = preflight(good, resumed=resumed)
    assert inputs.selection.held_out == {file: [1, 2]}
    assert any(note.startswith("Held out of --train-data for evaluation: 2 rows") for note in inputs.notes)


def test_run_that_goes_on_needs_the_same_rows_to_be_of_use(good: Options, resumed: Resumed) -> None:
    (file,) = good.train_data or []
    write_rows(Path(file).parent, [*ROWS[:3], {"prompt": "?"}], Path(file).name)
    good.bad_rows = "skip"
    with pytest.raises(
        InputError, match=rf"{file}: 3 \(\w+\) of its rows can be used, and 4 \(\w+\) could when the run began"
    ):
        preflight(good, resumed=resumed)


def test_folder_of_a_run_that_goes_on_has_to_be_writable(
    good: Options, resumed: Resumed, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resumed.checkpoint.folder
    monkeypatch.setattr(sizes, "_can_be_written_to", lambda place: place != folder)  # root may write everywhere
    with pytest.raises(InputError, match=f"--resume {folder}: {folder} can't be written to"):
        preflight(good, resumed=resumed)
    good.dry_run = True
    assert preflight(good, resumed=resumed).checkpoint == resumed.checkpoint


def test_epochs_note_of_a_run_that_goes_on_counts_the_samples_before_as_they_were(tmp_path: Path) -> None:
    selection = selection_with(tmp_path, a=20)
    run = ["--train-data", str(tmp_path / "a"), "--epochs", "2", "--batch-size"]
    record = RunRecord(3, 7, [*run, "6"], "animals", 1, {}, {}, {}, samples=18)
    resumed: Any = SimpleNamespace(record=record)
    options = parse([*run, "4"])
    steps = steps_of_run(options, selection, resumed)
    assert epochs_note(options, selection, steps, resumed) == (
        "Training on 20 samples: 9 steps, of 4 from here on, see 40 samples, 2 epochs."
    )
    of_steps = parse([*run[:2], "--train-iters", "9", "--batch-size", "4"])
    assert "9 steps, of 4 from here on, see 42 samples, 2.1 epochs, drawn" in epochs_note(
        of_steps, selection, 9, resumed
    )
    assert "7 steps of 6 see 40 samples" in epochs_note(parse([*run, "6"]), selection, 7, resumed)


def test_rows_that_are_left_out_do_not_count_for_split(good: Options, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "img": str(tmp_path / "missing.png")}, *ROWS]
    good.train_data, good.bad_rows = [str(write_rows(tmp_path, rows, "some.json"))], "skip"
    good.split, good.block_size, good.epochs, good.train_iters = "8,1,1", 5, None, 4
    with pytest.raises(InputError, match=r"some\.json: 4 rows found; --split 8,1,1 needs --block-size 5"):
        preflight(good)


def test_epochs_note_counts_the_share_of_split_that_is_trained_on(tmp_path: Path) -> None:
    selection = selection_with(tmp_path, a=20)
    words = ["--train-data", str(tmp_path / "a"), "--split", "5,5", "--block-size", "20", "--batch-size", "2"]
    note = epochs_note(parse([*words, "--train-iters", "10"]), selection)
    assert note.startswith("Training on 10 samples: 10 steps of 2 see 20 samples, 2 epochs")


def test_steps_and_their_note_are_those_of_the_batch_that_auto_has_found(good: Options) -> None:
    good.epochs, good.train_iters, good.batch_size, good.gradient_accumulation_steps = 1, None, 2, 2
    inputs = preflight(good)
    found = parse(["--train-data", *(good.train_data or []), "--epochs", "1", "--batch-size", "1"])
    new = with_options(inputs, good, found)
    samples = training_samples(good, inputs.selection)
    assert new.steps == samples
    assert epochs_note(found, inputs.selection) in new.notes
    assert epochs_note(good, inputs.selection) not in new.notes


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (
            "5,1,1,3",
            "a fourth share of 3 is not used; of the rows, 71.4% are trained on, 14.3% evaluated on and 14.3% tested",
        ),
        (
            "0.5,0.2,0.1",
            "a fourth share of 0.2 is not used; of the rows, 62.5% are trained on, 25.0% evaluated on and 12.5%",
        ),
        ("0.7,0.2,0.1", None),
        ("0.8,0.1", None),
        ("8/1/1", None),
        ("1", None),
    ],
)
def test_share_of_split_that_is_not_used_is_told(good: Options, split: str, told: str | None) -> None:
    good.split, good.block_size, good.epochs, good.train_iters = split, 1, None, 4
    notes = [note for note in preflight(good).notes if note.startswith("--split")]
    assert (told is None) == (notes == [])
    assert all(note.startswith(f"--split {split}: {told}") for note in notes)


def test_epochs_note_goes_by_the_batch_of_a_deepspeed_file(tmp_path: Path) -> None:
    selection = selection_with(tmp_path, a=20)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 5}))
    words = ["--train-data", str(tmp_path / "a"), "--deepspeed_config", str(file), "--batch-size", "4"]
    assert "2 steps of 10 see 20 samples, 1 epoch." in epochs_note(parse([*words, "--epochs", "1"]), selection)
    assert "3 steps of 10 see 30 samples" in epochs_note(parse([*words, "--train-iters", "3"]), selection)
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto"}))
    assert "5 steps of 4 see 20 samples" in epochs_note(parse([*words, "--epochs", "1"]), selection)


def test_interval_of_evaluations_without_rows_for_them_is_told(good: Options) -> None:
    told = "--eval-interval 5: nothing to evaluate on; --holdout 0.1 or --valid-data is needed for it."
    good.eval_interval, good.user_set = 5, good.user_set | {"eval_interval"}
    assert told in preflight(good).notes
    good.holdout = 2.0
    assert told not in preflight(good).notes


def test_gpu_memory_that_nobody_asks_for_is_told(good: Options) -> None:
    good.gpu_memory, good.user_set = 2**34, good.user_set | {"gpu_memory"}
    told = "--gpu_memory is for --dry_run and for --batch-size auto; this run takes no notice of it."
    assert told in preflight(good).notes
    good.dry_run = True
    assert told not in preflight(good).notes


def test_more_workers_than_processors_are_told(good: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5})
    told = "--num-workers 3: 2 processors found; more workers read no faster."
    good.num_workers = 2
    assert told not in preflight(good).notes
    good.num_workers = 3
    assert told in preflight(good).notes


def test_labels_that_are_cut_are_counted_for_each_file(good: Options) -> None:
    assert set(preflight(good).cut_labels.values()) == {0}
    good.max_target_length = 4
    (cut,) = preflight(good).cut_labels.values()
    assert cut > 0


def test_rows_whose_characters_become_bytes_are_told(good: Options, tmp_path: Path) -> None:
    assert not any(note.startswith("WARNING") for note in preflight(good).notes)
    good.train_data = [str(write_rows(tmp_path, [{"prompt": "ภาพนี้คืออะไร", "label": "ภาษาไทย"}] * 5, "thai.json"))]
    [told] = [note for note in preflight(good).notes if note.startswith("WARNING")]
    assert told.startswith(f"WARNING: {good.train_data[0]}: 100 % of the characters have no token, as in “ภาพนี้คืออะไร”;")


def test_characters_of_rows_that_are_left_out_are_not_told(good: Options, tmp_path: Path) -> None:
    english, thai = {"prompt": "What?", "label": "Rain."}, {"prompt": "ภาพนี้คืออะไร", "label": "ภาษาไทย"}
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [english] * 3 + [thai | {"img": str(tmp_path / "broken.png")}]
    good.train_data, good.bad_rows = [str(write_rows(tmp_path, rows, "mixed.json"))], "skip"
    notes = preflight(good).notes
    assert any("Left out, 1 bad row" in note for note in notes)
    assert not any(note.startswith("WARNING") for note in notes)


def test_epochs_of_less_than_one_step_are_refused(tmp_path: Path) -> None:
    selection = selection_with(tmp_path, a=3)
    words = ("--train-data", str(tmp_path / "a"), "--epochs", "1", "--batch-size", "4")
    [sentence] = epoch_problems(parse(words), selection)
    assert sentence.startswith("--epochs 1: 3 samples make less than one step of 4")
    assert epoch_problems(parse([*words[:3], "2", *words[4:]]), selection) == []


@pytest.mark.parametrize(("words", "told"), [
    (["--auto_warmup_steps", "0"], "From step 6 on the learning rate is 0, so that 7 of 12 steps change nothing (--lr-decay-iters 5)."),
    (["--auto_warmup_steps", "0", "--warmup", "0.5"], "From step 8 on the learning rate is 0, so that 5 of 12 steps"),
    (["--auto_warmup_steps", "0", "--mode", "pretrain", "--lr-decay-style", "cosine"], None),
    (["--auto_warmup_steps", "12"], None),
    (["--auto_warmup_steps", "0", "--warmup", "0", "--lr-decay-iters", "12"], None),  # as without
    (["--auto_warmup_steps", "0", "--warmup", "0.1", "--lr-decay-iters", "10"], "From step 11 on the learning rate is 0"),
])  # fmt: skip
def test_steps_without_a_learning_rate_are_told(words: list[str], told: str | None) -> None:
    options = parse(["--mode", "finetune", "--train-iters", "12", "--lr-decay-iters", "5", *words])
    notes = [note for note in rate_notes(options, 12, 0) if not note.startswith("The first")]
    assert (len(notes) == 1 and notes[0].startswith(told)) if told else notes == []


def test_folder_that_tensorboard_cannot_write_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    words = ["--from_pretrained", str(PROJECT / "model/tiny"), "--use_lora", "--train-data", "rows.json"]
    with pytest.raises(InputError, match=r"^--summary-dir .*runs is a file; a folder is needed"):
        preflight(parse([*words, "--summary-dir", str(tmp_path)]))
    with pytest.raises(InputError, match=r"^rows\.json: No such file"):  # nothing goes into the working directory
        preflight(parse(words))
