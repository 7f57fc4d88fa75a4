"""DeepSpeed's settings for a run, SAT's values or a user's own file completed, and four mends of its engine.

The mends are listed in the table of `model.training.sat_loop`. torch and DeepSpeed are imported where they are needed.
"""

import copy
import difflib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from model.errors import InputError

MOST_OF_A_REASON = 400  # characters

NO_CLIPPING = 1e30  # a norm that no gradient has: every gradient is multiplied by exactly 1


def deepspeed_settings(
    *,
    zero_stage: int,
    fp16: bool,
    bf16: bool,
    batch_size: int,
    gradient_accumulation_steps: int,
    lr: float,
    weight_decay: float,
) -> dict[str, Any]:
    """DeepSpeed's settings for a run: the values of SAT's bundled files, in a form that DeepSpeed takes today.

    The bundled file for stage 0 has `min_loss_scale: 0.01`, which must be a whole number now. `torch_adam` takes torch's
    Adam in place of DeepSpeed's, which is compiled with g++ or nvcc at the first run; the update is the same.

    Args:
        lr: peak learning rate. weight_decay: per step, decoupled (DeepSpeed's "Adam" decouples it too).
        batch_size: samples per process and micro-batch.
    """
    adam: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "torch_adam": True}
    if zero_stage >= 1:
        adam |= {"betas": [0.9, 0.95], "eps": 1e-8}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": 0.1,
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "fp16": {
            "enabled": fp16,
            "loss_scale": 0,
            "loss_scale_window": 400 if zero_stage >= 1 else 200,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "Adam" if zero_stage >= 1 else "AdamW", "params": adam},
    }
    if zero_stage >= 1:
        settings["zero_optimization"] = {
            "stage": zero_stage,
            "contiguous_gradients": False,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 40_000_000,
            "allgather_bucket_size": 100_000_000,
            "load_from_fp32_weights": False,
        }
    return settings


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's settings."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def completed_settings(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A user's DeepSpeed settings with what SAT needs and they leave out filled in from defaults.

    SAT reads the micro-batch, the accumulation and the optimizer from the file alone, and fails on None where the file
    is silent. `min_loss_scale` below 1, as in the files of SAT, is raised to the 1 that DeepSpeed needs.

    A gradient that isn't finite is always looked for, by its norm. Without ZeRO DeepSpeed takes the norm only where it
    clips: no clipping becomes clipping at NO_CLIPPING. Adam is torch's own, unless the file says `torch_adam: false`:
    DeepSpeed's needs nvcc, or g++ without a GPU.
    """
    settings = copy.deepcopy(dict(own))
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "steps_per_print",
                "optimizer"):  # fmt: skip
        if settings.get(key) in (None, "auto"):
            settings[key] = defaults[key]
    if "min_loss_scale" in settings.get("fp16", {}):
        settings["fp16"]["min_loss_scale"] = max(1, int(settings["fp16"]["min_loss_scale"]))
    settings["gradient_clipping"] = settings["gradient_clipping"] or NO_CLIPPING
    if "check_grad_overflow" in settings.get("bf16", {}):
        settings["bf16"]["check_grad_overflow"] = True
    optimizer = settings["optimizer"]
    optimizer.setdefault("type", defaults["optimizer"]["type"])
    params = optimizer.get("params", {})
    for key in [key for key, value in params.items() if value == "auto"]:
        params[key] = defaults["optimizer"]["params"].get(key)
        if params[key] is None:
            del params[key]
    if optimizer.get("type", "").lower() in ("adam", "adamw"):
        optimizer.setdefault("params", {}).setdefault("torch_adam", True)
    return settings


def try_out(settings: Mapping[str, Any], path: str) -> None:
    """Let DeepSpeed set up a model of one weight by the settings of the --deepspeed_config file at path.

    DeepSpeed checks its settings while it sets a model up, in many places, and the real model takes minutes to load.

    Raises:
        InputError: DeepSpeed can't.
    """
    import deepspeed
    import torch
    from pydantic import ValidationError

    if str(settings["optimizer"].get("type", "")).startswith("sat."):  # SAT builds it, for the real model only
        return
    weight = torch.nn.Linear(1, 1)
    try:
        with torch.random.fork_rng():
            deepspeed.initialize(
                model=weight, model_parameters=list(weight.parameters()), config=copy.deepcopy(dict(settings)),
                dist_init_required=False,
            )  # fmt: skip
    except Exception as error:  # of any kind: DeepSpeed's own, pydantic's, an optimizer's
        told = _odd_values(error, settings) if isinstance(error, ValidationError) else str(error)
        reason = " ".join(told.split()) or type(error).__name__
        raise InputError(
            f"--deepspeed_config {path}: DeepSpeed can't use it ({reason[:MOST_OF_A_REASON]}); settings that it takes are "
            "needed."
        ) from None


def _odd_values(error: Any, settings: Mapping[str, Any]) -> str:
    """What a pydantic error of DeepSpeed's says, without its own frame: which settings, by their place in the file."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    kinds = [DeepSpeedConfigModel]
    for kind in kinds:
        kinds += kind.__subclasses__()
    names = [name for kind in kinds if kind.__name__ == error.title for name in kind.model_fields]
    # DeepSpeedZeroConfig reads zero_optimization, CommsLoggerConfig comms_logger.
    title = error.title.lower().removeprefix("deepspeed")
    sections = [
        name for name in settings if title.startswith(name.split("_")[0]) and isinstance(settings[name], Mapping)
    ]
    sentences = []
    for odd in error.errors():
        what, close = odd["msg"], []
        if odd["type"] == "extra_forbidden":
            what = "there is no such setting"
            if len(odd["loc"]) == 1:  # deeper ones are of other classes
                close = difflib.get_close_matches(odd["loc"][0], names, n=1, cutoff=0.7)
        where = ".".join(map(str, [*sections[:1], *odd["loc"]]))
        sentences.append(": ".join(filter(None, [where, what])) + (f", did you mean {close[0]}?" if close else ""))
    return "; ".join(sentences)


def clip_or_skip(engine: Any) -> None:
    """`DeepSpeedEngine.clip_fp32_gradients`, which skips the update where the gradient isn't finite.

    It is the one optimizer of DeepSpeed that doesn't look: float32 without ZeRO. Parameters without a gradient stay as
    they are, and so does Adam's state. DeepSpeed reads `overflow` after each step and counts the skipped ones.
    """
    from deepspeed.runtime.utils import clip_grad_norm_, is_invalid_grad_norm

    norm = clip_grad_norm_(engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
    engine.optimizer._global_grad_norm = float(norm)  # where the engine looks for it, as in its other optimizers
    engine.optimizer.overflow = is_invalid_grad_norm(norm)
    if engine.optimizer.overflow:
        engine.zero_grad()


def half_precision_optimizers() -> tuple[Any, Any]:
    """DeepSpeed's optimizers of fp16 and bfloat16 without ZeRO.

    To make Adam's state they let it take a step without a gradient, at SAT's first rate of 1: weights decay by a hundredth,
    and the first true step is corrected as a second one, to 0.74 of its length. Adam makes its state by itself.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    return FP16_Optimizer, FP16_UnfusedOptimizer


def cut_up_what_is_there(offload_class: Any) -> Callable[..., None]:
    """`DeepSpeedZeRoOffload._convert_to_zero_parameters`, without parameters that have no numbers.

    ZeRO 3 cuts up every parameter, and reads it for that. The vision part has left when all pictures have been looked at.
    """
    convert = offload_class._convert_to_zero_parameters

    def converted(offload: Any, config: Any, module: Any, *rest: Any) -> None:
        for part in module.modules():
            for name, parameter in [*part.named_parameters(recurse=False)]:
                if parameter.is_meta:
                    setattr(part, name, None)
        convert(offload, config, module, *rest)

    return converted


def scaled_backward(engine_class: Any) -> Callable[..., Any]:
    """`DeepSpeedEngine.backward`, which multiplies the loss by fp16's loss scale without ZeRO too.

    DeepSpeed 0.19 scales it for ZeRO alone, but `half_precision_optimizers` divide the gradient by the scale as well. In
    bfloat16 their scale is 1.
    """
    backward, optimizers = engine_class.backward, half_precision_optimizers()

    def scaled(engine: Any, loss: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(engine.optimizer, optimizers):
            loss = loss.float() * engine.optimizer.loss_scale
        return backward(engine, loss, *rest, **named)

    return scaled
