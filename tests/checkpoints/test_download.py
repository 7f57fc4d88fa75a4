"""SAT's own download, from a server on this machine."""

import shutil
from pathlib import Path

import pytest
from conftest import run_here
from fake_hub import hub_of

from model.checkpoints import download
from model.checkpoints.layout import Checkpoint
from model.errors import InputError
from scripts import check_data, cli_demo, evaluate, predict


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (cli_demo.main, ["--image", "gone.png"], "there is no file gone.png"),
        (
            evaluate.main,
            ["--data", "gone.json"],
            "gone.json: No such file or directory; a JSON file of rows is needed.",
        ),
        (check_data.main, ["gone.json"], "gone.json: No such file or directory; a JSON file of rows is needed."),
        (
            predict.main,
            ["--data", "gone.json", "--out", "out.jsonl"],
            "gone.json: No such file or directory; a JSON file",
        ),
    ],
)
def test_named_file_that_is_gone_is_told_before_a_checkpoint_is_looked_for(capsys, main, words, told):
    run = run_here(main, capsys, "--from_pretrained", "owner/model", *words)
    assert run.returncode == 2
    assert told in run.stderr
    assert "owner/model" not in run.stderr


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder whose visualglm-6b.zip is behind SAT's link."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("SAT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "server"
    folder.mkdir()
    with hub_of(folder) as (address, _):
        monkeypatch.setattr(download, "SAT_LINK", f"{address}/owner/model/resolve/main/visualglm-6b.zip")
        yield folder


@pytest.mark.slow
def test_released_name_is_downloaded_and_unpacked_into_sat_home(
    server: Path, upstream_checkpoint: Path, tmp_path: Path
):
    shutil.copytree(upstream_checkpoint, tmp_path / "packed" / "visualglm-6b")
    shutil.make_archive(str(server / "visualglm-6b"), "zip", tmp_path / "packed")
    found = Checkpoint.find("visualglm-6b")
    assert found.folder == tmp_path / "home" / "visualglm-6b"
    assert found.weights_file().read_bytes() == Checkpoint.find(upstream_checkpoint).weights_file().read_bytes()


def test_web_page_in_place_of_the_archive_is_named_and_removed(server: Path, tmp_path: Path):
    (server / "visualglm-6b.zip").write_text("<html>Sign in to download</html>")
    with pytest.raises(InputError) as error:
        Checkpoint.find("visualglm-6b")
    archive = tmp_path / "home" / "visualglm-6b.zip"
    assert f"  SAT's download, {archive}: it is a web page: " in str(error.value)
    assert not archive.exists()
