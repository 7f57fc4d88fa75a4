"""The adapters' settings: from flags, from a checkpoint's config, back into one, and what stays when training goes on."""

from argparse import Namespace

import pytest

from model.adapter_config import ADAPTER_KEYS, AdapterConfig
from model.cli.options import parse

KEYS_OF_2023 = {
    "use_lora": True, "use_qlora": False, "use_ptuning": False, "lora_rank": 10, "layer_range": [0, 14], "pre_seq_len": 4,
}  # fmt: skip


def test_from_options_of_a_command_line_has_what_was_given() -> None:
    words = "--use_lora --lora_rank 4 --lora_alpha 8 --lora_target dense --layer_range 0 14 --train_parts vit=1e-5"
    assert AdapterConfig.from_options(parse(words.split())) == AdapterConfig(
        methods=("lora",), rank=4, alpha=8.0, layers=(0, 14), targets=("dense",), train_parts=("vit=1e-5",)
    )


def test_from_options_without_a_flag_has_the_parsers_defaults() -> None:
    assert AdapterConfig.from_options(parse([])) == AdapterConfig()


def test_from_options_of_a_2023_namespace_needs_none_of_the_newer_fields() -> None:
    assert AdapterConfig.from_options(Namespace(use_lora=True, lora_rank=7)) == AdapterConfig(methods=("lora",), rank=7)


def test_from_json_of_a_2023_config_has_the_released_alpha_and_targets() -> None:
    adapters = AdapterConfig.from_json(KEYS_OF_2023)
    assert (adapters.rank, adapters.alpha, adapters.layers, adapters.prefix_length) == (10, 1.0, (0, 14), 4)
    assert adapters.lora_targets == ("query_key_value", "dense")


def test_from_json_of_a_model_that_was_merged_as_in_2023_has_no_lora() -> None:
    for method in ("use_lora", "use_qlora"):
        assert (
            AdapterConfig.from_json({**KEYS_OF_2023, "use_lora": False, method: True, "layer_range": []}).methods == ()
        )


def test_empty_layer_range_of_options_and_of_our_own_checkpoints_is_all_layers() -> None:
    expected = AdapterConfig(methods=("lora",))
    assert AdapterConfig.from_options(Namespace(use_lora=True, layer_range=[])) == expected
    ours = {"use_lora": True, "layer_range": [], "finetuning": {"contents": "adapter"}}
    assert AdapterConfig.from_json(ours).lora_layers(3) == [0, 1, 2]


def test_from_json_of_a_base_models_config_has_no_method() -> None:
    assert AdapterConfig.from_json({"num_layers": 28}).methods == ()


@pytest.mark.parametrize("adapters", [
    AdapterConfig(),
    AdapterConfig(methods=("qlora", "ptuning"), rank=2, alpha=4.0, dropout=0.1, layers=(3, 1), targets=("dense",),
                  prefix_length=5, train_parts=("qformer=1e-5", "glm_proj")),
])  # fmt: skip
def test_to_json_has_all_keys_and_is_read_back_as_the_same(adapters: AdapterConfig) -> None:
    assert sorted(adapters.to_json()) == sorted(ADAPTER_KEYS)
    assert AdapterConfig.from_json(adapters.to_json()) == adapters


def test_layers_are_all_when_none_are_named() -> None:
    assert AdapterConfig().lora_layers(3) == [0, 1, 2]
    assert AdapterConfig(layers=()).lora_layers(3) == [0, 1, 2]
    assert AdapterConfig(layers=(2, 0)).lora_layers(3) == [2, 0]


def test_scale_is_alpha_over_rank() -> None:
    assert AdapterConfig(rank=4, alpha=8.0).scale == 2.0


def test_part_rates_are_none_where_a_part_has_no_rate_of_its_own() -> None:
    assert AdapterConfig(train_parts=("qformer=1e-5", "vit")).part_rates == {"qformer": 1e-5, "vit": None}


# going on from a checkpoint


def test_resumed_when_the_same_method_is_asked_for_has_the_checkpoints_sizes_and_trains_it() -> None:
    resumed = AdapterConfig(methods=("lora",), rank=3).resumed_from(KEYS_OF_2023)
    assert (resumed.methods, resumed.rank, resumed.layers) == (("lora",), 10, (0, 14))
    assert resumed.trained_tensor_names == ("matrix_A", "matrix_B")


def test_resumed_when_another_method_is_asked_for_keeps_the_first_and_trains_the_other_alone() -> None:
    resumed = AdapterConfig(methods=("ptuning",), prefix_length=6).resumed_from(KEYS_OF_2023)
    assert (resumed.methods, resumed.resumed_methods) == (("lora", "ptuning"), ("lora",))
    assert (resumed.rank, resumed.prefix_length) == (10, 6)
    assert resumed.trained_tensor_names == ("ptuning",)


def test_resumed_when_nothing_is_asked_for_trains_the_checkpoints_methods() -> None:
    resumed = AdapterConfig().resumed_from(KEYS_OF_2023)
    assert (resumed.methods, resumed.resumed_methods) == (("lora",), ())


def test_resumed_when_qlora_is_asked_for_over_lora_has_the_factors_over_4_bits() -> None:
    assert AdapterConfig(methods=("qlora",)).resumed_from(KEYS_OF_2023).methods == ("qlora",)


def test_resumed_from_a_2023_checkpoint_has_its_alpha_and_targets_whatever_is_asked_for() -> None:
    resumed = AdapterConfig(methods=("lora",), alpha=9.0, targets=("dense",)).resumed_from(KEYS_OF_2023)
    assert (resumed.alpha, resumed.targets) == (1.0, None)


def test_resumed_when_the_config_lacks_a_size_has_what_was_asked_for() -> None:
    assert AdapterConfig(methods=("lora",), rank=3).resumed_from({"use_lora": True}).rank == 3


def test_resumed_from_a_model_that_was_merged_as_in_2023_begins_an_adapter_in_all_layers() -> None:
    resumed = AdapterConfig(methods=("lora",), rank=3).resumed_from({**KEYS_OF_2023, "layer_range": []})
    assert (resumed.methods, resumed.rank, resumed.layers) == (("lora",), 3, None)


def test_resumed_has_the_dropout_and_the_parts_that_are_asked_for() -> None:
    stored = AdapterConfig(methods=("lora",), dropout=0.5, train_parts=("vit",)).to_json()
    resumed = AdapterConfig(methods=("lora",), dropout=0.1, train_parts=("qformer",)).resumed_from(stored)
    assert (resumed.dropout, resumed.train_parts) == (0.1, ("qformer",))


def test_differing_keys_leave_the_order_of_layers_and_targets_out() -> None:
    one = AdapterConfig(rank=4, layers=(0, 2), targets=("dense", "query_key_value"))
    assert one.differing_keys(AdapterConfig(rank=5, layers=(2, 0))) == ["lora_rank"]
