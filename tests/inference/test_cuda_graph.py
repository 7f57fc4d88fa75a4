"""Passes that are recorded and replayed, on a CPU (`recorded_graph`); `tests/test_cuda.py` does it on a GPU."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from golden.record_answers import ADAPTERS, model_of
from inference import test_engine
from inference.test_engine import RECORDED, finished, recorded_questions, text_question
from recorded_graph import Recorder

from model.inference import cuda_graph
from model.inference import engine as engine_module
from model.inference.cuda_graph import can_be_recorded, power_of_two
from model.inference.engine import Engine

base, model, never_ending = test_engine.base, test_engine.model, test_engine.never_ending  # fixtures


@pytest.fixture
def replaying(monkeypatch):
    """Let engines that are made from now on record their passes."""
    monkeypatch.setattr(engine_module, "can_be_recorded", lambda model: True)
    monkeypatch.setattr(cuda_graph, "Recorder", Recorder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_replayed_answers_of_any_kind_of_model_equal_sats_alone_and_in_a_refilled_batch(
    replaying, base, tokenizer, kind
):
    model, questions = model_of(kind, base), recorded_questions(tokenizer)
    engine = Engine(model, tokenizer)
    assert finished(engine, engine.submit(questions[5])).ids == RECORDED[kind][5]
    assert sum(engine.graphs.record.replays) == len(RECORDED[kind][5]) - 2  # all but the first and second token
    engine = Engine(model, tokenizer, rows=3, positions=128)
    together = dict(engine.answers(questions))
    assert [together[number].ids for number in range(len(questions))] == RECORDED[kind]
    assert sum(engine.graphs.record.replays) > 10


def test_each_number_of_rows_and_of_keys_has_its_graph(replaying, never_ending, tokenizer):
    def asked(engine):
        questions = [text_question(tokenizer, max_length=length) for length in (300, 290, 60)]
        return [answer.ids for answer in dict(sorted(engine.answers(questions))).values()]

    engine, plain = Engine(never_ending, tokenizer, rows=3, positions=300), Engine(never_ending, tokenizer, rows=3)
    plain.graphs = None
    assert asked(engine) == asked(plain)
    # Three rows, then two, over 128 and 256 keys, then over all there are; at last one row.
    assert list(engine.graphs.met) == [(3, 128), (2, 128), (2, 256), (2, 300), (1, 300)]
    assert all(engine.graphs.record.replays)
    assert [power_of_two(number) for number in (1, 2, 3, 4, 5, 129)] == [1, 2, 4, 4, 8, 256]


def test_rows_that_only_fill_up_leave_the_others_alone(replaying, never_ending, tokenizer):
    engine, plain = Engine(never_ending, tokenizer, rows=5, positions=64), Engine(never_ending, tokenizer)
    plain.graphs = None
    asked = [text_question(tokenizer, f"问：{text}\n答：", max_length=40) for text in ("你好", "这是什么？", "哪里")]
    alone = [finished(plain, plain.submit(question)).ids for question in asked]
    together = [engine.submit(question) for question in asked]
    assert [finished(engine, answer).ids for answer in together] == alone
    assert (4, 64) in engine.graphs.met


def test_what_an_error_leaves_behind_isnt_seen_by_graphs(replaying, never_ending, tokenizer):
    engine = Engine(never_ending, tokenizer, positions=64)
    expected = finished(engine, engine.submit(text_question(tokenizer))).ids
    for layer in engine.cache.layers:
        layer.fill_(float("nan"))
    engine.cache.forget()
    assert finished(engine, engine.submit(text_question(tokenizer))).ids == expected


def test_pass_that_cant_be_recorded_is_made_as_it_is_and_said_once(replaying, never_ending, tokenizer, capsys):
    expected = Engine(never_ending, tokenizer, positions=200)
    expected = finished(expected, expected.submit(text_question(tokenizer))).ids

    def refuses(work):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    engine = Engine(never_ending, tokenizer, positions=200)
    engine.graphs.record = refuses
    assert finished(engine, engine.submit(text_question(tokenizer))).ids == expected
    told = (
        "Answers come more slowly: a pass can't be recorded here (operation not permitted when stream is capturing).\n"
    )
    assert capsys.readouterr().err == told


def test_engine_that_nobody_has_any_more_frees_its_memory(replaying, model, tokenizer):
    gc.collect()
    gc.disable()
    try:
        engine = Engine(model, tokenizer, positions=64)
        finished(engine, engine.submit(text_question(tokenizer)))
        cache = weakref.ref(engine.cache)
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_passes_are_recorded_where_the_gpu_has_the_whole_model_and_it_is_only_asked(model, monkeypatch):
    weights = [torch.nn.Parameter(torch.empty(0), requires_grad=False)]
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), requires_grad=False)

    def can(*weights):
        return can_be_recorded(SimpleNamespace(parameters=lambda: iter(weights)))

    assert can(on_gpu)
    assert not can(*weights)
    assert not can(on_gpu, SimpleNamespace(device=on_gpu.device, requires_grad=True))
    monkeypatch.setattr(cuda_graph, "model_parallel", lambda: SimpleNamespace(ranks=2))
    assert not can(on_gpu)
    assert Engine(model, SimpleNamespace(eos_token_id=1, pad_token_id=3)).graphs is None
