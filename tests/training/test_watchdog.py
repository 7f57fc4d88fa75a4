"""The processes of a run watch each other: where one dies, fails or is stopped, all end, and say why."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, PROJECT, free_port, write_rows

from model.training.watchdog import Watchdog, is_broken_connection

HOST = socket.gethostname()
NO_SIGN_OF_LIFE = (
    r"finetune_visualglm.py: error: rank {} on "
    + re.escape(HOST)
    + r" gave no sign of life for \d+ s: it was killed or "
    r"stopped, or its machine can't be reached. --rank_timeout says how long the others wait."
)


@pytest.mark.run
@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.long), 1])
def test_stopped_rank_ends_the_other_with_a_sentence_and_itself_once_it_goes_on(ranks, stopped):
    both = ranks("--rank_timeout", "4")
    both[0].read_until("step      2/")
    both[stopped].send(signal.SIGSTOP)
    other = both[1 - stopped]
    assert other.end(60) == 3
    assert re.fullmatch(NO_SIGN_OF_LIFE.format(stopped), other.output.splitlines()[-1])
    both[stopped].send(signal.SIGCONT)
    assert both[stopped].end(60) == 3, both[stopped].output


@pytest.mark.parametrize("silence", [[5.0, 5.0, 3.9, 5.0], [3.9, 5.0, 4.1, 5.0]], ids=["the first one's", "all"])
@pytest.mark.parametrize("is_first_here", [True, False])
def test_silence_of_the_first_rank_is_told_by_one_process_of_each_machine_whichever_is_noticed(silence, is_first_here):
    """Rank 2's view, on a machine that is cut off from rank 0's: of its own beats it hears nothing either, sooner or later."""
    watchdog = Watchdog(4.0, lambda: "", lambda seconds: None, lambda: False)
    watchdog.rank, watchdog.is_first_here, watchdog.names = 2, is_first_here, [f"rank {rank}" for rank in range(4)]
    watchdog._store, watchdog._silence = object(), silence
    cause = watchdog._found()
    assert cause is not None
    assert cause.text.startswith("rank 0 gave no sign of life for")
    assert watchdog._tells == is_first_here


def test_silence_is_watched_while_a_store_that_can_not_be_reached_keeps_what_is_told_to_it_waiting():
    """A machine is cut off, and of all silences that of rank 1 is noticed first."""
    reached = threading.Event()
    store = SimpleNamespace(compare_set=lambda *_: reached.wait(60))  # no other connection is made to it
    watchdog = Watchdog(4.0, lambda: "", lambda seconds: None, lambda: False)
    watchdog.rank, watchdog.is_first_here, watchdog.names = 2, True, [f"rank {rank}" for rank in range(4)]
    watchdog._store, watchdog._store_to_tell, watchdog._silence = SimpleNamespace(), store, [3.9, 4.1, 3.9, 3.9]
    started = time.monotonic()
    assert [watchdog._found(), watchdog._found()] == [None, None]
    watchdog._silence = [4.4, 4.6, 4.4, 4.4]
    cause = watchdog._found()
    assert time.monotonic() - started < 30
    assert cause is not None
    assert cause.text.startswith("rank 0 gave no sign of life for 4 s")
    assert watchdog._tells
    reached.set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "use", [lambda store: store.get("key"), lambda store: store.check(["key"])], ids=["get", "check"]
)
def test_store_whose_process_has_gone_is_a_broken_connection(use):
    first = "import sys, time, torch; store = torch.distributed.TCPStore('127.0.0.1', int(sys.argv[1]), None, True)"
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", f"{first}; time.sleep(60)", str(port)]) as process:
        store = torch.distributed.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=30))
        process.kill()
    with pytest.raises(RuntimeError) as broken:
        use(store)
    assert is_broken_connection(broken.value)
    assert not is_broken_connection(RuntimeError("shapes don't match"))


@pytest.mark.run
@pytest.mark.long
def test_whole_run_that_is_stopped_for_longer_than_the_timeout_goes_on(ranks):
    both = ranks("--rank_timeout", "3")
    both[0].read_until("step      2/")
    for one in both:
        one.send(signal.SIGSTOP)
    time.sleep(8)
    for one in both:
        one.send(signal.SIGCONT)
    time.sleep(5)
    both[1].send(signal.SIGTERM)
    assert [one.end(60) for one in both] == [143, 143]


@pytest.mark.run
@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1, 3])
def test_killed_rank_of_four_ends_the_others_and_one_of_them_names_it(ranks, killed):
    four = ranks("--rank_timeout", "60", processes=4)
    four[0].read_until("step      2/")
    four[killed].send(signal.SIGKILL)
    assert [one.end(50) for one in four] == [-9 if rank == killed else 3 for rank in range(4)]
    told = [one.output for one in four if f"error: rank {killed} on {HOST} " in one.output]
    assert len(told) == 1
    assert f"error: rank {killed} on {HOST} " in told[0].splitlines()[-1]


@pytest.mark.run
@pytest.mark.long
def test_bad_row_that_one_rank_meets_ends_all_and_is_the_last_line(launched, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    row = {"img": str(GOLDEN / "upstream/images/0.png"), "prompt": "?", "label": "a"}
    rows = write_rows(tmp_path, [row] * 4 + [{**row, "img": str(tmp_path / "broken.png")}])
    one = launched("deepspeed", "--train-data", rows, "--check_seconds", "0", "--batch-size", "1", until="Trainable")
    assert one.end(60) == 2
    assert one.last_line().startswith(
        f"finetune_visualglm.py: error: {rows} row 5: {tmp_path}/broken.png isn't a picture"
    )
    assert one.output.count("isn't a picture") == 1
    assert "Traceback" not in one.output
    assert one.left_behind() == []


@pytest.mark.run
@pytest.mark.long
@pytest.mark.parametrize("failing", ["0", "1"])
def test_error_of_one_rank_is_the_last_line_with_its_rows_after_its_traceback(run, failing):
    program = PROJECT / "tests/programs/train_with_a_broken_rank.py"
    port = free_port()
    one = run(
        launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, program, failing)
    )
    assert one.end(60) == 1
    printed = one.output[: one.output.index("torch/distributed/elastic")]
    sentence = f"finetune_visualglm.py: error: rank {failing} on {HOST} failed: ZeroDivisionError: the step is broken. The rows of its"
    (at,) = [found.start() for found in re.finditer(re.escape(sentence), printed)]
    assert re.match(r".* batch: dataset.json row \d \(\d+ tokens\)", printed[at:])
    assert 0 < printed.index("Traceback") < at
    assert "step" not in printed[at + len(sentence) :]
    assert one.left_behind() == []


@pytest.mark.run
@pytest.mark.long
def test_ranks_that_see_different_files_or_flags_say_so_before_a_model_is_loaded(ranks, tmp_path):
    other = tmp_path / "dataset.json"
    other.write_text((GOLDEN / "upstream/dataset.json").read_text().replace("images/", f"{GOLDEN}/upstream/images/"))
    both = ranks(flags_of_last=("--train-data", other, "--lr", "0.5"))
    assert [one.end(60) for one in both] == [2, 2]
    first, second = both[0].output.splitlines()[-2:]
    names = [f"rank {rank} on {HOST} sees" for rank in (0, 1)]
    assert first == f"finetune_visualglm.py: error: --lr: {names[0]} 0.0001, {names[1]} 0.5; the same is needed on all."
    found = r"\d+ bytes, [0-9a-f]{12}"
    assert re.fullmatch(
        rf"--train-data, file 1: {names[0]} {found}, {names[1]} {found}; the same is needed on all.", second
    )
    assert "Trainable" not in both[0].output
