"""What a checkpoint keeps so that its run can go on: two files beside the weights of an iteration.

    <iteration>/training_state.pt   optimizer, random states, place in the data: see `model.training.run_state`
    <iteration>/training_run.json   the command line, the data files, how far the run is: a `RunRecord`

The record is JSON, so that a command line can be checked before torch is loaded. The state is read as tensors, numbers and
text only: nothing in the file is ever run. The record is written last: where it is, the state is whole.

After the last step come an evaluation, answers and the report. Once all that is done, `settings.json` in the run's folder
says so: an `Ending`.
"""

import hashlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from model.checkpoints.broken_files import what_it_is_instead
from model.checkpoints.layout import Checkpoint, ModelConfig, read_json_object
from model.checkpoints.whole import json_text
from model.errors import InputError

STATE_FILE = "training_state.pt"
RECORD_FILE = "training_run.json"
SETTINGS_FILE = "settings.json"  # in the run's folder
VERSION = 1  # of the state and of the record
NOT_NOTED = ("samples", "held_out", "rows", "evaluated")  # in the record of an older program: they have their defaults


@dataclass(frozen=True)
class RunRecord:
    """What a run says of itself in each checkpoint."""

    iteration: int  # optimizer steps that are done
    steps: int  # optimizer steps of the whole run
    words: list[str]  # the command line
    experiment: str  # the value of --experiment-name
    processes: int
    data: dict[str, str]  # the SHA-256 of each file of --train-data, hexadecimal
    left_out: dict[str, list[int]]  # rows of each data file that were left out as bad
    # Of the checkpoint that the run started from: SAT writes only some of it into the run's own.
    config: dict[str, object]
    saved_at: float = field(default_factory=time.time)  # seconds since 1970
    version: int = VERSION
    # An older program didn't note what follows.
    samples: int = 0  # of the order of training that are behind
    held_out: dict[str, list[int]] = field(default_factory=dict)  # rows of each data file, by --holdout
    rows: dict[str, str] = field(default_factory=dict)  # of each file of --train-data, those of use (`rows_of_use`)
    evaluated: dict[str, str] = field(default_factory=dict)  # as data, of --valid-data

    def write(self, path: Path) -> None:
        """Write the record to a file."""
        path.write_text(json_text(asdict(self), 1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """The record in a file.

        Raises:
            InputError: the file can't be read, or doesn't hold such a record.
        """
        values = read_json_object(path, "The record of a run")
        names = [one.name for one in fields(cls) if one.name in values or one.name not in NOT_NOTED]
        odd = [name for name in names if not _fits(values.get(name), name)]
        if odd:
            raise InputError(f"{path}: {', '.join(odd)} can't be used; a record that a run wrote is needed.")
        if values["version"] != VERSION:
            raise InputError(f"{path}: of version {values['version']}; this program reads version {VERSION}.")
        return cls(**{name: values[name] for name in names})  # type: ignore[arg-type]


def _fits(value: object, name: str) -> bool:
    """Whether a value from JSON is what the field of this name holds."""
    if name in ("iteration", "steps", "processes", "version", "samples"):
        return type(value) is int and value >= 0
    if name == "saved_at":
        return type(value) in (int, float)
    if name == "experiment":
        return isinstance(value, str)
    if name == "words":
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    if not isinstance(value, dict):
        return False
    if name == "config":
        return True
    if name in ("data", "rows", "evaluated"):
        return all(isinstance(digest, str) for digest in value.values())
    return all(isinstance(rows, list) and all(type(row) is int for row in rows) for rows in value.values())


@dataclass(frozen=True)
class Ending:
    """How a run has ended, after everything that comes behind its last step."""

    iteration: int
    early_stopping: int | None = None  # that flag's value, where it ended the run before its last step

    @classmethod
    def of(cls, folder: Path) -> "Ending | None":
        """What the settings in a run's folder say; None if its last start has not come to an end."""
        try:
            ended = read_json_object(folder / SETTINGS_FILE, "The settings of a run").get("ended")
        except InputError:
            return None
        values = ended if isinstance(ended, dict) else {}
        iteration, patience = values.get("iteration"), values.get("early_stopping")
        return cls(iteration, patience if type(patience) is int else None) if type(iteration) is int else None


@dataclass(frozen=True)
class Resumed:
    """A checkpoint whose run goes on."""

    checkpoint: Checkpoint
    record: RunRecord

    @property
    def state_file(self) -> Path:
        """The state of the run at this checkpoint."""
        return _beside_weights(self.checkpoint, STATE_FILE)


def resumed_from(name: str) -> Resumed:
    """The run at a checkpoint: a run's folder, where `latest` names the iteration, or an iteration's folder.

    Raises:
        InputError: there is no checkpoint, or none of a run that can go on.
    """
    checkpoint = Checkpoint.find(name, "--resume")
    for file in (RECORD_FILE, STATE_FILE):
        path = _beside_weights(checkpoint, file)
        if not path.is_file():
            raise InputError(
                f"--resume {name}: no {path}; a checkpoint with the state of its run is needed. --from_pretrained starts a "
                "new run from its weights."
            )
    record = RunRecord.read(_beside_weights(checkpoint, RECORD_FILE))
    config = cast(ModelConfig, {**record.config, **checkpoint.config})
    return Resumed(replace(checkpoint, config=config), record)


def newest_run(folder: Path, experiment: str) -> tuple[Resumed | None, list[str]]:
    """The latest whole checkpoint of the newest of an experiment's runs in a folder, if there is one.

    Also a sentence for each newer one that can't be used. Of two runs the clock tells which is newer; of one run, `latest`
    and the number of steps: clocks of machines differ.
    """
    found: dict[Path, dict[Path, float]] = {}  # when each iteration of each run was saved
    skipped: list[str] = []
    for path in (folder / experiment).parent.glob(f"*/*/{RECORD_FILE}"):  # a name may have a folder in front
        if not path.parent.name.isdecimal():  # what a killed save has left
            continue
        try:
            record = RunRecord.read(path)
        except InputError as problem:
            skipped.append(f"Left out: {problem}")
            continue
        if record.experiment == experiment:
            found.setdefault(path.parent.parent, {})[path.parent] = record.saved_at
    newest_first = sorted(found, key=lambda run: max(found[run].values()), reverse=True)
    for iteration in (one for run in newest_first for one in _latest_first(run, found[run])):
        try:
            return resumed_from(str(iteration)), skipped
        except InputError as problem:
            skipped.append(f"Left out: {problem}")
    return None, skipped


def _latest_first(run: Path, iterations: Iterable[Path]) -> list[Path]:
    """A run's iterations from the one that `latest` names downwards, and then those above it."""
    try:
        last = int((run / "latest").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = sys.maxsize
    return sorted(iterations, key=lambda one: (int(one.name) <= last, int(one.name)), reverse=True)


def _beside_weights(checkpoint: Checkpoint, file: str) -> Path:
    return checkpoint.weights_file().parent / file


def digest(path: str | Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(paths: Sequence[str]) -> dict[str, str]:
    """The digest of each file."""
    return {path: digest(path) for path in paths}


def rows_of_use(numbers: Sequence[int]) -> str:
    """How many rows of a data file can be used, and which, for a person and for comparing.

    Args:
        numbers: those of the rows in their file (`Rows.numbers`).
    """
    text = ",".join(map(str, numbers))
    return f"{len(numbers)} ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a run's state: tensors, numbers, text, and lists and dictionaries of them."""
    import torch

    torch.save({"version": VERSION, **state}, path)


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file, on the CPU. No code in the file is run.

    Raises:
        InputError: the file is missing, broken, or holds something else.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds, for broken zips, pickles and forbidden types
        words = str(error).strip().splitlines() if isinstance(error, RuntimeError | OSError) else []
        reason = what_it_is_instead(path) or (words[0] if words else "it isn't a file that torch wrote")
        raise InputError(
            f"{path}: can't be read as the state of a run ({reason}); one that is whole is needed."
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise InputError(f"{path}: not a run's state of version {VERSION}; one that this program wrote is needed.")
    return state
