"""LoRA's update against the one of full fine-tuning, rank by rank, beside the best of each rank and chance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rankscope.evidence.agreement.measure import EFFICIENCY_THRESHOLD, Agreement, RankAgreement
from rankscope.inference import Interval
from rankscope.plots.figure import COLOURS, FONT_SIZE, GREY, new_figure, set_log2_axis, style_grid

LORA, FULL, BEST, RIGHT = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3]
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
LEAST_ERROR = 0.01
"""Smaller errors are drawn here: a floor of zero has no place on a logarithmic axis."""


class LineStyle(NamedTuple):
    """How one quantity is drawn."""

    label: str
    colour: str
    style: str
    marker: str = ""


def plot_agreement(result: Agreement, figure: Figure | None = None) -> Figure:
    """Relative error, cosine, efficiency and captured energy against r; bars are 95 % intervals.

    Error and cosine are of all layers together with intervals over seeds, efficiency and captured energy medians over
    layers with intervals over layers. "Another full fine-tuning" is the full update of another seed cut to rank r.

    Args:
        result: from ``measure_agreement``.
        figure: an empty one to draw on; None makes one.
    """
    figure = figure or new_figure(9, 6.8)
    grid = figure.subplots(2, 2, sharex=True)
    panels: list[Axes] = list(chain.from_iterable(grid))
    for panel, draw in zip(panels, (_errors, _cosines, _efficiencies, _draw_captured), strict=True):
        style_grid(panel)
        draw(panel, result)
        panel.legend(fontsize=FONT_SIZE, loc="best", edgecolor="none", framealpha=0.85)
    set_log2_axis(panels[0])
    panels[0].set_xticks([one.rank for one in result.ranks])
    for panel in panels[2:]:
        panel.set_xlabel("nominal rank r", fontsize=FONT_SIZE + 1)
    return figure


def _errors(axes: Axes, result: Agreement) -> None:
    axes.set_yscale("log")
    _line(
        axes, result.ranks, [one.total.achieved for one in result.ranks], LineStyle("LoRA, as it is", LORA, "--", "s")
    )
    _line(
        axes, result.ranks, [one.total.scaled for one in result.ranks], LineStyle("LoRA, best multiple", LORA, "-", "o")
    )
    again = [one.total.scaled for one in result.repeat]
    _line(axes, result.repeat, again, LineStyle("another full fine-tuning, best multiple", FULL, "-.", "^"))
    _line(
        axes,
        result.ranks,
        [one.total.floor for one in result.ranks],
        LineStyle("floor: best of this rank", BEST, "-", "D"),
    )
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":", label="no update at all")
    axes.yaxis.set_major_locator(FixedLocator(ERRORS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.75)  # the legend's place
    axes.set_ylabel("distance to the full update over its norm\n(lower is closer)", fontsize=FONT_SIZE)


def _cosines(axes: Axes, result: Agreement) -> None:
    _line(
        axes,
        result.ranks,
        [_best(one.total.floor) for one in result.ranks],
        LineStyle("best of this rank", BEST, "-", "D"),
    )
    again = [one.total.cosine for one in result.repeat]
    _line(axes, result.repeat, again, LineStyle("another full fine-tuning", FULL, "-.", "^"))
    _line(axes, result.ranks, [one.total.cosine for one in result.ranks], LineStyle("LoRA", LORA, "-", "o"))
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":", label="by chance")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]) - 0.03, 1.03)
    axes.set_ylabel("cosine to the full update\n(higher is closer)", fontsize=FONT_SIZE)


def _efficiencies(axes: Axes, result: Agreement) -> None:
    again = [one.efficiency for one in result.repeat]
    _line(axes, result.repeat, again, LineStyle("another full fine-tuning", FULL, "-.", "^"))
    _line(axes, result.ranks, [one.efficiency for one in result.ranks], LineStyle("LoRA", LORA, "-", "o"))
    axes.axhline(
        EFFICIENCY_THRESHOLD,
        color="#444444",
        linewidth=1,
        linestyle="--",
        label=f"line of the verdict, {EFFICIENCY_THRESHOLD:g}",
    )
    axes.axhline(0, color=GREY, linewidth=1, linestyle=":", label="by chance")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("explained, of what rank r could\n(higher is closer)", fontsize=FONT_SIZE)


def _draw_captured(axes: Axes, result: Agreement) -> None:
    sides = (
        ("output space (left)", [(one.left, one.left_chance) for one in result.ranks], LineStyle("", LORA, "-", "o")),
        (
            "input space (right)",
            [(one.right, one.right_chance) for one in result.ranks],
            LineStyle("", RIGHT, "--", "v"),
        ),
    )
    best = [_best_captured_share(one.total.floor) for one in result.ranks]
    _line(axes, result.ranks, best, LineStyle("best of this rank", BEST, "-", "D"))
    for name, values, line in sides:
        _line(axes, result.ranks, [value for value, _ in values], line._replace(label=f"LoRA's {name}"))
        chance = [Interval(level) for _, level in values]
        _line(axes, result.ranks, chance, LineStyle(f"random {name}", line.colour, ":"))
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of the full update's energy inside\n(higher is closer)", fontsize=FONT_SIZE)


def _best(floor: Interval) -> Interval:
    """Cosine of the best approximation, whose error is the floor."""
    return Interval((1 - floor.value**2) ** 0.5)


def _best_captured_share(floor: Interval) -> Interval:
    return Interval(1 - floor.value**2)


def _line(axes: Axes, ranks: Sequence[RankAgreement], values: Sequence[Interval], line: LineStyle) -> None:
    """Values against rank, with bars where they have intervals."""
    if not ranks:
        return
    x = [one.rank for one in ranks]
    shown = [max(value.value, LEAST_ERROR) if axes.get_yscale() == "log" else value.value for value in values]
    form: dict[str, Any] = {"color": line.colour, "linestyle": line.style, "linewidth": 1.3}
    axes.plot(x, shown, marker=line.marker, markersize=4, label=line.label, **form)
    for place, value in zip(x, values, strict=True):
        if value.low is not None and value.high is not None:
            low = max(value.low, LEAST_ERROR) if axes.get_yscale() == "log" else value.low
            axes.plot([place, place], [low, value.high], color=line.colour, linewidth=1, alpha=0.7)
