"""The layout in which VisualGLM-6B is published for Hugging Face's transformers, in SAT's terms.

    <folder>/config.json                                  what to build
    <folder>/model.safetensors, pytorch_model.bin         the weights, or
    <folder>/model.safetensors.index.json, …bin.index.json   the names of the files that hold them
    <folder>/ice_text.model                               the tokenizer

    Hugging Face                                          SAT
    transformer.…                                         the same, but for:
    transformer.layers.N.attention.query_key_value.…      rows (head, 3, head_dim) are (3, head, head_dim)
    transformer.layers.N.attention.rotary_emb.inv_freq    mixins.chatglm-attn.rotary_emb.inv_freq, once
    lm_head.weight                                        mixins.chatglm-final.lm_head.weight
    image_encoder.…                                       mixins.eva.model.…

Only the standard library is imported.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.checkpoints.broken_files import what_it_is_instead
from model.checkpoints.config_types import KINDS, problems_of_kind
from model.errors import InputError, raise_problems

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS_FILES = ("model.safetensors", *INDEX_FILES[:1], "pytorch_model.bin", *INDEX_FILES[1:])  # the first is taken

LAYERS_OF_THE_RELEASED_CODE = 28  # it scales the residuals for so many, whatever its config says
HEAD = "lm_head.weight"
HEAD_IN_SAT = "mixins.chatglm-final.lm_head.weight"
VISION = "image_encoder."
VISION_IN_SAT = "mixins.eva.model."
ROTARY = re.compile(r"transformer\.layers\.(\d+)\.attention\.rotary_emb\.inv_freq")
ROTARY_IN_SAT = "mixins.chatglm-attn.rotary_emb.inv_freq"
QUERY_KEY_VALUE = re.compile(r"transformer\.layers\.\d+\.attention\.query_key_value\.(?:original\.)?(weight|bias)")

# Keys of the config that have one name and one meaning in both layouts.
SHARED_KEYS = (
    "num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size", "max_sequence_length",
    "image_length", "bos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id",
)  # fmt: skip
OPTIONAL_KEYS = ("layernorm_epsilon", "hidden_dropout", "attention_dropout")
VISION_KEYS = {"eva_config": "eva_args", "qformer_config": "qformer_args"}
_NAMES_HERE = {key: key for key in SHARED_KEYS + OPTIONAL_KEYS} | {ours: theirs for theirs, ours in VISION_KEYS.items()}
_KINDS_HERE = {(_NAMES_HERE[path[0]], *path[1:]): kind for path, kind in KINDS.items() if path[0] in _NAMES_HERE}
# The classes that transformers loads these weights into. Their code stays in the repository that published it.
CODE = "THUDM/visualglm-6b--"
CLASSES = {
    "AutoConfig": f"{CODE}configuration_chatglm.ChatGLMConfig",
    "AutoModel": f"{CODE}modeling_chatglm.ChatGLMForConditionalGenerationWithImage",
    "AutoModelForSeq2SeqLM": f"{CODE}modeling_chatglm.ChatGLMForConditionalGenerationWithImage",
}


# --- the folder -------------------------------------------------------------------------------------------------------


def folder_of(path: Path) -> Path | None:
    """The folder in this layout that a path is, or that its weights file lies in; None where it is none."""
    folder = path.parent if path.name in WEIGHTS_FILES and path.is_file() else path
    return folder if (folder / CONFIG_FILE).is_file() else None


def weights_files(folder: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
        InputError: there are none, one is missing, or one is seen to hold no weights.
    """
    first = weights_file(folder)
    files = [first]
    if first.name in INDEX_FILES:
        try:
            places = json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"{first}: can't be read ({type(error).__name__}); needed is an index with a weight_map."
            ) from None
        names = sorted({str(place) for place in places})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise InputError(f"{first}: {outside[0]!r} found in it; the name of a file beside it is needed.")
        files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(files)} weights files are missing (the first: {missing[0]}); all that "
            f"{first.name} names are needed."
        )
    for file in files:
        problem = what_it_is_instead(file)
        if problem:
            raise InputError(f"{file}: no weights in it: {problem}; the whole file is needed.")
    return files


def weights_file(folder: Path) -> Path:
    """The one file that holds the weights, or the index of several.

    Raises:
        InputError: there is none.
    """
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder}: no weights in it; one of {', '.join(WEIGHTS_FILES)} is needed.")


# --- the configuration ------------------------------------------------------------------------------------------------


def sat_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`model_config.json` for a model with this `config.json`.

    Args:
        where: the file, for messages.

    Raises:
        InputError: it is of another model, or of quantised weights, or a value is of another kind than its key has.
    """
    needed = (*SHARED_KEYS, *VISION_KEYS)
    missing = [f'"{key}"' for key in needed if key not in config]
    if missing:
        raise InputError(f"{where}: no {', '.join(missing)}; a VisualGLM for Hugging Face has {', '.join(needed)}.")
    if config.get("quantization_bit"):
        raise InputError(
            f'{where}: "quantization_bit" is {config["quantization_bit"]}; weights that are not quantised are needed.'
        )
    raise_problems(problems_of_kind(config, _KINDS_HERE, where))
    return {
        "model_class": "VisualGLMModel",
        "tokenizer_type": "outer_tokenizer",
        "layernorm_order": "post",
        "model_parallel_size": 1,
        "use_bias": True,
        **{key: config[key] for key in (*SHARED_KEYS, *OPTIONAL_KEYS) if key in config},
        **{ours: config[theirs] for theirs, ours in VISION_KEYS.items()},
    }


def huggingface_config(config: Mapping[str, Any], eos_token_id: int, dtype: str) -> dict[str, Any]:
    """`config.json` for a model with this `model_config.json`.

    Args:
        eos_token_id: which SAT leaves to the tokenizer. dtype: of the weights, as in "float16".
    """
    shared = {key: config[key] for key in (*SHARED_KEYS, *OPTIONAL_KEYS) if key in config}
    return {
        "architectures": ["ChatGLMModel"],
        "auto_map": CLASSES,
        "model_type": "chatglm",
        "layernorm_epsilon": 1e-05,
        **shared,
        "eos_token_id": eos_token_id,
        "position_encoding_2d": True,
        "torch_dtype": dtype,
        "use_cache": True,
        **{theirs: config[ours] for theirs, ours in VISION_KEYS.items()},
    }


# --- names and order of the tensors -----------------------------------------------------------------------------------


def sat_name(name: str) -> str | None:
    """SAT's name of a tensor; None for the rotary frequencies of all layers but the first, which are the same.

    Raises:
        InputError: it belongs to no part of a VisualGLM.
    """
    rotary = ROTARY.fullmatch(name)
    if rotary:
        return ROTARY_IN_SAT if int(rotary[1]) == 0 else None
    if name == HEAD:
        return HEAD_IN_SAT
    if name.startswith(VISION):
        return VISION_IN_SAT + name.removeprefix(VISION)
    if name.startswith("transformer."):
        return name
    raise InputError(f"{name}: a tensor of no part of a VisualGLM; needed are transformer, lm_head and image_encoder.")


def huggingface_names(name: str, num_layers: int) -> list[str]:
    """Hugging Face's names of one of SAT's tensors: one, or for the rotary frequencies one a layer.

    Raises:
        InputError: Hugging Face's layout has no place for it.
    """
    if name == ROTARY_IN_SAT:
        return [f"transformer.layers.{layer}.attention.rotary_emb.inv_freq" for layer in range(num_layers)]
    if name == HEAD_IN_SAT:
        return [HEAD]
    if name.startswith(VISION_IN_SAT):
        return [VISION + name.removeprefix(VISION_IN_SAT)]
    if name.startswith("transformer."):
        return [name]
    raise InputError(f"{name}: Hugging Face's layout has no place for this tensor; a plain VisualGLM is needed.")


def is_reordered(name: str) -> bool:
    """Whether the rows of this tensor have another order in the two layouts."""
    return QUERY_KEY_VALUE.fullmatch(name) is not None


def rows_for_sat(tensor: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows (head, 3, head_dim) put into the order (3, head, head_dim): query, key and value below each other."""
    return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def rows_for_huggingface(tensor: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows (3, head, head_dim) put into the order (head, 3, head_dim)."""
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
