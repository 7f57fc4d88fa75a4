"""What the recipes start the script with."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT

from model.cli.config_file import with_config_files
from model.cli.options import parse


def launched(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the recipes do in a folder on a machine without a GPU; they print the words before the script's path."""
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source {PROJECT}/scripts/launch.sh && echo "${{launch[@]}}"', "recipe.sh"],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": "active"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "python"),
        ({"HOSTFILE": "hosts"}, "deepspeed --log_level warning --hostfile hosts --master_port 29500"),
        (
            {"HOSTFILE": "hosts", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29600"},
            "deepspeed --log_level warning --hostfile hosts --master_port 29600 --no_ssh --node_rank 1 --master_addr 10.0.0.1",
        ),
    ],
)
def test_hostfile_is_for_deepspeed_which_reaches_the_machines_itself_unless_each_has_a_number(
    environment, words, tmp_path
):
    (tmp_path / "hosts").write_text("# two machines\n\none slots=8\n two  slots=4 # the small one\n")
    done = launched(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == words


LINES_NEEDED = 'lines such as "worker-1 slots=8" are needed.'


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"HOSTFILE": "nope"}, "HOSTFILE=nope: no file that can be read; a DeepSpeed hostfile is needed."),
        ({"HOSTFILE": "empty"}, f"HOSTFILE=empty: no machine in it; {LINES_NEEDED}"),
        ({"HOSTFILE": "wrong"}, f'HOSTFILE=wrong: a line "two: 8" in it; {LINES_NEEDED}'),
        (
            {"HOSTFILE": "hosts", "NODE_RANK": "0"},
            "NODE_RANK=0 without MASTER_ADDR; the address of the first machine is needed.",
        ),
        *(
            (
                {"HOSTFILE": "hosts", "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1"},
                f"NODE_RANK={rank}: no such line in hosts; a number from 0 to 1 is needed.",
            )
            for rank in ("7", "one", "-1")
        ),
    ],
)
def test_hostfile_that_can_not_be_used_is_told_in_a_sentence(environment, told, tmp_path):
    (tmp_path / "hosts").write_text("one slots=8\ntwo slots=8\n")
    (tmp_path / "empty").write_text("\n# none yet\n")
    (tmp_path / "wrong").write_text("one slots=8\ntwo: 8\n")
    done = launched(tmp_path, **environment)
    assert (done.returncode, done.stderr) == (2, f"recipe.sh: error: {told}\n")


@pytest.mark.parametrize(
    ("text", "holds_out"),
    [("lr: 0.1", True), ("valid-data: [a.json]", False), ('{"holdout": 3}', False), ("split: 9,1", True)],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}", "--conf {}", "--confi={}"])
def test_recipe_holds_nothing_out_where_a_file_of_flags_says_what_to_evaluate_on(text, holds_out, form, tmp_path):
    (tmp_path / "flags").write_text(text)
    command = 'source scripts/launch.sh && echo "held out: ${held_out[*]}"'
    flags = form.format(tmp_path / "flags").split()
    done = subprocess.run(
        ["bash", "-c", command, "bash", *flags], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert ("--holdout 0.1" in done.stdout) == holds_out


@pytest.mark.parametrize(
    ("flags", "holds_out"),
    [("--split 9,1", False), ("--split=8,1,1", False), ("--split 1", True), ("--split 1,1 --lr 1", False), ("", True)],
)
def test_recipe_holds_nothing_out_where_split_does(flags, holds_out):
    command = 'source scripts/launch.sh && echo "held out: ${held_out[*]}"'
    words = ["bash", "-c", command, "bash", *flags.split()]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert ("--holdout 0.1" in done.stdout) == holds_out


def words_of(folder: Path, recipe: str, *flags: str) -> list[str]:
    """The words that a recipe starts Python with, on a machine without a GPU."""
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "VIRTUAL_ENV": "active",
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", PROJECT / f"scripts/{recipe}.sh", *flags], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    return lines[lines.index(str(PROJECT / "finetune_visualglm.py")) + 1 :]


@pytest.mark.parametrize("recipe", ["finetune_visualglm", "finetune_visualglm_qlora", "finetune_visualglm_ptuning"])
def test_file_of_flags_wins_over_a_recipe_and_what_is_typed_over_both(recipe, tmp_path):
    (tmp_path / "flags.yaml").write_text("lr: 0.01\nbatch-size: 2\nepochs: 3\n")
    words = words_of(tmp_path, recipe, "--config", str(tmp_path / "flags.yaml"), "--batch-size", "7")
    options = parse(with_config_files(words))
    assert (options.lr, options.batch_size, options.epochs, options.train_iters) == (0.01, 7, 3, None)
    assert options.lora_rank == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("split: 8,1,1\nblock-size: 10", (300, None, None)),
        ("split: 1", (300, None, 0.1)),
        ("valid-data: [a.json]", (300, None, None)),
        ('{"lr": 0.5, "epochs": 2, "holdout": 3}', (None, 2, 3)),
        ('{"epochs": null, "lr": 0.5}', (300, None, 0.1)),
        ("train_iters: 7", (7, None, 0.1)),
    ],
)
def test_recipe_leaves_out_what_contradicts_a_file_of_flags(text, expected, tmp_path):
    (tmp_path / "flags").write_text(text)
    words = words_of(tmp_path, "finetune_visualglm", "--config", str(tmp_path / "flags"))
    options = parse(with_config_files(words))
    assert (options.train_iters, options.epochs, options.holdout) == expected


def test_run_that_goes_on_has_nothing_of_a_recipe(tmp_path):
    words = words_of(tmp_path, "finetune_visualglm", "--resume", "checkpoints/mine", "--lr", "0.5")
    assert with_config_files(words) == ["--resume", "checkpoints/mine", "--lr", "0.5"]
    assert "--use_lora" in with_config_files(words_of(tmp_path, "finetune_visualglm", "--resume", "auto"))


@pytest.mark.parametrize("recipe", ["finetune_visualglm", "finetune_visualglm_qlora", "finetune_visualglm_ptuning"])
@pytest.mark.parametrize(("flags", "counts"), [([], "--train-iters 300"), (["--epochs", "2"], "--epochs 2")])
def test_recipe_trains_as_long_as_in_2023_or_as_the_flags_say(recipe, flags, counts, tmp_path):
    words = " ".join(words_of(tmp_path, recipe, *flags))
    assert counts in words
    assert ("--train-iters" in words) != ("--epochs" in words)
