"""The weights of a checkpoint: found in either layout, held against the base that they belong to, and put into a model.

    load_checkpoint(model, args, place)         all of them; what SAT calls
    put_into = opened_for(module, checkpoint, args)
    put_into(lambda name: …)                    or the tensors of some names first, and others later

A tensor is mapped from the disk, or read when it is asked for: no more than a layer is in memory beside the model's own. How
checkpoints are written is in `model.checkpoints.save`.
"""

import argparse
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import Checkpoint, ModelConfig
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
from model.checkpoints.model_parallel import joined, own_parts
from model.checkpoints.packed import STATE, in_full_width, packings, states
from model.checkpoints.tensors import (
    LazyTensor,
    LazyTensors,
    by_layer,
    is_named_tensors,
    layers,
    load_tensors,
    looks_old,
    one_by_one,
    open_huggingface,
    shapes,
    size_in_bytes,
    todays_names,
)
from model.checkpoints.whole import CONFIG_FILE
from model.errors import InputError
from model.progress import count_of, warn, with_progress
from model.sat_compat import import_sat

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)

SAMPLES_PER_TENSOR = 16  # places, spread evenly, where a fingerprint looks into a tensor
SAMPLE_LENGTH = 32  # numbers in a row that it reads there
OF_A_LAYER = re.compile(r"transformer\.layers\.(\d+)\..*\.matrix_A\.")
SHOWN_FROM = 2**30  # bytes of weights; smaller ones are there before a line about them is read


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
                f"{path}: the weights are of another model than {checkpoint.config_file}: {error}"
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
            f"{path}: {count_of(len(needed), 'tensor is', 'tensors are')} missing (the first: {', '.join(needed[:3])}); needed are all the weights "
            f"that {checkpoint.config_file.name} describes."
        )
    if unexpected:
        warn(f"{path}: {len(unexpected)} tensors belong to no part of this model and are left out: {unexpected[:3]} …")


def _with_progress_if_large(weights: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """`by_layer`; of lazy tensors that take long, it is shown how far it is."""
    groups = by_layer(weights)
    if not isinstance(weights, LazyTensors) or size_in_bytes(weights) < SHOWN_FROM:
        return groups
    opened = shapes(weights)
    sizes = [size_in_bytes({name: opened[name] for name in names}) for names in layers(weights)]
    return with_progress(groups, len(sizes), "layers loaded", sizes=sizes)


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
    entries = LazyTensors.of(lazy).entries
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
    """All the weights that a checkpoint stands for, none read yet; their base; the names that aren't the base's.

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
    if problem := old_rows_problem(checkpoint, weights):
        warn(problem)
    if checkpoint.base is None:
        adapters = {tensor for tensor in weights if is_adapter_name(tensor)}
        found = fingerprint(_unmapped(checkpoint, weights))
        return weights, Base(checkpoint.name, os.path.abspath(path), found), adapters
    recorded = base_of(checkpoint.config)
    base_path = checkpoint.base.weights_file()
    opened = open_weights(checkpoint.base)
    base_weights = without_adapters(opened)
    parts = tuple(f"{VISION}{part}." for part in AdapterConfig.from_json(checkpoint.config).part_rates)
    _refuse_missing(
        ("trained tensor is", "trained tensors are"),
        [n for n in base_weights if n.startswith(parts) and n not in weights],
        path,
    )
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


def old_rows_problem(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> str:
    """A sentence if a whole model of SAT's looks as if it had been written before July 2023; else empty."""
    heads = checkpoint.config.get("num_attention_heads")
    if heads and checkpoint.layout == "sat" and len(checkpoint.weights_files()) == 1 and looks_old(weights, heads):
        return (
            f"{checkpoint.name}: the rows of query_key_value look ordered as SAT did before July 2023, and then the answers "
            f"are wrong. python scripts/convert_checkpoint.py {checkpoint.name} DST --to sat --old_sat puts them in order."
        )
    return ""


def refuse_unless_whole(weights: Mapping[str, torch.Tensor], config: ModelConfig, path: Path) -> None:
    """Raise an error where a checkpoint's adapters lack a tensor, or have a NaN or infinite number.

    Weights that weren't trained are not looked at: reading the base's 15 GB takes too long.

    Args:
        weights: all, or what was trained. path: where they come from, for the message.

    Raises:
        InputError: as said.
    """
    missing = [name for name in adapter_tensors(config) if name not in weights]
    if missing and "layer_range" not in config and KEY not in config:
        _refuse_unnamed_layers(weights, config, path)
    _refuse_missing(("tensor of its adapters is", "tensors of its adapters are"), missing, path)
    learned = weights if is_adapter(config) else learned_tensors(weights, AdapterConfig.from_json(config))
    refuse_unless_finite(learned, str(path))


def _refuse_unnamed_layers(weights: Mapping[str, torch.Tensor], config: ModelConfig, path: Path) -> None:
    """Raise an error that names the layers with LoRA, if that is all that the config lacks: they stood in the code once.

    Raises:
        InputError: as said.
    """
    layers = sorted({int(found[1]) for name in weights if (found := OF_A_LAYER.match(name))})
    if layers and all(name in weights for name in adapter_tensors({**config, "layer_range": layers})):
        raise InputError(
            f"{path}: LoRA is in layers {', '.join(map(str, layers))} only, which the script of May 2023 had in its code; "
            f'"layer_range": {layers} is needed in {path.parent.with_name(CONFIG_FILE)}.'
        )


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


def learned_tensors(weights: Mapping[str, torch.Tensor], adapters: AdapterConfig) -> dict[str, torch.Tensor]:
    """The tensors of a whole model with these adapters that fine-tuning has changed."""
    parts = tuple(f"{VISION}{part}." for part in adapters.part_rates)
    return {name: weights[name] for name in weights if is_adapter_name(name) or name.startswith(parts)}


def _refuse_missing(what: tuple[str, str], names: Sequence[str], path: Path) -> None:
    if names:
        raise InputError(
            f"{path}: {count_of(len(names), *what)} missing (the first: {', '.join(names[:3])}); a checkpoint that is whole "
            "is needed."
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
    for name, tensor in sorted(LazyTensors.of(without_adapters(weights)).entries.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        count = math.prod(tensor.shape)
        places = range(0, count, max(1, count // SAMPLES_PER_TENSOR))
        for numbers in tensor.some(places, SAMPLE_LENGTH):
            digest.update(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a checkpoint's weights file by name, mapped from the disk rather than read where it can be.

    Those of QLoRA that the script of 2023 saved in 4 bits are in full width: see `model.checkpoints.packed`.

    Raises:
        InputError: the file is missing, broken, or holds something else than weights.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or "module" not in content:
        raise InputError(f'{path}: no "module" in it; a checkpoint of SAT has its weights there.')
    module = content["module"]
    packed = states(module)
    tensors = {name: module[name] for name in module if not str(name).endswith(f".{STATE}")} if packed else module
    if not is_named_tensors(tensors):
        raise InputError(f'{path}: something else than tensors in its "module"; named tensors are needed there.')
    return _in_full_width(todays_names(tensors), packed, path) if packed else todays_names(tensors)


def _in_full_width(tensors: Mapping[str, torch.Tensor], packed: Mapping[str, Any], path: Path) -> LazyTensors:
    """The tensors of a QLoRA checkpoint of 2023, each packed weight unpacked when it is asked for."""
    try:
        how = packings(packed, tensors)
    except ValueError:
        raise InputError(
            f"{path}: weights of QLoRA that bitsandbytes packed otherwise than the script of 2023 had it done; such as that "
            "saved, or weights that are not packed, are needed."
        ) from None
    again = tuple(f"{name}." for name in how)  # later bitsandbytes saves a state's tensors a second time
    entries = {name: LazyTensor.of(tensor) for name, tensor in tensors.items() if not name.startswith(again)}
    for name, packing in how.items():
        read = functools.partial(in_full_width, tensors[name], packing)
        entries[name] = LazyTensor(packing.shape, packing.dtype, read)
    return LazyTensors(entries)
