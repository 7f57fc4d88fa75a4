"""Rows that are answered while a run goes on: which, where they are kept, and that the run doesn't notice."""

import json
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, PROJECT, free_port, run_program, run_python

from model import progress
from model.chinese import in_chinese
from model.cli.options import parse
from model.data.rows import Row, row_turns
from model.inference.engine import Engine, Question
from model.inference.scores import Result
from model.training.answers import Answered, RowAnswers, read_answers
from model.training.records import read_records

DATA = GOLDEN / "upstream/dataset.json"
COMMON = (
    "--use_lora", "--mode", "finetune", "--train-data", str(DATA), "--image_folder", str(GOLDEN / "upstream"), "--train-iters",
    "4", "--batch-size", "2", "--num-workers", "0", "--auto_warmup_steps", "0", "--lr", "0.05", "--lora_rank", "4",
    "--max_target_length", "64", "--hidden-dropout", "0.2", "--attention-dropout", "0.2",
)  # fmt: skip
PLAIN, ANSWERED, STOPPED = range(3)


@pytest.fixture(scope="module")
def runs(upstream_checkpoint, tmp_path_factory):
    """Runs of one process: without answers, with answers at each evaluation, and one that is to end early."""
    work = tmp_path_factory.mktemp("answers")
    held_out = ("--holdout", "2", "--eval-interval", "3")
    lines = [
        [*COMMON, *held_out, "--answers", "0"],
        [*COMMON, *held_out, "--answers", "3", "--eval_answers", "2", "--keep_best", "rouge_l"],
        [*COMMON, *held_out, "--eval-interval", "1", "--lr", "1e-12", "--early_stopping", "2", "--weight-decay", "0"],
    ]
    names = [["--from_pretrained", str(upstream_checkpoint), "--save", str(work / str(n))] for n in range(len(lines))]
    commands = work / "lines.json"
    commands.write_text(json.dumps([[*line, *name] for line, name in zip(lines, names, strict=True)]))
    done = run_program("main_with_each", commands, cwd=work)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert [one["status"] for one in ended] == ["trained"] * len(lines), ended
    folders = [next((work / str(number)).iterdir()) for number in range(len(lines))]
    return [SimpleNamespace(folder=folder, out=one["out"]) for folder, one in zip(folders, ended, strict=True)]


@pytest.mark.run
def test_losses_with_answers_are_those_without_to_the_last_bit_though_dropout_is_on(runs):
    losses = [
        [record.loss for record in read_records(run.folder / "metrics.jsonl")] for run in (runs[PLAIN], runs[ANSWERED])
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 3


@pytest.mark.run
def test_last_step_is_evaluated_where_the_interval_leaves_it_out(runs):
    records = [one for one in read_records(runs[PLAIN].folder / "metrics.jsonl") if one.kind == "evaluation"]
    assert [record.step for record in records] == [3, 4]


@pytest.mark.run
def test_evaluation_with_answers_has_their_measures(runs):
    plain, answered = (
        [one for one in read_records(run.folder / "metrics.jsonl") if one.kind == "evaluation"]
        for run in (runs[PLAIN], runs[ANSWERED])
    )
    assert [(one.answered, one.exact) for one in plain] == [(None, None)] * 2
    assert all(one.answered == 2 and 0 <= one.rouge_l <= 1 for one in answered)
    assert f"iteration 3: 2 rows answered, exact match {answered[0].exact:.1%}" in runs[ANSWERED].out


@pytest.mark.run
def test_best_by_answers_is_kept_with_its_measures(runs):
    best = runs[ANSWERED].folder / "best"
    noted = json.loads((best / (best / "latest").read_text() / "evaluation.json").read_text())
    assert noted.keys() == {"iteration", "loss", "exact", "rouge_l"}


@pytest.mark.run
def test_answers_of_held_out_rows_before_and_after_are_in_the_runs_folder(runs):
    kept = read_answers(runs[ANSWERED].folder)
    held_out = json.loads((runs[ANSWERED].folder / "held_out.json").read_text())
    assert kept["held_out"]
    assert [(one.prompt, one.label) for one in kept["after"].results] == [
        (row["prompt"], row["label"]) for row in held_out
    ]
    assert (kept["before"].step, kept["after"].step) == (0, 4)
    assert kept["before"].measures["loss"] != kept["after"].measures["loss"]
    assert not (runs[PLAIN].folder / "answers.json").exists()


@pytest.mark.run
def test_run_whose_evaluations_get_no_better_ends_early_and_is_saved(runs):
    run = runs[STOPPED]
    steps = [one.step for one in read_records(run.folder / "metrics.jsonl") if one.kind == "step"]
    assert steps == [1, 2, 3]  # the first evaluation is the best
    assert (run.folder / "latest").read_text() == "3"
    assert "The last 2 evaluations were no better: the run ends (--early_stopping 2)." in run.out


@pytest.mark.run
def test_metadata_says_how_questions_were_asked(runs):
    config = json.loads((runs[PLAIN].folder / "model_config.json").read_text())
    assert config["finetuning"]["asked_as"] == {
        "lang": "zh", "source_prefix": "", "max_source_length": 64, "max_target_length": 64,
    }  # fmt: skip


def test_answers_that_take_long_show_how_far_they_are(small_model, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOG_LINES", 0)
    answers = RowAnswers(parse(["--answers", "3", "--train-data", str(DATA), "--eval-batch-size", "2"]), tokenizer)
    questions = [Question([8, 9, 10], max_length=length) for length in (5, 7, 6)]
    made = answers._answers(Engine(small_model, tokenizer, rows=2, positions=7), questions)
    assert all(answer.finished for answer in made)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Answering, tokens at most: 1 of 8, ")
    assert 1 <= len(lines) <= 8
    assert in_chinese(lines[0]).startswith("正在回答，词元最多：1/8，")


def test_rows_with_several_turns_are_told_with_their_number(tmp_path):
    answers = RowAnswers(parse([]), None)
    answers.held_out, answers._folder = True, tmp_path
    row = Row(None, "?", "!", "a.json row 1", (("1", "2"),))
    answers._rows = [(turn, {}) for turn in (*row_turns(row), row._replace(where="a.json row 2", history=()))]
    assert answers.what == "3 turns of 2 held-out rows"
    answers._keep()
    assert read_answers(tmp_path) == {"held_out": True, "rows": 2}
    answers._rows = answers._rows[1:]
    assert answers.what == "2 held-out rows"


@pytest.mark.parametrize(("trained", "said"), [(1, "2 held-out rows"), (3, "3 training rows")])
def test_rows_of_the_evaluation_that_are_also_trained_on_are_not_told_as_held_out(trained, said, monkeypatch):
    options = parse(["--save", "none", "--eval_answers", "3", "--train-data", "a.json", "--valid-data", "b.json"])
    wheres = [f"b.json row {number}" for number in (1, 2, 3)]
    answers = RowAnswers(options, None, also_trained_on=wheres[:trained])
    monkeypatch.setattr(answers, "ask", lambda model, args: None)
    found = [(Row(None, "?", "!", where), {}) for where in wheres]
    valid = SimpleNamespace(spread=lambda number: found[:number])
    answers.begin(None, SimpleNamespace(deepspeed_config={}, save=None), None, valid)
    assert answers.what == said


def test_answers_survive_the_file(tmp_path):
    result = Result("a.png", "问", "答", "答", True, True, 1.0, 0.5, 2, cut=True)
    content = {"held_out": True, "after": Answered(7, [result]).to_json()}
    (tmp_path / "answers.json").write_text(json.dumps(content))
    assert read_answers(tmp_path) == {"held_out": True, "after": Answered(7, [result])}
    assert "shortened" not in (tmp_path / "answers.json").read_text()  # the run has said of all its rows how many are


@pytest.mark.parametrize("text", ["", "[]", '{"after": {"results": [{}], "step": 1}}', '{"after": 3}'])
def test_answers_file_that_is_broken_has_no_answers(tmp_path, text):
    (tmp_path / "answers.json").write_text(text)
    assert "after" not in read_answers(tmp_path)


@pytest.mark.run
@pytest.mark.timeout(120)
def test_part_of_a_model_that_has_no_memory_for_the_rows_ends_the_run(upstream_checkpoint, tmp_path):
    """The other part waits for it within a layer."""
    done = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
        PROJECT / "tests/programs/answer_without_room.py", "1", *COMMON, "--from_pretrained", upstream_checkpoint,
        "--answers", "2", "--save", tmp_path, "--model-parallel-size", "2",
    )  # fmt: skip
    assert done.returncode != 0
    assert "out of memory before the first step (out of memory on this rank)" in done.stderr


@pytest.mark.run
def test_run_that_counts_on_from_a_loaded_checkpoint_answers_before_its_first_step(runs, upstream_checkpoint, tmp_path):
    flags = [*COMMON, "--train-iters", "5", "--mode", "pretrain", "--answers", "2", "--save", tmp_path]
    words = ["--load", runs[PLAIN].folder, "--from_pretrained", upstream_checkpoint, *flags]
    done = run_python("finetune_visualglm.py", *words)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    answered = read_answers(folder)
    assert (answered["before"].step, answered["after"].step) == (4, 5)


@pytest.mark.run
@pytest.mark.parametrize("rank", ["0", "1"])
def test_rows_that_one_process_has_no_memory_for_are_left_out_by_all_and_the_run_goes_on(
    upstream_checkpoint, tmp_path, rank
):
    done = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(),
        PROJECT / "tests/programs/answer_without_room.py", rank, *COMMON, "--from_pretrained", upstream_checkpoint,
        "--answers", "2", "--save", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training rows are not answered: out of memory on this rank") == 2  # before and after
    assert "step 4/4" in done.stdout
