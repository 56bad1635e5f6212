"""How well runs did, against the rank they were given and the rank their updates really have."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankscope.errors import ConfigError
from rankscope.plots.figure import COLOURS, FONT_SIZE, GREY, new_figure, set_log2_axis, style_grid

FULL_COLOUR = COLOURS[1]
FULL_NAME = "full fine-tuning"
SERIES_COLOURS = tuple(colour for colour in COLOURS if colour != FULL_COLOUR)
MARKER, SMALLER = 5, 3.5  # points; the latter where seeds would cover each other
MARKERS = "os^vPX<>"  # without the D of full fine-tuning
WIDE = 16
"""Largest over smallest effective rank from which that axis is logarithmic."""
LEGEND_WIDTH = 145  # letters of a legend that fit below the panels
HANDLE = 7  # letters' worth of a legend's handle and the space around it
EDGE_NAME = "best rate at the end of the grid (!)"


@dataclass(frozen=True)
class PerformancePoint:
    """One run at the best rate: its rank as asked for, its effective rank, and the score it reached.

    ``method`` "full" is full fine-tuning. ``nominal_rank`` is None for it and for methods without a rank, such as
    training biases; ``effective_rank`` is None where a run changes no matrix. ``series`` names the line that the run
    belongs to. With ``edge`` the best rate is the lowest or the highest that was tried: the true best may lie beyond.
    """

    label: str
    method: str
    nominal_rank: int | None
    effective_rank: float | None
    score: float
    seed: int
    series: str = "LoRA"
    edge: bool = False


class RankMean(NamedTuple):
    """The runs of one rank: means over seeds; ``effective`` is None where a run has none."""

    rank: int
    effective: float | None
    score: float
    edge: bool


class PlotSeries(NamedTuple):
    """One series as it is drawn."""

    name: str
    colour: str
    marker: str
    runs: list[PerformancePoint]

    def means(self) -> list[RankMean]:
        """In order of rank."""
        return list(self._means())

    def _means(self) -> Iterator[RankMean]:
        for rank in sorted({run.nominal_rank for run in self.runs if run.nominal_rank is not None}):
            same = [run for run in self.runs if run.nominal_rank == rank]
            effective = [run.effective_rank for run in same if run.effective_rank is not None]
            yield RankMean(
                rank,
                statistics.fmean(effective) if len(effective) == len(same) else None,
                statistics.fmean(run.score for run in same),
                any(run.edge for run in same),
            )


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

    The runs of a series are joined by a line through the means of each rank, in order of rank; full fine-tuning is a
    marker of its own and a band from its least to its largest score. Methods without a rank are horizontal lines in
    the left panel. A run whose rate lies at an end of those tried is hollow, its rank marked with "!".

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
    lines, full = _lines(points), [point for point in points if point.method == "full"]
    for axes in (left, right):
        style_grid(axes)
        _full_band(axes, full)
        if baseline is not None:
            axes.axhline(baseline, color="#222222", linestyle=":", linewidth=1.1, label="untouched base")
    _against_nominal(left, lines)
    _without_rank(left, points)
    _against_effective(right, lines, full, measure)
    scores = [point.score for point in points] + ([] if baseline is None else [baseline])
    room = 0.12 * (max(scores) - min(scores) or abs(scores[0]) or 1.0)
    left.set_ylim(min(scores) - room, max(scores) + room)
    left.set_ylabel(f"{metric} ({'higher' if higher_is_better else 'lower'} is better)")
    if any(point.edge for point in points):
        right.plot([], [], "o", color=GREY, markerfacecolor="white", markersize=5, label=EDGE_NAME)
    _legend(figure, right)
    return figure


def _lines(points: Iterable[PerformancePoint]) -> list[PlotSeries]:
    """The series in the order in which they come, each with its colour and marker."""
    series: dict[str, list[PerformancePoint]] = {}
    for point in points:
        if point.nominal_rank is not None:
            series.setdefault(point.series, []).append(point)
    return [
        PlotSeries(name, SERIES_COLOURS[i % len(SERIES_COLOURS)], MARKERS[i % len(MARKERS)], runs)
        for i, (name, runs) in enumerate(series.items())
    ]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    fitting = [n for n in range(1, len(labels) + 1) if _legend_width(labels, n) <= LEGEND_WIDTH]
    columns = max(fitting, default=1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=FONT_SIZE, frameon=False)


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """In letters; a legend is filled column by column, the first ones longer by one."""
    short, longer = divmod(len(labels), columns)
    sizes = [short + (i < longer) for i in range(columns)]
    ends = [sum(sizes[: i + 1]) for i in range(columns)]
    return sum(
        max(len(label) for label in labels[end - size : end]) + HANDLE for end, size in zip(ends, sizes, strict=True)
    )


def _full_band(axes: Axes, full: Sequence[PerformancePoint]) -> None:
    scores = [point.score for point in full]
    if scores:
        axes.axhspan(min(scores), max(scores), color=FULL_COLOUR, alpha=0.18, linewidth=0)
        axes.axhline(
            statistics.fmean(scores), color=FULL_COLOUR, linewidth=1, linestyle="--", label=f"{FULL_NAME}, mean"
        )


def _runs(axes: Axes, line: PlotSeries, places: Sequence[tuple[float, PerformancePoint]]) -> None:
    """A marker for each run at its place on the x axis, hollow where its rate lies at an end."""
    size = SMALLER if len({run.seed for run in line.runs}) > 1 else MARKER
    for edge in (False, True):
        some = [(x, run.score) for x, run in places if run.edge is edge]
        if some:
            fill = "white" if edge else line.colour
            x, y = zip(*some, strict=True)
            axes.plot(x, y, line.marker, color=line.colour, markerfacecolor=fill, markersize=size)


def _against_nominal(axes: Axes, lines: Sequence[PlotSeries]) -> None:
    axes.set_xlabel("nominal rank r")
    axes.set_title("rank given", fontsize=FONT_SIZE + 2)
    set_log2_axis(axes)
    if not lines:
        axes.text(0.5, 0.5, "no LoRA run", transform=axes.transAxes, ha="center")
        axes.set_xticks([])
        return
    for line in lines:
        means = line.means()
        axes.plot([mean.rank for mean in means], [mean.score for mean in means], color=line.colour, linewidth=1.2)
        _runs(axes, line, [(float(run.nominal_rank or 0), run) for run in line.runs])
    axes.set_xticks(sorted({mean.rank for line in lines for mean in line.means()}))


def _without_rank(axes: Axes, points: Iterable[PerformancePoint]) -> None:
    """Methods such as training biases alone: the mean over seeds as a line with its name."""
    methods: dict[str, list[PerformancePoint]] = {}
    for point in points:
        if point.nominal_rank is None and point.method != "full":
            methods.setdefault(point.series, []).append(point)
    for name, runs in methods.items():
        score = statistics.fmean(run.score for run in runs)
        axes.axhline(score, color=GREY, linewidth=1, linestyle="-.")
        mark = " !" if any(run.edge for run in runs) else ""
        place = axes.get_yaxis_transform()
        axes.text(
            0.99, score, name + mark, transform=place, ha="right", va="bottom", fontsize=FONT_SIZE, color="#555555"
        )


def _against_effective(axes: Axes, lines: Sequence[PlotSeries], full: Sequence[PerformancePoint], measure: str) -> None:
    axes.set_xlabel(f"effective rank of the update: {measure.replace('_', ' ')}")
    axes.set_title("rank used", fontsize=FONT_SIZE + 2)
    everything = [*lines, PlotSeries(FULL_NAME, FULL_COLOUR, "D", list(full))]
    ranks = [rank for line in everything for rank, _ in _runs_with_effective_rank(line) if rank > 0]
    if ranks and max(ranks) / min(ranks) > WIDE:
        set_log2_axis(axes)
    for line in everything:
        _runs(axes, line, _runs_with_effective_rank(line))
        if line.runs:
            joined = len(lines) > 1 and line in lines
            name, form = (line.name, f"-{line.marker}") if joined else (f"{line.name}, a run", line.marker)
            axes.plot([], [], form, color=line.colour, linewidth=1.2, markersize=MARKER, label=name)
    for line in lines:
        (_draw_ringed_means if len(lines) == 1 else _draw_plain_means)(axes, line)


def _runs_with_effective_rank(line: PlotSeries) -> list[tuple[float, PerformancePoint]]:
    """The runs that have an effective rank, each with it."""
    return [(run.effective_rank, run) for run in line.runs if run.effective_rank is not None]


def _ranks_used(line: PlotSeries) -> list[tuple[str, float, float]]:
    """The rank as it is written, the mean effective rank and the mean score; "!" marks a rate at an end."""
    measured = [(mean, mean.effective) for mean in line.means()]
    return [(f"{m.rank}{'!' if m.edge else ''}", x, m.score) for m, x in measured if x is not None]


def _draw_ringed_means(axes: Axes, line: PlotSeries) -> None:
    """A line through the means, each a ring with the rank inside."""
    means = _ranks_used(line)
    x, y = [effective for _, effective, _ in means], [score for _, _, score in means]
    axes.plot(x, y, color=line.colour, linewidth=1.2)
    axes.plot(x, y, line.marker, color=line.colour, markerfacecolor="white", markersize=14, zorder=3)
    ring = f"{line.name}, mean of the rank inside"
    axes.plot([], [], line.marker, color=line.colour, markerfacecolor="white", markersize=9, label=ring)
    for rank, effective, score in means:
        axes.annotate(rank, (effective, score), ha="center", va="center", fontsize=FONT_SIZE - 1, zorder=4)


def _draw_plain_means(axes: Axes, line: PlotSeries) -> None:
    """A line through the means, with the rank at its ends: several series leave no room for more."""
    means = _ranks_used(line)
    axes.plot([x for _, x, _ in means], [y for _, _, y in means], color=line.colour, linewidth=1.2)
    for side, (rank, effective, score) in [(-1, mean) for mean in means[:1]] + [(1, mean) for mean in means[1:][-1:]]:
        axes.annotate(
            rank,
            (effective, score),
            xytext=(side * MARKER, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            color=line.colour,
            fontsize=FONT_SIZE - 1,
        )
