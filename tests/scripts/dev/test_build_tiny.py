"""The shipped small model is a real, trained checkpoint, and its builder keeps the taught question from it."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import PROJECT

from model.data.tokenizer import ChatGLMTokenizer
from scripts.dev import build_tiny
from scripts.dev.make_fewshot_data import QUESTION, label
from scripts.dev.scene_talk import Turn
from scripts.dev.scenes import BACKGROUNDS, SHAPES, crowded_scene, random_scene
from tests.conftest import load_model

TINY = PROJECT / "model/tiny"
FILES = {"model_config.json", "latest", "1/mp_rank_00_model_states.pt", "ice_text.model"}


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_corpus_never_has_what_is_taught():
    texts = build_tiny.corpus(20000, Random(1))

    assert len(texts) > 60000
    for text in texts:
        assert QUESTION not in text
        assert "这张图片的背景" not in text
        assert not any(label(background) in text for background in BACKGROUNDS)


@pytest.mark.parametrize("text", [QUESTION, "问：这张图片的背景里有什么内容呢", label(BACKGROUNDS[3])])
def test_check_untaught_of_taught_words_is_refused(text):
    with pytest.raises(ValueError, match="the small model must never see"):
        build_tiny.check_untaught(["你好", text])


@pytest.mark.slow
def test_train_tokenizer_with_the_seed_gives_the_shipped_tokenizer(tmp_path):
    build_tiny.train_tokenizer(build_tiny.corpus(build_tiny.CORPUS_LINES, Random(1)), tmp_path / "ice_text.model")

    assert (tmp_path / "ice_text.model").read_bytes() == (TINY / "ice_text.model").read_bytes()


def test_shipped_tokenizer_has_chatglms_layout():
    tokenizer = ChatGLMTokenizer(TINY / "ice_text.model")

    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    assert ids == {
        "<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "[MASK]": 85, "[gMASK]": 86, "[sMASK]": 87, "<unused_0>": 88,
        "<sop>": 89, "<eop>": 90, "<ENC>": 91, "<dBLOCK>": 92,
    }  # fmt: skip
    assert tokenizer.convert_tokens_to_ids(["<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>"]) == [4, 5, 6, 84]


def test_shipped_tokenizer_spells_what_it_has_never_seen():
    tokenizer = ChatGLMTokenizer(TINY / "ice_text.model")

    assert tokenizer.decode(tokenizer.encode("鲸鱼 🐳", add_special_tokens=False)) == "鲸鱼 🐳"


def test_shipped_checkpoint_has_the_6bs_layout_in_8_mb():
    assert files_in(TINY) == FILES
    assert (TINY / "latest").read_text() == "1"
    assert sum((TINY / file).stat().st_size for file in FILES) < 8_000_000


def test_shipped_configuration_is_the_builders():
    tokenizer = ChatGLMTokenizer(TINY / "ice_text.model")

    assert json.loads((TINY / "model_config.json").read_text()) == build_tiny.model_config(tokenizer)


def test_shipped_weights_are_float16_and_all_that_the_model_has():
    weights = torch.load(TINY / "1" / "mp_rank_00_model_states.pt")["module"]
    model = build_tiny.new_model(json.loads((TINY / "model_config.json").read_text()))

    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert {name for name, tensor in weights.items() if tensor.dtype != torch.float16} == {
        "mixins.chatglm-attn.rotary_emb.inv_freq"
    }


def test_shipped_model_can_be_split_into_four():
    config = json.loads((TINY / "model_config.json").read_text())
    sizes = [config[name] for name in ("num_attention_heads", "hidden_size", "inner_hidden_size", "vocab_size")]

    assert [size % 4 for size in sizes] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def fifty_scenes():
    """Scenes that the shipped model has never seen, with their pictures."""
    random = Random(123)
    return build_tiny.drawn_pool([random_scene(random) for _ in range(50)], image_size=112)


def right_count(pool, turns):
    """How many of the turns, one about each scene, the shipped model answers word for word."""
    return build_tiny.right_turns(load_model(TINY), pool, turns, ChatGLMTokenizer(TINY / "ice_text.model")).count(True)


@pytest.mark.slow
def test_shipped_model_tells_places_in_pictures_it_has_never_seen(fifty_scenes):
    turns = [Turn("place", "这是什么地方？", f"这是{scene.background.zh}。") for scene in fifty_scenes.scenes]

    assert right_count(fifty_scenes, turns) >= 48


@pytest.mark.slow
def test_shipped_model_tells_the_colours_of_objects_in_pictures_it_has_never_seen(fifty_scenes):
    things = [scene.things[0] for scene in fifty_scenes.scenes]
    turns = [Turn("colour", f"{one.shape.zh}的颜色是什么？", f"{one.colour.zh}。") for one in things]

    assert right_count(fifty_scenes, turns) >= 40


def new_vision():
    """The vision part of a new model, and pictures that it was prepared with."""
    random = Random(9)
    pool = build_tiny.drawn_pool([crowded_scene(random) for _ in range(24)], image_size=112)
    vision = (
        build_tiny.new_model(build_tiny.model_config(ChatGLMTokenizer(TINY / "ice_text.model"))).get_mixin("eva").model
    )
    build_tiny.prepare_vision(vision, pool.images)
    return vision, pool


@pytest.mark.slow
def test_prepare_vision_gives_patches_of_equal_and_independent_features():
    vision, pool = new_vision()

    with torch.no_grad():
        projected = vision.vit.get_mixin("patch_embedding").proj(pool.images.float())  # [images, width, side, side]
    features = projected.transpose(0, 1).flatten(1)

    torch.testing.assert_close(features.mean(1), torch.zeros(128), atol=1e-3, rtol=0)
    torch.testing.assert_close(features.cov(), torch.eye(128), atol=0.15, rtol=0)


def test_prepare_vision_gives_neighbours_like_positions_and_far_ones_others():
    vision, _ = new_vision()
    positions = vision.vit.transformer.position_embeddings.weight[1:].unflatten(0, (8, 8))

    def distance(row: int, column: int) -> float:
        return (positions[0, 0] - positions[row, column]).norm().item()

    assert distance(0, 1) < distance(0, 7)
    assert distance(1, 0) < distance(7, 0)


def test_tower_head_of_features_that_show_shapes_tells_them():
    random = Random(3)
    scenes = [crowded_scene(random) for _ in range(4)]
    features = torch.zeros(4, 1 + 64, len(SHAPES))
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            features[number, 1:][build_tiny.covered_patches(thing, 8), SHAPES.index(thing.shape)] = 1.0
    head = build_tiny.TowerHead(len(SHAPES))
    with torch.no_grad():
        head.shape.weight.copy_(torch.eye(len(SHAPES)))
        head.shape.bias.zero_()

    _, right = head(features, scenes)
    _, wrong = head(-features, scenes)

    assert (right.item(), wrong.item()) == (1.0, 0.0)


def test_seen_keeps_the_scenes_and_gives_the_features_of_their_images():
    images = torch.arange(70.0).view(70, 1).half()
    scenes = [random_scene(Random(seed)) for seed in range(70)]

    pool = build_tiny.seen(lambda image: image * 2, build_tiny.Pool(scenes, images), "")

    assert pool.scenes is scenes
    assert torch.equal(pool.images, images * 2)


def test_right_answers_with_one_wrong_token_is_false():
    sop, a, b, eop, ignored = 1, 2, 3, 4, -100
    labels = torch.tensor([[ignored, sop, a, b, eop], [ignored, sop, a, b, eop]])
    likeliest = torch.tensor([[a, a, b, eop, 0], [sop, a, a, eop, 0]])  # sop is given, so a wrong guess there is none

    logits = torch.nn.functional.one_hot(likeliest, 5).float()

    assert build_tiny.right_answers(logits, labels).tolist() == [True, False]


def test_talk_batches_frame_a_question_as_chat_does_and_learn_its_answer():
    tokenizer = ChatGLMTokenizer(TINY / "ice_text.model")
    pool = build_tiny.Pool([random_scene(Random(7))], torch.zeros(1, 3, 2, 2, dtype=torch.float16))
    batch = next(build_tiny.talk_batches(pool, tokenizer, image_length=4, random=Random(1)))

    for input_ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        start = input_ids.index(tokenizer.bos_token_id)
        end = input_ids.index(tokenizer.eos_token_id) + 1
        assert input_ids[start - 1] == tokenizer.gmask_token_id
        assert labels == [-100] * start + input_ids[start:end] + [-100] * (len(labels) - end)


@pytest.mark.run
def test_main_with_two_steps_writes_a_checkpoint(tmp_path, capsys):
    build_tiny.main(["--out", str(tmp_path), "--steps", "2", "--pool", "64"])

    assert files_in(tmp_path) == FILES
    assert "answers right word for word" in capsys.readouterr().out
