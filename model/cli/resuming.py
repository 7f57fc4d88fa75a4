"""What a command line that goes on with something means: --resume with a run, SAT's --load with a checkpoint's weights.

    --resume FOLDER [flags]     flags not given now are the run's; those given now win, where that can be
    --resume auto flags         the newest checkpoint of --experiment-name under --save; without one, a fresh run
    --load FOLDER flags         the weights of a checkpoint, whose adapters keep their sizes; a fresh optimizer
    … --mode pretrain           counts on from its iteration; --resume-dataloader: in the data too

Only the standard library is imported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.adapter_config import ADAPTER_KEYS, AdapterConfig
from model.checkpoints.layout import Checkpoint, newest_run_named
from model.checkpoints.resume import Ending, Resumed, digest, newest_run, resumed_from
from model.checkpoints.running import refuse_running
from model.cli.config_file import with_config_files
from model.cli.options import Options, flag_names, flag_with_value, parse, shown, spelled_out
from model.distributed import world_size
from model.errors import InputError, raise_problems

AUTO = "auto"
NOT_OF_THE_RUN = ("--resume", "--local_rank", "--local-rank")  # launchers give each process its own number

# Flags that may be others now: they change no step.
FREE = {
    "save_interval", "eval_interval", "eval_batch_size", "eval_iters", "strict_eval", "log_interval", "exit_interval",
    "num_workers", "prefetch_factor", "summary_dir", "wandb", "wandb_project_name", "save_args", "profiling", "check_seconds",
    "bad_rows", "image_folder", "feature_cache", "keep_best", "early_stopping", "answers", "eval_answers", "valid_data", "test_data", "base", "force_base", "tokenizer", "skip_init",
    "distributed_backend", "local_rank", "device", "checkpoint_activations", "checkpoint_num_layers",
    "save_total_limit", "max_skipped_steps", "ui_lang", "no_save_rng", "revision", "config", "force_train", "help",
    "input_source", "length_penalty", "max_inference_batch_size", "min_tgt_length", "no_repeat_ngram_size", "num_beams",
    "out_seq_length", "output_path", "temperature", "top_k", "top_p", "with_id",
    "checkpoint_skip_layers", "rank_timeout", "model_parallel_size", "dry_run", "gpu_memory", "auto_batch_size",
}  # fmt: skip
# Flags that stay the run's, each with the reason.
_ADAPTERS = "the adapters are the checkpoint's"
_DATA = "the place in the data would be among other rows"
_FOLDER = "a run goes on in its folder"
FIXED = {
    **dict.fromkeys((*ADAPTER_KEYS, "from_pretrained", "image_size", "image_length", "load"), _ADAPTERS),
    **dict.fromkeys(("train_data", "train_data_weights", "holdout", "split", "block_size", "seed"), _DATA),
    **dict.fromkeys(("save", "experiment_name"), _FOLDER),
    "save_full_model": "the checkpoint has its weights in the other form",
}
del FIXED["lora_dropout"]


@dataclass(frozen=True)
class CommandLine:
    """A command line, with that of the run where it resumes one."""

    words: list[str]
    options: Options
    resumed: Resumed | None = None
    notes: list[str] = field(default_factory=list)  # sentences for the person at the prompt
    evaluates_anew: bool = False  # on other rows than the run did: which evaluation was the best is not known any more

    @property
    def steps_done(self) -> int:
        """Optimizer steps that are behind."""
        return self.resumed.record.iteration if self.resumed else 0


def command_line(argv: Sequence[str]) -> CommandLine:
    """What argv means: as it stands, or with --resume joined to the run's own flags.

    Raises:
        InputError: there is nothing to resume, or it can't be resumed with these flags.
    """
    argv = spelled_out(with_config_files(argv))
    words, options = own_words(argv), parse(argv)
    if options.resume is None:
        return _loading(words, options) if options.load else CommandLine(words, options)
    if options.resume == AUTO:
        resumed, notes = _newest(options)
    else:
        if not options.dry_run:
            refuse_running(Path(options.resume).expanduser())  # which may have saved nothing yet
        resumed, notes = resumed_from(options.resume), []
    if resumed is None:
        return CommandLine(words, options, None, notes)
    before, joined = parse(resumed.record.words), parse([*resumed.record.words, *argv])
    home = resumed.checkpoint.folder.parent  # which may have been moved since
    if "save" not in options.user_set or Path(options.save or "").expanduser().resolve() == home.resolve():
        before.save = joined.save = str(home)
    began, resumed = resumed, with_data_where_it_is(resumed, before, joined)
    more, more_notes = for_these_processes(resumed.record.processes // before.model_parallel_size, before, joined)
    raise_problems([*fixed_problems(before, joined, resumed is not began), *data_problems(resumed)])
    changed = change_notes(before, joined)
    words, save = [*words, *more], joined.save
    joined = parse([*resumed.record.words, *argv, *more])
    joined.save = save
    changes = differing(before, joined)
    joined.load = None  # what it loaded is in the checkpoint
    if not joined.dry_run:
        refuse_running(resumed.checkpoint.folder)
    joined_words = [*resumed.record.words, *words] if changes else resumed.record.words
    anew = [name for name in ("valid_data", "eval_answers") if name in changes]
    if "valid_data" in anew and is_same_evaluation(resumed, joined):
        anew.remove("valid_data")
    if "valid_data" not in anew and (other := other_evaluated_files(resumed, joined)):
        changed += [f"{file}: other rows than the run evaluated on before." for file in other]
        anew.append("valid_data")
    if not (joined.keep_best or joined.early_stopping):
        anew = []
    changed += [
        f"{flag_with_value(name, getattr(joined, name))}: the best evaluation is looked for anew." for name in anew
    ]
    return CommandLine(joined_words, joined, resumed, [*notes, *more_notes, *changed], bool(anew))


def with_data_where_it_is(resumed: Resumed, before: Options, joined: Options) -> Resumed:
    """The run, with its data files under the names that --train-data gives them now, if they are the same files or copies."""
    record, then, now = resumed.record, before.train_data or [], joined.train_data or []
    if then == now or len(then) != len(now):
        return resumed
    try:
        is_same = [record.data.get(one) for one in then] == [digest(one) for one in now]
    except OSError:
        return resumed  # the checks of data say so
    if not is_same:
        return resumed
    names = dict(zip(then, now, strict=True))
    moved: dict[str, Any] = {
        part: {names.get(file, file): of_file for file, of_file in getattr(record, part).items()}
        for part in ("data", "left_out", "held_out", "rows")
    }
    return replace(resumed, record=replace(record, **moved))


def is_same_evaluation(resumed: Resumed, joined: Options) -> bool:
    """Whether --valid-data names the files that the run evaluated on, or copies, elsewhere."""
    files = joined.valid_data or []
    return bool(files) and [*resumed.record.evaluated.values()] == [
        digest(file) if Path(file).is_file() else "" for file in files
    ]


def other_evaluated_files(resumed: Resumed, joined: Options) -> list[str]:
    """Those of --valid-data that have other rows now."""
    stored = resumed.record.evaluated
    files = [file for file in joined.valid_data or [] if file in stored and Path(file).is_file()]
    return [file for file in files if digest(file) != stored[file]]


def for_these_processes(ranks_before: int, before: Options, joined: Options) -> tuple[list[str], list[str]]:
    """Flags that let a step take as many samples as before, on another number of data-parallel processes; and a note.

    Then every row of the rest of the run comes once, and in the same step as it would have. Nothing is added where the
    person says how many samples a process takes.

    Raises:
        InputError: accumulation alone can't do that.
    """
    ranks = world_size() // joined.model_parallel_size
    if ranks in (0, ranks_before) or {"batch_size", "gradient_accumulation_steps"} & {*differing(before, joined)}:
        return [], []
    steps, rest = divmod(before.gradient_accumulation_steps * ranks_before, ranks)
    if rest or joined.group_by_length:  # which sorts what a micro-batch of all processes takes
        at_once = before.batch_size * ranks_before
        samples = at_once * before.gradient_accumulation_steps
        if at_once % ranks == 0:
            needed = f"--batch-size {at_once // ranks} is needed"
        elif samples % ranks == 0 and not joined.group_by_length:
            own = samples // ranks
            size = max(size for size in range(1, before.batch_size + 1) if own % size == 0)
            needed = f"--batch-size {size} --gradient-accumulation-steps {own // size} is needed"
        else:
            shared = at_once if joined.group_by_length else samples
            needed = f"a number of processes that {shared} can be divided by is needed"
        raise InputError(
            f"--resume: {ranks} data-parallel processes found, the run had {ranks_before}; {needed}, so that a step takes the "
            "same samples, or as many processes as before."
        )
    note = (
        f"{ranks} data-parallel processes go on where {ranks_before} were: each takes {steps} micro-batches for a step."
    )
    return ["--gradient-accumulation-steps", str(steps)], [note]


def _loading(words: list[str], options: Options) -> CommandLine:
    """A command line with --load. The sizes of its adapters, which are not flags then, are put in front of the others."""
    assert options.load is not None
    folder = Path(options.load).expanduser()
    run = None if folder.exists() else newest_run_named(folder)
    if run is not None:
        words = [*words, "--load", str(run)]
        return _loading(words, parse(words))
    if not (folder / "latest").is_file():
        return CommandLine(words, options)  # `flag_checks` says so, with what else is wrong
    checkpoint = Checkpoint.at(folder)
    stored = AdapterConfig.from_json(checkpoint.config)
    sizes: dict[str, object] = {**stored.to_json()}
    of_checkpoint = [
        word
        for key in stored.fixed_keys()
        if sizes[key] is not None
        for word in (flag_names()[key], *_words(sizes[key]))
    ]
    joined = parse([*of_checkpoint, *words])
    raise_problems(loading_problems(joined, stored))
    return CommandLine([*of_checkpoint, *words], joined, None, loading_notes(joined, checkpoint))


def _words(value: object) -> list[str]:
    return [shown(item) for item in value] if isinstance(value, list) else [shown(value)]


def loading_problems(options: Options, stored: AdapterConfig) -> list[str]:
    """What keeps the adapters of --load's checkpoint from being loaded."""
    asked = AdapterConfig.from_options(options)
    sizes: dict[str, object] = {**stored.to_json()}
    problems = [
        f"{flag_with_value(key, getattr(options, key))}: --load {options.load} has adapters with "
        f"{flag_with_value(key, sizes[key]) if sizes[key] else f'no {flag_names()[key]}'}; the same is needed, or no {flag_names()[key]}."
        for key in stored.differing_keys(asked)
        if key in stored.fixed_keys()
    ]
    for has, wants, flag in (
        (stored.has_lora, asked.has_lora, "--use_lora"),
        (stored.has_ptuning, asked.has_ptuning, "--use_ptuning"),
    ):
        if has and not wants:
            problems.append(
                f"--load {options.load}: it was trained with {flag}, and without that its adapter would be left out; {flag} "
                "is needed, or --from_pretrained in place of --load."
            )
    return problems


def loading_notes(options: Options, checkpoint: Checkpoint) -> list[str]:
    """What --load, --mode and --resume-dataloader do to the adapter, the rate and the data, a sentence each."""
    stored, asked = AdapterConfig.from_json(checkpoint.config), AdapterConfig.from_options(options)
    fresh = [method for method, has in (("LoRA", stored.has_lora or not asked.has_lora),
                                        ("P-Tuning", stored.has_ptuning or not asked.has_ptuning)) if not has]  # fmt: skip
    notes = [f"--load {options.load}: its weights, with a fresh optimizer; --resume would go on exactly."]
    if fresh:
        notes.append(f"It has no {' and no '.join(fresh)}: that starts from fresh values.")
    iteration = loaded_iteration(options)
    if not iteration:
        notes.append(
            f"--mode {options.mode}: iteration, learning rate and data start from the beginning."
            + (" --resume-dataloader has nothing to leave out." if options.resume_dataloader else "")
        )
        return notes
    if options.auto_warmup_steps:
        notes.append(
            f"--mode pretrain: after iteration {iteration}, the next {options.auto_warmup_steps} steps use at most 5 % of --lr "
            f"({0.05 * options.lr:.2g}), as SAT does; --auto_warmup_steps changes that."
        )
    else:
        notes.append(f"--mode pretrain: the learning rate is that after iteration {iteration}.")
    notes.append(
        f"--resume-dataloader: the data goes on after iteration {iteration}."
        if options.resume_dataloader
        else "The data starts from the beginning; --resume-dataloader goes on where the checkpoint stopped."
    )
    return notes


def loaded_iteration(options: Options) -> int:
    """The iteration that SAT counts on from: --load's, with --mode pretrain; else 0."""
    if not options.load or options.mode != "pretrain":
        return 0
    iteration = Checkpoint.at(Path(options.load).expanduser()).iteration
    return int(iteration) if iteration.isdecimal() else 0


def _newest(options: Options) -> tuple[Resumed | None, list[str]]:
    if options.save is None:
        raise InputError("--resume auto: --save none; the folder where the experiment's checkpoints are is needed.")
    resumed, notes = newest_run(Path(options.save).expanduser(), options.experiment_name)
    if resumed is None:
        notes.append(
            f"--resume auto: no checkpoint of {options.experiment_name} under {options.save} can be resumed; a fresh run "
            "starts."
        )
    return resumed, notes


def own_words(argv: Sequence[str]) -> list[str]:
    """A command line without --resume and what a launcher adds to it."""
    words: list[str] = []
    is_value = False
    for word in argv:
        if is_value:
            is_value = False
        elif word in NOT_OF_THE_RUN:
            is_value = True
        elif word.split("=")[0] not in NOT_OF_THE_RUN:
            words.append(word)
    return words


def differing(before: Options, joined: Options) -> list[str]:
    """The flags, by attribute, that have another value now than in the run."""
    apart = {"resume", "local_rank"}
    return sorted(name for name in joined.user_set - apart if getattr(joined, name) != getattr(before, name))


def fixed_problems(before: Options, joined: Options, has_moved_data: bool) -> list[str]:
    """Which flags are others now although they have to stay as they are.

    Args:
        has_moved_data: --train-data names the same files, or copies.
    """
    stay = FIXED.keys() - {*(["train_data"] if has_moved_data else []), *same_place(before, joined)}
    problems = [
        f"{flag_with_value(name, getattr(joined, name))}: the run has {_value(before, name)}, and {FIXED[name]}; the same is "
        "needed, or a new run."
        for name in differing(before, joined)
        if name in stay
    ]
    if before.holdout is not None and joined.valid_data:
        problems.append(
            f"{flag_with_value('valid_data', joined.valid_data)}: the run has {flag_with_value('holdout', before.holdout)}, whose rows it "
            "evaluates on; --resume is needed without --valid-data, or a new run."
        )
    if (before.epochs is None) != (joined.epochs is None):
        problems.append(
            f"--epochs {joined.epochs}: the run counts --train-iters, and --epochs goes through the rows in another order; "
            "--train-iters is needed."
        )
    elif before.epochs is not None and joined.train_iters is not None:
        problems.append(
            f"--train-iters {joined.train_iters}: the run counts --epochs, and --train-iters goes through the rows in another "
            "order; --epochs is needed."
        )
    return problems


def same_place(before: Options, joined: Options) -> list[str]:
    """--from_pretrained's attribute, if it names the run's folder by another path."""
    paths = [Path(options.from_pretrained or "").expanduser() for options in (before, joined)]
    return ["from_pretrained"] if all(path.exists() for path in paths) and paths[0].samefile(paths[1]) else []


def change_notes(before: Options, joined: Options) -> list[str]:
    """A sentence for each flag that is another one now and changes what is computed."""
    return [
        f"{flag_with_value(name, getattr(joined, name))} from here on; the run had {_value(before, name)}, and with it would "
        f"go on otherwise{_SCHEDULE if name in ('train_iters', 'epochs') else ''}."
        for name in differing(before, joined)
        if name not in FREE
        and name not in FIXED
        and not (name == "zero_stage" and before.zero_stage and joined.zero_stage)
    ]


_SCHEDULE = ": the learning rate falls over all steps, unless --lr-decay-iters says over how many"


def _value(options: Options, name: str) -> str:
    value = getattr(options, name)
    return f"no {flag_names()[name]}" if value is None or value is False or value == [] else shown(value)


def data_problems(resumed: Resumed) -> list[str]:
    """Which files of --train-data are not those that the run was trained on."""
    problems = []
    for path, stored in resumed.record.data.items():
        try:
            found = digest(path)
        except OSError as error:
            problems.append(
                f"{path}: {error.strerror}; the run was trained on it, and it is needed to go on; --train-data with "
                "its place now, if it has moved."
            )
            continue
        if found != stored:
            problems.append(
                f"{path}: other rows than the run was trained on (SHA-256 {stored[:12]}, found {found[:12]}); the file as it "
                "was is needed, or a new run that starts from the checkpoint with --from_pretrained."
            )
    return problems


def steps_problems(options: Options, steps: int) -> list[str]:
    """Why --load leaves nothing to train, if that is so.

    Args:
        steps: of the whole run.
    """
    iteration = loaded_iteration(options)
    if not iteration or iteration < steps:
        return []
    return [
        f"--load {options.load}: it is at iteration {iteration}, and --mode pretrain goes on from there to {steps}, so nothing "
        f"is left to train; a higher {_length_flag(options)} is needed, or --mode finetune, which starts at 0."
    ]


def finished_note(line: CommandLine, steps: int) -> str | None:
    """Why a run that was to go on has nothing left to do, if that is so.

    Args:
        steps: of the whole run, with the flags of now.
    """
    if line.resumed is None:
        return None
    folder, done = line.resumed.checkpoint.folder, line.steps_done
    ending = Ending.of(folder)
    if ending is not None and ending.iteration != done:  # it went on since, or an earlier iteration is asked for
        ending = None
    if done >= steps and (ending or done != line.resumed.record.steps):  # else it was killed after its last step
        return (
            f"{folder}: iteration {done} of {steps} is done, so nothing is left to train. A higher "
            f"{_length_flag(line.options)} goes on."
        )
    if ending and ending.early_stopping and (line.options.early_stopping or math.inf) <= ending.early_stopping:
        return (
            f"{folder}: the run ended at iteration {done} of {steps} (--early_stopping {ending.early_stopping}), so nothing "
            "is left to train. A higher --early_stopping goes on."
        )
    return None


def _length_flag(options: Options) -> str:
    return "--epochs" if options.epochs else "--train-iters"
