"""Trouble while training: what is skipped, what is said, and when a run ends."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT, RUNS, free_port, printed_losses, run_program, run_python, write_rows
from warm_start import commands

from model.data.sampling import SampleOrder
from model.training.trouble import longest

TRAIN = (
    "--from_pretrained", "model/tiny", "--use_lora", "--mode", "finetune", "--auto_warmup_steps", "0", "--train-data",
)  # fmt: skip
SHIPPED = "fewshot-data/dataset.json"


def finetune(*words):
    return run_python("finetune_visualglm.py", *TRAIN, *words)


def with_nan(runs, *flags):
    """What each of these runs of train_with_nan.py found, and what all printed."""
    done = run_program(
        "train_with_nan", ",".join(runs), *TRAIN, SHIPPED, "--batch-size", "2", "--train-iters", "3", *flags
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")], done


@pytest.mark.run
@pytest.mark.long
def test_nan_gradient_of_a_finite_loss_is_skipped_at_every_zero_stage_and_weights_stay_finite():
    found, done = with_nan(
        [f"gradient:2:--zero-stage:{stage}{flag}" for stage in (0, 1, 2) for flag in ("", ":--bf16")]
    )
    assert [(run["skipped"], run["finite"]) for run in found] == [([2], True)] * 6
    assert done.stderr.count("Step 2 skipped: the gradient isn't finite, at a loss of 2.") == 6
    assert done.stdout.count("  1 skipped\n") == 2 * 6  # steps 2 and 3
    assert "Skipping backward" not in done.stdout + done.stderr  # SAT's line


@pytest.mark.run
@pytest.mark.parametrize("normalization", [pytest.param("micro_batch", marks=pytest.mark.long), "token"])
def test_nan_loss_in_an_accumulated_step_skips_that_step_and_every_row_keeps_its_step(normalization):
    first_of_step_2 = "loss:3"
    (whole, broken), done = with_nan(
        ["nothing:0", first_of_step_2], "--gradient-accumulation-steps", "2", "--loss_normalization", normalization
    )
    assert (whole["skipped"], broken["skipped"], broken["finite"]) == ([], [2], True)
    assert [len(rows) for rows in whole["rows"]] == [4, 4, 4]
    assert broken["rows"] == whole["rows"]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Step 2 skipped: the loss is nan. ")]
    assert all(f"{where} (" in line for where in whole["rows"][1])


@pytest.mark.run
def test_run_that_diverges_stops_and_leaves_the_last_good_checkpoint_the_last(tmp_path):
    done = finetune(
        SHIPPED, "--lr", "1e6", "--train-iters", "30", "--save", tmp_path, "--save-interval", "1",
        "--max_skipped_steps", "4",
    )  # fmt: skip
    assert done.returncode == 2
    (run,) = tmp_path.iterdir()
    assert done.stderr.splitlines()[-1] == (
        "finetune_visualglm.py: error: stopped after step 6: the last 4 steps were skipped, because the loss is not finite. "
        "Needed is a lower --lr than 1e+06, a longer --warmup, or a smaller gradient_clipping in a --deepspeed_config. "
        f"The last good checkpoint: {run / '1'}."
    )
    assert (run / "latest").read_text() == "1"
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"1", "2-diverged", "tensorboard"}
    assert "Not saved at iteration 3: the loss is not finite." in done.stderr
    assert "NaN or Inf found" not in done.stderr  # TensorBoard's writer
    again = run_python("finetune_visualglm.py", "--resume", run)
    assert again.returncode == 2
    assert again.stderr.endswith(f"The last good checkpoint: {run / '1'}.\n")
    assert (run / "latest").read_text() == "1"
    assert {path.name for path in run.glob("2*")} == {"2-diverged", "2-diverged-2"}


@pytest.mark.run
def test_checkpoint_that_newer_ones_have_replaced_is_not_the_last_good_one(tmp_path):
    saves = ("--save-interval", "1", "--save_total_limit", "1")
    assert finetune(SHIPPED, "--train-iters", "1", "--save", tmp_path, *saves).returncode == 0
    (run,) = tmp_path.iterdir()
    flags = ("--train-iters", "30", "--lr", "1e6", "--max_skipped_steps", "4")
    done = run_python("finetune_visualglm.py", "--resume", run, *flags)
    assert done.stderr.endswith("The last good checkpoint: none.\n")
    assert not (run / "latest").exists()
    assert [path.name for path in run.glob("[0-9]*")] == ["2-diverged"]


@pytest.mark.run
def test_run_whose_last_step_is_nan_ends_with_a_sentence_and_is_not_saved(tmp_path):
    done = finetune(SHIPPED, "--lr", "1e6", "--train-iters", "3", "--save", tmp_path)
    assert done.returncode == 2
    assert "stopped after step 3: the last step was skipped, because the loss is not finite." in done.stderr
    assert done.stderr.endswith("The last good checkpoint: none.\n")
    assert not list(tmp_path.rglob("*.pt"))


@pytest.fixture
def broken_picture(tmp_path: Path) -> dict:
    """A row whose picture can't be opened."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return {"img": str(tmp_path / "broken.png"), "prompt": "什么？", "label": "没有"}


@pytest.mark.run
def test_run_whose_last_rows_cannot_be_used_keeps_what_it_has_learned(tmp_path, broken_picture):
    good = {"prompt": "什么？", "label": "没有"}
    rows = write_rows(tmp_path, [good] * 20 + [broken_picture])
    seed = next(
        seed for seed in range(1, 999) if SampleOrder((21,), seed, epochs=1)[20] == 20
    )  # the broken one is last
    done = finetune(
        rows, "--bad_rows", "skip", "--check_seconds", "0", "--epochs", "1", "--batch-size", "1", "--save", tmp_path / "saved",
        "--seed", str(seed),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, last_but_one, last = (line for line in done.stdout.splitlines() if line.startswith("step "))
    assert "without a usable row" not in last_but_one
    assert last.endswith("  1 without a usable row")
    (folder,) = (tmp_path / "saved").iterdir()
    assert (folder / "latest").read_text() == "21"


@pytest.mark.run
@pytest.mark.timeout(120)  # they waited for ever
def test_processes_that_have_not_looked_at_the_pictures_end_with_the_first_one(tmp_path, broken_picture):
    """It alone knows which rows are left out, and so how many steps --epochs are."""
    rows = write_rows(tmp_path, [{"prompt": "什么？", "label": "没有"}] * 6 + [broken_picture] * 6)
    words = (
        *TRAIN,
        rows,
        "--bad_rows",
        "skip",
        "--epochs",
        "1",
        "--batch-size",
        "1",
        "--save",
        "none",
        "--answers",
        "0",
    )
    two = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    done = run_python(*two, "finetune_visualglm.py", *words)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == ["1/3", "2/3", "3/3"]


@pytest.mark.run
@pytest.mark.parametrize(("batch", "steps"), [("2", "10/10"), ("8", "4/4")])
def test_run_through_the_rows_that_goes_on_with_another_batch_takes_those_that_are_left(tmp_path, batch, steps):
    """16 are left after two steps of 4; of 24 rows in all, counted as if from the start, a batch of 2 would want more."""
    rows = write_rows(tmp_path, [{"prompt": "什么？", "label": f"{number}"} for number in range(12)])
    flags = (
        rows,
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--save",
        tmp_path / "saved",
        "--answers",
        "0",
        "--num-workers",
        "0",
    )
    first = finetune(*flags, "--save-interval", "2", "--exit-interval", "2")
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "saved").iterdir()
    rest = run_python("finetune_visualglm.py", "--resume", folder, "--exit-interval", "99", "--batch-size", batch)
    assert rest.returncode == 0, rest.stderr
    last = [line for line in rest.stdout.splitlines() if line.startswith("step ")][-1]
    assert last.removeprefix("step ").split()[0] == steps


@pytest.mark.run
def test_run_that_can_use_no_row_stops_and_saves_nothing(tmp_path, broken_picture):
    rows = write_rows(tmp_path, [broken_picture])
    done = finetune(
        rows, "--bad_rows", "skip", "--check_seconds", "0", "--train-iters", "20", "--save", tmp_path / "saved",
        "--max_skipped_steps", "3",
    )  # fmt: skip
    assert done.returncode == 2
    assert "step  3/20" not in done.stdout
    assert "step  2/20" in done.stdout
    assert "  2 without a usable row\n" in done.stdout
    assert done.stderr.endswith(
        "error: stopped after step 3: no row of the last 3 steps could be used, so nothing was learned. Needed are rows "
        "whose pictures can be opened; those that can't are named above.\n"
    )
    assert f"Left out: {rows} row 1" in done.stderr
    (folder,) = (tmp_path / "saved").iterdir()
    story = {"settings.json", "metrics.jsonl", "tensorboard", "loss.png", "loss.png.unfinished"}  # and no checkpoint
    assert {path.name for path in folder.iterdir()} <= story


@pytest.mark.run
def test_run_with_one_good_row_among_bad_ones_goes_on_and_counts_batches_without_one(tmp_path, broken_picture):
    good = {"prompt": "什么？", "label": "一只猫"}
    rows = write_rows(tmp_path, [broken_picture, good, broken_picture, broken_picture])
    done = finetune(
        rows, "--bad_rows", "skip", "--check_seconds", "0", "--epochs", "2", "--batch-size", "1", "--max_skipped_steps", "4",
        "--save", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("  6 without a usable row")


def in_fp16(runs, *flags):
    """What each of these runs of train_in_fp16.py recorded, and what all printed."""
    done = run_program(
        "train_in_fp16", ";".join(runs), *TRAIN, SHIPPED, "--lr", "0.01", "--hidden-dropout", "0", "--attention-dropout", "0",
        "--batch-size", "2", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")], done


@pytest.mark.run
def test_fp16_learns_as_fast_as_float32_at_every_zero_stage():
    zero = [f"--zero-stage,{stage}" for stage in (0, 1, 2, 3)]
    found, _ = in_fp16([*zero[:2], *(f"--fp16,{stage}" for stage in zero)], "--train-iters", "10")
    without_zero, with_zero, *halves = [run["losses"] for run in found]  # from stage 1 on, Adam has other betas
    assert found[-1]["dtype"] == "torch.float16"
    optimizers = ["FP16_UnfusedOptimizer", *2 * ["DeepSpeedZeroOptimizer"], "DeepSpeedZeroOptimizer_Stage3"]
    assert [run["optimizer"] for run in found[2:]] == optimizers
    assert without_zero[-1] < without_zero[0] - 1
    for losses, expected in zip(halves, (without_zero, *3 * [with_zero]), strict=True):
        assert losses == pytest.approx(expected, abs=0.005)  # fp16 rounds at the fourth digit


@pytest.mark.run
def test_fp16_whose_gradients_overflow_shows_skipped_steps_and_the_falling_loss_scale(tmp_path):
    (tmp_path / "ds.json").write_text('{"fp16": {"enabled": true, "initial_scale_power": 22, "hysteresis": 1}}')
    (found,), done = in_fp16([f"--fp16,--deepspeed_config,{tmp_path / 'ds.json'}"], "--train-iters", "6")
    skipped = done.stderr.count("fp16's gradients overflowed")
    assert found["scales"][0] == 2.0**21
    assert found["scales"][-1] == 2.0 ** (22 - skipped)
    assert "Step 1 skipped: fp16's gradients overflowed; the loss scale is 2097152 now." in done.stderr
    assert skipped < 6
    assert "loss scale 2097152  1 skipped\n" in done.stdout


def test_longest_rows_are_named_longest_first_and_the_rest_counted():
    rows = [(f"a.json row {number}", number) for number in range(1, 11)]
    named = longest(rows)
    assert named.startswith("a.json row 10 (10 tokens), a.json row 9 (9 tokens), ")
    assert named.endswith("a.json row 3 (3 tokens) and 2 more")


def with_trouble(*words):
    """What train_with_trouble.py printed on standard error, and its last line without the script's name."""
    done = run_program("train_with_trouble", *words, "--answers", "0")  # a pass is a step's or an evaluation's
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("finetune_visualglm.py: error: ")


@pytest.fixture(scope="module")
def mixed_rows(tmp_path_factory):
    """Five rows, of which the third has the longest answer."""
    rows = [
        {"img": str(PROJECT / f"fewshot-data/images/{name}"), "prompt": "什么？", "label": label}
        for name, label in (
            ("heldout00.png", "猫"),
            ("heldout01.png", "猪"),
            ("heldout00.png", "一只猫" * 20),
            ("heldout01.png", "两只猪"),
            ("heldout00.png", "一只大猫"),
        )
    ]
    return write_rows(tmp_path_factory.mktemp("rows"), rows)


@pytest.mark.run
@pytest.mark.parametrize("kind", ["device", "host"])
def test_run_without_memory_names_the_longest_rows_of_the_batch_and_what_to_change(mixed_rows, kind):
    line = with_trouble(kind, "2", *TRAIN, mixed_rows, "--epochs", "3", "--batch-size", "5")
    reason = {
        "device": "CUDA out of memory. Tried to allocate 2.00 GiB",
        "host": "DefaultCPUAllocator: can't allocate memory",
    }
    assert line.startswith("out of memory in step 2 (")
    assert reason[kind] in line
    assert f"The longest rows of the batch: {mixed_rows} row 3 (" in line
    lengths = [int(tokens) for tokens in re.findall(r"row \d+ \((\d+) tokens\)", line)]
    assert len(lengths) == 5
    assert lengths == sorted(lengths, reverse=True)
    assert line.endswith(
        "Needed is a smaller --batch-size than 5 with more --gradient-accumulation-steps than 1, --checkpoint-activations, or "
        "a smaller --max_source_length or --max_target_length."
    )


@pytest.mark.run
def test_run_without_memory_for_an_accumulated_step_names_the_rows_of_its_second_micro_batch_only(mixed_rows):
    line = with_trouble("device", "2", *TRAIN, mixed_rows, "--train-iters", "2", "--batch-size", "2",
                        "--gradient-accumulation-steps", "2")  # fmt: skip
    assert line.startswith("out of memory in step 1 (")
    assert line.count(" tokens)") == 2


@pytest.mark.run
def test_evaluation_without_memory_names_its_batch_size(mixed_rows):
    line = with_trouble(
        "device", "2", *TRAIN, mixed_rows, "--valid-data", mixed_rows, "--train-iters", "2", "--eval-interval", "1",
        "--eval-batch-size", "3",
    )  # fmt: skip
    assert line.startswith("out of memory after step 1 (")
    assert "Needed is a smaller --eval-batch-size than 3, or" in line


@pytest.mark.run
def test_model_that_doesnt_fit_on_the_device_ends_the_run_before_the_first_step():
    line = with_trouble("moving", *TRAIN, SHIPPED, "--train-iters", "2")
    assert line.startswith("out of memory before the first step (CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--use_qlora" in line


@pytest.mark.run
@pytest.mark.parametrize("flags", [(), ("--train_parts", "vit")])  # pictures are opened once before, or for each batch
def test_data_worker_that_is_killed_is_told_with_its_row(tmp_path, flags):
    rows = [
        {"img": str(PROJECT / "fewshot-data/images" / name), "prompt": "什么？", "label": "猫"}
        for name in ("heldout00.png", "heldout01.png", "heldout00.png")
    ]
    file = write_rows(tmp_path, rows)
    line = with_trouble("killed", "heldout01.png", *TRAIN, file, "--epochs", "3", "--num-workers", "1", *flags)
    what = f"{file} row 2" if flags else rows[1]["img"]
    assert line.startswith(f"a data worker died while it opened {what}. ")
    assert "--num-workers 0" in line


@pytest.mark.run
def test_bug_in_a_step_ends_the_run_and_its_data_workers():
    done = run_program("train_with_a_bug", *TRAIN, SHIPPED, "--train-iters", "9", "--num-workers", "2", cwd=PROJECT)
    assert done.returncode == 1
    assert "KeyError: 'a bug'" in done.stderr
    assert "RuntimeError" not in done.stderr  # of torch, about the workers' end


def with_small_file_system(folder, size, *words, full=False, **environment):
    """A run for which folder is a file system of so many KiB; skips where that isn't permitted."""
    fill = f"head -c {size * 1024} /dev/zero > {folder}/filled;" if full else ""
    mount = f"mount -t tmpfs -o size={size}k tmpfs {folder} && {{ {fill} true; }}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    command = [str(commands() / "python"), "finetune_visualglm.py", *map(str, [*TRAIN, *words, "--save", RUNS.name])]
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && exec {shlex.join(command)}"],
        cwd=PROJECT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.run
@pytest.mark.long
def test_run_with_too_little_shared_memory_says_so_once_and_learns_the_same():
    words = (SHIPPED, "--train-iters", "3", "--batch-size", "16", "--num-workers", "2", "--train_parts", "vit")
    small = with_small_file_system("/dev/shm", 1024, *words)
    assert small.returncode == 0, small.stderr
    assert small.stderr.splitlines().count(
        "/dev/shm is too small for the batches of the data workers, which now come through a pipe, slower. In Docker, "
        "--shm-size=8g makes it larger; a smaller --num-workers or --prefetch-factor needs less of it."
    ) == 1  # fmt: skip
    assert printed_losses(small.stdout) == printed_losses(finetune(*words).stdout)
    assert len(printed_losses(small.stdout)) == 3


@pytest.mark.run
def test_run_without_any_shared_memory_ends_with_a_sentence(tmp_path):
    nothing_known = {"XDG_CACHE_HOME": str(tmp_path)}  # pictures are opened, too
    done = with_small_file_system(
        "/dev/shm", 4, SHIPPED, "--train-iters", "3", "--num-workers", "2", full=True, **nothing_known
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        "error: the data workers can't be started: No space left on device. Needed is room in /dev/shm (in Docker, "
        "--shm-size=8g), or --num-workers 0.\n"
    )


@pytest.mark.run
def test_run_whose_tensorboard_disk_is_full_says_so_once_and_trains_on(tmp_path):
    done = with_small_file_system(
        tmp_path, 16, SHIPPED, "--train-iters", "12", "--batch-size", "1", "--summary-dir", tmp_path, full=True
    )
    assert done.returncode == 0, done.stderr
    assert len(printed_losses(done.stdout)) == 12
    assert done.stderr.count("TensorBoard's file can't be written ([Errno 28] No space left on device") == 1
    assert "Traceback" not in done.stderr
