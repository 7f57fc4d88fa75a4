"""A picture by path or by URL, for asking about it: rows of training data are always files."""

import io
import os
import stat
import warnings
from typing import IO, Any, cast

import requests
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from model.errors import InputError

MAX_PIXELS = 200_000_000  # a 200-megapixel phone's largest photo; as RGB it takes 0.8 GB of memory
LEAST_REDUCTION = 3  # times the resized edge: what a JPEG decoded at reduced size still has
# Only what people keep photos in. Pillow would also run Ghostscript on EPS, a program inside a stranger's file.
IMAGE_FORMATS = (
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
IMAGE_NEEDED = "a picture (JPEG, PNG, WebP, GIF, BMP, TIFF, …) is needed"
GREY_RANGES: dict[str, tuple[int, ...]] = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}
ImageSource = str | os.PathLike[str] | IO[bytes] | Image.Image


TIMEOUT = 20.0  # seconds without a byte
LARGEST_DOWNLOAD = 50 * 2**20  # bytes; a 200-megapixel JPEG is smaller
CHUNK = 2**16


def is_url(source: object) -> bool:
    """Whether source is text that names a picture on a server."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def downloaded(url: str) -> io.BytesIO:
    """What a server gives for url, in memory.

    Raises:
        InputError: the server can't be reached, refuses, is silent for TIMEOUT seconds, or sends too much.
    """
    content = io.BytesIO()
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT) as response:
            if not response.ok:
                raise InputError(
                    f"{url}: the server answered {response.status_code} {response.reason}; needed is a picture."
                )
            for chunk in response.iter_content(CHUNK):
                content.write(chunk)
                if content.tell() > LARGEST_DOWNLOAD:
                    raise InputError(f"{url}: more than {LARGEST_DOWNLOAD >> 20} MiB; a smaller picture is needed.")
    except requests.Timeout:
        raise InputError(f"{url}: no answer in {TIMEOUT:.0f} seconds; the address of a picture is needed.") from None
    except (requests.RequestException, UnicodeError) as error:
        raise InputError(f"{url}: can't be fetched ({_reason(error)}); the address of a picture is needed.") from None
    content.seek(0)
    return content


def _reason(error: Exception) -> str:
    """The last and most telling part of requests' nested errors."""
    cause = getattr(error.args[0], "reason", error.args[0]) if error.args else type(error).__name__
    return str(cause).rsplit(": ", 1)[-1].splitlines()[0]


def image_file(source: Any) -> Any:
    """source, or an open file of what it points to if it is a URL: something that `model.data.images.open_image` takes."""
    return downloaded(str(source)) if is_url(source) else source


def image_path(img: str, folder: str, known_folders: dict[str, bool]) -> str | None:
    """Path of a row's picture, or None: looked up from the working directory, else from the JSON file's own folder.

    Args:
        folder: the JSON file's own.
        known_folders: whether there is a folder of that name, seen from the working directory. What is asked here is
            added, so that the disk is asked but once for each folder.
    """
    of_img = img.rpartition("/")[0]
    try:
        if of_img not in known_folders:
            known_folders[of_img] = not of_img or os.path.isdir(of_img)
        if known_folders[of_img] and os.path.lexists(img):  # a broken link is found: opening it says what is wrong
            return img
        if not folder or img.startswith("/"):
            return None
        beside = f"{folder}/{img}"
        return beside if os.path.lexists(beside) else None
    except ValueError:  # a zero byte
        return None


def open_image(source: ImageSource, target_size: int | None = None) -> Image.Image:
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
        name = printable(str(source))
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
        raise InputError(f"{name} isn't a picture; {IMAGE_NEEDED}.") from error
    except OSError as error:
        # The system's errors have a number and a text for people; Pillow's own have neither.
        found = f"can't be read ({error.strerror})" if error.errno else "is damaged or cut short"
        raise InputError(f"{name} {found}; {IMAGE_NEEDED}.") from error
    except Exception as error:  # a damaged file leaves Pillow's decoders as almost any exception
        raise InputError(f"{name} is damaged and can't be decoded; {IMAGE_NEEDED}.") from error


def checked_file(path: str, name: str | None = None) -> os.stat_result:
    """What the system says of path, a file with something in it. A pipe would hang whoever opens it.

    Args:
        name: what to call it in a message, path if absent.

    Raises:
        InputError: it isn't.
    """
    name = printable(path) if name is None else name
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise InputError(
                f"{name} is a link to {os.readlink(path)}, which doesn't exist; {IMAGE_NEEDED}."
            ) from error
        raise InputError(
            f"there is no file {name}; a relative path is looked up from the working directory,"
            " then from the JSON file's own folder."
        ) from error
    except OSError as error:
        raise InputError(f"{name} can't be read ({error.strerror}); {IMAGE_NEEDED}.") from error
    except ValueError as error:
        raise InputError(f"{name} can't be the name of a file; {IMAGE_NEEDED}.") from error
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{name} is a folder; {IMAGE_NEEDED}.")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{name} is not an ordinary file; {IMAGE_NEEDED}.")
    if status.st_size == 0:
        raise InputError(f"{name} is empty (0 bytes); {IMAGE_NEEDED}.")
    return status


def printable(path: str) -> str:
    """path as it can stand in a message: a line break or an escape code would garble the report."""
    return path if path.isprintable() else repr(path)


def _set_pixel_limit() -> None:
    # Pillow warns above its limit and refuses above twice the limit; setting it again and again is safe in threads.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken tags in a readable picture


def _known_formats() -> list[str]:
    """IMAGE_FORMATS that this build of Pillow knows."""
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels; a smaller picture is needed."


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < 1:
        raise InputError(f"{name} has no pixels ({image.width}×{image.height}); {IMAGE_NEEDED}.")
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
