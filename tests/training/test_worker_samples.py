"""What worker processes open and hand over."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, PROJECT
from torch.utils.data import DataLoader

from model.errors import TOO_MANY_FILES, RowError
from model.training import worker_samples
from model.training.worker_samples import SAVED, HandedOver, NotedSamples, dead_workers_named, received


class Numbers(torch.utils.data.Dataset):
    """Sample n is [n, the process that opened it]."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return [index, os.getpid()]


def as_batch(samples):
    """A batch with what ours hold: tensors, an empty one, numbers, texts, names with lengths."""
    tensor = torch.tensor([number for number, _ in samples], dtype=torch.bfloat16)
    return {"numbers": tensor, "none": torch.empty(0, 3), "pids": [pid for _, pid in samples], "rows": [("a row 1", 7)]}


def loaded(samples, workers):
    loader = DataLoader(samples, batch_size=2, num_workers=workers, collate_fn=HandedOver(as_batch))
    return [received(batch) for batch in loader]


def test_worker_notes_the_sample_that_it_opened_last():
    samples = NotedSamples(Numbers(), 2)
    first, second = loaded(samples, 2)
    assert samples.opened_by(first["pids"][0], str) == ("1", False)
    assert samples.opened_by(second["pids"][0], str) == ("3", False)
    assert samples.opened_by(os.getpid(), str) is None


def test_main_process_notes_nothing():
    samples = NotedSamples(Numbers(), 0)
    loaded(samples, 0)
    assert samples.opened_by(os.getpid(), str) is None


def test_batches_through_the_pipe_are_those_through_shared_memory(monkeypatch, capfd):
    worker_samples._warn_once_of_full_memory.cache_clear()
    shared = loaded(Numbers(), 1)

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    piped = loaded(Numbers(), 1)
    assert capfd.readouterr().err.count("/dev/shm is too small") == 1
    for ours, theirs in zip(piped, shared, strict=True):
        assert torch.equal(ours["numbers"], theirs["numbers"])
        assert (ours["numbers"].dtype, ours["none"].shape) == (torch.bfloat16, (0, 3))
        assert ours["rows"] == theirs["rows"] == [("a row 1", 7)]
    worker_samples._warn_once_of_full_memory.cache_clear()


def test_limit_of_file_sizes_that_batches_are_beyond_is_told_as_such(monkeypatch, capfd):
    def too_large(tensor):
        raise RuntimeError("unable to resize file </torch_1> to the right size: File too large (27)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", too_large)
    monkeypatch.setattr(worker_samples.resource, "getrlimit", lambda kind: (512, 512))
    loaded(Numbers(), 1)
    told = capfd.readouterr().err
    assert told.count("A file may have 512 bytes at most (ulimit -f), too few for the batches of the data workers") == 1
    assert "too small" not in told


def test_list_of_pictures_with_their_digests_comes_back_from_the_pipe_as_it_was(monkeypatch):
    batch = [("a.png", b"\x00\xff", torch.ones(2)), ("b.png", None, None)]

    def full(tensor):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(worker_samples, "get_worker_info", lambda: object())
    handed_over = HandedOver(list)(batch)
    assert set(handed_over) == {SAVED}
    back = received(handed_over)
    assert [entry[:2] for entry in back] == [entry[:2] for entry in batch]
    assert torch.equal(back[0][2], torch.ones(2))
    assert back[1][2] is None


def test_worker_that_ends_while_it_hands_a_batch_over_is_told_by_the_signal_that_follows():
    def said_by_torch(*_):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    @dead_workers_named(lambda pid: (f"row {pid}", False))
    def read_a_batch():
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise EOFError

    before = signal.signal(signal.SIGALRM, said_by_torch)
    try:
        with pytest.raises(RowError, match="a data worker died after it opened row 7"):
            read_a_batch()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.run
@pytest.mark.parametrize("most", [24, 64])  # in the main process, and in a worker
def test_run_that_may_open_too_few_files_says_so_and_ends(most, upstream_checkpoint, tmp_path):
    words = [
        sys.executable, str(PROJECT / "finetune_visualglm.py"), "--from_pretrained", str(upstream_checkpoint), "--use_lora",
        "--train-data", str(GOLDEN / "upstream/dataset.json"), "--train-iters", "9", "--answers", "0", "--save", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        f"ulimit -n {most}; {shlex.join(words)}", shell=True, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"finetune_visualglm.py: error: {TOO_MANY_FILES}\n"
