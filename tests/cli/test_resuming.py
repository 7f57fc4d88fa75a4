"""What --resume makes of a command line: which flags are the run's, which win, which are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint, write_rows

from model.checkpoints.resume import RECORD_FILE, STATE_FILE, Ending, RunRecord, digest, write_state
from model.cli.resuming import command_line, finished_note, own_words, steps_problems
from model.errors import InputError

ROWS = [{"prompt": "这是什么？", "label": "一只猫。"}] * 4


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The command line of the run that is resumed."""
    rows = write_rows(tmp_path, ROWS)
    return [
        "--use_lora", "--train-data", str(rows), "--train-iters", "20", "--lr", "0.01", "--experiment-name", "animals",
        "--save", str(tmp_path / "saved"),
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, words: list[str]) -> Path:
    """The folder of a run with that command line, 6 of 20 steps done."""
    folder = write_checkpoint(tmp_path / "saved" / "animals-1", {}, {"weight": torch.zeros(1)})
    (data,) = tmp_path.glob("rows.json")
    record = RunRecord(6, 20, words, "animals", 1, {str(data): digest(data)}, {}, {})
    write_state({}, folder / "1" / STATE_FILE)
    record.write(folder / "1" / RECORD_FILE)
    return folder


@pytest.fixture
def run_of_four(run: Path) -> Path:
    """The same run, of 4 processes with 6 samples each."""
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    record |= {"processes": 4, "words": [*record["words"], "--batch-size", "6"]}
    file.write_text(json.dumps(record))
    return run


def refusal(*words: str | Path) -> str:
    with pytest.raises(InputError) as error:
        command_line([*map(str, words)])
    return str(error.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--resume", "x", "--lr", "1"], ["--lr", "1", "--resume=x"], ["--local_rank=3", "--lr", "1"],
        ["--local_rank", "3", "--lr", "1"], ["--local-rank=3", "--lr", "1"],
    ],
)  # fmt: skip
def test_own_words_leave_out_what_is_not_the_runs(argv: list[str]) -> None:
    assert own_words(argv) == ["--lr", "1"]


def test_command_line_without_resume_is_as_it_stands(words: list[str]) -> None:
    line = command_line(words)
    assert (line.words, line.resumed, line.notes) == (words, None, [])


def test_folder_alone_gives_the_runs_flags(run: Path, words: list[str]) -> None:
    line = command_line(["--resume", str(run)])
    assert line.words == words
    assert (line.options.lr, line.options.train_iters) == (0.01, 20)
    assert line.notes == []


def test_the_runs_whole_command_line_again_changes_nothing(run: Path, words: list[str]) -> None:
    line = command_line([*words, "--resume", "auto"])
    assert line.resumed is not None
    assert line.resumed.checkpoint.folder == run
    assert (line.words, line.notes) == (words, [])


@pytest.mark.parametrize(
    ("processes", "argv", "added"),
    [
        (1, ["--batch-size", "6"], ["--gradient-accumulation-steps", "4"]),  # as in the run: 4 processes of 6
        (2, [], ["--gradient-accumulation-steps", "2"]),
        (2, ["--model-parallel-size", "2"], ["--gradient-accumulation-steps", "4"]),
        (2, ["--batch-size", "12"], []),
        (4, [], []),
    ],
)
def test_other_number_of_processes_takes_the_same_samples_in_a_step(
    run_of_four: Path, monkeypatch: pytest.MonkeyPatch, processes: int, argv: list[str], added: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    line = command_line(["--resume", str(run_of_four), *argv])
    assert line.words[len(line.words) - len(added) :] == added
    options, parts = line.options, line.options.model_parallel_size
    assert options.batch_size * options.gradient_accumulation_steps * processes // parts == 24


def test_processes_that_cannot_share_the_samples_of_a_step_need_a_batch_size(
    run_of_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = refusal("--resume", run_of_four)
    assert found == (
        "--resume: 3 data-parallel processes found, the run had 4; --batch-size 8 is needed, so that a step takes the same "
        "samples, or as many processes as before."
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--batch-size 12 is needed" in refusal("--resume", run_of_four, "--group_by_length")


def test_other_rows_to_evaluate_on_are_refused_where_the_run_holds_rows_out(run: Path, tmp_path: Path) -> None:
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "words": [*record["words"], "--holdout", "0.25"]}))
    other = str(write_rows(tmp_path, ROWS, "other.json"))
    assert refusal("--resume", run, "--valid-data", other) == (
        f"--valid-data {other}: the run has --holdout 0.25, whose rows it evaluates on; --resume is needed without "
        "--valid-data, or a new run."
    )


@pytest.mark.parametrize(
    ("processes", "flags", "needed"),
    [
        ("5", [], "a number of processes that 24 can be divided by is needed, so that"),
        ("16", ["--group_by_length"], "a number of processes that 24 can be divided by is needed, so that"),
    ],
)
def test_processes_that_no_batch_size_suits_are_told_which_number_does(
    run_of_four: Path, monkeypatch: pytest.MonkeyPatch, processes: str, flags: list[str], needed: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert needed in refusal("--resume", run_of_four, *flags)


def test_micro_batches_that_processes_cannot_share_are_cut_anew(
    run_of_four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_of_four / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    words = [*record["words"], "--gradient-accumulation-steps", "2"]  # 48 samples a step, of which 24 at once
    file.write_text(json.dumps({**record, "words": words}))
    monkeypatch.setenv("WORLD_SIZE", "16")
    found = refusal("--resume", run_of_four)
    assert "--batch-size 3 --gradient-accumulation-steps 1 is needed, so that" in found


def test_flag_that_changes_no_step_is_taken_without_a_word(run: Path, words: list[str]) -> None:
    line = command_line(["--resume", str(run), "--save-interval", "3", "--num-workers", "0", "--local_rank", "0"])
    assert (line.options.save_interval, line.options.num_workers) == (3, 0)
    assert line.words == [*words, "--save-interval", "3", "--num-workers", "0"]
    assert line.notes == []


def test_flags_of_a_run_that_change_no_step_are_no_change(run: Path) -> None:
    words = ("--save_total_limit", "3", "--max_skipped_steps", "7", "--ui_lang", "en", "--no-save-rng")
    assert command_line(["--resume", str(run), *words]).notes == []


def test_best_evaluation_is_looked_for_anew_on_other_rows(run: Path, tmp_path: Path) -> None:
    other = str(write_rows(tmp_path, ROWS, "other.json"))
    line = command_line(["--resume", str(run), "--valid-data", other, "--keep_best"])
    assert line.notes == [f"--valid-data {other}: the best evaluation is looked for anew."]
    assert line.evaluates_anew
    assert not command_line(["--resume", str(run), "--valid-data", other]).evaluates_anew


def test_best_evaluation_is_looked_for_anew_where_the_same_file_has_other_rows(run: Path, tmp_path: Path) -> None:
    other = str(write_rows(tmp_path, ROWS, "other.json"))
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    record["words"] += ["--valid-data", other, "--keep_best"]
    file.write_text(json.dumps(record | {"evaluated": {other: digest(other)}}))
    assert command_line(["--resume", str(run)]).notes == []
    write_rows(tmp_path, ROWS[:3], "other.json")
    line = command_line(["--resume", str(run)])
    assert line.notes == [
        f"{other}: other rows than the run evaluated on before.",
        f"--valid-data {other}: the best evaluation is looked for anew.",
    ]
    assert line.evaluates_anew


def test_rows_to_evaluate_on_that_are_named_elsewhere_are_the_same(run: Path, tmp_path: Path) -> None:
    one, other = (str(write_rows(tmp_path, ROWS, name)) for name in ("one.json", "other.json"))
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    record["words"] += ["--valid-data", one, "--keep_best"]
    file.write_text(json.dumps(record | {"evaluated": {one: digest(one)}}))
    line = command_line(["--resume", str(run), "--valid-data", other])
    assert (line.notes, line.evaluates_anew, line.options.valid_data) == ([], False, [other])


def test_data_and_base_may_be_named_where_they_are_now(run: Path, tmp_path: Path) -> None:
    (base := tmp_path / "base").mkdir()
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    record["words"] += ["--from_pretrained", str(base)]
    (data,) = record["data"]
    file.write_text(json.dumps(record | {"left_out": {data: [2]}}))
    moved = str(Path(data).rename(tmp_path / "moved.json"))
    line = command_line(["--resume", str(run), "--train-data", moved, "--from_pretrained", f"{tmp_path}/./base"])
    assert line.notes == []
    assert line.words[-4:-2] == ["--train-data", moved]
    assert line.resumed is not None
    assert (line.resumed.record.data, line.resumed.record.left_out) == ({moved: digest(moved)}, {moved: [2]})
    write_rows(tmp_path, ROWS[:3], "moved.json")
    assert "the place in the data would be among other rows" in refusal("--resume", run, "--train-data", moved)


def test_newest_run_of_an_experiment_in_a_folder_of_its_own_is_found(words: list[str], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "saved/group/animals-1", {}, {"weight": torch.zeros(1)})
    (data,) = tmp_path.glob("rows.json")
    of_run = [*words, "--experiment-name", "group/animals"]
    record = RunRecord(6, 20, of_run, "group/animals", 1, {str(data): digest(data)}, {}, {})
    write_state({}, folder / "1" / STATE_FILE)
    record.write(folder / "1" / RECORD_FILE)
    line = command_line([*of_run, "--resume", "auto"])
    assert line.resumed is not None
    assert line.resumed.checkpoint.folder == folder


def test_flag_that_changes_the_numbers_is_taken_with_a_sentence(run: Path) -> None:
    line = command_line(["--resume", str(run), "--lr", "0.02", "--bf16"])
    assert (line.options.lr, line.options.bf16) == (0.02, True)
    assert line.notes == [
        "--bf16 from here on; the run had no --bf16, and with it would go on otherwise.",
        "--lr 0.02 from here on; the run had 0.01, and with it would go on otherwise.",
    ]


def test_number_of_the_run_that_is_0_is_told_as_0(run: Path) -> None:
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    record["words"] += ["--auto_warmup_steps", "0"]
    file.write_text(json.dumps(record))
    [told] = command_line(["--resume", str(run), "--auto_warmup_steps", "5"]).notes
    assert told.startswith("--auto_warmup_steps 5 from here on; the run had 0, and")


def test_more_iterations_are_taken_and_what_that_does_to_the_rate_is_said(run: Path) -> None:
    line = command_line(["--resume", str(run), "--train-iters", "30"])
    assert line.options.train_iters == 30
    assert line.notes == [
        "--train-iters 30 from here on; the run had 20, and with it would go on otherwise: the learning rate falls over all "
        "steps, unless --lr-decay-iters says over how many."
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lora_rank", "4"], "--lora_rank 4: the run has 10, and the adapters are the checkpoint's"),
        (["--use_ptuning"], "--use_ptuning: the run has no --use_ptuning, and the adapters are the checkpoint's"),
        (["--from_pretrained", "other"], "--from_pretrained other: the run has visualglm-6b, and the adapters are"),
        (["--seed", "2"], "--seed 2: the run has 1234, and the place in the data would be among other rows"),
        (["--holdout", "2"], "--holdout 2: the run has no --holdout, and the place in the data would be among"),
        (["--save", "elsewhere"], "--save elsewhere: the run has /.*, and a run goes on in its folder"),
        (["--save", "none"], "--save none: the run has /.*, and a run goes on in its folder"),
        (
            ["--epochs", "3"],
            "--epochs 3: the run counts --train-iters, and --epochs goes through the rows in another order",
        ),
    ],
)
def test_flag_that_cannot_be_another_one_is_refused(run: Path, flags: list[str], sentence: str) -> None:
    assert re.match(sentence, refusal("--resume", run, *flags))


def test_data_file_with_other_rows_is_refused(run: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, ROWS[:3])
    assert "rows.json: other rows than the run was trained on" in refusal("--resume", run)


def test_data_file_that_is_gone_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").unlink()
    assert "rows.json: No such file or directory; the run was trained on it" in refusal("--resume", run)


@pytest.mark.parametrize("how", ["auto", "folder"])
def test_run_that_was_moved_goes_on_where_it_is_now(run: Path, tmp_path: Path, how: str) -> None:
    moved = run.parent.rename(tmp_path / "elsewhere")
    flags = ["auto", "--save", str(moved), "--experiment-name", "animals"] if how == "auto" else [str(moved / run.name)]
    line = command_line(["--resume", *flags])
    assert line.resumed is not None
    assert line.resumed.checkpoint.folder == moved / run.name
    assert (line.options.save, line.notes) == (str(moved), [])


def test_auto_without_a_checkpoint_is_a_fresh_run_with_a_sentence(words: list[str], tmp_path: Path) -> None:
    line = command_line([*words, "--resume", "auto"])
    assert (line.words, line.resumed) == (words, None)
    assert line.notes == [
        f"--resume auto: no checkpoint of animals under {tmp_path / 'saved'} can be resumed; a fresh run starts."
    ]


def test_auto_without_a_folder_to_look_in_is_refused() -> None:
    assert refusal("--use_lora", "--resume", "auto", "--save", "none").startswith("--resume auto: --save none; ")


def test_resuming_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal("--resume", tmp_path / "nothing").startswith(f"--resume {tmp_path / 'nothing'}: no such folder")


def test_run_with_all_steps_done_has_nothing_left(run: Path) -> None:
    line = command_line(["--resume", str(run)])
    assert finished_note(line, 20) is None
    note = finished_note(line, 6)
    assert note == f"{run}: iteration 6 of 6 is done, so nothing is left to train. A higher --train-iters goes on."


def test_run_whose_last_step_is_done_has_something_left_until_it_has_ended(run: Path) -> None:
    record = run / "1" / RECORD_FILE
    record.write_text(json.dumps({**json.loads(record.read_text()), "iteration": 20}))
    line = command_line(["--resume", str(run)])
    assert finished_note(line, 20) is None  # killed in the evaluation after the last step
    write_ending(run, 10, None)
    assert finished_note(line, 20) is None  # it ended there, and went on later
    write_ending(run, 20, None)
    note = finished_note(line, 20)
    assert note == f"{run}: iteration 20 of 20 is done, so nothing is left to train. A higher --train-iters goes on."
    assert finished_note(line, 30) is None


def test_run_that_early_stopping_has_ended_goes_on_only_with_more_patience(run: Path) -> None:
    file = run / "1" / RECORD_FILE
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "words": [*record["words"], "--holdout", "1", "--early_stopping", "2"]}))
    write_ending(run, 6, 2)
    for words in ([], ["--early_stopping", "1"]):
        assert finished_note(command_line(["--resume", str(run), *words]), 20) == (
            f"{run}: the run ended at iteration 6 of 20 (--early_stopping 2), so nothing is left to train. A higher "
            "--early_stopping goes on."
        )
    assert finished_note(command_line(["--resume", str(run), "--early_stopping", "3"]), 20) is None
    write_ending(run, 4, 2)
    assert finished_note(command_line(["--resume", str(run)]), 20) is None  # of an earlier iteration


@pytest.mark.parametrize("settings", ["", "[]", "{}", '{"ended": 3}', '{"ended": {"iteration": "6"}}', '{"ended": {}}'])
def test_settings_that_tell_of_no_ending_leave_a_run_unfinished(run: Path, settings: str) -> None:
    (run / "settings.json").write_text(settings)
    assert Ending.of(run) is None


def write_ending(run: Path, iteration: int, early_stopping: int | None) -> None:
    ended = {"iteration": iteration, "early_stopping": early_stopping}
    (run / "settings.json").write_text(json.dumps({"ended": ended}))


def test_record_with_a_flag_that_is_gone_is_refused_with_status_2(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "1" / RECORD_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "words": ["--no_such_flag"]}))
    with pytest.raises(SystemExit) as exit:
        command_line(["--resume", str(run)])
    assert exit.value.code == 2
    assert "--no_such_flag: there is no such flag" in capsys.readouterr().err


# --- SAT's --load


@pytest.fixture
def loaded(tmp_path: Path) -> Path:
    """A checkpoint of LoRA at alpha 16 in layers 0 and 2, at iteration 1."""
    config = {"use_lora": True, "lora_rank": 4, "lora_alpha": 16.0, "layer_range": [0, 2]}
    return write_checkpoint(tmp_path / "loaded", config, {"weight": torch.zeros(1)})


def test_load_takes_the_sizes_of_the_checkpoints_adapters(loaded: Path) -> None:
    line = command_line(["--use_lora", "--load", str(loaded), "--mode", "finetune"])
    assert (line.options.lora_rank, line.options.lora_alpha, line.options.layer_range) == (4, 16.0, [0, 2])
    assert line.words[:8] == ["--lora_rank", "4", "--lora_alpha", "16.0", "--layer_range", "0", "2", "--use_lora"]


def test_load_of_a_name_is_of_its_newest_run(loaded: Path) -> None:
    run = loaded.rename(loaded.with_name("animals-11-28-01-30"))
    line = command_line(["--use_lora", "--load", str(run.with_name("animals"))])
    assert line.options.load == str(run)
    assert line.options.lora_rank == 4


def test_load_with_other_sizes_is_refused(loaded: Path) -> None:
    told = refusal("--use_lora", "--load", loaded, "--lora_alpha", "1", "--lora_rank", "4")
    assert told == (
        f"--lora_alpha 1.0: --load {loaded} has adapters with --lora_alpha 16.0; the same is needed, or no --lora_alpha."
    )


def test_load_of_lora_for_p_tuning_alone_is_refused(loaded: Path) -> None:
    assert refusal("--use_ptuning", "--load", loaded).startswith(
        f"--load {loaded}: it was trained with --use_lora, and without that its adapter would be left out"
    )


def test_load_without_a_checkpoint_is_left_to_the_other_checks(tmp_path: Path) -> None:
    assert command_line(["--use_lora", "--load", str(tmp_path)]).notes == []


def test_load_says_what_happens_to_optimizer_rate_and_data(loaded: Path) -> None:
    def notes(*words: str) -> list[str]:
        return command_line(["--use_lora", "--load", str(loaded), *words]).notes

    weights = f"--load {loaded}: its weights, with a fresh optimizer; --resume would go on exactly."
    slow = (
        "--mode pretrain: after iteration 1, the next 100 steps use at most 5 % of --lr (5e-06), as SAT does; "
        "--auto_warmup_steps changes that."
    )
    from_start = "The data starts from the beginning; --resume-dataloader goes on where the checkpoint stopped."
    assert notes() == [weights, slow, from_start]
    assert notes("--auto_warmup_steps", "0", "--resume-dataloader") == [
        weights,
        "--mode pretrain: the learning rate is that after iteration 1.",
        "--resume-dataloader: the data goes on after iteration 1.",
    ]
    assert notes("--mode", "finetune") == [
        weights,
        "--mode finetune: iteration, learning rate and data start from the beginning.",
    ]
    assert notes("--mode", "finetune", "--use_ptuning")[1] == "It has no P-Tuning: that starts from fresh values."


def test_load_of_a_checkpoint_beyond_the_last_step_is_refused(loaded: Path) -> None:
    (loaded / "latest").write_text("30")
    options = command_line(["--use_lora", "--load", str(loaded), "--train-iters", "20"]).options
    assert steps_problems(options, 31) == []
    (told,) = steps_problems(options, 20)
    assert told == (
        f"--load {loaded}: it is at iteration 30, and --mode pretrain goes on from there to 20, so nothing is left to train; "
        "a higher --train-iters is needed, or --mode finetune, which starts at 0."
    )


def test_load_of_a_checkpoint_beyond_the_last_step_is_fine_where_counting_starts_at_0(loaded: Path) -> None:
    (loaded / "latest").write_text("30")
    options = command_line(["--use_lora", "--load", str(loaded), "--train-iters", "20", "--mode", "finetune"]).options
    assert steps_problems(options, 20) == []


def test_run_that_loaded_a_checkpoint_goes_on_without_it(run: Path, words: list[str], loaded: Path) -> None:
    file = run / "1" / RECORD_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "words": [*words, "--load", str(loaded)]}))
    assert command_line(["--resume", str(run)]).options.load is None
