"""What is trained: LoRA's arithmetic and names, P-Tuning's prefixes, and that all the rest is frozen."""

import pytest
import torch
from conftest import load_model

from model.finetune import FineTuneVisualGLMModel
from model.lora import LoraLinear

LORA = {"use_lora": True, "lora_rank": 4}
PTUNING = {"use_ptuning": True, "pre_seq_len": 5}
INPUT_IDS = torch.tensor([[859, 775, 2685, 86, 89, 554, 90]])


def trainable(model):
    return {name: list(parameter.shape) for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_names(layers):
    """{name: shape} of the released LoRA factors in a model of width 64 at rank 4."""
    shapes = {}
    for layer in layers:
        attention = f"transformer.layers.{layer}.attention"
        for part in range(3):
            shapes[f"{attention}.query_key_value.matrix_A.{part}"] = [4, 64]
            shapes[f"{attention}.query_key_value.matrix_B.{part}"] = [64, 4]
        shapes[f"{attention}.dense.matrix_A.0"] = [4, 64]
        shapes[f"{attention}.dense.matrix_B.0"] = [64, 4]
    return shapes


def prefix_names():
    return {f"mixins.ptuning.prefix.{layer}": [2, 4, 5, 16] for layer in range(3)}


@pytest.fixture
def build(upstream_checkpoint, capsys):
    """Builds a FineTuneVisualGLMModel with the flags given and freezes what SAT would have it freeze."""

    def built(**flags):
        model = load_model(upstream_checkpoint, "FineTuneVisualGLMModel", **flags)
        capsys.readouterr()
        model.disable_untrainable_params()
        return model

    return built


# LoraLinear


def test_lora_linear_at_the_start_gives_the_originals_output():
    original = torch.nn.Linear(6, 9)
    hidden_states = torch.randn(2, 5, 6)
    assert torch.equal(LoraLinear(original, rank=2, parts=3)(hidden_states), original(hidden_states))


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(2, 1.0, 0.5), (4, 1.0, 0.25), (4, 8.0, 2.0)])
def test_lora_linear_adds_b_a_x_times_alpha_over_r(rank, alpha, scale):
    original = torch.nn.Linear(6, 4)
    lora = LoraLinear(original, rank, alpha=alpha)
    torch.nn.init.normal_(lora.matrix_B[0])
    x = torch.randn(6)
    by_hand = original.weight @ x + original.bias + scale * (lora.matrix_B[0] @ (lora.matrix_A[0] @ x))
    torch.testing.assert_close(lora(x), by_hand)


def test_lora_linear_of_three_parts_changes_each_by_its_own_factors():
    original = torch.nn.Linear(6, 9)
    lora = LoraLinear(original, rank=2, parts=3)
    torch.nn.init.ones_(lora.matrix_B[1])
    x = torch.randn(6)
    change = lora(x) - original(x)
    key = 0.5 * (lora.matrix_A[1] @ x).sum()
    torch.testing.assert_close(change, torch.tensor([0.0] * 3 + [key.item()] * 3 + [0.0] * 3))


def test_lora_linear_has_the_released_names_and_shapes():
    lora = LoraLinear(torch.nn.Linear(6, 9), rank=2, parts=3)
    assert {name: list(parameter.shape) for name, parameter in lora.named_parameters()} == {
        "original.weight": [9, 6],
        "original.bias": [9],
        **{f"matrix_A.{part}": [2, 6] for part in range(3)},
        **{f"matrix_B.{part}": [3, 2] for part in range(3)},
    }


def test_lora_linear_at_the_start_has_a_uniform_a_and_a_zero_b():
    lora = LoraLinear(torch.nn.Linear(400, 10), rank=8)
    bound = 400**-0.5  # kaiming_uniform_ with a = √5: gain √(1/3) · √(3 / fan_in)
    assert lora.matrix_A[0].abs().max() <= bound
    assert lora.matrix_A[0].std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not lora.matrix_B[0].any()


def test_lora_linear_has_the_originals_dtype():
    lora = LoraLinear(torch.nn.Linear(6, 4).bfloat16(), rank=2)
    assert lora.matrix_A[0].dtype == lora.matrix_B[0].dtype == torch.bfloat16


def test_lora_linear_loads_the_plain_linears_weights_beside_its_factors():
    plain = torch.nn.Linear(6, 4)
    lora = LoraLinear(torch.nn.Linear(6, 4), rank=2)
    missing, unexpected = lora.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ["matrix_A.0", "matrix_B.0"]
    assert not unexpected
    assert torch.equal(lora.original.weight, plain.weight)
    assert torch.equal(lora.original.bias, plain.bias)


def test_lora_linear_loads_what_it_saved():
    saved = LoraLinear(torch.nn.Linear(6, 4), rank=2)
    torch.nn.init.normal_(saved.matrix_B[0])
    loaded = LoraLinear(torch.nn.Linear(6, 4), rank=2)
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(6)
    assert torch.equal(loaded(x), saved(x))


def test_lora_linear_when_the_output_has_no_equal_parts_is_refused():
    with pytest.raises(ValueError, match="10 outputs in 3 parts"):
        LoraLinear(torch.nn.Linear(6, 10), rank=2, parts=3)


# the trainable set


def test_trainable_tensors_of_lora_are_its_factors_in_every_layer(build):
    assert trainable(build(**LORA)) == lora_names([0, 1, 2])


def test_trainable_tensors_of_lora_with_a_layer_range_are_the_factors_of_those_layers(build):
    assert trainable(build(**LORA, layer_range=[0, 2])) == lora_names([0, 2])


def test_layers_outside_the_layer_range_keep_plain_linears(build):
    layers = build(**LORA, layer_range=[1]).transformer.layers
    has_lora = [isinstance(layer.attention.query_key_value, LoraLinear) for layer in layers]
    assert has_lora == [False, True, False]


def test_trainable_tensors_of_p_tuning_are_its_prefixes(build):
    assert trainable(build(**PTUNING)) == prefix_names()


def test_trainable_tensors_of_both_methods_are_those_of_each(build):
    assert trainable(build(**LORA, **PTUNING)) == lora_names([0, 1, 2]) | prefix_names()


@pytest.mark.parametrize("flags", [LORA, PTUNING, {**LORA, **PTUNING}])
def test_gradients_after_a_backward_pass_are_on_the_trainable_tensors_only(build, flags):
    model = build(**flags)
    model(input_ids=INPUT_IDS)[0].square().mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(trainable(model))


@torch.no_grad()
def test_logits_with_fresh_lora_are_the_base_models(build, upstream_checkpoint):
    base = load_model(upstream_checkpoint)(input_ids=INPUT_IDS)[0]
    assert torch.equal(build(**LORA)(input_ids=INPUT_IDS)[0], base)


@torch.no_grad()
def test_logits_with_changed_lora_are_those_of_weights_with_b_a_folded_in(build, upstream_checkpoint):
    adapted, folded = build(**LORA), load_model(upstream_checkpoint)
    for index, layer in enumerate(adapted.transformer.layers):
        for name in ("query_key_value", "dense"):
            lora = getattr(layer.attention, name)
            for factor in lora.matrix_B:
                torch.nn.init.normal_(factor, std=0.1)
            change = torch.cat([b @ a for a, b in zip(lora.matrix_A, lora.matrix_B, strict=True)]) / 4
            getattr(folded.transformer.layers[index].attention, name).weight += change
    torch.testing.assert_close(adapted(input_ids=INPUT_IDS)[0], folded(input_ids=INPUT_IDS)[0], rtol=1e-4, atol=1e-5)


def test_trainable_tensors_and_their_total_are_printed_once(build, capsys):
    model = build(**LORA, layer_range=[0])
    printed = capsys.readouterr().out.splitlines()
    factors = 8 * 4 * 64
    of_all = sum(parameter.numel() for parameter in model.parameters())
    assert printed[0] == f"Trainable, {factors:,} of {of_all:,} parameters in 8 tensors:"
    attention = "  transformer.layers.*.attention"
    assert printed[1:] == [
        f"{attention}.query_key_value.matrix_A.*: 3 tensors [4, 64], layer 0",
        f"{attention}.query_key_value.matrix_B.*: 3 tensors [64, 4], layer 0",
        f"{attention}.dense.matrix_A.*: 1 tensor [4, 64], layer 0",
        f"{attention}.dense.matrix_B.*: 1 tensor [64, 4], layer 0",
    ]
    assert len(trainable(model)) == 8


def test_trainable_tensors_are_printed_by_the_first_process_only(build, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    build(**LORA)
    assert capsys.readouterr().out == ""


def test_adapters_sizes_are_declared_for_the_checkpoints_config():
    args = FineTuneVisualGLMModel.get_args()
    assert (args.use_lora, args.use_qlora, args.use_ptuning) == (False, False, False)
    assert (args.lora_rank, args.layer_range, args.pre_seq_len) == (10, None, 8)


def test_constructor_takes_parallel_output_as_the_2023_script_gave_it(upstream_config):
    args = FineTuneVisualGLMModel.get_args(**upstream_config, use_lora=True)
    model = FineTuneVisualGLMModel(args, transformer=None, parallel_output=True, params_dtype=torch.float32)
    assert isinstance(model.transformer.layers[0].attention.dense, LoraLinear)


def test_layers_below_the_lowest_adapted_one_build_no_gradient_graph(build):
    model = build(use_lora=True, layer_range=[1])
    model.freeze()
    needs_gradient = []
    for layer in model.transformer.layers:
        layer.mlp.register_forward_hook(lambda *args: needs_gradient.append(args[-1].requires_grad))
    model(input_ids=torch.tensor([[5, 6, 86, 89, 7, 90]]))
    assert needs_gradient == [False, True, True]
