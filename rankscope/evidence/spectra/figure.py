"""Spectra of full fine-tuning and of LoRA on one axis, beside those of noise; and ranks by kind of module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rankscope.errors import ConfigError
from rankscope.evidence.spectra.measure import FULL_LABEL, JointSpectrum, KindRanks, Spectra, SpectrumCurve
from rankscope.measures import measures_shown
from rankscope.plots.figure import FONT_SIZE, GREY, new_figure, set_log2_axis, style_grid
from rankscope.plots.performance import FULL_COLOUR as FULL_COLOUR
from rankscope.plots.performance import FULL_NAME
from rankscope.verdict import LOW_RANK_SHARE

PANELS = 8
"""The kinds of module that are shown: those with most energy."""
A_ROW = 4
DECADES = 3
"""The axis ends this far below the largest σ."""
DARK = "#222222"
REACH = 0.36  # half the width of a segment beside its kind


def rank_colours(ranks: Sequence[int]) -> dict[int, str]:
    """Dark for a high rank, light for a low one; told apart in grey, too."""
    steps = max(len(ranks) - 1, 1)
    return {rank: to_hex(colormaps["YlGnBu"](0.35 + 0.6 * i / steps)) for i, rank in enumerate(sorted(ranks))}


def plot_joint_spectra(found: Spectra) -> Figure:
    """σ against its index, a panel for each kind of module: the layer of median energy, every method on one axis.

    Grey: noise with the energy of the first method. Dashed: the largest σ that noise would have, judged by the median
    σ; dotted: the largest that rounding in storage can have added.

    Raises:
        ConfigError: no kind of module that all methods have.
    """
    shown = _select_panels(found)
    if not shown:
        raise ConfigError("nothing to plot: the methods have no layer in common")
    rows = -(-len(shown) // A_ROW)
    columns = min(len(shown), A_ROW)
    figure = new_figure(9, 4 if rows == 1 else 6.5)
    panels: list[Axes] = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    colours = rank_colours(found.ranks)
    for panel, spectrum in zip(panels, shown, strict=False):
        _panel(panel, spectrum, colours)
    for unused in panels[len(shown) :]:
        unused.remove()
    _axes(panels[: len(shown)], shown, columns)
    figure.supylabel("singular value σ of the update", fontsize=FONT_SIZE + 2)
    figure.legend(
        handles=_legend(shown, colours), loc="outside lower center", ncols=4, fontsize=FONT_SIZE, frameon=False
    )
    return figure


def _select_panels(found: Spectra) -> list[JointSpectrum]:
    energy = {kind.kind: kind.energy for kind in reversed(found.kinds)}  # the first method's stays
    most = sorted(found.joint, key=lambda spectrum: -energy[spectrum.kind])[:PANELS]
    return [spectrum for spectrum in found.joint if spectrum in most]


def _panel(axes: Axes, spectrum: JointSpectrum, colours: dict[int, str]) -> None:
    style_grid(axes)
    axes.set_title(f"{spectrum.kind} ({spectrum.shape[0]} × {spectrum.shape[1]})", fontsize=FONT_SIZE + 1)
    _curve(axes, spectrum.noise, GREY, 1.0)
    for curve in sorted(spectrum.curves, key=lambda curve: curve.label == FULL_LABEL):
        colour, width = (FULL_COLOUR, 2.4) if curve.rank is None else (colours[curve.rank], 1.4)
        _curve(axes, curve.values, colour, width)
    if spectrum.mp_edge is not None:
        axes.axhline(spectrum.mp_edge, color=DARK, linestyle=(0, (4, 2)), linewidth=1)
    if spectrum.rounding_edge is not None:
        axes.axhline(spectrum.rounding_edge, color=DARK, linestyle=(0, (1, 1)), linewidth=1)


def _curve(axes: Axes, values: Sequence[float], colour: str, width: float) -> None:
    positive = [value for value in values if value > 0]
    marker = "o" if len(positive) <= 2 else ""
    axes.plot(range(1, len(positive) + 1), positive, color=colour, linewidth=width, marker=marker, markersize=4)


def _axes(panels: Sequence[Axes], shown: Sequence[JointSpectrum], columns: int) -> None:
    values = [value for spectrum in shown for value in _values(spectrum.curves) if value > 0]
    longest = max(len(curve.values) for spectrum in shown for curve in spectrum.curves)
    if values:
        panels[0].set_yscale("log")
        panels[0].set_ylim(max(min(values), max(values) * 10.0**-DECADES) / 1.3, max(values) * 1.5)
    for number, panel in enumerate(panels):
        set_log2_axis(panel)
        if number + columns >= len(panels):
            panel.tick_params(labelbottom=True)
        if number >= (len(panels) - 1) // columns * columns:  # above an empty place a label would part the rows
            panel.set_xlabel("index", fontsize=FONT_SIZE + 1)
    panels[0].set_xlim(0.9, longest * 1.1)


def _values(curves: Iterable[SpectrumCurve]) -> list[float]:
    return [value for curve in curves for value in curve.values]


def _legend(shown: Sequence[JointSpectrum], colours: dict[int, str]) -> list[Line2D]:
    handles = []
    if any(curve.label == FULL_LABEL for curve in shown[0].curves):
        handles.append(Line2D([], [], color=FULL_COLOUR, linewidth=2.4, label=FULL_NAME))
    handles += [Line2D([], [], color=colour, linewidth=1.4, label=f"LoRA r = {r}") for r, colour in colours.items()]
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="noise of equal energy"))
    for name, dashes, edges in (
        ("noise edge (MP)", (4, 2), [spectrum.mp_edge for spectrum in shown]),
        ("rounding edge", (1, 1), [spectrum.rounding_edge for spectrum in shown]),
    ):
        if any(edge is not None for edge in edges):
            handles.append(Line2D([], [], color=DARK, linewidth=1, linestyle=(0, dashes), label=name))
    return handles


def plot_ranks_by_kind(found: Spectra) -> Figure:
    """k90 and entropy rank by kind of module, medians over layers, beside noise and the smaller side."""
    figure = new_figure(9, 4)
    panels: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    colours = rank_colours(found.ranks)
    names = list(dict.fromkeys(kind.kind for kind in found.kinds))
    for panel, measure in zip(panels, measures_shown("kinds"), strict=True):
        style_grid(panel)
        panel.set_title(measure.label, fontsize=FONT_SIZE + 2)
        for place, name in enumerate(names):
            _ranks(panel, place, measure.name, [kind for kind in found.kinds if kind.kind == name], colours)
        panel.set_xticks(range(len(names)), names, fontsize=FONT_SIZE, rotation=30 if len(names) > 4 else 0, ha="right")
        panel.set_xlim(-0.6, len(names) - 0.4)
        panel.set_xlabel("kind of module", fontsize=FONT_SIZE + 1)
    panels[0].set_yscale("log", base=2)
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylabel("effective rank of the update", fontsize=FONT_SIZE + 1)
    handles = _rank_legend(found, colours)
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=FONT_SIZE, frameon=False)
    return figure


def _ranks(axes: Axes, place: int, measure: str, kinds: Sequence[KindRanks], colours: dict[int, str]) -> None:
    dim = kinds[0].dim
    span = (place - REACH, place + REACH)
    axes.plot(span, (dim, dim), color=DARK, linewidth=1.2)
    axes.plot(span, (LOW_RANK_SHARE * dim, LOW_RANK_SHARE * dim), color=DARK, linewidth=1, linestyle=(0, (1, 1)))
    for kind in kinds:
        if kind.noise is not None:
            axes.plot(span, (kind.noise[measure],) * 2, color=GREY, linewidth=3, alpha=0.7, solid_capstyle="butt")
        if kind.rank is None:
            axes.plot([place], [kind.measures[measure]], "D", color=FULL_COLOUR, markersize=6, zorder=4)
        else:
            axes.plot([place], [kind.measures[measure]], "o", color=colours[kind.rank], markersize=5, zorder=3)


def _rank_legend(found: Spectra, colours: dict[int, str]) -> list[Line2D]:
    def mark(marker: str, colour: str, label: str) -> Line2D:
        return Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)

    full = any(kind.label == FULL_LABEL for kind in found.kinds)
    return [
        *([mark("D", FULL_COLOUR, FULL_NAME)] if full else []),
        *(mark("o", colour, f"LoRA r = {rank}") for rank, colour in colours.items()),
        Line2D([], [], color=DARK, linewidth=1.2, label="smaller side of the weight"),
        *([Line2D([], [], color=GREY, linewidth=3, alpha=0.7, label="pure noise")] if full else []),
        Line2D(
            [], [], color=DARK, linewidth=1, linestyle=(0, (1, 1)), label=f"low: {LOW_RANK_SHARE:g} of the smaller side"
        ),
    ]
