"""The processes of a run: what a launcher sets, and what a plain start is given."""

import importlib
import os
import socket

import pytest
import torch
from conftest import LAUNCHER, load_model

from model import distributed
from model.training.deepspeed_config import deepspeed_settings


@pytest.mark.run
def test_deepspeed_without_a_launcher_refuses_to_start(upstream_checkpoint, no_launcher, monkeypatch):
    import deepspeed

    communication = importlib.import_module("deepspeed.comm.torch")
    monkeypatch.setattr(communication, "build_shm_op", lambda: None)  # half a minute of g++, and not what is tested

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


def test_launcher_environment_of_a_plain_run_is_one_process_with_a_free_port(no_launcher, monkeypatch):
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
