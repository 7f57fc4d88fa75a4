"""LoRA into PEFT's files and back: the real library, on a model whose modules have Hugging Face's names, answers the same."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, run_python, write_tuned
from huggingface_chatglm import ChatGLM
from safetensors.torch import load_file, save_file

from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import is_adapter_name
from model.checkpoints.tensors import open_huggingface
from model.checkpoints.weights import read_weights
from model.convert.huggingface import convert
from model.convert.peft import from_peft, to_peft
from model.errors import InputError
from model.inference.load import load_for_answering

pytestmark = pytest.mark.slow  # importing PEFT takes seconds

WEIGHTS = "1/mp_rank_00_model_states.pt"
INPUT_IDS = torch.tensor([[859, 775, 2685, 2676, 86, 89, 554, 17]])
ALL_TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.fixture(scope="session")
def published(upstream_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(str(upstream_checkpoint), str(tmp_path_factory.mktemp("published") / "hf"), "hf")


@pytest.fixture
def theirs(published: Path) -> ChatGLM:
    """The small model with the names and the computation of Hugging Face's code."""
    return ChatGLM.from_folder(published).eval()


@torch.no_grad()
def our_logits(folder: Path, **named) -> torch.Tensor:
    return load_for_answering(str(folder), **named)[0](input_ids=INPUT_IDS)[0]


@torch.no_grad()
def their_logits(model) -> torch.Tensor:
    return model(INPUT_IDS)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=2e-5)


def test_model_with_hugging_faces_names_answers_as_ours(theirs: ChatGLM, upstream_checkpoint: Path):
    assert close(their_logits(theirs), our_logits(upstream_checkpoint))


# --- to PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    {"lora_rank": 3},
    {"lora_rank": 4, "lora_alpha": 6.0, "layer_range": [0, 2]},
    {"lora_rank": 2, "lora_target": ALL_TARGETS, "lora_alpha": 0.5},
    {"lora_rank": 2, "lora_target": ["dense_4h_to_h"], "layer_range": [1]},
])  # fmt: skip
def test_peft_on_hugging_faces_model_answers_as_ours(
    upstream_checkpoint: Path, theirs: ChatGLM, tmp_path: Path, flags: dict
):
    import peft  # seconds, for whoever collects the tests

    tuned = write_tuned(upstream_checkpoint, tmp_path / "lora", use_lora=True, **flags)
    expected = our_logits(tuned)
    base = their_logits(theirs)
    adapter = to_peft(str(tuned), str(tmp_path / "adapter"))
    model = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    assert close(their_logits(model), expected)
    assert not close(base, expected)
    assert close(their_logits(model.merge_and_unload()), expected)


def test_files_are_pefts_and_the_vision_part_is_left_alone(upstream_checkpoint: Path, theirs: ChatGLM, tmp_path: Path):
    import peft  # seconds, for whoever collects the tests

    tuned = write_tuned(upstream_checkpoint, tmp_path / "lora", use_lora=True, lora_rank=3, layer_range=[1])
    adapter = to_peft(str(tuned), str(tmp_path / "adapter"))
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    shapes = {name: list(tensor.shape) for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    prefix = "base_model.model.transformer.layers.1.attention."
    assert shapes == {
        f"{prefix}query_key_value.lora_A.weight": [9, 64],
        f"{prefix}query_key_value.lora_B.weight": [192, 9],
        f"{prefix}dense.lora_A.weight": [3, 64],
        f"{prefix}dense.lora_B.weight": [64, 3],
    }
    model = peft.PeftModel.from_pretrained(theirs, adapter)
    assert {name for name, _ in model.named_parameters() if "lora" in name} == {
        name.replace(".weight", ".default.weight") for name in shapes
    }


def test_lora_of_a_full_checkpoint_goes_to_peft_too(upstream_checkpoint: Path, theirs: ChatGLM, tmp_path: Path):
    import peft  # seconds, for whoever collects the tests

    tuned = write_tuned(upstream_checkpoint, tmp_path / "full", full=True, use_lora=True, lora_rank=2)
    adapter = to_peft(str(tuned), str(tmp_path / "adapter"))
    model = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    assert close(their_logits(model), our_logits(tuned))


def test_lora_that_is_not_whole_is_not_converted(upstream_checkpoint: Path, tmp_path: Path):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "full", full=True, use_lora=True, lora_rank=2)
    content = torch.load(tuned / WEIGHTS)
    gone = "transformer.layers.1.attention.dense.matrix_A.0"
    del content["module"][gone]
    torch.save(content, tuned / WEIGHTS)
    (tuned / "1/checksums.json").unlink()  # as older checkpoints have none
    assert f"1 tensor of its adapters is missing (the first: {gone})" in refused(
        to_peft, str(tuned), str(tmp_path / "x")
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("method", "notes"), [("use_qlora", 1), ("use_lora", 0)])
def test_qlora_is_told_to_need_a_base_in_4_bits_there(
    upstream_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, notes: int
):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", **{method: True}, lora_rank=2)
    capsys.readouterr()
    to_peft(str(tuned), str(tmp_path / "adapter"))
    told = f"{tuned}: QLoRA learned beside weights in 4 bits, and answers worse beside the base's in full width. Load the base"
    assert capsys.readouterr().err.count(told) == notes


# --- from PEFT --------------------------------------------------------------------------------------------------------


def trained_by_peft(model: ChatGLM, folder: Path, **settings) -> tuple[torch.Tensor, Path]:
    """Logits of a model with random LoRA of PEFT's, and where PEFT saved it."""
    import peft  # seconds, for whoever collects the tests

    torch.manual_seed(3)
    pattern = settings.pop("target_modules", r"transformer\.layers\.\d+\.attention\.(query_key_value|dense)")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=pattern, **settings)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder)
    return their_logits(tuned), folder


@pytest.mark.parametrize("settings", [
    {"r": 4, "lora_alpha": 8},
    {"r": 3, "lora_alpha": 5, "use_rslora": True},
    {"r": 4, "lora_alpha": 2, "rank_pattern": {"dense": 2}, "alpha_pattern": {"dense": 7}},
    {"r": 2, "lora_alpha": 2, "target_modules": r"transformer\.layers\.[02]\.mlp\.dense_h_to_4h"},
])  # fmt: skip
def test_adapter_that_peft_trained_answers_the_same_here(
    upstream_checkpoint: Path, published: Path, theirs: ChatGLM, tmp_path: Path, settings: dict
):
    expected, adapter = trained_by_peft(theirs, tmp_path / "adapter", **settings)
    ours = from_peft(str(adapter), str(tmp_path / "ours"), str(published))
    assert close(our_logits(ours), expected)
    assert not close(our_logits(upstream_checkpoint), expected)
    assert Checkpoint.find(ours).config["finetuning"]["base"]["name"] == str(published)


@pytest.mark.parametrize("flags", [{"lora_rank": 3}, {"lora_rank": 4, "lora_alpha": 6.0, "layer_range": [0, 2]}])
def test_ours_there_and_back_has_the_same_bytes(upstream_checkpoint: Path, tmp_path: Path, flags: dict):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "lora", use_lora=True, **flags)
    back = from_peft(
        str(to_peft(str(tuned), str(tmp_path / "adapter"))), str(tmp_path / "back"), str(upstream_checkpoint)
    )
    before, after = read_weights(tuned / WEIGHTS), read_weights(back / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(is_adapter_name(name) and torch.equal(before[name], after[name]) for name in before)
    keys = ("lora_rank", "lora_alpha", "use_lora")
    configs = [json.loads((folder / "model_config.json").read_text()) for folder in (tuned, back)]
    assert {key: configs[0][key] for key in keys} == {key: configs[1][key] for key in keys}
    assert (configs[0]["layer_range"] or None) == configs[1]["layer_range"]


def test_converted_adapter_can_be_trained_on_and_merged(published: Path, theirs: ChatGLM, tmp_path: Path):
    from model.convert.merge_lora import merge

    expected, adapter = trained_by_peft(theirs, tmp_path / "adapter", r=2, lora_alpha=2)
    ours = from_peft(str(adapter), str(tmp_path / "ours"), str(published))
    merged = merge(str(ours), str(tmp_path / "merged"))
    assert close(our_logits(merged), expected)
    more = write_tuned(ours, tmp_path / "more", use_lora=True)
    assert read_weights(more / WEIGHTS).keys() == read_weights(ours / WEIGHTS).keys()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    return str(error.value)


def test_checkpoints_without_lora_or_with_more_are_refused(upstream_checkpoint: Path, tmp_path: Path):
    out = str(tmp_path / "out")
    assert "no LoRA in it" in refused(to_peft, str(upstream_checkpoint), out)
    both = write_tuned(upstream_checkpoint, tmp_path / "both", use_lora=True, lora_rank=2, use_ptuning=True)
    assert "it has P-Tuning prefixes besides LoRA" in refused(to_peft, str(both), out)
    parts = write_tuned(upstream_checkpoint, tmp_path / "parts", use_lora=True, lora_rank=2, train_parts=["glm_proj"])
    text = refused(to_peft, str(parts), out)
    assert "2 trained tensors are no LoRA (the first: mixins.eva.model.glm_proj." in text
    assert "convert the result with --to hf" in text
    whole = write_tuned(
        upstream_checkpoint, tmp_path / "whole", True, use_lora=True, lora_rank=2, train_parts=["glm_proj"]
    )
    assert "besides LoRA, glm_proj was trained (--train_parts)" in refused(to_peft, str(whole), out)


@pytest.mark.parametrize(("settings", "told"), [
    ({"use_dora": True}, '"use_dora" is true; false is needed'),
    ({"bias": "all"}, '"bias" is "all"; "none" is needed'),
    ({"peft_type": "PREFIX_TUNING"}, '"peft_type" is "PREFIX_TUNING"; "LORA" is needed'),
    ({"base_model_name_or_path": None}, "no base_model_name_or_path; --base"),
    ({"lora_alpha": None}, '"lora_alpha" is null; a number is needed'),
    ({"lora_alpha": "x"}, '"lora_alpha" is "x"; a number is needed'),
    ({"alpha_pattern": {"(": 1}}, '"alpha_pattern" has "(", which is no pattern'),
    ({"alpha_pattern": [1]}, '"alpha_pattern" is [1]; an object of numbers is needed'),
])  # fmt: skip
def test_adapters_of_other_kinds_are_refused(theirs: ChatGLM, tmp_path: Path, settings: dict, told: str):
    _, adapter = trained_by_peft(theirs, tmp_path / "adapter", r=2)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert told in refused(from_peft, str(adapter), str(tmp_path / "ours"))


def test_adapter_as_base_is_refused_and_leaves_nothing(published: Path, theirs: ChatGLM, tmp_path: Path):
    _, adapter = trained_by_peft(theirs, tmp_path / "adapter", r=2)
    tuned = write_tuned(published, tmp_path / "tuned", use_lora=True, lora_rank=2)
    text = refused(from_peft, str(adapter), str(tmp_path / "ours"), str(tuned))
    assert text == f"--base {tuned}: an adapter checkpoint too; the model that {adapter} was trained on is needed."
    assert not (tmp_path / "ours").exists()


def test_lora_on_the_vision_part_is_refused(published: Path, theirs: ChatGLM, tmp_path: Path):
    _, adapter = trained_by_peft(theirs, tmp_path / "adapter", r=2)
    save_file(
        {"base_model.model.image_encoder.glm_proj.lora_A.weight": torch.zeros(1)}, adapter / "adapter_model.safetensors"
    )
    text = refused(from_peft, str(adapter), str(tmp_path / "ours"), str(published))
    assert "image_encoder.glm_proj.lora_A.weight found; LoRA on query_key_value, dense" in text


def test_different_linears_in_different_layers_are_refused(published: Path, theirs: ChatGLM, tmp_path: Path):
    pattern = r"transformer\.layers\.(0\.attention\.dense|1\.attention\.query_key_value)"
    _, adapter = trained_by_peft(theirs, tmp_path / "adapter", r=2, target_modules=pattern)
    assert "the same in all are needed" in refused(from_peft, str(adapter), str(tmp_path / "ours"), str(published))


DENSE = "transformer.layers.{}.attention.dense.lora_{}.weight"
A, B = DENSE.format(0, "A"), DENSE.format(0, "B")


@pytest.mark.parametrize(("tensors", "told"), [
    ({A: torch.zeros(2, 160), B: torch.zeros(160, 2)}, "has lora_A [2, 160] and lora_B [160, 2]; for {base} [r, 64] and [64, r]"),
    ({A: torch.zeros(4, 64), B: torch.zeros(64, 7)}, "has lora_A [4, 64] and lora_B [64, 7]"),
    ({A: torch.zeros(2, 64), B: torch.zeros(63, 2)}, "has lora_A [2, 64] and lora_B [63, 2]"),
    ({A: torch.zeros(64), B: torch.zeros(64)}, "has lora_A [64] and lora_B [64]"),
    ({DENSE.format(6, "A"): torch.zeros(2, 64), DENSE.format(6, "B"): torch.zeros(64, 2)},
     "transformer.layers.6.attention.dense has LoRA, and {base} has 3 layers; the model that"),
    ({B: torch.zeros(64, 2)}, "transformer.layers.0.attention.dense has lora_B and no lora_A; both are needed"),
    ({A: torch.zeros(2, 64)}, "transformer.layers.0.attention.dense has lora_A and no lora_B; both are needed"),
    ({A: 1, B: 2}, "adapter_model.bin: something else than tensors in it"),
    ([torch.zeros(2, 64)], "adapter_model.bin: something else than tensors in it"),
    ({1: torch.zeros(2, 64)}, "adapter_model.bin: something else than tensors in it"),
])  # fmt: skip
def test_adapter_that_is_malformed_or_of_another_model_is_refused(
    published: Path, tmp_path: Path, tensors: object, told: str
):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    torch.save(tensors, tmp_path / "adapter/adapter_model.bin")
    text = refused(from_peft, str(tmp_path / "adapter"), str(tmp_path / "ours"), str(published))
    assert told.format(base=published) in text
    assert not (tmp_path / "ours").exists()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.run
def test_command_converts_an_adapter_both_ways(upstream_checkpoint: Path, published: Path, tmp_path: Path):
    tuned = write_tuned(published, tmp_path / "lora", use_lora=True, lora_rank=2)
    script = PROJECT / "scripts/convert_checkpoint.py"
    run = run_python(script, tuned, tmp_path / "adapter", "--to", "peft")
    assert run.stdout == f"Converted into {tmp_path / 'adapter'}.\n", run.stderr
    run = run_python(script, tmp_path / "adapter", tmp_path / "back", "--to", "sat")
    assert run.stdout == f"Converted into {tmp_path / 'back'}.\n", run.stderr
    assert close(our_logits(tmp_path / "back"), our_logits(tuned))
    assert open_huggingface(published, 4).keys() == read_weights(upstream_checkpoint / WEIGHTS).keys()
