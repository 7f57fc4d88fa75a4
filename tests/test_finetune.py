"""FineTuneVisualGLMModel as the 2023 script starts it."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import free_port, load_model, run_python, write_tuned

from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import VISION, is_adapter_name
from model.finetune import FineTuneVisualGLMModel, by_kind
from model.lora import LoraLinear

INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


def loaded_later(checkpoint, **flags):
    args = FineTuneVisualGLMModel.get_args(lora_rank=2, layer_range=[0], lr=1.0, **flags)
    return FineTuneVisualGLMModel.from_pretrained(str(checkpoint), args, language_later=True)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["use_lora", "use_qlora", "use_ptuning"])
def test_language_model_is_loaded_after_the_vision_part_and_is_that_of_the_file(upstream_checkpoint, method):
    model = loaded_later(upstream_checkpoint, **{method: True})
    of_vision = {name.startswith(VISION) for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert of_vision == {True}
    assert not any(parameter.is_meta for parameter in model.get_mixin("eva").parameters())
    model.finish_loading()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    expected = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", lora_rank=2, layer_range=[0], **{method: True})
    found, wanted = model.state_dict(), expected.state_dict()
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        if is_adapter_name(name):  # drawn, but for B
            assert tensor.any() == ("matrix_B" not in name), name
        elif "inv_freq" not in name:
            assert torch.equal(tensor, wanted[name]), name


def test_frozen_tensors_loaded_into_no_memory_keep_what_sat_notes_of_them(upstream_checkpoint):
    model = loaded_later(upstream_checkpoint, use_lora=True)
    model.finish_loading()
    expected = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", use_lora=True, lora_rank=2, layer_range=[0])
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert vars(found) == vars(wanted), name


def test_no_memory_while_a_model_is_loaded_is_an_error(upstream_checkpoint, monkeypatch):
    def conversion(model, device):
        def no_memory(name, tensor):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return no_memory

    monkeypatch.setattr(FineTuneVisualGLMModel, "conversion", conversion)
    with pytest.raises(torch.OutOfMemoryError):
        loaded_later(upstream_checkpoint, use_lora=True)


@torch.no_grad()
@pytest.mark.usefixtures("process_group")
def test_from_pretrained_with_a_2023_namespace_adds_its_lora(upstream_checkpoint: Path) -> None:
    args = Namespace(use_lora=True, use_qlora=False, use_ptuning=False, lora_rank=4, layer_range=[1], pre_seq_len=4)
    model, args = FineTuneVisualGLMModel.from_pretrained(str(upstream_checkpoint), args)
    has_lora = [isinstance(layer.attention.dense, LoraLinear) for layer in model.transformer.layers]
    assert has_lora == [False, True, False]
    assert model.get_mixin("lora").rank == 4
    assert args.num_layers == 3
    base = load_model(upstream_checkpoint)
    assert torch.equal(model.eval()(input_ids=INPUT_IDS)[0], base(input_ids=INPUT_IDS)[0])


@pytest.mark.usefixtures("process_group")
def test_model_keeps_its_namespace_as_the_released_one_does(upstream_checkpoint: Path) -> None:
    model, args = FineTuneVisualGLMModel.from_pretrained(upstream_checkpoint, Namespace(use_lora=True, lora_rank=4))
    assert model.args is args
    assert (args.use_lora, args.use_ptuning) == (True, False)


@pytest.mark.usefixtures("process_group")
def test_overwrite_args_ask_for_adapters_as_args_do(upstream_checkpoint: Path) -> None:
    asked = {"use_lora": True, "lora_rank": 4, "layer_range": [1]}
    args = Namespace(use_ptuning=True, pre_seq_len=3, lora_rank=2)
    model, args = FineTuneVisualGLMModel.from_pretrained(upstream_checkpoint, args, overwrite_args=asked)
    has_lora = [isinstance(layer.attention.dense, LoraLinear) for layer in model.transformer.layers]
    assert has_lora == [False, True, False]
    assert (model.adapters.methods, model.adapters.rank) == (("lora", "ptuning"), 4)
    assert (args.use_lora, args.use_ptuning, args.lora_rank, args.layer_range) == (True, True, 4, [1])
    again, _ = FineTuneVisualGLMModel.from_pretrained(upstream_checkpoint, overwrite_args=asked)
    assert (again.adapters.methods, again.adapters.rank) == (("lora",), 4)


@pytest.mark.usefixtures("process_group")
def test_overwrite_args_dont_change_what_the_namespace_says_of_a_checkpoints_own_adapters(
    upstream_checkpoint: Path, tmp_path: Path
) -> None:
    folder = write_tuned(upstream_checkpoint, tmp_path / "lora", use_lora=True, lora_rank=4, layer_range=[1])
    model, args = FineTuneVisualGLMModel.from_pretrained(folder, overwrite_args={"lora_rank": 7, "use_lora": False})
    assert (model.get_mixin("lora").rank, args.lora_rank, args.use_lora) == (4, 4, True)


@pytest.mark.usefixtures("process_group")
def test_use_gpu_initialization_asks_for_no_gpu(upstream_checkpoint: Path) -> None:
    args = Namespace(use_lora=True, lora_rank=4, use_gpu_initialization=True, device="cpu")
    model, _ = FineTuneVisualGLMModel.from_pretrained(str(upstream_checkpoint), args)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.usefixtures("process_group")
def test_from_pretrained_leaves_the_namespace_that_it_was_given_alone(upstream_checkpoint: Path) -> None:
    args = Namespace(use_lora=True, lora_rank=4, num_layers=99)
    FineTuneVisualGLMModel.from_pretrained(str(upstream_checkpoint), args)
    assert args == Namespace(use_lora=True, lora_rank=4, num_layers=99)


@pytest.mark.usefixtures("process_group")
def test_from_pretrained_takes_a_checkpoint_that_was_found_before(upstream_checkpoint: Path) -> None:
    checkpoint = Checkpoint.find(upstream_checkpoint)
    model, args = FineTuneVisualGLMModel.from_pretrained(checkpoint, Namespace(use_ptuning=True, pre_seq_len=3))
    assert model.get_mixin("ptuning").prefix[0].shape[2] == 3
    assert model.base.name == str(upstream_checkpoint)
    args.eva_args["image_size"] = [1, 1]
    assert checkpoint.config["eva_args"]["image_size"] != [1, 1]


@pytest.mark.run
def test_processes_that_share_a_model_tell_all_parameters_and_not_those_of_one(no_launcher):
    flags = (
        "--from_pretrained",
        "model/tiny",
        "--mode",
        "finetune",
        "--use_qlora",
        "--use_ptuning",
        "--pre_seq_len",
        "4",
    )
    flags += ("--train-data", "fewshot-data/dataset.json", "--train-iters", "1", "--answers", "0", "--save", "none")
    two = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    alone = run_python("finetune_visualglm.py", *flags)
    shared = run_python(*two, "finetune_visualglm.py", *flags, "--model-parallel-size", "2")
    told, told_by_two = (
        done.stdout[done.stdout.index("Trainable") : done.stdout.index("\nstep ")] for done in (alone, shared)
    )
    assert told_by_two == told
    assert told.startswith("Trainable, 84,480 of 3,393,952 parameters in 54 tensors:")


def test_trained_tensors_are_told_kind_by_kind_with_their_layers():
    shapes = {f"transformer.layers.{layer}.mlp.dense.matrix_A.0": [10, 64] for layer in (0, 14)}
    shapes |= {f"mixins.ptuning.prefix.{layer}": [2, 4, 3, 16] for layer in range(28)}
    shapes |= {"mixins.eva.model.glm_proj.weight": [64, 32], "mixins.eva.model.vit.transformer.layers.7.mlp.bias": [8]}
    assert by_kind(shapes) == [
        "transformer.layers.*.mlp.dense.matrix_A.*: 2 tensors [10, 64], layers 0 14",
        "mixins.ptuning.prefix.*: 28 tensors [2, 4, 3, 16], layers 0 to 27",
        "mixins.eva.model.glm_proj.weight: 1 tensor [64, 32]",
        "mixins.eva.model.vit.transformer.layers.*.mlp.bias: 1 tensor [8], layer 7",
    ]
