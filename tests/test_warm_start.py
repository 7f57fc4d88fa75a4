"""Processes that start warm: they end, are signalled and print as others do, and what a start itself reads starts cold."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PROJECT, run_python, small_disk
from warm_start import commands, run_warm

TELLING = "import sys; print(sys.argv[1:], 'torch' in sys.modules); print('problem', file=sys.stderr); "


@pytest.fixture
def script(tmp_path):
    """A script of this text, with the name of one that starts warm."""

    def written(text: str) -> Path:
        (tmp_path / "report.py").write_text(text)
        return tmp_path / "report.py"

    return written


@pytest.mark.run
@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("sys.exit(3)", 3), ("sys.exit('no')", 1), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_run_has_its_words_streams_and_status(script, tmp_path, end, status):
    done = run_warm([str(script(TELLING + end)), "a b"], tmp_path, dict(os.environ))
    assert (done.returncode, done.stdout) == (status, "['a b'] True\n")
    assert done.stderr.startswith("problem\n")
    assert ("ZeroDivisionError" in done.stderr) is (end == "1 / 0")


@pytest.mark.run
def test_run_with_a_variable_that_an_import_may_read_starts_cold(script):
    for variables, is_warm in (({"SAT_HOME": "/nowhere"}, True), ({"OMP_NUM_THREADS": "2"}, False)):
        assert run_python(script(TELLING), **variables).stdout == f"[] {is_warm}\n"


@pytest.mark.run
@small_disk
def test_process_sees_the_file_systems_of_whoever_asks(script, tmp_path):
    program = script("import sys, os; print('torch' in sys.modules, os.listdir(sys.argv[1]))")
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "file").touch()
    mounting = ["unshare", "-m", "bash", PROJECT / "tests/programs/on_a_small_disk.sh", disk]
    covered = subprocess.run([*mounting, commands() / "python", program, disk], capture_output=True, text=True)
    assert (covered.stdout, covered.stderr) == ("True []\n", "")
    assert run_python(program, disk).stdout == "True ['file']\n"


@pytest.mark.run
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_signal_to_the_python_that_waits_ends_the_process(script, sent):
    waits = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    words = [commands() / "python", script(waits)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as python:
        pid = int(python.stdout.readline())
        assert pid != python.pid
        python.send_signal(sent)
        assert python.wait(10) == -sent
    end = time.monotonic() + 10
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(pid, 0)
            time.sleep(0.05)
        pytest.fail("it goes on")


@pytest.mark.run
def test_waiting_processes_end_with_the_one_that_has_started_them():
    code = "import warm_start; warm_start.wait_for_requests(); print(*(one.pid for one in warm_start._waiting))"
    done = subprocess.run(
        [sys.executable, "-c", code + "; import os; os._exit(1)"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for pid in map(int, done.stdout.split()):
        end = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
