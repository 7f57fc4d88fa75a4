"""SAT's namespace for a command line, on a machine without a GPU, which SAT alone refuses."""

import importlib
import json

import pytest
import torch

from model import distributed, sat_compat
from model.cli.options import parse, script_parser
from model.training.sat_args import get_args

sat = sat_compat.import_sat()


@pytest.fixture
def sat_args(no_launcher, uncompiled_deepspeed):
    """Gives SAT's namespace for a command line."""

    def given(*argv):
        argv = ["--use_lora", "--mode", "finetune", "--train-iters", "4", "--train-data", "rows.json", *argv]
        with distributed.launcher_environment():
            return get_args(argv, parse(argv), script_parser())

    return given


def test_sats_own_get_args_without_a_gpu_refuses_to_train(no_launcher):
    argv = ["--use_lora", "--mode", "finetune", "--train-iters", "4", "--train-data", "rows.json"]
    with pytest.raises(ValueError, match="inconsistent"):
        sat.get_args(argv, parser=script_parser())


@pytest.mark.parametrize(
    ("flags", "iters", "epochs"), [([], 10_000, None), (["--epochs", "3"], None, 3), (["--train-iters", "7"], 7, None)]
)
def test_args_without_a_number_of_steps_have_sats_and_no_warning_of_it(
    no_launcher, uncompiled_deepspeed, monkeypatch, flags, iters, epochs
):
    told = []
    monkeypatch.setattr("sat.arguments.print_rank0", lambda message, **_: told.append(message))
    argv = ["--use_lora", "--mode", "finetune", "--train-data", "rows.json", *flags]
    with distributed.launcher_environment():
        args = get_args(argv, parse(argv), script_parser())
    assert (args.train_iters, args.epochs) == (iters, epochs)
    assert not [message for message in told if "iters" in message]


@pytest.mark.parametrize("flags", [[], ["--device", "0"], ["--distributed-backend", "nccl"]])
def test_args_without_a_gpu_are_for_the_cpu(sat_args, flags):
    assert sat_args(*flags).device == "cpu"


def test_args_with_fp16_without_a_gpu_are_float32(sat_args):
    args = sat_args("--fp16")
    assert args.fp16 is False
    assert args.bf16 is False
    assert args.deepspeed_config["fp16"]["enabled"] is False


@pytest.mark.parametrize("zero_stage", ["1", "2"])
def test_args_with_zero_and_no_precision_flag_are_float32(sat_args, zero_stage):
    args = sat_args("--zero-stage", zero_stage)
    assert (args.fp16, args.bf16) == (False, False)
    assert args.deepspeed_config["zero_optimization"]["stage"] == int(zero_stage)


def test_args_with_bf16_are_bf16(sat_args):
    args = sat_args("--zero-stage", "1", "--bf16")
    assert (args.fp16, args.bf16) == (False, True)


def test_args_hold_what_was_typed(sat_args):
    args = sat_args("--lr", "0.5", "--weight-decay", "0.2", "--batch-size", "7", "--gradient-accumulation-steps", "3")
    assert (args.lr, args.weight_decay, args.batch_size, args.gradient_accumulation_steps) == (0.5, 0.2, 7, 3)


@pytest.mark.parametrize(("flags", "interval"), [([], 1), (["--log-interval", "9"], 9)])
def test_args_report_every_step_unless_told_otherwise(sat_args, flags, interval):
    assert sat_args(*flags).log_interval == interval


def test_args_with_a_deepspeed_file_hold_the_files_values_and_the_typed_ones_it_leaves_open(sat_args, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": 2}}))
    args = sat_args("--deepspeed_config", str(file), "--batch-size", "2", "--lr", "0.5")
    assert (args.batch_size, args.lr, args.gradient_accumulation_steps) == (6, 0.5, 1)
    assert args.deepspeed_config["zero_optimization"] == {"stage": 2}


def test_args_with_a_deepspeed_file_that_asks_for_fp16_are_float32_without_a_gpu(sat_args, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"fp16": {"enabled": true, "min_loss_scale": 0.01}}')
    assert sat_args("--deepspeed_config", str(file)).fp16 is False


def scheduler(warmup):
    """An optimizer and SAT's schedule of 4 iterations at rate 1, of which the first is held down as in fine-tuning."""
    sat_compat.import_sat(training=True)
    training = importlib.import_module("sat.training.deepspeed_training")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, training.AnnealingLR(optimizer, 1.0, warmup * 4, 4, "constant", auto_warmup_steps=1)


def test_sats_schedule_with_warmup_0_divides_by_zero():
    with pytest.raises(ZeroDivisionError):
        scheduler(0)


def test_schedule_of_args_with_warmup_0_is_at_the_full_rate_after_that(sat_args):
    optimizer, schedule = scheduler(sat_args("--warmup", "0").warmup)
    schedule.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 1.0
