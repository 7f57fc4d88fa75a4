"""Every saving alone changes neither the loss nor the gradient; the benchmark measures both ways on the same weights."""

import json

import pytest
import torch
from conftest import GOLDEN, PROJECT, run_python

from model.cpu import IDENTITY_WIDTH, can_pack
from model.errors import InputError
from scripts.dev import benchmark
from scripts.dev.benchmark import Bench, compare, parsed
from scripts.dev.released_way import SAVINGS, Way

SHAPE = GOLDEN / "upstream/model_config.json"


def bench(*words: str) -> Bench:
    """The small golden model with random weights, and two batches of two rows."""
    return Bench(parsed(["--shape", str(SHAPE), "--batch-size", "2", "--steps", "2", *words]))


@pytest.fixture(scope="module", params=["lora", "qlora", "ptuning"])
def small(request: pytest.FixtureRequest) -> Bench:
    return bench("--method", request.param)


def loss_and_gradient(small: Bench, savings: list[str]) -> tuple[float, torch.Tensor]:
    way = Way(savings, small.options)
    with way.of(small.model):
        loss = small.step(way, small.model, small.dtype, small.batches[0])
    return loss, small.gradient(small.model)


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVINGS)
def test_step_without_a_saving_has_the_same_loss_and_gradient(small: Bench, saving: str) -> None:
    loss, gradient = loss_and_gradient(small, list(SAVINGS))
    other_loss, other_gradient = loss_and_gradient(small, [name for name in SAVINGS if name != saving])
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert gradient.norm() > 0


@pytest.mark.slow
def test_step_without_any_saving_has_the_same_loss_and_gradient(small: Bench) -> None:
    loss, gradient = loss_and_gradient(small, list(SAVINGS))
    released_loss, released_gradient = loss_and_gradient(small, [])
    assert loss == pytest.approx(released_loss, rel=1e-5)
    assert (released_gradient - gradient).norm() <= 1e-4 * gradient.norm()


def test_rows_of_the_released_way_are_padded_to_the_flags() -> None:
    small = bench()
    batch = Way([], small.options).batch(small.batches[0], small.features, small.device, small.dtype)
    assert batch["input_ids"].shape == (2, 320)


@pytest.mark.slow
@pytest.mark.long
def test_comparison_in_bfloat16_measures_the_released_way_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MEASURED_SECONDS", 0.0)
    small = bench("--dtype", "bf16")
    results = compare(small)
    assert small.released_dtype == torch.float32
    assert results["loss difference"] < 1e-2
    assert results["gradient difference"] < 5e-2


@pytest.mark.slow
@pytest.mark.long
def test_comparison_tells_the_worst_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MEASURED_SECONDS", 0.0)
    small, asked = bench(), []
    gradient = Bench.gradient

    def worse_each_time(bench: Bench, model: object) -> torch.Tensor:
        asked.append(model)
        return gradient(bench, model) * (2.0 if len(asked) == 4 else 1.0)  # released, released, ours, ours

    monkeypatch.setattr(Bench, "gradient", worse_each_time)
    assert compare(small)["gradient difference"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_both_ways_are_measured_in_turns_and_the_ratio_is_the_median_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    small, seconds = bench("--steps", "3"), iter([4.0, 2.0, 9.0, 1.0, 6.0, 2.0])
    sides, rates = [], iter([1e9, 2e9, 4e9])
    monkeypatch.setattr(Bench, "seconds", lambda bench, side: sides.append(len(side.way.savings)) or next(seconds))
    monkeypatch.setattr(Bench, "rate", lambda bench: next(rates))
    results = compare(small)
    assert sides == [0, len(SAVINGS)] * 3
    assert results["ratios"] == [2.0, 9.0, 3.0]
    assert results["ratio"] == 3.0
    assert results["matrix rate"] == 2e9
    batch = Way(list(SAVINGS), small.options).batch(small.batches[0], small.features, small.device, small.dtype)
    operations = benchmark.step_operations(small.config, batch)
    assert results["ours"]["matrix-rate share"] == operations / 2e9  # the median of 2 s at 1e9, 1 s at 2e9, 2 s at 4e9


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_the_machine_is_measured_with_make_large_products(dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    products = benchmark.matrix_products(dtype, device)
    assert ("b packed by oneDNN" in products) == can_pack(torch.ones(1, dtype=dtype))
    shape = (benchmark.matrix_size(device),) * 2
    assert {product().shape for product in products.values()} == {shape}


def test_fastest_kernel_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"slow": 1.0, "fast": 3.0, "middling": 2.0}
    monkeypatch.setattr(benchmark, "matrix_products", lambda *_: {name: lambda name=name: name for name in rates})
    monkeypatch.setattr(benchmark, "product_rate", lambda product, device: rates[product()])
    assert bench().fastest_product[0] == "fast"


def test_last_line_begins_with_the_ratio_and_ends_with_its_spread(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"seconds per step": 1.0, "matrix-rate share": 0.5}
    benchmark.comparison_table({
        "released": figures, "ours": figures, "ratio": 13.5, "ratios": [12.0, 13.5, 15.25], "loss difference": 1e-7,
        "gradient difference": 1e-6, "matrix rate": 3e11, "matrix rates": [2e11, 3e11, 4e11], "fastest product": "a · b",
    })  # fmt: skip
    *_, rate, last = capsys.readouterr().out.splitlines()
    assert rate == "measured matrix rate 300 GFLOP/s (200 to 400; the fastest kernel: a · b)"
    assert last == (
        "ratio 13.5, loss difference 1.0e-07, gradient difference 1.0e-06, matrix-rate share 0.50, "
        "ratios of 3 pairs 12.0 to 15.2"
    )


@pytest.mark.long
@pytest.mark.run
def test_command_ends_with_the_four_figures(tmp_path) -> None:
    figures = tmp_path / "figures.json"
    words = ("--shape", SHAPE, "--steps", "1", "--batch-size", "1", "--json", figures)
    run = run_python(PROJECT / "scripts/dev/benchmark.py", *words)
    assert run.returncode == 0, run.stderr
    last = run.stdout.splitlines()[-1]
    assert last.startswith("ratio ")
    assert all(word in last for word in ("loss difference", "gradient difference", "matrix-rate share"))
    assert json.loads(figures.read_text())["ours"]["seconds per step"] > 0


@pytest.mark.slow
def test_profile_counts_the_products_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    small = bench("--dtype", "bf16")
    found, rate = benchmark.profile(small)
    batch = Way(list(SAVINGS), small.options).batch(small.batches[0], small.features, small.device, small.dtype)
    counted = sum(one.operations for one in found.values())
    assert counted > 0.5 * benchmark.step_operations(small.config, batch)  # the lowest layers have no gradient
    benchmark.profile_table(found, rate)
    assert capsys.readouterr().out.splitlines()[-1].startswith("products ")


def test_product_is_described_by_its_sizes() -> None:
    a, b = torch.ones(2, 3, 4), torch.ones(4, 5)
    assert benchmark.described("aten.mm.default", (a, b), a @ b) == ("mm 6 × 4 → 5", 2.0 * 6 * 4 * 5)
    assert benchmark.described("aten.add.Tensor", (a, a), a) == ("add.Tensor", 0.0)
    rows = torch.ones(5, IDENTITY_WIDTH)  # of the product with the identity that is a GELU
    assert benchmark.described("mkldnn._linear_pointwise.default", (rows, rows), rows) == ("gelu", 0.0)


def test_no_steps_are_refused() -> None:
    with pytest.raises(InputError, match="--steps 0: 1 or more"):
        parsed(["--steps", "0"])


@pytest.mark.run
def test_command_when_the_shape_is_no_file_says_so() -> None:
    run = run_python(PROJECT / "scripts/dev/benchmark.py", "--shape", "no-such.json")
    assert run.returncode == 2
    assert "no-such.json" in run.stderr
    assert "Traceback" not in run.stderr
