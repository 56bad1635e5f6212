"""How well runs did, against the rank they were given and the rank their updates really have."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankscope.errors import ConfigError
from rankscope.plots.figure import COLOURS, SMALL, log2_axis, new_figure, plain_grid

LORA, FULL = COLOURS[0], COLOURS[1]
STYLES = {"lora": ("o", LORA, "LoRA"), "full": ("D", FULL, "full fine-tuning")}
WIDE = 16
"""Largest over smallest effective rank from which that axis is logarithmic."""


@dataclass(frozen=True)
class PerformancePoint:
    """One run: its rank as asked for (None for full fine-tuning), its effective rank, and the score it reached."""

    label: str
    method: Literal["lora", "full"]
    nominal_rank: int | None
    effective_rank: float
    score: float
    seed: int


def plot_performance(
    points: Sequence[PerformancePoint],
    *,
    metric: str,
    measure: str,
    baseline: float | None = None,
    higher_is_better: bool = True,
    figure: Figure | None = None,
) -> Figure:
    """Score against nominal rank, and against effective rank; a marker is a run.

    LoRA's runs are joined by a line through the means of each rank, in order of rank; full fine-tuning is a marker
    of its own and a band from its least to its largest score.

    Args:
        points: at least one.
        metric: name of the score.
        measure: which effective rank it is, such as ``entropy_rank``.
        baseline: score of the untouched base.
        higher_is_better: said on the axis.
        figure: an empty one to draw on; None makes one.

    Raises:
        ConfigError: no points.
    """
    if not points:
        raise ConfigError("nothing to plot: no run has a score")
    figure = figure or new_figure(9, 3.9)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        plain_grid(axes)
        _full_band(axes, points)
        if baseline is not None:
            axes.axhline(baseline, color="#222222", linestyle=":", linewidth=1.1, label="untouched base")
    _against_nominal(left, points)
    _against_effective(right, points, measure)
    scores = [point.score for point in points] + ([] if baseline is None else [baseline])
    room = 0.12 * (max(scores) - min(scores) or abs(scores[0]) or 1.0)
    left.set_ylim(min(scores) - room, max(scores) + room)
    left.set_ylabel(f"{metric} ({'higher' if higher_is_better else 'lower'} is better)")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=SMALL, frameon=False)
    return figure


def _means(points: Sequence[PerformancePoint]) -> list[tuple[int, float, float]]:
    """(nominal rank, mean effective rank, mean score) in order of rank; LoRA only."""
    ranks = sorted({point.nominal_rank for point in points if point.nominal_rank is not None})
    found = []
    for rank in ranks:
        same = [point for point in points if point.nominal_rank == rank]
        effective = statistics.fmean(point.effective_rank for point in same)
        found.append((rank, effective, statistics.fmean(point.score for point in same)))
    return found


def _full_band(axes: Axes, points: Sequence[PerformancePoint]) -> None:
    scores = [point.score for point in points if point.method == "full"]
    if scores:
        axes.axhspan(min(scores), max(scores), color=FULL, alpha=0.18, linewidth=0)
        axes.axhline(statistics.fmean(scores), color=FULL, linewidth=1, linestyle="--", label="full fine-tuning, mean")


def _runs(axes: Axes, x: Sequence[float], runs: Sequence[PerformancePoint]) -> None:
    """A marker for each run, of one method."""
    if runs:
        marker, colour, name = STYLES[runs[0].method]
        axes.plot(x, [run.score for run in runs], marker, color=colour, markersize=5, label=f"{name}, a run")


def _against_nominal(axes: Axes, points: Sequence[PerformancePoint]) -> None:
    means = _means(points)
    axes.set_xlabel("nominal rank r")
    axes.set_title("rank given", fontsize=SMALL + 2)
    log2_axis(axes)
    if not means:
        axes.text(0.5, 0.5, "no LoRA run", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        return
    ranks = [rank for rank, _, _ in means]
    axes.plot(ranks, [score for _, _, score in means], color=LORA, linewidth=1.2)
    lora = [point for point in points if point.nominal_rank is not None]
    _runs(axes, [float(point.nominal_rank or 0) for point in lora], lora)
    axes.set_xticks(ranks)


def _against_effective(axes: Axes, points: Sequence[PerformancePoint], measure: str) -> None:
    axes.set_xlabel(f"effective rank of the update: {measure.replace('_', ' ')}")
    axes.set_title("rank used", fontsize=SMALL + 2)
    ranks = [point.effective_rank for point in points if point.effective_rank > 0]
    if ranks and max(ranks) / min(ranks) > WIDE:
        log2_axis(axes)
    for method in STYLES:
        same = [point for point in points if point.method == method]
        _runs(axes, [point.effective_rank for point in same], same)
    means = _means(points)
    if not means:
        return
    x, y = [effective for _, effective, _ in means], [score for _, _, score in means]
    axes.plot(x, y, color=LORA, linewidth=1.2)
    axes.plot(x, y, "o", color=LORA, markerfacecolor="white", markersize=14, zorder=3)
    axes.plot([], [], "o", color=LORA, markerfacecolor="white", markersize=9, label="LoRA, mean of the rank inside")
    for rank, effective, score in means:
        axes.annotate(str(rank), (effective, score), ha="center", va="center", fontsize=SMALL - 1, zorder=4)
