"""One training step: a batch in, a loss out.

batch = samples, seq = tokens of the longest one, vocab = entries of the vocabulary.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from model.dataset import heed_problems
from model.prompt import IGNORE_INDEX
from model.sat_compat import broadcast_data, import_sat

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)


def get_batch(
    data_iterator: Iterator[dict[str, Any]] | None, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The next batch on the model's device: input_ids, labels int64[batch, seq], image [pictures, 3, H, W], pre_image.

    Rows without a picture have none in image. The image has the model's dtype. With model parallelism only the first rank of a group reads data; the others get
    theirs, pre_image included, from it.
    """
    timers("data loader").start()
    is_reader = mpu.get_model_parallel_rank() == 0
    batch = next(data_iterator) if is_reader and data_iterator is not None else {}
    timers("data loader").stop()
    if batch:
        heed_problems(batch, getattr(args, "bad_rows", "error"))
        batch["pre_image_tensor"] = torch.tensor([batch["pre_image"]], dtype=torch.int64)
    device = args.device
    text = broadcast_data(("input_ids", "labels", "pre_image_tensor"), batch, torch.int64, device)
    image = broadcast_data(("image",), batch, torch.float32, device)["image"]
    pre_image = batch["pre_image"] if batch else int(text["pre_image_tensor"])
    dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    return text["input_ids"], text["labels"], image.to(dtype), pre_image


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, scalar float32, over the supervised tokens; 0 if there are none.

        tokens    question gMASK sop  a   b   eop
        labels       -       -   sop  a   b   eop
        predicted            sop  a   b   eop           logits at t are for the token at t + 1

    Args:
        logits: [batch, seq, vocab]. labels: int64[batch, seq], IGNORE_INDEX where nothing is learned.
    """
    predictions = logits[:, :-1].flatten(0, 1).float()
    targets = labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(predictions, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def forward_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the next batch, scalar float32, and the same as SAT's metric "loss"."""
    loss, _ = _next_loss(data_iterator, model, args, timers)
    return loss, {"loss": loss}


def evaluation_step(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of the next batch, and what the mean over all tokens of all batches needs: "loss_sum" and "tokens"."""
    loss, labels = _next_loss(data_iterator, model, args, timers)
    tokens = (labels[:, 1:] != IGNORE_INDEX).sum().float()
    return loss, {"loss_sum": loss * tokens, "tokens": tokens}


def _next_loss(
    data_iterator: Iterator[dict[str, Any]] | None, model: torch.nn.Module, args: argparse.Namespace, timers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    timers("batch generator").start()
    input_ids, labels, image, pre_image = get_batch(data_iterator, args, timers)
    timers("batch generator").stop()
    logits = model(input_ids=input_ids, image=image, pre_image=pre_image)[0]
    return answer_loss(logits, labels), labels
