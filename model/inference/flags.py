"""The flags that commands which answer have in common, and what they mean; imported without torch."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import answer_length, refuse_needless_base
from model.checkpoints.whole import is_same_file
from model.distributed import world_size
from model.errors import InputError
from model.hub import at_revision
from model.inference.sampling import Sampling
from model.progress import count_of

if TYPE_CHECKING:
    from model.data.remote_images import Limits
    from model.data.tokenizer import ChatGLMTokenizer
    from model.visualglm import VisualGLMModel

CONVERSATION_LENGTH = 2048  # tokens, in the released demos and API
ROW_LENGTH = 512  # tokens of a row's question and answer together


def refuse_launcher(program: str) -> None:
    """Raise an error if a launcher started several processes: each would do the whole work.

    Raises:
        InputError: as said.
    """
    if world_size() > 1:
        raise InputError(
            f"WORLD_SIZE={world_size()}: {program} runs in one process; a start without a launcher is needed. predict.py, "
            "evaluate.py and cli_demo.py take several."
        )


def add_model_parallel_flag(parser: argparse.ArgumentParser) -> None:
    """Declare how many of a launcher's processes share a model; the rows are shared out among those that don't."""
    parser.add_argument(
        "--model-parallel-size", type=int, default=1, metavar="N",
        help="processes that share a model, of those that a launcher started (default %(default)s)",
    )  # fmt: skip


def refuse_uneven_processes(parts: int) -> None:
    """Raise an error if so many processes can't share a model each.

    Raises:
        InputError: as said.
    """
    if parts < 1 or world_size() % parts:
        found = count_of(world_size(), "process", "processes")
        raise InputError(f"--model-parallel-size {parts}: {found} found; a divisor of them is needed.")


def add_checkpoint_flags(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Declare which checkpoint answers; without a default it has to be given."""
    add = parser.add_argument
    shown = " (default %(default)s)" if default else ""
    # fmt: off
    add("--from_pretrained", required=default is None, default=default, metavar="CHECKPOINT",
        help="a checkpoint of any kind: a folder, a part of it, a name in $SAT_HOME, or OWNER/NAME of the Hugging Face hub"
             + shown)
    add("--revision", metavar="NAME", help="branch, tag or commit of the hub's checkpoint")
    add("--base", metavar="NAME_OR_FOLDER", help="an adapter's base, if it has been moved")
    add("--force_base", action="store_true", help="take --base although the adapter was trained on other weights")
    add("--tokenizer", metavar="PATH", help="ice_text.model, where the checkpoint has none")
    # fmt: on


def found_checkpoint(options: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the flags name.

    Raises:
        InputError: there is none, or it can't be used.
    """
    checkpoint = Checkpoint.find(at_revision(options.from_pretrained, options.revision))
    if not getattr(options, "compare", None):  # the other one may be an adapter
        refuse_needless_base(checkpoint, options.base)
    return checkpoint


def with_compared(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Checkpoint]:
    """The checkpoint, and behind it that of --compare where it is given.

    Raises:
        InputError: there is none, or it can't be used, or it is the same one, whatever its name.
    """
    if not options.compare:
        return [checkpoint]
    other = Checkpoint.find(options.compare, "--compare")
    if is_same_file(checkpoint.folder, other.folder) and checkpoint.iteration == other.iteration:
        raise InputError(f"--compare {other.name}: the same as --from_pretrained; another checkpoint is needed.")
    return [checkpoint, other]


def add_number_format_flags(parser: argparse.ArgumentParser) -> None:
    """Declare --dtype and --quant; `load_for_answering` takes their values under the same names."""
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="numbers to answer in; auto takes what is fast here and fits into the free memory, and says what that is "
             "(default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quant", type=int, choices=(8, 4), help="keep weights in that many bits, on a CPU or an NVIDIA GPU"
    )


def loaded(
    checkpoint: Checkpoint, options: argparse.Namespace, model_parallel_size: int = 1
) -> "tuple[VisualGLMModel, ChatGLMTokenizer]":
    """A checkpoint's model and tokenizer, as `load_for_answering` gives them, in the number format of the flags."""
    from model.inference.load import load_for_answering

    return load_for_answering(
        checkpoint, options.tokenizer, options.base, options.force_base, options.quant, options.dtype,
        model_parallel_size,
    )  # fmt: skip


def add_max_length_flag(parser: argparse.ArgumentParser, of: str, default: int) -> None:
    """Declare how many tokens question and answer may have together."""
    parser.add_argument(
        "--max_length", type=int, metavar="N",
        help=f"tokens of {of} (default {default}, or as many as a smaller model takes)",
    )  # fmt: skip


def max_length_of(options: argparse.Namespace, checkpoints: Sequence[Checkpoint], default: int) -> int:
    """How many tokens question and answer may have together, with each of the checkpoints.

    Raises:
        InputError: --max_length is more than one of them takes.
    """
    positions = min(checkpoint.config.get("max_sequence_length", default) for checkpoint in checkpoints)
    return answer_length(positions, options.max_length, default)


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Declare how tokens are chosen, with the released demo's numbers but for the default temperature."""
    add = parser.add_argument
    # fmt: off
    add("--top_p", type=float, default=0.4, metavar="P",
        help="sample from the likeliest tokens of this total probability (default %(default)s)")
    add("--top_k", type=int, default=100, metavar="N", help="sample from this many likeliest tokens (default %(default)s)")
    add("--temperature", type=float, default=temperature, metavar="X",
        help="of sampling; 0 always takes the likeliest token (default %(default)s)")
    add("--seed", type=_seed, metavar="N",
        help="random seed: the same one gives the same answers; without it, too, each start of a command draws alike (in 16 "
             "bits, and with --quant 4, rounding depends on how many are answered at once)")
    # fmt: on


def _seed(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text):  # what torch's generators take, and a little less
        raise argparse.ArgumentTypeError(f"{text} found; a whole number of at most 18 digits is needed")
    return int(text)


def sampling_of(options: argparse.Namespace, invalid_slices: tuple[slice, ...] = ()) -> Sampling:
    """How the flags ask for tokens to be chosen, whatever --seed.

    Raises:
        InputError: a number is out of bounds.
    """
    if options.top_k < 1:
        raise InputError(f"--top_k {options.top_k}: 1 or more is needed.")
    return Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=1.0 if options.temperature == 0 else 1.2,
        invalid_slices=invalid_slices,
    )


def add_serving_flags(
    parser: argparse.ArgumentParser, *, port: int, queue: int, seconds: float, protected_by: str
) -> None:
    """Declare what servers have in common: where they listen, how many they answer, and what they take from strangers.

    Args:
        port, queue, seconds: the defaults of these flags.
        protected_by: the flag that keeps others out, with its article.
    """
    add = parser.add_argument
    # fmt: off
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help=f"listen there; 0.0.0.0 is everywhere, for which {protected_by} is advised (default %(default)s: this machine only)")
    add("--port", type=int, default=port, metavar="N", help="listen there; 0 takes a free one (default %(default)s)")
    add("--rows", type=int, default=4, metavar="N",
        help="answers that are made at once; each takes memory for --max_length tokens (default %(default)s)")
    add("--queue", type=int, default=queue, metavar="N", help="questions that may wait besides (default %(default)s)")
    add_max_length_flag(parser, "a conversation", CONVERSATION_LENGTH)
    add("--seconds", type=float, default=seconds, metavar="X", help="for an answer; then it is cut off (default %(default)s)")
    add("--max_image", type=float, default=10.0, metavar="MIB", help="of a picture's file (default %(default)s)")
    add("--max_pixels", type=float, default=50.0, metavar="MILLION", help="of a picture (default %(default)s)")
    add("--private_images", action="store_true",
        help="also fetch pictures from this machine and from private networks: whoever may ask can then reach them")
    # fmt: on


def serving_problems(
    options: argparse.Namespace, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()
) -> list[str]:
    """A sentence for each of the serving flags that is out of bounds, and of those that a command has besides."""
    problems = [
        f"--{name} {getattr(options, name)}: more than 0 is needed."
        for name in ("rows", "seconds", *positive, "max_image", "max_pixels")
        if not getattr(options, name) > 0
    ]
    problems += [
        f"--{name} {getattr(options, name)}: 0 or more is needed."
        for name in ("queue", *not_negative)
        if getattr(options, name) < 0
    ]
    if not 0 <= options.port < 2**16:
        problems.append(f"--port {options.port}: a number from 0 to 65535 is needed.")
    return problems


def secret_of(flag: str, typed: str | None, variable: str) -> tuple[str, str | None]:
    """Who says the secret, as a message names it, and what it is: the flag if it was typed, else the variable if it is set."""
    if typed is None and variable in os.environ:
        return f"${variable}", os.environ[variable]
    return flag, typed


def image_limits(options: argparse.Namespace, seconds: float) -> "Limits":
    """What the serving flags take of a stranger's picture, which may take so many seconds to come."""
    from model.data.remote_images import Limits

    return Limits(options.private_images, int(options.max_image * 2**20), int(options.max_pixels * 1e6), seconds)
