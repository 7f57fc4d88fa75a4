"""Measure what large data costs: time and memory before the first step, and pictures read per second.

    python scripts/dev/benchmark_data.py --from_pretrained model/tiny
    python scripts/dev/benchmark_data.py --from_pretrained model/tiny --rows 300000 --edge 640

Makes a data file of 20 rows and one of many, each row with a text and a picture of its own (a hundred different
pictures, the rest are links to them), trains one step on each in processes of their own, and compares. The first run
on new pictures opens as many as --check_seconds allows; the second shows what is remembered.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from PIL import Image

from model.checkpoints.layout import Checkpoint
from model.progress import say

PROJECT = Path(__file__).resolve().parents[2]
FEW = 20
DIFFERENT_IMAGES = 100
MIB = 2**20


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from_pretrained", required=True, metavar="CHECKPOINT", help="model to train a step of")
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the large file (default 300000)")
    parser.add_argument("--edge", type=int, default=256, help="pixels of a picture's edge (default 256)")
    parser.add_argument("--num-workers", type=int, default=1, help="processes that read pictures (default 1)")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a step (default 4)")
    parser.add_argument("--steps", type=int, default=8, help="steps of the run whose speed is compared (default 8)")
    parser.add_argument("--folder", default=None, help="where to make the data (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("benchmark_data.py"):
        options = command_line().parse_args(argv)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            figures = measured(options, Path(folder))
        say(json.dumps(figures, indent=1) if options.json else "\n".join(figure_lines(figures)))


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures: seconds, MiB and samples per second.

    Raises:
        InputError: the checkpoint can't be used, or a run failed.
    """
    checkpoint = Checkpoint.find(options.from_pretrained)
    say(f"Making {options.rows} rows and pictures of {options.edge} × {options.edge} pixels in {folder} …")
    few, many = made_data(folder, FEW, options.edge), made_data(folder, options.rows, options.edge)
    step = ("--train-iters", "1")
    run = {
        "few": training_run(options, checkpoint, few, folder, *step),
        "many_first": training_run(options, checkpoint, many, folder, *step),
        "many_again": training_run(options, checkpoint, many, folder, *step),
    }
    run["few_again"] = training_run(options, checkpoint, few, folder, "--train-iters", str(options.steps))
    return {
        "rows": options.rows,
        "runs": run,
        "more_seconds_first": run["many_first"]["seconds"] - run["few"]["seconds"],
        "more_seconds_again": run["many_again"]["seconds"] - run["few"]["seconds"],
        "more_processor_seconds_first": run["many_first"]["processor_seconds"] - run["few"]["processor_seconds"],
        "more_processor_seconds_again": run["many_again"]["processor_seconds"] - run["few"]["processor_seconds"],
        "more_mib_first": run["many_first"]["peak_mib"] - run["few"]["peak_mib"],
        "more_mib_again": run["many_again"]["peak_mib"] - run["few"]["peak_mib"],
        "pictures_per_second": reading_rate(options, checkpoint, many),
        "samples_per_second_needed": run["few_again"]["samples_per_second"],
        "workers": options.num_workers,
    }


def made_data(folder: Path, rows: int, edge: int) -> Path:
    """A data file of rows, each with a question, an answer and a picture of its own, whose pictures lie beside it."""
    rng = random.Random(rows)
    pictures = folder / f"pictures-{rows}"
    pictures.mkdir()
    for number in range(min(rows, DIFFERENT_IMAGES)):
        noise = Image.frombytes("RGB", (16, 16), rng.randbytes(768))
        noise.resize((edge, edge), Image.Resampling.BICUBIC).save(pictures / f"{number:06}.jpg", quality=90)
    for number in range(DIFFERENT_IMAGES, rows):
        os.link(pictures / f"{number % DIFFERENT_IMAGES:06}.jpg", pictures / f"{number:06}.jpg")
    path = folder / f"rows-{rows}.json"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "img": f"{pictures.name}/{number:06}.jpg",
                "prompt": f"第{number}张图片里有什么？",
                "label": f"图片{number}里有一只猫，背景是蓝天白云，还有{rng.randrange(100)}棵树。",
            }
            file.write(("[" if number == 0 else ",\n") + json.dumps(row, ensure_ascii=False))
        file.write("]\n")
    return path


def training_run(
    options: argparse.Namespace, checkpoint: Checkpoint, data: Path, folder: Path, *flags: str
) -> dict[str, float]:
    """Seconds until the first step is done, most memory of all its processes together until then, and its speed.

    Also the processor's seconds of the whole run, which a busy machine changes less.

    Raises:
        InputError: the run failed; its last lines say why.
    """
    training = [
        sys.executable, str(PROJECT / "finetune_visualglm.py"), "--from_pretrained", str(checkpoint.folder.resolve()), "--use_lora",
        "--mode", "finetune", "--train-data", str(data), "--batch-size", str(options.batch_size), "--num-workers",
        str(options.num_workers), "--max_target_length", "64", "--save", "none", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    started, processor_before = time.monotonic(), children_seconds()
    peak = 0
    lines: list[str] = []
    output = folder / "output.txt"
    with (
        open(output, "w+b") as file,
        subprocess.Popen(training, stdout=file, stderr=file, env=environment) as process,
        killed_on_error(process),
    ):
        while process.poll() is None:
            time.sleep(0.05)
            lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
            if any(line.startswith("step 1/") or line.startswith("step  1/") for line in lines):
                break
            peak = max(peak, memory_of(process.pid))
        seconds = time.monotonic() - started
        process.wait()
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    speeds = [float(speed) for speed in re.findall(r"^step .* (\S+) samples/s", "\n".join(lines), re.MULTILINE)]
    if process.returncode or not speeds:
        raise InputError("a run failed: " + " / ".join(lines[-3:]))
    speeds = speeds[1:] or speeds  # the first step is slower than any other
    return {
        "seconds": seconds,
        "processor_seconds": children_seconds() - processor_before,
        "peak_mib": peak / MIB,
        "samples_per_second": sum(speeds) / len(speeds),
    }


@contextmanager
def killed_on_error(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill a process where the block is left by an exception, which leaving `with Popen` would wait for."""
    try:
        yield
    except BaseException:
        process.kill()
        raise


def children_seconds() -> float:
    """Processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory_of(process: int) -> int:
    """Bytes of memory of a process and its descendants, shared pages counted once (Linux's proportional set size)."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0  # it has just ended
    found = re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)
    return (int(found[1]) * 1024 if found else 0) + sum(memory_of(int(child)) for child in children)


def reading_rate(options: argparse.Namespace, checkpoint: Checkpoint, data: Path) -> float:
    """Samples per second that the data loader gives when nobody trains, after its first batches."""
    from torch.utils.data import DataLoader, Subset

    from model.data.dataset import FewShotDataset, data_collator
    from model.data.image_processor import BlipImageEvalProcessor
    from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer

    lengths = argparse.Namespace(
        image_length=checkpoint.config["image_length"], max_source_length=64, max_target_length=64
    )
    processor = BlipImageEvalProcessor(checkpoint.config["eva_args"]["image_size"][0])
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder))
    dataset = FewShotDataset(data, processor, tokenizer, lengths)
    some = Subset(dataset, range(min(len(dataset), 1000)))
    loader = DataLoader(some, options.batch_size, num_workers=options.num_workers, collate_fn=data_collator)
    samples, started = 0, 0.0
    for batch in loader:
        if not started:
            started = time.monotonic()  # the workers have started
            continue
        samples += len(batch["input_ids"])
    return samples / (time.monotonic() - started)


def figure_lines(figures: dict[str, Any]) -> list[str]:
    """The figures as a person reads them."""
    lines = [f"{'until the first step':<28} {'seconds':>10} {'processor':>10} {'MiB':>8}"]
    names = {
        "few": f"{FEW} rows",
        "many_first": f"{figures['rows']} rows",
        "many_again": f"{figures['rows']} rows, again",
    }
    for name, what in names.items():
        run = figures["runs"][name]
        values = run["seconds"], run["processor_seconds"], run["peak_mib"]
        lines.append(f"{what:<28} {values[0]:>10.1f} {values[1]:>10.1f} {values[2]:>8.0f}")
    for which, what in (("first", "more than for few rows"), ("again", "more, again")):
        values = tuple(figures[f"more_{name}_{which}"] for name in ("seconds", "processor_seconds", "mib"))
        lines.append(f"{what:<28} {values[0]:>10.1f} {values[1]:>10.1f} {values[2]:>8.0f}")
    lines.append(
        f"input: {figures['pictures_per_second']:.0f} pictures/s with {figures['workers']} workers;"
        f" training needs {figures['samples_per_second_needed']:.1f}"
    )
    return lines


if __name__ == "__main__":
    main()
