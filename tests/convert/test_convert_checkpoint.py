"""SAT's layout into Hugging Face's and back: the same bytes, one tensor at a time, nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, run_here, run_program, run_python, upstream_weights, write_checkpoint, write_tuned
from safetensors.torch import load_file, save_file

from model.adapter_config import AdapterConfig
from model.checkpoints.huggingface import rows_for_huggingface
from model.checkpoints.layout import Checkpoint
from model.checkpoints.sizes import free_bytes
from model.checkpoints.tensors import looks_old
from model.checkpoints.weights import read_weights
from model.convert import huggingface as module
from model.convert.huggingface import convert
from model.convert.merge_lora import merge
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.inference.load import load_for_answering
from scripts import convert_checkpoint

WEIGHTS = "1/mp_rank_00_model_states.pt"
TINY = PROJECT / "model/tiny"
HEADS = 4  # of TINY
FUSED = "transformer.layers.2.attention.query_key_value.bias"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/tiny in Hugging Face's layout, in files of a megabyte."""
    return convert(str(TINY), str(tmp_path_factory.mktemp("converted") / "hf"), "hf", max_shard_size=10**6)


def same_bytes(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiny_there_and_back_has_the_same_bytes_of_every_tensor(published: Path, tmp_path: Path):
    back = convert(str(published), str(tmp_path / "sat"), "sat")
    assert same_bytes(read_weights(back / WEIGHTS), read_weights(TINY / WEIGHTS))
    assert (back / "ice_text.model").read_bytes() == (TINY / "ice_text.model").read_bytes()
    config, before = (json.loads((folder / "model_config.json").read_text()) for folder in (back, TINY))
    assert {key: config[key] for key in before} == before


@pytest.mark.slow
def test_hugging_faces_files_there_and_back_are_the_same(published: Path, tmp_path: Path):
    sat = convert(str(published), str(tmp_path / "sat"), "sat")
    again = convert(str(sat), str(tmp_path / "hf"), "hf", max_shard_size=10**6)
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in published.iterdir())
    for path in published.glob("*.safetensors"):
        assert same_bytes(load_file(path), load_file(again / path.name))


def test_float32_stays_float32(upstream_checkpoint: Path, tmp_path: Path):
    folder = convert(str(upstream_checkpoint), str(tmp_path / "hf"), "hf")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "ice_text.model", "model.safetensors", "tokenizer_config.json",
    ]  # fmt: skip
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    back = convert(str(folder), str(tmp_path / "sat"), "sat")
    assert same_bytes(read_weights(back / WEIGHTS), read_weights(upstream_checkpoint / WEIGHTS))


def test_files_are_no_larger_than_asked_for_and_the_index_names_every_tensor(published: Path):
    index = json.loads((published / "model.safetensors.index.json").read_text())
    files = sorted(published.glob("model-*.safetensors"))
    assert len(files) == 8
    tensors = {name: (path.name, tensor) for path in files for name, tensor in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in tensors.items()}
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in files]
    assert max(sizes) <= 10**6
    assert index["metadata"]["total_size"] == sum(sizes)


def test_rows_of_query_key_value_are_put_in_hugging_faces_order(published: Path):
    index = json.loads((published / "model.safetensors.index.json").read_text())
    theirs = load_file(published / index["weight_map"][FUSED])[FUSED].view(HEADS, 3, -1)
    query, key, value = read_weights(TINY / WEIGHTS)[FUSED].view(3, HEADS, -1)
    assert torch.equal(theirs[1], torch.stack([query[1], key[1], value[1]]))


def test_rotary_frequencies_stand_in_every_layer(published: Path):
    index = json.loads((published / "model.safetensors.index.json").read_text())
    assert sum(name.endswith("rotary_emb.inv_freq") for name in index["weight_map"]) == 6


@pytest.mark.slow
@torch.no_grad()
def test_answers_are_the_same_in_either_layout(published: Path):
    input_ids = torch.tensor([[10, 20, 86, 89, 30]])
    ours, theirs = (load_for_answering(str(folder))[0](input_ids=input_ids)[0] for folder in (TINY, published))
    assert torch.equal(ours, theirs)


def test_other_numbers_of_layers_than_28_are_told_of(upstream_checkpoint: Path, tmp_path: Path, capsys):
    convert(str(upstream_checkpoint), str(tmp_path / "hf"), "hf")
    assert "3 layers; Hugging Face's released code computes with 28" in capsys.readouterr().out


def test_tokenizer_in_the_folder_is_read(published: Path):
    tokenizer = ChatGLMTokenizer.from_pretrained(published)
    assert tokenizer.encode("描述这张图片。") == ChatGLMTokenizer.from_pretrained(TINY).encode("描述这张图片。")


# --- old SAT ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/tiny as SAT would have written it before July 2023."""
    return in_the_old_order(TINY, tmp_path_factory.mktemp("old") / "sat")


def in_the_old_order(source: Path, folder: Path) -> Path:
    """A copy with the rows of query_key_value by heads. LoRA's factors were for query, key and value then too."""
    shutil.copytree(source, folder)
    weights = {
        name: rows_for_huggingface(tensor, HEADS)
        if "query_key_value" in name and name[0] == "t" and "matrix" not in name
        else tensor.clone()
        for name, tensor in read_weights(source / WEIGHTS).items()
    }
    torch.save({"module": weights}, folder / WEIGHTS)
    (folder / "1/checksums.json").unlink(missing_ok=True)  # as none had been written then
    return folder


def test_old_order_is_recognised_by_the_sizes_of_trained_biases(old: Path):
    assert looks_old(read_weights(old / WEIGHTS), HEADS)
    assert not looks_old(read_weights(TINY / WEIGHTS), HEADS)


def test_weights_that_were_never_trained_are_not_taken_for_old():
    assert not looks_old(upstream_weights(), 4)


@pytest.mark.parametrize("layout", ["sat", "hf"])
def test_old_file_is_put_in_todays_order_when_told_to(old: Path, published: Path, tmp_path: Path, layout: str):
    folder = convert(str(old), str(tmp_path / "new"), layout, max_shard_size=10**6, old_sat=True)
    if layout == "sat":
        assert same_bytes(read_weights(folder / WEIGHTS), read_weights(TINY / WEIGHTS))
    else:
        files = sorted(path.name for path in published.glob("*.safetensors"))
        assert all(same_bytes(load_file(folder / file), load_file(published / file)) for file in files)


def test_old_file_ends_with_a_question_unless_told(old: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"look ordered as SAT did before July 2023; --old_sat .* or --no-old_sat"):
        convert(str(old), str(tmp_path / "hf"), "hf")
    assert not (tmp_path / "hf").exists()
    assert convert(str(old), str(tmp_path / "hf"), "hf", old_sat=False).is_dir()


@pytest.mark.slow
def test_old_file_that_is_loaded_as_it_is_is_warned_of(old: Path, capsys: pytest.CaptureFixture[str]):
    load_for_answering(str(old))
    assert f"convert_checkpoint.py {old} DST --to sat --old_sat puts them in order" in capsys.readouterr().err
    load_for_answering(str(TINY))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flags", [{"use_lora": True, "lora_rank": 2}, {"use_ptuning": True, "pre_seq_len": 2}])
def test_old_file_with_adapters_is_put_in_todays_order_and_keeps_them(tmp_path: Path, flags: dict):
    tuned = write_tuned(TINY, tmp_path / "tuned", full=True, **flags)
    old = in_the_old_order(tuned, tmp_path / "old")
    assert looks_old(read_weights(old / WEIGHTS), HEADS)
    folder = convert(str(old), str(tmp_path / "new"), "sat", old_sat=True)
    assert same_bytes(read_weights(folder / WEIGHTS), read_weights(tuned / WEIGHTS))
    assert AdapterConfig.from_json(Checkpoint.at(folder).config) == AdapterConfig.from_json(Checkpoint.at(tuned).config)


def test_old_file_is_not_merged_before_it_is_in_todays_order(tmp_path: Path):
    tuned = write_tuned(TINY, tmp_path / "tuned", full=True, use_lora=True, lora_rank=2)
    old = in_the_old_order(tuned, tmp_path / "old")
    with pytest.raises(InputError, match=f"convert_checkpoint.py {old} DST --to sat --old_sat puts them in order"):
        merge(str(old), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(*arguments, **named) -> str:
    with pytest.raises(InputError) as error:
        convert(*arguments, **named)
    return str(error.value)


def test_what_has_the_layout_already_is_refused(published: Path, tmp_path: Path):
    assert "it has the layout of --to hf already" in refused(str(published), str(tmp_path / "x"), "hf")
    assert "it has the layout of --to sat already" in refused(str(TINY), str(tmp_path / "x"), "sat")
    assert "a checkpoint of SAT is needed" in refused(str(published), str(tmp_path / "x"), "sat", old_sat=True)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, ""),
        ({"lang": "en"}, "trained with --lang en, "),
        ({"lang": "en", "source_prefix": "看图："}, 'trained with --source_prefix "看图：" and --lang en, '),
    ],
)
def test_what_stood_around_questions_is_told_where_the_layout_has_no_place_for_it(
    upstream_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict, told: str
):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "lora", use_lora=True, lora_rank=2, **flags)
    convert_checkpoint.main([str(tuned), str(tmp_path / "adapter"), "--to", "peft"])
    printed = capsys.readouterr().err
    assert told in printed
    assert ("no place" in printed) == bool(told)


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False])
def test_lora_is_to_be_merged_first(upstream_checkpoint: Path, tmp_path: Path, full: bool):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "lora", full, use_lora=True, lora_rank=2)
    text = refused(str(tuned), str(tmp_path / "hf"), "hf")
    assert f"python scripts/merge_lora.py {tuned} MERGED. Or convert its adapter alone: --to peft." in text
    merged = merge(str(tuned), str(tmp_path / "merged"))
    folder = convert(str(merged), str(tmp_path / "hf"), "hf")
    back = convert(str(folder), str(tmp_path / "back"), "sat")
    assert same_bytes(read_weights(back / WEIGHTS), read_weights(merged / WEIGHTS))


def test_p_tuning_has_no_place(upstream_checkpoint: Path, tmp_path: Path):
    tuned = write_tuned(upstream_checkpoint, tmp_path / "ptuning", use_ptuning=True)
    assert "it has P-Tuning prefixes, for which" in refused(str(tuned), str(tmp_path / "hf"), "hf")


def test_destination_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").write_text("keep")
    assert "a new or empty folder is needed" in refused(str(TINY), str(tmp_path), "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_destination_that_would_hide_its_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(TINY, tmp_path / "home/mine")
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run = run_here(convert_checkpoint.main, capsys, "mine", "mine", "--to", "hf")
    assert f"DST mine: a folder there would hide {tmp_path}/home/mine, which is found by that name" in run.stderr
    assert not (tmp_path / "mine").exists()


def test_destination_that_would_hide_a_run_behind_its_short_name_is_refused(tmp_path: Path):
    run = shutil.copytree(TINY, tmp_path / "animals-11-28-08-00")
    told = refused(str(run), str(tmp_path / "animals"), "hf")
    assert (
        told
        == f"DST {tmp_path}/animals: a folder there would hide {run}, which is found by that name; another is needed."
    )
    assert not (tmp_path / "animals").exists()


def test_destination_in_use_is_told_before_the_source_is_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").write_text("keep")
    run = run_here(convert_checkpoint.main, capsys, "owner/model", tmp_path, "--to", "hf")
    assert (
        run.stderr
        == f"convert_checkpoint.py: error: DST {tmp_path}: something is there already; a new or empty folder is needed.\n"
    )


def test_empty_destination_is_taken(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    assert (convert(str(TINY), str(tmp_path / "hf"), "hf") / "model.safetensors").is_file()


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model.checkpoints.sizes.free_bytes", lambda _: 2**20)
    text = refused(str(TINY), str(tmp_path / "hf"), "hf")
    assert text == f"DST {tmp_path / 'hf'}: 1.0 MiB free on its disk; 6.3 MiB are needed."
    assert list(tmp_path.iterdir()) == []
    assert free_bytes(tmp_path) > 2**20


@pytest.mark.parametrize("layout", ["hf", "sat"])
def test_failure_midway_leaves_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_json", fails)
    text = refused(str(TINY if layout == "hf" else published), str(tmp_path / "out"), layout)
    assert text == f"DST {tmp_path / 'out'}: No space left on device; room to write it is needed."
    assert list(tmp_path.iterdir()) == []


def test_tensor_without_a_place_is_named(upstream_config: dict, tmp_path: Path):
    weights = upstream_weights() | {"mixins.new.weight": torch.zeros(1)}
    folder = write_checkpoint(tmp_path / "more", upstream_config, weights)
    assert "mixins.new.weight: Hugging Face's layout has no place" in refused(str(folder), str(tmp_path / "hf"), "hf")


def test_source_without_the_rotary_buffer_that_nobody_reads_is_converted(upstream_config: dict, tmp_path: Path):
    weights = {name: tensor for name, tensor in upstream_weights().items() if not name.endswith("inv_freq")}
    assert len(weights) == len(upstream_weights()) - 1
    folder = write_checkpoint(tmp_path / "source", upstream_config, weights)
    there = convert(str(folder), str(tmp_path / "there"), "hf")
    back = convert(str(there), str(tmp_path / "back"), "sat")
    assert torch.load(back / WEIGHTS)["module"].keys() == weights.keys()


@pytest.mark.parametrize("layout", ["hf", "sat"])
def test_source_without_one_of_its_tensors_is_refused(upstream_config: dict, tmp_path: Path, layout: str):
    weights = upstream_weights()
    if layout == "hf":
        folder = write_checkpoint(tmp_path / "source", upstream_config, weights)
        content = torch.load(folder / WEIGHTS)
        del content["module"][FUSED]
        torch.save(content, folder / WEIGHTS)
    else:
        folder = convert(
            str(write_checkpoint(tmp_path / "whole", upstream_config, weights)), str(tmp_path / "source"), "hf"
        )
        theirs = load_file(folder / "model.safetensors")
        del theirs[FUSED]
        save_file(theirs, folder / "model.safetensors")
    name = "model_config.json" if layout == "hf" else "config.json"
    assert refused(str(folder), str(tmp_path / "out"), layout) == (
        f"{folder}: 1 tensors are not those that {name} describes (the first: {FUSED} is missing); all the weights of that "
        "model are needed."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hf", "sat"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"hidden_size": 128}, "mixins.eva.model.glm_proj.weight is [64, 48], not [128, 48]"),
        ({"num_layers": 2}, "(the first: transformer.layers.2.input_layernorm.weight is in no layer of it"),
        ({"num_layers": 4}, "(the first: transformer.layers.3.input_layernorm.weight is missing"),
    ],
)
def test_source_of_another_model_than_its_configuration_is_refused(
    upstream_config: dict, tmp_path: Path, layout: str, changed: dict, told: str
):
    folder = write_checkpoint(tmp_path / "source", upstream_config, upstream_weights())
    path = folder / "model_config.json"
    if layout == "sat":
        folder = convert(str(folder), str(tmp_path / "published"), "hf")
        path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    text = refused(str(folder), str(tmp_path / "out"), layout)
    assert f"tensors are not those that {path.name} describes" in text
    assert told in text
    assert not (tmp_path / "out").exists()


# --- memory, and the command ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.run
def test_converting_holds_one_tensor_at_a_time(tmp_path: Path):
    """A model of 400 MiB is converted there and back by a process whose own memory grows by far less."""
    run = run_program("convert_large", tmp_path, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_=str(2**20))
    assert run.returncode == 0, run.stderr
    size, there, back = map(int, run.stdout.split()[-3:])  # MiB
    assert size > 350
    assert max(there, back) < 100


@pytest.mark.run
def test_command_converts_there_and_back_and_says_where(tmp_path: Path):
    script = PROJECT / "scripts/convert_checkpoint.py"
    run = run_python(script, TINY, tmp_path / "hf", "--to", "hf", "--max_shard_size", "3MB")
    assert run.stdout.splitlines()[-1] == f"Converted into {tmp_path / 'hf'}.", run.stderr
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 3
    run = run_python(script, tmp_path / "hf", tmp_path / "sat", "--to", "sat")
    assert run.stdout == f"Converted into {tmp_path / 'sat'}.\n", run.stderr
    assert same_bytes(read_weights(tmp_path / "sat" / WEIGHTS), read_weights(TINY / WEIGHTS))


@pytest.mark.run
@pytest.mark.parametrize(("words", "told"), [
    (["gone", "out", "--to", "hf"], "convert_checkpoint.py: error: SRC gone: no such folder. Tried:"),
    ([str(TINY), "out", "--to", "hf", "--max_shard_size", "big"], '"big" found; a size such as 2GB or 500MB is needed'),
    ([str(TINY), "out", "--to", "hf", "--revision", "main"], "--revision main: "),
])  # fmt: skip
def test_command_with_bad_input_ends_with_a_sentence_and_status_2(tmp_path: Path, words: list[str], told: str):
    run = run_python(PROJECT / "scripts/convert_checkpoint.py", *words, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert told in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.run
def test_reader_that_goes_ends_the_command_quietly_with_all_written(published: Path, tmp_path: Path):
    words = [sys.executable, PROJECT / "scripts/convert_checkpoint.py", published, tmp_path / "sat", "--to", "sat"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert same_bytes(read_weights(tmp_path / "sat" / WEIGHTS), read_weights(TINY / WEIGHTS))


@pytest.mark.run
def test_run_that_starts_from_hugging_faces_layout_learns_as_from_sats(published: Path, tmp_path: Path):
    """Losses of three steps are equal, and the run's adapter is loaded again, merged, and evaluated."""
    flags = (
        "--use_lora", "--train-data", PROJECT / "fewshot-data/dataset.json", "--train-iters", "3", "--lr", "0.01",
        "--auto_warmup_steps", "0", "--num-workers", "0", "--seed", "7", "--summary-dir", tmp_path / "board",
    )  # fmt: skip
    lines = {}
    for name, base in (("sat", TINY), ("hf", published)):
        run = run_python(
            PROJECT / "finetune_visualglm.py", "--from_pretrained", base, *flags, "--save", tmp_path / name
        )
        assert run.returncode == 0, run.stdout + run.stderr
        lines[name] = [line.split("  lr")[0] for line in run.stdout.splitlines() if line.startswith("step ")]
    assert len(lines["hf"]) == 3
    assert lines["hf"] == lines["sat"]
    [tuned] = [path.parent for path in (tmp_path / "hf").glob("*/latest")]
    for command in (
        (
            "scripts/cli_demo.py",
            "--from_pretrained",
            tuned,
            "--query",
            "你好",
            "--temperature",
            "0",
            "--max_length",
            "60",
        ),
        ("scripts/merge_lora.py", tuned, tmp_path / "merged"),
        ("scripts/evaluate.py", "--from_pretrained", published, "--data", PROJECT / "fewshot-data/heldout.json"),
    ):
        run = run_python(PROJECT / command[0], *command[1:])
        assert run.returncode == 0, run.stdout + run.stderr
    assert Checkpoint.find(tmp_path / "merged").config["num_layers"] == 6
