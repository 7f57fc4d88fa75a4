"""Everything that can fail, checked in seconds before a model is loaded; before torch is, unless there is much data.

A function named …_problems returns sentences: where, what was found, what is needed; an empty list when all is well.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoints.layout import find_weights, read_json_object
from model.checkpoints.metadata import (
    find_base,
    has_lora,
    is_adapter,
    settings_to_go_on,
)
from model.checkpoints.sizes import folder_problems
from model.cli.flag_checks import (
    config_problems,
    deepspeed_problems,
    frame_problems,
    method_problems,
    overridden_by_config,
    overridden_by_deepspeed,
    save_problems,
    split_row_problems,
)
from model.cli.options import Options
from model.data.lengths import Truncations, auto_lengths, begin_counting_truncations
from model.data.prompt import Lengths
from model.data.split import Selection, hold_out, leave_out_bad_images, same_file_warnings, scan_files
from model.data.tokenizer import ChatGLMTokenizer, check_special_ids, find_tokenizer
from model.data.workers import run_in_subprocess
from model.distributed import is_first_process
from model.errors import raise_problems
from model.model_flags import DEFAULT_LORA_TARGETS


@dataclass(frozen=True)
class Inputs:
    """What a command line means, once it is known to be good."""

    checkpoint: Path
    weights: Path  # the checkpoint's weights file: of its latest iteration, or of the one that was meant
    config: dict[str, Any]
    tokenizer: ChatGLMTokenizer
    selection: Selection
    lengths: Lengths  # with --max_source_length auto settled
    notes: list[str]  # sentences for the person at the prompt


def checked(options: Options, meanwhile: Callable[[], object] = lambda: None) -> Inputs:
    """Check everything, the quickest first, and stop at the first kind of problem.

    Where there is much data, checking it takes seconds, in a process of its own; meanwhile is then called here.

    Raises:
        InputError: lists every problem of that kind.
    """
    raise_problems(method_problems(options))
    notes = []
    if options.deepspeed_config:
        settings = read_json_object(options.deepspeed_config, "--deepspeed_config")
        raise_problems(deepspeed_problems(settings, options.deepspeed_config))
        notes += overridden_by_deepspeed(options, settings, options.deepspeed_config)
    weights = find_weights(options.from_pretrained)
    checkpoint = weights.parent.parent
    config = read_json_object(checkpoint / "model_config.json", "The checkpoint's configuration")
    raise_problems(config_problems(options, config))
    notes += overridden_by_config(options, config)
    full_weights = weights
    if is_adapter(config):
        full_weights = find_base(config, options.from_pretrained, options.base)
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint, options.tokenizer))
    check_special_ids(tokenizer, config)
    raise_problems(frame_problems(options, tokenizer, config["image_length"]))
    raise_problems(save_problems(options, checkpoint_size(options, config, full_weights.stat().st_size)))
    if options.feature_cache is not None:
        raise_problems(folder_problems("--feature_cache", options.feature_cache))
    data = run_in_subprocess(lambda: checked_data(options, config, tokenizer), meanwhile)
    return Inputs(checkpoint, weights, config, tokenizer, data.selection, data.lengths, [*notes, *data.notes])


@dataclass(frozen=True)
class Data:
    """The part of Inputs that comes from the data files."""

    selection: Selection
    lengths: Lengths
    notes: list[str]


def checked_data(options: Options, config: Mapping[str, Any], tokenizer: ChatGLMTokenizer) -> Data:
    """Check the data files: rows, then pictures, while what the lengths cut off is counted in other processes.

    Raises:
        InputError: lists every problem of the first kind that there is.
    """
    valid_files = [*(options.valid_data or []), *(options.test_data or [])]
    selection, problems = scan_files([*options.train_data, *valid_files], options.bad_rows)
    lengths = settled_lengths(options, config, tokenizer, selection)
    # Nobody but the first process tells it, and counting takes a while.
    cuts = begin_counting_truncations(selection.rows, tokenizer, lengths) if is_first_process() else None
    notes = leave_out_bad_images(selection, problems, options.bad_rows, options.check_seconds)
    raise_problems(split_row_problems(options, {file: len(selection.rows[file]) for file in options.train_data}))
    notes += same_file_warnings(options.train_data, valid_files)
    if options.holdout is not None:
        hold_out(selection, options.train_data, options.holdout, options.seed)
    raise_problems(epoch_problems(options, selection))
    if cuts is not None:
        notes += data_notes(options, selection, lengths, cuts())
    return Data(selection, lengths, notes)


def checkpoint_size(options: Options, config: Mapping[str, Any], full_size: int) -> int:
    """About how many bytes one checkpoint of this run will take: all weights, or what is trained in float32 at most.

    Args:
        config: the starting checkpoint's. full_size: bytes of its weights, or of its base's.
    """
    if options.save_full_model or options.train_parts or options.image_size:
        return full_size
    settings = settings_to_go_on(config, vars(options))
    hidden = config["hidden_size"]
    inner = config.get("inner_hidden_size") or 4 * hidden
    widths = {  # of all that goes into and out of one rank of the factors
        "query_key_value": 3 * hidden + 3 * hidden,
        "dense": hidden + hidden,
        "dense_h_to_4h": hidden + inner,
        "dense_4h_to_h": inner + hidden,
    }
    numbers = 0
    if has_lora(settings):
        layers = len(settings["layer_range"] or range(config["num_layers"]))
        targets = settings["lora_target"] or DEFAULT_LORA_TARGETS
        numbers += layers * settings["lora_rank"] * sum(widths[target] for target in targets)
    if settings["use_ptuning"]:
        numbers += config["num_layers"] * 2 * hidden * settings["pre_seq_len"]
    return 4 * numbers + 2**20


def settled_lengths(
    options: Options, config: Mapping[str, Any], tokenizer: ChatGLMTokenizer, selection: Selection
) -> Lengths:
    """The lengths of the command line, with what the data needs where it says auto."""
    source, target = options.max_source_length, options.max_target_length
    unsettled = Lengths(
        config["image_length"], 0, 0, options.source_prefix, options.ignore_pad_token_for_loss, options.lang
    )
    if source is None or target is None:
        limit = config.get("max_sequence_length", options.max_sequence_length)
        source, target = auto_lengths(selection.rows, tokenizer, unsettled, source, target, limit)
    return replace(unsettled, max_source_length=source, max_target_length=target)


def data_notes(options: Options, selection: Selection, lengths: Lengths, cuts: Mapping[str, Truncations]) -> list[str]:
    """What the run will do with its data: rows, the cuts of each file, held-out ones, samples seen and epochs."""
    notes = []
    if None in (options.max_source_length, options.max_target_length):
        notes.append(
            f"--max_source_length {lengths.max_source_length} --max_target_length {lengths.max_target_length} (auto)"
        )
    for file, rows in selection.rows.items():
        notes.append(f"{file}: {len(rows)} rows{cut_note(cuts[file], len(rows))}")
    held_out = sum(len(selection.chosen(file, training=False) or ()) for file in selection.held_out)
    if held_out:
        notes.append(f"Held out of --train-data for evaluation: {held_out} rows (--holdout, --seed {options.seed}).")
    if "eval_iters" in options.typed and (options.valid_data or held_out):
        notes.append("--eval-iters is not used: an evaluation goes through all rows once.")
    return [*notes, epochs_note(options, selection)]


def samples_per_step(options: Options) -> int:
    """Samples of one optimizer step, over all processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return options.batch_size * options.gradient_accumulation_steps * processes


def training_samples(options: Options, selection: Selection) -> int:
    """Samples of one epoch: every turn of every row, as often as --train-data-weights says."""
    weights = options.train_data_weights or [1] * len(options.train_data)
    counts = (selection.sample_count(file) for file in options.train_data)
    return sum(weight * count for weight, count in zip(weights, counts, strict=True))


def epoch_problems(options: Options, selection: Selection) -> list[str]:
    """What keeps --epochs from making a single step."""
    samples = training_samples(options, selection)
    if not samples:
        return ["--train-data: no row is left to learn; more rows are needed."]
    if options.epochs is None or options.epochs * samples >= samples_per_step(options):
        return []
    return [
        f"--epochs {options.epochs}: {samples} samples make less than one step of {samples_per_step(options)} (--batch-size,"
        " --gradient-accumulation-steps and processes); more epochs or a smaller batch are needed."
    ]


def epochs_note(options: Options, selection: Selection) -> str:
    """How many samples a run sees, and how many times through the data that is."""
    samples, at_once = training_samples(options, selection), samples_per_step(options)
    steps, seen = options.train_iters or 10_000, (options.train_iters or 10_000) * at_once
    if options.epochs:  # the last batch may be a small one; batches that make no whole step are left over
        batches = -(-options.epochs * samples * options.gradient_accumulation_steps // at_once)
        steps = max(1, batches // options.gradient_accumulation_steps)
        seen = min(options.epochs * samples, steps * at_once)
    return (
        f"Training on {samples} samples: {steps} steps of {at_once} see {seen} samples, {seen / samples:.3g} epochs"
        + ("." if options.epochs else ", drawn by chance (--seed); --epochs goes through all of them instead.")
    )


def cut_note(cuts: Truncations, rows: int) -> str:
    """How many samples rows make, where it isn't one each, and what the lengths cut off; nothing if they all fit."""
    turns = f", {cuts.samples} samples (one for every turn)" if cuts.samples != rows else ""
    if not cuts.prompts + cuts.labels + cuts.histories:
        return turns
    histories = f", oldest turns of {cuts.histories} samples" if cuts.histories else ""
    return (
        f"{turns}; cut to fit: {cuts.prompts} prompts{histories} (--max_source_length), {cuts.labels} labels"
        " (--max_target_length)"
    )


# --- checks of the command line alone ---------------------------------------------------------------------------------


# --- checks against the checkpoint's config and DeepSpeed's settings --------------------------------------------------
