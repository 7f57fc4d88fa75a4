"""What the page says: both languages have every text, and a browser's language chooses."""

import re

import pytest

from model.inference.page_texts import TEXTS, language_of, sentence, texts

CHINESE = re.compile("[\u4e00-\u9fff]")
FIELDS = re.compile(r"\{\w+\}")


def test_each_text_is_there_in_both_languages_with_the_same_fields():
    for key, (english, chinese) in TEXTS.items():
        assert not CHINESE.search(english), key
        assert CHINESE.search(chinese) or english == chinese in ("top_p", "top_k"), key
        assert FIELDS.findall(english) == FIELDS.findall(chinese), key


@pytest.mark.parametrize(("accepted", "flag", "language"), [
    ("zh-CN,zh;q=0.9,en;q=0.8", "auto", "zh"), ("ZH", "auto", "zh"), ("en-US,zh;q=0.5", "auto", "en"), ("fr", "auto", "en"),
    ("", "auto", "en"), ("zh-CN", "en", "en"), ("en", "zh", "zh"),
])  # fmt: skip
def test_language_is_that_of_the_flag_or_the_first_that_the_browser_asks_for(accepted, flag, language):
    assert language_of(accepted, flag) == language


@pytest.mark.parametrize("language", ["zh", "zh-CN", "zh-TW"])
def test_kinds_of_chinese_have_the_chinese_texts(language):
    assert texts(language)["send"] == "发送"


def test_problem_is_told_without_the_dashes_of_a_flag_and_in_chinese_where_asked_for():
    assert sentence("--seed x: a whole number is needed.", "en") == "seed x: a whole number is needed."
    assert sentence("--seed x: a whole number is needed.", "zh") == "seed x：需要一个整数。"
    assert sentence(
        "http://10.0.0.1: leads to this machine or into a private network; a public address is needed.", "zh"
    ) == ("http://10.0.0.1：指向本机或内部网络；需要公网上的网址。")
