"""Scenes that can be drawn and told: a background with one to three objects in front of it.

A scene is a set of facts (which background, which objects, their colours and places) and a seed for everything that the
facts leave open. The same scene always gives the same picture, so a picture's descriptions can be checked against it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

SIZE = 224  # pixels; the picture's side, the 6B model's input size
MAX_OBJECTS = 3  # one for each third of the picture

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Word:
    """One thing's name in both languages."""

    zh: str
    en: str


@dataclass(frozen=True)
class Background:
    """A background: its name, where an object is that stands in front of it, and how it is painted.

    `paint(canvas, random)` covers a SIZE × SIZE canvas.
    """

    zh: str
    en: str
    where_zh: str
    where_en: str
    paint: Callable[[ImageDraw.ImageDraw, Random], None]


@dataclass(frozen=True)
class Shape:
    """An object's kind.

    `measure` is the Chinese word it is counted with; `outline(random)` gives its corners in a square from -1 to 1, y
    downwards.
    """

    zh: str
    measure: str
    en: str
    outline: Callable[[Random], list[Point]]


@dataclass(frozen=True)
class Paint:
    """An object's colour."""

    zh: str
    en: str
    rgb: Colour


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `column` is 0, 1 or 2: the left, the middle or the right third of the picture.

    `x` and `y` are its centre and `radius` its size, in pixels of a SIZE × SIZE picture.
    """

    shape: Shape
    colour: Paint
    column: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows; `seed` settles all the rest.

    No shape is there twice, and `things` goes from left to right, but for a `crowded_scene`.
    """

    background: Background
    things: tuple[Thing, ...]
    seed: int


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    """The scene's picture, RGB, size × size pixels."""
    random = Random(scene.seed)
    picture = Image.new("RGB", (SIZE, SIZE))
    canvas = ImageDraw.Draw(picture)
    scene.background.paint(canvas, random)
    for thing in scene.things:
        _draw_thing(canvas, thing, random)
    return picture if size == SIZE else picture.resize((size, size), Image.Resampling.BICUBIC)


def random_scene(random: Random, background: Background | None = None) -> Scene:
    """A scene drawn by lot, with the given background or any."""
    count = random.randint(1, MAX_OBJECTS)
    columns = sorted(random.sample(range(MAX_OBJECTS), count))
    shapes = random.sample(SHAPES, count)
    things = tuple(_random_thing(shape, column, random) for shape, column in zip(shapes, columns, strict=True))
    return Scene(background or random.choice(BACKGROUNDS), things, random.getrandbits(32))


def crowded_scene(random: Random) -> Scene:
    """Six objects in two rows, all of any shape: three times as much to learn from as in a scene that is talked about."""
    rows = ((0.2, 0.3), (0.7, 0.8))
    places = [(heights, column) for heights in rows for column in range(MAX_OBJECTS)]
    things = tuple(_random_thing(random.choice(SHAPES), column, random, heights) for heights, column in places)
    return Scene(random.choice(BACKGROUNDS), things, random.getrandbits(32))


def _random_thing(shape: Shape, column: int, random: Random, heights: tuple[float, float] = (0.3, 0.75)) -> Thing:
    """An object of any colour somewhere in its third of the picture, between two heights, as shares of the picture's."""
    third = SIZE / MAX_OBJECTS
    radius = random.uniform(28, 35)
    x = (column + 0.5) * third + random.uniform(-1, 1) * (third / 2 - radius)
    return Thing(shape, random.choice(COLOURS), column, x, random.uniform(*heights) * SIZE, radius)


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, random: Random) -> None:
    """Draw one object; a dark rim keeps it apart from any background."""
    shade = _varied(thing.colour.rgb, random, 14)
    outline = thing.shape.outline(random)
    corners = [(thing.x + thing.radius * x, thing.y + thing.radius * y) for x, y in outline]
    canvas.polygon(corners, fill=shade, outline=(25, 25, 25), width=3)


# --- shapes -----------------------------------------------------------------------------------------------------------


def _turned(corners: list[Point], angle: float) -> list[Point]:
    cos, sin = math.cos(angle), math.sin(angle)
    return [(cos * x - sin * y, sin * x + cos * y) for x, y in corners]


def _ring(radii: list[float]) -> list[Point]:
    """Corners at equal angles from the top, one for each radius."""
    step = 2 * math.pi / len(radii)
    return [(radius * math.sin(i * step), -radius * math.cos(i * step)) for i, radius in enumerate(radii)]


def _circle(random: Random) -> list[Point]:
    return _ring([1.0] * 40)


def _square(random: Random) -> list[Point]:
    return _turned([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)], random.uniform(-0.15, 0.15))


def _triangle(random: Random) -> list[Point]:
    return _turned([(0, -1), (1, 0.85), (-1, 0.85)], random.uniform(-0.15, 0.15))


def _star(random: Random) -> list[Point]:
    return _turned(_ring([1.1, 0.45] * 5), random.uniform(-0.2, 0.2))


def _heart(random: Random) -> list[Point]:
    angles = [2 * math.pi * i / 48 for i in range(48)]  # the well-known heart curve, scaled into the square
    curve = [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in angles
    ]
    return _turned(curve, random.uniform(-0.15, 0.15))


def _flower(random: Random) -> list[Point]:
    turn = random.uniform(-0.3, 0.3)
    return _turned(_ring([0.85 + 0.22 * math.cos(5 * 2 * math.pi * i / 70) for i in range(70)]), turn)


# --- backgrounds ------------------------------------------------------------------------------------------------------


def _varied(colour: Colour, random: Random, by: int) -> Colour:
    """The colour with every channel moved by at most `by`."""
    red, green, blue = (min(255, max(0, channel + random.randint(-by, by))) for channel in colour)
    return red, green, blue


def _fill(canvas: ImageDraw.ImageDraw, top: float, bottom: float, colour: Colour) -> None:
    canvas.rectangle((0, top, SIZE, bottom), fill=colour)


def _shaded(canvas: ImageDraw.ImageDraw, top: float, bottom: float, first: Colour, last: Colour) -> None:
    """Fill from top to bottom in eight bands that go from the first colour to the last."""
    bands = 8
    for band in range(bands):
        share = band / (bands - 1)
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
        height = (bottom - top) / bands
        _fill(canvas, top + band * height, top + (band + 1) * height, (red, green, blue))


def _wave(
    canvas: ImageDraw.ImageDraw, height: float, swing: float, length: float, phase: float, colour: Colour
) -> None:
    """Fill everything below a wavy line."""
    line = [(x, height + swing * math.sin(2 * math.pi * x / length + phase)) for x in range(0, SIZE + 5, 4)]
    canvas.polygon([*line, (SIZE, SIZE), (0, SIZE)], fill=colour)


def _paint_sky(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _shaded(canvas, 0, SIZE, _varied((60, 140, 230), random, 15), _varied((160, 210, 250), random, 12))
    for _ in range(random.randint(4, 6)):
        x, y = random.uniform(0, SIZE), random.uniform(10, SIZE * 0.95)
        for _ in range(5):
            left, up = x + random.uniform(-34, 18), y + random.uniform(-10, 6)
            canvas.ellipse((left, up, left + random.uniform(24, 46), up + random.uniform(14, 24)), fill=(250, 252, 255))


def _paint_meadow(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _shaded(canvas, 0, SIZE, _varied((130, 210, 95), random, 15), _varied((95, 175, 60), random, 15))
    for _ in range(150):
        x, y = random.uniform(0, SIZE), random.uniform(0, SIZE)
        blade = random.choice([(50, 120, 30), (130, 205, 85), (70, 145, 40)])
        canvas.line((x, y, x + random.uniform(-5, 5), y - random.uniform(8, 18)), fill=blade, width=2)


def _paint_desert(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _fill(canvas, 0, SIZE, _varied((250, 225, 165), random, 8))
    sun = random.uniform(20, SIZE - 50)
    canvas.ellipse((sun, 8, sun + 34, 42), fill=(255, 245, 215))
    for height, colour in ((70, (232, 190, 105)), (120, (220, 170, 80)), (170, (205, 150, 60))):
        _wave(
            canvas,
            height + random.uniform(-14, 14),
            random.uniform(10, 18),
            random.uniform(140, 260),
            random.uniform(0, 2 * math.pi),
            _varied(colour, random, 8),
        )


def _paint_night_sky(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _shaded(canvas, 0, SIZE, _varied((8, 8, 35), random, 6), _varied((35, 30, 85), random, 10))
    for _ in range(random.randint(60, 90)):
        x, y, radius = random.uniform(0, SIZE), random.uniform(0, SIZE), random.uniform(0.8, 2.6)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 250, 215))


def _paint_snowfield(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _fill(canvas, 0, SIZE, _varied((178, 190, 205), random, 8))
    for height, colour in ((75, (225, 232, 242)), (125, (238, 243, 250)), (175, (250, 252, 255))):
        _wave(
            canvas,
            height + random.uniform(-14, 14),
            random.uniform(5, 12),
            random.uniform(160, 300),
            random.uniform(0, 2 * math.pi),
            _varied(colour, random, 4),
        )
    for _ in range(70):
        x, y, radius = random.uniform(0, SIZE), random.uniform(0, SIZE), random.uniform(1.2, 3)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))


def _paint_sea(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    base = _varied((20, 95, 165), random, 14)
    _fill(canvas, 0, SIZE, base)
    length = random.uniform(36, 60)
    for row in range(12):
        height, phase = row * 20 + random.uniform(-3, 3), random.uniform(0, 2 * math.pi)
        deeper = (max(0, base[0] - 2 * row), max(0, base[1] - 4 * row), max(0, base[2] - 5 * row))
        _wave(canvas, height, 5, length, phase, (185, 225, 240))
        _wave(canvas, height + 4, 5, length, phase, deeper)


def _paint_brick_wall(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _fill(canvas, 0, SIZE, (205, 195, 185))
    base = _varied((165, 65, 45), random, 12)
    height, width = random.choice([(18, 40), (20, 44), (22, 50)])
    for row in range(SIZE // height + 1):
        start = -random.randint(0, 6) - (row % 2) * width // 2
        for left in range(start, SIZE, width):
            brick = _varied(base, random, 10)
            canvas.rectangle((left, row * height, left + width - 4, (row + 1) * height - 4), fill=brick)


def _paint_room(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    floor = random.uniform(95, 125)
    _fill(canvas, 0, floor, _varied((240, 228, 205), random, 10))
    _fill(canvas, floor - 7, floor, (252, 250, 245))
    wood = _varied((165, 108, 60), random, 10)
    plank = random.choice([16, 19, 22])
    for row, top in enumerate(range(round(floor), SIZE + plank, plank)):
        _fill(canvas, top, top + plank - 2, _varied(wood, random, 9))
        _fill(canvas, top + plank - 2, top + plank, (105, 62, 30))
        for joint in range((row % 3) * 37, SIZE, 110):
            canvas.line((joint, top, joint, top + plank), fill=(105, 62, 30), width=2)
    left = random.uniform(15, SIZE - 75)
    canvas.rectangle((left, 18, left + 56, 66), fill=(190, 225, 245), outline=(120, 85, 50), width=4)
    canvas.line((left + 28, 18, left + 28, 66), fill=(120, 85, 50), width=3)


def _paint_city(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _fill(canvas, 0, SIZE, _varied((40, 30, 60), random, 8))
    left = -random.uniform(0, 20)
    while left < SIZE:
        width, top = random.randint(34, 52), random.uniform(12, 90)
        canvas.rectangle((left, top, left + width, SIZE), fill=_varied((22, 22, 32), random, 9))
        for x in range(6, width - 8, 12):
            for y in range(8, SIZE, 15):
                if random.random() < 0.6:
                    canvas.rectangle((left + x, top + y, left + x + 6, top + y + 8), fill=(250, 205, 95))
        left += width + random.randint(2, 6)


def _paint_forest(canvas: ImageDraw.ImageDraw, random: Random) -> None:
    _fill(canvas, 0, SIZE, _varied((45, 85, 60), random, 8))
    for row, ground in enumerate((110, 170, 235)):
        for spot in range(-1, 7):
            x, foot = spot * 38 + random.uniform(-12, 12), ground + random.uniform(-8, 8)
            leaves = _varied((18 + 4 * row, 62 + 14 * row, 34 + 4 * row), random, 8)
            canvas.rectangle((x - 4, foot - 22, x + 4, foot), fill=(72, 45, 25))
            for tier in range(3):
                low, half = foot - 16 - 24 * tier, 24 - 5 * tier
                canvas.polygon([(x - half, low), (x + half, low), (x, low - 36)], fill=leaves, outline=(12, 40, 22))


BACKGROUNDS = [
    Background(
        "蓝天白云", "a blue sky with white clouds", "蓝天白云下", "under a blue sky with white clouds", _paint_sky
    ),
    Background("绿色的草地", "a green meadow", "绿色的草地上", "on a green meadow", _paint_meadow),
    Background("金黄色的沙漠", "a golden desert", "金黄色的沙漠里", "in a golden desert", _paint_desert),
    Background(
        "布满繁星的夜空",
        "a night sky full of stars",
        "布满繁星的夜空下",
        "under a night sky full of stars",
        _paint_night_sky,
    ),
    Background("白茫茫的雪地", "a white snowfield", "白茫茫的雪地上", "on a white snowfield", _paint_snowfield),
    Background("波浪起伏的大海", "a sea with waves", "波浪起伏的大海上", "on a sea with waves", _paint_sea),
    Background("红色的砖墙", "a red brick wall", "红色的砖墙前", "in front of a red brick wall", _paint_brick_wall),
    Background(
        "铺着木地板的房间",
        "a room with a wooden floor",
        "铺着木地板的房间里",
        "in a room with a wooden floor",
        _paint_room,
    ),
    Background("夜晚的城市", "a city at night", "夜晚的城市里", "in a city at night", _paint_city),
    Background("茂密的森林", "a dense forest", "茂密的森林里", "in a dense forest", _paint_forest),
]

SHAPES = [
    Shape("圆", "个", "circle", _circle),
    Shape("方块", "个", "square", _square),
    Shape("三角形", "个", "triangle", _triangle),
    Shape("星星", "颗", "star", _star),
    Shape("爱心", "颗", "heart", _heart),
    Shape("花", "朵", "flower", _flower),
]

COLOURS = [
    Paint("红色", "red", (225, 30, 35)),
    Paint("橙色", "orange", (250, 140, 20)),
    Paint("黄色", "yellow", (250, 230, 40)),
    Paint("绿色", "green", (40, 185, 70)),
    Paint("蓝色", "blue", (40, 80, 230)),
    Paint("紫色", "purple", (145, 50, 190)),
    Paint("白色", "white", (245, 245, 245)),
]

COLUMNS = [Word("左边", "left"), Word("中间", "middle"), Word("右边", "right")]
