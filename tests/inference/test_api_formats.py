"""Requests become a question, its history and how to answer; what isn't offered is a sentence."""

import pytest
from pydantic import ValidationError

from model.errors import InputError
from model.inference.api_formats import Asked, ChatRequest, Message, ReleasedRequest, conversation
from model.inference.sampling import GREEDY, Sampling

WARM = Sampling(0.8, 0.4, 100, 1.2, seed=7)
PICTURE = {"type": "image_url", "image_url": {"url": "data:,a"}}


def messages(*said):
    return [Message(role=role, content=content) for role, content in said]


@pytest.mark.parametrize(("said", "expected"), [
    ([("user", "a")], ("a", [], None)),
    ([("system", "s"), ("user", "a")], ("s\na", [], None)),
    ([("user", "a"), ("assistant", "b"), ("user", "c")], ("c", [("a", "b")], None)),
    ([("assistant", "b"), ("user", "c")], ("c", [("", "b")], None)),
    ([("user", "a"), ("user", "b"), ("assistant", "c"), ("system", "s"), ("user", "d")], ("s\nd", [("a\nb", "c")], None)),
    ([("user", [PICTURE, {"type": "text", "text": "a"}])], ("a", [], "data:,a")),
    ([("user", [{"type": "image_url", "image_url": "http://a/b"}]), ("assistant", None), ("user", "c")],
     ("c", [("", "")], "http://a/b")),
])  # fmt: skip
def test_messages_are_a_question_after_turns(said, expected):
    assert conversation(messages(*said)) == expected


@pytest.mark.parametrize(("said", "problem"), [
    ([("user", "a"), ("assistant", "b")], 'the last one is of role "assistant"'),
    ([("user", [PICTURE]), ("assistant", "b"), ("user", [PICTURE])], "2 pictures; the model takes one"),
    ([("system", [PICTURE]), ("user", "a")], r'messages\[0\]: a picture in a message of role "system"'),
    ([("user", [{"type": "text"}])], r'messages\[0\]: a part of type "text" without "text"'),
    ([("user", [PICTURE | {"text": "a"}])], r'messages\[0\]: a part with "text" and "image_url"; a part for each is needed'),
])  # fmt: skip
def test_messages_that_are_no_conversation_are_told(said, problem):
    with pytest.raises(InputError, match=problem):
        conversation(messages(*said))


@pytest.mark.parametrize("said", [
    [("user", None)], [("user", "")], [("user", " \n")], [("user", [])], [("user", [PICTURE])], [("system", "s"), ("user", "")],
    [("user", "a"), ("assistant", "b"), ("user", [PICTURE, {"type": "text", "text": ""}])],
])  # fmt: skip
def test_question_without_text_is_refused(said):
    with pytest.raises(InputError) as error:
        conversation(messages(*said))
    assert str(error.value) == 'messages: the last question has no text; a text in its "content" is needed.'


def test_text_and_picture_of_a_question_may_come_in_two_messages():
    assert conversation(messages(("user", "a"), ("user", [PICTURE]))) == ("a", [], "data:,a")


@pytest.mark.parametrize("text", ["", " \n"])
def test_question_without_text_is_refused_in_the_released_form_too(text):
    with pytest.raises(InputError) as error:
        ReleasedRequest(text=text).asked(WARM)
    assert str(error.value) == "text: it is empty; a question is needed."


def chat_request(**fields):
    return ChatRequest(model="a", messages=[{"role": "user", "content": "a"}], **fields)


def test_request_without_settings_takes_the_servers():
    asked = chat_request().asked(WARM)
    assert asked == Asked("a", [], None, WARM)
    assert ReleasedRequest(text="a").asked(GREEDY).sampling == GREEDY


def test_settings_of_a_request_take_the_place_of_the_servers():
    asked = chat_request(temperature=0.5, top_p=1, top_k=3, seed=-1, stop="b", max_tokens=9, max_completion_tokens=4)
    assert asked.asked(WARM) == Asked("a", [], None, Sampling(0.5, 1, 3, 1.2, seed=2**63 - 1), ("b",), 4)


def test_request_for_the_likeliest_answer_has_no_penalty_and_one_of_a_greedy_server_gets_the_released():
    assert chat_request(temperature=0).asked(WARM).sampling.repetition_penalty == 1
    assert chat_request(temperature=1).asked(GREEDY).sampling.repetition_penalty == 1.2


def test_everything_that_is_not_offered_is_told_at_once():
    with pytest.raises(InputError) as error:
        chat_request(n=2, tools=[{}], logprobs=True, response_format={"type": "json_object"}).asked(WARM)
    assert str(error.value).splitlines() == [
        f"{name} isn't offered; leave it out." for name in ("n", "tools", "logprobs", "response_format")
    ]


@pytest.mark.parametrize(("field", "refused", "plain"), [
    ("tool_choice", "required", "auto"), ("top_logprobs", 3, 0), ("logit_bias", {"5": 100}, {}), ("modalities", ["audio"], ["text"]),
    ("min_p", 0.1, 0), ("min_tokens", 5, 0), ("best_of", 2, 1), ("stop_token_ids", [5], []), ("length_penalty", 2.0, 1.0),
    ("guided_choice", ["yes", "no"], None), ("guided_json", {"type": "object"}, None), ("guided_regex", "a+", ""),
    ("guided_grammar", "a", ""), ("structured_outputs", {"choice": ["yes"]}, None), ("ignore_eos", True, False),
    ("max_new_tokens", 5, None), ("no_repeat_ngram_size", 2, 0), ("stop_sequences", ["you"], []), ("system", "Be brief.", ""),
    ("image", "a", None), ("images", ["a"], []), ("echo", True, False), ("use_beam_search", True, False), ("bad_words", ["cat"], []), ("max_length", 60, None),
])  # fmt: skip
def test_field_that_would_change_the_answer_is_refused_and_its_default_is_not(field, refused, plain):
    with pytest.raises(InputError, match=f"{field} isn't offered"):
        chat_request(**{field: refused}).asked(WARM)
    assert chat_request(**{field: plain}).asked(WARM) == chat_request().asked(WARM)


@pytest.mark.parametrize("field", [
    {"temprature": 0.5}, {"Temperature": 1.5}, {"temprature": 0}, {"Temperature": 0}, {"top-p": 0.1}, {"do_sample": False}, {"num_beams": 4},
])  # fmt: skip
def test_field_that_is_not_known_is_refused_in_both_forms(field):
    (name,) = field
    for request in (chat_request(**field), ReleasedRequest(text="a", **field)):
        with pytest.raises(
            InputError, match=f"^{name} isn't (known here; .*temperature, .* are|offered; leave it out)[.]$"
        ):
            request.asked(WARM)


def test_empty_history_of_the_released_form_may_be_a_text():
    assert ReleasedRequest(text="a", history="").asked(WARM) == ReleasedRequest(text="a").asked(WARM)


def test_field_that_asks_for_nothing_or_changes_no_answer_is_ignored():
    fields = {"skip_special_tokens": True, "do_sample": True, "web_search": False, "thinking": {"type": "disabled"}}
    assert chat_request(**fields, reasoning_effort="high").asked(WARM) == chat_request().asked(WARM)


@pytest.mark.parametrize(
    "field", [{"max_tokens": 3}, {"stop": ["b"]}, {"img": "zzz"}, {"image_prompt": "zzz"}, {"images": ["a"]}]
)
def test_field_of_another_form_is_refused_in_the_released_one(field):
    with pytest.raises(InputError, match=f"^{next(iter(field))} isn't (known|offered)"):
        ReleasedRequest(text="a", **field).asked(WARM)


@pytest.mark.parametrize(("message", "problem"), [
    ({"content": "a", "images": ["b"]}, "messages[0].images isn't offered; leave it out."),
    ({"content": "a", "tool_calls": [{"id": "b"}]}, "messages[0].tool_calls isn't offered; leave it out."),
    ({"content": [{"type": "text", "text": "a", "url": "b"}]},
     "messages[0].content[0].url isn't known here; type, text, image_url are."),
])  # fmt: skip
def test_field_of_a_message_that_is_not_known_is_refused(message, problem):
    with pytest.raises(InputError) as error:
        ChatRequest(model="a", messages=[{"role": "user", **message}]).asked(WARM)
    assert str(error.value) == problem


def test_fields_that_change_no_answer_are_ignored():
    harmless = {"user": "a", "id": 5, "metadata": {"a": "b"}, "store": True, "any": None, "other": "", "more": []}
    assert chat_request(**harmless).asked(WARM) == chat_request().asked(WARM)
    released = {**harmless, "min_length": 50, "num_beams": 1}
    assert ReleasedRequest(text="a", **released).asked(WARM) == ReleasedRequest(text="a").asked(WARM)
    answer = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "tool_calls": None}
    said = [{"role": "user", "name": "me", "content": "a"}, answer, {"role": "user", "content": "c"}]
    assert ChatRequest(model="a", messages=said).asked(WARM).history == [("a", "b")]


def test_names_of_unknown_fields_are_shown_shortened():
    with pytest.raises(InputError) as error:
        ReleasedRequest(text="a", **{f"{number}" * 60: 1 for number in range(20)}).asked(WARM)
    lines = str(error.value).splitlines()
    assert len(lines) == 10
    assert all(line.startswith(f"{number}" * 50 + " isn't known here; ") for number, line in enumerate(lines))


def test_number_out_of_bounds_is_told_by_the_fields_name():
    with pytest.raises(InputError, match=r"^top_p 2\.0: a number above 0"):
        chat_request(top_p=2).asked(WARM)
    with pytest.raises(ValidationError):
        chat_request(max_tokens=0)


@pytest.mark.parametrize(("query", "lang"), [("Describe it.", "en"), ("描述 it", "zh"), ("", "en")])
def test_question_without_chinese_is_framed_in_english(query, lang):
    assert Asked(query, [], None, WARM).lang == lang


def test_text_is_refused_by_its_length_before_it_becomes_tokens():
    Asked("a" * 800, [], None, WARM).refuse_text(10)
    with pytest.raises(InputError, match="have 801 characters; there is room for 10 tokens"):
        Asked("a" * 800, [("", "b")], None, WARM).refuse_text(10)
