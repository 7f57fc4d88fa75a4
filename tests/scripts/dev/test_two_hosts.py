"""A run on two hosts, of which one is cut off."""

import shutil
import signal
import subprocess
import sys

import pytest
from conftest import PROJECT, run_python

from model.errors import InputError
from scripts.dev.two_hosts import last_words, problem_with_hosts, two_hosts

CONNECT = ("timeout", "2", "bash", "-c", "< /dev/tcp/second/8000")
needs_hosts = pytest.mark.skipif(problem_with_hosts() is not None, reason=str(problem_with_hosts()))


@needs_hosts
@pytest.mark.run
@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "recipe"])
def test_run_whose_host_is_cut_off_ends_and_goes_on_on_the_other_as_on_one(launcher):
    done = run_python(PROJECT / "scripts/dev/two_hosts.py", "--launcher", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "two hosts: as it should be"


@pytest.mark.slow
@needs_hosts
def test_hosts_have_names_and_reach_each_other_until_the_wire_is_cut():
    with two_hosts() as (first, second):
        words = second.words(sys.executable, "-u", "-m", "http.server", "8000")
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            server.stdout.readline()  # it serves now
            first.run(*CONNECT)
            second.cut_off()
            with pytest.raises(subprocess.CalledProcessError):
                first.run(*CONNECT)
            second.end()
            assert server.wait() == -signal.SIGKILL


def test_machine_without_the_tools_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ip" else f"/bin/{name}")
    assert problem_with_hosts() == "ip not found, which hosts are made with."
    with pytest.raises(InputError, match="ip not found"), two_hosts():
        pass


def test_last_words_are_those_of_the_script():
    assert (
        last_words("step 1\nfinetune_visualglm.py: error: the cause.\nlauncher: more")
        == "finetune_visualglm.py: error: the cause."
    )
    assert last_words("step 1") == "nothing"
