"""Data files and their pictures, checked to the last row before torch is loaded: standard library and Pillow only."""

import json
import os
import stat
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, TypeVar, cast

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from model.errors import InputError, raise_problems
from model.progress import duration, is_first_process
from model.prompt import ROW_NEEDS, Row, row_from_json

MAX_PIXELS = 200_000_000  # a 200-megapixel phone's largest photo; as RGB it takes 0.8 GB of memory
MOST_PROBLEM_LINES = 20  # what fits on a screen
QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LOG_LINES = 30.0  # where stderr is a file

# Only what people keep photos in. Pillow would also run Ghostscript on EPS, a program inside a stranger's file.
PICTURE_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "MPO",
    "AVIF",
    "JPEG2000",
    "DIB",
    "ICO",
    "PPM",
    "TGA",
    "PSD",
)
A_PICTURE = "a picture (JPEG, PNG, WebP, GIF, BMP, TIFF, …) is needed"
GREY_RANGES: dict[str, tuple[int, ...]] = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}

PictureSource = str | os.PathLike[str] | IO[bytes] | Image.Image
Item = TypeVar("Item")


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a data file: a JSON list of objects, UTF-8 with or without a byte-order mark.

    Each img is already looked up (`find_picture`); one that was not found stays as written.

    Raises:
        InputError: the file can't be read, isn't such a list, or has bad rows (the first 20 are named).
    """
    entries = _json_list(Path(path))
    rows, problems = [], []
    found: dict[str, str] = {}  # rows often share pictures, and looking asks the disk
    for number, entry in enumerate(entries, 1):
        try:
            row = row_from_json(entry, f"{path} row {number}")
        except InputError as problem:
            problems.append(str(problem))
            continue
        if row.img not in found:
            found[row.img] = str(find_picture(row.img, path) or row.img)
        rows.append(replace(row, img=found[row.img]))
    raise_problems(_first_lines(problems))
    return rows


def find_picture(img: str, json_path: str | os.PathLike[str]) -> Path | None:
    """Where the picture of a row is: looked up from the working directory, else from the JSON file's own folder."""
    for candidate in (img, os.path.join(os.path.dirname(json_path), img)):
        if os.path.lexists(candidate):  # a broken link counts as found: its error can then say what it is
            return Path(candidate)
    return None


def open_picture(source: PictureSource) -> Image.Image:
    """The picture in mode RGB, decoded in full and turned upright as its EXIF says; the first frame of an animation.

    Transparency is dropped, as `convert("RGB")` drops it. Grey of more than 8 bits is scaled to 8, not clipped: I;16
    from 0…65535; I and F, which have no range of their own in use, from the smallest of 0…1 (F only), 0…255, 0…65535
    and 0…2³¹ - 1 that holds their brightest value.

    source is a path, an open binary file or a Pillow image; an upright RGB image is returned as it is. Pillow's own limit
    of pixels is one per process, and is set to MAX_PIXELS there.

    Raises:
        InputError: source is no picture, is damaged or has more than MAX_PIXELS; the text has no line break.
    """
    if isinstance(source, Image.Image):
        name = "the picture"
    elif isinstance(source, str | os.PathLike):
        path = str(source)
        name = path if path.isprintable() else repr(path)  # a line break or an escape code would garble the report
        _check_file(path, name)
    else:
        name = "the picture file"
    _set_pixel_limit()
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        with Image.open(source, formats=_known_formats()) as image:
            return _upright_rgb(image, name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(name)) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name} isn't a picture; {A_PICTURE}.") from error
    except OSError as error:
        # The system's errors have a number and a text for people; Pillow's own have neither.
        found = f"can't be read ({error.strerror})" if error.errno else "is damaged or cut short"
        raise InputError(f"{name} {found}; {A_PICTURE}.") from error
    except Exception as error:  # a damaged file leaves Pillow's decoders as almost any exception
        raise InputError(f"{name} is damaged and can't be decoded; {A_PICTURE}.") from error


def check_pictures(rows: Sequence[Row], progress: bool = True) -> None:
    """Open every distinct picture of rows once, in as many threads as there are CPUs; do nothing if all are good.

    Raises:
        InputError: some aren't; the first 20 rows concerned are named (`picture_problems` gives all).
    """
    raise_problems(_first_lines(picture_problems(rows, progress)))


def picture_problems(rows: Sequence[Row], progress: bool = True) -> list[str]:
    """One line for each row whose picture can't be used: `{row.where}: {what was found}; {what is needed}`.

    With progress, stderr shows how far it is and the time left, once it has taken two seconds.
    """
    row_names: dict[str, list[str]] = {}
    for row in rows:
        row_names.setdefault(row.img, []).append(row.where)
    with ThreadPool(os.cpu_count()) as pool:
        checked: Iterable[str | None] = pool.imap(_picture_problem, row_names, chunksize=8)
        if progress and is_first_process():
            checked = _with_progress(checked, len(row_names), "Checking pictures")
        found = zip(row_names.values(), checked, strict=True)
        return [f"{where}: {problem}" for wheres, problem in found if problem for where in wheres]


def _json_list(path: Path) -> list[object]:
    try:
        entries = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a JSON file of rows is needed.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} isn't UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno} column {error.colno}: not JSON ({error.msg}); a JSON list of rows is needed."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in thousands of brackets
        raise InputError(f"{path}: JSON that can't be read ({error}); a list of rows is needed.") from error
    if not isinstance(entries, list):
        raise InputError(f"{path}: not a JSON list; a list of rows is needed, and {ROW_NEEDS}.")
    if not entries:
        raise InputError(f"{path}: the list is empty; at least one row is needed.")
    return entries


def _picture_problem(path: str) -> str | None:
    try:
        open_picture(path)
    except InputError as problem:
        return str(problem)
    return None


def _check_file(path: str, name: str) -> None:
    """Do nothing if path is a file with something in it. A pipe would hang whoever opens it.

    Raises:
        InputError: it isn't.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise InputError(f"{name} is a link to {os.readlink(path)}, which doesn't exist; {A_PICTURE}.") from error
        raise InputError(
            f"there is no file {name}; a relative path is looked up from the working directory,"
            " then from the JSON file's own folder."
        ) from error
    except OSError as error:
        raise InputError(f"{name} can't be read ({error.strerror}); {A_PICTURE}.") from error
    except ValueError as error:
        raise InputError(f"{name} can't be the name of a file; {A_PICTURE}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{name} is a folder; {A_PICTURE}.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is not an ordinary file; {A_PICTURE}.")
    if status.st_size == 0:
        raise InputError(f"{name} is empty (0 bytes); {A_PICTURE}.")


def _set_pixel_limit() -> None:
    # Pillow warns above its limit and refuses above twice the limit; setting it again and again is safe in threads.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _known_formats() -> list[str]:
    """PICTURE_FORMATS that this build of Pillow knows."""
    Image.init()
    return [name for name in PICTURE_FORMATS if name in Image.OPEN]


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels; a smaller picture is needed."


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < 1:
        raise InputError(f"{name} has no pixels ({image.width}×{image.height}); {A_PICTURE}.")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name))
    image.load()
    image = _upright(image)
    if image.mode == "RGB":
        return image
    if image.mode in GREY_RANGES or image.mode.startswith("I;16"):
        image = _eight_bit_grey(image)
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns where the palette holds transparency
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow knows no direct way
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF says nothing about up and down: viewers show such a picture as it is stored
        return image


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    grey = image.convert("F")
    ranges = GREY_RANGES.get(image.mode, (65535,))  # the other modes are I;16 in its byte orders
    brightest = cast(tuple[float, float], grey.getextrema())[1]
    white = next((top for top in ranges if brightest <= top), ranges[-1])
    return grey.point(lambda value: value * (255 / white) + 0.5).convert("L")  # + 0.5: Pillow truncates from F to L


def _first_lines(problems: list[str]) -> list[str]:
    more = len(problems) - MOST_PROBLEM_LINES
    return problems if more <= 0 else [*problems[:MOST_PROBLEM_LINES], f"… and {more} more"]


def _with_progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Yield items; after two quiet seconds, keep one line on stderr that says how many and the time left."""
    on_screen = sys.stderr.isatty()
    start = time.monotonic()
    next_line = start + QUIET_SECONDS
    shown = False
    for done, item in enumerate(items, 1):
        now = time.monotonic()
        if now >= next_line:
            line = f"{what}: {done} of {total}, {duration((now - start) / done * (total - done))} left"
            print(f"\r{line:<60}" if on_screen else line, end="" if on_screen else "\n", file=sys.stderr, flush=True)
            next_line = now + (0.2 if on_screen else SECONDS_BETWEEN_LOG_LINES)
            shown = True
        yield item
    if shown and on_screen:
        print(file=sys.stderr)
