"""Lines from the keyboard: they can be edited, earlier ones come back, and a path may be written as shells take it.

    with line_editing():
        path = typed_path(input("Picture: "))

Where Python has no readline, as on Windows, lines are what the terminal makes of them.
"""

import locale
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from model.data.remote_images import is_url

MOST_LINES = 1000  # that are remembered


def history_file() -> Path:
    """Where lines are kept from one time to the next: in the user's state folder."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "visualglm", "history")


@contextmanager
def line_editing() -> Iterator[None]:
    """Let `input` edit its line inside the block, and bring back those of earlier times with the up key.

    Only at a terminal, and where Python has readline. A history that can't be read or written is done without.
    """
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield
        return
    file = history_file()
    readline.set_history_length(MOST_LINES)
    with suppress(OSError):
        readline.read_history_file(file)
    before = readline.get_current_history_length()
    try:
        with utf8_locale():
            yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # what was asked is nobody else's business
            readline.append_history_file(readline.get_current_history_length() - before, file)


@contextmanager
def utf8_locale() -> Iterator[None]:
    """Let readline edit UTF-8 inside the block also where the locale is C, or isn't installed: it took bytes for commands.

    It sets the locale of C's environment at each line. Python's own stays: it says in which language messages are.
    """
    if locale.nl_langinfo(locale.CODESET) == "UTF-8" or sys.stdin.encoding.lower() != "utf-8":
        yield
        return
    os.putenv("LC_ALL", "C.UTF-8")
    try:
        yield
    finally:
        if "LC_ALL" in os.environ:
            os.putenv("LC_ALL", os.environ["LC_ALL"])
        else:
            os.unsetenv("LC_ALL")


def typed_path(text: str) -> str:
    """The path, or the URL, that text means: as it stands, or in quotes, with `\\ ` for a space, `~` or `file://`.

    A terminal writes one of these when a file is dropped into it.
    """
    if is_url(text):
        return text
    meanings = [text]
    with suppress(ValueError):  # a quotation mark alone
        words = shlex.split(text)
        meanings += words if len(words) == 1 else []
    if meanings[-1].lower().startswith("file://"):
        meanings.append(unquote(urlsplit(meanings[-1]).path))
    paths = [os.path.expanduser(meaning) for meaning in meanings]
    has_marks = text.lower().startswith(("'", '"', "file://"))  # else a backslash may be of a Windows path
    return next((path for path in paths if os.path.exists(path)), paths[-1] if has_marks else paths[0])
