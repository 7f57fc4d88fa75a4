"""The flags of commands that answer: their defaults, and what they take."""

import argparse

import pytest

from model.errors import InputError
from model.inference.flags import add_checkpoint_flags, add_number_format_flags, add_sampling_flags, sampling_of
from model.inference.load import DTYPES
from model.inference.sampling import GREEDY


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


def sampling_flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser, temperature=0.0)
    return parser.parse_args(words)


def test_temperature_of_0_always_takes_the_likeliest_token() -> None:
    assert sampling_of(sampling_flags()).takes_the_likeliest == GREEDY.takes_the_likeliest
    assert sampling_of(sampling_flags("--temperature", "0.5")).repetition_penalty == 1.2


@pytest.mark.parametrize("words", [("--top_k", "0"), ("--top_p", "0"), ("--temperature", "-1")])
def test_sampling_out_of_bounds_is_refused(words: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=words[0]):
        sampling_of(sampling_flags(*words))


@pytest.mark.parametrize("seed", [str(10**18), "-" + "1" * 19, "1.5", ""])
def test_seed_that_torch_would_not_take_is_refused(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sampling_flags("--seed", seed)
    assert f"--seed: {seed} found; a whole number of at most 18 digits is needed" in capsys.readouterr().err
    assert sampling_flags("--seed", "-" + "9" * 18).seed == 1 - 10**18


def test_checkpoint_has_to_be_given_where_there_is_no_default() -> None:
    parser = argparse.ArgumentParser()
    add_checkpoint_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([])
