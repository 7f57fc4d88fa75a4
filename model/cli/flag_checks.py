"""What is wrong with a command line: by itself, against the checkpoint it names, and against its DeepSpeed file.

A function named …_problems returns sentences: where, what was found, what is needed; an empty list when all is well.
"""

import difflib
import functools
import importlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model.adapter_config import ADAPTER_KEYS, VISION_PARTS, AdapterConfig
from model.checkpoints.config_types import (
    AMOUNT,
    BETAS,
    COUNT,
    OBJECT,
    RATE,
    TEXT,
    TRUTH,
    WHOLE,
    Kind,
    model_problems,
    or_auto,
    problems_of_kind,
)
from model.checkpoints.layout import NOT_UNICODE, EvaArgs, ModelConfig, checkpoint_problem, split_problems
from model.checkpoints.sizes import folder_problems
from model.checkpoints.whole import CONFIG_FILE
from model.cli.options import Options, flag_names, flag_with_value, shown
from model.cli.sat_flags import LARGEST_SEED
from model.data.prompt import LEAST_TARGET_LENGTH, least_source_length
from model.data.tokenizer import ChatGLMTokenizer
from model.distributed import world_size
from model.progress import count_of, is_unicode

MOST_OF_NAME = 230  # bytes of 255 that a file's name may have: the run's time follows, or -find_lr.png.unfinished
SMALLEST_SHARE = 1e-6  # of --split; smaller ones come from rounding

# Bounds of numbers: what holds for a good one, how that is said, and for which flags.
_BOUNDS: tuple[tuple[Callable[[float], bool], str, tuple[str, ...]], ...] = (
    (
        lambda number: number >= 1,
        "1 or more is needed.",
        ("lora_rank", "pre_seq_len", "image_length", "max_source_length", "max_target_length", "train_iters", "epochs",
         "batch_size", "gradient_accumulation_steps", "eval_batch_size", "eval_iters", "eval_interval", "save_interval",
         "save_total_limit", "log_interval", "lr_decay_iters", "model_parallel_size", "block_size", "prefetch_factor", "image_size",
         "max_skipped_steps", "early_stopping", "checkpoint_num_layers", "make_vocab_size_divisible_by"),
    ),
    (
        lambda number: number >= 0,
        "0 or more is needed.",
        ("auto_warmup_steps", "num_workers", "rank_timeout", "answers", "eval_answers", "checkpoint_skip_layers"),
    ),
    (
        lambda number: 0 <= number < math.inf,
        "a finite number of 0 or more is needed.",
        ("weight_decay",),
    ),
    (
        lambda number: 0 < number < math.inf,
        "a number greater than 0 is needed.",
        ("lr", "lr_decay_ratio", "lora_alpha", "holdout"),
    ),
    (
        lambda number: number >= 0,
        "a number of 0 or more is needed, or inf.",
        ("check_seconds",),
    ),
    (
        lambda number: 0 <= number <= 1,
        "a number from 0 to 1 is needed.",
        ("warmup", "hidden_dropout", "attention_dropout", "drop_path"),
    ),
    (
        lambda number: 0 <= number < 1,
        "a number from 0 to less than 1 is needed.",
        ("lora_dropout",),
    ),
    (
        lambda number: 1 <= number <= LARGEST_SEED,
        f"a whole number from 1 to {LARGEST_SEED} is needed.",
        ("seed",),
    ),
)  # fmt: skip
NOT_WITH_ZERO_3 = (
    "ZeRO 3 keeps a part of the model on each process, and would send all of it anew for each token of an answer; "
    "--zero-stage 2 or less is needed, or no --eval_answers."
)
# Which setting replaces which flag, and its value where the file is silent (None: the flag's own).
_DEEPSPEED_SETTINGS: Mapping[str, tuple[str, object]] = {
    "fp16": ("fp16.enabled", False),
    "bf16": ("bf16.enabled", False),
    "batch_size": ("train_micro_batch_size_per_gpu", None),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", None),
    "lr": ("optimizer.params.lr", None),
    "weight_decay": ("optimizer.params.weight_decay", None),
    "zero_stage": ("zero_optimization.stage", 0),
}


# --- the command line by itself ---------------------------------------------------------------------------------------


def flag_problems(options: Options) -> list[str]:
    """What is wrong with the flags by themselves: no method, conflicts, numbers out of bounds, what SAT can't do."""
    return [
        *_choice_problems(options),
        *_number_problems(options),
        *_data_flag_problems(options),
        *_machine_problems(options),
    ]


def _choice_problems(options: Options) -> list[str]:
    problems = []
    if not (options.use_lora or options.use_qlora or options.use_ptuning):
        problems.append("No method: --use_lora, --use_qlora or --use_ptuning is needed.")
    if options.use_lora and options.use_qlora:
        problems.append("--use_lora and --use_qlora: only one is needed; QLoRA is LoRA over 4-bit weights.")
    if len(AdapterConfig.from_options(options).part_rates) < len(options.train_parts):
        problems.append(
            f"--train_parts {shown(options.train_parts)}: each of {', '.join(VISION_PARTS)} is needed once."
        )
    if options.train_iters is not None and options.epochs is not None:
        problems.append("--train-iters and --epochs: both say how long to train; only one is needed.")
    if options.fp16 and options.bf16:
        problems.append("--fp16 and --bf16: only one is needed.")
    if options.auto_batch_size and options.deepspeed_config:
        problems.append(
            "--batch-size auto and --deepspeed_config: both say how many rows a batch has; only one is needed."
        )
    if options.mode == "inference":
        problems.append("--mode inference: this script trains; --mode finetune is needed.")
    return problems


def _number_problems(options: Options) -> list[str]:
    problems = []
    for holds, needed, names in _BOUNDS:
        for name in names:
            number = getattr(options, name)
            if number is not None and not holds(number):
                problems.append(f"{flag_names()[name]} {number}: {needed}")
    return problems


def _data_flag_problems(options: Options) -> list[str]:
    problems = []
    if not options.train_data and options.mode != "inference":
        problems.append("--train-data: no file given; a JSON file with rows to learn is needed.")
    problems += _weights_problems(options.train_data_weights, options.train_data)
    if options.iterable_dataset is not False or options.iterable_dataset_eval == "True":
        flag = "--iterable-dataset" if options.iterable_dataset is not False else "--iterable-dataset-eval"
        problems.append(f"{flag}: SAT reads webdataset shards with it; rows in JSON files need it left out.")
    for flag, files in (("--valid-data", options.valid_data), ("--test-data", options.test_data)):
        if files == []:
            problems.append(f"{flag}: no file given; a JSON file with rows is needed, or no {flag}.")
    if options.holdout is not None:
        problems += _holdout_problems(options, options.holdout)
    problems += _evaluation_problems(options)
    problems += _name_problems(options)
    if options.train_data:
        problems += _split_problems(options)
    return problems


def _name_problems(options: Options) -> list[str]:
    problems = []
    if not _is_below(options.experiment_name):
        problems.append(
            f"--experiment-name {shown(options.experiment_name)}: it leads out of --save; a name without .. and without / at "
            "its start is needed."
        )
    longest = max(len(part.encode(errors="replace")) for part in options.experiment_name.split("/"))
    if longest > MOST_OF_NAME:
        problems.append(
            f"--experiment-name {shown(options.experiment_name)}: {longest} bytes found; {MOST_OF_NAME} at most are "
            "needed."
        )
    for name, value in (("save", options.save), ("experiment_name", options.experiment_name)):
        if value and not is_unicode(value):
            problems.append(f"{flag_with_value(name, value)}: {NOT_UNICODE}")
    return problems


def _evaluation_problems(options: Options) -> list[str]:
    problems = []
    if options.find_lr and options.exit_interval:
        problems.append(
            f"--find_lr and --exit-interval {options.exit_interval}: the rate is known after the last step; only one is "
            "needed."
        )
    if options.find_lr and (options.resume or options.load):
        flag = "--resume" if options.resume else "--load"
        problems.append(f"--find_lr and {flag}: a rate is looked for from the start; --find_lr is needed without it.")
    if not (options.valid_data or options.holdout is not None or _split_evaluates(options)):
        problems += [
            f"{flag_names()[name]}: nothing to evaluate on; --holdout or --valid-data is needed."
            for name in ("keep_best", "early_stopping", "eval_answers")
            if getattr(options, name)
        ]
    if options.keep_best not in (None, "loss") and not options.eval_answers:
        problems.append(f"--keep_best {options.keep_best}: no rows are answered; --eval_answers N is needed.")
    if options.eval_answers and options.zero_stage == 3:
        problems.append(f"--eval_answers {options.eval_answers}: {NOT_WITH_ZERO_3}")
    if options.keep_best and options.save is None:
        problems.append("--keep_best: no --save; a folder for the checkpoint is needed.")
    return problems


def _split_evaluates(options: Options) -> bool:
    try:
        return split_shares(options)[1] > 0
    except ValueError:  # which `_split_problems` tells
        return True


def _is_below(name: str) -> bool:
    """Whether a folder of this name, with the time behind it, lies below the one that it is put into."""
    top = os.path.join(os.sep, "save")
    return os.path.normpath(os.path.join(top, f"{name}-")).startswith(top + os.sep)


def _weights_problems(weights: Sequence[int] | None, files: Sequence[str] | None) -> list[str]:
    problems = []
    if weights is not None and files and len(weights) != len(files):
        problems.append(
            f"--train-data-weights {shown(weights)}: {len(weights)} found for {len(files)} files in --train-data; one for "
            "each file is needed."
        )
    if weights is not None and (min(weights) < 0 or max(weights) < 1):
        problems.append(f"--train-data-weights {shown(weights)}: whole numbers of 1 or more are needed.")
    return problems


def _holdout_problems(options: Options, holdout: float) -> list[str]:
    problems = []
    if holdout >= 1 and holdout % 1:
        problems.append(f"--holdout {holdout}: a whole number of rows is needed, or a share below 1.")
    if options.valid_data:
        problems.append("--holdout and --valid-data: both say what to evaluate on; only one is needed.")
    if options.split != "1":
        problems.append(f"--holdout and --split {options.split}: both hold rows out; only one is needed.")
    return problems


def split_shares(options: Options) -> list[float]:
    """The shares of --train-data for training, evaluation and test, adding up to 1, as SAT reads --split.

    What is missing to 1 after a single share is evaluated on, and after two it is the test's; a fourth share is dropped, and a
    share whose rows come from --valid-data or --test-data is 0 (SAT's `get_split`).

    Raises:
        ValueError: --split isn't numbers of 0 or more with a training share above 0.
    """
    training, evaluation, test = [*_typed_shares(options), 0.0, 0.0][:3]
    evaluation = evaluation if options.valid_data is None else 0.0
    test = test if options.test_data is None else 0.0
    total = training + evaluation + test
    return [training / total, evaluation / total, test / total]


def _typed_shares(options: Options) -> list[float]:
    """The numbers of --split, and what is missing to 1.

    Raises:
        ValueError: as `split_shares`.
    """
    shares = [float(share) for share in options.split.split("," if "," in options.split else "/")]
    if not all(0 <= share < math.inf for share in shares) or shares[0] == 0:
        raise ValueError(options.split)
    if sum(shares) < 1:
        shares.append(1 - sum(shares))
    return shares


def split_notes(options: Options) -> list[str]:
    """What becomes of the rows where --split names more than three shares, or three of less than 1."""
    dropped = sum(_typed_shares(options)[3:])
    if dropped < SMALLEST_SHARE:  # what 0.7,0.2,0.1 lack of 1 is no share
        return []
    training, evaluation, test = split_shares(options)
    return [
        f"--split {options.split}: a fourth share of {dropped:.3g} is not used; of the rows, {training:.1%} are trained on, "
        f"{evaluation:.1%} evaluated on and {test:.1%} tested on."
    ]


def _split_problems(options: Options) -> list[str]:
    try:
        shares = split_shares(options)
    except ValueError:
        return [f"--split {options.split}: shares of 0 or more are needed, as in 8,1,1, the first above 0."]
    if shares[0] == 1:
        return []
    if options.epochs is not None:
        return [
            f"--split {options.split} holds rows out of --train-data, which SAT can't do with --epochs; --split 1 is "
            "needed, or --train-iters."
        ]
    return []


def split_row_problems(options: Options, row_counts: Mapping[str, int]) -> list[str]:
    """Which files have too few rows for --split, which deals out --block-size rows at a time.

    Args:
        row_counts: rows of each file in --train-data that can be used, each turn counted.
    """
    if split_shares(options)[0] == 1:
        return []
    return [
        f"{path}: {rows} rows found; --split {options.split} needs --block-size {options.block_size} of them or more: "
        f"--block-size {rows} is needed, or --split 1 to train on every row."
        for path, rows in row_counts.items()
        if rows < options.block_size
    ]


def _machine_problems(options: Options) -> list[str]:
    problems = []
    if options.wandb and not _is_installed("wandb"):
        problems.append("--wandb: the package wandb is not installed; pip install wandb is needed.")
    if options.use_qlora and not _is_installed("bitsandbytes"):
        problems.append("--use_qlora: the package bitsandbytes is not installed; pip install bitsandbytes is needed.")
    local_rank = options.local_rank if options.local_rank is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if options.device not in (-1, local_rank):
        problems.append(
            f"--device {options.device}: process {local_rank} can train on GPU {local_rank} only; "
            f"CUDA_VISIBLE_DEVICES={options.device} in place of --device is needed."
        )
    processes = world_size()
    if options.model_parallel_size > 1 and processes % options.model_parallel_size:
        or_whole = ", or --model-parallel-size 1, with which the run goes on as well" if options.resume else ""
        problems.append(
            f"--model-parallel-size {options.model_parallel_size}: {count_of(processes, 'process', 'processes')} found; a multiple of "
            f"{options.model_parallel_size} is needed: deepspeed's flag is --num_gpus, torchrun's --nproc-per-node{or_whole}."
        )
    if options.load is not None:
        problem = checkpoint_problem(Path(options.load).expanduser(), ("latest",))
        if problem:
            problems.append(f"--load {options.load}: {problem}")
    return problems


def _is_installed(package: str) -> bool:
    # Not importlib.util.find_spec: that looks at sys.modules first, where a placeholder may stand.
    return importlib.machinery.PathFinder.find_spec(package) is not None


# --- the command line against the checkpoint's config -----------------------------------------------------------------


def config_problems(options: Options, config: ModelConfig) -> list[str]:
    """What is wrong with a checkpoint's config, or with the flags once it is known.

    Args:
        config: what the checkpoint's `model_config.json` holds.
    """
    return model_problems(config, str(_config_path(options))) or [
        *going_on_problems(options, config),
        *_layer_problems(options.layer_range or [], config["num_layers"]),
        *_stretch_problems(options, config["num_layers"]),
        *_shape_problems(options, config),
        *_length_problems(options, config),
        *_image_size_problems(options, config["eva_args"]),
        *split_problems(options.model_parallel_size, config),
    ]


def _config_path(options: Options) -> Path:
    """The config as the user knows it: beside the name or folder that was given."""
    return Path(options.from_pretrained, CONFIG_FILE)


def _layer_problems(layers: list[int], num_layers: int) -> list[str]:
    problems = []
    outside = sorted({layer for layer in layers if not 0 <= layer < num_layers})
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if outside:
        problems.append(
            f"--layer_range {shown(layers)}: no layer {shown(outside)} in this checkpoint; "
            f"layers from 0 to {num_layers - 1} are needed."
        )
    if twice:
        problems.append(f"--layer_range {shown(layers)}: {shown(twice)} found twice; each layer is needed once.")
    return problems


def _stretch_problems(options: Options, num_layers: int) -> list[str]:
    """SAT asserts this also where no activations are checkpointed."""
    stretch, skipped = options.checkpoint_num_layers, options.checkpoint_skip_layers
    if stretch + skipped <= num_layers:
        return []
    return [
        f"--checkpoint-num-layers {stretch} and --checkpoint-skip-layers {skipped}: {num_layers} layers found in this "
        f"checkpoint; together no more than {num_layers} are needed."
    ]


def _shape_problems(options: Options, config: ModelConfig) -> list[str]:
    """Which of SAT's flags would build layers that no ChatGLM has, where the config says nothing of them."""
    of_chatglm = {
        "num_multi_query_heads": (0,),
        "is_gated_mlp": (False,),
        "hidden_size_per_attention_head": (None, config["hidden_size"] // max(1, config["num_attention_heads"])),
    }
    return [
        f"{flag_with_value(name, getattr(options, name))}: a ChatGLM's layers have another shape; the flag is needed left out."
        for name, fitting in of_chatglm.items()
        if name not in config and getattr(options, name) not in fitting
    ]


def _length_problems(options: Options, config: ModelConfig) -> list[str]:
    problems = []
    source, target = options.max_source_length, options.max_target_length
    longest = (source or 0) + (target or 0)
    positions = config.get("max_sequence_length", options.max_sequence_length)
    if longest > positions:
        problems.append(
            f"--max_source_length {source or 'auto'} and --max_target_length {target or 'auto'}: "
            f"{longest} tokens together; this checkpoint takes {positions} (max_sequence_length), so less is needed."
        )
    if source is not None and source <= config["image_length"]:
        problems.append(
            f"--max_source_length {source}: the picture alone takes {config['image_length']} "
            "tokens; more is needed for the question."
        )
    return problems


def _image_size_problems(options: Options, eva_args: EvaArgs) -> list[str]:
    patch = eva_args.get("patch_size", 16)  # SAT's default
    if options.image_size is None or options.image_size % patch == 0:
        return []
    return [
        f"--image_size {options.image_size}: the vision tower reads patches of {patch} pixels; a multiple is needed."
    ]


def overridden_by_config(options: Options, config: Mapping[str, object]) -> list[str]:
    """A sentence for each flag of the user that differs from the checkpoint's config, which wins in SAT.

    The method's flags are not among them, see `going_on_problems`; nor is --model-parallel-size: SAT splits a checkpoint
    anew.
    """
    path = _config_path(options)
    others = {*ADAPTER_KEYS, "model_parallel_size"}
    return [
        f"{flag_with_value(name, getattr(options, name))} is overridden by {shown(config[name])} from {path}."
        for name in sorted(options.user_set & config.keys() - others)
        if config[name] != getattr(options, name)
    ]


def going_on_problems(options: Options, config: ModelConfig) -> list[str]:
    """Which sizes of the user differ from those of the adapters that the checkpoint already has."""
    asked, stored = AdapterConfig.from_options(options), AdapterConfig.from_json(config)
    resumed = asked.resumed_from(config)
    sizes: Mapping[str, object] = {**resumed.to_json()}
    differing = resumed.differing_keys(asked)
    return [
        f"{flag_with_value(key, getattr(options, key))}: {options.from_pretrained} already has adapters, with "
        f"{flag_with_value(key, sizes[key]) if sizes[key] else 'all'}; the same is needed to go on with them, or a "
        "checkpoint without: scripts/merge_lora.py makes one."
        for key in stored.fixed_keys()
        if key in options.user_set and key in differing
    ]


def frame_problems(options: object, tokenizer: ChatGLMTokenizer, image_length: int) -> list[str]:
    """Which lengths leave no room for the frame around the question, or for the answer."""
    least = {
        "max_source_length": least_source_length(tokenizer, image_length),
        "max_target_length": LEAST_TARGET_LENGTH,
    }
    return [
        f"{flag_names()[name]} {getattr(options, name)}: no room for a single token of text; at least {needed} is needed."
        for name, needed in least.items()
        if getattr(options, name) is not None and getattr(options, name) < needed
    ]


def save_problems(options: Options, bytes_needed: int) -> list[str]:
    """Why checkpoints can't be saved under --save, as far as its disk can tell now.

    Args:
        bytes_needed: what the run's checkpoints will take together.
    """
    return [] if options.save is None else folder_problems("--save", options.save, bytes_needed)


# --- the command line against its DeepSpeed file ----------------------------------------------------------------------


def overridden_by_deepspeed(options: Options, settings: Mapping[str, object], path: Path | str) -> list[str]:
    """A sentence for each flag of the user that differs from the settings in a --deepspeed_config file, which win.

    Args:
        settings: what the file at path holds.
    """
    sentences = []
    for name, (key, if_silent) in _DEEPSPEED_SETTINGS.items():
        value = _setting(settings, key, if_silent)
        if name in options.user_set and value not in (None, "auto", getattr(options, name)):
            flag = flag_with_value(name, getattr(options, name))
            sentences.append(f"{flag} is overridden by {shown(value)} from {path} ({key}).")
    return sentences


def _setting(settings: Mapping[str, object], key: str, if_silent: object) -> object:
    value: object = settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return if_silent
        value = value[part]
    return value


# What the values of a --deepspeed_config file must be, of those that SAT or this code reads or that abort DeepSpeed.
# `model.training.deepspeed_config.try_out` has DeepSpeed check the rest.
_DEEPSPEED_KINDS: Mapping[tuple[str, ...], Kind] = {
    ("train_batch_size",): COUNT,
    ("train_micro_batch_size_per_gpu",): or_auto(COUNT),
    ("gradient_accumulation_steps",): or_auto(COUNT),
    ("gradient_clipping",): or_auto(AMOUNT),
    ("steps_per_print",): or_auto(COUNT),
    ("fp16",): OBJECT,
    ("fp16", "enabled"): TRUTH,
    ("fp16", "loss_scale"): AMOUNT,
    ("fp16", "min_loss_scale"): AMOUNT,
    ("fp16", "initial_scale_power"): WHOLE,
    ("fp16", "loss_scale_window"): COUNT,
    ("fp16", "hysteresis"): COUNT,
    ("bf16",): OBJECT,
    ("bf16", "enabled"): TRUTH,
    ("optimizer",): OBJECT,
    ("optimizer", "type"): TEXT,
    ("optimizer", "params"): OBJECT,
    ("optimizer", "params", "lr"): or_auto(RATE),
    ("optimizer", "params", "weight_decay"): or_auto(AMOUNT),
    ("optimizer", "params", "eps"): or_auto(RATE),
    ("optimizer", "params", "betas"): or_auto(BETAS),
    ("zero_optimization",): OBJECT,
    ("zero_optimization", "stage"): Kind(lambda value: type(value) is int and 0 <= value <= 3, "0, 1, 2 or 3"),
    ("zero_optimization", "reduce_bucket_size"): or_auto(COUNT),
    ("zero_optimization", "allgather_bucket_size"): or_auto(COUNT),
}


@functools.cache
def deepspeed_words() -> frozenset[str]:
    """Every word in quotes in the code that reads DeepSpeed's settings; importing DeepSpeed takes seconds.

    DeepSpeed takes no notice of a setting whose name it doesn't have. Empty where it isn't installed.
    """
    found = importlib.machinery.PathFinder.find_spec("deepspeed")
    files = [
        file
        for folder in (found.submodule_search_locations if found else None) or ()
        for pattern in ("*config*.py", "*constants.py")
        for file in Path(folder).rglob(pattern)
    ]
    return frozenset(word for file in files for word in re.findall(r"""["'](\w+)["']""", file.read_text("utf-8")))


def deepspeed_problems(options: Options, settings: Mapping[str, object], path: Path | str) -> list[str]:
    """What SAT can't use in the settings of a --deepspeed_config file, or DeepSpeed with these flags."""
    problems = problems_of_kind(settings, _DEEPSPEED_KINDS, str(path))
    known = deepspeed_words()
    for key, value in settings.items():
        if key in known or not known or isinstance(value, str):  # a text is a remark
            continue
        close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.7)
        meant = f'did you mean "{close[0]}"?' if close else "it is needed without."
        problems.append(f'{path}: DeepSpeed has no setting "{key}"; {meant}')
    for section in ("fp16", "bf16"):
        value = settings.get(section)
        if isinstance(value, Mapping) and "enabled" not in value:
            problems.append(f'{path}: no "enabled" in "{section}"; true or false is needed.')
    if _setting(settings, "fp16.enabled", False) and _setting(settings, "bf16.enabled", False):
        problems.append(f"{path}: fp16 and bf16 are both enabled; only one is needed.")
    if options.use_ptuning and str(_setting(settings, "optimizer.type", "")).lower() == "muon":
        problems.append(
            f"--use_ptuning and Muon in {path}: DeepSpeed's Muon takes matrices, and prefixes have four dimensions; AdamW is "
            "needed."
        )
    return problems
