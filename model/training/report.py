"""`report.html`: one page on a run, or on several side by side, made of the files in its folder.

What was trained on what, whether it learned, the curves, pictures with their questions and answers before and after, the
worst first, and what can be done next. `python scripts/report.py RUN [RUN …]` makes it again.
"""

import datetime
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model.chinese import in_ui_language, listed_in_ui_language
from model.cli.options import flag_names, shown
from model.inference.page import Curve, chart, escaped, page, paragraphs, row_card, section, table
from model.inference.scores import Result, worst_first
from model.progress import count_of, duration
from model.training.answers import Answered, read_answers
from model.training.curves import settings_in, top_of_losses
from model.training.records import (
    EVALUATION,
    HELD_OUT_FILE,
    METRICS_FILE,
    STEP,
    VALIDATION,
    Record,
    comparable,
    read_records,
    running_means,
)
from model.training.verdict import fall_of, verdict

MOST_ROWS = 50  # of answers on a page


@dataclass(frozen=True)
class Story:
    """What a run has left behind."""

    folder: Path
    settings: Mapping[str, Any]
    records: Sequence[Record]
    answers: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> "Story":
        """That of the run in folder; what is missing or broken is empty.

        Raises:
            OSError: its metrics can't be read.
        """
        return cls(folder, settings_in(folder), read_records(folder / METRICS_FILE), read_answers(folder))

    @property
    def name(self) -> str:
        """The run's."""
        return self.folder.name or self.folder.resolve().name

    @property
    def steps(self) -> list[Record]:
        """The records of its steps."""
        return [record for record in self.records if record.kind == STEP]

    @property
    def evaluations(self) -> list[Record]:
        """The records of its evaluations."""
        return [record for record in self.records if record.kind == EVALUATION and record.split == VALIDATION]

    @property
    def flags(self) -> Mapping[str, Any]:
        """Every flag as it held."""
        return self.settings.get("flags", {})


def report(folders: Sequence[Path]) -> str:
    """The page on the runs in folders."""
    stories = [Story.of(folder) for folder in folders]
    several = len(stories) > 1
    given = list(dict.fromkeys(name for story in stories for name in story.settings.get("given", [])))
    title = " · ".join(story.name for story in stories)
    heads = [story.name for story in stories] if several else [""]
    learned = "".join(
        (f"<h3>{escaped(story.name)}</h3>" if several else "")
        + paragraphs(verdict(story.settings, story.records, story.answers))
        for story in stories
    )
    return page(
        title,
        f"<h1>{escaped(title)}</h1>",
        section("Did it learn?", learned),
        section("Figures", table(heads, rows_of(stories, figures_of))),
        section("The loss", losses_of(stories)),
        section("The learning rate", rates_of(stories)),
        section(*answers_of(stories)),
        section("What was trained on what", table(heads, rows_of(stories, partial(settings_of, given=given)))),
        section("What can be done next", *(commands_of(story, several) for story in stories)),
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_of(stories: Sequence[Story], entries_of: Any) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table with a column for each run; what none of them has is left out."""
    columns = [dict(entries_of(story)) for story in stories]
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = [column.get(name, "") for column in columns]
        if any(cells):
            yield name, cells


def figures_of(story: Story) -> Iterator[tuple[str, str]]:
    """The figures of a run: its losses, and those that evaluate.py gives."""
    steps, evaluations, answers = story.steps, story.evaluations, story.answers
    fall = fall_of([record.loss for record in steps if record.loss == record.loss])
    if fall is not None:
        yield "training loss, first and last steps", f"{fall.before:.4f} → {fall.after:.4f}"
    if evaluations:
        yield "evaluation loss, last", _loss_of(evaluations[-1])
    compared = comparable(evaluations, story.settings)
    if compared:
        yield "evaluation loss, lowest", _loss_of(min(compared, key=lambda record: record.loss))
    before, after = answers.get("before"), answers.get("after")
    if after is not None:
        whose = "held out" if answers["held_out"] else "trained on"
        yield "rows answered", listed_in_ui_language((f"{len(after.results)}", whose))
        for name, key, form in (
            ("right, before and after", "right", "{:.0f}"),
            ("exact match", "exact_match", "{:.1%}"),
            ("ROUGE-L", "rouge_l", "{:.3f}"),
            ("BLEU", "bleu", "{:.1f}"),
            ("loss per token of their labels", "loss", "{:.4f}"),
            ("answers cut off, at about twice their label's length", "cut", "{:.0f}"),
        ):
            values = [form.format(one.measures[key]) for one in (before, after) if one is not None]
            yield name, " → ".join(values)
    if steps:
        yield "time", duration(sum(record.seconds or 0 for record in steps))


def _loss_of(evaluation: Record) -> str:
    return f"{evaluation.loss:.4f} {in_ui_language(f'at step {evaluation.step}')}"


def settings_of(story: Story, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What a run was: its base, its method, its data, the flags that it or a run beside it was given, and its machine."""
    flags, settings = story.flags, story.settings
    starts = settings.get("starts") or [{}]
    started = starts[0].get("time")
    if started:
        yield "started", datetime.datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M")
    yield "base", str(flags.get("from_pretrained", ""))
    yield "method", listed_in_ui_language(_methods(flags))
    for file, data in settings.get("data", {}).items():
        parts = [count_of(data["rows"], "row")] if "rows" in data else []
        parts += [f"{data[key]} {words}" for key, words in (("trained_on", "trained on"), ("held_out", "held out"),
                                                            ("left_out", "left out as bad"), ("cut_labels", "answers cut"))
                  if data.get(key)]  # fmt: skip
        yield file, listed_in_ui_language(parts)
    steps, at_once = settings.get("steps"), settings.get("samples_per_step")
    if steps and at_once:
        done = story.steps[-1].step if story.steps else 0
        yield "steps", in_ui_language(f"{done} of {steps}, {count_of(at_once, 'sample')} each")
    if story.steps and story.steps[-1].epoch:
        yield "epochs", f"{story.steps[-1].epoch:.3g}"
    for name in given:
        value = flags.get(name)
        is_off = name not in settings.get("given", []) and (value is None or value is False or value == [])
        if name not in ("from_pretrained", "train_data", "save", "ui_lang") and not is_off:
            yield flag_names().get(name, f"--{name}"), "✓" if value is True else shown(value)
    machine = starts[-1].get("machine", {})
    cpus = [count_of(machine["cpus"], "CPU")] if machine.get("cpus") else []
    yield "machine", ", ".join(machine.get("gpus") or cpus)
    yield "torch", str(starts[-1].get("versions", {}).get("torch") or "")


def _methods(flags: Mapping[str, Any]) -> Iterator[str]:
    for name, words in (("use_lora", "LoRA"), ("use_qlora", "QLoRA")):
        if flags.get(name):
            layers = flags.get("layer_range") or []
            where = f"layers {' '.join(map(str, layers))}" if layers else "all layers"
            yield f"{words} of rank {flags.get('lora_rank')}, alpha {flags.get('lora_alpha'):g}, in {where}"
    if flags.get("use_ptuning"):
        yield f"P-Tuning of {flags.get('pre_seq_len')} positions"
    if flags.get("train_parts"):
        yield f"{' '.join(flags['train_parts'])} trained too"


# --- curves -----------------------------------------------------------------------------------------------------------


def losses_of(stories: Sequence[Story]) -> str:
    """The curves of all losses, training's with its running mean and the evaluation's."""
    curves = []
    for number, story in enumerate(stories):
        prefix, colour = (f"{story.name}: ", 2 * number) if len(stories) > 1 else ("", 0)
        steps, losses = [record.step for record in story.steps], [record.loss for record in story.steps]
        means, window = running_means(losses)
        curves.append(Curve("", list(zip(steps, losses, strict=True)), colour, pale=True))
        of_training = list(zip(steps, means, strict=True))
        name = in_ui_language(f"training, mean over {count_of(window, 'step')}")
        curves.append(Curve(prefix + name, of_training, colour))
        evaluations = [(record.step, record.loss) for record in story.evaluations]
        if evaluations:
            curves.append(Curve(prefix + in_ui_language("evaluation"), evaluations, colour + 1, dots=True))
    every = [record.loss for story in stories for record in (*story.steps, *story.evaluations)]
    return chart(curves, 260, "loss per token over the steps", top_of_losses(every))


def rates_of(stories: Sequence[Story]) -> str:
    """The curves of the learning rates."""
    curves = [
        Curve(
            story.name if len(stories) > 1 else "",
            [(one.step, one.lr) for one in story.steps if one.lr is not None],
            2 * number,
        )
        for number, story in enumerate(stories)
    ]
    return chart(curves, 110, "learning rate over the steps")


# --- answers ----------------------------------------------------------------------------------------------------------


def answers_of(stories: Sequence[Story]) -> tuple[str, str]:
    """The heading and the rows of the answers, the worst of the first run first."""
    told = [story for story in stories if story.answers.get("after")]
    if not told:
        return "Answers", ""
    kinds = {"Held-out rows" if story.answers["held_out"] else "Rows that were trained on" for story in told}
    heading = (kinds.pop() if len(kinds) == 1 else "Rows") + ", the worst answers first"
    several = len(stories) > 1
    of_row: dict[tuple[str, str, str], list[tuple[str, Result]]] = {}
    for story in told:
        for name in ("before", "after"):
            answered: Answered | None = story.answers.get(name)
            for result in answered.results if answered is not None else ():
                label = in_ui_language(name) + (f", {story.name}" if several else "")
                of_row.setdefault((result.img, result.prompt, result.label), []).append((label, result))
    first = worst_first([result for story in told for result in story.answers["after"].results])
    order = dict.fromkeys((result.img, result.prompt, result.label) for result in first)
    cards = [row_card(of_row[key][0][1], of_row[key]) for key in list(order)[:MOST_ROWS]]
    return heading, "\n".join(cards)


# --- commands ---------------------------------------------------------------------------------------------------------


def commands_of(story: Story, several: bool) -> str:
    """What can be done with the run's checkpoint, as commands to copy."""
    lines = "\n\n".join(f"# {in_ui_language(what)}\n{command}" for what, command in next_commands(story))
    heading = f"<h3>{escaped(story.name)}</h3>" if several else ""
    return f"{heading}<pre>{escaped(lines)}</pre>" if lines else ""


def next_commands(story: Story) -> Iterator[tuple[str, str]]:
    """What a command does, and the command with everything filled in."""
    folder, flags = story.folder, story.flags
    if not (folder / "latest").is_file():
        return
    run = str(folder)
    results = worst_first([*(story.answers["after"].results if story.answers.get("after") else ())])
    image = next((result for result in results if result.img), None)
    about = ["--image", os.path.relpath(image.img), "--query", image.prompt] if image else []
    yield "talk to it", _line("python scripts/cli_demo.py --from_pretrained", run, *about)
    rows = folder / HELD_OUT_FILE
    files = [str(rows)] if rows.is_file() else [*(flags.get("valid_data") or flags.get("train_data") or [])][:1]
    for file in files:
        out = ["--out", str(folder / "evaluation.json"), "--html", str(folder / "evaluation.html")]
        yield (
            "answer and measure every held-out row" if rows.is_file() else "answer and measure every row",
            _line("python scripts/evaluate.py --from_pretrained", run, "--data", file, *out),
        )
    if (flags.get("use_lora") or flags.get("use_qlora")) and not flags.get("use_ptuning"):
        yield "fold LoRA into an ordinary checkpoint", _line("python scripts/merge_lora.py", run, f"{run}-merged")
    longer = (
        ["--epochs", 2 * flags["epochs"]]
        if flags.get("epochs")
        else ["--train-iters", 2 * (story.settings.get("steps") or 1)]
    )
    yield "train on, to twice as many steps", _line("python finetune_visualglm.py --resume", run, *longer)


def _line(start: str, *words: Any) -> str:
    return " ".join([start, *(shlex.quote(str(word)) for word in words)])
