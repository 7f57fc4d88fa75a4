"""Files that strangers may send as pictures: small, and of many pixels. More are in `scripts/dev/fuzz_data.py`."""

import io

from PIL import Image


def saved(kind: str) -> bytes:
    """A black picture of 2.25 million pixels in a format of Pillow's."""
    content = io.BytesIO()
    Image.new("RGB", (1500, 1500)).save(content, kind)
    return content.getvalue()
