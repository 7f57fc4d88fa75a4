"""Convert a checkpoint: SAT's layout into Hugging Face's and back, or a LoRA adapter into PEFT's and back.

python scripts/convert_checkpoint.py visualglm-6b published --to hf
python scripts/convert_checkpoint.py THUDM/visualglm-6b visualglm-6b --to sat
python scripts/convert_checkpoint.py checkpoints/finetune-visualglm-6b-01-31-12-00 adapter --to peft
python scripts/convert_checkpoint.py adapter tuned --to sat --base THUDM/visualglm-6b

A checkpoint in either layout is loaded as it is by the other commands: convert it for other tools, not for these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import re
from collections.abc import Sequence

from model.checkpoints.layout import Checkpoint
from model.checkpoints.sizes import new_folder_problems
from model.cli.flag_parser import FlagParser
from model.errors import command, raise_problems
from model.hub import at_revision
from model.progress import say, warn

BYTES = {"K": 10**3, "M": 10**6, "G": 10**9}


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("source", metavar="SRC",
        help="A checkpoint in either layout: a folder, a name in $SAT_HOME, or OWNER/NAME of the Hugging Face hub; or the "
             "folder of an adapter of PEFT's.")
    add("destination", metavar="DST", help="A new or empty folder.")
    add("--to", required=True, choices=["sat", "hf", "peft"],
        help="sat: model_config.json and mp_rank_00_model_states.pt. hf: config.json and safetensors. peft: the LoRA of a "
             "fine-tuned checkpoint alone, as adapter_config.json and adapter_model.safetensors.")
    add("--max_shard_size", type=_size, default=_size("2GB"), metavar="SIZE",
        help="Of one file with --to hf, such as 2GB (the default) or 500MB.")
    add("--old_sat", action=argparse.BooleanOptionalAction,
        help="SRC was written by SAT before July 2023, which ordered query_key_value otherwise; put it in order. The files "
             "don't say so. Trained weights that look like that end with a question; --no-old_sat takes them as they are.")
    add("--base", metavar="NAME_OR_FOLDER", help="The model that PEFT's adapter was trained on, with --to sat.")
    add("--tokenizer", metavar="PATH", help="ice_text.model, or a folder that holds it, if SRC has none.")
    add("--revision", metavar="NAME", help="Branch, tag or commit, where SRC is OWNER/NAME of the hub.")
    # fmt: on
    return parser


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text, re.IGNORECASE)
    size = int(float(found[1]) * BYTES[found[2].upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f'"{text}" found; a size such as 2GB or 500MB is needed')
    return size


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; bad input ends it with a sentence and status 2."""
    with command("convert_checkpoint.py"):
        folder = converted(command_line().parse_args(argv))
        say(f"Converted into {folder}.")


def converted(options: argparse.Namespace) -> Path:
    """The folder with what the command line asks for.

    Raises:
        InputError: it can't be done.
    """
    raise_problems(new_folder_problems("DST", options.destination))  # before anything is downloaded
    if Path(options.source, "adapter_config.json").expanduser().is_file() and options.to == "sat":
        from model.convert.peft import from_peft

        return from_peft(options.source, options.destination, options.base, options.tokenizer)
    checkpoint = Checkpoint.find(at_revision(options.source, options.revision), "SRC")  # before torch is loaded
    raise_problems(new_folder_problems("DST", options.destination, checkpoint))
    if options.to == "peft":
        from model.convert.peft import to_peft

        folder = to_peft(checkpoint, options.destination)
    else:
        from model.convert.huggingface import convert

        folder = convert(
            checkpoint, options.destination, options.to, options.max_shard_size, options.old_sat, options.tokenizer
        )
    if options.to != "sat":
        warn_of_what_stood_around_questions(checkpoint)
    return folder


def warn_of_what_stood_around_questions(checkpoint: Checkpoint) -> None:
    """Say so if the model was trained on questions that nobody asks it by themselves in another layout than SAT's."""
    asked_as = checkpoint.asked_as
    flags = [f'--source_prefix "{asked_as.source_prefix}"'] * bool(asked_as.source_prefix)
    flags += ["--lang en"] * asked_as.is_english()
    if flags:
        warn(
            f"{checkpoint.name}: trained with {' and '.join(flags)}, for which the other layout has no place; questions have to "
            "be put so there by whoever asks."
        )


if __name__ == "__main__":
    main()
