"""Answer the rows of a data file, which need no labels: a line of JSON for each row, in the file's order.

python scripts/predict.py --from_pretrained model/tiny --data fewshot-data/heldout.json --out answers.jsonl
python scripts/predict.py --from_pretrained model/tiny --data fewshot-data/heldout.json --out - | head -1
torchrun --nproc-per-node 2 scripts/predict.py …        the rows shared out between two processes

    {"row": 1, "img": "a.png", "prompt": "…", "answer": "…"}       what the row holds, and its answer
    {"row": 2, "img": "gone.png", "prompt": "…", "error": "…"}     or why there is none
    {"row": 3, …, "answer": "…", "cut": true}                      an answer that --max_length cut off

A line is written once its row and those before it are done: a row with a long answer holds those after it back. The same
command goes on where one was stopped or killed, if the data file, the checkpoint and the settings are still the same;
ANSWERS.jsonl.settings.json says what they were. Pictures aren't compared, and rows with an error are not tried again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import contextlib
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from os.path import expanduser
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TextIO

from model.checkpoints.layout import Checkpoint, read_json_object
from model.checkpoints.running import locked_here
from model.checkpoints.whole import CHECKSUMS_FILE, is_replaceable, is_same_file, json_text, place_problem, write_whole
from model.cli.flag_parser import FlagParser
from model.data.bad_rows import first_lines
from model.data.image_check import CheckedImages, check_rows
from model.data.rows import LANGUAGES, Row, Rows, missing_file_problems, rows_in_place, values_of
from model.distributed import done_by_first_process, from_all_processes, is_first_process, model_replica, world_size
from model.errors import InputError, command, raise_problems
from model.inference.flags import (
    ROW_LENGTH,
    add_checkpoint_flags,
    add_max_length_flag,
    add_model_parallel_flag,
    add_number_format_flags,
    add_sampling_flags,
    found_checkpoint,
    loaded,
    max_length_of,
    refuse_uneven_processes,
    sampling_of,
)
from model.progress import count_of, say, warn, with_progress

if TYPE_CHECKING:  # rows and flags are checked before torch is loaded
    from model.inference.engine import Answer, Engine, Question

CHECK_SECONDS = 2.0  # for opening pictures beforehand, where a bad one does no harm
IMPLIED_SEED = 0  # without --seed; rows draw alike, too, where a command goes on
STANDARD_OUTPUT = "-"
CONFIG = "the checkpoint's config"
OWN_SETTINGS = re.compile(rb'[{]\s*"--')
NOT_SETTINGS = (
    "data", "out", "overwrite", "batch_size", "bad_rows", "from_pretrained", "revision", "model_parallel_size",
)  # fmt: skip

Outcome = dict[str, Any]  # what a line says besides its row: "answer" or "error"


# --- which rows -------------------------------------------------------------------------------------------------------


class Questions(NamedTuple):
    """The rows that can be read, what is wrong with each bad one, by its number in the file, and how many rows there are.

    A row whose picture is bad is in both of the first two.
    """

    rows: Rows
    problems: dict[int, str]
    total: int


def read_questions(options: argparse.Namespace) -> Questions:
    """The rows of the data file. Pictures are looked at by the first process of several.

    Raises:
        InputError: the file can't be used as a whole, or all its rows are bad, or one is and --bad_rows is error.
    """
    rows, problems = Rows(options.data), {}
    for number, row in enumerate(rows_in_place(options.data, options.image_folder, needs_label=False), 1):
        if isinstance(row, InputError):
            problems[number] = str(row)
        else:
            rows.append(row, number)
    total = len(rows) + len(problems)
    if is_first_process():
        seconds = math.inf if options.bad_rows == "error" else CHECK_SECONDS
        of_images = check_rows(rows, CheckedImages(), seconds).problems
        problems |= {rows.numbers[index]: problem for index, problem in of_images.items()}
    if problems:
        lines = first_lines([problems[number] for number in sorted(problems)])
        if options.bad_rows == "error" or len(problems) == total:
            raise_problems(lines)
        warn("\n".join([f"Not answered, {count_of(len(problems), 'bad row')}:", *lines]))
    return Questions(rows, problems, total)


# --- the answers' file ------------------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """What answers depend on, by the names that a person knows: flags, the checkpoint's weights and config, the data file."""
    flags = {f"--{name}": value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    checksums = checkpoint.weights_file().parent / CHECKSUMS_FILE
    if checksums.is_file():
        weights = hashlib.sha256(checksums.read_bytes()).hexdigest()
    else:  # reading 15 GB would take a minute
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.weights_files()]
        weights = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    data = hashlib.sha256(Path(options.data).read_bytes()).hexdigest()
    config = hashlib.sha256(json_text(checkpoint.config, 0).encode()).hexdigest()
    return {
        **flags, "the checkpoint's weights": weights, CONFIG: config, "the data file's content": data,
    }  # fmt: skip


@contextlib.contextmanager
def held(out: Path) -> Iterator[IO[bytes]]:
    """The answers' file, open to add to, for this process alone; it goes if nothing has come into a new one.

    Raises:
        InputError: it isn't a file, or another process is writing into it.
    """
    is_new = not out.exists()
    if not is_new and not out.is_file():
        raise InputError(f"--out {out}: not a file; the name of one is needed, or - for standard output.")
    with open(out, "ab", buffering=0) as file:
        if not locked_here(file):
            raise InputError(
                f"--out {out}: another process is writing into it; wait until it has ended, or name another file."
            )
        try:
            yield file
        finally:
            if is_new and not out.stat().st_size:
                out.unlink()


def begin_anew(out: Path, file: IO[bytes], settings: dict[str, Any]) -> None:
    """Empty the answers' file, and note what its answers depend on."""
    file.truncate(0)
    text = json_text(settings, 1) + "\n"
    write_whole(settings_file(out), lambda path: path.write_text(text, encoding="utf-8"))


def settings_file(out: Path) -> Path:
    """Where it stands what the answers in a file depend on."""
    return out.with_name(f"{out.name}.settings.json")


def begun(out: Path, settings: dict[str, Any]) -> tuple[int, int]:
    """Rows that the answers' file has already, and how many of them without an answer; the file is ready for the next.

    Raises:
        InputError: it was begun otherwise, or by something else, or it is damaged.
    """
    if not settings_file(out).is_file():
        raise InputError(
            f"--out {out}: there is such a file, and not of predict.py; another name or --overwrite is needed."
        )
    before = read_json_object(settings_file(out), "--out")
    before = {CONFIG: settings[CONFIG], **before}  # of an older program, which didn't note it
    changed = [name for name in settings if name not in before or before[name] != settings[name]]
    if changed:
        found = ", ".join(
            f"{name} {_shown(before.get(name))}, now {_shown(settings[name])}" if name.startswith("--") else name
            for name in changed
        )
        raise InputError(
            f"--out {out}: begun with something else than now ({found}); the same is needed to go on, or --overwrite "
            "to begin anew."
        )
    return whole_lines(out)


def _shown(value: object) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


def whole_lines(out: Path) -> tuple[int, int]:
    """The lines of an answers' file, and those without an answer; half a line at its end is cut off.

    Raises:
        InputError: a line isn't that of its row.
    """
    count = errors = end = 0
    with open(out, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
                is_right = content["row"] == count + 1
            except (ValueError, TypeError, KeyError):
                is_right = False
            if not is_right:
                raise InputError(
                    f"--out {out} line {count + 1}: not the line of row {count + 1}; a file that nobody changed is needed "
                    "to go on, or --overwrite to begin anew."
                )
            count, errors, end = count + 1, errors + ("error" in content), end + len(line)
        file.truncate(end)
    return count, errors


@contextlib.contextmanager
def telling(out: str) -> Iterator[None]:
    """Make a sentence of what keeps the block from writing, such as a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; a file that can be written is needed.") from None


def write_at_once(line: bytes, file: IO[bytes]) -> None:
    """Hand a line to the system: what a full disk has no room for isn't tried again when the file is closed."""
    while line:
        line = line[file.write(line) :]
    file.flush()


def written(lines: Iterable[tuple[bytes, Outcome]], file: IO[bytes], out: str) -> int:
    """Write lines as they come, and count the rows without an answer."""
    errors = 0
    for line, outcome in lines:
        with telling(out):
            write_at_once(line, file)
        errors += "error" in outcome
    return errors


# --- asking -----------------------------------------------------------------------------------------------------------


def outcomes(
    rows: Iterable[tuple[int, Row]],
    engine: "Engine",
    question_of: "Callable[[int, Row], Question]",
    text_of: "Callable[[Answer, Row], str]",
) -> Iterator[tuple[int, Outcome]]:
    """The numbers of rows and what became of them, as they finish; the engine has as many in hand as it has room for."""
    asked: dict[Answer, tuple[int, Row]] = {}

    def finished() -> Iterator[tuple[int, Outcome]]:
        for answer in engine.step():
            if answer.finished:
                number, row = asked.pop(answer)
                cut = {"cut": True} if answer.finished == "length" else {}
                yield number, {"answer": text_of(answer, row), **cut}

    for number, row in rows:
        while len(engine.active) + len(engine.waiting) == engine.rows:
            yield from finished()
        try:
            asked[engine.submit(question_of(number, row))] = number, row
        except InputError as problem:  # a picture that can't be opened, a question that is too long
            yield number, {"error": f"{row.where}: {problem}"}
    while engine.busy:
        yield from finished()


def answered(
    rows: Rows, to_ask: set[int], checkpoint: Checkpoint, options: argparse.Namespace
) -> Iterator[tuple[int, Outcome]]:
    """`outcomes` of a checkpoint, which is loaded here. The processes of a launcher share the rows out, and each has them all.

    Args:
        to_ask: the numbers of the rows that are asked; the first process's count.
    """
    from model.inference.chat import chat_question, image_tensor
    from model.inference.engine import Engine
    from model.inference.text import answer_text

    model, tokenizer = loaded(checkpoint, options, options.model_parallel_size)
    sampling = sampling_of(options)
    to_ask = done_by_first_process(lambda: to_ask)
    replica, replicas = model_replica(options.model_parallel_size)
    mine = set(sorted(to_ask)[replica::replicas])

    def question_of(number: int, row: Row) -> "Question":
        image = None if row.img is None else image_tensor(row.img, model)
        seed = row_seed(IMPLIED_SEED if options.seed is None else options.seed, number)
        return chat_question(
            image, model, tokenizer, row.prompt, row.history,
            max_length=options.max_length, sampling=replace(sampling, seed=seed), lang=row.lang or options.lang,
        )  # fmt: skip

    def text_of(answer: "Answer", row: Row) -> str:
        return answer_text(answer.ids, tokenizer, model.asked_as.is_english(row.lang or options.lang))

    engine = Engine(model, tokenizer, options.batch_size, options.max_length)
    numbered = zip(rows.numbers, rows, strict=True)
    finished = outcomes((one for one in numbered if one[0] in mine), engine, question_of, text_of)
    if world_size() == 1:
        return finished
    most = math.ceil(len(to_ask) / replicas)
    return of_all_processes(finished, most, options.batch_size, options.model_parallel_size)


def of_all_processes(
    finished: Iterator[tuple[int, Outcome]], most: int, at_once: int, parts: int
) -> Iterator[tuple[int, Outcome]]:
    """What this process and the others finish, which they tell each other; every process has to take it all.

    Args:
        most: what a process finishes at most. at_once: how much of it it tells at once. parts: processes that share a model.
    """
    for _ in range(0, most, at_once):
        for of_one in from_all_processes(list(islice(finished, at_once)))[::parts]:
            yield from of_one


def row_seed(seed: int, number: int) -> int:
    """The seed of one row: whichever rows were answered before, or stand beside it, its answer is the same.

    But for rounding: in 16 bits, and with --quant 4, that depends on --batch-size.
    """
    return random.Random(f"{seed} {number}").getrandbits(32)


def lines_in_order(
    path: str, done: int, known: dict[int, Outcome], finished: Iterator[tuple[int, Outcome]]
) -> Iterator[tuple[bytes, Outcome]]:
    """The lines of the rows of a data file after the first few that are done, and each one's outcome.

    Args:
        known: outcomes that are there already, by row. finished: the others, in any order; they are asked for when needed.

    Raises:
        InputError: the file has other rows than before.
    """
    for number, entry in enumerate(values_of(path), 1):
        if number <= done:
            continue
        while number not in known:
            row_and_outcome = next(finished, None)
            if row_and_outcome is None:
                raise InputError(
                    f"{path}: it has changed since this command began; a file that stays as it is is needed."
                )
            known |= [row_and_outcome]
        outcome = known.pop(number)
        row = entry if isinstance(entry, dict) else {}
        row = {key: value for key, value in row.items() if key not in ("row", "answer", "error", "cut")}
        line = json.dumps({"row": number, **row, **outcome}, ensure_ascii=False)
        yield f"{line}\n".encode("utf-8", "backslashreplace"), outcome  # half a character becomes its JSON escape


# --- the command ------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    # fmt: off
    add("--data", type=expanduser, required=True, metavar="ROWS.json",
        help='rows of "prompt", and "img", "history" and "lang" where they have them; JSON or JSON Lines')
    add("--out", type=expanduser, required=True, metavar="ANSWERS.jsonl",
        help="where the answers are written; - is standard output")
    add("--overwrite", action="store_true", help="begin anew although there are answers in --out")
    add("--image_folder", type=expanduser, metavar="FOLDER", help="where the pictures of relative paths are")
    add("--bad_rows", type=_keep_or_error, choices=("keep", "error"), default="keep",
        help="rows that can't be answered: keep writes the reason in the answer's place, error stops before a model is "
             "loaded (default %(default)s)")
    add("--lang", choices=LANGUAGES, help="frame of the rows that don't say (default: the one of the checkpoint's training)")
    add("--batch-size", type=int, default=16, metavar="N", help="questions asked at once (default %(default)s)")
    # fmt: on
    add_max_length_flag(parser, "question and answer together", ROW_LENGTH)
    add_model_parallel_flag(parser)
    add_sampling_flags(parser, temperature=0.0)
    add_number_format_flags(parser)
    return parser


def _keep_or_error(text: str) -> str:
    if text == "skip":  # of other commands
        raise argparse.ArgumentTypeError(
            "skip found; keep is needed, which writes the reason in the answer's place, or error"
        )
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("predict.py"):
        options = command_line().parse_args(argv)
        try:
            predict(options)
        except SystemExit:  # a signal: what comes next on the screen begins on a line of its own
            if sys.stderr.isatty():
                print(file=sys.stderr)
            raise


def predict(options: argparse.Namespace) -> None:
    """Answer every row that isn't answered yet; the last line counts the answers. The first process of several writes."""
    check(options)
    with contextlib.ExitStack() as stack:
        standard_output = sys.stdout
        if options.out == STANDARD_OUTPUT:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # all else that is said
        checkpoint = found_checkpoint(options)
        options.max_length = max_length_of(options, [checkpoint], ROW_LENGTH)
        questions = read_questions(options)
        if is_first_process():
            write_answers(questions, checkpoint, options, standard_output)
        else:
            for _ in answered(questions.rows, set(), checkpoint, options):
                pass  # the first process has it, too


def write_answers(
    questions: Questions, checkpoint: Checkpoint, options: argparse.Namespace, standard_output: TextIO
) -> None:
    """Answer the questions that aren't answered yet, and write a line for each row, in order."""
    rows, problems, total = questions
    done = errors = 0
    out, begins = Path(options.out), False
    with contextlib.ExitStack() as stack:
        if options.out == STANDARD_OUTPUT:
            file: IO[bytes] = standard_output.buffer
        else:
            with telling(options.out):
                settings = settings_of(options, checkpoint)
                file = stack.enter_context(held(out))
                begins = options.overwrite or not out.stat().st_size
                if not begins:
                    done, errors = begun(out, settings)
        if done:
            say(f"{options.out}: {done} of {total} rows are done already.")
        to_ask = {number for number in rows.numbers if number > done} - problems.keys()
        asked: Iterator[tuple[int, Outcome]] = iter(())
        if to_ask or world_size() > 1:  # the others wait
            asked = answered(rows, to_ask, checkpoint, options)
        if begins:  # the model is there: what stood in the file isn't lost for nothing
            with telling(options.out):
                begin_anew(out, file, settings)
        known = {number: {"error": problem} for number, problem in problems.items()}
        lines = lines_in_order(options.data, done, known, asked)
        if not (options.out == STANDARD_OUTPUT and file.isatty()):
            lines = with_progress(lines, total - done, "Answering")
        errors += written(lines, file, options.out)
        say(f"{options.out}: {total - errors} of {total} rows answered.")
        if errors == total:
            raise InputError(f"{options.data}: no row could be answered; each one's line says why.")


def check(options: argparse.Namespace) -> None:
    """Check the flags that need no file.

    Raises:
        InputError: one is out of bounds, or --out would overwrite the rows, or they can't be read twice.
    """
    refuse_uneven_processes(options.model_parallel_size)
    sampling_of(options)
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: 1 or more is needed.")
    if Path(options.data).exists() and not Path(options.data).is_file():
        raise InputError(f"--data {options.data}: not a file; one is needed, for it is read twice.")
    raise_problems(missing_file_problems([options.data]))  # before a checkpoint is downloaded
    if options.out == STANDARD_OUTPUT:
        return
    if problem := place_problem(options.out):  # before pictures are opened
        raise InputError(f"--out {options.out}: {problem}")
    if is_same_file(options.out, options.data):
        raise InputError(f"--out {options.out}: the same file as --data; another one is needed.")
    settings = settings_file(Path(options.out))
    if not is_replaceable(settings, OWN_SETTINGS):
        raise InputError(f"--out {options.out}: {settings} is somebody else's; another name is needed.")


if __name__ == "__main__":
    main()
