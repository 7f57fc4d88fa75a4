"""Scenes: the same facts give the same picture, and what the facts say is in it."""

from random import Random

import pytest

from scripts.dev.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Background,
    Scene,
    Thing,
    crowded_scene,
    draw,
    random_scene,
)


def test_draw_of_the_same_scene_gives_the_same_picture():
    scene = random_scene(Random(3))

    assert draw(scene).tobytes() == draw(scene).tobytes()


def test_draw_with_another_seed_gives_another_picture():
    scene = random_scene(Random(3))
    other = Scene(scene.background, scene.things, scene.seed + 1)

    assert draw(scene).tobytes() != draw(other).tobytes()


@pytest.mark.parametrize("size", [SIZE, 112])
def test_draw_gives_an_rgb_picture_of_the_size_asked_for(size):
    picture = draw(random_scene(Random(3)), size)

    assert (picture.mode, picture.size) == ("RGB", (size, size))


@pytest.mark.parametrize("column", [0, 1, 2])
def test_draw_puts_a_thing_into_its_third_of_the_picture(column):
    meadow = BACKGROUNDS[1]
    purple = COLOURS[5]
    picture = draw(Scene(meadow, (Thing(SHAPES[0], purple, column, x=37 + 75 * column, y=112, radius=30),), seed=4))

    def distance_from_purple(x: int, y: int) -> int:
        return sum(abs(a - b) for a, b in zip(picture.getpixel((x, y)), purple.rgb, strict=True))

    purple_columns = {x * 3 // SIZE for x in range(SIZE) for y in range(SIZE) if distance_from_purple(x, y) < 60}
    assert purple_columns == {column}


@pytest.mark.parametrize("background", BACKGROUNDS, ids=lambda background: background.en)
def test_paint_covers_the_whole_picture(background: Background):
    colours = draw(Scene(background, (), seed=5)).getcolors(SIZE * SIZE)

    assert (0, 0, 0) not in [colour for _, colour in colours]


def test_random_scene_has_one_to_three_different_shapes_from_left_to_right():
    scenes = [random_scene(Random(seed)) for seed in range(200)]

    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    for scene in scenes:
        columns = [thing.column for thing in scene.things]
        assert columns == sorted(set(columns))
        assert len({thing.shape.en for thing in scene.things}) == len(scene.things)


def test_random_scene_keeps_the_background_it_is_given():
    assert random_scene(Random(3), BACKGROUNDS[4]).background is BACKGROUNDS[4]


def test_crowded_scene_has_an_object_in_each_of_six_places_and_none_covers_another():
    for seed in range(100):
        things = crowded_scene(Random(seed)).things

        assert sorted((thing.column, thing.y > SIZE / 2) for thing in things) == [
            (column, is_low) for column in range(3) for is_low in (False, True)
        ]
        assert all(
            max(abs(one.x - other.x), abs(one.y - other.y)) >= one.radius + other.radius
            for one in things
            for other in things
            if one is not other
        )
