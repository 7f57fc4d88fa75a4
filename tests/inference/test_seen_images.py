"""A picture that was seen is not looked at again: in a batch, in a conversation, in the rows of a file."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, PROJECT, load_model

from model.inference import seen_images
from model.inference.chat import answer_so_far, image_tensor
from model.inference.engine import Engine, Question
from model.inference.load import load_for_answering
from model.inference.seen_images import SeenImages, image_features
from scripts import cli_demo, evaluate, predict

PICTURES = [GOLDEN / f"upstream/images/{number}.png" for number in (0, 1, 2)]


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


@pytest.fixture
def images(model):
    return [image_tensor(picture, model) for picture in PICTURES]


def looks(model):
    """A list that will hold how many images the vision part of model is shown at each of its passes."""
    shown = []
    vision = model.get_mixin("eva").model.vit
    vision.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    return shown


def test_new_images_are_looked_at_together_and_once(model, images):
    shown, seen = looks(model), SeenImages(model)
    first = seen.features([images[0], images[1], images[0].clone()])
    assert shown == [2]
    again = seen.features([images[1], images[2], images[0]])
    assert shown == [2, 1]
    assert [one.shape for one in first] == [(32, first[0].shape[1])] * 3
    assert torch.equal(first[0], first[2])
    assert [torch.equal(*pair) for pair in ((first[1], again[0]), (first[0], again[2]))] == [True, True]
    for one, image in zip(again, (images[1], images[2], images[0]), strict=True):
        torch.testing.assert_close(one, image_features(image, model)[0])
    assert not torch.allclose(again[0], again[1])


def test_no_image_is_no_look(model):
    shown = looks(model)
    assert SeenImages(model).features([]) == []
    assert shown == []


def test_features_seen_longest_ago_are_forgotten(model, images, monkeypatch):
    monkeypatch.setattr(seen_images, "KEPT_IMAGES", 2)
    shown, seen = looks(model), SeenImages(model)
    for number in (0, 1, 0, 2, 0, 1):  # at 2, 1 is forgotten: 0 was seen since
        seen.features([images[number]])
    assert shown == [1, 1, 1, 1]
    assert len(seen.features(images)) == 3  # more than are kept
    assert shown == [1, 1, 1, 1, 1]


def test_images_that_differ_in_one_number_are_two(model, images):
    shown, other = looks(model), images[0].clone()
    other[0, 0, 0, 0] += 1e-3
    SeenImages(model).features([images[0], other])
    assert shown == [2]


def test_engine_looks_once_at_a_picture_of_many_rows_and_of_later_ones(model, tokenizer, images):
    ids = tokenizer.encode("问：你好\n答：")
    context = [*ids[:2], *[model.pad_token_id] * model.image_length, *ids[2:]]
    shown, engine = looks(model), Engine(model, tokenizer, rows=2, positions=80)
    questions = [Question(context, 2, images[number], max_length=len(context) + 4) for number in (0, 0, 1, 0)]
    answers = dict(engine.answers(questions))
    assert shown == [1, 1]
    assert answers[0].ids == answers[1].ids == answers[3].ids
    alone = Engine(model, tokenizer, positions=80)
    assert [dict(alone.answers([question]))[0].ids for question in questions[1:3]] == [answers[1].ids, answers[2].ids]


def test_turns_with_one_engine_look_once_and_answer_as_with_one_each(model, tokenizer, images):
    def turns(engine):
        history = []
        for query, length in (
            ("这是什么？", 70),
            ("为什么？", 110),
            ("谁？", 150),
        ):  # the answers never end by themselves
            *_, answer = answer_so_far(images[0], model, tokenizer, query, history, max_length=length, engine=engine)
            history.append((query, answer))
        return history

    torch.manual_seed(3)
    expected = turns(None)
    shown = looks(model)
    torch.manual_seed(3)
    assert turns(Engine(model, tokenizer, positions=150)) == expected
    assert shown == [1]


def test_turn_that_is_left_early_holds_up_none_after_it(model, tokenizer):
    engine = Engine(model, tokenizer, positions=120)
    next(answer_so_far(None, model, tokenizer, "你好", max_length=120, engine=engine))
    *_, answer = answer_so_far(None, model, tokenizer, "你好", max_length=120, engine=engine)
    assert not engine.busy
    assert isinstance(answer, str)


@pytest.fixture
def tiny_looks(monkeypatch):
    """How many images each pass of the vision part is shown, of every model that a command loads."""
    shown, plain = [], load_for_answering

    def loaded(*args, **kwargs):
        model, tokenizer = plain(*args, **kwargs)
        model.get_mixin("eva").model.vit.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
        return model, tokenizer

    monkeypatch.setattr("model.inference.load.load_for_answering", loaded)
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("command", [evaluate, predict])
def test_commands_look_once_at_a_picture_of_several_rows(tiny_looks, tmp_path, command):
    pictures = [str(PROJECT / f"fewshot-data/images/train0{number}.png") for number in (0, 1)]
    asked = [
        ("这张图片的背景里有什么内容？", pictures[0]),
        ("图里有什么？", pictures[1]),
        ("图里有什么？", pictures[0]),
    ]
    rows = [{"img": picture, "prompt": prompt, "label": "雪"} for prompt, picture in asked]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    out = str(tmp_path / "out.jsonl")
    command.main(
        ["--from_pretrained", str(PROJECT / "model/tiny"), "--data", str(data), "--out", out, "--batch-size", "1"]
    )
    assert tiny_looks == [1, 1]


@pytest.mark.slow
def test_demo_looks_once_at_a_picture_of_several_questions(tiny_looks, monkeypatch, capsys):
    lines = iter([str(PROJECT / "fewshot-data/images/train00.png"), "图里有什么？", "为什么？", "stop"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    cli_demo.main(["--from_pretrained", str(PROJECT / "model/tiny")])
    assert tiny_looks == [1]
    assert capsys.readouterr().out.strip()
