"""Score of the tuned model against the rank that its update is cut to, and which kinds of module need rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rankscope.evidence.truncation.measure import KindPoint, Truncation, TruncationCurve, TruncationPoint
from rankscope.plots.figure import COLOURS, DARK, FONT_SIZE, FULL_COLOUR, FULL_NAME, GREY, new_figure, style_grid
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE

LORA, REMOVED = COLOURS[0], COLOURS[3]
ZERO = 0.4
"""Where k = 0 stands on the logarithmic axis."""
BREAK = (0.6, 0.66)
"""Where the axis is struck through between 0 and 1."""
MOST_KINDS = 12
MOST_TICKS = 9


def plot_truncation(result: Truncation) -> Figure:
    """Left: the score against k, of the best rank k, of the update without it, and of LoRA's best rank k.

    Lines are means over seeds, bands the least to the largest. The ring is the smallest k that keeps ``GAIN`` of the
    gain. Right: the share of the gain that is kept where one kind of module alone is cut, for one seed.
    """
    figure = new_figure(9, 4.4)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _scores(left, result)
    _kinds(right, result.kinds, result.kinds_seed)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=FONT_SIZE, frameon=False
    )
    return figure


def _scores(axes: Axes, result: Truncation) -> None:
    style_grid(axes)
    _references(axes, result)
    _curve(axes, result.full.kept, FULL_COLOUR, "o", f"{FULL_NAME}: best rank k")
    _curve(axes, result.full.removed, REMOVED, "v", f"{FULL_NAME} without its best rank k")
    if result.lora is not None:
        _curve(axes, result.lora.kept, LORA, "s", f"{result.lora.name}: best rank k")
    for cut, colour in ((result.full, FULL_COLOUR), *([(result.lora, LORA)] if result.lora else [])):
        _mark(axes, cut, colour)
    _axis(axes, [point.k for point in result.full.kept], result.full.dim)
    way = "higher" if result.higher_is_better else "lower"
    axes.set_ylabel(f"{result.metric} ({way} is better)", fontsize=FONT_SIZE + 1)
    axes.set_xlabel("k: rank kept, or removed, in every matrix", fontsize=FONT_SIZE + 1)


def _references(axes: Axes, result: Truncation) -> None:
    """The base, the whole update, and the line where ``GAIN`` of the gain is reached."""
    base, whole = result.base.value, statistics.fmean(result.full.recorded)
    axes.axhline(base, color=DARK, linestyle=":", linewidth=1.1, label="untouched base")
    axes.axhspan(min(result.full.recorded), max(result.full.recorded), color=FULL_COLOUR, alpha=0.18, linewidth=0)
    axes.axhline(whole, color=FULL_COLOUR, linestyle="--", linewidth=1, label="whole update, as its run recorded")
    if result.full.gain.value > 0:
        line = base + GAIN_SHARE * (whole - base)
        axes.axhline(line, color=GREY, linestyle=(0, (5, 2)), linewidth=1, label=f"{GAIN_SHARE:.0%} of its gain")


def _place(k: int) -> float:
    return float(k) if k else ZERO


def _curve(axes: Axes, points: Sequence[TruncationPoint], colour: str, marker: str, label: str) -> None:
    x = [_place(point.k) for point in points]
    axes.plot(x, [point.score.value for point in points], color=colour, linewidth=1.6)
    axes.plot(x, [point.score.value for point in points], marker, color=colour, markersize=4)
    low, high = [min(point.scores) for point in points], [max(point.scores) for point in points]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot([], [], color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)


def _mark(axes: Axes, cut: TruncationCurve, colour: str) -> None:
    """A ring at the smallest k that keeps enough, and a line down to the axis."""
    for point in cut.kept:
        if point.k == cut.k90.rank:
            place = _place(point.k)
            axes.plot([place], [point.score.value], "o", color=colour, markersize=11, markerfacecolor="none")
            axes.axvline(place, color=colour, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)


def _axis(axes: Axes, ranks: Sequence[int], dim: int) -> None:
    """A logarithmic axis in k with 0 at its left end, cut off from the rest; shaded: what is called low."""
    axes.set_xscale("log", base=2)
    shown = [0, *(rank for rank in ranks if rank and (rank & (rank - 1) == 0 or rank == ranks[-1]))]
    while len(shown) > MOST_TICKS:
        shown = [0, *shown[1:-1:2], shown[-1]]
    if len(shown) > 2 and shown[-1] < 2 * shown[-2]:
        del shown[-2]  # their labels would touch
    axes.xaxis.set_major_locator(FixedLocator([_place(rank) for rank in shown]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value < 1 else f"{value:g}"))
    left, right = ZERO / 1.3, ranks[-1] * 1.15
    axes.set_xlim(left, right)
    if LOW_RANK_SHARE * dim > ZERO:
        axes.axvspan(
            left,
            LOW_RANK_SHARE * dim,
            color=GREY,
            alpha=0.1,
            linewidth=0,
            label=f"low: k up to {LOW_RANK_SHARE * dim:g}",
            zorder=0,
        )
    for stroke in BREAK:  # across the axis: no distance on it leads to zero
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": FONT_SIZE + 1, "annotation_clip": False}
        axes.annotate("/", (stroke, 0.0), xycoords=("data", "axes fraction"), **style)


def _kinds(axes: Axes, kinds: Sequence[KindPoint], seed: int) -> None:
    style_grid(axes)
    names = _order_kinds(kinds)
    ranks = sorted({point.k for point in kinds})
    colours = {k: to_hex(colormaps["YlGnBu"](0.35 + 0.6 * i / max(len(ranks) - 1, 1))) for i, k in enumerate(ranks)}
    for height, name in enumerate(names):
        own = [(point.share, point.k) for point in kinds if point.kind == name and point.share is not None]
        axes.plot([share for share, _ in own], [height] * len(own), color=GREY, linewidth=0.8, zorder=1)
        for share, k in own:
            axes.plot([share], [height], "o", color=colours[k], markersize=6, zorder=2 + k)
    shares = [GAIN_SHARE, 1.0, *(point.share for point in kinds if point.share is not None)]
    room = 0.05 * (max(shares) - min(shares))
    axes.set_xlim(min(shares) - room, max(shares) + room)
    axes.set_yticks(range(len(names)), [f"{name} × {_count(kinds, name)}" for name in names], fontsize=FONT_SIZE)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(1, color=FULL_COLOUR, linestyle="--", linewidth=1)
    axes.axvline(GAIN_SHARE, color=GREY, linestyle=(0, (5, 2)), linewidth=1)
    axes.set_xlabel(f"share of the gain kept (seed {seed}; higher is better)", fontsize=FONT_SIZE)
    axes.set_ylabel("kind of module × matrices", fontsize=FONT_SIZE + 1)
    handles = [Line2D([], [], color=colours[k], marker="o", linestyle="none", label=f"k = {k}") for k in ranks]
    title = "one kind alone cut to rank k, all else whole"
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.4, 1.0), "ncols": 4, "columnspacing": 1.0}
    axes.legend(handles=handles, title=title, fontsize=FONT_SIZE, title_fontsize=FONT_SIZE + 1, frameon=False, **place)


def _order_kinds(kinds: Sequence[KindPoint]) -> list[str]:
    """Those that lose most without any rank first, at most ``MOST_KINDS``."""
    without = {point.kind: point.share for point in kinds if point.k == 0}
    return sorted(without, key=lambda name: without[name] or 0.0)[:MOST_KINDS]


def _count(kinds: Sequence[KindPoint], name: str) -> int:
    return next(point.matrices for point in kinds if point.kind == name)
