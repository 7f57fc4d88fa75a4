"""Processes of the project's commands, and of launchers, that have imported torch and SAT already when they start.

Of the seconds that a small run takes, these imports are the larger part, and the tests start some 600 processes. So two
processes that have done them (one for training, with DeepSpeed; one for the other commands) wait for command lines, and fork
for each. What runs is a process of its own all the same, with its own streams, signals and status.

    run_warm([script, *words], folder, environment) what `subprocess.run` gives
    started_warm([script, *words], …)               what `subprocess.Popen` gives, as far as tests ask
    commands(), a folder for PATH                   its python, torchrun and deepspeed start warm what they can, and the rest
                                                    cold; what they start in turn has this python as its own

What a start itself reads, such as PYTHONUTF8 and LC_ALL, it reads cold: see `STAND_A_WARM_START`.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import termios
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
LONGEST = 600  # seconds
SOCKETS = "VISUALGLM_TEST_SOCKETS"  # the variable with the folder of the waiting processes' sockets
TRAINING, ASKING = "training", "asking"
LAUNCHERS = ("torchrun", "deepspeed", "torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch")
TRAINS = (  # and train_….py of tests/programs
    "finetune_visualglm.py", "resume_and_record.py", "layouts.py", "fail_in_the_first_step.py", "main_after_a_signal.py",
    "main_three_times.py", "main_with_each.py", "count_config_reads.py", "image_features_of_one_of_two.py",
    "image_features_without_room.py", "write_saved_configs.py", *LAUNCHERS,
)  # fmt: skip
ASKS = (
    "evaluate.py", "predict.py", "cli_demo.py", "merge_lora.py", "convert_checkpoint.py", "convert_data.py", "check_data.py",
    "report.py", "load_and_merge.py", "answer_in_parts.py", "share_a_model.py", "save_without_room.py",
    "model.training.curves",
)  # fmt: skip
# What may differ for a process that starts warm: it is read by our own code or a launcher's, when the run has begun.
STAND_A_WARM_START = {
    "CUDA_VISIBLE_DEVICES", "PATH", "PYTHONPATH", "SAT_HOME", "VIRTUAL_ENV", "VISUALGLM_UI_LANG", "XDG_CACHE_HOME",
    "XDG_STATE_HOME", "MPLBACKEND", "LANG", "LC_MESSAGES", "TERM", "COLUMNS", "LINES", "PWD", "OLDPWD", "SHLVL", "_",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CXX", "CRC32C_SW_MODE", SOCKETS,
}  # fmt: skip
STARTS_OF_MORE = ("TORCHELASTIC_", "TORCH_NCCL_", "NCCL_", "PYTEST_")
MOUNTED = "/proc/self/ns/mnt"  # the file systems that a process sees: those of whoever asks
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def commands() -> Path:
    """The folder of a python, torchrun and deepspeed that start warm what they can, and the rest cold."""
    return Path(os.environ[SOCKETS], "bin")


# --- who asks ---------------------------------------------------------------------------------------------------------


class WarmProcess:
    """A process that has been started warm: its number, and the way to wait for its status."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile()
        self._connection = connection
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its status, as `subprocess` has it; None while it goes on."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Its status. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                from subprocess import TimeoutExpired  # not imported by whoever starts cold

                raise TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._connection.close()  # until then, its end is the process's
        return self.returncode


def started_warm(
    words: list[str], cwd: str, environment: dict[str, str], streams: tuple[int, int, int], own_session: bool = False
) -> WarmProcess | None:
    """Start a command line of Python's with these streams; None if it must start cold."""
    for_python = words[1:] if words[:1] == ["-u"] else words
    kind = _kind(for_python)
    if kind is None or not _stands_a_warm_start(environment):
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{os.environ[SOCKETS]}/{kind}")
    request = {"words": for_python, "cwd": cwd, "environment": environment, "own_session": own_session}
    with open(MOUNTED) as mounted:
        socket.send_fds(connection, [b"."], (*streams, mounted.fileno()))
    connection.sendall(json.dumps(request).encode() + b"\n")
    return WarmProcess(connection)


def _kind(words: list[str]) -> str | None:
    """Which of the waiting processes forks for a command line of Python's."""
    if words[:1] == ["-m"]:
        name = words[1]
    elif words and not words[0].startswith("-"):
        name = Path(words[0]).name
    else:
        return None
    return TRAINING if name in TRAINS or name.startswith("train_") else ASKING if name in ASKS else None


def _stands_a_warm_start(environment: dict[str, str]) -> bool:
    """Whether nothing in it is other than in the waiting processes that an import has read."""
    waiting = json.loads(Path(os.environ[SOCKETS], "environment.json").read_text())
    differing = {name for name in {*environment, *waiting} if environment.get(name) != waiting.get(name)}
    return not {name for name in differing - STAND_A_WARM_START if not name.startswith(STARTS_OF_MORE)}


def run_warm(words: list[str], cwd: Path, environment: dict[str, str]) -> Any:
    """Run a script with its words in cwd, and give what it printed, as `subprocess.run` does; None if it must start cold."""
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        streams = (nothing.fileno(), out.fileno(), err.fileno())
        process = started_warm(words, str(cwd), environment, streams)
        if process is None:
            return None
        status = process.wait(LONGEST)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(words, status, *texts)


def be_python(name: str, words: list[str]) -> None:
    """What the python, torchrun and deepspeed of `commands` do: start warm and wait, or start cold in this process's place."""
    words = words if name == "python" else [str(Path(sys.executable).with_name(name)), *words]
    process = started_warm(words, os.getcwd(), dict(os.environ), (0, 1, 2))
    if process is None:
        os.execv(sys.executable, [sys.executable, *words])
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(process.pid, number))
    status = process.wait()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# --- the processes that wait ------------------------------------------------------------------------------------------

_waiting: list[Any] = []
_ours: list[str] = []  # modules of model/ that `import_for` has imported


def wait_for_requests() -> None:
    """Start both waiting processes, which end with this one. They import when they are first asked."""
    import shutil
    import subprocess
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[SOCKETS] = str(folder)
    (folder / "bin").mkdir()
    for name in ("python", "torchrun", "deepspeed"):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{__file__}" {name} "$@"\n')
        command.chmod(0o755)
    environment = dict(os.environ)
    (folder / "environment.json").write_text(json.dumps(environment))
    for kind in (TRAINING, ASKING):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{folder}/{kind}")
            listening.listen(64)
            number = str(listening.fileno())
            words = [sys.executable, __file__, "wait", kind, number, str(folder / "bin/python")]
            process = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, pass_fds=(listening.fileno(),))
        _waiting.append(process)  # its standard input is open as long as this process is there


def serve(listening: socket.socket, kind: str) -> dict[str, Any]:
    """Fork for each request, without end; returns in each fork, with its request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those that watch have ended
    asked_before = False
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
            os._exit(0)  # the tests have ended
        connection = listening.accept()[0]
        if not asked_before:
            import_for(kind)
            gc.collect()
            gc.freeze()  # what is imported is no garbage, and need not be gone through in each process
        asked_before = True
        if not os.fork():
            break
        connection.close()
    listening.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    received = socket.recv_fds(connection, 1, 4)[1]
    if not received:  # whoever asked has gone
        os._exit(0)
    *streams, mounted = received
    request: dict[str, Any] = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid:
        for stream in (*streams, mounted):
            os.close(stream)
        watch(pid, connection)
    connection.close()
    if os.fstat(mounted).st_ino != os.stat(MOUNTED).st_ino and ctypes.CDLL(None, use_errno=True).setns(mounted, 0):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(mounted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return request


def watch(pid: int, connection: socket.socket) -> None:
    """Say this process's number and its status; if whoever asked has gone, it goes too. Never returns."""
    with suppress(BrokenPipeError):
        connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def become(request: dict[str, Any], executable: str) -> None:
    """Run the request's script or module as if Python had been started with it. Never returns."""
    if request["own_session"]:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it may be ignored around us
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.executable = executable
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    words: list[str] = request["words"]
    if Path(words[0]).parent.name == "programs":  # they change some of our modules before others import them
        for name in _ours:
            del sys.modules[name]
    status = _run_as_main(words, request["cwd"])
    # As Python ends, but for the third of a second in which it would take apart what is imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _run_as_main(words: list[str], folder: str) -> int:
    """The status that a script with its words, or -m and a module with its words, ends with; negative for a signal."""
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], folder
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def import_for(kind: str) -> None:
    """Import what such commands do."""
    from model.sat_compat import import_sat

    others = [
        "numpy.random",
        "sentencepiece",
        "torch.utils.serialization",
        "PIL.ImageOps",
        "multiprocessing.sharedctypes",
    ]
    if kind == TRAINING:
        import_sat(training=True)
        others += ["deepspeed.module_inject.auto_ep_layer"]
        rooms = ("checkpoints", "cli", "data", "training", "inference")
    else:
        others += ["matplotlib.figure", "matplotlib.backends.backend_agg", "sacrebleu.metrics", "rapidfuzz.distance"]
        rooms = ("checkpoints", "convert", "data", "inference")
    from PIL import Image

    from model.frozen import import_bitsandbytes

    import_bitsandbytes()
    Image.init()  # imports what reads each format
    before = set(sys.modules)
    for name in (*others, *_modules(*rooms)):
        with suppress(ImportError):  # of another version, or of requirements-web.txt
            importlib.import_module(name)
    _ours.extend(name for name in sys.modules if name.startswith("model.") and name not in before)


def _modules(*rooms: str) -> list[str]:
    """The modules of these rooms of model/, but the one that imports Gradio."""
    paths = [path for room in rooms for path in sorted((PROJECT / "model" / room).glob("*.py"))]
    return [".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in paths if path.stem != "web_page"]


if __name__ == "__main__":
    if sys.argv[1] != "wait":
        be_python(sys.argv[1], sys.argv[2:])
    _, _, kind, number, executable = sys.argv
    sys.path[0] = str(PROJECT)
    become(serve(socket.socket(fileno=int(number)), kind), executable)
