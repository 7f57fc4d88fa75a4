"""Everything that can fail, checked in seconds before a model is loaded; before torch is, unless there is much data.

    flags → DeepSpeed's file → checkpoint → tokenizer → room on the disk → rows → pictures

The first of these with a problem ends the run, with every problem of its kind. Where a checkpoint may have to be downloaded,
data files that aren't there are told before.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from model.adapter_config import AdapterConfig
from model.checkpoints.download import may_be_downloaded
from model.checkpoints.layout import Checkpoint, ModelConfig, read_json_object
from model.checkpoints.metadata import refuse_needless_base, with_base
from model.checkpoints.resume import Resumed, RunRecord, rows_of_use
from model.checkpoints.sizes import (
    BYTES_OF_FLOAT32,
    ROOM_FOR_THE_REST,
    adapter_size,
    folder_problems,
    full_size,
    state_size,
)
from model.cli.flag_checks import (
    config_problems,
    deepspeed_problems,
    flag_problems,
    frame_problems,
    overridden_by_config,
    overridden_by_deepspeed,
    save_problems,
    split_notes,
    split_row_problems,
    split_shares,
)
from model.cli.options import FIND_LR_STEPS, SAT_TRAIN_ITERS, Options, parse
from model.cli.resuming import steps_problems
from model.data.lengths import Truncations, auto_lengths, begin_counting_truncations, bytes_note
from model.data.prompt import Lengths
from model.data.rows import missing_file_problems
from model.data.sampling import SampleOrder
from model.data.split import Selection, find_trained_rows, hold_out, leave_out_bad_images, scan_files
from model.data.tokenizer import ChatGLMTokenizer, check_special_ids, find_tokenizer
from model.data.workers import run_in_subprocess
from model.distributed import is_first_process, world_size
from model.errors import raise_problems
from model.hub import at_revision
from model.progress import count_of


@dataclass(frozen=True)
class Inputs:
    """What a command line means, once it is known to be good."""

    checkpoint: Checkpoint
    tokenizer: ChatGLMTokenizer
    selection: Selection
    lengths: Lengths  # with --max_source_length auto settled
    notes: list[str]  # sentences for the person at the prompt
    steps: int  # optimizer steps of the whole run
    cut_labels: Mapping[str, int]  # how many labels of each data file lose their end, on the first process


def preflight(
    options: Options, meanwhile: Callable[[], object] = lambda: None, resumed: Resumed | None = None
) -> Inputs:
    """Check everything, the quickest first.

    Args:
        resumed: the run that goes on, if one does.
        meanwhile: called here while a process of its own checks the data, where there is so much that it takes seconds.

    Raises:
        InputError: lists every problem of the first kind that there is.
    """
    raise_problems(flag_problems(options))
    notes = []
    if not (options.save or options.find_lr):  # --find_lr says by itself that it saves nothing
        notes.append("NOTHING IS SAVED (--save none): what is learned is gone when this run ends.")
    if "gpu_memory" in options.user_set and not (options.dry_run or options.auto_batch_size):
        notes.append("--gpu_memory is for --dry_run and for --batch-size auto; this run takes no notice of it.")
    notes += worker_notes(options)
    notes += split_notes(options)
    notes += deepspeed_notes(options)
    if not resumed and any(may_be_downloaded(name) for name in (options.from_pretrained, options.base) if name):
        files = [*(options.train_data or []), *(options.valid_data or []), *(options.test_data or [])]
        raise_problems(missing_file_problems(files))
    checkpoint = checked_checkpoint(options, resumed)
    notes += [] if resumed else overridden_by_config(options, checkpoint.config)
    tokenizer = checked_tokenizer(options, checkpoint)
    raise_problems(save_problems(options, checkpoint_size(options, checkpoint)))
    if resumed and not options.dry_run:
        raise_problems(folder_problems("--resume", str(resumed.checkpoint.folder)))
    if options.summary_dir:
        raise_problems(folder_problems("--summary-dir", os.path.join(options.summary_dir, "runs")))
    if options.feature_cache is not None:
        raise_problems(folder_problems("--feature_cache", options.feature_cache))
    record = resumed.record if resumed else None
    data = run_in_subprocess(lambda: checked_data(options, checkpoint.config, tokenizer, record), meanwhile)
    if record:
        data.selection.left_out = record.left_out
    steps = steps_of_run(options, data.selection, resumed)
    raise_problems(steps_problems(options, steps))
    notes += [*data.notes, epochs_note(options, data.selection, steps, resumed)]
    return Inputs(checkpoint, tokenizer, data.selection, data.lengths, notes, steps, data.cut_labels)


def rows_problems(record: RunRecord, selection: Selection) -> list[str]:
    """Which files of a run that goes on have other rows of use than when it began, though the files are the same."""
    now = {file: rows_of_use(selection.rows[file].numbers) for file in record.rows if file in selection.rows}
    return [
        f"{file}: {now[file]} of its rows can be used, and {record.rows[file]} could when the run began, so that the place in "
        "the data would be among other rows. Needed are the pictures' files, and --image_folder, as they were, or a new run."
        for file in now
        if now[file] != record.rows[file]
    ]


def with_options(inputs: Inputs, before: Options, options: Options, resumed: Resumed | None = None) -> Inputs:
    """The same inputs for other options, of which those that a step's samples depend on may differ."""
    steps = steps_of_run(options, inputs.selection, resumed)
    old = epochs_note(before, inputs.selection, inputs.steps, resumed)
    new = epochs_note(options, inputs.selection, steps, resumed)
    return replace(inputs, steps=steps, notes=[new if note == old else note for note in inputs.notes])


def worker_notes(options: Options) -> list[str]:
    """A note where --num-workers asks for more processes than there are processors to run them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if options.num_workers <= count:
        return []
    return [f"--num-workers {options.num_workers}: {count_of(count, 'processor')} found; more workers read no faster."]


def deepspeed_notes(options: Options) -> list[str]:
    """Which flags the --deepspeed_config file overrides.

    Raises:
        InputError: it can't be read, or SAT can't use it.
    """
    path = options.deepspeed_config
    if not path:
        return []
    settings = read_json_object(path, "--deepspeed_config")
    raise_problems(deepspeed_problems(options, settings, path))
    return overridden_by_deepspeed(options, settings, path)


def checked_checkpoint(options: Options, resumed: Resumed | None) -> Checkpoint:
    """The checkpoint to start from, or to go on with, and its base.

    Raises:
        InputError: one of them is not there, or the checkpoint and the flags don't fit.
    """
    checkpoint = (
        resumed.checkpoint if resumed else Checkpoint.find(at_revision(options.from_pretrained, options.revision))
    )
    raise_problems(config_problems(options, checkpoint.config))
    if resumed is None:  # else it may have begun from an adapter
        refuse_needless_base(checkpoint, options.base)
    return with_base(checkpoint, options.base)


def checked_tokenizer(options: Options, checkpoint: Checkpoint) -> ChatGLMTokenizer:
    """The checkpoint's tokenizer.

    Raises:
        InputError: there is none, it is another model's, or the lengths leave no room for its tokens.
    """
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder, options.tokenizer))
    check_special_ids(tokenizer, checkpoint.config)
    raise_problems(frame_problems(options, tokenizer, checkpoint.config["image_length"]))
    return tokenizer


def checkpoint_size(options: Options, checkpoint: Checkpoint) -> int:
    """About how many bytes one checkpoint of this run will take: all weights, or what is trained; and the run's state.

    `model.checkpoints.save` asks again before each is saved, when it knows.
    """
    adapters = adapter_size(AdapterConfig.from_options(options).resumed_from(checkpoint.config), checkpoint.config)
    adapters += state_size((adapters - ROOM_FOR_THE_REST) // BYTES_OF_FLOAT32)
    whole = checkpoint.base or checkpoint
    if options.save_full_model:
        width = 2 if options.fp16 or options.bf16 else 4
        return sum(full_size(file, width) for file in whole.weights_files()) + adapters
    if options.train_parts or options.image_size:
        return whole.weights_size()
    return adapters


# --- the data files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The part of Inputs that comes from the data files."""

    selection: Selection
    lengths: Lengths
    notes: list[str]
    cut_labels: Mapping[str, int]


def checked_data(options: Options, config: ModelConfig, tokenizer: ChatGLMTokenizer, record: RunRecord | None) -> Data:
    """Check the data files: rows, then pictures, while other processes count what the lengths cut off.

    Args:
        record: of the run that goes on, whose rows stay held out; None for a new one.

    Raises:
        InputError: lists every problem of the first kind that there is.
    """
    train_files, valid_files = options.train_data or [], [*(options.valid_data or []), *(options.test_data or [])]
    selection, problems = scan_files([*train_files, *valid_files], options.bad_rows, options.image_folder)
    lengths = settled_lengths(options, config, tokenizer, selection)
    # Nobody but the first process tells it, and counting takes a while.
    truncations = begin_counting_truncations(selection.rows, tokenizer, lengths) if is_first_process() else None
    notes = leave_out_bad_images(selection, problems, options.bad_rows, options.check_seconds)
    raise_problems(split_row_problems(options, {file: selection.sample_count(file) for file in train_files}))
    raise_problems(rows_problems(record, selection) if record else [])
    if record and record.held_out:
        selection.held_out = record.held_out
    elif options.holdout is not None:
        hold_out(selection, train_files, options.holdout, options.seed)
    notes += find_trained_rows(selection, train_files, valid_files)
    raise_problems(epoch_problems(options, selection))
    found = truncations() if truncations is not None else {}
    if found:
        notes += data_notes(options, selection, lengths, found)
        in_bytes = {file: bytes_note(selection.trained_rows(file), tokenizer, cut) for file, cut in found.items()}
        notes += [f"WARNING: {file}: {note}" for file, note in in_bytes.items() if note]
    return Data(selection, lengths, notes, {file: cut.labels for file, cut in found.items()})


def settled_lengths(
    options: Options, config: ModelConfig, tokenizer: ChatGLMTokenizer, selection: Selection
) -> Lengths:
    """The lengths of the command line, with what the data needs where it says auto."""
    unsettled = Lengths(
        config["image_length"], 0, 0, options.source_prefix, options.ignore_pad_token_for_loss, options.lang
    )
    limit = config.get("max_sequence_length", options.max_sequence_length)
    source, target = auto_lengths(
        selection.rows, tokenizer, unsettled, options.max_source_length, options.max_target_length, limit
    )
    return replace(unsettled, max_source_length=source, max_target_length=target)


# --- what is said of them ---------------------------------------------------------------------------------------------


def data_notes(
    options: Options, selection: Selection, lengths: Lengths, truncations: Mapping[str, Truncations]
) -> list[str]:
    """What the run will do with its data: rows, what is truncated in each file, held-out ones."""
    notes = []
    if None in (options.max_source_length, options.max_target_length):
        notes.append(
            f"--max_source_length {lengths.max_source_length} --max_target_length {lengths.max_target_length} (auto)"
        )
    for file, rows in selection.rows.items():
        usable = len(rows) - len(selection.left_out.get(file, ()))
        notes.append(f"{file}: {count_of(usable, 'row')}{truncation_note(truncations[file], len(rows))}")
    held_out = sum(len(selection.chosen(file, training=False) or ()) for file in selection.held_out)
    if held_out:
        notes.append(
            f"Held out of --train-data for evaluation: {count_of(held_out, 'row')} (--holdout, --seed {options.seed})."
        )
        taken = sum(map(len, selection.held_out.values()))  # bad ones included
        if options.holdout is not None and options.holdout >= 1 and taken != options.holdout:
            notes.append(
                f"--holdout {options.holdout:g}: rows that share a picture, or are the same text, stay together."
            )
    if "eval_interval" in options.user_set and not (options.valid_data or held_out or split_shares(options)[1]):
        notes.append(
            f"--eval-interval {options.eval_interval}: nothing to evaluate on; --holdout 0.1 or --valid-data is needed for it."
        )
    if "eval_iters" in options.user_set and (options.valid_data or held_out):
        notes.append("--eval-iters is not used: an evaluation goes through all rows once.")
    return notes


def batch_and_accumulation(options: Options) -> tuple[int, int]:
    """Samples of a process's micro-batch, and micro-batches of a step: by a DeepSpeed file, where it says so."""
    if not options.deepspeed_config:
        return options.batch_size, options.gradient_accumulation_steps
    settings = read_json_object(options.deepspeed_config, "--deepspeed_config")

    def number(name: str, otherwise: int) -> int:
        found = settings.get(name)
        return found if type(found) is int else otherwise

    return (
        number("train_micro_batch_size_per_gpu", options.batch_size),
        number("gradient_accumulation_steps", options.gradient_accumulation_steps),
    )


def samples_per_step(options: Options) -> int:
    """Samples of one optimizer step, over all processes."""
    batch, accumulated = batch_and_accumulation(options)
    return batch * accumulated * (world_size() // options.model_parallel_size)


def training_samples(options: Options, selection: Selection) -> int:
    """Samples of one epoch: every turn of every row, as often as --train-data-weights says."""
    files = options.train_data or []
    weights = options.train_data_weights or [1] * len(files)
    counts = tuple(selection.sample_count(file) for file in files)
    if not counts:
        return 0
    shares = split_shares(options)
    order = SampleOrder(counts, 0, weights=tuple(weights), shares=tuple(shares), block_size=options.block_size)
    return len(order)


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


def training_steps(options: Options, selection: Selection) -> int:
    """Optimizer steps of a run."""
    if options.find_lr:
        return FIND_LR_STEPS
    if not options.epochs:
        return options.train_iters or SAT_TRAIN_ITERS
    # The last batch may be a small one; batches that make no whole step are left over.
    samples = options.epochs * training_samples(options, selection)
    _, accumulated = batch_and_accumulation(options)
    batches = -(-samples * accumulated // samples_per_step(options))
    return max(1, batches // accumulated)


def steps_of_run(options: Options, selection: Selection, resumed: Resumed | None) -> int:
    """Optimizer steps of a run. One that goes on with --epochs takes those for which samples are left.

    Where all of its steps took as many samples as they do now, it keeps the number that it began with: `training_steps`
    may be one more or less on other processes, as micro-batches of another size leave others over.
    """
    if not (resumed and resumed.record.samples and options.epochs):
        return training_steps(options, selection)
    record, at_once = resumed.record, samples_per_step(options)
    if record.samples == record.iteration * at_once and parse(record.words).epochs == options.epochs:
        return record.steps
    _, accumulated = batch_and_accumulation(options)
    micro_batch, samples = at_once // accumulated, options.epochs * training_samples(options, selection)
    batches = -(-samples // micro_batch) - record.samples // micro_batch if record.samples < samples else 0
    return record.iteration + batches // accumulated


def epochs_note(
    options: Options, selection: Selection, steps: int | None = None, resumed: Resumed | None = None
) -> str:
    """How many samples a run sees, those before it went on included, and how many times through the data that is."""
    if options.find_lr:
        return f"Looking for a learning rate: {FIND_LR_STEPS} steps with a rising one; --lr and the number of steps don't count."
    samples, at_once = training_samples(options, selection), samples_per_step(options)
    steps = steps or training_steps(options, selection)
    seen, of = steps * at_once, f" of {at_once}"
    if resumed and resumed.record.samples and -(-resumed.record.samples // at_once) != resumed.record.iteration:
        seen = resumed.record.samples + (steps - resumed.record.iteration) * at_once
        of = f", of {at_once} from here on,"
    seen = min(options.epochs * samples, seen) if options.epochs else seen
    epochs = _amount(seen / samples)
    return (
        f"Training on {count_of(samples, 'sample')}: {count_of(steps, 'step')}{of} see {count_of(seen, 'sample')}, "
        f"{epochs} epoch{'' if epochs == '1' else 's'}"
        + ("." if options.epochs else ", drawn by chance (--seed); --epochs goes through all of them instead.")
    )


def _amount(number: float) -> str:
    """A number to three digits, but never as 2e+03."""
    return f"{number:.3g}" if number < 999.5 else f"{number:.0f}"


def truncation_note(truncations: Truncations, rows: int) -> str:
    """How many samples rows make, where it isn't one each, and what the lengths cut off; nothing if they all fit."""
    turns = f", {truncations.samples} samples (one for every turn)" if truncations.samples != rows else ""
    if not truncations.prompts + truncations.labels + truncations.histories:
        return turns
    histories = f", oldest turns of {count_of(truncations.histories, 'sample')}" if truncations.histories else ""
    return (
        f"{turns}; cut to fit: {count_of(truncations.prompts, 'prompt')}{histories} (--max_source_length),"
        f" {count_of(truncations.labels, 'label')} (--max_target_length)"
    )


def rate_notes(options: Options, steps: int, steps_done: int) -> list[str]:
    """What the learning rate does that nobody may expect: it is low in the first steps, or 0 in the last."""
    notes = warm_up_notes(options, steps_done)
    decay = options.lr_decay_iters or steps
    if options.find_lr or decay >= steps or options.lr_decay_style != "linear":
        return notes
    # SAT's line ends so many steps after the warm-up, and its rule for the first steps goes before.
    last = decay + math.ceil(decay * options.warmup) - 1
    last = max(last, options.auto_warmup_steps) if options.mode == "finetune" else last
    if last < steps:
        notes.append(
            f"From step {last + 1} on the learning rate is 0, so that {steps - last} of {steps} steps change nothing "
            f"(--lr-decay-iters {decay})."
        )
    return notes


def warm_up_notes(options: Options, steps_done: int) -> list[str]:
    """Which rule of SAT's slows the first steps down, unless they are behind."""
    if options.find_lr or options.mode != "finetune" or options.auto_warmup_steps <= steps_done:
        return []
    return [
        f"The first {options.auto_warmup_steps} steps use at most 5 % of --lr ({0.05 * options.lr:.2g}), as SAT does "
        "in finetune mode; --auto_warmup_steps changes that."
    ]
