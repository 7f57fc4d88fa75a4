"""Cross entropy of the supervised tokens. `model.masks` says which position predicts which of them.

`head_loss` is what training uses, `head_losses` evaluating. `answer_loss` and `losses_by_row` take logits that are there
already.

Shapes: batch = samples, seq = tokens, answers = supervised tokens of the whole batch, vocab = entries of the
vocabulary, hidden = the width of the language model.
"""

from typing import Any

import torch
import torch.nn.functional as F

from model.data.prompt import IGNORE_INDEX
from model.distributed import whole_parameters
from model.frozen import FrozenLinear, input_gradient, product
from model.masks import next_labels
from model.sat_compat import model_parallel

CHUNK_LOGITS = 2**26  # scores held at once: 256 MiB in float32
CACHED_LOGITS = 2**16  # of them, those that a CPU's thread turns into gradients at once: 256 KiB fit into its cache


def answer_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, scalar float32, over the supervised tokens; 0 if there are none.

    Args:
        logits: [batch, seq, vocab]. labels: int64[batch, seq], IGNORE_INDEX where nothing is learned.
    """
    totals, counts = losses_by_row(logits, labels)
    return totals.sum() / counts.sum().clamp(min=1)


def losses_by_row(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's sum of cross entropies in nats, float32[batch], and its number of supervised tokens, int64[batch].

    Args:
        logits: [batch, seq, vocab]. labels: int64[batch, seq], IGNORE_INDEX where nothing is learned.
    """
    targets = next_labels(labels, IGNORE_INDEX)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(targets).sum(dim=1), (targets != IGNORE_INDEX).sum(dim=1)


class _HeadLoss(torch.autograd.Function):
    """`head_loss`. The gradient is made together with the sum, so that no chunk's scores are kept for later."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, rows: int, cached: int
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        rank, ranks, group = model_parallel()
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            scores, chosen = product(head, hidden[start : start + rows]), targets[start : start + rows, None]
            for part, target in zip(scores.split(cached), chosen.split(cached), strict=True):
                log_p = (
                    part.log_softmax(dim=1, dtype=torch.float32) if ranks == 1 else _log_p_of_part(part, ranks, group)
                )
                hit = log_p.new_ones(target.shape)
                if ranks > 1:  # this process has some words of the vocabulary only
                    target = target - rank * log_p.shape[1]
                    hit = ((target >= 0) & (target < log_p.shape[1])).float()
                    target = target.clamp(0, log_p.shape[1] - 1)
                total -= (log_p.gather(1, target) * hit).sum()
                if gradient is not None:
                    # d loss / d scores = softmax(scores) - one_hot(target), in the place of the scores
                    part.copy_(log_p.exp_().scatter_add_(1, target, -hit))
            if gradient is not None:
                gradient[start : start + rows] = input_gradient(head, scores)
        if ranks > 1:  # the gradient is summed up by SAT, where hidden comes from
            torch.distributed.all_reduce(total, group=group)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        # fp16 ends at 65504, below its own first loss scale; only the product has to fit
        wide = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
        return (gradient.to(wide) * loss_gradient.to(wide)).to(gradient.dtype), None, None, None, None


def _log_p_of_part(scores: torch.Tensor, ranks: int, group: Any) -> torch.Tensor:
    """The log probabilities, float32[answers, words], of this process's words among those of all."""
    scores = scores.float()
    own = scores.logsumexp(dim=1, keepdim=True)
    others = [torch.empty_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(others, own, group=group)
    return scores - torch.cat(others, dim=1).logsumexp(dim=1, keepdim=True)


def head_loss(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies, scalar float32, of the tokens that hidden states predict.

    The scores of a chunk of tokens are made at a time, never all at once. The head is frozen: it gets no gradient.

    With model parallelism the head has a part of the vocabulary. The sum is that over all words, on every process; the
    gradient is this part's share, and SAT's transformer, which gave the hidden states, adds up those of all.

    Args:
        hidden: [answers, hidden]. targets: int64[answers].
        head: a linear, [..., hidden] → [..., vocab], without a bias.
    """
    with whole_parameters(head.parameters()):  # the gradient is made here too
        vocab = head.out_features if isinstance(head, FrozenLinear) else head.weight.shape[0]
        rows = max(1, CHUNK_LOGITS // vocab)
        cached = max(1, CACHED_LOGITS // vocab) * torch.get_num_threads() if hidden.device.type == "cpu" else rows
        return _HeadLoss.apply(hidden, head, targets, rows, cached)


@torch.no_grad()
def head_losses(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each token that hidden states predict, float32[answers], without gradients.

    The scores of a chunk of tokens are made at a time. The arguments are `head_loss`'s, the head a linear of any kind.
    """
    vocab = head.out_features if isinstance(head, FrozenLinear) else head.weight.shape[0]
    rows = max(1, CHUNK_LOGITS // vocab)
    losses = [
        F.cross_entropy(head(part).float(), target, reduction="none")
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)
