"""The load test at its smallest: a real server, two clients."""

import pytest

from scripts.dev.load_test import Phase, main


@pytest.mark.run
@pytest.mark.long
def test_load_test_loses_nothing(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--seconds", "2", "--clients", "2", "--rows", "2"])
    assert end.value.code == 0
    assert "Every answer came, and was the one given alone." in capsys.readouterr().out


def test_phase_tells_rate_and_percentiles():
    phase = Phase(4, 2.0, [0.1] * 99 + [1.0], memory=[2**20, 3 * 2**20])
    assert str(phase).split() == (
        [
            "4",
            "clients",
            "100",
            "answers",
            "50.00",
            "a",
            "second",
            "p50",
            "0.100",
            "s",
            "p99",
            "0.109",
            "s",
            "lost",
            "0",
            "memory",
            "1",
            "→",
            "3",
            "MiB",
        ]
    )


@pytest.mark.parametrize("flag", ["--clients", "--rows", "--seconds"])
def test_nothing_asked_for_is_told(capsys, flag):
    with pytest.raises(SystemExit) as end:
        main([flag, "0"])
    assert end.value.code == 2
    assert "more than 0 is needed" in capsys.readouterr().err
