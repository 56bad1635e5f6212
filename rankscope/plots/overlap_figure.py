"""Overlap of the top directions of two updates, beside what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from rankscope.analysis.comparison import CompareResult
from rankscope.analysis.layer_comparison import SideComparison
from rankscope.errors import ConfigError
from rankscope.noise import Array
from rankscope.plots.figure import FONT_SIZE, add_colour_bar, add_legend_below, escape_math, new_figure

HATCH: dict[str, Any] = {"facecolor": "none", "edgecolor": "white", "hatch": "////", "linewidth": 0.0, "alpha": 0.8}
SPACES = {"left": "output space (left)", "right": "input space (right)"}


def plot_overlap(result: CompareResult, layer: str | None = None, figure: Figure | None = None) -> Figure:
    """Heat maps of φ(i, j), each beside its chance level max(i, j)/d on the same colours.

    Hatched: cuts i of a or j of b among singular values so close that the directions are arbitrary (in at least
    half of the layers, where several are shown).

    Args:
        result: from ``rankscope.compare``.
        layer: one layer's name; None takes the median over the layers whose grids have the most common size.
        figure: an empty one to draw on; None makes one.

    Raises:
        ConfigError: no such layer.
    """
    chosen, description = select_drawn_layers(result, layer)
    sides = list(chosen[0])
    figure = figure or new_figure(8.2, 0.9 + 3.1 * len(sides))
    grid = figure.subplots(len(sides), 2, squeeze=False)
    hatched = False
    for row, name in zip(grid, sides, strict=True):
        compared = [layer_sides[name] for layer_sides in chosen]
        overlap, expected = (np.median([getattr(s, f) for s in compared], axis=0) for f in ("overlap", "expected"))
        d = " or ".join(str(d) for d in sorted({side.d for side in compared}))
        image = _map(row[0], overlap, f"φ, {SPACES[name]}")
        _map(row[1], expected, f"by chance, max(i, j)/d, d = {d}")
        hatched |= _hatch(row[0], compared)
        add_colour_bar(figure, image, row, "overlap φ", FONT_SIZE + 1, fraction=0.05, pad=0.02)
    a, b = result.titles
    figure.suptitle(escape_math(f"a = {a},  b = {b}\n{result.matrices}, {description}"), fontsize=FONT_SIZE + 2)
    if hatched:
        label = "cut among near-equal σ: directions are arbitrary"
        note = Patch(**{**HATCH, "edgecolor": "#555555"}, label=label)
        add_legend_below(figure, [note])
    return figure


def select_drawn_layers(result: CompareResult, layer: str | None) -> tuple[list[dict[str, SideComparison]], str]:
    """Sides of the layers to draw, and what they are called."""
    if layer is not None:
        named = [one for one in result.layers if layer in (one.name, one.name_b)]
        if not named:
            raise ConfigError(f"no layer {layer!r} was compared; there is {result.layers[0].name}, …")
        return [named[0].sides], layer
    sizes = Counter(_size(one.sides) for one in result.layers)
    size = max(sizes, key=lambda size: (sizes[size], size))
    kept = [one for one in result.layers if _size(one.sides) == size]
    rest = len(result.layers) - len(kept)
    others = f" ({rest} with another number of directions left out)" if rest else ""
    return [one.sides for one in kept], (f"median over {len(kept)} layers" if len(kept) > 1 else kept[0].name) + others


def _size(sides: dict[str, SideComparison]) -> tuple[int, ...]:
    return next(iter(sides.values())).overlap.shape


def _map(axes: Axes, grid: Array, title: str) -> AxesImage:
    rows, columns = grid.shape
    extent = (0.5, columns + 0.5, 0.5, rows + 0.5)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", origin="lower", extent=extent, aspect="auto")
    axes.set_title(title, fontsize=FONT_SIZE + 1)
    axes.set_ylabel("top i directions of a", fontsize=FONT_SIZE)
    axes.set_xlabel("top j directions of b", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.set_xticks(_ticks(columns))
    axes.set_yticks(_ticks(rows))
    return image


def _ticks(n: int) -> list[int]:
    """1 and round numbers up to n, about eight."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, n) if n / step <= 8 or step >= n)
    return [1, *range(step, n + 1, step)] if step > 1 else list(range(1, n + 1))


def _hatch(axes: Axes, sides: Sequence[SideComparison]) -> bool:
    """Mark rows and columns of cuts inside a cluster; whether there were any."""
    rows, columns = ([getattr(s, f"cluster_{x}") for s in sides] for x in "ab")
    spans = [(axes.axhspan, run) for run in _runs(rows)] + [(axes.axvspan, run) for run in _runs(columns)]
    for draw, (first, last) in spans:
        draw(first - 0.5, last + 0.5, **HATCH)
    return bool(spans)


def _runs(flags: Sequence[Sequence[bool]]) -> list[tuple[int, int]]:
    """First and last cut, from 1, of each run that is flagged in at least half of the layers."""
    marked = [i + 1 for i, share in enumerate(np.mean(flags, axis=0)) if share >= 0.5]
    groups = [[cut for _, cut in group] for _, group in groupby(enumerate(marked), key=lambda pair: pair[1] - pair[0])]
    return [(group[0], group[-1]) for group in groups]
