"""Ask a checkpoint the questions of a JSON file, and measure its answers against the labels.

python scripts/evaluate.py --from_pretrained model/tiny --data fewshot-data/heldout.json
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import answer_length
from model.data.image_check import check_images
from model.data.rows import Row, read_rows
from model.hub import at_revision
from model.inference.flags import add_number_format_flags
from model.inference.scores import Result, result_of, summary, summary_line
from model.progress import say

DEFAULT_LENGTH = 512  # tokens of question and answer together
SHOWN = 3  # rows printed as examples


# --- asking -----------------------------------------------------------------------------------------------------------


def results_of(checkpoint: Checkpoint, rows: Sequence[Row], options: argparse.Namespace) -> list[Result]:
    """Answer every row with a checkpoint, --batch-size of them at once."""
    from tqdm import tqdm

    from model.inference.batch import answers_as_they_finish
    from model.inference.load import load_for_answering
    from model.inference.text import answer_text

    model, tokenizer = load_for_answering(
        checkpoint, options.tokenizer, options.base, options.force_base, options.quant, options.dtype
    )
    losses: list[tuple[float, int]] = []
    rooms: list[int] = []
    questions = asked(rows, model, tokenizer, options, losses, rooms)
    answers = answers_as_they_finish(questions, model, tokenizer, options.max_length, options.batch_size)
    results: dict[int, Result] = {}
    with tqdm(total=len(rows), desc="answering", unit="row", disable=not sys.stderr.isatty()) as bar:
        for number, ids in answers:
            row = rows[number]
            answer = answer_text(ids, tokenizer, (row.lang or model.asked_as.lang) == "en")
            results[number] = result_of(row, answer, *losses[number], len(ids) >= rooms[number])
            bar.update()
    return [results[number] for number in range(len(rows))]


def asked(
    rows: Sequence[Row],
    model: Any,
    tokenizer: Any,
    options: argparse.Namespace,
    losses: list[tuple[float, int]],
    rooms: list[int],
) -> Iterator[Any]:
    """Each row as a question that is asked as the checkpoint was trained.

    Before it is given, the loss of its label is added to losses, and to rooms how many tokens its answer may have.
    """
    import torch

    from model.data.prompt import sample_from_row
    from model.inference.batch import label_losses
    from model.inference.chat import image_tensor
    from model.inference.engine import Question, image_features

    lengths = model.asked_as.lengths(model.image_length, options.max_length)
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        pictures = [image_tensor(row.img, model) for row in batch if row.img is not None]
        features = image_features(torch.cat(pictures), model) if pictures else None
        samples = [sample_from_row(row, tokenizer, lengths) for row in batch]
        losses += label_losses(samples, None, model, tokenizer, features)
        of_pictures = iter([] if features is None else features.split(1))
        for row, sample in zip(batch, samples, strict=True):
            ids = sample.input_ids[: sample.input_ids.index(tokenizer.bos_token_id) + 1]
            rooms.append(options.max_length - len(ids))
            yield Question(ids, sample.pre_image, image_features=None if row.img is None else next(of_pictures))


# --- the command ------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--from_pretrained", required=True, metavar="CHECKPOINT",
        help="a checkpoint of any kind: a folder, a part of it, a name in $SAT_HOME, or OWNER/NAME of the Hugging Face hub")
    add("--revision", metavar="NAME", help="branch, tag or commit of the hub's checkpoint")
    add("--compare", metavar="OTHER", help="a second checkpoint, to be put beside the first")
    add("--data", required=True, metavar="ROWS.json", help='rows of "img", "prompt" and "label"')
    add("--image_folder", metavar="FOLDER", help="where the pictures of relative paths are")
    add("--out", metavar="RESULTS.json", help="write the measures and every row's answer there")
    add("--base", metavar="NAME_OR_FOLDER", help="an adapter's base, if it has been moved")
    add("--force_base", action="store_true", help="take --base although the adapter was trained on other weights")
    add("--tokenizer", metavar="PATH", help="ice_text.model, where the checkpoint has none")
    add("--batch-size", type=int, default=16, metavar="N", help="questions asked at once (default %(default)s)")
    add("--max_length", type=int, metavar="N",
        help="tokens of question and answer together (default 512, or as many as a smaller model takes)")
    add("--full_width", action="store_true", help="answer without --quant too, in --dtype auto, and put both side by side")
    # fmt: on
    add_number_format_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("evaluate.py"):
        evaluate(command_line().parse_args(argv))


def evaluate(options: argparse.Namespace) -> None:
    """Answer every row, print the measures, and write them down if asked; the last line counts the right answers."""
    check(options)
    checkpoints = [Checkpoint.find(at_revision(options.from_pretrained, options.revision))]
    if options.compare:
        checkpoints.append(Checkpoint.find(options.compare, "--compare"))
    positions = min(checkpoint.config.get("max_sequence_length", DEFAULT_LENGTH) for checkpoint in checkpoints)
    options.max_length = answer_length(positions, options.max_length, DEFAULT_LENGTH)
    rows = read_rows(options.data, options.image_folder)
    if not rows:
        raise InputError(f"{options.data}: no rows in it; one or more are needed.")
    check_images(rows)
    results = {checkpoint.name: results_of(checkpoint, rows, options) for checkpoint in checkpoints}
    if options.full_width:
        full_width = argparse.Namespace(**{**vars(options), "dtype": "auto", "quant": None})
        results[f"{checkpoints[0].name} in full width"] = results_of(checkpoints[0], rows, full_width)
    measures = {checkpoint: summary(of_checkpoint) for checkpoint, of_checkpoint in results.items()}
    if options.out:
        report = [
            {"checkpoint": checkpoint, **measures[checkpoint], "results": [asdict(result) for result in of_checkpoint]}
            for checkpoint, of_checkpoint in results.items()
        ]
        text = json.dumps(report if len(report) > 1 else report[0], ensure_ascii=False, indent=1)
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    for number, row in enumerate(rows[:SHOWN]):
        say(f"{row.img}\n  asked  {row.prompt}\n  label  {row.label}")
        for checkpoint, of_checkpoint in results.items():
            source = f"  ({checkpoint})" if len(results) > 1 else ""
            say(f"  answer {of_checkpoint[number].answer}{source}")
    for checkpoint, measured in measures.items():
        heading = f"{checkpoint}\n  right {measured['right']}/{len(rows)}, " if len(results) > 1 else ""
        say(heading + summary_line(measured))
    if len(results) > 1:
        say(comparison(*results.values()))
    say(f"answers right: {measures[checkpoints[0].name]['right']}/{len(rows)}")


def check(options: argparse.Namespace) -> None:
    """Check the flags against each other.

    Raises:
        InputError: one is out of bounds, or contradicts another.
    """
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: 1 or more is needed.")
    if options.compare == options.from_pretrained:
        raise InputError(f"--compare {options.compare}: the same as --from_pretrained; another checkpoint is needed.")
    if options.full_width and (options.compare or not is_narrow(options)):
        raise InputError("--full_width: --quant or --dtype is needed with it, and no --compare.")


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
