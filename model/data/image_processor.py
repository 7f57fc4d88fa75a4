"""A Pillow image becomes what the vision tower reads: float32[3, H, W]."""

import torch
from PIL import Image

from model.data.images import open_image

# Mean and standard deviation of CLIP's training pixels, per channel R, G, B, in [0, 1]: the preprocessing released with
# Radford et al. 2021. BLIP-2 and VisualGLM normalise with the same numbers.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class BlipImageEvalProcessor:
    """Turns pictures of any size and mode into float32[3, image_size, image_size].

    Resized with Pillow's bicubic filter, not cropped: the picture's proportions are not kept. mean and std are per
    channel, of values in [0, 1].
    """

    def __init__(
        self,
        image_size: int = 224,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
    ):
        self.image_size = image_size
        self.mean = mean
        self.std = std

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """float32[3, H, W], normalised.

        Raises:
            InputError: the image's data can't be read.
        """
        resized = open_image(image).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.image_size, self.image_size, 3).permute(2, 0, 1)  # uint8[3, H, W]
        values = pixels.to(torch.float32).div(255)
        return values.sub(torch.tensor(self.mean).view(3, 1, 1)).div(torch.tensor(self.std).view(3, 1, 1))
