"""The processes of a run: which one this is, what they tell each other, and what a launcher sets up for them.

Only the standard library is imported; torch where it is needed.
"""

import os
import socket
from typing import Any


def is_first_process() -> bool:
    """Whether this process is rank 0 of the run (every launcher sets RANK; without one there is one process)."""
    return os.environ.get("RANK", "0") == "0"


def has_gpu() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def set_launcher_environment() -> None:
    """Give a plain `python finetune_visualglm.py …` what a launcher would have set.

    DeepSpeed refuses to start without LOCAL_RANK, and torch.distributed without the others.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    single_process = {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port,
    }  # fmt: skip
    if "WORLD_SIZE" not in os.environ:
        for name, value in single_process.items():
            os.environ.setdefault(name, str(value))
    # deepspeed's launcher calls it LOCAL_SIZE
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))


def processes_here() -> tuple[int, int]:
    """This process's number among the run's processes on this machine, and how many they are."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def start_gloo() -> None:
    """Make the process group over gloo, before SAT would with a CUDA device that isn't there."""
    import torch

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


def from_first_process(value: Any) -> Any:
    """The first process's value, on every process."""
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def from_processes_here(value: Any) -> list[Any]:
    """The value of each of the run's processes on this machine, in their order; all processes wait for each other."""
    import torch

    if not torch.distributed.is_initialized():
        return [value]
    process, processes = processes_here()
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    first = torch.distributed.get_rank() - process
    return values[first : first + processes]
