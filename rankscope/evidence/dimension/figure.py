"""Share of full fine-tuning's gain, and effective rank, against how many numbers were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rankscope.evidence.dimension.measure import SMALL_SHARE, DimensionCurve, DimensionPoint, IntrinsicDimension
from rankscope.plots.figure import COLOURS, GREY, new_figure, style_grid
from rankscope.plots.figure import FONT_SIZE as TYPE
from rankscope.train.method_table import find_method
from rankscope.verdict import GAIN_SHARE

FULL = COLOURS[1]
LOWEST, HIGHEST = -0.25, 1.25
"""Shares of the gain that the axis holds at most: intervals of two seeds would leave nothing to see."""


def plot_dimension(result: IntrinsicDimension) -> Figure:
    """Random subspaces, LoRA and full fine-tuning on one axis of trained numbers: what they gain, what rank they use.

    Bars are 95 % intervals over seeds. A size whose best rate lies at an end of those tried is hollow.
    """
    figure = new_figure(9, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for axes in (left, right):
        style_grid(axes)
        _numbers_axis(axes, result)
    _gain(left, result)
    _rank(right, result)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=TYPE, frameon=False)
    return figure


def _numbers_axis(axes: Axes, result: IntrinsicDimension) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("numbers trained", fontsize=TYPE + 1)
    least = min(size.trained for curve in result.curves for size in curve.sizes)
    axes.set_xlim(least / 1.8, result.parameters * 1.8)


def _short(value: float) -> str:
    """10, 1k, 100k, 1M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _style(curve: DimensionCurve) -> tuple[str, str]:
    method = find_method(curve.method)
    return COLOURS[method.colour % len(COLOURS)], method.marker


# What they gain


def _gain(axes: Axes, result: IntrinsicDimension) -> None:
    axes.set_title("gain over the base", fontsize=TYPE + 2)
    axes.set_ylabel("share of full fine-tuning's gain", fontsize=TYPE + 1)
    way = "higher" if result.higher_is_better else "lower"
    functions: Any = (result.score_at, result.share_at)
    other = axes.secondary_yaxis("right", functions=functions)
    other.set_ylabel(f"{result.metric} ({way} is better)", fontsize=TYPE + 1)
    other.tick_params(labelsize=TYPE)
    axes.axhline(0, color="#222222", linestyle=":", linewidth=1.1, label="untouched base")
    axes.axhline(GAIN_SHARE, color=GREY, linestyle="--", linewidth=1, label=f"{GAIN_SHARE:.0%} of the gain")
    axes.axvline(
        SMALL_SHARE * result.parameters,
        color=GREY,
        linestyle=":",
        linewidth=1,
        label=f"{SMALL_SHARE:.0%} of all numbers",
    )
    if result.full.low is not None and result.full.high is not None:
        ends = sorted(result.share_at(end) for end in (result.full.low, result.full.high))
        axes.axhspan(max(ends[0], LOWEST), min(ends[1], HIGHEST), color=FULL, alpha=0.15, linewidth=0)
    axes.plot([result.parameters], [1], "D", color=FULL, markersize=6, label="full fine-tuning")
    for curve in result.curves:
        _shares(axes, curve)
    shares = [size.share.value for curve in result.curves for size in curve.sizes]
    axes.set_ylim(max(LOWEST, min(-0.06, *shares) - 0.04), min(HIGHEST, max(1.0, *shares) + 0.15))


def _shares(axes: Axes, curve: DimensionCurve) -> None:
    colour, marker = _style(curve)
    x, y = [size.trained for size in curve.sizes], [size.share.value for size in curve.sizes]
    axes.plot(x, y, f"-{marker}", color=colour, linewidth=1.2, markersize=4.5, label=curve.name)
    for size in curve.sizes:
        if size.share.low is not None and size.share.high is not None:
            axes.vlines(size.trained, size.share.low, size.share.high, color=colour, linewidth=1)
    _hollow(axes, curve, [size.share.value for size in curve.sizes])
    if not curve.is_random:
        _name_ends(axes, curve, [size.share.value for size in curve.sizes])


def _hollow(axes: Axes, curve: DimensionCurve, y: Sequence[float | None]) -> None:
    colour, marker = _style(curve)
    for size, value in zip(curve.sizes, y, strict=True):
        if size.edge is not None and value is not None:
            axes.plot(size.trained, value, marker, color=colour, markerfacecolor="white", markersize=4.5)


def _name_ends(axes: Axes, curve: DimensionCurve, y: Sequence[float]) -> None:
    """The ranks at both ends of LoRA's line: its x axis is no rank."""
    ends: list[tuple[DimensionPoint, float]] = list(zip(curve.sizes, y, strict=True))
    for size, value in (ends[0], ends[-1])[: len(ends)]:
        axes.annotate(
            f"r = {size.size}",
            (size.trained, value),
            xytext=(-6, 5),
            textcoords="offset points",
            ha="right",
            color=_style(curve)[0],
            fontsize=TYPE,
        )


# What rank they use


def _rank(axes: Axes, result: IntrinsicDimension) -> None:
    axes.set_title("rank of the update", fontsize=TYPE + 2)
    axes.set_ylabel(f"{result.measure.replace('_', ' ')}, median over layers", fontsize=TYPE + 1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(result.noise_rank, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        f"noise of these shapes: {result.noise_rank:.0f}",
        (0.02, result.noise_rank),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=TYPE,
        color="#555555",
    )
    if result.full_rank is not None:
        axes.plot([result.parameters], [result.full_rank], "D", color=FULL, markersize=6)
    for curve in result.curves:
        colour, marker = _style(curve)
        known = [(size.trained, size.rank) for size in curve.sizes if size.rank is not None]
        if known:
            axes.plot(*zip(*known, strict=True), f"-{marker}", color=colour, linewidth=1.2, markersize=4.5)
            _hollow(axes, curve, [size.rank for size in curve.sizes])
    ranks = [size.rank for curve in result.curves for size in curve.sizes if size.rank] + [result.full_rank or 1.0]
    axes.set_ylim(min(ranks) / 1.5, 2 * result.noise_rank)
