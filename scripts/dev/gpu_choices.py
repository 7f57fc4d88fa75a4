"""Measures a GPU in one go: our step against the released one, and what only a GPU can decide. Ends in a table for BENCHMARKS.md.

    bash scripts/dev/benchmark_gpu.sh                             the 6B shape with random weights
    python scripts/dev/gpu_choices.py figures --shape mini        small, to try it; without a GPU it runs on the CPU

What has been measured of each row goes to figures/<row>.json, and the table to figures/choices.md. Each line of it says what is
done now, what was measured, and, if the two disagree, which line of the code to change. On a CPU its numbers mean nothing.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.distributed import has_gpu
from model.errors import command
from model.progress import count_of, duration, say, warn
from scripts.dev.benchmark import Bench, Side, machine, measured, parsed, synchronize, trained_parameters
from scripts.dev.released_way import SAVINGS, Way
from scripts.dev.shapes import SHAPES

# Rows of benchmark.py by name, and steps whose memory is held against --dry_run's, as (rows, tokens); one model a method.
ROWS = {
    "lora": {
        "few-shot": "--batch-size 4",
        "ablation": "--batch-size 4 --ablate",
        "lora-batch-1": "--batch-size 1",
        "full-batches": "--batch-size 16 --seq 1024 --max_source_length 512 --max_target_length 512 --steps 3",
    },
    "ptuning": {"ptuning": "--batch-size 4"},
    "qlora": {"qlora-batch-1": "--batch-size 1"},
}
MEMORY = {"lora": ((4, 56), (4, 320)), "ptuning": (), "qlora": ((1, 56),)}
LENGTHS = (64, 192, 320)  # tokens, at which cuDNN's gradients are reported NaN
ROWS_OF_PRODUCTS = (1, 4, 16, 56, 320, 1280)
REPEATS = 5
WORTH = 0.95  # a kernel is taken if it needs less than this share of the time
TENTH = 0.1


class Choice(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    verdict: str  # "as it is", or what to change


def seconds(call: Callable[[], Any], device: Any) -> float:
    """The median time of a call, after two that make plans and tables."""
    times = []
    for _ in range(REPEATS + 2):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def attention_choices(device: Any, dtype: Any, heads: int) -> Iterator[Choice]:
    """cuDNN's attention against the others, with a mask and gradients."""
    import torch
    import torch.nn.functional as F

    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    for seq in LENGTHS:
        shape = (4, heads, seq, 128)
        inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        bias = torch.zeros(4, 1, seq, seq, device=device, dtype=dtype)
        bias[..., seq // 2 :] = -10_000.0

        def step(inputs: Any = inputs, bias: Any = bias) -> bool:
            query, key, value = inputs
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            gradients = torch.autograd.grad(output.float().sum(), inputs)
            return all(bool(gradient.isfinite().all()) for gradient in gradients)

        found = {}
        for enabled in (False, True):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            try:
                found[enabled] = step(), seconds(step, device)
            finally:
                torch.backends.cuda.enable_cudnn_sdp(was_enabled)
        (_, without), (is_finite, with_cudnn) = found[False], found[True]
        better = is_finite and with_cudnn < WORTH * without
        told = f"{1000 * without:.2f} ms without, {1000 * with_cudnn:.2f} ms with, gradients {'finite' if is_finite else 'NaN'}"
        verdict = "faster here and finite: if so at all lengths, drop `without_cudnn` in model/attention.py"
        yield Choice(f"cuDNN's attention at {seq} tokens (off)", told, verdict if better else "as it is")


def product_choices(device: Any, dtype: Any, hidden: int) -> Iterator[Choice]:
    """bitsandbytes' own product, which takes a fused kernel or not by the GPU and the rows, against unpacking each time."""
    import bitsandbytes
    import torch
    import torch.nn.functional as F

    from model.frozen import dequantized, quantized

    packed, state = quantized(0.02 * torch.randn(3 * hidden, hidden, device=device, dtype=dtype))
    state.dtype = dtype
    for rows in ROWS_OF_PRODUCTS:
        x = torch.randn(rows, hidden, device=device, dtype=dtype)
        with torch.no_grad():
            unpacked = seconds(lambda x=x: F.linear(x, dequantized(packed, state, dtype)), device)  # type: ignore[misc]
            theirs = seconds(lambda x=x: bitsandbytes.matmul_4bit(x, packed.t(), state), device)  # type: ignore[misc]
        told = f"{1000 * unpacked:.3f} ms unpacked, {1000 * theirs:.3f} ms bitsandbytes'"
        verdict = f"unpack it in `Nf4Linear.product`, model/frozen.py, at {count_of(rows, 'row')}"
        yield Choice(
            f"a product of 4 bits, {count_of(rows, 'row')} (bitsandbytes')",
            told,
            verdict if unpacked < WORTH * theirs else "as it is",
        )


def compile_choice(device: Any, dtype: Any, hidden: int) -> Choice:
    """A frozen layer's norm and MLP, compiled and not, with gradients."""
    import torch

    norm, up = torch.nn.LayerNorm(hidden), torch.nn.Linear(hidden, 4 * hidden)
    layer = torch.nn.Sequential(norm, up, torch.nn.GELU("tanh"), torch.nn.Linear(4 * hidden, hidden)).to(device, dtype)
    layer.requires_grad_(False)
    x = torch.randn(4 * 56, hidden, device=device, dtype=dtype, requires_grad=True)

    def step(function: Any) -> None:
        torch.autograd.grad(function(x).float().sum(), x)

    plain = seconds(lambda: step(layer), device)
    try:
        compiled_layer = torch.compile(layer, dynamic=True)
        compiled = seconds(lambda: step(compiled_layer), device)
    except Exception as error:  # of any kind: the compiler needs a compiler of its own
        reason = " ".join(str(error).split())[:80]
        return Choice("torch.compile (not used)", f"it can't here ({reason})", "as it is")
    told = f"{1000 * plain:.2f} ms as it is, {1000 * compiled:.2f} ms compiled, lengths left open"
    verdict = "compile the layers in model/visualglm.py, and measure a whole run, start included"
    return Choice("torch.compile (not used)", told, verdict if compiled < 0.8 * plain else "as it is")


def row_choices(folder: Path, shape: str, dtype: str, only: Sequence[str]) -> Iterator[Choice]:
    """The memory of steps; what is measured of each row goes to its file in folder, for `speed_choices`."""
    import torch

    for method, rows in ROWS.items():
        bench = model = None
        common = ["--shape", shape, "--method", method, "--dtype", dtype]
        for name, words in rows.items():
            if name not in only:
                continue
            say(f"== {name}: {words}")
            try:
                bench = Bench(parsed([*common, *words.split(), "--json", str(folder / f"{name}.json")]), model)
                model = bench.model
                measured(bench)
            except torch.OutOfMemoryError as error:
                yield Choice(f"step of {name}", "it doesn't fit", str(error).split(". ")[0])
        bench = None  # with the matrices that the GPU's rate was measured with
        for size in MEMORY[method] if has_gpu() and model is not None else ():
            yield memory_choice(model, common, *size)
        del model
        trained_parameters.cache_clear()  # it holds the model
        gc.collect()
        torch.cuda.empty_cache()


def memory_choice(model: Any, common: Sequence[str], rows: int, seq: int) -> Choice:
    """The memory of a step beside what --dry_run says."""
    from model.training.memory import CUDA_ITSELF, GIB, Batch, Setup, estimate

    bench = Bench(parsed([*common, "--batch-size", str(rows), "--seq", str(seq), "--steps", "1"]), model)
    options = bench.options
    figures, _ = bench.memory(Side(Way(list(SAVINGS), options), bench.model, bench.dtype))
    setup = Setup(bench.config, bench.model.adapters, options.dtype, hidden_dropout=0.0, attention_dropout=0.0)
    told = estimate(setup, Batch(rows, seq, rows * (seq - 40), images=0)).training
    estimated = sum(told.values()) - told["optimizer"] - CUDA_ITSELF
    found = figures["GPU GiB"] * GIB
    off = estimated / found - 1
    return Choice(
        f"memory of {options.method}, {rows} × {seq}",
        f"{found / GIB:.2f} GiB measured, {estimated / GIB:.2f} estimated",
        "as it is" if abs(off) <= TENTH else f"`activation_bytes` in model/training/memory.py is off by {off:+.0%}",
    )


def context_choice() -> Choice:
    """The memory that CUDA takes for itself."""
    import torch

    from model.training.memory import CUDA_ITSELF, GIB

    free, total = torch.cuda.mem_get_info()
    itself = total - free - torch.cuda.memory_reserved()
    is_near = itself <= CUDA_ITSELF
    verdict = "as it is" if is_near else "CUDA_ITSELF in model/training/memory.py, if nobody else uses this GPU"
    return Choice(f"CUDA itself ({CUDA_ITSELF / GIB:.2f} GiB)", f"{itself / GIB:.2f} GiB", verdict)


def speed_choices(folder: Path) -> Iterator[Choice]:
    """The rows of which folder has figures: ours against the released way."""
    for file in sorted(folder.glob("*.json")):
        figures = json.loads(file.read_text())
        if "ratio" not in figures:
            continue
        released, ours = (figures[side]["seconds per step"] for side in ("released", "ours"))
        ratio = figures["ratio"]
        verdict = (
            "as it is" if ratio > 1 else "slower than released: `benchmark.py --ablate` says which saving costs time"
        )
        told = f"{released:.3f} s released, {ours:.3f} s ours, ratio {ratio:.1f}, {figures['ours']['GPU GiB']:.1f} GiB"
        yield Choice(f"step of {file.stem}", told, verdict)


def choices(folder: Path, shape: str, dtype_name: str, only: Sequence[str]) -> Iterator[Choice]:
    """Every line of the table, each when it has been measured."""
    import torch

    from model.inference.load import DTYPES

    device = torch.device("cuda" if has_gpu() else "cpu")
    dtype, config = DTYPES[dtype_name], SHAPES[shape]
    yield compile_choice(device, dtype, config["hidden_size"])
    yield from row_choices(folder, shape, dtype_name, only)
    yield from attention_choices(device, dtype, config["num_attention_heads"])
    yield from product_choices(device, dtype, config["hidden_size"])
    if has_gpu():
        yield context_choice()
    yield from speed_choices(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the figures and the table are put")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="6b", help="sizes (default %(default)s)")
    names = [name for rows in ROWS.values() for name in rows]
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="numbers (default %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help=f"of {', '.join(names)}")
    with command("gpu_choices.py"):
        options = parser.parse_args(argv)
        import torch

        started = time.monotonic()
        options.folder.mkdir(parents=True, exist_ok=True)
        where = machine(torch.device("cuda" if has_gpu() else "cpu"))
        lines = [f"| {where} | measured | what to change |", "| --- | --- | --- |"]
        for choice in choices(options.folder, options.shape, options.dtype, options.only):
            lines.append(f"| {' | '.join(choice)} |")
            warn(lines[-1])
        say("\n".join(lines))
        (options.folder / "choices.md").write_text("\n".join(lines) + "\n")
        say(f"This call took {duration(time.monotonic() - started)}.")


if __name__ == "__main__":
    main()
    from torch import distributed

    distributed.destroy_process_group()  # SAT's; NCCL warns where nobody ends it
