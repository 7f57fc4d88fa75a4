"""loss.png: that it is drawn beside the training, whatever the records hold, and that a run goes on without matplotlib."""

import importlib.util
import json
import math
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from model.training import curves as module
from model.training.curves import LossPicture, epoch_ends, figure, main
from model.training.records import MetricsFile, Record

matplotlib = pytest.importorskip("matplotlib")


def records(count, every=0, **fields):
    """Steps whose loss is 8/n, four to an epoch, and an evaluation after so many of them."""
    made = []
    for n in range(1, count + 1):
        made.append(Record("step", n, 8 / n, 0.0, epoch=n / 4, lr=1e-3 / n, skipped=int(n == 5), **fields))
        if every and n % every == 0:
            made.append(Record("evaluation", n, 9 / n + (n == count), 0.0, epoch=n / 4, perplexity=1.0, split="val"))
    return made


def written(folder, made, **settings):
    file = MetricsFile(folder / "metrics.jsonl")
    for record in made:
        file.write(record)
    file.close()
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def labels(drawing):
    return [text.get_text() for text in drawing.axes[0].get_legend().get_texts()]


@pytest.mark.slow
def test_picture_shows_losses_evaluation_best_epochs_resumes_and_skipped_steps():
    drawing = figure(records(12, every=4), [8], "a-run")
    assert labels(drawing) == [
        "training loss", "its mean over 3 steps", "evaluation loss", "best evaluation: 1.1250 at step 8", "end of an epoch",
        "resumed", "1 skipped",
    ]  # fmt: skip
    training, _, evaluation, *_ = drawing.axes[0].get_lines()
    assert list(training.get_xydata()[3]) == [4, 2.0]
    assert [tuple(point) for point in evaluation.get_xydata()] == [(4, 2.25), (8, 1.125), (12, 1.75)]
    (rate,) = drawing.axes[1].get_lines()
    assert list(rate.get_xydata()[1]) == [2, 5e-4]


def test_axis_is_not_stretched_by_one_loss_far_above_all_others():
    made = [*records(200), Record("step", 201, 1e9, 0.0, lr=1.0)]
    assert figure(made, [], "a-run").axes[0].get_ylim()[1] < 100


def title_of(drawing):
    return drawing.axes[0].get_title(loc="left")


def test_title_is_drawn_as_it_is_typed(tmp_path):
    folder = tmp_path / r"cost$\frac$_{x"
    folder.mkdir()
    main(written(folder, records(8)))
    assert Image.open(folder / "loss.png").size == (1080, 720)
    assert title_of(figure(records(8), [], folder.name)) == folder.name


def test_title_has_chinese_where_a_font_has_it_and_no_boxes_elsewhere(monkeypatch):
    monkeypatch.setattr(module, "CHINESE_FAMILIES", ("Not Installed",))
    assert title_of(figure(records(8), [], "小猫-é\n7")) == "-é7"
    assert title_of(figure(records(8), [], "小猫 7")) == "7"
    every_character = "Last Resort High-Efficiency"  # comes with matplotlib
    monkeypatch.setattr(module, "CHINESE_FAMILIES", ("Not Installed", every_character))
    drawing = figure(records(8), [], "小猫-é7")
    assert title_of(drawing) == "小猫-é7"


@pytest.mark.run
def test_picture_that_can_not_be_drawn_is_told_once(tmp_path, capsys):
    picture = LossPicture(written(tmp_path, records(8)))
    (tmp_path / "loss.png").mkdir()  # in its place
    picture.note(Record("step", 8, 1.0, 0.0))
    picture.finish()
    picture.wait()
    picture.wait()
    assert capsys.readouterr().err == (
        f"loss.png is not drawn: its process ended with status 1; python -m model.training.curves {tmp_path} says why.\n"
    )


def test_picture_that_is_given_up_is_not_told(tmp_path, capsys):
    picture = LossPicture(written(tmp_path, records(8)))
    picture.note(Record("evaluation", 8, 1.0, 0.0))
    picture.give_up()
    picture.wait()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("made", [
    records(1), [Record("step", 1, math.nan, 0.0, lr=0.0)], [Record("evaluation", 4, 1.0, 0.0, split="val")],
    [Record("step", 1, 0.0, 0.0, lr=1.0)],
])  # fmt: skip
def test_picture_of_next_to_nothing_is_drawn(tmp_path, made):
    main(written(tmp_path, made))
    assert Image.open(tmp_path / "loss.png").size == (1080, 720)


def test_run_of_which_nothing_is_recorded_has_no_picture(tmp_path):
    main(written(tmp_path, []))
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.slow
def test_best_evaluation_is_one_over_the_rows_of_now():
    starts = [{"after_step": step, "valid_data": [str(step)]} for step in (0, 5)]
    losses = {4: 1.0, 8: 3.0, 12: 2.0}
    made = [*records(12), *(Record("evaluation", step, loss, 0.0, split="val") for step, loss in losses.items())]
    assert "best evaluation: 2.0000 at step 12" in labels(figure(made, [5], "a-run", {"starts": starts}))


def test_epochs_end_at_the_first_step_that_completes_them():
    epochs = [0.4, 0.8, 1.2, 1.6, 2.0, 4.1]
    assert epoch_ends([Record("step", n, 1.0, 0.0, epoch=epoch) for n, epoch in enumerate(epochs, 1)]) == [3, 5, 6]


@pytest.mark.run
def test_picture_is_drawn_by_another_process_after_an_evaluation_and_at_the_end(tmp_path):
    written(tmp_path, records(8, every=4), starts=[{"after_step": 0}, {"after_step": 4}])
    picture = LossPicture(tmp_path)
    picture.note(Record("step", 1, 1.0, 0.0))
    assert picture._process is None
    picture.note(Record("evaluation", 4, 1.0, 0.0))
    picture._process.wait(60)
    first = (tmp_path / "loss.png").stat().st_mtime_ns
    picture.finish()
    picture.wait()
    assert (tmp_path / "loss.png").stat().st_mtime_ns > first
    assert module.resumed_after(module.settings_in(tmp_path)) == [4]


def test_picture_is_renewed_every_half_minute_one_at_a_time(tmp_path, monkeypatch):
    clock, started, is_running = SimpleNamespace(now=0.0), [], True

    def popen(*words, **named):
        started.append(clock.now)
        return SimpleNamespace(poll=lambda: None if is_running else 0)

    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(module.subprocess, "Popen", popen)
    picture = LossPicture(tmp_path)
    for clock.now in range(100):
        is_running = clock.now < 75
        picture.note(Record("step", 1, 1.0, 0.0))
    assert started == [30, 75]


def test_without_matplotlib_a_sentence_says_so_and_nothing_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    picture = LossPicture(tmp_path)
    picture.finish()
    picture.wait()
    assert picture._process is None
    assert capsys.readouterr().err == (
        "loss.png is not drawn: the package matplotlib is missing; pip install matplotlib adds it.\n"
    )
