"""Every adaptation of SAT and DeepSpeed to today's machines, one function each.

Written for SwissArmyTransformer 0.4.12 and DeepSpeed 0.19 on torch 2.13. Each function says what breaks without it.
Nothing happens at import: the modules that stand on SAT call `import_sat`. What is replaced for a run stands in
`model.training.sat_loop`.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

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
    """Let modules be importable inside the block only, so that nobody else mistakes them for the real packages.

    None in place of a module makes importing it fail.
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

    SAT imports it on every path where it is installed, takes two seconds for that, and does without it where it isn't.
    """
    with _standing_in({} if "deepspeed" in sys.modules else {"deepspeed": None}):
        yield


def import_sat(training: bool = False) -> types.ModuleType:
    """SAT's top module, imported although wandb and triton may be missing, and without what no run here uses.

    SAT imports both on every path, uses wandb for `--wandb` alone and triton for the rotary embeddings of other
    models: without this, `import sat` ends in ModuleNotFoundError for whoever hasn't installed 200 MB that never run.
    SAT's GPT-2 and Hugging Face data set pull in transformers and pandas, four seconds of every start.

    Args:
        training: with its training loop, and so with DeepSpeed. On a GPU SAT chooses at its first import whose
            checkpointing of activations it takes, so whoever trains calls this first.
    """
    loop = "sat.training.deepspeed_training"
    if ("sat" in sys.modules and not training) or loop in sys.modules:
        return sys.modules["sat"]
    unused = {
        "sat.model.official.gpt2_model": ("SAT's GPT2Model", "GPT2Model"),
        "sat.data_utils.hf_dataset": ("SAT's Hugging Face data set", "load_hf_dataset"),
    }
    if importlib.util.find_spec("triton") is None:
        # SAT's own user of triton is stood in for, not triton: torch and DeepSpeed look for triton too.
        unused["sat.model.position_embedding.triton_rotary"] = ("SAT's triton rotary embedding", "apply_rotary")
    if importlib.util.find_spec("wandb") is None:
        unused["wandb"] = ("--wandb", "log")
    placeholders = {name: _placeholder(name, *why) for name, why in unused.items() if not sys.modules.get(name)}
    # About fifty lines that nobody asked for are logged on the way, one of them a warning that there is no GPU.
    logging.disable(logging.WARNING)
    try:
        with _standing_in(placeholders), nullcontext() if training else model_only():
            sat = importlib.import_module("sat")
            if training:
                importlib.import_module(loop)
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
    """kwargs without `parallel_output`, which is noted in args instead.

    The 2023 script hands it to the constructor; SAT 0.4.12 takes it from args as well, and then Python finds the same
    keyword twice.
    """
    if "parallel_output" not in kwargs:
        return kwargs
    remaining = dict(kwargs)
    args.parallel_output = remaining.pop("parallel_output")
    return remaining


# --- training -----------------------------------------------------------------------------------------------------


def broadcast_data(keys: Sequence[str], data: Mapping[str, Any], dtype: Any, device: Any) -> dict[str, Any]:
    """The tensors data[key] of the first model-parallel rank, on every rank of its group, on device.

    SAT's `mpu.broadcast_data` calls CUDA without asking whether there is a GPU. It is used where there is one and the
    group has several ranks; on the CPU the same tensors are sent one by one over gloo.

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
