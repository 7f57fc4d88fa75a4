"""Check data files before a long run: bad rows and pictures, lengths, repetitions, overlaps.

    python scripts/check_data.py rows.json
    python scripts/check_data.py rows.json --valid heldout.json --from_pretrained model/tiny --max_source_length 64
    python scripts/check_data.py rows.json --json

Exit status: 0 when all is well, 1 when something is wrong (bad rows or pictures, or rows for evaluation that are also
trained on), 2 when a file can't be used at all. What the lengths would cut is reported; it is not an error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import hashlib
import json
import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import chain
from os.path import expanduser
from typing import Any

from model.checkpoints.layout import Checkpoint
from model.cli.flag_checks import frame_problems
from model.cli.flag_parser import FlagParser
from model.cli.options import length_or_auto
from model.data.bad_rows import all_listed, by_cause
from model.data.image_check import CheckedImages
from model.data.images import checked_file, open_image
from model.data.lengths import auto_lengths, bounded_length, bytes_note, count_truncations, needed_lengths, turn_lengths
from model.data.prompt import Lengths
from model.data.rows import Row, Rows, missing_file_problems, scan_rows
from model.data.split import digest_of, row_digest
from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer
from model.errors import InputError, command, raise_problems
from model.progress import count_of, say, with_progress

TYPICAL_BATCH = 4  # samples: the default of --batch-size
# Without a checkpoint, those of the 6B: tokens of a picture, and of a sample.
TYPICAL_IMAGE_LENGTH, TYPICAL_POSITIONS = 32, 2048
BARS = 8  # lines of a histogram
BAR_WIDTH = 40  # characters


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        foreign_flags={"--train-data": "the FILE alone"},
    )  # fmt: skip
    parser.add_argument(
        "train", nargs="+", type=expanduser, metavar="FILE", help="JSON or JSON Lines files of rows to train on"
    )
    parser.add_argument(
        "--valid",
        "--valid-data",
        nargs="+",
        type=expanduser,
        default=[],
        metavar="FILE",
        help="files of rows to evaluate on",
    )
    parser.add_argument(
        "--image_folder", type=expanduser, metavar="FOLDER", help="where the pictures of relative paths are"
    )
    parser.add_argument("--from_pretrained", metavar="CHECKPOINT", help="whose tokenizer and sizes count the tokens")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="ice_text.model, where no checkpoint is given or it has none"
    )
    for part, tokens in (("source", 64), ("target", 256)):
        parser.add_argument(
            f"--max_{part}_length", type=length_or_auto, default=tokens, metavar="N|auto",
            help="to say what it would cut; auto takes what the data needs, as in training (default %(default)s)",
        )  # fmt: skip
    parser.add_argument("--source_prefix", default="", help="text put before every prompt (default: none)")
    parser.add_argument("--lang", default="zh", choices=["zh", "en"], help="of rows that don't say (default zh)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command, and leave with its exit status; `model.errors` lists those besides its own."""
    with command("check_data.py"):
        options = command_line().parse_args(argv)
        report = data_report(options)
        say(json.dumps(report, ensure_ascii=False, indent=1) if options.json else "\n".join(report_lines(report)))
        sys.exit(1 if report["wrong"] else 0)


# --- what is found ----------------------------------------------------------------------------------------------------


def data_report(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the text output tells, as values for JSON.

    Raises:
        InputError: a file can't be used as a whole, no tokenizer is where it was said to be, or lengths leave no room.
    """
    files = list(dict.fromkeys([*options.train, *options.valid]))
    raise_problems(missing_file_problems(files))  # before a checkpoint is downloaded
    tokenizer, config = _tokenizer(options)
    image_length = config.get("image_length", TYPICAL_IMAGE_LENGTH)
    if tokenizer is not None:
        raise_problems(frame_problems(options, tokenizer, image_length))
    scanned = {file: scan_rows(file, options.image_folder) for file in files}
    rows = {file: good for file, (good, _) in scanned.items()}
    facts = image_facts(rows.values(), max(1, options.workers))
    problems = {
        file: [*bad, *(f"{row.where}: {problem}" for row in rows[file] if (problem := _image_problem(row, facts)))]
        for file, (_, bad) in scanned.items()
    }
    overlap = overlaps([rows[file] for file in options.train], [rows[file] for file in options.valid], facts)
    report: dict[str, Any] = {
        "files": [
            {
                "file": file,
                "rows": len(good) + len(scanned[file][1]),
                "samples": sum(good.turns),
                "without_picture": sum(row.img is None for row in good),
                "problems": problems[file],
            }
            for file, good in rows.items()
        ],
        "pictures": image_summary(facts),
        "repeated": repetitions(rows.values()),
        "overlap": overlap,
        "tokens": None,
    }
    if tokenizer is not None:
        unsettled = Lengths(image_length, 0, 0, options.source_prefix, lang=options.lang)
        limit = config.get("max_sequence_length", TYPICAL_POSITIONS)
        source, target = auto_lengths(
            rows, tokenizer, unsettled, options.max_source_length, options.max_target_length, limit
        )
        lengths = replace(unsettled, max_source_length=source, max_target_length=target)
        positions = config.get("max_sequence_length")
        report["tokens"] = {**token_report(rows.values(), tokenizer, lengths), "positions": positions}
    report["problems"] = sum(map(len, problems.values()))
    report["wrong"] = bool(report["problems"] or (overlap and overlap["rows"]))
    return report


def image_facts(all_rows: Iterable[Rows], workers: int) -> dict[str, dict[str, Any]]:
    """For every image by its path: its "problem", or its "size" and a "digest" of its content. All are opened."""
    paths = list(dict.fromkeys(row.img for rows in all_rows for row in rows if row.img is not None))
    memory = CheckedImages()
    found: dict[str, dict[str, Any]] = {}
    for path, fact in with_progress(_facts(paths, workers), len(paths), "Opening pictures"):
        found[path] = fact
        if "problem" not in fact:
            memory.add(path)
    memory.write()
    return found


def _facts(paths: list[str], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if workers == 1 or len(paths) < 100:
        yield from ((path, image_fact(path)) for path in paths)
        return
    try:
        with ProcessPoolExecutor(workers) as pool:
            yield from zip(paths, pool.map(image_fact, paths, chunksize=16), strict=True)
    except BrokenProcessPool as error:
        raise InputError(
            "A process that opened pictures died (no memory left?); --workers 1 is needed to find out which picture it was."
        ) from error


def image_fact(path: str) -> dict[str, Any]:
    """One image's "problem", or its "size" in pixels and the "digest" of its bytes."""
    try:
        checked_file(path)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        return {"size": open_image(path).size, "digest": digest}
    except InputError as problem:
        return {"problem": str(problem)}
    except OSError as error:
        return {"problem": f"{path} can't be read ({error.strerror}); a picture is needed."}


def _image_problem(row: Row, facts: dict[str, dict[str, Any]]) -> str | None:
    return None if row.img is None else facts[row.img].get("problem")


def image_summary(facts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many images there are, how many are bad, how many equal another under another name, and their sizes."""
    good = [fact for fact in facts.values() if "problem" not in fact]
    sizes = sorted(fact["size"] for fact in good)
    by_edge = sorted(sizes, key=lambda size: size[0] * size[1])
    return {
        "distinct": len(facts),
        "bad": len(facts) - len(good),
        "same_content": len(good) - len({fact["digest"] for fact in good}),
        "smallest": by_edge[0] if good else None,
        "middle": by_edge[len(good) // 2] if good else None,
        "largest": by_edge[-1] if good else None,
    }


def repetitions(all_rows: Iterable[Rows]) -> dict[str, int]:
    """How many rows repeat an earlier row, of any file, and how many ask the same question but have another answer."""
    same = other_answer = 0
    answers: dict[bytes, bytes] = {}
    for row in chain.from_iterable(all_rows):
        question, answer = digest_of(row.img, row.prompt, row.history), digest_of(row.label)
        first = answers.setdefault(question, answer)
        same += first == answer
        other_answer += first != answer
    return {"rows": same - len(answers), "same_question_other_answer": other_answer}


def overlaps(train: list[Rows], valid: list[Rows], facts: dict[str, dict[str, Any]]) -> dict[str, int] | None:
    """How many rows to evaluate on are also trained on, and how many share a prompt or an image with a trained one.

    None if there are no rows to evaluate on.
    """
    if not valid:
        return None

    def keys(row: Row) -> tuple[bytes, bytes, str | None]:
        picture = facts[row.img].get("digest", row.img) if row.img is not None else None
        return row_digest(row, picture), digest_of(row.prompt), picture

    seen: tuple[set[Any], ...] = set(), set(), set()
    for rows in train:
        for row in rows:
            for known, key in zip(seen, keys(row), strict=True):
                known.add(key)
    shared = [0, 0, 0]
    for rows in valid:
        for row in rows:
            for place, (known, key) in enumerate(zip(seen, keys(row), strict=True)):
                shared[place] += key is not None and key in known
    return {"rows": shared[0], "prompts": shared[1], "pictures": shared[2], "of": sum(map(len, valid))}


def _tokenizer(options: argparse.Namespace) -> tuple[ChatGLMTokenizer | None, Mapping[str, Any]]:
    """The tokenizer, or None if none was named, and the checkpoint's config, empty without one."""
    if options.from_pretrained is None and options.tokenizer is None:
        return None, {}
    checkpoint = Checkpoint.find(options.from_pretrained) if options.from_pretrained else None
    folder = checkpoint.folder if checkpoint else None
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(folder, options.tokenizer))
    return tokenizer, checkpoint.config if checkpoint else {}


def token_report(all_rows: Collection[Rows], tokenizer: ChatGLMTokenizer, lengths: Lengths) -> dict[str, Any]:
    """How many tokens sources and targets have, and what lengths truncate; see `model.data.lengths`."""

    def rows() -> Iterator[Row]:
        return chain.from_iterable(all_rows)

    turns = list(turn_lengths(rows(), tokenizer, lengths))
    truncated = count_truncations(rows(), tokenizer, lengths)
    source, target = needed_lengths(rows(), tokenizer, lengths) if turns else (0, 0)
    return {
        "source": _distribution([source for source, _ in turns]),
        "target": _distribution([target for _, target in turns]),
        "lengths": {"max_source_length": lengths.max_source_length, "max_target_length": lengths.max_target_length},
        "cut": {"prompts": truncated.prompts, "labels": truncated.labels, "histories": truncated.histories},
        "bytes": bytes_note(rows(), tokenizer, truncated),
        "cuts_nothing": {"max_source_length": source, "max_target_length": target},
        "padding": padding_shares([bounded_length(source, target, lengths) for source, target in turns]),
    }


def padding_shares(lengths: list[int]) -> dict[str, float]:
    """How much of batches of TYPICAL_BATCH samples is padding, from 0 to 1: in random order, and sorted by length."""
    drawn = random.Random(0).sample(lengths, len(lengths))

    def share(ordered: list[int]) -> float:
        batches = [ordered[start : start + TYPICAL_BATCH] for start in range(0, len(ordered), TYPICAL_BATCH)]
        positions = sum(len(batch) * max(batch) for batch in batches)
        return 1 - sum(ordered) / positions if positions else 0.0

    return {"by_chance": share(drawn), "group_by_length": share(sorted(lengths))}


def _distribution(counts: list[int]) -> dict[str, Any]:
    """Smallest, median, 95th percentile and largest of counts, and how many counts are in each of BARS ranges.

    "up_to" gives the number in each range, by the range's last count.
    """
    if not counts:
        return {"least": 0, "middle": 0, "most_of_95_percent": 0, "most": 0, "up_to": {}}
    ordered = sorted(counts)
    step = max(1, -(-(ordered[-1] - ordered[0] + 1) // BARS))
    bounds = [min(ordered[-1], ordered[0] + step * (bar + 1) - 1) for bar in range(BARS)]
    up_to = dict.fromkeys(bounds, 0)
    for count in counts:
        up_to[bounds[(count - ordered[0]) // step]] += 1
    return {
        "least": ordered[0],
        "middle": ordered[len(ordered) // 2],
        "most_of_95_percent": ordered[int(0.95 * (len(ordered) - 1))],
        "most": ordered[-1],
        "up_to": up_to,
    }


# --- how it is told ---------------------------------------------------------------------------------------------------


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as text, a summary in its last line."""
    lines, told = [], 0
    problems: list[str] = []
    for file in report["files"]:
        turns = f", {file['samples']} samples (one for every turn)" if file["samples"] > file["rows"] else ""
        without = f", {file['without_picture']} without a picture" if file["without_picture"] else ""
        lines.append(f"{file['file']}: {count_of(file['rows'], 'row')}{turns}{without}, {len(file['problems'])} bad")
        of_file = by_cause(file["problems"])
        lines += [f"  {problem}" for problem in of_file]
        problems, told = problems + file["problems"], told + len(of_file)
    if told < len(problems):
        lines.append(f"{len(problems)} bad rows; {all_listed(problems)}.")
    pictures = report["pictures"]
    lines.append(
        f"pictures: {pictures['distinct']}, {pictures['bad']} bad, {pictures['same_content']} the same as another under"
        " another name"
    )
    if pictures["smallest"]:
        sizes = " / ".join("×".join(map(str, pictures[name])) for name in ("smallest", "middle", "largest"))
        lines.append(f"  smallest / middle / largest: {sizes} pixels")
    repeated = report["repeated"]
    lines.append(
        f"repeated rows: {repeated['rows']}; the same question answered otherwise:"
        f" {repeated['same_question_other_answer']}"
    )
    overlap = report["overlap"]
    if overlap:
        lines.append(
            f"evaluation: of {overlap['of']} rows, {overlap['rows']} are also trained on, {overlap['pictures']} have a"
            f" picture and {overlap['prompts']} a prompt that is"
        )
    lines += _token_lines(report["tokens"])
    wrong = [count_of(report["problems"], "bad row")] if report["problems"] else []
    wrong += (
        [f"{count_of(overlap['rows'], 'row')} both trained and evaluated on"] if overlap and overlap["rows"] else []
    )
    tokens = report["tokens"]
    wrong += ["texts that are cut"] if tokens and any(tokens["cut"].values()) else []
    wrong += ["characters without a token"] if tokens and tokens["bytes"] else []
    rows = sum(file["rows"] for file in report["files"])
    return [*lines, f"{count_of(rows, 'row')}: " + (", ".join(wrong) if wrong else "all is well") + "."]


def _token_lines(tokens: dict[str, Any] | None) -> list[str]:
    if tokens is None:
        return ["token lengths: not counted; --from_pretrained CHECKPOINT or --tokenizer PATH is needed for that"]
    if not tokens["source"]["up_to"]:
        return ["token lengths: not counted; a row without a problem is needed for that"]
    lines = []
    for name, what in (("source", "question, picture and frame included"), ("target", "answer")):
        spread = tokens[name]
        lines.append(f"tokens of the {what}: {spread['least']} to {spread['most']}, middle {spread['middle']}")
        most = max(spread["up_to"].values(), default=1)
        for bound, count in spread["up_to"].items():
            lines.append(f"  up to {bound:>5} {'█' * round(BAR_WIDTH * count / most):<{BAR_WIDTH}} {count}")
    by_chance, grouped = tokens["padding"]["by_chance"], tokens["padding"]["group_by_length"]
    lines.append(f"padding of batches of {TYPICAL_BATCH}: {by_chance:.0%}, and {grouped:.0%} with --group_by_length")
    cut, now, enough = tokens["cut"], tokens["lengths"], tokens["cuts_nothing"]
    lines.append(
        f"--max_source_length {now['max_source_length']} --max_target_length {now['max_target_length']} cut"
        f" {count_of(cut['prompts'], 'prompt')}, {count_of(cut['labels'], 'label')} and the oldest turns of"
        f" {count_of(cut['histories'], 'sample')}"
    )
    nothing = f"--max_source_length {enough['max_source_length']} --max_target_length {enough['max_target_length']} cut nothing"
    positions, needed = tokens["positions"], enough["max_source_length"] + enough["max_target_length"]
    too_many = positions is not None and needed > positions
    lines.append(f"{nothing}; this checkpoint takes {positions} together" if too_many else nothing)
    return [*lines, f"tokens: {tokens['bytes']}"] if tokens["bytes"] else lines


if __name__ == "__main__":
    main()
