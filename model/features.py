"""What the frozen eyes make of each picture, computed once before training instead of at every step.

A picture's features, the Q-Former's output, take 32 × 768 numbers in the 6B model: 48 KiB in half precision against
588 KiB of pixels. They hold as long as the vision tower, the Q-Former and the picture's processing don't change.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.blip2 import BLIP2
from model.dataset import FewShotDataset
from model.errors import InputError
from model.progress import is_first_process
from model.rows import open_picture

PICTURES_AT_ONCE = 16  # enough to keep the matrix units busy at 257 positions a picture
MEMORY_SHARE = 0.25  # of what is free now; beyond it features lie in a file


class _Pictures(Dataset[tuple[str, torch.Tensor | None]]):
    """Pictures by index, as (path, float32[3, H, W]), for a DataLoader's workers; None for one that can't be opened."""

    def __init__(self, paths: Sequence[str], processor: Callable[[Any], torch.Tensor]) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | None]:
        path = self.paths[index]
        try:
            return path, self.processor(open_picture(path, getattr(self.processor, "image_size", None)))
        except InputError:
            return path, None


@torch.no_grad()
def picture_features(
    paths: Sequence[str], processor: Callable[[Any], torch.Tensor], eyes: BLIP2, num_workers: int = 0
) -> dict[str, torch.Tensor]:
    """Features [queries, width] of each picture by its path, in the model's dtype, on the CPU.

    They are in memory, or in one file without a name where they would take more than a quarter of the free memory; the
    system removes the file when the run ends, however it ends. Forked workers share either.

    Args:
        paths: pictures, each once.
        processor: a Pillow image to float32[3, H, W].
        num_workers: processes that open pictures.

    A picture that can't be opened has no features: its row tells when it is asked for.
    """
    weight = eyes.glm_proj.weight
    was_training = eyes.training
    eyes.eval()
    loader = DataLoader(
        _Pictures(paths, processor), batch_size=PICTURES_AT_ONCE, num_workers=num_workers, collate_fn=list
    )
    store: torch.Tensor | None = None
    known: list[str] = []
    hidden = not is_first_process()
    with tqdm(total=len(paths), desc="looking at the pictures", unit="picture", disable=hidden, delay=2) as bar:
        for batch in loader:
            bar.update(len(batch))
            opened = {path: image for path, image in batch if image is not None}
            if not opened:
                continue
            images = torch.stack(list(opened.values())).to(weight.device, weight.dtype)
            made = eyes.features(images).cpu()
            store = _room_for(len(paths), made) if store is None else store
            store[len(known) : len(known) + len(made)] = made
            known += opened
    eyes.train(was_training)
    return {} if store is None else dict(zip(known, store, strict=False))


def _room_for(count: int, example: torch.Tensor) -> torch.Tensor:
    """An empty tensor [count, queries, width] like example [n, queries, width], in memory or in a nameless file."""
    shape, size = (count, *example.shape[1:]), count * example[0].numel()
    if size * example.element_size() <= MEMORY_SHARE * psutil.virtual_memory().available:
        return example.new_empty(shape)
    with tempfile.NamedTemporaryFile(prefix="visualglm-features-") as file:
        return torch.from_file(file.name, shared=True, size=size, dtype=example.dtype).view(shape)


class FeatureCache:
    """Gives data sets their pictures' features where that pays, and sends eyes that nobody needs any more away."""

    def __init__(self, eyes: BLIP2, samples_planned: Callable[[int], float], num_workers: int = 0) -> None:
        """samples_planned gives the rows that training will take from a data set of so many rows."""
        self.eyes, self.samples_planned, self.num_workers = eyes, samples_planned, num_workers
        self.everything_known = True

    def given_to(self, dataset: FewShotDataset) -> FewShotDataset:
        """dataset, with features if the eyes are frozen and training meets each row twice or more on average."""
        rows = len(dataset)
        if self.eyes.has_fixed_features() and self.samples_planned(rows) >= 2 * rows:
            dataset.features = picture_features(dataset.pictures(), dataset.processor, self.eyes, self.num_workers)
        else:
            self.everything_known = False
        return dataset

    def send_eyes_away(self) -> None:
        """Move the vision tower and the Q-Former to host memory, if every data set has its features."""
        if self.everything_known:
            self.eyes.vit.cpu()
            self.eyes.qformer.cpu()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
