"""A row's tokens: equal to the released script's where it fits, framed and counted where it doesn't."""

import dataclasses
import json

import pytest
from conftest import GOLDEN, run_program

from model.data.prompt import (
    IGNORE_INDEX,
    LEAST_TARGET_LENGTH,
    AskedAs,
    Lengths,
    answer_labels,
    chat_prompt,
    context_ids,
    least_conversation_length,
    least_source_length,
    sample_from_row,
)
from model.data.rows import Row, released_row, row_from_json, row_turns
from model.errors import InputError

QUESTION = "这张图片的背景里有什么内容？"
IMG = [563, 775, 2685]  # ▁< img >
HEAD = [859, 775, 2685, 2676, 2713]  # ▁</ img > 问 ：
TAIL = [4, 2913, 2713]  # <n> 答 ：
PAD, GMASK, SOP, EOP = 3, 86, 89, 90
LENGTHS = Lengths(image_length=32, max_source_length=64, max_target_length=64)
LONG = "一二三四五六七八九十" * 20


@pytest.fixture(scope="module")
def first_batch():
    return json.loads((GOLDEN / "upstream/expected_lora.json").read_text())["first_batch"]


def row(prompt=QUESTION, label="蒙蒙细雨。"):
    return Row("0.png", prompt, label, "data.json row 1")


def without_padding(ids):
    return ids[: ids.index(EOP) + 1]


# Rows


def test_row_when_keys_are_there_holds_them_and_where():
    found = row_from_json({"img": "a.png", "prompt": "?", "label": "!"}, "data.json row 3")
    assert found == Row("a.png", "?", "!", "data.json row 3")


def test_released_row_is_the_row_that_all_checks_give():
    entry = {"label": "!", "prompt": "", "img": "a.png"}
    expected = Row(img="a.png", prompt="", label="!", where="row 1", history=(), lang=None)
    assert released_row(entry, "row 1") == row_from_json(entry, "row 1") == expected


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {}, "text", {"prompt": "?", "label": "!"}, {"prompt": "?", "label": "!", "image": "a.png"},
        {"img": None, "prompt": "?", "label": "!"}, {"img": " ", "prompt": "?", "label": "!"},
        {"img": "a.png", "prompt": 7, "label": "!"}, {"img": "a.png", "prompt": "?", "label": " \n"},
        {"img": "a.png", "prompt": "\ud800", "label": "!"}, {"img": "a.png", "prompt": "?", "label": "!", "lang": "en"},
    ],
)  # fmt: skip
def test_released_row_of_anything_else_is_none(entry):
    assert released_row(entry, "row 1") is None


def test_row_when_it_has_another_key_is_accepted():
    assert row_from_json({"img": "a.png", "prompt": "?", "label": "!", "id": 7}, "row 1").label == "!"


def test_row_when_the_prompt_is_empty_is_accepted():
    assert row_from_json({"img": "a.png", "prompt": "", "label": "!"}, "row 1").prompt == ""


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ("a.png", "a text instead of an object"),
        (["a.png", "?", "!"], "a list instead of an object"),
        (None, "null instead of an object"),
        ({"img": "a.png", "prompt": "?"}, 'no "label"'),
        ({"img": "a.png"}, 'no "prompt" and no "label"'),
        ({"img": "a.png", "prompt": 3, "label": "!"}, '"prompt" is a number'),
        ({"img": "a.png", "prompt": True, "label": "!"}, '"prompt" is true or false'),
        ({"img": 3, "prompt": "?", "label": "!"}, '"img" is a number'),
        ({"image": "a.png", "prompt": "?", "label": "!"}, 'no "img", but "image"'),
        ({"prompt": "?", "label": "!", "lang": "fr"}, '"lang" is "fr"; "zh" or "en" is needed'),
        ({"prompt": "?", "label": "!", "lang": ["zh"]}, '"lang" is ["zh"]'),
        ({"prompt": "?", "label": "!", "history": "?"}, '"history" is a text'),
        ({"prompt": "?", "label": "!", "history": [["?", "!"], ["?"]]}, '"history" holds ["?"] as its turn 2'),
        ({"prompt": "?", "label": "!", "history": [["?", 3]]}, '"history" holds ["?", 3] as its turn 1'),
        ({"prompt": "?", "label": "!", "history": [["?", " "]]}, '"history" has an empty answer in its turn 1'),
        ({"img": "a.png", "prompt": "?", "label": ["!"]}, '"label" is a list'),
        ({"img": "", "prompt": "?", "label": "!"}, '"img" is empty'),
        ({"img": "a.png", "prompt": "?", "label": ""}, '"label" is empty'),
        ({"img": "a.png", "prompt": "?", "label": " \n"}, '"label" is empty'),
        ({"img": "a.png", "prompt": "\ud800", "label": "!"}, '"prompt" holds half a character'),
    ],
)
def test_row_when_it_is_bad_names_the_row_and_what_was_found(entry, found):
    with pytest.raises(InputError) as error:
        row_from_json(entry, "data.json row 3")
    assert str(error.value).startswith(f"data.json row 3: {found}")


# Samples that fit


def test_sample_when_it_fits_is_the_released_layout(tokenizer):
    sample = sample_from_row(row("？", "蒙。"), tokenizer, LENGTHS)
    assert sample.input_ids == [*IMG, *[PAD] * 32, *HEAD, 3092, *TAIL, GMASK, SOP, 2468, 3117, 2465, EOP]


def test_labels_when_it_fits_ignore_the_context_and_keep_sop(tokenizer):
    sample = sample_from_row(row("？", "蒙。"), tokenizer, LENGTHS)
    assert sample.labels == [IGNORE_INDEX] * 45 + [SOP, 2468, 3117, 2465, EOP]


def test_pre_image_is_the_length_of_the_opening_tag(tokenizer):
    assert sample_from_row(row(), tokenizer, LENGTHS).pre_image == len(IMG)


@pytest.mark.parametrize("index", [0, 1])
def test_sample_of_a_released_row_has_the_released_first_batch_ids(index, tokenizer, upstream_rows, first_batch):
    expected = without_padding(first_batch["input_ids"][index])
    assert expected in [sample_from_row(one, tokenizer, LENGTHS).input_ids for one in upstream_rows]


@pytest.mark.parametrize("index", [0, 1])
def test_sample_of_a_released_row_has_the_released_first_batch_labels(index, tokenizer, upstream_rows, first_batch):
    expected_ids = without_padding(first_batch["input_ids"][index])
    samples = [sample_from_row(one, tokenizer, LENGTHS) for one in upstream_rows]
    (sample,) = [one for one in samples if one.input_ids == expected_ids]
    assert sample.labels == first_batch["labels"][index][: len(expected_ids)]


def test_source_prefix_stands_before_the_prompt(tokenizer):
    lengths = dataclasses.replace(LENGTHS, source_prefix="描述")
    assert sample_from_row(row("这张图片。"), tokenizer, lengths) == sample_from_row(
        row("描述这张图片。"), tokenizer, LENGTHS
    )


def test_sample_when_padding_is_ignored_is_not_padded(tokenizer):
    assert sample_from_row(row(), tokenizer, LENGTHS).input_ids[-1] == EOP


def test_sample_when_padding_is_learned_has_the_released_length(tokenizer):
    lengths = dataclasses.replace(LENGTHS, ignore_pad_token_for_loss=False)
    assert len(sample_from_row(row(), tokenizer, lengths).input_ids) == 64 + 64


def test_labels_when_padding_is_learned_end_in_pad_ids(tokenizer):
    lengths = dataclasses.replace(LENGTHS, ignore_pad_token_for_loss=False)
    labels = sample_from_row(row(), tokenizer, lengths).labels
    assert labels[labels.index(EOP) + 1 :] == [PAD] * (128 - labels.index(EOP) - 1)


# Samples that don't fit


def test_prompt_when_it_is_exactly_as_long_as_allowed_is_not_cut(tokenizer):
    source = len(sample_from_row(row(), tokenizer, LENGTHS).input_ids) - len([GMASK, SOP, 2468, 3117, 3117, EOP]) - 3
    lengths = dataclasses.replace(LENGTHS, max_source_length=source + 1)
    assert sample_from_row(row(), tokenizer, lengths).truncated_prompt_tokens == 0


def test_prompt_when_it_is_one_token_too_long_loses_one_token(tokenizer):
    source = len(sample_from_row(row(), tokenizer, LENGTHS).input_ids) - len([GMASK, SOP, 2468, 3117, 3117, EOP]) - 3
    lengths = dataclasses.replace(LENGTHS, max_source_length=source)
    assert sample_from_row(row(), tokenizer, lengths).truncated_prompt_tokens == 1


def test_long_prompt_fills_the_source_to_its_last_token(tokenizer):
    sample = sample_from_row(row(LONG), tokenizer, LENGTHS)
    assert sample.input_ids.index(GMASK) == LENGTHS.max_source_length - 1


def test_long_prompt_keeps_its_beginning_and_the_whole_frame(tokenizer):
    whole = tokenizer.encode(f"</img>问：{LONG}\n答：", add_special_tokens=False)
    question = sample_from_row(row(LONG), tokenizer, LENGTHS).input_ids[len(IMG) + 32 : 63]
    assert question == whole[: 28 - len(TAIL)] + TAIL


def test_long_prompt_with_line_breaks_keeps_only_the_frames_own_tail(tokenizer):
    sample = sample_from_row(row("问\n" * 60), tokenizer, LENGTHS)
    assert sample.input_ids[60:63] == TAIL


def test_long_prompt_counts_what_it_lost(tokenizer):
    whole = tokenizer.encode(f"</img>问：{LONG}\n答：", add_special_tokens=False)
    assert sample_from_row(row(LONG), tokenizer, LENGTHS).truncated_prompt_tokens == len(whole) - 28


def test_long_label_fills_the_target_without_eop(tokenizer):
    sample = sample_from_row(row(label=LONG), tokenizer, LENGTHS)
    answer = sample.input_ids[sample.input_ids.index(SOP) + 1 :]
    assert answer == tokenizer.encode(LONG, add_special_tokens=False)[:62]


def test_long_label_counts_what_it_lost(tokenizer):
    sample = sample_from_row(row(label=LONG), tokenizer, LENGTHS)
    assert sample.truncated_label_tokens == len(tokenizer.encode(LONG, add_special_tokens=False)) - 62


def test_label_when_it_is_exactly_as_long_as_allowed_keeps_eop(tokenizer):
    lengths = dataclasses.replace(LENGTHS, max_target_length=6 + 2)  # ▁ 蒙 蒙 细 雨 。
    assert sample_from_row(row(), tokenizer, lengths).input_ids[-3:] == [3120, 2465, EOP]


def test_sample_when_all_is_too_long_is_within_both_lengths(tokenizer):
    assert len(sample_from_row(row(LONG, LONG), tokenizer, LENGTHS).input_ids) <= 64 + 64


# Rows of other shapes


def texts(sample, tokenizer):
    """The text that a sample shows, and the text that it teaches."""
    learned = [token for token in sample.labels if token != IGNORE_INDEX]
    return tokenizer.decode(sample.input_ids[: -len(learned) - 1]), tokenizer.decode(learned[1:-1])


def test_sample_of_a_row_without_picture_has_no_slots(tokenizer):
    sample = sample_from_row(Row(None, "几点了？", "三点。", ""), tokenizer, LENGTHS)
    assert sample.pre_image == 0
    assert tokenizer.pad_token_id not in sample.input_ids
    assert sample.input_ids[: sample.input_ids.index(SOP) + 1] == context_ids("几点了？", None, False, tokenizer, 32)[0]


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_sample_with_history_has_the_frame_of_chat(tokenizer, lang):
    one = Row("a.png", "三？", "3", "", history=(("一？", "1"), ("二？", "2")), lang=lang)
    sample = sample_from_row(one, tokenizer, dataclasses.replace(LENGTHS, max_source_length=200))
    context, pre_image = context_ids("三？", one.history, True, tokenizer, LENGTHS.image_length, english=lang == "en")
    assert (sample.input_ids[: len(context)], sample.pre_image) == (context, pre_image)


def test_turns_of_a_row_teach_each_answer_after_what_came_before(tokenizer):
    one = Row(None, "三？", "丙", "", history=(("一？", "甲"), ("二？", "乙")))
    taught = [texts(sample_from_row(turn, tokenizer, LENGTHS), tokenizer) for turn in row_turns(one)]
    assert [answer for _, answer in taught] == ["甲", "乙", "丙"]
    assert [context.count("问") for context, _ in taught] == [1, 2, 3]


def test_lang_of_the_flags_is_for_rows_that_say_none(tokenizer):
    english = dataclasses.replace(LENGTHS, lang="en")
    frames = [
        texts(sample_from_row(Row(None, "x", "y", "", lang=lang), tokenizer, english), tokenizer)[0]
        for lang in (None, "zh")
    ]
    assert [frame[:1] for frame in frames] == ["Q", "问"]


def test_history_when_it_is_too_long_loses_its_oldest_turns_whole(tokenizer):
    one = Row(None, "三？", "丙", "", history=(("甲" * 30, "乙" * 30), ("二？", "丁")))
    sample = sample_from_row(one, tokenizer, LENGTHS)
    assert (sample.dropped_turns, sample.truncated_prompt_tokens) == (1, 0)
    assert sample.input_ids == sample_from_row(one._replace(history=one.history[1:]), tokenizer, LENGTHS).input_ids


def test_prompt_is_cut_only_when_all_history_has_left(tokenizer):
    one = Row(None, LONG, "丙", "", history=(("一？", "甲"),))
    sample = sample_from_row(one, tokenizer, LENGTHS)
    assert sample.dropped_turns == 1
    assert sample.truncated_prompt_tokens > 0


class MeltingTokenizer:
    """One token per character, but the prompt's last letter z and the line break after it are a single token."""

    pad_token_id, bos_token_id = 0, 1

    def encode(self, text, add_special_tokens=True):
        return [ord(character) for character in text.replace("z\n", "Z")]

    def build_inputs_with_special_tokens(self, a, b=None):
        return a if b is None else [*a, 1, *b, 2]


def test_long_prompt_when_its_end_melts_with_the_frame_still_keeps_the_frame():
    lengths = Lengths(image_length=1, max_source_length=30, max_target_length=8)
    sample = sample_from_row(row("abcdefghijklmnopqrstuvwxyz", "!"), MeltingTokenizer(), lengths)
    text = "".join(map(chr, sample.input_ids[len("<img>") + 1 : 29]))
    assert (text, sample.truncated_prompt_tokens) == ("</img>问：abcdefghijkl\n答：", 14)


# Too small lengths


@pytest.mark.parametrize(("asked_as", "english"), [
    (AskedAs(), True), (AskedAs("zh", max_source_length=64), False), (AskedAs("en", "Answer: "), True),
])  # fmt: skip
def test_least_conversation_is_a_letter_in_the_shortest_frame_and_a_token_of_answer(tokenizer, asked_as, english):
    """A tuned model is asked in its own frame alone. The English one is shorter."""
    ids, _ = context_ids(f"{asked_as.source_prefix}a", None, False, tokenizer, 32, english)
    assert least_conversation_length(tokenizer, asked_as) == len(ids) + 1


def test_least_source_length_leaves_room_for_one_token_of_prompt(tokenizer):
    lengths = dataclasses.replace(LENGTHS, max_source_length=least_source_length(tokenizer, 32))
    sample = sample_from_row(row(LONG), tokenizer, lengths)
    whole = tokenizer.encode(f"</img>问：{LONG}\n答：", add_special_tokens=False)
    assert sample.input_ids[35 : sample.input_ids.index(GMASK)] == [*HEAD, whole[len(HEAD)], *TAIL]


def test_sample_when_the_source_length_is_one_less_than_the_least_names_the_least(tokenizer):
    least = least_source_length(tokenizer, 32)
    with pytest.raises(InputError, match=f"--max_source_length {least - 1} leaves no room .* at least {least}"):
        sample_from_row(row(LONG), tokenizer, dataclasses.replace(LENGTHS, max_source_length=least - 1))


def test_least_target_length_leaves_room_for_one_token_of_label(tokenizer):
    lengths = dataclasses.replace(LENGTHS, max_target_length=LEAST_TARGET_LENGTH)
    sample = sample_from_row(row(), tokenizer, lengths)
    assert sample.input_ids[sample.input_ids.index(SOP) :] == [SOP, 2468]


def test_sample_when_the_target_length_is_less_than_the_least_is_an_error(tokenizer):
    with pytest.raises(InputError, match="--max_target_length 2 leaves no room for an answer; at least 3"):
        sample_from_row(row(), tokenizer, dataclasses.replace(LENGTHS, max_target_length=2))


# Labels, lengths and conversations


def test_answer_labels_begin_at_sop():
    assert answer_labels([5, 6, SOP, 7, EOP], SOP) == [IGNORE_INDEX, IGNORE_INDEX, SOP, 7, EOP]


def test_answer_labels_without_sop_are_an_error():
    with pytest.raises(ValueError, match="89"):
        answer_labels([5, 6], SOP)


def test_lengths_from_args_without_the_optional_flags_have_their_defaults():
    class Args:
        image_length, max_source_length, max_target_length = 32, 64, 256

    assert Lengths.from_args(Args) == Lengths(32, 64, 256, "", True)


@pytest.mark.parametrize(
    ("history", "has_image", "english", "expected"),
    [
        ([], True, False, "<img></img>问：后来？\n答："),
        (None, False, False, "问：后来？\n答："),
        ([("谁？", "他。")], True, False, "<img></img>问：谁？\n答：他。\n问：后来？\n答："),
        ([("Who?", "He.")], True, True, "<img></img>Q:Who?\nA:He.\nQ:后来？\nA:"),
    ],
)
def test_chat_prompt_is_image_then_past_turns_then_the_question(history, has_image, english, expected):
    assert chat_prompt("后来？", history, has_image, english) == expected


def test_context_of_one_question_is_what_training_gives_before_the_answer(tokenizer):
    sample = sample_from_row(row(), tokenizer, LENGTHS)
    context = sample.input_ids[: sample.input_ids.index(SOP) + 1]
    assert context_ids(QUESTION, [], True, tokenizer, 32) == (context, sample.pre_image)


def test_context_without_an_image_has_no_slots(tokenizer):
    text = tokenizer.encode("问：你好\n答：", add_special_tokens=False)
    assert context_ids("你好", [], False, tokenizer, 32) == ([*text, GMASK, SOP], 0)


def test_context_with_history_holds_one_image(tokenizer):
    ids, pre_image = context_ids("后来？", [("谁？", "他。")], True, tokenizer, 32)
    rest = tokenizer.encode("</img>问：谁？\n答：他。\n问：后来？\n答：", add_special_tokens=False)
    assert (ids, pre_image) == ([*IMG, *[PAD] * 32, *rest, GMASK, SOP], 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "model.errors",
        "model.data.prompt",
        "model.data.tokenizer",
        "model.data.rows",
        "model.data.image_check",
        "model.data.split",
    ],
)
def test_checks_before_training_import_neither_torch_nor_sat(module):
    finished = run_program("loaded_modules", module, "torch", "sat", "transformers", "numpy")
    assert (finished.stdout.strip(), finished.stderr) == ("[]", "")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["model.data.image_processor", "model.data.dataset"])
def test_data_modules_do_not_import_sat(module):
    finished = run_program("loaded_modules", module, "sat")
    assert finished.stdout.strip() == "[]", finished.stderr
