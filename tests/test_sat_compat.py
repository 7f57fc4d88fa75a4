"""Each adaptation of SAT and DeepSpeed: the obstacle as it is, and that it is gone.

Written for a machine without a GPU, where most of the obstacles are.
"""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, load_model, run_program, run_python

from model import sat_compat
from model.errors import InputError

sat = sat_compat.import_sat()


# --- importing


def test_what_is_to_be_compiled_at_import_is_compiled_once_when_it_is_called(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append(options)
        return lambda number: function(number) + 100

    monkeypatch.setattr(torch, "compile", compile_now)
    with sat_compat.compiled_when_called():
        plain = torch.compile(lambda number: number + 1)
        with_options = torch.compile(dynamic=True)(lambda number: number + 2)
    assert torch.compile is compile_now
    assert compiled == []
    assert [plain(1), with_options(1), with_options(2)] == [102, 103, 104]
    assert compiled == [{}, {"dynamic": True}]


def test_function_that_is_called_while_another_is_compiled_is_no_compiled_one_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: pytest.fail("compiled"))
    with sat_compat.compiled_when_called():
        inner = torch.compile(lambda number: number + 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert inner(1) == 2


@pytest.mark.run
def test_plain_import_of_sat_without_wandb_and_triton_fails():
    done = run_program("import_plain_sat_without_wandb_and_triton")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


@pytest.fixture(scope="module")
def imported():
    done = run_program("import_sat_without_wandb_and_triton")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.run
def test_import_sat_without_wandb_and_triton_leaves_no_stand_in_behind(imported):
    assert imported.stdout.splitlines()[0] == "[]"


@pytest.mark.run
def test_what_was_left_out_of_sat_fails_with_a_sentence_when_used(imported):
    assert imported.stdout.splitlines()[1:] == [
        "--wandb is not available here: wandb was left out when SAT was imported.",
        "SAT's GPT2Model is not available here: sat.model.official.gpt2_model was left out when SAT was imported.",
    ]


@pytest.mark.run
def test_import_sat_logs_nothing(imported):
    assert "INFO" not in imported.stderr
    assert "WARNING" not in imported.stderr


def test_quieten_leaves_warnings_and_errors(monkeypatch):
    import logging

    monkeypatch.delenv("SAT_LOGLEVEL", raising=False)
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    loggers = {name: logging.getLogger(name) for name in ("sat", "DeepSpeed")}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        sat_compat.quieten()
        assert not loggers["sat"].isEnabledFor(logging.INFO)
        assert loggers["sat"].isEnabledFor(logging.WARNING)
        assert not loggers["DeepSpeed"].isEnabledFor(logging.INFO)
        assert loggers["DeepSpeed"].isEnabledFor(logging.ERROR)
        monkeypatch.setenv("SAT_LOGLEVEL", "debug")
        sat_compat.quieten()
        assert loggers["sat"].isEnabledFor(logging.DEBUG)
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])


# --- starting


# --- DeepSpeed's settings


# --- SAT's namespace


def test_parallel_output_given_twice_is_a_type_error_in_sat(upstream_config):
    from sat.model import ChatGLMModel

    args = ChatGLMModel.get_args(**upstream_config)
    with pytest.raises(TypeError, match="parallel_output"):
        ChatGLMModel(args, parallel_output=True)


def test_parallel_output_once_moves_it_into_args():
    args, kwargs = SimpleNamespace(parallel_output=False), {"parallel_output": True, "params_dtype": torch.float16}
    assert sat_compat.parallel_output_once(args, kwargs) == {"params_dtype": torch.float16}
    assert args.parallel_output is True
    assert kwargs["parallel_output"] is True


def test_parallel_output_once_leaves_args_alone_when_it_is_not_given():
    args = SimpleNamespace(parallel_output=False)
    assert sat_compat.parallel_output_once(args, {"params_dtype": torch.float16}) == {"params_dtype": torch.float16}
    assert args.parallel_output is False


# --- training


def test_broadcast_data_to_a_group_of_one_is_the_data(upstream_checkpoint):
    load_model(upstream_checkpoint)  # sets up SAT's groups
    data = {"a": torch.tensor([1, 2], dtype=torch.int32), "b": torch.tensor([[3]])}
    received = sat_compat.broadcast_data(("a", "b"), data, torch.int64, "cpu")
    assert {key: tensor.tolist() for key, tensor in received.items()} == {"a": [1, 2], "b": [[3]]}
    assert {tensor.dtype for tensor in received.values()} == {torch.int64}


def test_sats_own_broadcast_data_without_a_gpu_fails(upstream_checkpoint):
    load_model(upstream_checkpoint)
    with pytest.raises((AssertionError, RuntimeError)):
        sat.mpu.broadcast_data(["a"], {"a": torch.tensor([1])}, torch.int64)


@pytest.mark.run
def test_data_and_batches_reach_both_processes_that_share_a_model(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_python(*launcher, PROJECT / "tests/programs/share_a_model.py", tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [[1, 2], [[3.0], [4.0]], [[5, 6]], [[-100, 6]], [0.5] * 12, "torch.bfloat16", 3]
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [expected, expected]


def test_placeholder_names_what_needs_it():
    module = sat_compat._placeholder("wandb", "--wandb", "log")
    with pytest.raises(InputError, match="--wandb is not available"):
        module.log({})


# --- one whole run: ZeRO 1, neither wandb nor triton, nothing to compile with


def test_importing_the_module_imports_neither_torch_nor_sat():
    done = run_python("-c", "import sys, model.sat_compat; print({'torch', 'sat', 'deepspeed'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr
    assert sys.modules["sat"] is sat
