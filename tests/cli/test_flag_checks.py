"""Checks that need no model: each problem is a sentence with where, what was found and what is needed."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from model.cli import flag_checks
from model.cli.flag_checks import (
    _image_size_problems,
    config_problems,
    deepspeed_problems,
    deepspeed_words,
    flag_problems,
    overridden_by_config,
    overridden_by_deepspeed,
    split_row_problems,
    split_shares,
)
from model.cli.options import Options, parse

CONFIG = {
    "num_layers": 28,
    "layernorm_order": "post",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "vocab_size": 130528,
    "max_sequence_length": 2048,
    "image_length": 32,
    "eva_args": {"num_layers": 39, "hidden_size": 1408, "num_attention_heads": 16},
    "qformer_args": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 32},
    "bos_token_id": 130004,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
}

pytestmark = pytest.mark.usefixtures("no_launcher")


def good(*words: str) -> Options:
    """A command line without a problem, and more words after it."""
    return parse(["--use_lora", "--train-data", "rows.json", *words])


def problem(*words: str) -> str:
    """The one problem that these words make of a good command line."""
    [sentence] = flag_problems(good(*words))
    return sentence


# --- the command line alone -------------------------------------------------------------------------------------------


def test_flag_problems_when_all_is_well_is_empty() -> None:
    assert flag_problems(good()) == []


def test_flag_problems_when_no_method_is_given_names_the_three() -> None:
    options = parse(["--train-data", "rows.json", "--split", "1"])
    assert flag_problems(options) == ["No method: --use_lora, --use_qlora or --use_ptuning is needed."]


def test_flag_problems_when_lora_and_ptuning_are_combined_is_empty() -> None:
    assert flag_problems(good("--use_ptuning")) == []


def test_flag_problems_when_several_things_are_wrong_lists_all() -> None:
    assert len(flag_problems(good("--fp16", "--bf16", "--lr", "0", "--warmup", "2"))) == 3


@pytest.mark.parametrize(("words", "parts"), [
    (["--fp16", "--bf16"], ["--fp16 and --bf16", "one is needed"]),
    (["--train-iters", "5", "--epochs", "1"], ["--train-iters and --epochs", "one is needed"]),
    (["--mode", "inference"], ["--mode inference", "this script trains", "--mode finetune"]),
    (["--lora_rank", "0"], ["--lora_rank 0: 1 or more is needed."]),
    (["--pre_seq_len", "0"], ["--pre_seq_len 0: 1 or more is needed."]),
    (["--max_source_length", "0"], ["--max_source_length 0: 1 or more is needed."]),
    (["--batch-size", "0"], ["--batch-size 0: 1 or more is needed."]),
    (["--eval-batch-size", "-1"], ["--eval-batch-size -1: 1 or more is needed."]),
    (["--gradient-accumulation-steps", "0"], ["--gradient-accumulation-steps 0: 1 or more is needed."]),
    (["--eval-interval", "0"], ["--eval-interval 0: 1 or more is needed."]),
    (["--checkpoint-num-layers", "0"], ["--checkpoint-num-layers 0: 1 or more is needed."]),
    (["--make-vocab-size-divisible-by", "0"], ["--make-vocab-size-divisible-by 0: 1 or more is needed."]),
    (["--checkpoint-skip-layers", "-1"], ["--checkpoint-skip-layers -1: 0 or more is needed."]),
    (["--save-interval", "0"], ["--save-interval 0: 1 or more is needed."]),
    (["--save_total_limit", "0"], ["--save_total_limit 0: 1 or more is needed."]),
    (["--experiment-name", "../x"], ["--experiment-name ../x: it leads out of --save", "is needed"]),
    (["--experiment-name", "a/../../x"], ["--experiment-name a/../../x: it leads out of --save"]),
    (["--experiment-name", "a/" + "猫" * 79], ["--experiment-name a/猫猫", "237 bytes found; 230 at most are needed."]),
    (["--experiment-name", "/x"], ["--experiment-name /x: it leads out of --save"]),
    (["--log-interval", "0"], ["--log-interval 0: 1 or more is needed."]),
    (["--max_skipped_steps", "0"], ["--max_skipped_steps 0: 1 or more is needed."]),
    (["--rank_timeout", "-1"], ["--rank_timeout -1.0: 0 or more is needed."]),
    (["--train-iters", "0"], ["--train-iters 0: 1 or more is needed."]),
    (["--auto_warmup_steps", "-1"], ["--auto_warmup_steps -1: 0 or more is needed."]),
    (["--lr", "0"], ["--lr 0.0: a number greater than 0 is needed."]),
    (["--lr", "nan"], ["--lr nan: a number greater than 0 is needed."]),
    (["--lr-decay-ratio", "0"], ["--lr-decay-ratio 0.0: a number greater than 0 is needed."]),
    (["--weight-decay", "inf"], ["--weight-decay inf: a finite number of 0 or more is needed."]),
    (["--weight-decay", "-1"], ["--weight-decay -1.0: a finite number of 0 or more is needed."]),
    (["--warmup", "2"], ["--warmup 2.0: a number from 0 to 1 is needed."]),
    (["--seed", "0"], ["--seed 0: a whole number from 1 to 4294967295 is needed."]),
    (["--train-data-weights", "1", "2"], ["--train-data-weights 1 2: 2 found for 1 files", "one for each file"]),
    (["--train-data-weights", "0"], ["--train-data-weights 0", "1 or more"]),
    (["--iterable-dataset"], ["--iterable-dataset", "webdataset shards", "left out"]),
    (["--iterable-dataset-eval", "True"], ["--iterable-dataset-eval", "webdataset shards"]),
    (["--split", "8,one"], ["--split 8,one", "as in 8,1,1"]),
    (["--split", "0,1"], ["--split 0,1", "the first above 0"]),
    (["--split", "9,1", "--epochs", "2"], ["--split 9,1", "--epochs", "--split 1 is needed"]),
    (["--valid-data"], ["--valid-data: no file given"]),
    (["--device", "1"], ["--device 1", "GPU 0 only", "CUDA_VISIBLE_DEVICES=1"]),
    (["--model-parallel-size", "2"], ["--model-parallel-size 2: 1 process found", "a multiple of 2", "--num_gpus", "nproc-per-node."]),
    (["--model-parallel-size", "2", "--resume", "run"], ["1 process found", "or --model-parallel-size 1, with which"]),
])  # fmt: skip
def test_flag_problems_when_one_thing_is_wrong_says_where_what_and_what_is_needed(
    words: list[str], parts: list[str]
) -> None:
    sentence = problem(*words)
    for part in parts:
        assert part in sentence


def test_flag_problems_when_lora_meets_qlora_needs_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flag_checks, "_is_installed", lambda package: True)
    assert "--use_lora and --use_qlora: only one is needed" in problem("--use_qlora")


@pytest.mark.parametrize(("words", "package"), [
    (["--use_qlora"], "bitsandbytes"),
    (["--use_lora", "--wandb"], "wandb"),
])  # fmt: skip
def test_flag_problems_when_a_package_is_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, words: list[str], package: str
) -> None:
    monkeypatch.setattr(flag_checks, "_is_installed", lambda package: False)
    [sentence] = flag_problems(parse([*words, "--train-data", "rows.json", "--split", "1"]))
    assert f"pip install {package} is needed" in sentence


def test_is_installed_when_the_package_exists_is_true() -> None:
    assert flag_checks._is_installed("pytest")


def test_is_installed_when_only_a_placeholder_stands_in_sys_modules_is_false(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "no_such_package", type(sys)("no_such_package"))
    assert not flag_checks._is_installed("no_such_package")


def test_flag_problems_when_train_data_is_missing_needs_a_file() -> None:
    [sentence] = flag_problems(parse(["--use_lora", "--split", "1"]))
    assert sentence == "--train-data: no file given; a JSON file with rows to learn is needed."


def test_flag_problems_when_device_is_this_process_local_rank_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert flag_problems(good("--device", "1")) == []


def test_flag_problems_when_load_has_no_latest_names_it(tmp_path: Path) -> None:
    assert f'--load {tmp_path}: no "latest" in {tmp_path}' in problem("--load", str(tmp_path))


def test_flag_problems_when_load_is_not_there_says_so(tmp_path: Path) -> None:
    assert "is not there; a checkpoint folder is needed." in problem("--load", str(tmp_path / "none"))


def test_flag_problems_when_load_is_an_iteration_says_that_the_folder_above_is_needed(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12/mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("14")
    assert problem("--load", str(tmp_path / "12")).endswith(
        f"it is one iteration of {tmp_path}; that folder is needed, and its latest iteration is loaded. --from_pretrained "
        "takes any iteration."
    )


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "shares"), [
    (["--split", "1"], [1, 0, 0]),
    (["--split", "8,1,1"], [0.8, 0.1, 0.1]),
    (["--split", "3/1"], [0.75, 0.25, 0]),
    (["--split", "0.75"], [0.75, 0.25, 0]),
    (["--split", "8,2,1", "--test-data", "t.json"], [0.8, 0.2, 0]),
    (["--split", "8,1,1", "--valid-data", "v.json", "--test-data", "t.json"], [1, 0, 0]),
])  # fmt: skip
def test_split_shares_are_those_sat_takes(words: list[str], shares: list[float]) -> None:
    assert split_shares(good(*words)) == pytest.approx(shares)


def test_split_row_problems_when_a_file_is_shorter_than_a_block_names_it() -> None:
    [sentence] = split_row_problems(good("--split", "9,1", "--eval-interval", "5"), {"a.json": 20, "b.json": 10000})
    assert sentence.startswith("a.json: 20 rows found; --split 9,1 needs --block-size 10000")
    assert "--block-size 20 is needed" in sentence


def test_split_row_problems_when_nothing_is_held_out_is_empty() -> None:
    assert split_row_problems(good(), {"a.json": 1}) == []


# --- the checkpoint's config ------------------------------------------------------------------------------------------


def test_config_problems_when_all_is_well_is_empty() -> None:
    assert config_problems(good("--layer_range", "0", "27"), CONFIG) == []
    width = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    assert config_problems(good("--hidden-size-per-attention-head", str(width)), CONFIG) == []


def test_config_problems_when_keys_are_missing_names_them_and_the_file() -> None:
    config = {key: value for key, value in CONFIG.items() if key not in ("eva_args", "pad_token_id")}
    [sentence] = config_problems(good(), config)
    assert sentence.startswith(
        'visualglm-6b/model_config.json: no "eva_args", "pad_token_id"; a VisualGLM checkpoint has'
    )


@pytest.mark.parametrize(("key", "value", "needed"), [
    ("num_layers", "28", 'model_config.json: "num_layers" is "28"; a whole number is needed.'),
    ("eva_args", [], 'model_config.json: "eva_args" is []; an object {…} is needed.'),
])  # fmt: skip
def test_config_problems_when_a_key_has_the_wrong_type_says_which(key: str, value: object, needed: str) -> None:
    [sentence] = config_problems(good(), {**CONFIG, key: value})
    assert needed in sentence


@pytest.mark.parametrize(("words", "sentence"), [
    (["--layer_range", "0", "28"],
     "--layer_range 0 28: no layer 28 in this checkpoint; layers from 0 to 27 are needed."),
    (["--layer_range", "-1"], "--layer_range -1: no layer -1 in this checkpoint; layers from 0 to 27 are needed."),
    (["--checkpoint-num-layers", "20", "--checkpoint-skip-layers", "9"],
     "--checkpoint-num-layers 20 and --checkpoint-skip-layers 9: 28 layers found in this checkpoint; "
     "together no more than 28 are needed."),
    (["--num-multi-query-heads", "2"],
     "--num-multi-query-heads 2: a ChatGLM's layers have another shape; the flag is needed left out."),
    (["--is-gated-mlp"], "--is-gated-mlp: a ChatGLM's layers have another shape; the flag is needed left out."),
    (["--layer_range", "3", "3"], "--layer_range 3 3: 3 found twice; each layer is needed once."),
    (["--max_source_length", "1800"],
     "--max_source_length 1800 and --max_target_length 256: 2056 tokens together; "
     "this checkpoint takes 2048 (max_sequence_length), so less is needed."),
    (["--max_source_length", "32"],
     "--max_source_length 32: the picture alone takes 32 tokens; more is needed for the question."),
])  # fmt: skip
def test_config_problems_when_a_flag_does_not_fit_the_model_says_why(words: list[str], sentence: str) -> None:
    assert config_problems(good(*words), CONFIG) == [sentence]


def test_config_problems_when_the_layer_norms_are_elsewhere_says_so() -> None:
    [sentence] = config_problems(good(), CONFIG | {"layernorm_order": "pre"})
    assert sentence.endswith('"layernorm_order" is "pre"; a ChatGLM has "post".')


@pytest.mark.parametrize(("words", "sentences"), [
    (["--num-layers", "12"], ["--num-layers 12 is overridden by 28 from visualglm-6b/model_config.json."]),
    (["--num-layers", "28"], []),
    ([], []),
    (["--model-parallel-size", "2"], []),
    (["--layer_range", "0"], []),  # the method's sizes: see test_metadata.py
])  # fmt: skip
def test_overridden_by_config_names_the_users_flags_that_differ(words: list[str], sentences: list[str]) -> None:
    assert overridden_by_config(good(*words), {**CONFIG, "model_parallel_size": 1, "layer_range": [0, 14]}) == sentences


# --- DeepSpeed's settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "settings", "sentences"), [
    (["--lr", "1e-4"], {"optimizer": {"params": {"lr": 0.5}}},
     ["--lr 0.0001 is overridden by 0.5 from ds.json (optimizer.params.lr)."]),
    (["--weight-decay", "0"], {"optimizer": {"params": {"weight_decay": 0.1}}},
     ["--weight-decay 0.0 is overridden by 0.1 from ds.json (optimizer.params.weight_decay)."]),
    (["--batch-size", "4"], {"train_micro_batch_size_per_gpu": 8},
     ["--batch-size 4 is overridden by 8 from ds.json (train_micro_batch_size_per_gpu)."]),
    (["--gradient-accumulation-steps", "2"], {"gradient_accumulation_steps": 1},
     ["--gradient-accumulation-steps 2 is overridden by 1 from ds.json (gradient_accumulation_steps)."]),
    (["--fp16"], {}, ["--fp16 is overridden by false from ds.json (fp16.enabled)."]),
    (["--bf16"], {"bf16": {"enabled": False}}, ["--bf16 is overridden by false from ds.json (bf16.enabled)."]),
    (["--zero-stage", "1"], {}, ["--zero-stage 1 is overridden by 0 from ds.json (zero_optimization.stage)."]),
    (["--batch-size", "4"], {"train_micro_batch_size_per_gpu": "auto"}, []),
    (["--lr", "0.5"], {"optimizer": {"params": {"lr": 0.5}}}, []),
    ([], {"train_micro_batch_size_per_gpu": 8}, []),
])  # fmt: skip
def test_overridden_by_deepspeed_names_the_users_flags_that_differ(
    words: list[str], settings: dict[str, Any], sentences: list[str]
) -> None:
    assert overridden_by_deepspeed(good(*words), settings, "ds.json") == sentences


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled; only one is needed."),
    ({"fp16": True}, '"fp16" is true; an object {…} is needed.'),
    ({"bf16": {}}, 'no "enabled" in "bf16"; true or false is needed.'),
    ({"zero_optimisation": {"stage": 2}}, 'DeepSpeed has no setting "zero_optimisation"; did you mean "zero_optimization"?'),
    ({"foo": 1, "_comment": "mine"}, 'DeepSpeed has no setting "foo"; it is needed without.'),
])  # fmt: skip
def test_deepspeed_problems_when_sat_cannot_use_the_settings_says_why(settings: dict[str, Any], sentence: str) -> None:
    assert deepspeed_problems(good(), settings, "ds.json") == [f"ds.json: {sentence}"]


def test_deepspeed_problems_when_all_is_well_is_empty() -> None:
    remarks = {"comment": "for the big machine", "//": "mine", "_note": "yours"}
    settings = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}, **remarks}
    assert deepspeed_problems(good(), settings, "ds.json") == []


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_key_of_sats_own_deepspeed_files_is_known(stage: int) -> None:
    folder = Path(importlib.util.find_spec("sat").submodule_search_locations[0])
    assert json.loads((folder / f"training/deepspeed_zero{stage}.json").read_text()).keys() <= deepspeed_words()


def test_muon_is_refused_for_prefixes_and_taken_for_lora() -> None:
    settings = {"optimizer": {"type": "Muon"}}
    assert deepspeed_problems(good(), settings, "ds.json") == []
    [sentence] = deepspeed_problems(good("--use_ptuning"), settings, "ds.json")
    assert sentence.startswith("--use_ptuning and Muon in ds.json: ")


# --- data flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--holdout", "0"), "--holdout 0: a number greater than 0 is needed."),
        (("--holdout", "2.5"), "--holdout 2.5: a whole number of rows is needed, or a share below 1."),
        (("--holdout", "2", "--valid-data", "v.json"), "--holdout and --valid-data: both say what to evaluate on"),
        (("--holdout", "2", "--split", "8,2"), "--holdout and --split 8,2: both hold rows out"),
        (("--keep_best", "--save", "x"), "--keep_best: nothing to evaluate on"),
        (("--keep_best", "--holdout", "2", "--save", "none"), "--keep_best: no --save"),
        (
            ("--eval_answers", "2", "--holdout", "2", "--zero-stage", "3"),
            "--eval_answers 2: ZeRO 3 keeps a part of the model on each process",
        ),
        (
            ("--keep_best", "exact", "--holdout", "2"),
            "--keep_best exact: no rows are answered; --eval_answers N is needed.",
        ),
        (("--keep_best", "--save", "x", "--split", "1"), "--keep_best: nothing to evaluate on"),
        (("--early_stopping", "3"), "--early_stopping: nothing to evaluate on"),
        (("--early_stopping", "0", "--holdout", "2"), "--early_stopping 0: 1 or more is needed."),
        (("--eval_answers", "4"), "--eval_answers: nothing to evaluate on"),
        (("--find_lr", "--resume", "auto"), "--find_lr and --resume"),
        (("--find_lr", "--exit-interval", "5"), "--find_lr and --exit-interval 5"),
        (("--check_seconds", "-1"), "--check_seconds -1.0: a number of 0 or more is needed"),
        (("--max_source_length", "0"), "--max_source_length 0: 1 or more is needed."),
        (("--image_size", "0"), "--image_size 0: 1 or more is needed."),
    ],
)
def test_data_flags_that_cannot_be_are_refused(words: tuple[str, ...], found: str) -> None:
    assert problem(*words).startswith(found)


@pytest.mark.parametrize("words", [("--max_source_length", "auto"), ("--check_seconds", "inf"), ("--holdout", "0.1")])
def test_data_flags_that_can_be_are_taken(words: tuple[str, ...]) -> None:
    assert flag_problems(good(*words)) == []


def test_auto_lengths_are_no_problem_for_the_checkpoint() -> None:
    assert config_problems(good("--max_source_length", "auto", "--max_target_length", "auto"), CONFIG) == []


def test_image_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    assert _image_size_problems(good("--image_size", "336"), {"patch_size": 14}) == []
    [sentence] = _image_size_problems(good("--image_size", "300"), {"patch_size": 14})
    assert sentence == "--image_size 300: the vision tower reads patches of 14 pixels; a multiple is needed."


def test_share_of_split_is_something_to_evaluate_on() -> None:
    words = ("--split", "8,2", "--save", "x", "--keep_best", "exact", "--eval_answers", "2", "--early_stopping", "3")
    assert flag_problems(good(*words)) == []
