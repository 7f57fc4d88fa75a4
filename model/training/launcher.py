"""The launcher of this process: who it is, and whether it is still there.

    deepspeed …        its runner starts deepspeed.launcher.launch, which starts the processes of the run
    torchrun …         its agent starts them

A launcher that is killed tells its processes nothing, and they would go on without anyone who knows of them. The system
then gives them another parent, which is how it is found out here. A shell is no launcher: `nohup` lets a run outlive it.

Two runs of `deepspeed` on one machine are given the same port. The second one takes another here (`agreed_port`). torchrun
listens on its port itself, before there are processes: its --master-port, or --standalone, is the user's to give.
"""

import functools
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import psutil

from model.distributed import free_port, is_first_process
from model.progress import warn

DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
# As words of their command lines; a path counts by its last part.
LAUNCHERS = {DEEPSPEED_LAUNCH, "deepspeed", "ds", "torchrun", "torch.distributed.run", "accelerate"}
SECONDS_BETWEEN_LOOKS = 0.05
GENERATIONS = 4  # between a launcher and its processes: numactl, a shell script of the user's


class Launcher:
    """The processes between this one and its launcher, as they are when this is made."""

    def __init__(self) -> None:
        processes = [psutil.Process(), *psutil.Process().parents()[:GENERATIONS]]
        launchers = [number for number, process in enumerate(processes) if number and _is_launcher(process)]
        self.line = [process.pid for process in processes[: launchers[-1] + 1]] if launchers else []  # from this one up

    @classmethod
    @functools.cache
    def of_this_command(cls) -> "Launcher":
        """The launcher as it was when this was called first: a command does so at its start, for it may be gone later."""
        return cls()

    def is_gone(self) -> bool:
        """Whether one of these processes has lost its parent. False where there was no launcher."""
        return any(_parent(child) != parent for child, parent in zip(self.line, self.line[1:], strict=False))


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    # A flag's value may be named so too: the launcher is the program, or the module that Python runs.
    return any(PurePath(word).name in LAUNCHERS for word in words[:4] if not word.startswith("-"))


def _parent(pid: int) -> int:
    """The number of a process's parent, 0 if it has gone."""
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.Error:
        return 0


# --- the port ---------------------------------------------------------------------------------------------------------


@contextmanager
def agreed_port() -> Iterator[None]:
    """Let the processes that deepspeed started on this machine take another MASTER_PORT where that one is in use.

    The first process finds one, and the others read it from a file that is there while the block makes the process group.
    """
    line = Launcher().line
    several = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("CROSS_SIZE") == "1"  # of deepspeed: machines
    if not line or not several or _has_process_group():
        yield
        return
    launcher = psutil.Process(line[-1])
    file = Path(tempfile.gettempdir(), f"visualglm-port-{os.getuid()}-{launcher.pid}-{launcher.create_time():.2f}")
    if not is_first_process():
        os.environ["MASTER_PORT"] = _read_port(file)
        yield
        return
    _take_another_port_if_in_use()
    file.unlink(missing_ok=True)  # of a process of that number, killed before the clock was set back
    with file.open("x") as made:
        made.write(f"{os.environ['MASTER_PORT']}\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _has_process_group() -> bool:
    import torch

    return torch.distributed.is_initialized()


def _take_another_port_if_in_use() -> None:
    port = os.environ["MASTER_PORT"]
    try:
        socket.create_server(("", int(port))).close()
    except OSError:
        os.environ["MASTER_PORT"] = str(free_port())
        warn(f"MASTER_PORT {port}: another program listens on it; {os.environ['MASTER_PORT']} is taken in its place.")


def _read_port(file: Path) -> str:
    """The port in the first process's file, once it is there: that process may still be reading its rows."""
    while True:
        if file.is_file() and file.stat().st_uid == os.getuid() and (text := file.read_text()).endswith("\n"):
            return text.strip()
        time.sleep(SECONDS_BETWEEN_LOOKS)
