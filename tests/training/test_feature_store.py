"""A part of the features: what is added can be read, here and by others, and what is not on the disk isn't listed."""

from pathlib import Path

import torch

from model.training import feature_store as feature_files
from model.training.feature_store import FeaturePart, kept_in, part_of_this_process, placed, rows_in

SHAPE, DTYPE = (2, 3), torch.float32
DIGESTS = [bytes([number]) * feature_files.DIGEST_BYTES for number in range(4)]
FEATURES = torch.arange(24.0).view(4, *SHAPE)


def test_part_of_one_process_is_in_memory():
    part = part_of_this_process(4, SHAPE, DTYPE, None)
    part.add(DIGESTS[:1], FEATURES[:1])
    part.add(DIGESTS[1:], FEATURES[1:])
    assert part.path is None
    assert part.digests == DIGESTS
    assert torch.equal(part.rows, FEATURES)


def test_shared_part_without_a_place_of_its_own_is_read_under_its_path_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files.tempfile, "tempdir", str(tmp_path))
    part = FeaturePart(4, SHAPE, DTYPE, is_shared=True)
    part.add(DIGESTS, FEATURES)
    assert part.path is not None
    assert torch.equal(rows_in(part.path, 4, SHAPE, DTYPE), FEATURES)
    assert not list(tmp_path.iterdir())


def test_parts_in_a_folder_are_found_together_and_gone_on_with(tmp_path):
    file = tmp_path / "some.features"
    for own_file, some in ((file, slice(0, 1)), (tmp_path / "some-1.features", slice(1, 2)), (file, slice(2, 4))):
        part = FeaturePart(3, SHAPE, DTYPE, own_file)
        part.add(DIGESTS[some], FEATURES[some])
        part.close()
    kept = kept_in(file, SHAPE, DTYPE)
    assert all(torch.equal(kept[digest][0][kept[digest][1]], FEATURES[i]) for i, digest in enumerate(DIGESTS))
    assert len(kept) == 4


def test_features_that_were_not_noted_are_not_found(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(feature_files, "NEW_BEFORE_NOTED", 2)
    part = FeaturePart(4, SHAPE, DTYPE, tmp_path / "some.features")
    part.add(DIGESTS[:2], FEATURES[:2])
    part.add(DIGESTS[2:3], FEATURES[2:3])
    assert list(kept_in(tmp_path / "some.features", SHAPE, DTYPE)) == DIGESTS[:2]
    part.close()
    assert list(kept_in(tmp_path / "some.features", SHAPE, DTYPE)) == DIGESTS[:3]


def test_placed_digests_have_the_rows_in_their_order():
    rows, row = placed(DIGESTS, FEATURES)[DIGESTS[2]]
    assert torch.equal(rows[row], FEATURES[2])
