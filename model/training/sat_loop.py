"""SAT's training loop with our own parts in it.

    with distributed.launcher_environment(), adapted(hooks):
        args = get_args(argv, options, parser)     # of `model.training.sat_args`
        …                                          # load the model; hooks may still be filled in
        training_main()(args, …)

`replacements` lists everything that is replaced in SAT, DeepSpeed and torch for a run, each with its reason. When the
block ends all is as before, so that a run can be followed by another one in the same process.

A script of 2023 that calls SAT itself needs one line at its top: `stay_adapted()`.

Written for SwissArmyTransformer 0.4.12 and DeepSpeed 0.19 on torch 2.13. SAT's loop itself is kept: what it does between
our parts (the order of logging, saving and evaluating) is the released script's.
"""

import argparse
import atexit
import importlib
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from model.distributed import done_by_first_process, from_first_process, has_gpu, launcher_environment
from model.errors import InputError
from model.sat_compat import broadcast_data, import_sat, left_alone, quieten
from model.training.deepspeed_config import (
    clip_or_skip,
    cut_up_what_is_there,
    half_precision_optimizers,
    scaled_backward,
)
from model.training.metrics import TensorBoardFile, TrainingReport
from model.training.sat_args import get_args_of_2023

AUTO_WARMUP_STEPS = 100  # SAT's default
SAT_AUTO_WARMUP_RATE = 0.05  # of --lr: SAT's get_learning_rate_scheduler, `auto_warmup_rate`

# torch lets a process wait ten minutes (NCCL) or half an hour (gloo) for another one. One that lives may well take longer:
# it opens pictures on a slow disk. One that died is found by `model.training.watchdog`.
LONGEST_WAIT = timedelta(hours=1)
ABSENT = object()  # the old value of an attribute that was not there


# --- what is replaced -------------------------------------------------------------------------------------------------


class LoopState(NamedTuple):
    """What SAT's loop works on; `args.iteration` counts the steps that are done."""

    model: Any  # DeepSpeed's engine
    optimizer: Any
    scheduler: Any
    args: argparse.Namespace


class StepWatcher:
    """Something that is told of every optimizer step, on every process. A subclass says what it does with it."""

    def before_step(self, state: LoopState) -> None:
        """`state.args.iteration` steps are done, and the next one comes now."""

    def after_step(self, state: LoopState, loss: Any, skipped: bool) -> None:
        """A step has been taken, or skipped; `state.args.iteration` doesn't count it yet.

        Args:
            loss: scalar float32, the mean over processes and micro-batches.
        """


class EvaluationGivenUp(BaseException):
    """A signal came while SAT evaluates: the evaluation has no result. Not an Exception, which libraries would catch."""


@dataclass
class Hooks:
    """Our own parts in SAT's loop. They are read when SAT calls them, so they may be set after the loop is adapted.

    Where `make_loaders` is None, SAT makes its own.
    """

    load_checkpoint: Callable[..., int]
    save_checkpoint: Callable[..., None]
    report: TrainingReport
    auto_warmup_steps: int = AUTO_WARMUP_STEPS  # optimizer steps at 5 % of --lr at most, when fine-tuning
    make_loaders: Callable[..., tuple[Any, Any, Any]] | None = None
    get_model: Callable[[], Any] | None = None  # the model, asked for once the loaders have been made
    after_evaluation: Callable[..., None] | None = None  # (model, args, iteration, measures), on every process
    while_evaluating: Callable[[str], AbstractContextManager[None]] = lambda split: nullcontext()  # "val" or "test"
    longest_wait: timedelta = LONGEST_WAIT  # of one process for another, in torch.distributed
    step_watchers: list[StepWatcher] = field(default_factory=list)  # told in this order
    before_exit: Callable[[], None] = lambda: None  # --exit-interval ends the run here
    exit: Callable[[], None] = sys.exit  # in this way; where it returns, SAT's loop goes on
    before_last_evaluation: Callable[[], None] = lambda: None  # all steps are done, and saved only after it
    # Everything is put back, the first step comes next: (state, loader of the training rows, that of the evaluation's).
    before_first_step: Callable[[LoopState, Any, Any], None] = lambda state, train, valid: None
    answers: Callable[[Any, argparse.Namespace], dict[str, float]] = lambda model, args: {}  # of rows, at an evaluation
    after_last_step: Callable[[LoopState], None] = lambda state: None  # and after the last evaluation
    # Where TensorBoard's file goes, by --summary-dir and the run's name; None for no file. SAT's place unless set.
    tensorboard_folder: Callable[[str, str], Path | None] = lambda base, name: Path(base, "runs", name)
    # For a run that goes on: the iteration that its schedule counts from, by the one that SAT starts at.
    schedule_start: Callable[[int], int] = lambda iteration: iteration
    # Everything is seeded, the first step comes next: (state, loader of the training rows). Whether to evaluate first.
    before_training: Callable[[LoopState, Any], bool] = lambda state, loader: False


class Replacement(NamedTuple):
    """For a run, `owner.name` is `value`."""

    owner: Any
    name: str
    value: Any
    reason: str


def replacements(hooks: Hooks) -> list[Replacement]:
    """Everything that is replaced for a run in SAT, DeepSpeed and torch."""
    import torch

    sat = import_sat(training=True)
    loop: Any = importlib.import_module("sat.training.deepspeed_training")
    helpers: Any = importlib.import_module("sat.helpers")
    engine: Any = importlib.import_module("deepspeed").DeepSpeedEngine
    zero_3: Any = importlib.import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    table = [
        Replacement(sat, "get_args", get_args_of_2023, "SAT's refuses its own DeepSpeed files, and to train on a CPU"),
        Replacement(sat, "get_tokenizer", tokenizer_of_checkpoint, "SAT's runs the hub's code, then takes a fake one"),
        Replacement(
            helpers, "check_if_zero3", lambda args: False, "SAT can't build the model in parts; DeepSpeed can cut it up"
        ),
        Replacement(loop, "load_checkpoint", hooks.load_checkpoint, "SAT's refuses old files of --load, and asks CUDA"),
        Replacement(loop, "save_checkpoint", hooks.save_checkpoint, "SAT's fails at ZeRO stage 0, and asks CUDA"),
        Replacement(loop, "report_iteration_metrics", hooks.report.step, "a record a step, with the time left"),
        Replacement(loop, "report_evaluate_metrics", hooks.report.evaluation, "a record, the mean over all tokens"),
        Replacement(loop, "get_sample_writer", _summary_writer(hooks), "SAT's waits for ever when the disk is full"),
        Replacement(loop, "report_memory", lambda _: None, "SAT prints CUDA's figures, which may not be there"),
        Replacement(loop, "print_args", lambda _: None, "SAT prints 150 lines"),
        Replacement(
            loop, "get_learning_rate_scheduler", _scheduler(loop, hooks), "--auto_warmup_steps; the rate shown"
        ),
        Replacement(loop, "get_model", _model(loop, hooks), "SAT's goes on where there is no memory for the model"),
        Replacement(loop, "make_loaders", _loaders(loop, hooks), "the order of rows: see model.training.loaders"),
        Replacement(loop, "evaluate_and_print_results", _evaluation(loop, hooks), "SAT has no hook after evaluating"),
        Replacement(loop, "train_step", _train_step(hooks), "SAT's mixes steps up after a NaN, and has no hooks"),
        Replacement(engine, "clip_fp32_gradients", clip_or_skip, "DeepSpeed's lets NaN through"),
        Replacement(engine, "_broadcast_model", lambda _: None, "it sends frozen weights that all have read, 15 GB"),
        Replacement(engine, "backward", scaled_backward(engine), "without ZeRO, DeepSpeed's forgets fp16's scale"),
        Replacement(
            zero_3, "_convert_to_zero_parameters", cut_up_what_is_there(zero_3), "the vision part may have left"
        ),
        *(
            Replacement(
                optimizer, "initialize_optimizer_states", lambda _: None, "it decays the weights at a rate of 1"
            )
            for optimizer in half_precision_optimizers()
        ),
        Replacement(loop, "train", _train(loop, hooks), "SAT seeds everything anew just before; a run may go on"),
        Replacement(loop, "exit", _exit(hooks), "--exit-interval leaves without saving"),
        Replacement(loop, "Timers", timers_without_waiting(loop.Timers), "SAT's wait for CUDA at each start and stop"),
        *(
            Replacement(
                torch.distributed.distributed_c10d, name, hooks.longest_wait, "too short for --check_seconds inf"
            )
            for name in ("default_pg_timeout", "default_pg_nccl_timeout")
        ),
        *without_torchs_compiler(),
    ]
    return table if has_gpu() else table + _without_gpu(loop)


def _without_gpu(loop: Any) -> list[Replacement]:
    """What calls CUDA, or compiles for it, without asking whether there is a GPU."""
    mpu = importlib.import_module("sat.mpu")
    transformer = importlib.import_module("sat.model.transformer")
    # Not `import deepspeed.comm.torch as …`: that finds the name `torch` in deepspeed.comm, which is torch itself.
    communication = importlib.import_module("deepspeed.comm.torch")

    def broadcast(keys: Sequence[str], data: dict[str, Any], datatype: Any) -> dict[str, Any]:
        return broadcast_data(keys, data, datatype, "cpu")

    return [
        Replacement(mpu, "broadcast_data", broadcast, "SAT's sends through CUDA memory"),
        Replacement(transformer, "checkpoint", checkpointed, "SAT's leaves out use_reentrant, which torch warns of"),
        Replacement(communication, "build_shm_op", lambda: None, "DeepSpeed compiles it with g++ for half a minute"),
    ]


def without_torchs_compiler() -> list[Replacement]:
    """Importing torch's compiler takes seconds of every start, only for it to leave some functions alone.

    Methods of every optimizer, of ZeRO 3 and of activation checkpointing ask for the compiler at their first call. Adam's
    step tells the compiler at every call that it switches gradients off.
    """
    import torch

    zero_3 = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    owners = (
        torch.optim.Optimizer,
        torch.utils.checkpoint,
        importlib.import_module("deepspeed.runtime.activation_checkpointing.checkpointing"),
        zero_3,
        zero_3.PartitionedParameterCoordinator,
    )
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    return [
        *(
            Replacement(function, "__dynamo_disable", function, "the compiler's answer, without asking")
            for owner in owners
            for function in _asking_for_the_compiler(owner)
        ),
        Replacement(torch.optim.Adam, "step", step, "switches gradients off without telling the compiler"),
        Replacement(torch.optim.AdamW, "step", step, "the same"),
        Replacement(torch.compiler, "disable", left_alone, "ZeRO 3 has the compiler leave each module's hooks alone"),
    ]


def _asking_for_the_compiler(owner: Any) -> Iterator[Any]:
    """The functions of a module or class that torch's decorator is around; it remembers the answer at the function."""
    for value in [*vars(owner).values()]:
        while isinstance(value, FunctionType):
            inside = getattr(value, "__wrapped__", None) or inspect.getclosurevars(value).nonlocals.get("func")
            if value.__code__.co_qualname == "_disable_dynamo.<locals>.inner":
                yield inside
            value = inside


@contextmanager
def adapted(hooks: Hooks) -> Iterator[None]:
    """Put everything of `replacements` in its place inside the block, and keep SAT, DeepSpeed and torch quiet there."""
    with ExitStack() as undo, warnings.catch_warnings():
        for name in ("sat", "DeepSpeed"):
            undo.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
        quieten()
        silence_known_warnings()
        for owner, name, value, _ in replacements(hooks):
            undo.callback(_put_back, owner, name, vars(owner).get(name, ABSENT))
            setattr(owner, name, value)
        yield


def _put_back(owner: Any, name: str, value: Any) -> None:
    if value is not ABSENT:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


def stay_adapted() -> None:
    """Adapt SAT until this process ends: the one line that a script of 2023 needs at its top.

    Such a script calls `sat.get_args` and `training_main` by itself. It then runs with or without a GPU, started plainly
    or by a launcher; its rows come in SAT's order, and its checkpoints are written as ours are. Elsewhere SAT's own loader is left
    alone; it then takes what released checkpoints hold besides tensors.
    """
    import_sat(training=True)
    from torch.serialization import safe_globals

    from model.checkpoints.save import save_checkpoint
    from model.checkpoints.tensors import safe_checkpoint_types
    from model.checkpoints.weights import load_checkpoint

    until_exit = ExitStack()
    atexit.register(until_exit.close)
    until_exit.enter_context(launcher_environment())
    until_exit.enter_context(safe_globals(safe_checkpoint_types()))
    until_exit.enter_context(adapted(Hooks(load_checkpoint, save_checkpoint, TrainingReport())))


def silence_known_warnings() -> None:
    """Hide what SAT and DeepSpeed make torch warn of and no user can change.

    SAT pins memory for a GPU that may not be there, and finds processes that it has not brought together itself.
    DeepSpeed's ZeRO calls a collective that torch 2.13 renames. Of more workers than processors, torch warns at each loader.
    On a GPU DeepSpeed waits for the others without naming its device, which SAT has made the current one.
    """
    warnings.filterwarnings(
        "ignore", message="model_parallel_size > 1 but torch.distributed is not initialized via SAT"
    )
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)


# --- the parts that take SAT's place ----------------------------------------------------------------------------------


def _scheduler(loop: Any, hooks: Hooks) -> Callable[..., Any]:
    """SAT's learning rate schedule, with --auto_warmup_steps in place of its 100."""
    schedule_of_sat = loop.get_learning_rate_scheduler

    def scheduler(optimizer: Any, iteration: int, args: argparse.Namespace) -> Any:
        start = hooks.schedule_start(iteration)
        schedule = schedule_of_sat(optimizer, start, args, hooks.auto_warmup_steps, SAT_AUTO_WARMUP_RATE)
        rate = schedule.get_lr
        schedule.get_lr = lambda: max(0.0, rate())  # SAT's line goes on below 0 after --lr-decay-iters
        hooks.report.watch(schedule, optimizer)
        return schedule

    return scheduler


def _model(loop: Any, hooks: Hooks) -> Callable[..., Any]:
    """The model of a run. SAT asks for it, given its class, when the loaders are there; a script's own is SAT's, moved."""
    model_of_sat = loop.get_model

    def model(args: argparse.Namespace, model_class: Any) -> Any:
        return hooks.get_model() if hooks.get_model else model_of_sat(args, model_class).to(args.device)

    return model


def _summary_writer(hooks: Hooks) -> Callable[..., TensorBoardFile | None]:
    def summary_writer(name: str, base: str = "..", iteration: int = 0) -> TensorBoardFile | None:
        folder = hooks.tensorboard_folder(base, name)
        return None if folder is None else TensorBoardFile(folder, iteration)

    return summary_writer


def _loaders(loop: Any, hooks: Hooks) -> Callable[..., tuple[Any, Any, Any]]:
    """The run's loaders, or SAT's; to a script's own collator these give samples of equal length, as in 2023."""
    from model.data.dataset import collator_of_2023, data_collator, packed_collator

    loaders_of_sat = loop.make_loaders

    def loaders(args: argparse.Namespace, create_dataset_function: Any, collate_fn: Any = None) -> tuple[Any, Any, Any]:
        if hooks.make_loaders is None and collate_fn not in (None, data_collator, packed_collator):
            collate_fn = collator_of_2023(collate_fn)
        return (hooks.make_loaders or loaders_of_sat)(args, create_dataset_function, collate_fn=collate_fn)

    return loaders


def _evaluation(loop: Any, hooks: Hooks) -> Callable[..., Any]:
    """SAT's evaluation, and what comes after it: only the first process knows the loss, and tells the others."""
    import torch

    evaluate = loop.evaluate_and_print_results

    def evaluate_and_go_on(
        prefix: str, iterator: Any, model: Any, iters: int, args: argparse.Namespace, *rest: Any, **named: Any
    ) -> Any:
        if named["split"] == "val" and args.iteration >= args.train_iters:
            hooks.before_last_evaluation()
        hooks.report.split = named["split"]
        random_state = torch.get_rng_state()
        try:
            with hooks.while_evaluating(named["split"]):
                hooks.report.answers = hooks.answers(model, args) if named["split"] == "val" else {}
                result = evaluate(prefix, iterator, model, iters, args, *rest, **named)
        except EvaluationGivenUp:
            # Its loader has drawn a seed for its workers, and will again when the run goes on with this evaluation.
            torch.set_rng_state(random_state)
            return None
        if named["split"] == "val":
            hooks.report.evaluated_at = args.iteration
            if hooks.after_evaluation is not None:
                hooks.after_evaluation(model, args, args.iteration, from_first_process(hooks.report.measures))
        return result

    return evaluate_and_go_on


def _train_step(hooks: Hooks) -> Callable[..., Any]:
    """`model.training.step.optimizer_step`, of which the watchers are told before and after."""
    optimizer_step = importlib.import_module("model.training.step").optimizer_step

    def train_step(
        iterator: Any, model: Any, optimizer: Any, scheduler: Any, args: argparse.Namespace, *rest: Any, **named: Any
    ) -> Any:
        state = LoopState(model, optimizer, scheduler, args)
        for watcher in hooks.step_watchers:
            watcher.before_step(state)
        loss, skipped, metrics = optimizer_step(iterator, model, optimizer, scheduler, args, *rest, **named)
        for watcher in hooks.step_watchers:
            watcher.after_step(state, loss, bool(skipped))
        return loss, skipped, metrics

    return train_step


def _train(loop: Any, hooks: Hooks) -> Callable[..., Any]:
    """SAT's loop over the steps, before which a run that goes on gets its state, and the evaluation that it still owes.
    After it comes an evaluation, unless SAT has just made one.

    The loop reports every step; the report knows which of them get a line (--log-interval).
    """
    train_of_sat = loop.train

    def train(
        model: Any, optimizer: Any, scheduler: Any, train_data: Any, val_data: Any, timers: Any,
        args: argparse.Namespace, **named: Any,
    ) -> Any:  # fmt: skip
        def evaluate_now() -> None:
            loop.evaluate_and_print_results(
                f"iteration {args.iteration}", iter(val_data), model, len(val_data), args, timers, False,
                step=args.iteration, split="val", **named,
            )  # fmt: skip

        state, is_ours = LoopState(model, optimizer, scheduler, args), hooks.make_loaders is not None
        hooks.report.terminal.lines_every, args.log_interval = args.log_interval, 1
        if is_ours and val_data is not None:
            val_data.batch_sampler.start_iter = 0  # SAT's --resume-dataloader leaves rows out of every evaluation
        owes_evaluation = hooks.before_training(state, train_data)
        hooks.before_first_step(state, train_data, val_data)
        if owes_evaluation and args.do_valid and args.eval_interval and args.iteration % args.eval_interval == 0:
            evaluate_now()
        result = train_of_sat(model, optimizer, scheduler, train_data, val_data, timers, args, **named)
        # --eval-interval leaves the end out.
        if is_ours and args.do_valid and hooks.report.evaluated_at != args.iteration:
            evaluate_now()
        hooks.after_last_step(state)
        return result

    return train


def _exit(hooks: Hooks) -> Callable[[], None]:
    """What SAT's loop calls to leave with --exit-interval, in place of Python's function of that name."""

    def leave() -> None:
        hooks.before_exit()
        hooks.exit()

    return leave


def timers_without_waiting(timers_of_sat: Any) -> Any:
    """SAT's timers without their `torch.cuda.synchronize()`, of which a step has ten. On a GPU they time what is asked of
    it; a whole step comes out right, for it ends with a look at the gradient's norm.
    """

    class Timer(timers_of_sat.Timer):
        def start(self) -> None:
            self.start_time = time.time()
            self.started_ = True

        def stop(self) -> None:
            self.elapsed_ += time.time() - self.start_time
            self.started_ = False

    class Timers(timers_of_sat):
        def __call__(self, name: str) -> Timer:
            return self.timers.setdefault(name, Timer(name))

    return Timers


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function's output, whose activations are computed again in the backward pass.

    Not with use_reentrant=False: SAT's scripted rotary embedding saves other tensors the second time it runs, which that
    variant refuses.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=True)


def tokenizer_of_checkpoint(args: argparse.Namespace | None = None, **named: Any) -> Any:
    """The tokenizer that was set, else the one of the checkpoint that args was filled from.

    Args:
        named: SAT's `outer_tokenizer` sets one.
    """
    from sat.tokenization import get_tokenizer

    from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer

    if named or hasattr(get_tokenizer, "tokenizer"):
        return get_tokenizer(**named)
    file = find_tokenizer(getattr(args, "checkpoint_folder", None), getattr(args, "tokenizer", None))
    return get_tokenizer(outer_tokenizer=ChatGLMTokenizer.from_pretrained(file))


def training_main() -> Callable[..., Any]:
    """SAT's training loop."""
    import_sat(training=True)
    return importlib.import_module("sat.training.deepspeed_training").training_main


def save_beside_earlier_runs(args: argparse.Namespace, model: Any) -> None:
    """Make the run's folder, args.save, and change args.save where it exists. SAT calls this on every rank.

    SAT names a run after the minute it started in: a second one within that minute would overwrite the first. Making a
    folder is one operation, so that of two runs that start at once each gets its own.

    Raises:
        InputError: it can't be made. Every process raises it.
    """
    if not args.save:
        return
    try:
        args.save = done_by_first_process(lambda: _folder_of_its_own(args.save))
    except OSError as error:
        raise InputError(
            f"--save: {error.filename} can't be made ({error.strerror}); a folder of your own is needed."
        ) from None


def _folder_of_its_own(folder: str) -> str:
    """A new folder of that name, or with a number behind it where that is taken."""
    os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
    number, new = 1, folder
    while True:
        try:
            os.mkdir(new)
            return new
        except FileExistsError:
            number += 1
            new = f"{folder}-{number}"
