"""Every command in the pages runs, as it stands there, in a copy of the project; and what the pages name is there.

Two kinds of commands don't run here, see `HELP_ONLY` and `test_benchmark_of_a_gpu_…`. Those of README.md also run in its
order, twice, in a clone.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import PROJECT, run_python, write_checkpoint
from warm_start import commands as warm_commands

PAGES = (
    "README.md", "README_6b.md", "README_zh.md", "scripts/README.md", "scripts/dev/BENCHMARKS.md", ".github/CONTRIBUTING.md", "model/README.md",
    "tests/golden/README.md",
)  # fmt: skip
TEXTS = {page: (PROJECT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]


def commands_in(text: str) -> list[str]:
    """The command lines of a page, without their comments."""
    return [
        command.split("  #")[0].strip()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for command in block.replace("\\\n", " ").splitlines()
        if command.strip()
    ]


COMMANDS = commands_in(README)
ALL_COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands_in(text)))
BY_THEMSELVES = ("bash scripts/test.sh", "bash scripts/check.sh")  # they run these tests
LONG = ("bash scripts/quickstart.sh",)
NEEDS_GPU = "bash scripts/dev/benchmark_gpu.sh"
# These take minutes or have no end; other tests run them at small size. Here, --help must know the flags in their lines.
HELP_ONLY = (
    "python scripts/api.py",  # it answers until it is stopped; tests/scripts/test_api.py runs it
    "python scripts/web_demo.py",  # so does it; tests/scripts/test_web_demo.py
    "python scripts/dev/load_test.py",  # 15 seconds at its smallest
    "python scripts/dev/benchmark.py",  # 15 seconds at its smallest
    "python scripts/dev/benchmark_answers.py",  # 20 seconds at its smallest
    "python scripts/dev/benchmark_data.py",  # 10 seconds at its smallest
    "python scripts/dev/build_tiny.py",  # 5 seconds at its smallest
    "python scripts/dev/layouts.py",  # 25 seconds at its smallest
    "python scripts/dev/rehearse_6b.py",  # minutes
    "python scripts/dev/torture.py",  # 15 seconds at its smallest
    "python scripts/dev/two_hosts.py",  # a minute
)
CONVERTER = "scripts/convert_checkpoint.py"
HUB_NAME = "THUDM/visualglm-6b"  # here the folder of a small checkpoint in Hugging Face's layout
RUN_HERE = [
    command for command in ALL_COMMANDS if not command.startswith((*BY_THEMSELVES, *LONG, *HELP_ONLY, NEEDS_GPU))
]
ALONE = (  # they need nothing of the others, nor the others of them
    "python scripts/dev/",
    "bash scripts/finetune_visualglm.sh --from_pretrained model/tiny --layer_range 0 2 --train-iters 20",
)
SHORTENED = {  # so that a run of minutes on a real model takes seconds here; nothing else is changed
    "bash scripts/finetune_visualglm": " --train-iters 2 --eval-interval 2 --layer_range 0 2 --answers 0",
    "python finetune_visualglm.py --": " --train-iters 2 --answers 0",
    "cli_demo.py --from_pretrained checkpoints/my-6b": " --max_length 100",  # the model of random numbers never ends
    "evaluate.py --from_pretrained checkpoints/my-6b": " --max_length 100",
    "deepspeed": " --train-iters 2 --answers 0",
    "torchrun": " --train-iters 2 --answers 0",
    "python scripts/dev/fuzz_data.py": " --rows 100 --pictures 20",
}
# Flags of other people's commands.
FOREIGN_FLAGS = {"--num_gpus", "--nproc-per-node", "--fix", "--help", "--model", "--local_dir", "--dist"}
USERS_FILES = {"my.json": slice(8), "my-other.json": slice(8, 12)}
CONVERSATION = {
    "image": "images/train00.png",
    "conversations": [
        {"from": "human", "value": "<image>\n这张图片的背景里有什么内容？"},
        {"from": "gpt", "value": "这张图片的背景是茂密的森林。"},
    ],
}


def not_cloned(folder: str, names: list[str]) -> set[str]:
    """Which of a folder's files stay behind: results in the project's own folder, for model/checkpoints is a package."""
    everywhere = {"__pycache__", "golden"}
    at_the_top = {".git", ".venv", "runs", "checkpoints", ".quickstart"}
    return set(names) & (everywhere | at_the_top if Path(folder) == PROJECT else everywhere)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, upstream_config: dict) -> Path:
    """A copy of the project as it would be cloned, with a small checkpoint where the 6B one is looked for."""
    copy = tmp_path_factory.mktemp("readme") / "project"
    shutil.copytree(PROJECT, copy, ignore=not_cloned)
    released = add_what_users_have(copy, upstream_config)
    converted = run_python(copy / CONVERTER, released, copy / HUB_NAME, "--to", "hf", "--no-old_sat")
    assert converted.returncode == 0, converted.stderr
    (copy / "conversations.json").write_text(json.dumps([CONVERSATION], ensure_ascii=False))
    return copy


def add_what_users_have(copy: Path, config: dict) -> Path:
    """Data files of one's own in a copy of the project, and beside it the checkpoint that is given: a small one."""
    from conftest import upstream_weights

    rows = json.loads((copy / "fewshot-data/dataset.json").read_text())
    for name, some in USERS_FILES.items():
        (copy / name).write_text(json.dumps(rows[some], ensure_ascii=False))
    return write_checkpoint(copy.parent / "sat_home" / "visualglm-6b", config, upstream_weights())


def run(command: str, project: Path, cold: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command line in bash; cold: from nothing, where python, torchrun and deepspeed else start warm."""
    environment = os.environ | environment_of(project) | {"OMP_NUM_THREADS": "1"}
    if not cold:
        environment["PATH"] = f"{warm_commands()}:{environment['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )


def environment_of(project: Path) -> dict[str, str]:
    """What is set for commands of the pages: the environment is active, and the checkpoint lies where SAT looks."""
    return {
        "SAT_HOME": str(project.parent / "sat_home"),
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.mark.run
@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=pytest.mark.long if command.startswith(ALONE) else []) for command in RUN_HERE],
)
def test_command_of_the_pages_runs(command: str, project: Path) -> None:
    done = run(command + shortened(command), project)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def shortened(command: str) -> str:
    """The flags that make a command of minutes one of seconds."""
    return next((words for start, words in SHORTENED.items() if start in command and "--help" not in command), "")


# Of README.md's commands, those that a clone can't run in order. Without a GPU all the others run.
NOT_IN_A_CLONE = {
    "bash scripts/test.sh": "it runs these tests",
    "bash scripts/check.sh": "it runs these tests",
}
SERVES = {  # they have no end of their own: each is asked for this address, and stopped
    "python scripts/api.py": "health",
    "python scripts/web_demo.py": "",
}


@pytest.mark.run
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="what is committed is cloned; here is no repository")
def test_commands_of_the_readme_run_in_order_twice_in_a_fresh_clone(tmp_path: Path, upstream_config: dict) -> None:
    clone = tmp_path / "project"
    subprocess.run(["git", "clone", "--quiet", PROJECT, clone], check=True)
    add_what_users_have(clone, upstream_config)
    commands = [command for command in COMMANDS if command not in NOT_IN_A_CLONE]
    assert len(COMMANDS) - len(commands) == 3  # test.sh stands there twice
    printed = {}
    for command in 2 * commands:
        served = [path for start, path in SERVES.items() if command.startswith(start)]
        if served:
            assert status_while_serving(f"{command} --port 0", served[0], clone) == 200
            continue
        # Recipes are for hours on the 6B. The small model's own commands run as they stand.
        shorter = "" if "model/tiny" in command else shortened(command)
        done = run(command + shorter, clone, cold=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        printed.setdefault(command, []).append(done.stdout)
    [evaluations] = [
        texts for command, texts in printed.items() if "evaluate.py --from_pretrained checkpoints" in command
    ]
    rights = [int(re.search(r"answers right: (\d+)/50", text)[1]) for text in evaluations]
    assert min(rights) >= 45  # what the page trains is what it evaluates, and it has learned
    for name in USERS_FILES:
        (clone / name).unlink()
    assert subprocess.check_output(["git", "status", "--short"], cwd=clone, text=True) == ""


def status_while_serving(command: str, path: str, project: Path) -> int:
    """What a server answers for a path; it is stopped afterwards, and ends as it should."""
    words = [sys.executable, *shlex.split(command)[1:]]
    server = subprocess.Popen(words, cwd=project, stdout=subprocess.PIPE, text=True)
    try:
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.:]+", line)))
        with urllib.request.urlopen(f"{url}/{path}", timeout=30) as answer:
            status = answer.status
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 128 + signal.SIGTERM
        return status
    finally:
        server.kill()
        server.stdout.close()


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


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_readme_shows_a_real_row(page: str) -> None:
    [row] = re.findall(r"```json\n(.*?)\n```", TEXTS[page], re.DOTALL)
    assert json.loads(row) in json.loads((PROJECT / "fewshot-data/dataset.json").read_text(encoding="utf-8"))


def test_readme_of_the_house_names_every_module() -> None:
    house = (PROJECT / "model/README.md").read_text(encoding="utf-8")
    modules = {str(path.relative_to(PROJECT / "model")) for path in (PROJECT / "model").rglob("*.py")}
    assert {module for module in modules if not module.endswith("__init__.py")} <= set(
        re.findall(r"`(?:model/)?([\w/]+\.py)`", house)
    )


def test_commands_that_run_by_themselves_are_in_the_readme() -> None:
    assert set(BY_THEMSELVES + LONG) <= set(COMMANDS)


@pytest.mark.run
@pytest.mark.parametrize("script", HELP_ONLY)
def test_commands_that_take_minutes_have_only_flags_of_their_help(script: str, project: Path) -> None:
    commands = [command for command in ALL_COMMANDS if command.startswith(script)]
    done = run(f"{commands[0]} --help", project)
    assert done.returncode == 0, done.stderr[-2000:]
    for command in commands:
        assert flags_in(command) <= flags_in(done.stdout), command


def test_benchmark_of_a_gpu_starts_one_command_with_what_follows_it(tmp_path: Path) -> None:
    """It is written down by a `python` of ours in place of measured: there may be no GPU here."""
    for name, script in (("nvidia-smi", "true"), ("python", f'echo "$@" >> {tmp_path}/rows')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for words in ([], ["figures"], ["figures", "--dtype", "bf16"]):
        done = subprocess.run(
            ["bash", PROJECT / "scripts/dev/benchmark_gpu.sh", *words],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    rows = [row.split() for row in (tmp_path / "rows").read_text().splitlines()]
    assert all(row.pop(0).endswith("scripts/dev/gpu_choices.py") for row in rows)
    assert rows == [["benchmark_gpu"], ["figures"], ["figures", "--dtype", "bf16"]]


def test_benchmark_of_a_gpu_without_an_active_environment_uses_the_projects(tmp_path: Path) -> None:
    (tmp_path / "scripts/dev").mkdir(parents=True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(PROJECT / "scripts/dev/benchmark_gpu.sh", tmp_path / "scripts/dev")
    for name, script in (("nvidia-smi", "true"), ("python", f"echo used >> {tmp_path}/rows")):
        (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    done = subprocess.run(["bash", "scripts/dev/benchmark_gpu.sh"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rows").read_text() == "used\n"


@pytest.mark.parametrize(
    ("devices", "launcher"),
    [
        (None, "deepspeed --log_level warning --master_port"),
        ("0", "deepspeed --log_level warning --master_port"),
        ("2,3", "deepspeed --log_level warning --master_port"),
        ("GPU-8932f937-d72c,GPU-2ab1", "torchrun --nproc-per-node 2 --master-port"),
        ("MIG-8932f937-d72c,MIG-2ab1", "torchrun --nproc-per-node 1 --master-port"),
        ("", "python"),
        ("-1", "python"),
    ],
)
@pytest.mark.parametrize("recipe", ["finetune_visualglm.sh", "finetune_visualglm_qlora.sh"])
def test_recipe_takes_every_form_of_cuda_visible_devices(
    devices: str | None, launcher: str, recipe: str, tmp_path: Path
) -> None:
    """What is started, written down by launchers of ours: there may be no GPU here."""
    for name in ("deepspeed", "torchrun", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\ncase "$1" in -c) echo 29501;; *) echo "{name} $@";; esac\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)}
    command = ["bash", PROJECT / "scripts" / recipe]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()[-1]
    if "qlora" in recipe:  # it takes the first of several
        launcher = launcher.replace("--nproc-per-node 2", "--nproc-per-node 1")
    assert started.startswith(launcher + " "), started
    assert ("No GPU found" in done.stdout) <= (launcher == "python")


def test_scripts_readme_names_every_script() -> None:
    scripts = [path for path in (PROJECT / "scripts").rglob("*") if path.suffix in (".py", ".sh")]
    named = set(re.findall(r"`(?:dev/)?(\w+\.(?:py|sh))`", TEXTS["scripts/README.md"]))
    assert {path.name for path in scripts} <= named


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_a_page_names_exist(page: str) -> None:
    sources = [*(PROJECT / "model").rglob("*.py"), *(PROJECT / "scripts").rglob("*.py"), PROJECT / "tests/conftest.py"]
    declared = {flag for path in sources for flag in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    assert flags_in(TEXTS[page]) <= declared | FOREIGN_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]) if not link.startswith("https://")]
    assert [link for link in links if not (PROJECT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize(("page", "lines"), [("README.md", 220), ("README_6b.md", 200), ("README_zh.md", 150)])
def test_page_is_short(page: str, lines: int) -> None:
    assert len(TEXTS[page].splitlines()) <= lines


def test_page_of_the_6b_has_commands_on_either_layout() -> None:
    of_page = commands_in(TEXTS["README_6b.md"])
    recipes = [command for command in of_page if command.startswith("bash scripts/finetune_visualglm")]
    assert {HUB_NAME in command for command in recipes} == {True, False}
    assert [layout for layout in ("sat", "hf") if any(f"--to {layout}" in command for command in of_page)] == [
        "sat",
        "hf",
    ]


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
