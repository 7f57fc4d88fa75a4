"""A visitor's conversation: real models, asked side by side."""

import asyncio
import json

import pytest
from conftest import GOLDEN, PICTURE, load_model

from model.data.remote_images import Limits
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.chat import chat
from model.inference.engine import Engine
from model.inference.sampling import GREEDY
from model.inference.serving import BusyError, Service
from model.inference.talk import Speaker, Talk, Turn, Wish, held_out_rows, together

QUESTION = "这是什么？"
SHORT, LONG = Wish(GREEDY, False, 300, max_tokens=12), Wish(GREEDY, False, 300, max_tokens=100)


@pytest.fixture(scope="module")
def speakers(upstream_checkpoint):
    """Two, each with one row and one place to wait."""
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    models = [load_model(upstream_checkpoint), load_model(upstream_checkpoint)]
    with (
        Service(Engine(models[0], tokenizer, 1, 300), 1) as one,
        Service(Engine(models[1], tokenizer, 1, 300), 1) as other,
    ):
        yield [
            Speaker(name, service, model, tokenizer)
            for name, service, model in zip("ab", (one, other), models, strict=True)
        ]


@pytest.fixture
def talk(speakers):
    """About the picture."""
    talk = Talk()
    talk.look(PICTURE.read_bytes(), speakers, Limits())
    return talk


async def heard(talk, question, speakers, wish=SHORT):
    """How many times an answer has grown, until it is whole."""
    return [[*turn.answers] async for turn in talk.asked(question, speakers, wish)]


def test_each_speaker_answers_as_chat_does_with_what_was_said_before(talk, speakers):
    for question in (QUESTION, "再说一次"):
        asyncio.run(heard(talk, question, speakers))
    model, tokenizer = speakers[0].model, speakers[0].tokenizer
    history = []
    for turn in talk.turns:
        taken = len(tokenizer.encode(turn.answers[0]))
        assert turn.answers[0] == turn.answers[1]
        assert taken > 3
        whole, _, _ = chat(PICTURE, model, tokenizer, turn.question, history, max_length=100, temperature=0,
                           repetition_penalty=1)  # fmt: skip
        assert whole.startswith(turn.answers[0])
        history.append((turn.question, turn.answers[0]))


def test_answer_grows_in_steps_and_the_first_is_empty(talk, speakers):
    seen = asyncio.run(heard(talk, QUESTION, speakers, LONG))  # on a busy machine it grows by several tokens at once
    assert seen[0] == ["", ""]
    assert len(set(map(tuple, seen))) > 8
    assert talk.turns[0].finished == ["length", "length"]


def test_stop_ends_the_answers_where_they_are_and_frees_the_rows(talk, speakers):
    async def stopped():
        async for turn in talk.asked(QUESTION, speakers, LONG):
            if len(turn.answers[0]) > 20:
                talk.stop()

    asyncio.run(stopped())
    [turn] = talk.turns
    assert (turn.is_stopped, turn.finished) == (True, ["", ""])
    assert 20 < len(turn.answers[0]) < 200
    asyncio.run(heard(talk, "再说一次", speakers))  # there is a row
    assert len(talk.turns) == 2


def test_whoever_leaves_early_frees_the_rows(talk, speakers):
    async def left():
        asked = talk.asked(QUESTION, speakers, LONG)
        for _ in range(5):
            await anext(asked)
        await asked.aclose()

    for _ in range(3):
        asyncio.run(left())
    assert asyncio.run(heard(talk, QUESTION, speakers))


@pytest.mark.slow
def test_more_than_may_wait_are_told_and_leave_no_turn(speakers):
    async def crowd():
        talks = [Talk() for _ in range(4)]
        return talks, await asyncio.gather(
            *(heard(one, QUESTION, speakers, LONG) for one in talks), return_exceptions=True
        )

    talks, results = asyncio.run(crowd())
    refused = [isinstance(result, BusyError) for result in results]
    assert sum(refused) == 2  # one row, one that waits
    assert [len(one.turns) for one in talks] == [0 if is_refused else 1 for is_refused in refused]


@pytest.mark.parametrize(("question", "words"), [
    ("猫 " * 100_000, "characters; there is room for 300 tokens"), ("猫 " * 2_000, r"take \d+ tokens"), ("\ud800", "surrogate"),
])  # fmt: skip
def test_question_that_does_not_fit_leaves_no_turn(talk, speakers, question, words):
    with pytest.raises(InputError, match=words):
        asyncio.run(heard(talk, question, speakers))
    assert talk.turns == []


def test_new_picture_begins_anew_and_a_bad_one_leaves_none(talk, speakers):
    talk.turns.append(Turn("a", ["b", "b"], ["stop", "stop"]))
    talk.look(PICTURE.read_bytes(), speakers, Limits())
    assert talk.turns == []
    assert [image.shape[:2] for image in talk.images] == [(1, 3)] * 2
    with pytest.raises(InputError, match="isn't a picture"):
        talk.look(b"%!PS-Adobe-3.0 EPSF-3.0", speakers, Limits())
    assert talk.images == []


def test_question_waits_for_a_picture_that_is_on_its_way(talk, speakers):
    async def asked_too_early():
        with talk.changing():
            answer = asyncio.create_task(heard(talk, QUESTION, speakers))
            await asyncio.sleep(0.2)
            assert talk.turns == []
            talk.look(None, speakers, Limits())
        await answer

    asyncio.run(heard(talk, QUESTION, speakers))
    with_picture = talk.turns.pop().answers
    asyncio.run(asked_too_early())
    [turn] = talk.turns
    assert turn.answers != with_picture


def test_what_one_stream_raises_ends_the_others():
    ended = []

    async def endless():
        try:
            while True:
                yield "a"
                await asyncio.sleep(0.01)
        finally:
            ended.append(True)

    async def broken():
        await asyncio.sleep(0.03)
        raise BusyError
        yield

    async def read():
        async for _ in together([endless(), broken()]):
            pass

    with pytest.raises(BusyError):
        asyncio.run(read())
    assert ended == [True]


def test_held_out_rows_are_those_whose_pictures_are_there(tmp_path):
    file = tmp_path / "held_out.json"
    rows = [{"img": str(PICTURE), "prompt": "a", "label": "b"}, {"img": "gone.png", "prompt": "a", "label": "b"}] * 3
    file.write_text(json.dumps(rows))
    assert [row.img for row in held_out_rows(file, 2)] == [str(PICTURE)] * 2
    assert held_out_rows(file, 0) == held_out_rows(tmp_path / "none.json", 5) == []
    file.write_text("[")
    assert held_out_rows(file, 5) == []
