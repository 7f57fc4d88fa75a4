"""Two hosts on one machine, and a run between them: one is cut off in the middle, and the other goes on alone.

    python scripts/dev/two_hosts.py                       started by torchrun (a minute)
    python scripts/dev/two_hosts.py --launcher recipe     by the recipe, with HOSTFILE and NODE_RANK

A host is a network, a name and a /dev/shm of its own; a pair of virtual devices is the wire between the two. The disk is
shared, as a cluster's is. Each host runs two processes. Making hosts needs the rights of root, and `unshare` and `ip`.

What is shown: each host makes the features of every picture once; when the wire is cut, the processes of both end, and each
host says why; the run goes on with two processes on one host, and its losses are those of one process that was never
disturbed. The last line is `two hosts: as it should be`, or the command ends with status 1.

Traded away: a disk that answers differently on each host.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.errors import InputError, command
from model.progress import say

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT, RECIPE = "finetune_visualglm.py", "scripts/finetune_visualglm.sh"
NAMES, ADDRESSES = ("first", "second"), ("10.77.0.1", "10.77.0.2")
PORT = "29500"  # of a network where nobody else is
STEPS, SAVED_AT = 12, 2
SILENCE = 4  # seconds, until a process that isn't heard from is given up
SECONDS_TO_END = 60  # after the cut, until all processes must have ended
SECONDS_TO_TRAIN = 600
TOLERANCES = {"torchrun": 1e-5, "recipe": 1e-2}  # relative, of a loss; the recipe trains in bfloat16
FEATURES = "/dev/shm/features"  # another folder on each host
TRAIN = (
    "--from_pretrained", "model/tiny", "--use_lora", "--mode", "finetune", "--layer_range", "0", "2",
    "--train-data", "fewshot-data/dataset.json", "--holdout", "4", "--train-iters", str(STEPS),
    "--save-interval", str(SAVED_AT), "--eval-interval", "1000", "--loss_normalization", "token", "--zero-stage", "1",
    "--hidden-dropout", "0", "--attention-dropout", "0", "--num-workers", "0", "--rank_timeout", str(SILENCE),
    "--feature_cache", FEATURES,
)  # fmt: skip


# --- hosts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A host of `two_hosts`."""

    name: str
    address: str
    pid: int  # of the process that keeps its namespaces
    network: str  # that all processes on it have in common

    def words(self, *command: str) -> list[str]:
        """The command line that runs a command on it."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", f"--wd={PROJECT}", *command]

    def run(self, *command: str) -> None:
        """Run a short command on it."""
        subprocess.run(self.words(*command), check=True, capture_output=True, text=True)

    def cut_off(self) -> None:
        """Cut the wire: what is sent is lost, and nobody is told."""
        self.run("ip", "link", "set", "wire", "down")

    def end(self) -> None:
        """Kill every process on it, so that it is gone."""
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):  # it has ended, or is not ours
                if network_of(process.pid) == self.network:
                    process.kill()

    def file(self, path: str) -> Path:
        """Where a file of this host is seen from outside."""
        return Path(f"/proc/{self.pid}/root{path}")


def problem_with_hosts() -> str | None:
    """Why hosts can't be made here, if they can't."""
    missing = [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found, which hosts are made with."
    tried = subprocess.run(
        [
            "unshare",
            "-n",
            "-m",
            "-u",
            "sh",
            "-c",
            "mount -t tmpfs none /dev/shm && ip link add wire type veth peer name other",
        ],
        capture_output=True,
        text=True,
    )
    return f"hosts can't be made here: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other. They are gone after the block, with the processes on them.

    Raises:
        InputError: they can't be made here.
    """
    problem = problem_with_hosts()
    if problem:
        raise InputError(problem)
    keepers = [
        subprocess.Popen(["unshare", "-n", "-m", "-u", "sh", "-c", "echo; sleep infinity"], stdout=subprocess.PIPE)
        for _ in NAMES
    ]
    for keeper in keepers:
        assert keeper.stdout is not None
        keeper.stdout.readline()  # now it has namespaces of its own
    first, second = (
        Host(name, address, keeper.pid, network_of(keeper.pid))
        for name, address, keeper in zip(NAMES, ADDRESSES, keepers, strict=True)
    )
    try:
        wire = ["netns", str(first.pid), "type", "veth", "peer", "name", "wire", "netns", str(second.pid)]
        subprocess.run(["ip", "link", "add", "wire", *wire], check=True)
        for host in (first, second):
            host.run("hostname", host.name)
            host.run("mount", "-t", "tmpfs", "none", "/dev/shm")
            names = "\n".join(map(" ".join, zip(ADDRESSES, NAMES, strict=True)))
            host.run("sh", "-c", f"echo '127.0.0.1 localhost\n{names}' > /dev/shm/hosts")
            host.run("mount", "--bind", "/dev/shm/hosts", "/etc/hosts")
            for device in ("lo", "wire"):
                host.run("ip", "link", "set", device, "up")
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "wire")
        yield first, second
    finally:
        for host, keeper in zip((first, second), keepers, strict=True):
            host.end()
            keeper.wait()


def network_of(pid: int) -> str:
    """The network namespace of a process."""
    return os.readlink(f"/proc/{pid}/ns/net")


# --- the run ----------------------------------------------------------------------------------------------------------


def launch(host: Host, launcher: str, words: Sequence[str], hosts: Sequence[Host], log: Path) -> subprocess.Popen[str]:
    """Start two processes of a run on a host: its share of those on all hosts. What they print goes to log."""
    number = hosts.index(host)
    environment = {"OMP_NUM_THREADS": "1", "VISUALGLM_UI_LANG": "en"}
    if launcher == "recipe":
        hostfile = log.parent / "hostfile"
        hostfile.write_text("".join(f"{one.name} slots=2\n" for one in hosts))
        environment |= {"HOSTFILE": str(hostfile), "NODE_RANK": str(number), "MASTER_ADDR": hosts[0].address}
        command = ["bash", RECIPE]
    else:
        nodes = ["--nnodes", str(len(hosts)), "--node-rank", str(number), "--nproc-per-node", "2"]
        master = ["--master-addr", hosts[0].address, "--master-port", PORT]
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, *master, SCRIPT]
    with log.open("w") as file:
        return subprocess.Popen(
            host.words(*command, *words),
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ended(process: subprocess.Popen[str], log: Path, seconds: float) -> tuple[int, str]:
    """The exit status of a launcher, which must end in so many seconds, and what its processes printed.

    Raises:
        InputError: it hasn't ended.
    """
    try:
        return process.wait(seconds), log.read_text()
    except subprocess.TimeoutExpired:
        raise InputError(f"{log.stem}: its processes have not ended within {seconds} s:\n{log.read_text()}") from None


def run_folder(saved: Path) -> Path | None:
    """The folder of the only run in saved, once it has a checkpoint."""
    return next((file.parent for file in saved.glob("*/latest")), None)


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step of a run, by its number."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def last_words(printed: str) -> str:
    """The line in which the script says why it ends."""
    lines = [line for line in printed.splitlines() if line.startswith(f"{SCRIPT}: error:")]
    return lines[-1] if lines else "nothing"


def show(launcher: str, folder: Path) -> bool:
    """Tell what happens to a run on two hosts, and whether it is what should."""
    right = []

    def told(fact: str, is_right: bool) -> None:
        right.append(is_right)
        say(f"{'' if is_right else 'NOT AS IT SHOULD BE: '}{fact}")

    with two_hosts() as hosts:
        first, second = hosts
        saved = folder / "two hosts"
        words = [*TRAIN, "--batch-size", "1", "--save", str(saved)]
        logs = [folder / f"{host.name}.log" for host in hosts]
        running = [launch(host, launcher, words, hosts, log) for host, log in zip(hosts, logs, strict=True)]
        while run_folder(saved) is None and all(process.poll() is None for process in running):
            time.sleep(0.05)
        second.cut_off()
        for host, process, log in zip(hosts, running, logs, strict=True):
            status, printed = ended(process, log, SECONDS_TO_END)
            told(
                f"cut off, the {host.name} host ends with status {status}: {last_words(printed)}",
                "sign of life" in printed,
            )
        for host in hosts:
            counts = {file.stem: made_features(file) for file in sorted(host.file(FEATURES).glob("*.index"))}
            made = " + ".join(map(str, counts.values()))
            told(f"features of pictures that the {host.name} host's processes made: {made}", sum(counts.values()) == 20)
        run = run_folder(saved)
        if run is None:
            told(f"no checkpoint was saved: {logs[0].read_text()[-2000:]}", False)
            return False
        step = (run / "latest").read_text()
        log = folder / "alone.log"
        resumed = launch(first, launcher, [*words, "--resume", "auto"], [first], log)
        status, printed = ended(resumed, log, SECONDS_TO_TRAIN)
        told(f"the first host goes on alone after step {step}, with 2 processes for 4: status {status}", status == 0)
        if status:
            say(printed[-2000:])
            return False
        starter = ["bash", RECIPE] if launcher == "recipe" else [sys.executable, SCRIPT]
        one = [*starter, *TRAIN, "--batch-size", "4", "--save", str(folder / "one")]
        subprocess.run(first.words(*one), check=True, capture_output=True)
    like = run_folder(folder / "one")
    assert like is not None
    found, expected = losses(run), losses(like)
    worst = max(abs(found[step] - loss) / loss for step, loss in expected.items())
    told(
        f"{len(found)} losses of {len(expected)}, {worst:.1e} from those of one process", worst <= TOLERANCES[launcher]
    )
    return all(right)


def made_features(index: Path) -> int:
    """How many features a file of the cache has, by its index."""
    from model.training.feature_store import DIGEST_BYTES, HEADER

    return (index.stat().st_size - len(HEADER)) // (2 * DIGEST_BYTES)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    with command("two_hosts.py"):
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--launcher", choices=("torchrun", "recipe"), default="torchrun",
            help="what starts the processes on each host (default %(default)s)",
        )  # fmt: skip
        options = parser.parse_args(argv)
        with tempfile.TemporaryDirectory() as folder:
            if not show(options.launcher, Path(folder)):
                sys.exit(1)
        say("two hosts: as it should be")


if __name__ == "__main__":
    main()
