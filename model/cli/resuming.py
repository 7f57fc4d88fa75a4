"""What a command line with --resume means: the run's own flags, and those that are given now.

    --resume FOLDER [flags]     flags not given now are the run's; those given now win, where that can be
    --resume auto flags         the newest checkpoint of --experiment-name under --save; without one, a fresh run

Only the standard library is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.adapter_config import ADAPTER_KEYS
from model.checkpoints.resume import Resumed, digest, newest_run, resumed_from
from model.cli.options import Options, flag_names, flag_with_value, parse, shown
from model.errors import InputError, raise_problems

AUTO = "auto"
NOT_OF_THE_RUN = ("--resume", "--local_rank", "--local-rank")  # launchers give each process its own number

# Flags that may be others now without a word: they change no step.
FREE = {
    "save_interval", "eval_interval", "eval_batch_size", "eval_iters", "strict_eval", "log_interval", "exit_interval",
    "num_workers", "prefetch_factor", "summary_dir", "wandb", "wandb_project_name", "save_args", "profiling", "check_seconds",
    "bad_rows", "feature_cache", "keep_best", "valid_data", "test_data", "base", "force_base", "tokenizer", "skip_init",
    "distributed_backend", "local_rank", "device", "checkpoint_activations", "checkpoint_num_layers",
    "checkpoint_skip_layers",
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

    @property
    def steps_done(self) -> int:
        """Optimizer steps that are behind."""
        return self.resumed.record.iteration if self.resumed else 0


def command_line(argv: Sequence[str]) -> CommandLine:
    """What argv means: as it stands, or with --resume joined to the run's own flags.

    Raises:
        InputError: there is nothing to resume, or it can't be resumed with these flags.
    """
    words, options = own_words(argv), parse(argv)
    if options.resume is None:
        return CommandLine(words, options)
    if options.resume == AUTO:
        resumed, notes = _newest(options)
    else:
        resumed, notes = resumed_from(options.resume), []
    if resumed is None:
        return CommandLine(words, options, None, notes)
    before, joined = parse(resumed.record.words), parse([*resumed.record.words, *argv])
    raise_problems([*fixed_problems(before, joined), *data_problems(resumed)])
    changes = differing(before, joined)
    joined_words = [*resumed.record.words, *words] if changes else resumed.record.words
    return CommandLine(joined_words, joined, resumed, [*notes, *change_notes(before, joined)])


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


def fixed_problems(before: Options, joined: Options) -> list[str]:
    """Which flags are others now although they have to stay as they are."""
    problems = [
        f"{flag_with_value(name, getattr(joined, name))}: the run has {_value(before, name)}, and {FIXED[name]}; the same is "
        "needed, or a new run."
        for name in differing(before, joined)
        if name in FIXED
    ]
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


def change_notes(before: Options, joined: Options) -> list[str]:
    """A sentence for each flag that is another one now and changes what is computed."""
    return [
        f"{flag_with_value(name, getattr(joined, name))} from here on; the run had {_value(before, name)}, and with it would "
        f"go on otherwise{_SCHEDULE if name in ('train_iters', 'epochs') else ''}."
        for name in differing(before, joined)
        if name not in FREE and name not in FIXED
    ]


_SCHEDULE = ": the learning rate falls over all steps, unless --lr-decay-iters says over how many"


def _value(options: Options, name: str) -> str:
    value = getattr(options, name)
    return f"no {flag_names()[name]}" if value in (None, False, []) else shown(value)


def data_problems(resumed: Resumed) -> list[str]:
    """Which files of --train-data are not those that the run was trained on."""
    problems = []
    for path, stored in resumed.record.data.items():
        try:
            found = digest(path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}; the run was trained on it, and it is needed to go on.")
            continue
        if found != stored:
            problems.append(
                f"{path}: other rows than the run was trained on (SHA-256 {stored[:12]}, found {found[:12]}); the file as it "
                "was is needed, or a new run that starts from the checkpoint with --from_pretrained."
            )
    return problems


def finished_note(line: CommandLine, steps: int) -> str | None:
    """Why a run that was to go on has nothing left to do, if that is so.

    Args:
        steps: of the whole run, with the flags of now.
    """
    if line.resumed is None or line.steps_done < steps:
        return None
    more = "--epochs" if line.options.epochs else "--train-iters"
    return (
        f"{line.resumed.checkpoint.folder}: iteration {line.steps_done} of {steps} is done, so nothing is left to train. A higher {more} "
        "goes on."
    )
