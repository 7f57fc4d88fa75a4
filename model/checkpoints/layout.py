"""Where the files of a checkpoint lie, in SAT's layout.

    <folder>/model_config.json                        what to build, and how it was fine-tuned
    <folder>/latest                                   the iteration to load
    <folder>/<iteration>/mp_rank_00_model_states.pt   the weights of model-parallel rank 0
    <folder>/ice_text.model                           the tokenizer; older checkpoints lack it

    checkpoint = Checkpoint.find("visualglm-6b")      once, from what the user gave; then it is handed on

Only the standard library is imported.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, cast

from model.adapter_config import AdapterKeys
from model.checkpoints.config_types import type_problems
from model.errors import InputError, raise_problems

CONFIG_FILE = "model_config.json"
MOST_OF_LATEST = 40  # bytes: more isn't the number of an iteration


class BaseRecord(TypedDict):
    """What an adapter checkpoint says of the weights that it was trained on."""

    name: str
    path: str
    fingerprint: str


class Finetuning(TypedDict, total=False):
    """What a checkpoint says of its fine-tuning, see `model.checkpoints.metadata`."""

    contents: str
    base: BaseRecord
    methods: list[str]
    trained_parts: list[str]
    versions: dict[str, str]
    lora: dict[str, object]
    checkpoint: str


class EvaArgs(TypedDict, total=False):
    """The sizes of the vision tower, as far as this code reads them."""

    image_size: list[int]  # height and width, pixels
    patch_size: int  # pixels


class ModelConfig(AdapterKeys, total=False):
    """What `model_config.json` holds, as far as this code reads it; `model.cli.flag_checks` checks the types."""

    num_layers: int
    hidden_size: int
    inner_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_sequence_length: int
    layernorm_order: str
    image_length: int
    eva_args: EvaArgs
    qformer_args: dict[str, object]
    finetuning: Finetuning


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is on the disk, and its configuration, which is read once."""

    name: str  # as the user gave it, for messages
    folder: Path
    iteration: str  # a number, or "release"
    config: ModelConfig = field(repr=False, compare=False)
    base: "Checkpoint | None" = None  # of an adapter checkpoint, once it has been looked for

    @classmethod
    def find(cls, name: "str | Path | Checkpoint", flag: str = "--from_pretrained") -> "Checkpoint":
        """The checkpoint that the value of a flag means: a folder as given, else the name in $SAT_HOME.

        Given a checkpoint's folder, the iteration is the one that `latest` names. An iteration's folder may be given
        too, or the weights in it. A Checkpoint is returned as it is.

        Raises:
            InputError: nothing is there, or a part is missing, or the configuration can't be read.
        """
        if isinstance(name, Checkpoint):
            return name
        name = str(name)
        given, in_home = Path(name).expanduser(), _sat_home() / name
        found = next((path for path in (given, in_home) if path.exists()), None)
        if found is None:
            raise InputError(
                f"{flag} {name}: no such folder, neither {given.absolute()} nor {in_home}; give "
                f"{flag} FOLDER, or unpack the checkpoint to {in_home}."
            )
        folder, iteration = _folder_and_iteration(found)
        problem = (
            checkpoint_problem(folder, (CONFIG_FILE, "latest"))
            if iteration is None
            else _missing_file(folder, (CONFIG_FILE,))
        )
        if problem:
            raise InputError(f"{flag} {name}: {problem}")
        return cls(name, folder, iteration or _latest(folder), _read_config(folder))

    @classmethod
    def at(cls, place: str | Path, iteration: int | None = None) -> "Checkpoint":
        """The checkpoint in a folder or one of its parts, as SAT's --load takes it: a configuration is not needed.

        Args:
            iteration: instead of the one that `latest` names.

        Raises:
            InputError: the folder has no `latest`, or its configuration can't be read.
        """
        folder, found = _folder_and_iteration(Path(place))
        if iteration is not None:
            found = str(iteration)
        if found is None and not (folder / "latest").is_file():
            raise InputError(f"{place}: no file named latest; a checkpoint folder has one.")
        config = _read_config(folder) if (folder / CONFIG_FILE).is_file() else ModelConfig()
        return cls(str(place), folder, found or _latest(folder), config)

    def weights_file(self, rank: int = 0) -> Path:
        """The weights of a model-parallel rank."""
        return weights_path(self.folder, self.iteration, rank)


def weights_path(folder: Path, iteration: str | int, rank: int = 0) -> Path:
    """Where a checkpoint folder has the weights of an iteration and a model-parallel rank."""
    return folder / str(iteration) / f"mp_rank_{rank:02d}_model_states.pt"


def _read_config(folder: Path) -> ModelConfig:
    what = "The checkpoint's configuration"
    config = read_json_object(folder / CONFIG_FILE, what)
    raise_problems(type_problems(config, f"{what} {folder / CONFIG_FILE}"))
    return cast(ModelConfig, config)


def read_json_object(path: str | Path, what: str) -> dict[str, object]:
    """The JSON object in a file.

    Args:
        what: who asked for it, to begin the message with: a flag, or "The checkpoint's config".

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, not JSON, or not an object.
    """
    where = f"{what} {path}"
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where}: no such file; a JSON file is needed.") from None
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}; a JSON file is needed.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start} is not UTF-8; JSON in UTF-8 is needed.") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); an object {{…}} is needed."
        ) from None
    except (RecursionError, ValueError) as error:  # brackets too deep, a number of thousands of digits
        raise InputError(f"{where}: can't be read as JSON ({error}); an object {{…}} is needed.") from None
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
        raise InputError(f"{where}: {found} found; an object {{…}} is needed.")
    return value


def _sat_home() -> Path:
    return Path(os.environ.get("SAT_HOME") or "~/.sat_models").expanduser()


def _folder_and_iteration(path: Path) -> tuple[Path, str | None]:
    """The checkpoint folder that path is or lies in, and the iteration where path names one."""
    if path.is_file() and re.fullmatch(r"mp_rank_\d+_model_states\.pt", path.name):
        path = path.parent
    elif not (path / "mp_rank_00_model_states.pt").is_file():
        return path, None
    iteration = path.resolve()
    return iteration.parent, iteration.name


def checkpoint_problem(folder: Path, files: Sequence[str]) -> str | None:
    """What keeps folder from being a checkpoint that has these files, and the weights that `latest` names."""
    if not folder.is_dir():
        return f"{folder} is {'a file' if folder.exists() else 'not there'}; a checkpoint folder is needed."
    problem = _missing_file(folder, files)
    if problem:
        return problem
    try:
        iteration = _latest(folder)
    except InputError as problem:
        return str(problem)
    weights = weights_path(folder, iteration)
    if not weights.is_file():
        return f"no {weights}; the weights of the iteration that latest names are needed."
    return None


def _missing_file(folder: Path, files: Sequence[str]) -> str | None:
    for file in files:
        if not (folder / file).is_file():
            return f'no "{file}" in {folder}; {_what_to_give_instead(folder)}'
    return None


def _what_to_give_instead(folder: Path) -> str:
    checkpoints = sorted(path.parent for path in folder.glob("*/latest"))
    if checkpoints:
        return f"a checkpoint folder inside it is needed, such as {checkpoints[-1]}."
    if (folder / "config.json").is_file():
        return "it looks like a Hugging Face checkpoint, and one in SAT's layout is needed."
    return "a checkpoint folder with model_config.json, latest and the weights is needed."


def _latest(folder: Path) -> str:
    """The iteration that `latest` names: a number, or "release".

    Raises:
        InputError: it names none, or can't be read.
    """
    path = folder / "latest"
    try:
        with open(path, "rb") as file:
            text = file.read(MOST_OF_LATEST).decode(errors="replace").strip()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; the number of the iteration to load is needed.") from None
    if text != "release" and not (re.fullmatch("[0-9]+", text) and int(text) > 0):
        raise InputError(f'"{text}" found in {path}; the number of the iteration to load is needed.')
    return text
