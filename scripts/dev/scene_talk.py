"""What can be said of a scene: questions with their true answers, in Chinese and English.

The wording of a question settles the wording of its answer, so that a model can be held to it word for word. What is
said here never uses the words that `make_fewshot_data.py` teaches: build_tiny.py checks that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from scripts.dev.scenes import BACKGROUNDS, COLOURS, COLUMNS, SHAPES, Scene, Thing

NUMBERS_ZH = ["零", "一", "两", "三"]
NUMBERS_EN = ["no", "one", "two", "three"]


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `kind` names what is asked, for the report by kind."""

    kind: str
    question: str
    answer: str


def _name_zh(thing: Thing) -> str:
    return f"一{thing.shape.measure}{thing.colour.zh}的{thing.shape.zh}"


def _name_en(thing: Thing) -> str:
    return f"{'an' if thing.colour.en[0] in 'aeiou' else 'a'} {thing.colour.en} {thing.shape.en}"


def _list_zh(names: Sequence[str]) -> str:
    return "和".join(["、".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _list_en(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _caption(scene: Scene, random: Random) -> Turn:
    ground = scene.background
    things = _list_zh([_name_zh(thing) for thing in scene.things])
    things_en = _list_en([_name_en(thing) for thing in scene.things])
    question, answer = random.choice(
        [
            ("描述这张图片。", f"{ground.where_zh}有{things}。"),
            ("请描述一下这幅画。", f"{ground.where_zh}有{things}。"),
            ("看图说一句话。", f"{things}在{ground.where_zh}。"),
            ("你看到了什么？", f"我看到了{things}，后面是{ground.zh}。"),
            ("这幅画画的是什么？", f"画的是{ground.zh}，还有{things}。"),
            ("这幅画的内容是什么？", f"这幅画以{ground.zh}为背景，前面有{things}。"),
            ("给这张图片写一个说明。", f"这是一张{ground.zh}的图片，里面有{things}。"),
            ("图里有哪些东西？", f"有{ground.zh}，也有{things}。"),
            ("Describe the image.", _sentence(f"{things_en} {ground.where_en}")),
            ("What do you see?", f"I see {things_en} {ground.where_en}."),
            ("Write a caption for this picture.", f"A picture of {ground.en} with {things_en}."),
            ("Tell me about this picture.", _sentence(f"there is {things_en} {ground.where_en}")),
        ]
    )
    return Turn("caption", question, answer)


def _place(scene: Scene, random: Random) -> Turn:
    ground = scene.background
    question, answer = random.choice(
        [
            ("这是在哪里？", f"这是在{ground.where_zh}。"),
            ("这是什么地方？", f"这是{ground.zh}。"),
            ("这些物体在哪里？", f"{ground.where_zh}。"),
            ("物体的后面画着什么？", f"后面画着{ground.zh}。"),
            ("Where is this?", f"This is {ground.where_en}."),
            ("What place is this?", _sentence(ground.en)),
        ]
    )
    return Turn("place", question, answer)


def _place_check(scene: Scene, random: Random) -> Turn:
    ground = scene.background
    asked = ground if random.random() < 0.5 else random.choice([other for other in BACKGROUNDS if other is not ground])
    is_it = asked is ground
    question, answer = random.choice(
        [
            (f"这里是{asked.zh}吗？", f"{'是的' if is_it else '不是'}，这里是{ground.zh}。"),
            (f"图片里画了{asked.zh}吗？", f"{'画了' if is_it else '没有'}。"),
            (f"Does it show {asked.en}?", f"{'Yes' if is_it else 'No'}, it shows {ground.en}."),
        ]
    )
    return Turn("place, yes or no", question, answer)


def _count(scene: Scene, random: Random) -> Turn:
    number, number_en = NUMBERS_ZH[len(scene.things)], NUMBERS_EN[len(scene.things)]
    plural = "s" if len(scene.things) > 1 else ""
    question, answer = random.choice(
        [
            ("图里有几个物体？", f"图里有{number}个物体。"),
            ("一共画了多少个东西？", f"一共画了{number}个。"),
            ("数一数这张图片里的物体。", f"这张图片里有{number}个物体。"),
            ("背景前面有几个物体？", f"背景前面有{number}个物体。"),
            ("How many objects are there?", f"There {'are' if plural else 'is'} {number_en} object{plural}."),
            ("Count the objects.", _sentence(number_en)),
        ]
    )
    return Turn("count", question, answer)


def _colour(scene: Scene, random: Random) -> Turn:
    thing = random.choice(scene.things)
    shape, colour = thing.shape, thing.colour
    question, answer = random.choice(
        [
            (f"{shape.zh}是什么颜色的？", f"{shape.zh}是{colour.zh}的。"),
            (f"{shape.zh}的颜色是什么？", f"{colour.zh}。"),
            (f"What colour is the {shape.en}?", f"The {shape.en} is {colour.en}."),
        ]
    )
    return Turn("colour", question, answer)


def _side(scene: Scene, random: Random) -> Turn:
    thing = random.choice(scene.things)
    shape, column = thing.shape, COLUMNS[thing.column]
    place_en = "in the middle" if column.en == "middle" else f"on the {column.en}"
    question, answer = random.choice(
        [
            (f"{shape.zh}在哪一边？", f"{shape.zh}在{column.zh}。"),
            (f"这张图片里的{shape.zh}在什么位置？", f"在这张图片的{column.zh}。"),
            (f"Where is the {shape.en}?", f"The {shape.en} is {place_en}."),
        ]
    )
    return Turn("side", question, answer)


def _at_side(scene: Scene, random: Random) -> Turn:
    place = random.randrange(len(COLUMNS))
    column = COLUMNS[place]
    there = [thing for thing in scene.things if thing.column == place]
    name = _name_zh(there[0]) if there else "空的"
    name_en = _name_en(there[0]) if there else "nothing"
    place_en = "in the middle" if column.en == "middle" else f"on the {column.en}"
    question, answer = random.choice(
        [
            (f"{column.zh}是什么？", f"{column.zh}是{name}。"),
            (f"看看这张图片的{column.zh}。", f"这张图片的{column.zh}是{name}。"),
            (f"What is {place_en}?", _sentence(name_en)),
        ]
    )
    return Turn("what is on a side", question, answer)


def _shape_check(scene: Scene, random: Random) -> Turn:
    shape = random.choice(SHAPES if random.random() < 0.5 else [thing.shape for thing in scene.things])
    found = [thing for thing in scene.things if thing.shape is shape]
    question, answer = random.choice(
        [
            (f"有{shape.zh}吗？", f"有，有{_name_zh(found[0])}。" if found else f"没有{shape.zh}。"),
            (f"Is there a {shape.en}?", f"Yes, {_name_en(found[0])}." if found else f"No, there is no {shape.en}."),
        ]
    )
    return Turn("object, yes or no", question, answer)


def _colour_check(scene: Scene, random: Random) -> Turn:
    colour = random.choice(COLOURS if random.random() < 0.5 else [thing.colour for thing in scene.things])
    found = any(thing.colour is colour for thing in scene.things)
    question, answer = random.choice(
        [
            (f"有{colour.zh}的物体吗？", f"{'有' if found else '没有'}。"),
            (f"Is anything {colour.en}?", "Yes." if found else "No."),
        ]
    )
    return Turn("colour, yes or no", question, answer)


# kind of question, and how often it is asked
_KINDS: list[tuple[Callable[[Scene, Random], Turn], int]] = [
    (_caption, 7),
    (_place, 3),
    (_place_check, 2),
    (_count, 2),
    (_colour, 2),
    (_side, 2),
    (_at_side, 3),
    (_shape_check, 2),
    (_colour_check, 1),
]


def random_turn(scene: Scene, random: Random) -> Turn:
    """A question about the scene, drawn by lot, and its true answer."""
    kinds, weights = zip(*_KINDS, strict=True)
    ask = random.choices(kinds, weights)[0]
    return ask(scene, random)


# Asked without a picture.
SMALL_TALK = [
    Turn("small talk", "你好", "你好！"),
    Turn("small talk", "你好！", "你好！"),
    Turn("small talk", "你是谁？", "我是一个很小的看图模型。"),
    Turn("small talk", "你会做什么？", "我会看图，也会回答问题。"),
    Turn("small talk", "谢谢。", "不客气。"),
    Turn("small talk", "再见。", "再见！"),
    Turn("small talk", "雪是什么颜色的？", "雪是白色的。"),
    Turn("small talk", "草是什么颜色的？", "草是绿色的。"),
    Turn("small talk", "天空是什么颜色的？", "天空是蓝色的。"),
    Turn("small talk", "什么是背景？", "背景是画面里最远的部分。"),
    Turn("small talk", "Hello", "Hello!"),
    Turn("small talk", "Who are you?", "I am a very small model that looks at pictures."),
    Turn("small talk", "What can you do?", "I can look at a picture and answer questions."),
    Turn("small talk", "Thank you.", "You are welcome."),
    Turn("small talk", "What colour is snow?", "Snow is white."),
    Turn("small talk", "What colour is grass?", "Grass is green."),
]
