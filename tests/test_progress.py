"""What a run says: from the first process only, at once, and times as a person says them."""

import os
import sys
from types import SimpleNamespace

import pytest
from conftest import PROJECT, run_python, write_rows

from model import progress
from model.distributed import is_first_process
from model.progress import DISK_IS_FULL, OutputIsFull, duration, outliving_readers, printable, say, warn


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


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("图 1\tOK\né", "图 1\tOK\né"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("over\rwritten\b\x00", "over\\x0dwritten\\x08\\x00"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
    ],
)
def test_text_is_printed_without_what_a_terminal_would_obey(capsys, text, printed):
    assert printable(text) == printed
    say(text)
    warn(text)
    assert capsys.readouterr() == (printed + "\n", printed + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ("check_data.py", "ROWS"), ("evaluate.py", "--from_pretrained", PROJECT / "model/tiny", "--data", "ROWS"),
    ("merge_lora.py", "\x1b[2Jcheckpoint", "out"), ("convert_data.py", "\x1b[2Jtalk.json", "out"),
    ("cli_demo.py", "--from_pretrained", PROJECT / "model/tiny", "--image", "\x1b[2J.png"),
    ("../finetune_visualglm.py", "--from_pretrained", PROJECT / "model/tiny", "--use_lora", "--train-data", "ROWS"),
], ids=lambda words: words[0])  # fmt: skip
def test_escape_codes_of_rows_and_names_never_reach_the_terminal(tmp_path, words):
    rows = write_rows(tmp_path, [{"img": "\x1b[2J.png", "prompt": "\x1b]0;x\x07", "label": "a"}])
    done = run_python(PROJECT / "scripts" / words[0], *(rows if word == "ROWS" else word for word in words[1:]))
    assert done.returncode in (1, 2)
    assert "\\x1b[2J" in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="a pseudo-terminal tells EIO there once it is closed")
def test_terminal_that_was_closed_is_printed_to_no_more(monkeypatch):
    controller, terminal = os.openpty()
    monkeypatch.setattr(sys, "stdout", os.fdopen(terminal, "w"))
    say("seen")
    os.close(controller)
    say("lost")
    say("lost too")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full is /dev/full")
def test_full_disk_under_the_output_ends_a_command_and_not_a_run(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputIsFull, match="standard output: No space left on device"):
            say("lost")
        say("lost too")  # it leads nowhere now
    assert capsys.readouterr().err == ""
    with open("/dev/full", "w") as full, outliving_readers():
        monkeypatch.setattr(sys, "stdout", full)
        say("lost")
        say("lost too")
    assert capsys.readouterr().err == f"{DISK_IS_FULL}\n"


def test_progress_is_shown_by_the_first_process_only_and_every_item_comes(capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOG_LINES", 0)
    shown = []
    for is_first in (True, False):
        monkeypatch.setattr(progress, "is_first_process", lambda is_first=is_first: is_first)
        assert list(progress.with_progress(range(3), 3, "Items")) == [0, 1, 2]
        shown.append(capsys.readouterr().err.count("Items: "))
    assert shown == [3, 0]


def test_time_left_goes_by_the_sizes_of_items(capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOG_LINES", 0)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress.with_progress("abc", 3, "Items", sizes=[10, 20, 70])) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines] == ["1 min 30 s left", "47 s left", "0 s left"]


def test_item_that_takes_its_time_after_it_came_counts_when_it_is_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOG_LINES", 0)
    clock = [0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for seconds in progress.with_progress([0, 10, 40, 50], 4, "Items", sizes=[0, 10, 40, 50]):
        clock[0] += seconds
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines] == ["0 s left", "1 min 30 s left", "50 s left", "0 s left"]


def test_column_of_a_table_is_as_wide_in_chinese(monkeypatch):
    monkeypatch.setenv("VISUALGLM_UI_LANG", "en")
    assert progress.in_column("weights", 10) == "weights   "
    monkeypatch.setenv("VISUALGLM_UI_LANG", "zh")
    assert progress.in_column("weights", 10) == "权重      "
    assert progress.in_column("no such name", 5) == "no such name"
