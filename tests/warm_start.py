"""Runs of the project's commands in processes that have imported torch and SAT already, and DeepSpeed for training.

Of the seconds that a small run takes, these imports are the larger part, and the tests make some 400 runs. So a process
that has done them waits for command lines, and forks for each. What runs is a process of its own all the same, with its own
streams, signals and status. What a start itself reads, such as PYTHONPATH, it reads cold: see `STAND_A_WARM_START`.

    python tests/warm_start.py finetune_visualglm.py
        reads a request a line, {"words", "cwd", "environment", "streams"}, and answers with the run's status
"""

import atexit
import json
import os
import runpy
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
LONGEST = 600  # seconds
TRAINING = "finetune_visualglm.py"
# What may be set for a run that starts warm: it is read by the project's own code, when the run has begun.
STAND_A_WARM_START = {"CUDA_VISIBLE_DEVICES", "PATH", "SAT_HOME", "VIRTUAL_ENV", "VISUALGLM_UI_LANG", "XDG_CACHE_HOME"}
ASKING = ("evaluate.py", "predict.py", "cli_demo.py", "merge_lora.py", "convert_checkpoint.py")


class WarmStart:
    """A process that waits for command lines, and the way to give it one at a time."""

    def __init__(self, script: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, script],
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.kill)

    def run(self, words: list[str], cwd: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a script with its words in cwd, and give what it printed; as `subprocess.run` does."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            streams = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (out, err)]
            environment = {**os.environ, "PYTHONPATH": str(PROJECT), **variables}
            request = {"words": words, "cwd": str(cwd), "environment": environment, "streams": streams}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], LONGEST)[0]:
                raise subprocess.TimeoutExpired(words, LONGEST)
            status = int(self._process.stdout.readline())
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
            return subprocess.CompletedProcess(words, status, *texts)


def run_warm(words: list[str], cwd: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str] | None:
    """Run a script with its words in cwd, and give what it printed; None if it must start cold.

    Args:
        variables: of the environment, beside this process's own.
    """
    if not {name for name in variables if variables[name] != os.environ.get(name)} <= STAND_A_WARM_START:
        return None
    name = Path(words[0]).name
    if name in (TRAINING, "resume_and_record.py") or name.startswith("train_"):  # the latter are of tests/programs
        script = TRAINING
    elif name in ASKING:
        script = ASKING[0]
    else:
        return None
    idle = _idle[script]  # of threads that run something at the same time, each takes another
    process = idle.pop() if idle else WarmStart(script)
    completed = process.run(words, cwd, variables)
    idle.append(process)
    return completed


_idle: dict[str, list[WarmStart]] = {TRAINING: [], ASKING[0]: []}


def serve() -> dict[str, Any] | None:
    """Fork for each request. Returns None when there are no more, and in each fork its request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answers.close()
            request: dict[str, Any] = json.loads(line)
            return request
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Run the request's script as if Python had been started with it."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    files = [os.open(os.devnull, os.O_RDONLY), *(os.open(path, os.O_WRONLY) for path in request["streams"])]
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.argv = request["words"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def import_for(script: str) -> None:
    """Import what a script does, and what takes long."""
    from model.sat_compat import import_sat

    if script == TRAINING:
        import_sat(training=True)
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        FakeTensorMode()  # `write_weights` has one, which takes all of torch's compiler
    from model.frozen import import_bitsandbytes

    import_bitsandbytes()


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    import_for(sys.argv[1])
    asked = serve()
    if asked is not None:
        become(asked)
