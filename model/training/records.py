"""What happened in a run: a `Record` for each step and each evaluation, which are the lines of `metrics.jsonl`.

    {"kind": "step", "step": 12, "loss": 1.93, "time": …, "epoch": 2.4, "lr": 0.0001, "seconds": 0.53, …}
    {"kind": "evaluation", "step": 12, "loss": 2.1, "time": …, "epoch": 2.4, "perplexity": 8.17, "split": "val"}

Whatever shows a run takes these records: the terminal, TensorBoard, Weights & Biases, `loss.png`. A field that a record
has nothing for is left out of its line. A loss that isn't finite is null there, for JSON has no word for it.

A line is handed to the system as soon as it is there, so that a kill loses no more than a part of the last one, which
`read_records` leaves out. A run that goes on from a checkpoint removes the lines after it: what stands there in the end is
what an uninterrupted run would have written, but for the fields of MEASURED.

Only the standard library is imported.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from model.checkpoints.whole import write_whole
from model.progress import warn

METRICS_FILE, LOSS_FILE = "metrics.jsonl", "loss.png"  # in a run's folder
ANSWERS_FILE, REPORT_FILE, HELD_OUT_FILE = "answers.json", "report.html", "held_out.json"
STEPS_PER_WINDOW, LARGEST_WINDOW = 15, 100  # of the running mean: a fifteenth of the run, 100 steps at most
STEP, EVALUATION = "step", "evaluation"
VALIDATION, TEST = "val", "test"  # SAT's names of the two kinds of evaluation
MEASURED = ("time", "seconds", "samples_per_second", "memory_bytes")  # what no two runs have in common


@dataclass(frozen=True)
class Record:
    """One step, or one evaluation. Fields that it has nothing for are None."""

    kind: str  # STEP or EVALUATION
    step: int  # optimizer steps that are done
    loss: float  # of a step, the mean over micro-batches and processes; of an evaluation, over all tokens
    time: float  # seconds since 1970
    epoch: float | None = None  # samples that were trained on, divided by those there are
    # of a step
    lr: float | None = None  # the rate that it used
    seconds: float | None = None  # since the step before, with what was saved and evaluated in between
    samples_per_second: float | None = None
    loss_scale: float | None = None  # of fp16
    memory_bytes: int | None = None  # of a GPU, the most that were in use; else those of this process
    skipped: int | None = None  # 1 for a step that changed nothing, because its loss or gradient wasn't finite
    empty_batches: int | None = None  # micro-batches of the first process in which no row could be used
    # of an evaluation
    perplexity: float | None = None
    split: str | None = None  # VALIDATION or TEST
    answered: int | None = None  # rows, with --eval_answers; of their answers:
    exact: float | None = None  # the share that equals the label
    rouge_l: float | None = None  # 0 to 1
    bleu: float | None = None  # 0 to 100

    @property
    def has_no_rows(self) -> bool:
        """Whether a step has no loss because none of its rows could be used."""
        return bool(self.empty_batches) and math.isnan(self.loss) and not self.skipped

    def to_line(self) -> str:
        """The record as a line of `metrics.jsonl`, with its end."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        shown = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        return json.dumps(shown) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Record":
        """The record of such a line. Fields that this version doesn't know are left out.

        Raises:
            ValueError: it is none.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or values.get("kind") not in (STEP, EVALUATION) or "step" not in values:
            raise ValueError("not a record of a run")
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        loss = math.nan if known.get("loss") is None else known["loss"]
        return cls(**{"time": 0.0, **known, "loss": loss})


def read_records(path: Path) -> list[Record]:
    """The records in a file, without lines that a kill has cut short; none if there is no such file.

    Raises:
        OSError: there is one, but it can't be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with suppress(ValueError, TypeError):
            records.append(Record.from_line(line))
    return records


def comparable(records: Sequence[Record], settings: Mapping[str, Any]) -> list[Record]:
    """The evaluations with a finite loss over the rows that a run with these settings evaluates on now.

    A run that goes on may have others than before (--valid-data). Older programs didn't note which a start had.
    """
    starts = [start for start in settings.get("starts") or [] if "valid_data" in start]
    changes = [new.get("after_step", 0) for old, new in pairwise(starts) if new["valid_data"] != old["valid_data"]]
    since = max(changes, default=0)
    made = (one for one in records if one.kind == EVALUATION and one.split == VALIDATION)
    return [one for one in made if one.step > since and math.isfinite(one.loss)]


class MetricsFile:
    """`metrics.jsonl` of a run. The first error is a line, and training goes on without the file."""

    def __init__(self, path: Path, keep: Callable[[Record], bool] = lambda record: False) -> None:
        """A file whose records that keep is true of stay; those of a run that is trained again go."""
        self.path = path
        self._file: IO[str] | None = None
        try:
            lines = "".join(record.to_line() for record in read_records(path) if keep(record))
            write_whole(path, lambda unfinished: unfinished.write_text(lines, encoding="utf-8"))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        except OSError as error:
            self._give_up(error)

    def write(self, record: Record) -> None:
        """Add a record."""
        try:
            if self._file is not None:
                self._file.write(record.to_line())
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _give_up(self, error: OSError) -> None:
        self._file = None
        warn(f"{self.path} can't be written ({error.strerror}); training goes on without it.")


def running_means(losses: Sequence[float]) -> tuple[list[float], int]:
    """The running mean at each of a run's steps, as its curves show it, and over how many steps it goes."""
    window = max(3, min(len(losses) // STEPS_PER_WINDOW, LARGEST_WINDOW))
    return [running_mean(losses[max(0, end - window) : end]) for end in range(1, len(losses) + 1)], window


def running_mean(losses: Sequence[float]) -> float:
    """The mean of those losses that are finite; NaN without one."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
