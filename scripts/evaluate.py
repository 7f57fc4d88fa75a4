"""Ask a checkpoint the questions of a JSON file, and measure its answers against the labels.

python scripts/evaluate.py --from_pretrained model/tiny --data fewshot-data/heldout.json
torchrun --nproc-per-node 2 scripts/evaluate.py …        the rows shared out between two processes
"""

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from model.distributed import from_all_processes, is_first_process, world_size
from model.inference.flags import add_checkpoint_flags, add_number_format_flags, found_checkpoint
from model.progress import say

DEFAULT_LENGTH = 512  # tokens of question and answer together
SHOWN = 3  # rows printed as examples


@dataclass(frozen=True)
class Result:
    """One row and what a checkpoint made of it. loss is the mean over the label's tokens, in nats."""

    img: str
    prompt: str
    label: str
    answer: str
    right: bool
    exact: bool
    rouge_l: float
    loss: float
    tokens: int


# --- measures ---------------------------------------------------------------------------------------------------------


def without_punctuation(text: str) -> str:
    """Letters, digits and Chinese characters of text, in lower case: what must be equal for an answer to be right."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PZCS")


def rouge_l(answer: str, label: str) -> float:
    """Character ROUGE-L (Lin 2004), 0 to 1: F1 of the longest common subsequence; spaces and case don't count."""
    from rapidfuzz.distance import LCSseq

    answer, label = ("".join(text.lower().split()) for text in (answer, label))
    if not answer or not label:
        return float(answer == label)
    return 2 * LCSseq.similarity(answer, label) / (len(answer) + len(label))


def bleu(results: Sequence[Result]) -> float:
    """Corpus BLEU, 0 to 100, of sacrebleu's "zh": Chinese by characters, other scripts by words."""
    import sacrebleu

    answers, labels = [result.answer for result in results], [result.label for result in results]
    return float(sacrebleu.corpus_bleu(answers, [labels], tokenize="zh").score)


def summary(results: Sequence[Result]) -> dict[str, float]:
    """The measures of all rows together. loss is the mean over all labels' tokens."""
    count, tokens = len(results), sum(result.tokens for result in results)
    return {
        "rows": count,
        "right": sum(result.right for result in results),
        "exact_match": sum(result.exact for result in results) / count,
        "rouge_l": sum(result.rouge_l for result in results) / count,
        "bleu": bleu(results),
        "loss": sum(result.loss * result.tokens for result in results) / max(1, tokens),
    }


def summary_line(measures: dict[str, float]) -> str:
    """The measures as they are printed."""
    return (
        f"exact match {measures['exact_match']:.1%}, ROUGE-L {measures['rouge_l']:.3f}, BLEU {measures['bleu']:.1f}, "
        f"loss per token {measures['loss']:.4f}"
    )


# --- asking -----------------------------------------------------------------------------------------------------------


def results_of(checkpoint: Checkpoint, rows: Sequence[Row], options: argparse.Namespace) -> list[Result]:
    """Answer every row with a checkpoint, --batch-size of them at once. The processes of a launcher share the rows out."""
    from tqdm import tqdm

    from model.inference.batch import answers_as_they_finish
    from model.inference.load import load_for_answering
    from model.inference.text import answer_text

    parts = options.model_parallel_size
    model, tokenizer = load_for_answering(
        checkpoint, options.tokenizer, options.base, options.force_base, options.quant, options.dtype, parts
    )
    process, processes = int(os.environ.get("RANK", "0")) // parts, world_size() // parts
    mine = rows[process::processes]
    losses: list[tuple[float, int]] = []
    questions = asked(mine, model, tokenizer, options, losses)
    answers = answers_as_they_finish(questions, model, tokenizer, options.max_length, options.batch_size)
    results: dict[int, Result] = {}
    silent = not (is_first_process() and sys.stderr.isatty())
    with tqdm(total=len(mine), desc="answering", unit="row", disable=silent) as bar:
        for place, ids in answers:
            row = mine[place]
            answer = answer_text(ids, tokenizer, row.lang == "en")
            results[process + place * processes] = result_of(row, answer, *losses[place])
            bar.update()
    for of_others in from_all_processes(results):
        results |= of_others
    return [results[number] for number in range(len(rows))]


def asked(
    rows: Sequence[Row], model: Any, tokenizer: Any, options: argparse.Namespace, losses: list[tuple[float, int]]
) -> Iterator[Any]:
    """Each row as a question that is asked as in training; the loss of its label is added to losses before."""
    import torch

    from model.data.prompt import Lengths, context_ids, sample_from_row
    from model.inference.batch import label_losses
    from model.inference.chat import image_tensor
    from model.inference.engine import Question, image_features

    lengths = Lengths(model.image_length, options.max_length, options.max_length)
    for start in range(0, len(rows), options.batch_size):
        batch = rows[start : start + options.batch_size]
        pictures = [image_tensor(row.img, model) for row in batch if row.img is not None]
        features = image_features(torch.cat(pictures), model) if pictures else None
        samples = [sample_from_row(row, tokenizer, lengths) for row in batch]
        losses += label_losses(samples, None, model, tokenizer, features)
        of_pictures = iter([] if features is None else features.split(1))
        for row in batch:
            ids, pre_image = context_ids(
                row.prompt, row.history, row.img is not None, tokenizer, model.image_length, row.lang == "en"
            )
            yield Question(ids, pre_image, image_features=None if row.img is None else next(of_pictures))


def result_of(row: Row, answer: str, loss: float, tokens: int) -> Result:
    """What is to be said of one row's answer, and of the loss of its label in all its tokens."""
    right = without_punctuation(answer) == without_punctuation(row.label)
    exact = answer.strip() == row.label.strip()
    similarity = rouge_l(answer, row.label)
    return Result(row.img or "", row.prompt, row.label, answer, right, exact, similarity, loss / max(1, tokens), tokens)


# --- the command ------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    # fmt: off
    add("--compare", metavar="OTHER", help="a second checkpoint, to be put beside the first")
    add("--data", required=True, metavar="ROWS.json", help='rows of "img", "prompt" and "label"')
    add("--image_folder", metavar="FOLDER", help="where the pictures of relative paths are")
    add("--out", metavar="RESULTS.json", help="write the measures and every row's answer there")
    add("--batch-size", type=int, default=16, metavar="N", help="questions asked at once (default %(default)s)")
    add("--max_length", type=int, metavar="N",
        help="tokens of question and answer together (default 512, or as many as a smaller model takes)")
    add("--full_width", action="store_true", help="answer without --quant too, in --dtype auto, and put both side by side")
    add("--model-parallel-size", type=int, default=1, metavar="N",
        help="processes that share a model, of those that a launcher started (default %(default)s)")
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
    checkpoints = [found_checkpoint(options)]
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
    if options.out and is_first_process():
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
    parts = options.model_parallel_size
    if parts < 1 or world_size() % parts:
        raise InputError(f"--model-parallel-size {parts}: {world_size()} processes found; a divisor of them is needed.")


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
