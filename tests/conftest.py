"""What several tests share: real checkpoints at small width, and real runs of the script."""

import gc
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from warm_start import SOCKETS, commands, run_warm, wait_for_requests

PROJECT = Path(__file__).resolve().parent.parent
RUNS = tempfile.TemporaryDirectory(prefix="runs-")  # of runs in the project's folder whose checkpoints nobody looks at
GOLDEN = Path(__file__).resolve().parent / "golden"
PICTURE = GOLDEN / "upstream/images/0.png"
sys.path.insert(0, str(PROJECT))
# The models here are so small that threads would wait for each other; set before torch is imported, for runs as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a network, but for those that have a hub of their own
os.environ.pop("SAT_HOME", None)  # where this machine's user has checkpoints
os.environ["VISUALGLM_UI_LANG"] = "en"  # whatever this machine's locale is: the tests read messages


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_true",
        help="run the tests marked `gpu`, and no others, on this machine's GPU; without it GPUs are hidden",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "run: runs the script or a command in a process of its own (seconds)")
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()  # pictures are remembered there: not the user's own
    config.addinivalue_line("markers", "slow: takes seconds; left out of the quick tests of scripts/check.sh")
    config.addinivalue_line("markers", "long: left out of scripts/test.sh too, which runs them with `-m long`")
    config.addinivalue_line("markers", "gpu: what `--gpu` runs")
    if config.getoption("--gpu"):  # every process starts cold: CUDA doesn't survive a fork
        from model.distributed import has_gpu

        if not has_gpu():
            raise pytest.UsageError("--gpu: torch finds no GPU here.")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the numbers that the tests know are a CPU's
    if not hasattr(config, "workerinput"):  # xdist's workers share those of the process that has started them
        wait_for_requests()
        no_driver = commands() / "nvidia-smi"  # for the README's line that names GPUs by itself
        no_driver.write_text("#!/bin/sh\nexit 9\n")
        no_driver.chmod(0o755)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with many long tests come first: what comes last is short, and no worker waits long for the other."""
    if config.getoption("--gpu"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu") is None])
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
    long = Counter(item.path for item in items if {"run", "slow"} & {mark.name for mark in item.iter_markers()})
    items.sort(key=lambda item: -long[item.path])


def pytest_collection_finish() -> None:
    """What the test files have imported stays: Python needn't look through it again and again."""
    gc.freeze()


def golden_values(name: str, shape: list[int]) -> numpy.ndarray:
    """float32[shape]: what golden/README.md sets the tensor of this name to."""
    base = 1.0 if name.endswith("weight") and ("layernorm" in name or "ln_vision" in name) else 0.0
    noise = numpy.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (base + 0.05 * noise).astype(numpy.float32)


def upstream_weights(trainable: dict[str, list[int]] | None = None) -> dict:
    """The small model's tensors by name: those of parameters.json, and trainable ones by their shapes."""
    import torch

    shapes = json.loads((GOLDEN / "upstream/parameters.json").read_text()) | (trainable or {})
    heads_dim = json.loads((GOLDEN / "upstream/model_config.json").read_text())
    rotary = heads_dim["hidden_size"] // heads_dim["num_attention_heads"] // 2
    weights = {name: torch.from_numpy(golden_values(name, shape)) for name, shape in shapes.items()}
    weights["mixins.chatglm-attn.rotary_emb.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, rotary, 2).float() / rotary)
    return weights


def write_checkpoint(folder: Path, config: dict, weights: dict) -> Path:
    """A checkpoint folder in SAT's layout, with the golden tokenizer."""
    import torch

    (folder / "1").mkdir(parents=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "latest").write_text("1")
    torch.save({"module": weights}, folder / "1" / "mp_rank_00_model_states.pt")
    (folder / "ice_text.model").write_bytes((GOLDEN / "tokenizer/ice_text.model").read_bytes())
    return folder


def write_huggingface(folder: Path, config: dict, weights: dict, files: str = "model.safetensors") -> Path:
    """A checkpoint folder in Hugging Face's layout, with the golden tokenizer.

    files: "model.safetensors", "pytorch_model.bin", or two files with "safetensors index" or "bin index".
    """
    import torch
    from safetensors.torch import save_file

    from model.checkpoints.huggingface import huggingface_config

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(huggingface_config(config, 90, "float32")))
    (folder / "ice_text.model").write_bytes((GOLDEN / "tokenizer/ice_text.model").read_bytes())
    write = save_file if "safetensors" in files else torch.save
    if "index" not in files:
        write(weights, folder / files)
        return folder
    stem, kind = ("model", "safetensors") if "safetensors" in files else ("pytorch_model", "bin")
    names, places = sorted(weights), {}
    for number, some in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{stem}-{number:05}-of-00002.{kind}"
        write({name: weights[name] for name in some}, folder / file)
        places |= dict.fromkeys(some, file)
    index = f"{stem}.{kind}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.fixture(scope="session")
def upstream_config() -> dict:
    """model_config.json of the small model that the released script's losses were recorded with."""
    return json.loads((GOLDEN / "upstream/model_config.json").read_text())


@pytest.fixture(scope="session")
def upstream_checkpoint(tmp_path_factory: pytest.TempPathFactory, upstream_config: dict) -> Path:
    """That model, with the weights that golden/README.md gives."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "upstream", upstream_config, upstream_weights())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """ChatGLM's tokenizer over the small golden vocabulary."""
    from model.data.tokenizer import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def small_model(upstream_checkpoint: Path) -> Any:
    """The small model's base, in eval mode; loading it makes SAT's model-parallel groups."""
    return load_model(upstream_checkpoint)


@pytest.fixture(scope="module")
def process_group(upstream_checkpoint: Path) -> None:
    """SAT's, which loading a model makes."""
    load_model(upstream_checkpoint)


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a launcher's variables; what a test sets is undone."""
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def uncompiled_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed sets up processes without half a minute of g++, as in a run (`sat_loop`)."""
    monkeypatch.setattr(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)


class FakeClock:
    """A time.monotonic that tells the time it is set to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """What a run's lines go by, on its first process; a test sets the time."""
    monkeypatch.setenv("RANK", "0")
    clock = FakeClock()
    monkeypatch.setattr("model.training.terminal.time", clock)
    return clock


class FakeTimers:
    """Counts what is started and stopped, as SAT's timers are."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.started: list[str] = []

    def __call__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: self._start(name), stop=lambda: self.running.remove(name))

    def _start(self, name: str) -> None:
        self.running.append(name)
        self.started.append(name)


def write_rows(folder: Path, rows: list, name: str = "rows.json") -> Path:
    """A data file of these rows."""
    path = folder / name
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def upstream_rows() -> list:
    """The rows that the released script's losses were recorded with; their images are not looked up."""
    from model.data.rows import row_from_json

    entries = json.loads((GOLDEN / "upstream/dataset.json").read_text(encoding="utf-8"))
    return [row_from_json(entry, f"dataset.json row {number}") for number, entry in enumerate(entries, 1)]


def few_shot_dataset(path: Path, image_size: int = 28, flags: dict | None = None, **options: Any) -> Any:
    """The FewShotDataset of a data file, with the golden tokenizer; flags are attributes of args, options its own."""
    from model.data.dataset import FewShotDataset
    from model.data.image_processor import BlipImageEvalProcessor
    from model.data.tokenizer import ChatGLMTokenizer

    args = SimpleNamespace(**{"image_length": 32, "max_source_length": 64, "max_target_length": 64} | (flags or {}))
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    return FewShotDataset(path, BlipImageEvalProcessor(image_size), tokenizer, args, **options)


def run_program(name: str, *words: str | Path, cwd: Path = PROJECT, **environment: str) -> Any:
    """Run tests/programs/<name>.py in a process of its own, and give what it printed; see `run_python`."""
    return run_python(PROJECT / "tests/programs" / f"{name}.py", *words, cwd=cwd, **environment)


def run_python(*command: str | Path, cwd: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with a command line in the folder cwd, and give what it printed.

    Training answers no rows before and after, unless the command line says how many: that takes a second each time; and it
    leaves nothing in the project. Where the environment allows it, it is started warm: see `run_warm`.
    """
    words = [str(word) for word in command]
    trains = any(Path(word).name.startswith(("finetune_visualglm.py", "train_")) for word in words)
    if trains and not {"--answers", "--eval_answers", "--help"} & {*words}:
        words += ["--answers", "0"]
    if trains and cwd == PROJECT and not {"--save", "--resume", "--help"} & {*words}:
        words += ["--save", RUNS.name]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    warm = run_warm(words, cwd, environment) if SOCKETS in environment else None
    return warm or subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


@dataclass
class Run:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def run_here(main: Any, capsys: pytest.CaptureFixture[str], *words: Any) -> Run:
    """Run a command's main with these words in this process."""
    capsys.readouterr()
    try:
        main([*map(str, words)])
        code: Any = 0
    except SystemExit as end:
        code = end.code
    return Run(code, *capsys.readouterr())


def may_mount() -> bool:
    """Whether this user may mount a file system in a namespace of its own."""
    mounting = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/tmp"]
    return shutil.which("unshare") is not None and not subprocess.run(mounting, capture_output=True).returncode


small_disk = pytest.mark.skipif(
    not may_mount(),
    reason="a small disk is mounted in a namespace of its own, which this user may not make (unshare -m)",
)


def run_on_a_small_disk(name: str, disk: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run tests/programs/<name>.py with disk and words, where disk is a file system of 8 MiB for this process alone."""
    mounting = PROJECT / "tests/programs/on_a_small_disk.sh"
    program = PROJECT / "tests/programs" / f"{name}.py"
    return subprocess.run(
        ["unshare", "-m", "bash", mounting, disk, commands() / "python", program, disk, *words],
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def free_port() -> int:
    """A port for a launcher, free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load_model(checkpoint: Path, name: str = "VisualGLMModel", **flags: Any) -> Any:
    """A checkpoint's model in this process, in eval mode; flags are attributes of SAT's namespace (use_lora=True, …)."""
    import finetune_visualglm
    from model.checkpoints.weights import load_checkpoint

    model_class = getattr(finetune_visualglm, name)
    args = model_class.get_args(skip_init=True, **flags)
    model, args = model_class.from_pretrained(str(checkpoint), args, build_only=True)
    load_checkpoint(model, args, load_path=str(checkpoint))
    return model.eval()


def write_tuned(base: Path, folder: Path, full: bool = False, **flags: Any) -> Path:
    """A checkpoint of base tuned as flags say, by random numbers in place of training; saved as the script saves."""
    import torch

    from model.checkpoints.save import save_checkpoint
    from model.data.tokenizer import ChatGLMTokenizer
    from model.finetune import FineTuneVisualGLMModel
    from model.sat_compat import import_sat

    import_sat().get_tokenizer(outer_tokenizer=ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer"))
    args = FineTuneVisualGLMModel.get_args(skip_init=True, save=str(folder), save_full_model=full, lr=1.0, **flags)
    model, args = FineTuneVisualGLMModel.from_pretrained(str(base), args)
    model.freeze()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    save_checkpoint(1, model, None, None, args)
    return folder


def printed_losses(output: str) -> list[float]:
    """The loss of each step line that a run printed."""
    return [float(loss) for loss in re.findall(r"^step +\d+/\d+  loss (\S+)  ", output, re.MULTILINE)]


from live_runs import launched, ranks, run  # noqa: E402, F401  (fixtures; runs imports this module)
