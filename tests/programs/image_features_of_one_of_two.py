"""One of two processes that compute features together: checkpoint, file ("" for none) and image paths are its words.

Prints how many images this process has looked at. tests/ must be on the path.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from conftest import load_model

from model.data.image_processor import BlipImageEvalProcessor
from model.data.images import open_image
from model.training.feature_cache import image_features


def main() -> None:
    checkpoint, file, *paths = sys.argv[1:]
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    vision, processor = load_model(Path(checkpoint)).get_mixin("eva").model, BlipImageEvalProcessor(224)
    seen, features_of = [], vision.features
    vision.features = lambda images: seen.extend(images) or features_of(images)
    found = image_features(paths, processor, vision, file=Path(file) if file else None)
    assert list(found) == [path for path in paths if Path(path).exists()]
    with torch.no_grad():
        expected = {path: features_of(processor(open_image(path))[None])[0] for path in found}
    torch.testing.assert_close(found, expected)
    print(f"looked at {len(seen)}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
