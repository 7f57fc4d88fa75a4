"""One question about one image, for whoever compares the logits of two processes."""

import torch

QUESTION = {
    "input_ids": torch.tensor([[859] + [3] * 32 + [775, 2685, 86, 89, 554, 90]]),
    "image": torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(7)),
    "pre_image": 1,
}
