"""Files from the Hugging Face hub, without waiting for a network that isn't there.

What is in Hugging Face's cache is taken without asking. Before anything is downloaded, one short question finds out
whether the hub answers at all: its library would try for half a minute. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the
proxies of the environment count, as they do for the library. No code is downloaded or run.

The library is imported when a file is asked for: that takes longer than all checks together.
"""

import re
import threading
from pathlib import Path

from model.distributed import is_first_process
from model.errors import InputError

SECONDS_TO_ANSWER = 2.5
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/repository, with a revision after @ where it is pinned
# What a checkpoint and its tokenizer need. Of weights in two formats, the safetensors are taken.
CHECKPOINT_FILES = ("config.json", "ice_text.model", "tokenizer_config.json")
SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of the hub's: owner/repository, or owner/repository@revision."""
    return NAME.fullmatch(name) is not None and not name.startswith(".")


def at_revision(name: str, revision: str | None) -> str:
    """The name of a repository at a branch, tag or commit: OWNER/NAME@REVISION.

    Raises:
        InputError: it is a folder, or no repository's name.
    """
    if revision is None:
        return name
    if Path(name).expanduser().exists() or not is_hub_name(name):
        raise InputError(f"--revision {revision}: {name} is a folder or no OWNER/NAME; a name of the hub is needed.")
    return f"{name}@{revision}"


def cached_snapshot(name: str) -> Path | None:
    """The folder where Hugging Face's cache has files of a repository, perhaps not all of them."""
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        config = cached_file(repository, CHECKPOINT_FILES[0], revision or None)
    except HFValidationError:  # no name that a repository may have
        return None
    return None if config is None else config.parent


def download_snapshot(name: str) -> Path:
    """The folder with a checkpoint's files, downloaded into Hugging Face's cache: of half a download, the missing files.

    Raises:
        OSError: the hub doesn't answer, or has no such files; the text is a clause that says so.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    require_answer()
    if not is_first_process():  # it shows the progress; the others wait for the library's locks
        huggingface_hub.utils.disable_progress_bars()
    try:
        files = huggingface_hub.HfApi().list_repo_files(repository, revision=revision or None)
        weights = SAFETENSORS if any(file.endswith(".safetensors") for file in files) else PICKLES
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=[*CHECKPOINT_FILES, *weights]
        )
    except Exception as error:  # of the library, of the network below it, or of the disk
        raise _in_one_line(error) from error
    return Path(folder)


def cached_file(repository: str, name: str, revision: str | None = None) -> Path | None:
    """One file of a repository that Hugging Face's cache has."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def hub_file(repository: str, name: str) -> Path:
    """One file of a repository, from the cache or the hub.

    Raises:
        OSError: the hub doesn't answer, or has no such file; the text is a clause that says so.
    """
    import huggingface_hub

    cached = cached_file(repository, name)
    if cached is not None:
        return cached
    require_answer()
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except Exception as error:  # as above
        raise _in_one_line(error) from error


def _in_one_line(error: Exception) -> OSError:
    """What the library tells in a page, in a clause."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return OSError(f"{type(error).__name__}: {reason}")


def require_answer() -> None:
    """Do nothing if the hub answers.

    Raises:
        OSError: it doesn't, or HF_HUB_OFFLINE says not to ask.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    silence = why_silent(constants.ENDPOINT)
    if silence:
        raise ConnectionError(silence)


def why_silent(url: str, seconds: float = SECONDS_TO_ANSWER) -> str | None:
    """Why a server says nothing at all within so many seconds, as a clause; None if it does."""
    import urllib.error
    import urllib.request

    heard: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            heard.append(None)  # an answer, although a refusal
        except Exception as error:  # no network, no such host, a broken proxy
            reason = getattr(error, "reason", error)
            if not isinstance(reason, TimeoutError):
                words = str(getattr(reason, "strerror", None) or reason).strip().splitlines()
                heard.append(f"no answer from {url} ({words[0] if words else type(reason).__name__})")
        else:
            heard.append(None)

    # A thread, because looking up a name has no time limit of its own.
    question = threading.Thread(target=ask, daemon=True)
    question.start()
    question.join(seconds)
    return heard[0] if heard else f"no answer from {url} within {seconds} seconds"
