"""The script as people run it: each way to train on the small golden model, and what a wrong command line prints."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    GOLDEN,
    PROJECT,
    free_port,
    load_model,
    printed_losses,
    run_program,
    run_python,
    write_checkpoint,
    write_rows,
)  # fmt: skip
from PIL import Image

SCRIPT = PROJECT / "finetune_visualglm.py"
PROGRAMS = PROJECT / "tests/programs"
STEPS = 3
RECIPE = (
    "--mode", "finetune", "--train-data", "dataset.json", "--split", "1", "--train-iters", STEPS, "--batch-size", "2",
    "--max_source_length", "64", "--max_target_length", "64", "--num-workers", "0", "--lr", "0.02",
    "--lr-decay-style", "constant", "--warmup", "0", "--auto_warmup_steps", "0",
)  # fmt: skip
LORA = ("--use_lora", "--lora_rank", "4")


@pytest.fixture(scope="module")
def train(upstream_checkpoint, tmp_path_factory):
    """Trains with further flags, in a folder of its own: gives the losses, what was printed, and that folder."""

    def trained(*flags, launcher=(SCRIPT,), checkpoint=upstream_checkpoint, method=LORA):
        folder = tmp_path_factory.mktemp("run")
        command = (
            *launcher,
            "--from_pretrained",
            checkpoint,
            *RECIPE,
            *method,
            "--summary-dir",
            folder,
            "--save",
            "none",
            *flags,
        )
        done = run_python(*command, cwd=GOLDEN / "upstream")
        assert done.returncode == 0, done.stdout + done.stderr
        losses = printed_losses(done.stdout)
        return SimpleNamespace(losses=losses, out=done.stdout, err=done.stderr, folder=folder)

    return trained


@pytest.fixture(scope="module")
def plain(train):
    """A plain run in float32 with ZeRO 0, which the others are compared with."""
    return train()


def saved_checkpoint(run):
    """The one checkpoint that a run with --save wrote into its folder."""
    (latest,) = run.folder.glob("saved/*/latest")
    return latest.parent


# --- ways to train


@pytest.mark.run
def test_plain_run_prints_a_finite_loss_for_each_step_and_no_error(plain):
    assert len(plain.losses) == STEPS
    assert all(math.isfinite(loss) for loss in plain.losses)
    assert plain.losses[2] != plain.losses[0]
    assert plain.err == ""


@pytest.mark.run
def test_activation_checkpointing_gives_the_same_losses(train, plain):
    run = train("--checkpoint-activations")
    assert run.losses == plain.losses
    assert run.err == ""


@pytest.mark.run
def test_bf16_on_the_cpu_trains_near_float32(train, plain):
    run = train("--bf16")
    assert run.losses == pytest.approx(plain.losses, rel=0.02)
    assert run.losses != plain.losses


@pytest.mark.run
def test_fp16_without_a_gpu_trains_near_float32(train, plain):
    assert train("--fp16").losses == pytest.approx(plain.losses, rel=0.02)


@pytest.mark.run
@pytest.mark.long
def test_zero_1_and_2_give_the_same_losses(train, plain):
    first, second = (train("--zero-stage", stage).losses for stage in ("1", "2"))
    assert first == second
    assert first[0] == plain.losses[0]
    assert first == pytest.approx(plain.losses, rel=0.02)  # Adam's second beta differs, by SAT's files


@pytest.mark.run
def test_gradient_accumulation_over_single_rows_takes_as_many_steps(train):
    run = train("--batch-size", "1", "--gradient-accumulation-steps", "2")
    assert len(run.losses) == STEPS
    assert all(math.isfinite(loss) for loss in run.losses)


@pytest.mark.run
def test_deepspeed_config_files_values_win_and_one_line_says_so(train, plain, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(
        '{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2},'
        ' "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.01}}}'
    )
    run = train("--deepspeed_config", file, "--batch-size", "5")
    assert f"--batch-size 5 is overridden by 2 from {file} (train_micro_batch_size_per_gpu)." in run.out.splitlines()
    assert run.losses == plain.losses


BOTH = (*LORA, "--use_ptuning", "--pre_seq_len", "3")


@pytest.fixture(scope="module")
def both(train, tmp_path_factory):
    """A saved run of LoRA and P-Tuning together, with the logits of the trained model."""
    folder = tmp_path_factory.mktemp("both")
    logits, saved = folder / "logits", folder / "saved"
    run = train(
        "--save", saved, "--answers", "8", launcher=(PROGRAMS / "train_and_save_logits.py", logits), method=BOTH
    )
    return SimpleNamespace(**vars(run) | {"folder": folder}, logits=torch.load(logits))


@pytest.mark.run
def test_lora_and_p_tuning_train_together(both):
    assert len(both.losses) == STEPS
    assert "Trainable, 7,296 of " in both.out
    assert re.search(
        r"^  mixins\.ptuning\.prefix\.\*: 3 tensors \[2, 4, 3, 16\], layers 0 to 2$", both.out, re.MULTILINE
    )


@pytest.mark.run
@torch.no_grad()
def test_saved_checkpoint_when_loaded_gives_the_trained_models_logits(both):
    model = load_model(saved_checkpoint(both), "FineTuneVisualGLMModel")
    logits = model(input_ids=torch.tensor([[859, 775, 2685, 86, 89, 554]]))[0]
    torch.testing.assert_close(logits, both.logits)


@pytest.mark.run
def test_saved_checkpoint_can_be_trained_on(train, both):
    run = train(checkpoint=saved_checkpoint(both), method=BOTH)
    assert run.losses[0] < both.losses[0]  # the same rows, seen before


@pytest.mark.run
def test_saving_says_where_and_when(both):
    folder = saved_checkpoint(both)
    *_, saved, answers, page = both.out.splitlines()
    assert saved == f"Saved {folder} (iteration {STEPS})."
    assert (answers.split(",")[1], page) == (" answers right: before 0/6", f"Report: {folder}/report.html")
    assert re.fullmatch(r"MyModel-\d\d-\d\d-\d\d-\d\d", folder.name)


@pytest.mark.run
@pytest.mark.slow
def test_two_processes_give_equal_losses_under_torchrun_and_deepspeed(train):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), SCRIPT)
    deepspeed = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port(), SCRIPT)
    by_torchrun, by_deepspeed = train(launcher=torchrun), train(launcher=deepspeed)
    assert len(by_torchrun.losses) == STEPS  # from one process, not from both
    assert by_torchrun.losses == by_deepspeed.losses


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.long
def test_two_processes_that_share_the_work_by_zero_2_train(train):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), SCRIPT)
    run = train("--zero-stage", "2", "--batch-size", "1", launcher=torchrun)
    assert len(run.losses) == STEPS
    assert all(math.isfinite(loss) for loss in run.losses)


@pytest.mark.run
@pytest.mark.slow
def test_one_batch_of_four_trains_like_two_of_two_and_like_two_processes_of_two(train, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), SCRIPT)
    common = ("--loss_normalization", "token", "--hidden-dropout", "0", "--attention-dropout", "0")

    def weights_of(name, *flags, launcher=(SCRIPT,)):
        train(*common, "--save", tmp_path / name, *flags, launcher=launcher)
        (weights,) = tmp_path.glob(f"{name}/*/3/mp_rank_00_model_states.pt")
        return torch.load(weights)["module"]

    whole = weights_of("whole", "--batch-size", "4")
    for other in (
        weights_of("accumulated", "--batch-size", "2", "--gradient-accumulation-steps", "2"),
        weights_of("two", "--batch-size", "2", launcher=torchrun),
    ):
        for name, tensor in whole.items():
            assert (other[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.run
@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "flags"),
    [
        ("3", ("--train-iters", "6")),  # rows come twice: the pictures have been looked at
        ("2", ("--train_parts", "vit=0.001", "glm_proj")),
        *(
            pytest.param(stage, flags, marks=pytest.mark.long)
            for stage, flags in (
                ("1", ("--train_parts", "glm_proj", "--train-iters", "6")),
                ("3", ("--train_parts", "qformer=0.001", "--packing")),
                ("3", ()),
            )
        ),
    ],
)
def test_two_processes_of_which_one_has_no_picture_in_a_step_train_like_one(train, tmp_path, zero_stage, flags):
    common = (
        "--train-data",
        mixed_rows(tmp_path),
        "--loss_normalization",
        "token",
        "--hidden-dropout",
        "0",
        "--holdout",
        "1",
    )
    common += ("--attention-dropout", "0", "--drop-path", "0", "--train-iters", "4", *flags)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), SCRIPT)
    one = train(*common, "--zero-stage", "1", "--batch-size", "2")
    two = train(*common, "--zero-stage", zero_stage, "--batch-size", "1", launcher=torchrun)
    assert len(one.losses) > 3
    assert two.losses == pytest.approx(one.losses, abs=2e-4)
    assert [line for line in two.out.splitlines() if "validation loss" in line]


@pytest.mark.run
@pytest.mark.slow
def test_zero_3_trains_on_steps_with_and_without_pictures_and_saves_in_between(train, tmp_path):
    run = train(
        "--train-data", mixed_rows(tmp_path), "--train_parts", "vit=0.001", "--train-iters", "8", "--batch-size", "1",
        "--seed", "2",  # the first six steps have: text, picture, text, picture, picture, picture
        "--zero-stage", "3", "--save-interval", "5", "--save", tmp_path,
    )  # fmt: skip
    assert len(run.losses) == 8
    assert all(map(math.isfinite, run.losses))


def mixed_rows(folder: Path) -> Path:
    """Three rows with a picture each, and three without."""
    pictures = json.loads((GOLDEN / "upstream/dataset.json").read_text(encoding="utf-8"))[:3]
    texts = [{"prompt": f"问题{number}", "label": "没有图片的回答。"} for number in range(3)]
    return write_rows(folder, [row | {"img": str(GOLDEN / "upstream" / row["img"])} for row in pictures] + texts)


# --- wrong command lines and data: told before torch is even imported


ROW = {"img": "good.png", "prompt": "?", "label": "!"}
# name: further flags (after good ones), the content of rows.json, and what the sentence says
CASES = {
    "no method": (["--use_none"], None, ["No method", "--use_lora"]),
    "two methods": (["--use_lora", "--use_qlora"], None, ["--use_lora and --use_qlora"]),
    "unknown flag": (["--lora_rnak", "4"], None, ["--lora_rnak", "did you mean --lora_rank?"]),
    "value of the wrong kind": (["--lr", "fast"], None, ["--lr fast: a number is needed"]),
    "value out of bounds": (["--lora_rank", "0"], None, ["--lora_rank 0: 1 or more is needed"]),
    "two precisions": (["--fp16", "--bf16"], None, ["--fp16 and --bf16"]),
    "parts without processes": (["--model-parallel-size", "2"], None, ["--model-parallel-size 2", "1 process found"]),
    "layer outside the model": (["--layer_range", "0", "7"], None, ["--layer_range 0 7", "no layer 7", "0 to 2"]),
    "source too short for the picture": (["--max_source_length", "30"], None, ["--max_source_length 30", "32"]),
    "source too short for the frame": (["--max_source_length", "40"], None, ["--max_source_length 40"]),
    "target too short": (["--max_target_length", "2"], None, ["--max_target_length 2", "3"]),
    "no such data file": (["--train-data", "none.json"], None, ["none.json", "No such file"]),
    "broken JSON": ([], b'[{"img": "a.png",\n "prompt" "?"}]', ["rows.json line 2 column 11", "not JSON"]),
    "not a list": ([], {"rows": []}, ["rows.json", "not a JSON list"]),
    "row without a key": ([], [ROW, {"img": "good.png", "prompt": "?"}], ["rows.json row 2", 'no "label"']),
    "row with a wrong type": ([], [ROW | {"prompt": 7}], ["rows.json row 1", '"prompt" is a number']),
    "two bad rows": ([], [[], ROW, ROW | {"label": ""}], ["row 1: a list", 'row 3: "label" is empty']),
    "missing picture": ([], [ROW | {"img": "none.png"}], ["rows.json row 1", "none.png"]),
    "unreadable picture": ([], [ROW, ROW | {"img": "bad.png"}], ["rows.json row 2", "bad.png", "a picture"]),
    "bad validation rows": (["--valid-data", "bad.json", "--eval-interval", "1"], None, ["bad.json row 1"]),
    "no such checkpoint": (["--from_pretrained", "visualglm-7b"], None, ["visualglm-7b"]),
    "checkpoint without a config": (["--from_pretrained", "empty"], None, ["empty", "model_config.json"]),
    "save at a file": (["--save", "good.png"], None, ["--save good.png", "is a file"]),
    "no such DeepSpeed file": (["--deepspeed_config", "none.json"], None, ["--deepspeed_config none.json"]),
    "broken DeepSpeed file": (["--deepspeed_config", "bad.png"], None, ["--deepspeed_config bad.png"]),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory, upstream_config):
    """How each of CASES ended, by its name."""
    home = tmp_path_factory.mktemp("refused")
    folder = home / "work"
    write_checkpoint(folder / "checkpoint", upstream_config, {})
    (folder / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"not a picture")
    (folder / "bad.json").write_text("[{}]")
    command_lines = []
    for number, (flags, content, _) in enumerate(CASES.values()):
        rows = folder / f"{number}" / "rows.json"
        rows.parent.mkdir()
        content = [ROW] if content is None else content
        rows.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        good = ["--from_pretrained", "checkpoint", "--mode", "finetune", "--train-data", str(rows), "--split", "1"]
        method = [] if flags == ["--use_none"] else ["--use_lora"]
        command_lines.append([*good, *method, *(flag for flag in flags if flag != "--use_none")])
    (home / "command_lines.json").write_text(json.dumps(command_lines))
    file, sat_home = home / "command_lines.json", str(home / "models")
    done = run_program("main_with_each", file, cwd=folder, SAT_HOME=sat_home, PYTHONUTF8="1")  # so it starts cold
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_ends_with_a_sentence_and_status_2_before_torch_is_imported(refused, name):
    found = refused[name]
    assert found["status"] == 2, found
    assert found["err"].startswith("finetune_visualglm.py: error: ")
    for words in CASES[name][2]:
        assert words in found["err"]
    assert "Traceback" not in found["err"] + found["out"]
    assert found["err"].rstrip().endswith((".", "?"))
    assert found["torch"] is False


@pytest.mark.slow
def test_wrong_command_line_as_a_program_has_exit_status_2_and_prints_on_stderr_only(tmp_path):
    done = run_python(SCRIPT, "--train-data", "rows.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("finetune_visualglm.py: error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_wrong_command_line_in_two_processes_is_told_by_the_first_only(tmp_path):
    assert run_python(SCRIPT, cwd=tmp_path, RANK="1").stderr == ""


def test_help_all_shows_every_kind_of_flag_and_ends_with_status_0(tmp_path):
    done = run_python(SCRIPT, "--help", "all", cwd=tmp_path)
    assert done.returncode == 0
    for flag in ("--use_lora", "--layer_range", "--train-iters", "--zero-stage", "--deepspeed_config", "--tokenizer"):
        assert flag in done.stdout
    assert done.stderr == ""


def test_script_fits_its_house():
    assert len(SCRIPT.read_text().splitlines()) <= 150
