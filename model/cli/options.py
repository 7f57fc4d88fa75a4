"""The command line of `finetune_visualglm.py`: every flag with its help, and `parse`.

Our parser tells a person what is wrong; SAT's then reads the same command line again. So the names, types, choices and
defaults of SAT's and DeepSpeed's flags are theirs (`model.cli.sat_flags`), and a test compares them. Only the standard
library is imported: a wrong command line is refused before torch would have been loaded.

A new flag takes two lines here: its annotation in `Options`, and its help in `_add_script_flags`.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from os.path import expanduser
from typing import NoReturn

from model.chinese import UI_LANGUAGES, choose_ui_language
from model.cli.flag_parser import FlagParser
from model.cli.sat_flags import SatOptions, add_sat_flags
from model.model_flags import MethodOptions, ModelOptions, add_method_flags, add_model_flags

SCRIPT = "finetune_visualglm.py"
FIND_LR_STEPS = 100
SAT_TRAIN_ITERS = 10_000  # steps, without --train-iters and --epochs
MEASURES = ("loss", "exact", "rouge_l")  # that an evaluation can be the best by

# Flags of Hugging Face's trainer, of those built on it and of our other commands, and what they are here.
FOREIGN_FLAGS: Mapping[str, str] = {
    "--learning_rate": "--lr",
    "--num_train_epochs": "--epochs",
    "--max_steps": "--train-iters",
    "--warmup_ratio": "--warmup",
    "--warmup_steps": "--warmup",
    "--gradient_checkpointing": "--checkpoint-activations",
    "--train_file": "--train-data",
    "--per_device_train_batch_size": "--batch-size",
    "--per_device_eval_batch_size": "--eval-batch-size",
    "--model_name_or_path": "--from_pretrained",
    "--data": "--train-data",
    "--output_dir": "--save",
    "--save_steps": "--save-interval",
    "--eval_steps": "--eval-interval",
    "--logging_steps": "--log-interval",
    "--resume_from_checkpoint": "--resume",
}

# What people need first: the flags that --help shows, in this order.
FIRST_FLAGS: Mapping[str, Sequence[str]] = {
    "data": ("--train-data", "--holdout"),
    "method, one at least": ("--use_lora", "--use_qlora", "--use_ptuning"),
    "training": ("--from_pretrained", "--epochs", "--lr", "--save"),
}
FIRST_EXAMPLES = """\
examples:
  a first run in seconds, without a GPU; after each epoch it prints the loss of the 4 rows that are held out:
    python finetune_visualglm.py --use_lora --from_pretrained model/tiny --train-data fewshot-data/dataset.json \\
      --holdout 4 --epochs 20 --lr 0.01
  your own rows on two GPUs, in half precision; the checkpoint with the lowest held-out loss is kept:
    deepspeed --num_gpus 2 finetune_visualglm.py --use_lora --mode finetune --train-data rows.json \\
      --holdout 0.1 --keep_best --epochs 3 --fp16 --zero-stage 1 --save checkpoints

--help all shows every flag.
"""

EXAMPLES = """\
examples:
  LoRA on your own rows, every row trained on:
    python finetune_visualglm.py --use_lora --mode finetune --train-data rows.json --save checkpoints
  LoRA in layers 0 and 14, evaluated every 50 iterations on rows of its own:
    python finetune_visualglm.py --use_lora --layer_range 0 14 --mode finetune --train-data rows.json \\
      --valid-data heldout.json --eval-interval 50 --eval-batch-size 4 --train-iters 300 --fp16 --save checkpoints
  P-Tuning v2 on two GPUs:
    deepspeed --num_gpus 2 finetune_visualglm.py --use_ptuning --pre_seq_len 4 --mode finetune --fp16 --zero-stage 1 \\
      --train-data rows.json --save checkpoints
"""


class Options(SatOptions, MethodOptions, ModelOptions):
    """A parsed command line: an attribute for each flag.

    A plain class, not argparse's Namespace: of that mypy takes any attribute, the misspelt ones too.
    """

    # fine-tuning VisualGLM
    from_pretrained: str
    revision: str | None
    base: str | None
    force_base: bool
    save_full_model: bool
    save_total_limit: int | None
    tokenizer: str | None
    max_source_length: int | None  # None: auto
    max_target_length: int | None  # None: auto
    lang: str
    image_size: int | None
    image_folder: str | None
    bad_rows: str
    check_seconds: float
    holdout: float | None
    keep_best: str | None
    early_stopping: int | None
    find_lr: bool
    answers: int
    eval_answers: int
    max_skipped_steps: int
    rank_timeout: float
    source_prefix: str
    ignore_pad_token_for_loss: bool
    feature_cache: str | None
    loss_normalization: str
    packing: bool
    group_by_length: bool
    auto_warmup_steps: int
    ui_lang: str
    resume: str | None
    config: str | None
    dry_run: bool
    gpu_memory: int | None  # bytes
    auto_batch_size: bool

    user_set: frozenset[str]  # the attributes that the user gave a value, be it the default

    def __init__(self, values: Mapping[str, object], user_set: frozenset[str]) -> None:
        """Options with these values of all flags, by attribute."""
        self.__dict__.update(values)
        self.user_set = user_set


# --- flags: one table per group, read from top to bottom --------------------------------------------------------------


def _add_script_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("fine-tuning VisualGLM").add_argument
    # fmt: off
    add("-h", "--help", action=_Help, nargs="?", choices=["all"], metavar="all",
        help="Show what is needed first and leave; --help all shows every flag.")
    add("--from_pretrained", default="visualglm-6b", metavar="NAME_OR_FOLDER",
        help="Checkpoint to start from, in SAT's or Hugging Face's layout: a folder, a name in $SAT_HOME (~/.sat_models), "
             "or OWNER/NAME of the hub (default %(default)s).")
    add("--revision", metavar="NAME", help="Branch, tag or commit of the hub's checkpoint (default: its newest).")
    add("--base", metavar="NAME_OR_FOLDER",
        help="Base of an adapter checkpoint, where it isn't in the place that the checkpoint remembers.")
    add("--force_base", action="store_true", help="Take --base although the adapter was trained on other weights.")
    add("--save_full_model", action="store_true",
        help="Save every weight, for the released tools, and not only what was trained.")
    add("--save_total_limit", type=int, metavar="N",
        help="Iterations that are kept: once a new one is safe, the oldest are removed, but never the one in the folder "
             "best (default: all).")
    add("--tokenizer", metavar="PATH",
        help="Folder with ice_text.model, or that file, for a checkpoint that has none (default: the hub's).")
    add("--max_source_length", type=length_or_auto, default=64, metavar="N|auto",
        help="Longest question in tokens, picture, frame and history included; where a row has more, the oldest turns "
             "leave first, then the prompt is shortened; auto takes what the data needs (default %(default)s).")
    add("--max_target_length", type=length_or_auto, default=256, metavar="N|auto",
        help="Longest answer in tokens; longer labels are cut; auto takes what the data needs (default %(default)s).")
    add("--lang", default="zh", choices=["zh", "en"],
        help='The frame of rows without a "lang" of their own: 问：…答：… or Q:…A:… (default %(default)s).')
    add("--image_size", type=int, metavar="N",
        help="Edge of the picture in pixels; another one than the checkpoint's interpolates its position embeddings "
             "(default: the checkpoint's).")
    add("--image_folder", metavar="FOLDER",
        help="Where the pictures of rows are whose paths are relative (default: the working directory, the JSON file's folder, "
             "or the one above it).")
    add("--bad_rows", default="error", choices=["error", "skip"],
        help="What to do about rows that can't be used and pictures that can't be opened: name them and stop, or leave "
             "them out and say how many (default %(default)s).")
    add("--check_seconds", type=float, default=2.0, metavar="S",
        help="How long pictures may be looked for and opened before training, those remembered from earlier runs aside; "
             "the rest are opened while training; inf opens all first (default %(default)s).")
    add("--holdout", type=_rows_or_share, metavar="N|FRACTION",
        help="Rows of --train-data to evaluate on, and whose pictures are never trained on: how many, or which share "
             "(default: none).")
    add("--keep_best", type=_measure, nargs="?", const="loss", metavar="|".join(MEASURES),
        help="Keep the checkpoint of the best evaluation, in the folder best beside the others: by its loss, or with "
             "--eval_answers by its answers (default: not kept; loss without a value).")
    add("--early_stopping", type=int, metavar="N",
        help="End after N evaluations in a row that are no better than the best so far, by the measure of --keep_best or by "
             "the loss (default: go on).")
    add("--find_lr", action="store_true",
        help=f"Look for a rate in place of training: {FIND_LR_STEPS} steps with a rising one, their losses drawn to "
             "SAVE/NAME-find_lr.png, a rate proposed, nothing saved.")
    add("--eval_answers", type=int, default=0, metavar="N",
        help="Rows of each evaluation that are answered too: exact match, ROUGE-L and BLEU stand beside the loss (default: "
             "none); the same rows are answered before and after the run.")
    add("--answers", type=int, default=8, metavar="N",
        help="Rows that are answered before the first step and after the last, held-out ones where there are any: the run's "
             "last lines and report.html show what changed (default %(default)s; 0, and with ZeRO 3: none).")
    add("--max_skipped_steps", type=int, default=20, metavar="N",
        help="Stop after N optimizer steps in a row whose loss or gradient isn't finite, or in which no row could be used "
             "(default %(default)s: in 17 of them fp16's loss scale falls from 65536 to 1).")
    add("--rank_timeout", type=float, default=60.0, metavar="SECONDS",
        help="End a run of several processes when one of them was killed, is stopped or can't be reached for so long; 0: "
             "wait for ever (default %(default)g).")
    add("--source_prefix", default="", metavar="TEXT",
        help="Text put before every prompt (default: none).")
    add("--ignore_pad_token_for_loss", type=_truth, nargs="?", const=True, default=True, metavar="true|false",
        help="Whether padding is left out of the loss (default true).")
    add("--feature_cache", metavar="FOLDER",
        help="Keep the frozen vision tower's features of each picture there, so that later runs need not compute them again "
             "(default: kept for this run only).")
    add("--loss_normalization", choices=["micro_batch", "token"], default="micro_batch",
        help="What the loss is a mean over: each process's micro-batch, as released, or all supervised tokens of an "
             "optimizer step, however it is cut (default %(default)s).")
    add("--packing", action="store_true",
        help="Put several short rows of a batch behind each other in one sequence; the loss stays the same. Meant for GPUs: "
             "on a CPU, attention over long sequences is several times slower.")
    add("--group_by_length", action="store_true",
        help="Put rows of about the same length into a batch, so that less of it is padding; the order of the batches "
             "stays one of chance.")
    add("--auto_warmup_steps", type=int, default=100, metavar="N",
        help="Iterations that SAT holds at 5 %% of --lr at most, with --mode finetune (default %(default)s).")
    add("--ui_lang", default="auto", choices=UI_LANGUAGES,
        help="Language of the most common messages, 中文 or English; auto goes by $VISUALGLM_UI_LANG, then by the locale "
             "(default %(default)s).")
    add("--resume", metavar="FOLDER|auto",
        help="Go on with the run in this folder as if it had never stopped; flags that are not given are the run's; "
             "--train-data may name the same files elsewhere. auto: the newest checkpoint of --experiment-name under --save, or a "
             "fresh run. A run that still goes on is refused.")
    add("--config", metavar="FILE.yaml",
        help="Flags, one a line: `lr: 0.001`, `use_lora: true`; those on the command line win, but for a recipe's own. A "
             "run's settings.json is such a file too.")
    add("--dry_run", action="store_true",
        help="Check everything, print how much memory the run would take and on what, and end.")
    add("--gpu_memory", type=_memory, metavar="SIZE",
        help="Memory of a GPU, such as 24GB, for --dry_run and --batch-size auto (default: that of the GPUs found).")
    add("--auto_batch_size", action="store_true",
        help="Take the largest --batch-size that fits; a step keeps its samples (--batch-size times "
             "--gradient-accumulation-steps). --batch-size auto says the same.")
    # fmt: on


def _rows_or_share(text: str) -> float:
    """A whole number is an int, so that it is shown as it was typed."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _measure(text: str) -> str | None:
    words = {**{measure: measure for measure in MEASURES}, "true": "loss", "false": None}  # the latter two in a file
    if text not in words:
        raise argparse.ArgumentTypeError(f'"{text}" found; one of {", ".join(MEASURES)} is needed')
    return words[text]


def length_or_auto(text: str) -> int | None:
    """A number of tokens, or None for auto."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" found; a whole number or auto is needed') from None


def _memory(text: str) -> int:
    """Bytes: of 24, 24GB or 24GiB. A run's settings.json has bytes: no GPU has a million GB."""
    match = re.fullmatch(r"(\d+\.?\d*) *(GB|G|GiB)?", text.strip(), re.IGNORECASE)
    number, unit = (float(match[1]), (match[2] or "").lower()) if match else (0.0, "")
    if number <= 0:
        raise argparse.ArgumentTypeError(f'"{text}" found; a size such as 24GB is needed')
    if not unit and number >= 10**6:
        return int(number)
    return int(number * (2**30 if unit == "gib" else 10**9))


def _truth(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f'"{text}" found; true or false is needed')
    return words[text.lower()]


def whole_flags(argv: Sequence[str]) -> list[str]:
    """argv with the flags that argparse takes for abbreviations in full, so that all who look for one find it."""
    return [_whole_flag(word) for word in argv]


def _whole_flag(word: str) -> str:
    flag, is_assigned, value = word.partition("=")
    meant = [known for known in flag_names().values() if known.startswith(flag)] if flag.startswith("--") else []
    return f"{meant[0]}{is_assigned}{value}" if len(meant) == 1 else word


def spelled_out(argv: Sequence[str]) -> list[str]:
    """argv with --batch-size auto, which SAT's parser doesn't know, as --auto_batch_size, and the user's own folder for ~.

    Of `--save=~/runs`, and of words in a --config file, the shell leaves the ~ as it is. In a text it stays.
    """
    words: list[str] = []
    flag = ""
    for word in argv:
        is_value = word == "auto" and words and words[-1] in ("--batch-size", "--batch_size")
        if is_value:
            words[-1] = "--auto_batch_size"
        elif word == "--batch-size=auto":
            words.append("--auto_batch_size")
        elif word.startswith("--"):
            flag, is_assigned, value = word.partition("=")
            words.append(f"{flag}={expanduser(value)}" if is_assigned and flag in path_flags() else word)
        else:
            words.append(expanduser(word) if flag in path_flags() else word)
    return words


@functools.cache
def path_flags() -> frozenset[str]:
    """The flags that take files and folders, as their help says."""
    return frozenset(
        action.option_strings[-1]
        for action in full_parser()._actions
        if re.search("FILE|FOLDER|PATH", str(action.metavar))
    )


# --- parsing ----------------------------------------------------------------------------------------------------------


class _Help(argparse.Action):
    """--help shows the first flags, --help all every flag; both end the program with status 0."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **kwargs)  # type: ignore[arg-type]

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: object, *_: object) -> NoReturn:
        print(parser.format_help() if values == "all" else first_help(parser), end="")
        sys.exit(0)


def first_help(parser: argparse.ArgumentParser) -> str:
    """What --help shows: the flags that people need first, and examples."""
    formatter = parser.formatter_class(prog=parser.prog)
    formatter.add_usage(parser.usage, [], [])
    formatter.add_text(parser.description)
    actions = {action.option_strings[-1]: action for action in parser._actions}
    for heading, flags in FIRST_FLAGS.items():
        formatter.start_section(heading)
        formatter.add_arguments(actions[flag] for flag in flags)
        formatter.end_section()
    formatter.add_text(FIRST_EXAMPLES)
    return formatter.format_help()


def script_parser() -> FlagParser:
    """A parser that knows the flags that are neither SAT's nor DeepSpeed's: `sat.get_args` adds those to it."""
    parser = FlagParser(
        prog=SCRIPT,
        usage=f"{SCRIPT} (--use_lora | --use_qlora | --use_ptuning) --train-data FILE [FILE ...] [flags]",
        description="Fine-tune VisualGLM on rows of picture, question and answer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,  # it would open a group of its own above ours
        help_with_every_flag="--help all",
        foreign_flags=FOREIGN_FLAGS,
    )
    _add_script_flags(parser)
    add_method_flags(parser)
    add_model_flags(parser)
    return parser


def full_parser() -> FlagParser:
    """A parser that knows every flag: ours, SAT's and DeepSpeed's."""
    parser = script_parser()
    add_sat_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> Options:
    """The options of a command line, given without the script's name.

    Prints and exits where argparse does: with status 0 for `--help`, with status 2 and a sentence on standard error for
    an unknown flag, a missing value or a value of the wrong type.
    """
    argv = whole_flags(argv)
    choose_ui_language(_ui_language(argv))
    parser = full_parser()
    defaults: dict[str, object] = vars(parser.parse_args([]))
    absent = object()
    found = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, absent)))
    given = {name: value for name, value in vars(found).items() if value is not absent}
    return Options({**defaults, **given}, frozenset(given))


def _ui_language(argv: Sequence[str]) -> str:
    """The value of --ui_lang, known before the other flags so that their errors are told in it; auto if it has none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--ui_lang", nargs="?")
    language = parser.parse_known_args(argv)[0].ui_lang
    return language if language in UI_LANGUAGES else "auto"


@functools.cache
def flag_names() -> dict[str, str]:
    """Which flag sets an attribute of Options: {"train_data": "--train-data", …}."""
    return {action.dest: action.option_strings[-1] for action in full_parser()._actions}


def flag_with_value(name: str, value: object) -> str:
    """A flag and its value as they stand on a command line: `--layer_range 0 14`, `--fp16`."""
    flag = flag_names()[name]
    return flag if value is True else f"{flag} {'none' if value is None else shown(value)}"


def shown(value: object) -> str:
    """A value as it stands on a command line, or in JSON."""
    if isinstance(value, list):
        return " ".join(shown(item) for item in value) or "nothing"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
