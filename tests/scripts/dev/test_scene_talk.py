"""What is said of a scene is true of it."""

from random import Random

import pytest

from scripts.dev.scene_talk import random_turn
from scripts.dev.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, random_scene

RED_STAR = Thing(SHAPES[3], COLOURS[0], column=0, x=37, y=112, radius=30)
BLUE_SQUARE = Thing(SHAPES[1], COLOURS[4], column=2, x=187, y=112, radius=30)
RED_STAR_AND_BLUE_SQUARE = Scene(BACKGROUNDS[0], (RED_STAR, BLUE_SQUARE), seed=1)


def answers(scene: Scene) -> dict[str, str]:
    """Every question that is ever asked about the scene, with its answer."""
    random = Random(1)
    turns = [random_turn(scene, random) for _ in range(6000)]
    return {turn.question: turn.answer for turn in turns}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("描述这张图片。", "蓝天白云下有一颗红色的星星和一个蓝色的方块。"),
        ("Describe the image.", "A red star and a blue square under a blue sky with white clouds."),
        ("这是在哪里？", "这是在蓝天白云下。"),
        ("图里有几个物体？", "图里有两个物体。"),
        ("星星是什么颜色的？", "星星是红色的。"),
        ("What colour is the square?", "The square is blue."),
        ("方块在哪一边？", "方块在右边。"),
        ("中间是什么？", "中间是空的。"),
        ("有圆吗？", "没有圆。"),
        ("有星星吗？", "有，有一颗红色的星星。"),
        ("有红色的物体吗？", "有。"),
        ("Is anything green?", "No."),
        ("这里是茂密的森林吗？", "不是，这里是蓝天白云。"),
        ("这里是蓝天白云吗？", "是的，这里是蓝天白云。"),
    ],
)
def test_random_turn_about_a_known_scene_answers_truly(question, answer):
    assert answers(RED_STAR_AND_BLUE_SQUARE)[question] == answer


def test_random_turn_with_the_same_lot_says_the_same():
    scene = random_scene(Random(2))

    assert random_turn(scene, Random(9)) == random_turn(scene, Random(9))


def test_random_turn_gives_one_answer_for_one_question():
    random = Random(1)
    turns = [random_turn(RED_STAR_AND_BLUE_SQUARE, random) for _ in range(3000)]

    assert len({turn.question for turn in turns}) == len({(turn.question, turn.answer) for turn in turns})
