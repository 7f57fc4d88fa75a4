"""Features of a picture stand for the picture: the same loss and gradient, computed once."""

import gc
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, PROJECT, free_port, load_model, printed_losses, run_python

from model.data.dataset import FewShotDataset, data_collator
from model.data.image_processor import BlipImageEvalProcessor
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.training import feature_cache as features
from model.training import feature_store as feature_files
from model.training.feature_cache import FeatureCache, feature_file, picture_features
from model.training.step import loss_sum

LENGTHS = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=64)


@pytest.fixture
def model(upstream_checkpoint):
    """The golden model with its eyes frozen and one linear of the language model trained."""
    model = load_model(upstream_checkpoint).requires_grad_(False)
    model.transformer.layers[0].attention.dense.weight.requires_grad_(True)
    return model


@pytest.fixture
def eyes(model):
    return model.get_mixin("eva").model


@pytest.fixture
def dataset(monkeypatch):
    monkeypatch.chdir(GOLDEN / "upstream")
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    return FewShotDataset("dataset.json", BlipImageEvalProcessor(224), tokenizer, LENGTHS)


def loss_and_gradient(model, dataset):
    model.zero_grad()
    loss = loss_sum(model, data_collator([dataset[index] for index in range(3)]))
    loss.backward()
    return loss.item(), model.transformer.layers[0].attention.dense.weight.grad.clone()


def test_step_on_features_has_the_loss_and_gradient_of_the_pictures(model, eyes, dataset):
    loss, gradient = loss_and_gradient(model, dataset)
    dataset = FeatureCache(eyes, lambda rows: 2 * rows).given_to(dataset)
    assert "image" not in dataset[0]
    other_loss, other_gradient = loss_and_gradient(model, dataset)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_gradient, gradient)


def test_features_are_kept_per_picture_in_the_q_formers_width(eyes, dataset):
    kept = picture_features([row.img for row in dataset.rows], dataset.processor, eyes)
    assert len(kept) == 6
    assert {tuple(tensor.shape) for tensor in kept.values()} == {(32, 48)}


def test_features_in_a_file_equal_those_in_memory(eyes, dataset, monkeypatch):
    paths = [row.img for row in dataset.rows]
    in_memory = picture_features(paths, dataset.processor, eyes)
    monkeypatch.setattr(feature_files, "MEMORY_SHARE", 0.0)
    in_file = picture_features(paths, dataset.processor, eyes)
    for path in paths:
        torch.testing.assert_close(in_file[path], in_memory[path])


def test_features_leave_the_eyes_mode_as_it_was(eyes, dataset):
    eyes.train()
    picture_features([dataset.rows[0].img], dataset.processor, eyes)
    assert eyes.training


def test_rows_that_training_meets_once_keep_their_pixels(eyes, dataset):
    assert "image" in FeatureCache(eyes, lambda rows: 2 * rows - 1).given_to(dataset)[0]


def test_rows_keep_their_pixels_when_a_part_of_the_eyes_is_trained(eyes, dataset):
    eyes.qformer.requires_grad_(True)
    assert "image" in FeatureCache(eyes, lambda rows: 100 * rows).given_to(dataset)[0]


def test_rows_have_features_when_only_the_projection_is_trained(eyes, dataset):
    eyes.glm_proj.requires_grad_(True)
    assert "image_features" in FeatureCache(eyes, lambda rows: 100 * rows).given_to(dataset)[0]


def test_eyes_stay_when_a_data_set_still_needs_them(eyes, dataset, monkeypatch):
    sent = []
    monkeypatch.setattr(eyes.vit, "cpu", lambda: sent.append("vit"))
    cache = FeatureCache(eyes, lambda rows: 0)
    cache.given_to(dataset)
    cache.send_eyes_away()
    assert sent == []


def test_eyes_leave_when_every_data_set_has_its_features(eyes, dataset, monkeypatch):
    sent = []
    monkeypatch.setattr(eyes.vit, "cpu", lambda: sent.append("vit"))
    monkeypatch.setattr(eyes.qformer, "cpu", lambda: sent.append("qformer"))
    cache = FeatureCache(eyes, lambda rows: 2 * rows)
    cache.given_to(dataset)
    cache.send_eyes_away()
    assert sent == ["vit", "qformer"]


def looked_at(eyes, monkeypatch):
    """How many pictures the eyes look at from now on, as a list that grows."""
    seen, features_of = [], eyes.features
    monkeypatch.setattr(eyes, "features", lambda images: seen.extend(range(len(images))) or features_of(images))
    return seen


def test_picture_under_two_names_is_looked_at_once(eyes, dataset, monkeypatch, tmp_path):
    twin = tmp_path / "twin.png"
    twin.write_bytes(Path(dataset.rows[0].img).read_bytes())
    seen = looked_at(eyes, monkeypatch)
    kept = picture_features([dataset.rows[0].img, str(twin)], dataset.processor, eyes)
    assert len(seen) == 1
    assert torch.equal(kept[str(twin)], kept[dataset.rows[0].img])


def cached(eyes, dataset, folder, paths=None):
    file = feature_file(str(folder), eyes, dataset.processor)
    return picture_features(paths or [row.img for row in dataset.rows], dataset.processor, eyes, file=file)


def test_features_kept_in_a_folder_are_not_made_again(eyes, dataset, monkeypatch, tmp_path):
    first = cached(eyes, dataset, tmp_path / "new", [row.img for row in dataset.rows[:4]])
    seen = looked_at(eyes, monkeypatch)
    again = cached(eyes, dataset, tmp_path / "new")
    assert len(seen) == 2  # the two that are new
    assert all(torch.equal(again[path], features) for path, features in first.items())
    plain = picture_features([row.img for row in dataset.rows], dataset.processor, eyes)
    assert all(torch.allclose(again[path], plain[path], atol=1e-6) for path in plain)
    cached(eyes, dataset, tmp_path / "new")
    assert len(seen) == 2 + len(plain)


@pytest.mark.parametrize("change", ["weights", "size", "dtype", "bytes"])
def test_features_are_made_again_when_what_they_come_from_changes(change, eyes, dataset, monkeypatch, tmp_path):
    copied = tmp_path / "picture.png"
    copied.write_bytes(Path(dataset.rows[0].img).read_bytes())
    cached(eyes, dataset, tmp_path, [str(copied)])
    if change == "weights":
        next(eyes.qformer.parameters()).data.add_(1.0)
    elif change == "size":
        eyes.vit.set_image_size(112)
        dataset.processor = BlipImageEvalProcessor(112)
    elif change == "dtype":
        eyes.to(torch.bfloat16)
    else:
        copied.write_bytes(Path(dataset.rows[1].img).read_bytes())
    seen = looked_at(eyes, monkeypatch)
    cached(eyes, dataset, tmp_path, [str(copied)])
    assert len(seen) == 1


def test_features_not_noted_before_a_kill_are_made_again(eyes, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "PICTURES_AT_ONCE", 1)
    monkeypatch.setattr(feature_files, "NEW_BEFORE_NOTED", 2)
    features_of, calls = eyes.features, []

    def dies_at_the_fourth(images):
        calls.append(images)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return features_of(images)

    monkeypatch.setattr(eyes, "features", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        cached(eyes, dataset, tmp_path)
    monkeypatch.setattr(eyes, "features", features_of)
    gc.collect()  # the dead run's lock goes with it
    seen = looked_at(eyes, monkeypatch)
    assert len(cached(eyes, dataset, tmp_path)) == 6
    assert len(seen) == 4  # two were noted


def test_features_of_a_second_run_at_the_same_time_are_for_that_run_only(eyes, dataset, tmp_path):
    file = feature_file(str(tmp_path), eyes, dataset.processor)
    part = feature_files.FeaturePart(6, (32, 48), torch.float32, file)
    second = cached(eyes, dataset, tmp_path)
    assert len(second) == 6
    assert not file.with_suffix(".index").read_bytes()
    part.close()
    assert torch.equal(cached(eyes, dataset, tmp_path)[dataset.rows[0].img], second[dataset.rows[0].img])
    assert len(file.with_suffix(".index").read_bytes()) == 6 * 16


def test_features_whose_file_is_gone_are_made_again(eyes, dataset, monkeypatch, tmp_path):
    cached(eyes, dataset, tmp_path)
    feature_file(str(tmp_path), eyes, dataset.processor).unlink()
    seen = looked_at(eyes, monkeypatch)
    cached(eyes, dataset, tmp_path)
    cached(eyes, dataset, tmp_path)
    assert len(seen) == 6


def test_features_with_no_room_on_the_disk_are_one_sentence(eyes, dataset, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_files.os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device; 1 MiB are needed there"):
        cached(eyes, dataset, tmp_path, [dataset.rows[0].img] * 170)


def test_rows_that_training_meets_once_have_features_when_those_are_kept(eyes, dataset, tmp_path):
    assert "image_features" in FeatureCache(eyes, lambda rows: rows, folder=str(tmp_path)).given_to(dataset)[0]


def test_features_of_a_picture_that_cannot_be_opened_are_left_out(eyes, dataset):
    good = dataset.rows[0].img
    assert list(picture_features(["gone.png", good], dataset.processor, eyes)) == [good]


def test_row_whose_picture_cannot_be_opened_still_tells_when_it_is_asked_for(eyes, dataset):
    dataset.features = picture_features([dataset.rows[1].img, "gone.png"], dataset.processor, eyes)
    dataset.processor = lambda image: (_ for _ in ()).throw(InputError("gone"))
    with pytest.raises(InputError, match="gone"):
        dataset[0]


TRAINING = ("--use_lora", "--mode", "finetune", "--train-iters", "3", "--batch-size", "2", "--num-workers", "1")


@pytest.mark.run
def test_runs_with_a_feature_cache_have_the_losses_of_one_without(upstream_checkpoint, tmp_path):
    def losses(*flags):
        command = (PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, *TRAINING)
        run = run_python(*command, "--train-data", "dataset.json", *flags, cwd=GOLDEN / "upstream")
        assert run.returncode == 0, run.stderr
        return printed_losses(run.stdout)

    cache = ("--feature_cache", tmp_path / "cache")
    assert losses(*cache) == losses(*cache) == losses()
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".features", ".index"]


ONE_OF_TWO_PROCESSES = """
import sys
from datetime import timedelta
from pathlib import Path

import torch
from conftest import load_model

from model.training.feature_cache import picture_features
from model.data.image_processor import BlipImageEvalProcessor
from model.data.images import open_image

checkpoint, file, *paths = sys.argv[1:]
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
eyes, processor = load_model(Path(checkpoint)).get_mixin("eva").model, BlipImageEvalProcessor(224)
seen, features_of = [], eyes.features
eyes.features = lambda images: seen.extend(images) or features_of(images)
found = picture_features(paths, processor, eyes, file=Path(file) if file else None)
assert list(found) == [path for path in paths if Path(path).exists()]
with torch.no_grad():
    expected = {path: features_of(processor(open_image(path))[None])[0] for path in found}
torch.testing.assert_close(found, expected)
print(f"looked at {len(seen)}", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.run
@pytest.mark.parametrize("in_folder", [False, True])
def test_two_processes_share_the_pictures_out(in_folder, dataset, upstream_checkpoint, tmp_path):
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO_PROCESSES)
    paths = ["gone.png", *(row.img for row in dataset.rows)]
    file = tmp_path / "cache/some.features" if in_folder else ""

    def looks() -> list[str]:
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), script)
        path = f"{PROJECT}:{PROJECT / 'tests'}"
        run = run_python(*launcher, upstream_checkpoint, file, *paths, cwd=GOLDEN / "upstream", PYTHONPATH=path)
        assert run.returncode == 0, run.stderr
        return re.findall(r"looked at \d", run.stdout)

    assert looks() == ["looked at 3"] * 2
    if in_folder:
        assert looks() == ["looked at 0"] * 2
        assert sorted(part.name for part in file.parent.glob("*.features")) == ["some-1.features", "some.features"]


@pytest.mark.run
def test_process_without_room_for_its_features_ends_them_all(upstream_checkpoint, dataset, tmp_path):
    script = tmp_path / "one_of_two.py"
    fails_in_the_second = """
import os

from model.training import feature_store as feature_files, feature_cache as features

def full(*_):
    raise OSError(28, "No space left on device")

if os.environ["RANK"] == "1":
    feature_files.os.posix_fallocate = full
"""
    script.write_text(fails_in_the_second + ONE_OF_TWO_PROCESSES)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), script)
    path = f"{PROJECT}:{PROJECT / 'tests'}"
    run = run_python(
        *launcher, upstream_checkpoint, "", *(row.img for row in dataset.rows), cwd=GOLDEN / "upstream", PYTHONPATH=path
    )
    assert run.returncode != 0
    assert run.stderr.count(f"InputError: {tempfile.gettempdir()}: No space left on device") == 2
    assert "looked at" not in run.stdout


@pytest.mark.run
def test_feature_cache_in_the_place_of_a_file_is_refused_before_a_model_is_loaded(upstream_checkpoint, tmp_path):
    (tmp_path / "file").touch()
    command = (PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, *TRAINING)
    run = run_python(
        *command, "--train-data", "dataset.json", "--feature_cache", tmp_path / "file", cwd=GOLDEN / "upstream"
    )
    assert run.returncode == 2
    assert run.stderr.endswith(f"--feature_cache {tmp_path}/file: {tmp_path}/file is a file; a folder is needed.\n")
