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
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import Checkpoint, ModelConfig, weights_path
from model.checkpoints.metadata import (
    KEY,
    VISION,
    Base,
    adapter_tensors,
    base_of,
    is_adapter,
    is_adapter_name,
    with_base,
)
from model.checkpoints.model_parallel import gathered, joined, own_parts
from model.checkpoints.sizes import free_bytes, size_text, state_size
from model.checkpoints.tensors import (
    LazyTensor,
    LazyTensors,
    by_layer,
    layers,
    load_tensors,
    looks_old,
    one_by_one,
    open_huggingface,
    shapes,
    size_in_bytes,
    write_weights,
)
from model.checkpoints.whole import (
    CONFIG_FILE,
    SHARED_FILES,
    UNFINISHED,
    put_in_place,
    remove,
    remove_unfinished,
    sync,
    write_whole,
)
from model.data.prompt import AskedAs
from model.distributed import is_first_process, whole_parameters
from model.errors import InputError
from model.progress import say, warn, with_progress
from model.sat_compat import import_sat

import_sat()

from sat import get_tokenizer, mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.training.model_io import extract_model_specific_args_to_dump  # noqa: E402

SAMPLES_PER_TENSOR = 16  # places, spread evenly, where a fingerprint looks into a tensor
SAMPLE_LENGTH = 32  # numbers in a row that it reads there
BYTES_BESIDE_A_TENSOR = 768  # at most, in a file of torch's: two zip headers, alignment to 64 bytes, its names
SHOWN_FROM = 2**30  # bytes of weights; smaller ones are there before a line about them is read
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
    learned = _learned(weights, adapters) if full else weights
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
    saving.config_text = json.dumps(config, indent=4, ensure_ascii=False)
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
                write_whole(folder / "latest", lambda path: path.write_text(str(iteration)))
        except BaseException:
            remove_unfinished(folder)
            raise
        try:
            remove_older_iterations(folder, iteration, self.save_total_limit)
        except OSError as error:
            warn(f"WARNING: {folder}: older iterations can't be removed ({error.strerror}).")
        say(f"Saved {folder} (iteration {iteration}).")


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
    problems = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    found = [problem for problem in problems if problem]
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


def refuse_unless_finite(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise an error that names the first tensor with a NaN or infinite number in it.

    Raises:
        InputError: there is one.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"{where}: {name} has numbers that are NaN or infinite, so the model has diverged; weights that are finite "
                "are needed. A lower --lr from the checkpoint before may help."
            )


def _learned(weights: Mapping[str, torch.Tensor], adapters: AdapterConfig) -> dict[str, torch.Tensor]:
    """The tensors of a whole model with these adapters that fine-tuning has changed."""
    parts = tuple(f"{VISION}{part}." for part in adapters.part_rates)
    return {name: weights[name] for name in weights if is_adapter_name(name) or name.startswith(parts)}


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


def load_checkpoint(
    model: torch.nn.Module,
    args: argparse.Namespace,
    load_path: str | Path | Checkpoint | None = None,
    prefix: str = "",
    specific_iteration: int | None = None,
    convert: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> int:
    """Read a checkpoint's weights into model, and return the iteration to go on from. SAT calls this.

    Only weights are read; no code in the file is ever run. Adapters that the checkpoint doesn't have keep
    their fresh values.

    Args:
        load_path: a checkpoint, its folder, or its weights file; args.load if absent.
        args: `base` and `force_base` tell where an adapter's base is.
        prefix: take only the tensors whose names start with it, without it.
        specific_iteration: instead of the one that `latest` names.
        convert: gives what a tensor becomes, by its name. The tensors are then read one layer at a time, the largest
            first, so that no more than a layer is in memory beside what became of the others.

    Raises:
        InputError: no checkpoint there, one that can't be read, or one of another model.
    """
    place = load_path or args.load
    checkpoint = place if isinstance(place, Checkpoint) else Checkpoint.at(place, specific_iteration)
    module = getattr(model, "module", model)
    put_into = opened_for(module, checkpoint, args, prefix, convert)
    put_into(lambda name: True)
    mode = getattr(args, "mode", "inference")
    if mode == "inference":
        module.eval()
    return int(checkpoint.iteration) if mode == "pretrain" and checkpoint.iteration.isdigit() else 0


def opened_for(
    module: Any,
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    prefix: str = "",
    convert: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> Callable[[Callable[[str], bool]], None]:
    """Open a checkpoint for a module; the function that is returned loads the tensors whose names it is asked for.

    Args, Raises:
        As for `load_checkpoint`; what is returned raises InputError too.
    """
    checkpoint = with_base(checkpoint, getattr(args, "base", None))
    weights, module.base, module.tuned_names = whole_weights(checkpoint, getattr(args, "force_base", False))
    if convert is not None:
        weights = read_one_by_one(weights, checkpoint, module.tuned_names)
    weights = own_parts(weights, mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size())
    if convert is not None:
        assert isinstance(weights, LazyTensors)
        weights = weights.converted(convert)

    def put_into(is_asked_for: Callable[[str], bool]) -> None:
        _put_into(module, _chosen(weights, is_asked_for), prefix, checkpoint, is_asked_for)

    return put_into


def _chosen(weights: Mapping[str, torch.Tensor], is_asked_for: Callable[[str], bool]) -> Mapping[str, torch.Tensor]:
    if isinstance(weights, LazyTensors):
        return weights.renamed(lambda name: name if is_asked_for(name) else None)
    return {name: weights[name] for name in weights if is_asked_for(name)}


def _put_into(
    module: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    prefix: str,
    checkpoint: Checkpoint,
    is_asked_for: Callable[[str], bool],
) -> None:
    """Copy the tensors under prefix into module; into one on the meta device, put them themselves.

    Args:
        is_asked_for: names of the tensors that must not be missing.

    Raises:
        InputError: they are of another model, or some are missing.
    """
    path = checkpoint.weights_file()
    missing, unexpected = None, []
    on_meta = any(parameter.is_meta for parameter in module.parameters())
    of_sat = {name: vars(parameter) for name, parameter in module.named_parameters()}  # such as `model_parallel`
    for group in _with_progress_if_large(weights):
        selected = {name[len(prefix) :]: tensor for name, tensor in group.items() if name.startswith(prefix)}
        try:
            missing_here, unexpected_here = module.load_state_dict(selected, strict=False, assign=on_meta)
        except RuntimeError as error:  # torch lists every tensor of another shape
            raise InputError(
                f"{path}: the weights are of another model than {checkpoint.folder / CONFIG_FILE}: {error}"
            ) from None
        missing_in_all = set(missing_here)
        missing = [name for name in (missing_here if missing is None else missing) if name in missing_in_all]
        unexpected += unexpected_here
    if on_meta:
        for name, parameter in module.named_parameters():
            vars(parameter).update(of_sat.get(name, {}) | vars(parameter))
    needed = [name for name in missing or () if is_asked_for(prefix + name) and not is_adapter_name(name)]
    if needed:
        raise InputError(
            f"{path}: {len(needed)} tensors are missing (the first: {', '.join(needed[:3])}); needed are all the weights "
            "that model_config.json describes."
        )
    if unexpected:
        warn(f"{path}: {len(unexpected)} tensors belong to no part of this model and are left out: {unexpected[:3]} …")


def _with_progress_if_large(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """`by_layer`; of lazy tensors that take long, it is shown how far it is."""
    groups = by_layer(weights)
    if not isinstance(weights, LazyTensors) or size_in_bytes(weights) < SHOWN_FROM:
        return groups
    return with_progress(groups, len(layers(weights)), "layers loaded")


def read_one_by_one(
    weights: Mapping[str, torch.Tensor], checkpoint: Checkpoint, tuned_names: Collection[str]
) -> LazyTensors:
    """What `whole_weights` gave, each tensor read from its file when it is asked for, the largest first."""
    source = checkpoint.base or checkpoint
    lazy = weights
    if _is_one_file(source):
        lazy = _unmapped(source, read_weights(source.weights_file()))
    if checkpoint.base is not None:
        lazy = without_adapters(lazy)
    entries = lazy.entries if isinstance(lazy, LazyTensors) else {n: LazyTensor.of(lazy[n]) for n in lazy}
    if checkpoint.base is not None:
        entries = entries | {name: LazyTensor.of(weights[name]) for name in tuned_names}
    return LazyTensors(dict(sorted(entries.items(), key=lambda entry: -math.prod(entry[1].shape))))


def _is_one_file(checkpoint: Checkpoint) -> bool:
    """Whether its weights are in one file of SAT's."""
    return checkpoint.layout == "sat" and len(checkpoint.weights_files()) < 2


def _unmapped(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A checkpoint's own tensors, read from their file when they are asked for, where SAT wrote them into one file.

    A process that looks into a mapped file seems to take all of its bytes: the system maps megabytes around each look.
    """
    return one_by_one(checkpoint.weights_file(), weights) if _is_one_file(checkpoint) else weights


def open_weights(checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """The whole tensors in a checkpoint's own files, in either layout, under SAT's names: mapped or read when asked for.

    Raises:
        InputError: a file is missing or broken, or holds something else than weights.
    """
    if checkpoint.layout == "hf":
        return open_huggingface(checkpoint.folder, checkpoint.config["num_attention_heads"])
    parts = [read_weights(file) for file in checkpoint.weights_files() or [checkpoint.weights_file()]]
    return joined(parts, checkpoint.config) if len(parts) > 1 else parts[0]


def whole_weights(
    checkpoint: Checkpoint, force_base: bool = False
) -> tuple[Mapping[str, torch.Tensor], Base, set[str]]:
    """All the weights that a checkpoint stands for, mapped from the disk; their base; the names that aren't the base's.

    For an adapter checkpoint the base's weights and its own; for any other the base is the checkpoint itself, without
    its adapters.

    Args:
        checkpoint: an adapter checkpoint with its base, see `model.checkpoints.metadata.with_base`; or any other.
        force_base: take the base even if it isn't the one that the adapter was trained on.

    Raises:
        InputError: a file can't be read, the adapters in it are not whole, or the base is another one.
    """
    path = checkpoint.weights_file()
    weights = open_weights(checkpoint)
    refuse_unless_whole(weights, checkpoint.config, path)
    _warn_of_old_rows(checkpoint, weights)
    if checkpoint.base is None:
        adapters = {tensor for tensor in weights if is_adapter_name(tensor)}
        found = fingerprint(_unmapped(checkpoint, weights))
        return weights, Base(checkpoint.name, os.path.abspath(path), found), adapters
    recorded = base_of(checkpoint.config)
    base_path = checkpoint.base.weights_file()
    opened = open_weights(checkpoint.base)
    base_weights = without_adapters(opened)
    parts = tuple(f"{VISION}{part}." for part in AdapterConfig.from_json(checkpoint.config).part_rates)
    _refuse_missing("trained tensors", [n for n in base_weights if n.startswith(parts) and n not in weights], path)
    found = fingerprint(_unmapped(checkpoint.base, opened))
    used = Base(recorded.name, os.path.abspath(base_path), found)
    if not force_base:
        refuse_another_base(checkpoint, used)
    whole = base_weights.with_others(weights) if isinstance(base_weights, LazyTensors) else {**base_weights, **weights}
    return whole, used, set(weights)


def refuse_another_base(checkpoint: Checkpoint, used: Base) -> None:
    """Raise an error unless the base that is used is the one that a fine-tuned checkpoint was trained on.

    Raises:
        InputError: its weights are others.
    """
    recorded = base_of(checkpoint.config)
    if used.fingerprint != recorded.fingerprint:
        raise InputError(
            f"{checkpoint.folder}: trained on other weights than those of {used.path} (fingerprint "
            f"{recorded.fingerprint[:12]}, found {used.fingerprint[:12]}); --base with {recorded.name} as it was is needed, "
            "or --force_base to use this one all the same."
        )


def _warn_of_old_rows(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> None:
    """Say so if a whole model of SAT's looks as if it had been written before July 2023."""
    heads = checkpoint.config.get("num_attention_heads")
    if heads and checkpoint.layout == "sat" and len(checkpoint.weights_files()) == 1 and looks_old(weights, heads):
        warn(
            f"{checkpoint.name}: the rows of query_key_value look ordered as SAT did before July 2023, and then the answers "
            f"are wrong. python scripts/convert_checkpoint.py {checkpoint.name} DST --to sat --old_sat puts them in order."
        )


def refuse_unless_whole(weights: Mapping[str, torch.Tensor], config: ModelConfig, path: Path) -> None:
    """Raise an error where a checkpoint's adapters lack a tensor, or have a NaN or infinite number.

    Weights that weren't trained are not looked at: reading the base's 15 GB takes too long.

    Args:
        weights: all, or what was trained. path: where they come from, for the message.

    Raises:
        InputError: as said.
    """
    missing = [name for name in adapter_tensors(config) if name not in weights]
    _refuse_missing("tensors of its adapters", missing, path)
    learned = weights if is_adapter(config) else _learned(weights, AdapterConfig.from_json(config))
    refuse_unless_finite(learned, str(path))


def _refuse_missing(what: str, names: Sequence[str], path: Path) -> None:
    if names:
        raise InputError(
            f"{path}: {len(names)} {what} are missing (the first: {', '.join(names[:3])}); a checkpoint that is whole is "
            "needed."
        )


def without_adapters(weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint but for LoRA and P-Tuning, under the names that they have in a base model."""
    if isinstance(weights, LazyTensors):
        return weights.renamed(lambda name: None if is_adapter_name(name) else name.replace(".original.", "."))
    return {name.replace(".original.", "."): tensor for name, tensor in weights.items() if not is_adapter_name(name)}


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A hexadecimal SHA-256 that tells base models apart: of names, shapes, dtypes and samples of every tensor.

    Adapters don't count, so that a full checkpoint has its base's fingerprint unless the base was changed. Samples do:
    reading 15 GB at every start would take longer than loading them.
    """
    digest = hashlib.sha256()
    plain = without_adapters(weights)
    for name in sorted(plain):
        tensor = plain.entries[name] if isinstance(plain, LazyTensors) else LazyTensor.of(plain[name])
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        count = math.prod(tensor.shape)
        places = range(0, count, max(1, count // SAMPLES_PER_TENSOR))
        for numbers in tensor.some(places, SAMPLE_LENGTH):
            digest.update(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's weights file by name, mapped from the disk rather than read where it can be.

    Raises:
        InputError: the file is missing, broken, or holds something else than weights.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or "module" not in content:
        raise InputError(f'{path}: no "module" in it; a checkpoint of SAT has its weights there.')
    return content["module"]
