"""Features of images, computed once before training by the frozen vision part, instead of at every step.

An image's features are the Q-Former's output: 32 × 768 numbers in the 6B model, 48 KiB in half precision against 588 KiB
of pixels. They stay the same as long as the vision tower, the Q-Former, the image's bytes and its processing do. They are
kept under a digest of all four. So an image under two names is computed once, and with --feature_cache later runs need
not compute it again.
"""

import argparse
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
from model.distributed import from_processes_here, processes_here
from model.errors import InputError
from model.progress import with_progress
from model.training.feature_store import (
    DIGEST_BYTES,
    FeatureFormat,
    FeaturePart,
    kept_in,
    part_of_this_process,
    placed,
    rows_in,
)
from model.training.worker_samples import HandedOver, NotedSamples, dead_workers_named, end_if_unable, received, started

IMAGES_AT_ONCE = 16  # enough to keep the matrix units busy at 257 positions an image
# Of ViT and Q-Former: what the features depend on, and no weight's name or shape tells.
COMPUTED_BY = ("num_attention_heads", "layernorm_epsilon", "layernorm_order", "pre_len", "post_len", "is_decoder")

OpenedImage = tuple[str, bytes | None, torch.Tensor | None]  # path, digest of its bytes, float32[3, H, W]


class _Images(Dataset[OpenedImage]):
    """Images by index, for a DataLoader's workers.

    An image whose digest is known comes without its pixels, one that can't be opened without a digest too.
    """

    def __init__(
        self, paths: Sequence[str], processor: Callable[[Any], torch.Tensor], known: Collection[bytes]
    ) -> None:
        self.paths, self.processor, self.known = paths, processor, known

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> OpenedImage:
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


def feature_file(folder: str, vision: BLIP2, processor: Any) -> Path:
    """Where in folder the features are kept that this vision part makes of images so processed."""
    weights = {**vision.vit.state_dict(prefix="vit."), **vision.qformer.state_dict(prefix="qformer.")}
    settings = [(part, key, args.get(key)) for part, args in vision.config.items() for key in COMPUTED_BY]
    made_by = f"{fingerprint(weights)} {settings} {type(processor).__name__} {sorted(vars(processor).items())}"
    return Path(folder).expanduser() / (hashlib.sha256(made_by.encode()).hexdigest()[:16] + ".features")


@torch.no_grad()
def image_features(
    paths: Sequence[str],
    processor: Callable[[Any], torch.Tensor],
    vision: BLIP2,
    num_workers: int = 0,
    file: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Features [queries, width] of each image by its path, in the model's dtype, on the CPU.

    The processes of a run on this machine share the images out, and read each other's features. An image that can't be
    opened has no features: its row tells when it is asked for.

    Args:
        paths: images, each once.
        processor: a Pillow image to float32[3, H, W].
        num_workers: processes that open images.
        file: where features stay after the run, if they are to. Those of other processes stay beside it.

    Raises:
        InputError: there is no room for the features.
    """
    format = FeatureFormat(vision.qformer.query_length, vision.glm_proj.in_features, vision.glm_proj.weight.dtype)
    process, processes = processes_here()
    share = paths[process::processes]
    places = kept_in(file, format) if file else {}
    part = part_of_this_process(len(share), format, file)
    digests = _add_missing_features(share, processor, vision, num_workers, places, part)
    for others_digests, added, path, start in from_processes_here((digests, part.digests, part.path, part.start)):
        rows = part.rows if path == part.path else rows_in(path, start + len(added), format)[start:]
        digests |= others_digests
        places |= placed(added, rows)
    if file and processes > 1:
        places |= kept_in(file, format, known=places)  # another process may have found more there
    from_processes_here(None)  # everybody has opened the files that have no name
    found = ((path, places[digests[path]]) for path in paths if path in digests)
    return {path: rows[row] for path, (rows, row) in found}


def _add_missing_features(
    paths: Sequence[str],
    processor: Callable[[Any], torch.Tensor],
    vision: BLIP2,
    num_workers: int,
    known: Collection[bytes],
    part: FeaturePart,
) -> dict[str, bytes]:
    """Add to part the features of images that aren't known yet, and close it. The digest of each image that opens."""
    weight, was_training = vision.glm_proj.weight, vision.training
    vision.eval()
    noted = NotedSamples(_Images(paths, processor, frozenset(known)), num_workers)
    loader = DataLoader(
        noted,
        batch_size=IMAGES_AT_ONCE,
        num_workers=num_workers,
        collate_fn=HandedOver(list),
        worker_init_fn=end_if_unable,
    )
    batches = started(loader)
    digests: dict[str, bytes] = {}
    made = set(known)
    told = f"Looking at the pictures, {IMAGES_AT_ONCE} at a time"
    with dead_workers_named(lambda pid: noted.opened_by(pid, paths.__getitem__)):
        for handed_over in with_progress(batches, len(loader), told):
            batch = received(handed_over)
            digests |= {path: digest for path, digest, _ in batch if digest is not None}
            new = {digest: image for _, digest, image in batch if image is not None and digest not in made}
            if new:
                images = torch.stack(list(new.values())).to(weight.device, weight.dtype)
                part.add(list(new), vision.features(images).cpu())
                made |= set(new)
    part.close()
    vision.train(was_training)
    return digests


class FeatureCache:
    """Gives data sets the features of their images where that pays, and then frees the device of the vision part."""

    def __init__(
        self, vision: BLIP2, samples_planned: Callable[[int], float], num_workers: int = 0, folder: str | None = None
    ) -> None:
        """samples_planned gives the rows that training will take from a data set of so many rows.

        In folder, if there is one, features are kept for later runs.
        """
        self.vision, self.samples_planned, self.num_workers, self.folder = vision, samples_planned, num_workers, folder
        self.vision_is_needed = False

    @classmethod
    def of_run(
        cls, model: Any, args: argparse.Namespace, samples_per_step: int, folder: str | None = None
    ) -> "FeatureCache":
        """That of a training run with SAT's namespace args. samples_per_step are those of all processes."""

        def samples_planned(rows: int) -> int:
            return rows * args.epochs if args.epochs else args.train_iters * samples_per_step

        return cls(model.get_mixin("eva").model, samples_planned, args.num_workers, folder)

    def with_features(self, dataset: FewShotDataset, rows: int | None = None) -> FewShotDataset:
        """dataset, which has features from now on if they are fixed and worth their time.

        They are if training meets each row twice or more on average, or if they are kept for later runs.

        Args:
            rows: of all data sets that a batch may mix, so that all of them have features or none has; its own by default.
        """
        rows = len(dataset) if rows is None else rows
        if self.vision.has_fixed_features() and (self.folder or self.samples_planned(rows) >= 2 * rows):
            file = feature_file(self.folder, self.vision, dataset.processor) if self.folder else None
            paths = dataset.image_paths()
            dataset.features = image_features(paths, dataset.processor, self.vision, self.num_workers, file)
        else:
            self.vision_is_needed = True
        return dataset

    def offload_vision(self, is_saved: bool = True) -> None:
        """Let the vision tower and the Q-Former leave the device, if every data set has its features.

        Args:
            is_saved: whether their weights will be saved. They are kept in host memory then, and else forgotten.
        """
        if not self.vision_is_needed:
            self.vision.send_away(is_kept=is_saved)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
