"""One training step: a batch in, a loss out.

batch = samples, seq = tokens of the longest one, answers = supervised tokens of the whole batch, vocab = entries of the
vocabulary, hidden = the language model's width.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from model.data.bad_rows import heed_problems
from model.data.prompt import IGNORE_INDEX
from model.frozen import FrozenLinear, input_gradient, product
from model.sat_compat import broadcast_data, import_sat
from model.visualglm import packed_prefix_mask

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)

MODEL_INPUTS = (
    "input_ids", "position_ids", "image", "image_features", "pre_image", "image_slots", "answer_positions",
)  # fmt: skip
CHUNK_LOGITS = 2**26  # scores held at once: 256 MiB in float32
CACHED_LOGITS = 2**16  # scores that a thread of a CPU turns into gradients at once: 256 KiB, which its cache holds


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
    heed_problems(batch, getattr(args, "bad_rows", "error"))
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


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, scalar float32, over the supervised tokens; 0 if there are none.

        tokens    question gMASK sop  a   b   eop
        labels       -       -   sop  a   b   eop
        predicted            sop  a   b   eop           logits at t are for the token at t + 1

    Args:
        logits: [batch, seq, vocab]. labels: int64[batch, seq], IGNORE_INDEX where nothing is learned.
    """
    predictions, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = F.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


class _HeadLoss(torch.autograd.Function):
    """`head_loss`'s sum: the gradient is made beside it, and no chunk's scores are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, rows: int, cached: int
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            scores, chosen = product(head, hidden[start : start + rows]), targets[start : start + rows, None]
            for part, target in zip(scores.split(cached), chosen.split(cached), strict=True):
                log_p = part.log_softmax(dim=1, dtype=torch.float32)
                total -= log_p.gather(1, target).sum()
                if gradient is not None:
                    # d loss / d scores = softmax(scores) - one_hot(target), in the place of the scores
                    part.copy_(log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)))
            if gradient is not None:
                gradient[start : start + rows] = input_gradient(head, scores)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * loss_gradient.to(gradient.dtype), None, None, None, None


def head_loss(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies, scalar float32, of the tokens that hidden [answers, hidden] predicts.

    Chunk by chunk: all scores are never held at once. The head stays as it is; it gets no gradient.

    Args:
        head: a linear, [..., hidden] → [..., vocab], without a bias. targets: int64[answers].
    """
    vocab = head.out_features if isinstance(head, FrozenLinear) else head.weight.shape[0]
    rows = max(1, CHUNK_LOGITS // vocab)
    cached = max(1, CACHED_LOGITS // vocab) * torch.get_num_threads() if hidden.device.type == "cpu" else rows
    return _HeadLoss.apply(hidden, head, targets, rows, cached)


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
