"""Trains, resumes, evaluates and merges a model of the true 6B shape with random weights, on whatever is here.

    python scripts/dev/rehearse_6b.py rehearsal                  the 6B: 33 GB of disk, 20 of memory, a quarter of an hour
    python scripts/dev/rehearse_6b.py rehearsal --shape mini     to try it: a minute

Each line of the table is a command of this project in a process of its own, with its time and the most memory that it took:
of the host, and with a GPU also what torch took of it in training, beside which CUDA itself takes some.
LoRA and QLoRA train for 3 steps, and go on for one more from the checkpoint; then 2 rows are evaluated and LoRA is merged.
The answers are nonsense, as the weights are, and never end: so none are given before and after a run. Before a command of
training, --dry_run says what it will take; the table has that beside what it took.

What has been measured is kept in the folder, in measured-<shape>.json. After a kill the same command goes on with the rest;
without that file it begins anew. At the end the models, 33 GB of them, are removed; --keep leaves them.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.checkpoints.sizes import folder_problems
from model.distributed import has_gpu
from model.errors import InputError, command, raise_problems
from model.progress import duration, say, warn

PROJECT = Path(__file__).resolve().parents[2]
ROWS = 2  # that are evaluated
STEPS = 3  # and one more after resuming
DISK = {"6b": 33 * 10**9, "mini": 2 * 10**9}  # bytes: the model, and the merged one
LAYERS = {"6b": ("0", "14"), "mini": ("0", "3")}  # that LoRA is in


@dataclass(frozen=True)
class Measured:
    """One command: its seconds; in GiB the most memory of the host, what --dry_run had said, and the most of the GPU."""

    seconds: float
    peak: float
    estimated: float | None = None
    of_gpu: float | None = None

    def columns(self) -> str:
        """Its figures between the table's bars; a GPU's memory only where there is one."""
        figures = [self.peak, *([self.of_gpu] if has_gpu() else []), self.estimated]
        return " | ".join([f"{self.seconds:.0f}", *("" if figure is None else f"{figure:.2f}" for figure in figures)])


def run(script: str, *words: str) -> tuple[str, float, float]:
    """What a script of the project printed, its seconds, and the most host memory that it took, in GiB.

    Raises:
        InputError: it failed.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, script, *words], cwd=PROJECT, stdout=out, stderr=err)
        try:
            _, status, used = os.wait4(process.pid, 0)  # of this process alone, unlike getrusage's children
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said, wrong = out.read(), err.read()
    if process.returncode:
        reason = " ".join((wrong or said).split()[-60:])
        raise InputError(f"{script} {' '.join(words)}: status {process.returncode} ({reason}); 0 is needed.")
    return said, time.perf_counter() - started, used.ru_maxrss / 2**20


def first_rows(folder: Path) -> Path:
    """A file of the few-shot rows that are evaluated, with whole paths of their pictures."""
    rows = json.loads((PROJECT / "fewshot-data/dataset.json").read_text(encoding="utf-8"))[:ROWS]
    file = folder / "rows.json"
    text = json.dumps([{**row, "img": str(PROJECT / row["img"])} for row in rows], ensure_ascii=False)
    file.write_text(text, encoding="utf-8")
    return file


def training(model: Path, shape: str, method: str, save: Path) -> list[str]:
    """The flags of a run that is rehearsed."""
    return [
        f"--use_{method}", "--layer_range", *LAYERS[shape], "--bf16", "--from_pretrained", str(model), "--mode", "finetune",
        "--train-data", str(PROJECT / "fewshot-data/dataset.json"), "--batch-size", "1", "--train-iters", str(STEPS + 1),
        "--save", str(save), "--experiment-name", method, "--save-interval", str(STEPS), "--answers", "0",
    ]  # fmt: skip


def estimated_peak(report: str) -> float:
    """The memory that --dry_run says a run takes, in GiB."""
    return max(float(size) for size in re.findall(r"all while \w+ +([\d.]+)", report))


def stages(folder: Path, shape: str) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """Every command by its name, in order; what measures it begins anew if it is called again."""
    model, merged = folder / f"model-{shape}", folder / f"{shape}-merged"

    def write() -> Measured:
        shutil.rmtree(model, ignore_errors=True)  # half of one
        return Measured(*run("scripts/dev/write_random_model.py", str(model), "--shape", shape)[1:])

    yield "write random weights", write
    for method in ("lora", "qlora"):
        saved = folder / f"{shape}-{method}"
        yield f"{method}: train {STEPS + 1} steps, save", partial(_train, model, shape, method, saved)
        yield f"{method}: resume at step {STEPS}", partial(_resume, saved)
        yield f"{method}: evaluate {ROWS} rows", partial(_evaluate, folder, saved, method)

    def merge() -> Measured:
        shutil.rmtree(merged, ignore_errors=True)
        [checkpoint] = (folder / f"{shape}-lora").iterdir()
        return Measured(*run("scripts/merge_lora.py", str(checkpoint), str(merged))[1:])

    yield "lora: merge", merge


def _train(model: Path, shape: str, method: str, saved: Path) -> Measured:
    shutil.rmtree(saved, ignore_errors=True)
    flags = training(model, shape, method, saved)
    estimated = estimated_peak(run("finetune_visualglm.py", *flags, "--dry_run")[0])
    _, seconds, peak = run("finetune_visualglm.py", *flags)
    return Measured(seconds, peak, estimated, peak_of_gpu(saved) if has_gpu() else None)


def peak_of_gpu(saved: Path) -> float:
    """The most memory of the GPU that the run whose checkpoint is in the folder had taken for tensors, in GiB.

    The run's log asks once a second.
    """
    [metrics] = saved.glob("*/metrics.jsonl")
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return max(record.get("memory_bytes", 0) for record in records) / 2**30


def _resume(saved: Path) -> Measured:
    [checkpoint] = saved.iterdir()
    shutil.rmtree(checkpoint / str(STEPS + 1), ignore_errors=True)  # as if the run had been killed after the first save
    (checkpoint / "latest").write_text(str(STEPS))
    return Measured(*run("finetune_visualglm.py", "--resume", str(checkpoint))[1:])


def _evaluate(folder: Path, saved: Path, method: str) -> Measured:
    [checkpoint] = saved.iterdir()
    words = ["--from_pretrained", str(checkpoint), "--data", str(first_rows(folder)), "--max_length", "80"]
    return Measured(*run("scripts/evaluate.py", *words, *(["--quant", "4"] if method == "qlora" else []))[1:])


def rehearse(folder: Path, shape: str) -> Iterator[tuple[str, Measured]]:
    """Every command by its name, one after another, when it has been measured; those of an earlier call at once."""
    file = folder / f"measured-{shape}.json"
    done = {name: Measured(**one) for name, one in json.loads(file.read_text()).items()} if file.is_file() else {}
    for name, measure in stages(folder, shape):
        if name not in done:
            warn(f"{time.strftime('%H:%M:%S')} {name} …")
            done[name] = measure()
            file.write_text(json.dumps({name: vars(one) for name, one in done.items()}, indent=1))
        yield name, done[name]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the model and what is trained are put")
    parser.add_argument("--keep", action="store_true", help="leave the models on the disk")
    parser.add_argument("--shape", choices=tuple(DISK), default="6b", help="of benchmark.py (default %(default)s)")
    with command("rehearse_6b.py"):
        options = parser.parse_args(argv)
        needed = DISK[options.shape] // (2 if (options.folder / f"measured-{options.shape}.json").is_file() else 1)
        raise_problems(folder_problems("FOLDER", str(options.folder), needed))
        folder = options.folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        gpu = " of the GPU, GiB |" if has_gpu() else ""
        bars = "| --- " * (5 if gpu else 4) + "|"
        say(f"| command | seconds | peak of host memory, GiB |{gpu} --dry_run, GiB |\n{bars}")
        started = time.monotonic()
        for name, one in rehearse(folder, options.shape):
            say(f"| {name} | {one.columns()} |")
        if not options.keep:
            for made in (
                f"model-{options.shape}",
                *(f"{options.shape}-{name}" for name in ("lora", "qlora", "merged")),
            ):
                shutil.rmtree(folder / made, ignore_errors=True)
        say(f"This call took {duration(time.monotonic() - started)}.")


if __name__ == "__main__":
    main()
