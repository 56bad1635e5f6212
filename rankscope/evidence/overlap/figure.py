"""Overlap of top directions across ranks and across seeds, medians over layers, beside what chance gives."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from rankscope.errors import ConfigError
from rankscope.evidence.overlap.measure import MATRIX_SYMBOLS, SHARED_OVERLAP, Overlap
from rankscope.evidence.overlap.pairs import RunComparison, SideOverlap
from rankscope.noise import Array
from rankscope.plots.figure import COLOURS, FONT_SIZE, GREY, add_legend, new_figure, style_grid

SPACES = {"left": "left, output space", "right": "right, input space"}
MOST_TICKS = 6


class ComparisonRow(NamedTuple):
    """A comparison with what it is drawn beside: a random pair of the same shapes, or None for the chance level."""

    across: str
    measured: RunComparison
    random: RunComparison | None

    @property
    def title(self) -> str:
        """What was compared, in words."""
        one, other = f"r = {self.measured.rank_a}", f"r = {self.measured.rank_b}"
        return f"across {self.across}, {one} against {other}"


def select_comparisons(result: Overlap) -> list[ComparisonRow]:
    """What the figures show: a low against the highest rank, and two seeds at the highest rank with several.

    Raises:
        ConfigError: nothing was compared.
    """
    beside = [ComparisonRow("ranks", result.ranks, None)] if result.ranks else []
    beside += [
        ComparisonRow("seeds", one, other) for one, other in zip(result.seeds[-1:], result.random[-1:], strict=True)
    ]
    if not beside:
        raise ConfigError("nothing to plot: no runs were compared")
    return beside


def plot_overlaps(result: Overlap, figure: Figure | None = None) -> Figure:
    """Heat maps of φ(i, j), each beside what chance gives, all on the same colours; median over layers and pairs.

    The first row is across ranks beside the chance level max(i, j)/d, the second across seeds beside a random pair.

    Args:
        result: from ``measure_overlap``.
        figure: an empty one to draw on; None makes one.

    Raises:
        ConfigError: nothing was compared.
    """
    rows = select_comparisons(result)
    columns = 2 * len(rows[0].measured.sides)
    figure = figure or new_figure(9, 0.6 + 2.5 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    images: list[AxesImage] = []
    for axes, row in zip(grid, rows, strict=True):
        for place, side in enumerate(row.measured.sides.values()):
            pair = axes[2 * place], axes[2 * place + 1]
            _heat(pair[0], side.grid.overlap, f"{SPACES[side.side]}\nacross {row.across}", row.measured)
            name, chance = _by_chance(row, side)
            images.append(_heat(pair[1], chance, name, row.measured))
    bar = figure.colorbar(images[0], ax=list(grid.flat), fraction=0.025, pad=0.015)
    bar.set_label(f"overlap φ(i, j) of {MATRIX_SYMBOLS[result.of]}: 1 shared, 0 orthogonal", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    return figure


def _by_chance(row: ComparisonRow, side: SideOverlap) -> tuple[str, Array]:
    random = row.random.sides.get(side.side) if row.random else None
    if random is not None and random.grid.overlap.shape == side.grid.overlap.shape:
        return "the same of a\nrandom pair", random.grid.overlap
    return "by chance,\nmax(i, j)/d", side.grid.expected


def _heat(axes: Axes, grid: Array, title: str, runs: RunComparison) -> AxesImage:
    rows, columns = grid.shape
    extent = (0.5, columns + 0.5, 0.5, rows + 0.5)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", origin="lower", extent=extent, aspect="auto")
    axes.set_title(title, fontsize=FONT_SIZE)
    axes.set_ylabel(f"top i, r = {runs.rank_a}", fontsize=FONT_SIZE)
    axes.set_xlabel(f"top j, r = {runs.rank_b}", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.set_xticks(_ticks(columns))
    axes.set_yticks(_ticks(rows))
    return image


def _ticks(n: int) -> list[int]:
    """1 and round numbers up to n."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, n) if n / step <= MOST_TICKS or step >= n)
    return list(range(1, n + 1)) if step == 1 else [1, *range(step, n + 1, step)]


def plot_directions(result: Overlap, figure: Figure | None = None) -> Figure:
    """φ(i, i) against i with the chance level, between which 95 % of single layers lie by chance, and the factors
    before training; a panel for each side, across ranks above and across seeds below.

    Args:
        result: from ``measure_overlap``.
        figure: an empty one to draw on; None makes one.

    Raises:
        ConfigError: nothing was compared.
    """
    rows = select_comparisons(result)
    columns = len(rows[0].measured.sides)
    figure = figure or new_figure(9, 0.9 + 2.8 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for axes, row in zip(grid, rows, strict=True):
        for panel, side in zip(axes, row.measured.sides.values(), strict=True):
            random = row.random.sides.get(side.side) if row.random else None
            _diagonal(panel, side, random)
            panel.set_title(f"{SPACES[side.side]}: {row.title}", fontsize=FONT_SIZE + 1)
            panel.set_xlabel("i, how many top directions of each", fontsize=FONT_SIZE + 1)
        axes[0].set_ylabel(f"overlap φ(i, i) of {MATRIX_SYMBOLS[result.of]}", fontsize=FONT_SIZE + 1)
    grid[0][0].set_ylim(0, min(1.04, 1.1 * max(SHARED_OVERLAP, *map(_highest, rows))))
    add_legend(figure, [panel for axes in grid for panel in axes], columns=3)
    return figure


def _highest(row: ComparisonRow) -> float:
    return max(float(max(side.grid.diagonal[0].max(), side.grid.high.max())) for side in row.measured.sides.values())


def _diagonal(axes: Axes, side: SideOverlap, random: SideOverlap | None) -> None:
    style_grid(axes)
    measured, expected = side.grid.diagonal
    marker = "o" if len(measured) <= 8 else ""
    i = range(1, len(measured) + 1)
    axes.fill_between(
        i, side.grid.low, side.grid.high, color=GREY, alpha=0.25, linewidth=0, label="95 % of layers by chance"
    )
    axes.plot(i, expected, "--", color="#444444", linewidth=1, label="expected by chance, i/d")
    if random is not None:
        _line(axes, random.grid.diagonal[0], COLOURS[2], "-.", "random pair")
    if len(side.grid.initial):
        _line(axes, side.grid.initial, COLOURS[1], ":", "factors before training")
    axes.plot(
        i, measured, color=COLOURS[0], marker=marker, markersize=4, linewidth=1.6, label="measured, median of layers"
    )
    axes.plot([1], [SHARED_OVERLAP], "_", color="#000000", markersize=14, label="Hu et al.: a shared φ(1, 1) is above")
    axes.set_xlim(0.5, len(measured) + 0.5)
    axes.set_xticks(_ticks(len(measured)))


def _line(axes: Axes, values: Array, colour: str, style: str, label: str) -> None:
    axes.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=1.3, label=label)
