"""Fold the LoRA of a checkpoint into its weights: the result is an ordinary VisualGLM checkpoint.

python scripts/merge_lora.py checkpoints/finetune-visualglm-6b-01-31-12-00 merged
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
from collections.abc import Sequence
from os.path import expanduser

from model.checkpoints.layout import Checkpoint
from model.cli.flag_parser import FlagParser
from model.errors import command
from model.progress import say


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint of LoRA or QLoRA: a folder, or a part of it"
    )
    parser.add_argument("out", type=expanduser, metavar="OUT", help="a new folder")
    parser.add_argument("--base", metavar="NAME_OR_FOLDER", help="the adapter's base, if it has been moved")
    parser.add_argument(
        "--force_base", action="store_true", help="take --base although the adapter was trained on other weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUT has")
    parser.add_argument("--tokenizer", metavar="PATH", help="ice_text.model, where the checkpoint has none")
    parser.add_argument(
        "--dtype", choices=["fp32"], help="write float32, in which nothing is lost to rounding (default: as the base)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("merge_lora.py"):
        options = command_line().parse_args(argv)
        checkpoint = Checkpoint.find(options.checkpoint, "CHECKPOINT")  # before torch is loaded
        from model.convert.merge_lora import merge

        folder = merge(
            checkpoint,
            options.out,
            options.base,
            options.force_base,
            options.overwrite,
            options.tokenizer,
            options.dtype,
        )
        say(f"Merged into {folder}.")


if __name__ == "__main__":
    main()
