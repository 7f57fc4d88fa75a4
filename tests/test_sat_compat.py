"""Each adaptation of SAT and DeepSpeed: the obstacle as it is, and that it is gone.

Written for a machine without a GPU, where most of the obstacles are.
"""

import importlib
import json
import re
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import GOLDEN, load_model, run_python

from model import distributed, sat_compat
from model.checkpoints import weights
from model.cli.options import parse, script_parser
from model.errors import InputError
from model.training import deepspeed_config, sat_loop

sat = sat_compat.import_sat()

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the obstacle is there without a GPU only")

HIDE = "import sys; sys.modules['wandb'] = sys.modules['triton'] = None\n"  # as if they weren't installed
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def settings(zero_stage=0, **values):
    return deepspeed_config.deepspeed_settings(
        **{
            "zero_stage": zero_stage, "fp16": False, "bf16": False, "batch_size": 2, "gradient_accumulation_steps": 3,
            "lr": 1e-3, "weight_decay": 0.01, **values,
        }
    )  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
    """An environment without a launcher's variables; what a test sets is undone."""
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


# --- importing


@pytest.mark.run
def test_plain_import_of_sat_without_wandb_and_triton_fails():
    done = run_python("-c", HIDE + "import sat")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


IMPORTING = """
from model.errors import InputError
from model.sat_compat import import_sat
sat = import_sat(training=True)
assert import_sat() is sat is sys.modules["sat"]
stand_ins = [name for name in ("wandb", "triton") if sys.modules.get(name) is not None]
stand_ins += [name for name, module in sys.modules.items() if module and name.startswith("sat.") and not module.__spec__]
import sat.training.deepspeed_training as training
sentences = []
for use in (lambda: training.wandb.log({}), lambda: sat.model.GPT2Model(None)):
    try:
        use()
    except InputError as problem:
        sentences.append(str(problem))
print(stand_ins, *sentences, sep="\\n")
"""


@pytest.fixture(scope="module")
def imported():
    done = run_python("-c", HIDE + IMPORTING)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.run
def test_import_sat_without_wandb_and_triton_leaves_no_stand_in_behind(imported):
    assert imported.stdout.splitlines()[0] == "[]"


@pytest.mark.run
def test_what_was_left_out_of_sat_fails_with_a_sentence_when_used(imported):
    assert imported.stdout.splitlines()[1:] == [
        "--wandb is not available here: wandb was left out when SAT was imported.",
        "SAT's GPT2Model is not available here: sat.model.official.gpt2_model was left out when SAT was imported.",
    ]


@pytest.mark.run
def test_import_sat_logs_nothing(imported):
    assert "INFO" not in imported.stderr
    assert "WARNING" not in imported.stderr


def test_quieten_leaves_warnings_and_errors(monkeypatch):
    import logging

    monkeypatch.delenv("SAT_LOGLEVEL", raising=False)
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    loggers = {name: logging.getLogger(name) for name in ("sat", "DeepSpeed")}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        sat_compat.quieten()
        assert not loggers["sat"].isEnabledFor(logging.INFO)
        assert loggers["sat"].isEnabledFor(logging.WARNING)
        assert not loggers["DeepSpeed"].isEnabledFor(logging.INFO)
        assert loggers["DeepSpeed"].isEnabledFor(logging.ERROR)
        monkeypatch.setenv("SAT_LOGLEVEL", "debug")
        sat_compat.quieten()
        assert loggers["sat"].isEnabledFor(logging.DEBUG)
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])


# --- starting


@pytest.mark.run
def test_deepspeed_without_a_launcher_refuses_to_start(upstream_checkpoint, alone):
    import deepspeed

    load_model(upstream_checkpoint)  # sets up a process group

    with pytest.raises(AssertionError, match="LOCAL_RANK"):
        deepspeed.initialize(model=torch.nn.Linear(1, 1), config=settings())


def test_launcher_environment_of_a_plain_run_is_one_process_with_a_free_port(alone, monkeypatch):
    import os
    import socket

    distributed.set_launcher_environment()
    found = {name: os.environ[name] for name in LAUNCHER}
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_launcher_environment_of_a_launcher_is_kept(alone, monkeypatch):
    import os

    launched = dict(zip(LAUNCHER[:3], ("3", "1", "4"), strict=True))
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    distributed.set_launcher_environment()
    assert {name: os.environ.get(name) for name in LAUNCHER} == {
        **launched, "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": None, "MASTER_PORT": None,
    }  # fmt: skip


# --- DeepSpeed's settings


def validated(config):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(str(config) if isinstance(config, Path) else config)


def test_sats_own_deepspeed_file_is_refused_by_deepspeed():
    bundled = Path(sat.__file__).parent / "training/deepspeed_zero0.json"
    with pytest.raises(ValueError, match="min_loss_scale"):
        validated(bundled)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_settings_of_each_stage_are_taken_by_deepspeed_with_sats_values(zero_stage):
    config = validated(settings(zero_stage))
    bundled = json.loads((Path(sat.__file__).parent / f"training/deepspeed_zero{zero_stage}.json").read_text())
    assert config.gradient_clipping == bundled["gradient_clipping"] == 0.1
    assert config.zero_optimization_stage == zero_stage
    assert config.train_micro_batch_size_per_gpu == 2
    assert config.gradient_accumulation_steps == 3
    assert config.optimizer_name == bundled["optimizer"]["type"].lower() == ("adam" if zero_stage else "adamw")
    adam = {key: value for key, value in config.optimizer_params.items() if key != "torch_adam"}
    released = bundled["optimizer"]["params"]
    assert adam == {**released, "lr": 1e-3, "weight_decay": 0.01}
    if zero_stage:
        assert (adam["betas"], adam["eps"]) == ([0.9, 0.95], 1e-8)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_settings_have_every_value_of_sats_files_but_the_invalid_one(zero_stage):
    bundled = json.loads((Path(sat.__file__).parent / f"training/deepspeed_zero{zero_stage}.json").read_text())
    ours = settings(zero_stage)
    fp16 = {key: value for key, value in bundled["fp16"].items() if key not in ("enabled", "min_loss_scale")}
    assert {key: ours["fp16"][key] for key in fp16} == fp16
    zero = bundled.get("zero_optimization", {})
    assert {
        key: ours["zero_optimization"].get(key, False) for key in zero
    } == zero  # DeepSpeed's default of a switch is off


@pytest.mark.parametrize(("flag", "enabled"), [("fp16", (True, False)), ("bf16", (False, True))])
def test_settings_turn_on_the_precision_asked_for(flag, enabled):
    ours = settings(1, **{flag: True})
    assert (ours["fp16"]["enabled"], ours["bf16"]["enabled"]) == enabled


def test_completed_settings_fill_what_the_file_leaves_out():
    defaults = settings()
    completed = deepspeed_config.completed_settings({"zero_optimization": {"stage": 2}}, defaults)
    assert completed["zero_optimization"] == {"stage": 2}
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer"):
        assert completed[key] == defaults[key]
    validated(completed)


def test_completed_settings_fill_what_the_file_leaves_to_auto():
    own = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    completed = deepspeed_config.completed_settings(own, settings())
    assert (completed["train_micro_batch_size_per_gpu"], completed["gradient_clipping"]) == (2, 0.1)


def test_completed_settings_keep_the_files_own_values():
    own = {"gradient_clipping": 1.0, "gradient_accumulation_steps": 7, "train_micro_batch_size_per_gpu": 5}
    completed = deepspeed_config.completed_settings(own, settings())
    assert {key: completed[key] for key in own} == own


def test_completed_settings_of_sats_own_file_are_taken_by_deepspeed():
    own = json.loads((Path(sat.__file__).parent / "training/deepspeed_zero0.json").read_text())
    completed = deepspeed_config.completed_settings(own, settings())
    assert completed["fp16"]["min_loss_scale"] == 1
    assert own["fp16"]["min_loss_scale"] == 0.01
    validated(completed)


@without_gpu
def test_completed_settings_take_torchs_adam_where_deepspeeds_would_be_compiled():
    completed = deepspeed_config.completed_settings({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, settings())
    assert completed["optimizer"] == {"type": "Adam", "params": {"lr": 1.0, "torch_adam": True}}


# --- SAT's namespace


@pytest.fixture
def sat_args(alone):
    """Gives SAT's namespace for a command line."""

    def given(*argv):
        argv = ["--use_lora", "--mode", "finetune", "--train-iters", "4", "--train-data", "rows.json", *argv]
        distributed.set_launcher_environment()
        return sat_loop.get_args(argv, parse(argv), script_parser())

    return given


@without_gpu
def test_sats_own_get_args_without_a_gpu_refuses_to_train(alone):
    argv = ["--use_lora", "--mode", "finetune", "--train-iters", "4", "--train-data", "rows.json"]
    with pytest.raises(ValueError, match="inconsistent"):
        sat.get_args(argv, parser=script_parser())


@without_gpu
@pytest.mark.parametrize("flags", [[], ["--device", "0"], ["--distributed-backend", "nccl"]])
def test_args_without_a_gpu_are_for_the_cpu(sat_args, flags):
    assert sat_args(*flags).device == "cpu"


@without_gpu
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


@without_gpu
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


def test_parallel_output_given_twice_is_a_type_error_in_sat(upstream_config):
    from sat.model import ChatGLMModel

    args = ChatGLMModel.get_args(**upstream_config)
    with pytest.raises(TypeError, match="parallel_output"):
        ChatGLMModel(args, parallel_output=True)


def test_parallel_output_once_moves_it_into_args():
    args, kwargs = SimpleNamespace(parallel_output=False), {"parallel_output": True, "params_dtype": torch.float16}
    assert sat_compat.parallel_output_once(args, kwargs) == {"params_dtype": torch.float16}
    assert args.parallel_output is True
    assert kwargs["parallel_output"] is True


def test_parallel_output_once_leaves_args_alone_when_it_is_not_given():
    args = SimpleNamespace(parallel_output=False)
    assert sat_compat.parallel_output_once(args, {"params_dtype": torch.float16}) == {"params_dtype": torch.float16}
    assert args.parallel_output is False


# --- training


def sat_timers():
    """SAT's module of timers, as it is imported."""
    return types.SimpleNamespace(Timers=importlib.import_module("sat.training.utils").Timers)


@without_gpu
def test_sats_timers_without_a_gpu_fail():
    with pytest.raises((AssertionError, RuntimeError)):
        sat_timers().Timers()("step").start()


@without_gpu
def test_timers_without_a_gpu_measure_without_asking_it():
    import time

    training = sat_timers()
    sat_loop.synchronize_only_with_gpu(training)
    timer = training.Timers()("step")
    timer.start()
    time.sleep(0.02)
    timer.stop()
    assert 0.02 <= timer.elapsed(reset=True) < 2
    assert timer.elapsed() == 0


@without_gpu
def test_timers_of_one_name_are_one_timer():
    training = sat_timers()
    sat_loop.synchronize_only_with_gpu(training)
    timers = training.Timers()
    assert timers("step") is timers("step")
    assert timers("step") is not timers("data loader")


def test_broadcast_data_to_a_group_of_one_is_the_data(upstream_checkpoint):
    load_model(upstream_checkpoint)  # sets up SAT's groups
    data = {"a": torch.tensor([1, 2], dtype=torch.int32), "b": torch.tensor([[3]])}
    received = sat_compat.broadcast_data(("a", "b"), data, torch.int64, "cpu")
    assert {key: tensor.tolist() for key, tensor in received.items()} == {"a": [1, 2], "b": [[3]]}
    assert {tensor.dtype for tensor in received.values()} == {torch.int64}


@without_gpu
def test_sats_own_broadcast_data_without_a_gpu_fails(upstream_checkpoint):
    load_model(upstream_checkpoint)
    with pytest.raises((AssertionError, RuntimeError)):
        sat.mpu.broadcast_data(["a"], {"a": torch.tensor([1])}, torch.int64)


# Two processes that share one model: only the first has data.
TWO_PROCESSES = """
import json, os, pathlib, sys, types
import torch
from model.sat_compat import broadcast_data, import_sat
import_sat()
from sat import mpu
from model.training.step import get_batch

torch.distributed.init_process_group("gloo")
mpu.initialize_model_parallel(2)
rank = mpu.get_model_parallel_rank()
data = {"a": torch.tensor([1, 2]), "b": torch.tensor([[3.0], [4.0]])} if rank == 0 else {}
whole = broadcast_data(("a",), data, torch.int64, "cpu")
real = broadcast_data(("b",), data, torch.float32, "cpu")
batches = iter([{
    "input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, 6]]), "image": torch.full((1, 3, 2, 2), 0.5),
    "pre_image": 3,
}])
args = types.SimpleNamespace(device="cpu", fp16=False, bf16=True)
timers = lambda _: types.SimpleNamespace(start=lambda: None, stop=lambda: None)
input_ids, labels, image, pre_image = get_batch(batches if rank == 0 else None, args, timers)
found = [
    whole["a"].tolist(), real["b"].tolist(), input_ids.tolist(), labels.tolist(), image.flatten().tolist(),
    str(image.dtype), pre_image,
]
pathlib.Path(sys.argv[1], str(rank)).write_text(json.dumps(found))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.run
@without_gpu
def test_data_and_batches_reach_both_processes_that_share_a_model(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_python(*launcher, tmp_path / "two.py", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [[1, 2], [[3.0], [4.0]], [[5, 6]], [[-100, 6]], [0.5] * 12, "torch.bfloat16", 3]
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [expected, expected]


@without_gpu
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


def test_run_that_would_overwrite_an_earlier_one_is_saved_beside_it(upstream_checkpoint, tmp_path):
    load_model(upstream_checkpoint)  # sets up a process group
    saved = []
    for _ in range(3):
        args = SimpleNamespace(save=str(tmp_path / "run-11-22-10-46"))
        sat_loop.save_beside_earlier_runs(args, None)
        Path(args.save).mkdir()
        saved.append(Path(args.save).name)
    assert saved == ["run-11-22-10-46", "run-11-22-10-46-2", "run-11-22-10-46-3"]


def test_run_that_saves_nothing_needs_no_place():
    args = SimpleNamespace(save=None)
    sat_loop.save_beside_earlier_runs(args, None)
    assert args.save is None


def test_safe_checkpoint_types_let_numpys_random_state_through(tmp_path):
    torch.save(numpy.random.get_state(), tmp_path / "state")
    with torch.serialization.safe_globals(weights.safe_checkpoint_types()):
        name, keys, *_ = torch.load(tmp_path / "state", weights_only=True)
    assert name == "MT19937"
    assert numpy.array_equal(keys, numpy.random.get_state()[1])


OPTIMIZING = """
import sys, torch
from model.training import sat_loop
parameter = torch.nn.Parameter(torch.ones(2))
if sys.argv[1:]:
    sat_loop.without_compiler()
optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 0.1}])
parameter.grad = torch.tensor([1.0, -2.0])
optimizer.step()
print("torch._dynamo" in sys.modules, parameter.requires_grad, parameter.tolist())
"""


@pytest.mark.run
def test_optimizer_step_is_the_same_without_torchs_compiler():
    plain, without = (run_python("-c", OPTIMIZING, *words).stdout.split(maxsplit=1) for words in ((), ("without",)))
    assert (plain[0], without[0]) == ("True", "False")
    assert plain[1] == without[1]


def test_placeholder_names_what_needs_it():
    module = sat_compat._placeholder("wandb", "--wandb", "log")
    with pytest.raises(InputError, match="--wandb is not available"):
        module.log({})


# --- one whole run: ZeRO 1, neither wandb nor triton, nothing to compile with

RUN = (
    HIDE
    + """
import finetune_visualglm
from model.training import metrics as report
watch = report.TrainingReport.watch

def telling_watch(self, scheduler, optimizer):
    inner = optimizer.optimizer
    group = inner.param_groups[0]
    module = type(inner).__module__.split(".")[0]
    print("optimizer", module, type(inner).__name__, *group["betas"], group["eps"], group["weight_decay"])
    watch(self, scheduler, optimizer)

report.TrainingReport.watch = telling_watch
finetune_visualglm.main(sys.argv[1:])
"""
)


@pytest.fixture(scope="module")
def run(upstream_checkpoint, tmp_path_factory):
    """A run of six steps with ZeRO 1, evaluated once: what it printed, and where it may have left files."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "extensions").mkdir()
    (folder / "bin").mkdir()
    done = run_python(
        "-c", RUN, "--from_pretrained", upstream_checkpoint, "--use_lora", "--lora_rank", "4", "--mode", "finetune",
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
@without_gpu
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
        r"  transformer\S+ \[\d+, \d+\]",
        r"step \d/6  loss \S+  lr \S+  \S+ samples/s  .* left",
        r".*: validation loss \S+, perplexity \S+",
        r"Saved .* \(iteration 6\)\.",
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


def test_importing_the_module_imports_neither_torch_nor_sat():
    done = run_python("-c", "import sys, model.sat_compat; print({'torch', 'sat', 'deepspeed'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr
    assert sys.modules["sat"] is sat
