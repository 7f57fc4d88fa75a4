"""Ask a checkpoint the questions of a JSON file, and measure its answers against the labels.

python scripts/evaluate.py --from_pretrained model/tiny --data fewshot-data/heldout.json
torchrun --nproc-per-node 2 scripts/evaluate.py …        the rows shared out between two processes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from os.path import expanduser
from typing import Any, NamedTuple

from model.checkpoints.layout import Checkpoint
from model.checkpoints.whole import is_replaceable, is_same_file, json_text, place_problem, write_whole
from model.chinese import in_ui_language
from model.cli.flag_parser import FlagParser
from model.data.prompt import least_source_length
from model.data.rows import Row, missing_file_problems
from model.data.split import leave_out_bad_images, scan_files
from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer
from model.distributed import done_by_first_process, from_all_processes, is_first_process, model_replica
from model.errors import InputError, command, raise_problems
from model.inference.flags import (
    ROW_LENGTH,
    add_checkpoint_flags,
    add_max_length_flag,
    add_model_parallel_flag,
    add_number_format_flags,
    found_checkpoint,
    loaded,
    max_length_of,
    refuse_uneven_processes,
    with_compared,
)
from model.inference.page import OWN_PAGE
from model.inference.scores import Result, result_of, summary, summary_line, worst_first
from model.progress import in_column, say, show

SHOWN = 3  # rows printed as examples: the worst
SECONDS_BETWEEN_WRITES = 5.0  # of --out
OWN_RESULTS = re.compile(rb'(\[\s*)?[{]\s*"checkpoint":')
SHOWN_MEASURES = (  # by their keys in a summary: their names on the page of --html, and how they are shown
    ("rows", "rows", "{:.0f}"),
    ("right", "right", "{:.0f}"),
    ("exact_match", "exact match", "{:.1%}"),
    ("rouge_l", "ROUGE-L", "{:.3f}"),
    ("bleu", "BLEU", "{:.1f}"),
    ("loss", "loss per token of the labels", "{:.4f}"),
    ("cut", "answers cut off", "{:.0f}"),
    ("shortened", "questions shortened", "{:.0f}"),
)


# --- asking -----------------------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """What is known of a row when it is asked."""

    loss: float  # of the label's tokens, summed
    tokens: int  # how many these are
    room: int  # tokens that its answer may have
    shortened: bool  # the question lost its end, or earlier turns


def results_of(checkpoint: Checkpoint, rows: Sequence[Row], options: argparse.Namespace) -> list[Result]:
    """Answer every row with a checkpoint, --batch-size of them at once. The processes of a launcher share the rows out."""
    from tqdm import tqdm

    from model.inference.batch import answers_as_they_finish
    from model.inference.text import answer_text

    parts = options.model_parallel_size
    model, tokenizer = loaded(checkpoint, options, parts)
    rows = done_by_first_process(lambda: rows)  # it alone has opened the pictures, and left bad ones out
    replica, replicas = model_replica(parts)
    mine = rows[replica::replicas]
    facts: list[Fact] = []
    questions = asked(mine, model, tokenizer, options, facts)
    answers = answers_as_they_finish(questions, model, tokenizer, options.max_length, options.batch_size)
    results: dict[int, Result] = {}
    out = Output(options.out, len(rows))
    silent = not (is_first_process() and sys.stderr.isatty())
    with tqdm(total=len(mine), desc="answering", unit="row", disable=silent) as bar:
        for place, ids in answers:
            row, fact = mine[place], facts[place]
            answer = answer_text(ids, tokenizer, model.asked_as.is_english(row.lang))
            results[replica + place * replicas] = result_of(
                row, answer, fact.loss, fact.tokens, len(ids) >= fact.room, fact.shortened
            )
            bar.update()
            out.note(checkpoint.name, results)
    for of_others in from_all_processes(results):
        results |= of_others
    return [results[number] for number in range(len(rows))]


def asked(
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    facts: list[Fact],
) -> Iterator[Any]:
    """Each row as a question that is asked as the checkpoint was trained; before it is given, its fact is added to facts."""
    import torch

    from model.data.prompt import sample_from_row
    from model.inference.batch import label_losses
    from model.inference.chat import image_tensor
    from model.inference.engine import Question
    from model.inference.seen_images import SeenImages

    seen = SeenImages(model)
    lengths = model.asked_as.lengths(model.image_length, options.max_length)
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        pictures = [image_tensor(row.img, model) for row in batch if row.img is not None]
        features = seen.features(pictures)
        samples = [sample_from_row(row, tokenizer, lengths) for row in batch]
        losses = label_losses(samples, None, model, tokenizer, torch.stack(features) if features else None)
        of_pictures = iter(features)
        for row, sample, loss in zip(batch, samples, losses, strict=True):
            ids = sample.input_ids[: sample.input_ids.index(tokenizer.bos_token_id) + 1]
            shortened = bool(sample.truncated_prompt_tokens or sample.dropped_turns)
            facts.append(Fact(*loss, options.max_length - len(ids), shortened))
            yield Question(
                ids, sample.pre_image, image_features=None if row.img is None else next(of_pictures).unsqueeze(0)
            )


# --- what is written --------------------------------------------------------------------------------------------------


class Output:
    """The file of --out: what is known so far every few seconds, so that a kill loses no more, and in the end all."""

    def __init__(self, path: str | None, rows: int) -> None:
        self.path, self.rows = path, rows
        self._written = -math.inf

    def note(self, checkpoint: str, results: Mapping[int, Result]) -> None:
        """Some rows are answered; write them if it is time."""
        if self.path and len(results) < self.rows and time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            so_far = [asdict(results[number]) for number in sorted(results)]
            self._write(
                {"checkpoint": checkpoint, "unfinished": f"{len(results)} of {self.rows} rows", "results": so_far}
            )

    def write(self, results: Mapping[str, Sequence[Result]], measures: Mapping[str, dict[str, float]]) -> None:
        """Write the measures and results of every checkpoint."""
        report = [
            {"checkpoint": checkpoint, **measures[checkpoint], "results": [asdict(result) for result in of_checkpoint]}
            for checkpoint, of_checkpoint in results.items()
        ]
        self._write(report if len(report) > 1 else report[0])

    def _write(self, content: Any) -> None:
        if self.path and is_first_process():
            text = json_text(content, 1) + "\n"
            written(self.path, text, "--out")
            self._written = time.monotonic()


def written(path: str, text: str, flag: str) -> None:
    """Write a file, whole or not at all.

    Raises:
        InputError: it can't be written.
    """
    try:
        write_whole(Path(path), lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise InputError(f"{flag} {path}: can't be written ({error.strerror}); another place is needed.") from error


def place_problems(options: argparse.Namespace) -> list[str]:
    """Why the files of --out and --html can't be written, as far as their places tell now."""
    problems = []
    for flag, path, own in (("--out", options.out, OWN_RESULTS), ("--html", options.html, OWN_PAGE)):
        if not path:
            continue
        if problem := place_problem(path):
            problems.append(f"{flag} {path}: {problem}")
        elif is_same_file(path, options.data):
            problems.append(f"{flag} {path}: the same file as --data; another one is needed.")
        elif not is_replaceable(Path(path), own):
            problems.append(f"{flag} {path}: there is such a file, and not of evaluate.py; another name is needed.")
    if options.out and options.html and is_same_file(options.out, options.html):
        problems.append(f"--html {options.html}: the same file as --out; another one is needed.")
    return problems


def page_of(results: Mapping[str, Sequence[Result]], measures: Mapping[str, dict[str, float]]) -> str:
    """The page of --html: the measures, and every row with its answers, the worst of the first checkpoint first."""
    from model.inference.page import escaped, page, row_card, section, table

    first = next(iter(results.values()))
    names = list(results) if len(results) > 1 else [in_ui_language("answer")]
    figures = [(words, [form.format(one[key]) for one in measures.values()]) for key, words, form in SHOWN_MEASURES]
    cards = [
        row_card(first[number], [(name, of[number]) for name, of in zip(names, results.values(), strict=True)])
        for number in worst_places(first)
    ]
    title = " · ".join(results)
    return page(
        title,
        f"<h1>{escaped(title)}</h1>",
        section("Figures", table(list(results), figures)),
        section("The rows, the worst answers first", *cards),
    )


def worst_places(results: Sequence[Result]) -> list[int]:
    """Where the rows stand in results, the worst first."""
    place = {id(result): number for number, result in enumerate(results)}
    return [place[id(result)] for result in worst_first(results)]


# --- the command ------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    # fmt: off
    add("--compare", metavar="OTHER", help="a second checkpoint, to be put beside the first")
    add("--data", type=expanduser, required=True, metavar="ROWS.json", help='rows of "img", "prompt" and "label"')
    add("--image_folder", type=expanduser, metavar="FOLDER", help="where the pictures of relative paths are")
    add("--bad_rows", default="error", choices=["error", "skip"],
        help="what to do about rows that can't be used: name them and stop, or leave them out (default %(default)s)")
    add("--out", type=expanduser, metavar="RESULTS.json",
        help="write the measures and every row's answer there, what is known as it goes")
    add("--html", type=expanduser, metavar="PAGE.html",
        help="write a page with every row, its picture and its answers, the worst first")
    add("--batch-size", type=int, default=16, metavar="N", help="questions asked at once (default %(default)s)")
    add_max_length_flag(parser, "question and answer together", ROW_LENGTH)
    add("--full_width", action="store_true", help="answer without --quant too, in --dtype auto, and put both side by side")
    # fmt: on
    add_model_parallel_flag(parser)
    add_number_format_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("evaluate.py"):
        evaluate(command_line().parse_args(argv))


def evaluate(options: argparse.Namespace) -> None:
    """Answer every row, print the measures, and write them down if asked; the last line counts the right answers."""
    check(options)
    checkpoints = with_compared(found_checkpoint(options), options)
    options.max_length = max_length_of(options, checkpoints, ROW_LENGTH)
    rows = usable_rows(options)
    refuse_no_room(options, checkpoints[0], rows)
    results = {checkpoint.name: results_of(checkpoint, rows, options) for checkpoint in checkpoints}
    if options.full_width:
        full_width = argparse.Namespace(**{**vars(options), "dtype": "auto", "quant": None})
        results[f"{checkpoints[0].name} in full width"] = results_of(checkpoints[0], rows, full_width)
    measures = {checkpoint: summary(of_checkpoint) for checkpoint, of_checkpoint in results.items()}
    Output(options.out, len(rows)).write(results, measures)
    if options.html and is_first_process():
        written(options.html, page_of(results, measures), "--html")
    for number in worst_places(next(iter(results.values())))[:SHOWN]:
        show(row_in_words(rows[number], {name: of[number].answer for name, of in results.items()}))
    for checkpoint, measured in measures.items():
        heading = f"{checkpoint}\n  right {measured['right']}/{len(rows)}, " if len(results) > 1 else ""
        say(heading + summary_line(measured))
        if measured["cut"]:
            one = f"1 answer was cut off (--max_length {options.max_length})."
            many = f"{measured['cut']:.0f} answers were cut off (--max_length {options.max_length})."
            say(one if measured["cut"] == 1 else many)
    for note in shortened_notes(checkpoints, measures, options.max_length):
        say(note)
    if len(results) > 1:
        say(comparison(*results.values()))
    say(f"answers right: {measures[checkpoints[0].name]['right']}/{len(rows)}")


def row_in_words(row: Row, answers: Mapping[str, str]) -> str:
    """A row and the answers by their checkpoints. Only the words before the texts are in the language of the user."""
    lines = [
        row.img or "(no picture)",
        f"  {in_column('asked', 7)}{row.prompt}",
        f"  {in_column('label', 7)}{row.label}",
    ]
    for checkpoint, answer in answers.items():
        source = f"  ({checkpoint})" if len(answers) > 1 else ""
        lines.append(f"  {in_column('answer', 7)}{answer}{source}")
    return "\n".join(lines)


def shortened_notes(
    checkpoints: Sequence[Checkpoint], measures: Mapping[str, dict[str, float]], max_length: int
) -> Iterator[str]:
    """How many questions lost their end or earlier turns, and what they were bound by, a sentence for each checkpoint."""
    for checkpoint in checkpoints:
        measured, known = measures[checkpoint.name], checkpoint.asked_as.max_source_length
        count, rows = int(measured["shortened"]), int(measured["rows"])
        if count:
            note = (
                f"Shortened to --max_length {max_length}: {count} of {rows} questions; predict.py, cli_demo.py and the servers "
                "refuse what doesn't fit."
                if known is None
                else f"Shortened as in training, to --max_source_length {known}: {count} of {rows} questions; predict.py, "
                "cli_demo.py and the servers ask them whole."
            )
            yield f"{checkpoint.name}: {note}" if len(checkpoints) > 1 else note


def usable_rows(options: argparse.Namespace) -> list[Row]:
    """The rows of --data, without bad ones where --bad_rows is skip, which are named.

    Raises:
        InputError: the file can't be used, or there are bad rows and they are not to be left out.
    """
    selection, problems = scan_files([options.data], options.bad_rows, options.image_folder)
    for note in leave_out_bad_images(selection, problems, options.bad_rows, math.inf):
        say(note)
    left_out = set(selection.left_out.get(options.data, ()))
    return [row for number, row in enumerate(selection.rows[options.data]) if number not in left_out]


def refuse_no_room(options: argparse.Namespace, checkpoint: Checkpoint, rows: Sequence[Row]) -> None:
    """Raise an error where --max_length leaves no room for a question beside a picture.

    Raises:
        InputError: as said.
    """
    if not any(row.img for row in rows):
        return
    slots = checkpoint.config.get("image_length", 0)
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder, options.tokenizer))
    least = least_source_length(tokenizer, slots)
    if options.max_length < least:
        raise InputError(
            f"--max_length {options.max_length}: no room for a question beside {slots} image tokens; at least {least} are "
            "needed."
        )


def check(options: argparse.Namespace) -> None:
    """Check the flags against each other.

    Raises:
        InputError: one is out of bounds, or contradicts another.
    """
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: 1 or more is needed.")
    if options.full_width and (options.compare or not is_narrow(options)):
        raise InputError("--full_width: --quant or --dtype is needed with it, and no --compare.")
    refuse_uneven_processes(options.model_parallel_size)
    raise_problems(place_problems(options))
    raise_problems(missing_file_problems([options.data]))  # before a checkpoint is downloaded


def is_narrow(options: argparse.Namespace) -> bool:
    """Whether --dtype or --quant asks for another number format than the one that is taken without them."""
    return options.quant is not None or options.dtype != "auto"


def comparison(first: Sequence[Result], second: Sequence[Result]) -> str:
    """One line on the rows that only one of two checkpoints answered right."""
    pairs = list(zip(first, second, strict=True))
    only_first = sum(one.right and not other.right for one, other in pairs)
    only_second = sum(other.right and not one.right for one, other in pairs)
    return f"right in the first only: {only_first}, in the second only: {only_second}"


if __name__ == "__main__":
    main()
