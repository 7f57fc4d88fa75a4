"""Problems are collected and told at once."""

import pytest

from model.errors import InputError, raise_problems


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
