"""Two processes that have a part of a model each answer as one process that has all of it."""

import json
import runpy
from pathlib import Path

import pytest
from conftest import PROJECT, free_port, run_python, write_tuned

PROGRAM = PROJECT / "tests/programs/answer_in_parts.py"
KINDS = [("base", None), ("prefixes", None), ("base", 8), ("LoRA", 4)]  # checkpoint, bits


@pytest.fixture(scope="module")
def answers(upstream_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """For each kind, what each of two processes found, and what one alone did."""
    folder = tmp_path_factory.mktemp("parts")
    paths = {
        "base": upstream_checkpoint,
        "prefixes": write_tuned(upstream_checkpoint, folder / "prefixes", use_ptuning=True, pre_seq_len=3),
        "LoRA": write_tuned(upstream_checkpoint, folder / "lora", use_lora=True, lora_rank=2, layer_range=[0, 1]),
    }
    words = [f"{paths[checkpoint]}={bits or ''}" for checkpoint, bits in KINDS]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    done = run_python(*launcher, PROGRAM, folder, *words)
    assert done.returncode == 0, done.stderr
    of_ranks = [json.loads((folder / str(rank)).read_text()) for rank in range(2)]
    alone = runpy.run_path(str(PROGRAM))["found"]
    return {kind: (*found, alone(str(paths[kind[0]]), kind[1])) for kind, *found in zip(KINDS, *of_ranks, strict=True)}


@pytest.mark.run
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_share_a_model_find_the_same_also_by_chance(answers: dict, kind: tuple) -> None:
    first, second, _ = answers[kind]
    assert len(first["drawn"]) > 5
    assert first == second


@pytest.mark.run
@pytest.mark.parametrize("kind", KINDS)
def test_parts_answer_as_the_whole_model_does(answers: dict, kind: tuple) -> None:
    found, _, expected = answers[kind]
    if kind[1] is None:
        assert found["greedy"] == expected["greedy"]
    # the numbers of a part share other scales than those of the whole do
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-4 if kind[1] else 1e-5)
