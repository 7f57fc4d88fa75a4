"""Files that strangers may send as pictures: small, and of many pixels."""

import io
import struct
import zlib

from PIL import Image


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header says width × height pixels, and that holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(kind: str) -> bytes:
    """A black picture of 2.25 million pixels in a format of Pillow's."""
    content = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(content, kind)
    return content.getvalue()
