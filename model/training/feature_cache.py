"""What the frozen eyes make of each picture, computed once before training instead of at every step.

A picture's features, the Q-Former's output, take 32 × 768 numbers in the 6B model: 48 KiB in half precision against
588 KiB of pixels. They hold as long as the vision tower, the Q-Former, the picture's bytes and its processing don't
change, and are kept under all four: a picture under two names is looked at once, and with --feature_cache no later run
looks at it again.
"""

import hashlib
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from model.blip2 import BLIP2
from model.checkpoints.weights import fingerprint
from model.data.dataset import FewShotDataset
from model.data.images import checked_file, open_image
from model.distributed import from_processes_here, is_first_process, processes_here
from model.errors import InputError
from model.progress import with_progress
from model.training.feature_store import DIGEST_BYTES, FeaturePart, kept_in, part_of_this_process, placed, rows_in

PICTURES_AT_ONCE = 16  # enough to keep the matrix units busy at 257 positions a picture

Looked = tuple[str, bytes | None, torch.Tensor | None]  # path, digest of its bytes, float32[3, H, W]


class _Pictures(Dataset[Looked]):
    """Pictures by index, for a DataLoader's workers. One that is known comes without its pixels, and one that can't be
    opened without a digest too.
    """

    def __init__(
        self, paths: Sequence[str], processor: Callable[[Any], torch.Tensor], known: Collection[bytes]
    ) -> None:
        self.paths, self.processor, self.known = paths, processor, known

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Looked:
        path = self.paths[index]
        try:
            checked_file(path)
            content = Path(path).read_bytes()
            digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
            if digest in self.known:
                return path, digest, None
            image = open_image(io.BytesIO(content), getattr(self.processor, "image_size", None))
            return path, digest, self.processor(image)
        except (InputError, OSError):
            return path, None, None


def feature_file(folder: str, eyes: BLIP2, processor: Any) -> Path:
    """Where the features that these eyes make of pictures so processed are kept in folder."""
    seen_by = {**eyes.vit.state_dict(prefix="vit."), **eyes.qformer.state_dict(prefix="qformer.")}
    made_by = f"{fingerprint(seen_by)} {type(processor).__name__} {sorted(vars(processor).items())}"
    return Path(folder).expanduser() / (hashlib.sha256(made_by.encode()).hexdigest()[:16] + ".features")


@torch.no_grad()
def picture_features(
    paths: Sequence[str],
    processor: Callable[[Any], torch.Tensor],
    eyes: BLIP2,
    num_workers: int = 0,
    file: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Features [queries, width] of each picture by its path, in the model's dtype, on the CPU.

    Args:
        paths: pictures, each once.
        processor: a Pillow image to float32[3, H, W].
        num_workers: processes that open pictures.
        file: where features stay after the run, if they are to; those of other processes stay beside it.

    A picture that can't be opened has no features: its row tells when it is asked for. The processes of a run on this
    machine share the pictures out, and read each other's features.

    Raises:
        InputError: there is no room for the features.
    """
    weight = eyes.glm_proj.weight
    shape = (eyes.qformer.query_length, eyes.glm_proj.in_features)
    process, processes = processes_here()
    share = paths[process::processes]
    places = kept_in(file, shape, weight.dtype) if file else {}
    part = part_of_this_process(len(share), shape, weight.dtype, file)
    digests = _look(share, processor, eyes, num_workers, places, part)
    for others_digests, added, path, start in from_processes_here((digests, part.digests, part.path, part.start)):
        is_own = path == part.path
        rows = part.rows if is_own else rows_in(path, start + len(added), shape, weight.dtype)[start:]
        digests |= others_digests
        places |= placed(added, rows)
    if file and processes > 1:
        places |= kept_in(file, shape, weight.dtype)  # another process may have found more there
    from_processes_here(None)  # everybody has opened the files that have no name
    found = ((path, places[digests[path]]) for path in paths if path in digests)
    return {path: rows[row] for path, (rows, row) in found}


def _look(
    paths: Sequence[str],
    processor: Callable[[Any], torch.Tensor],
    eyes: BLIP2,
    num_workers: int,
    known: Collection[bytes],
    part: FeaturePart,
) -> dict[str, bytes]:
    """Add to part the features of the pictures that aren't known yet; the digest of each one that can be opened."""
    weight, was_training = eyes.glm_proj.weight, eyes.training
    eyes.eval()
    loader = DataLoader(
        _Pictures(paths, processor, frozenset(known)),
        batch_size=PICTURES_AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
    )
    digests: dict[str, bytes] = {}
    made = set(known)
    told = f"Looking at the pictures, {PICTURES_AT_ONCE} at a time"
    for batch in with_progress(loader, len(loader), told) if is_first_process() else loader:
        digests |= {path: digest for path, digest, _ in batch if digest is not None}
        new = {digest: image for _, digest, image in batch if image is not None and digest not in made}
        if new:
            images = torch.stack(list(new.values())).to(weight.device, weight.dtype)
            part.add(list(new), eyes.features(images).cpu())
            made |= set(new)
    part.close()
    eyes.train(was_training)
    return digests


class FeatureCache:
    """Gives data sets their pictures' features where that pays, and sends eyes that nobody needs any more away."""

    def __init__(
        self, eyes: BLIP2, samples_planned: Callable[[int], float], num_workers: int = 0, folder: str | None = None
    ) -> None:
        """samples_planned gives the rows that training will take from a data set of so many rows.

        In folder, if there is one, features are kept for later runs.
        """
        self.eyes, self.samples_planned, self.num_workers, self.folder = eyes, samples_planned, num_workers, folder
        self.everything_known = True

    def given_to(self, dataset: FewShotDataset) -> FewShotDataset:
        """dataset, with features if the eyes are frozen and training meets each row twice or more on average, or if they
        are kept for later runs.
        """
        rows = len(dataset)
        if self.eyes.has_fixed_features() and (self.folder or self.samples_planned(rows) >= 2 * rows):
            file = feature_file(self.folder, self.eyes, dataset.processor) if self.folder else None
            pictures = dataset.image_paths()
            dataset.features = picture_features(pictures, dataset.processor, self.eyes, self.num_workers, file)
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
