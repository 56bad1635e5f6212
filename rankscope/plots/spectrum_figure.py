"""Rank spectra: singular values of every layer, effective ranks, and the edge of the noise."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rankscope.analysis.layer_spectra import LayerSpectrum, SpectrumResult
from rankscope.errors import ConfigError
from rankscope.formats.names import layer_kind
from rankscope.measures import measures_shown
from rankscope.plots.figure import (
    COLOURS,
    DARK,
    FONT_SIZE,
    GREY,
    add_legend_below,
    draw_level,
    escape_math,
    new_figure,
    set_log2_axis,
    style_grid,
)

PANELS_A_ROW = 4
LINEAR_UP_TO = 32
"""More singular values than this, and the index gets a logarithmic axis."""
DECADES = 6
"""The axis ends this far below the largest σ: what lies lower is rounding."""
CAPTION = "marks: effective rank by its measure, median over layers"
LEGEND: dict[str, Any] = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "ncols": 2,
    "fontsize": FONT_SIZE - 1,
    "title_fontsize": FONT_SIZE + 1,
    "columnspacing": 1.0,
    "handlelength": 1.6,
    "handletextpad": 0.4,
    "frameon": False,
}
HIGHEST_MARK, MARK_STEP = 0.97, 0.04
"""Places of the marks, as shares of the height of the axes."""


def plot_spectra(results: Sequence[SpectrumResult], figure: Figure | None = None) -> Figure:
    """Singular values of every layer against their index, one panel a result, all on the same axes.

    A line is a layer, its colour the kind of module, darker with depth. Marks: effective ranks, the median over
    layers. Dashed and dotted, for full updates: the largest σ that noise, or rounding in storage, would have
    (median over layers, the band from least to largest).

    Args:
        results: from ``rankscope.spectrum``.
        figure: an empty one to draw on; None makes one.

    Raises:
        ConfigError: no results.
    """
    if not results:
        raise ConfigError("nothing to plot: no spectra")
    rows = -(-len(results) // PANELS_A_ROW)
    columns = -(-len(results) // rows)
    figure = figure or new_figure(max(5.6, 3.5 * columns), 0.6 + 3.6 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours = _colours(results)
    panels: list[Axes] = list(grid.flat)
    for panel, result in zip(panels, results, strict=False):
        _panel(panel, result, colours)
    for unused in panels[len(results) :]:
        unused.remove()
    _axes(panels[: len(results)], results, columns)
    handles = [Line2D([], [], color=colour, label=escape_math(kind)) for kind, colour in colours.items()]
    if handles:
        add_legend_below(figure, handles, title=CAPTION, title_fontsize=FONT_SIZE, ncols=4)
    return figure


def _colours(results: Sequence[SpectrumResult]) -> dict[str, str]:
    """A colour for each of the most frequent kinds of module; the rest is grey."""
    counts = Counter(layer_kind(layer.name) for result in results for layer in result.layers if layer.energy > 0)
    kinds = [kind for kind, _ in counts.most_common(len(COLOURS))]
    colours = dict(zip(sorted(kinds), COLOURS, strict=False))
    return colours if len(counts) <= len(COLOURS) else {**colours, "other": GREY}


def _layers(result: SpectrumResult) -> str:
    count, zero = result.total.layers, result.total.zero
    return f"{count} layer{'' if count == 1 else 's'}" + (f", {zero} unchanged" if zero else "")


def _panel(axes: Axes, result: SpectrumResult, colours: dict[str, str]) -> None:
    changed = [layer for layer in result.layers if layer.energy > 0]
    style_grid(axes)
    title = escape_math(f"{result.title} ({_layers(result)})")
    if not changed:
        axes.set_title(title, fontsize=FONT_SIZE + 1)
        axes.text(0.5, 0.5, "no layer has changed", transform=axes.transAxes, fontsize=FONT_SIZE, ha="center")
        return
    depth = {kind: [layer.name for layer in changed if layer_kind(layer.name) == kind] for kind in colours}
    for layer in changed:
        kind = layer_kind(layer.name)
        same = depth.get(kind, [layer.name])
        alpha = 0.35 + 0.6 * (same.index(layer.name) + 1) / len(same)
        values = [value for value in layer.singular_values if value > 0]
        marker = "." if len(values) <= 2 else ""
        axes.plot(
            range(1, len(values) + 1), values, color=colours.get(kind, GREY), alpha=alpha, linewidth=1, marker=marker
        )
    handles = _marks(axes, result, changed) + _edges(axes, changed)
    # Above the axes it can hide no line.
    axes.legend(handles=handles, title=title, **LEGEND)


def _marks(axes: Axes, result: SpectrumResult, changed: Sequence[LayerSpectrum]) -> list[Line2D]:
    """Effective ranks along the upper edge, each with a thin line down, at heights of their own, as they may agree."""
    handles = []
    for number, measure in enumerate(measures_shown("plot")):
        rank = result.total.median.get(measure.name)
        if rank is None:  # a sketch leaves it open
            continue
        noise = [layer.noise[measure.name] or 0 for layer in changed if layer.noise]
        beside = f" (noise {statistics.median(noise):.3g})" if noise else ""
        label = f"{measure.title} {rank:.3g}{beside}"
        axes.axvline(rank, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        height = round(HIGHEST_MARK - MARK_STEP * number, 2)
        axes.plot([rank], [height], measure.mark, color=DARK, markersize=4, transform=axes.get_xaxis_transform())
        handles.append(Line2D([], [], color=DARK, marker=measure.mark, markersize=4, linestyle="none", label=label))
    return handles


def _edges(axes: Axes, changed: Sequence[LayerSpectrum]) -> list[Line2D]:
    """The largest σ of noise and of rounding, as far as the layers have them."""
    noise = [edge for layer in changed if layer.noise and (edge := layer.noise["mp_edge"])]
    rounding = [layer.rounding_floor.edge for layer in changed if layer.rounding_floor]
    handles = []
    for name, dashes, edges in (("noise edge (MP)", (4, 2), noise), ("rounding edge", (1, 1), rounding)):
        if edges:
            label = f"{name} {statistics.median(edges):.2g}"
            style: dict[str, Any] = {"linestyle": (0, dashes), "linewidth": 1.1, "label": label}
            handles.append(draw_level(axes, edges, DARK, band=GREY, **style))
    return handles


def _axes(panels: Sequence[Axes], results: Sequence[SpectrumResult], columns: int) -> None:
    values = [s for result in results for layer in result.layers for s in layer.singular_values if s > 0]
    longest = max(len(layer.singular_values) for result in results for layer in result.layers)
    first = panels[0]
    if not values:
        first.set_yticks([])
    else:
        first.set_yscale("log")
        first.set_ylim(max(min(values), max(values) * 10.0**-DECADES) / 1.5, max(values) * 4)
    if longest > LINEAR_UP_TO:
        for panel in panels:
            set_log2_axis(panel)
        first.set_xlim(0.9, longest * 1.1)
    else:
        first.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        first.set_xlim(0.5, longest + 0.5)
    for number, panel in enumerate(panels):
        if number % columns == 0:
            panel.set_ylabel("singular value σ")
        if number + columns >= len(panels):
            panel.set_xlabel("index")
            panel.tick_params(labelbottom=True)
