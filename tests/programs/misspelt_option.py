"""Not to be run: mypy must find the misspelt option, and the wrong type, on the lines that say so."""

from model.cli.options import Options


def half_precision(options: Options) -> bool:
    return options.fp16 or options.bf61  # misspelt


def longest(options: Options) -> int:
    return options.max_source_length + 1  # wrong type: None is auto
