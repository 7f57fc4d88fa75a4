"""Large pictures are decoded at once only as memory allows; one that doesn't fit by itself is refused.

Without torch.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from model.errors import InputError

SMALL = 64 * 2**20  # bytes; pictures that take less don't wait for each other
SHARE = 0.5  # of the free memory, for pictures that are decoded at once
LONGEST_WAIT = 60.0  # seconds; then a picture is decoded beside the others all the same

_changed = threading.Condition()
_being_decoded: list[int] = []  # bytes of each large picture in hand


def decoding_bytes(image: Image.Image, full_pixels: int) -> int:
    """What decoding an image and making it RGB takes at its peak, in bytes; measured with Pillow 13, rounded up.

    Args:
        image: its header read, its pixels not; of a JPEG, at the reduced size that it will be decoded at.
        full_pixels: of the file. A progressive JPEG holds the coefficients of all of them.
    """
    each = 17 if image.format == "WEBP" else 14 if image.mode[0] in "IF" else 10
    coefficients = 6 * full_pixels if image.info.get("progressive") else 0
    return image.width * image.height * each + coefficients


@contextmanager
def memory_for(needed: int, name: str) -> Iterator[None]:
    """Hold room for a picture of so many bytes; wait while other threads decode pictures that leave too little.

    Raises:
        InputError: more is needed than is free.
    """
    if needed < SMALL:
        yield
        return
    with _changed:
        _changed.wait_for(lambda: not _being_decoded or needed + sum(_being_decoded) <= SHARE * free(), LONGEST_WAIT)
        left = free()
        if needed > left:
            raise InputError(
                f"{name} takes {needed >> 20} MiB of memory to decode, and {left >> 20} MiB are free; a smaller picture is "
                "needed."
            )
        _being_decoded.append(needed)
    try:
        yield
    finally:
        with _changed:
            _being_decoded.remove(needed)
            _changed.notify_all()


def free() -> int:
    """The machine's free memory, in bytes."""
    import psutil  # where no picture is large, it isn't needed

    return int(psutil.virtual_memory().available)
