"""`loss.png`: the curves of a run, drawn from its metrics.jsonl and settings.json.

    python -m model.training.curves checkpoints/MyModel-11-25-00-52        draws them anew

While a run goes on, a process of its own draws, at the lowest priority, so that no step waits for it. Matplotlib is
imported there only. Without it, a run says so once and goes on. A run of fewer than FEWEST_STEPS steps that evaluated
nothing has no curve, and gets no picture.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.checkpoints.resume import SETTINGS_FILE
from model.checkpoints.whole import write_whole
from model.progress import warn
from model.training.records import (
    EVALUATION,
    LOSS_FILE,
    METRICS_FILE,
    STEP,
    VALIDATION,
    Record,
    comparable,
    read_records,
    running_means,
)

PROJECT = Path(__file__).resolve().parent.parent.parent
SECONDS_BETWEEN_PICTURES = 30.0
SECONDS_FOR_THE_LAST = 30.0
FEWEST_STEPS = 5
LOWEST_PRIORITY = 19
IN_THE_BACKGROUND = "--in-the-background"
MOST_EPOCH_MARKS = 20
DEFAULT_FAMILY = "DejaVu Sans"  # comes with matplotlib
CHINESE_FAMILIES = (  # of Linux, Windows and macOS
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Serif CJK SC", "Noto Serif CJK JP", "Source Han Sans SC",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC",
    "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS",
)  # fmt: skip
BLUE, PALE, ORANGE, GREY, RED = "#1f5fa8", "#a9c4e4", "#d9680f", "#8a8a8a", "#c0262c"


# --- while a run goes on ----------------------------------------------------------------------------------------------


class LossPicture:
    """Keeps the picture of a running run up to date: at evaluations, every half minute, and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._started = time.monotonic()
        self._step = 0
        self._is_possible = importlib.util.find_spec("matplotlib") is not None
        if not self._is_possible:
            warn(f"{LOSS_FILE} is not drawn: the package matplotlib is missing; pip install matplotlib adds it.")

    def note(self, record: Record) -> None:
        """A record has been written; draw if it is time. Returns at once."""
        now = time.monotonic()
        self._step = record.step
        if record.kind == EVALUATION or now - self._started >= SECONDS_BETWEEN_PICTURES:
            self._start(now, IN_THE_BACKGROUND)

    def _start(self, now: float, *flags: str) -> None:
        """Start to draw, unless a picture is being drawn."""
        if not self._is_possible or (self._process is not None and self._process.poll() is None):
            return
        command = [sys.executable, "-m", "model.training.curves", str(self.folder.resolve()), *flags]
        environment = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._is_possible = False
            warn(f"{LOSS_FILE} is not drawn ({error.strerror}).")
        self._started = now

    def finish(self) -> None:
        """Start to draw the whole run, and return at once. A picture that is being drawn lacks its end: it is given up."""
        has_begun = self._process is not None
        self.give_up()
        if self._step >= FEWEST_STEPS or has_begun:
            self._start(time.monotonic())

    def give_up(self) -> None:
        """Leave the picture as it is, for the run has to leave now."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wait(self) -> None:
        """Return when the picture is there, or after half a minute; say so if it can't be drawn."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(SECONDS_FOR_THE_LAST)
            if status:
                warn(
                    f"{LOSS_FILE} is not drawn: its process ended with status {status}; python -m model.training.curves "
                    f"{self.folder} says why."
                )


# --- drawing ----------------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Draw the picture of the run in folder."""
    records = read_records(folder / METRICS_FILE)
    if records:
        settings = settings_in(folder)
        drawing = figure(records, resumed_after(settings), folder.name, settings)
        write_whole(folder / LOSS_FILE, lambda file: drawing.savefig(file, format="png", dpi=120))


def resumed_after(settings: Mapping[str, Any]) -> list[int]:
    """After which steps a run with these settings went on."""
    return sorted({start.get("after_step", 0) for start in settings.get("starts") or []} - {0})


def settings_in(folder: Path) -> Mapping[str, Any]:
    """What settings.json says; nothing if it can't be read."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    return {}


def figure(
    records: Sequence[Record],
    resumed: Sequence[int],
    title: str,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A matplotlib figure of a run: its losses over its steps, with the learning rate below.

    Args:
        resumed: after which steps the run went on. settings: what its `settings.json` holds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [record for record in records if record.kind == STEP]
    evaluations = [record for record in records if record.kind == EVALUATION and record.split == VALIDATION]
    drawing = Figure(figsize=(9, 6), layout="constrained")
    losses, rates = drawing.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_losses(losses, steps, evaluations, comparable(evaluations, settings))
    _draw_marks(losses, steps, resumed)
    rates.plot([record.step for record in steps], [record.lr for record in steps], color=GREY, linewidth=1.2)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rates):
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    text, families = drawable(title)
    losses.set_title(text, loc="left", fontsize=11, fontfamily=families, parse_math=False)
    losses.legend(frameon=False, fontsize=9)
    return drawing


def drawable(title: str) -> tuple[str, list[str]]:
    """A title without the characters that no font here has, and the families of the fonts that have the others."""
    from matplotlib.font_manager import FontProperties, findfont, get_font, get_font_names

    installed = set(get_font_names())
    families = [DEFAULT_FAMILY, *(family for family in CHINESE_FAMILIES if family in installed)]
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    shown = "".join(one for one in title if any(font.get_char_index(ord(one)) for font in fonts))
    return shown.strip(), families


def _draw_losses(axes: Any, steps: Sequence[Record], evaluations: Sequence[Record], compared: Sequence[Record]) -> None:
    numbers, losses = [record.step for record in steps], [record.loss for record in steps]
    few = len(steps) <= 30
    axes.plot(numbers, losses, color=PALE, linewidth=1, marker="." if few else "", label="training loss")
    means, window = running_means(losses)
    axes.plot(numbers, means, color=BLUE, linewidth=1.8, label=f"its mean over {window} steps")
    if evaluations:
        at, loss = [record.step for record in evaluations], [record.loss for record in evaluations]
        axes.plot(at, loss, color=ORANGE, linewidth=1.5, marker="o", markersize=4, label="evaluation loss")
    if compared:
        best = min(compared, key=lambda record: record.loss)
        axes.plot(
            [best.step], [best.loss], color=ORANGE, marker="*", markersize=15, markeredgecolor="white", linestyle="",
            label=f"best evaluation: {best.loss:.4f} at step {best.step}",
        )  # fmt: skip
    axes.set_ylabel("loss per token")
    axes.set_ylim(0, top_of_losses([record.loss for record in (*steps, *evaluations)]))


def top_of_losses(losses: Sequence[float]) -> float | None:
    """Where the axis ends. A few losses far above all others would press the curve flat: they are cut off."""
    finite = sorted(loss for loss in losses if math.isfinite(loss))
    if not finite:
        return None
    usual = finite[int(0.98 * (len(finite) - 1))]
    return 1.05 * (finite[-1] if finite[-1] <= 3 * usual else 1.5 * usual) or None


def _draw_marks(axes: Any, steps: Sequence[Record], resumed: Sequence[int]) -> None:
    """Vertical lines at the ends of epochs and where the run went on, and crosses where a step was skipped."""
    ends = epoch_ends(steps)
    if len(ends) <= MOST_EPOCH_MARKS:
        for number, step in enumerate(ends):
            axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":", label=None if number else "end of an epoch")
    for number, step in enumerate(resumed):
        axes.axvline(step, color=BLUE, linewidth=1, linestyle="--", label=None if number else "resumed")
    skipped = [record.step for record in steps if record.skipped]
    if skipped:
        axes.plot(
            skipped, [0.02] * len(skipped), color=RED, marker="x", linestyle="", transform=axes.get_xaxis_transform(),
            label=f"{len(skipped)} skipped",
        )  # fmt: skip


def epoch_ends(steps: Sequence[Record]) -> list[int]:
    """The first step at or after which a whole number of epochs is done, for each such number."""
    ends, done = [], 0
    for record in steps:
        if record.epoch is not None and int(record.epoch + 1e-9) > done:
            done = int(record.epoch + 1e-9)
            ends.append(record.step)
    return ends


if __name__ == "__main__":
    if IN_THE_BACKGROUND in sys.argv[2:]:
        with suppress(OSError):
            os.nice(LOWEST_PRIORITY)
    main(Path(sys.argv[1]))
