"""--find_lr: the rate that a sweep proposes, and that a sweep leaves nothing behind but its picture."""

import math
import re
from types import SimpleNamespace

import pytest
from conftest import PROJECT, run_python
from PIL import Image

from model.cli.options import FIND_LR_STEPS, parse
from model.training.find_lr import HIGHEST, LOWEST, RateSweep, proposed_rate, rate_of

NOISE = [0.1, -0.1] * 50


def losses_of(lowest_at, diverges_at):
    """A sweep's losses: flat, falling over thirty steps to the lowest, flat, and rising."""
    return [
        2.5 - 2.4 * min(1, max(0, 1 - (lowest_at - step) / 30)) + max(0, step - diverges_at) + NOISE[step]
        for step in range(100)
    ]


def test_rates_rise_by_one_factor_from_the_lowest_to_the_highest():
    assert (rate_of(0), rate_of(FIND_LR_STEPS - 1)) == (LOWEST, pytest.approx(HIGHEST))
    assert rate_of(11) / rate_of(10) == pytest.approx(rate_of(71) / rate_of(70))


def test_proposed_rate_lies_below_that_of_the_lowest_loss():
    assert rate_of(60) / 4 < proposed_rate(losses_of(lowest_at=65, diverges_at=66)) < rate_of(65)


def test_losses_that_end_in_nan_still_propose():
    losses = [*losses_of(lowest_at=65, diverges_at=70)[:72], math.nan]
    assert proposed_rate(losses) is not None


@pytest.mark.parametrize(
    "losses", [[2.5 + one for one in NOISE], [2.5 + 0.01 * step for step in range(100)], [], [math.nan]]
)
def test_losses_that_never_fall_propose_nothing(losses):
    assert proposed_rate(losses) is None


def test_picture_of_an_experiment_in_a_folder_is_drawn_there(tmp_path, capsys):
    options = parse(["--save", str(tmp_path / "saved"), "--experiment-name", "team/x"])
    sweep = RateSweep(options, SimpleNamespace(step_watchers=[]))
    sweep.losses = losses_of(lowest_at=65, diverges_at=66)
    sweep.tell()
    picture = tmp_path / "saved/team/x-find_lr.png"
    assert capsys.readouterr().out.splitlines()[-1] == f"The losses over the rates: {picture}"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [picture]
    assert Image.open(picture).format == "PNG"


def run_on_tiny(folder, *words):
    """The lines of a run of the small model on the shipped rows, four of them held out."""
    done = run_python(
        PROJECT / "finetune_visualglm.py", "--from_pretrained", PROJECT / "model/tiny", "--use_lora", "--mode", "finetune",
        "--train-data", PROJECT / "fewshot-data/dataset.json", "--holdout", "4", "--num-workers", "0", *words, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def told_rate(lines):
    (told,) = (line for line in lines if line.startswith("--find_lr proposes --lr "))
    return float(told.split()[3].rstrip("."))


@pytest.mark.long
@pytest.mark.run
def test_sweep_on_the_small_model_proposes_a_rate_and_saves_only_its_picture(tmp_path):
    lines = run_on_tiny(tmp_path, "--epochs", "3", "--find_lr", "--save", "saved", "--experiment-name", "look")
    assert 0.001 <= told_rate(lines) <= 0.1
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "saved",
        "saved/look-find_lr.png",
    ]
    assert lines[-1] == "The losses over the rates: saved/look-find_lr.png"


@pytest.mark.run
@pytest.mark.long
def test_proposed_rate_is_about_the_best_of_a_grid(tmp_path):
    losses = {}
    for rate in (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        lines = run_on_tiny(
            tmp_path, "--lr", rate, "--train-iters", "200", "--auto_warmup_steps", "0", "--save", "none"
        )  # after 100, rates that differ tenfold have learned all there is, to 0.0001
        (evaluated,) = (line for line in lines if "validation loss" in line)
        losses[rate] = float(re.search(r"validation loss ([\d.]+)", evaluated)[1])
    print(losses)
    proposed = told_rate(run_on_tiny(tmp_path, "--find_lr", "--save", "none"))
    best = min(losses, key=losses.__getitem__)
    nearest = min(losses, key=lambda rate: abs(math.log(rate / proposed)))
    assert best / 3.5 <= proposed <= best * 3.5  # a step of the grid
    assert losses[nearest] <= 0.05 * max(losses.values())
