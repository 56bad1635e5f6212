"""An update against its weight: how much it amplifies, where in the weight's spectrum it points, what it adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rankscope.analysis.intruders import INTRUDER_THRESHOLD, SWEEP_THRESHOLDS
from rankscope.evidence.weight.layers import LayerAmplification, PositionCurve
from rankscope.evidence.weight.measure import AmplificationSummary, WeightComparison
from rankscope.plots.figure import COLOURS, FONT_SIZE, GREY, new_figure, set_log2_axis, style_grid
from rankscope.subspace import Side

LORA, FULL, TOP, BLACK = COLOURS[0], COLOURS[1], COLOURS[2], "#222222"
SPACES: dict[Side, str] = {"left": "output space (left)", "right": "input space (right)"}
LIGHT, DARK = np.array([0.66, 0.83, 0.95]), np.array([0.0, 0.08, 0.25])
"""Blues of the lowest and of the highest LoRA rank."""


def plot_weight(result: WeightComparison, figure: Figure | None = None) -> Figure:
    """Amplification against the number of directions, and the three columns of Table 7, medians over layers.

    A faint line is a layer; LoRA at its rank, full fine-tuning at its top r directions. Dashed: random directions.
    """
    figure = figure or new_figure(9, 4.2)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        style_grid(axes)
        set_log2_axis(axes)
        axes.set_yscale("log")
        axes.set_xlabel("r: directions of the update (LoRA: its rank)", fontsize=FONT_SIZE + 1)
        axes.set_xticks(sorted({one.r for one in result.strengths}))
    for rows, colour, marker, name in _groups(result):
        columns = [c for c in result.columns if (c.rank is None) == (rows[0].rank is None)]
        _amplification(left, rows, columns, colour, marker, name)
        _strength(right, rows, colour, marker, name)
    _references(right, result)
    left.set_ylabel("amplification ‖ΔW‖/‖UᵀWV‖", fontsize=FONT_SIZE + 1)
    right.set_ylabel("‖UᵀWV‖ (Frobenius norm)", fontsize=FONT_SIZE + 1)
    left.set_title("how far the update amplifies its directions", fontsize=FONT_SIZE + 2)
    right.set_title("how much of the weight W lies in r directions", fontsize=FONT_SIZE + 2)
    for axes in (left, right):
        axes.legend(fontsize=FONT_SIZE, frameon=False)
    return figure


def _groups(result: WeightComparison) -> list[tuple[list[AmplificationSummary], str, str, str]]:
    groups = [(result.lora_strengths, LORA, "o", "LoRA"), (result.full_strengths, FULL, "D", "full fine-tuning")]
    return [group for group in groups if group[0]]


def _amplification(
    axes: Axes,
    rows: Sequence[AmplificationSummary],
    columns: Sequence[LayerAmplification],
    colour: str,
    marker: str,
    name: str,
) -> None:
    for layer in dict.fromkeys(column.layer for column in columns):
        line = [(c.r, c.found.amplification) for c in columns if c.layer == layer and c.found.amplification]
        axes.plot([r for r, _ in line], [factor for _, factor in line], color=colour, alpha=0.15, linewidth=0.7)
    r = [one.r for one in rows]
    middle = [one.amplification.value if one.amplification else np.nan for one in rows]
    axes.plot(r, middle, f"-{marker}", color=colour, linewidth=2, markersize=4.5, label=f"{name}, median over layers")
    random = [one.median.random_amplification for one in rows]
    axes.plot(r, random, "--", color=colour, linewidth=1.2, label=f"{name}, along random directions")


def _strength(axes: Axes, rows: Sequence[AmplificationSummary], colour: str, marker: str, name: str) -> None:
    own = [one.median.own for one in rows]
    label = f"top r of ΔW, {name}"
    axes.plot([one.r for one in rows], own, f"-{marker}", color=colour, linewidth=1.6, markersize=4.5, label=label)


def _references(axes: Axes, result: WeightComparison) -> None:
    """W's own column and the random one, which are the weight's alone."""
    once = sorted({one.r: one.median for one in result.strengths}.items())
    r = [at for at, _ in once]
    random, sd = (np.array([getattr(one, field) for _, one in once]) for field in ("random", "random_sd"))
    axes.plot(r, [one.top for _, one in once], "-s", color=TOP, linewidth=1.2, markersize=4, label="top r of W itself")
    axes.plot(r, random, "--", color=BLACK, linewidth=1.2, label="random directions ± sd")
    axes.fill_between(r, np.maximum(random - sd, random / 10), random + sd, color=GREY, alpha=0.25, linewidth=0)


def plot_positions(result: WeightComparison, figure: Figure | None = None) -> Figure:
    """Figure 8 of Hu et al. 2021 with its chance level, left and right, means over layers and seeds.

    Above: energy of the update's top i directions at each place of the weight's spectrum, in units of chance. Below:
    their overlap φ(i, m) with the weight's top m. Places come in octaves: 1, 2, 3–4, 5–8, …
    """
    figure = figure or new_figure(9, 6.5)
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, side in enumerate(SPACES):
        above, below = grid[0, column], grid[1, column]
        for axes in (above, below):
            style_grid(axes)
            set_log2_axis(axes)
        for curve in result.curves:
            style = _style(result, curve.rank)
            places = curve.sides[side]
            above.plot(
                curve.ends, places.energy, color=style, marker=_marker(curve.rank), markersize=3.5, linewidth=1.3
            )
            below.plot(
                curve.ends, places.overlap, color=style, marker=_marker(curve.rank), markersize=3.5, linewidth=1.3
            )
        above.axhline(1, color=BLACK, linestyle="--", linewidth=1.2)
        for curve in {curve.i: curve for curve in result.curves}.values():
            below.plot(curve.ends, curve.sides[side].expected, color=BLACK, linestyle="--", linewidth=1)
        above.set_title(SPACES[side], fontsize=FONT_SIZE + 2)
        below.set_xlabel("m: place in W's spectrum, 1 the strongest", fontsize=FONT_SIZE + 1)
    grid[0, 0].set_ylabel("energy of ΔW's top i at place m\n(1 = chance, i/d)", fontsize=FONT_SIZE + 1)
    grid[1, 0].set_ylabel("overlap φ(i, m) with the top m of W", fontsize=FONT_SIZE + 1)
    grid[1, 0].set_ylim(0, 1.02)
    for axes in grid.flat:
        axes.set_ylim(bottom=0)
    handles = [_handle(result, curve) for curve in result.curves]
    handles.append(Line2D([], [], color=BLACK, linestyle="--", label="chance: 1, and max(i, m)/d for each i"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=FONT_SIZE, frameon=False
    )
    return figure


def _handle(result: WeightComparison, curve: PositionCurve) -> Line2D:
    label = f"{curve.label}, i = {curve.i}" if curve.rank is not None else f"full fine-tuning, i = {curve.i}"
    return Line2D([], [], color=_style(result, curve.rank), marker=_marker(curve.rank), markersize=3.5, label=label)


def _marker(rank: int | None) -> str:
    return "D" if rank is None else "o"


def _style(result: WeightComparison, rank: int | None) -> tuple[float, float, float] | str:
    """LoRA's ranks from light to dark blue, full fine-tuning in its own colour."""
    if rank is None:
        return FULL
    ranks = [one.rank for one in result.lora_strengths]
    red, green, blue = LIGHT + (DARK - LIGHT) * ranks.index(rank) / max(len(ranks) - 1, 1)
    return float(red), float(green), float(blue)


def plot_intruders(result: WeightComparison, figure: Figure | None = None) -> Figure:
    """max|cos| of the top directions of the tuned weights to all old ones; how many are intruders at each threshold.

    A dot is a direction of a layer and a seed; below the line at ε it is an intruder. The dashed line is a random
    direction's mean.
    """
    figure = figure or new_figure(9, 4.2)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        style_grid(axes)
    for place, one in enumerate(result.novelties):
        cosines = [c for layer in result.intruders if layer.rank == one.rank for seed in layer.cosines for c in seed]
        # A golden-ratio sequence spreads the dots evenly, and the same way each time.
        spread = (np.arange(len(cosines)) * 0.6180339887 % 1 - 0.5) * 0.7
        colour = _style(result, one.rank)
        left.plot(place + spread, cosines, ".", color=colour, markersize=2.5, alpha=0.45, rasterized=True)
        name = "full fine-tuning" if one.rank is None else one.label
        right.plot(
            SWEEP_THRESHOLDS,
            one.sweep,
            color=colour,
            marker=_marker(one.rank),
            markersize=3.5,
            linewidth=1.3,
            label=name,
        )
    chances = [one.chance for one in result.novelties]
    chance = float(np.median(chances))
    lines = [
        left.axhline(
            INTRUDER_THRESHOLD,
            color=BLACK,
            linewidth=1.2,
            label=f"ε = {INTRUDER_THRESHOLD:g}, below which a direction is new",
        ),
        left.axhline(chance, color=BLACK, linestyle="--", linewidth=1.2, label=f"random direction: {chance:.2f}"),
    ]
    right.axvline(INTRUDER_THRESHOLD, color=BLACK, linewidth=1.2)
    right.axvline(chance, color=BLACK, linestyle="--", linewidth=1.2)
    left.set_xticks(range(len(result.novelties)), [one.label.replace("r = ", "") for one in result.novelties])
    left.set_ylim(0, 1.03)
    left.set_xlabel("LoRA's rank r", fontsize=FONT_SIZE + 1)
    left.set_ylabel("max|cos| to the old directions (1 = kept)", fontsize=FONT_SIZE + 1)
    directions = max(one.directions for one in result.novelties)
    left.set_title(f"the top {directions} directions of every tuned weight", fontsize=FONT_SIZE + 2)
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=FONT_SIZE, frameon=False)
    right.set_xlabel("threshold ε", fontsize=FONT_SIZE + 1)
    right.set_ylabel(f"intruders among the top {directions} (mean a layer)", fontsize=FONT_SIZE + 1)
    right.set_title("how many count as new", fontsize=FONT_SIZE + 2)
    right.set_ylim(0, directions)
    right.legend(fontsize=FONT_SIZE, loc="upper left", framealpha=1, edgecolor="white")
    return figure
