"""What a run leaves behind: in its own folder, and nowhere else."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, PROJECT, run_program, run_python, write_rows

from model.data.rows import read_rows
from model.data.split import Selection
from model.training.records import read_records
from model.training.run_folder import held_out_rows

SCRIPT = PROJECT / "finetune_visualglm.py"
DATA = GOLDEN / "upstream/dataset.json"


@pytest.fixture(scope="module")
def run(upstream_checkpoint, tmp_path_factory):
    """A run of two epochs in an empty working directory, with a bad row and two rows held out."""
    work = tmp_path_factory.mktemp("work")
    images = GOLDEN / "upstream"
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    entries = [{**row, "img": str(images / row["img"])} for row in rows]
    write_rows(work, [*entries, {"img": str(images / entries[0]["img"]), "prompt": "?", "label": ""}])
    done = run_python(
        SCRIPT, "--from_pretrained", upstream_checkpoint, "--use_lora", "--mode", "finetune", "--train-data", "rows.json",
        "--bad_rows", "skip", "--holdout", "2", "--epochs", "2", "--batch-size", "2", "--num-workers", "0", "--save", "saved",
        "--max_source_length", "auto", "--save-args", "--experiment-name", "story", "--answers", "8", cwd=work,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (work / "saved").iterdir()
    return SimpleNamespace(work=work, folder=folder, out=done.stdout, entries=entries)


@pytest.mark.run
def test_run_writes_into_its_folder_and_nothing_into_the_working_directory(run):
    assert sorted(path.name for path in run.work.iterdir()) == ["rows.json", "saved"]
    names = {path.name for path in run.folder.iterdir()}
    story = {"settings.json", "metrics.jsonl", "loss.png", "held_out.json", "bad_rows.txt", "tensorboard"}
    story |= {"answers.json", "report.html"}
    assert story <= names
    assert names - story == {"latest", "model_config.json", "ice_text.model", "2", "4"}
    assert list((run.folder / "tensorboard").iterdir())


@pytest.mark.run
def test_metrics_have_a_line_a_step_and_one_an_evaluation(run):
    records = read_records(run.folder / "metrics.jsonl")
    assert [(one.kind, one.step, one.epoch) for one in records] == [
        ("step", 1, 0.5), ("step", 2, 1.0), ("evaluation", 2, 1.0), ("step", 3, 1.5), ("step", 4, 2.0), ("evaluation", 4, 2.0),
    ]  # fmt: skip
    printed = [f"{one.loss:.4f}" for one in records if one.kind == "step"]
    assert printed == [line.split("loss ")[1].split()[0] for line in run.out.splitlines() if line.startswith("step")]
    assert all(math.isfinite(one.samples_per_second) for one in records if one.kind == "step")


@pytest.mark.run
def test_settings_say_what_held_and_where_it_ran(run):
    settings = json.loads((run.folder / "settings.json").read_text(encoding="utf-8"))
    assert (settings["run"], settings["steps"], settings["samples_per_step"]) == (run.folder.name, 4, 2)
    assert settings["positions"] == json.loads((run.folder / "model_config.json").read_text())["max_sequence_length"]
    assert settings["flags"]["max_source_length"] > 0
    assert settings["flags"]["lr"] == 1e-4
    assert "lr" not in settings["given"]
    assert settings["data"]["rows.json"]["path"] == str(run.work / "rows.json")
    counts = {key: settings["data"]["rows.json"][key] for key in ("rows", "trained_on", "held_out")}
    assert counts == {"rows": 6, "trained_on": 4, "held_out": 2}
    (start,) = settings["starts"]
    assert (start["after_step"], start["folder"], start["processes"]) == (0, str(run.work), 1)
    assert start["versions"]["torch"]
    assert start["machine"]["cpus"]


@pytest.mark.run
def test_held_out_rows_are_a_data_file_that_evaluate_takes_from_anywhere(run, tmp_path):
    rows = json.loads((run.folder / "held_out.json").read_text(encoding="utf-8"))
    assert len(rows) == 2
    assert all(row in run.entries for row in rows)
    done = run_python(
        PROJECT / "scripts/evaluate.py", "--from_pretrained", run.folder, "--data", run.folder / "held_out.json",
        "--max_length", "100", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/2")


@pytest.mark.run
def test_run_ends_by_saying_what_became_of_its_answers_and_where_its_page_is(run):
    said = run.out.splitlines()
    assert said[-1] == f"Report: saved/{run.folder.name}/report.html"
    assert said[-2].startswith("Of 2 held-out rows, answers right: before 0/2, after 0/2; ROUGE-L ")
    assert "<script" not in (run.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.run
def test_bad_rows_stand_in_a_file_of_the_run(run):
    text = (run.folder / "bad_rows.txt").read_text(encoding="utf-8")
    assert text == 'rows.json row 7: "label" is empty; it is the answer to learn.\n'


@pytest.mark.run
def test_settings_given_back_make_the_same_run_again(run):
    done = run_python(SCRIPT, "--config", run.folder / "settings.json", "--save", "again", cwd=run.work)
    assert done.returncode == 0, done.stderr
    (again,) = (run.work / "again").iterdir()
    losses = [[one.loss for one in read_records(folder / "metrics.jsonl")] for folder in (run.folder, again)]
    assert losses[0] == losses[1]
    shutil.rmtree(run.work / "again")


@pytest.mark.run
def test_run_that_goes_on_adds_a_start_to_its_settings_and_its_steps_to_the_metrics(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    done = run_python(SCRIPT, "--resume", folder / "2", cwd=run.work)
    assert done.returncode == 0, done.stderr
    starts = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["starts"]
    assert [start["after_step"] for start in starts] == [0, 2]
    both = [read_records(one / "metrics.jsonl") for one in (run.folder, folder)]
    assert [[(one.kind, one.step, one.loss) for one in records] for records in both[:1]] == [
        [(one.kind, one.step, one.loss) for one in both[1]]
    ]


@pytest.mark.run
def test_run_killed_after_its_last_step_makes_up_for_what_comes_then_and_saves_nothing_again(run, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(run.folder, folder)
    (folder / "report.html").unlink()
    metrics, answers, settings = (folder / name for name in ("metrics.jsonl", "answers.json", "settings.json"))
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    answers.write_text(json.dumps({**json.loads(answers.read_text(encoding="utf-8")), "after": None}))
    ended = json.loads(settings.read_text(encoding="utf-8"))
    assert ended.pop("ended") == {"iteration": 4, "early_stopping": None}
    settings.write_text(json.dumps(ended))
    saved = (folder / "4").stat().st_ino

    again = run_python(SCRIPT, "--resume", folder, "--answers", "8", cwd=run.work)
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith(("step", "Saved"))] == []
    assert (folder / "4").stat().st_ino == saved
    records = [read_records(one / "metrics.jsonl") for one in (folder, run.folder)]
    assert [(one.kind, one.step, one.loss) for one in records[0]] == [
        (one.kind, one.step, one.loss) for one in records[1]
    ]
    assert answers.read_text() == (run.folder / "answers.json").read_text()
    assert (folder / "report.html").is_file()
    now = json.loads(settings.read_text(encoding="utf-8"))
    assert now["ended"] == {"iteration": 4, "early_stopping": None}
    assert now["checkpoint"] == ended["checkpoint"]
    assert [start["after_step"] for start in now["starts"]] == [0, 4]
    done = run_python(SCRIPT, "--resume", folder, cwd=run.work)
    assert (
        done.stdout == f"{folder}: iteration 4 of 4 is done, so nothing is left to train. A higher --epochs goes on.\n"
    )


@pytest.mark.run
def test_run_that_saves_nothing_writes_nothing_and_says_whether_it_learned(upstream_checkpoint, tmp_path):
    done = run_python(
        SCRIPT, "--from_pretrained", upstream_checkpoint, "--use_ptuning", "--train-data", DATA, "--image_folder",
        GOLDEN / "upstream", "--train-iters", "10", "--num-workers", "0", "--save", "none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].startswith("The loss has hardly moved: ")
    assert done.stdout.splitlines()[-1].startswith("Likely: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.run
def test_run_that_ends_before_its_first_step_leaves_no_folder(upstream_checkpoint, tmp_path):
    shutil.copy(DATA, tmp_path)
    done = run_program(
        "fail_in_the_first_step", "--from_pretrained", upstream_checkpoint, "--use_lora", "--train-data", DATA, "--image_folder",
        GOLDEN / "upstream", "--train-iters", "1", "--num-workers", "0", "--holdout", "2", "--save", tmp_path / "saved", cwd=tmp_path,
    )  # fmt: skip
    assert "the first step fails" in done.stderr
    assert list((tmp_path / "saved").iterdir()) == []


def test_held_out_rows_keep_history_and_language_and_have_absolute_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    rows = [
        {"img": "a.png", "prompt": "p", "label": "l", "history": [["q", "a"]], "lang": "zh"},
        {"prompt": "text only", "label": "l"},
        {"img": "a.png", "prompt": "trained on", "label": "l"},
    ]
    file = write_rows(tmp_path, rows)
    selection = Selection({str(file): read_rows(file)}, held_out={str(file): [0, 1]})
    assert list(held_out_rows(selection, "en")) == [
        {**rows[0], "img": str(tmp_path / "a.png")},
        {**rows[1], "lang": "en"},
    ]
    assert next(iter(held_out_rows(Selection(selection.rows, held_out={str(file): [1]}), "zh"))) == rows[1]


def has_wandb():
    import importlib.util

    return importlib.util.find_spec("wandb") is not None


@pytest.mark.run
@pytest.mark.skipif(not has_wandb(), reason="the package wandb is not installed")
def test_real_wandb_offline_gets_steps_and_evaluations_in_the_runs_folder(upstream_checkpoint, tmp_path):
    done = run_program(
        "train_and_read_wandb", tmp_path, "--from_pretrained", upstream_checkpoint, "--use_lora", "--train-data", DATA,
        "--image_folder", GOLDEN / "upstream", "--train-iters", "4", "--eval-interval", "2", "--holdout", "2",
        "--num-workers", "0", cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "history.json").read_text())
    (folder,) = (tmp_path / "saved").iterdir()
    records = read_records(folder / "metrics.jsonl")
    losses = {one.step: one.loss for one in records if one.kind == "step"}
    evaluations = {one.step: one.loss for one in records if one.kind == "evaluation"}
    assert {line["_step"]: line["Train/train_loss"] for line in history} == losses
    assert {line["_step"]: line["Train/valid_loss"] for line in history if "Train/valid_loss" in line} == evaluations
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["saved"]


@pytest.mark.run
def test_run_on_data_in_a_folder_whose_name_is_not_text_is_saved_and_goes_on(upstream_checkpoint, tmp_path):
    data = tmp_path / os.fsdecode(b"\xce\xd2\xb5\xc4")  # as Windows writes Chinese
    shutil.copytree(GOLDEN / "upstream", data)
    words = (
        SCRIPT, "--from_pretrained", upstream_checkpoint, "--use_lora", "--mode", "finetune", "--batch-size", "2",
        "--train-data", data / "dataset.json", "--save", tmp_path / "saved",
    )  # fmt: skip
    done = run_python(*words, "--train-iters", "1")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "saved").iterdir()
    more = run_python(SCRIPT, "--resume", folder, "--train-iters", "2")
    assert more.returncode == 0, more.stderr
    assert (folder / "latest").read_text() == "2"
    for flags in (("--save", data), ("--from_pretrained", data), ("--experiment-name", data.name)):
        refused = run_python(*words, "--train-iters", "1", *flags)
        assert refused.returncode == 2
        assert f"{flags[0]} " in refused.stderr
        assert "the name isn't UTF-8, so torch can't open files there" in refused.stderr
