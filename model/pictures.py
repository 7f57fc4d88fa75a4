"""A picture by path or by URL, for asking about it: rows of training data are always files."""

import io
from typing import Any

import requests

from model.errors import InputError

TIMEOUT = 20.0  # seconds without a byte
LARGEST_DOWNLOAD = 50 * 2**20  # bytes; a 200-megapixel JPEG is smaller
CHUNK = 2**16


def is_url(source: object) -> bool:
    """Whether source is text that names a picture on a server."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def downloaded(url: str) -> io.BytesIO:
    """What a server gives for url, in memory.

    Raises:
        InputError: the server can't be reached, refuses, is silent for TIMEOUT seconds, or sends too much.
    """
    content = io.BytesIO()
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as response:
            if not response.ok:
                raise InputError(
                    f"{url}: the server answered {response.status_code} {response.reason}; needed is a picture."
                )
            for chunk in response.iter_content(CHUNK):
                content.write(chunk)
                if content.tell() > LARGEST_DOWNLOAD:
                    raise InputError(f"{url}: more than {LARGEST_DOWNLOAD >> 20} MiB; a smaller picture is needed.")
    except requests.Timeout:
        raise InputError(f"{url}: no answer in {TIMEOUT:.0f} seconds; the address of a picture is needed.") from None
    except (requests.RequestException, UnicodeError) as error:
        raise InputError(f"{url}: can't be fetched ({_reason(error)}); the address of a picture is needed.") from None
    content.seek(0)
    return content


def _reason(error: Exception) -> str:
    """The last and most telling part of requests' nested errors."""
    cause = getattr(error.args[0], "reason", error.args[0]) if error.args else type(error).__name__
    return str(cause).rsplit(": ", 1)[-1].splitlines()[0]


def picture_file(source: Any) -> Any:
    """source, or an open file of what it points to if it is a URL: something that `model.rows.open_picture` takes."""
    return downloaded(str(source)) if is_url(source) else source
