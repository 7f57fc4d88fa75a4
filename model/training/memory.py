"""How much memory a run takes, told from its flags and sizes; and what a step keeps, by the memory that is there.

`Setup` says what decides it. `estimate` adds it up: --dry_run prints that, --auto_batch_size asks it, and `fit_into_memory`
lets a step compute its activations again where they don't fit. A formula, and no count: it is there before torch is, and
for models that no device here can hold. Tests hold it against a count of the real model's tensors.

Only the standard library is imported at the top. Units: bytes, unless a name says otherwise.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.adapter_config import AdapterConfig
from model.checkpoints.sizes import adapter_numbers
from model.distributed import free_host_memory, free_memory, processes_here, world_size
from model.errors import InputError
from model.progress import say

GIB = 2**30
USABLE = 0.9  # of a device's memory; the rest is fragmentation
CUDA_ITSELF = int(0.6 * GIB)  # its context and kernels; on an H100 0.51 at first, and 0.81 in the end (torch 2.11)
PROCESS_ON_CPU = int(0.32 * GIB)  # Python, torch, SAT and DeepSpeed; measured with torch 2.13 for CPUs alone
BUILT_FOR_CUDA = int(0.34 * GIB)  # what a torch that is built for GPUs takes more, whether one is there or not
# The heap of the C library (glibc 2.36): its holes lie between blocks that stay. Their shares were measured in steps of
# a model of 2 GB, batches 4 and 16. Blocks of MAPPED bytes and more are mapped one by one, outside the heap.
HOLES_OF_ACTIVATIONS, HOLES_OF_UNPACKED, MAPPED = 0.25, 0.75, 32 * 2**20
ITSELF_ON_CPU = "Python and its libraries"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
NF4_BYTES = 0.5 + 4 / 64  # of a number in 4 bits, with its share of a scale in float32: see `model.frozen`
ADAM = 8  # two averages in float32
MASTER = 4  # half precision's second copy, in float32
IMAGES_AT_ONCE = 16  # while all pictures are looked at: see `model.training.feature_cache`
CHUNK_SCORES = 2**26  # see `model.loss`
SHORT_ON_CPU = 256  # keys; see `model.attention`
COPIES_BACKWARD = 2  # of a layer's attention weights with dropout, on a CPU: two gradients at once


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of a process."""

    rows: int  # samples
    seq: int  # tokens of a sequence, padding included
    answers: int  # supervised tokens, of all rows
    images: int  # that go through the vision part in each step; 0 where their features are kept
    packs: int = 0  # sequences that the rows share with --packing; 0 where each has its own

    @property
    def sequences(self) -> int:
        return self.packs or self.rows

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq


@dataclass(frozen=True)
class Setup:
    """What decides how much memory a process of a run takes, the batch aside."""

    config: Any  # the checkpoint's, with the sizes of the released layout
    adapters: AdapterConfig
    dtype: str = "fp32"  # of BYTES
    zero_stage: int = 0
    model_parallel: int = 1  # processes that share the language model
    data_parallel: int = 1  # processes, or groups of these, that share the rows
    on_gpu: bool = True
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    recomputed: bool = False  # --checkpoint-activations
    packed: bool = False  # on a CPU, whether frozen weights are there in a second order, for the gradient

    @classmethod
    def of_run(cls, flags: Any, config: Any, zero_stage: int, on_gpu: bool) -> "Setup":
        """That of a process of a run. flags has the attributes of a command line's options, or of SAT's namespace."""
        if getattr(flags, "image_size", None):
            config = {**config, "eva_args": {**config["eva_args"], "image_size": [flags.image_size] * 2}}
        return cls(
            config=config,
            adapters=AdapterConfig.from_options(flags).resumed_from(config),
            dtype="fp16" if flags.fp16 else "bf16" if flags.bf16 else "fp32",
            zero_stage=zero_stage,
            model_parallel=flags.model_parallel_size,
            data_parallel=max(1, world_size() // flags.model_parallel_size),
            on_gpu=on_gpu,
            hidden_dropout=config.get("hidden_dropout", flags.hidden_dropout),
            attention_dropout=config.get("attention_dropout", flags.attention_dropout),
            recomputed=flags.checkpoint_activations,
        )

    @property
    def bytes(self) -> int:
        """Of a number of the weights."""
        return BYTES[self.dtype]

    @property
    def is_4bit(self) -> bool:
        return "qlora" in self.adapters.methods

    @property
    def trains_vision(self) -> bool:
        return any(part in self.adapters.part_rates for part in ("vit", "qformer"))


@dataclass(frozen=True)
class Estimate:
    """The memory of one process. `training` and `loading` hold parts by name; each is there at the peak."""

    training: dict[str, int]
    loading: int
    parameters: int  # of all processes together
    trained: int
    in_4_bits: int

    @property
    def peak(self) -> int:
        return max(self.loading, sum(self.training.values()))


# --- how many numbers -------------------------------------------------------------------------------------------------


def layer_linears(config: Any) -> int:
    """Numbers in the weights of a language model's layer, biases and norms aside."""
    hidden = config["hidden_size"]
    return 4 * hidden * hidden + 2 * hidden * inner_size(config)


def language_numbers(config: Any) -> int:
    """Parameters of the language model, without adapters."""
    hidden, layers = config["hidden_size"], config["num_layers"]
    biases_and_norms = 4 * hidden + inner_size(config) + hidden + 4 * hidden
    return 2 * config["vocab_size"] * hidden + layers * (layer_linears(config) + biases_and_norms) + 2 * hidden


def vision_numbers(config: Any) -> dict[str, int]:
    """Parameters of the vision part, by the names of --train_parts."""
    vit, qformer = config["eva_args"], config["qformer_args"]
    width, patch = vit["hidden_size"], vit["patch_size"]
    seq = image_positions(config)
    vit_numbers = (
        vit["vocab_size"] * width + seq * width + width * (vit["in_channels"] * patch * patch + 1)
        + vit["num_layers"] * _block(width, inner_size(vit)) + 2 * width
    )  # fmt: skip
    hidden, seen = qformer["hidden_size"], qformer["cross_attn_hidden_size"]
    cross = 2 * hidden * (hidden + 1) + 2 * hidden * (seen + 1) + 2 * hidden
    qformer_numbers = (
        qformer["vocab_size"] * hidden + qformer["num_layers"] * _block(hidden, inner_size(qformer)) + decoders(qformer) * cross
        + 2 * hidden
    )  # fmt: skip
    return {"vit": vit_numbers, "qformer": qformer_numbers, "glm_proj": config["hidden_size"] * (hidden + 1)}


def trained_numbers(setup: Setup) -> int:
    """Parameters that are trained."""
    methods = setup.adapters.methods
    trained = {"lora" if name == "qlora" else name for name in methods if name not in setup.adapters.resumed_methods}
    adapters = sum(count for name, count in adapter_numbers(setup.adapters, setup.config).items() if name in trained)
    vision = vision_numbers(setup.config)
    return adapters + sum(vision[part] for part in setup.adapters.part_rates)


def image_positions(config: Any) -> int:
    """Positions of an image in the vision transformer."""
    vit = config["eva_args"]
    return int(vit["pre_len"] + math.prod(edge // vit["patch_size"] for edge in vit["image_size"]) + vit["post_len"])


def decoders(qformer: Any) -> int:
    """How many of the Q-Former's layers attend to the image."""
    is_decoder = qformer["is_decoder"]
    return sum(is_decoder) if isinstance(is_decoder, list) else is_decoder * qformer["num_layers"]


def inner_size(config: Any) -> int:
    return int(config.get("inner_hidden_size") or 4 * config["hidden_size"])


def _block(width: int, inner: int) -> int:
    """Parameters of a transformer's layer."""
    return 4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1) + 4 * width


# --- how many bytes ---------------------------------------------------------------------------------------------------


def weight_bytes(setup: Setup) -> dict[str, int]:
    """Of the frozen and trained weights of a process, without adapters: language model, ViT and Q-Former, projection."""
    config, size = setup.config, setup.bytes
    linears = config["num_layers"] * layer_linears(config)
    others = language_numbers(config) - linears
    language = (linears * (NF4_BYTES if setup.is_4bit else size) + others * size) / setup.model_parallel
    vision = vision_numbers(config)
    return {
        "language": int(language),
        "vision": (vision["vit"] + vision["qformer"]) * size,
        "projection": vision["glm_proj"] * size,
    }


def second_order_bytes(setup: Setup) -> tuple[int, int]:
    """Of the frozen linears a second time, for the gradient: the layers' from the first trained one up, and the head's.

    See `model.cpu`.
    """
    if setup.zero_stage == 3:
        return 0, 0
    layers = 0 if setup.is_4bit else setup.config["num_layers"] - first_trained_layer(setup)
    head = setup.config["vocab_size"] * setup.config["hidden_size"]
    of_layers, of_head = (
        numbers * setup.bytes // setup.model_parallel for numbers in (layers * layer_linears(setup.config), head)
    )
    return of_layers, of_head


def holes_bytes(setup: Setup, batch: Batch) -> int:
    """Of holes in the heap of a process on a CPU while it trains; a GPU's allocator has none to speak of.

    Two things leave them. What a step frees lies between what it keeps for the gradient. And a weight that is unpacked from
    4 bits is freed after its product, where the layer's output lies behind it already: what later layers keep fills a part
    of that place, so that the next large weight doesn't fit into it.
    """
    if setup.on_gpu:
        return 0
    one, copies = _attention_weights(setup, batch)
    layers = 1 if setup.recomputed else setup.config["num_layers"] - first_trained_layer(setup)
    at_once = COPIES_BACKWARD if _drops_by_itself(setup, batch) else 0
    mapped = (layers * copies + at_once) * one if one >= MAPPED else 0
    holes = HOLES_OF_ACTIVATIONS * (activation_bytes(setup, batch) - mapped)
    if setup.is_4bit:
        hidden, inner = setup.config["hidden_size"], inner_size(setup.config)
        sizes = [3 * hidden * hidden, hidden * hidden, hidden * inner, inner * hidden]
        in_heap = [part for part in (size * setup.bytes // setup.model_parallel for size in sizes) if part < MAPPED]
        layers = setup.config["num_layers"] - first_trained_layer(setup)
        holes += HOLES_OF_UNPACKED * layers * sum(in_heap) / max(1, len(in_heap))
    return int(holes)


def optimizer_bytes(setup: Setup) -> tuple[int, int]:
    """Of a process's gradients, and of what the optimizer keeps, for the weights that are trained."""
    trained = trained_numbers(setup)
    adapters = sum(adapter_numbers(setup.adapters, setup.config).values())
    own = trained - min(trained, adapters) + min(trained, adapters) // setup.model_parallel
    shared = setup.data_parallel if setup.zero_stage else 1
    master = 0 if setup.dtype == "fp32" and not setup.zero_stage else MASTER
    # A step turns half precision's gradients into float32 to clip them and to update the second copy.
    gradients = own * setup.bytes // (setup.data_parallel if setup.zero_stage >= 2 else 1)
    return gradients, own * (master + ADAM + master) // shared


def first_trained_layer(setup: Setup) -> int:
    """The lowest layer of the language model that a gradient comes to. Those below keep nothing for it."""
    adapters, layers = setup.adapters, setup.config["num_layers"]
    if adapters.has_ptuning or adapters.part_rates or not adapters.has_lora:
        return 0
    return min(adapters.lora_layers(layers), default=layers)


def _kept_by_layer(setup: Setup, batch: Batch) -> tuple[float, float, float, float]:
    """Bytes that a layer without LoRA keeps for the backward pass: a token's in attention, and in the rest of the layer;
    what LoRA adds to both."""
    config, adapters, size = setup.config, setup.adapters, setup.bytes
    hidden, inner, heads = config["hidden_size"], inner_size(config), config["num_attention_heads"]
    part, mask = setup.model_parallel, 1 if setup.on_gpu else size
    norm = hidden * (4 if setup.dtype == "bf16" and not setup.on_gpu else size) + 8  # its input, mean and deviation
    dropped = hidden * mask if setup.hidden_dropout else 0
    attention = norm + 4 * hidden * size / part  # query, key, value, output
    if adapters.has_ptuning:  # key and value with the prefix behind them, beside those without
        attention += 2 * hidden * size / part * (batch.seq + adapters.prefix_length) / batch.seq - hidden * size / part
    if setup.on_gpu:
        attention += 4 * heads / part
    else:
        one, copies = _attention_weights(setup, batch)
        attention += copies * one / batch.tokens
    rest = dropped + norm + inner * size / part + dropped
    lora = {"attention": 0.0, "rest": 0.0}
    if adapters.has_lora:
        of_input = size + mask if adapters.dropout else size
        wide = {
            "query_key_value": hidden,
            "dense": hidden / part,
            "dense_h_to_4h": hidden,
            "dense_4h_to_h": inner / part,
        }
        for target in adapters.lora_targets:
            place = "attention" if target == "query_key_value" else "rest"
            is_there = target == "dense" and not adapters.dropout  # attention's output
            lora[place] += (0 if is_there else wide[target] * of_input) + 3 * adapters.rank * size
    return attention, rest, lora["attention"], lora["rest"]


def seen_keys(setup: Setup, batch: Batch) -> int:
    """Keys that a token sees at most: those of its sequence, and of the prefix."""
    return batch.seq + (setup.adapters.prefix_length if setup.adapters.has_ptuning else 0)


def _drops_by_itself(setup: Setup, batch: Batch) -> bool:
    """Whether torch's own attention on a CPU leaves weights out: it has two gradients of them at once."""
    return not setup.on_gpu and bool(setup.attention_dropout) and seen_keys(setup, batch) > SHORT_ON_CPU


def _attention_weights(setup: Setup, batch: Batch) -> tuple[float, int]:
    """Bytes of a layer's weights of all keys, and how often a CPU keeps them for the gradient: those that dropout leaves too.

    torch computes them in float32, unless there are few keys, which `model.attention` does by itself.
    """
    keys, dropped = seen_keys(setup, batch), bool(setup.attention_dropout)
    is_short = keys <= SHORT_ON_CPU
    one = batch.tokens * keys * setup.config["num_attention_heads"] / setup.model_parallel
    return one * (setup.bytes if is_short else 4), 3 if dropped else int(is_short)


def activation_bytes(setup: Setup, batch: Batch) -> int:
    """Of what a step takes beside weights, gradients and the optimizer, at its peak."""
    config, adapters, size = setup.config, setup.adapters, setup.bytes
    hidden, inner, layers = config["hidden_size"], inner_size(config), config["num_layers"]
    part, tokens, answers = setup.model_parallel, batch.tokens, min(batch.answers, batch.tokens)
    attention, rest, lora_attention, lora_rest = _kept_by_layer(setup, batch)
    with_lora = adapters.lora_layers(layers) if adapters.has_lora else []

    def kept(layer: int) -> float:
        is_last, lora = layer == layers - 1, layer in with_lora
        return tokens * (attention + lora * lora_attention) + (answers if is_last else tokens) * (
            rest + lora * lora_rest
        )

    of_layers = [kept(layer) for layer in range(first_trained_layer(setup), layers)]
    if setup.recomputed:
        of_layers = [max(of_layers, default=0), *(layers * [float(tokens * hidden * size)])]
    masks = batch.tokens * batch.seq * size * 2  # the mask, and what it adds to the scores
    positions = 3 * tokens * hidden // config["num_attention_heads"] * size
    rows = min(answers, max(1, CHUNK_SCORES // config["vocab_size"]))
    in_float32 = 4 if setup.on_gpu else 0  # the scores' logarithms
    loss = rows * config["vocab_size"] // part * (size + in_float32) + 2 * answers * hidden * size
    unpacked = hidden * inner * size if setup.is_4bit else 0
    backward = tokens * (2 * inner / part + 2 * hidden) * size + unpacked
    if _drops_by_itself(setup, batch):
        backward = max(backward, COPIES_BACKWARD * _attention_weights(setup, batch)[0])
    return int(sum(of_layers) + masks + positions + max(loss, backward)) + vision_activation_bytes(setup, batch)


def vision_activation_bytes(setup: Setup, batch: Batch) -> int:
    """Of what ViT and Q-Former keep for the backward pass, where they are trained."""
    parts, size = setup.adapters.part_rates, setup.bytes
    vit, qformer = setup.config["eva_args"], setup.config["qformer_args"]
    kept = 0
    if "vit" in parts:
        # Per layer both norms' inputs and outputs, query, key, value, attention's output, GELU's input and output.
        width = 8 * vit["hidden_size"] + 2 * inner_size(vit)
        kept += vit["num_layers"] * image_positions(setup.config) * width * size
    if "vit" in parts or "qformer" in parts:
        width = 12 * qformer["hidden_size"] + 2 * inner_size(qformer)
        kept += qformer["num_layers"] * qformer["vocab_size"] * width * size
        kept += decoders(qformer) * image_positions(setup.config) * 2 * qformer["hidden_size"] * size
    return kept * batch.images


def looking_bytes(setup: Setup, images: int) -> int:
    """Of what frozen ViT and Q-Former take while they look at so many images: one layer's tensors."""
    vit = setup.config["eva_args"]
    return images * image_positions(setup.config) * (4 * vit["hidden_size"] + 2 * inner_size(vit)) * setup.bytes


def process_bytes() -> int:
    """Of a process on a CPU, before it has a model."""
    torch = importlib.util.find_spec("torch")
    places = torch.submodule_search_locations if torch else None
    for_cuda = any(Path(place, "lib/libtorch_cuda.so").exists() for place in places or ())
    return PROCESS_ON_CPU + (BUILT_FOR_CUDA if for_cuda else 0)


def estimate(setup: Setup, batch: Batch) -> Estimate:
    """The memory of one process of this run, on its device."""
    weights, size, queries = weight_bytes(setup), setup.bytes, setup.config["qformer_args"]
    adapters = sum(adapter_numbers(setup.adapters, setup.config).values()) * size // setup.model_parallel
    gradients, optimizer = optimizer_bytes(setup)
    of_layers, of_head = second_order_bytes(setup) if setup.packed else (0, 0)
    vision = weights["vision"] if batch.images else 0
    shared = setup.data_parallel if setup.zero_stage == 3 else 1
    itself = CUDA_ITSELF if setup.on_gpu else process_bytes()
    training = {
        "weights": (weights["language"] + weights["projection"] + vision) // shared,
        "weights for gradients": of_layers + of_head,
        # The head is packed first, when the layers' aren't there yet; it is there as rows too for that moment.
        "packing the head": max(0, of_head - of_layers),
        "adapters": adapters // shared,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activation_bytes(setup, batch) + (looking_bytes(setup, batch.images) if batch.images else 0),
        "holes in the heap": holes_bytes(setup, batch),
        "features": 0 if batch.images else batch.rows * queries["vocab_size"] * queries["hidden_size"] * size,
        "CUDA itself" if setup.on_gpu else ITSELF_ON_CPU: itself,
    }
    alone = weights["vision"] + weights["projection"] + looking_bytes(setup, IMAGES_AT_ONCE)
    # A weight that is packed into 4 bits is on the device for a moment as it was, and a part of it in float32.
    unpacked = layer_linears(setup.config) // 3 * size if setup.is_4bit else 0
    whole = weights["language"] + weights["projection"] + vision + adapters + unpacked
    numbers = language_numbers(setup.config) + sum(vision_numbers(setup.config).values())
    return Estimate(
        training, itself + max(alone, whole), numbers + sum(adapter_numbers(setup.adapters, setup.config).values()), trained_numbers(setup),
        setup.config["num_layers"] * layer_linears(setup.config) if setup.is_4bit else 0,
    )  # fmt: skip


# --- what a step keeps ------------------------------------------------------------------------------------------------


def fit_into_memory(model: Any, setup: Setup, at_most: Batch, of_data: Callable[[], Batch]) -> None:
    """Choose what is kept for a micro-batch, by the memory that is free beside the weights of model.

    If the activations don't fit, they are checkpointed, and that is said. If they do on a CPU, the language model's
    frozen linears are prepacked (`model.cpu`), provided that there is room for their weights a second time: the gradient
    needs them in an order of its own.

    Args:
        at_most: a micro-batch that is as long as --max_source_length and --max_target_length allow.
        of_data: gives the largest that the data makes. It is asked only where at_most doesn't fit.

    Raises:
        InputError: a CPU has no room for it either way.
    """
    from model.cpu import can_pack, give_back_memory, pack_linears
    from model.frozen import plain_linears

    transformer, weight = model.transformer, model.transformer.word_embeddings.weight
    give_back_memory()  # what loading took
    free = USABLE * free_memory(weight.device)
    networks, second_order = [], 0
    if can_pack(weight) and setup.zero_stage != 3:  # ZeRO 3 keeps a part of each weight, in torch's order
        networks = [transformer.layers, model.get_mixin("chatglm-final")]
        weights = [linear.weight for network in networks for _, _, linear in plain_linears(network)]
        second_order = sum(weight.nbytes for weight in weights if not weight.requires_grad)

    def needed_for(batch: Batch) -> int:
        recomputed = replace(setup, recomputed=transformer.checkpoint_activations)
        return activation_bytes(recomputed, batch) + holes_bytes(recomputed, batch) + sum(optimizer_bytes(setup))

    batch = at_most
    if needed_for(batch) + second_order > free:
        batch = of_data()
    needed = needed_for(batch)
    if needed > free and not transformer.checkpoint_activations:
        transformer.checkpoint_activations = True
        say(
            f"Activations of {batch.tokens} tokens take about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB can be used: they "
            "are computed again in the backward pass, which takes a third longer. A smaller --batch-size avoids that."
        )
        if weight.device.type == "cpu":  # Linux would kill the process without a word; CUDA says that memory ran out
            refuse_too_large(needed_for(batch), batch)
    elif needed + second_order <= free:
        for network in networks:
            pack_linears(network)


def refuse_too_large(needed: int, batch: Batch) -> None:
    """Raise an error if a step needs more bytes of host memory than there are, swap included.

    Raises:
        InputError: as said.
    """
    import psutil

    there = free_host_memory() + psutil.swap_memory().free // processes_here()[1]
    if needed > there:
        raise InputError(
            f"--batch-size {batch.rows}: a step of {batch.tokens} tokens takes about {needed / GIB:.1f} GiB, {there / GIB:.1f} GiB "
            "are free; a smaller one is needed, with --gradient-accumulation-steps for as many samples a step, or auto."
        )


def has_room_to_pack(setup: Setup, batch: Batch, free: int) -> bool:
    """Whether `fit_into_memory` will pack weights on a CPU, of whose memory so many bytes are free before all is loaded."""
    told = estimate(replace(setup, packed=False), batch).training
    before = told["weights"] + told[ITSELF_ON_CPU]
    numbers = 0 if setup.is_4bit else setup.config["num_layers"] * layer_linears(setup.config)
    head = setup.config["vocab_size"] * setup.config["hidden_size"]
    second_order = (numbers + head) * setup.bytes // setup.model_parallel
    return sum(told.values()) - before + second_order <= USABLE * (free - before)
