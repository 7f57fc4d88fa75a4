"""What a run leaves behind beside its checkpoints, in `<save>/<run>/`; with --save none, only its last words.

    settings.json    every flag as it held, the data files, each start of the run: packages and machine; and its end
    metrics.jsonl    a line a step and a line an evaluation: `model.training.records`
    answers.json     some rows, answered before the first step and after the last: `model.training.answers`
    report.html      one page on all of this, made at the end: `model.training.report`
    loss.png         their curves, from five steps on: `model.training.curves`
    tensorboard/     the same for TensorBoard, unless --summary-dir names a place
    held_out.json    the rows of --holdout, as a data file that scripts/evaluate.py takes
    bad_rows.txt     the rows that were left out (--bad_rows skip), a sentence each
    running.txt      the process that trains here, while it does: `model.checkpoints.running`

These files are for people and for tools that show a run. Going on with a run needs none of them: --resume reads
`training_run.json` beside the weights of an iteration (`model.checkpoints.resume`), which says what held at that iteration.
Of `settings.json` it reads only whether the run has ended.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from model.checkpoints.resume import SETTINGS_FILE, Ending, digests
from model.checkpoints.running import RUNNING_FILE, Running
from model.checkpoints.save import make_latest
from model.checkpoints.whole import json_text, remove, write_whole
from model.cli.config_file import flags_as_held
from model.cli.preflight import Inputs
from model.cli.resuming import CommandLine
from model.data.rows import Row, json_row
from model.data.split import Selection
from model.distributed import done_by_first_process, is_first_process
from model.errors import InputError
from model.progress import say, warn
from model.training.curves import LossPicture
from model.training.records import ANSWERS_FILE, HELD_OUT_FILE, METRICS_FILE, REPORT_FILE, MetricsFile, Record
from model.training.run_state import RunState
from model.training.sat_loop import Hooks
from model.training.verdict import verdict

BAD_ROWS_FILE, TENSORBOARD_FOLDER = "bad_rows.txt", "tensorboard"
# What is there before the first step; it goes with a run that takes none.
OF_EVERY_RUN = (
    SETTINGS_FILE, METRICS_FILE, ANSWERS_FILE, HELD_OUT_FILE, BAD_ROWS_FILE, TENSORBOARD_FOLDER, RUNNING_FILE,
)  # fmt: skip
VERSION = 1  # of settings.json
PACKAGES = (
    "torch", "SwissArmyTransformer", "deepspeed", "transformers", "bitsandbytes", "numpy", "Pillow", "sentencepiece",
)  # fmt: skip
# Attributes of SAT's namespace that a --deepspeed_config, or a machine without a GPU, makes others than the flags'.
HELD_BY_SAT = ("batch_size", "gradient_accumulation_steps", "lr", "weight_decay", "fp16", "bf16")


class RunFolder:
    """The files of one run. As a context manager it closes them, and removes them if not a single step was taken."""

    def __init__(
        self,
        line: CommandLine,
        inputs: Inputs,
        run: RunState,
        hooks: Hooks,
        is_stopping: Callable[[], bool],
        running: Running,
    ) -> None:
        """Let hooks put TensorBoard's file in its place. The folder is known when SAT calls `place`.

        Args:
            is_stopping: whether a signal, or --exit-interval, has asked the run to end.
            running: claims the folder for this run.
        """
        self.is_stopping, self.running = is_stopping, running
        self.line, self.inputs, self.run, self.report = line, inputs, run, hooks.report
        self.folder: Path | None = None
        self.settings: dict[str, Any] = {}
        self.records: list[Record] = []  # of a run without a folder, which has them nowhere else
        self.metrics: MetricsFile | None = None
        self.picture: LossPicture | None = None
        self.steps = line.steps_done
        hooks.tensorboard_folder = self.tensorboard_folder

    def __enter__(self) -> "RunFolder":
        return self

    def place(self, args: argparse.Namespace, model: Any) -> None:
        """Choose the run's folder, and write what is known of the run. SAT calls this on every process before training.

        Raises:
            InputError: another run goes on in it. Every process raises it.
        """
        self.run.place(args, model)
        if not args.save:
            if is_first_process() and not self.line.options.find_lr:
                no_digests = dict.fromkeys(self.inputs.selection.rows, "")  # reading large files for them takes a while
                self.settings = settings_of_run(self.line, self.inputs, args, no_digests)
                self.report.sinks.append(self.records.append)
            return
        self.folder = Path(args.save)
        done_by_first_process(partial(self._take, self.folder))
        args.summary_dir = args.summary_dir or args.save  # Weights & Biases keeps its files there
        if not is_first_process():
            return
        try:
            self._write(args)
        except OSError as error:
            warn(f"{self.folder}: the settings of the run can't be written ({error.strerror}); training goes on.")
        self.metrics = MetricsFile(self.folder / METRICS_FILE, self.run.is_behind)
        self.picture = LossPicture(self.folder)
        self.report.sinks += [self.metrics.write, self.picture.note, self._count]

    def _take(self, folder: Path) -> None:
        """Claim the folder. Its checkpoint is now the one that the run goes on from: a kill before the first save leaves that.

        Raises:
            InputError: another run goes on there, or the folder can't be written to.
        """
        self.running.claim(folder)
        if self.line.resumed is None:
            return
        iteration, latest = self.line.steps_done, self.line.resumed.checkpoint.latest()
        if latest == str(iteration):
            return
        try:
            make_latest(folder, iteration)
        except OSError as error:
            raise InputError(f"{folder}: `latest` can't be written ({error.strerror}).") from None
        was = f", {latest} was; that one stays until it is saved anew" if latest else ""
        say(f"{folder}: iteration {iteration} is the latest from here on{was}.")

    def tensorboard_folder(self, base: str, name: str) -> Path | None:
        """Where TensorBoard's file goes: into the run's folder, or where --summary-dir says."""
        if self.line.options.summary_dir:
            return Path(self.line.options.summary_dir, "runs", self.folder.name if self.folder else name)
        return self.folder / TENSORBOARD_FOLDER if self.folder else None

    def _count(self, record: object) -> None:
        self.steps += 1

    def _write(self, args: argparse.Namespace) -> None:
        assert self.folder is not None
        selection = self.inputs.selection
        settings = settings_of_run(self.line, self.inputs, args, self.run.data)
        settings["starts"] = []
        if self.line.resumed is not None:
            settings |= earlier_settings(self.folder, self.line.steps_done)
        valid_data = [settings["data"][file]["sha256"] for file in self.line.options.valid_data or []]
        settings["starts"].append({**start_of_run(self.line), "valid_data": valid_data})
        self._write_settings(settings)
        held_out = list(held_out_rows(selection, self.line.options.lang))
        if held_out:
            rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in held_out)
            write_text(self.folder / HELD_OUT_FILE, f"[\n{rows}\n]\n")
        if selection.problems:
            write_text(self.folder / BAD_ROWS_FILE, "\n".join(selection.problems) + "\n")

    def _write_settings(self, settings: dict[str, Any]) -> None:
        assert self.folder is not None
        write_text(self.folder / SETTINGS_FILE, json_text(settings, 1) + "\n")
        self.settings = settings

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.metrics is not None:
            self.metrics.close()
        if self.line.options.wandb and is_first_process():
            sys.modules["wandb"].finish(exit_code=int(kind is not None))  # a second run may follow in this process
        if self.folder is None or not is_first_process():
            return
        if not self.steps:
            for name in OF_EVERY_RUN:
                remove(self.folder / name)
        elif self.picture is not None:
            if self.is_stopping() or (kind is not None and not issubclass(kind, Exception)):
                self.picture.give_up()
            else:
                self.picture.finish()
            if kind is not None:
                self.picture.wait()

    def tell_what_was_learned(self) -> None:
        """Say whether the run has learned, and make its page. Whatever goes wrong here, the run is done and saved."""
        if not is_first_process() or (self.folder is not None and not self.steps):
            return
        page = self.folder / REPORT_FILE if self.folder is not None else None
        try:
            from model.training.report import Story, report

            story = Story(Path(), self.settings, self.records, {}) if page is None else Story.of(page.parent)
            for line in verdict(story.settings, story.records, story.answers):
                say(line)
            if page is not None:
                write_text(page, report([page.parent]))
                say(f"Report: {page}")
        except Exception as error:
            what = "What was learned can't be told" if page is None else f"{page} can't be made"
            warn(f"{what} ({type(error).__name__}: {error}); the run itself is done.")

    def note_end(self) -> None:
        """Keep that nothing is left to do, for whoever resumes the run. Without it, all that comes at the end is done again."""
        if self.folder is None or not self.settings or not self.steps:
            return
        done = self.report.steps_done
        is_early = (self.report.last_step or 0) > done
        ending = Ending(done, self.line.options.early_stopping if is_early else None)
        with suppress(OSError):
            self._write_settings(self.settings | {"ended": asdict(ending)})

    def wait_for_picture(self) -> None:
        """Return when `loss.png` shows the whole run, or after half a minute."""
        if self.picture is not None:
            self.picture.wait()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", errors="backslashreplace"))


# --- settings.json ----------------------------------------------------------------------------------------------------


def settings_of_run(
    line: CommandLine, inputs: Inputs, args: argparse.Namespace, known: Mapping[str, str]
) -> dict[str, Any]:
    """What `settings.json` says of a run as a whole.

    Args:
        known: digests of data files, by path.
    """
    options, selection = line.options, inputs.selection
    held: dict[str, object] = {name: getattr(args, name) for name in HELD_BY_SAT}
    held |= {name: getattr(inputs.lengths, name) for name in ("max_source_length", "max_target_length")}
    other = [file for file in selection.rows if file not in known]
    of_file = {**known, **digests(other)}
    return {
        "version": VERSION,
        "run": Path(args.save or "").name,
        **flags_as_held(options, held),
        "steps": inputs.steps,
        "samples_per_step": args.batch_size
        * args.gradient_accumulation_steps
        * (args.world_size // args.model_parallel_size),
        "checkpoint": str(inputs.checkpoint.folder.resolve()),
        "positions": inputs.checkpoint.config.get("max_sequence_length"),  # tokens that it takes, question and answer
        "data": {
            file: data_of(
                selection, file, of_file[file], file in (options.train_data or []), inputs.cut_labels.get(file)
            )
            for file in selection.rows
        },
        "deepspeed": args.deepspeed_config,
    }


def data_of(
    selection: Selection, file: str, sha256: str, trained_on: bool, cut_labels: int | None = None
) -> dict[str, Any]:
    """What `settings.json` says of a data file.

    Args:
        cut_labels: labels of which --max_target_length cuts off the end; None where that isn't known.
    """
    return {
        "path": os.path.abspath(file),
        "sha256": sha256,
        "rows": len(selection.rows[file]),
        "samples": selection.sample_count(file),
        "trained_on": selection.row_count(file) if trained_on else 0,
        "held_out": len(selection.chosen(file, training=False) or ()),
        "left_out": len(selection.left_out.get(file, ())),
        "cut_labels": cut_labels,
    }


def start_of_run(line: CommandLine) -> dict[str, Any]:
    """This start of a run: a fresh one's first, or where it goes on; and what it runs on."""
    return {
        "time": time.time(),
        "after_step": line.steps_done,
        "command": line.words,
        "folder": os.getcwd(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": versions(),
        "machine": machine(),
    }


def earlier_settings(folder: Path, steps_done: int) -> dict[str, Any]:
    """What stays of `settings.json` in a folder when its run goes on after so many steps: what it started from, and its
    starts, without those after these steps, which are taken again."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        starts = [start for start in settings["starts"] if start["after_step"] <= steps_done]
        return {"checkpoint": settings["checkpoint"], "starts": starts}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a run of an earlier version


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that training stands on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """What the run is on."""
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count()) if torch is not None and torch.cuda.is_available() else ()
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(number) for number in gpus] if torch is not None else [],
    }


# --- held_out.json ----------------------------------------------------------------------------------------------------


def held_out_rows(selection: Selection, lang: str) -> Iterable[dict[str, Any]]:
    """The rows that --holdout took out of training, as they stand in a data file, each image by its absolute path.

    Args:
        lang: --lang, which holds for rows that don't say.
    """
    for file in selection.held_out:
        for index in selection.chosen(file, training=False) or ():
            row: Row = selection.rows[file][index]
            img = None if row.img is None else os.path.abspath(row.img)
            yield json_row(row._replace(img=img, lang=row.lang or (lang if lang != "zh" else None)))
