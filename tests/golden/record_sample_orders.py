"""Record which training sample comes n-th, as SwissArmyTransformer gives it with this project's `adapt_data`.

    PYTHONPATH=. python record_sample_orders.py sample_orders.json      in a checkout of commit d2f0275

Every case goes through SAT's own `make_loaders`. A sample is its number in the concatenation of all files' samples. Its
text length is made up: `LENGTHS[number]`, in tokens.

    {"about": …, "versions": …, "text_lengths": [4, 15, …], "defaults": {settings},
     "cases": [{"name": …, settings that differ, "samples": whole length, "micro_batches": …, "steps": …,
                "parts": [{"rank": 0, "start": 0, "batches": [[sample, …], …]}, …]}, …]}

`start` is the number of the part's first micro-batch. `steps` is how many optimizer steps SAT takes with --epochs.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

from model import sat_compat

sat_compat.import_sat(training=True)

import torch  # noqa: E402
from model.dataset import FewShotDataset  # noqa: E402

LENGTHS = [1 + 37 * number % 23 for number in range(400)]  # equal ones are among them
FIRST_SAMPLES = 150  # recorded of an order that is drawn by chance; of --epochs all are
AROUND_WINDOW = range(62, 67)  # micro-batches around the end of the first window of --group_by_length
LAST_BATCHES = 3
SEEDS = (1234, 1, 4294967295)

DEFAULTS = {
    "loader": "train", "files": [20], "weights": None, "seed": 1234, "train_iters": None, "epochs": None,
    "batch_size": 4, "accumulation": 1, "ranks": 1, "split": "1", "shares": [1.0, 0.0, 0.0], "block_size": 10000,
    "group_by_length": False, "eval_interval": 10, "eval_iters": 100, "eval_batch_size": 4,
}  # fmt: skip


class NumberedSamples(FewShotDataset):
    """One file's samples, each of which is its own number; `first` is that of the first one."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        if not 0 <= index < self.count:
            raise IndexError(index)
        return int(self.first + index)

    def text_length(self, index: int) -> int:
        return LENGTHS[self[index]]


# --- what is recorded -----------------------------------------------------------------------------------------------


def all_cases() -> Iterator[dict[str, Any]]:
    """The settings of every case that differ from DEFAULTS, and its name."""
    for case in (*drawn(), *by_epochs(), *several_files(), *accumulating(), *splitting(), *on_ranks(), *held_out()):
        grouped = " grouped" if case.get("group_by_length") else ""
        yield {"name": case.pop("name") + grouped, **case}


def drawn() -> Iterator[dict[str, Any]]:
    for seed in SEEDS:
        for files in ([1], [7], [20], [203]):
            for group in (False, True):
                yield {"name": f"drawn seed {seed} of {files[0]}", "seed": seed, "files": files, "train_iters": 30,
                       "group_by_length": group}  # fmt: skip
    yield {"name": "drawn one by one", "files": [20], "train_iters": 30, "batch_size": 1, "group_by_length": True}
    yield {"name": "drawn more than 200 times", "files": [7], "train_iters": 500}
    yield {"name": "drawn more than 200 times", "files": [7], "train_iters": 500, "group_by_length": True}
    yield {"name": "drawn 1400 of 7", "files": [7], "train_iters": 350, "group_by_length": True}


def by_epochs() -> Iterator[dict[str, Any]]:
    for seed in SEEDS:
        for files in ([1], [7], [20], [203]):
            for epochs in (1, 3):
                for group in (False, True):
                    yield {"name": f"epochs {epochs} seed {seed} of {files[0]}", "seed": seed, "files": files,
                           "epochs": epochs, "group_by_length": group}  # fmt: skip


def several_files() -> Iterator[dict[str, Any]]:
    for seed in SEEDS[:2]:
        for weights in (None, [2, 1, 3], [0, 1, 3]):
            for group in (False, True):
                more = {"seed": seed, "weights": weights, "group_by_length": group}
                told = f"seed {seed} weights {weights}" if weights else f"seed {seed} no weights"
                yield {"name": f"files drawn {told}", "files": [7, 20, 203], "train_iters": 30, **more}
                for epochs in (1, 3):
                    yield {"name": f"files epochs {epochs} {told}", "files": [7, 20, 5], "epochs": epochs, **more}


def accumulating() -> Iterator[dict[str, Any]]:
    for accumulation in (1, 3):
        for group in (False, True):
            more = {"accumulation": accumulation, "group_by_length": group}
            told = f"accumulation {accumulation}"
            yield {"name": f"{told} drawn", "files": [7], "train_iters": 200, **more}
            for epochs in (1, 3):
                yield {"name": f"{told} epochs {epochs}", "files": [20], "epochs": epochs, **more}
                yield {"name": f"{told} epochs {epochs} of 7", "files": [7], "epochs": epochs, **more}


def splitting() -> Iterator[dict[str, Any]]:
    for block_size in (10, 20):
        for seed in SEEDS:
            yield {"name": f"split block {block_size} seed {seed}", "files": [203], "seed": seed, "train_iters": 30,
                   "split": "8,1,1", "block_size": block_size}  # fmt: skip
        for weights in (None, [2, 1, 3]):
            for group in (False, True):
                told = f"weights {weights}" if weights else "no weights"
                yield {"name": f"split block {block_size} files {told}", "files": [20, 203, 45], "weights": weights,
                       "train_iters": 30, "split": "8,1,1", "block_size": block_size,
                       "group_by_length": group}  # fmt: skip
    for accumulation in (1, 3):
        yield {"name": f"split accumulation {accumulation}", "files": [20], "train_iters": 1000, "split": "8,1,1",
               "block_size": 20, "accumulation": accumulation, "group_by_length": True}  # fmt: skip
    for split in ("7,2,1", "1,1,1", "1000,1,1", "0.7/0.1", "1,1,1000"):
        for block_size in (7, 10, 30):
            yield {"name": f"split {split} block {block_size}", "files": [45], "train_iters": 3, "split": split,
                   "block_size": block_size}  # fmt: skip


def on_ranks() -> Iterator[dict[str, Any]]:
    for ranks in (2, 4):
        for files in ([1], [7], [20], [203]):
            yield {"name": f"ranks {ranks} drawn of {files[0]}", "ranks": ranks, "files": files, "train_iters": 5}
            for epochs in (1, 3):
                yield {"name": f"ranks {ranks} epochs {epochs} of {files[0]}", "ranks": ranks, "files": files,
                       "epochs": epochs}  # fmt: skip
        more = {"ranks": ranks, "files": [7, 20, 5], "weights": [2, 1, 3], "group_by_length": True, "accumulation": 3}
        yield {"name": f"ranks {ranks} files drawn", "train_iters": 5, **more}
        yield {"name": f"ranks {ranks} files epochs 3", "epochs": 3, **more}
    yield {"name": "ranks 2 split", "ranks": 2, "files": [203], "train_iters": 5, "split": "8,1,1", "block_size": 20}


def held_out() -> Iterator[dict[str, Any]]:
    """The loaders of an evaluation: parts of a split, which SAT draws by chance, and --valid-data, which it doesn't."""
    for loader in ("valid", "test"):
        for files, seed, split, block_size in (
            ([203], 1234, "8,1,1", 10), ([203], 1, "8,1,1", 20), ([20, 45], 1, "7,2,1", 20), ([45], 1, "1000,1,1", 10),
            ([45], 1, "1,1,1", 10), ([45], 1, "1,1,1", 7),
        ):  # fmt: skip
            yield {"name": f"{loader} part of {split} block {block_size} seed {seed}", "loader": loader,
                   "files": files, "seed": seed, "train_iters": 30, "split": split, "block_size": block_size,
                   "eval_iters": 20}  # fmt: skip
    for ranks in (1, 2, 4):
        for files in ([1], [7, 20]):
            yield {"name": f"valid-data of {sum(files)} ranks {ranks}", "loader": "valid-data", "files": files,
                   "ranks": ranks, "train_iters": 30, "eval_batch_size": 3}  # fmt: skip


# --- recording ------------------------------------------------------------------------------------------------------


@contextmanager
def untouched_sat() -> Iterator[None]:
    """Undo afterwards what `adapt_data` puts into SAT: it would be put there twice."""
    data: Any = importlib.import_module("sat.data_utils.configure_data")
    training: Any = importlib.import_module("sat.training.deepspeed_training")
    names = ("RandomMappingDataset", "RandomDataset", "make_data_loader")
    before = {name: getattr(data, name) for name in names}
    make_loaders = training.make_loaders
    try:
        yield
    finally:
        for name in names:
            setattr(data, name, before[name])
        training.make_loaders = make_loaders


def loader_of(case: dict[str, Any], rank: int) -> Any:
    """The project's `LazyLoader` of a case, on one of its ranks."""
    firsts = [0, *accumulate(case["files"])]
    paths = [str(number) for number in range(len(case["files"]))]
    args = argparse.Namespace(
        train_data=paths,
        train_data_weights=case["weights"],
        valid_data=paths if case["loader"] == "valid-data" else None,
        test_data=None,
        strict_eval=True,
        iterable_dataset=False,
        iterable_dataset_eval=False,
        batch_from_same_dataset=False,
        num_workers=0,
        prefetch_factor=4,
        gradient_accumulation_steps=case["accumulation"],
        **{name: case[name] for name in ("seed", "train_iters", "epochs", "batch_size", "split", "block_size",
           "group_by_length", "eval_interval", "eval_iters", "eval_batch_size")},
    )  # fmt: skip

    def create_dataset(path: str, _: argparse.Namespace) -> NumberedSamples:
        return NumberedSamples(firsts[int(path)], case["files"][int(path)])

    training: Any = importlib.import_module("sat.training.deepspeed_training")
    with (
        untouched_sat(),
        mock.patch("torch.distributed.get_world_size", return_value=case["ranks"]),
        mock.patch("torch.distributed.get_rank", return_value=rank),
    ):
        sat_compat.adapt_data(args)
        loaders = training.make_loaders(args, create_dataset, collate_fn=list)
    return loaders[{"train": 0, "valid": 1, "valid-data": 1, "test": 2}[case["loader"]]]


def recorded(case: dict[str, Any]) -> dict[str, Any]:
    """A case with its order."""
    whole = DEFAULTS | case
    configure_data: Any = importlib.import_module("sat.data_utils.configure_data")
    if "split" in case:
        case["shares"] = configure_data.get_split(
            argparse.Namespace(valid_data=None, test_data=None, split=case["split"])
        )
    parts = []
    for rank in range(whole["ranks"]):
        lazy = loader_of(whole, rank)
        sizes = {"samples": len(lazy.loader.dataset), "micro_batches": len(lazy.loader), "steps": len(lazy)}
        parts += [{"rank": rank, **part} for part in recorded_parts(whole, lazy)]
    return {**case, **sizes, "parts": parts}


def recorded_parts(case: dict[str, Any], lazy: Any) -> list[dict[str, Any]]:
    """The micro-batches of one rank: all where the order ends, else the first, those around a window, and the last."""
    if case["epochs"] or case["loader"] == "valid-data":
        return [{"start": 0, "batches": list(lazy)}]
    first = -(-FIRST_SAMPLES // (case["batch_size"] * case["ranks"]))
    batches = list(lazy.loader.batch_sampler)  # of places: going through all samples would take minutes
    further = [AROUND_WINDOW] * case["group_by_length"] + [range(len(batches) - LAST_BATCHES, len(batches))]
    parts = [{"start": 0, "batches": list(islice(lazy, first))}]
    for numbers in further:
        numbers = range(max(numbers.start, 0), min(numbers.stop, len(batches)))
        parts.append(
            {
                "start": numbers.start,
                "batches": [[lazy.loader.dataset[place] for place in batches[number]] for number in numbers],
            }
        )
    return parts


def main() -> None:
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    sat_compat.set_launcher_environment()
    torch.distributed.init_process_group("gloo")
    importlib.import_module("sat.mpu").initialize_model_parallel(1)
    sat_compat.quieten()
    cases = [recorded(case) for case in all_cases()]
    names = [case["name"] for case in cases]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    packages = ("SwissArmyTransformer", "deepspeed", "torch", "numpy")
    head = {
        "about": "which sample comes n-th; written by record_sample_orders.py, which says what the fields are",
        "versions": {
            "commit": "d2f0275",
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "text_lengths": LENGTHS,
        "defaults": DEFAULTS,
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    listed = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + ',\n"cases": [\n' + listed + "\n]}\n")


if __name__ == "__main__":
    main()
