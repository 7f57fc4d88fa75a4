"""Where the files of a checkpoint lie: in SAT's layout, or in Hugging Face's (`model.checkpoints.huggingface`).

    <folder>/model_config.json                        what to build, and how it was fine-tuned
    <folder>/latest                                   the iteration to load
    <folder>/<iteration>/mp_rank_00_model_states.pt   the weights of model-parallel rank 0
    <folder>/<iteration>/checksums.json               what its files must be, see `model.checkpoints.whole`
    <folder>/ice_text.model                           the tokenizer; older checkpoints lack it

    checkpoint = Checkpoint.find("visualglm-6b")      once, from what the user gave; then it is handed on

A name is looked for in this order, and the first place that has it is taken: the folder as given; $SAT_HOME; the newest
run of that name (checkpoints/MyModel is the newest of checkpoints/MyModel-*); for OWNER/NAME the Hugging Face hub and its
cache; for visualglm-6b the download that SAT's users know.

Only the standard library is imported.
"""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from model.adapter_config import AdapterKeys
from model.checkpoints import huggingface
from model.checkpoints.config_types import type_problems
from model.checkpoints.whole import (
    CONFIG_FILE,
    UNFINISHED,
    DamagedCheckpoint,
    config_was_changed,
    damage,
    has_checksums,
)
from model.errors import InputError, raise_problems
from model.progress import is_unicode, warn

if TYPE_CHECKING:
    from model.data.prompt import AskedAs

MOST_OF_LATEST = 40  # bytes: more isn't the number of an iteration
NOT_UNICODE = "the name isn't UTF-8, so torch can't open files there; a folder that is renamed is needed."
# Behind its name: month, day, hour, minute; a number where that was taken.
TIME_OF_A_RUN = re.compile(r"(-\d\d){4}(-\d+)?")


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
    asked_as: dict[str, object]  # see `model.data.prompt.AskedAs`


class EvaArgs(TypedDict, total=False):
    """The sizes of the vision tower, as far as this code reads them."""

    image_size: list[int]  # height and width, pixels
    patch_size: int  # pixels
    pre_len: int  # positions before the patches
    post_len: int  # and behind them
    in_channels: int


class ModelConfig(AdapterKeys, total=False):
    """What `model_config.json` holds, as far as this code reads it; `model.checkpoints.config_types` checks the types."""

    num_layers: int
    hidden_size: int
    inner_hidden_size: int
    num_attention_heads: int
    model_parallel_size: int  # in how many files the weights are
    vocab_size: int
    max_sequence_length: int
    layernorm_order: str
    image_length: int
    eva_args: EvaArgs
    qformer_args: dict[str, object]
    finetuning: Finetuning


# What SAT builds where the configuration is silent.
VIT_OF_SAT: EvaArgs = {"image_size": [224, 224], "patch_size": 16, "pre_len": 1, "post_len": 0, "in_channels": 3}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is on the disk, and its configuration, which is read once."""

    name: str  # as the user gave it, for messages
    folder: Path
    iteration: str  # a number, or "release"
    config: ModelConfig = field(repr=False, compare=False)
    base: "Checkpoint | None" = None  # of an adapter checkpoint, once it has been looked for
    layout: Literal["sat", "hf"] = "sat"  # of its files; the config is in SAT's terms in both

    @classmethod
    def find(cls, name: "str | Path | Checkpoint", flag: str = "--from_pretrained") -> "Checkpoint":
        """The checkpoint that the value of a flag means: a folder as given, else a name, see above.

        Given a checkpoint's folder in SAT's layout, the iteration is the one that `latest` names. Where that one is
        damaged, a line says so, and the newest before it whose checksums are right is taken. An iteration's folder may
        be given too, or the weights in it. A Checkpoint is returned as it is.

        Raises:
            InputError: nothing is there, or a part is missing, or the configuration can't be read.
            DamagedCheckpoint: an InputError too: no iteration is whole, or the given one isn't.
        """
        if isinstance(name, Checkpoint):
            return name
        name = str(name)
        place = _place(name, flag)
        folder, iteration = _folder_and_iteration(place)
        published = huggingface.folder_of(place)
        if published is not None and not (folder / CONFIG_FILE).is_file():
            return cls._in_huggingfaces_layout(name, flag, published)
        problem = (
            checkpoint_problem(folder, (CONFIG_FILE, "latest"))
            if iteration is None
            else _missing_file(folder, (CONFIG_FILE,))
        )
        if problem:
            raise InputError(f"{flag} {name}: {problem}")
        iteration = _whole_iteration(f"{flag} {name}", folder, iteration)
        return cls(name, folder, iteration, _read_config(folder))

    @classmethod
    def _in_huggingfaces_layout(cls, name: str, flag: str, folder: Path) -> "Checkpoint":
        path = folder / huggingface.CONFIG_FILE
        try:
            config = huggingface.sat_config(read_json_object(path, "The checkpoint's configuration"), str(path))
            huggingface.weights_files(folder)
        except InputError as error:
            raise InputError(f"{flag} {name}: {error}") from None
        return cls(name, folder, "1", _with_all_vision_sizes(cast(ModelConfig, config)), layout="hf")

    @classmethod
    def at(cls, place: str | Path, iteration: int | None = None) -> "Checkpoint":
        """The checkpoint in a folder or one of its parts, as SAT's --load takes it: a configuration is not needed.

        Args:
            iteration: instead of the one that `latest` names.

        Raises:
            InputError: the folder has no `latest`, or its configuration can't be read, or as `find` does.
        """
        folder, found = _folder_and_iteration(Path(place))
        if iteration is not None:
            found = str(iteration)
        if found is None and not (folder / "latest").is_file():
            raise InputError(f"{place}: no file named latest; a checkpoint folder has one.")
        config = _read_config(folder) if (folder / CONFIG_FILE).is_file() else ModelConfig()
        return cls(str(place), folder, _whole_iteration(str(place), folder, found), config)

    @property
    def asked_as(self) -> "AskedAs":
        """How questions stood before it in training; the default where it doesn't say, as a base."""
        from model.data.prompt import AskedAs  # which needs more than the standard library

        return AskedAs.from_json(self.config.get("finetuning", {}).get("asked_as") or {})

    @property
    def config_file(self) -> Path:
        """The file that its configuration was read from."""
        return self.folder / (huggingface.CONFIG_FILE if self.layout == "hf" else CONFIG_FILE)

    def latest(self) -> str:
        """The iteration that `latest` in its folder names by now; "" if it names none."""
        try:
            return _latest(self.folder)
        except InputError:
            return ""

    def weights_file(self, rank: int = 0) -> Path:
        """The weights of a model-parallel rank; in Hugging Face's layout all weights, or the index of their files."""
        if self.layout == "hf":
            return huggingface.weights_file(self.folder)
        return weights_path(self.folder, self.iteration, rank)

    def weights_files(self) -> list[Path]:
        """All files with weights: of Hugging Face's layout, or of all model-parallel ranks."""
        if self.layout == "hf":
            return huggingface.weights_files(self.folder)
        ranks = range(len(list(self.weights_file().parent.glob("mp_rank_*_model_states.pt"))))
        return [self.weights_file(rank) for rank in ranks]

    def weights_size(self) -> int:
        """How many bytes the files with weights take."""
        return sum(file.stat().st_size for file in self.weights_files())


def split_problems(parts: int, config: ModelConfig) -> list[str]:
    """Why a model with this config can't be split among so many model-parallel processes, if it can't."""
    sizes = {**config}
    return [
        f"--model-parallel-size {parts}: {key} {size} of this checkpoint can't be divided by it; a divisor is needed."
        for key in ("num_attention_heads", "inner_hidden_size", "vocab_size")
        if isinstance(size := sizes.get(key), int) and size % max(1, parts)
    ]


def weights_path(folder: Path, iteration: str | int, rank: int = 0) -> Path:
    """Where a checkpoint folder has the weights of an iteration and a model-parallel rank."""
    return folder / str(iteration) / f"mp_rank_{rank:02d}_model_states.pt"


def _read_config(folder: Path) -> ModelConfig:
    what = "The checkpoint's configuration"
    config = read_json_object(folder / CONFIG_FILE, what)
    raise_problems(type_problems(config, f"{what} {folder / CONFIG_FILE}"))
    return _with_all_vision_sizes(cast(ModelConfig, config))


def _with_all_vision_sizes(config: ModelConfig) -> ModelConfig:
    """config with the sizes of ViT and Q-Former that it leaves to SAT, behind those that it has."""
    completed = config.copy()
    if "eva_args" in config:
        vit = config["eva_args"]
        completed["eva_args"] = {**vit, **VIT_OF_SAT, **vit}
    if "qformer_args" in config:
        qformer = config["qformer_args"]
        seen = qformer.get("cross_attn_hidden_size") or qformer.get("hidden_size")
        completed["qformer_args"] = {
            **qformer,
            "is_decoder": qformer.get("is_decoder", False),
            "cross_attn_hidden_size": seen,
        }
    return completed


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


def _place(name: str, flag: str) -> Path:
    """Where a name leads to.

    Raises:
        InputError: nowhere; every place that was tried is told, a line each.
    """
    given = Path(name).expanduser()
    in_home = sat_home() / given  # an absolute path stays as it is
    if not is_unicode(name):
        raise InputError(f"{flag} {name}: {NOT_UNICODE}")
    for path in (given, in_home):
        if path.exists():
            return path
    run = newest_run_named(given)
    if run is not None:
        warn(f"{flag} {name}: the newest run of that name is taken, {run}.")
        return run
    tried = [f"no folder {given.absolute()}"]
    if in_home != given:
        tried.append(f"no folder {in_home} ($SAT_HOME)")
    if flag == "--resume":  # a run isn't downloaded
        unsaved = max(_runs_named(given), default=None, key=lambda run: run.stat().st_mtime)
        if unsaved is not None:
            raise InputError(
                f"{flag} {name}: {unsaved} has no checkpoint; a run that has saved one is needed, or auto."
            )
        raise InputError(f"{flag} {name}: no such folder; the folder of a run is needed, or auto.")
    from model.checkpoints.download import from_hub, from_sat  # it imports this module

    for get in (from_hub, from_sat):
        fetched = get(name, tried)
        if fetched is not None:
            return fetched
    lines = "".join(f"  {line}\n" for line in tried)
    folder = f"{flag} FOLDER" if flag.startswith("--") else "a folder"
    raise InputError(
        f"{flag} {name}: no such folder. Tried:\n{lines}Needed is {folder}, OWNER/NAME of the Hugging Face hub, or "
        f"the checkpoint unpacked to {in_home}."
    )


def newest_run_named(path: Path) -> Path | None:
    """The run that saved last of those whose names are path's and the time of their start, or what path names in it."""
    for named, below in ((path, ""), (path.parent, path.name)):
        saved = [run for run in _runs_named(named) if (run / "latest").is_file() and (run / below).exists()]
        if saved:
            return max(saved, key=lambda run: (run / "latest").stat().st_mtime) / below
    return None


def hiding_problem(folder: Path, source: Checkpoint | None) -> str | None:
    """Why this folder should not be made, nor those above that are missing, in half a sentence.

    A run would not be found by its short name any more, or the source not by the name that it was found by.
    """
    missing = (place for place in (folder, *folder.parents) if not place.exists())
    hidden = next((run for place in missing if (run := newest_run_named(place)) is not None), None)
    if source is not None and os.path.abspath(folder) == os.path.abspath(os.path.expanduser(source.name)):
        hidden = source.folder
    return f"a folder there would hide {hidden}, which is found by that name; another is needed." if hidden else None


def _runs_named(path: Path) -> list[Path]:
    """The runs whose names are path's and the time of their start."""
    dated = path.parent.glob(f"{glob.escape(path.name)}-*")
    return [run for run in dated if TIME_OF_A_RUN.fullmatch(run.name.removeprefix(path.name))]


def sat_home() -> Path:
    """The folder in which SAT's checkpoints are looked for by name."""
    return Path(os.environ.get("SAT_HOME") or "~/.sat_models").expanduser()


def _folder_and_iteration(path: Path) -> tuple[Path, str | None]:
    """The checkpoint folder that path is or lies in, and the iteration where path names one."""
    if path.is_file() and re.fullmatch(r"mp_rank_\d+_model_states\.pt", path.name):
        path = path.parent
    elif not (path / "mp_rank_00_model_states.pt").is_file():
        return path, None
    iteration = path.resolve()
    if (path / CONFIG_FILE).is_file() and not (iteration.parent / CONFIG_FILE).is_file():  # no iteration's folder
        return path, None
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
    if not weights.is_file() and not any(has_checksums(folder / earlier) for earlier in _earlier(folder, iteration)):
        elsewhere = f", but {folder / weights.name}" if (folder / weights.name).is_file() else ""
        return f"no {weights}{elsewhere}; the weights of the iteration that latest names are needed."
    return None


def _whole_iteration(what: str, folder: Path, named: str | None) -> str:
    """The iteration to use: the named one, else the one of `latest`, else the newest before it that is surely whole.

    Args:
        what: who asked for it, to begin a message with.

    Raises:
        DamagedCheckpoint: there is none.
    """
    iteration = named or _latest(folder)
    problem = _iteration_damage(folder, iteration)
    if problem and named:
        raise DamagedCheckpoint(
            f"{what}: {problem}; another iteration, or a copy of this one that is whole, is needed."
        )
    if problem:
        whole = (one for one in _earlier(folder, iteration) if has_checksums(folder / one) and not damage(folder / one))
        earlier = next(whole, None)
        if earlier is None:
            raise DamagedCheckpoint(f"{what}: {problem}; no iteration before it is whole, and one that is is needed.")
        warn(f"WARNING: {what}: iteration {iteration} is left out: {problem}. Iteration {earlier} is used.")
        iteration = earlier
    if config_was_changed(folder / iteration):
        warn(
            f"WARNING: {folder / CONFIG_FILE} was changed after iteration {iteration} was saved; it is used as it is now."
        )
    return iteration


def _iteration_damage(folder: Path, iteration: str) -> str | None:
    if iteration.endswith(UNFINISHED):
        return f"{folder / iteration} was never finished"
    weights = weights_path(folder, iteration)
    if not weights.is_file() and any(has_checksums(folder / earlier) for earlier in _earlier(folder, iteration)):
        return f"{weights} is missing"
    return damage(folder / iteration)


def _earlier(folder: Path, iteration: str) -> list[str]:
    """The iterations in folder before this one, the newest first."""
    if not re.fullmatch(r"\d{1,18}", iteration):
        return []
    numbers = (int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
    return [str(number) for number in sorted(numbers, reverse=True) if number < int(iteration)]


def _missing_file(folder: Path, files: Sequence[str]) -> str | None:
    for file in files:
        if not (folder / file).is_file():
            return f'no "{file}" in {folder}; {_what_to_give_instead(folder)}'
    return None


def _what_to_give_instead(folder: Path) -> str:
    checkpoints = sorted(path.parent for path in folder.glob("*/latest"))
    if checkpoints:
        return f"a checkpoint folder inside it is needed, such as {checkpoints[-1]}."
    if any((folder / file).is_file() for file in huggingface.WEIGHTS_FILES):
        return f"beside weights in Hugging Face's layout {huggingface.CONFIG_FILE} is needed."
    if (folder / "mp_rank_00_model_states.pt").is_file() and (folder.parent / "latest").is_file():
        return (
            f"it is one iteration of {folder.parent}; that folder is needed, and its latest iteration is loaded. "
            "--from_pretrained takes any iteration."
        )
    snapshots = sorted(path.parent for path in folder.glob(f"snapshots/*/{huggingface.CONFIG_FILE}"))
    if snapshots:
        return f"it is a folder of Hugging Face's cache, in which a snapshot is needed, such as {snapshots[-1]}."
    if (folder / "adapter_config.json").is_file():
        return f"it is an adapter of PEFT's: python scripts/convert_checkpoint.py {folder} DST --to sat converts it."
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
    if text != "release" and not re.fullmatch(r"0*[1-9]\d{0,17}", text):
        raise InputError(f"{json.dumps(text)} found in {path}; the number of the iteration to load is needed.")
    return text
