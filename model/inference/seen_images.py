"""The pictures that a model has looked at: asked about one again, it needn't look again.

On a CPU looking takes longer than reading a short question. Conversations, clients that send the picture with every
question, and data with several rows about a picture all come back to it.

Shapes: queries, width = the Q-Former's; H, W = the model's image size.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

KEPT_IMAGES = 256  # whose features are kept, 0.1 MB each with the 6B in float32


class SeenImages:
    """Features of the pictures seen last, for a model whose vision part stays as it is."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # by digest; the last one seen last

    def features(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What `image_features` makes of each image [1, 3, H, W]: [queries, width]. New ones are looked at together."""
        digests = [digest(image) for image in images]
        new = {key: image for key, image in zip(digests, images, strict=True) if key not in self._features}
        if new:
            computed = image_features(torch.cat(list(new.values())), self.model)
            self._features |= zip(new, (one.clone() for one in computed), strict=True)
        found = [self._features[key] for key in digests]
        for key in digests:
            self._features.move_to_end(key)
        while len(self._features) > KEPT_IMAGES:
            self._features.popitem(last=False)
        return found


def digest(image: torch.Tensor) -> bytes:
    """A few bytes that another picture wouldn't have. A GPU is waited for."""
    return hashlib.sha256(image.to("cpu", torch.float32).contiguous().numpy().data).digest()


@torch.no_grad()
def image_features(image: torch.Tensor, model: Any) -> torch.Tensor:
    """What the vision part makes of image [images, 3, H, W], before the projection: [images, queries, width]."""
    dtype = model.transformer.word_embeddings.weight.dtype
    return model.get_mixin("eva").model.features(image.to(dtype))
