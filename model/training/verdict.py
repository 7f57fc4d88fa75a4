"""Did it learn? What a run's last lines and its report say of its losses and answers, and what to try if they stand still.

Everything is read off what a run leaves behind: its settings, its records and its answers. Only the standard library is
imported.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pvariance
from types import MappingProxyType
from typing import Any

from model.progress import count_of
from model.training.records import STEP, Record, comparable

LEAST_STEPS = 10  # fewer say nothing
SHARE, LARGEST_WINDOW = 5, 200  # the first and the last fifth of the steps are compared, 200 at most
SIGMAS = 2.0  # of a mean's own uncertainty: a smaller fall is noise
DIVERGED = 0.1  # of the loss at its start: a rise by more
CLEAR_RISE = 1.02  # of the evaluation loss over its best, or of the answered rows over their first, a factor
WARM_UP_SHARE = 0.2  # of the steps under the 5 % rule, from which on it is named
SMALL_SCALE = 1.0  # alpha / rank below which LoRA's product is scaled down
FEW_LAYERS = 4
LOW_RATE = 1e-3  # for LoRA at a scale of 0.1
LOWER_RATE = 1 / 3  # of --lr, to try after a run that diverged; as far apart as the rates of a usual grid


def verdict(settings: Mapping[str, Any], records: Sequence[Record], answers: Mapping[str, Any]) -> list[str]:
    """Sentences on what a run has learned, the most important first; none of a run of very few steps without answers.

    Args:
        settings: what `settings.json` holds. answers: as `model.training.answers.read_answers` gives them.
    """
    lines = []
    steps = [record for record in records if record.kind == STEP and math.isfinite(record.loss)]
    fall = fall_of([record.loss for record in steps])
    diverged = None if fall is None else divergence(fall, answers)
    if fall is not None:
        lines.append(diverged or harder_rows(fall, answers) or fall.sentence)
    changed = answers_sentence(answers)
    lines += [changed] if changed else []
    if diverged:
        lines.append(rise_advice(settings))
    elif fall is not None and not fall.is_clear and not (fall.is_rise and has_improved(answers)):
        lines += advice(settings)
    if fall is None or fall.is_clear:  # rows can't be learned by heart by a run that learned little
        lines += overfitting(steps, records, settings)
    return lines


class Fall:
    """How far a loss has fallen from the first steps to the last."""

    def __init__(self, first: Sequence[float], last: Sequence[float]) -> None:
        self.steps = len(first)
        self.start = first[0]  # of the first step, before anything was changed
        self.before, self.after = fmean(first), fmean(last)
        self.noise = SIGMAS * math.sqrt(pvariance(first) / len(first) + pvariance(last) / len(last))

    @property
    def is_clear(self) -> bool:
        """Whether it fell by more than the noise of these two means."""
        return self.before - self.after > self.noise

    @property
    def is_rise(self) -> bool:
        """Whether it rose instead, far beyond the noise."""
        return self.after - self.before > max(self.noise, DIVERGED * self.before)

    @property
    def means(self) -> str:
        """What before and after are, for a person."""
        return f"the mean of the first {self.steps} steps and of the last"

    @property
    def sentence(self) -> str:
        """For a person."""
        if self.is_clear:
            return f"The loss fell from {self.before:.4f} to {self.after:.4f} ({self.means})."
        return (
            f"The loss has hardly moved: {self.before:.4f}, then {self.after:.4f} ({self.means}), no fall beyond its noise of "
            f"{self.noise:.2g}. Little or nothing was learned."
        )


def divergence(fall: Fall, answers: Mapping[str, Any]) -> str | None:
    """A sentence if the run has diverged, early or late.

    A loss that rose far in the first steps may fall again, and stay above its start. Batches differ, so that a few steps
    say little: the rows that are answered before and after tell.
    """
    losses = losses_of_answered_rows(answers)
    if fall.is_rise:
        if losses and losses[1] <= CLEAR_RISE * losses[0]:
            return None
        before, what = fall.before, fall.means
    else:
        if not losses or losses[1] <= (1 + DIVERGED) * losses[0] or fall.after <= fall.start:
            return None
        before, what = fall.start, f"the first step and the mean of the last {fall.steps}"
    return (
        f"The loss rose from {before:.4f} to {fall.after:.4f} ({what}). The run has diverged: it ends worse than it "
        "began."
    )


def harder_rows(fall: Fall, answers: Mapping[str, Any]) -> str | None:
    """A sentence if the loss rose in a run that has not diverged."""
    losses = losses_of_answered_rows(answers)
    if not (fall.is_rise and losses):
        return None
    return (
        f"The loss rose from {fall.before:.4f} to {fall.after:.4f} ({fall.means}), but of the rows that were answered it was "
        f"{losses[0]:.4f} and is {losses[1]:.4f}: the last steps had harder rows."
    )


def has_improved(answers: Mapping[str, Any]) -> bool:
    """Whether the answered rows have a loss that is clearly lower than before."""
    losses = losses_of_answered_rows(answers)
    return bool(losses) and losses[1] < (1 - DIVERGED) * losses[0]


def losses_of_answered_rows(answers: Mapping[str, Any]) -> list[float]:
    """Their mean loss before the first step and after the last; empty where one isn't known."""
    losses = [answers[name].measures["loss"] for name in ("before", "after") if name in answers]
    return losses if len(losses) == 2 else []


def fall_of(losses: Sequence[float]) -> Fall | None:
    """The fall of a run's losses; None if there are too few."""
    if len(losses) < LEAST_STEPS:
        return None
    window = _compared(len(losses))
    return Fall(losses[:window], losses[-window:])


def _compared(steps: int) -> int:
    """How many of a run's steps are compared with as many others."""
    return max(3, min(steps // SHARE, LARGEST_WINDOW))


def answers_sentence(answers: Mapping[str, Any]) -> str | None:
    """What became of the answers."""
    after, before = answers.get("after"), answers.get("before")
    if after is None:
        return None
    count = len(after.results)
    rows = rows_in_words(count, answers.get("rows", count), bool(answers.get("held_out")))
    measures = after.measures
    right = f"{measures['right']:.0f}/{len(after.results)}"
    if before is None:
        return f"Of {rows}, answers right: {right}; ROUGE-L {measures['rouge_l']:.3f}."
    earlier = before.measures
    changed = sum(one.answer != other.answer for one, other in zip(before.results, after.results, strict=True))
    return (
        f"Of {rows}, answers right: before {earlier['right']:.0f}/{len(before.results)}, after {right}; ROUGE-L "
        f"{earlier['rouge_l']:.3f}, then {measures['rouge_l']:.3f}; "
        + ("no answer has changed." if not changed else f"{changed} changed.")
    )


def rows_in_words(answered: int, rows: int, held_out: bool) -> str:
    """What was answered: rows, or where a row has several turns, so many turns of so many rows."""
    told = count_of(rows, "held-out row" if held_out else "training row")
    return told if answered == rows else f"{answered} turns of {told}"


def rise_advice(settings: Mapping[str, Any]) -> str:
    """What to do after a run that diverged."""
    flags: Mapping[str, Any] = settings.get("flags", {})
    lr = flags.get("lr", 0.0)
    keep_best = " With --holdout, --keep_best keeps the best checkpoint." if _saves(flags) else ""
    return (
        f"Likely: --lr {lr:g} is too high; try {lr * LOWER_RATE:.2g}, or --find_lr, which proposes a rate.{keep_best}"
    )


def _saves(flags: Mapping[str, Any]) -> bool:
    return flags.get("save") != "none"  # as `settings.json` has it


def advice(settings: Mapping[str, Any]) -> list[str]:
    """Why a run may have learned nothing, each with the flag to try."""
    flags: Mapping[str, Any] = settings.get("flags", {})
    reasons = [*_rate_reasons(flags, settings.get("steps") or 0), *_adapter_reasons(flags), *_data_reasons(settings)]
    if not reasons:
        reasons = ["more steps may be needed, or another rate: --find_lr proposes one"]
    return [f"Likely: {reasons[0]}.", *(f"Also: {reason}." for reason in reasons[1:])]


def _rate_reasons(flags: Mapping[str, Any], steps: int) -> list[str]:
    reasons: list[str] = []
    slow = min(steps, flags.get("auto_warmup_steps", 0)) if flags.get("mode") == "finetune" else 0
    lr = flags.get("lr", 0.0)
    if steps and slow >= WARM_UP_SHARE * steps:
        reasons.append(
            f"{slow} of {steps} steps had 5 % of --lr at most ({0.05 * lr:.2g}), SAT's rule; try --auto_warmup_steps 0"
        )
    if lr < LOW_RATE:
        reasons.append(f"--lr {lr:g} is low for adapters; --find_lr proposes a rate")
    return reasons


def _adapter_reasons(flags: Mapping[str, Any]) -> list[str]:
    reasons: list[str] = []
    if not (flags.get("use_lora") or flags.get("use_qlora")):
        return reasons
    rank, alpha = flags.get("lora_rank", 1), flags.get("lora_alpha", 1.0)
    if alpha / rank < SMALL_SCALE:
        reasons.append(f"LoRA is scaled by alpha/rank = {alpha / rank:.3g}; try --lora_alpha {rank}, a scale of 1")
    layers = flags.get("layer_range") or []
    if 0 < len(layers) < FEW_LAYERS:
        reasons.append(
            f"LoRA is in {count_of(len(layers), 'layer')} only (--layer_range); without that flag it is in all"
        )
    return reasons


def _data_reasons(settings: Mapping[str, Any]) -> list[str]:
    trained = [file for file in settings.get("data", {}).values() if file.get("trained_on")]
    cut = sum(file.get("cut_labels") or 0 for file in trained)
    answers = sum(file.get("samples") or file.get("rows") or 0 for file in trained)  # one for every turn
    if not cut:
        return []
    what = f"{cut} of {answers} answers are cut off, so their ends are never learned"
    flags: Mapping[str, Any] = settings.get("flags", {})
    positions = settings.get("positions") or math.inf  # a run of an earlier version doesn't say
    if flags.get("max_source_length", 0) + flags.get("max_target_length", 0) < positions:
        return [f"{what}; try --max_target_length auto"]
    return [f"{what}; this checkpoint takes {positions} tokens with the question, so try a smaller --max_source_length"]


def overfitting(
    steps: Sequence[Record], records: Sequence[Record], settings: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """A sentence if the evaluation loss rises while the training loss falls, with flags to try that settings don't have."""
    made = comparable(records, settings)
    if len(made) < 2 or not steps:
        return []
    best, last = min(made, key=lambda record: record.loss), made[-1]
    if last.loss <= CLEAR_RISE * best.loss or last.step == best.step:
        return []
    window = _compared(len(steps))
    near_best = [record.loss for record in steps if record.step <= best.step][-window:]
    if near_best and fmean(near_best) <= fmean(record.loss for record in steps[-window:]):
        return []
    given = settings.get("flags", {})
    flags = {"keep_best": "--keep_best"} if _saves(given) else {}
    flags["early_stopping"] = "--early_stopping 3"
    to_try = ", ".join([*(flag for name, flag in flags.items() if not given.get(name)), "fewer epochs"])
    return [
        f"The evaluation loss was lowest at step {best.step} ({best.loss:.4f}) and rose to {last.loss:.4f} while the training "
        f"loss fell: rows are learned by heart. Try {to_try}, or more rows."
    ]
