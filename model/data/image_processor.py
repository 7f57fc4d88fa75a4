"""A Pillow image becomes what the vision tower reads: float32[3, H, W]."""

from collections.abc import Sequence

import numpy
import torch
from PIL import Image

from model.data.images import open_image

# Mean and standard deviation of CLIP's training pixels, per channel R, G, B, in [0, 1]: the preprocessing released with
# Radford et al. 2021. BLIP-2 and VisualGLM normalise with the same numbers.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class BlipImageEvalProcessor:
    """Turns images of any size and mode into float32[3, image_size, image_size].

    They are resized with Pillow's bicubic filter, not cropped: their proportions are not kept.

    Args:
        mean, std: per channel, of values in [0, 1]; None for CLIP's, as in the 2023 script.
    """

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        self.image_size = image_size
        self.mean = CLIP_MEAN if mean is None else mean
        self.std = CLIP_STD if std is None else std

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """float32[3, H, W], normalised.

        Raises:
            InputError: the image's data can't be read.
        """
        resized = open_image(image).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        # In NumPy: torch would give every thread of a server that opens pictures helpers, see `model.inference.serving`.
        mean, std = (numpy.array(one, dtype=numpy.float32).reshape(3, 1, 1) for one in (self.mean, self.std))
        pixels = numpy.asarray(resized).transpose(2, 0, 1)  # uint8[3, H, W]
        values = numpy.divide(pixels, 255, dtype=numpy.float32)
        return torch.from_numpy((values - mean) / std)
