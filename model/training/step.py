"""One training step: a batch becomes a loss.

    next_batch       the collator's batch, its tensors on the model's device
    loss_sum         → hidden states at the supervised positions → sum of their cross entropies
    forward_step     → divided by the number of supervised tokens
    optimizer_step   as many of these as are accumulated, backward, and one update of the weights

Shapes: batch = rows, seq = tokens of the longest one, pictures = those that the rows have, answers = supervised tokens of
the whole batch.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from model.data.bad_rows import handle_bad_rows
from model.data.prompt import IGNORE_INDEX
from model.loss import head_loss
from model.masks import packed_prefix_mask, supervised_positions
from model.sat_compat import broadcast_data, import_sat

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)

Step = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]

MODEL_INPUTS = (
    "input_ids", "position_ids", "image", "image_features", "pre_image", "image_slots", "answer_positions",
)  # fmt: skip


def forward_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean cross entropy of the next batch, scalar float32, and the same as SAT's metric "loss"."""
    timers("batch generator").start()
    batch = next_batch(data_iterator, args, timers)
    timers("batch generator").stop()
    loss = loss_sum(model, batch) / max(1, len(batch["answers"]))
    return loss, {"loss": loss}


def loss_sum(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the cross entropies, scalar float32, of the supervised tokens of a batch on the model's device."""
    network: Any = getattr(model, "module", model)  # inside DeepSpeed's engine, or by itself
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    if "segments" in batch:  # a row of several samples; for other rows the model makes the mask itself
        dtype = network.transformer.word_embeddings.weight.dtype
        inputs["attention_mask"] = packed_prefix_mask(batch["segments"], batch["in_context"]).to(dtype)
    hidden = model(**inputs)[0]  # [answers, hidden]
    return head_loss(hidden, network.get_mixin("chatglm-final").lm_head, batch["answers"])


def next_batch(data_iterator: Iterator[dict[str, Any]] | None, args: argparse.Namespace, timers: Any) -> dict[str, Any]:
    """The collator's next batch (`model.data.dataset.data_collator`) on the model's device, as `on_device` puts it there.

    A collator of 2023 gives input_ids, labels, image and pre_image only. What is learned is then read off the labels.

    Raises:
        RowError: a row's picture can't be opened, and args.bad_rows isn't "skip".
    """
    timers("data loader").start()
    is_reader = mpu.get_model_parallel_rank() == 0
    batch = next(data_iterator) if is_reader and data_iterator is not None else {}
    timers("data loader").stop()
    if "labels" in batch and "answers" not in batch:
        positions, answers = supervised_positions(batch["labels"], IGNORE_INDEX)
        batch = {**batch, "answer_positions": positions, "answers": answers}
    return on_device(batch, args)


def on_device(batch: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The batch with its tensors on args.device, and those of floating-point numbers in the model's dtype.

    With model parallelism only the first rank of a group has a batch to give. The others get theirs from it.

    Raises:
        RowError: a row's picture can't be opened, and args.bad_rows isn't "skip".
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    plain = {name: value for name, value in batch.items() if name not in tensors}
    described = [({name: tensor.dtype for name, tensor in tensors.items()}, plain)]
    if mpu.get_model_parallel_world_size() > 1:
        source, group = mpu.get_model_parallel_src_rank(), mpu.get_model_parallel_group()
        torch.distributed.broadcast_object_list(described, source, group=group)
    dtypes, plain = described[0]
    handle_bad_rows(plain, getattr(args, "bad_rows", "error"))  # on all ranks alike
    moved: dict[str, Any] = dict(plain)
    for name, dtype in dtypes.items():
        moved |= broadcast_data((name,), tensors, dtype, args.device)
        if dtype.is_floating_point:
            moved[name] = moved[name].to(model_dtype(args))
    return moved


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    """The dtype that SAT's flags make the model of. Scripts of 2023 have no --bf16."""
    return torch.float16 if args.fp16 else torch.bfloat16 if getattr(args, "bf16", False) else torch.float32


def get_batch(
    data_iterator: Iterator[dict[str, Any]] | None, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """`next_batch` as scripts of 2023 ask for it: input_ids, labels int64[batch, seq], image [pictures, 3, H, W] and
    pre_image.
    """
    batch = next_batch(data_iterator, args, timers)
    return batch["input_ids"], batch["labels"], batch["image"], batch["pre_image"]


def evaluation_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the next batch, and what the mean over all tokens of all batches needs: "loss_sum" and "tokens"."""
    batch = next_batch(data_iterator, args, timers)
    total, tokens = loss_sum(model, batch), len(batch["answers"])
    return total / max(1, tokens), {"loss_sum": total, "tokens": total.new_tensor(float(tokens))}


def token_normalized_step() -> Step:
    """A `forward_step` whose gradient is that of the mean over all supervised tokens of the whole optimizer step.

    The plain one takes the mean over each micro-batch, and DeepSpeed the mean of those. A token then counts more in a
    micro-batch of few tokens, and the loss depends on how rows are divided into micro-batches.

    Here the micro-batches of an optimizer step are read together. Each one's sum of losses is divided by the number of
    tokens that a micro-batch has on average. DeepSpeed's mean is then the sum over all tokens divided by their number.
    """
    waiting: list[tuple[dict[str, Any], torch.Tensor]] = []

    def step(
        data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        timers("batch generator").start()
        if not waiting:
            micro_batches = getattr(args, "gradient_accumulation_steps", 1)
            batches = [next_batch(data_iterator, args, timers) for _ in range(micro_batches)]
            tokens = torch.tensor(float(sum(len(batch["answers"]) for batch in batches)), device=args.device)
            torch.distributed.all_reduce(tokens, group=mpu.get_data_parallel_group())
            average = tokens.clamp(min=1) / (len(batches) * mpu.get_data_parallel_world_size())
            waiting.extend((batch, average) for batch in batches)
        timers("batch generator").stop()
        batch, average_tokens = waiting.pop(0)
        loss = loss_sum(model, batch) / average_tokens
        return loss, {"loss": loss}

    return step


def optimizer_step(
    data_iterator: Iterator[Any] | None,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    args: argparse.Namespace,
    timers: Any,
    hooks: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    """One optimizer step, in the place of SAT's `train_step`: its loss, 1 if it was skipped, and no metrics.

    SAT's ends where a micro-batch's loss is NaN: the micro-batches before it stay in the gradient, and those after it go to
    the next step. Here every step takes all its micro-batches. A loss that isn't finite makes the gradient NaN, and
    DeepSpeed then skips the update on all processes alike. Only DeepSpeed's look at the gradient's norm waits for the device.

    Args:
        model: DeepSpeed's engine. hooks: SAT's; "forward_step" gives a loss, or a loss and metrics.

    Returns:
        The mean loss over micro-batches and processes, scalar float32.
    """
    forward = (hooks or {})["forward_step"]
    losses: list[torch.Tensor] = []
    last = False
    while not last:
        timers("forward").start()
        result = forward(data_iterator, model, args, timers, **kwargs)
        timers("forward").stop()
        loss = result[0] if isinstance(result, tuple) else result
        losses.append(loss.detach().clone())
        timers("backward").start()
        model.backward(loss * (1 + 0 * loss.detach()))  # times 1, or NaN: an infinite loss may have a finite gradient
        timers("backward").stop()
        timers("optimizer").start()
        last = model.is_gradient_accumulation_boundary()
        model.step()
        timers("optimizer").stop()
    skipped = not model.was_step_applied()
    if not skipped:
        scheduler.step()
    mean_loss = sum(losses[1:], losses[0]) / len(losses)
    torch.distributed.all_reduce(mean_loss)
    return mean_loss / args.world_size, int(skipped), {}
