"""benchmark_data.py makes its data, trains on it and prints its figures; how large they are is no test's business."""

import json
import os

import pytest
from conftest import run_python

from scripts.dev.benchmark_data import made_data, memory_of


def test_made_data_has_a_picture_of_its_own_for_every_row(tmp_path):
    rows = json.loads(made_data(tmp_path, 120, edge=8).read_text())
    assert len({row["img"] for row in rows}) == len({row["prompt"] for row in rows}) == 120
    assert all((tmp_path / row["img"]).is_file() for row in rows)


def test_memory_of_a_process_is_at_least_what_it_holds():
    block = bytearray(os.urandom(2**24))
    assert memory_of(os.getpid()) > len(block)


@pytest.mark.slow
@pytest.mark.long
def test_command_measures_both_files_and_the_input(upstream_checkpoint):
    done = run_python(
        "scripts/dev/benchmark_data.py", "--from_pretrained", upstream_checkpoint, "--rows", "200", "--edge", "32",
        "--steps", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout[done.stdout.index("{") :])
    assert set(figures["runs"]) == {"few", "many_first", "many_again", "few_again"}
    assert figures["pictures_per_second"] > 0
    assert figures["runs"]["few"]["peak_mib"] > 50
