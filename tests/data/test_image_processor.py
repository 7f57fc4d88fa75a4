"""The image transform against an independent computation."""

import pickle

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

from model.data.image_processor import CLIP_MEAN, CLIP_STD, BlipImageEvalProcessor

IMAGES = sorted((GOLDEN / "upstream/images").glob("*.png"))


@pytest.mark.parametrize("path", IMAGES, ids=[path.name for path in IMAGES])
def test_image_is_resized_scaled_and_normalised(path):
    image = Image.open(path).convert("RGB")
    pixels = np.asarray(image.resize((224, 224), Image.BICUBIC), dtype=np.float64) / 255
    expected = ((pixels - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(2, 0, 1)
    np.testing.assert_allclose(BlipImageEvalProcessor()(image).numpy(), expected, rtol=0, atol=1e-6)


def test_image_is_float32_with_channels_first():
    image = BlipImageEvalProcessor(32)(Image.new("RGB", (50, 20)))
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (3, 32, 32))


def test_processor_without_mean_and_std_has_clips():
    assert (BlipImageEvalProcessor(32, None, None).mean, BlipImageEvalProcessor().std) == (CLIP_MEAN, CLIP_STD)


def test_image_is_not_cropped():
    wide = Image.new("RGB", (100, 10))
    wide.paste((255, 255, 255), (0, 0, 50, 10))
    red = BlipImageEvalProcessor(10, mean=(0, 0, 0), std=(1, 1, 1))(wide)[0]
    assert red[:, 0].tolist() == [1.0] * 10
    assert red[:, 9].tolist() == [0.0] * 10


def test_image_rows_are_height_and_columns_are_width():
    image = Image.new("RGB", (10, 10))
    image.paste((255, 255, 255), (0, 0, 10, 5))  # white above
    red = BlipImageEvalProcessor(10, mean=(0, 0, 0), std=(1, 1, 1))(image)[0]
    assert (red[0].mean().item(), red[9].mean().item()) == (1.0, 0.0)


def test_image_channels_are_red_green_blue():
    image = BlipImageEvalProcessor(4, mean=(0, 0, 0), std=(1, 1, 1))(Image.new("RGB", (4, 4), (255, 102, 0)))
    assert image.mean(dim=(1, 2)).tolist() == pytest.approx([1.0, 0.4, 0.0])


def test_image_in_another_mode_equals_its_rgb():
    grey = Image.new("L", (4, 4), 77)
    processor = BlipImageEvalProcessor(4)
    assert torch.equal(processor(grey), processor(grey.convert("RGB")))


def test_processor_when_pickled_gives_the_same():
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    processor = BlipImageEvalProcessor(8)
    assert torch.equal(pickle.loads(pickle.dumps(processor))(image), processor(image))
