"""Odd text in `latest` and odd types in `model_config.json`: a sentence, in every command that reads a checkpoint."""

import contextlib
import json
import shutil

import pytest
from conftest import GOLDEN, PROJECT, write_huggingface

import finetune_visualglm
from model.checkpoints.config_types import model_problems, type_problems
from model.checkpoints.layout import Checkpoint
from model.errors import InputError
from scripts import cli_demo, convert_checkpoint, evaluate, merge_lora

CONFIGS = [json.loads(path.read_text()) for path in (PROJECT / "model/tiny/model_config.json",
           *sorted((GOLDEN / "saved_configs").glob("*.json")))]  # fmt: skip
BASE = {"name": "b", "path": "p", "fingerprint": "f"}
LATEST = {
    "empty": b"", "spaces": b" \n", "binary": bytes(range(128, 256)), "zeros": b"\0" * 100, "huge": b"9" * 10**7,
    "another folder": b"../../1", "a path": b"/etc/passwd", "negative": b"-1", "zero": b"0", "a float": b"1.0",
    "other digits": "١".encode(), "two": b"1 2", "escape codes": b"\x1b[31m1", "a missing iteration": b"2",
}  # fmt: skip
ODD = [
    ({"finetuning": []}, '"finetuning" is []; an object {…} is needed.'),
    ({"finetuning": "adapter"}, '"finetuning" is "adapter"'),
    ({"finetuning": None}, '"finetuning" is null'),
    ({"finetuning": {"contents": 3}}, '"finetuning.contents" is 3; a text is needed.'),
    ({"finetuning": {"contents": ["adapter"]}}, '"finetuning.contents" is ["adapter"]'),
    ({"finetuning": {"contents": "adapter"}}, 'no "name", "path", "fingerprint" in "finetuning.base"'),
    ({"finetuning": {"contents": "adapter", "base": "visualglm-6b"}}, '"finetuning.base" is "visualglm-6b"'),
    ({"finetuning": {"contents": "adapter", "base": {"name": "b", "fingerprint": "f"}}}, 'no "path" in'),
    ({"finetuning": {"contents": "adapter", "base": BASE | {"name": 7}}}, '"finetuning.base.name" is 7'),
    ({"finetuning": {"contents": "full", "base": BASE, "methods": {"lora": 1}}}, '"finetuning.methods" is {"lora": 1}'),
    ({"use_lora": "yes"}, '"use_lora" is "yes"; true or false or null is needed.'),
    ({"lora_rank": "10"}, '"lora_rank" is "10"; a whole number of 1 or more is needed.'),
    ({"lora_rank": 0}, '"lora_rank" is 0'),
    ({"lora_alpha": float("nan")}, '"lora_alpha" is NaN; a number above 0 is needed.'),
    ({"lora_alpha": True}, '"lora_alpha" is true'),
    ({"layer_range": "0 14"}, '"layer_range" is "0 14"; a list of layers counted from 0 or null is needed.'),
    ({"layer_range": [0, None]}, '"layer_range" is [0, null]'),
    ({"lora_target": ["everything"]}, '"lora_target" is ["everything"]; a list of query_key_value,'),
    ({"pre_seq_len": 2.5}, '"pre_seq_len" is 2.5'),
    ({"train_parts": [["vit"]]}, '"train_parts" is [["vit"]]'),
    (
        {"eva_args": {"image_size": 224}},
        '"eva_args.image_size" is 224; a list of height and width in pixels is needed.',
    ),
    ({"eva_args": {"patch_size": 0}}, '"eva_args.patch_size" is 0'),
    ({"num_layers": [28]}, '"num_layers" is [28]'),
    ({"hidden_size": "x" * 1000}, '"hidden_size" is "xxx'),
    ({"inner_hidden_size": -1}, '"inner_hidden_size" is -1'),
    ({"max_sequence_length": {}}, '"max_sequence_length" is {}'),
    ({"hidden_dropout": "0.1"}, '"hidden_dropout" is "0.1"; a number from 0 to less than 1 is needed.'),
    ({"eva_args": {"num_layers": "3"}}, '"eva_args.num_layers" is "3"; a whole number of 1 or more is needed.'),
    ({"eva_args": {"num_attention_heads": 0}}, '"eva_args.num_attention_heads" is 0'),
    (
        {"qformer_args": {"is_decoder": [1, 0]}},
        '"qformer_args.is_decoder" is [1, 0]; true, false or a list of these, one',
    ),
]
ODD_AT_HUGGING_FACE = [
    ({"num_layers": "6"}, '"num_layers" is "6"; a whole number of 1 or more is needed.'),
    ({"hidden_size": None}, '"hidden_size" is null'),
    ({"num_attention_heads": 0}, '"num_attention_heads" is 0'),
    ({"layernorm_epsilon": "1e-05"}, '"layernorm_epsilon" is "1e-05"; a number of 0 or more is needed.'),
    ({"gmask_token_id": "86"}, '"gmask_token_id" is "86"'),
    ({"eva_config": []}, '"eva_config" is []; an object {…} is needed.'),
    ({"eva_config": {"image_size": 224}}, '"eva_config.image_size" is 224; a list of height and width in pixels is needed.'),
    ({"qformer_config": {"hidden_size": "128"}}, '"qformer_config.hidden_size" is "128"'),
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A copy of the model that ships with the project."""
    return shutil.copytree(PROJECT / "model/tiny", tmp_path / "tiny")


def refusals(checkpoint, capsys):
    """What each command that reads a checkpoint says of it, before it loads anything; all end with status 2."""
    rows = str(PROJECT / "fewshot-data/dataset.json")
    for main, words in (
        (finetune_visualglm.main, ["--from_pretrained", checkpoint, "--use_lora", "--train-data", rows]),
        (cli_demo.main, ["--from_pretrained", checkpoint]),
        (evaluate.main, ["--from_pretrained", checkpoint, "--data", rows]),
        (merge_lora.main, [checkpoint, f"{checkpoint}-merged"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(list(map(str, words)))
        assert left.value.code == 2
        yield capsys.readouterr().err


@pytest.mark.parametrize("content", LATEST.values(), ids=LATEST)
def test_odd_text_in_latest_is_a_sentence(tiny, capsys, content):
    (tiny / "latest").write_bytes(content)
    for sentence in refusals(tiny, capsys):
        assert "latest" in sentence
        assert "needed." in sentence
        assert len(sentence) < 1000
        assert "\x1b" not in sentence
    with contextlib.suppress(InputError):  # what SAT's --load reads: nothing outside of the folder
        assert Checkpoint.at(tiny).iteration.isdigit()


@pytest.mark.parametrize(("odd", "sentence"), ODD, ids=[str(odd)[:50] for odd, _ in ODD])
def test_odd_type_in_the_configuration_is_a_sentence(tiny, capsys, odd, sentence):
    config = json.loads((tiny / "model_config.json").read_text())
    (tiny / "model_config.json").write_text(json.dumps(config | odd))
    for told in refusals(tiny, capsys):
        assert f"The checkpoint's configuration {tiny / 'model_config.json'}: " in told
        assert sentence in told
        assert len(told) < 1000


@pytest.mark.parametrize(
    ("odd", "sentence"), ODD_AT_HUGGING_FACE, ids=[str(odd)[:50] for odd, _ in ODD_AT_HUGGING_FACE]
)
def test_odd_type_in_hugging_faces_configuration_is_a_sentence_in_its_own_names(tmp_path, capsys, odd, sentence):
    config = json.loads((PROJECT / "model/tiny/model_config.json").read_text())
    published = write_huggingface(tmp_path / "published", config, {})
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | odd))
    for told in refusals(published, capsys):
        assert f"{published / 'config.json'}: {sentence}" in told
        assert "model_config.json" not in told


@pytest.mark.parametrize(
    ("odd", "sentence"),
    [
        (
            {"num_attention_heads": 7},
            '"hidden_size" is 160 and "num_attention_heads" 7; whole numbers are needed, the first a',
        ),
        ({"hidden_size": 161}, '"hidden_size" is 161 and "num_attention_heads" 4; whole'),
        ({"eva_args": {}}, '"eva_args.hidden_size" is null and "eva_args.num_attention_heads" null; whole numbers'),
        ({"qformer_args": None}, 'no "qformer_args"; a VisualGLM checkpoint has num_layers, '),
        ({"image_length": 16}, '"image_length" is 16 and "qformer_args.vocab_size" 32; the same is needed'),
        ({"layernorm_order": "middle"}, '"layernorm_order" is "middle"; a ChatGLM has "post".'),
    ],
)
def test_sizes_that_no_model_can_have_are_a_sentence(tiny, capsys, odd, sentence):
    config = {**json.loads((tiny / "model_config.json").read_text()), **odd}
    (tiny / "model_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    told = [told for told, _ in zip(refusals(tiny, capsys), range(3), strict=False)]
    with pytest.raises(SystemExit):
        convert_checkpoint.main([str(tiny), f"{tiny}-converted", "--to", "hf"])
    for printed in (*told, capsys.readouterr().err):
        assert f"{tiny / 'model_config.json'}: {sentence}" in printed


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"num_layers": ' + "9" * 5000 + "}", "\ufeff{}", '{"a": 1', "NaN", ""]
)
def test_configuration_that_is_no_json_is_a_sentence(tiny, capsys, text):
    (tiny / "model_config.json").write_text(text, encoding="utf-8")
    for told in refusals(tiny, capsys):
        assert "model_config.json: " in told
        assert "needed." in told


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_that_are_saved_have_no_problem(config):
    assert type_problems(config, "") == []
    assert model_problems(config, "") == []
