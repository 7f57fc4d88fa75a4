"""Files that a command line names: a checkpoint's folder, a JSON object, a place to save.

Only the standard library is imported.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import InputError

WEIGHTS_FILE = "mp_rank_00_model_states.pt"  # SAT's name for the weights of model-parallel rank 0


def read_json_object(path: str | Path, what: str) -> dict[str, Any]:
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
    if not isinstance(value, dict):
        found = "a list" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
        raise InputError(f"{where}: {found} found; an object {{…}} is needed.")
    return value


def find_checkpoint(name: str) -> Path:
    """The checkpoint folder that --from_pretrained means, as `find_weights` finds it."""
    return find_weights(name).parent.parent


def find_weights(name: str, flag: str = "--from_pretrained") -> Path:
    """The weights file of the checkpoint that a flag means: a folder as given, else the name in $SAT_HOME.

    A checkpoint's folder holds `latest` (an iteration), `model_config.json` and
    `<iteration>/mp_rank_00_model_states.pt`. Given that folder, the iteration is latest's; an iteration's folder, or the
    weights in it, may be given too.

    Raises:
        InputError: nothing is there, or a part is missing.
    """
    given, in_home = Path(name).expanduser(), _sat_home() / name
    found = next((path for path in (given, in_home) if path.exists()), None)
    if found is None:
        raise InputError(
            f"{flag} {name}: no such folder, neither {given.absolute()} nor {in_home}; give "
            f"{flag} FOLDER, or unpack the checkpoint to {in_home}."
        )
    folder, iteration = _folder_and_iteration(found)
    problem = (
        checkpoint_problem(folder, ("model_config.json", "latest"))
        if iteration is None
        else _missing_file(folder, ("model_config.json",))
    )
    if problem:
        raise InputError(f"{flag} {name}: {problem}")
    return folder / (iteration or _latest(folder)) / WEIGHTS_FILE


def _sat_home() -> Path:
    return Path(os.environ.get("SAT_HOME") or "~/.sat_models").expanduser()


def _folder_and_iteration(path: Path) -> tuple[Path, str | None]:
    """The checkpoint folder that path is or lies in, and the iteration where path names one."""
    if path.is_file() and re.fullmatch(r"mp_rank_\d+_model_states\.pt", path.name):
        path = path.parent
    elif not (path / WEIGHTS_FILE).is_file():
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
    iteration = _latest(folder)
    if iteration != "release" and not (iteration.isdecimal() and int(iteration) > 0):
        return f'"{iteration}" found in {folder / "latest"}; the number of the iteration to load is needed.'
    weights = folder / iteration / WEIGHTS_FILE
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
    return (folder / "latest").read_text().strip()
