"""Score against effective rank, a point a run; and stable rank against the rank that was given."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from rankscope.evidence.effective.measure import EffectiveRanks, RankMeasures, RunPoint
from rankscope.plots.figure import (
    DARK,
    FONT_SIZE,
    FULL_COLOUR,
    FULL_NAME,
    GREY,
    MARKER,
    MARKERS,
    SERIES_COLOURS,
    add_legend,
    new_figure,
    set_log2_axis,
    style_grid,
)
from rankscope.train.method_table import find_method
from rankscope.train.results import DEFAULT_MEASURE
from rankscope.verdict import format_interval

FAINT = 3.5  # points, of runs at other rates
WORSE = 0.35
"""Scores that are worse than the base and the best runs by more than this share of their range stand on the edge."""


def plot_effective(result: EffectiveRanks) -> Figure:
    """Score against entropy rank, and stable rank against r.

    Left: strong, the runs at the best rate of their label, joined through the means of each rank; faint, those at other
    rates; full fine-tuning is a diamond, and what a noise matrix of its shapes would read a dashed line. Right: LoRA's
    runs at their best rates with the fit, the line stable rank = r, and what random factors would have.
    """
    figure = new_figure(9, 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _scores(left, result)
    _growth(right, result)
    add_legend(figure, (left, right))
    return figure


def _scores(axes: Axes, result: EffectiveRanks) -> None:
    style_grid(axes)
    axes.set_ylabel(f"{result.metric} ({'higher' if result.higher_is_better else 'lower'} is better)")
    low, high = _limits(result)
    axes.set_ylim(low, high)
    if result.base is not None:
        axes.axhline(result.base, color=DARK, linestyle=":", linewidth=1.2, label="untouched base")
    draw_rank_used(axes, result.points, (result.method, result.targets))
    others = [point for point in result.points if not point.best]
    if any(low <= point.score <= high for point in others):
        axes.plot([], [], "o", color=GREY, markersize=FAINT, alpha=0.5, label="a run at another rate")
    if beyond := [point for point in others if not low <= point.score <= high]:
        edge = low if result.higher_is_better else high
        axes.plot(
            [point.ranks[DEFAULT_MEASURE] for point in beyond],
            [edge] * len(beyond),
            "v" if result.higher_is_better else "^",
            color=GREY,
            markersize=MARKER,
            clip_on=False,
            label=f"worse than shown ({len(beyond)} runs)",
        )
    if any(point.best and point.edge for point in result.points):
        axes.plot([], [], "o", color=GREY, markerfacecolor="white", markersize=MARKER, label="best rate on the edge")
    if result.noise:
        axes.axvline(
            result.noise[DEFAULT_MEASURE],
            color=FULL_COLOUR,
            linestyle="--",
            linewidth=1.1,
            label="noise of the same shapes",
        )


def draw_rank_used(axes: Axes, points: Sequence[RunPoint], first: tuple[str, str | None]) -> None:
    """Score against effective rank on these axes, a marker for each run.

    The runs of a method at their best rates are joined through the means of each rank, and each mean has its rank
    beside it; of several methods only the first and the last mean have it. A run whose best rate lies on the edge of
    those tried is hollow.

    Args:
        first: method and targets of the line that comes first.
    """
    set_log2_axis(axes)
    axes.set_xlabel(f"effective rank of the update ({DEFAULT_MEASURE.replace('_', ' ')})")
    series = _series(points, first)
    alone = sum(any(point.rank for point in group) for *_, group in series) == 1
    for name, colour, marker, group in series:
        _runs(axes, name, colour, marker, group)
        means = _means_of_ranks(group)
        for rank, x, y in means if alone else [*means[:1], *means[1:][-1:]]:
            place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": colour}
            axes.annotate(str(rank), (x, y), (0, MARKER), fontsize=FONT_SIZE - 1, **place)


def _means_of_ranks(points: Sequence[RunPoint]) -> list[tuple[int, float, float]]:
    """Each rank with the mean effective rank and the mean score of its runs at the best rate."""
    best = [point for point in points if point.best]
    groups = {rank: [p for p in best if p.rank == rank] for rank in sorted({p.rank for p in best if p.rank})}
    return [
        (
            rank,
            statistics.fmean(point.ranks[DEFAULT_MEASURE] for point in same),
            statistics.fmean(point.score for point in same),
        )
        for rank, same in groups.items()
    ]


def _series(points: Sequence[RunPoint], first: tuple[str, str | None]) -> list[tuple[str, str, str, list[RunPoint]]]:
    """Name, colour, marker and runs of each method, that of ``first`` before the others."""
    groups: dict[tuple[str, str | None], list[RunPoint]] = {first: []}
    for point in points:
        groups.setdefault((point.method, point.targets), []).append(point)
    ranked = [key for key in groups if key[0] != "full"]
    styles = {key: (SERIES_COLOURS[i % len(SERIES_COLOURS)], MARKERS[i % len(MARKERS)]) for i, key in enumerate(ranked)}
    return [
        (
            " ".join(filter(None, (find_method(key[0]).title, key[1]))),
            *styles.get(key, (FULL_COLOUR, "D")),
            points,
        )
        for key, points in groups.items()
        if points
    ]


def _runs(axes: Axes, name: str, colour: str, marker: str, points: Sequence[RunPoint]) -> None:
    best = [point for point in points if point.best]
    others = [point for point in points if not point.best]
    x, y = [point.ranks[DEFAULT_MEASURE] for point in others], [point.score for point in others]
    axes.plot(x, y, marker, color=colour, markersize=FAINT, alpha=0.4, markeredgewidth=0)
    for edge in (False, True):
        some = [point for point in best if point.edge is edge]
        fill = "white" if edge else colour
        x, y = [point.ranks[DEFAULT_MEASURE] for point in some], [point.score for point in some]
        axes.plot(x, y, marker, color=colour, markerfacecolor=fill, markersize=MARKER)
    means = _means_of_ranks(points)
    axes.plot([x for _, x, _ in means], [y for *_, y in means], color=colour, linewidth=1.2)
    form, label = (marker, name) if name == FULL_NAME else (f"-{marker}", f"{name}, mean")
    axes.plot([], [], form, color=colour, linewidth=1.2, markersize=MARKER, label=label)


def _limits(result: EffectiveRanks) -> tuple[float, float]:
    """Around the best runs and the base: a rate that was much too high would leave no room for them."""
    scores = [point.score for point in result.points if point.best]
    scores += [] if result.base is None else [result.base]
    low, high = min(scores), max(scores)
    spread = high - low or abs(high) or 1.0
    everything = [point.score for point in result.points] + scores
    low, high = max(min(everything), low - WORSE * spread), min(max(everything), high + WORSE * spread)
    return low - 0.05 * spread, high + 0.05 * spread


def _growth(axes: Axes, result: EffectiveRanks) -> None:
    style_grid(axes)
    set_log2_axis(axes)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("nominal rank r, each at its best rate")
    axes.set_ylabel("stable rank of the update")
    ranks = [one.rank for one in result.curve]
    axes.set_xticks(ranks)
    ends = [min(ranks), max(ranks)]
    axes.plot(ends, ends, color=DARK, linewidth=1, linestyle="-.", label="stable rank = r")
    axes.plot(
        ranks,
        [one.random["stable_rank"] for one in result.curve],
        color=GREY,
        linewidth=1.1,
        linestyle="--",
        label="random factors",
    )
    for one in result.curve:
        _stable(axes, result, one)
    if growth := result.growth:
        fitted = [growth.factor * rank**growth.beta.value for rank in growth.ranks]
        axes.plot(
            growth.ranks,
            fitted,
            color=SERIES_COLOURS[0],
            linewidth=1.3,
            label=f"fit: β = {format_interval(growth.beta, 2)}",
        )


def _stable(axes: Axes, result: EffectiveRanks, one: RankMeasures) -> None:
    """The runs of a rank; hollow where it is no part of the fit."""
    fitted = result.growth is not None and one.rank in result.growth.ranks
    values = [
        point.ranks["stable_rank"]
        for point in result.points
        if point.best and point.rank == one.rank and (point.method, point.targets) == (result.method, result.targets)
    ]
    fill = SERIES_COLOURS[0] if fitted else "white"
    axes.plot([one.rank] * len(values), values, "o", color=SERIES_COLOURS[0], markerfacecolor=fill, markersize=MARKER)
