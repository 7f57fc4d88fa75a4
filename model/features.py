"""What the frozen eyes make of each picture, computed once before training instead of at every step.

A picture's features, the Q-Former's output, take 32 × 768 numbers in the 6B model: 48 KiB in half precision against
588 KiB of pixels. They hold as long as the vision tower, the Q-Former, the picture's bytes and its processing don't
change, and are kept under all four: a picture under two names is looked at once, and with --feature_cache no later run
looks at it again.
"""

import fcntl
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.blip2 import BLIP2
from model.checkpoint import fingerprint
from model.dataset import FewShotDataset
from model.errors import InputError
from model.progress import is_first_process
from model.rows import checked_file, open_picture

PICTURES_AT_ONCE = 16  # enough to keep the matrix units busy at 257 positions a picture
MEMORY_SHARE = 0.25  # of what is free now; beyond it features lie in a file
DIGEST_BYTES = 16
NEW_BEFORE_NOTED = 1024  # pictures that a run which is killed may look at in vain, with --feature_cache

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
            image = open_picture(io.BytesIO(content), getattr(self.processor, "image_size", None))
            return path, digest, self.processor(image)
        except (InputError, OSError):
            return path, None, None


class FeatureStore:
    """Features [queries, width] by the digest of a picture's bytes: in memory, or in one file.

    The file has no name, and the system removes it when the run ends, however it ends; or it stays, and an index beside
    it lists the digests whose features are on the disk. Forked workers share either.
    """

    def __init__(self, new: int, shape: tuple[int, int], dtype: torch.dtype, file: Path | None = None) -> None:
        """new is how many pictures may be added. With file, those that it has are here already; the first process adds
        to it, unless another run is doing so: then what is added is for this run only.

        Raises:
            InputError: there is no room for the file.
        """
        self.file, self.index = file, self._locked_index(file)
        digests = [] if file is None else _listed(file, shape[0] * shape[1] * dtype.itemsize)
        self.old = self.noted = len(digests)
        self.place = {digest: place for place, digest in enumerate(digests)}
        if file is not None and self.index is not None:
            if not digests:
                self.index.truncate(0)  # of a features file that is gone
            rows = _rows_in(file, self.old + new, shape, dtype)
            self.kept, self.new = rows[: self.old], rows[self.old :]
        else:
            self.kept = torch.empty(0) if file is None or not digests else _rows_in(file, self.old, shape, dtype)
            self.new = _rows_of_this_run(new, shape, dtype)

    @staticmethod
    def _locked_index(file: Path | None) -> IO[bytes] | None:
        """The index of file, open for this process alone to add to; None if it isn't to, or another one has it."""
        if file is None or not is_first_process():
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        index = open(file.with_suffix(".index"), "ab")  # noqa: SIM115  (held until `close`)
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            index.close()
            return None
        return index

    def __getitem__(self, digest: bytes) -> torch.Tensor:
        place = self.place[digest]
        return self.kept[place] if place < self.old else self.new[place - self.old]

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        """Keep the features [pictures, queries, width] of pictures that are not here yet."""
        start = len(self.place)
        self.new[start - self.old : start - self.old + len(features)] = features
        self.place.update((digest, start + i) for i, digest in enumerate(digests))
        if len(self.place) - self.noted >= NEW_BEFORE_NOTED:
            self._note()

    def _note(self) -> None:
        """List what has been added, once it is on the disk: a run that is killed leaves nothing half-written."""
        if self.file is None or self.index is None:
            return
        with open(self.file, "rb") as file:
            os.fsync(file.fileno())
        self.index.write(b"".join(list(self.place)[self.noted :]))
        self.index.flush()
        self.noted = len(self.place)

    def close(self) -> None:
        """Note the last ones, and let other runs add theirs."""
        if self.index is not None:
            self._note()
            self.index.close()
            self.index = None


def _listed(file: Path, row_bytes: int) -> list[bytes]:
    """The digests whose features are in file; none when it doesn't hold as many as its index lists."""
    index = file.with_suffix(".index")
    if not file.exists() or not index.exists():
        return []
    listed = index.read_bytes()
    digests = [listed[i : i + DIGEST_BYTES] for i in range(0, len(listed) - DIGEST_BYTES + 1, DIGEST_BYTES)]
    return digests if file.stat().st_size >= len(digests) * row_bytes else []


def _rows_in(file: Path, count: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """[count, queries, width] in a file, which is made as large as that."""
    size = count * shape[0] * shape[1]
    try:
        with open(file, "ab") as opened:
            os.posix_fallocate(opened.fileno(), 0, max(1, size * dtype.itemsize))
    except OSError as error:
        raise InputError(
            f"{file}: {error.strerror}; {size * dtype.itemsize / 2**20:.0f} MiB are needed there for features of pictures."
        ) from error
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(count, *shape)


def _rows_of_this_run(count: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """[count, queries, width] in memory, or in a nameless file where that would take much of what is free."""
    if count * shape[0] * shape[1] * dtype.itemsize <= MEMORY_SHARE * psutil.virtual_memory().available:
        return torch.empty(count, *shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="visualglm-features-") as file:
        return _rows_in(Path(file.name), count, shape, dtype)


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
    """Features [queries, width] of each picture by its path, in the model's dtype, on the CPU; see `FeatureStore`.

    Args:
        paths: pictures, each once.
        processor: a Pillow image to float32[3, H, W].
        num_workers: processes that open pictures.
        file: where features stay after the run, if they are to.

    A picture that can't be opened has no features: its row tells when it is asked for.
    """
    weight = eyes.glm_proj.weight
    was_training = eyes.training
    eyes.eval()
    store = FeatureStore(len(paths), (eyes.qformer.query_length, eyes.glm_proj.in_features), weight.dtype, file)
    loader = DataLoader(
        _Pictures(paths, processor, frozenset(store.place)),
        batch_size=PICTURES_AT_ONCE,
        num_workers=num_workers,
        collate_fn=list,
    )
    digests: dict[str, bytes] = {}
    hidden = not is_first_process()
    with tqdm(total=len(paths), desc="looking at the pictures", unit="picture", disable=hidden, delay=2) as bar:
        for batch in loader:
            bar.update(len(batch))
            digests |= {path: digest for path, digest, _ in batch if digest is not None}
            new = {digest: image for _, digest, image in batch if image is not None and digest not in store.place}
            if new:
                images = torch.stack(list(new.values())).to(weight.device, weight.dtype)
                store.add(list(new), eyes.features(images).cpu())
    store.close()
    eyes.train(was_training)
    return {path: store[digest] for path, digest in digests.items()}


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
            pictures = dataset.pictures()
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
