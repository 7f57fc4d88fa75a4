"""Names of the hub, against a hub on this machine: what is downloaded, what is gone on with, and what isn't waited for."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_program, upstream_weights, write_checkpoint
from fake_hub import COMMIT, hub_of

from model.checkpoints.layout import Checkpoint
from model.errors import InputError
from model.hub import at_revision, is_hub_name, why_silent

NAME = "owner/model"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, upstream_config: dict) -> Path:
    """What a repository of the hub holds: a checkpoint, the same weights as a pickle, code, and a page."""
    from model.convert.huggingface import convert

    sat = write_checkpoint(tmp_path_factory.mktemp("sat") / "model", upstream_config, upstream_weights())
    folder = convert(str(sat), str(tmp_path_factory.mktemp("hub") / "model"), "hf", max_shard_size=10**6)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('remote code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted beside safetensors")
    (folder / "README.md").write_text("# A model")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[tuple[str, list[str]]]:
    with hub_of(repository) as address_and_requests:
        yield address_and_requests


def find(name: str, home: Path, endpoint: str, **environment: str):
    """The run of a program that finds a checkpoint with this hub, and a cache in the folder home."""
    return run_program(
        "find_checkpoint", name, cwd=home,
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "0", "SAT_HOME": str(home / "sat"),
           "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
    )  # fmt: skip


@pytest.mark.run
def test_name_is_downloaded_once_without_code_and_then_found_offline(
    hub: tuple[str, list[str]], repository: Path, tmp_path: Path
):
    endpoint, requests = hub
    first = find(NAME, tmp_path, endpoint)
    assert first.returncode == 0, first.stderr
    *_, folder, name, _ = first.stdout.splitlines()
    assert (Path(folder).name, name) == (COMMIT, NAME)
    wanted = {"config.json", "ice_text.model", "tokenizer_config.json", "model.safetensors.index.json"}
    wanted |= {path.name for path in repository.glob("*.safetensors")}
    assert {path.name for path in Path(folder).iterdir()} == wanted

    requests.clear()
    again = find(NAME, tmp_path, endpoint)
    assert again.stdout.splitlines()[0] == folder
    assert requests == []
    offline = find(NAME, tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert offline.stdout.splitlines()[0] == folder


@pytest.mark.run
def test_after_half_a_download_only_the_missing_files_are_fetched(hub: tuple[str, list[str]], tmp_path: Path):
    endpoint, requests = hub
    first = find(NAME, tmp_path, endpoint)
    lost = Path(first.stdout.splitlines()[-3], "model-00001-of-00004.safetensors")
    content = lost.read_bytes()
    lost.resolve().unlink()
    lost.unlink()
    requests.clear()
    again = find(NAME, tmp_path, endpoint)
    assert again.returncode == 0, again.stderr
    assert [request for request in requests if request.startswith("GET")] == [f"GET {lost.name}"]
    assert lost.read_bytes() == content


@pytest.mark.run
def test_revision_is_pinned_and_remembered_in_the_name(hub: tuple[str, list[str]], tmp_path: Path):
    run = find(at_revision(NAME, "v1"), tmp_path, hub[0])
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2] == f"{NAME}@v1"
    unknown = find(f"{NAME}@v2", tmp_path, hub[0])
    assert unknown.returncode == 2
    assert "Hugging Face hub: RevisionNotFoundError" in unknown.stderr


@pytest.mark.run
def test_repository_that_the_hub_does_not_have_is_told_in_a_line(hub: tuple[str, list[str]], tmp_path: Path):
    run = find("owner/other", tmp_path, hub[0])
    assert run.returncode == 2
    lines = run.stderr.splitlines()
    assert lines[0] == "find_checkpoint.py: error: --from_pretrained owner/other: no such folder. Tried:"
    assert lines[3] == "  Hugging Face's cache: nothing"
    assert lines[4].startswith("  Hugging Face hub: RepositoryNotFoundError: ")
    assert len(lines) == 6


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes calls and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.run
@pytest.mark.parametrize("name", ["owner/model", "visualglm-6b"])
def test_hub_that_does_not_answer_is_not_waited_for(silent: str, tmp_path: Path, name: str):
    proxies = {"HTTPS_PROXY": silent, "https_proxy": silent}  # SAT's link is asked through it
    run = find(name, tmp_path, silent, **proxies)
    assert run.returncode == 2
    assert "no answer from " in run.stderr
    assert float(run.stdout.splitlines()[-1]) < 3 + 1  # the library's import, on a busy machine


@pytest.mark.run
@pytest.mark.parametrize("offline", ["0", "1"])
def test_missing_tokenizer_is_named_without_half_a_minute_of_retries(silent: str, tmp_path: Path, offline: str):
    run = run_program(
        "find_tokenizer", tmp_path, HF_ENDPOINT=silent, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE=offline
    )
    assert run.returncode == 2
    assert "No tokenizer: ice_text.model was looked for in" in run.stderr
    if offline == "0":
        assert f"THUDM/visualglm-6b (no answer from {silent} within 2.5 seconds); give its path" in run.stderr
    assert float(run.stdout.splitlines()[-1]) < 3 + 1


def test_why_silent_knows_a_hub_from_silence_and_from_a_refusal(hub: tuple[str, list[str]], silent: str):
    assert why_silent(hub[0]) is None
    assert why_silent(silent, seconds=0.2) == f"no answer from {silent} within 0.2 seconds"
    assert why_silent("http://127.0.0.1:9") == "no answer from http://127.0.0.1:9 (Connection refused)"


@pytest.mark.parametrize(
    "name", ["runs/My--Model", "runs/模型", "runs/a..b", "runs/-a", "runs/a.git", f"runs/{'a' * 97}"]
)
def test_name_that_no_repository_can_have_is_no_folder_and_nothing_worse(name: str):
    with pytest.raises(InputError, match=f"--from_pretrained {re.escape(name)}: no such folder"):
        Checkpoint.find(name)


@pytest.mark.parametrize(("name", "is_one"), [
    ("THUDM/visualglm-6b", True), ("owner/model@v1.0", True), ("owner/model@refs/pr/3", True),
    ("visualglm-6b", False), ("/models/mine", False), ("./model/tiny", False), ("a/b/c", False), ("../model", False),
])  # fmt: skip
def test_is_hub_name_tells_owner_and_name_from_a_path(name: str, is_one: bool):
    assert is_hub_name(name) is is_one
