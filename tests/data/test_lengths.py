"""How many tokens rows take: as many as their samples have, however they are counted."""

import dataclasses
from pathlib import Path

import pytest
from conftest import write_rows

from model.data import lengths as lengths_module
from model.data.lengths import (
    Truncations,
    auto_lengths,
    begin_counting_truncations,
    bounded_length,
    bytes_note,
    count_truncations,
    estimated_length,
    longest_samples,
    needed_lengths,
    turn_lengths,
)
from model.data.prompt import IGNORE_INDEX, Lengths, sample_from_row
from model.data.rows import Row, read_rows, row_turns
from model.data.tokenizer import ChatGLMTokenizer

LENGTHS = Lengths(image_length=32, max_source_length=64, max_target_length=64)
LONG = "一二三四五六七八九十" * 20


def row(prompt="这张图片的背景里有什么内容？", label="蒙蒙细雨。"):
    return Row("0.png", prompt, label, "data.json row 1")


def test_longest_samples_are_padded_where_padding_is_learned(tokenizer, tmp_path):
    file = write_rows(tmp_path, [{"prompt": "?", "label": "!"}])
    rows = {str(file): read_rows(file)}
    lengths = dataclasses.replace(LENGTHS, ignore_pad_token_for_loss=False)
    sample = sample_from_row(rows[str(file)][0], tokenizer, lengths)
    learned = sum(label != IGNORE_INDEX for label in sample.labels)
    tokens, target = longest_samples(rows, tokenizer, lengths)
    assert tokens == [len(sample.input_ids)] == [128]
    assert learned <= target <= tokens[0]
    assert longest_samples(rows, tokenizer, LENGTHS)[0][0] < 20


def test_truncations_of_rows_are_counted(tokenizer):
    lengths = dataclasses.replace(LENGTHS, max_target_length=7)  # five of the label's six tokens
    assert count_truncations([row(), row(label="蒙。")], tokenizer, lengths) == Truncations(samples=2, labels=1)


def test_truncations_are_those_of_the_samples_at_every_length(tokenizer, upstream_rows):
    rows = [row(LONG, LONG), row("?", "a  b\nc" * 9), *upstream_rows]
    rows.append(Row(None, "second", "…", "", history=(("first", "①½㌖" * 3), ("", "﷽" * 3))))
    for length in range(48, 90, 3):
        lengths = dataclasses.replace(LENGTHS, max_source_length=length, max_target_length=length - 40)
        samples = [sample_from_row(turn, tokenizer, lengths) for one in rows for turn in row_turns(one)]
        assert count_truncations(rows, tokenizer, lengths) == Truncations(
            len(samples),
            sum(sample.truncated_prompt_tokens > 0 for sample in samples),
            sum(sample.truncated_label_tokens > 0 for sample in samples),
            sum(sample.dropped_turns > 0 for sample in samples),
        )


def test_rows_whose_characters_become_bytes_are_told_with_an_example(tokenizer, upstream_rows):
    def told(*rows):
        return bytes_note(rows, tokenizer, count_truncations(rows, tokenizer, LENGTHS))

    assert told(*upstream_rows, row("图片😀")) is None
    thai = row("?", "ภาษา\n ไทย")
    thai_and_its_history = thai._replace(history=((LONG, "ภาษาไทย"),))
    assert told(row(), thai).startswith("24 % of the characters have no token, as in “ภาษา ไทย”")
    assert told(thai_and_its_history).count("“ภาษาไทย”") == 1
    assert told() is told(row("", "")) is None
    alike = "ภาษาไทย" + "a" * 18  # 7 / 25 * 25 is more than 7, in floating point
    assert told(row(alike, alike)).startswith("28 % of the characters have no token, as in “ภาษาไทยaaa")
    assert told(row("?", "+^|~\r\n" * 9)) is None  # a byte each, so a token each
    assert "as in “ไทย”;" in told(row("?", "a" * 50 + " ไทย"))


def test_characters_of_rows_that_are_not_used_are_not_told(tokenizer):
    rows = [row(), row("?", "ภาษาไทย"), row("?", "ไทยaaa")]
    counted = count_truncations(rows, tokenizer, LENGTHS)
    assert bytes_note(iter(rows[::2]), tokenizer, counted).startswith(
        "12 % of the characters have no token, as in “ไทยaaa”;"
    )
    assert bytes_note(rows[:1], tokenizer, counted) is None
    assert bytes_note(rows, tokenizer, Truncations(characters=20, in_bytes=1)) is None


def test_needed_lengths_truncate_nothing_and_one_token_less_does(tokenizer):
    rows = [row(LONG, "!"), row("?", LONG), Row(None, "?", "!", "", history=(("?", LONG),))]
    source, target = needed_lengths(rows, tokenizer, LENGTHS)
    enough = dataclasses.replace(LENGTHS, max_source_length=source, max_target_length=target)
    assert count_truncations(rows, tokenizer, enough) == Truncations(samples=4)
    assert count_truncations(rows, tokenizer, dataclasses.replace(enough, max_source_length=source - 1)).prompts == 1
    assert count_truncations(rows, tokenizer, dataclasses.replace(enough, max_target_length=target - 1)).labels == 2


def test_turn_lengths_are_those_of_the_samples_before_and_from_sop_on(tokenizer, upstream_rows):
    rows = [*upstream_rows, row(LONG, LONG), Row(None, "三？", "丙", "", history=(("一？", "甲"),), lang="en")]
    endless = dataclasses.replace(LENGTHS, max_source_length=10_000, max_target_length=10_000, source_prefix="图")
    samples = [sample_from_row(turn, tokenizer, endless) for one in rows for turn in row_turns(one)]
    contexts = [sample.labels.count(IGNORE_INDEX) for sample in samples]
    targets = [len(sample.labels) - context for sample, context in zip(samples, contexts, strict=True)]
    lengths = dataclasses.replace(LENGTHS, source_prefix="图")
    assert list(turn_lengths(rows, tokenizer, lengths)) == list(zip(contexts, targets, strict=True))


def test_lengths_of_many_rows_do_not_depend_on_how_many_are_tokenized_together(tokenizer, monkeypatch):
    rows = [row("长" * (i % 50), "长" * (i % 70 + 1)) for i in range(100)]
    expected = [f(rows, tokenizer, LENGTHS) for f in (count_truncations, needed_lengths)]
    monkeypatch.setattr(lengths_module, "ROWS_AT_ONCE", 7)
    assert [f(rows, tokenizer, LENGTHS) for f in (count_truncations, needed_lengths)] == expected


@pytest.mark.parametrize(("source", "target", "expected"), [(10, 20, 30), (100, 20, 84), (10, 100, 74)])
def test_bounded_length_is_within_both_flags(source, target, expected):
    assert bounded_length(source, target, LENGTHS) == expected


def test_estimated_length_counts_characters_and_image_slots():
    assert estimated_length(Row("0.png", "ab", "c", "", history=(("de", "f"),)), LENGTHS) == 32 + 3 + 2 + 1


def test_truncations_in_processes_are_those_in_one(tmp_path: Path, tokenizer: ChatGLMTokenizer, monkeypatch) -> None:
    rows = [{"prompt": "长" * (i % 90), "label": "长" * (i % 70 + 1)} for i in range(500)]
    some = read_rows(write_rows(tmp_path, rows))
    monkeypatch.setattr(lengths_module, "ROWS_PER_PROCESS", 100)
    in_processes = begin_counting_truncations({"rows.json": some}, tokenizer, LENGTHS)()
    assert in_processes == {"rows.json": count_truncations(some, tokenizer, LENGTHS)} != {"rows.json": Truncations(500)}


def test_auto_lengths_truncate_nothing(tmp_path: Path, tokenizer: ChatGLMTokenizer) -> None:
    texts = [{"prompt": f"{i}?", "label": f"{i}!"} for i in range(3)]
    rows = read_rows(write_rows(tmp_path, [{"prompt": "长" * 90, "label": "长" * 70}, *texts]))
    source, target = auto_lengths({"rows.json": rows}, tokenizer, LENGTHS, None, None, limit=2048)
    assert count_truncations(rows, tokenizer, Lengths(32, source, target)) == Truncations(4)


@pytest.mark.parametrize(
    ("given", "expected"), [((None, None), (100, 100)), ((64, None), (64, 136)), ((None, 20), (180, 20))]
)
def test_auto_lengths_share_what_the_model_takes(tmp_path: Path, tokenizer, given, expected) -> None:
    rows = read_rows(write_rows(tmp_path, [{"prompt": "长" * 900, "label": "长" * 900}]))
    assert auto_lengths({"rows.json": rows}, tokenizer, LENGTHS, *given, limit=200) == expected
