"""The parser of every command: a mistake on a command line is one sentence, and status 2."""

from importlib import import_module

import pytest
from conftest import PROJECT

SCRIPTS = sorted(path.stem for path in (PROJECT / "scripts").glob("*.py"))


def refusal(capsys: pytest.CaptureFixture[str], script: str, *words: str) -> str:
    """What a script says of a wrong command line on standard error, without its name."""
    parser = import_module(f"scripts.{script}").command_line()
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([*words])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.removeprefix(f"{parser.prog}: error: ")


@pytest.mark.parametrize(
    ("script", "words", "sentence"),
    [
        ("evaluate", ["--batch_size", "2"], "--batch_size: there is no such flag; did you mean --batch-size?"),
        ("evaluate", ["--form_pretrained", "a", "--data", "b"], "--form_pretrained: there is no such flag; did you mean --from_pretrained?"),
        ("cli_demo", ["--promt_zh=x"], "--promt_zh: there is no such flag; did you mean --prompt_zh?"),
        ("api", ["--max-length", "9"], "--max-length: there is no such flag; did you mean --max_length?"),
        ("cli_demo", ["-seed", "9"], "-seed: there is no such flag; did you mean --seed?"),
        ("check_data", ["--valid_data", "a"], "--valid_data: there is no such flag; did you mean --valid-data?"),
        ("convert_checkpoint", ["--old-sat"], "--old-sat: there is no such flag; did you mean --old_sat?"),
        ("check_data", ["--train-data", "a"], "--train-data: there is no such flag; did you mean the FILE alone?"),
        ("cli_demo", ["--prompt_zh", "--x"], "--prompt_zh: no value found; one is needed."),
        ("merge_lora", ["a", "b", "c"], '"c": one word too many; it is needed without, or after a flag that takes it.'),
        ("cli_demo", ["what is it"], '"what is it": it follows no flag that takes it; a flag is needed before it.'),
        ("evaluate", [], "--from_pretrained, --data: not given; they are needed."),
        ("merge_lora", ["a"], "OUT: not given; it is needed."),
        ("evaluate", ["--batch-size", "two"], "--batch-size two: a whole number is needed."),
        ("evaluate", ["--seed"], "--seed: there is no such flag; --help shows every flag."),
    ],
)  # fmt: skip
def test_wrong_word_is_one_sentence(
    capsys: pytest.CaptureFixture[str], script: str, words: list[str], sentence: str
) -> None:
    assert refusal(capsys, script, *words) == f"{sentence}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_tells_an_unknown_flag_in_a_sentence(capsys: pytest.CaptureFixture[str], script: str) -> None:
    assert refusal(capsys, script, "--xyzzy") == "--xyzzy: there is no such flag; --help shows every flag.\n"


def test_two_names_of_a_flag_can_be_shortened_alike() -> None:
    assert import_module("scripts.check_data").command_line().parse_args(["a", "--val", "b"]).valid == ["b"]


def test_help_is_shown_beside_a_wrong_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        import_module("scripts.evaluate").command_line().parse_args(["--xyzzy", "--help"])
    assert stopped.value.code == 0
    assert "--batch-size" in capsys.readouterr().out


def test_wrong_choice_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "cli_demo", "--dtype", "int8")
    assert error.startswith("--dtype int8: one of ")
    assert "bf16" in error


def test_value_that_begins_like_a_flag_is_taken_where_argparse_takes_it() -> None:
    parser = import_module("scripts.cli_demo").command_line()
    assert parser.parse_args(["--query", "--what is it"]).query == "--what is it"
    assert parser.parse_args(["--query=--what"]).query == "--what"
    assert import_module("scripts.merge_lora").command_line().parse_args(["--", "--a", "--b"]).out == "--b"
