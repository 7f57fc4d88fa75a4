"""The processes of a run: which one this is, what they tell each other, and what a launcher sets up for them.

Only the standard library is imported; torch where it is needed.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS_TO_TRY = 5
GPUS_OF_THE_DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each, with a file "information"

Result = TypeVar("Result")


def is_first_process() -> bool:
    """Whether this process is rank 0 of the run (every launcher sets RANK; without one there is one process)."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def model_replica(parts: int) -> tuple[int, int]:
    """Which of the run's copies of a model this process has, and how many there are, if parts processes share one."""
    return int(os.environ.get("RANK", "0")) // parts, world_size() // parts


def has_gpu() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def unusable_gpu() -> str:
    """A sentence on a GPU of this machine that torch can't use, so that the CPU is taken; "" where there is none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip() in ("", "-1")
    names = _gpus_of_the_driver()
    if hidden or not names or has_gpu():
        return ""
    import torch

    build = torch.version.cuda
    if build is None:
        reason, needed = "it was built for CPUs alone", "a build of torch for CUDA"
    else:
        try:
            torch.cuda.init()
            reason = "it finds none"
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
        needed = f"a driver for CUDA {build} (its newest, to be safe), or a torch for the CUDA that nvidia-smi shows"
    return f"GPU found ({names[0]}), but torch {torch.__version__} can't use it: {reason}. Needed is {needed}."


def _gpus_of_the_driver() -> list[str]:
    """The GPUs that NVIDIA's driver has, by name."""
    texts = [path.read_text(errors="replace") for path in sorted(GPUS_OF_THE_DRIVER.glob("*/information"))]
    return [line.partition(":")[2].strip() for text in texts for line in text.splitlines() if line.startswith("Model:")]


@contextmanager
def launcher_environment() -> Iterator[None]:
    """Give a plain `python finetune_visualglm.py …` what a launcher would have set, inside the block only.

    DeepSpeed refuses to start without LOCAL_RANK, and torch.distributed without the others.
    """
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    os.environ.update(_variables_of_a_launcher())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _variables_of_a_launcher() -> dict[str, str]:
    """The variables that this process lacks and a launcher would have set."""
    values = ("0", "0", "1", "1", "127.0.0.1", str(free_port()))
    single_process = dict(zip(LAUNCHER_VARIABLES, values, strict=True))
    if "WORLD_SIZE" in os.environ:  # deepspeed's launcher calls it LOCAL_SIZE
        single_process = {"LOCAL_WORLD_SIZE": os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])}
    return {name: value for name, value in single_process.items() if name not in os.environ}


def free_port() -> int:
    """A port of this machine that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_a_free_port(start: Callable[[], Result]) -> Result:
    """start(), which listens on MASTER_PORT. In a run of one process another port is taken where that one is in use.

    Raises:
        InputError: it is in use in a run of several, which must agree on it.
    """
    from torch.distributed import DistNetworkError

    from model.errors import InputError  # which prints, on the first process only: it imports this module

    for _ in range(PORTS_TO_TRY):
        try:
            return start()
        except DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            if os.environ["WORLD_SIZE"] != "1":
                raise InputError(
                    f"MASTER_PORT {os.environ['MASTER_PORT']}: another program listens on it; a free one is needed: "
                    "deepspeed's flag is --master_port, torchrun's --master-port."
                ) from None
            os.environ["MASTER_PORT"] = str(free_port())
    return start()


def processes_here() -> tuple[int, int]:
    """This process's number among the run's processes on this machine, and how many they are."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory(device: Any) -> int:
    """Bytes that are free on the torch.device now. Each process has a GPU of its own."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()


def free_host_memory() -> int:
    """Bytes of host memory that are free now for each of the run's processes on this machine."""
    import psutil

    return int(psutil.virtual_memory().available) // processes_here()[1]


def start_gloo() -> None:
    """Make the process group over gloo, before SAT would with a CUDA device that isn't there."""
    import torch

    if not torch.distributed.is_initialized():
        on_a_free_port(lambda: torch.distributed.init_process_group("gloo"))


def store_of_run() -> Any:
    """A new store of keys and values that the run's processes share, served by the first. Every process calls this.

    torch.distributed keeps one too. It outlives a run, and torchrun's agent serves it: killed, it takes that with it.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], 0
    store = TCPStore(address, port, is_master=True, wait_for_workers=False) if is_first_process() else None
    port = from_first_process(store.port if store else None)
    return store or TCPStore(address, port, is_master=False, wait_for_workers=False)


@contextmanager
def whole_parameters(parameters: Iterable[Any], writer: int | None = None) -> Iterator[None]:
    """Inside the block, parameters of which ZeRO 3 keeps a part on each process are whole on all of them.

    Args:
        writer: which process, counted among those that share these parameters, keeps its changes to them.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(split, modifier_rank=writer):
        yield


def from_first_process(value: Any) -> Any:
    """The first process's value, on every process."""
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def done_by_first_process(act: Callable[[], Any]) -> Any:
    """What act() gives, or the exception that it raises, on every process; the first one alone calls it."""
    import torch

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return act()
    result: Any = None
    if is_first_process():
        try:
            result = act()
        except Exception as error:
            result = error
    result = from_first_process(result)
    if isinstance(result, Exception):
        raise result
    return result


def from_processes_here(value: Any) -> list[Any]:
    """The value of each of the run's processes on this machine, in their order; all processes wait for each other."""
    import torch

    process, processes = processes_here()
    first = torch.distributed.get_rank() - process if torch.distributed.is_initialized() else 0
    return from_all_processes(value)[first : first + processes]


def from_all_processes(value: Any) -> list[Any]:
    """The value of each process of the run, in their order; all wait for each other."""
    import torch

    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
