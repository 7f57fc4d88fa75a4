"""How much faster answers are than the released script's, both measured in one process, in turns.

python scripts/dev/benchmark_answers.py --shape mini
python scripts/dev/benchmark_answers.py --shape mini --dtype bf16
python scripts/dev/benchmark_answers.py --shape mini --dtype bf16 --quant 4
python scripts/dev/write_random_model.py random-6b --shape 6b
python scripts/dev/benchmark_answers.py --from_pretrained random-6b --dtype bf16 --quant 4 --ours_only

The released way: SAT's `filling_sequence` with its cache, in float32, with SAT's own attention and plain weights. Each
figure is the median of pairs, of which one is measured right after the other, so that what else the machine does hits both.
The memory's rate is measured in each pair too: a token can't come faster than all weights are read. So is how long the
products of a token take one after another, without anything between them: what is left is ours to save. In a batch the
released way reads one context and answers it in every row, while ours reads each row's context: its prefill does more.
"""

import abc
import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from model.progress import say
from scripts.dev.benchmark import machine, peak_host_memory, spread, synchronize
from scripts.dev.released_way import separate_attention
from scripts.dev.shapes import SHAPES, random_model
from scripts.dev.write_random_model import write_random_shape

QUESTION_TOKENS = 12  # beside the picture's slots
BATCHES = (1, 16)
READ_BYTES = 2**29  # that the memory's rate is measured with: more than any cache holds
Times = dict[str, float]


def made_model(options: argparse.Namespace, dtype: Any) -> Any:
    """A model in dtype that answers, with its weights as `load_for_answering` keeps them."""
    from model.inference.load import arrange_weights, load_for_answering

    if options.from_pretrained:
        return load_for_answering(options.from_pretrained, quant=options.quant, dtype=options.dtype)[0]
    if options.quant:
        with tempfile.TemporaryDirectory() as folder:
            write_random_shape(Path(folder, "random"), options.shape)
            return load_for_answering(Path(folder, "random"), quant=options.quant, dtype=options.dtype)[0]
    model = plain_model(options, dtype)
    arrange_weights(model)
    return model


def plain_model(options: argparse.Namespace, dtype: Any) -> Any:
    """The model of --shape with random weights, always the same, and without adapters."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    without_adapters = argparse.Namespace(method="none", layer_range=None)
    return random_model(SHAPES[options.shape], without_adapters, dtype, device).eval().requires_grad_(False)


class Way(abc.ABC):
    """One way to answer a question, in batches of any size."""

    def __init__(self, model: Any, new_tokens: int) -> None:
        import torch

        self.model, self.new_tokens = model, new_tokens
        self.device = model.transformer.word_embeddings.weight.device
        edge = model.get_mixin("eva").model.vit.transformer.property.image_size[0]
        self.image = torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(1)).to(self.device)
        words = torch.arange(200, 200 + QUESTION_TOKENS).tolist()
        slots = [model.pad_token_id] * model.image_length
        self.ids = [*words[:3], *slots, *words[3:], model.gmask_token_id, model.bos_token_id]

    @abc.abstractmethod
    def run(self, rows: int) -> tuple[list[float], list[int]]:
        """Seconds of each token, the first of which reads the context, and the first row's token ids."""


class Ours(Way):
    """The engine."""

    def run(self, rows: int) -> tuple[list[float], list[int]]:
        from model.inference.engine import Engine, Question

        no_end = SimpleNamespace(eos_token_id=-1, pad_token_id=self.model.pad_token_id)
        length = len(self.ids) + self.new_tokens
        engine = Engine(self.model, no_end, rows, length)  # type: ignore[arg-type]
        answers = [engine.submit(Question(self.ids, 3, self.image)) for _ in range(rows)]
        times = []
        while engine.busy:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        return times, answers[0].ids


class Released(Way):
    """SAT's `filling_sequence`."""

    def run(self, rows: int) -> tuple[list[float], list[int]]:
        import torch
        from sat.generation.autoregressive_sampling import filling_sequence
        from sat.generation.sampling_strategies import BaseStrategy
        from sat.model.cached_autoregressive_model import CachedAutoregressiveMixin

        ends = []

        class Timed(BaseStrategy):
            def forward(strategy, *args: Any, **kwargs: Any) -> Any:
                result = super().forward(*args, **kwargs)
                synchronize(self.device)
                ends.append(time.perf_counter())
                return result

        with torch.no_grad(), separate_attention(self.model):
            self.model.add_mixin("auto-regressive", CachedAutoregressiveMixin())
            start = time.perf_counter()
            tokens, _ = filling_sequence(
                self.model,
                torch.tensor(self.ids + [-1] * self.new_tokens, device=self.device),
                batch_size=rows,
                strategy=Timed(top_k=1),
                get_masks_and_position_ids=self._masks_and_positions,
                image=self.image,
                pre_image=3,
            )
            self.model.del_mixin("auto-regressive")
        times = [end - before for before, end in zip([start, *ends], ends, strict=False)]
        return times, tokens[0, len(self.ids) :].tolist()

    def _masks_and_positions(self, tokens: Any) -> tuple[Any, Any, Any]:
        import torch

        from model.masks import mask_and_positions

        context_length = torch.tensor([len(self.ids) - 1], device=self.device)
        mask, positions = mask_and_positions(context_length, torch.zeros_like(context_length), len(tokens))
        return tokens.unsqueeze(0), mask.float(), positions


# --- what is measured -----------------------------------------------------------------------------------------------


def read_rate(device: Any) -> float:
    """Bytes per second that the memory gives: the best of adding numbers up, and of products with a vector."""
    import torch

    from model.cpu import can_pack, in_onednn_order, onednn_linear

    weight = torch.ones(READ_BYTES // 4 // 4096, 4096, device=device)
    x = torch.ones(1, 4096, device=device)
    ways: list[Callable[[], Any]] = [lambda: weight.sum().item()]
    if can_pack(weight):
        packed = in_onednn_order(weight)
        ways.append(lambda: onednn_linear(x, packed, None)[0, 0].item())
    best = 0.0
    for way in ways * 3:
        start = time.perf_counter()
        way()
        best = max(best, READ_BYTES / (time.perf_counter() - start))
    return best


def parts_of_a_token(model: Any) -> list[Any]:
    """What each token goes through: the language model's layers and its head."""
    return [model.transformer.layers, model.get_mixin("chatglm-final")]


def products_alone(model: Any) -> float:
    """Milliseconds of a token's products, one after another: the median of a few times."""
    import torch

    from model.frozen import PLAIN_LINEARS, FrozenLinear
    from model.inference.quantize import sizes_of

    modules = [module for part in parts_of_a_token(model) for module in part.modules()]
    linears = [module for module in modules if isinstance(module, (FrozenLinear, *PLAIN_LINEARS))]
    weights = model.transformer.word_embeddings.weight
    inputs = [torch.ones(1, sizes_of(linear)[0]).to(weights) for linear in linears]
    times = []
    with torch.no_grad():
        for _ in range(5):
            start = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)
            synchronize(weights.device)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def weight_bytes(model: Any) -> int:
    """What is read for each token, in the form in which it is kept."""
    from model.cpu import PrepackedLinear
    from model.inference.quantize import Int4Linear

    parts = parts_of_a_token(model)
    tensors = sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))
    modules = [module for part in parts for module in part.modules()]
    packed = [module for module in modules if isinstance(module, PrepackedLinear)]
    in_4_bits = [module for module in modules if isinstance(module, Int4Linear)]
    return (
        tensors
        + sum(linear.in_features * linear.out_features * linear.dtype.itemsize for linear in packed)
        + sum(linear.packed.nbytes + linear.scales.nbytes for linear in in_4_bits)
    )


def figures(way: Way, rows: int) -> Times:
    """Milliseconds of reading the contexts, and of a token of all rows: the median of them."""
    times, _ = way.run(rows)
    return {
        f"prefill, batch {rows}": 1000 * times[0],
        f"a token, batch {rows}": 1000 * statistics.median(times[1:]),
    }


def in_turns(ours: Way, released: Way | None, rows: int) -> tuple[Times, Times]:
    """`figures` of both ways, one right after the other."""
    return figures(ours, rows), figures(released, rows) if released else {}


@dataclass
class Pair:
    """What is measured one after another: both ways' figures, the memory's bytes a second, and a token's products."""

    ours: Times
    released: Times
    rate: float
    products: float  # milliseconds


def pairs(ours: Way, released: Way | None, count: int) -> list[Pair]:
    """As many as count, after one to warm up."""
    return [measured_pair(ours, released) for _ in range(count + 1)][1:]


def measured_pair(ours: Way, released: Way | None) -> Pair:
    """Both ways once. The memory's rate is taken before one row's answer and after it: it may change within seconds."""
    before = read_rate(ours.device)
    alone = in_turns(ours, released, BATCHES[0])
    products = products_alone(ours.model)
    rate = max(before, read_rate(ours.device))
    together = in_turns(ours, released, BATCHES[1])
    return Pair(alone[0] | together[0], alone[1] | together[1], rate, products)


def report(measured: Sequence[Pair], read: int) -> str:
    """Print the table; the last line's ratios and shares are medians of pairs."""
    ratios: dict[str, list[float]] = {}
    say(f"{'milliseconds':24}{'released':>30}{'ours':>30}{'ratio':>24}")
    for name in measured[0].ours:
        ours = [pair.ours[name] for pair in measured]
        others = [pair.released[name] for pair in measured if pair.released]
        ratios[name] = [other / one for one, other in zip(ours, others, strict=False)]
        columns = [spread(values) if values else "" for values in (others, ours, ratios[name])]
        say(f"{name:24}{columns[0]:>30}{columns[1]:>30}{columns[2]:>24}")
    token = "a token, batch {}"
    shares = [read / pair.rate / (pair.ours[token.format(1)] / 1000) for pair in measured]
    gains = [BATCHES[-1] * pair.ours[token.format(1)] / pair.ours[token.format(BATCHES[-1])] for pair in measured]
    say(
        f"memory gives {spread([pair.rate / 1e9 for pair in measured]).strip()} GB/s; a token reads {read / 1e9:.2f} GB"
    )
    of_products = statistics.median(read / pair.rate / (pair.products / 1000) for pair in measured)
    say(
        f"the products of a token alone take {spread([pair.products for pair in measured]).strip()} ms, "
        f"a share of {of_products:.2f}"
    )
    ratio = f"ratio {statistics.median(ratios[token.format(1)]):.2f}, " if ratios[token.format(1)] else ""
    return (
        f"{ratio}bandwidth share {statistics.median(shares):.2f}, "
        f"batch {BATCHES[-1]} {statistics.median(gains):.1f} times the tokens/s of batch 1"
    )


# --- the command ----------------------------------------------------------------------------------------------------


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="mini", help="of a model with random weights (default mini)")
    add("--from_pretrained", metavar="CHECKPOINT", help="take this checkpoint in place of random weights")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="numbers of our way (default fp32)")
    add("--quant", type=int, choices=(8, 4), help="keep our way's weights in so many bits, as cli_demo.py does")
    add("--new_tokens", type=int, default=24, metavar="N", help="tokens of an answer (default 24)")
    add("--pairs", type=int, default=5, metavar="N", help="how often both ways are measured (default 5)")
    add("--ours_only", action="store_true", help="leave the released way out: it keeps a second model, in float32")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("benchmark_answers.py"):
        benchmark(command_line().parse_args(argv))


def benchmark(options: argparse.Namespace) -> None:
    """Measure, and print the table; the last line has the ratio, the share and what a batch gains."""
    if options.pairs < 1 or options.new_tokens < 2:
        raise InputError("--pairs of 1 or more and --new_tokens of 2 or more are needed.")
    if options.from_pretrained and not options.ours_only:
        raise InputError("--from_pretrained: only our way is measured with a checkpoint; --ours_only is needed.")
    import torch

    from model.inference.load import DTYPES
    from model.sat_compat import quieten

    quieten()
    dtype = DTYPES[options.dtype]
    with peak_host_memory() as host:
        start = time.perf_counter()
        ours = Ours(made_model(options, dtype), options.new_tokens)
        loading = time.perf_counter() - start
    with peak_host_memory() as host_answering:
        ours.run(1)
    say(
        f"{machine(ours.device)}, {torch.get_num_threads()} threads, {options.from_pretrained or options.shape}, {dtype}"
        + (f", {options.quant} bits" if options.quant else "")
    )
    say(f"loading {loading:.1f} s, host {host[0]:.2f} GiB at most; answering {host_answering[0]:.2f} GiB")
    released = None
    if not options.ours_only:
        released = Released(plain_model(options, torch.float32), options.new_tokens)
        if not options.quant:
            same = ours.run(1)[1] == released.run(1)[1]
            say(f"both ways answer {'the same' if same else 'differently'}")
    say(report(pairs(ours, released, options.pairs), weight_bytes(ours.model)))


if __name__ == "__main__":
    main()
