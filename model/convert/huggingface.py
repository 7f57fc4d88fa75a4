"""A checkpoint from SAT's layout into Hugging Face's, and back: from file to file, one tensor in memory at a time.

    convert("visualglm-6b", "published", "hf")      config.json, model-*.safetensors with their index, the tokenizer
    convert("published", "visualglm-6b", "sat")     model_config.json, latest, 1/mp_rank_00_model_states.pt, the tokenizer

There and back gives the same bytes of every tensor. What was fine-tuned is merged first, or goes to and from PEFT: see
`model.convert.peft`. Hugging Face's own code for the model is not written: config.json names the repository that has it.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from model.adapter_config import AdapterConfig
from model.checkpoints.config_types import model_problems
from model.checkpoints.huggingface import CONFIG_FILE as HUGGINGFACE_CONFIG
from model.checkpoints.huggingface import (
    INDEX_FILES,
    LAYERS_OF_THE_RELEASED_CODE,
    ROTARY_IN_SAT,
    huggingface_config,
    huggingface_names,
    is_reordered,
    rows_for_huggingface,
    rows_for_sat,
)
from model.checkpoints.layout import Checkpoint, weights_path
from model.checkpoints.metadata import is_adapter
from model.checkpoints.model_parallel import joined
from model.checkpoints.sizes import folder_problems, new_folder_problems
from model.checkpoints.tensors import (
    DTYPES,
    LazyTensors,
    looks_old,
    one_by_one,
    shapes,
    size_in_bytes,
    write_weights,
)
from model.checkpoints.weights import open_weights, read_weights, without_adapters
from model.checkpoints.whole import CONFIG_FILE, SHARED_FILES, UNFINISHED, json_text, put_in_place, sync
from model.convert.merge_lora import ITERATION
from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer
from model.errors import InputError, raise_problems
from model.progress import say, with_progress
from model.sat_compat import model_only, quieten
from model.visualglm import VisualGLMModel, without_memory

LAYER = re.compile(r"transformer\.layers\.\d+\.")  # before the names of the language model's tensors in a layer
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def convert(
    source: str | Checkpoint,
    destination: str,
    layout: str,
    max_shard_size: int = 2 * 10**9,
    old_sat: bool | None = None,
    tokenizer: str | None = None,
) -> Path:
    """Write a checkpoint's weights, configuration and tokenizer into the new folder destination, in a layout.

    Args:
        source: anything that `Checkpoint.find` takes, of a plain model; with old_sat and to "sat", of any whole model.
        layout: "hf" or "sat". From SAT to SAT, model-parallel parts are put together and old rows put in order.
        max_shard_size: of one file of Hugging Face's layout, in bytes; a tensor is never divided.
        old_sat: whether query_key_value has its rows in the order of SAT before July 2023, which is Hugging Face's.
            None: no, and an error where they look as if they had.
        tokenizer: where its file is, if the checkpoint's folder has none.

    Raises:
        InputError: source can't be used, is fine-tuned or isn't whole, or destination is in use or has no room.
    """
    checkpoint = Checkpoint.find(source, "SRC")
    if not (old_sat and layout == "sat") or is_adapter(checkpoint.config):
        refuse_adapters(checkpoint)
    raise_problems(model_problems(checkpoint.config, str(checkpoint.config_file)))
    parts = 1 if checkpoint.layout == "hf" else len(checkpoint.weights_files())
    if checkpoint.layout == layout and not (layout == "sat" and (parts > 1 or old_sat)):
        raise InputError(f"{checkpoint.name}: it has the layout of --to {layout} already; there is nothing to convert.")
    weights = plain_weights(checkpoint, parts, old_sat)
    vocabulary = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder, tokenizer))
    with new_folder(destination, size_in_bytes(weights)) as folder:
        if layout == "hf":
            _write_huggingface(folder, weights, checkpoint.config, vocabulary, max_shard_size)
            vocabulary.save_pretrained(folder)
        else:
            _write_sat(folder, weights, checkpoint.config, vocabulary)
    if layout == "hf" and checkpoint.config["num_layers"] != LAYERS_OF_THE_RELEASED_CODE:
        say(
            f"{destination}: {checkpoint.config['num_layers']} layers; Hugging Face's released code computes with "
            f"{LAYERS_OF_THE_RELEASED_CODE} whatever config.json says, so that its answers differ. Ours takes the config's."
        )
    return Path(destination)


def refuse_adapters(checkpoint: Checkpoint) -> None:
    """Do nothing if a checkpoint is a plain model.

    Raises:
        InputError: it has adapters, or nothing else.
    """
    adapters = AdapterConfig.from_json(checkpoint.config)
    if adapters.has_ptuning:
        raise InputError(
            f"{checkpoint.name}: it has P-Tuning prefixes, for which the other layout has no place; a plain model, or LoRA, "
            "is needed."
        )
    if adapters.has_lora or is_adapter(checkpoint.config):
        raise InputError(
            f"{checkpoint.name}: it is fine-tuned with LoRA; a plain model is needed. Merge it first: python "
            f"scripts/merge_lora.py {checkpoint.name} MERGED. Or convert its adapter alone: --to peft."
        )


# --- reading ----------------------------------------------------------------------------------------------------------


def plain_weights(checkpoint: Checkpoint, parts: int, old_sat: bool | None) -> Mapping[str, torch.Tensor]:
    """A checkpoint's tensors under SAT's names and in today's order, of all its model-parallel parts."""
    if checkpoint.layout == "hf":
        if old_sat:
            raise InputError(
                f"--old_sat: {checkpoint.name} is in Hugging Face's layout; a checkpoint of SAT is needed."
            )
        weights = open_weights(checkpoint)
        refuse_another_model(checkpoint, weights)
        return weights
    opened = [one_by_one(file, read_weights(file)) for file in map(checkpoint.weights_file, range(parts))]
    weights = joined(opened, checkpoint.config) if parts > 1 else opened[0]
    refuse_another_model(checkpoint, without_adapters(weights))
    heads = checkpoint.config["num_attention_heads"]
    if old_sat is None and looks_old(weights, heads):
        raise InputError(
            f"{checkpoint.name}: the rows of query_key_value look ordered as SAT did before July 2023; --old_sat to put "
            "them into today's order is needed, or --no-old_sat to take them as they are."
        )
    return _in_todays_order(weights, heads) if old_sat else weights


def refuse_another_model(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor]) -> None:
    """Do nothing if a checkpoint's tensors are those that its configuration describes.

    Raises:
        InputError: one is missing, has another shape, or is of a layer that the model doesn't have.
    """
    described = described_shapes(checkpoint)
    found = {name: list(tensor.shape) for name, tensor in shapes(weights).items()}
    differences = [
        # Nobody reads the rotary buffer: it is made anew.
        *(f"{name} is missing" for name in described if name not in found and name != ROTARY_IN_SAT),
        *(
            f"{name} is {found[name]}, not {shape}"
            for name, shape in described.items()
            if found.get(name, shape) != shape
        ),
        *(f"{name} is in no layer of it" for name in found if LAYER.match(name) and name not in described),
    ]
    if differences:
        raise InputError(
            f"{checkpoint.name}: {len(differences)} tensors are not those that {checkpoint.config_file.name} describes (the first: "
            f"{'; '.join(differences[:3])}); all the weights of that model are needed."
        )


def described_shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The names of the plain model's tensors that a checkpoint's configuration describes, and their shapes."""
    quieten()
    with model_only(), without_memory():
        args = VisualGLMModel.get_args(skip_init=True, device="meta")
        model, _ = VisualGLMModel.from_pretrained(checkpoint, args, build_only=True)
    return {name: list(tensor.shape) for name, tensor in model.tensors().entries.items()}


def _in_todays_order(weights: Mapping[str, torch.Tensor], heads: int) -> LazyTensors:
    """LoRA's factors stay as they are: they were for query, key and value then too."""

    def in_order(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return rows_for_sat(tensor, heads) if is_reordered(name) else tensor

    return LazyTensors.of(weights).converted(in_order)


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(destination: str, bytes_needed: int) -> Iterator[Path]:
    """A folder beside destination to be filled inside the block, that gets destination's name when all is there.

    Raises:
        InputError: something is there already, or there is no room.
    """
    target = Path(destination).expanduser()
    raise_problems(new_folder_problems("DST", destination) or folder_problems("DST", destination, bytes_needed))
    unfinished = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a conversion that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                sync(path)
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    except OSError as error:
        raise InputError(f"DST {destination}: {error.strerror or error}; room to write it is needed.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json_text(content, 2) + "\n", encoding="utf-8")


def _write_sat(
    folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], tokenizer: ChatGLMTokenizer
) -> None:
    unfinished = folder / f"{ITERATION}{UNFINISHED}"
    unfinished.mkdir()
    write_weights(weights_path(folder, unfinished.name), shapes(weights), weights.__getitem__, int(ITERATION))
    _write_json(folder / CONFIG_FILE, {**config, "model_parallel_size": 1})
    tokenizer.save_vocabulary(folder)
    put_in_place(unfinished, folder / ITERATION, (folder / name for name in SHARED_FILES))
    (folder / "latest").write_text(ITERATION)


def _write_huggingface(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    tokenizer: ChatGLMTokenizer,
    max_shard_size: int,
) -> None:
    heads, num_layers = config["num_attention_heads"], config["num_layers"]
    like = shapes(weights)
    ours = {theirs: name for name in like for theirs in huggingface_names(name, num_layers)}

    def value(theirs: str) -> torch.Tensor:
        tensor = weights[ours[theirs]]
        return rows_for_huggingface(tensor, heads) if is_reordered(theirs) else tensor

    write_shards(folder, {theirs: like[name] for theirs, name in ours.items()}, value, max_shard_size)
    dtype = like["transformer.word_embeddings.weight"].dtype
    named_dtype = str(dtype).removeprefix("torch.")
    _write_json(folder / HUGGINGFACE_CONFIG, huggingface_config(config, tokenizer.eos_token_id, named_dtype))


def write_shards(
    folder: Path, like: Mapping[str, torch.Tensor], value: Callable[[str], torch.Tensor], max_shard_size: int
) -> None:
    """Write tensors as safetensors, in as many files as needed, with an index where there are several.

    Args:
        like: tensors of these names, shapes and dtypes. value: gives the tensor of a name.
    """
    shards = _shards(like, max_shard_size)
    sizes = [tensor.nbytes for tensor in shapes(like).values()]
    tensors = (value(name) for name in with_progress(list(like), len(like), "Tensors written", sizes=sizes))
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, {name: like[name] for name in shard}, islice(tensors, len(shard)))
        files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": size_in_bytes(like)}, "weight_map": files})


def _shards(like: Mapping[str, torch.Tensor], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in like.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_safetensors(path: Path, like: Mapping[str, torch.Tensor], tensors: Iterable[torch.Tensor]) -> None:
    """Write one file of the safetensors format: the length of a header, the header in JSON, the numbers.

    The library's own writer needs every tensor at once. Format: https://huggingface.co/docs/safetensors

    Args:
        like: the names, shapes and dtypes. tensors: their numbers, in the same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES_OF_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
