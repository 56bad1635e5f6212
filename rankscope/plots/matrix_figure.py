"""Which of several sources learned the same: overlap and cosine of every pair, beside the tree of which are alike."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from rankscope.analysis.matrix_result import SIGNIFICANCE_LEVEL, MatrixResult
from rankscope.noise import Array
from rankscope.plots.figure import (
    CHANCE_COLOUR,
    COLOURS,
    FONT_SIZE,
    GREY,
    add_colour_bar,
    draw_level,
    escape_math,
    new_figure,
)

LONGEST = 40
"""Characters of a name that are written: its beginning and its end."""
DOT = "#E69F00"
MOST_NUMBERS = 16
"""Sources up to which each cell has its number written into it."""
WIDEST = 30.0
"""Inches: beyond it labels get smaller, no figure larger."""


def plot_matrix(result: MatrixResult, figure: Figure | None = None) -> Figure:
    """A tree of average linkage on 1 − φ, a heat map of φ and one of the cosine, rows in the order of the tree.

    φ is that of the left side below the diagonal and of the right side above it. The dashed line in the tree is the
    chance level; joins that are not beyond chance are grey. A dot marks pairs whose overlap is not beyond chance.

    Args:
        result: from ``rankscope.compare_all``.
        figure: an empty one to draw on; None makes one.
    """
    n, order = len(result.titles), result.order
    cell = min(max(0.2, 3.2 / n), WIDEST / n)
    maps = 1 if result.cosine is None else 2
    names = [_short(f"{result.titles[i]}  {i + 1}") for i in order]
    side = max(n * cell, 2.4)
    labels = 0.065 * max(map(len, names)) + 0.3
    figure = figure or new_figure(2.6 + labels + maps * (side + 0.6), side + 1.9)
    axes = figure.subplots(1, 1 + maps, width_ratios=[2.2, *[side] * maps], squeeze=False)[0]
    size = min(FONT_SIZE, max(2.0, cell * 72 * 0.75))
    _tree(axes[0], result)
    drawn = _overlaps(result, order)
    image = _map(axes[1], drawn, order, names, size, cmap="viridis", vmin=0, vmax=1)
    _finish(figure, axes[1], image, _overlap_title(result), "overlap φ, median over layers")
    _marks(axes[1], result, order)
    if result.cosine is not None:
        picked = result.cosine[np.ix_(order, order)]
        image = _map(axes[2], picked, order, None, size, cmap="PuOr", vmin=-1, vmax=1)
        _finish(figure, axes[2], image, "cosine of the updates", "cosine, all layers as one vector")
    layers = f"{len(result.layers)} layer{'' if len(result.layers) == 1 else 's'} that all share"
    figure.suptitle(f"{n} sources, {result.matrices}, {layers}", fontsize=FONT_SIZE + 2)
    return figure


def _short(name: str) -> str:
    return escape_math(name if len(name) <= LONGEST else f"{name[: LONGEST // 3]}…{name[1 - LONGEST + LONGEST // 3 :]}")


def _overlaps(result: MatrixResult, order: list[int]) -> Array:
    """φ in the order of the tree: left below the diagonal, right above; of one side, that on both."""
    below, above = (list(result.sides.values()) * 2)[:2]
    picked = np.ix_(order, order)
    overlaps: Array = np.tril(below.overlap[picked]) + np.triu(above.overlap[picked], 1)
    return overlaps


def _overlap_title(result: MatrixResult) -> str:
    sides = list(result.sides)
    return (
        "overlap φ\nbelow: output space (left), above: input (right)" if len(sides) == 2 else f"overlap φ, {sides[0]}"
    )


def _map(axes: Axes, values: Array, order: list[int], names: list[str] | None, size: float, **style: Any) -> AxesImage:
    n = len(order)
    image = axes.imshow(values, origin="upper", aspect="equal", interpolation="nearest", **style)
    axes.set_xticks(range(n), [str(i + 1) for i in order], fontsize=size, rotation=90 if n > 9 else 0)
    axes.set_yticks(range(n), names if names else [""] * n, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if n <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:z.2f}".replace("0.", ".", 1)
            colour = "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=min(size, 7), color=colour)
    return image


def _finish(figure: Figure, axes: Axes, image: AxesImage, title: str, label: str) -> None:
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    add_colour_bar(figure, image, axes, label, location="bottom", fraction=0.05, pad=0.03, shrink=0.9)


def _marks(axes: Axes, result: MatrixResult, order: list[int]) -> None:
    """A dot in the corner of each cell whose overlap is no more than chance."""
    below, above = (list(result.sides.values()) * 2)[:2]
    picked = np.ix_(order, order)
    chance = np.tril(below.p[picked] >= SIGNIFICANCE_LEVEL, -1) | np.triu(above.p[picked] >= SIGNIFICANCE_LEVEL, 1)
    rows, columns = np.nonzero(chance)
    size = 9 if len(order) <= MOST_NUMBERS else 4
    axes.scatter(columns + 0.36, rows - 0.36, s=size, color=DOT, linewidths=0, clip_on=False)


def _tree(axes: Axes, result: MatrixResult) -> None:
    """The joins, leaves at the right, on the axis of φ: 1 at the leaves, and chance where random directions join."""
    n = len(result.titles)
    place = {leaf: float(row) for row, leaf in enumerate(result.order)}
    height = dict.fromkeys(range(n), 0.0)
    colour_of: dict[int, str] = {}
    lines, colours = [], []
    parts = _groups(result)
    palette = cycle([colour for colour in COLOURS if colour not in (CHANCE_COLOUR, DOT)])
    for join, (a, b, distance, _) in enumerate(result.joins):
        one, other, node = int(a), int(b), n + join
        group = parts[node]
        colour = GREY if group is None else colour_of.setdefault(group, next(palette))
        for child in (one, other):
            lines.append([(height[child], place[child]), (distance, place[child])])
        lines.append([(distance, place[one]), (distance, place[other])])
        colours += [colour] * 3
        place[node], height[node] = (place[one] + place[other]) / 2, float(distance)
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.4))
    levels = result.chance_distance[np.triu_indices(n, 1)]
    draw_level(axes, levels.tolist(), CHANCE_COLOUR, is_vertical=True, linestyle="--", linewidth=1)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xlim(max(float(result.joins[:, 2].max()), float(levels.max())) * 1.04 + 1e-9, 0)
    axes.set_yticks([])
    axes.set_xlabel(
        "1 − φ, average linkage\n(mean of the sides)" if len(result.sides) == 2 else "1 − φ, average linkage"
    )
    axes.xaxis.label.set_fontsize(FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.spines[["top", "left", "right"]].set_visible(False)
    chance = Line2D([], [], color=CHANCE_COLOUR, linestyle="--", linewidth=1, label="chance")
    grey = Line2D([], [], color=GREY, linewidth=1.4, label="join not beyond chance")
    dot = Line2D([], [], color=DOT, marker="o", markersize=3, linestyle="", label="pair not beyond chance")
    joins, pairs = (
        all(result.beyond_chance),
        any((side.p >= SIGNIFICANCE_LEVEL).any() for side in result.sides.values()),
    )
    handles = [chance, *([] if joins else [grey]), *([dot] if pairs else [])]
    axes.legend(handles=handles, fontsize=FONT_SIZE - 1, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))


def _groups(result: MatrixResult) -> dict[int, int | None]:
    """For each join the largest one above it that is beyond chance with all below it; None for joins that are not."""
    n = len(result.titles)
    good = dict.fromkeys(range(n), True)
    top: dict[int, int | None] = {}
    for join, (a, b) in enumerate(result.joins[:, :2].astype(int)):
        good[n + join] = result.beyond_chance[join] and good[a] and good[b]
    for join in reversed(range(n - 1)):
        node = n + join
        above = top.get(node)
        top[node] = above if above is not None else node if good[node] else None
        for child in result.joins[join, :2].astype(int):
            top[int(child)] = top[node]
    return top
