"""The flags of commands that answer: their defaults, and what they take."""

import argparse
import shutil
from pathlib import Path

import pytest

from model.checkpoints.layout import Checkpoint
from model.errors import InputError
from model.inference.flags import (
    add_checkpoint_flags,
    add_number_format_flags,
    add_sampling_flags,
    sampling_of,
    with_compared,
)
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


@pytest.mark.parametrize("other", ["model/tiny", "./model/tiny", "model/tiny/1", "linked"])
def test_compared_checkpoint_that_is_the_first_by_any_name_is_refused(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linked").symlink_to(Path("model/tiny").absolute())
    monkeypatch.setenv("SAT_HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"--compare {other}: the same as --from_pretrained"):
        with_compared(Checkpoint.find("model/tiny"), argparse.Namespace(compare=other))


def test_another_iteration_of_the_same_run_is_compared(tmp_path: Path) -> None:
    shutil.copytree("model/tiny", tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    first, second = (Checkpoint.find(tmp_path / iteration) for iteration in "12")
    assert with_compared(first, argparse.Namespace(compare=str(tmp_path / "2"))) == [first, second]


def test_without_compare_there_is_one_checkpoint() -> None:
    first = Checkpoint.find("model/tiny")
    assert with_compared(first, argparse.Namespace(compare=None)) == [first]
