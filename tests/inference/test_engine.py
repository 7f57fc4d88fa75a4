"""The engine: SAT's greedy answers token by token, for every kind of model, alone and in a batch that is refilled."""

import json
import threading

import pytest
import torch
from conftest import GOLDEN, load_model
from golden.record_answers import ADAPTERS, CONTEXTS, NEW_TOKENS, context_of, image_of, model_of, write_base

from model.errors import InputError
from model.inference.engine import Engine, Question, model_positions
from model.inference.sampling import Sampling
from model.inference.seen_images import image_features

RECORDED = json.loads((GOLDEN / "answers.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def model(base):
    return model_of("base", base)


def recorded_questions(tokenizer):
    questions = []
    for context in CONTEXTS:
        ids, pre_image = context_of(context, tokenizer)
        questions.append(Question(ids, pre_image, image_of(context["image"]), max_length=len(ids) + NEW_TOKENS))
    return questions


def text_question(tokenizer, text="问：你好\n答：", **options):
    return Question(tokenizer.encode(text), **options)


def finished(engine, answer):
    while not answer.finished:
        engine.step()
    return answer


@pytest.fixture
def never_ending(model, tokenizer):
    """The model, which never answers <eop> inside the test."""

    def without_eop(head, inputs, scores):
        scores[..., tokenizer.eos_token_id] = -1e4

    hook = model.get_mixin("chatglm-final").lm_head.register_forward_hook(without_eop)
    yield model
    hook.remove()


# SAT's answers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_answers_of_any_kind_of_model_equal_sats_alone_and_in_a_refilled_batch(base, tokenizer, kind):
    model, questions = model_of(kind, base), recorded_questions(tokenizer)
    engine = Engine(model, tokenizer)
    assert finished(engine, engine.submit(questions[5])).ids == RECORDED[kind][5]
    together = dict(Engine(model, tokenizer, rows=3, positions=128).answers(questions))
    assert [together[number].ids for number in range(len(questions))] == RECORDED[kind]


def test_answers_by_known_image_features_equal_those_by_pixels(model, tokenizer):
    questions = recorded_questions(tokenizer)
    known = [
        question
        if question.image is None
        else Question(
            question.input_ids,
            question.pre_image,
            image_features=image_features(question.image, model),
            max_length=question.max_length,
        )
        for question in questions
    ]
    mixed = [*known[:2], *questions[2:]]
    answers = dict(Engine(model, tokenizer, rows=7, positions=128).answers(mixed))
    assert [answers[number].ids for number in range(7)] == RECORDED["base"]


# rows


def test_free_row_is_filled_while_the_others_go_on(never_ending, tokenizer):
    engine = Engine(never_ending, tokenizer, rows=2, positions=64)
    size = len(text_question(tokenizer).input_ids)
    long, short, third = (
        engine.submit(text_question(tokenizer, max_length=size + new_tokens)) for new_tokens in (9, 3, 4)
    )
    changed = [engine.step() for _ in range(6)]
    assert changed == [[long, short], [long, short], [long, short], [third], [long, third], [long, third]]
    assert (short.finished, third.finished) == ("length", "")
    assert (len(long.ids), len(third.ids)) == (5, 3)


def test_questions_are_taken_only_when_there_is_a_row_for_them(never_ending, tokenizer):
    taken = []

    def questions():
        for number in range(5):
            taken.append(number)
            yield text_question(tokenizer, max_length=20)

    engine = Engine(never_ending, tokenizer, rows=2, positions=64)
    number, answer = next(engine.answers(questions()))
    assert taken == [0, 1]
    assert (number, answer.finished) == (0, "length")


def test_answer_that_is_cancelled_gets_no_more_tokens_and_leaves_its_row(never_ending, tokenizer):
    engine = Engine(never_ending, tokenizer, rows=1, positions=64)
    first, waiting, last = (engine.submit(text_question(tokenizer, max_length=40)) for _ in range(3))
    engine.step()
    first.cancel()
    waiting.cancel()
    assert engine.step() == [first, waiting, last]
    assert [answer.finished for answer in (first, waiting, last)] == ["cancelled", "cancelled", ""]
    assert [len(answer.ids) for answer in (first, waiting, last)] == [1, 0, 1]


def test_rows_that_move_go_on_as_if_alone(never_ending, tokenizer):
    texts = [f"问：{text}\n答：" for text in ("你好", "这是什么？", "描述这张图片。")]
    alone = [
        finished(
            engine := Engine(never_ending, tokenizer), engine.submit(text_question(tokenizer, text, max_length=40))
        )
        for text in texts
    ]
    engine = Engine(never_ending, tokenizer, rows=3, positions=64)
    first, *others = [engine.submit(text_question(tokenizer, text, max_length=40)) for text in texts]
    for _ in range(4):
        engine.step()
    first.cancel()
    assert [finished(engine, answer).ids for answer in others] == [answer.ids for answer in alone[1:]]


@pytest.mark.slow
def test_other_threads_may_submit_and_cancel(never_ending, tokenizer):
    engine = Engine(never_ending, tokenizer, rows=2, positions=512)
    submitted = []

    def ask():
        for _ in range(5):
            submitted.append(engine.submit(text_question(tokenizer, max_length=30)))
        submitted.append(engine.submit(text_question(tokenizer)))
        submitted[-1].cancel()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or engine.busy:
        engine.step()
    assert sorted(answer.finished for answer in submitted) == ["cancelled"] * 3 + ["length"] * 15


def test_step_with_nothing_to_do_changes_nothing(model, tokenizer):
    engine = Engine(model, tokenizer)
    assert not engine.busy
    assert engine.step() == []


# lengths and seeds


def test_context_without_room_for_an_answer_is_a_sentence(model, tokenizer):
    engine = Engine(model, tokenizer, positions=64)
    with pytest.raises(InputError, match=r"take \d+ tokens; --max_length must be more, not 4\."):
        engine.submit(text_question(tokenizer, max_length=4))
    with pytest.raises(InputError, match="--max_length 65: there is room for 64 tokens"):
        engine.submit(text_question(tokenizer, max_length=65))


def test_more_tokens_than_the_model_takes_are_refused_in_a_sentence(model, tokenizer):
    positions = model_positions(model)
    with pytest.raises(InputError, match=f"--max_length {positions + 1}: this model takes {positions} tokens"):
        Engine(model, tokenizer, positions=positions + 1)


@pytest.mark.slow
def test_answer_may_fill_every_position_of_the_model(never_ending, tokenizer):
    engine = Engine(never_ending, tokenizer)
    answer = engine.submit(text_question(tokenizer))
    assert finished(engine, answer).length == model_positions(never_ending)


def test_seed_decides_an_answer_whatever_else_is_in_the_batch(never_ending, tokenizer):
    def drawn(seed, others):
        engine = Engine(never_ending, tokenizer, rows=3, positions=64)
        sampling = Sampling(temperature=3.0, top_p=1.0, top_k=500, seed=seed)
        answers = [engine.submit(text_question(tokenizer, max_length=30)) for _ in range(others)]
        answers.append(engine.submit(text_question(tokenizer, max_length=30, sampling=sampling)))
        return finished(engine, answers[-1]).ids

    assert drawn(1, 0) == drawn(1, 2)
    assert drawn(1, 0) != drawn(2, 0)


def test_damaged_weights_are_a_sentence(base, tokenizer):
    model = load_model(base)
    torch.nn.init.constant_(model.get_mixin("chatglm-final").lm_head.weight, float("nan"))
    engine = Engine(model, tokenizer)
    engine.submit(text_question(tokenizer))
    with pytest.raises(InputError, match="hold nan"):
        engine.step()


def test_answers_after_one_whose_numbers_were_not_finite_are_as_ever(model, tokenizer):
    short, long = (
        text_question(tokenizer, max_length=40),
        text_question(tokenizer, "问：" + "你好" * 20 + "\n答：", max_length=60),
    )
    nan = torch.full((1, model.image_length, model.get_mixin("eva").model.glm_proj.weight.shape[1]), float("nan"))
    bad = Question(tokenizer.encode("问：" + "你好" * 40 + "\n答："), 0, image_features=nan)
    clean, engine = Engine(model, tokenizer, rows=2), Engine(model, tokenizer, rows=2)
    expected = [finished(clean, answer).ids for answer in [clean.submit(short), clean.submit(long)]]
    engine.submit(bad)
    with pytest.raises(InputError, match="scores hold nan"):
        engine.step()
    engine.active.clear()  # as a server does
    assert [finished(engine, answer).ids for answer in [engine.submit(short), engine.submit(long)]] == expected
