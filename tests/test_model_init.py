"""The house: public names, which part may import which, and that importing does nothing."""

import ast
import importlib
import sys

import pytest
from conftest import PROJECT, run_python

PUBLIC = (
    "VisualGLMModel", "FineTuneVisualGLMModel", "FewShotDataset", "create_dataset_function", "get_batch",
    "forward_step", "data_collator", "BlipImageEvalProcessor", "chat",
)  # fmt: skip
MODULES = {
    path.relative_to(PROJECT / "model").with_suffix("").as_posix().replace("/", "."): path
    for path in sorted((PROJECT / "model").rglob("*.py"))
    if path.stem != "__init__"
}
WITH_SAT = {
    "inference.batch",
    "attention",
    "blip2",
    "visualglm",
    "lora",
    "finetune",
    "frozen",
    "training.step",
    "training.sat_loop",
    "training.loaders",
    "training.feature_cache",
    "checkpoints.download",
    "checkpoints.save",
    "checkpoints.weights",
    "inference.chat",
    "inference.load",
    "sat_compat",
}
WITHOUT_TORCH = (
    "cli.preflight", "errors", "checkpoints.layout", "checkpoints.metadata", "checkpoints.huggingface", "checkpoints.broken_files", "checkpoints.download", "hub",
    "cli.options", "progress", "data.prompt", "data.rows", "sat_compat", "data.tokenizer",
    "inference.flags", "inference.serving", "inference.api_formats", "inference.web_guard", "data.remote_images",
)  # fmt: skip
HEAVY = ("torch", "sat", "deepspeed", "transformers")


def imported_names(path):
    """Top-level names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_can_be_imported_from_the_script(name):
    script = importlib.import_module("finetune_visualglm")
    public = getattr(script, name)
    assert callable(public)
    assert public.__name__ == name


def test_public_names_are_found_by_dir_and_by_import_star():
    script = importlib.import_module("finetune_visualglm")
    assert set(PUBLIC) <= set(dir(script))
    namespace = {}
    exec("from finetune_visualglm import *", namespace)
    assert set(PUBLIC) <= set(namespace)


def test_models_names_are_found_by_dir_and_by_import_star():
    names = {"VisualGLMModel", "FineTuneVisualGLMModel", "BlipImageEvalProcessor", "chat"}
    assert names <= set(dir(importlib.import_module("model")))
    namespace = {}
    exec("from model import *", namespace)
    assert names <= set(namespace)


def test_image_processor_is_where_scripts_of_2023_import_it_from():
    from model.blip2 import BlipImageEvalProcessor

    assert BlipImageEvalProcessor is importlib.import_module("finetune_visualglm").BlipImageEvalProcessor


@pytest.mark.run
@pytest.mark.parametrize("first", ["", "import model.inference.chat, model.lora\n"])
def test_models_names_can_be_imported_from_the_package(first):
    names = "VisualGLMModel, FineTuneVisualGLMModel, BlipImageEvalProcessor, chat"
    done = run_python("-c", f"{first}from model import {names}\nprint(*(callable(name) for name in ({names})))")
    assert done.stdout == "True True True True\n", done.stderr


@pytest.mark.parametrize("module", ["finetune_visualglm", "model"])
def test_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="Nothing"):
        importlib.import_module(module).Nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("module", ["finetune_visualglm", *(f"model.{name}" for name in WITHOUT_TORCH)])
def test_importing_what_needs_no_torch_stays_light_and_silent(module):
    done = run_python("-c", f"import sys, {module}\nprint([name for name in {HEAVY} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.run
def test_importing_everything_prints_nothing_and_leaves_the_environment_alone():
    modules = ", ".join(f"model.{name}" for name in MODULES)
    done = run_python("-c", f"import os\nbefore = dict(os.environ)\nimport {modules}\nassert os.environ == before")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_only_what_stands_on_sat_imports_it():
    importing = {name for name, path in MODULES.items() if "sat" in imported_names(path)}
    assert importing <= WITH_SAT


def test_scripts_do_not_import_sat():
    importing = {path.name for path in (PROJECT / "scripts").rglob("*.py") if "sat" in imported_names(path)}
    assert importing <= {"released_way.py", "benchmark_answers.py"}  # they measure SAT's own parts beside ours


def test_nothing_imports_the_script():
    paths = [*(PROJECT / "model").rglob("*.py"), *(PROJECT / "scripts").rglob("*.py")]
    assert [path.name for path in paths if "finetune_visualglm" in imported_names(path)] == []


def test_parts_of_a_rows_way_know_nothing_of_the_parts_after_them():
    standard = {"data.prompt", "errors", "progress", "cli.options"}
    for name in standard:
        outside = imported_names(MODULES[name]) - sys.stdlib_module_names - {"model"}
        assert outside == set(), name


# Who may import whom. Everything may import what stands in its own room.
GROUND = {"errors", "chinese", "progress", "distributed", "adapter_config", "model_flags", "sat_compat", "masks", "hub"}
MAY_IMPORT = {
    "ground": set(),
    "data": {"ground"},
    "checkpoints": {"data", "ground"},
    "cli": {"checkpoints", "data", "ground"},
    "network": {"checkpoints", "data", "ground"},
    "training": {"inference", "network", "cli", "checkpoints", "data", "ground"},
    "inference": {"network", "checkpoints", "data", "ground"},
    "convert": {"network", "cli", "checkpoints", "data", "ground"},
}


def room(module):
    """The room that a module of `model` stands in; flat ones are the network's, but for the ground."""
    first, *rest = module.split(".")
    return first if rest or (PROJECT / "model" / first).is_dir() else "ground" if first in GROUND else "network"


def modules_imported(path):
    """(line, module) of every import of a part of `model`, wherever in the file; modules without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("model.") in MODULES else node.module for name in names]
        else:
            continue
        yield from ((node.lineno, name.removeprefix("model.")) for name in names if name.startswith("model."))


def test_imports_run_one_way():
    wrong = [
        f"model/{name.replace('.', '/')}.py line {line}: {room(name)} may not import {room(imported)} ({imported})"
        for name, path in MODULES.items()
        for line, imported in modules_imported(path)
        if room(imported) not in MAY_IMPORT[room(name)] | {room(name)}
    ]
    assert wrong == []


def test_every_room_of_the_house_is_in_the_table():
    assert {room(name) for name in MODULES} == set(MAY_IMPORT)
