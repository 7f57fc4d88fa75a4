"""--find_lr: which learning rate suits these rows and this method, by a hundred steps with a rising one.

The rate rises from LOWEST to HIGHEST, by the same factor at every step (Smith 2017, "Cyclical learning rates"). While it
is too low the loss stands still; then it falls; then it is too high, and the loss rises or is no number any more. A run
holds its rate for many steps, so that the rate at the lowest loss is too high for it: proposed is BELOW_LOWEST of it.

Nothing is saved and nothing else is changed: the weights that these steps have moved are forgotten. The curve is drawn
to `<save>/<experiment>-find_lr.png`.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.checkpoints.whole import write_whole
from model.cli.options import FIND_LR_STEPS, Options
from model.distributed import is_first_process
from model.progress import say, warn
from model.training.curves import BLUE, ORANGE, PALE
from model.training.sat_loop import Hooks, LoopState, StepWatcher

LOWEST, HIGHEST = 1e-6, 1.0
BELOW_LOWEST = 1 / 3
DIVERGED = 3.0  # times the first loss, smoothed: no higher rate is tried
SMOOTHED_OVER = 7  # steps, of which the one in the middle gets the mean


def rate_of(step: int) -> float:
    """The rate of a step, counted from 0."""
    return LOWEST * (HIGHEST / LOWEST) ** (step / (FIND_LR_STEPS - 1))


class RateSweep(StepWatcher):
    """Gives each step its rate, and remembers the losses."""

    def __init__(self, options: Options, hooks: Hooks) -> None:
        """hooks lets it into SAT's loop; no checkpoint is saved."""
        self.place = Path(options.save).expanduser() if options.save else None
        self.name = f"{options.experiment_name}-find_lr.png"
        self.losses: list[float] = []  # of the steps, each before its own update
        self.hooks = hooks
        hooks.step_watchers.append(self)
        hooks.save_checkpoint = lambda *_: None
        hooks.before_first_step = self._leave_evaluation_out

    @staticmethod
    def prepare(args: argparse.Namespace) -> None:
        """Let SAT take as many steps, and make no folder."""
        args.train_iters, args.epochs, args.save = FIND_LR_STEPS, None, None

    @staticmethod
    def _leave_evaluation_out(state: LoopState, train: Any, valid: Any) -> None:
        state.args.do_valid = state.args.do_test = False

    def before_step(self, state: LoopState) -> None:
        """Set the rate, for each group of parameters in proportion to its own."""
        rate = rate_of(state.args.iteration)
        for group, scale in zip(state.optimizer.param_groups, state.scheduler.lr_scale, strict=True):
            group["lr"] = rate * scale

    def after_step(self, state: LoopState, loss: Any, skipped: bool) -> None:
        """Remember the loss; end where it has diverged."""
        self.losses.append(float(loss))
        known = smoothed(self.losses)
        if not math.isfinite(self.losses[-1]) or known[-1] > DIVERGED * max(known[0], 1e-3):
            self.hooks.report.last_step = state.args.train_iters
            state.args.train_iters = state.args.iteration + 1  # SAT counts this step after us

    def tell(self) -> None:
        """Draw the curve, and propose a rate."""
        if not is_first_process():
            return
        found = proposed_rate(self.losses)
        if found is None:
            say("--find_lr: the loss fell at no rate, so none is proposed; the picture shows the losses.")
        else:
            say(f"--find_lr proposes --lr {found:.1g}. Nothing was saved; the rows have been seen by these steps only.")
        if self.place is None:
            return
        try:
            write_whole(self.place / self.name, lambda file: draw(self.losses, found, file))
            say(f"The losses over the rates: {self.place / self.name}")
        except (ImportError, OSError) as error:
            warn(f"{self.place / self.name} is not drawn ({error}).")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Each loss with its neighbours' mean; what isn't finite is left out of it."""
    half = SMOOTHED_OVER // 2
    means = []
    for place in range(len(losses)):
        near = [loss for loss in losses[max(0, place - half) : place + half + 1] if math.isfinite(loss)]
        means.append(sum(near) / len(near) if near else math.inf)
    return means


def proposed_rate(losses: Sequence[float]) -> float | None:
    """The rate to train at; None if the loss never fell clearly.

    Args:
        losses: of the steps from the lowest rate on.
    """
    means = smoothed(losses)
    if not means or not math.isfinite(means[0]):
        return None
    lowest = min(range(len(means)), key=means.__getitem__)
    noise = max(abs(loss - mean) for loss, mean in zip(losses[:20], means[:20], strict=True))
    if means[0] - means[lowest] <= noise / 2:
        return None
    return rate_of(lowest) * BELOW_LOWEST


def draw(losses: Sequence[float], found: float | None, path: Path) -> None:
    """Draw the losses over the rates, with the proposed one."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawing.subplots()
    rates = [rate_of(step) for step in range(len(losses))]
    axes.plot(rates, losses, color=PALE, linewidth=1)
    axes.plot(rates, smoothed(losses), color=BLUE, linewidth=1.8, label=f"loss, mean over {SMOOTHED_OVER} steps")
    if found is not None:
        axes.axvline(found, color=ORANGE, linestyle="--", label=f"proposed: --lr {found:.1g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss per token")
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        axes.set_ylim(0, 1.5 * max(finite[: len(finite) // 2 + 1]))
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.legend(frameon=False)
    drawing.savefig(path, format="png", dpi=120)
