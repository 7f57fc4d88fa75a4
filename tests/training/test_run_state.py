"""A run that goes on equals the one that was never stopped, bit for bit: its losses, evaluations and weights.

Dropout is on, so the random states count.
"""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import GOLDEN, PROJECT, free_port, printed_losses, run_program, run_python, write_tuned
from safetensors.torch import load_file, save_file

from model.checkpoints.layout import Checkpoint
from model.checkpoints.sizes import ROOM_FOR_THE_REST
from model.cli.options import parse
from model.cli.preflight import checkpoint_size
from model.training.records import MEASURED, read_records
from model.training.run_state import RunState, can_be_kept, put_back_random_state, random_state
from scripts import convert_checkpoint

COMMON = (
    "--mode", "finetune", "--train-data", "dataset.json", "--max_source_length", "64", "--max_target_length", "64",
    "--auto_warmup_steps", "2", "--lr", "0.01", "--batch-size", "2", "--lora_rank", "4", "--lr-decay-style", "cosine",
)  # fmt: skip
EVALUATED = (
    "--holdout",
    "2",
    "--eval-interval",
    "2",
    "--keep_best",
    "rouge_l",
    "--eval_answers",
    "2",
    "--early_stopping",
    "50",
)
# Each name says what is put together; the iteration after which the run is cut off, and the flags.
QUICK = {
    "float32, workers, accumulation, evaluated where it is cut": (
        4, "--use_lora", "--train-iters", "7", "--save-interval", "2", "--num-workers", "2", "--gradient-accumulation-steps",
        "2", "--loss_normalization", "token", *EVALUATED,
    ),
    "bf16, ZeRO 2, P-Tuning, epochs, packing, grouping": (
        5, "--use_ptuning", "--use_lora", "--lora_dropout", "0.2", "--epochs", "3", "--save-interval", "5", "--bf16",
        "--zero-stage", "2", "--packing", "--group_by_length", "--num-workers", "0",
    ),
    "QLoRA, ZeRO 1, a part of the vision tower": (
        3, "--use_qlora", "--train-iters", "5", "--save-interval", "3", "--zero-stage", "1", "--train_parts",
        "qformer=0.001", "--num-workers", "0",
    ),
    "LoRA, every weight saved, at another image size": (
        3, "--use_lora", "--train-iters", "6", "--save-interval", "3", "--image_size", "56",
    ),
}  # fmt: skip
SLOW = {
    "bf16, ZeRO 0": (3, "--use_lora", "--train-iters", "6", "--save-interval", "3", "--bf16"),
    "bf16, ZeRO 1, accumulation": (
        3, "--use_lora", "--train-iters", "6", "--save-interval", "3", "--bf16", "--zero-stage", "1",
        "--gradient-accumulation-steps", "3",
    ),
    "float32, ZeRO 2, mid-epoch": (4, "--use_lora", "--epochs", "4", "--save-interval", "4", "--zero-stage", "2", *EVALUATED),
    "P-Tuning, ZeRO 1, packing": (3, "--use_ptuning", "--train-iters", "6", "--save-interval", "3", "--zero-stage", "1", "--packing"),
    "QLoRA, bf16, every weight saved": (
        3, "--use_qlora", "--train-iters", "6", "--save-interval", "3", "--bf16", "--save_full_model",
    ),
    "feature cache, workers, grouping": (
        3, "--use_lora", "--train-iters", "6", "--save-interval", "3", "--feature_cache", "{folder}/features",
        "--num-workers", "2", "--group_by_length",
    ),
    "checkpointed activations, warm-up": (
        2, "--use_lora", "--train-iters", "6", "--save-interval", "2", "--checkpoint-activations", "--warmup", "0.5",
    ),
}  # fmt: skip
NOT_ON_A_GPU = "QLoRA, ZeRO 1, a part of the vision tower"  # its gradients are added up there in an order that varies
CASES = [
    *(
        pytest.param(case, id=name, marks=() if name == NOT_ON_A_GPU else pytest.mark.gpu)
        for name, case in QUICK.items()
    ),
    *(pytest.param(case, id=name, marks=pytest.mark.long) for name, case in SLOW.items()),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, upstream_checkpoint):
    """The small checkpoint with dropout: its own configuration switches it off."""
    folder = tmp_path_factory.mktemp("dropout") / "base"
    shutil.copytree(upstream_checkpoint, folder)
    config = json.loads((folder / "model_config.json").read_text())
    config |= {"hidden_dropout": 0.3, "attention_dropout": 0.2}  # other numbers than SAT's defaults
    (folder / "model_config.json").write_text(json.dumps(config))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    iteration = (folder / "latest").read_text()
    return torch.load(folder / iteration / "mp_rank_00_model_states.pt")["module"]


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.run
@pytest.mark.parametrize("case", CASES)
def test_run_that_goes_on_has_the_losses_evaluations_and_weights_of_the_whole_run(case, base, tmp_path):
    iteration, *flags = case
    flags = [flag.format(folder=tmp_path) for flag in flags]
    done = run_program(
        "resume_and_record", tmp_path, str(iteration), "--from_pretrained", base, "--answers", "0", *COMMON, *flags,
        cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses["whole"]) > iteration
    assert losses["cut"] == losses["whole"][iteration:]
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    evaluations = [
        [
            line
            for line in part.splitlines()
            if "validation loss" in line and int(line.split()[1].rstrip(":")) >= iteration
        ]
        for part in done.stdout.split("== cut off")
    ]
    assert evaluations[0] == evaluations[1]
    whole, cut = (
        [replace(record, **dict.fromkeys(MEASURED, 0)) for record in read_records(tmp_path / part / "metrics.jsonl")]
        for part in ("whole", "cut")
    )
    assert [record.loss for record in whole if record.kind == "step"] == losses["whole"]
    assert cut == whole


@pytest.mark.run
def test_qlora_run_that_saves_every_weight_goes_on_with_its_base_and_no_other(upstream_checkpoint, tmp_path):
    base = tmp_path / "base"
    convert_checkpoint.main([str(upstream_checkpoint), str(base), "--to", "hf"])
    flags = ("--use_qlora", "--image_size", "56", "--train-iters", "2", "--save-interval", "1", "--num-workers", "0")
    done = run_program(
        "resume_and_record", tmp_path, "1", "--from_pretrained", base, "--answers", "0", *COMMON, *flags,
        cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["cut"] == losses["whole"][1:]
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    path = base / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    other = run_python(PROJECT / "finetune_visualglm.py", "--resume", tmp_path / "whole/1", cwd=GOLDEN / "upstream")
    assert other.returncode == 2
    assert f"trained on other weights than those of {path}" in other.stderr.splitlines()[-1]


@pytest.mark.run
def test_run_that_a_signal_stopped_in_an_evaluation_goes_on_with_the_same_dropout(base, tmp_path):
    flags = (
        "--from_pretrained", base, *COMMON, "--use_lora", "--train-iters", "3", "--num-workers", "0", "--holdout", "2",
        "--eval-interval", "2", "--eval-batch-size", "1",
    )  # fmt: skip
    done = run_program("train_and_stop_evaluating", tmp_path, *flags, cwd=GOLDEN / "upstream")
    assert done.returncode == 0, done.stdout + done.stderr
    for stopped in done.stdout.split("== stopped")[1:]:
        until_stopped, afterwards = stopped.split("== left with 143")
        assert "SIGTERM: stopped after step 2 of 3" in until_stopped
        assert "validation loss" not in until_stopped
        assert "validation loss" in afterwards
    assert "Exception ignored" not in done.stderr
    whole, here, in_callback = json.loads(done.stdout.splitlines()[-1])
    assert here == in_callback == whole


@pytest.fixture(scope="module")
def killed(tmp_path_factory, base):
    """A whole run; one killed after 5 of 6 steps, 4 of them saved; and what `--resume auto` prints then."""
    folder = tmp_path_factory.mktemp("killed")
    flags = ["--from_pretrained", base, *COMMON, "--use_lora", "--train-iters", "6", "--save-interval", "2"]
    flags += ["--log-interval", "3", "--summary-dir", folder]
    script, cwd = PROJECT / "finetune_visualglm.py", GOLDEN / "upstream"
    whole = run_python(script, *flags, "--save", folder / "whole", cwd=cwd)
    run_program("train_until_killed", "5", *flags, "--save", folder / "killed", cwd=cwd)
    resumed = run_python(script, *flags, "--save", folder / "killed", "--resume", "auto", cwd=cwd)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return SimpleNamespace(folder=folder, whole=whole.stdout, resumed=resumed.stdout)


@pytest.mark.run
def test_killed_run_resumed_in_a_new_process_ends_with_the_weights_of_the_whole_run(killed):
    (whole,), (cut,) = (list((killed.folder / name).iterdir()) for name in ("whole", "killed"))
    assert_same_weights(cut, whole)


@pytest.mark.run
def test_resumed_line_of_several_steps_has_the_mean_over_those_before_the_kill_too(killed):
    assert printed_losses(killed.whole)[1:] == printed_losses(killed.resumed)
    assert re.search(r"^Going on with .* after iteration 4\.$", killed.resumed, re.MULTILINE)


@pytest.mark.run
def test_checkpoint_with_its_state_takes_about_the_room_that_is_asked_for(killed, base):
    (folder,) = (killed.folder / "whole").iterdir()
    taken = sum(path.stat().st_size for path in (folder / "6").iterdir())
    asked_for = checkpoint_size(parse([*COMMON, "--use_lora"]), Checkpoint.find(base))
    assert asked_for - ROOM_FOR_THE_REST < taken < asked_for


@pytest.mark.run
def test_finished_run_that_is_resumed_trains_nothing_and_says_so(killed):
    (folder,) = (killed.folder / "whole").iterdir()
    done = run_python(PROJECT / "finetune_visualglm.py", "--resume", folder, cwd=GOLDEN / "upstream")
    assert done.returncode == 0
    assert done.stdout == (
        f"{folder}: iteration 6 of 6 is done, so nothing is left to train. A higher --train-iters goes on.\n"
    )


@pytest.mark.run
@pytest.mark.long
def test_two_processes_go_on_as_they_were_and_one_process_goes_on_with_their_state(base, tmp_path):
    script, cwd = PROJECT / "finetune_visualglm.py", GOLDEN / "upstream"
    two = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    flags = ("--from_pretrained", base, *COMMON, "--use_lora", "--train-iters", "6", "--save-interval", "3")
    first = run_python(
        *two,
        "--master-port",
        str(free_port()),
        script,
        *flags,
        "--zero-stage",
        "2",
        "--save",
        tmp_path / "saved",
        cwd=cwd,
    )
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "saved").iterdir()
    before = weights(folder)
    again = run_python(*two, "--master-port", str(free_port()), script, "--resume", folder / "3", cwd=cwd)
    assert printed_losses(again.stdout) == printed_losses(first.stdout)[3:]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(folder).items())
    alone = run_python(script, "--resume", folder / "3", "--batch-size", "4", cwd=cwd)
    assert len(printed_losses(alone.stdout)) == 3
    assert "2 processes saved this checkpoint, 1 go on with it" in alone.stderr


@pytest.mark.parametrize(("saved", "told"), [(1, "1 process saved"), (3, "3 processes saved")])
def test_other_number_of_processes_than_saved_is_told(saved, told, monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    RunState._put_back_random_states(SimpleNamespace(_stored={"random": [None] * saved}), leave=False)
    assert capsys.readouterr().err.startswith(f"{told} this checkpoint, 2 go on with it: dropout draws other numbers")


def test_random_states_that_are_put_back_give_the_same_numbers_again():
    def draw():
        return random.random(), random.gauss(0, 1), numpy.random.randn(), torch.rand(3).tolist()

    numpy.random.randn()  # an odd number of normal draws: one is kept for the next
    state = random_state()
    drawn = draw()
    put_back_random_state(state)
    assert draw() == drawn


@pytest.mark.slow
def test_state_of_deepspeeds_fused_half_precision_optimizer_cannot_be_kept(small_model, uncompiled_deepspeed):
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # over the process group that the model has made
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    unfused = FP16_UnfusedOptimizer(torch.optim.AdamW([weight]), low_precision_dtype=torch.bfloat16)
    fused = FP16_Optimizer(torch.optim.AdamW([weight]), low_precision_dtype=torch.bfloat16)
    assert can_be_kept(unfused)
    assert not can_be_kept(fused)


def test_momentum_of_muon_is_kept_without_zero_alone() -> None:
    class MuonWithAuxAdam:
        pass

    parts = [torch.zeros(4)]
    for inner, is_kept in ((MuonWithAuxAdam(), False), (torch.optim.Adam([torch.zeros(1)]), True)):
        assert can_be_kept(inner)
        assert can_be_kept(SimpleNamespace(optimizer=inner, single_partition_of_fp32_groups=parts)) == is_kept


# --- SAT's --load


@pytest.fixture(scope="module")
def plain_flags(upstream_checkpoint):
    """Flags of runs whose losses tell which rows were seen, and with which weights: no dropout, next to no rate."""
    return [
        "--from_pretrained", upstream_checkpoint, "--train-data", "dataset.json", "--use_lora", "--lr", "1e-12",
        "--auto_warmup_steps", "0", "--batch-size", "2", "--max_target_length", "64", "--num-workers", "0",
        "--hidden-dropout", "0", "--attention-dropout", "0", "--save", "none",
    ]  # fmt: skip


def run_script(*flags):
    done = run_python(PROJECT / "finetune_visualglm.py", *flags, cwd=GOLDEN / "upstream")
    assert done.returncode == 0, done.stdout + done.stderr
    return printed_losses(done.stdout)


@pytest.mark.run
def test_load_with_resume_dataloader_sees_the_rows_after_its_iteration_on_one_process(plain_flags, tmp_path):
    flags = [*plain_flags, "--train-iters", "8", "--save", tmp_path / "saved", "--save-interval", "4", "--holdout", "2"]
    whole = run_script(*flags, "--mode", "finetune")
    (folder,) = (tmp_path / "saved").iterdir()
    (folder / "latest").write_text("4")
    rest = run_script(*flags, "--mode", "pretrain", "--load", folder, "--resume-dataloader", "--eval-interval", "2")
    assert whole[:4] != whole[4:] == rest


@pytest.mark.run
def test_load_of_an_adapter_gives_the_loss_that_it_was_trained_to(plain_flags, tmp_path):
    tuned = write_tuned(plain_flags[1], tmp_path / "tuned", use_lora=True, lora_rank=4, lora_alpha=16.0)
    flags = [*plain_flags, "--mode", "finetune", "--train-iters", "1", "--save", "none"]
    assert (
        run_script(*flags, "--load", tuned) == run_script("--from_pretrained", tuned, *flags[2:]) != run_script(*flags)
    )


@pytest.mark.run
def test_auto_takes_the_last_iteration_of_a_run_that_saved_several(upstream_checkpoint, tmp_path):
    flags = (
        "--from_pretrained", upstream_checkpoint, "--use_lora", "--mode", "finetune", "--train-data", "dataset.json",
        "--save", tmp_path, "--save-interval", "4", "--num-workers", "0", "--summary-dir", tmp_path,
    )  # fmt: skip
    first = run_python(PROJECT / "finetune_visualglm.py", *flags, "--train-iters", "12", cwd=GOLDEN / "upstream")
    assert first.returncode == 0, first.stderr
    again = run_python(
        PROJECT / "finetune_visualglm.py", *flags, "--train-iters", "13", "--resume", "auto", cwd=GOLDEN / "upstream"
    )
    assert "after iteration 12." in again.stdout, again.stderr
