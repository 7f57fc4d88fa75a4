"""Processes that see other files or flags are told apart."""

import pytest

from model.errors import InputError
from model.training.same_inputs import _sampled, refuse_different

NAMES = ["rank 0 on a", "rank 1 on a", "rank 2 on b"]


def test_processes_that_see_the_same_are_taken():
    refuse_different(NAMES, [{"--lr": "0.1", "the tokenizer": "12ab"}] * 3)


def test_what_differs_is_listed_with_the_process_that_sees_it():
    seen = [{"--lr": "0.1", "x": "1"}, {"--lr": "0.1", "x": "1"}, {"--lr": "0.2"}]
    with pytest.raises(InputError) as found:
        refuse_different(NAMES, seen)
    assert str(found.value).splitlines() == [
        "--lr: rank 0 on a sees 0.1, rank 2 on b sees 0.2; the same is needed on all.",
        "x: rank 0 on a sees 1, rank 2 on b sees nothing; the same is needed on all.",
    ]


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_sample_of_a_file_of_weights_tells_another_one(tmp_path, place):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1_000_000))
    before = _sampled(file)
    content = bytearray(1_000_000)
    content[place - 16_000 if place else 0 : place] = b"1" * 16_000
    file.write_bytes(content)
    assert _sampled(file) != before


def test_sample_of_a_small_file_is_of_its_size_and_bytes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert _sampled(file).startswith("3 bytes, ")
