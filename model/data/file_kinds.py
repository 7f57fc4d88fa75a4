"""What a file is by its first bytes, where it is something else than was asked for: a web page, or compressed.

Only the standard library is imported.
"""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COMPRESSED = {  # by how it was made
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")


def text_of(head: bytes) -> bytes:
    """The first bytes of a file of markup in lower case, without what may stand before it."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()


def is_web_page(head: bytes) -> bool:
    """Whether a file with these first bytes is a web page: a link that led to a page, or to a login."""
    return text_of(head).startswith(WEB_PAGES)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file with these first bytes stands for one that git-lfs has not fetched."""
    return head.startswith(LFS_POINTER)


def compression_of(head: bytes) -> str | None:
    """How a file with these first bytes was compressed; None if it wasn't."""
    return next((kind for start, kind in COMPRESSED.items() if head.startswith(start)), None)
