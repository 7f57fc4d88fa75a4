"""The thread around the engine: what fails, waits, is late or left, and texts before which an answer ends."""

import asyncio
import json
import time
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, load_model, run_python

from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.chat import answer_so_far, chat_question
from model.inference.engine import Engine
from model.inference.sampling import GREEDY
from model.inference.serving import BusyError, FailedError, Service, before_stop, computed_apart, growing


@pytest.fixture(scope="module")
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def question(model, tokenizer):
    return chat_question(None, model, tokenizer, "你好", max_length=20, sampling=GREEDY)


def growths(service, question, tokenizer, **options):
    """All that `growing` gives."""

    async def collected():
        return [growth async for growth in growing(service, question, tokenizer, **options)]

    return asyncio.run(collected())


def test_answer_grows_by_a_token_until_it_is_whole(model, tokenizer, question):
    *_, expected = answer_so_far(None, model, tokenizer, "你好", max_length=20, sampling=GREEDY)
    with Service(Engine(model, tokenizer), queue=0) as service:
        found = growths(service, question, tokenizer)
    assert (found[-1].text, found[-1].finished) == (expected, "length")
    assert found[-1].tokens == 20 - len(question.input_ids)
    assert [growth.finished for growth in found[:-1]] == [""] * (len(found) - 1)


def test_step_that_fails_fails_its_answers_and_the_service_lives(model, tokenizer, question, capsys):
    weight = model.transformer.word_embeddings.weight
    kept = weight.clone()
    with Service(Engine(model, tokenizer), queue=0) as service:
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(FailedError, match="the server's own output says why"):
            growths(service, question, tokenizer)
        with torch.no_grad():
            weight.copy_(kept)
        assert growths(service, question, tokenizer)[-1].finished == "length"
        assert service.is_alive
    assert "1 answer failed: the model's scores hold nan" in capsys.readouterr().err


def test_answers_cancelled_in_a_step_that_fails_are_forgotten(model, tokenizer, question, monkeypatch):
    def fails(contexts):
        time.sleep(0.1)
        raise RuntimeError("no memory")

    with Service(Engine(model, tokenizer, rows=1), queue=9) as service:
        monkeypatch.setattr(service.engine, "_read_contexts", fails)
        answers = [service.submit(question, lambda: None) for _ in range(3)]
        answers[1].cancel()
        deadline = time.monotonic() + 20
        while service._listeners and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service._listeners == {}
    assert [answer.finished for answer in answers] == ["failed", "cancelled", "failed"]


def test_more_questions_than_may_wait_are_refused(model, tokenizer, question):
    service = Service(Engine(model, tokenizer, rows=1), queue=1)  # not started: nothing is answered
    for _ in range(2):
        service.submit(question, lambda: None)
    with pytest.raises(BusyError):
        service.submit(question, lambda: None)


def test_question_whose_asker_has_gone_takes_no_place_from_another(model, tokenizer, question):
    service = Service(Engine(model, tokenizer, rows=1), queue=1)  # not started: no step has finished what was cancelled
    answers = [service.submit(question, lambda: None) for _ in range(2)]
    assert service.before_a_new_one == 2
    answers[0].cancel()
    assert service.before_a_new_one == 1
    service.submit(question, lambda: None)
    with pytest.raises(BusyError):
        service.submit(question, lambda: None)


def test_answer_that_is_left_early_frees_its_row(model, tokenizer, question):
    long = replace(question, max_length=None)  # not done before its first growth is seen

    async def first():
        answer = growing(service, long, tokenizer)
        growth = await anext(answer)
        await answer.aclose()
        return growth

    with Service(Engine(model, tokenizer), queue=0) as service:
        assert asyncio.run(first()).finished == ""
    assert service.engine.active == []
    assert not service.is_alive


def test_answer_that_nobody_waits_for_ends_without_its_last_growth(model, tokenizer, question):
    async def gone():
        return True

    with Service(Engine(model, tokenizer), queue=0) as service:
        assert growths(service, question, tokenizer, is_gone=gone) == []


def test_answer_that_gets_no_row_in_time_is_told(model, tokenizer, question):
    service = Service(Engine(model, tokenizer), queue=0)  # not started
    with pytest.raises(FailedError, match="no row was free within 0 seconds"):
        growths(service, question, tokenizer, seconds=0)


@pytest.mark.parametrize(("text", "stops", "finished", "expected"), [
    ("abc", [], False, ("abc", False)),
    ("abcd", ["c"], False, ("ab", True)),
    ("abcd", ["d", "b"], False, ("a", True)),
    ("abc", ["cd"], False, ("ab", False)),  # the next letter may be d
    ("abc", ["cd"], True, ("abc", False)),
    ("abab", ["abac"], False, ("ab", False)),
])  # fmt: skip
def test_text_ends_before_a_stop_and_its_beginning_is_held_back(text, stops, finished, expected):
    assert before_stop(text, stops, finished) == expected


def test_new_question_is_told_how_many_are_before_it(model, tokenizer, question):
    with Service(Engine(model, tokenizer, rows=2), queue=2) as service:
        assert service.before_a_new_one == 0
        with service._changed:  # the engine waits
            service.submit(question, lambda: None)
            assert service.before_a_new_one == 0
            service.submit(question, lambda: None)
            assert service.before_a_new_one == 1
            service.submit(question, lambda: None)
            assert service.before_a_new_one == 2


# helpers of threads


@pytest.mark.run
def test_thread_that_loads_leaves_no_helpers_and_one_that_prepares_pictures_has_none():
    done = run_python("tests/programs/helpers_of_openmp.py", OMP_NUM_THREADS="2")
    assert json.loads(done.stdout) == {"apart": 0, "picture": 0, "here": 1}, done.stderr


def test_what_is_wrong_with_what_is_computed_apart_is_told():
    def refuse():
        raise InputError("no such model")

    with pytest.raises(InputError, match="no such model"):
        computed_apart(refuse)
