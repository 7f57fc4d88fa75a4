"""The flags of number formats: their defaults, and what they take."""

import argparse

import pytest

from model.inference.flags import add_number_format_flags
from model.inference.load import DTYPES


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_number_format_flags(parser)
    return parser.parse_args(words)


def test_defaults_are_auto_and_no_quantisation() -> None:
    assert vars(parsed()) == {"dtype": "auto", "quant": None}


def test_every_dtype_of_the_flag_can_be_loaded() -> None:
    assert [parsed("--dtype", name).dtype for name in ("auto", *DTYPES)] == ["auto", *DTYPES]


@pytest.mark.parametrize("words", [("--quant", "5"), ("--dtype", "int8")])
def test_another_format_is_refused(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*words)
