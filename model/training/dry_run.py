"""What a run would take, told before it begins: --dry_run, and the batch that --batch-size auto takes.

Neither loads weights; torch is imported only to ask what GPUs there are, and not at all with --gpu_memory. The numbers are
those of `model.training.memory`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from model.checkpoints.layout import read_json_object
from model.checkpoints.sizes import size_text
from model.cli.options import Options, parse
from model.cli.preflight import Inputs, batch_and_accumulation, checkpoint_size, samples_per_step, training_steps
from model.cli.resuming import CommandLine
from model.data.lengths import longest_samples, packed_shape, padded
from model.distributed import free_host_memory, has_gpu
from model.errors import InputError
from model.progress import count_of, in_column
from model.training.deepspeed_config import zero_stage
from model.training.memory import BYTES, GIB, USABLE, Batch, Estimate, Setup, estimate, has_room_to_pack
from model.training.step_time import (
    measured_rate,
    measured_unpacking,
    picture_operations,
    starting_seconds,
    step_operations,
    unpacked_numbers,
)


@dataclass(frozen=True)
class Device:
    """Where a process trains."""

    name: str
    memory: int  # bytes
    on_gpu: bool
    is_elsewhere: bool = False  # whether its speed can't be measured

    @property
    def usable(self) -> int:
        """Bytes that a run may count on."""
        return int(USABLE * self.memory)


@dataclass(frozen=True)
class Plan:
    """What a process of a run works on, and how."""

    setup: Setup
    batch: Batch
    accumulated: int  # micro-batches of a step
    longest: Sequence[int] = ()  # with --packing: tokens of as many of the longest samples as a step has

    @property
    def told(self) -> Estimate:
        return estimate(self.setup, self.batch)

    def with_rows(self, rows: int) -> "Plan":
        """The same step, in micro-batches of so many rows, of which its samples are a multiple."""
        old = self.batch
        images = rows if old.images else 0
        batch = replace(old, rows=rows, answers=old.answers // old.rows * rows, images=images)
        if self.longest:
            packs, seq = packed_shape(self.longest[:rows])
            batch = replace(batch, packs=packs, seq=seq)
        return replace(self, batch=batch, accumulated=old.rows * self.accumulated // rows)

    def changed(self, **setup: object) -> "Plan":
        return replace(self, setup=replace(self.setup, **setup))  # type: ignore[arg-type]


def device_of(options: Options) -> Device:
    """The smallest GPU that torch can use, a GPU of --gpu_memory, or the CPU."""
    if options.gpu_memory:
        return Device("--gpu_memory", options.gpu_memory, on_gpu=True, is_elsewhere=True)
    if not has_gpu():
        return Device("the CPU, as no GPU was found", free_host_memory(), False)
    import torch

    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    smallest = min(found, key=lambda gpu: gpu.total_memory)
    return Device(f"{count_of(len(found), 'GPU')} found, {smallest.name}", smallest.total_memory, True)


def plan_of(options: Options, inputs: Inputs, on_gpu: bool) -> Plan:
    """What a run with these options would do, with the longest rows of its data in one batch."""
    stage, (rows, accumulated) = options.zero_stage, batch_and_accumulation(options)
    config = inputs.checkpoint.config
    setup = Setup.of_run(options, config, stage, on_gpu)
    if options.deepspeed_config:
        settings = read_json_object(options.deepspeed_config, "--deepspeed_config")
        stage = zero_stage(settings)
        half = [name for name in ("fp16", "bf16") if dict(settings.get(name) or {}).get("enabled")]  # type: ignore[call-overload]
        setup = replace(setup, zero_stage=stage, dtype=(half or ["fp32"])[0])
    if not on_gpu and setup.dtype == "fp16":
        setup = replace(setup, dtype="fp32")  # as a run without a GPU does
    images = 0 if keeps_features(options, inputs, setup) else rows
    longest, target = longest_of_data(options, inputs, rows * accumulated)
    batch = batch_of(options, rows, images, longest, target)
    plan = Plan(setup, batch, accumulated, longest if options.packing else ())
    return plan if on_gpu else plan.changed(packed=has_room_to_pack(setup, plan.batch, free_host_memory()))


def longest_of_data(options: Options, inputs: Inputs, count: int) -> tuple[list[int], int]:
    """`longest_samples` of the training data. Much of it takes seconds to count."""
    files = {file: inputs.selection.rows[file] for file in options.train_data or []}
    return longest_samples(files, inputs.tokenizer, inputs.lengths, count if options.packing else 1)


def batch_of(options: Options, rows: int, images: int, longest: Sequence[int], target: int) -> Batch:
    """The batch of so many rows in which the longest ones meet, and all labels are as long as target."""
    packs, seq = packed_shape(longest[:rows]) if options.packing else (0, padded(longest[0]))
    return Batch(rows, seq, rows * target, images, packs)


def keeps_features(options: Options, inputs: Inputs, setup: Setup) -> bool:
    """Whether the frozen vision part looks at each picture once, and leaves: see `model.training.feature_cache`."""
    if setup.trains_vision:
        return False
    selection = inputs.selection
    if options.feature_cache:
        return True
    if options.epochs and not options.find_lr:
        return options.epochs >= 2
    data_sets = (options.train_data, options.valid_data, options.test_data)
    rows = [sum(map(selection.sample_count, files or [])) for files in data_sets]
    rows.append(sum(selection.sample_count(file, training=False) for file in selection.held_out))
    return training_steps(options, selection) * samples_per_step(options) >= 2 * max(rows)


# --- the batch --------------------------------------------------------------------------------------------------------


def with_batch_size(line: CommandLine, inputs: Inputs) -> CommandLine:
    """line with the --batch-size that --batch-size auto stands for: the largest that fits. A step keeps its samples.

    Raises:
        InputError: not even one row at a time fits.
    """
    options = line.options
    if not options.auto_batch_size:
        return line
    device = device_of(options)
    plan = plan_of(options, inputs, device.on_gpu)
    fitting = [smaller for smaller in (plan, *_smaller_batches(plan, whole=True)) if smaller.told.peak <= device.usable]
    if not fitting:
        raise InputError(
            f"--batch-size auto: one row of {plan.batch.seq} tokens takes {_gib(plan.with_rows(1).told.peak)} GiB, "
            f"{_gib(device.usable)} can be used ({device.name}); more memory is needed, or what --dry_run names."
        )
    chosen = max(fitting, key=lambda one: one.batch.rows)
    rows, accumulated = str(chosen.batch.rows), str(chosen.accumulated)
    added = ["--batch-size", rows, "--gradient-accumulation-steps", accumulated]
    words = [word for word in line.words if word != "--auto_batch_size"] + added
    note = f"--batch-size {rows} --gradient-accumulation-steps {accumulated} (auto)"
    return replace(line, words=words, options=_with_words(options, added), notes=[*line.notes, note])


def _with_words(options: Options, words: list[str]) -> Options:
    given = parse(words)
    values = {**vars(options), **{name: getattr(given, name) for name in given.user_set}, "auto_batch_size": False}
    user_set = (values.pop("user_set") | given.user_set) - {"auto_batch_size"}
    return Options(values, frozenset(user_set))


def _smaller_batches(plan: Plan, whole: bool = False) -> Iterator[Plan]:
    """The plan in other micro-batches, the largest first: smaller ones than its own, or, if whole, all of its step."""
    samples = plan.batch.rows * plan.accumulated
    for rows in range(samples if whole else plan.batch.rows - 1, 0, -1):
        if samples % rows == 0:
            yield plan.with_rows(rows)


# --- what is said -----------------------------------------------------------------------------------------------------


def dry_run_report(options: Options, inputs: Inputs) -> str:
    """What --dry_run prints."""
    device = device_of(options)
    plan = plan_of(options, inputs, device.on_gpu)
    told, batch, setup = plan.told, plan.batch, plan.setup
    in_4_bits = f"; {told.in_4_bits:,} are kept in 4 bits" if told.in_4_bits else ""
    pictures = "features of the pictures" if not batch.images else f"{count_of(batch.images, 'picture')}"
    shared = f" in {count_of(batch.packs, 'pack')}" if batch.packs else ""
    lines = [
        f"Parameters: {told.parameters:,}, of which {told.trained:,} are trained{in_4_bits}.",
        f"Largest batch: {count_of(batch.rows, 'row')}{shared} of {batch.seq} tokens, {batch.answers} of them learned; {pictures}. "
        f"Batches a step: {plan.accumulated}, processes that share the rows: {setup.data_parallel}.",
        f"Memory of {'each GPU' if setup.on_gpu else 'each process'} in {setup.dtype}, GiB:",
        *(_table_line(name, size) for name, size in told.training.items() if size),
        _table_line("all while training", sum(told.training.values())),
        _table_line("all while loading", told.loading),
        *_verdict(plan, device),
        *nccl_note(setup, options.distributed_backend),
        f"A checkpoint takes {size_text(checkpoint_size(options, inputs.checkpoint))}.",
        time_per_step(plan, device),
    ]
    return "\n".join(lines)


def nccl_note(setup: Setup, backend: str) -> list[str]:
    """What the table leaves out on a GPU, as it is known for one card only; in runs like the measured one, what avoids it."""
    if not setup.on_gpu or backend != "nccl":
        return []
    is_alone = setup.data_parallel * setup.model_parallel == 1
    is_measured = is_alone and setup.zero_stage == 0 and not setup.trains_vision
    taken = "Not counted: NCCL, which took 1.2 GiB of an H100 in a run of one process."
    if not is_measured:
        return [taken]
    return [f"{taken} --distributed-backend gloo does without it: on one GPU there is nobody to talk to."]


def _table_line(name: str, size: int) -> str:
    return f"  {in_column(name, 24)} {_gib(size):>7}"


def _verdict(plan: Plan, device: Device) -> list[str]:
    there = f"{_gib(device.usable)} of {_gib(device.memory)} GiB can be used ({device.name})"
    if plan.told.peak <= device.usable:
        return [f"It fits: {there}."]
    ways = [(words, cost, way) for words, cost, way in ways_to_fit(plan) if way.told.peak <= device.usable]
    if not ways:
        return [f"It does not fit: {there}. None of the flags alone makes it fit: a larger GPU is needed."]
    return [
        f"It does not fit: {there}. What would make it fit, the cheapest first:",
        *(f"  {in_column(words, 62)} {_gib(way.told.peak):>6} GiB; {in_column(cost, 0)}" for words, cost, way in ways),
    ]


def time_per_step(plan: Plan, device: Device) -> str:
    """What a step's products take on this machine, in a sentence."""
    if device.is_elsewhere:
        return "Time per step: can't be measured for a GPU that isn't here; a run prints it from its first steps on."
    setup, batch, where = plan.setup, plan.batch, "cuda" if plan.setup.on_gpu else "cpu"
    rate = measured_rate(setup, batch, where)
    seconds = step_operations(setup, batch) / rate
    unpacked = unpacked_numbers(setup)
    if unpacked:
        seconds += unpacked / measured_unpacking(setup, where)
    lines = [
        f"Time per step: about {seconds * plan.accumulated:.2g} s for the largest batch, by this processor's rate in such "
        f"products just now, {rate / 1e9:.0f} GFLOP/s{'; 4 bits are unpacked in it' if unpacked else ''}. What is no product "
        "comes on top."
    ]
    if setup.on_gpu:
        started = starting_seconds(setup) * plan.accumulated
        lines.append(
            f"Starting a step's kernels takes a core about {started:.2g} s: on a GPU a short batch takes that long at least."
        )
    if not batch.images:
        looked = picture_operations(setup.config) / rate
        lines.append(f"Before the first step each picture is looked at, for about {looked:.2g} s.")
    return "\n".join(lines)


def ways_to_fit(plan: Plan) -> Iterator[tuple[str, str, Plan]]:
    """Flags that need less memory, what they cost, and the plan with them; in the order of their cost."""
    setup = plan.setup
    if BYTES[setup.dtype] == 4:
        yield "--bf16", "no slower where there is a GPU; numbers of half the width", plan.changed(dtype="bf16")
    if plan.batch.images and not setup.trains_vision:
        way = replace(plan, batch=replace(plan.batch, images=0))
        yield "--feature_cache FOLDER", "no slower; each picture is looked at once, before the first step", way
    recomputed = plan if setup.recomputed else plan.changed(recomputed=True)
    if not setup.recomputed:
        yield "--checkpoint-activations", "a third longer; a run does so by itself", recomputed
    if setup.data_parallel > 1 and setup.zero_stage < 2:
        yield "--zero-stage 2", "more exchanges between the processes", plan.changed(zero_stage=2)
    for way in _smaller_batches(plan):
        yield _batch_flags(way), "the same step in more parts, up to as many times as long", way
    if plan.batch.rows > 1 and not setup.recomputed:
        way = recomputed.with_rows(1)
        yield f"--checkpoint-activations {_batch_flags(way)}", "a third longer, and the step in more parts", way
    if "lora" in setup.adapters.methods:
        methods = tuple("qlora" if method == "lora" else method for method in setup.adapters.methods)
        in_4_bits = plan.changed(adapters=replace(setup.adapters, methods=methods))  # type: ignore[arg-type]
        cost = "up to twice as long; weights are rounded to 4 bits"
        with_all = "up to three times as long, the step in more parts; weights are rounded to 4 bits"
        yield "--use_qlora in place of --use_lora", cost, in_4_bits
        way = in_4_bits.changed(recomputed=True).with_rows(1)
        yield f"--use_qlora --checkpoint-activations {_batch_flags(way)}", with_all, way
    for processes in (2, 4, 8):
        if processes > setup.model_parallel and setup.config["num_attention_heads"] % processes == 0:
            way = plan.changed(model_parallel=processes)
            yield f"--model-parallel-size {processes}", f"{processes} GPUs for one model", way


def _batch_flags(plan: Plan) -> str:
    return f"--batch-size {plan.batch.rows} --gradient-accumulation-steps {plan.accumulated}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
