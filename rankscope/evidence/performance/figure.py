"""Score against rank and against trained parameters, each rank at its best rate; and what each rank costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from rankscope.evidence.effective.figure import draw_rank_used
from rankscope.evidence.effective.measure import RunPoint
from rankscope.evidence.entries import Entry
from rankscope.evidence.performance.measure import Performance
from rankscope.inference import CONFIDENCE_LEVEL, Interval
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
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE

BEYOND = 0.6
"""Intervals are drawn up to this share of the scores' range beyond it: those of two seeds would fill the axes."""
APART = 1.05
"""Ratio of the places of two series at the same rank."""
Series = tuple[str, str, str, list[Entry]]
"""Name, colour, marker, entries in order of rank."""


def plot_rank_curve(result: Performance, points: Sequence[RunPoint] = ()) -> Figure:
    """Score against rank, against trained parameters, and, with ``points``, against effective rank.

    A line joins the means over seeds, with their intervals; small markers are seeds; a hollow marker is a best rate on
    the edge of those tried. Full fine-tuning is a line with its interval as a band, the untouched base a dotted
    line, with a band from its least to its largest score.
    """
    figure = new_figure(13 if points else 9, 4.2)
    panels = list(figure.subplots(1, 3 if points else 2, sharey=True, width_ratios=(1.25, 1, 1)[: 3 if points else 2]))
    left, right = panels[:2]
    for axes in panels:
        style_grid(axes)
        _references(axes, result)
    lines = _series(result)
    for i, line in enumerate(lines):
        # Side by side: at one rank the intervals of several series would cover each other.
        _draw(left, line, _rank, APART ** (i - (len(lines) - 1) / 2))
        _draw(right, line, _trainable)
    _marks(left, result)
    _without_rank(right, result)
    if points:
        draw_rank_used(panels[2], points, (result.method, result.targets))
    set_log2_axis(left)
    left.set_xticks(sorted({entry.rank for *_, entries in lines for entry in entries if entry.rank}))
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if _decades(result) < 2 else (1.0,)))
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    right.xaxis.set_minor_formatter(NullFormatter())
    left.set_xlabel("nominal rank r, each at its best rate")
    right.set_xlabel("trained parameters")
    left.set_ylabel(f"{result.metric} ({'higher' if result.higher_is_better else 'lower'} is better)")
    left.set_ylim(*_limits(result))
    if any(len(entry.scores) > 1 for entry in result.entries if entry.method != "base"):
        left.plot([], [], "|", color=GREY, markersize=9, label=f"{CONFIDENCE_LEVEL:.0%} interval of the mean")
        left.plot([], [], "_", color=GREY, markersize=7, label="a seed")
    if any(entry.edge for entry in result.entries):
        left.plot([], [], "o", color=GREY, markerfacecolor="white", markersize=MARKER, label="best rate on the edge")
    add_legend(figure, panels)
    return figure


def _decades(result: Performance) -> float:
    """How far the sizes of what is trained reach."""
    sizes = [entry.trainable for entry in result.entries if entry.trainable]
    return math.log10(max(sizes) / min(sizes)) if sizes else 0.0


def _rank(entry: Entry) -> float:
    return float(entry.rank or 0)


def _trainable(entry: Entry) -> float:
    return float(entry.trainable)


def _series(result: Performance) -> list[Series]:
    """The methods with ranks, LoRA's curve first."""
    groups: dict[tuple[str, str | None], list[Entry]] = {(result.method, result.targets): []}
    for entry in result.entries:
        if entry.rank is not None:
            groups.setdefault((entry.method, entry.targets), []).append(entry)
    return [
        (
            " ".join(filter(None, (find_method(method).title, targets))),
            SERIES_COLOURS[i % len(SERIES_COLOURS)],
            MARKERS[i % len(MARKERS)],
            sorted(entries, key=_rank),
        )
        for i, ((method, targets), entries) in enumerate(groups.items())
        if entries
    ]


def _draw(axes: Axes, line: Series, place: Callable[[Entry], float], aside: float = 1.0) -> None:
    name, colour, marker, entries = line
    x, means = [aside * place(entry) for entry in entries], [entry.score.value for entry in entries]
    axes.plot(x, means, color=colour, linewidth=1.3)
    axes.plot([], [], f"-{marker}", color=colour, linewidth=1.3, markersize=MARKER, label=f"{name}, mean")
    for entry in entries:
        _point(axes, entry, aside * place(entry), colour, marker)


def _point(axes: Axes, entry: Entry, x: float, colour: str, marker: str) -> None:
    """The mean with its interval, and its seeds in small."""
    fill = "white" if entry.edge else colour
    if len(entry.scores) > 1:
        axes.plot([x] * len(entry.scores), entry.scores, "_", color=colour, markersize=10, alpha=0.7)
    if entry.score.low is not None and entry.score.high is not None:
        axes.plot([x, x], [entry.score.low, entry.score.high], color=colour, linewidth=1, zorder=2)
    axes.plot([x], [entry.score.value], marker, color=colour, markerfacecolor=fill, markersize=MARKER, zorder=3)


def _references(axes: Axes, result: Performance) -> None:
    """Full fine-tuning, the untouched base, and the share of the gain that is asked for between them."""
    full, base = result.entry_of("full"), result.entry_of("base")
    if full:
        _level(axes, full.score, FULL_COLOUR, "-", FULL_NAME)
    if full and base and not result.missing:
        asked = base.score.value + GAIN_SHARE * (full.score.value - base.score.value)
        axes.axhline(asked, color=FULL_COLOUR, linewidth=1, linestyle="--", label=f"{GAIN_SHARE:.0%} of its gain")
    if base:
        # Gains are paired by seed: how far the bases of the seeds lie apart matters, not how well their mean is known.
        _level(axes, Interval(base.score.value, min(base.scores), max(base.scores)), DARK, ":", "untouched base")


def _level(axes: Axes, score: Interval, colour: str, style: str, name: str) -> None:
    if score.low is not None and score.high is not None and score.high > score.low:
        axes.axhspan(score.low, score.high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(score.value, color=colour, linewidth=1.2, linestyle=style, label=name)


def _marks(axes: Axes, result: Performance) -> None:
    """Where ranks are low, the smallest with the gain asked for, and the smallest equivalent to full fine-tuning."""
    if not result.lora_curve:
        axes.text(0.5, 0.5, "no LoRA run", transform=axes.transAxes, ha="center", fontsize=FONT_SIZE)
        return
    smallest = min(entry.rank or 1 for entry in result.lora_curve)
    low = LOW_RANK_SHARE * result.dim
    if result.dim:
        axes.axvspan(smallest / 1.25, low, color=GREY, alpha=0.12, linewidth=0, label=f"low rank: up to {low:g}")
    axes.set_xlim(smallest / 1.25, max(low, *(entry.rank or 1 for entry in result.entries)) * 1.25)
    marked: dict[int, list[str]] = {}
    if result.r90 and result.r90.rank is not None:
        marked.setdefault(result.r90.rank, []).append(f"r{100 * GAIN_SHARE:.0f}")
    if result.equivalent is not None:
        marked.setdefault(result.equivalent, []).append("r≈")
    for rank, names in marked.items():
        axes.axvline(rank, color=DARK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        said = f"{' = '.join(names)} = {rank}"
        axes.text(rank, 1.01, said, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=FONT_SIZE)


def _without_rank(axes: Axes, result: Performance) -> None:
    """Full fine-tuning and methods such as training biases alone are points; one of several sizes is a line."""
    methods: dict[str, list[Entry]] = {}
    for entry in sorted(result.entries, key=_trainable):
        if entry.rank is None and entry.method != "base":
            methods.setdefault(entry.method, []).append(entry)
    used = len(_series(result))
    for i, (method, entries) in enumerate(methods.items(), used):
        if method == "full":
            _point(axes, entries[0], _trainable(entries[0]), FULL_COLOUR, "D")
        elif len(entries) > 1:
            _draw(
                axes,
                (
                    find_method(method).title,
                    SERIES_COLOURS[i % len(SERIES_COLOURS)],
                    MARKERS[i % len(MARKERS)],
                    entries,
                ),
                _trainable,
            )
        else:
            place = (_trainable(entries[0]), entries[0].score.value)
            _point(axes, entries[0], place[0], DARK, "D")
            axes.annotate(
                find_method(method).title, place, (6, 0), textcoords="offset points", va="center", fontsize=FONT_SIZE
            )


def _limits(result: Performance) -> tuple[float, float]:
    scores = [score for entry in result.entries for score in entry.scores]
    low, high = min(scores), max(scores)
    spread = high - low or abs(high) or 1.0
    trained = [entry.score for entry in result.entries if entry.method != "base"]
    ends = [end for score in trained for end in (score.low, score.high) if end is not None]
    low = max(min([low, *ends]), low - BEYOND * spread)
    high = min(max([high, *ends]), high + BEYOND * spread)
    return low - 0.06 * spread, high + 0.06 * spread


# Costs


class CostMeasure(NamedTuple):
    """A cost as it is drawn. ``shared``: runs that are trained in one pass share it."""

    name: str
    unit: str
    of: Callable[[Entry], float | None]
    shared: bool


COSTS = (
    CostMeasure("seconds a step", "", lambda entry: entry.seconds_per_step, True),
    CostMeasure("peak memory", " in bytes", lambda entry: entry.peak_memory, True),
    CostMeasure("saved size", " in bytes", lambda entry: entry.saved_bytes, False),
)


def plot_costs(result: Performance) -> Figure:
    """What each rank costs, relative to full fine-tuning where there is one, and how it fits the training data.

    Hollow markers are of runs that were trained in one pass with others: the peak is that of all, the time a share.
    """
    figure = new_figure(9, 6.2)
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    for axes, cost in zip(panels, COSTS, strict=False):
        style_grid(axes)
        _cost(axes, result, cost)
    panels[2].set_yscale("log")
    _gaps(panels[3], result)
    for axes in panels[2:]:
        set_log2_axis(axes)
        axes.set_xticks(sorted({entry.rank for entry in result.entries if entry.rank}))
        axes.set_xlabel("nominal rank r, each at its best rate")
    add_legend(figure, panels[:1])
    return figure


def _cost(axes: Axes, result: Performance, cost: CostMeasure) -> None:
    full = result.entry_of("full")
    whole = cost.of(full) if full else None
    for name, colour, marker, entries in _series(result):
        known = [(entry, value / (whole or 1.0)) for entry in entries if (value := cost.of(entry)) is not None]
        axes.plot([_rank(entry) for entry, _ in known], [y for _, y in known], color=colour, linewidth=1.2)
        axes.plot([], [], f"-{marker}", color=colour, linewidth=1.2, markersize=MARKER, label=name)
        for entry, y in known:
            fill = "white" if cost.shared and entry.together > 1 else colour
            axes.plot([_rank(entry)], [y], marker, color=colour, markerfacecolor=fill, markersize=MARKER)
    if whole:
        axes.axhline(1.0, color=FULL_COLOUR, linewidth=1.2, label=FULL_NAME)
    if cost.shared and any(entry.together > 1 for entry in result.entries):
        axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="trained in one pass with other runs")
    said = f"{cost.name} / full fine-tuning" if whole else cost.name + cost.unit
    axes.set_ylabel(f"{said}\n(lower is better)")


def _gaps(axes: Axes, result: Performance) -> None:
    style_grid(axes)
    for _, colour, marker, entries in _series(result):
        known = [(_rank(entry), entry.gap) for entry in entries if entry.gap is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], f"-{marker}", color=colour, markersize=MARKER)
    full = result.entry_of("full")
    if full and full.gap is not None:
        axes.axhline(full.gap, color=FULL_COLOUR, linewidth=1.2)
    axes.set_ylabel("training loss − test loss\n(lower: fits its training data more)")
    if all(entry.gap is None for entry in result.entries):
        axes.text(0.5, 0.5, "no loss of both kinds", transform=axes.transAxes, ha="center", fontsize=FONT_SIZE)
