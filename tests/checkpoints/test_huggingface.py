"""A folder in Hugging Face's layout, loaded as it is: by the product's own --from_pretrained."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, golden_values, upstream_weights, write_huggingface, write_tuned
from safetensors.torch import save_file

from model.checkpoints.huggingface import huggingface_config, huggingface_names, sat_config, sat_name
from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import with_base
from model.checkpoints.tensors import open_huggingface
from model.checkpoints.weights import fingerprint, read_weights
from model.convert.merge_lora import merge
from model.errors import InputError
from model.inference.load import load_for_answering

WEIGHTS = "1/mp_rank_00_model_states.pt"
INPUT_IDS = torch.tensor([[859, 775, 86, 89, 554]])


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((GOLDEN / "hf/expected.json").read_text())


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory, golden: dict, upstream_config: dict) -> Path:
    """A VisualGLM in Hugging Face's layout, whose language model is that of golden/hf."""
    weights = {name: torch.from_numpy(golden_values(name, shape)) for name, shape in golden["parameters"].items()}
    vision = "mixins.eva.model."
    for name, tensor in upstream_weights().items():
        if name.startswith(vision):
            weights[f"image_encoder.{name.removeprefix(vision)}"] = tensor
    return write_huggingface(tmp_path_factory.mktemp("published") / "model", upstream_config, weights)


@torch.no_grad()
def test_logits_are_those_of_the_released_hugging_face_code(published: Path, golden: dict):
    model, _ = load_for_answering(str(published))
    logits = model(input_ids=torch.tensor([golden["input_ids"]]))[0][0]
    assert logits[-1].tolist() == pytest.approx(golden["logits_last_position"], abs=1e-5)
    assert logits.norm(dim=-1).tolist() == pytest.approx(golden["logits_norm_per_position"], abs=5e-5)
    assert logits.argmax(dim=-1).tolist() == golden["argmax_per_position"]


@pytest.mark.parametrize("files", ["model.safetensors", "safetensors index", "pytorch_model.bin", "bin index"])
def test_weights_are_the_same_in_each_of_the_four_forms(published: Path, upstream_config: dict, tmp_path: Path, files):
    expected = open_huggingface(published, upstream_config["num_attention_heads"])
    tensors = {name: entry.clone() for name, entry in load_all(published).items()}
    folder = write_huggingface(tmp_path / "other", upstream_config, tensors, files)
    found = open_huggingface(folder, upstream_config["num_attention_heads"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert Checkpoint.find(folder).weights_size() == sum(
        path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".safetensors")
    )


def load_all(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("part", ["", "model.safetensors"])
def test_find_takes_the_folder_and_its_weights_file(published: Path, part: str, upstream_config: dict):
    found = Checkpoint.find(published / part)
    assert (found.folder, found.layout) == (published, "hf")
    assert {key: found.config[key] for key in ("num_layers", "eva_args", "qformer_args", "gmask_token_id")} == {
        key: upstream_config[key] for key in ("num_layers", "eva_args", "qformer_args", "gmask_token_id")
    }


def test_folder_in_both_layouts_is_sats(published: Path, upstream_checkpoint: Path, tmp_path: Path):
    for one in (published, upstream_checkpoint):
        shutil.copytree(one, tmp_path / "both", dirs_exist_ok=True)
    assert Checkpoint.find(tmp_path / "both").layout == "sat"


# --- adapters on such a base ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tuned(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "lora"
    return write_tuned(published, folder, use_lora=True, lora_rank=2, layer_range=[1])


@pytest.mark.slow
def test_adapter_remembers_its_base_and_is_loaded_with_it(tuned: Path, published: Path):
    found = with_base(Checkpoint.find(tuned))
    assert found.base is not None
    assert found.base.folder == published
    config = json.loads((tuned / "model_config.json").read_text())
    assert config["finetuning"]["base"]["path"] == str(published / "model.safetensors")
    model, _ = load_for_answering(str(tuned))
    base, _ = load_for_answering(str(published))
    assert not torch.allclose(model(input_ids=INPUT_IDS)[0], base(input_ids=INPUT_IDS)[0])


def test_adapter_finds_a_base_whose_name_is_gone_by_its_path(tuned: Path, published: Path):
    config = json.loads((tuned / "model_config.json").read_text())
    config["finetuning"]["base"]["name"] = "owner/repository@abc"
    (tuned / "model_config.json").write_text(json.dumps(config))
    assert with_base(Checkpoint.find(tuned)).base.folder == published


@pytest.mark.slow
@torch.no_grad()
def test_adapter_is_merged_into_such_a_base(tuned: Path, tmp_path: Path):
    merged = merge(str(tuned), str(tmp_path / "merged"))
    torch.testing.assert_close(
        load_for_answering(str(merged))[0](input_ids=INPUT_IDS)[0],
        load_for_answering(str(tuned))[0](input_ids=INPUT_IDS)[0],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.slow
def test_fingerprint_is_that_of_the_same_model_in_sats_layout(published: Path, tmp_path: Path):
    from model.convert.huggingface import convert

    converted = convert(str(published), str(tmp_path / "sat"), "sat")
    heads = Checkpoint.find(published).config["num_attention_heads"]
    assert fingerprint(open_huggingface(published, heads)) == fingerprint(read_weights(converted / WEIGHTS))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"use_qlora": True}, {"use_ptuning": True}])
def test_other_methods_start_from_such_a_base_too(published: Path, method: dict):
    model = load_tuning(published, **method)
    assert torch.isfinite(model(input_ids=INPUT_IDS)[0]).all()


def load_tuning(published: Path, **flags):
    from model.finetune import FineTuneVisualGLMModel

    args = FineTuneVisualGLMModel.get_args(skip_init=True, **flags)
    return FineTuneVisualGLMModel.from_pretrained(str(published), args)[0].eval()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        Checkpoint.find(folder)
    return str(error.value)


@pytest.fixture
def sharded(published: Path, upstream_config: dict, tmp_path: Path) -> Path:
    return write_huggingface(tmp_path / "sharded", upstream_config, load_all(published), "safetensors index")


def test_missing_shard_is_named(sharded: Path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 weights files are missing (the first: model-00002-of-00002.safetensors)" in refused(sharded)


def test_shard_that_is_a_pointer_is_named_before_torch_is_needed(sharded: Path):
    (sharded / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    text = refused(sharded)
    assert "model-00001-of-00002.safetensors: no weights in it: it is a pointer of git-lfs" in text


def test_index_that_leads_out_of_the_folder_is_refused(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "the name of a file beside it is needed" in refused(sharded)


def test_folder_without_weights_names_the_files_that_are_looked_for(sharded: Path):
    (sharded / "model.safetensors.index.json").unlink()
    assert "no weights in it; one of model.safetensors, " in refused(sharded)


@pytest.mark.parametrize(("key", "value", "told"), [
    ("quantization_bit", 4, '"quantization_bit" is 4; weights that are not quantised are needed'),
    ("eva_config", None, 'no "eva_config"; a VisualGLM for Hugging Face has'),
])  # fmt: skip
def test_config_of_another_model_is_refused(sharded: Path, key: str, value, told: str):
    config = json.loads((sharded / "config.json").read_text())
    config = config | {key: value} if value else {name: config[name] for name in config if name != key}
    (sharded / "config.json").write_text(json.dumps(config))
    assert told in refused(sharded)


def test_tensor_of_no_part_is_refused(upstream_config: dict, tmp_path: Path):
    folder = write_huggingface(tmp_path / "more", upstream_config, {"vision_tower.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"vision_tower\.weight: a tensor of no part of a VisualGLM"):
        load_for_answering(str(folder))


def test_missing_tensors_are_told_once(published: Path, upstream_config: dict, tmp_path: Path):
    tensors = {name: tensor for name, tensor in load_all(published).items() if "lm_head" not in name}
    folder = write_huggingface(tmp_path / "less", upstream_config, tensors)
    with pytest.raises(
        InputError, match=r"1 tensor is missing \(the first: mixins\.chatglm-final\.lm_head\.weight\)"
    ) as error:
        load_for_answering(str(folder))
    assert str(error.value).endswith("needed are all the weights that config.json describes.")


def test_weights_of_another_model_than_the_configuration_describes_name_its_file(
    published: Path, upstream_config: dict, tmp_path: Path
):
    folder = write_huggingface(tmp_path / "other", upstream_config | {"hidden_size": 128}, load_all(published))
    told = f"model.safetensors: the weights are of another model than {folder / 'config.json'}: "
    with pytest.raises(InputError, match=re.escape(told)):
        load_for_answering(str(folder))


@pytest.mark.parametrize(("key", "value", "told"), [
    ("num_layers", 4, "needed are all the weights that config.json describes"),
    ("vocab_size", 3840, "the weights are of another model than {config}: "),
])  # fmt: skip
def test_sizes_of_another_model_are_told_with_the_layouts_own_file(published: Path, tmp_path: Path, key, value, told):
    folder = shutil.copytree(published, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError) as error:
        load_for_answering(str(folder))
    assert told.format(config=folder / "config.json") in str(error.value)


# --- names and configuration ------------------------------------------------------------------------------------------


def test_names_there_and_back_are_the_same(golden: dict):
    for name in golden["parameters"]:
        ours = sat_name(name)
        assert ours is None or name in huggingface_names(ours, 3)


def test_config_there_and_back_keeps_every_size(upstream_config: dict):
    there = huggingface_config(upstream_config, 90, "float16")
    back = sat_config(there, "config.json")
    assert {key: back[key] for key in upstream_config} == upstream_config
    assert (there["eos_token_id"], there["torch_dtype"], "eva_args" in there) == (90, "float16", False)


def test_integers_of_an_unknown_kind_are_refused(tmp_path: Path, upstream_config: dict):
    folder = write_huggingface(tmp_path / "odd", upstream_config, {})
    save_file({"transformer.a": torch.zeros(1, dtype=torch.float8_e5m2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="holds F8_E5M2, which no VisualGLM does"):
        load_for_answering(str(folder))
