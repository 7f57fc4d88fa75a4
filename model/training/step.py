"""One training step: a batch in, a loss out.

batch = samples, seq = tokens of the longest one, answers = supervised tokens of the whole batch, vocab = entries of the
vocabulary, hidden = the language model's width.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from model.data.bad_rows import handle_bad_rows
from model.loss import head_loss
from model.masks import packed_prefix_mask
from model.sat_compat import broadcast_data, import_sat

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)

MODEL_INPUTS = (
    "input_ids", "position_ids", "image", "image_features", "pre_image", "image_slots", "answer_positions",
)  # fmt: skip


def get_batch(
    data_iterator: Iterator[dict[str, Any]] | None, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The next batch on the model's device: input_ids, labels int64[batch, seq], image [pictures, 3, H, W] of the rows
    that have one, pre_image.

    The image has the model's dtype. With model parallelism only the first rank of a group reads data; the others get
    theirs, pre_image included, from it.
    """
    batch = next_batch(data_iterator, args, timers)
    return batch["input_ids"], batch["labels"], batch["image"], batch["pre_image"]


def next_batch(data_iterator: Iterator[dict[str, Any]] | None, args: argparse.Namespace, timers: Any) -> dict[str, Any]:
    """The collator's next batch with its tensors on the model's device, pictures or their features in its dtype."""
    timers("data loader").start()
    is_reader = mpu.get_model_parallel_rank() == 0
    batch = next(data_iterator) if is_reader and data_iterator is not None else {}
    timers("data loader").stop()
    handle_bad_rows(batch, getattr(args, "bad_rows", "error"))
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in batch.items() if name not in tensors}
    described = [({name: tensor.dtype for name, tensor in tensors.items()}, plain)]
    if mpu.get_model_parallel_world_size() > 1:
        source, group = mpu.get_model_parallel_src_rank(), mpu.get_model_parallel_group()
        torch.distributed.broadcast_object_list(described, source, group=group)
    dtypes, plain = described[0]
    on_device: dict[str, Any] = dict(plain)
    for name, dtype in dtypes.items():
        on_device |= broadcast_data((name,), tensors, dtype, args.device)
        if dtype.is_floating_point:
            on_device[name] = on_device[name].to(model_dtype(args))
    return on_device


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    """The numbers that SAT's flags make the model of."""
    return torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32


Step = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def forward_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the next batch, scalar float32, and the same as SAT's metric "loss"."""
    timers("batch generator").start()
    batch = next_batch(data_iterator, args, timers)
    timers("batch generator").stop()
    loss = loss_sum(model, batch) / max(1, len(batch["answers"]))
    return loss, {"loss": loss}


def evaluation_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the next batch, and what the mean over all tokens of all batches needs: "loss_sum" and "tokens"."""
    batch = next_batch(data_iterator, args, timers)
    total, tokens = loss_sum(model, batch), len(batch["answers"])
    return total / max(1, tokens), {"loss_sum": total, "tokens": total.new_tensor(float(tokens))}


def token_normalized_step() -> Step:
    """A `forward_step` whose gradient is that of the mean over all supervised tokens of the whole optimizer step.

    The plain one means over each micro-batch of each rank, and DeepSpeed means over those: a token then counts more in
    a micro-batch of few tokens, and the loss depends on how the batch is cut. Here the micro-batches of an optimizer
    step are read together; each one's sum of losses is divided by its fair share of all tokens, so that DeepSpeed's
    mean is the sum over tokens divided by their number.
    """
    waiting: list[tuple[dict[str, Any], torch.Tensor]] = []

    def step(
        data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        timers("batch generator").start()
        if not waiting:
            batches = [next_batch(data_iterator, args, timers) for _ in range(args.gradient_accumulation_steps)]
            tokens = torch.tensor(float(sum(len(batch["answers"]) for batch in batches)), device=args.device)
            ranks = mpu.get_data_parallel_world_size()
            torch.distributed.all_reduce(tokens, group=mpu.get_data_parallel_group())
            fair_share = tokens.clamp(min=1) / (len(batches) * ranks)
            waiting.extend((batch, fair_share) for batch in batches)
        timers("batch generator").stop()
        batch, share = waiting.pop(0)
        loss = loss_sum(model, batch) / share
        return loss, {"loss": loss}

    return step


def loss_sum(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the cross entropies, scalar float32, of the supervised tokens of a batch on the model's device."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    network: Any = getattr(model, "module", model)  # inside DeepSpeed's engine, or by itself
    head = network.get_mixin("chatglm-final").lm_head
    if "segments" in batch:
        dtype = network.transformer.word_embeddings.weight.dtype
        inputs["attention_mask"] = packed_prefix_mask(batch["segments"], batch["in_context"]).to(dtype)
    hidden = model(**inputs)[0]
    return head_loss(hidden, head, batch["answers"])
