"""Checkpoints in SAT's layout, written so that a kill at any moment leaves the previous one whole.

<save>/<experiment>-<mm-dd-HH-MM>/
    model_config.json                        what to build
    ice_text.model                           the tokenizer
    <iteration>/mp_rank_00_model_states.pt   {"module": weights, "iteration": int}
    <iteration>/checksums.json               of all of these
    <iteration>/…                            further files of the run, which the released tools never look at
    latest                                   the iteration; written last

The weights are those that differ from the base, or all of them with --save_full_model: see `model.checkpoints.metadata`.
How files are written whole, and checked, is in `model.checkpoints.whole`.
"""

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import weights_path
from model.checkpoints.metadata import KEY, Base
from model.checkpoints.model_parallel import gathered
from model.checkpoints.sizes import free_bytes, size_text, state_size
from model.checkpoints.tensors import LazyTensors, shapes, size_in_bytes, write_weights
from model.checkpoints.weights import learned_tensors, refuse_unless_finite
from model.checkpoints.whole import (
    CONFIG_FILE,
    SHARED_FILES,
    UNFINISHED,
    json_text,
    put_in_place,
    remove,
    remove_unfinished,
    sync,
    write_whole,
)
from model.data.prompt import AskedAs
from model.distributed import from_all_processes, is_first_process, whole_parameters
from model.errors import InputError
from model.progress import say, warn
from model.sat_compat import import_sat

import_sat()

from sat import get_tokenizer, mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.training.model_io import extract_model_specific_args_to_dump  # noqa: E402

BYTES_BESIDE_A_TENSOR = 768  # at most, in a file of torch's: two zip headers, alignment to 64 bytes, its names
NO_FILES: Mapping[str, Callable[[Path], Any]] = MappingProxyType({})


def save_checkpoint(
    iteration: int,
    model: torch.nn.Module,
    optimizer: Any,
    lr_scheduler: Any,
    args: argparse.Namespace,
    extra_files: Mapping[str, Callable[[Path], Any]] = NO_FILES,
    publish: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Write a checkpoint into args.save (SAT has put the experiment's name into it). SAT calls this on every rank.

    With args.save_total_limit, older iterations are removed once this one is on the disk.

    Args:
        model: DeepSpeed's engine, or the model itself.
        optimizer, lr_scheduler: SAT hands them over; its layout has no place for the optimizer's state.
        extra_files: further files of the iteration, by name: each function writes to the path that it is given. They
            are there whole, with the weights, or not at all. Several processes may give files of different names.
        publish: calls the function that it is given, at once or in a thread: it waits for the disk.

    Raises:
        InputError: on every process. The weights are not finite, or the disk has no room or can't be written to; the
            checkpoints before are as they were.
    """
    (publish or on_every_process)(write_unfinished(iteration, model, args, extra_files))


def write_unfinished(
    iteration: int, model: torch.nn.Module, args: argparse.Namespace, extra_files: Mapping[str, Callable[[Path], Any]]
) -> Callable[[], None]:
    """Write the files of a checkpoint beside its place, and give the function that makes them the checkpoint.

    All that depends on the state of the run is written here, at the speed of memory. What is left waits for the disk and
    uses nothing that training changes; on other processes than the first it does nothing.

    Args, Raises:
        As for `save_checkpoint`.
    """
    module: Any = getattr(model, "module", model)
    full = getattr(args, "save_full_model", False) or not hasattr(module, "is_trained_name")
    weights = weights_to_save(module, full)
    adapters, is_first = AdapterConfig.from_options(args), torch.distributed.get_rank() == 0
    learned = learned_tensors(weights, adapters) if full else weights
    saving = _Saving(iteration, Path(args.save), weights, extra_files, getattr(args, "save_total_limit", None))
    if extra_files:
        saving.needed += state_size(sum(tensor.numel() for tensor in shapes(learned).values()))

    def begin() -> None:
        refuse_unless_finite(learned, f"iteration {iteration}")
        if is_first:
            saving.make_room()

    on_every_process(begin)
    try:
        on_every_process(saving.write)
    except BaseException:
        if is_first:
            remove_unfinished(saving.folder)
        raise
    if not is_first:
        return lambda: None
    config = extract_model_specific_args_to_dump(args, module)
    config["model_parallel_size"] = 1  # the files are whole, however the run is split
    config[KEY] = description(adapters, module.base, args.num_layers, full)
    asked_as = AskedAs.from_options(args)
    if asked_as != AskedAs():  # a script of 2023 may know of none of it
        config[KEY]["asked_as"] = vars(asked_as)
    saving.config_text = json_text(config, 4)
    return saving.publish


class _Saving:
    """An iteration on its way to the disk: written beside its place, then put there."""

    def __init__(
        self,
        iteration: int,
        folder: Path,
        weights: Mapping[str, torch.Tensor],
        extra_files: Mapping[str, Callable[[Path], Any]],
        save_total_limit: int | None,
    ) -> None:
        self.iteration, self.folder, self.weights, self.extra_files = iteration, folder, weights, extra_files
        self.save_total_limit = save_total_limit
        self.needed = size_of(weights)  # bytes
        self.unfinished = folder / f"{iteration}{UNFINISHED}"
        self.config_text = ""  # of model_config.json

    def make_room(self) -> None:
        """Make the folder that is written to, without what a killed save has left."""
        with told_as_a_sentence(self.iteration, self.folder, self.needed):
            _make_room(self.folder, self.iteration, self.needed)
            self.unfinished.mkdir(parents=True)

    def write(self) -> None:
        """Write this process's files."""
        with told_as_a_sentence(self.iteration, self.folder, self.needed):
            if self.weights:
                path = weights_path(self.folder, self.unfinished.name)
                if isinstance(self.weights, LazyTensors):
                    write_weights(path, shapes(self.weights), self.weights.__getitem__, self.iteration)
                else:
                    torch.save({"module": self.weights, "iteration": self.iteration}, path)
            for name, write_file in self.extra_files.items():
                write_file(self.unfinished / name)

    def publish(self) -> None:
        """Wait for the disk, and make the files the newest checkpoint."""
        folder, iteration = self.folder, self.iteration
        try:
            with told_as_a_sentence(iteration, folder, self.needed):
                shared = _write_shared_files(folder, self.config_text)
                put_in_place(self.unfinished, folder / str(iteration), shared)
                make_latest(folder, iteration)
        except BaseException:
            remove_unfinished(folder)
            raise
        try:
            remove_older_iterations(folder, iteration, self.save_total_limit)
        except OSError as error:
            warn(f"WARNING: {folder}: older iterations can't be removed ({error.strerror}).")
        say(f"Saved {folder} (iteration {iteration}).")


def make_latest(folder: Path, iteration: int) -> None:
    """Let the checkpoint in folder be that of an iteration."""
    write_whole(folder / "latest", lambda path: path.write_text(str(iteration)))


def on_every_process(act: Callable[[], None]) -> None:
    """Call act on every process of the run, wait for all, and raise one's InputError on all of them.

    Raises:
        InputError: act raised it on one process at least.
    """
    problem = None
    try:
        act()
    except InputError as error:
        problem = str(error)
    found = [told for told in from_all_processes(problem) if told]
    if found:
        raise InputError(found[0])


@contextmanager
def told_as_a_sentence(iteration: int, folder: Path, needed: int) -> Iterator[None]:
    """Turn what a full or broken disk raises inside the block into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        # torch's own writer tells where in its code it stopped, and not why
        reason = error.strerror if isinstance(error, OSError) else "the file was cut short while it was written"
        raise InputError(
            f"{folder}: iteration {iteration} can't be saved ({reason}); {size_text(free_bytes(folder))} free on its disk, "
            f"{size_text(needed)} and a folder that can be written to are needed. Checkpoints before it are whole."
        ) from error


def _make_room(folder: Path, iteration: int, needed: int) -> None:
    """Remove what a killed save has left in folder.

    Raises:
        InputError: there is no room for so many bytes all the same.
    """
    remove_unfinished(folder)
    free = free_bytes(folder)
    if free < needed:
        raise InputError(
            f"{folder}: {size_text(free)} free on its disk; {size_text(needed)} are needed to save iteration {iteration}. "
            "Checkpoints before it are whole."
        )


def size_of(weights: Mapping[str, torch.Tensor]) -> int:
    """How many bytes torch.save takes for these tensors; a few more, for their names and what stands beside them."""
    return size_in_bytes(weights) + BYTES_BESIDE_A_TENSOR * len(weights)


def _write_shared_files(folder: Path, config_text: str) -> list[Path]:
    """Write what all iterations share, where it isn't there already, and give the paths."""
    config = folder / CONFIG_FILE
    if not config.is_file() or config.read_bytes() != config_text.encode():
        write_whole(config, lambda path: path.write_text(config_text, encoding="utf-8"))
    beside = folder / f"tokenizer{UNFINISHED}"
    get_tokenizer().save_vocabulary(beside)
    for new in sorted(beside.iterdir()):
        old = folder / new.name
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            sync(new)
            os.replace(new, old)
    remove(beside)
    sync(folder)
    return [path for path in (folder / name for name in SHARED_FILES) if path.is_file()]


def remove_older_iterations(folder: Path, iteration: int, limit: int | None) -> None:
    """Remove the oldest iterations in folder, so that limit of them are left up to this one, which is the newest."""
    if limit is None:
        return
    weights = folder.glob("*/mp_rank_00_model_states.pt")
    numbers = sorted(int(path.parent.name) for path in weights if path.parent.name.isdecimal())
    for number in [number for number in numbers if number <= iteration][:-limit]:
        # Renamed first: a kill while it is removed leaves litter, and not half a checkpoint.
        unwanted = folder / f"{number}.old{UNFINISHED}"
        os.rename(folder / str(number), unwanted)
        remove(unwanted)


def weights_to_save(module: Any, full: bool) -> Mapping[str, torch.Tensor]:
    """The tensors of module, whole, on the first process; nothing on the others. Every process calls this.

    Not all of them, unless full: those that differ from its base's, trained now or before.
    """
    parameters = dict(module.named_parameters())
    tensors: Mapping[str, torch.Tensor]
    if full:
        tensors = module.tensors()  # one is unpacked from 4 bits when it is asked for
    else:
        tensors = {name: parameter for name, parameter in parameters.items() if is_to_be_saved(module, name)}
    is_split = mpu.get_model_parallel_world_size() > 1 or any(hasattr(one, "ds_id") for one in parameters.values())
    is_first = is_first_process()
    if full and not is_split:
        return tensors if is_first else {}
    weights = {}
    for name, tensor in tensors.items():
        with whole_parameters([parameters[name]] if name in parameters else []):
            whole = gathered(name, parameters.get(name, tensor).detach(), is_split_here(module, name))
            if is_first:
                weights[name] = whole.cpu().clone()  # ZeRO keeps them as views of one long tensor
    return weights


def is_to_be_saved(module: Any, name: str) -> bool:
    """Whether a tensor of module differs from its base's."""
    return module.is_trained_name(name) or name in module.tuned_names


def is_split_here(module: Any, name: str) -> bool:
    """Whether model parallelism splits a tensor of this name in module, if it does at all: not a small vocabulary."""
    words = module.transformer.word_embeddings
    return not name.endswith("word_embeddings.weight") or isinstance(words, mpu.VocabParallelEmbedding)


def description(adapters: AdapterConfig, base: Base, num_layers: int, full: bool) -> dict[str, Any]:
    """What `model_config.json` says of the fine-tuning, under the key KEY of `model.checkpoints.metadata`.

    Args:
        num_layers: of the language model. full: whether the checkpoint has every weight.
    """
    packages = ("torch", "SwissArmyTransformer", "deepspeed", "transformers", "bitsandbytes")
    return {
        "contents": "full" if full else "adapter",
        "base": vars(base),
        "methods": list(adapters.methods),
        "trained_parts": list(adapters.part_rates),
        "versions": {name: version for name in packages if (version := _installed_version(name))},
        **adapters.lora_section(num_layers),
    }


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
