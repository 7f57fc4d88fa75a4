"""SAT's namespace: what its loop and its models read their settings from.

    with distributed.launcher_environment():
        args = get_args(argv, options, script_parser())

SAT's own `get_args` stands behind it. It refuses its own DeepSpeed files, and a machine without a GPU: what it is given
instead is made here.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoints.layout import read_json_object
from model.cli.options import SAT_TRAIN_ITERS, Options, full_parser
from model.distributed import has_gpu, on_a_free_port, start_gloo, unusable_gpu
from model.progress import say, warn
from model.training.deepspeed_config import completed_settings, deepspeed_settings, try_out
from model.training.launcher import agreed_port

NEVER = sys.maxsize  # steps; SAT divides by it


def get_args(argv: Sequence[str], options: Options, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """SAT's namespace for a checked command line, on a machine with or without a GPU.

    Where a flag was not given, SAT multiplies by None or divides by it: --eval-batch-size and --eval-interval get values.

    Args:
        argv: the command line as given. options: the same, parsed by `model.cli.options`.
        parser: knows the flags that are not SAT's.
    """
    evaluate_every = options.eval_interval or options.train_iters
    words = [*argv, "--log-interval", str(options.log_interval), "--split", options.split, "--strict-eval"]
    words += ["--eval-batch-size", str(options.eval_batch_size or options.batch_size)]
    words += ["--eval-interval", str(evaluate_every)] if evaluate_every else []
    if not (options.train_iters or options.epochs):  # SAT would take as many, with a warning; ours have been said
        words += ["--train-iters", str(SAT_TRAIN_ITERS)]
    args = _sat_args(words, options, parser, options.fp16)
    if args.warmup == 0:
        args.warmup = 1e-12  # SAT divides by the number of warm-up steps; so small a number changes no rate
    args.load = options.load  # a run that goes on has none any more
    if args.mode == "finetune":
        args.resume_dataloader = False  # a fresh run has nothing to skip
    args.save = options.save  # SAT would take "none" for a folder
    if "save_interval" not in options.user_set and not options.save_full_model:
        # SAT puts an epoch for None. Without epochs `model.training.saving` looks at the clock instead.
        args.save_interval = None if args.epochs else NEVER
    return args


def get_args_of_2023(
    args_list: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """`sat.get_args` for scripts that call it by themselves, on a machine with or without a GPU.

    As in 2023, ZeRO without --fp16 or --bf16 turns fp16 on.
    """
    words = list(sys.argv[1:] if args_list is None else args_list)
    options = full_parser().parse_known_args(words)[0]
    return _sat_args(words, options, parser, options.fp16 or (options.zero_stage > 0 and not options.bf16))


def _sat_args(
    words: Sequence[str], options: Any, parser: argparse.ArgumentParser | None, fp16: bool
) -> argparse.Namespace:
    """SAT's own `get_args` for words, where it refuses today.

    Its DeepSpeed files don't pass DeepSpeed's validation: it gets a file with our settings. Without a GPU it insists on a
    device number equal to LOCAL_RANK and then selects that CUDA device: the process group is made beforehand, with gloo,
    and the device becomes "cpu".
    """
    with agreed_port():
        args = _sat_args_on_this_port(words, options, parser, fp16)
    if not has_gpu():
        args.device = "cpu"
    if options.deepspeed_config:
        try_out(_settings(options, fp16 and has_gpu()), options.deepspeed_config)
    return args


def _sat_args_on_this_port(
    words: Sequence[str], options: Any, parser: argparse.ArgumentParser | None, fp16: bool
) -> argparse.Namespace:
    words = list(words)
    if not has_gpu():
        if unusable := unusable_gpu():
            warn(unusable)
        instead = ["--fp16"] * options.fp16 + ["nccl"] * any(word.endswith("nccl") for word in words)
        if instead:
            numbers = "bfloat16" if options.bf16 else "float32"
            say(f"No GPU found: {numbers} and gloo on the CPU in place of {' and '.join(instead)}.")
        if options.profiling != -1:
            say(
                f"--profiling {options.profiling}: it starts CUDA's profiler, and no GPU was found. Nothing is profiled."
            )
        words += ["--device", os.environ["LOCAL_RANK"], "--distributed-backend", "gloo", "--profiling", "-1"]
        start_gloo()
    settings = _settings(options, fp16 and has_gpu())
    with tempfile.TemporaryDirectory() as folder:
        settings_file = Path(folder, "deepspeed.json")
        settings_file.write_text(json.dumps(settings))
        get_args_of_sat = importlib.import_module("sat.arguments").get_args
        words += ["--deepspeed_config", str(settings_file)]
        args: argparse.Namespace = on_a_free_port(lambda: get_args_of_sat(words, parser=parser))
    return args


def _settings(options: Any, fp16: bool) -> dict[str, Any]:
    """DeepSpeed's settings: those of --deepspeed_config where there is one, ours for the rest."""
    settings = deepspeed_settings(
        zero_stage=options.zero_stage,
        fp16=fp16,
        bf16=options.bf16,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr=options.lr,
        weight_decay=options.weight_decay,
    )
    if options.deepspeed_config:
        settings = completed_settings(read_json_object(options.deepspeed_config, "--deepspeed_config"), settings)
        if not has_gpu():
            settings["fp16"] = {**settings.get("fp16", {}), "enabled": False}
    return settings
