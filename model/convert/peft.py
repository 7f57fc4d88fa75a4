"""LoRA adapters from our checkpoints into PEFT's files, and back: they answer the same on the other library's model.

    ours, SAT's names                                      PEFT's, on Hugging Face's model
    ….query_key_value.matrix_A.0 .1 .2   [r, in]           ….query_key_value.lora_A.weight  [3r, in]   below each other
    ….query_key_value.matrix_B.0 .1 .2   [out / 3, r]      ….query_key_value.lora_B.weight  [out, 3r]  a block diagonal
    ….dense.matrix_A.0, .matrix_B.0                        ….dense.lora_A.weight, .lora_B.weight
    alpha, r                                               lora_alpha, r; for query_key_value three times both

The block diagonal's rows are ordered (head, 3, head_dim), as Hugging Face's query_key_value is. An adapter that PEFT
trained has no block diagonal. Its lora_A then stands in all three parts: its rank stays what it is.

Only LoRA has a place in both. QLoRA's factors convert too, but Hugging Face's model then has to be loaded in 4 bits as
well (bitsandbytes, nf4), or it answers worse, as a note says.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.adapter_config import LORA_TARGETS, AdapterConfig
from model.checkpoints.config_types import model_problems
from model.checkpoints.huggingface import rows_for_huggingface, rows_for_sat
from model.checkpoints.layout import Checkpoint, read_json_object, weights_path
from model.checkpoints.metadata import KEY, base_of, is_adapter
from model.checkpoints.save import description
from model.checkpoints.tensors import open_pickle, open_safetensors, size_in_bytes
from model.checkpoints.weights import open_weights, refuse_unless_whole, whole_weights
from model.checkpoints.whole import CONFIG_FILE, SHARED_FILES, UNFINISHED, json_text, put_in_place
from model.convert.huggingface import described_shapes, new_folder, write_safetensors
from model.convert.merge_lora import ITERATION
from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer
from model.errors import InputError, raise_problems
from model.progress import warn

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the names of the model's modules
LINEAR = rf"(transformer\.layers\.(\d+)\.(?:attention|mlp)\.({'|'.join(LORA_TARGETS)}))\."
OUR_NAME = re.compile(LINEAR + r"matrix_[AB]\.\d")
PEFTS_NAME = re.compile(LINEAR + r"lora_[AB]\.weight")
# What PEFT can do to a model beyond LoRA, with the value that leaves it alone.
PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "layer_replication": (None,), "lora_bias": (False, None),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base's weights
}  # fmt: skip


class Factors(NamedTuple):
    """LoRA of one linear in our form: a pair of factors for each of its stacked parts."""

    matrix_a: list[torch.Tensor]  # [r, in]
    matrix_b: list[torch.Tensor]  # [out / parts, r]


# --- to PEFT ----------------------------------------------------------------------------------------------------------


def to_peft(source: str | Checkpoint, destination: str) -> Path:
    """Write the LoRA of a checkpoint as PEFT's two files into the new folder destination.

    Raises:
        InputError: it has no LoRA, lacks a part of it, or has something besides that PEFT has no place for; destination is in use.
    """
    checkpoint = Checkpoint.find(source, "SRC")
    raise_problems(model_problems(checkpoint.config, str(checkpoint.config_file)))
    adapters = AdapterConfig.from_json(checkpoint.config)
    weights = open_weights(checkpoint)
    _refuse_more_than_lora(checkpoint, adapters, weights)
    refuse_unless_whole(weights, checkpoint.config, checkpoint.weights_file())
    heads = checkpoint.config["num_attention_heads"]
    modules = dict.fromkeys(found[1] for name in weights if (found := OUR_NAME.fullmatch(name)))
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        a, b = _as_one_pair(_factors(weights, module), heads)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    with new_folder(destination, size_in_bytes(tensors)) as folder:
        write_safetensors(folder / ADAPTER_WEIGHTS, tensors, iter(tensors.values()))
        config = _peft_config(checkpoint, adapters)
        (folder / ADAPTER_CONFIG).write_text(json_text(config, 2), encoding="utf-8")
    if "qlora" in adapters.methods:
        warn(
            f"{checkpoint.name}: QLoRA learned beside weights in 4 bits, and answers worse beside the base's in full width. Load "
            "the base in 4 bits there (bitsandbytes, nf4), or convert the merged model: scripts/merge_lora.py, then --to hf."
        )
    return Path(destination)


def _refuse_more_than_lora(
    checkpoint: Checkpoint, adapters: AdapterConfig, weights: Mapping[str, torch.Tensor]
) -> None:
    if not adapters.has_lora:
        raise InputError(f"{checkpoint.name}: no LoRA in it; --to peft needs a checkpoint of LoRA or QLoRA.")
    if adapters.has_ptuning:
        raise InputError(f"{checkpoint.name}: it has P-Tuning prefixes besides LoRA; --to peft needs LoRA alone.")
    others = [name for name in weights if not OUR_NAME.fullmatch(name)]
    if is_adapter(checkpoint.config) and others:
        raise InputError(
            f"{checkpoint.name}: {len(others)} trained tensors are no LoRA (the first: {others[0]}), and PEFT has no place "
            "for them; merge it, and convert the result with --to hf."
        )
    if adapters.part_rates:
        raise InputError(
            f"{checkpoint.name}: besides LoRA, {', '.join(adapters.part_rates)} was trained (--train_parts), and PEFT has no "
            "place for that; merge it, and convert the result with --to hf."
        )


def _factors(weights: Mapping[str, torch.Tensor], module: str) -> Factors:
    parts = sorted(name for name in weights if name.startswith(f"{module}.matrix_A."))
    matrix_a = [weights[name] for name in parts]
    return Factors(matrix_a, [weights[name.replace(".matrix_A.", ".matrix_B.")] for name in parts])


def _as_one_pair(factors: Factors, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A [parts · r, in] and lora_B [out, parts · r]."""
    if len(factors.matrix_a) == 1:
        return factors.matrix_a[0], factors.matrix_b[0]
    below_each_other = torch.block_diag(*factors.matrix_b)
    return torch.cat(factors.matrix_a), rows_for_huggingface(below_each_other, heads).contiguous()


def _peft_config(checkpoint: Checkpoint, adapters: AdapterConfig) -> dict[str, Any]:
    config = checkpoint.config
    layers = "|".join(map(str, sorted(adapters.lora_layers(config["num_layers"]))))
    targets = "|".join(adapters.lora_targets)
    name = base_of(config).name if config.get("finetuning", {}).get("base") else None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": name,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": _number(adapters.alpha),
        "lora_dropout": adapters.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        # A pattern, because the vision part has linears of the same names.
        "target_modules": rf"transformer\.layers\.({layers})\.(attention|mlp)\.({targets})",
        "rank_pattern": {"query_key_value": 3 * adapters.rank} if "query_key_value" in adapters.lora_targets else {},
        "alpha_pattern": {"query_key_value": _number(3 * adapters.alpha)}
        if "query_key_value" in adapters.lora_targets
        else {},
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


# --- from PEFT --------------------------------------------------------------------------------------------------------


def from_peft(source: str, destination: str, base: str | None = None, tokenizer: str | None = None) -> Path:
    """Write an adapter of PEFT's as an adapter checkpoint of ours into the new folder destination.

    Args:
        base: the model that it was trained on, in either layout; else the name that its configuration holds.
        tokenizer: where its file is, if the base's folder has none.

    Raises:
        InputError: it is more than LoRA of a VisualGLM, or its base isn't found or is another model; destination is in use.
    """
    folder = Path(source).expanduser()
    path = folder / ADAPTER_CONFIG
    settings = read_json_object(path, "SRC")
    _refuse_more_than_peft_lora(path, settings)
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{path}: no base_model_name_or_path; --base with the model that it was trained on is needed.")
    base_model = Checkpoint.find(str(name), "--base")
    if is_adapter(base_model.config):
        raise InputError(f"--base {name}: an adapter checkpoint too; the model that {source} was trained on is needed.")
    adapters, tensors = _our_adapters(folder, settings, base_model)
    _, recorded, _ = whole_weights(base_model)
    config = {
        **base_model.config,
        **adapters.to_json(),
        "model_class": "FineTuneVisualGLMModel",
        KEY: description(adapters, recorded, base_model.config["num_layers"], full=False),
    }
    vocabulary = ChatGLMTokenizer.from_pretrained(find_tokenizer(base_model.folder, tokenizer))
    with new_folder(destination, size_in_bytes(tensors)) as out:
        unfinished = out / f"{ITERATION}{UNFINISHED}"
        unfinished.mkdir()
        torch.save({"module": tensors, "iteration": int(ITERATION)}, weights_path(out, unfinished.name))
        (out / CONFIG_FILE).write_text(json_text(config, 4), encoding="utf-8")
        vocabulary.save_vocabulary(out)
        put_in_place(unfinished, out / ITERATION, (out / name for name in SHARED_FILES))
        (out / "latest").write_text(ITERATION)
    return Path(destination)


def _refuse_more_than_peft_lora(path: Path, settings: Mapping[str, Any]) -> None:
    for key, plain in PLAIN_LORA.items():
        if key in settings and settings[key] not in plain:
            raise InputError(f'{path}: "{key}" is {json.dumps(settings[key])}; {json.dumps(plain[0])} is needed.')
    alphas = {"lora_alpha": settings.get("lora_alpha")}
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InputError(f'{path}: "alpha_pattern" is {json.dumps(patterns)}; an object of numbers is needed.')
    for name, alpha in {**alphas, **patterns}.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise InputError(f'{path}: "{name}" is {json.dumps(alpha)}; a number is needed.')
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f'{path}: "alpha_pattern" has "{pattern}", which is no pattern ({error}).') from None


def _our_adapters(
    folder: Path, settings: Mapping[str, Any], base: Checkpoint
) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """The sizes of an adapter of PEFT's in our terms, and its tensors under our names."""
    pairs = _pairs(folder)
    _refuse_other_shapes(folder, pairs, base)
    layers = sorted({layer for _, layer, _ in pairs.values()})
    targets = [target for target in LORA_TARGETS if target in {target for _, _, target in pairs.values()}]
    if len(pairs) != len(layers) * len(targets):
        raise InputError(f"{folder}: some layers have LoRA on other linears than others; the same in all are needed.")
    heads = base.config["num_attention_heads"]
    factors = {module: _parts(a, b, target, heads) for module, ((a, b), _, target) in pairs.items()}
    scales = {module: _alpha(settings, module) / _divisor(settings, len(a)) for module, ((a, _), _, _) in pairs.items()}
    rank = max(len(parts.matrix_a[0]) for parts in factors.values())
    scale = next(iter(scales.values()))
    tensors = {}
    for module, parts in factors.items():
        for number, (a, b) in enumerate(zip(*parts, strict=True)):
            b = b if scales[module] == scale else b * (scales[module] / scale)
            missing = rank - len(a)
            tensors[f"{module}.matrix_A.{number}"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
            tensors[f"{module}.matrix_B.{number}"] = torch.nn.functional.pad(b, (0, missing))
    all_layers = layers == list(range(base.config["num_layers"]))
    adapters = AdapterConfig(
        methods=("lora",),
        rank=rank,
        alpha=round(scale * rank, 9),
        dropout=float(settings.get("lora_dropout") or 0),
        layers=None if all_layers else tuple(layers),
        targets=tuple(targets),
    )
    return adapters, {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _pairs(folder: Path) -> dict[str, tuple[tuple[torch.Tensor, torch.Tensor], int, str]]:
    """By module: lora_A and lora_B, the layer, and which of its linears it is."""
    file = folder / ADAPTER_WEIGHTS
    tensors = open_safetensors(file) if file.is_file() else open_pickle(file.with_suffix(".bin"))
    by_name = {name.removeprefix(PREFIX): tensor.read() for name, tensor in tensors.items()}
    others = [name for name in by_name if not PEFTS_NAME.fullmatch(name)]
    if others or not by_name:
        raise InputError(
            f"{folder}: {others[0] if others else 'nothing'} found; LoRA on {', '.join(LORA_TARGETS)} of the language "
            "model's layers is needed."
        )
    pairs = {}
    for name in by_name:
        found = PEFTS_NAME.fullmatch(name)
        assert found is not None
        a, b = (by_name.get(f"{found[1]}.lora_{factor}.weight") for factor in "AB")
        if a is None or b is None:
            there, lacking = "AB" if b is None else "BA"
            raise InputError(f"{folder}: {found[1]} has lora_{there} and no lora_{lacking}; both are needed.")
        pairs[found[1]] = ((a, b), int(found[2]), found[3])
    return pairs


def _refuse_other_shapes(
    folder: Path, pairs: Mapping[str, tuple[tuple[torch.Tensor, torch.Tensor], int, str]], base: Checkpoint
) -> None:
    linears = described_shapes(base)
    for module, ((a, b), _, _) in pairs.items():
        if f"{module}.weight" not in linears:
            raise InputError(
                f"{folder}: {module} has LoRA, and {base.name} has {base.config['num_layers']} layers; the model that the "
                "adapter was trained on is needed (--base)."
            )
        rows, columns = linears[f"{module}.weight"]
        rank = len(a) if a.dim() else 0
        if rank == 0 or list(a.shape) != [rank, columns] or list(b.shape) != [rows, rank]:
            raise InputError(
                f"{folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; for {base.name} [r, {columns}] "
                f"and [{rows}, r] are needed: a whole adapter, and the model that it was trained on (--base)."
            )


def _parts(a: torch.Tensor, b: torch.Tensor, target: str, heads: int) -> Factors:
    """Factors for each stacked part, of one pair: three of a third of the rank where B is a block diagonal."""
    if target != "query_key_value":
        return Factors([a], [b])
    b_of_parts = list(rows_for_sat(b, heads).chunk(3))
    rank, rest = divmod(len(a), 3)
    if rest == 0 and torch.equal(
        torch.cat(b_of_parts),
        torch.block_diag(*(part[:, i * rank : (i + 1) * rank] for i, part in enumerate(b_of_parts))),
    ):
        return Factors(list(a.chunk(3)), [part[:, i * rank : (i + 1) * rank] for i, part in enumerate(b_of_parts)])
    return Factors([a] * 3, b_of_parts)


def _alpha(settings: Mapping[str, Any], module: str) -> float:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(settings["lora_alpha"])


def _divisor(settings: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if settings.get("use_rslora") else rank
