"""The measures of answers are what they say."""

import pytest
import sacrebleu

from model.data.rows import Row
from model.inference.scores import Result, bleu, result_of, rouge_l, summary, worst_first


@pytest.mark.parametrize(
    ("answer", "label", "score"),
    [
        ("蓝天白云", "蓝天白云", 1.0),
        ("蓝天", "蓝天白云", 2 * 2 / (2 + 4)),  # P = 1, R = 1/2
        ("云白天蓝", "蓝天白云", 2 * 1 / (4 + 4)),  # any one character in order
        ("A Cat", "a  cat", 1.0),
        ("", "蓝天", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l_is_f1_of_the_longest_common_subsequence_of_characters(answer, label, score):
    assert rouge_l(answer, label) == pytest.approx(score)


def result(answer, label, loss=1.0, tokens=1):
    return result_of(Row("a.png", "问", label, "a.json row 1"), answer, loss * tokens, tokens)


@pytest.mark.parametrize(
    "label", ["这张图片的背景是蓝天白云。", "The background is a blue sky with clouds.", "蓝色", "yes"]
)
def test_bleu_of_equal_answers_is_100_in_both_languages(label):
    assert bleu([result(label, label)]) == pytest.approx(100)


def test_bleu_takes_chinese_by_characters():
    one = result("这张图片的背景是蓝天白云", "这张图片的背景是金色沙漠")
    spaced = sacrebleu.corpus_bleu([" ".join(one.answer)], [[" ".join(one.label)]], tokenize="none")
    assert bleu([one]) == pytest.approx(spaced.score)


def test_bleu_of_short_answers_that_are_wrong_is_low():
    assert bleu([result("蓝色", "绿叶")]) < 10
    assert bleu([result("yes", "no"), result("no", "no")]) == pytest.approx(50)


def test_right_leaves_punctuation_and_case_aside_and_exact_match_does_not():
    measures = summary([result("蓝天 白云", "蓝天白云。"), result("雪地", "雪地")])
    assert (measures["right"], measures["exact_match"]) == (2, 0.5)


def test_loss_is_the_mean_over_all_tokens_not_over_rows():
    measures = summary([result("a", "a", loss=1.0, tokens=1), result("b", "b", loss=4.0, tokens=2)])
    assert measures["loss"] == pytest.approx((1 + 4 * 2) / 3)


def test_cut_answers_are_counted():
    cut = Result("a.png", "问", "ab", "a", False, False, 0.5, 1.0, 1, cut=True)
    assert summary([result("a", "a"), cut])["cut"] == 1


def test_worst_first_begins_with_the_furthest_answer_and_of_equal_ones_with_the_least_expected_label():
    right, near, far = result("蓝天白云", "蓝天白云"), result("蓝天", "蓝天白云"), result("雪地", "蓝天白云")
    unexpected = result("雪地", "蓝天白云", loss=3.0)
    assert worst_first([right, far, near, unexpected]) == [unexpected, far, near, right]
