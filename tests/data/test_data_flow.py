"""The script on messy data: bad rows, held-out rows, every shape of row, --epochs and --seed, in real runs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import GOLDEN, PICTURE, PROJECT, printed_losses, run_python, write_rows

pytestmark = pytest.mark.run

SHAPES = [
    {"img": str(PICTURE), "prompt": "这是什么？", "label": "天。"},
    {"img": str(PICTURE), "prompt": "还有呢？", "label": "云。", "history": [["这是什么？", "天。"]]},
    {"prompt": "几点了？", "label": "三点。"},
    {"prompt": "What time is it?", "label": "Three.", "lang": "en"},
]
NO_DROPOUT = ("--hidden-dropout", "0", "--attention-dropout", "0")


def train(checkpoint: Path, data: Path, *flags: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        PROJECT / "finetune_visualglm.py", "--from_pretrained", checkpoint, "--use_lora", "--mode", "finetune",
        "--train-data", data, "--batch-size", "2", *NO_DROPOUT, *flags, cwd=data.parent, **environment,
    )  # fmt: skip


def test_epochs_with_every_shape_of_row_and_accumulation_sees_all_samples(tmp_path, upstream_checkpoint):
    done = train(
        upstream_checkpoint, write_rows(tmp_path, SHAPES * 2), "--epochs", "2", "--gradient-accumulation-steps", "2",
        "--max_source_length", "auto", "--max_target_length", "auto",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 rows, 10 samples (one for every turn)" in done.stdout
    assert "cut to fit" not in done.stdout
    assert "Training on 10 samples: 5 steps of 4 see 20 samples, 2 epochs." in done.stdout
    assert len(printed_losses(done.stdout)) == 5


def test_holdout_is_evaluated_and_the_best_checkpoint_can_be_loaded(tmp_path, upstream_checkpoint):
    data = write_rows(tmp_path, SHAPES * 3)
    flags = ("--holdout", "0.25", "--keep_best", "--eval-interval", "1", "--train-iters", "2", "--save", "saved")
    done = train(upstream_checkpoint, data, *flags, "--lr", "0.01", "--auto_warmup_steps", "0")
    assert done.returncode == 0, done.stderr
    assert "Held out of --train-data for evaluation: 3 rows" in done.stdout
    losses = [float(loss) for loss in re.findall(r"validation loss (\S+),", done.stdout)]
    assert len(losses) == 2
    (best,) = tmp_path.glob("saved/*/best")
    kept = json.loads(next(best.glob("*/evaluation.json")).read_text())
    assert (str(kept["iteration"]), kept["loss"]) == (
        (best / "latest").read_text(),
        pytest.approx(min(losses), abs=1e-4),
    )
    assert [path.name for path in best.glob("[0-9]*")] == [(best / "latest").read_text()]
    again = train(best, data, "--holdout", "0.25", "--train-iters", "1")
    assert again.returncode == 0, again.stderr


def test_bad_rows_stop_the_run_and_are_all_named(tmp_path, upstream_checkpoint):
    data = write_rows(tmp_path, [SHAPES[0], {"img": "no.png", "prompt": "?", "label": "!"}, SHAPES[2], {"prompt": 3}])
    done = train(upstream_checkpoint, data)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"{data} row 2: there is no file no.png" in done.stderr
    assert f'{data} row 4: no "label"' in done.stderr


def test_bad_rows_are_left_out_and_counted_when_asked(tmp_path, upstream_checkpoint):
    bad = [{"img": "no.png", "prompt": "?", "label": "!"}, {}, 7]
    data = write_rows(tmp_path, [*bad, *SHAPES])
    done = train(upstream_checkpoint, data, "--bad_rows", "skip", "--train-iters", "1")
    assert done.returncode == 0, done.stderr
    assert f"{data}: {len(SHAPES)} rows" in done.stdout
    assert "Left out, 3 bad rows (--bad_rows skip):" in done.stdout
    assert "Training on 5 samples" in done.stdout


def test_very_many_rows_are_checked_beside_the_imports_and_every_cut_is_counted(tmp_path, upstream_checkpoint):
    rows = [{"prompt": f"{number}？", "label": "天。"} for number in range(25_000)]
    rows[24_000] |= {"prompt": "长" * 90}
    rows[7] |= {"label": "长" * 300}
    done = train(upstream_checkpoint, write_rows(tmp_path, rows), "--train-iters", "1")
    assert done.returncode == 0, done.stderr
    assert "25000 rows; cut to fit: 1 prompt (--max_source_length), 1 label (--max_target_length)" in done.stdout
    bad = train(upstream_checkpoint, write_rows(tmp_path, [*rows, {"prompt": "?"}]), "--train-iters", "1")
    assert (bad.returncode, bad.stdout, "Traceback" in bad.stderr) == (2, "", False)
    assert 'row 25001: no "label"' in bad.stderr


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_picture_that_breaks_while_training_follows_the_same_policy(tmp_path, upstream_checkpoint, policy):
    (tmp_path / "broken.jpg").write_text("no picture")
    data = write_rows(tmp_path, [SHAPES[0], SHAPES[0] | {"img": "broken.jpg"}])
    done = train(
        upstream_checkpoint, data, "--bad_rows", policy, "--check_seconds", "0", "--epochs", "2", "--num-workers", "2"
    )
    told = f"{data} row 2: broken.jpg isn't a picture"
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert "pictures have not been opened yet" in done.stdout
    assert done.returncode == (2 if policy == "error" else 0)
    assert len(printed_losses(done.stdout)) == (0 if policy == "error" else 2)


@pytest.mark.parametrize("policy", [pytest.param("error", marks=pytest.mark.long), "skip"])
def test_picture_that_breaks_on_one_of_two_processes_stops_both_or_none(tmp_path, upstream_checkpoint, policy):
    (tmp_path / "broken.jpg").write_text("no picture")
    data = write_rows(tmp_path, [SHAPES[0], SHAPES[2], SHAPES[0] | {"img": "broken.jpg"}, SHAPES[3]])
    done = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", PROJECT / "finetune_visualglm.py", "--from_pretrained",
        upstream_checkpoint, "--use_lora", "--mode", "finetune", "--train-data", data, "--batch-size", "1", "--epochs",
        "2", "--bad_rows", policy, "--check_seconds", "0", *NO_DROPOUT, cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    said = "finetune_visualglm.py: error: " if policy == "error" else "Left out: "
    assert f"{said}{data} row 3: broken.jpg isn't a picture" in done.stderr
    assert (done.returncode == 0) == (policy == "skip")
    assert policy == "error" or len(printed_losses(done.stdout)) == 4


def test_order_of_rows_follows_the_seed(tmp_path, upstream_checkpoint):
    shutil.copytree(GOLDEN / "upstream/images", tmp_path / "images")
    data = Path(shutil.copy(GOLDEN / "upstream/dataset.json", tmp_path))
    runs = [
        train(upstream_checkpoint, data, "--train-iters", "3", "--seed", seed, "--lr", "1e-9").stdout
        for seed in ("1234", "7", "7")
    ]
    released, seven, seven_again = map(printed_losses, runs)
    assert len(seven) == 3
    assert seven == seven_again
    assert seven != released


def test_same_file_for_training_and_evaluation_is_warned_about(tmp_path, upstream_checkpoint):
    data = write_rows(tmp_path, SHAPES)
    copy = shutil.copy(data, tmp_path / "copy.json")
    done = train(upstream_checkpoint, data, "--valid-data", copy, "--train-iters", "1")
    assert f"WARNING: {copy} is given for training and for evaluation" in done.stdout


@pytest.mark.long
def test_evaluation_on_two_processes_is_the_same_as_on_one(tmp_path, upstream_checkpoint):
    data, valid = write_rows(tmp_path, SHAPES), write_rows(tmp_path, [*SHAPES, *SHAPES[2:]], "valid.json")
    flags = ("--valid-data", valid, "--train-iters", "1", "--lr", "1e-9", "--eval-batch-size", "2")
    one = train(upstream_checkpoint, data, *flags)
    two = run_python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", PROJECT / "finetune_visualglm.py", "--from_pretrained",
        upstream_checkpoint, "--use_lora", "--mode", "finetune", "--train-data", data, "--batch-size", "1",
        *NO_DROPOUT, *flags, cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    found = [re.findall(r"validation loss (\S+),", run.stdout) for run in (one, two)]
    assert found[0], one.stderr + two.stderr
    assert found[0] == found[1]


def test_larger_image_is_trained_and_saved_as_such(tmp_path, upstream_checkpoint):
    data = write_rows(tmp_path, SHAPES)
    size = 2 * 224
    done = train(upstream_checkpoint, data, "--image_size", str(size), "--train-iters", "1", "--save", "saved")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("saved/*/1")
    config = json.loads((folder.parent / "model_config.json").read_text())
    assert config["eva_args"]["image_size"] == [size, size]
    again = train(folder.parent, data, "--train-iters", "1")
    assert again.returncode == 0, again.stderr
