"""Train one small model in every layout of processes, and compare each with one process.

    python scripts/dev/layouts.py                    every layout (five minutes)
    python scripts/dev/layouts.py --only "2 parts"   those with this in their names, and what they are compared with

A layout is a number of processes with a ZeRO stage, model parallelism, accumulation, … All take the same rows in a step. A
loss and a gradient norm may differ from one process's by a hundred-thousandth; the rows, not at all. The last line counts:
`layouts: N equal, M refused`. A layout that is neither ends the command with status 1.

Each launch of torchrun runs several layouts in the same processes, one after another: importing torch takes longest.
Bytes are those that a ring of processes sends, reckoned from the collectives that torch is asked for. A table at the end
says how a step's time and bytes grow from 1 to 2 and 4 processes. Where these have fewer cores, their time grows too.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.distributed import free_port
from model.progress import say

PROJECT = Path(__file__).resolve().parents[2]
STEPS, SAVED_AT = 4, 2
SAMPLES = 4  # of a step, in every layout
TOLERANCE = 1e-5  # relative
TRAIN = (
    "--mode", "finetune", "--train-data", str(PROJECT / "fewshot-data/dataset.json"), "--max_source_length", "64",
    "--max_target_length", "32", "--train-iters", str(STEPS), "--save-interval", str(SAVED_AT), "--loss_normalization", "token",
    "--auto_warmup_steps", "0", "--lr", "0.001", "--num-workers", "0", "--hidden-dropout", "0", "--attention-dropout", "0",
    "--lora_rank", "4", "--pre_seq_len", "3",
)  # fmt: skip
VISION = "LoRA and Q-Former"
FLAGS = {
    "LoRA": ["--use_lora"],
    "P-Tuning": ["--use_ptuning"],
    "QLoRA": ["--use_qlora"],
    VISION: [
        "--use_lora",
        "--train_parts",
        "qformer=0.001",
        "--save_full_model",
        "--holdout",
        "2",
        "--eval-interval",
        "2",
    ],
}
METHODS = {name + zero: flags for name, flags in FLAGS.items() for zero in ("", ", ZeRO")}


@dataclass(frozen=True)
class Layout:
    """A run: its processes, its flags, and the run that it goes on with."""

    name: str
    processes: int
    like: str  # the run of one process that it must equal
    flags: tuple[str, ...] = ()
    model_parallel: int = 1
    accumulation: int = 1
    resumes: str = ""
    offloaded: int = 0  # the ZeRO stage of a DeepSpeed file that keeps in the CPU's memory what it can
    refused: bool = False  # it can't work, and is to be told so in a sentence

    def words(self, folder: Path, model: str) -> list[str]:
        """Its command line."""
        batch = SAMPLES * self.model_parallel // (self.processes * self.accumulation)
        words = ["--batch-size", str(batch), "--gradient-accumulation-steps", str(self.accumulation)]
        words += ["--model-parallel-size", str(self.model_parallel), "--summary-dir", str(folder), *self.flags]
        if self.offloaded:
            keep = {"device": "cpu"}
            zero = {
                "stage": self.offloaded,
                "offload_optimizer": keep,
                **({"offload_param": keep} if self.offloaded == 3 else {}),
            }
            file = folder / f"offloaded-{self.offloaded}.json"
            file.write_text(json.dumps({"zero_optimization": zero}))
            words += ["--deepspeed_config", str(file)]
        if self.resumes:
            (run,) = (folder / self.resumes).glob("*/latest")
            return ["--resume", str(run.parent / str(SAVED_AT)), *words]
        saved = ["--save", str(folder / self.name), "--from_pretrained", model]
        return [*TRAIN, *METHODS[self.like], *saved, *words]


@dataclass
class Record:
    """What the processes of a run saw: for each step its loss, its gradient's norm and its rows."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)  # of each micro-batch
    seconds: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)  # bytes
    calls: list[int] = field(default_factory=list)  # of collectives
    ours: list[list[str]] = field(
        default_factory=list
    )  # of those, where the ones are asked for that are not DeepSpeed's or SAT's
    problem: str = ""


# --- in each process of a launch --------------------------------------------------------------------------------------


def record_all(jobs: Path) -> None:
    """Run the command lines in a file, and write beside it what this process recorded of each."""
    from model.sat_compat import import_sat

    mpu = import_sat(training=True).mpu
    script = runpy.run_path(str(PROJECT / "finetune_visualglm.py"))
    record = Record()
    watch(lambda: record)
    records, mine = {}, jobs.with_suffix(f".{os.environ['RANK']}")
    for name, words in json.loads(jobs.read_text()).items():
        record, printed = Record(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                script["main"](words)
            except SystemExit:  # a sentence is printed, on the first process
                record.problem = printed.getvalue().strip() or "see the first process"
            except Exception:
                record.problem = traceback.format_exc()
        mpu.destroy_model_parallel()
        records[name] = vars(record)
        mine.write_text(json.dumps(records))


def watch(current: Callable[[], Record]) -> None:
    """Have every step noted in the record that is current then."""
    import torch

    from model.training.loaders import OrderedBatches
    from model.training.signals import StopAtSignal

    after_step, batches = StopAtSignal.after_step, OrderedBatches.__iter__
    sent: list[tuple[float, str]] = []  # by each collective since the last step: bytes, and where it was asked for
    began = [time.monotonic()]

    def noting_step(self: Any, state: Any, loss: Any, skipped: bool) -> None:
        after_step(self, state, loss, skipped)
        record, now = current(), time.monotonic()
        record.losses.append(loss.item())
        record.norms.append(float(state.model.get_global_grad_norm()))
        record.seconds.append(now - began[0])
        record.sent.append(sum(size for size, _ in sent))
        record.calls.append(len(sent))
        record.ours.append([place for _, place in sent if place])
        sent.clear()
        began[0] = now

    def noting_rows(self: Any) -> Iterator[list[int]]:
        for rows in batches(self):
            if self.order.draws:  # of training
                current().rows.append(rows)
            yield rows

    StopAtSignal.after_step, OrderedBatches.__iter__ = noting_step, noting_rows  # type: ignore[method-assign]
    for name, (place, share) in COLLECTIVES.items():
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name), place, share, sent))


# Which argument of a collective is as long as all that is sent around, and how many times a ring sends it around. Objects
# are not measured.
COLLECTIVES: dict[str, tuple[int | None, int]] = {
    "all_reduce": (0, 2), "broadcast": (0, 1), "reduce": (0, 1), "all_gather": (0, 1), "all_gather_into_tensor": (0, 1),
    "reduce_scatter_tensor": (1, 1), "all_to_all_single": (0, 1), "broadcast_object_list": (None, 0),
    "all_gather_object": (None, 0),
}  # fmt: skip


def counting(
    collective: Callable[..., Any], place: int | None, times: int, sent: list[tuple[float, str]]
) -> Callable[..., Any]:
    """A collective of torch's that is noted in sent, with as many bytes as one process of a ring sends."""
    import torch

    def call(*args: Any, **named: Any) -> Any:
        tensors = [] if place is None else args[place] if len(args) > place else next(iter(named.values()))
        tensors = tensors if isinstance(tensors, list) else [tensors]
        processes = torch.distributed.get_world_size(named.get("group"))
        asking = sys._getframe(1).f_code
        file = Path(asking.co_filename)
        is_ours = file.is_relative_to(PROJECT / "model")
        size = times * (processes - 1) / processes * sum(tensor.nbytes for tensor in tensors)
        sent.append((size, f"{file.name} {asking.co_name}" if is_ours else ""))
        return collective(*args, **named)

    return call


# --- launches ---------------------------------------------------------------------------------------------------------


def recorded(layouts: Sequence[Layout], folder: Path, model: str) -> dict[str, list[Record]]:
    """What each process of each layout recorded. The layouts have equally many processes."""
    processes = layouts[0].processes
    folder.mkdir(exist_ok=True)
    jobs = folder / f"jobs-{time.monotonic_ns()}.json"
    jobs.write_text(json.dumps({layout.name: layout.words(folder, model) for layout in layouts}))
    words = ["--nproc-per-node", str(processes), "--master-port", str(free_port()), __file__, "--record", str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VISUALGLM_UI_LANG": "en"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    records: dict[str, list[Record]] = {layout.name: [] for layout in layouts}
    for rank in range(processes):
        file = jobs.with_suffix(f".{rank}")
        of_rank = json.loads(file.read_text()) if file.is_file() else {}
        for name in records:
            records[name].append(Record(**of_rank.get(name, {"problem": done.stderr[-2000:] or "it ended early"})))
    return records


def compared(layout: Layout, records: list[Record], like: Record) -> tuple[str, bool]:
    """A line on a layout beside the run of one process, and whether they are equal."""
    problem = next((record.problem for record in records if record.problem), "")
    if problem or layout.refused:
        is_right = layout.refused and "needed" in problem and "Traceback" not in problem
        return problem.splitlines()[0] if is_right else problem, is_right
    start = SAVED_AT if layout.resumes else 0
    loss, norm = (
        max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(mine, expected[start:], strict=True))
        for mine, expected in ((records[0].losses, like.losses), (records[0].norms, like.norms))
    )
    rows = rows_by_step(layout, records)
    expected_rows = rows_by_step(Layout("", 1, ""), [like])[start:]
    equal = loss <= TOLERANCE and norm <= TOLERANCE and rows == expected_rows
    seen = " | ".join(" ".join(map(str, of_step)) for of_step in rows)
    told = f"the same{': ' + seen if layout.resumes else ''}" if rows == expected_rows else seen
    figures = f"loss {loss:.1e}  gradient norm {norm:.1e}  rows {told}"
    return f"{figures}  {cost(records[0])}", equal


def cost(record: Record) -> str:
    """What the quickest step takes, and the one with least to send: time, bytes, and in how many collectives."""
    return f"{1000 * min(record.seconds):6.0f} ms  {min(record.sent) / 1024:8.1f} KiB in {min(record.calls):3} calls"


def rows_by_step(layout: Layout, records: list[Record]) -> list[list[int]]:
    """The rows of each step, in the order in which all processes together saw them."""
    readers = [record for rank, record in enumerate(records) if rank % layout.model_parallel == 0]
    micro_batches = [
        [row for rows in at_once for row in rows] for at_once in zip(*(r.rows for r in readers), strict=True)
    ]
    ends = range(0, len(micro_batches), layout.accumulation)
    return [[row for rows in micro_batches[start : start + layout.accumulation] for row in rows] for start in ends]


# --- the table --------------------------------------------------------------------------------------------------------

Z1 = ("--zero-stage", "1")  # Adam's betas are others than without ZeRO, as SAT has them
ONE = [Layout(name, 1, name, Z1 if "ZeRO" in name else ()) for name in METHODS]


def layouts() -> list[list[Layout]]:
    """The launches, in an order in which each finds the runs that it goes on with."""
    zero = {stage: ("--zero-stage", str(stage)) for stage in range(4)}

    def data_parallel(processes: int, method: str, stages: Sequence[int] = range(4)) -> list[Layout]:
        return [split(zero_layout(method, processes, stage), processes, 1, stage, method) for stage in stages]

    def split(
        name: str,
        processes: int,
        parts: int,
        stage: int = 0,
        method: str = "LoRA",
        flags: tuple[str, ...] = (),
        **more: Any,
    ) -> Layout:
        return Layout(name, processes, method + ", ZeRO" * (stage > 0), (*zero[stage], *flags), parts, **more)

    def resumed(name: str, processes: int, saved: str, stage: int = 1, parts: int = 1) -> Layout:
        return Layout(name, processes, "LoRA, ZeRO", zero[stage], parts, resumes=saved)

    saved = "LoRA, 2 processes, ZeRO 2"
    checkpointed = ("--checkpoint-activations",)
    return [
        [
            *ONE,
            Layout("LoRA, 1 process, accumulated", 1, "LoRA", accumulation=2),
            Layout("LoRA, 2 parts on 1 process", 1, "LoRA", ("--model-parallel-size", "2"), refused=True),
            *data_parallel(1, "LoRA", (2, 3)),
        ],
        [
            *(layout for method in ("LoRA", "P-Tuning", "QLoRA") for layout in data_parallel(2, method)),
            split("LoRA, 2 processes, accumulated, ZeRO 2", 2, 1, 2, accumulation=2),
            split("LoRA, 2 processes, checkpointed, ZeRO 3", 2, 1, 3, flags=checkpointed),
            *(split(f"{method}, 2 parts", 2, 2, method=method) for method in ("LoRA", "P-Tuning", "QLoRA")),
            *(split(f"LoRA, 2 parts, ZeRO {stage}", 2, 2, stage) for stage in (1, 2, 3)),
            split(f"{VISION}, 2 parts", 2, 2, method=VISION),
            split(f"{VISION}, 2 processes, ZeRO 3", 2, 1, 3, VISION),
            split("LoRA, 2 parts, accumulated", 2, 2, accumulation=2),
            split("LoRA, 2 parts, checkpointed", 2, 2, flags=checkpointed),
            *(split(f"LoRA, 2 processes, ZeRO {stage}, offloaded", 2, 1, stage, offloaded=stage) for stage in (2, 3)),
        ],
        [
            *(layout for method in ("LoRA", "P-Tuning", "QLoRA") for layout in data_parallel(4, method)),
            *(split(f"{method}, 4 parts", 4, 4, method=method) for method in ("LoRA", "P-Tuning", "QLoRA")),
            *(split(f"{method}, 2 times 2 parts", 4, 2, method=method) for method in ("LoRA", "P-Tuning", "QLoRA")),
            *(split(f"LoRA, 2 times 2 parts, ZeRO {stage}", 4, 2, stage) for stage in (1, 2, 3)),
            split(f"{VISION}, 2 times 2 parts, ZeRO 2", 4, 2, 2, VISION),
            resumed("2 processes, ZeRO 2 → 4 processes, ZeRO 3", 4, saved, 3),
            resumed("2 processes, ZeRO 2 → 2 times 2 parts, ZeRO 1", 4, saved, 1, 2),
            resumed("2 processes, ZeRO 2 → 2 times 2 parts, ZeRO 3", 4, saved, 3, 2),
        ],
        [
            resumed("2 processes, ZeRO 2 → 1 process, ZeRO 1", 1, saved),
            resumed("4 processes, ZeRO 3 → 1 process, ZeRO 1", 1, "LoRA, 4 processes, ZeRO 3"),
            resumed("2 times 2 parts, ZeRO 2 → 1 process, ZeRO 1", 1, "LoRA, 2 times 2 parts, ZeRO 2"),
        ],
        [split("LoRA, 3 parts of 4 heads", 3, 3, refused=True)],
        [
            resumed("2 processes, ZeRO 2 → 2 parts, ZeRO 1", 2, saved, 1, 2),
            resumed("2 parts, ZeRO 3 → 2 parts, ZeRO 3", 2, "LoRA, 2 parts, ZeRO 3", 3, 2),
            resumed("2 times 2 parts, ZeRO 3 → 2 processes, ZeRO 3", 2, "LoRA, 2 times 2 parts, ZeRO 3", 3),
        ],
    ]


def zero_layout(method: str, processes: int, stage: int) -> str:
    """The name of a layout with data-parallel processes."""
    if processes == 1 and stage < 2:
        return method + ", ZeRO" * stage
    return f"{method}, {processes} process{'es' * (processes > 1)}, ZeRO {stage}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="layouts with this in their names, and what they need"
    )
    parser.add_argument("--record", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.record:
        record_all(options.record)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare_all(layouts(), options.only, Path(folder))


def compare_all(launches: Sequence[Sequence[Layout]], only: str, folder: Path) -> int:
    """Run the launches, print a line for each layout, and give the command's status."""
    model = random_model(folder)
    likes: dict[str, Record] = {}
    counts = {True: 0, False: 0}  # of those that are as they are to be, by whether they are to be refused
    lines = 0
    firsts: dict[str, Record] = {}  # of each layout, what its first process recorded
    for launch in launches:
        chosen = [layout for layout in launch if only in layout.name or layout in ONE]
        records = recorded(chosen, folder, model) if chosen else {}
        for layout in chosen:
            if layout in ONE:
                likes[layout.name] = records[layout.name][0]
            line, is_right = compared(layout, records[layout.name], likes[layout.like])
            firsts[layout.name] = records[layout.name][0]
            counts[layout.refused] += is_right
            lines += 1
            say(f"{layout.name:50}{'' if is_right else 'NOT AS IT SHOULD BE: '}{line}")
    for line in growth(firsts):
        say(line)
    say(f"layouts: {counts[False]} equal, {counts[True]} refused")
    return int(sum(counts.values()) < lines)


def growth(records: dict[str, Record]) -> list[str]:
    """Lines on how a step's time, bytes and collectives grow with the number of processes."""
    ways = {f"ZeRO {stage}": [zero_layout("LoRA", processes, stage) for processes in (1, 2, 4)] for stage in range(4)}
    ways["parts"] = ["LoRA", "LoRA, 2 parts", "LoRA, 4 parts"]
    known = {
        way: names for way, names in ways.items() if all(name in records and records[name].calls for name in names)
    }
    heading = [f"{'a step of LoRA on':20}" + "".join(f"{processes:<42}" for processes in ("1 process", "2", "4"))]
    lines = [
        f"{way:20}" + "".join(f"{cost(records[name]).strip():<42}" for name in names) for way, names in known.items()
    ]
    return heading + lines if lines else []


def random_model(folder: Path) -> str:
    """A small VisualGLM with random weights, whose heads and vocabulary can be divided by 4."""
    from scripts.dev.write_random_model import write_random_model

    write_random_model(folder / "model", hidden=256, layers=2, heads=4)
    return str(folder / "model")


if __name__ == "__main__":
    sys.exit(main())
