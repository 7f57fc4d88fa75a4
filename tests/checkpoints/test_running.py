"""A run's folder belongs to the process that trains there, until it ends, however it ends."""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import PROJECT

from model.checkpoints import running as module
from model.checkpoints.running import RUNNING_FILE, Running, refuse_running
from model.errors import InputError

CLAIM = """
import sys
from pathlib import Path
from model.checkpoints.running import Running
with Running() as running:
    running.claim(Path(sys.argv[1]))
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that has claimed tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_folder_that_another_process_trains_in_is_refused_by_its_name(tmp_path: Path, other) -> None:
    with pytest.raises(InputError, match=f"--resume: {tmp_path} is trained in by process {other.pid} on "):
        refuse_running(tmp_path)
    with Running() as running, pytest.raises(InputError, match="two at once would overwrite"):
        running.claim(tmp_path)
    assert (tmp_path / RUNNING_FILE).read_text().startswith(f"process {other.pid} on ")  # still the other's


def test_other_processes_of_a_run_wait_until_its_first_has_left(tmp_path: Path, other, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(module, "SECONDS_FOR_THE_FIRST", 0.3)
    with pytest.raises(InputError, match="is trained in by process"):
        refuse_running(tmp_path)
    monkeypatch.setattr(module, "SECONDS_FOR_THE_FIRST", 60)
    threading.Timer(0.5, other.stdin.close).start()
    refuse_running(tmp_path)


@pytest.mark.parametrize("way", ["ends", "killed"])
def test_folder_is_free_when_the_process_is_gone(tmp_path: Path, other, way: str) -> None:
    if way == "killed":
        other.kill()
    else:
        other.stdin.close()
    other.wait()
    assert (tmp_path / RUNNING_FILE).exists() == (way == "killed")
    refuse_running(tmp_path)
    with Running() as running:
        running.claim(tmp_path)
        assert "process" in (tmp_path / RUNNING_FILE).read_text()
        refuse_running(tmp_path)  # it is this one's
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_to_is_not_claimed_and_not_refused(tmp_path: Path) -> None:
    with Running() as running:
        running.claim(tmp_path / "none")
    refuse_running(tmp_path / "none")


@pytest.mark.run
def test_run_that_is_going_on_is_not_resumed_by_a_second_one(run, tmp_path: Path) -> None:
    first = run("--save-interval", "1")
    first.read_until("step      3/")
    (folder,) = (tmp_path / "saved").iterdir()
    for what in (folder, "auto"):
        second = run("--resume", what)
        assert second.end() == 2
        words = rf"--resume: {folder} is trained in by process {first.process.pid} on \S+ now"
        assert re.search(words, second.output), second.output
    assert run("--resume", folder, "--dry_run").end() == 0  # which writes nothing
    first.send(signal.SIGTERM)
    assert first.end() == 143
    assert not (folder / RUNNING_FILE).exists()
    run("--resume", folder).read_until("step ")
    assert (folder / RUNNING_FILE).exists()
