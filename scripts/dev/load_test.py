"""Measure how scripts/api.py serves the small model on this machine: one client at a time, and then many.

python scripts/dev/load_test.py
python scripts/dev/load_test.py --seconds 20 --clients 16 --rows 16

It starts the server, asks it the questions of fewshot-data about their pictures, and stops it by SIGTERM. Each client asks
again as soon as it has its answer, so that server and clients share the machine. Exit status 1 means that an answer was lost or
differs from the one that was given alone.

On a CPU the server's memory grows at first: oneDNN keeps what it compiled for each new shape, 1024 of them at most. Memory
tells something once it has settled.
"""

import argparse
import base64
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import psutil
import requests

from model.progress import is_on_screen, renew, say

PROJECT = Path(__file__).resolve().parents[2]
SECONDS_TO_START = 120
JSON = {"Content-Type": "application/json"}
SAMPLES_OF_MEMORY = 0.5  # seconds between them


@dataclass
class Phase:
    """What some clients saw."""

    clients: int
    seconds: float = 0.0
    durations: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes of the server

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.durations) / self.seconds

    def __str__(self) -> str:
        if len(self.durations) < 2:
            return f"{self.clients} clients: {len(self.durations)} answers; more --seconds are needed"
        percent = statistics.quantiles(self.durations, n=100, method="inclusive")
        half = len(self.memory) // 2
        return (
            f"{self.clients:>3} clients  {len(self.durations):>6} answers  {self.rate:7.2f} a second  p50 {percent[49]:.3f} s"
            f"  p99 {percent[98]:.3f} s  lost {len(self.lost)}"
            f"  memory {max(self.memory[:half]) >> 20} → {max(self.memory[half:]) >> 20} MiB"
        )


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--from_pretrained", default=str(PROJECT / "model/tiny"), metavar="CHECKPOINT", help="which model (default: the small one)")
    add("--seconds", type=float, default=60.0, metavar="X",
        help="with many clients; one alone takes a third of it (default %(default)s)")
    add("--clients", type=int, default=16, metavar="N", help="that ask at once (default %(default)s)")
    add("--rows", type=int, default=16, metavar="N", help="the server's own flag (default %(default)s)")
    # fmt: on
    return parser


@contextmanager
def served(checkpoint: str, rows: int, queue: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process; afterwards it is ended by SIGTERM.

    Raises:
        InputError: it doesn't start.
    """
    flags = f"--model_name served --port 0 --rows {rows} --queue {queue} --temperature 0".split()
    words = [sys.executable, str(PROJECT / "scripts/api.py"), "--from_pretrained", checkpoint, *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            if address is None:
                raise InputError("scripts/api.py didn't start; its own message says why.")
            yield address[0], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(SECONDS_TO_START)


def questions() -> list[str]:
    """Requests about the pictures of fewshot-data, in the released form."""
    rows = json.loads((PROJECT / "fewshot-data/heldout.json").read_text(encoding="utf-8"))
    pictures = [base64.b64encode((PROJECT / row["img"]).read_bytes()).decode() for row in rows]
    return [
        json.dumps({"image": picture, "text": row["prompt"], "history": []})
        for picture, row in zip(pictures, rows, strict=True)
    ]


def ask(session: requests.Session, url: str, question: str) -> str:
    """The answer.

    Raises:
        requests.RequestException: there is none.
    """
    answered = session.post(url, data=question, headers=JSON, timeout=SECONDS_TO_START)
    answered.raise_for_status()
    return str(answered.json()["result"])


def phase(
    url: str, server: psutil.Process, asked: list[str], answers: list[str], clients: int, seconds: float
) -> Phase:
    """So many clients that ask for so many seconds; answers holds the right ones."""
    found, numbers, end = Phase(clients), count(), time.monotonic() + seconds

    def client() -> None:
        with requests.Session() as session:
            while (started := time.monotonic()) < end:
                number = next(numbers) % len(asked)
                try:
                    answer = ask(session, url, asked[number])
                except requests.RequestException as error:
                    found.lost.append(f"{type(error).__name__}: {error}")
                    continue
                found.durations.append(time.monotonic() - started)
                if answer != answers[number]:
                    found.lost.append(f"question {number}: {answer!r} in place of {answers[number]!r}")

    began = time.monotonic()
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.memory.append(server.memory_info().rss)
        if is_on_screen(sys.stdout):
            renew(f"{clients} clients: {len(found.durations)} answers, {max(0.0, end - time.monotonic()):.0f} s left")
        time.sleep(SAMPLES_OF_MEMORY)
    for thread in threads:
        thread.join()
    found.seconds = time.monotonic() - began
    return found


def measured(options: argparse.Namespace) -> list[Phase]:
    """Both phases, which are printed too."""
    asked = questions()
    with served(options.from_pretrained, options.rows, options.clients) as (address, server):
        url = address.removesuffix("/v1") + "/"
        with requests.Session() as session:
            answers = [ask(session, url, question) for question in asked]
        found = []
        for clients, seconds in ((1, options.seconds / 3), (options.clients, options.seconds)):
            found.append(phase(url, server, asked, answers, clients, seconds))
            say(str(found[-1]))
    say(f"{options.clients} clients at once get {found[1].rate / found[0].rate:.2f} times the answers of one.")
    lost = [line for one in found for line in one.lost]
    say("\n".join(lost[:20]) or "Every answer came, and was the one given alone.")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command, and leave with status 1 if an answer was lost; `model.errors` lists the others."""
    with command("load_test.py"):
        options = command_line().parse_args(argv)
        if options.clients < 1 or options.rows < 1 or not options.seconds > 0:
            raise InputError("--clients, --rows and --seconds: more than 0 is needed.")
        sys.exit(1 if any(one.lost for one in measured(options)) else 0)


if __name__ == "__main__":
    main()
