"""A checkpoint that is nowhere on the disk: from the Hugging Face hub, or from where SAT's users got it in 2023.

Each function notes in one line what it tried where it finds nothing.
"""

import os
from pathlib import Path

from model import hub
from model.checkpoints import huggingface
from model.checkpoints.broken_files import what_it_is_instead
from model.checkpoints.layout import sat_home
from model.errors import InputError
from model.progress import say

SAT_NAME = "visualglm-6b"
# The link of the released model/visualglm.py. It has been dead for many, so that it is asked for an answer first.
SAT_LINK = "https://cloud.tsinghua.edu.cn/f/348b98dffcc940b6a09d/?dl=1"


def may_be_downloaded(name: str) -> bool:
    """Whether looking for a checkpoint of this name may take hours: what is checked in a moment is checked before."""
    return hub.is_hub_name(name) or name == SAT_NAME


def from_hub(name: str, tried: list[str]) -> Path | None:
    """The folder of a hub's repository, from the cache if it is whole there, else downloaded."""
    if not hub.is_hub_name(name):
        return None
    cached = hub.cached_snapshot(name)
    if cached is not None and _is_whole(cached):
        return cached
    tried.append(f"Hugging Face's cache: {'nothing' if cached is None else f'not all files in {cached}'}")
    try:
        folder = hub.download_snapshot(name)
    except OSError as error:
        tried.append(f"Hugging Face hub: {error}")
        return None
    say(f"{name}: {folder}")
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        return huggingface.folder_of(folder) is not None and bool(huggingface.weights_files(folder))
    except InputError:
        return False


def from_sat(name: str, tried: list[str]) -> Path | None:
    """The folder in $SAT_HOME, downloaded there and unpacked by SAT."""
    if name != SAT_NAME:
        return None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        tried.append("SAT's download: HF_HUB_OFFLINE is set")
        return None
    silence = hub.why_silent(SAT_LINK)
    if silence:
        tried.append(f"SAT's download: {silence}")
        return None
    from model.sat_compat import import_sat

    import_sat()
    from sat.resources import auto_create

    try:
        return Path(auto_create(name, path=str(sat_home()), url=SAT_LINK))
    except Exception as error:  # of the network, of the disk, or a file that is no zip
        archive = sat_home() / f"{name}.zip"
        problem = what_it_is_instead(archive)
        tried.append(f"SAT's download, {archive}: {problem or f'{type(error).__name__}: {error}'}")
        if problem is not None and "web page" in problem:
            archive.unlink()  # or the next download would go on after it
        return None
