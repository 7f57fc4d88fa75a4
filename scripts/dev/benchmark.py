"""How much faster and smaller a training step is than the 2023 script's, both measured in one process.

python scripts/dev/benchmark.py --shape mini --steps 5
python scripts/dev/benchmark.py --shape mini --dtype bf16
python scripts/dev/benchmark.py --shape mini --ablate
python scripts/dev/benchmark.py --shape 6b --dtype fp16        on a GPU; random weights, no file needed

The released way: every row padded to --max_source_length + --max_target_length tokens, the vision tower run at every
step, scores of all positions in float32, attention in separate operations, activations recomputed, masks made token by
token, three LoRA products. Ours: the same weights, rows and loss without any of that.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from model.checkpoints.layout import read_json_object
from model.progress import count_of, say
from scripts.dev.released_way import SAVINGS, Way, vision_on_the_device
from scripts.dev.shapes import SHAPES, random_model

ADAPTED_LAYERS = {"mini": [0, 3], "6b": [0, 14]}
PROFILED = 20  # lines of the table of operations
MEASURED_SECONDS = 3.0  # at least, of each way in all its turns
LOSS_SCALE = 2.0**10  # without one, small gradients are lost in float16; a power of two changes no other number


# --- what is measured -----------------------------------------------------------------------------------------------


def drawn_samples(options: argparse.Namespace, config: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Samples with random words and pictures: as long as the released few-shot rows, or --seq tokens exactly."""
    import torch

    from model.data.prompt import answer_labels

    draw, words = random.Random(1), range(200, min(config["vocab_size"], 20_000))
    side, slots = config["eva_args"]["image_size"][0], config["image_length"]
    samples = []
    for index in range(count):
        question = draw.choices(words, k=5)
        answer = draw.choices(words, k=draw.randint(10, 13))
        if options.seq:
            answer = draw.choices(words, k=options.seq - slots - len(question) - 8)
        ids = [*draw.choices(words, k=3), *[config["pad_token_id"]] * slots, *question]
        ids += [config["gmask_token_id"], config["bos_token_id"], *answer, 90]
        generator = torch.Generator().manual_seed(index)
        samples.append({
            "input_ids": ids, "labels": answer_labels(ids, config["bos_token_id"]), "pre_image": 3,
            "image_length": slots, "pad_token_id": config["pad_token_id"], "path": str(index),
            "image": torch.randn(3, side, side, generator=generator),
        })  # fmt: skip
    return samples


def read_samples(options: argparse.Namespace, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of --data as samples, with the small checkpoint's tokenizer."""
    from model.data.dataset import FewShotDataset
    from model.data.image_processor import BlipImageEvalProcessor
    from model.data.tokenizer import ChatGLMTokenizer, find_tokenizer

    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(Path(__file__).resolve().parents[2] / "model/tiny"))
    dataset = FewShotDataset(
        options.data, BlipImageEvalProcessor(config["eva_args"]["image_size"][0]), tokenizer, options
    )
    return [{**dataset[index], "path": row.img} for index, row in enumerate(dataset.rows)]


def matrix_products(dtype: Any, device: Any) -> dict[str, Callable[[], Any]]:
    """The kernels at hand for a large matrix product. Which one is the fastest depends on the processor."""
    import torch

    from model.cpu import can_pack, in_onednn_order, onednn_linear

    size = matrix_size(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = {"a · b": lambda: a @ b, "a · bᵀ": lambda: a @ b.T, "aᵀ · b": lambda: a.T @ b}
    if can_pack(b):
        packed = in_onednn_order(b)
        products["b packed by oneDNN"] = lambda: onednn_linear(a, packed, None)
    return products


def matrix_size(device: Any) -> int:
    """Rows and columns of the matrices that are multiplied to measure the machine."""
    return 8192 if device.type == "cuda" else 2048


def product_rate(product: Callable[[], Any], device: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations per second of a product of two square matrices, the best of four times."""
    best = 0.0
    for _ in range(4):
        synchronize(device)
        start = clock()
        product()
        synchronize(device)
        best = max(best, 2 * matrix_size(device) ** 3 / (clock() - start))
    return best


def synchronize(device: Any) -> None:
    """Wait for a GPU; a CPU is always done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def step_operations(config: dict[str, Any], batch: dict[str, Any]) -> float:
    """Floating-point operations that a step can't do without: 4 per language-model weight and token.

    Forward 2, gradients with respect to activations 2; frozen weights need no gradient of their own. The head counts at
    supervised positions.
    """
    hidden = config["hidden_size"]
    inner = config.get("inner_hidden_size") or 4 * hidden
    layers = config["num_layers"] * (4 * hidden**2 + 2 * hidden * inner)
    head = config["vocab_size"] * hidden
    return 4.0 * (layers * batch["input_ids"].numel() + head * len(batch["answers"]))


def peak_gpu_memory(device: Any) -> float:
    """GiB allocated at most since the last reset; 0 without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


@functools.cache
def trained_parameters(model: Any) -> list[Any]:
    """The parameters of model that are learned: searching them takes some per cent of the fastest steps."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Side(NamedTuple):
    """A way, the model that it is measured on, and the numbers that it computes in."""

    way: Way
    model: Any
    dtype: Any


class Bench:
    """A model, its rows, and the two ways of working on them.

    Args:
        model: one of these options' shape, method and dtype, which another bench has measured; None: it is made.
    """

    def __init__(self, options: argparse.Namespace, model: Any = None) -> None:
        import torch

        from model.inference.load import DTYPES
        from model.sat_compat import quieten
        from model.training.memory import Batch, Setup, fit_into_memory

        quieten()
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = DTYPES[options.dtype]
        if options.shape in SHAPES:
            self.config = SHAPES[options.shape]
        else:
            self.config = read_json_object(options.shape, "--shape")
        self.model = model or random_model(self.config, options, self.dtype, self.device)
        self.model.transformer.checkpoint_activations = False  # until they are found not to fit
        # The released script can't train in bfloat16: it is measured in float32, with the same weights.
        self.released_dtype = (
            torch.float32 if self.dtype == torch.bfloat16 and self.device.type == "cpu" else self.dtype
        )
        self.released_model = self.model
        if self.released_dtype != self.dtype:
            self.released_model = copy.deepcopy(self.model).to(self.released_dtype)
        rows, target = options.batch_size, options.max_target_length
        setup = Setup(self.config, self.model.adapters, options.dtype, on_gpu=self.device.type == "cuda")
        batch = Batch(rows, options.max_source_length + target, rows * target, images=0)
        fit_into_memory(self.model, setup, batch, lambda: batch)
        count = options.batch_size * options.steps
        samples = read_samples(options, self.config) if options.data else drawn_samples(options, self.config, count)
        samples = (samples * (count // len(samples) + 1))[:count]
        self.batches = [samples[i : i + options.batch_size] for i in range(0, count, options.batch_size)]
        self.features = self._features(samples)

    @functools.cached_property
    def fastest_product(self) -> tuple[str, Callable[[], Any]]:
        """The name of the fastest kernel for matrix products in our way's numbers, and a large product of it."""
        products = matrix_products(self.dtype, self.device)
        return max(products.items(), key=lambda named: product_rate(named[1], self.device))

    def rate(self) -> float:
        """The machine's matrix rate at this moment, in operations per second: other programs slow it as they slow a step."""
        return 2 * matrix_size(self.device) ** 3 / self.median_seconds(self.fastest_product[1])

    def _features(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        vision = self.model.get_mixin("eva").model
        known = {}
        with torch.no_grad(), vision_on_the_device(self.model):
            for sample in samples:
                if sample["path"] not in known:
                    image = sample["image"].unsqueeze(0).to(self.device, self.dtype)
                    known[sample["path"]] = vision.features(image)[0].cpu()
        return known

    def step(self, way: Way, model: Any, dtype: Any, samples: Sequence[dict[str, Any]]) -> float:
        """One forward and backward pass this way; the loss. Gradients, times LOSS_SCALE, stay in the model."""
        for parameter in trained_parameters(model):
            parameter.grad = None
        loss = way.loss(model, way.batch(samples, self.features, self.device, dtype))
        (loss * LOSS_SCALE).backward()
        return loss.item()

    def gradient(self, model: Any) -> Any:
        """All trainable gradients as one vector, float32."""
        import torch

        gradients = [parameter.grad.flatten().float() for parameter in trained_parameters(model)]
        return torch.cat(gradients) / LOSS_SCALE

    def learned(self, side: Side) -> list[tuple[float, Any]]:
        """The loss and the gradient of each of --steps steps, which warm up too."""
        with side.way.of(side.model):
            return [(self.step(*side, samples), self.gradient(side.model)) for samples in self.batches]

    def seconds(self, side: Side) -> float:
        """Median seconds of a step."""
        rows_again = itertools.cycle(self.batches)
        with side.way.of(side.model):
            return self.median_seconds(lambda: self.step(*side, next(rows_again)))

    def median_seconds(self, once: Callable[[], Any]) -> float:
        """Median seconds of what is done again and again for a turn's share of MEASURED_SECONDS, and once at least."""
        times: list[float] = []
        while not times or sum(times) < MEASURED_SECONDS / self.options.steps:
            synchronize(self.device)
            start = time.perf_counter()
            once()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def figures(self, side: Side, rate: float) -> dict[str, float]:
        """Time and rates of a step; its matrix-rate share is of the rate that the machine had at that time."""
        seconds = self.seconds(side)
        batch = side.way.batch(self.batches[0], self.features, self.device, side.dtype)
        return {
            "seconds per step": seconds,
            "samples/s": self.options.batch_size / seconds,
            "tokens/s": batch["input_ids"].numel() / seconds,
            "matrix-rate share": step_operations(self.config, batch) / seconds / rate,
        }

    def memory(self, side: Side) -> tuple[dict[str, float], list[tuple[float, Any]]]:
        """The memory that steps take, and what they learn."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with peak_host_memory() as host:
            learned = self.learned(side)
        return {"host GiB": host[0], "GPU GiB": peak_gpu_memory(self.device)}, learned


@contextlib.contextmanager
def peak_host_memory() -> Iterator[list[float]]:
    """The largest resident size, in GiB, of this process inside the block, as a list of that one number afterwards."""
    peak = [0.0]
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield peak
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak[0] = int(line.split()[1]) / 2**20


def compare(bench: Bench) -> dict[str, Any]:
    """Both ways on the same rows: what they take, and how far loss and gradients are apart, in the worst of the steps.

    They are measured in turns, --steps pairs, so that whatever else the machine does slows both down.
    """
    released = Side(Way([], bench.options), bench.released_model, bench.released_dtype)
    ours = Side(Way(list(SAVINGS), bench.options), bench.model, bench.dtype)
    released_memory, expected = bench.memory(released)
    memory, found = bench.memory(ours)
    pairs, rates = [], []
    for _ in range(bench.options.steps):
        rates.append(bench.rate())
        pairs.append((bench.figures(released, rates[-1]), bench.figures(ours, rates[-1])))
    names = pairs[0][0]
    steps = list(zip(found, expected, strict=True))
    ratios = [one["seconds per step"] / other["seconds per step"] for one, other in pairs]
    return {
        "released": {name: statistics.median(one[name] for one, _ in pairs) for name in names} | released_memory,
        "ours": {name: statistics.median(other[name] for _, other in pairs) for name in names} | memory,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "loss difference": max(abs(loss - other) / abs(other) for (loss, _), (other, _) in steps),
        "gradient difference": max(
            ((gradient - other).norm() / other.norm()).item() for (_, gradient), (_, other) in steps
        ),
        "matrix rate": statistics.median(rates),
        "matrix rates": rates,
        "fastest product": bench.fastest_product[0],
    }


def ablate(bench: Bench) -> dict[str, list[float]]:
    """Seconds per step without each saving alone, measured in turns: a list of --steps each."""
    sides = {
        name: Side(Way([saving for saving in SAVINGS if saving != name], bench.options), bench.model, bench.dtype)
        for name in ("all savings", *SAVINGS)
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        bench.learned(side)
    for _ in range(bench.options.steps):
        for name, side in sides.items():
            seconds[name].append(bench.seconds(side))
    return seconds


# --- where the time is ----------------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """What one kind of operation takes in a step: processor seconds, calls, and floating-point operations in products."""

    seconds: float
    calls: float
    operations: float


def profile(bench: Bench) -> tuple[dict[str, Operation], float]:
    """Where a step of ours spends the processor's time, and the matrix rate; on one thread, without other programs' time.

    Taking the time takes some itself, at each of some thousand calls.

    Raises:
        InputError: there is a GPU.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    if bench.device.type != "cpu":
        raise InputError("--profile: this is about a CPU; CUDA_VISIBLE_DEVICES= is needed to measure it here.")
    found: dict[str, Operation] = {}

    class Clock(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            start = time.thread_time()
            output = function(*args, **(kwargs or {}))
            seconds = time.thread_time() - start
            name, operations = described(str(function), args, output)
            before = found.get(name, Operation(0.0, 0.0, 0.0))
            added = (seconds / steps, 1 / steps, operations / steps)
            found[name] = Operation(*(one + other for one, other in zip(before, added, strict=True)))
            return output

    steps, threads = bench.options.steps, torch.get_num_threads()
    ours = Side(Way(list(SAVINGS), bench.options), bench.model, bench.dtype)
    torch.set_num_threads(1)
    try:
        bench.learned(ours)
        with Clock():
            bench.learned(ours)
        products = matrix_products(bench.dtype, bench.device).values()
        rate = max(product_rate(product, bench.device, time.thread_time) for product in products)
    finally:
        torch.set_num_threads(threads)
    return found, rate


def described(name: str, args: Sequence[Any], output: Any) -> tuple[str, float]:
    """An operation's name, that of a product with its sizes, and how many floating-point operations it is."""
    from model.cpu import IDENTITY_WIDTH

    name = name.removeprefix("aten.").removesuffix(".default")
    if not name.endswith(("mm", "linear_pointwise")):
        return name, 0.0
    inner, outer = args[0].shape[-1], output.shape[-1]
    rows = output.numel() // outer
    if name.endswith("linear_pointwise") and inner == outer == IDENTITY_WIDTH:
        return "gelu", 0.0  # `model.cpu.gelu` has it as a product with the identity
    return f"{name} {rows} × {inner} → {outer}", 2.0 * rows * inner * outer


def profile_table(found: dict[str, Operation], rate: float) -> dict[str, Operation]:
    """Print what takes most, and the last line: how much of the time products take, and at which share of the rate."""
    total = sum(one.seconds for one in found.values())
    say(f"{'ms':>8}{'share':>8}{'calls':>8}{'GFLOP/s':>9}  operation")
    for name, one in sorted(found.items(), key=lambda item: -item[1].seconds)[:PROFILED]:
        speed = f"{one.operations / one.seconds / 1e9:9.0f}" if one.operations else " " * 9
        say(f"{1000 * one.seconds:8.2f}{one.seconds / total:8.1%}{one.calls:8.1f}{speed}  {name}")
    products = [one for one in found.values() if one.operations]
    seconds, operations = sum(one.seconds for one in products), sum(one.operations for one in products)
    say(
        f"products {seconds / total:.0%} of {total:.3f} s, at {operations / seconds / rate:.2f} of the measured matrix rate "
        f"of a core ({rate / 1e9:.0f} GFLOP/s)"
    )
    return found


# --- the command ----------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="mini", help="mini (206 M parameters), 6b, or a model_config.json (default mini)")
    add("--method", choices=("lora", "qlora", "ptuning"), default="lora", help="what is trained (default lora)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="numbers of our way (default fp32)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows in a step (default 4)")
    add(
        "--steps",
        type=int,
        default=5,
        metavar="N",
        help="how often both ways are measured, in turns, 3 s in all at least, after as many steps to warm up (default 5)",
    )
    add("--data", metavar="ROWS.json", help="take these rows in place of drawn ones")
    add("--seq", type=int, metavar="N", help="draw rows of exactly N tokens in place of short few-shot ones")
    add("--layer_range", type=int, nargs="+", metavar="L", help="layers with LoRA (default: the recipe's)")
    add("--max_source_length", type=int, default=64, metavar="N", help="what the released way pads to (default 64)")
    add("--max_target_length", type=int, default=256, metavar="N", help="and the answer's part of it (default 256)")
    add("--ablate", action="store_true", help="measure our way without each saving alone, instead of comparing")
    add("--profile", action="store_true", help="show where our way spends its time on one core of a CPU, instead")
    add("--json", metavar="FILE", help="write the figures there too")
    return parser


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        InputError: no step is asked for.
    """
    options = command_line().parse_args(argv)
    if options.steps < 1:
        raise InputError(f"--steps {options.steps}: 1 or more is needed.")
    options.image_length = 32
    options.layer_range = options.layer_range or ADAPTED_LAYERS.get(options.shape)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("benchmark.py"):
        options = parsed(argv)
        measured(Bench(options))


def measured(bench: Bench) -> None:
    """Measure what the options ask for: printed as a table, and written to --json."""
    options = bench.options
    say(f"{machine(bench.device)}, {options.shape}, {options.method}, {options.dtype}, batch {options.batch_size}")
    figures: dict[str, Any]
    if options.profile:
        figures = profile_table(*profile(bench))
    else:
        figures = ablation_table(ablate(bench)) if options.ablate else comparison_table(compare(bench))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def machine(device: Any) -> str:
    """What the figures were measured on."""
    import torch

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} cores of {platform.machine()}"
    return f"{name}, torch {torch.__version__}"


def ablation_table(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print how many times as long a step takes without each saving, and give the median seconds."""
    for name, times in seconds.items():
        ratios = [without / everything for without, everything in zip(times, seconds["all savings"], strict=True)]
        say(f"{'without ' if name in SAVINGS else '':8}{name:50}{statistics.median(times):9.3f} s {spread(ratios)} ×")
    return {name: statistics.median(times) for name, times in seconds.items()}


def spread(values: Sequence[float]) -> str:
    """The median of values, and how far they lie apart."""
    return f"{statistics.median(values):9.2f} ({min(values):.2f} to {max(values):.2f})"


def comparison_table(results: dict[str, Any]) -> dict[str, Any]:
    """Print both ways beside each other; the last line has the figures to quote."""
    released, ours, ratios = results["released"], results["ours"], results["ratios"]
    say(f"{'':20} {'released':>12} {'ours':>12} {'ratio':>8}")
    for name in ours:
        ratio = f"{released[name] / ours[name]:8.2f}" if ours[name] else ""
        say(f"{name:20} {released[name]:12.4f} {ours[name]:12.4f} {ratio}")
    rates = [rate / 1e9 for rate in results["matrix rates"]]
    say(
        f"measured matrix rate {results['matrix rate'] / 1e9:.0f} GFLOP/s ({min(rates):.0f} to {max(rates):.0f}; the fastest "
        f"kernel: {results['fastest product']})"
    )
    say(
        f"ratio {results['ratio']:.1f}, loss difference {results['loss difference']:.1e}, "
        f"gradient difference {results['gradient difference']:.1e}, matrix-rate share {ours['matrix-rate share']:.2f}, "
        f"ratios of {count_of(len(ratios), 'pair')} {min(ratios):.1f} to {max(ratios):.1f}"
    )
    return results


if __name__ == "__main__":
    main()
