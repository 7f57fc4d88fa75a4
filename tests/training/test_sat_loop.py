"""SAT's loop with our parts in it: each obstacle as it is, that it is gone, and that all is put back afterwards."""

import importlib
import inspect
import re
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import (
    GOLDEN,
    PROJECT,
    few_shot_dataset,
    load_model,
    printed_losses,
    run_program,
    run_python,
    upstream_weights,
    write_checkpoint,
)  # fmt: skip

from model import sat_compat
from model.checkpoints.save import save_checkpoint
from model.checkpoints.weights import load_checkpoint
from model.data.dataset import data_collator
from model.errors import InputError
from model.training import sat_loop
from model.training.metrics import TrainingReport

sat = sat_compat.import_sat()


def sat_timers():
    """SAT's module of timers, as it is imported."""
    return importlib.import_module("sat.training.utils").Timers


def test_sats_timers_without_a_gpu_fail():
    with pytest.raises((AssertionError, RuntimeError)):
        sat_timers()()("step").start()


def test_timers_measure_without_asking_a_gpu(monkeypatch):
    import time

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("waits for the device"))
    timer = sat_loop.timers_without_waiting(sat_timers())()("step")
    timer.start()
    time.sleep(0.02)
    timer.stop()
    assert 0.02 <= timer.elapsed(reset=True) < 2
    assert timer.elapsed() == 0


def test_timers_of_one_name_are_one_timer():
    timers = sat_loop.timers_without_waiting(sat_timers())()
    assert timers("step") is timers("step")
    assert timers("step") is not timers("data loader")


def test_pinning_without_a_gpu_warns_of_nothing():
    from torch.utils.data import DataLoader

    def pinning_warnings():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if adapt:
                sat_loop.silence_known_warnings()
            list(DataLoader([1, 2], pin_memory=True))
        return [str(warning.message) for warning in caught if "pin_memory" in str(warning.message)]

    adapt = False
    assert pinning_warnings()
    adapt = True
    assert not pinning_warnings()


@pytest.mark.parametrize(
    ("text", "function"),
    [
        (
            "model_parallel_size > 1 but torch.distributed is not initialized via SAT.",
            "sat.arguments.initialize_distributed",
        ),
        ("barrier(): using the device under current context. ", "torch.distributed.distributed_c10d.barrier"),
    ],
)
def test_warning_that_no_user_can_change_is_not_shown(text, function):
    module, _, name = function.rpartition(".")
    assert text in inspect.getsource(getattr(importlib.import_module(module), name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sat_loop.silence_known_warnings()
        warnings.warn(text, stacklevel=1)
    assert not caught


def test_run_that_would_overwrite_an_earlier_one_is_saved_beside_it(upstream_checkpoint, tmp_path):
    load_model(upstream_checkpoint)  # sets up a process group
    saved = []
    for _ in range(3):
        args = SimpleNamespace(save=str(tmp_path / "run-11-22-10-46"))
        sat_loop.save_beside_earlier_runs(args, None)
        assert list(Path(args.save).iterdir()) == []
        saved.append(Path(args.save).name)
    assert saved == ["run-11-22-10-46", "run-11-22-10-46-2", "run-11-22-10-46-3"]


def test_run_whose_folder_cant_be_made_is_a_sentence(upstream_checkpoint, tmp_path):
    load_model(upstream_checkpoint)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--save: .*/file can't be made .*; a folder of your own is needed\.$"):
        sat_loop.save_beside_earlier_runs(SimpleNamespace(save=str(tmp_path / "file" / "run")), None)


def test_run_that_saves_nothing_needs_no_place():
    args = SimpleNamespace(save=None)
    sat_loop.save_beside_earlier_runs(args, None)
    assert args.save is None


@pytest.mark.run
@pytest.mark.long
def test_optimizer_step_is_the_same_without_torchs_compiler():
    plain, without = (run_program("optimize", *words).stdout.split(maxsplit=1) for words in ((), ("without",)))
    assert (plain[0], without[0]) == ("True", "False")
    assert plain[1] == without[1]


@pytest.fixture(scope="module")
def run(upstream_checkpoint, tmp_path_factory):
    """A run of six steps with ZeRO 1, evaluated once: what it printed, and where it may have left files."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "extensions").mkdir()
    (folder / "bin").mkdir()
    done = run_program(
        "train_and_tell_the_optimizer", "--from_pretrained", upstream_checkpoint, "--use_lora", "--lora_rank", "4", "--mode", "finetune",
        "--train-data", "dataset.json", "--valid-data", "dataset.json", "--split", "1", "--eval-interval", "3",
        "--eval-iters", "1", "--train-iters", "6", "--batch-size", "2", "--max_source_length", "64",
        "--max_target_length", "64", "--zero-stage", "1", "--lr", "1e-3", "--lr-decay-style", "constant",
        "--warmup", "0", "--auto_warmup_steps", "2", "--save", folder / "saved", "--summary-dir", folder,
        cwd=GOLDEN / "upstream", TORCH_EXTENSIONS_DIR=str(folder / "extensions"), CXX=str(folder / "bin/none"),
        PATH=str(folder / "bin"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(folder=folder, out=done.stdout, err=done.stderr)


@pytest.mark.run
def test_run_without_a_compiler_compiles_nothing(run):
    assert not list((run.folder / "extensions").rglob("*"))


@pytest.mark.run
def test_run_with_zero_1_and_no_precision_flag_saves_float32(run):
    (saved,) = (run.folder / "saved").glob("*/6/mp_rank_00_model_states.pt")
    weights = torch.load(saved)["module"]
    assert {tensor.dtype for name, tensor in weights.items() if "inv_freq" not in name} == {torch.float32}


@pytest.mark.run
def test_run_with_zero_1_is_optimised_by_torchs_adamw_with_sats_values(run):
    assert "optimizer torch AdamW 0.9 0.95 1e-08 0.01" in run.out.splitlines()


@pytest.mark.run
def test_run_holds_the_rate_at_a_twentieth_for_the_first_steps_only(run):
    rates = re.findall(r"^step \d/6  loss \S+  lr (\S+)  ", run.out, re.MULTILINE)
    assert rates == ["5.00e-05"] * 2 + ["1.00e-03"] * 4


@pytest.mark.run
def test_run_prints_nothing_but_what_is_for_a_person(run):
    known = (
        r"dataset\.json: 6 rows",
        r"WARNING: dataset\.json is given for training and for evaluation: .*",
        r"--eval-iters is not used: .*",
        r"Training on 6 samples: 6 steps of \d+ see \d+ samples, .*",
        r"The first 2 steps use at most 5 % of --lr .*",
        r"Trainable, [\d,]+ of [\d,]+ parameters in 24 tensors:",
        r"  transformer\S+: \d+ tensors \[\d+, \d+\], layers \d+( to)? \d+",
        r"step \d/6  loss \S+  lr \S+  \S+ samples/s  .* left",
        r".*: validation loss \S+, perplexity \S+",
        r"Saved .* \(iteration 6\)\.",
        r"Answering 6 training rows, and again at the end \(--answers 0: none\)\.",
        r"Of 6 training rows, answers right: before \d/6, after \d/6; ROUGE-L \S+, then \S+; .* changed\.",
        r"Report: \S+/report\.html",
        r"optimizer .*",  # this test's own
    )
    unknown = [line for line in run.out.splitlines() if not any(re.fullmatch(one, line) for one in known)]
    assert unknown == []
    assert run.err == ""


@pytest.mark.run
def test_run_evaluates_where_it_was_told_to(run):
    lines = [line for line in run.out.splitlines() if line.startswith("step") or "validation loss" in line]
    assert ["validation loss" in line for line in lines[:4]] == [False, False, False, True]
    assert lines[3].startswith("iteration 3: ")


# --- all is put back


def hooks() -> sat_loop.Hooks:
    return sat_loop.Hooks(load_checkpoint, save_checkpoint, TrainingReport())


def test_every_replacement_has_a_reason_and_an_owner_that_has_the_attribute():
    for owner, name, value, reason in sat_loop.replacements(hooks()):
        assert reason, name
        assert hasattr(owner, name) or name in ("__dynamo_disable", "exit"), (owner, name)  # exit is Python's own
        assert getattr(owner, name, None) is not value, name


def test_processes_of_a_run_wait_as_long_as_its_hooks_say_and_torchs_limit_is_as_before_afterwards():
    limit = torch.distributed.distributed_c10d._get_default_timeout
    before = [limit(backend) for backend in ("nccl", "gloo")]
    hooks = sat_loop.Hooks(lambda *_: 0, lambda *_: None, TrainingReport(), longest_wait=timedelta(days=7))
    with sat_loop.adapted(hooks):
        assert [limit(backend) for backend in ("nccl", "gloo")] == [timedelta(days=7)] * 2
    assert [limit(backend) for backend in ("nccl", "gloo")] == before


def test_what_is_replaced_for_a_run_is_as_before_afterwards():
    def found():
        return [vars(owner).get(name) for owner, name, _, _ in table]

    table = sat_loop.replacements(hooks())
    before, filters = found(), list(warnings.filters)
    with sat_loop.adapted(hooks()):
        assert all(one is not other for one, other in zip(found(), before, strict=True))
    assert found() == before
    assert list(warnings.filters) == filters


def test_what_is_replaced_is_put_back_after_an_error():
    sat_compat.import_sat(training=True)
    loop = importlib.import_module("sat.training.deepspeed_training")
    before = loop.save_checkpoint

    def fails_in_a_run():
        with sat_loop.adapted(hooks()):
            assert loop.save_checkpoint is save_checkpoint
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_in_a_run()
    assert loop.save_checkpoint is before


@pytest.mark.run
def test_main_three_times_in_one_process_trains_each_time_as_the_first(upstream_checkpoint):
    done = run_program(
        "main_three_times", "--from_pretrained", upstream_checkpoint, "--mode", "finetune", "--train-data",
        GOLDEN / "upstream/dataset.json", "--train-iters", "3", "--hidden-dropout", "0", "--attention-dropout", "0",
        "--num-workers", "0", "--auto_warmup_steps", "0", "--save", "none", cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *losses, environment = done.stdout.split("== ")[1:]
    lora, ptuning, again = map(printed_losses, losses)
    assert len(lora) == len(ptuning) == 3
    assert lora == again != ptuning
    assert environment.strip() == "the environment is as before"


@pytest.mark.run
@pytest.mark.gpu
def test_script_in_the_manner_of_2023_trains_as_ours_does(upstream_checkpoint, tmp_path):
    flags = (
        "--mode", "finetune", "--train-iters", "3", "--train-data", "dataset.json", "--max_source_length", "64",
        "--max_target_length", "64", "--lora_rank", "4", "--hidden-dropout", "0", "--attention-dropout", "0", "--use_lora",
        "--num-workers", "0", "--batch-size", "2",
    )  # fmt: skip
    theirs = run_program(
        "script_of_2023", upstream_checkpoint, *flags, "--split", "1", "--log-interval", "1", "--save", tmp_path,
        cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    ours = run_python(
        PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, *flags, "--save", "none",
        cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert printed_losses(theirs.stdout) == pytest.approx(printed_losses(ours.stdout), abs=1e-4)
    assert len(printed_losses(ours.stdout)) == 3
    (saved,) = tmp_path.glob("*/3/mp_rank_00_model_states.pt")
    assert len(torch.load(saved)["module"]) == 24


LOAD_AS_IN_2023 = """
from model.training import sat_loop; sat_loop.stay_adapted()
import argparse, sys
from sat.model import AutoModel
from sat.training.model_io import load_checkpoint
from model import VisualGLMModel
args = argparse.Namespace(fp16=False, skip_init=True, use_gpu_initialization=False, device="cpu")
model, args = AutoModel.from_pretrained(sys.argv[1], args=args)
load_checkpoint(model, args, load_path=sys.argv[1])
print(type(model) is VisualGLMModel)
"""


@pytest.mark.run
def test_sats_own_loaders_take_a_released_checkpoint_after_stay_adapted(upstream_config, tmp_path):
    folder = write_checkpoint(tmp_path / "released", upstream_config, {})
    released = {"module": upstream_weights(), "np_rng_state": numpy.random.get_state()}
    torch.save(released, folder / "1" / "mp_rank_00_model_states.pt")
    done = run_python("-c", LOAD_AS_IN_2023, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.usefixtures("small_model")
def test_loaders_of_a_script_of_2023_pad_for_its_own_collator_and_leave_ours_alone():
    args = SimpleNamespace(
        train_data=[str(GOLDEN / "upstream/dataset.json")], valid_data=None, test_data=None, train_data_weights=None,
        split="1", batch_size=6, eval_batch_size=6, gradient_accumulation_steps=1, epochs=1, seed=1234, num_workers=0,
        iterable_dataset=False, iterable_dataset_eval=False, batch_from_same_dataset=False,
    )  # fmt: skip
    sat_compat.import_sat(training=True)
    loop = importlib.import_module("sat.training.deepspeed_training")

    def lengths(examples):
        return [len(example["input_ids"]) for example in examples]

    def first_batch(collate_fn):
        return next(iter(loop.make_loaders(args, lambda path, _: few_shot_dataset(path), collate_fn=collate_fn)[0]))

    with sat_loop.adapted(hooks()):
        padded, ours = first_batch(lengths), first_batch(data_collator)
    assert {*padded} == {ours["input_ids"].shape[1]}
    assert len({length for _, length in ours["rows"]}) > 1


def test_rate_after_the_decay_ends_stays_at_0(no_launcher):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    args = SimpleNamespace(
        lr=0.01,
        lr_decay_iters=5,
        train_iters=12,
        mode="finetune",
        warmup=0.01,
        lr_decay_style="linear",
        lr_decay_ratio=0.1,
    )
    hooks = sat_loop.Hooks(load_checkpoint, save_checkpoint, TrainingReport(), auto_warmup_steps=0)
    with sat_loop.adapted(hooks):
        schedule = importlib.import_module("sat.training.deepspeed_training").get_learning_rate_scheduler(
            optimizer, 0, args
        )
        rates = []
        for _ in range(12):
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.01 * (5 - 2 + 0.05) / 5)  # SAT's line, which starts at its second point
    assert rates[5:] == [0.0] * 7
