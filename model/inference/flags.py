"""The flags that commands which answer have in common; without torch."""

import argparse

from model.checkpoints.layout import Checkpoint
from model.errors import InputError
from model.hub import at_revision
from model.inference.sampling import Sampling


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
    return Checkpoint.find(at_revision(options.from_pretrained, options.revision))


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


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Declare how tokens are chosen, with the released demo's numbers but for the default temperature."""
    add = parser.add_argument
    # fmt: off
    add("--top_p", type=float, default=0.4, metavar="P",
        help="sample from the likeliest tokens of this total probability (default %(default)s)")
    add("--top_k", type=int, default=100, metavar="N", help="sample from this many likeliest tokens (default %(default)s)")
    add("--temperature", type=float, default=temperature, metavar="X",
        help="of sampling; 0 always takes the likeliest token (default %(default)s)")
    add("--seed", type=int, metavar="N", help="random seed: the same one gives the same answers")
    # fmt: on


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
