"""Give thousands of damaged rows and pictures to check_data.py and the checks before training, and judge the verdicts.

    python scripts/dev/fuzz_data.py                         10,000 rows and 2,000 pictures, the same ones each time
    python scripts/dev/fuzz_data.py --hostile               a folder of pictures made to hurt, and what is said of each

Each row must be accepted, or refused with one sentence in one line that names it. Nothing may hang, no good row may be
refused, and no bad row accepted. Exit status 1 if something went otherwise.
"""

import argparse
import io
import json
import os
import random
import re
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from PIL import Image

from model.data.lengths import begin_counting_truncations
from model.data.prompt import Lengths
from model.data.split import read_selection
from model.data.tokenizer import ChatGLMTokenizer
from model.progress import say, with_progress
from scripts import check_data

SEED = 20230517
MOST_SECONDS = 60  # for one file; more is a hang
ROWS_IN_A_FILE = 100
SENTENCE = re.compile(r"[^\n]+: [^\n]+[.!…]|(… and \d+ more|\d+ in all); [^\n]+\.")
TINY = str(Path(__file__).resolve().parents[2] / "model/tiny")  # whose tokenizer counts
FLAGS = ("--workers", "1", "--from_pretrained", TINY, "--max_target_length", "64")
LENGTHS = Lengths(image_length=32, max_source_length=64, max_target_length=64)
HARMLESS = (
    lambda row, rng: row,
    lambda row, rng: row | {"prompt": random_text(rng, 0)},
    lambda row, rng: row | {"label": "x" + random_text(rng, 0)},
    lambda row, rng: row | {"id": random_value(rng), "ex tra": random_value(rng)},
    lambda row, rng: {key: row[key] for key in rng.sample(list(row), len(row))},
    lambda row, rng: {key: value for key, value in row.items() if key != "img"},
    lambda row, rng: row | {"img": None, "history": None, "lang": None},
    lambda row, rng: row | {"lang": rng.choice(["zh", "en"])},
    lambda row, rng: (
        row | {"history": [[random_text(rng, 0), "x" + random_text(rng, 0)] for _ in range(rng.randrange(4))]}
    ),
)
HARMFUL = (
    lambda row, rng: {key: row[key] for key in ("img", rng.choice(["prompt", "label"]))},
    lambda row, rng: row | {rng.choice(["prompt", "label"]): random_value(rng, but=str)},
    lambda row, rng: row | {"img": random_value(rng, but=(str, type(None)))},
    lambda row, rng: row | {"img": "no " + random_text(rng, 1)},
    lambda row, rng: row | {"label": rng.choice(["", " ", "\n\t", "\u3000"])},
    lambda row, rng: row | {rng.choice(["img", "prompt", "label"]): "half " + chr(rng.randrange(0xD800, 0xE000))},
    lambda row, rng: row | {"img": rng.choice(["", " ", "\0", ".", "/", "a" * 5000, "\n", "/dev/zero", "~"])},
    lambda row, rng: row | {"lang": random_value(rng, but=(str, type(None)))},
    lambda row, rng: row | {"history": rng.choice([[["?"]], [["?", ""]], "?", {}, [[1, 2]], [["?", "!", "?"]], [None], 1])},
    lambda row, rng: random_value(rng, but=dict),
)  # fmt: skip


def random_text(rng: random.Random, least: int) -> str:
    """Some characters of all kinds, none of them a lone surrogate."""
    kinds = ((0, 0x80), (0x80, 0x3000), (0x3000, 0xA000), (0xE000, 0x10000), (0x1F300, 0x1F700))
    return "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(least, 30)))


def random_value(rng: random.Random, but: Any = ()) -> Any:
    """Any JSON value that is none of the types `but`."""
    values: tuple[Any, ...] = (
        None,
        True,
        0,
        -1.5e300,
        10**30,
        "",
        "text",
        [],
        [[]],
        ["?", "!"],
        {},
        {"img": 1},
        float("nan"),
    )
    return rng.choice([value for value in values if not isinstance(value, but)])


# --- judging ----------------------------------------------------------------------------------------------------------


class Judge:
    """Counts verdicts, and keeps what went wrong."""

    def __init__(self) -> None:
        self.good = self.refused = 0
        self.failures: list[str] = []
        self.tokenizer = ChatGLMTokenizer.from_pretrained(TINY)

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Note every exception but InputError that leaves the block, and a block that takes over MOST_SECONDS."""

        def give_up(*_: Any) -> NoReturn:
            raise TimeoutError(f"more than {MOST_SECONDS} seconds")

        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(MOST_SECONDS)
        try:
            yield
        except InputError as problem:
            self.sentences(str(problem).splitlines(), what)
        except (Exception, SystemExit):
            self.failures.append(f"{what}: {traceback.format_exc()}")
        finally:
            signal.alarm(0)

    def sentences(self, lines: Sequence[str], what: str) -> None:
        """Note those of lines that are no sentences."""
        self.failures += [f"{what}: no sentence: {line!r}" for line in lines if not SENTENCE.fullmatch(line)]

    def verdicts(self, path: str, expected: Sequence[bool | None]) -> None:
        """Let both checks judge a data file whose rows should be good (True), bad (False) or either (None)."""
        bad: set[int] | None = None
        with self.watching(f"check_data.py {path}"):
            report = check_data.data_report(check_data.command_line().parse_args([path, *FLAGS]))
            problems = report["files"][0]["problems"]
            self.sentences([*problems, *check_data.report_lines(report)[1:2]] if problems else [], path)
            bad = {
                int(match[1]) for one in problems if (match := re.match(r".*? (?:row|line) (\d+)\b", one[len(path) :]))
            }
            for number, is_good in enumerate(expected, 1):
                if is_good is not None and is_good == (number in bad):
                    self.failures.append(f"{path} row {number}: {'refused' if is_good else 'accepted'}")
                self.refused += number in bad
                self.good += number not in bad
        if bad is None:
            self.refused += len(expected)  # the file as a whole
            self.failures += [f"{path}: refused, but it has good rows" for is_good in expected if is_good][:1]
            bad = set(range(1, len(expected) + 1))
        with self.watching(f"training checks {path}"):
            selection, _ = read_selection([path], "skip", float("inf"))
            begin_counting_truncations(selection.rows, self.tokenizer, LENGTHS)()
            usable = len(selection.rows[path]) - len(selection.left_out[path])
            if usable != len(expected) - len(bad):
                self.failures.append(
                    f"{path}: {usable} rows usable for training, {len(expected) - len(bad)} for check_data.py"
                )
        with self.watching(f"training checks {path}"):
            read_selection([path], "error", float("inf"))
            if bad:
                self.failures.append(f"{path}: bad rows, but no error")


# --- rows -------------------------------------------------------------------------------------------------------------


def fuzz_rows(folder: Path, number: int, judge: Judge) -> None:
    """Rows with wrong values, a hundred in a file; then files of one row with wrong bytes."""
    rng = random.Random(SEED)
    Image.new("RGB", (8, 8), "red").save(folder / "good.png")
    good = {"img": "good.png", "prompt": "这是什么？", "label": "一只猫。"}
    by_value = number * 4 // 5
    for start in with_progress(range(0, by_value, ROWS_IN_A_FILE), by_value // ROWS_IN_A_FILE, "Files of damaged rows"):
        expected = [rng.random() < 0.5 for _ in range(ROWS_IN_A_FILE)]
        rows = [rng.choice(HARMLESS if is_good else HARMFUL)(good, rng) for is_good in expected]
        path = folder / f"rows{start}.{rng.choice(['json', 'jsonl'])}"
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5 or not _is_text(row)) for row in rows]
        text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
        if path.suffix == ".jsonl" and not text.startswith("{"):
            text, expected = f"{json.dumps(good)}\n{text}", [True, *expected]
        path.write_bytes(rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode())
        judge.verdicts(str(path), expected)
        path.unlink()
    whole = [json.dumps([good]).encode(), json.dumps(good, ensure_ascii=False).encode()]
    for _ in with_progress(range(number - by_value), number - by_value, "Damaged files"):
        path = folder / "row.json"
        path.write_bytes(mutated(rng.choice(whole), rng))
        judge.verdicts(str(path), [None])


def _is_text(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def mutated(content: bytes, rng: random.Random) -> bytes:
    """content with some bytes changed, lost, doubled or added, or cut short."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(damaged) + 1)
        length = rng.choice((1, 1, 2, 8, 64))
        how = rng.randrange(6)
        if how == 0:
            damaged[place : place + length] = rng.randbytes(length)
        elif how == 1:
            del damaged[place : place + length]
        elif how == 2:
            damaged[place:place] = damaged[place : place + length]
        elif how == 3:
            damaged[place:place] = rng.randbytes(length)
        elif how == 4 and damaged:
            damaged[min(place, len(damaged) - 1)] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.3:
            del damaged[place:]
    return bytes(damaged)


# --- pictures ---------------------------------------------------------------------------------------------------------


def whole_images() -> dict[str, bytes]:
    """A good picture of every common format and mode, by the name of its file."""
    rng = random.Random(SEED)
    colour = Image.frombytes("RGB", (40, 30), rng.randbytes(3600))
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.jpg": (colour, {}),
        "turned.jpg": (colour, {"exif": exif}),
        "progressive.jpg": (colour, {"progressive": True}),
        "grey.jpg": (colour.convert("L"), {}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "rgb.png": (colour, {}),
        "rgba.png": (colour.convert("RGBA"), {}),
        "palette.png": (colour.convert("P"), {}),
        "transparent.png": (colour.convert("P"), {"transparency": 3}),
        "grey16.png": (Image.frombytes("I;16", (40, 30), rng.randbytes(2400)), {}),
        "bits.png": (colour.convert("1"), {}),
        "la.png": (colour.convert("LA"), {}),
        "rgb.webp": (colour, {}),
        "rgb.bmp": (colour, {}),
        "animation.gif": (colour, {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}),
        "pages.tiff": (colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        "packed.tiff": (colour, {"compression": "tiff_lzw"}),
    }
    pictures = {}
    for name, (image, options) in wanted.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.split(".")[1].upper()), **options)
        pictures[name] = buffer.getvalue()
    return pictures


def fuzz_images(folder: Path, number: int, judge: Judge) -> None:
    """Damaged images of every format. Each has a whole one of its format beside it; a hundred rows are in a file."""
    rng = random.Random(SEED)
    whole = whole_images()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
    at_once = ROWS_IN_A_FILE // 2
    for start in with_progress(range(0, number, at_once), -(-number // at_once), "Files of damaged pictures"):
        rows, expected = [], []
        for count in range(min(at_once, number - start)):
            name = rng.choice(list(whole))
            damaged = f"{count}{name}"
            (folder / damaged).write_bytes(mutated(whole[name], rng))
            rows += [{"img": img, "prompt": "?", "label": "!"} for img in (name, damaged)]
            expected += [True, None]
        path = folder / "pictures.json"
        path.write_text(json.dumps(rows))
        judge.verdicts(str(path), expected)


def hostile_images(folder: Path) -> None:
    """Fill folder with files that hurt whoever opens them carelessly."""
    whole = whole_images()
    for name, content in whole.items():
        (folder / name).write_bytes(content)
        (folder / f"cut {name}").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("This is no picture.")
    (folder / "page.png").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n")
    (folder / "folder.jpg").mkdir()
    (folder / "link to nowhere.jpg").symlink_to("nowhere")
    (folder / "link to itself.jpg").symlink_to("link to itself.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "bomb.png").write_bytes(png_header(40_000, 40_000))
    (folder / "larger than any.png").write_bytes(png_header(2**31 - 1, 2**31 - 1))
    (folder / "no pixels.png").write_bytes(png_header(0, 5))
    Image.new("RGB", (1, 1)).save(folder / "one pixel.png")
    Image.new("RGB", (20_000, 1)).save(folder / "thin.png")
    (folder / "wrong name.png").write_bytes(whole["rgb.jpg"])
    (folder / "line\nbreak.jpg").write_text("no picture")


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header says width × height pixels, and that holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def show_hostile(folder: Path, judge: Judge) -> None:
    """Print what is said of each hostile picture."""
    hostile_images(folder)
    for path in sorted(folder.iterdir()):
        with judge.watching(path.name):
            fact = check_data.image_fact(str(path))
            verdict = fact.get("problem", f"good, {'×'.join(map(str, fact.get('size', ())))}")
            if "problem" in fact:
                judge.sentences([f"row: {verdict}"], path.name)
            judge.good += "problem" not in fact
            judge.refused += "problem" in fact
            say(f"{path.name!r:<28} {verdict.replace(f'{folder}/', '')}")


# --- the command ------------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="damaged rows (default 10000)")
    parser.add_argument("--pictures", type=int, default=2_000, metavar="N", help="damaged pictures (default 2000)")
    parser.add_argument("--hostile", action="store_true", help="show what is said of pictures made to hurt, and leave")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command, and leave with status 1 if a verdict was wrong; `model.errors` lists the others."""
    with command("fuzz_data.py"):
        sys.exit(1 if wrong_verdicts(command_line().parse_args(argv)) else 0)


def wrong_verdicts(options: argparse.Namespace) -> list[str]:
    """Sentences on the verdicts that were wrong; they are printed too."""
    tasks: list[tuple[str, Callable[[Path, Judge], None]]] = [
        ("rows", lambda folder, judge: fuzz_rows(folder, options.rows, judge)),
        ("pictures", lambda folder, judge: fuzz_images(folder, options.pictures, judge)),
    ]
    if options.hostile:
        tasks = [("hostile pictures", show_hostile)]
    failures = []
    for what, task in tasks:
        judge = Judge()
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder + "/cache" if not options.hostile else tempfile.gettempdir()
            task(Path(folder), judge)
        say(f"{what}: {judge.good} good, {judge.refused} refused, {len(judge.failures)} wrong verdicts")
        failures += judge.failures
    say("\n".join(failures[:20]) or "Every verdict was a good row or a sentence.")
    return failures


if __name__ == "__main__":
    main()
