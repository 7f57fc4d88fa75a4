"""Merging: from file to file, one tensor at a time, into an ordinary checkpoint; and what can't be merged."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from conftest import GOLDEN, PROJECT, load_model, run_on_a_small_disk, run_program, run_python, small_disk, write_tuned

from model.adapter_config import AdapterConfig
from model.checkpoints.layout import Checkpoint
from model.checkpoints.tensors import write_weights
from model.checkpoints.weights import read_weights
from model.convert.merge_lora import is_packed_in_qlora, merge
from model.convert.peft import to_peft
from model.errors import InputError
from model.finetune import FineTuneVisualGLMModel
from model.frozen import dequantized, quantized
from model.inference.load import load_for_answering
from model.sat_compat import import_sat
from scripts import merge_lora

import_sat()

from sat.training import model_io  # noqa: E402  (sat can be imported only after import_sat)

WEIGHTS = "1/mp_rank_00_model_states.pt"
INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])
EVERY_LINEAR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.fixture(scope="module")
def lora(upstream_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "lora"
    flags = {"lora_rank": 7, "lora_alpha": 3.0, "layer_range": [2, 0], "lora_target": EVERY_LINEAR}
    return write_tuned(upstream_checkpoint, folder, use_lora=True, **flags)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=INPUT_IDS)[0]


def test_merged_weights_are_w_plus_b_a_alpha_over_r(lora, upstream_checkpoint, tmp_path):
    merged = read_weights(merge(str(lora), str(tmp_path / "merged")) / WEIGHTS)
    base, tuned = read_weights(upstream_checkpoint / WEIGHTS), read_weights(lora / WEIGHTS)
    name = "transformer.layers.2.attention.query_key_value"
    change = torch.cat([tuned[f"{name}.matrix_B.{part}"] @ tuned[f"{name}.matrix_A.{part}"] for part in range(3)])
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + change * 3 / 7)
    assert torch.equal(merged["transformer.layers.1.mlp.dense_h_to_4h.weight"],
                       base["transformer.layers.1.mlp.dense_h_to_4h.weight"])  # fmt: skip
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in base.items()}


@pytest.mark.slow
def test_merged_checkpoint_of_every_target_gives_the_same_logits(lora, tmp_path):
    merged, _ = load_for_answering(str(merge(str(lora), str(tmp_path / "merged"))))
    assert type(merged).__name__ == "VisualGLMModel"
    torch.testing.assert_close(logits(merged), logits(load_for_answering(str(lora))[0]), rtol=1e-5, atol=1e-5)


def test_merged_checkpoint_has_checksums(lora, tmp_path):
    folder = merge(str(lora), str(tmp_path / "merged"))
    files = json.loads((folder / "1/checksums.json").read_text())["files"]
    assert sorted(files) == ["../ice_text.model", "../model_config.json", "mp_rank_00_model_states.pt"]
    assert Checkpoint.find(folder).iteration == "1"


def test_merged_weights_that_are_not_finite_are_refused_and_leave_nothing(lora, tmp_path):
    tuned = shutil.copytree(lora, tmp_path / "lora")
    (tuned / "1/checksums.json").unlink()
    content = torch.load(tuned / WEIGHTS)
    for part in "AB":
        content["module"][f"transformer.layers.0.attention.dense.matrix_{part}.0"].fill_(1e30)
    torch.save(content, tuned / WEIGHTS)
    with pytest.raises(
        InputError, match=r"transformer\.layers\.0\.attention\.dense\.weight has numbers that are NaN or inf"
    ):
        merge(str(tuned), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def small_change_in_half(lora, upstream_checkpoint, tmp_path):
    """Weights in float16 with a LoRA whose change is about as small as their steps."""
    folder = write_tuned(upstream_checkpoint, tmp_path / "half", full=True, use_lora=True, lora_rank=4, layer_range=[0])
    (folder / "1/checksums.json").unlink()
    content = torch.load(folder / WEIGHTS)
    for name, tensor in content["module"].items():
        content["module"][name] = tensor * 1e-3 if ".matrix_A." in name else tensor.half()
    torch.save(content, folder / WEIGHTS)
    return folder


def test_change_that_rounding_takes_is_said_and_float32_keeps_it(small_change_in_half, tmp_path, capsys):
    tuned = read_weights(small_change_in_half / WEIGHTS)
    name = "transformer.layers.0.attention.dense"
    weight = tuned[f"{name}.weight" if f"{name}.weight" in tuned else f"{name}.original.weight"].float()
    change = (
        tuned[f"{name}.matrix_B.0"].float()
        @ tuned[f"{name}.matrix_A.0"]
        * AdapterConfig.from_json(json.loads((small_change_in_half / "model_config.json").read_text())).scale
    )
    rounded = read_weights(merge(str(small_change_in_half), str(tmp_path / "fp16")) / WEIGHTS)
    told = capsys.readouterr().out
    assert rounded[f"{name}.weight"].dtype == torch.float16
    off = ((rounded[f"{name}.weight"].float() - weight - change).norm() / change.norm()).item()
    said = re.search(r"Rounded to fp16, the LoRA's change is off by (\d+) % of its size. .*--dtype fp32", told)
    assert said, told
    assert int(said[1]) == pytest.approx(100 * off, rel=0.3)  # that of every tensor together
    exact = read_weights(merge(str(small_change_in_half), str(tmp_path / "fp32"), dtype="fp32") / WEIGHTS)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    torch.testing.assert_close(exact[f"{name}.weight"] - weight, change, rtol=1e-2, atol=1e-7)
    assert capsys.readouterr().out == ""
    assert load_for_answering(str(tmp_path / "fp32"))


def test_change_that_rounding_leaves_is_not_spoken_of(lora, tmp_path, capsys):
    merge(str(lora), str(tmp_path / "merged"))
    assert "Rounded" not in capsys.readouterr().out


@small_disk
@pytest.mark.run
def test_merging_onto_a_disk_that_fills_up_is_a_sentence_and_leaves_nothing(upstream_checkpoint, tmp_path):
    done = run_on_a_small_disk("save_without_room", tmp_path, upstream_checkpoint, "merging")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path}/merged: the merged checkpoint can't be written (No space left on device)" in done.stderr
    assert done.stdout.splitlines()[-1] == "other run"


def test_merged_checkpoint_is_read_by_sats_own_loader(lora, upstream_checkpoint, tmp_path):
    folder = merge(str(lora), str(tmp_path / "merged"))
    model = load_model(upstream_checkpoint)
    args = type(model).get_args(skip_init=True)
    model_io.load_checkpoint(model, args, load_path=str(folder))
    assert torch.equal(model.state_dict()["transformer.word_embeddings.weight"],
                       read_weights(folder / WEIGHTS)["transformer.word_embeddings.weight"])  # fmt: skip


def test_merged_config_is_that_of_an_ordinary_checkpoint_with_its_origin(lora, upstream_config, tmp_path):
    config = json.loads((merge(str(lora), str(tmp_path / "merged")) / "model_config.json").read_text())
    assert config["model_class"] == "VisualGLMModel"
    assert not {"use_lora", "lora_rank", "layer_range", "train_parts"} & config.keys()
    assert config["finetuning"]["contents"] == "merged"
    assert config["finetuning"]["lora"]["rank"] == 7
    sizes = ("num_layers", "hidden_size", "eva_args", "qformer_args", "image_length", "bos_token_id")
    assert {key: config[key] for key in sizes} == {key: upstream_config[key] for key in sizes}


@pytest.mark.slow
def test_model_merged_and_saved_as_the_released_readme_says_is_a_plain_one(lora, tmp_path):
    args = FineTuneVisualGLMModel.get_args(skip_init=True, save=str(tmp_path / "merged"))
    model, args = FineTuneVisualGLMModel.from_pretrained(str(lora), args)
    model.get_mixin("lora").merge_lora()
    args.layer_range, args.mode = [], "inference"
    model_io.save_checkpoint(1, model, None, None, args)
    loaded, _ = load_for_answering(str(tmp_path / "merged"), str(GOLDEN / "tokenizer"))
    assert type(loaded).__name__ == "VisualGLMModel"
    torch.testing.assert_close(logits(loaded), logits(load_for_answering(str(lora))[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_qlora_is_merged_into_the_weights_that_it_was_trained_over(upstream_checkpoint, tmp_path, capsys):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "qlora", use_qlora=True, lora_rank=2, layer_range=[1])
    folder = merge(str(tuned), str(tmp_path / "merged"))
    assert "The base was packed into 4 bits by this project's code for a CPU." in capsys.readouterr().out
    torch.testing.assert_close(
        logits(load_for_answering(str(folder))[0]), logits(load_for_answering(str(tuned))[0]), rtol=1e-5, atol=1e-5
    )
    name = "transformer.layers.0.mlp.dense_4h_to_h.weight"
    base = read_weights(upstream_checkpoint / WEIGHTS)[name]
    assert torch.equal(read_weights(folder / WEIGHTS)[name], dequantized(*quantized(base), torch.float32))


@pytest.mark.parametrize(
    ("name", "shape", "packed"),
    [
        ("transformer.layers.11.mlp.dense_h_to_4h.weight", (4, 4), True),
        ("transformer.layers.0.input_layernorm.weight", (4,), False),
        ("transformer.word_embeddings.weight", (4, 4), False),
        ("mixins.eva.model.vit.transformer.layers.0.mlp.dense_h_to_4h.weight", (4, 4), False),
        ("mixins.chatglm-final.lm_head.weight", (4, 4), False),
    ],
)
def test_is_packed_in_qlora_holds_for_linears_of_the_language_models_layers(name, shape, packed):
    assert is_packed_in_qlora(name, torch.zeros(shape)) is packed


@pytest.mark.slow
def test_merged_model_can_be_merged_again_after_another_tuning(lora, tmp_path):
    once = merge(str(lora), str(tmp_path / "once"))
    again = write_tuned(once, tmp_path / "again", use_lora=True, lora_rank=2)
    twice = merge(str(again), str(tmp_path / "twice"))
    torch.testing.assert_close(
        logits(load_for_answering(str(twice))[0]), logits(load_for_answering(str(again))[0]), rtol=1e-5, atol=1e-5
    )


# what can't be merged


def test_p_tuning_is_refused_with_the_reason(upstream_checkpoint, tmp_path):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "ptuning", use_ptuning=True)
    with pytest.raises(InputError, match=r"P-Tuning prefixes.* can't be merged"):
        merge(str(tuned), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_base_is_refused(upstream_checkpoint, tmp_path):
    with pytest.raises(InputError, match="no LoRA in it"):
        merge(str(upstream_checkpoint), str(tmp_path / "merged"))


def test_folder_in_use_is_refused_and_left_alone(lora, tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="a new folder is needed"):
        merge(str(lora), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("source", "out", "overwrite"), [
    ("{runs}/animals", "{runs}/animals", False),
    ("{runs}/animals", "{runs}/animals", True),
    ("{runs}/animals-11-28-08-00", "{runs}/animals/merged", False),
    ("in_home", "in_home", False),
])  # fmt: skip
def test_folder_that_would_hide_a_checkpoint_behind_its_name_is_refused(
    lora, tmp_path, monkeypatch, source, out, overwrite
):
    monkeypatch.setenv("SAT_HOME", str(tmp_path))
    monkeypatch.chdir(shutil.copytree(lora, tmp_path / "in_home"))
    run = shutil.copytree(lora, tmp_path / "animals-11-28-08-00")
    source, out = source.format(runs=tmp_path), out.format(runs=tmp_path)
    hidden = tmp_path / "in_home" if source == "in_home" else run
    with pytest.raises(InputError) as error:
        merge(source, out, overwrite=overwrite)
    assert (
        str(error.value)
        == f"{out}: a folder there would hide {hidden}, which is found by that name; another is needed."
    )
    assert not (tmp_path / "animals").exists()
    assert not (tmp_path / "in_home/in_home").exists()


@pytest.fixture
def without_tokenizer(lora, tmp_path, monkeypatch):
    """A checkpoint with LoRA, without ice_text.model, and a machine that reaches no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(lora, tmp_path / "lora")
    (folder / "ice_text.model").unlink()
    (folder / "1/checksums.json").unlink()
    return folder


def test_checkpoint_without_a_tokenizer_is_told_before_anything_is_written(without_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("model.convert.merge_lora.write_weights", lambda *_: pytest.fail("weights are written"))
    with pytest.raises(InputError, match=r"No tokenizer: .* give its path with --tokenizer"):
        merge(str(without_tokenizer), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_tokenizer_of_the_flag_is_written_beside_the_merged_weights_under_its_own_name(without_tokenizer, tmp_path):
    elsewhere = shutil.copyfile(GOLDEN / "tokenizer/ice_text.model", tmp_path / "mine.model")
    words = [without_tokenizer, tmp_path / "merged", "--tokenizer", elsewhere]
    merge_lora.main([str(word) for word in words])
    assert (tmp_path / "merged/ice_text.model").read_bytes() == elsewhere.read_bytes()
    assert Checkpoint.find(tmp_path / "merged").iteration == "1"


def test_failure_behind_the_weights_leaves_nothing(lora, tmp_path, monkeypatch):
    def without_room(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", without_room)
    with pytest.raises(InputError, match=r"the merged checkpoint can't be written \(No space left on device\)"):
        merge(str(lora), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    (tmp_path / "on another disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "on another disk")
    with pytest.raises(InputError, match="No space left on device"):
        merge(str(lora), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert not any((tmp_path / "on another disk").iterdir())


# memory, and the command


def test_checkpoint_in_the_way_is_replaced_if_that_is_asked_for(lora, tmp_path):
    folder = merge(str(lora), str(tmp_path / "merged"))
    (folder / "7").mkdir()
    assert merge(str(lora), str(folder), overwrite=True) == folder
    assert not (folder / "7").exists()
    assert Checkpoint.find(folder).iteration == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").touch()
    with pytest.raises(InputError, match="something is there already"):
        merge(str(lora), str(tmp_path / "notes"), overwrite=True)


def test_what_is_merged_is_not_replaced_by_it(lora, upstream_checkpoint, tmp_path):
    base = shutil.copytree(upstream_checkpoint, tmp_path / "base")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for out in (lora, base):
        with pytest.raises(InputError, match=f"{out}: what is merged is read from there"):
            merge(str(lora), str(out), base=str(base), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_lies_in_the_folder_that_is_to_be_replaced_is_not_lost(lora, tmp_path, monkeypatch):
    out = merge(str(lora), str(tmp_path / "merged"))
    inside = shutil.copytree(lora, out / "run")
    with pytest.raises(InputError, match="what is merged is read from there"):
        merge(str(inside), str(out), overwrite=True)
    with pytest.raises(InputError, match="run found besides a checkpoint, and would go with it"):
        merge(str(lora), str(out), overwrite=True)
    shutil.rmtree(inside)
    monkeypatch.chdir(out)
    merge(str(lora), ".", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    assert Checkpoint.find(out).iteration == "1"


@pytest.mark.long
@pytest.mark.run
def test_writing_holds_one_tensor_at_a_time(tmp_path):
    """512 MiB in 32 tensors are written by a process whose own memory grows by far less."""
    # What is freed goes back to the system at once, so that what is held can be told from what the allocator keeps.
    run = run_program(
        "write_large_weights", tmp_path / "weights.pt", OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_=str(2**20)
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100  # MiB
    written = torch.load(tmp_path / "weights.pt", mmap=True)["module"]
    assert [tensor[0, 0].item() for tensor in written.values()] == list(range(32))


def test_written_weights_are_read_without_a_memory_map_too(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    write_weights(tmp_path / "weights.pt", weights, weights.__getitem__)
    read = torch.load(tmp_path / "weights.pt", mmap=False)["module"]
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())


@pytest.mark.run
def test_command_merges_and_says_where(lora, tmp_path):
    run = run_python(PROJECT / "scripts/merge_lora.py", lora, tmp_path / "merged")
    assert run.stdout == f"Merged into {tmp_path / 'merged'}.\n", run.stderr
    assert load_for_answering(str(tmp_path / "merged"))


@pytest.mark.run
def test_command_with_nothing_to_merge_ends_with_a_sentence_and_status_2(tmp_path):
    run = run_python(PROJECT / "scripts/merge_lora.py", tmp_path / "gone", tmp_path / "merged")
    assert run.returncode == 2
    assert run.stderr.startswith("merge_lora.py: error: CHECKPOINT ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("convert", [merge, to_peft])
def test_adapter_whose_configuration_fits_no_model_is_refused(lora, tmp_path, convert):
    folder = shutil.copytree(lora, tmp_path / "odd")
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps(config | {"image_length": 16}))
    with pytest.raises(InputError, match=r'model_config\.json: "image_length" is 16 and "qformer_args\.vocab_size" 32'):
        convert(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
