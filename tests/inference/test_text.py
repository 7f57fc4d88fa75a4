"""The answer's text: tidied, whole or growing, and shown piece by piece."""

import pytest

from model.inference.text import HALF_A_CHARACTER, GrowingText, answer_text, new_text, tidied

TEXTS = [
    "一只猫,还有一只狗!",
    "A street in the rain: two  spaces, a\ttab\nand a line.",
    "🤗很高兴🤗",
    "问：谁？\n答：猫",
    "",
]


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("  一只猫。\n", "一只猫。"),
        ("[[训练时间]]", "2023年"),
        ("猫,狗!鸟:鱼;谁?", "猫，狗！鸟：鱼；谁？"),
        (",猫", "，猫"),
        ("1,000 cats: yes!", "1,000 cats: yes!"),
        ("猫, 狗", "猫， 狗"),
        ("问：谁？\n答：一只猫。\n答：一只狗。", "一只狗。"),
        ("A: yes", "A: yes"),
        ("", ""),
    ],
)
def test_answer_is_tidied_as_the_released_demo_does(response, shown):
    assert tidied(response) == shown


def test_english_answer_is_what_follows_the_last_a():
    assert tidied("Q:Who?\nA: a cat\nA: a dog ", english=True) == "a dog"
    assert tidied("答：猫", english=True) == "答：猫"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("english", [False, True])
def test_growing_text_ends_as_the_whole_answer_and_never_shows_half_a_character(tokenizer, text, english):
    ids, growing = tokenizer.encode(text, add_special_tokens=False), GrowingText(tokenizer, english)
    seen = [growing.of(ids[:count]) for count in range(len(ids) + 1)]
    assert not any(HALF_A_CHARACTER in one for one in seen)
    assert seen[-1] == answer_text(ids, tokenizer, english) == growing.of(ids, finished=True)


def test_growing_text_decodes_only_new_tokens(tokenizer):
    decoded = []

    class Counting:
        def decode(self, ids):
            decoded.append(len(ids))
            return tokenizer.decode(ids)

    ids = tokenizer.encode("这张图片的背景里有什么内容？", add_special_tokens=False) * 20
    growing = GrowingText(Counting())
    for count in range(1, len(ids) + 1):
        growing.of(ids[:count])
    assert len(ids) > 50
    assert max(decoded) <= 4


def test_half_a_character_at_the_end_of_an_answer_is_shown_as_the_whole_answer_shows_it(tokenizer):
    ids = tokenizer.encode("一🤗", add_special_tokens=False)[:-1]
    growing = GrowingText(tokenizer)
    assert growing.of(ids) == "一"
    assert growing.of(ids, finished=True) == answer_text(ids, tokenizer)


@pytest.mark.parametrize(
    "texts",
    [["一", "一只", "一只猫"], ["猫,", "猫，狗"], ["一�", "一🤗"], ["a", "a", "a: b"], [""], ["问，答：猫", "猫"]],
)
def test_pieces_that_are_printed_make_the_whole_answer_or_stop_where_it_turned(texts):
    printed = ""
    for text in texts:
        printed += new_text(text, printed)
    printed += new_text(texts[-1], printed, finished=True)
    assert printed == texts[-1] or not texts[-1].startswith(printed)
