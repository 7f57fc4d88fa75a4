"""--dry_run and --batch-size auto: what they say, and that a real run takes as much on a CPU."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, run_python, write_rows

import finetune_visualglm
from model.adapter_config import AdapterConfig
from model.cli.options import parse, spelled_out
from model.cli.preflight import Inputs, preflight
from model.cli.resuming import command_line
from model.data.dataset import packed_collator
from model.data.lengths import longest_samples
from model.data.prompt import sample_from_row
from model.errors import InputError
from model.training import dry_run, memory
from model.training.dry_run import plan_of, with_batch_size
from model.training.memory import Batch, Setup
from model.training.step_time import step_operations
from scripts.dev.shapes import SHAPES, TINY_IDS
from scripts.dev.write_random_model import write_random_model

ROWS = "fewshot-data/dataset.json"
FLAGS = ["--use_lora", "--layer_range", "0", "14", "--mode", "finetune", "--train-data", ROWS, "--save", "none"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the 6B shape, whose weights file is empty: --dry_run must not read it."""
    folder = tmp_path_factory.mktemp("large") / "large"
    (folder / "1").mkdir(parents=True)
    (folder / "1/mp_rank_00_model_states.pt").touch()
    config = {name: value for name, value in SHAPES["6b"].items() if not name.endswith("_dropout")} | TINY_IDS
    (folder / "model_config.json").write_text(json.dumps(config))
    (folder / "latest").write_text("1")
    shutil.copy(PROJECT / "model/tiny/ice_text.model", folder)
    return str(folder)


@pytest.fixture(autouse=True)
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    finetune_visualglm.main([*FLAGS, "--dry_run", *words])
    return capsys.readouterr().out


def auto(large: str, *words: str) -> Any:
    line = command_line([*FLAGS, "--from_pretrained", large, "--fp16", "--batch-size", "auto", *words])
    return with_batch_size(line, preflight(line.options))


def test_report_of_the_6b_says_what_is_trained_and_that_it_fits(capsys: pytest.CaptureFixture[str], large: str) -> None:
    said = told(capsys, "--from_pretrained", large, "--fp16", "--gpu_memory", "24GB")
    assert "Parameters: 7,802,848,768, of which 655,360 are trained." in said
    assert "Largest batch: 4 rows of 72 tokens" in said
    assert "It fits: 20.12 of 22.35 GiB can be used (--gpu_memory)." in said
    assert "A checkpoint takes 11.0 MiB." in said
    assert "Time per step: can't be measured for a GPU that isn't here" in said


def test_report_of_qlora_counts_4_bits_as_what_they_are(capsys: pytest.CaptureFixture[str], large: str) -> None:
    said = told(capsys, "--from_pretrained", large, "--fp16", "--gpu_memory", "8GB")
    as_qlora = [word.replace("--use_lora", "--use_qlora") for word in FLAGS]
    finetune_visualglm.main([*as_qlora, "--dry_run", "--from_pretrained", large, "--fp16", "--gpu_memory", "8GB"])
    qlora = capsys.readouterr().out
    assert "5,637,144,576 are kept in 4 bits." in qlora
    assert "It fits" in qlora
    assert "It does not fit" in said


def test_report_of_what_does_not_fit_names_the_flags_that_help_in_their_order(
    capsys: pytest.CaptureFixture[str], large: str
) -> None:
    said = told(capsys, "--from_pretrained", large, "--gpu_memory", "24GB", "--batch-size", "16")
    ways = said.partition("the cheapest first:\n")[2].splitlines()
    flags = [way.split()[0] for way in ways if way.startswith("  --")]
    assert flags[0] == "--bf16"
    assert flags.index("--use_qlora") < flags.index("--model-parallel-size")
    assert all(float(way.split(" GiB;")[0].split()[-1]) <= 0.9 * 24e9 / 2**30 for way in ways if " GiB;" in way)


def test_report_of_what_fits_without_the_vision_part_names_the_feature_cache(
    capsys: pytest.CaptureFixture[str], large: str
) -> None:
    few = ["--train-iters", "2", "--batch-size", "1", "--gpu_memory", "8GiB"]
    as_qlora = [word.replace("--use_lora", "--use_qlora") for word in FLAGS]
    words = [*as_qlora, "--dry_run", "--from_pretrained", large, "--fp16", *few]
    finetune_visualglm.main(words)
    said = capsys.readouterr().out
    assert "It does not fit" in said
    [needed] = re.findall(
        r"^  --feature_cache FOLDER +(\S+) GiB; no slower; each picture is looked at once", said, re.MULTILINE
    )
    finetune_visualglm.main([*words, "--feature_cache", str(Path(large, "features"))])
    said = capsys.readouterr().out
    assert "It fits" in said
    [training, loading] = re.findall(r"^  all while \w+ +(\S+)$", said, re.MULTILINE)
    assert needed == max(training, loading, key=float)


@pytest.mark.parametrize(
    ("flags", "said", "advised"),
    [
        ("", True, True),
        ("--zero-stage 1", True, False),
        ("--train_parts vit=1e-5", True, False),
        ("--distributed-backend gloo", False, False),
    ],
)
def test_report_for_a_gpu_says_what_nccl_takes_and_how_to_do_without(
    capsys: pytest.CaptureFixture[str], large: str, flags: str, said: bool, advised: bool
) -> None:
    report = told(capsys, "--from_pretrained", large, "--fp16", "--gpu_memory", "24GB", *flags.split())
    assert ("Not counted: NCCL, which took 1.2 GiB" in report) == said
    assert ("--distributed-backend gloo does without it" in report) == advised


def test_report_for_a_cpu_says_nothing_of_nccl(large: str) -> None:
    options = parse([*FLAGS, "--from_pretrained", large])
    assert dry_run.nccl_note(plan_of(options, preflight(options), on_gpu=True).setup, "nccl")
    assert not dry_run.nccl_note(plan_of(options, preflight(options), on_gpu=False).setup, "nccl")


def test_report_of_what_no_flag_makes_fit_says_so(capsys: pytest.CaptureFixture[str], large: str) -> None:
    assert "a larger GPU is needed" in told(capsys, "--from_pretrained", large, "--gpu_memory", "1GB")


def test_report_loads_neither_weights_nor_torch(large: str) -> None:
    words = [*FLAGS, "--dry_run", "--from_pretrained", large, "--gpu_memory", "24GB"]
    done = run_python(
        "-c", f"import sys, finetune_visualglm\nfinetune_visualglm.main({words})\nassert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", ["--use_lora", "--use_qlora"])
def test_report_on_a_machine_without_a_gpu_says_how_long_a_step_takes_by_its_rate(
    capsys: pytest.CaptureFixture[str], large: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "measured_rate", lambda *_: 1e11)
    monkeypatch.setattr(dry_run, "measured_unpacking", lambda *_: 1e10)
    flags = [method if word == "--use_lora" else word for word in FLAGS]
    finetune_visualglm.main([*flags, "--dry_run", "--from_pretrained", large, "--bf16", "--batch-size", "1"])
    found = re.search(r"about ([\d.]+) s for the largest batch, by .* 100 GFLOP/s(.*)\. What", capsys.readouterr().out)
    assert found is not None
    setup = Setup(SHAPES["6b"], AdapterConfig(("lora",), layers=(0, 14)), "bf16", on_gpu=False)
    in_products = step_operations(setup, Batch(1, 72, 20, images=0)) / 1e11
    unpacking = 2 * 28 * 12 * 4096 * 4096 / 1e10 if method == "--use_qlora" else 0
    assert float(found[1]) == pytest.approx(in_products + unpacking, rel=0.05)
    assert ("4 bits" in found[2]) == bool(unpacking)


@pytest.mark.parametrize(("flags", "seconds"), [([], 0.056), (["--checkpoint-activations"], 0.11)])
def test_step_of_a_gpu_that_is_here_takes_at_least_as_long_as_its_kernels_are_started(
    large: str, flags: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "measured_rate", lambda *_: 3e14)
    options = parse([*FLAGS, "--from_pretrained", large, "--fp16", *flags])
    plan = plan_of(options, preflight(options), on_gpu=True)
    said = dry_run.time_per_step(plan, dry_run.Device("1 GPU found", 2**37, on_gpu=True))
    assert f"Starting a step's kernels takes a core about {seconds} s: on a GPU a short batch" in said
    assert "Starting" not in dry_run.time_per_step(
        plan.changed(on_gpu=False), dry_run.Device("CPU", 2**37, on_gpu=False)
    )


def test_two_processes_and_zero_2_are_counted(large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = parse([*FLAGS, "--from_pretrained", large, "--fp16", "--zero-stage", "2", "--gpu_memory", "24GB"])
    setup = plan_of(options, preflight(options), on_gpu=True).setup
    assert (setup.data_parallel, setup.zero_stage, setup.dtype) == (2, 2, "fp16")


def test_deepspeed_file_wins_in_the_report_too(capsys: pytest.CaptureFixture[str], large: str, tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}))
    said = told(capsys, "--from_pretrained", large, "--gpu_memory", "24GB", "--deepspeed_config", str(file))
    assert "Largest batch: 2 rows" in said
    assert "in bf16, GiB" in said


def test_longest_sample_is_that_of_the_samples_themselves() -> None:
    options = parse([*FLAGS, "--from_pretrained", "model/tiny", "--layer_range", "0"])
    inputs: Inputs = preflight(options)
    samples = [sample_from_row(row, inputs.tokenizer, inputs.lengths) for row in inputs.selection.rows[ROWS]]
    longest, target = longest_samples({ROWS: inputs.selection.rows[ROWS]}, inputs.tokenizer, inputs.lengths)
    assert longest == [max(len(sample.input_ids) for sample in samples)]
    assert target == max(sum(label != -100 for label in sample.labels) for sample in samples)


@pytest.mark.parametrize(
    ("memory", "rows", "accumulated"), [("24GB", "16", "1"), ("16.3GB", "2", "8"), ("15.9GB", "1", "16")]
)
def test_auto_takes_the_largest_batch_that_fits_and_keeps_the_step(
    large: str, memory: str, rows: str, accumulated: str
) -> None:
    line = auto(large, "--gradient-accumulation-steps", "4", "--gpu_memory", memory)
    assert line.words[-4:] == ["--batch-size", rows, "--gradient-accumulation-steps", accumulated]
    assert (str(line.options.batch_size), str(line.options.gradient_accumulation_steps)) == (rows, accumulated)
    assert "--auto_batch_size" not in line.words
    assert int(rows) * int(accumulated) == 16


def test_auto_when_one_row_does_not_fit_says_what_is_needed(large: str) -> None:
    with pytest.raises(InputError, match=r"one row of 72 tokens takes 1\d\.\d\d GiB, 3\.35 can be used"):
        auto(large, "--gpu_memory", "4GB")


@pytest.mark.parametrize(
    ("steps", "flags", "kept"),
    [
        (6, [], False),  # 24 samples of 20, which are 10 in each file
        (10, [], True),
        (9, [], False),
        (6, ["--feature_cache", "features"], True),
        (6, ["--holdout", "0.7"], False),  # whose 14 rows are the larger data set
        (7, ["--holdout", "0.7"], True),
    ],
)
def test_features_are_kept_where_the_rows_of_all_files_come_twice(
    tmp_path: Path, steps: int, flags: list[str], kept: bool
) -> None:
    rows = json.loads((PROJECT / ROWS).read_text())
    rows = [{**row, "img": str(PROJECT / row["img"])} for row in rows]
    files = [write_rows(tmp_path, rows[:10], "a.json"), write_rows(tmp_path, rows[10:20], "b.json")]
    options = parse(
        [
            "--use_lora",
            "--mode",
            "finetune",
            "--from_pretrained",
            "model/tiny",
            "--save",
            "none",
            "--train-data",
            *map(str, files),
            "--train-iters",
            str(steps),
            *flags,
        ]
    )
    inputs = preflight(options)
    assert (plan_of(options, inputs, on_gpu=True).batch.images == 0) == kept


def test_packed_batch_is_counted_as_the_collator_makes_it() -> None:
    options = parse(
        [*FLAGS, "--from_pretrained", "model/tiny", "--layer_range", "0", "--packing", "--batch-size", "64"]
    )
    inputs = preflight(options)
    samples = [sample_from_row(row, inputs.tokenizer, inputs.lengths) for row in inputs.selection.rows[ROWS]]
    longest = sorted(samples, key=lambda sample: -len(sample.input_ids))
    examples = [
        {"input_ids": one.input_ids, "labels": one.labels, "image": None, "pad_token_id": 0}
        for one in [*3 * longest, *longest[:4]]
    ]
    made = packed_collator(examples)["input_ids"]
    plan = plan_of(options, inputs, on_gpu=False)
    assert (plan.batch.packs, plan.batch.seq) == tuple(made.shape) == (3, 2032)
    assert (plan.with_rows(4).batch.packs, plan.with_rows(4).batch.tokens) == (1, 272)


def test_auto_counts_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "free_host_memory", lambda: 10**9)
    words = ["--use_lora", *FLAGS[4:], "--from_pretrained", "model/tiny", "--gradient-accumulation-steps", "16"]
    words += ["--batch-size", "auto"]
    lines = [command_line([*words, *more]) for more in ([], ["--packing"])]
    rows = [with_batch_size(line, preflight(line.options)).options.batch_size for line in lines]
    assert rows[0] == 64
    assert rows[1] <= 16


def test_run_counts_packs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack of 1300 tokens keeps attention weights of half a GiB."""
    monkeypatch.setattr(memory, "free_memory", lambda _: 2**29)
    words = ["--use_lora", *FLAGS[4:], "--from_pretrained", "model/tiny", "--answers", "0", "--num-workers", "0"]
    words += ["--train-iters", "1", "--batch-size", "20"]
    finetune_visualglm.main(words)
    assert "computed again" not in capsys.readouterr().out
    finetune_visualglm.main([*words, "--packing"])
    assert "computed again" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--batch-size", "auto"], ["--batch-size=auto"], ["--auto_batch_size"]])
def test_auto_is_spelled_out_for_sats_parser(words: list[str]) -> None:
    assert spelled_out(["--lr", "1", *words]) == ["--lr", "1", "--auto_batch_size"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24", 24 * 10**9),
        ("24GB", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("24 g", 24 * 10**9),
        ("24000000000", 24 * 10**9),
    ],
)
def test_gpu_memory_is_read_in_the_usual_spellings(text: str, size: int) -> None:
    assert parse(["--gpu_memory", text]).gpu_memory == size


@pytest.mark.parametrize("text", ["much", "0", "GB", "-3GB", "1.2.3GB"])
def test_gpu_memory_that_is_no_size_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit):
        parse([f"--gpu_memory={text}"])
    assert "a size such as 24GB is needed" in capsys.readouterr().err


def peak_of_a_run(words: list[str]) -> tuple[int, str]:
    """Bytes of memory that a run in a process of its own took at most, and what it printed."""
    script = "import pathlib, re, sys, finetune_visualglm\nfinetune_visualglm.main(sys.argv[1:])\n"
    # Not getrusage's: that begins with what the process that started this one held.
    script += "print('peak', re.search(r'VmHWM:\\s*(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])"
    done = run_python("-c", script, *words)
    assert done.returncode == 0, done.stderr
    said, _, peak = done.stdout.rpartition("peak")
    return int(peak) * 1024, said


def assert_peak_is_as_estimated(words: list[str]) -> str:
    options = parse(spelled_out(words))
    estimated = plan_of(options, preflight(options), on_gpu=False).told.peak
    measured, said = peak_of_a_run(words)
    print(f"\n{estimated / 2**30:.3f} GiB estimated, {measured / 2**30:.3f} measured")
    assert 0.9 < estimated / measured < 1.1
    return said


@pytest.mark.run
def test_peak_of_the_small_model_on_a_cpu_is_as_estimated_with_the_batch_that_auto_takes() -> None:
    words = ["--use_lora", "--mode", "finetune", "--train-data", ROWS, "--save", "none"]
    words += ["--from_pretrained", "model/tiny", "--train-iters", "10", "--batch-size", "auto"]
    said = assert_peak_is_as_estimated(words)
    assert "--batch-size 4 --gradient-accumulation-steps 1 (auto)" in said
    assert "step 10/10" in said


SETTINGS = [
    f"{method} {dtype}"
    for method in ("--use_lora --layer_range 0 1", "--use_qlora --layer_range 0 1", "--use_ptuning --pre_seq_len 4")
    for dtype in ("", "--bf16")
]
TRAINS = ["--mode", "finetune", "--train-data", ROWS, "--save", "none", "--train-iters", "3"]


@pytest.mark.run
def test_peak_with_packing_on_a_cpu_is_as_estimated() -> None:
    words = ["--use_lora", *TRAINS[:-1], "1", "--from_pretrained", "model/tiny", "--answers", "0", "--num-workers", "0"]
    assert_peak_is_as_estimated([*words, "--packing", "--batch-size", "30"])


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_peak_of_the_small_model_on_a_cpu_is_as_estimated_for_every_method(setting: str) -> None:
    assert_peak_is_as_estimated([*TRAINS, "--from_pretrained", "model/tiny", *setting.split()])


@pytest.fixture(scope="module")
def of_2_gb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("random") / "random"
    write_random_model(folder, hidden=1536, layers=34, heads=12)
    yield str(folder)
    shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.parametrize("setting", [*SETTINGS, *(f"{setting} --batch-size 16" for setting in SETTINGS[1:4:2])])
def test_peak_of_a_model_of_2_gb_on_a_cpu_is_as_estimated(of_2_gb: str, setting: str) -> None:
    """Up to 9 GiB of memory. On two idle cores each takes from half a minute to two; -s shows both figures."""
    assert_peak_is_as_estimated([*TRAINS, "--from_pretrained", of_2_gb, *setting.split()])
