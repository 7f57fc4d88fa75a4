"""The launcher of this process: who it is, and whether it is still there.

    deepspeed …        its runner starts deepspeed.launcher.launch, which starts the processes of the run
    torchrun …         its agent starts them

A launcher that is killed tells its processes nothing, and they would go on without anyone who knows of them. The system
then gives them another parent, which is how it is found out here. A shell is no launcher: `nohup` lets a run outlive it.
"""

from pathlib import PurePath

import psutil

DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
# As words of their command lines; a path counts by its last part.
LAUNCHERS = {DEEPSPEED_LAUNCH, "deepspeed", "ds", "torchrun", "torch.distributed.run", "accelerate"}
GENERATIONS = 4  # between a launcher and its processes: numactl, a shell script of the user's


class Launcher:
    """The processes between this one and its launcher, as they are when this is made."""

    def __init__(self) -> None:
        processes = [psutil.Process(), *psutil.Process().parents()[:GENERATIONS]]
        launchers = [number for number, process in enumerate(processes) if number and _is_launcher(process)]
        self.line = [process.pid for process in processes[: launchers[-1] + 1]] if launchers else []  # from this one up

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
