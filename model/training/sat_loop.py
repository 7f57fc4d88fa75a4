"""SAT's training loop, and everything that is replaced in it for a run.

Written for SwissArmyTransformer 0.4.12 and DeepSpeed 0.19 on torch 2.13.
"""

import argparse
import importlib
import inspect
import json
import os
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from model.checkpoints.layout import read_json_object
from model.cli.options import Options
from model.data.split import HELD_OUT
from model.distributed import from_first_process, has_gpu, start_gloo
from model.progress import say
from model.sat_compat import import_sat, quieten
from model.training.deepspeed_config import completed_settings, deepspeed_settings

RELEASED_SEED = 1234  # SAT's default of --seed
SAT_AUTO_WARMUP_RATE = 0.05  # of --lr: SAT's get_learning_rate_scheduler, `auto_warmup_rate`


def get_args(argv: Sequence[str], options: Options, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """SAT's namespace for a checked command line, on a machine with or without a GPU.

    Three things are settled for SAT. Its DeepSpeed files don't pass DeepSpeed's validation, and it turns fp16 on for
    ZeRO: it gets a file with our settings. Without a GPU it insists on a device number equal to LOCAL_RANK and then
    selects that CUDA device: the process group is made beforehand, with gloo, and the device becomes "cpu". Where a flag
    was not typed, it multiplies by None or divides by it: --eval-batch-size and --eval-interval get values.

    Args:
        argv: the command line as typed. options: the same, parsed by `model.cli.options`.
        parser: knows the flags that are not SAT's.
    """
    sat = import_sat()
    fp16, bf16 = options.fp16 and has_gpu(), options.bf16
    settings = deepspeed_settings(
        zero_stage=options.zero_stage,
        fp16=fp16,
        bf16=bf16,
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr=options.lr,
        weight_decay=options.weight_decay,
    )
    if options.deepspeed_config:
        settings = completed_settings(read_json_object(options.deepspeed_config, "--deepspeed_config"), settings)
        if not has_gpu():
            settings["fp16"] = {**settings.get("fp16", {}), "enabled": False}
    evaluate_every = options.eval_interval or options.train_iters
    typed = [*argv, "--log-interval", str(options.log_interval), "--split", options.split, "--strict-eval"]
    if options.holdout is not None:
        typed += ["--valid-data", HELD_OUT]
    typed += ["--eval-batch-size", str(options.eval_batch_size or options.batch_size)]
    typed += ["--eval-interval", str(evaluate_every)] if evaluate_every else []
    if not has_gpu():
        typed_nccl = "distributed_backend" in options.user_set and options.distributed_backend == "nccl"
        instead = ["--fp16"] * options.fp16 + ["nccl"] * typed_nccl
        if instead:
            numbers = "bfloat16" if bf16 else "float32"
            say(f"No GPU found: {numbers} and gloo on the CPU in place of {' and '.join(instead)}.")
        typed += ["--device", os.environ["LOCAL_RANK"], "--distributed-backend", "gloo"]
        start_gloo()
    with tempfile.TemporaryDirectory() as folder:
        settings_file = Path(folder, "deepspeed.json")
        settings_file.write_text(json.dumps(settings))
        args = sat.get_args([*typed, "--deepspeed_config", str(settings_file)], parser=parser)
    if not has_gpu():
        args.device = "cpu"
    if args.warmup == 0:
        args.warmup = 1e-12  # SAT divides by the number of warm-up steps; so small a number changes no rate
    if args.mode == "finetune":
        # A fresh run has nothing to skip, but SAT would skip validation batches on several processes.
        args.resume_dataloader = False
    return args


def synchronize_only_with_gpu(training: Any) -> None:
    """SAT's timers without their `torch.cuda.synchronize()` when there is no GPU, where it raises."""
    if has_gpu():
        return

    class Timer(training.Timers.Timer):
        def start(self) -> None:
            self.start_time = time.time()
            self.started_ = True

        def stop(self) -> None:
            self.elapsed_ += time.time() - self.start_time
            self.started_ = False

    class Timers(training.Timers):
        def __call__(self, name: str) -> Timer:
            return self.timers.setdefault(name, Timer(name))

    training.Timers = Timers


def without_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory reduction with g++ at the first run on a CPU (half a minute)."""
    if has_gpu():
        return
    # Not `import deepspeed.comm.torch as …`: that finds the name `torch` in deepspeed.comm, which is torch itself.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def without_compiler() -> None:
    """Keep torch's Adam from importing torch's compiler, a second of every start, only to be left alone by it.

    Three methods of every optimizer ask for the compiler at their first call and remember its answer at the function
    itself; Adam's step tells it at every call that it switches gradients off.
    """
    import torch

    for name in ("add_param_group", "state_dict", "load_state_dict"):
        function = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        function.__dict__["__dynamo_disable"] = function
    torch.optim.Adam.step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))  # type: ignore[method-assign]


def silence_known_warnings() -> None:
    """Hide what SAT and DeepSpeed make torch warn of and no user can change.

    SAT pins memory for a GPU that may not be there; DeepSpeed's ZeRO calls a collective that torch 2.13 renames.
    """
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)


def checkpoint_without_gpu() -> None:
    """Activation checkpointing on the CPU the way torch wants it asked for, and only where gradients are.

    SAT falls back to `torch.utils.checkpoint` there and leaves out `use_reentrant`, which warns now and will raise; in
    an evaluation it warns of inputs without gradients. Not the other variant: SAT's scripted rotary embedding saves
    other tensors the second time it runs, which that one refuses.
    """
    if has_gpu():
        return
    import torch
    from torch.utils.checkpoint import checkpoint

    def checkpoint_gradients(function: Callable[..., Any], *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=True)

    transformer: Any = importlib.import_module("sat.model.transformer")
    transformer.checkpoint = checkpoint_gradients


def save_beside_earlier_runs(args: argparse.Namespace, model: Any) -> None:
    """Change args.save when it exists already. SAT calls this on every rank before training (its `init_function`).

    SAT names a run after the minute it started in: a second one within that minute would overwrite the first.
    """
    import torch

    if not args.save:
        return
    taken = [args.save]
    if torch.distributed.get_rank() == 0:
        number = 2
        while os.path.exists(taken[0]):
            taken, number = [f"{args.save}-{number}"], number + 1
    torch.distributed.broadcast_object_list(taken)
    args.save = taken[0]


def training_main() -> Callable[..., Any]:
    """SAT's training loop."""
    import_sat(training=True)
    return importlib.import_module("sat.training.deepspeed_training").training_main


def adapt_loading(load_checkpoint: Callable[..., int]) -> None:
    """Put our own loading into SAT's `from_pretrained`: its own refuses old checkpoints, and asks CUDA for a state."""
    import_sat(training=True)
    quieten()
    for module in ("sat.model.base_model", "sat.training.deepspeed_training"):
        importlib.import_module(module).load_checkpoint = load_checkpoint  # type: ignore[attr-defined]


def adapt_training(
    *,
    save_checkpoint: Callable[..., None],
    report: Any,
    auto_warmup_steps: int,
    when_ready: Callable[[], None] = lambda: None,
) -> None:
    """Put our own saving and reporting into SAT's `training_main`, and mend what fails without a GPU.

    SAT's own saving fails in ZeRO stage 0 ('FusedAdam' object has no attribute 'optimizer') and asks CUDA for its random
    state. See each function called for the rest.

    Args:
        report: has `step(…)`, `evaluation(…)` and `watch(scheduler, optimizer)`; see `model.training.metrics`.
        auto_warmup_steps: optimizer steps for which fine-tuning stays at 5 % of --lr at most (SAT: 100).
        when_ready: called once the model is on its device and before the first step.
    """
    import_sat(training=True)
    quieten()
    training: Any = importlib.import_module("sat.training.deepspeed_training")
    synchronize_only_with_gpu(training)
    without_compiling()
    without_compiler()
    silence_known_warnings()
    checkpoint_without_gpu()
    training.save_checkpoint = save_checkpoint
    training.report_iteration_metrics = report.step
    training.report_evaluate_metrics = report.evaluation
    training.report_memory = lambda _: None
    training.print_args = lambda _: None

    original_scheduler = training.get_learning_rate_scheduler

    def scheduler_with_flag(optimizer: Any, iteration: int, args: argparse.Namespace) -> Any:
        scheduler = original_scheduler(optimizer, iteration, args, auto_warmup_steps, SAT_AUTO_WARMUP_RATE)
        report.watch(scheduler, optimizer)
        when_ready()
        return scheduler

    training.get_learning_rate_scheduler = scheduler_with_flag


class LazyLoader:
    """A data loader that starts its worker processes when the first batch is asked for.

    SAT asks for an iterator of the evaluation's rows at the start of training and throws it away later. It also tells
    the evaluation to skip batches when it resumes; here that goes to `batch_sampler`, which may be nobody.
    """

    def __init__(self, loader: Any, length: int, batch_sampler: Any) -> None:
        self.loader, self.length, self.batch_sampler = loader, length, batch_sampler

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


def adapt_data(args: argparse.Namespace) -> None:
    """Let the order of training rows follow --seed and --group_by_length, and mend --epochs with accumulation.

    SAT draws rows by a hash of their place in the order alone, so that every seed gives the same order; here that is the
    order of SAT's default seed only. With --epochs it repeats one permutation; here every epoch has its own, the
    first is SAT's. It also takes one optimizer step for every batch of --epochs, and runs out of data when a step
    takes several.
    """
    import numpy

    from model.data.sampling import GroupedByLength, lengths_of

    configure_data: Any = importlib.import_module("sat.data_utils.configure_data")
    training: Any = importlib.import_module("sat.training.deepspeed_training")
    seed = args.seed

    class SeededMapping(configure_data.RandomMappingDataset):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index if seed == RELEASED_SEED else index + (seed << 64))

    class EpochPermutations(configure_data.RandomDataset):
        epoch = 0

        def __getitem__(self, index: int) -> Any:
            epoch, place = divmod(index, len(self.wrapped_data))
            if epoch != self.epoch:
                self.epoch = epoch
                key = seed if epoch == 0 else [seed, epoch]
                self.indices = numpy.random.default_rng(key).permutation(len(self.wrapped_data))
            return self.wrapped_data[int(self.indices[place])]

    configure_data.RandomMappingDataset = SeededMapping
    configure_data.RandomDataset = EpochPermutations
    make_data_loader = configure_data.make_data_loader

    def make_grouped_loader(dataset: Any, batch_size: int, args: argparse.Namespace, split: str, **more: Any) -> Any:
        if split == "train" and args.group_by_length:
            dataset = GroupedByLength(dataset, lengths_of(dataset), batch_size, seed)
        return make_data_loader(dataset, batch_size, args, split, **more)

    configure_data.make_data_loader = make_grouped_loader
    make_loaders = training.make_loaders

    def make_lazy_loaders(args: argparse.Namespace, *rest: Any, **more: Any) -> tuple[Any, ...]:
        train, *others = make_loaders(args, *rest, **more)
        if train is not None:
            batches_per_step = args.gradient_accumulation_steps if args.epochs else 1
            train = LazyLoader(train, max(1, len(train) // batches_per_step), train.batch_sampler)
        nobody = types.SimpleNamespace
        return train, *(loader and LazyLoader(loader, len(loader), nobody()) for loader in others)

    training.make_loaders = make_lazy_loaders


def after_evaluation(consider: Callable[..., None], report: Any) -> None:
    """Call consider(model, args, iteration, loss) on every process after each evaluation while training.

    SAT has no such place, and only its first process knows the loss.
    """
    training: Any = importlib.import_module("sat.training.deepspeed_training")
    evaluate = training.evaluate_and_print_results

    def evaluate_and_consider(
        prefix: str, iterator: Any, model: Any, iters: int, args: argparse.Namespace, *rest: Any, **named: Any
    ) -> Any:
        result = evaluate(prefix, iterator, model, iters, args, *rest, **named)
        if named.get("split") == "val":
            consider(model, args, args.iteration, from_first_process(report.evaluation_loss))
        return result

    training.evaluate_and_print_results = evaluate_and_consider
