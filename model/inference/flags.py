"""The flags of number formats, which every command that answers has; without torch."""

import argparse


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
