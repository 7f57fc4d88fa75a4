"""Image files: good ones are opened in RGB, hostile ones and bad addresses are refused with a sentence."""

import io
import math
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib

import pytest
from conftest import PROJECT
from PIL import Image

from model.data import images
from model.data.images import IMAGE_NEEDED, image_path, image_places, open_image
from model.errors import InputError

RED = (255, 0, 0)


def written(folder, content, name):
    (folder / name).write_bytes(content)
    return folder / name


def saved(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    return folder / name


def only_colour(image):
    ((_, colour),) = image.getcolors()
    return colour


def refused(path):
    with pytest.raises(InputError) as error:
        open_image(path)
    return str(error.value)


# Where a row's image is


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working directory, and data/sub in it, for a data file data/sub/rows.json."""
    (tmp_path / "data/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("file", "places"), [
    ("rows.json", ["", ".."]), ("data/rows.json", ["", "data"]), ("data/sub/rows.json", ["", "data/sub", "data"]),
    ("./data/sub/../rows.json", ["", "./data/sub/..", ]),
])  # fmt: skip
def test_places_of_images_are_the_working_directory_the_files_folder_and_the_one_above(folders, file, places):
    assert image_places(file) == places
    assert image_places(file, "elsewhere") == ["elsewhere"]


@pytest.mark.parametrize("place", ["", "data/sub", "data"])
def test_image_path_finds_an_image_in_each_place(folders, place):
    (folders / place / "0.png").touch()
    found = image_path("0.png", image_places("data/sub/rows.json"), {})
    assert found == os.path.join(place, "0.png")
    assert os.path.samefile(found, folders / place / "0.png")


def test_image_path_of_copies_of_one_file_is_the_working_directorys(folders):
    for place in ("", "data/sub", "data"):
        (folders / place / "0.png").write_bytes(b"the same")
    assert image_path("0.png", image_places("data/sub/rows.json"), {}) == "0.png"


def test_image_path_of_a_link_to_the_other_place_is_no_error(folders):
    (folders / "data/0.png").write_bytes(b"one file")
    (folders / "0.png").symlink_to("data/0.png")
    assert image_path("0.png", image_places("data/rows.json"), {}) == "0.png"


@pytest.mark.parametrize("content", [b"other", b"same size"])
def test_image_path_of_two_different_files_is_an_error_that_names_both(folders, content):
    (folders / "data/0.png").write_bytes(b"some size")
    (folders / "data/sub/0.png").write_bytes(content)
    with pytest.raises(
        InputError, match=r"^0.png is two different files, data/sub/0.png and data/0.png; --image_folder "
    ):
        image_path("0.png", image_places("data/sub/rows.json"), {})
    places = image_places("data/sub/rows.json", "data/sub")
    assert image_path("0.png", places, {}) == "data/sub/0.png"


def test_image_path_that_is_nowhere_in_the_image_folder_is_its_path_there(folders):
    (folders / "0.png").touch()
    assert image_path("0.png", image_places("rows.json", "data"), {}) == "data/0.png"


def test_image_path_of_an_absolute_path_is_that_path(tmp_path):
    (tmp_path / "0.png").touch()
    assert image_path(str(tmp_path / "0.png"), image_places("", "elsewhere"), {}) == str(tmp_path / "0.png")


@pytest.mark.parametrize("img", ["nowhere.png", "with\0zero.png", "x" * 5000])
def test_image_path_when_it_is_nowhere_is_none(tmp_path, img):
    assert image_path(img, image_places(tmp_path / "rows.json"), {}) is None


# Good pictures


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 10), (77, 77, 77)),
        ("RGB", RED, RED),
        ("RGBA", (255, 0, 0, 10), RED),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 255, (1, 1, 1)),
    ],
)
def test_picture_of_a_png_in_each_mode_is_rgb(tmp_path, mode, colour, expected):
    image = open_image(saved(tmp_path, Image.new(mode, (3, 2), colour)))
    assert (image.mode, image.size, only_colour(image)) == ("RGB", (3, 2), expected)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("PA", 0, (0, 0, 0)),
        ("La", (77, 255), (77, 77, 77)),
        ("RGBa", (255, 0, 0, 255), RED),
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), RED),
        ("I;16B", 65535, (255, 255, 255)),
        ("I", 200, (200, 200, 200)),
        ("I", 65535, (255, 255, 255)),
        ("I", 2**31 - 1, (255, 255, 255)),
        ("I", -5, (0, 0, 0)),
        ("F", 1.0, (255, 255, 255)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 200.0, (200, 200, 200)),
        ("F", 65535.0, (255, 255, 255)),
    ],
)
def test_picture_of_an_image_in_each_other_mode_is_rgb(mode, colour, expected):
    image = open_image(Image.new(mode, (3, 2), colour))
    assert (image.mode, only_colour(image)) == ("RGB", expected)


def test_picture_of_16_bits_keeps_its_greys_apart(tmp_path):
    image = Image.new("I;16", (2, 1))
    image.putpixel((0, 0), 300 * 100)
    image.putpixel((1, 0), 600 * 100)
    opened = open_image(saved(tmp_path, image))
    assert [opened.getpixel((x, 0))[0] for x in (0, 1)] == [117, 233]


def test_picture_with_a_palette_has_the_palettes_colour(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (2, 2), RED).quantize(4))
    assert only_colour(open_image(path)) == RED


def test_picture_with_a_transparent_palette_is_opened_without_a_warning(tmp_path):
    image = Image.new("RGB", (2, 2), RED).quantize(4)
    path = saved(tmp_path, image, transparency=bytes([0, 255, 255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only_colour(open_image(path)) == RED


def test_picture_in_cmyk_jpeg_is_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.jpg", quality=100)
    red, green, blue = only_colour(open_image(path))
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_with_an_exif_orientation_is_upright(tmp_path, orientation):
    upright = Image.new("RGB", (16, 8))
    upright.paste(RED, (0, 0, 8, 4))  # red in the upper left corner
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(stored_as[orientation]) if orientation in stored_as else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert open_image(saved(tmp_path, stored, exif=exif)).tobytes() == upright.tobytes()


def test_picture_with_broken_exif_is_as_it_is_stored(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (8, 8)), "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert open_image(path).size == (8, 8)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_picture_of_an_animation_is_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert only_colour(open_image(path)) == RED


def test_picture_with_the_wrong_ending_is_opened_by_its_content(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (2, 2), RED), "a.jpg", format="PNG")
    assert only_colour(open_image(path)) == RED


def test_picture_from_an_open_file_is_rgb():
    file = io.BytesIO()
    Image.new("L", (2, 2), 7).save(file, "PNG")
    assert only_colour(open_image(file)) == (7, 7, 7)


def test_picture_from_an_upright_rgb_image_is_that_image():
    image = Image.new("RGB", (2, 2))
    assert open_image(image) is image


# Hostile pictures


def test_picture_when_there_is_no_file_says_where_it_was_looked_up(tmp_path):
    assert refused(tmp_path / "no.png") == (
        f"there is no file {tmp_path}/no.png; a relative path is looked up from the working directory, the JSON file's folder"
        " and the one above it, or from --image_folder."
    )


def test_picture_when_it_is_an_address_says_that_a_file_is_needed():
    url = "https://example.org/a.png"
    assert refused(url) == f"{url} is an address; a file is needed: download it, and name its path."


def test_picture_when_it_is_empty_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert "a.jpg is empty (0 bytes); a picture" in refused(tmp_path / "a.jpg")


def test_picture_when_it_is_a_folder_is_refused(tmp_path):
    assert "is a folder; a picture" in refused(tmp_path)


def test_picture_when_it_is_a_broken_link_names_where_it_leads(tmp_path):
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    assert "a.jpg is a link to gone.jpg, which doesn't exist" in refused(tmp_path / "a.jpg")


def test_picture_when_it_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "a.jpg").symlink_to("a.jpg")
    assert "a.jpg can't be read (Too many levels of symbolic links)" in refused(tmp_path / "a.jpg")


def test_picture_when_it_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert "a.jpg is not an ordinary file" in refused(tmp_path / "a.jpg")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("place", [(0, 0), (2, 1)])
def test_picture_when_a_value_is_no_brightness_is_refused(tmp_path, value, place):
    image = Image.new("F", (3, 2), 200.0)
    image.putpixel(place, value)
    path = saved(tmp_path, image, "a.tif")
    assert refused(path) == (
        f"{path} has values that are no brightness (NaN, infinite or above 2147483647); a picture without them is needed."
    )


def test_picture_with_a_large_negative_value_is_black_there_alone(tmp_path):
    image = Image.new("F", (3, 2), 200.0)
    image.putpixel((0, 0), -3.4e38)
    opened = open_image(saved(tmp_path, image, "a.tif"))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (200, 200, 200)]


def test_picture_when_its_name_holds_a_line_break_is_refused_in_one_line():
    assert refused("a\nb.jpg").startswith(r"there is no file 'a\nb.jpg';")


def test_picture_when_its_name_holds_a_zero_is_refused():
    assert "can't be the name of a file" in refused("a\0.jpg")


@pytest.mark.parametrize("content", [b"this is a text\n" * 9, b"<html><body>404</body></html>", b"\0" * 999, b"P"])
def test_picture_when_it_is_something_else_is_refused(tmp_path, content):
    assert "a.jpg isn't a picture; a picture" in refused(written(tmp_path, content, "a.jpg"))


HEIC = "it is HEIC, as iPhones save pictures; the same one as JPEG will do."
SVG = "it is an SVG drawing; the same one as PNG will do."
POINTER = "it is a pointer of git-lfs; git lfs pull fetches the picture."
PAGE = "it is a web page, where a download's link has led to a page or a login."


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\0\0\0\x28ftypheic\0\0\0\0mif1MiHB" + b"\0" * 99, HEIC),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", HEIC),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="9"/>', SVG),
        (b"\n<SVG/>", SVG),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1963\n", POINTER),
        (b"<html><body>404</body></html>", PAGE),
        (b"\r\n<!DOCTYPE html><title>Sign in</title><svg/>", PAGE),
        (b'<?xml version="1.0"?><html><svg/></html>', PAGE),
    ],
)
def test_picture_when_it_is_something_known_is_told_for_what_it_is(tmp_path, content, told):
    path = written(tmp_path, content, "a.jpg")
    assert refused(path) == f"{path} isn't a picture; {IMAGE_NEEDED}: {told}"
    assert refused(io.BytesIO(content)) == f"the picture file isn't a picture; {IMAGE_NEEDED}: {told}"


def test_picture_when_it_is_a_film_is_no_heic(tmp_path):
    assert refused(written(tmp_path, b"\0\0\0\x18ftypisom", "a.jpg")).endswith(f"isn't a picture; {IMAGE_NEEDED}.")


def test_picture_when_it_is_a_program_for_ghostscript_is_not_run(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (2, 2)), "a.eps")
    assert "a.eps isn't a picture" in refused(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tiff"])
def test_picture_when_it_is_cut_short_is_refused(tmp_path, name):
    whole = saved(tmp_path, Image.effect_noise((64, 64), 99).convert("RGB"), name).read_bytes()
    half = written(tmp_path, whole[: len(whole) // 2], "half-" + name)
    assert f"half-{name} " in refused(half)


def test_picture_when_it_has_no_pixels_is_refused():
    assert refused(Image.new("RGB", (0, 5))).startswith("the picture has no pixels (0×5); a picture")


def png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20_000, 10_001), (100_000, 100_000)])
def test_picture_when_it_has_over_200_million_pixels_is_refused(tmp_path, width, height):
    path = written(tmp_path, png_that_claims(width, height), "a.png")
    assert refused(path) == f"{path} has more than 200 million pixels; a smaller picture is needed."


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.bmp", "a.gif"])
def test_picture_that_memory_has_no_room_for_is_not_damaged(tmp_path, name):
    path = saved(tmp_path, Image.new("L", (6000, 6000)), name)
    program = "import sys; from model.data.images import open_image; open_image(sys.argv[1])"
    command = ["bash", "-c", 'ulimit -v 200000; exec "$@"', "bash", sys.executable, "-c", program, path]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == (
        f"model.errors.InputError: {path} takes more memory to decode than is left; a smaller picture is needed."
    )


def test_picture_when_its_header_promises_more_than_it_holds_is_refused(tmp_path):
    assert "a.png is damaged or cut short" in refused(written(tmp_path, png_that_claims(500, 500), "a.png"))


def test_picture_that_pillow_would_warn_about_is_opened_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)  # Pillow warns from half of it on
    path = saved(tmp_path, Image.new("RGB", (9, 9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == (9, 9)


def test_pictures_with_bytes_changed_are_opened_or_refused_in_one_plain_line(tmp_path):
    rng = random.Random(0)
    image = Image.effect_noise((24, 24), 99).convert("RGB")
    refused = []
    for name in ("a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tiff"):
        whole = saved(tmp_path, image, name).read_bytes()
        for _ in range(50):
            mutated = bytearray(whole)
            for _ in range(rng.randrange(1, 9)):
                mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            try:
                open_image(io.BytesIO(bytes(mutated)))
            except InputError as problem:
                refused.append(str(problem))
    assert refused
    assert [sentence for sentence in refused if "\n" in sentence or "<" in sentence] == []


# Decoding at reduced size


def photo(width, height):
    """A picture with edges, gradients and noise, as photos have them."""
    image = Image.radial_gradient("L").resize((width, height))
    noise = Image.frombytes("L", (64, 64), random.Random(1).randbytes(64 * 64)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.merge("RGB", (image, noise, image.transpose(Image.Transpose.ROTATE_180)))


def test_picture_of_a_large_jpeg_is_decoded_at_reduced_size(tmp_path):
    path = saved(tmp_path, photo(3000, 2000), "a.jpg", quality=90)
    assert open_image(path, 224).size == (1500, 1000)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("a.jpg", (1300, 1300)), ("a.png", (3000, 2000))])
def test_picture_of_another_format_or_a_smaller_jpeg_is_decoded_whole(tmp_path, name, size):
    path = saved(tmp_path, photo(*size), name)
    assert open_image(path, 224).tobytes() == open_image(path).tobytes()


def test_picture_decoded_at_reduced_size_is_nearly_the_same_when_resized(tmp_path):
    path = saved(tmp_path, photo(3000, 2000), "a.jpg", quality=90)
    whole, reduced = (
        open_image(path, size).resize((224, 224), Image.Resampling.BICUBIC).tobytes() for size in (None, 224)
    )
    differences = [abs(a - b) for a, b in zip(whole, reduced, strict=True)]
    assert max(differences) <= 3
    assert sum(differences) / len(differences) < 0.5


def test_picture_decoded_at_reduced_size_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, photo(3000, 2000), "a.jpg", exif=exif)
    assert open_image(path, 224).size == (1000, 1500)
