"""Every command in the README runs, as it stands there, in a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, write_checkpoint

README = (PROJECT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    command.split("  #")[0].strip()
    for block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if command.strip()
]
BY_THEMSELVES = ("bash scripts/test.sh", "bash scripts/check.sh")  # they run these tests
LONG = ("bash scripts/quickstart.sh",)
SHORTENED = {  # so that a run of minutes on a real model takes seconds here; nothing else is changed
    "bash scripts/finetune_visualglm": " --train-iters 2 --eval-interval 2 --layer_range 0 2",
    "python finetune_visualglm.py --": " --train-iters 2",
    "deepspeed": " --train-iters 2",
    "torchrun": " --train-iters 2",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, upstream_config: dict) -> Path:
    """A copy of the project as it would be cloned, with a small checkpoint where the 6B one is looked for."""
    from conftest import upstream_weights

    copy = tmp_path_factory.mktemp("readme") / "project"
    left_out = {PROJECT / name for name in (".git", ".venv", "runs", "checkpoints", ".quickstart")}
    left_out |= {*PROJECT.rglob("__pycache__"), *PROJECT.rglob("golden")}
    shutil.copytree(
        PROJECT, copy, ignore=lambda folder, names: [name for name in names if Path(folder, name) in left_out]
    )
    write_checkpoint(copy.parent / "sat_home" / "visualglm-6b", upstream_config, upstream_weights())
    rows = json.loads((copy / "fewshot-data/dataset.json").read_text())
    for name, some in (("my.json", rows[:8]), ("my-other.json", rows[8:12])):
        (copy / name).write_text(json.dumps(some, ensure_ascii=False))
    return copy


def run(command: str, project: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "SAT_HOME": str(project.parent / "sat_home"),
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.run
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in BY_THEMSELVES + LONG])
def test_command_of_the_readme_runs(command: str, project: Path) -> None:
    shorter = next((words for start, words in SHORTENED.items() if start in command and "--help" not in command), "")
    done = run(command + shorter, project)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.run
def test_quickstart_teaches_the_small_model_and_installs_nothing_again(project: Path) -> None:
    done = run("bash scripts/quickstart.sh", project)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Installing" not in done.stdout
    last = done.stdout.splitlines()[-1]
    before, after = re.fullmatch(r"held-out answers right: before (\d+)/50, after (\d+)/50", last).groups()
    assert int(before) <= 5
    assert int(after) >= 45


@pytest.mark.run
def test_recipe_without_its_checkpoint_says_where_it_looked(project: Path, tmp_path: Path) -> None:
    done = run(f"SAT_HOME={tmp_path} bash scripts/finetune_visualglm.sh", project)
    assert done.returncode == 2
    assert f"{tmp_path}/visualglm-6b" in done.stderr
    assert "--from_pretrained FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_readme_shows_a_real_row() -> None:
    [row] = re.findall(r"```json\n(.*?)\n```", README, re.DOTALL)
    assert json.loads(row) in json.loads((PROJECT / "fewshot-data/dataset.json").read_text(encoding="utf-8"))


def test_readme_of_the_house_names_every_module() -> None:
    house = (PROJECT / "model/README.md").read_text(encoding="utf-8")
    modules = {str(path.relative_to(PROJECT / "model")) for path in (PROJECT / "model").rglob("*.py")}
    assert {module for module in modules if not module.endswith("__init__.py")} <= set(
        re.findall(r"`(?:model/)?([\w/]+\.py)`", house)
    )


def test_commands_that_run_by_themselves_are_in_the_readme() -> None:
    assert set(BY_THEMSELVES + LONG) <= set(COMMANDS)
