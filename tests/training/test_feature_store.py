"""A part of the features: what is added can be read, here and by others, and what is not on the disk isn't listed."""

from pathlib import Path

import torch

from model.training import feature_store
from model.training.feature_store import (
    FeatureFormat,
    FeaturesInMemory,
    FeaturesOfTheRun,
    FeaturesOnDisk,
    kept_in,
    new_part,
    part_of_this_process,
    placed,
    rows_in,
)

FORMAT = FeatureFormat(queries=2, width=3, dtype=torch.float32)
DIGESTS = [bytes([number]) * feature_store.DIGEST_BYTES for number in range(4)]
FEATURES = torch.arange(24.0).view(4, 2, 3)


def test_part_of_one_process_is_in_memory():
    part = part_of_this_process(4, FORMAT, None)
    assert type(part) is FeaturesInMemory
    part.add(DIGESTS[:1], FEATURES[:1])
    part.add(DIGESTS[1:], FEATURES[1:])
    assert part.path is None
    assert part.digests == DIGESTS
    assert torch.equal(part.rows, FEATURES)


def test_shared_part_without_a_place_of_its_own_is_read_under_its_path_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store.tempfile, "tempdir", str(tmp_path))
    part = new_part(4, FORMAT, is_shared=True)
    assert type(part) is FeaturesOfTheRun
    part.add(DIGESTS, FEATURES)
    assert part.path is not None
    assert torch.equal(rows_in(part.path, 4, FORMAT), FEATURES)
    assert not list(tmp_path.iterdir())


def test_parts_in_a_folder_are_found_together_and_gone_on_with(tmp_path):
    file = tmp_path / "some.features"
    for own_file, some in ((file, slice(0, 1)), (tmp_path / "some-1.features", slice(1, 2)), (file, slice(2, 4))):
        part = new_part(3, FORMAT, own_file)
        part.add(DIGESTS[some], FEATURES[some])
        part.close()
    kept = kept_in(file, FORMAT)
    assert all(torch.equal(kept[digest][0][kept[digest][1]], FEATURES[i]) for i, digest in enumerate(DIGESTS))
    assert len(kept) == 4


def test_features_that_were_not_noted_are_not_found(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(feature_store, "NEW_BEFORE_NOTED", 2)
    part = new_part(4, FORMAT, tmp_path / "some.features")
    part.add(DIGESTS[:2], FEATURES[:2])
    part.add(DIGESTS[2:3], FEATURES[2:3])
    assert list(kept_in(tmp_path / "some.features", FORMAT)) == DIGESTS[:2]
    part.close()
    assert list(kept_in(tmp_path / "some.features", FORMAT)) == DIGESTS[:3]


def test_placed_digests_have_the_rows_in_their_order():
    rows, row = placed(DIGESTS, FEATURES)[DIGESTS[2]]
    assert torch.equal(rows[row], FEATURES[2])


def test_part_too_large_for_memory_is_in_a_file_of_the_run(monkeypatch):
    monkeypatch.setattr(feature_store, "MEMORY_SHARE", 0.0)
    assert type(new_part(4, FORMAT)) is FeaturesOfTheRun


def test_part_in_a_folder_while_another_run_adds_to_it_is_for_this_run_only(tmp_path):
    file = tmp_path / "some.features"
    first, second = new_part(4, FORMAT, file), new_part(4, FORMAT, file)
    assert [type(part) for part in (first, second)] == [FeaturesOnDisk, FeaturesInMemory]
    first.close()
    assert type(new_part(4, FORMAT, file)) is FeaturesOnDisk


def test_files_of_a_part_are_plain_numbers_and_digests_as_ever(tmp_path):
    """Caches of earlier versions are read: `.features` holds the rows one behind the other, `.index` their digests."""
    (tmp_path / "some.features").write_bytes(FEATURES.numpy().tobytes())
    (tmp_path / "some.index").write_bytes(b"".join(DIGESTS))
    kept = kept_in(tmp_path / "some.features", FORMAT)
    assert all(torch.equal(kept[digest][0][kept[digest][1]], FEATURES[i]) for i, digest in enumerate(DIGESTS))
    part = new_part(4, FORMAT, tmp_path / "some.features")
    assert part.start == 4
    part.close()
    assert (tmp_path / "some.index").read_bytes() == b"".join(DIGESTS)
