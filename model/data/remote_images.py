"""Pictures that come from elsewhere: by address, in a data URI, as base64 or as an upload. Never a file of this machine.

    downloaded("https://…")                        for the person at this machine
    opened(source, 224, STRANGERS)                 for whoever asks over the network

Of strangers only public addresses are taken, `is_public`. A name is looked up once, each of its addresses is checked, and the
connection goes to a checked one. Each redirect is checked likewise. A person may name any address; a redirect leads into a
private network only from within one.

Traded away: strangers' addresses are fetched without the environment's proxies, because a proxy looks names up itself.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlsplit

import requests
import urllib3
from PIL import Image
from urllib3.connection import HTTPConnection, HTTPSConnection

from model.data.images import IMAGE_NEEDED, MAX_PIXELS, open_image, printable
from model.errors import InputError

TIMEOUT = 20.0  # seconds without a byte
LARGEST_DOWNLOAD = 50 * 2**20  # bytes; a 200-megapixel JPEG is smaller
CHUNK = 2**16
# What browsers show. Of others, headers don't bound what decoding takes: an icon's may hold any picture, a TIFF's tiles may be
# larger than the picture.
WEB_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF")
WEB_IMAGE_NEEDED = "a picture (JPEG, PNG, WebP, GIF, BMP or AVIF) is needed"
REDIRECTS = 5
REDIRECTING = (301, 302, 303, 307, 308)
SHOWN = 200  # characters of an address in a message
TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses behind NAT64 (RFC 6052)


@dataclass(frozen=True)
class Limits:
    """What is taken from elsewhere.

    Args:
        private_networks: also from this machine and from private networks.
        most_bytes: of the file; None for LARGEST_DOWNLOAD.
        most_pixels: of the picture.
        seconds: for a download in all, redirects included.
    """

    private_networks: bool = False
    most_bytes: int | None = None
    most_pixels: int = MAX_PIXELS
    seconds: float = 60.0

    @property
    def bytes(self) -> int:
        """The most bytes of a file."""
        return LARGEST_DOWNLOAD if self.most_bytes is None else self.most_bytes


PERSON = Limits(private_networks=True)
STRANGERS = Limits(most_bytes=10 * 2**20, most_pixels=50_000_000, seconds=20.0)


def is_url(source: object) -> bool:
    """Whether source is the text of an http or https address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def image_file(source: Any) -> Any:
    """source, in a form that `open_image` takes: a URL is downloaded into an open file, anything else stays as it is.

    Raises:
        InputError: as `downloaded`.
    """
    return downloaded(str(source)) if is_url(source) else source


def opened(source: str | bytes, target_size: int | None = None, limits: Limits = STRANGERS) -> Image.Image:
    """A stranger's picture in mode RGB: an http or https address, a data URI or base64; bytes are the picture's file.

    Args:
        target_size: as `open_image`'s.

    Raises:
        InputError: it can't be fetched or opened, or is beyond a limit.
    """
    content = source if isinstance(source, bytes) else _content(source, limits)
    if len(content) > limits.bytes:
        raise InputError(f"the picture has more than {_mebibytes(limits.bytes)}; a smaller one is needed.")
    try:
        return open_image(io.BytesIO(content), target_size, limits.most_pixels, WEB_FORMATS)
    except InputError as problem:
        raise InputError(str(problem).replace(IMAGE_NEEDED, WEB_IMAGE_NEEDED)) from None


def _content(source: str, limits: Limits) -> bytes:
    """The picture's file that the text stands for."""
    if is_url(source):
        return downloaded(source, limits).getvalue()
    if len(source) > 3 * limits.bytes:  # three characters a byte, %41, at most
        raise InputError(f"the picture has more than {_mebibytes(limits.bytes)}; a smaller one is needed.")
    if not source.lower().startswith("data:"):
        return _from_base64(source)
    kind, comma, content = source.partition(",")
    if not comma:
        raise InputError("the picture's data URI has no comma; data:image/png;base64,… is needed.")
    if kind.lower().endswith(";base64"):
        return _from_base64(content)
    try:
        return unquote_to_bytes(content)
    except UnicodeEncodeError:
        raise InputError("the picture's data URI holds half a character; %41 and the like are needed.") from None


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # the command base64 breaks lines
    except (binascii.Error, ValueError):
        raise InputError(
            f'the picture "{_shown(text)}" is neither base64 nor an address; base64, a data URI or an http or https '
            "address of a picture is needed."
        ) from None


# --- by address -------------------------------------------------------------------------------------------------------


def downloaded(url: str, limits: Limits = PERSON) -> io.BytesIO:
    """The content of url, in memory.

    Raises:
        InputError: the address is none of those that the limits allow; the server can't be reached, refuses, is silent for
            TIMEOUT seconds, or sends too much or for too long.
    """
    end = time.monotonic() + limits.seconds
    address, may_be_private = url, limits.private_networks
    try:
        for _ in range(REDIRECTS + 1):
            with _answer(address, may_be_private, limits, end) as (answer, is_private):
                if answer.status not in REDIRECTING or not answer.headers.get("location"):
                    return _received(url, answer, limits, end)
                address = urljoin(address, answer.headers["location"])
                may_be_private = may_be_private and is_private
    except TimeoutError:
        silent = f"no answer in {TIMEOUT:.0f} seconds; the address of a picture is needed."
        raise InputError(f"{_shown(url)}: {_too_slow(limits) if time.monotonic() >= end else silent}") from None
    except _Unusable as problem:
        raise InputError(f"{_shown(url)}: {problem}") from None
    except (
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        http.client.HTTPException,
        OSError,
        ValueError,
    ) as e:
        if time.monotonic() >= end:
            raise InputError(f"{_shown(url)}: {_too_slow(limits)}") from None
        raise InputError(
            f"{_shown(url)}: can't be fetched ({_reason(e)}); the address of a picture is needed."
        ) from None
    raise InputError(f"{_shown(url)}: more than {REDIRECTS} redirects; the address of a picture is needed.")


class _Unusable(Exception):
    """What is wrong with an address: found, needed."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, also where it is written inside another (IPv4 in IPv6)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if ip in TRANSLATED or int(ip) < 2**32:
            inner = ipaddress.IPv4Address(int(ip) % 2**32)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:  # which Python counts to the internet
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


@contextmanager
def _answer(url: str, may_be_private: bool, limits: Limits, end: float) -> Iterator[tuple[Any, bool]]:
    """The server's answer to GET url, its headers read, and whether it comes from a private network."""
    url = requests.Request("GET", url).prepare().url or ""  # quoted, and the name in ASCII
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise _Unusable(f"leads to {_shown(parts.scheme)}:; http or https is needed.")
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url)) if may_be_private else None
    addresses = [] if proxy else _addresses(parts, end)
    is_private = any(not is_public(address) for address in addresses)
    if is_private and not may_be_private:
        raise _Unusable("leads to this machine or into a private network; a public address is needed.")
    connection = _connected_to_proxy(parts, proxy, end) if proxy else _connected_to_one_of(addresses, parts, end)
    clock = threading.Timer(max(0.0, end - time.monotonic()), _cut, [connection.sock])
    clock.daemon = True
    clock.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc.rpartition("@")[2]
        headers = {"Host": host, "Accept": "image/*,*/*", "Accept-Encoding": "identity", "User-Agent": "visualglm"}
        if proxy and parts.scheme == "http":  # the proxy itself is asked, not the host through it
            path = url
            headers |= _proxy_headers(_proxy_parts(proxy))
        connection.request("GET", path, headers=headers, preload_content=False, decode_content=False)
        yield connection.getresponse(), is_private
    finally:
        clock.cancel()
        connection.close()


def _addresses(parts: SplitResult, end: float) -> list[str]:
    """The IP addresses of a URL's host.

    Raises:
        TimeoutError: they aren't found in time. The system can't be told how long to look, so a thread waits for it.
    """
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as problem:  # no such name, or one that can't be written in ASCII
            found.set_exception(problem)

    threading.Thread(target=look_up, daemon=True).start()
    return list(dict.fromkeys(str(entry[4][0]) for entry in found.result(_patience(end))))


def _connected_to_one_of(addresses: list[str], parts: SplitResult, end: float) -> Any:
    """A connection to the first of the addresses that takes one, for the host of the URL."""
    problem: Exception = OSError("no address")
    for address in addresses:
        try:
            return _connected(address, parts, end)
        except (OSError, urllib3.exceptions.HTTPError) as error:
            problem = error
    raise problem


def _connected(address: str, parts: SplitResult, end: float) -> Any:
    if parts.scheme == "http":
        connection = HTTPConnection(address, parts.port or 80, timeout=_patience(end))
    else:
        connection = HTTPSConnection(
            address,
            parts.port or 443,
            timeout=_patience(end),
            server_hostname=parts.hostname,
            assert_hostname=parts.hostname,
            **_authorities(),
        )
    connection.connect()
    return connection


def _connected_to_proxy(parts: SplitResult, proxy: str, end: float) -> Any:
    """A connection to the URL's host by way of a proxy of the environment."""
    way = _proxy_parts(proxy)
    if parts.scheme == "http":
        connection = HTTPConnection(way.hostname or "", way.port or 80, timeout=_patience(end))
    else:
        connection = HTTPSConnection(way.hostname or "", way.port or 80, timeout=_patience(end), **_authorities())
        connection.set_tunnel(parts.hostname or "", parts.port or 443, _proxy_headers(way))
    connection.connect()
    return connection


def _proxy_parts(proxy: str) -> SplitResult:
    return urlsplit(proxy if "://" in proxy else f"http://{proxy}")


def _proxy_headers(way: SplitResult) -> dict[str, str]:
    """The name and password that a proxy's address has, as it is told them."""
    if not way.username:
        return {}
    return dict(urllib3.make_headers(proxy_basic_auth=f"{unquote(way.username)}:{unquote(way.password or '')}"))


def _authorities() -> dict[str, Any]:
    """Whose certificates are believed: those that requests believes."""
    return {
        "cert_reqs": "CERT_REQUIRED",
        "ca_certs": os.environ.get("REQUESTS_CA_BUNDLE") or requests.certs.where(),
    }


def _patience(end: float) -> float:
    return max(0.001, min(TIMEOUT, end - time.monotonic()))


def _cut(connection: socket.socket) -> None:
    """End a connection that another thread waits for."""
    try:
        # Not SSLSocket's own, which the other thread stumbles over.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        return  # it has ended


def _received(url: str, answer: Any, limits: Limits, end: float) -> io.BytesIO:
    """The answer's content."""
    if not 200 <= answer.status < 300:
        raise _Unusable(f"the server answered {answer.status} {answer.reason}; needed is a picture.")
    content = io.BytesIO()
    length = answer.headers.get("content-length", "")
    too_large = f"more than {_mebibytes(limits.bytes)}; a smaller picture is needed."
    if length.isdecimal() and int(length) > limits.bytes:
        raise _Unusable(too_large)
    while chunk := answer.read1(CHUNK, decode_content=False):
        content.write(chunk)
        if content.tell() > limits.bytes:
            raise _Unusable(too_large)
    if time.monotonic() >= end:
        raise _Unusable(_too_slow(limits))
    content.seek(0)
    return content


def _too_slow(limits: Limits) -> str:
    return f"not whole after {limits.seconds:.0f} seconds; a faster server is needed."


def _mebibytes(number: int) -> str:
    return f"{number / 2**20:.3g} MiB"


def _shown(text: str) -> str:
    return printable(text if len(text) <= SHOWN else text[:SHOWN] + "…")


def _reason(error: Exception) -> str:
    """The last and most telling part of nested errors."""
    cause = getattr(error.args[0], "reason", error.args[0]) if error.args else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        cause = error.strerror
    return (str(cause).rsplit(": ", 1)[-1].splitlines() or [type(error).__name__])[0]
