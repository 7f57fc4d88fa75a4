"""What a run says: from the first process only, at once, and times as a person says them."""

import pytest

from model.distributed import is_first_process
from model.progress import duration, say, warn


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (42.4, "42 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7805, "2 h 10 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_duration_is_as_a_person_says_it(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("rank", "is_first"), [(None, True), ("0", True), ("1", False)])
def test_first_process_is_rank_0_or_the_only_one(monkeypatch, rank, is_first):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() is is_first


def test_say_and_warn_in_the_first_process_print_a_line_each(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    say("加油")
    warn("careful")
    assert capsys.readouterr() == ("加油\n", "careful\n")


def test_say_and_warn_in_another_process_print_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    say("a")
    warn("b")
    assert capsys.readouterr() == ("", "")
