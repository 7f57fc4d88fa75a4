"""DeepSpeed's settings: SAT's own as they are refused, and ours as they are taken."""

import json
from pathlib import Path

import pytest
import torch

from model import distributed
from model.checkpoints.save import save_checkpoint
from model.checkpoints.weights import load_checkpoint
from model.cli.options import parse, script_parser
from model.cli.preflight import deepspeed_notes
from model.errors import InputError
from model.sat_compat import import_sat
from model.training import deepspeed_config, sat_loop
from model.training.metrics import TrainingReport
from model.training.sat_args import get_args

sat = import_sat()


def settings(zero_stage=0, **values):
    return deepspeed_config.deepspeed_settings(
        **{
            "zero_stage": zero_stage, "fp16": False, "bf16": False, "batch_size": 2, "gradient_accumulation_steps": 3,
            "lr": 1e-3, "weight_decay": 0.01, **values,
        }
    )  # fmt: skip


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


@pytest.mark.parametrize("gpu", [False, True])
def test_completed_settings_take_torchs_adam_where_deepspeeds_would_be_compiled(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    completed = deepspeed_config.completed_settings({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, settings())
    assert completed["optimizer"] == {"type": "Adam", "params": {"lr": 1.0, "torch_adam": True}}
    own = {"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}
    assert deepspeed_config.completed_settings(own, settings())["optimizer"] == own["optimizer"]


def test_file_without_clipping_still_lets_deepspeed_take_the_norm_and_changes_no_gradient():
    completed = deepspeed_config.completed_settings({"gradient_clipping": 0}, settings())
    assert completed["gradient_clipping"] > 0
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = gradient = torch.tensor([3e8, 1e-8, -0.3])
    torch.nn.utils.clip_grad_norm_([parameter], completed["gradient_clipping"])
    assert torch.equal(gradient, torch.tensor([3e8, 1e-8, -0.3]))


def test_file_that_switches_the_look_at_bf16_gradients_off_doesnt():
    own = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    assert deepspeed_config.completed_settings(own, settings())["bf16"]["check_grad_overflow"] is True


# --- a file of the user's


MICRO, PARAMS = "train_micro_batch_size_per_gpu", {"lr": 1e-4}
ODD = [
    {MICRO: -1}, {MICRO: 0}, {MICRO: "4"}, {MICRO: 2.5}, {MICRO: [4]}, {MICRO: True}, {"gradient_accumulation_steps": -2},
    {"gradient_accumulation_steps": "two"}, {"train_batch_size": -8}, {"train_batch_size": 7}, {"train_batch_size": "auto"},
    {"gradient_clipping": "a little"}, {"gradient_clipping": -1}, {"gradient_clipping": [1]}, {"steps_per_print": 0},
    {"steps_per_print": "never"}, {"fp16": "on"}, {"fp16": {"enabled": "yes"}}, {"fp16": None}, {"bf16": []},
    {"bf16": {"enabled": 1}}, {"fp16": {"enabled": False, "loss_scale": "dynamic"}},
    {"fp16": {"enabled": False, "initial_scale_power": -3}}, {"fp16": {"enabled": False, "min_loss_scale": "x"}},
    {"optimizer": "Adam"}, {"optimizer": []}, {"optimizer": {"type": 7}}, {"optimizer": {"type": "Adom"}},
    {"optimizer": {"type": "Adam", "params": None}}, {"optimizer": {"type": "Adam", "params": {"lr": "fast"}}},
    {"optimizer": {"type": "Adam", "params": {"lr": -1}}}, {"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}},
    {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 2]}}},
    {"optimizer": {"type": "Adam", "params": PARAMS | {"eps": 0}}}, {"optimizer": {"type": "SGD", "params": {"betas": [0, 0]}}},
    {"optimizer": {"type": "Adam", "params": PARAMS | {"speed": 1}}}, {"zero_optimization": {"stage": 7}},
    {"zero_optimization": {"stage": "2"}}, {"zero_optimization": {"stage": True}}, {"zero_optimization": None},
    {"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}, {"zero_optimization": {"stage": 1, "unknown": 1}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, {"scheduler": "fast"}, {"scheduler": {"type": "None"}},
    {"tensorboard": 3}, {"flops_profiler": "yes"}, {"activation_checkpointing": []}, {"data_types": {"grad_accum_dtype": 9}},
    {"communication_data_type": "int3"}, {"compression_training": {"weight_quantization": 4}}, {"amp": {"enabled": "x"}},
]  # fmt: skip
TAKEN = [
    {"optimizer": {"params": {"lr": 1e-4}}},
    {}, {MICRO: "auto", "gradient_accumulation_steps": None}, {"train_batch_size": 4},
    {"optimizer": {"type": "Adam", "params": {"lr": "auto", "weight_decay": "auto", "betas": "auto"}}},
    {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}, {"zero_optimization": {"stage": 2}},
    {"gradient_clipping": 1, "wall_clock_breakdown": False}, {"bf16": {"enabled": True}},
]  # fmt: skip


@pytest.fixture
def checked(tmp_path, no_launcher):
    """Has a DeepSpeed file checked as a run does, before it loads a model."""
    import_sat(training=True)

    def of(settings):
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(settings))
        argv = ["--use_lora", "--train-iters", "4", "--train-data", "rows.json", "--deepspeed_config", str(file)]
        options = parse(argv)
        deepspeed_notes(options)
        with (
            distributed.launcher_environment(),
            sat_loop.adapted(sat_loop.Hooks(load_checkpoint, save_checkpoint, TrainingReport())),
        ):
            get_args(argv, options, script_parser())

    return of


@pytest.mark.parametrize("settings", ODD, ids=str)
def test_odd_deepspeed_file_is_a_sentence(checked, settings):
    with pytest.raises(InputError, match=r"ds\.json.*needed"):
        checked(settings)


def test_odd_settings_within_a_section_are_named_with_what_is_meant(checked):
    with pytest.raises(InputError) as refused:
        checked({"zero_optimization": {"stage": 2, "overlap_com": True, "qqq": 1, "round_robin_gradients": "x"}})
    assert (
        "(zero_optimization.round_robin_gradients: Input should be a valid boolean, unable to interpret input; "
        "zero_optimization.overlap_com: there is no such setting, did you mean overlap_comm?; "
        "zero_optimization.qqq: there is no such setting); settings"
    ) in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"fp16": {"enabled": False}, "zero_optimization": {"stage": 1, "enabled": True}},
            "zero_optimization.enabled: there is no such setting",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"ratio": 0.3}}},
            "zero_optimization: Assertion failed, Partial offloading only supported for ZeRO Stage 3.",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"ratoi": 0.3}}},
            "zero_optimization.offload_optimizer.ratoi: there is no such setting",
        ),
        (
            {"_comment": "", "fp16": {"enabled": False, "_comment": ""}},
            "fp16._comment: there is no such setting",
        ),
        ({"comms_logger": {"enabld": True}}, "comms_logger.enabld: there is no such setting, did you mean enabled?"),
        ({"tensorboard": {"enabld": True}}, "tensorboard.enabld: there is no such setting"),
    ],
    ids=str,
)
def test_odd_setting_is_told_with_its_own_section_and_no_setting_of_another(checked, settings, told):
    with pytest.raises(InputError) as refused:
        checked(settings)
    assert f"DeepSpeed can't use it ({told}); settings" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("settings", TAKEN, ids=str)
def test_good_deepspeed_file_is_taken(checked, settings):
    checked(settings)
