"""Answering: the cache changes nothing, the context is the training's, and the answer is tidied."""

import functools
import http.server
import threading

import pytest
import torch
from conftest import PICTURE, load_model
from PIL import Image

from model.data.image_processor import BlipImageEvalProcessor
from model.data.prompt import context_ids
from model.errors import InputError
from model.inference.chat import chat
from model.inference.load import image_size, load_for_answering
from model.inference.token_pass import TokenPass

CHATTY = {"max_length": 64, "temperature": 0}  # greedy, some twenty tokens
ADAPTERS = [
    {},
    {"use_lora": True, "lora_rank": 4},
    {"use_ptuning": True, "pre_seq_len": 5},
    {"use_lora": True, "lora_rank": 4, "use_ptuning": True, "pre_seq_len": 5},
]


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


@pytest.fixture
def heard(monkeypatch):
    """A function of a model: a list that will hold the token ids of each pass through it, int64[batch, seq] as lists."""
    passes, read = [], TokenPass.__call__

    def reads(token_pass, numbers):
        passes.append(numbers[2].unsqueeze(1).tolist())
        return read(token_pass, numbers)

    def listening(model):
        model.register_forward_pre_hook(
            lambda _, __, inputs: passes.append(inputs["input_ids"].tolist()), with_kwargs=True
        )
        return passes

    monkeypatch.setattr(TokenPass, "__call__", reads)
    return listening


@torch.no_grad()
def answer_without_cache(model, tokenizer, ids, pre_image, image, max_length, penalty):
    """The greedy answer's token ids, with every token computed anew for every next one."""
    answer = []
    while len(ids) + len(answer) < max_length:
        input_ids = torch.tensor([ids + answer])
        scores = model(input_ids=input_ids, image=image, pre_image=pre_image)[0][0, -1]
        scores[list(set(answer))] /= penalty
        answer.append(scores.argmax().item())
        if answer[-1] == tokenizer.eos_token_id:
            break
    return answer


# generation


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "penalty"), [*((flags, 1.2) for flags in ADAPTERS), ({}, 1.0)])
def test_greedy_answer_with_the_cache_equals_one_computed_without(
    upstream_checkpoint, tokenizer, flags, penalty, heard
):
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel" if flags else "VisualGLMModel", **flags)
    for name, parameter in model.named_parameters():
        if "matrix_B" in name or "ptuning" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    image = BlipImageEvalProcessor(224)(Image.open(PICTURE)).unsqueeze(0)
    ids, pre_image = context_ids("这是什么？", None, True, tokenizer, 32)
    expected = answer_without_cache(model, tokenizer, ids, pre_image, image, len(ids) + 8, penalty)

    passes = heard(model)
    chat(PICTURE, model, tokenizer, "这是什么？", max_length=len(ids) + 8, temperature=0, repetition_penalty=penalty)

    assert [len(one[0]) for one in passes] == [len(ids)] + [1] * (len(passes) - 1)
    assert [one[0][0] for one in passes[1:]] == expected[:-1]


def test_answer_stops_at_eop(model, tokenizer, heard):
    passes = heard(model)

    def end_after_four(head, inputs, logits):
        logits[..., tokenizer.eos_token_id if len(passes) == 4 else 554] = 1e4

    model.get_mixin("chatglm-final").lm_head.register_forward_hook(end_after_four)
    response, _, _ = chat(None, model, tokenizer, "你好", repetition_penalty=1.0, **CHATTY)
    assert len(passes) == 4
    assert response == tokenizer.decode([554, 554, 554]).strip()


def test_answer_at_max_length_ends(model, tokenizer, heard):
    ids, _ = context_ids("你好", None, False, tokenizer, 32)
    passes = heard(model)
    chat(None, model, tokenizer, "你好", max_length=len(ids) + 3, temperature=0)
    assert len(passes) == 3


def test_answer_at_temperature_0_is_the_same_each_time(model, tokenizer):
    answers = {chat(PICTURE, model, tokenizer, "你好", **CHATTY)[0] for _ in range(3)}
    assert len(answers) == 1


def test_sampled_answers_differ_unless_the_seed_is_the_same(model, tokenizer):
    def sampled(seed):
        torch.manual_seed(seed)
        return chat(None, model, tokenizer, "你好", max_length=40, temperature=2.0, top_p=1.0, top_k=1000)[0]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_token_ids_in_invalid_slices_are_never_answered(model, tokenizer, heard):
    allowed = 554
    passes = heard(model)
    chat(None, model, tokenizer, "你好", invalid_slices=[slice(0, allowed), slice(allowed + 1, None)], **CHATTY)
    assert {one[0][0] for one in passes[1:]} == {allowed}


def test_cache_is_gone_after_an_answer(model, tokenizer):
    before = list(model.mixins)
    chat(None, model, tokenizer, "你好", **CHATTY)
    assert list(model.mixins) == before
    assert "auto-regressive" not in model.mixins


def test_cache_is_gone_after_a_failure(model, tokenizer):
    torch.nn.init.constant_(model.get_mixin("chatglm-final").lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="nan"):
        chat(None, model, tokenizer, "你好", **CHATTY)
    assert "auto-regressive" not in model.mixins


# the context


def test_context_without_a_picture_is_the_question_in_its_frame(model, tokenizer, heard):
    passes = heard(model)
    chat(None, model, tokenizer, "你好", **CHATTY)
    assert passes[0] == [[*tokenizer.encode("问：你好\n答：", add_special_tokens=False), 86, 89]]


def test_context_with_a_picture_is_what_training_saw(model, tokenizer, heard):
    passes = heard(model)
    chat(PICTURE, model, tokenizer, "你好", **CHATTY)
    opening = tokenizer.encode("<img>", add_special_tokens=False)
    question = tokenizer.encode("</img>问：你好\n答：", add_special_tokens=False)
    assert passes[0] == [[*opening, *[3] * 32, *question, 86, 89]]


def test_history_enters_the_context_and_grows_by_the_turn(model, tokenizer, heard):
    history = [("你是谁？", "我是一只猫。")]
    passes = heard(model)
    response, longer, _ = chat(None, model, tokenizer, "真的？", history=history, **CHATTY)
    text = "问：你是谁？\n答：我是一只猫。\n问：真的？\n答："
    assert passes[0] == [[*tokenizer.encode(text, add_special_tokens=False), 86, 89]]
    assert longer == [*history, ("真的？", response)]
    assert history == [("你是谁？", "我是一只猫。")]


def test_english_context_has_the_english_frame(model, tokenizer, heard):
    passes = heard(model)
    chat(None, model, tokenizer, "Who?", history=[("a", "b")], english=True, **CHATTY)
    assert passes[0] == [[*tokenizer.encode("Q:a\nA:b\nQ:Who?\nA:", add_special_tokens=False), 86, 89]]


def test_too_long_context_is_a_sentence(model, tokenizer):
    with pytest.raises(InputError, match=r"take \d+ tokens; --max_length must be more, not 10\."):
        chat(PICTURE, model, tokenizer, "你好", max_length=10)


# the picture


def test_picture_as_path_text_pillow_image_and_tensor_gives_the_same_answer(model, tokenizer):
    with Image.open(PICTURE) as picture:
        results = [
            chat(source, model, tokenizer, "这是什么？", max_length=60, temperature=0)
            for source in (PICTURE, str(PICTURE), picture)
        ]
    image = results[0][2]
    results.append(chat(None, model, tokenizer, "这是什么？", image=image, max_length=60, temperature=0))
    assert {response for response, _, _ in results} == {results[0][0]}
    assert image.shape == (1, 3, 224, 224)
    assert all(torch.equal(tensor, image) for _, _, tensor in results)


def test_picture_given_as_image_is_opened_as_one_given_by_its_path(model, tokenizer):
    expected, _, tensor = chat(PICTURE, model, tokenizer, "看", **CHATTY)
    with Image.open(PICTURE) as picture:
        for image in (PICTURE, str(PICTURE), picture, tensor):
            answer, _, returned = chat(None, model, tokenizer, "看", image=image, **CHATTY)
            assert (answer, torch.equal(returned, tensor)) == (expected, True)


@pytest.mark.slow
def test_picture_as_url_gives_the_same_answer(model, tokenizer):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=PICTURE.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{PICTURE.name}"
        from_url = chat(url, model, tokenizer, "这是什么？", max_length=60, temperature=0)
        server.shutdown()
    assert from_url[0] == chat(PICTURE, model, tokenizer, "这是什么？", max_length=60, temperature=0)[0]


def test_answer_without_a_picture_gives_no_image(model, tokenizer):
    assert chat(None, model, tokenizer, "你好", **CHATTY)[2] is None


def test_missing_picture_is_a_sentence_with_its_name(model, tokenizer):
    with pytest.raises(InputError, match="nothing\\.png"):
        chat("nothing.png", model, tokenizer, "你好")


def test_image_size_is_the_checkpoints(model):
    assert image_size(model) == 224


# loading


def test_base_checkpoint_for_answering_is_a_plain_model_in_eval_mode(upstream_checkpoint, capsys):
    model, tokenizer = load_for_answering(str(upstream_checkpoint))
    assert type(model).__name__ == "VisualGLMModel"
    assert not model.training
    assert tokenizer.eos_token_id == 90
    assert capsys.readouterr().out == ""


def test_checkpoint_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_for_answering(str(tmp_path / "nowhere"))
