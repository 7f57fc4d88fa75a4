"""Problems are collected and told at once."""

import pytest

from model.errors import InputError, RowError, exit_on_input_error, raise_problems


def test_problems_are_raised_together_a_line_each():
    with pytest.raises(InputError) as error:
        raise_problems(problem for problem in ("row 1: no label.", "row 7: no img."))
    assert str(error.value) == "row 1: no label.\nrow 7: no img."


@pytest.mark.parametrize("problems", [[], iter(())])
def test_no_problems_raise_nothing(problems):
    raise_problems(problems)


def test_input_error_is_a_value_error_with_its_text_alone():
    assert issubclass(InputError, ValueError)
    assert str(InputError("rows.json row 3: no label.")) == "rows.json row 3: no label."


def test_exit_on_input_error_when_one_is_raised_prints_it_and_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_input_error("evaluate.py"):
        raise InputError("--data gone.json: no such file.")
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "evaluate.py: error: --data gone.json: no such file.\n")


def test_exit_on_input_error_when_none_is_raised_does_nothing(capsys):
    with exit_on_input_error("evaluate.py"):
        pass
    assert capsys.readouterr() == ("", "")


def test_exit_on_input_error_leaves_our_own_bugs_alone():
    with pytest.raises(ValueError, match="a bug"), exit_on_input_error("evaluate.py"):
        raise ValueError("a bug")


@pytest.mark.parametrize(("error", "told"), [(InputError, ""), (RowError, "x.py: error: a row.\n")])
def test_exit_on_input_error_in_another_process_tells_only_what_that_process_alone_knows(
    capsys, monkeypatch, error, told
):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), exit_on_input_error("x.py"):
        raise error("a row.")
    assert capsys.readouterr().err == told
