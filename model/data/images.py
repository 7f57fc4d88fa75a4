"""Image files become Pillow images in mode RGB. Damaged and hostile ones become a sentence.

open_image("a.jpg")

Pictures from elsewhere are `model.data.remote_images`; the rows of data files name files.
"""

import filecmp
import os
import stat
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import IO, cast

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from model.data.file_kinds import is_lfs_pointer, is_web_page, text_of
from model.data.image_memory import decoding_bytes, memory_for
from model.errors import InputError

MAX_PIXELS = 200_000_000  # a 200-megapixel phone's largest photo; as RGB it takes 0.8 GB of memory
LEAST_REDUCTION = 3  # a JPEG decoded at reduced size has edges at least so many times as long as when resized
# The formats that people keep photos in. Others stay closed: for EPS, Pillow would run a program that the file holds.
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
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # TIFF 6.0 and BigTIFF, in both byte orders
HEAD = 4096  # bytes that tell what else a file is
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12
GREY_RANGES: dict[str, tuple[int, ...]] = {"I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535, 2**31 - 1)}
ImageSource = str | os.PathLike[str] | IO[bytes] | Image.Image


def image_places(file: str | os.PathLike[str], image_folder: str | None = None) -> list[str]:
    """The folders from which the relative images of a data file are looked up, as they stand before an image's path.

    image_folder (--image_folder) alone if it is given; else the working directory, as the released script has it, the data
    file's own folder, and the one above that. A folder that is two of these counts once.
    """
    if image_folder is not None:
        return [image_folder]
    beside = os.path.dirname(file)
    places: dict[str, str] = {}
    for place in ("", beside, os.path.normpath(os.path.join(beside, ".."))):
        places.setdefault(os.path.realpath(place), place)
    return list(places.values())


def image_path(img: str, places: Sequence[str], known_folders: dict[str, bool]) -> str | None:
    """Path of a row's picture, or None if it is in none of the places.

    Args:
        places: `image_places` of the row's data file.
        known_folders: whether there is a folder of that name. What is asked here is added, so that the disk is asked but
            once for each folder.

    Raises:
        InputError: two of the places have different files of that name.
    """
    try:
        candidates = [img] if os.path.isabs(img) else [os.path.join(place, img) for place in places]
        found = [path for path in candidates if _is_there(path, known_folders)]
    except ValueError:  # a zero byte
        return None
    for other in found[1:]:
        if not _is_same_file(found[0], other):
            raise InputError(
                f"{printable(img)} is two different files, {printable(found[0])} and {printable(other)}; --image_folder "
                "FOLDER with the right one's folder is needed."
            )
    if len(candidates) == 1:
        return candidates[0]  # what is wrong with that one is told
    return found[0] if found else None


def _is_there(path: str, known_folders: dict[str, bool]) -> bool:
    folder = os.path.dirname(path)
    if folder not in known_folders:
        known_folders[folder] = not folder or os.path.isdir(folder)
    return known_folders[folder] and os.path.lexists(path)  # a broken link is found: opening it says what is wrong


def _is_same_file(one: str, other: str) -> bool:
    """Whether two paths are one file, or files of the same content."""
    try:
        return os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def open_image(
    source: ImageSource,
    target_size: int | None = None,
    most_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = IMAGE_FORMATS,
    address: str | None = None,
) -> Image.Image:
    """The image in mode RGB, decoded in full and upright as its EXIF says. Of an animation, the first frame.

    Transparency is dropped, as `convert("RGB")` drops it. Grey of more than 8 bits is scaled to 8 bits, not clipped.
    Mode I;16 is scaled from 0…65535. Modes I and F have no fixed range: they are scaled from the smallest of 0…1 (F
    only), 0…255, 0…65535 and 0…2³¹ - 1 that holds their brightest value. In F, values above that or not finite are
    refused: they mark where there is no value, and would make all others black.

    Pillow's limit of pixels, which holds for the whole process, is set to MAX_PIXELS.

    Args:
        source: a path, an open binary file or a Pillow image. An upright RGB image is returned as it is.
        target_size: the edge, in pixels, that the image will be resized to. A large JPEG is then decoded at a half, a
            quarter or an eighth of its size, if both edges stay at least LEAST_REDUCTION times as long as that. Opening
            a phone's photo is four times faster, and after resizing it differs by one or two levels of grey.
        most_pixels: more are refused, at MAX_PIXELS the latest.
        formats: those that are opened, of a path or a file.
        address: where an open file comes from; messages name it.

    Raises:
        InputError: source is no image, is damaged, has more than most_pixels or than memory holds, or values that are no
            brightness. Its text is one line.
    """
    if isinstance(source, Image.Image):
        name = "the picture"
    elif isinstance(source, str | os.PathLike):
        name = printable(str(source))
        checked_file(str(source), name)
    else:
        name = "the picture file" if address is None else printable(address)
    _set_pixel_limit()
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        return _decoded(source, name, target_size, most_pixels, formats)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(_too_large(name, min(most_pixels, MAX_PIXELS))) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{name} isn't a picture; {IMAGE_NEEDED}{_what_it_is_instead(_head(source), formats)}."
        ) from error
    except OSError as error:
        # The system's errors have a number and a text for people; Pillow's own have neither.
        found = f"can't be read ({error.strerror})" if error.errno else "is damaged or cut short"
        raise InputError(f"{name} {found}; {IMAGE_NEEDED}.") from error
    except MemoryError as error:
        raise InputError(f"{name} takes more memory to decode than is left; a smaller picture is needed.") from error
    except Exception as error:  # a damaged file leaves Pillow's decoders as almost any exception
        raise InputError(f"{name} is damaged and can't be decoded; {IMAGE_NEEDED}.") from error


def checked_file(path: str, name: str | None = None) -> os.stat_result:
    """The status of the file at path, which has something in it.

    Args:
        name: what to call it in a message; path if absent.

    Raises:
        InputError: there is no such file, it is empty, or it is no ordinary file. (Opening a pipe would hang.)
    """
    name = printable(path) if name is None else name
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise InputError(
                f"{name} is a link to {os.readlink(path)}, which doesn't exist; {IMAGE_NEEDED}."
            ) from error
        if path.lower().startswith(("http://", "https://")):
            raise InputError(f"{name} is an address; a file is needed: download it, and name its path.") from error
        raise InputError(
            f"there is no file {name}; a relative path is looked up from the working directory, the JSON file's folder and "
            "the one above it, or from --image_folder."
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
    """path as it can stand in a message, without line breaks and escape codes."""
    return path if path.isprintable() else repr(path)


def _set_pixel_limit() -> None:
    # Pillow warns above its limit and refuses above twice the limit. Setting it for each image is safe in threads.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of broken tags in a readable picture


def _decoded(
    source: str | os.PathLike[str] | IO[bytes],
    name: str,
    target_size: int | None,
    most_pixels: int,
    formats: Sequence[str],
) -> Image.Image:
    with Image.open(source, formats=_known(formats)) as image:
        pixels = image.width * image.height
        if pixels > most_pixels:
            raise InputError(_too_large(name, most_pixels))
        if target_size is not None:
            image.draft(None, (target_size * LEAST_REDUCTION,) * 2)  # type: ignore[arg-type]  # any mode; JPEG only
        with memory_for(decoding_bytes(image, pixels), name):
            return _upright_rgb(image, name)


def _head(source: ImageSource) -> bytes:
    """The first bytes of a path or an open file; none of an image, or if they can't be read any more."""
    if isinstance(source, Image.Image):
        return b""
    try:
        with open(source, "rb") if isinstance(source, str | os.PathLike) else nullcontext(source) as file:
            file.seek(0)
            return file.read(HEAD)
    except OSError:
        return b""


def _what_it_is_instead(head: bytes, formats: Sequence[str]) -> str:
    """What a file is that is none of formats, as the end of a sentence; nothing if that isn't known."""
    text = text_of(head)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
        return ": it is HEIC, as iPhones save pictures; the same one as JPEG will do"
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"svg" in text and b"<html" not in text:
        return ": it is an SVG drawing; the same one as PNG will do"
    if head.startswith(TIFFS) and "TIFF" not in formats:
        return ": it is a TIFF; the same one as PNG or JPEG will do"
    if is_lfs_pointer(head):
        return ": it is a pointer of git-lfs; git lfs pull fetches the picture"
    if is_web_page(head):
        return ": it is a web page, where a download's link has led to a page or a login"
    return ""


def _known(formats: Sequence[str]) -> list[str]:
    """Those of formats that this build of Pillow knows."""
    Image.init()
    return [name for name in formats if name in Image.OPEN]


def _too_large(name: str, most_pixels: int) -> str:
    return f"{name} has more than {most_pixels / 1_000_000:.3g} million pixels; a smaller picture is needed."


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if min(image.size) < 1:
        raise InputError(f"{name} has no pixels ({image.width}×{image.height}); {IMAGE_NEEDED}.")
    if image.width * image.height > MAX_PIXELS:
        raise InputError(_too_large(name, MAX_PIXELS))
    image.load()
    image = _upright(image)
    if image.mode == "RGB":
        return image
    if image.mode in GREY_RANGES or image.mode.startswith("I;16"):
        image = _eight_bit_grey(image, name)
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
    except Exception:  # broken EXIF: viewers show such an image as it is stored
        return image


def _eight_bit_grey(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F" and not _has_greys_only(image):
        raise InputError(
            f"{name} has values that are no brightness (NaN, infinite or above {GREY_RANGES['F'][-1]}); a picture without "
            "them is needed."
        )
    grey = image.convert("F")
    ranges = GREY_RANGES.get(image.mode, (65535,))  # the other modes are I;16 in its byte orders
    brightest = cast(tuple[float, float], grey.getextrema())[1]
    white = next((top for top in ranges if brightest <= top), ranges[-1])
    return grey.point(lambda value: value * (255 / white) + 0.5).convert("L")  # + 0.5: Pillow truncates from F to L


def _has_greys_only(image: Image.Image) -> bool:
    """Whether no value of an image in mode F marks a place without one. Large negative ones do no harm: they are black."""
    import numpy  # Pillow's extrema pass over NaN

    values = numpy.asarray(image)  # float32[H, W]
    return bool(numpy.isfinite(values).all() and values.max() <= GREY_RANGES["F"][-1])
