"""Features of a picture stand for the picture: the same loss and gradient, computed once."""

import gc
import json
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, PROJECT, free_port, load_model, printed_losses, run_python, write_rows

from model.data.dataset import FewShotDataset, data_collator
from model.data.image_processor import BlipImageEvalProcessor
from model.data.tokenizer import ChatGLMTokenizer
from model.errors import InputError
from model.training import feature_cache, feature_store
from model.training.feature_cache import FeatureCache, feature_file, image_features
from model.training.feature_store import FeatureFormat, new_part
from model.training.step import loss_sum

LENGTHS = SimpleNamespace(image_length=32, max_source_length=64, max_target_length=64)


@pytest.fixture
def model(upstream_checkpoint):
    """The golden model with its vision part frozen and one linear of the language model trained."""
    model = load_model(upstream_checkpoint).requires_grad_(False)
    model.transformer.layers[0].attention.dense.weight.requires_grad_(True)
    return model


@pytest.fixture
def vision(model):
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


def test_step_on_features_has_the_loss_and_gradient_of_the_pictures(model, vision, dataset):
    loss, gradient = loss_and_gradient(model, dataset)
    dataset = FeatureCache(vision, lambda rows: 2 * rows).with_features(dataset)
    assert "image" not in dataset[0]
    other_loss, other_gradient = loss_and_gradient(model, dataset)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_gradient, gradient)


def test_features_are_kept_per_picture_in_the_q_formers_width(vision, dataset):
    kept = image_features([row.img for row in dataset.rows], dataset.processor, vision)
    assert len(kept) == 6
    assert {tuple(tensor.shape) for tensor in kept.values()} == {(32, 48)}


def test_features_in_a_file_equal_those_in_memory(vision, dataset, monkeypatch):
    paths = [row.img for row in dataset.rows]
    in_memory = image_features(paths, dataset.processor, vision)
    monkeypatch.setattr(feature_store, "MEMORY_SHARE", 0.0)
    in_file = image_features(paths, dataset.processor, vision)
    for path in paths:
        torch.testing.assert_close(in_file[path], in_memory[path])


def test_features_leave_the_vision_parts_mode_as_it_was(vision, dataset):
    vision.train()
    image_features([dataset.rows[0].img], dataset.processor, vision)
    assert vision.training


def test_rows_that_training_meets_once_keep_their_pixels(vision, dataset):
    assert "image" in FeatureCache(vision, lambda rows: 2 * rows - 1).with_features(dataset)[0]


def test_rows_keep_their_pixels_when_a_part_of_the_vision_is_trained(vision, dataset):
    vision.qformer.requires_grad_(True)
    assert "image" in FeatureCache(vision, lambda rows: 100 * rows).with_features(dataset)[0]


def test_rows_have_features_when_only_the_projection_is_trained(vision, dataset):
    vision.glm_proj.requires_grad_(True)
    assert "image_features" in FeatureCache(vision, lambda rows: 100 * rows).with_features(dataset)[0]


def test_vision_stays_on_the_device_when_a_data_set_still_needs_it(vision, dataset, monkeypatch):
    offloaded = []
    monkeypatch.setattr(vision.vit, "cpu", lambda: offloaded.append("vit"))
    cache = FeatureCache(vision, lambda rows: 0)
    cache.with_features(dataset)
    cache.offload_vision()
    assert offloaded == []


def test_vision_is_offloaded_when_every_data_set_has_its_features(vision, dataset, monkeypatch):
    offloaded = []
    monkeypatch.setattr(vision.vit, "cpu", lambda: offloaded.append("vit"))
    monkeypatch.setattr(vision.qformer, "cpu", lambda: offloaded.append("qformer"))
    cache = FeatureCache(vision, lambda rows: 2 * rows)
    cache.with_features(dataset)
    cache.offload_vision()
    assert offloaded == ["vit", "qformer"]


def looked_at(vision, monkeypatch):
    """How many pictures the vision part looks at from now on, as a list that grows."""
    seen, features_of = [], vision.features
    monkeypatch.setattr(vision, "features", lambda images: seen.extend(range(len(images))) or features_of(images))
    return seen


def test_picture_under_two_names_is_looked_at_once(vision, dataset, monkeypatch, tmp_path):
    twin = tmp_path / "twin.png"
    twin.write_bytes(Path(dataset.rows[0].img).read_bytes())
    seen = looked_at(vision, monkeypatch)
    kept = image_features([dataset.rows[0].img, str(twin)], dataset.processor, vision)
    assert len(seen) == 1
    assert torch.equal(kept[str(twin)], kept[dataset.rows[0].img])


def cached(vision, dataset, folder, paths=None):
    file = feature_file(str(folder), vision, dataset.processor)
    return image_features(paths or [row.img for row in dataset.rows], dataset.processor, vision, file=file)


def test_features_kept_in_a_folder_are_not_made_again(vision, dataset, monkeypatch, tmp_path):
    first = cached(vision, dataset, tmp_path / "new", [row.img for row in dataset.rows[:4]])
    seen = looked_at(vision, monkeypatch)
    again = cached(vision, dataset, tmp_path / "new")
    assert len(seen) == 2  # the two that are new
    assert all(torch.equal(again[path], features) for path, features in first.items())
    plain = image_features([row.img for row in dataset.rows], dataset.processor, vision)
    assert all(torch.allclose(again[path], plain[path], atol=1e-6) for path in plain)
    cached(vision, dataset, tmp_path / "new")
    assert len(seen) == 2 + len(plain)


@pytest.mark.parametrize("change", ["weights", "size", "dtype", "bytes"])
def test_features_are_made_again_when_what_they_come_from_changes(change, vision, dataset, monkeypatch, tmp_path):
    copied = tmp_path / "picture.png"
    copied.write_bytes(Path(dataset.rows[0].img).read_bytes())
    cached(vision, dataset, tmp_path, [str(copied)])
    if change == "weights":
        next(vision.qformer.parameters()).data.add_(1.0)
    elif change == "size":
        vision.vit.set_image_size(112)
        dataset.processor = BlipImageEvalProcessor(112)
    elif change == "dtype":
        vision.to(torch.bfloat16)
    else:
        copied.write_bytes(Path(dataset.rows[1].img).read_bytes())
    seen = looked_at(vision, monkeypatch)
    cached(vision, dataset, tmp_path, [str(copied)])
    assert len(seen) == 1


@pytest.mark.parametrize("change", [
    {"eva_args": {"num_attention_heads": 2}}, {"eva_args": {"layernorm_epsilon": 0.1}},
    {"qformer_args": {"num_attention_heads": 2}}, {"qformer_args": {"layernorm_epsilon": 0.1}},
])  # fmt: skip
def test_features_of_the_same_weights_under_another_configuration_are_in_another_file(
    change, model, upstream_checkpoint, tmp_path
):
    """Neither the number of heads nor the norms' epsilon shows in a weight's name or shape."""
    changed = shutil.copytree(upstream_checkpoint, tmp_path / "changed")
    config = json.loads((changed / "model_config.json").read_text())
    [(part, sizes)] = change.items()
    (changed / "model_config.json").write_text(json.dumps(config | {part: config[part] | sizes}))
    image = torch.linspace(-1, 1, 3 * 224 * 224).view(1, 3, 224, 224)
    one, other = (found.get_mixin("eva").model.eval() for found in (model, load_model(changed)))
    assert not torch.allclose(one.features(image), other.features(image))
    files = [feature_file("folder", vision, BlipImageEvalProcessor(224)) for vision in (one, other, one)]
    assert files[0] == files[2] != files[1]


def test_features_not_noted_before_a_kill_are_made_again(vision, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(feature_cache, "IMAGES_AT_ONCE", 1)
    monkeypatch.setattr(feature_store, "NEW_BEFORE_NOTED", 2)
    features_of, calls = vision.features, []

    def dies_at_the_fourth(images):
        calls.append(images)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return features_of(images)

    monkeypatch.setattr(vision, "features", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        cached(vision, dataset, tmp_path)
    monkeypatch.setattr(vision, "features", features_of)
    gc.collect()  # the dead run's lock goes with it
    seen = looked_at(vision, monkeypatch)
    assert len(cached(vision, dataset, tmp_path)) == 6
    assert len(seen) == 4  # two were noted


def test_features_of_a_second_run_at_the_same_time_are_for_that_run_only(vision, dataset, tmp_path):
    file = feature_file(str(tmp_path), vision, dataset.processor)
    part = new_part(6, FeatureFormat(32, 48, torch.float32), file)
    second = cached(vision, dataset, tmp_path)
    assert len(second) == 6
    assert not file.with_suffix(".index").read_bytes()
    part.close()
    assert torch.equal(cached(vision, dataset, tmp_path)[dataset.rows[0].img], second[dataset.rows[0].img])
    assert len(file.with_suffix(".index").read_bytes()) == len(feature_store.HEADER) + 6 * 32


def test_features_whose_file_is_gone_are_made_again(vision, dataset, monkeypatch, tmp_path):
    cached(vision, dataset, tmp_path)
    feature_file(str(tmp_path), vision, dataset.processor).unlink()
    seen = looked_at(vision, monkeypatch)
    cached(vision, dataset, tmp_path)
    cached(vision, dataset, tmp_path)
    assert len(seen) == 6


def test_features_kept_in_a_folder_take_no_more_room_after_a_second_run(vision, dataset, tmp_path):
    sizes = []
    for _ in range(3):
        cached(vision, dataset, tmp_path)
        sizes.append({path.suffix: path.stat().st_size for path in tmp_path.iterdir()})
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0][".features"] == 6 * 32 * 48 * 4


@pytest.mark.parametrize("content", [b"\0", b"\xff"])
def test_features_that_a_disk_has_lost_are_made_again_with_a_sentence(
    content, vision, dataset, monkeypatch, tmp_path, capsys
):
    first = cached(vision, dataset, tmp_path)
    first = {path: features.clone() for path, features in first.items()}
    file = feature_file(str(tmp_path), vision, dataset.processor)
    size = file.stat().st_size
    file.write_bytes(content * size)
    seen = looked_at(vision, monkeypatch)
    for _ in range(2):
        again = cached(vision, dataset, tmp_path)
        assert all(torch.equal(again[path], features) for path, features in first.items())
    assert len(seen) == 6
    assert file.stat().st_size == size
    told = f"{file}: the features of 6 of 6 pictures are damaged; they are made anew."
    assert capsys.readouterr().out.count(told) == 1


def test_features_with_one_flipped_bit_are_made_again_and_no_others(vision, dataset, monkeypatch, tmp_path):
    first = {path: features.clone() for path, features in cached(vision, dataset, tmp_path).items()}
    file = feature_file(str(tmp_path), vision, dataset.processor)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    seen = looked_at(vision, monkeypatch)
    for _ in range(2):
        again = cached(vision, dataset, tmp_path)
        assert all(torch.allclose(again[path], features, atol=1e-6) for path, features in first.items())
    assert len(seen) == 1


def test_features_with_no_room_on_the_disk_are_one_sentence(vision, dataset, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device; 1 MiB are needed there"):
        cached(vision, dataset, tmp_path, [dataset.rows[0].img] * 170)
    with pytest.raises(InputError, match="No space left on device; 1 MiB are needed there"):
        cached(vision, dataset, tmp_path)  # a part of one
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_full_now_leaves_the_features_of_earlier_runs(vision, dataset, monkeypatch, tmp_path):
    cached(vision, dataset, tmp_path, [dataset.rows[0].img])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2

    def full_after_a_while(opened, start, size):
        feature_store.os.truncate(opened, size)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_store.os, "posix_fallocate", full_after_a_while)
    with pytest.raises(InputError, match="No space left on device"):
        cached(vision, dataset, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_that_training_meets_once_have_features_when_those_are_kept(vision, dataset, tmp_path):
    assert "image_features" in FeatureCache(vision, lambda rows: rows, folder=str(tmp_path)).with_features(dataset)[0]


def test_features_of_a_picture_that_cannot_be_opened_are_left_out(vision, dataset):
    good = dataset.rows[0].img
    assert list(image_features(["gone.png", good], dataset.processor, vision)) == [good]


def test_row_whose_picture_cannot_be_opened_still_tells_when_it_is_asked_for(vision, dataset):
    dataset.features = image_features([dataset.rows[1].img, "gone.png"], dataset.processor, vision)
    dataset.processor = lambda image: (_ for _ in ()).throw(InputError("gone"))
    with pytest.raises(InputError, match="gone"):
        dataset[0]


TRAINING = (
    "--use_lora", "--mode", "finetune", "--train-iters", "3", "--batch-size", "2", "--num-workers", "1", "--save", "none",
)  # fmt: skip


@pytest.fixture
def losses(upstream_checkpoint):
    """The losses that a run with further flags prints."""

    def of_a_run(*flags):
        command = (PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, *TRAINING)
        run = run_python(*command, "--train-data", "dataset.json", *flags, cwd=GOLDEN / "upstream")
        assert run.returncode == 0, run.stderr
        return printed_losses(run.stdout)

    return of_a_run


@pytest.mark.run
def test_files_of_which_one_alone_would_have_features_are_trained_on_together(losses, tmp_path):
    rows = json.loads((GOLDEN / "upstream/dataset.json").read_text(encoding="utf-8"))
    few = write_rows(tmp_path, [rows[0]])  # met twice or more in 6 samples, and the other file's six rows are not
    assert len(losses("--train-data", "dataset.json", few, "--image_folder", GOLDEN / "upstream")) == 3


def test_picture_that_can_be_opened_only_after_all_were_looked_at_is_a_bad_one(vision, dataset):
    dataset.features = image_features([dataset.rows[1].img], dataset.processor, vision)
    with pytest.raises(InputError, match="could not be opened when all pictures were looked at"):
        dataset[0]


@pytest.mark.run
def test_runs_with_a_feature_cache_have_the_losses_of_one_without(losses, tmp_path):
    cache = ("--feature_cache", tmp_path / "cache")
    assert losses(*cache) == losses(*cache) == losses()
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".features", ".index"]


@pytest.mark.run
def test_vision_that_has_left_is_no_part_of_what_zero_3_cuts_up(losses, tmp_path):
    cache = ("--feature_cache", tmp_path / "cache")
    assert losses(*cache, "--zero-stage", "3") == pytest.approx(losses(*cache, "--zero-stage", "2"), abs=2e-4)


def in_two_processes(program, *words):
    """Run a program of tests/programs in two processes that know of each other."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    path = f"{PROJECT}:{PROJECT / 'tests'}"
    file = PROJECT / "tests/programs" / f"{program}.py"
    return run_python(*launcher, file, *words, cwd=GOLDEN / "upstream", PYTHONPATH=path)


@pytest.mark.run
@pytest.mark.parametrize("in_folder", [pytest.param(False, marks=pytest.mark.long), True])
def test_two_processes_share_the_pictures_out(in_folder, dataset, upstream_checkpoint, tmp_path):
    paths = ["gone.png", *(row.img for row in dataset.rows)]
    file = tmp_path / "cache/some.features" if in_folder else ""

    def looks() -> list[str]:
        run = in_two_processes("image_features_of_one_of_two", upstream_checkpoint, file, *paths)
        assert run.returncode == 0, run.stderr
        return re.findall(r"looked at \d", run.stdout)

    assert looks() == ["looked at 3"] * 2
    if in_folder:
        assert looks() == ["looked at 0"] * 2
        assert sorted(part.name for part in file.parent.glob("*.features")) == ["some-1.features", "some.features"]


@pytest.mark.long
@pytest.mark.run
def test_process_without_room_for_its_features_ends_them_all(upstream_checkpoint, dataset):
    paths = [row.img for row in dataset.rows]
    run = in_two_processes("image_features_without_room", upstream_checkpoint, "", *paths)
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
