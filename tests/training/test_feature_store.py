"""A part of the features: what is added can be read, here and by others, and what is not on the disk isn't listed."""

import errno
import os
from hashlib import blake2b
from pathlib import Path

import pytest
import torch

from model.errors import InputError
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


def test_part_in_a_folder_whose_file_system_has_no_locks_is_for_this_run_only_with_a_sentence(
    tmp_path, monkeypatch, capsys
):
    """As on Lustre without -o flock, or NFS without its lock service. Two runs could not tell that both add to a file."""
    opened = []

    def without_locks(index, _):
        opened.append(index)
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(feature_store.fcntl, "flock", without_locks)
    assert type(new_part(4, FORMAT, tmp_path / "some.features")) is FeaturesInMemory
    assert opened[0].closed
    assert capsys.readouterr().out == (
        f"{tmp_path}: its file system can't lock files (Function not implemented), so features of pictures are kept for this "
        "run only; a --feature_cache on another one is needed.\n"
    )


def written(file):
    part = new_part(4, FORMAT, file)
    part.add(DIGESTS, FEATURES)
    part.close()
    return file


def test_files_of_a_part_are_plain_numbers_and_a_list_of_digests_and_checksums(tmp_path):
    file = written(tmp_path / "some.features")
    assert file.read_bytes() == FEATURES.numpy().tobytes()
    sums = [
        blake2b(row.numpy().tobytes(), key=digest, digest_size=16).digest()
        for digest, row in zip(DIGESTS, FEATURES, strict=True)
    ]
    entries = b"".join(digest + sum for digest, sum in zip(DIGESTS, sums, strict=True))
    assert file.with_suffix(".index").read_bytes() == b"features of images, version 2\n" + entries


def test_files_of_an_earlier_version_cant_be_checked_and_are_made_anew_with_a_sentence(tmp_path, capsys):
    """They had the same rows, and only the digests in their index."""
    file = tmp_path / "some.features"
    file.write_bytes(FEATURES.numpy().tobytes())
    file.with_suffix(".index").write_bytes(b"".join(DIGESTS))
    assert kept_in(file, FORMAT) == {}
    index = file.with_suffix(".index")
    told = f"{index}: it is of an earlier version, without checksums, or damaged; the features are made anew."
    assert told in capsys.readouterr().out
    assert new_part(4, FORMAT, file).start == 0
    assert len(kept_in(written(file), FORMAT)) == 4


def test_file_of_no_use_is_not_overwritten_where_another_run_may_be_reading_it(tmp_path):
    file = written(tmp_path / "some.features")
    (digest, *_) = DIGESTS
    rows, row = kept_in(file, FORMAT)[digest]
    file.with_suffix(".index").unlink()
    part = new_part(4, FORMAT, file)
    part.add(DIGESTS, -FEATURES)
    part.close()
    assert torch.equal(rows[row], FEATURES[0])


def test_entry_that_a_killed_run_has_half_written_is_not_in_the_way_of_the_next(tmp_path):
    file = written(tmp_path / "some.features")
    index = file.with_suffix(".index")
    index.write_bytes(index.read_bytes()[:-5])
    part = new_part(4, FORMAT, file)
    assert part.start == 3
    part.add(DIGESTS[3:], FEATURES[3:])
    part.close()
    assert set(kept_in(file, FORMAT)) == set(DIGESTS)


def test_index_with_a_flipped_bit_loses_that_row_only(tmp_path):
    file = written(tmp_path / "some.features")
    index = bytearray(file.with_suffix(".index").read_bytes())
    index[len(feature_store.HEADER) + 32] ^= 1  # in the second digest
    file.with_suffix(".index").write_bytes(index)
    assert set(kept_in(file, FORMAT)) == {*DIGESTS} - {DIGESTS[1]}


@pytest.mark.parametrize("suffix", [".index", ".features"])
@pytest.mark.parametrize("act", [kept_in, lambda file, format: new_part(4, format, file)])
def test_link_out_of_the_folder_is_refused_and_its_target_left_alone(tmp_path, suffix, act):
    file = written(tmp_path / "cache" / "some.features")
    target = tmp_path / "target"
    target.write_text("mine")
    file.with_suffix(suffix).unlink()
    file.with_suffix(suffix).symlink_to(target)
    with pytest.raises(InputError, match=rf"some\{suffix}: a link found; .* so remove the link"):
        act(file, FORMAT)
    assert target.read_text() == "mine"


def test_index_that_cant_be_opened_is_a_sentence(tmp_path):
    (tmp_path / "some.index").mkdir()
    with pytest.raises(InputError, match=r"some\.index: Is a directory; a file that can be written to is needed"):
        new_part(4, FORMAT, tmp_path / "some.features")
