"""The processes of a run: what a launcher sets, and what a plain start is given."""

import os
import socket
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, LAUNCHER, PROJECT, load_model, printed_losses, run_python

from model import distributed
from model.errors import InputError
from model.inference.load import load_for_answering
from model.training.deepspeed_config import deepspeed_settings


@pytest.mark.run
def test_deepspeed_without_a_launcher_refuses_to_start(upstream_checkpoint, no_launcher, uncompiled_deepspeed):
    import deepspeed

    load_model(upstream_checkpoint)  # sets up a process group

    with pytest.raises(AssertionError, match="LOCAL_RANK"):
        deepspeed.initialize(
            model=torch.nn.Linear(1, 1),
            config=deepspeed_settings(
                zero_stage=0,
                fp16=False,
                bf16=False,
                batch_size=2,
                gradient_accumulation_steps=3,
                lr=1e-3,
                weight_decay=0.01,
            ),
        )


def test_launcher_environment_of_a_plain_run_is_one_process_with_a_free_port(no_launcher):
    with distributed.launcher_environment():
        found = {name: os.environ[name] for name in LAUNCHER}
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_launcher_environment_of_a_launcher_is_kept(no_launcher, monkeypatch):
    launched = dict(zip(LAUNCHER[:3], ("3", "1", "4"), strict=True))
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with distributed.launcher_environment():
        found = {name: os.environ.get(name) for name in LAUNCHER}
    assert found == {
        **launched, "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": None, "MASTER_PORT": None,
    }  # fmt: skip


@pytest.mark.parametrize("launched", [{}, {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}])
def test_launcher_environment_is_as_before_afterwards(no_launcher, monkeypatch, launched):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with distributed.launcher_environment():
        assert os.environ != before
    assert dict(os.environ) == before


# --- a port in use


@pytest.fixture
def taken_port(no_launcher, monkeypatch):
    """MASTER_PORT, where another program listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = str(server.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        yield port


def listen():
    """What torch.distributed does first."""
    port = int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore("127.0.0.1", port, world_size=1, is_master=True, use_libuv=True)


def test_port_in_use_is_an_error_of_torch(taken_port):
    with pytest.raises(torch.distributed.DistNetworkError, match="EADDRINUSE"):
        listen()


def test_port_in_use_in_a_run_of_one_process_is_another_port(taken_port, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert str(distributed.on_a_free_port(listen).port) == os.environ["MASTER_PORT"] != taken_port


def test_port_in_use_in_a_run_of_several_is_a_sentence(taken_port, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=f"^MASTER_PORT {taken_port}: another program listens on it; a free one is needed"
    ):
        distributed.on_a_free_port(listen)


@pytest.mark.run
def test_plain_run_whose_port_is_in_use_trains(taken_port, upstream_checkpoint, tmp_path):
    done = run_python(
        PROJECT / "finetune_visualglm.py", "--from_pretrained", upstream_checkpoint, "--use_lora", "--train-data",
        "dataset.json", "--train-iters", "1", "--save", tmp_path, "--summary-dir", tmp_path, cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert (done.returncode, len(printed_losses(done.stdout))) == (0, 1), done.stderr


@pytest.fixture
def driver_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver has a GPU."""
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0/information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 18\n")
    monkeypatch.setattr(distributed, "GPUS_OF_THE_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("driver_with_a_gpu")
@pytest.mark.parametrize(
    ("cuda", "reason", "needed"),
    [
        (None, "it was built for CPUs alone. ", "a build of torch for CUDA."),
        ("13.0", "The driver is too old (found version 12040). ", "a driver for CUDA 13.0 "),
    ],
)
def test_gpu_that_torch_cant_use_is_told_with_what_is_needed(
    cuda: str | None, reason: str, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise RuntimeError("The driver is too old (found version 12040). Please update it.\nMore.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = distributed.unusable_gpu()
    assert found.startswith(f"GPU found (NVIDIA H100 80GB HBM3), but torch {torch.__version__} can't use it: ")
    assert reason.rstrip(". ").split(" Please")[0] in found
    assert needed in found


@pytest.mark.usefixtures("driver_with_a_gpu")
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpu_that_is_hidden_or_used_is_not_told(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert distributed.unusable_gpu() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert distributed.unusable_gpu() == ""


@pytest.mark.usefixtures("driver_with_a_gpu")
def test_commands_that_would_use_the_cpu_silently_say_why(
    upstream_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch can use it here")
    load_for_answering(upstream_checkpoint)
    assert "GPU found (NVIDIA H100 80GB HBM3), but torch" in capsys.readouterr().err


def test_free_memory_of_the_cpu_is_what_the_system_has():
    assert 0 < distributed.free_memory(torch.device("cpu")) < 2**50


def test_free_memory_of_the_cpu_is_shared_by_the_processes_on_it(monkeypatch):
    alone = distributed.free_memory(torch.device("cpu"))
    monkeypatch.setattr(distributed, "processes_here", lambda: (0, 4))
    assert 0.2 < distributed.free_memory(torch.device("cpu")) / alone < 0.3
