"""Kills, stops and damages training runs of the small model, and compares what is resumed with what would have been.

    python scripts/dev/torture.py              50 kills, every signal in every phase, a full disk, damaged checkpoints
    python scripts/dev/torture.py --quick      8 kills, and less of the rest

A kill -9 comes at a random moment, every third one while a checkpoint is written. Each is followed by the same command with
`--resume auto`. Every loss must equal the uninterrupted run's to the last bit, and so must the weights in the end. What a
life has announced as saved must be there for the next one. The last line counts: `torture: K kills, R resumed exactly,
L lost`. Anything else than K = R and L = 0 ends with status 1.
"""

import argparse
import contextlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.progress import say

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 90
EVALUATE_EVERY = 30
TRAIN = (
    "--from_pretrained", str(PROJECT / "model/tiny"), "--use_lora", "--lora_rank", "4", "--mode", "finetune",
    "--train-data", str(PROJECT / "fewshot-data/dataset.json"), "--holdout", "4", "--train-iters", str(STEPS),
    "--eval-interval", str(EVALUATE_EVERY), "--save-interval", "4", "--batch-size", "2", "--gradient-accumulation-steps", "2",
    "--auto_warmup_steps", "0", "--lr", "0.003", "--num-workers", "0", "--experiment-name", "torture",
)  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LONGEST_LIFE = 120.0  # seconds; a run that takes longer hangs
LEAVES_WITHIN = 3.0  # seconds after a signal in start-up, on a busy machine


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Life:
    """One process of a run: what it recorded and printed until it ended."""

    status: int
    losses: dict[int, str]  # by step, as hexadecimal numbers: to the last bit
    out: str
    err: str
    seconds: float = 0.0  # from a signal to the end

    @property
    def last_saved(self) -> int:
        """The last iteration that it announced as saved; 0 if none."""
        return max((int(number) for number in re.findall(r"\(iteration (\d+)\)", self.out)), default=0)


def record_losses(file: str, argv: Sequence[str]) -> None:
    """Run finetune_visualglm.py in this process, with every step's loss appended to a file at once."""
    from model.training.metrics import TrainingReport

    report_step = TrainingReport.step

    def recording_step(self: TrainingReport, *given: object) -> None:
        report_step(self, *given)  # type: ignore[arg-type]
        loss, step = given[3], given[5]
        assert isinstance(loss, float)
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(f"{step} {loss.hex()}\n")

    TrainingReport.step = recording_step  # type: ignore[assignment, method-assign]
    sys.argv[1:] = argv
    runpy.run_path(str(PROJECT / "finetune_visualglm.py"), run_name="__main__")


@contextlib.contextmanager
def started(folder: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A run that saves under folder and resumes what is there; killed at the end of the block if it still runs."""
    record = folder / "losses"
    record.unlink(missing_ok=True)
    command = [
        sys.executable,
        __file__,
        "--child",
        str(record),
        *TRAIN,
        "--save",
        str(folder),
        "--summary-dir",
        str(folder),
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    with (
        open(folder / "out", "w+") as out,
        open(folder / "err", "w+") as err,
        subprocess.Popen(
            command, stdout=out, stderr=err, text=True, cwd=PROJECT, env=environment, preexec_fn=heed_signals
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def heed_signals() -> None:
    """Take signals that may be ignored around this command, as in the background of a shell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ended(process: subprocess.Popen[str], folder: Path, since: float | None = None) -> Life:
    """What became of a process, which is waited for."""
    try:
        status = process.wait(LONGEST_LIFE)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    seconds = 0.0 if since is None else time.monotonic() - since
    lines = (folder / "losses").read_text().splitlines() if (folder / "losses").exists() else []
    losses = {int(step): loss for step, loss in (line.split() for line in lines if line.count(" ") == 1)}
    return Life(status, losses, (folder / "out").read_text(), (folder / "err").read_text(), seconds)


def whole_life(folder: Path, *flags: str) -> Life:
    """A run that nobody disturbs."""
    with started(folder, *flags) as process:
        return ended(process, folder)


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Wait until found() is true or the process ends; whether it was."""
    end = time.monotonic() + LONGEST_LIFE
    while process.poll() is None and time.monotonic() < end:
        if found():
            return True
        time.sleep(0.0005)
    return False


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of the last checkpoint under folder."""
    import torch

    (run,) = folder.glob("torture-*/latest")
    file = run.parent / run.read_text().strip() / "mp_rank_00_model_states.pt"
    module = torch.load(file, weights_only=True)["module"]
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in module.items()}


@dataclass
class Reference:
    """The run that nobody disturbed."""

    losses: dict[int, str]
    weights: dict[str, bytes]

    def disagreement(self, life: Life) -> str | None:
        """The first step of a life whose loss is another one."""
        wrong = [step for step, loss in sorted(life.losses.items()) if self.losses.get(step) != loss]
        return f"step {wrong[0]} has another loss" if wrong else None


@dataclass
class Score:
    """A line of the table: what was tried, how often it went well, and what went wrong."""

    tried: int = 0
    good: int = 0
    problems: list[str] = field(default_factory=list)

    def note(self, what: str, problem: str | None) -> None:
        """Count one try, which went well unless there is a problem."""
        self.tried += 1
        self.good += problem is None
        if problem is not None:
            self.problems.append(f"{what}: {problem}")
            say(f"  {what}: {problem}")


# --- what is done to them ---------------------------------------------------------------------------------------------


def kills(count: int, reference: Reference, home: Path, chance: random.Random) -> tuple[Score, int]:
    """Kill runs so many times, and resume each: how many went on exactly, and how many saved checkpoints were lost."""
    score, lost = Score(), 0
    folder, killed_at = new_folder(home), 0  # killed_at: what the last life of this run had saved
    while score.tried < count:
        while_saving = score.tried % 3 == 2
        with started(folder, "--resume", "auto") as process:
            kill(process, folder, while_saving, chance)
            life = ended(process, folder)
        killed = life.status == -signal.SIGKILL
        problem = unlike(reference, life, killed_at)
        if killed:
            score.note(f"kill {score.tried + 1}{' while saving' if while_saving else ''}", problem)
            lost += bool(life.losses) and min(life.losses) <= killed_at
            killed_at = max(killed_at, life.last_saved)
        elif life.status or weights_of(folder) != reference.weights:
            score.note("end of a run", problem or f"status {life.status}, or other weights: {life.err[-300:]}")
        if not killed:
            shutil.rmtree(folder)
            folder, killed_at = new_folder(home), 0
    last = whole_life(folder, "--resume", "auto")
    if unlike(reference, last, killed_at) or last.status or weights_of(folder) != reference.weights:
        score.good -= 1
        score.problems.append("the last run ends otherwise")
    return score, lost


def kill(process: subprocess.Popen[str], folder: Path, while_saving: bool, chance: random.Random) -> None:
    """kill -9, at a random moment of start-up or training, or while a checkpoint is written."""

    def is_saving() -> bool:
        return any(folder.glob("torture-*/*.unfinished")) or any(folder.glob("torture-*/*/*.unfinished"))

    if not while_saving:
        if chance.random() < 0.8:  # else in start-up
            wait_for((folder / "losses").exists, process)
        time.sleep(chance.uniform(0, 1.5))
    else:
        wait_for((folder / "losses").exists, process)
        time.sleep(chance.uniform(0, 0.5))
        wait_for(is_saving, process)
    process.kill()


def unlike(reference: Reference, life: Life, saved: int) -> str | None:
    """What is wrong with a life that follows one which had saved so many iterations."""
    if "Traceback" in life.err:
        return f"a traceback: {life.err.strip().splitlines()[-1]}"
    if life.losses and min(life.losses) != saved + 1 and min(life.losses) <= saved:
        return f"began at step {min(life.losses)} although iteration {saved} was saved"
    return reference.disagreement(life)


def signals(reference: Reference, home: Path, phases: Sequence[str]) -> Score:
    """Every signal in every phase: the run leaves in time and quietly, and its resumption ends as the reference."""
    score = Score()
    for phase in phases:
        for number in SIGNALS:
            folder = new_folder(home)
            with started(folder, "--resume", "auto") as process:
                reached = wait_for(moment(phase, folder), process)
                since = time.monotonic()
                process.send_signal(number)
                life = ended(process, folder, since)
            problem = None if reached else "the phase was not reached"
            if life.status != 128 + number:
                problem = f"status {life.status}, not {128 + number}: {life.err[-200:]}"
            elif "Traceback" in life.err:
                problem = "a traceback"
            elif phase == "start" and life.seconds > LEAVES_WITHIN:
                problem = f"left after {life.seconds:.1f} s"
            elif phase != "start" and "--resume" not in life.out + life.err:
                problem = "no line says how to resume"
            else:
                last = whole_life(folder, "--resume", "auto")
                problem = unlike(reference, last, life.last_saved)
                if problem is None and (last.status or weights_of(folder) != reference.weights):
                    problem = "the resumed run ends otherwise"
            score.note(f"{signal.Signals(number).name} in {phase}", problem)
            shutil.rmtree(folder)
    return score


def moment(phase: str, folder: Path) -> Callable[[], bool]:
    """A function that says whether the phase has come."""
    begun = time.monotonic()
    if phase == "start":
        return lambda: time.monotonic() - begun > 0.8

    def out() -> str:
        return (folder / "out").read_text()

    if phase == "evaluation":
        return lambda: f"step {EVALUATE_EVERY}/" in out()
    if phase == "saving":
        return lambda: any(folder.glob("torture-*/*.unfinished"))
    return lambda: "step  7/" in out()


def damage(reference: Reference, home: Path, flips: int, chance: random.Random) -> Score:
    """A truncated checkpoint and ones with a flipped bit: named, and the one before is resumed from."""
    score, folder, pattern = Score(), new_folder(home), home / "pattern"
    with started(folder, "--resume", "auto") as process:
        wait_for(lambda: "(iteration 44)" in (folder / "out").read_text(), process)
        process.kill()
        ended(process, folder)
    shutil.move(folder, pattern)
    for number in range(-1, flips):
        shutil.copytree(pattern, folder)  # in its place: a run goes on in its own folder
        (run,) = folder.glob("torture-*")
        iteration = max((path.name for path in run.iterdir() if path.name.isdecimal()), key=int)
        file = chance.choice(sorted(path for path in (run / iteration).iterdir() if path.suffix == ".pt"))
        what = f"{file.name} truncated" if number < 0 else f"bit flip {number + 1} in {file.name}"
        spoil(file, truncate=number < 0, chance=chance)
        life = whole_life(folder, "--resume", "auto")
        problem = None
        if life.losses and min(life.losses) > int(iteration):
            problem = f"began at step {min(life.losses)}, from the damaged checkpoint"
        elif file.name not in life.out + life.err:
            problem = "the damaged file isn't named"
        else:
            problem = unlike(reference, life, 0)
            if problem is None and (life.status or weights_of(folder) != reference.weights):
                problem = f"the resumed run ends otherwise, status {life.status}: {life.err[-300:]}"
        score.note(what, problem)
        shutil.rmtree(folder)
    return score


def spoil(file: Path, truncate: bool, chance: random.Random) -> None:
    """Cut a file in half, or flip one of its bits."""
    content = bytearray(file.read_bytes())
    if truncate:
        content = content[: len(content) // 2]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def full_disk(reference: Reference, home: Path) -> Score:
    """A disk that fills up: a sentence, the older checkpoints whole, no litter; with room again the run goes on."""
    score = Score()
    folder = new_folder(home)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        say("  full disk: left out, no file system can be mounted here")
        return score
    try:
        (folder / "filler").write_bytes(bytes(1_100_000))
        life = whole_life(folder, "--resume", "auto")
        problem = None
        if life.status == 0 or "Traceback" in life.err or not life.err.strip():
            problem = f"status {life.status}: {life.err[-300:]}"
        elif litter := [path.name for path in folder.rglob("*unfinished*")]:
            problem = f"left behind: {litter}"
        (folder / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        if problem is None:
            last = whole_life(folder, "--resume", "auto")
            problem = unlike(reference, last, life.last_saved)
            if problem is None and (last.status or weights_of(folder) != reference.weights):
                problem = "the resumed run ends otherwise"
        score.note("full disk", problem)
    finally:
        subprocess.run(["umount", str(folder)], check=False)
    return score


def new_folder(home: Path) -> Path:
    """An empty folder to save under."""
    folder = Path(tempfile.mkdtemp(dir=home))
    return folder


# --- the command ------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 kills and less of the rest: two minutes")
    parser.add_argument("--kills", type=int, metavar="N", help="how many kills (default 50; 8 with --quick)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the random moments (default %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the table's last line counts kills, exact resumptions and lost checkpoints."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--child"]:
        record_losses(argv[1], argv[2:])
        return
    options = command_line().parse_args(argv)
    chance, begun = random.Random(options.seed), time.monotonic()
    count = options.kills or (8 if options.quick else 50)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        undisturbed = new_folder(home)
        life = whole_life(undisturbed)
        if life.status or len(life.losses) != STEPS:
            sys.exit(f"The uninterrupted run failed with status {life.status}: {life.err}")
        reference = Reference(life.losses, weights_of(undisturbed))
        killed, lost = kills(count, reference, home, chance)
        scores = {
            "kill -9": killed,
            "signals": signals(reference, home, ["training"] if options.quick else ["start", "training", "evaluation", "saving"]),
            "damaged checkpoints": damage(reference, home, 2 if options.quick else 20, chance),
            "full disk": full_disk(reference, home),
        }  # fmt: skip
    say("\n| what | tried | as it should be |\n| --- | --- | --- |")
    for name, score in scores.items():
        say(f"| {name} | {score.tried} | {score.good} |")
    say(json.dumps({"seconds": round(time.monotonic() - begun), "steps": STEPS, "seed": options.seed}))
    say(f"torture: {killed.tried} kills, {killed.good} resumed exactly, {lost} lost")
    sys.exit(lost > 0 or any(score.good < score.tried for score in scores.values()))


if __name__ == "__main__":
    main()
