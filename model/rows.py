"""Data files and their pictures: standard library and Pillow only, so that they are checked before torch is loaded."""

import json
import marshal
import os
import re
import stat
import warnings
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast, overload

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from model.distributed import is_first_process
from model.errors import InputError, raise_problems
from model.files import cache_folder
from model.prompt import ROW_NEEDS, Row, RowValues, plain_values, row_from_json

MAX_PIXELS = 200_000_000  # a 200-megapixel phone's largest photo; as RGB it takes 0.8 GB of memory
LEAST_REDUCTION = 3  # times the resized edge: what a JPEG decoded at reduced size still has
MOST_PROBLEM_LINES = 20  # what fits on a screen

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
_NEXT = re.compile(r"[ \t\n\r]*(,?)[ \t\n\r]*")  # from one value of a list to another
_BLANK = re.compile(r"[ \t\n\r]*")  # what JSON allows between values


class Rows(Sequence[Row]):
    """The rows of one data file in few bytes: a Row is made when it is asked for.

    Texts lie in one block of memory, which worker processes share with their parent: 300,000 Row objects would be
    copied into every worker as soon as their reference counts change.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self._texts = bytearray()
        self._ends = array("Q")
        self._numbers = array("L")
        self.turns = array("L")  # of each row, earlier ones and its own

    def append(self, values: RowValues, number: int) -> None:
        """Add a row by its values: the file's number-th, counted from 1."""
        self._texts += marshal.dumps(values)
        self._ends.append(len(self._texts))
        self._numbers.append(number)
        self.turns.append(1 + len(values[3]))

    def values(self, start: int = 0, stop: int | None = None) -> Iterator[RowValues]:
        """(img, prompt, label, history, lang) of each row from start to before stop. Quicker than asking for the rows."""
        begin = self._ends[start - 1] if start else 0
        with memoryview(self._texts) as texts:
            for end in self._ends[start:stop]:
                yield marshal.loads(texts[begin:end])
                begin = end

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        ((img, prompt, label, history, lang),) = self.values(index, index + 1)
        return Row(img, prompt, label, f"{self.path} row {self._numbers[index]}", history, lang)


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """Rows of a data file, all of them good; as `scan_rows`.

    Raises:
        InputError: the file can't be used as a whole, or has bad rows (the first 20 are named).
    """
    rows, problems = scan_rows(path)
    raise_problems(first_lines(problems))
    return rows


def scan_rows(path: str | os.PathLike[str]) -> tuple[Rows, list[str]]:
    """The good rows of a data file, and a sentence for each bad one.

    The file is a JSON list of objects, or JSON Lines (one object a line, empty lines are fine), UTF-8 with or without
    a byte-order mark. Each img is already looked up (`find_picture`); one that was not found stays as written.

    Raises:
        InputError: the file can't be read, isn't one of these, or holds no row at all.
    """
    rows, problems = Rows(path), []
    file, folder = str(path), os.path.dirname(path)
    folders: dict[str, bool] = {}  # of pictures, seen from the working directory: is there such a folder?
    count = 0
    for count, entry in enumerate(values_of(path), 1):
        try:
            if isinstance(entry, InputError):
                raise entry
            values = plain_values(entry) or row_from_json(entry, f"{file} row {count}").values()
        except InputError as problem:
            problems.append(str(problem))
            continue
        img = values[0]
        place = img and (_place_of(img, folder, folders) or img)
        rows.append((place, *values[1:]), count)
    if not count:
        raise InputError(f"{path}: the list is empty; at least one row is needed.")
    return rows, problems


def find_picture(img: str, json_path: str | os.PathLike[str]) -> Path | None:
    """Where the picture of a row is: looked up from the working directory, else from the JSON file's own folder."""
    place = _place_of(img, os.path.dirname(json_path), {})
    return None if place is None else Path(place)


def _place_of(img: str, folder: str, folders: dict[str, bool]) -> str | None:
    """The path of a picture, or None; in folders it is noted which ones there are, to ask the disk but once."""
    of_img = img.rpartition("/")[0]
    try:
        if of_img not in folders:
            folders[of_img] = not of_img or os.path.isdir(of_img)
        if folders[of_img] and os.path.lexists(img):  # a broken link counts as found: its error can then say what it is
            return img
        if not folder or img.startswith("/"):
            return None
        beside = f"{folder}/{img}"
        return beside if os.path.lexists(beside) else None
    except ValueError:  # a zero byte
        return None


def open_picture(source: PictureSource, target_size: int | None = None) -> Image.Image:
    """The picture in mode RGB, decoded in full and turned upright as its EXIF says; the first frame of an animation.

    Transparency is dropped, as `convert("RGB")` drops it. Grey of more than 8 bits is scaled to 8, not clipped: I;16
    from 0…65535; I and F, which have no range of their own in use, from the smallest of 0…1 (F only), 0…255, 0…65535
    and 0…2³¹ - 1 that holds their brightest value.

    With target_size, the edge in pixels that the picture will be resized to, a JPEG is decoded at a half, a quarter or
    an eighth where that leaves both edges at least LEAST_REDUCTION times as long: four times faster on a phone's photo,
    and after resizing no further from the whole picture than a level of grey or two. Smaller ones are decoded whole.

    source is a path, an open binary file or a Pillow image; an upright RGB image is returned as it is. Pillow's own limit
    of pixels is one per process, and is set to MAX_PIXELS there.

    Raises:
        InputError: source is no picture, is damaged or has more than MAX_PIXELS; the text has no line break.
    """
    if isinstance(source, Image.Image):
        name = "the picture"
    elif isinstance(source, str | os.PathLike):
        name = _printable(str(source))
        checked_file(str(source), name)
    else:
        name = "the picture file"
    _set_pixel_limit()
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        with Image.open(source, formats=_known_formats()) as image:
            if target_size is not None and image.width * image.height <= MAX_PIXELS:
                image.draft(None, (target_size * LEAST_REDUCTION,) * 2)  # type: ignore[arg-type]  # any mode; JPEG only
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


def values_of(path: str | os.PathLike[str]) -> Iterator[object]:
    """The values of a data file one by one; in JSON Lines, an InputError in place of a line that is no JSON.

    Raises:
        InputError: the file can't be read, or is neither a JSON list nor JSON Lines.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; a JSON file of rows is needed.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} isn't UTF-8; save the file as UTF-8.") from error
    start = _skip_blank(text, 0)
    if text[start : start + 1] == "{" and _has_rows_in_lines(text, start):
        return _entries_of_lines(path, text)
    return _entries_of_list(path, text, start)


def _skip_blank(text: str, start: int) -> int:
    return cast(re.Match[str], _BLANK.match(text, start)).end()


def _has_rows_in_lines(text: str, start: int) -> bool:
    """Whether text is JSON Lines rather than a single object: a row in its first line, or something after the object."""
    try:
        first, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return "\n" in text[start:].strip()  # a broken first line, then others
    return bool({"prompt", "label", "conversations", "messages"} & first.keys()) or _skip_blank(text, end) < len(text)


def _entries_of_lines(path: Path, text: str) -> Iterator[object]:
    start = number = 0
    while start < len(text):
        number += 1
        end = text.find("\n", start)  # not splitlines: that also splits at characters that JSON texts may hold
        end = len(text) if end < 0 else end
        line, start = text[start:end], end + 1
        if not line.strip(" \t\r\n"):
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            found = f"column {error.colno}: not JSON ({error.msg})"
            yield InputError(f"{path} line {number} {found}; a row in one line is needed.")
        except (ValueError, RecursionError) as error:
            yield InputError(f"{path} line {number}: JSON that can't be read ({error}); a row in one line is needed.")


def _entries_of_list(path: Path, text: str, start: int) -> Iterator[object]:
    """The values of a JSON list, each decoded when it is asked for: all at once would take five times the memory."""
    decode = json.JSONDecoder().raw_decode
    try:
        if text[start : start + 1] != "[":
            json.loads(text)  # tells what is wrong with it, if it is no JSON at all
            raise InputError(f"{path}: not a JSON list; a list of rows is needed, and {ROW_NEEDS}.")
        position = _skip_blank(text, start + 1)
        while text[position : position + 1] != "]":
            value, position = decode(text, position)
            yield value
            between = cast(re.Match[str], _NEXT.match(text, position))
            position = between.end()
            if not between[1] and text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        end = _skip_blank(text, position + 1)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno} column {error.colno}: not JSON ({error.msg}); a JSON list of rows is needed."
        ) from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in thousands of brackets
        raise InputError(f"{path}: JSON that can't be read ({error}); a list of rows is needed.") from error


def checked_file(path: str, name: str | None = None) -> os.stat_result:
    """What the system says of path, a file with something in it. A pipe would hang whoever opens it.

    Args:
        name: what to call it in a message, path if absent.

    Raises:
        InputError: it isn't.
    """
    name = _printable(path) if name is None else name
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
    return status


def _printable(path: str) -> str:
    """path as it can stand in a message: a line break or an escape code would garble the report."""
    return path if path.isprintable() else repr(path)


def _set_pixel_limit() -> None:
    # Pillow warns above its limit and refuses above twice the limit; setting it again and again is safe in threads.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken tags in a readable picture


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


def first_lines(problems: list[str]) -> list[str]:
    """As many problems as a screen has room for; then how many more there are, and which file, made here, has them all."""
    more = len(problems) - MOST_PROBLEM_LINES
    if more <= 0:
        return problems
    file = cache_folder() / "bad-rows.txt"
    where_all_are = f"all are in {file}"
    if is_first_process():  # the others print nothing
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            where_all_are = f"they can't be listed in {file}: {error.strerror}"
    return [*problems[:MOST_PROBLEM_LINES], f"… and {more} more; {where_all_are}."]
