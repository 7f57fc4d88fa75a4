"""Importing SAT, and small mends of it. Each function says what breaks without it.

Importing this module does nothing: the modules that stand on SAT call `import_sat`. What is replaced for a training run is
listed in `model.training.sat_loop`. Written for SwissArmyTransformer 0.4.12 on torch 2.13.
"""

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, NoReturn

from model.distributed import has_gpu
from model.errors import InputError

# --- importing ------------------------------------------------------------------------------------------------------


def _placeholder(name: str, needed_for: str, *attributes: str) -> types.ModuleType:
    """A module whose attributes exist and fail with a sentence when they are called."""

    def unavailable(*_: Any, **__: Any) -> NoReturn:
        raise InputError(f"{needed_for} is not available here: {name} was left out when SAT was imported.")

    module = types.ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, unavailable)
    return module


@contextmanager
def _standing_in(modules: Mapping[str, types.ModuleType | None]) -> Iterator[None]:
    """Make modules importable inside the block only. Outside, nobody mistakes them for the real packages.

    None in place of a module makes its import fail.
    """
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)


@contextmanager
def model_only() -> Iterator[None]:
    """Keep SAT from importing DeepSpeed inside the block, where only a model is built or asked.

    SAT imports it wherever it is installed, which takes two seconds. It also works without DeepSpeed.
    """
    with _standing_in({} if "deepspeed" in sys.modules else {"deepspeed": None}):
        yield


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """What modules imported inside the block have torch compile is compiled at its first call.

    torch imports its compiler, which takes three seconds, as soon as a function is to be compiled.
    """
    import torch

    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))

        @functools.wraps(function)
        def called(*values: Any, **named: Any) -> Any:
            # Called by another function that is being compiled, it becomes a part of that one.
            return (function if torch.compiler.is_compiling() else compiled())(*values, **named)

        return called

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def left_alone(function: Any = None, **_: Any) -> Any:
    """In place of a decorator of torch's, with or without arguments: the function as it is."""
    return (lambda decorated: decorated) if function is None else function


def import_sat(training: bool = False) -> types.ModuleType:
    """SAT's top module, imported without wandb, triton, and the parts of SAT that no run here uses.

    A plain `import sat` fails without wandb and triton. SAT uses wandb for `--wandb` alone, and triton for the rotary
    embeddings of other models. SAT's GPT-2 and its Hugging Face data set import transformers and pandas, which takes four
    seconds of every start; tensorboardX imports boto3, for logs on Amazon's S3, which takes half a second.

    Args:
        training: also import the training loop, and with it DeepSpeed. Training code calls this first: on a GPU, SAT
            decides at its first import whether activations are checkpointed by DeepSpeed.
    """
    loop = "sat.training.deepspeed_training"
    if ("sat" in sys.modules and not training) or loop in sys.modules:
        return sys.modules["sat"]
    unused = {
        "sat.model.official.gpt2_model": ("SAT's GPT2Model", "GPT2Model"),
        "sat.data_utils.hf_dataset": ("SAT's Hugging Face data set", "load_hf_dataset"),
    }
    if importlib.util.find_spec("triton") is None:
        # The stand-in is for SAT's module, not for triton itself: torch and DeepSpeed look for triton too.
        unused["sat.model.position_embedding.triton_rotary"] = ("SAT's triton rotary embedding", "apply_rotary")
    if importlib.util.find_spec("wandb") is None:
        unused["wandb"] = ("--wandb", "log")
    placeholders: dict[str, types.ModuleType | None] = {"boto3": None}
    placeholders |= {name: _placeholder(name, *why) for name, why in unused.items()}
    placeholders = {name: module for name, module in placeholders.items() if not sys.modules.get(name)}
    # SAT logs about fifty lines at import, one of them a warning that there is no GPU.
    logging.disable(logging.WARNING)
    try:
        with _standing_in(placeholders), nullcontext() if training else model_only():
            sat = importlib.import_module("sat")
            if training:
                importlib.import_module(loop)
                # DeepSpeed imports it in every run with ZeRO, to see whether it is the run's optimizer.
                with compiled_when_called(), suppress(ImportError):
                    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
            return sat
    finally:
        logging.disable(logging.NOTSET)


def quieten() -> None:
    """Let SAT and DeepSpeed log warnings and errors only, unless SAT_LOGLEVEL or DS_LOG_LEVEL asks for more.

    Without this about a hundred lines scroll by before the first loss.
    """
    import_sat()
    logging.getLogger("sat").setLevel(os.environ.get("SAT_LOGLEVEL", "WARNING").upper())
    logging.getLogger("DeepSpeed").setLevel(os.environ.get("DS_LOG_LEVEL", "ERROR").upper())


# --- the command line ---------------------------------------------------------------------------------------------


def parallel_output_once(args: argparse.Namespace, kwargs: dict[str, Any]) -> dict[str, Any]:
    """kwargs without `parallel_output`, which is put into args instead.

    The 2023 script gives it to the constructor. SAT 0.4.12 also takes it from args, and the same keyword twice is a
    TypeError.
    """
    if "parallel_output" not in kwargs:
        return kwargs
    remaining = dict(kwargs)
    args.parallel_output = remaining.pop("parallel_output")
    return remaining


# --- model parallelism ---------------------------------------------------------------------------------------------


class ModelParallel(NamedTuple):
    """This process among those that share a model."""

    rank: int = 0
    ranks: int = 1
    group: Any = None  # for torch's collectives


def model_parallel() -> ModelParallel:
    """This process among those that share a model; alone where SAT has made no groups."""
    from sat import mpu

    if not mpu.model_parallel_is_initialized():
        return ModelParallel()
    group = mpu.get_model_parallel_group()
    return ModelParallel(mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size(), group)


@contextmanager
def whole_on_every_process(model_parallel_size: int) -> Iterator[None]:
    """Let SAT build models inside the block that are not split among model-parallel processes.

    SAT asks its groups how many parts there are, when a model is built and in every product.
    """
    from sat import mpu

    if model_parallel_size == 1:
        yield
        return
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(1)
    yield
    mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(model_parallel_size)


# --- training -----------------------------------------------------------------------------------------------------


def broadcast_data(keys: Sequence[str], data: Mapping[str, Any], dtype: Any, device: Any) -> dict[str, Any]:
    """The tensors data[key] of the first model-parallel rank, on every rank of its group, on device.

    SAT's `mpu.broadcast_data` needs a GPU. It is used where there is one and the group has several ranks. Without a GPU
    the tensors are sent one by one over gloo.

    Args:
        data: needed on the group's first rank only. dtype: of all those tensors.
    """
    import torch
    from sat import mpu

    if mpu.get_model_parallel_world_size() == 1:
        return {key: data[key].to(device, dtype, non_blocking=True) for key in keys}
    if has_gpu():
        return mpu.broadcast_data(keys, data, dtype)
    source, group = mpu.get_model_parallel_src_rank(), mpu.get_model_parallel_group()
    shapes = [{key: tuple(data[key].shape) for key in keys} if mpu.get_model_parallel_rank() == 0 else None]
    torch.distributed.broadcast_object_list(shapes, source, group=group)
    assert shapes[0] is not None
    received = {}
    for key in keys:
        tensor = data[key].to(dtype).clone() if data else torch.empty(shapes[0][key], dtype=dtype)
        torch.distributed.broadcast(tensor, source, group=group)
        received[key] = tensor
    return received
