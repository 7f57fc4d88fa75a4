"""The state of a run: collected for each checkpoint, and put back when the run goes on.

    run = RunState(report, resumed, begin)
    Hooks(…, run.saving(save_checkpoint), …)      every checkpoint gets the two files of `checkpoints.resume`
    run.watch(hooks, …)                           everything is put back after SAT has seeded everything anew

What there is for each trained tensor is kept by its name, whole, and not as a process has it: float32 weight, the optimizer's
averages and step count. So it doesn't matter which ZeRO stage, precision or number of processes goes on with it.

Which classes of DeepSpeed 0.19 hold that:

    float32, ZeRO 0            torch's optimizer, over the parameters themselves
    fp16 or bf16, ZeRO 0       FP16_UnfusedOptimizer: a float32 copy of each parameter, over which torch's optimizer works
    ZeRO 1 and 2               a long float32 tensor for each parameter group and process; `deepspeed.utils` reads and
                               writes a parameter's part of it
    ZeRO 3                     the same, and of the parameter itself a part too

With model parallelism a process has a part of some tensors: `model.checkpoints.model_parallel` makes them whole.
"""

import argparse
import importlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy
import torch

from model.checkpoints.metadata import VISION, base_of, found_base
from model.checkpoints.model_parallel import gathered, own_part
from model.checkpoints.resume import (
    RECORD_FILE,
    STATE_FILE,
    Resumed,
    RunRecord,
    digests,
    read_state,
    rows_of_use,
    write_state,
)
from model.checkpoints.weights import opened_for, refuse_another_base
from model.cli.preflight import Inputs, training_samples
from model.cli.resuming import CommandLine
from model.distributed import from_all_processes, is_first_process, whole_parameters
from model.progress import say, warn
from model.sat_compat import model_parallel
from model.training.best_checkpoint import BestEvaluation
from model.training.metrics import TrainingReport
from model.training.records import STEP as STEP_RECORD
from model.training.records import TEST, Record
from model.training.sat_loop import Hooks, LoopState

MASTER = "master"  # the float32 weight
STEP = "step"  # how many steps the optimizer has taken with this tensor
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class RunState:
    """The state of this process's run."""

    def __init__(self, report: TrainingReport, resumed: Resumed | None, begin: Callable[..., None]) -> None:
        """A fresh run, whose folder begin(args, model) makes, or one that goes on.

        Raises:
            InputError: the state to go on with can't be read.
        """
        self.report, self.resumed, self.begin = report, resumed, begin
        self.best: BestEvaluation | None = None
        self._stored: dict[str, Any] = read_state(resumed.state_file) if resumed else {}
        self._first_iteration: int | None = self._stored.get("first_iteration")  # that the schedule counts from
        self._evaluated_at: int = self._stored.get("evaluated_at", -1)  # the iteration of the last evaluation
        self._record: RunRecord | None = None
        self._loader: Any = None
        self._samples_per_epoch = 1
        self._said: set[str] = set()
        self._evaluates_anew = False  # on other rows than before

    def watch(self, hooks: Hooks, line: CommandLine, inputs: Inputs) -> None:
        """Be told of what the run does, and take down what it is: its flags, its data files, rows that are left out."""
        options, self._evaluates_anew = line.options, line.evaluates_anew
        self._samples_per_epoch = training_samples(options, inputs.selection)
        notes = is_first_process() and (options.save or self.resumed)
        self._record = RunRecord(
            iteration=0,
            steps=0,
            words=line.words,
            experiment=options.experiment_name,
            processes=torch.distributed.get_world_size(),
            data=digests(options.train_data or []) if notes else {},
            left_out=inputs.selection.left_out,
            config={**inputs.checkpoint.config},
            held_out=inputs.selection.held_out,
            rows={file: rows_of_use(inputs.selection.rows[file].numbers) for file in options.train_data or []},
            evaluated=digests(options.valid_data or []) if notes else {},
        )
        hooks.schedule_start, hooks.before_training = self.schedule_start, self.before_training
        hooks.after_evaluation = self._note_evaluation

    @property
    def data(self) -> Mapping[str, str]:
        """The digest of each file of --train-data, on the first process of a run that saves."""
        return {} if self._record is None else self._record.data

    def is_behind(self, record: Record) -> bool:
        """Whether what a record tells of is behind the checkpoint that the run goes on from, and not done again."""
        if self.resumed is None or record.split == TEST:
            return False
        done = (
            self.resumed.record.iteration
            if record.kind == STEP_RECORD
            else min(self.resumed.record.iteration, self._evaluated_at)
        )
        return record.step <= done

    def watch_for_the_best(self, best: BestEvaluation) -> None:
        """Be told which evaluation is the best, from what the run that goes on knew of it."""
        self.best = best
        if self.resumed is not None and not self._evaluates_anew:
            best.resumed_at = self.resumed.record.iteration
            best.load_state_dict(self._stored.get("best", {}))

    def saves_every_weight(self, args: argparse.Namespace) -> bool:
        """Whether checkpoints hold the whole model: those of a run that goes on do if its first ones did."""
        if self.resumed is None:
            return bool(args.save_full_model)
        return bool(self.resumed.checkpoint.config["finetuning"]["contents"] == "full")

    # --- what SAT's loop calls

    def place(self, args: argparse.Namespace, model: Any) -> None:
        """Choose the folder that args.save names: a fresh one, or that of the run that goes on. SAT's `init_function`."""
        if self.resumed is None:
            self.begin(args, model)
            return
        folder = self.resumed.checkpoint.folder
        args.save, args.experiment_name, args.iteration = str(folder), folder.name, self.resumed.record.iteration
        args.save_full_model = self.saves_every_weight(args)
        if args.save_full_model:
            if "qlora" in model.adapters.methods:
                # The full weights are those that 4 bits stand for, and would not become the same 4 bits again.
                put_into = opened_for(model, found_base(self.resumed.checkpoint, args.base), args)
                put_into(lambda name: not name.startswith(VISION))
                if not args.force_base:
                    refuse_another_base(self.resumed.checkpoint, model.base)
            model.base = base_of(self.resumed.checkpoint.config)  # and not the run's own checkpoint

    def _note_evaluation(
        self, model: Any, args: argparse.Namespace, iteration: int, measures: Mapping[str, float]
    ) -> None:
        self._evaluated_at = iteration
        if self.best is not None and self.best.consider(model, args, iteration, measures):
            self._end_here(args)

    def _end_here(self, args: argparse.Namespace) -> None:
        """SAT's loop ends after this iteration, and saves."""
        self.report.last_step, args.train_iters = args.train_iters, args.iteration

    def schedule_start(self, iteration: int) -> int:
        """The iteration that the learning rate's schedule counts from: that of the run's first start."""
        if self._first_iteration is None:
            self._first_iteration = iteration
        return self._first_iteration

    def before_training(self, state: LoopState, loader: Any) -> bool:
        """Put back what the checkpoint holds. Returns whether the evaluation at this iteration has not been made yet.

        Args:
            loader: of the training rows.
        """
        self._loader = loader
        self.report.epoch = lambda: loader.samples_taken / self._samples_per_epoch
        if not self._stored:
            return False
        put_back_parameters(state.model, state.optimizer, self._stored["parameters"])
        _set_fields(_scaler(state.optimizer), self._stored["scaler"])
        _set_fields(state.model, self._stored["engine"])
        state.scheduler.init_step = self._stored["schedule"]["init_step"]
        state.scheduler.step(self._stored["schedule"]["num_iters"])
        loader.start_at_sample(self._stored["samples"])
        self.report.load_state_dict(self._stored["report"])
        self._put_back_random_states(state.args.no_load_rng)
        say(f"Going on with {state.args.save} after iteration {state.args.iteration}.")
        self.report.steps_done, self.report.evaluated_at = state.args.iteration, self._evaluated_at
        if self.best is not None and self.best.is_over:
            self._end_here(state.args)
        return self._evaluated_at < state.args.iteration

    def _put_back_random_states(self, leave: bool) -> None:
        states = self._stored["random"]
        if leave or not states:
            say("Dropout draws other numbers from here on (--no-load-rng or --no-save-rng).")
            return
        saved, here = len(states), torch.distributed.get_world_size()
        if saved != here:
            warn(
                f"{saved} process{'es' if saved > 1 else ''} saved this checkpoint, {here} go on with it: dropout draws other "
                "numbers from here on."
            )
            return
        if self._stored.get("model_parallel_size", 1) != model_parallel().ranks:
            warn("--model-parallel-size is another one than it was: dropout draws other numbers from here on.")
            return
        put_back_random_state(states[torch.distributed.get_rank()])

    def saving(self, save_checkpoint: Callable[..., None]) -> Callable[..., None]:
        """save_checkpoint, which writes the state of the run beside the weights. SAT calls it on every process."""

        def save(iteration: int, model: Any, optimizer: Any, scheduler: Any, args: argparse.Namespace) -> None:
            if not can_be_kept(optimizer):
                self._say_once(
                    f"The state of {type(optimizer).__name__} with {type(inner_optimizer(optimizer)).__name__} is not kept: "
                    "no --resume from these checkpoints."
                )
                save_checkpoint(iteration, model, optimizer, scheduler, args)
                return
            state = self.collect(iteration, LoopState(model, optimizer, scheduler, args))
            assert self._record is not None
            record = replace(
                self._record,
                saved_at=time.time(),
                iteration=iteration,
                steps=self.report.last_step or args.train_iters,
                samples=state["samples"],
            )
            files = {STATE_FILE: lambda path: write_state(state, path), RECORD_FILE: record.write}
            # The first process reads rows, whatever the layout: its place in them is the run's.
            mine = files if is_first_process() else {}
            save_checkpoint(iteration, model, optimizer, scheduler, args, extra_files=mine)

        return save

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            warn(text)
        self._said.add(text)

    def collect(self, iteration: int, state: LoopState) -> dict[str, Any]:
        """What `before_training` puts back. Every process calls this; all get the whole state."""
        random_states = from_all_processes(random_state())
        return {
            "iteration": iteration,
            "first_iteration": self._first_iteration or 0,
            "parameters": parameter_states(state.model, state.optimizer),
            "scaler": _get_fields(_scaler(state.optimizer), SCALER_FIELDS),
            "engine": _get_fields(state.model, ENGINE_COUNTERS),
            "schedule": {"num_iters": state.scheduler.num_iters, "init_step": state.scheduler.init_step},
            "random": [] if state.args.no_save_rng else random_states,
            "model_parallel_size": model_parallel().ranks,
            "samples": self._loader.samples_taken,
            "report": self.report.state_dict(),
            "evaluated_at": self._evaluated_at,
            "best": {} if self.best is None else self.best.state_dict(),
        }


def _scaler(optimizer: Any) -> Any:
    """Where an optimizer of DeepSpeed keeps its loss scale."""
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", optimizer)


def _get_fields(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def _set_fields(owner: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if hasattr(owner, name):
            setattr(owner, name, value)


# --- trained tensors --------------------------------------------------------------------------------------------------


def can_be_kept(optimizer: Any) -> bool:
    """Whether `parameter_states` knows where an optimizer has its state.

    By a user's own --deepspeed_config, DeepSpeed may take others: FP16_Optimizer at ZeRO 0, with its own FusedAdam; or Muon,
    whose momentum ZeRO cuts up at other places than the weights.
    """
    is_cut_muon = "muon" in type(inner_optimizer(optimizer)).__name__.lower() and _flat_masters(optimizer)
    return not hasattr(optimizer, "fp32_groups_flat") and not is_cut_muon


def inner_optimizer(optimizer: Any) -> Any:
    """torch's or DeepSpeed's own, inside the one that holds weights in float32 or in parts."""
    return getattr(optimizer, "optimizer", optimizer)


def parameter_states(engine: Any, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """For each trained tensor by name: its float32 weight, and what the optimizer keeps for it, on the CPU.

    Args:
        engine, optimizer: DeepSpeed's. Every process calls this: each may have a part.
    """
    inner = inner_optimizer(optimizer)
    flat, masters = _flat_masters(optimizer), _own_masters(optimizer)
    _link_flat_states(optimizer)
    states = {}
    for name, parameter in _trained(engine):
        if flat:
            state = _state_in_flat(parameter, inner.state[flat[_group_of(parameter, optimizer)]])
        else:
            master = masters.get(parameter, parameter)
            state = {MASTER: master, **inner.state.get(master, {})}
        tensors = {key: torch.as_tensor(value).detach() for key, value in state.items()}
        states[name] = {
            key: (gathered(name, value) if value.dim() else value).cpu().clone() for key, value in tensors.items()
        }
    return states


@torch.no_grad()
def put_back_parameters(engine: Any, optimizer: Any, states: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """The opposite of `parameter_states`: engine and optimizer get what states holds by name."""
    inner = inner_optimizer(optimizer)
    flat, masters = _flat_masters(optimizer), _own_masters(optimizer)
    if flat:
        _make_flat_states(engine, optimizer, flat, states)
        _link_flat_states(optimizer)
    rank, ranks, _ = model_parallel()
    for name, parameter in _trained(engine):
        state = {key: own_part(name, value, rank, ranks) for key, value in states[name].items()}
        weight = state.pop(MASTER).to(parameter.device)
        with whole_parameters([parameter], writer=0):
            parameter.copy_(weight)
        if flat:
            _put_into_flat(parameter, {MASTER: weight, **state})
            continue
        master = masters.get(parameter, parameter)
        master.copy_(weight)
        if state:
            inner.state[master] = {key: _on_device(key, value, master) for key, value in state.items()}


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _on_device(key: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value of the optimizer's state. torch's optimizers keep their step counts on the CPU."""
    return value.clone() if key == STEP else value.to(like.device, copy=True)


def _own_masters(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Of FP16_UnfusedOptimizer: the float32 copy of each parameter."""
    copies = getattr(optimizer, "fp32_groups", [])
    pairs = zip(getattr(optimizer, "fp16_groups", []), copies, strict=True) if copies else []
    return {parameter: copy for group, own in pairs for parameter, copy in zip(group, own, strict=True)}


def _flat_masters(optimizer: Any) -> list[torch.Tensor]:
    """Of ZeRO, and of BF16_Optimizer: this process's part of all weights, float32[numbers], for each group."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def _groups(optimizer: Any) -> list[list[torch.nn.Parameter]]:
    names = ("bit16_groups", "bf16_groups", "fp16_groups")  # the last at ZeRO 3
    return next((groups for name in names if (groups := getattr(optimizer, name, None))), [])


def _group_of(parameter: torch.nn.Parameter, optimizer: Any) -> int:
    """The number of the parameter's group."""
    return next(
        number for number, group in enumerate(_groups(optimizer)) if any(parameter is member for member in group)
    )


def _state_in_flat(parameter: torch.nn.Parameter, state_of_group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's own state, put together from the parts of all processes."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = {MASTER: safe_get_full_fp32_param(parameter)}
    for key, value in state_of_group.items():
        is_flat = isinstance(value, torch.Tensor) and value.dim() > 0
        state[key] = safe_get_full_optimizer_state(parameter, key) if is_flat else value
    return state


def _make_flat_states(engine: Any, optimizer: Any, flat: list[torch.Tensor], states: Mapping[str, Any]) -> None:
    """Give the optimizer the state that it makes at its first step only: zeros, and the step counts."""
    names = {parameter: name for name, parameter in _trained(engine)}
    for group, part in zip(_groups(optimizer), flat, strict=True):
        example = {key: value for key, value in states[names[group[0]]].items() if key != MASTER}
        if example:
            optimizer.optimizer.state[part] = {
                key: torch.zeros_like(part) if value.dim() else value.clone() for key, value in example.items()
            }


def _link_flat_states(optimizer: Any) -> None:
    """Let each parameter know its part of the optimizer's state.

    DeepSpeed does so after its first step, with the first parameter group only: the others have no state yet by then.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _put_into_flat(parameter: Any, state: Mapping[str, torch.Tensor]) -> None:
    from deepspeed import utils

    at_zero_3 = hasattr(parameter, "ds_id")  # whose setters of whole tensors forget the padding of the last part
    for key, value in state.items():
        own = _part_at_zero_3(parameter, value) if at_zero_3 else value
        own = own.to(parameter.device)
        if key == MASTER:
            (utils.safe_set_local_fp32_param if at_zero_3 else utils.safe_set_full_fp32_param)(parameter, own)
        elif value.dim():
            put = utils.safe_set_local_optimizer_state if at_zero_3 else utils.safe_set_full_optimizer_state
            put(parameter, own, key)


def _part_at_zero_3(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """The numbers of a whole tensor that this process has, zeros where the last part is padded."""
    size = parameter.partition_numel()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    own = value.flatten()[start : start + size]
    return torch.nn.functional.pad(own, (0, size - len(own)))


# --- random states ----------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The states of this process's generators: Python's, numpy's, torch's, and on a GPU CUDA's and DeepSpeed's own."""
    version, numbers, next_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(numbers), next_gauss],
        "numpy": [kind, torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
        state["tracker"] = dict(_tracker().get_states())
    return state


def put_back_random_state(state: Mapping[str, Any]) -> None:
    """The opposite of `random_state`."""
    version, numbers, next_gauss = state["python"]
    random.setstate((version, tuple(numbers), next_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype(numpy.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
        _tracker().set_states(dict(state["tracker"]))


def _tracker() -> Any:
    """The generators that dropout draws from on a GPU."""
    return importlib.import_module("sat.mpu").get_cuda_rng_tracker()
