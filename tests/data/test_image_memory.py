"""Large pictures are decoded at once only as memory allows."""

import io
import threading

import pytest
from PIL import Image

from model.data import image_memory
from model.data.image_check import problems_by_path
from model.data.image_memory import decoding_bytes, memory_for
from model.data.images import open_image
from model.errors import InputError

LARGE = image_memory.SMALL


def test_memory_is_counted_from_the_header_and_of_a_jpeg_at_its_reduced_size(tmp_path):
    Image.new("RGB", (4000, 2000)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert decoding_bytes(image, 8_000_000) == 80_000_000
        image.draft(None, (500, 250))
        assert decoding_bytes(image, 8_000_000) == 80_000_000 // 64


def test_progressive_jpeg_takes_memory_for_all_its_pixels(tmp_path):
    Image.new("RGB", (4000, 2000)).save(tmp_path / "a.jpg", progressive=True)
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft(None, (500, 250))
        assert decoding_bytes(image, 8_000_000) > 48_000_000


def test_large_pictures_wait_for_each_other_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(image_memory, "free", lambda: 3 * LARGE)
    began, at_once = threading.Event(), []

    def second():
        began.set()
        with memory_for(LARGE, "second"):
            at_once.append(list(image_memory._being_decoded))

    thread = threading.Thread(target=second)
    with memory_for(LARGE, "first"):
        thread.start()
        began.wait()
        assert at_once == []
    thread.join()
    assert at_once == [[LARGE]]


def test_small_pictures_wait_for_none(monkeypatch):
    monkeypatch.setattr(image_memory, "free", lambda: 0)
    with memory_for(LARGE - 1, "small"):
        assert image_memory._being_decoded == []


def test_picture_that_memory_does_not_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_memory, "free", lambda: 2**20)
    content = io.BytesIO()
    Image.new("L", (3000, 3000)).save(content, "JPEG2000")
    (tmp_path / "a.jp2").write_bytes(content.getvalue())
    with pytest.raises(InputError, match="takes 85 MiB of memory to decode, and 1 MiB are free; a smaller picture"):
        open_image(content)
    [(_, problem)] = problems_by_path([str(tmp_path / "a.jp2")], seconds=60)
    assert "takes 85 MiB of memory" in problem
