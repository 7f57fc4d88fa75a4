"""Damaged rows and pictures get a verdict each: a good row, or a sentence that names it."""

import pytest
from conftest import run_python


@pytest.mark.long
@pytest.mark.slow
def test_thousands_of_damaged_rows_and_pictures_get_the_right_verdicts() -> None:
    done = run_python("scripts/dev/fuzz_data.py")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("Every verdict was a good row or a sentence.\n")


@pytest.mark.run
def test_some_damaged_rows_and_pictures_get_the_right_verdicts() -> None:
    done = run_python("scripts/dev/fuzz_data.py", "--rows", "500", "--pictures", "100")
    assert done.returncode == 0, done.stdout
    assert "0 wrong verdicts" in done.stdout


@pytest.mark.run
def test_hostile_pictures_are_each_opened_or_refused_with_a_sentence() -> None:
    done = run_python("scripts/dev/fuzz_data.py", "--hostile")
    assert done.returncode == 0, done.stdout
    assert "'one pixel.png'              good, 1×1" in done.stdout
    assert "bomb.png has more than 200 million pixels" in done.stdout
