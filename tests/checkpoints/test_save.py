"""Checkpoints as they are written: which files, in which order, and what a kill or a full disk leaves."""

import json
import math
import os
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    GOLDEN,
    load_model,
    run_on_a_small_disk,
    small_disk,
)

from model.checkpoints import save
from model.checkpoints.layout import Checkpoint
from model.checkpoints.save import save_checkpoint, write_unfinished
from model.checkpoints.weights import load_checkpoint, read_weights
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.finetune import FineTuneVisualGLMModel
from model.sat_compat import import_sat

import_sat()

from sat import get_tokenizer  # noqa: E402
from sat.training import model_io  # noqa: E402

WEIGHTS = "mp_rank_00_model_states.pt"
FLAGS = {"use_lora": True, "lora_rank": 2, "layer_range": [1], "use_ptuning": True, "pre_seq_len": 3}


@pytest.fixture(scope="module", autouse=True)
def sats_tokenizer(tokenizer):
    """SAT has the run's tokenizer, as the script hands it over."""
    get_tokenizer(outer_tokenizer=tokenizer)


@pytest.fixture(scope="module")
def tuned(upstream_checkpoint):
    """A model with LoRA and P-Tuning, and SAT's namespace for it."""
    args = FineTuneVisualGLMModel.get_args(skip_init=True, **FLAGS)
    tuned, args = FineTuneVisualGLMModel.from_pretrained(str(upstream_checkpoint), args, build_only=True)
    load_checkpoint(tuned, args, load_path=str(upstream_checkpoint))
    return tuned, args


def saving_args(tuned, folder):
    return Namespace(**vars(tuned[1]) | {"save": str(folder), "save_full_model": True})


def saved(tuned, folder, iteration=1):
    save_checkpoint(iteration, tuned[0], None, None, saving_args(tuned, folder))
    return folder


def test_saved_checkpoint_has_the_released_layout(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run", iteration=300)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["300/checksums.json", f"300/{WEIGHTS}", "ice_text.model", "latest", "model_config.json"]
    assert (folder / "latest").read_text() == "300"
    assert (folder / "ice_text.model").read_bytes() == (GOLDEN / "tokenizer/ice_text.model").read_bytes()


def test_saved_full_weights_are_all_of_the_models_under_module(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    content = torch.load(folder / "1" / WEIGHTS)
    expected = tuned[0].state_dict()
    assert content.keys() == {"module", "iteration"}
    assert content["iteration"] == 1
    assert content["module"].keys() == expected.keys()
    assert all(content["module"][name].equal(tensor) for name, tensor in expected.items())


def test_saved_config_describes_the_base_model_and_its_adapters(tuned, upstream_config, tmp_path):
    config = json.loads((saved(tuned, tmp_path / "run") / "model_config.json").read_text())
    assert config["model_class"] == "FineTuneVisualGLMModel"
    assert config["eva_args"] == upstream_config["eva_args"]
    assert config["qformer_args"] == upstream_config["qformer_args"]
    sizes = ("num_layers", "hidden_size", "vocab_size", "image_length", "bos_token_id", "pad_token_id")
    assert {key: config[key] for key in sizes} == {key: upstream_config[key] for key in sizes}
    assert {key: config[key] for key in FLAGS} == FLAGS


def test_saving_says_where_in_one_line(tuned, tmp_path, capsys):
    folder = saved(tuned, tmp_path / "run", iteration=20)
    assert capsys.readouterr().out == f"Saved {folder} (iteration 20).\n"


def test_saved_checkpoint_is_read_by_sats_own_loader(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    args = FineTuneVisualGLMModel.get_args(skip_init=True, **FLAGS)
    loaded, _ = FineTuneVisualGLMModel.from_pretrained(str(folder), args, build_only=True)
    model_io.load_checkpoint(loaded, args, load_path=str(folder))
    assert all(loaded.state_dict()[name].equal(tensor) for name, tensor in tuned[0].state_dict().items())


def test_saved_checkpoint_when_loaded_gives_the_same_logits(tuned, tmp_path):
    for name, parameter in tuned[0].named_parameters():
        if "matrix_B" in name or "ptuning" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    input_ids = torch.tensor([[859, 775, 86, 89, 554]])
    loaded = load_model(saved(tuned, tmp_path / "run"), "FineTuneVisualGLMModel")
    tuned[0].eval()
    assert torch.equal(loaded(input_ids=input_ids)[0], tuned[0](input_ids=input_ids)[0])


def test_model_inside_deepspeeds_engine_is_saved_under_its_own_names(tuned, tmp_path):
    engine = SimpleNamespace(module=tuned[0])
    folder = saved((engine, tuned[1]), tmp_path / "run")
    assert torch.load(folder / "1" / WEIGHTS)["module"].keys() == tuned[0].state_dict().keys()


def test_saving_writes_latest_last(tuned, tmp_path, monkeypatch):
    named = []

    def recording(rename):
        def renamed(source, target):
            rename(source, target)
            named.append(Path(target).name)

        return renamed

    monkeypatch.setattr(os, "rename", recording(os.rename))
    monkeypatch.setattr(os, "replace", recording(os.replace))
    saved(tuned, tmp_path / "run")
    assert named == ["model_config.json", "ice_text.model", "checksums.json", "1", "latest"]


def dies_midway(_, path):
    Path(path).write_bytes(b"half of the wei")
    raise KeyboardInterrupt


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("iteration", [1, 2])  # saved again, or saved next
def test_kill_while_weights_are_written_leaves_the_last_checkpoint_whole(tuned, tmp_path, monkeypatch, iteration):
    folder = saved(tuned, tmp_path / "run", iteration=1)
    before = (folder / "1" / WEIGHTS).read_bytes()
    monkeypatch.setattr(torch, "save", dies_midway)
    with pytest.raises(KeyboardInterrupt):
        saved(tuned, folder, iteration)
    assert (folder / "latest").read_text() == "1"
    assert (folder / "1" / WEIGHTS).read_bytes() == before
    assert not (folder / "2" / WEIGHTS).exists()


def test_kill_after_the_weights_leaves_latest_at_the_last_checkpoint(tuned, tmp_path, monkeypatch):
    folder = saved(tuned, tmp_path / "run", iteration=1)
    monkeypatch.setattr(ChatGLMTokenizer, "save_vocabulary", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tuned, folder, iteration=2)
    assert (folder / "latest").read_text() == "1"
    assert load_checkpoint(tuned[0], Namespace(load=str(folder))) == 0


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_kill_leaves_litter_that_the_next_save_removes(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    whole = names_in(folder)
    write_unfinished(2, tuned[0], saving_args(tuned, folder), {})
    assert "2.unfinished" in names_in(folder)
    (folder / "tokenizer.unfinished").mkdir()
    (folder / "latest.unfinished").touch()
    saved(tuned, folder, 3)
    assert names_in(folder) == sorted([*whole, "3"])


def killed_at(operation, publish):
    """Whether a process that publishes is killed (-9) at this one of what it asks of the file system."""
    if not (child := os.fork()):
        left = [operation]

        def killing(act):
            def one_less(*words, **named):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*words, **named)

            return one_less

        for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "rmdir"), (Path, "write_text")):
            setattr(owner, name, killing(getattr(owner, name)))
        publish()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_kill_at_every_moment_of_a_save_leaves_a_checkpoint_that_is_whole(tuned, tmp_path, capsys):
    found, operation = [], 0
    while operation := operation + 1:
        folder = saved(tuned, tmp_path / str(operation))
        (folder / "model_config.json").write_text("{}")  # of an older version: to be written again, as is the tokenizer
        (folder / "ice_text.model").write_bytes(b"")
        (folder / "1/checksums.json").unlink()
        saved(tuned, folder)
        (folder / "model_config.json").write_text("{}")
        capsys.readouterr()
        was_killed = killed_at(operation, write_unfinished(2, tuned[0], saving_args(tuned, folder), {}))
        capsys.readouterr()
        checkpoint = Checkpoint.find(folder)
        assert ChatGLMTokenizer.from_pretrained(folder).vocab_size > 0
        assert read_weights(checkpoint.weights_file()).keys() == tuned[0].state_dict().keys()
        assert "is left out" not in capsys.readouterr().err
        found.append(checkpoint.iteration)
        if not was_killed:
            break
    assert found == sorted(found)
    assert (found[0], found[-1]) == ("1", "2")
    assert len(found) > 10


def test_further_files_of_an_iteration_are_there_with_it_and_checked(tuned, tmp_path):
    args = saving_args(tuned, tmp_path / "run")
    save_checkpoint(1, tuned[0], None, None, args, {"training_state.pt": lambda path: path.write_bytes(b"state")})
    assert (tmp_path / "run/1/training_state.pt").read_bytes() == b"state"
    (tmp_path / "run/1/training_state.pt").write_bytes(b"stats")
    with pytest.raises(InputError, match=r"1/training_state.pt is damaged: its checksum"):
        Checkpoint.find(tmp_path / "run")


def test_tokenizer_that_is_there_already_is_not_written_again(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    before = (folder / "ice_text.model").stat()
    saved(tuned, folder, 2)
    after = (folder / "ice_text.model").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_iteration_saved_again_replaces_the_one_before(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    (folder / "1" / "more").touch()
    saved(tuned, folder)
    assert names_in(folder / "1") == ["checksums.json", WEIGHTS]
    assert Checkpoint.find(folder).iteration == "1"


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("full", [True, False])
def test_weights_that_are_not_finite_are_not_saved(upstream_checkpoint, tmp_path, full, number):
    model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2)
    args = FineTuneVisualGLMModel.get_args(
        use_lora=True, save=str(tmp_path / "run"), save_full_model=full, num_layers=3
    )
    factor = dict(model.named_parameters())["transformer.layers.1.attention.dense.matrix_B.0"]
    with torch.no_grad():
        factor[1, 1] = number
    with pytest.raises(
        InputError, match=r"^iteration 5: transformer\.layers\.1\.attention\.dense\.matrix_B\.0 has numbers"
    ):
        save_checkpoint(5, model, None, None, args)
    assert not (tmp_path / "run").exists()


# what is removed, and when


def test_save_total_limit_keeps_the_newest_and_the_best(tuned, tmp_path):
    folder = tmp_path / "run"
    args = saving_args(tuned, folder)
    save_checkpoint(2, tuned[0], None, None, Namespace(**vars(args) | {"save": str(folder / "best")}))
    args.save_total_limit = 2
    for iteration in (2, 4, 10, 12):
        save_checkpoint(iteration, tuned[0], None, None, args)
    assert [name for name in names_in(folder) if name[0].isdigit()] == ["10", "12"]
    assert Checkpoint.find(folder / "best").iteration == "2"


def test_save_total_limit_removes_nothing_until_the_new_one_is_safe(tuned, tmp_path, monkeypatch):
    folder = saved(tuned, tmp_path / "run")
    args = saving_args(tuned, folder)
    args.save_total_limit = 1
    publish = write_unfinished(2, tuned[0], args, {})
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish()
    assert Checkpoint.find(folder).iteration == "1"


def test_older_iteration_that_cant_be_removed_is_a_warning(tuned, tmp_path, monkeypatch, capsys):
    folder = saved(tuned, tmp_path / "run")
    args = saving_args(tuned, folder)
    args.save_total_limit = 1
    rename = os.rename

    def refusing(source, target):
        if Path(source).name == "1":
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    save_checkpoint(2, tuned[0], None, None, args)
    assert Checkpoint.find(folder).iteration == "2"
    assert f"WARNING: {folder}: older iterations can't be removed (Permission denied)." in capsys.readouterr().err


def test_size_of_weights_is_hardly_more_than_their_file_takes(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run")
    found = (folder / "1" / WEIGHTS).stat().st_size
    assert found < save.size_of(tuned[0].state_dict()) < found + 768 * len(tuned[0].state_dict())


# a disk without room


@small_disk
@pytest.mark.run
@pytest.mark.parametrize(("how", "reason"), [
    ("known", "are needed to save iteration 2"),
    ("filling", "can't be saved (No space left on device)"),
    pytest.param("extra", "can't be saved (No space left on device)", marks=pytest.mark.long),
    pytest.param("read-only", "can't be saved (Read-only file system)", marks=pytest.mark.long),
])  # fmt: skip
def test_save_onto_a_disk_without_room_is_a_sentence_and_leaves_the_one_before(
    upstream_checkpoint, tmp_path, how, reason
):
    done = run_on_a_small_disk("save_without_room", tmp_path, upstream_checkpoint, how)
    assert done.returncode == 2, done.stdout + done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"saving: error: {tmp_path}/run: ")
    assert reason in error
    assert "free on its disk" in error
    assert done.stdout.splitlines()[-3:-1] == ["found 1", "1 ice_text.model latest model_config.json"]


# what is read back


def test_iteration_to_go_on_from_is_latests_in_pretrain_mode_and_0_else(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run", iteration=7)
    modes = ("pretrain", "finetune", "inference")
    assert [load_checkpoint(tuned[0], Namespace(load=str(folder), mode=mode)) for mode in modes] == [7, 0, 0]


def test_specific_iteration_is_read_in_place_of_latests(tuned, tmp_path):
    folder = saved(tuned, tmp_path / "run", iteration=3)
    saved(tuned, folder, iteration=6)
    args = Namespace(load=str(folder), mode="pretrain")
    assert load_checkpoint(tuned[0], args, specific_iteration=3) == 3
