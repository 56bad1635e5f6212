"""What all figures share: colours, size, and being written to a file."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from rankscope.errors import ConfigError, FormatError
from rankscope.formats.file_io import write_atomic

SUFFIXES = ("png", "svg", "pdf")
DPI = 160
FONT_SIZE = 8  # points; titles and labels are matplotlib's own 10 to 12

# Okabe & Ito 2008, told apart with every common kind of colour blindness; without the yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#888888"
DARK = "#222222"
CHANCE_COLOUR = "#D55E00"
BAND: dict[str, Any] = {"alpha": 0.15, "linewidth": 0}
"""The style of a band from the least to the largest of several values."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches that draws itself without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The kind of picture a path asks for by its suffix.

    Raises:
        ConfigError: not one of ``SUFFIXES``.
    """
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a plot is written as {', '.join('.' + s for s in SUFFIXES)}, by its suffix")
    return suffix


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as png, svg or pdf, atomically and without a date: the same figure gives the same bytes.

    Raises:
        ConfigError: another suffix.
        FormatError: the file cannot be written.
    """
    kind, target = check_suffix(path), Path(path).expanduser()
    if target.is_dir():
        raise FormatError(f"{target}: is a folder; give the plot a name of its own")

    def write(file: Path) -> None:
        file.write_bytes(encode(figure, kind))

    write_atomic(target, write)
    return target


def encode(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file of this kind, one of ``SUFFIXES``, without a date."""
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    content = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "rankscope"}):
        figure.savefig(content, format=kind, dpi=DPI, metadata=undated[kind])
    return content.getvalue()


def escape_math(name: str) -> str:
    """A name from a file as text: between dollar signs matplotlib would read mathematics, and stop at what is none."""
    return name.replace("$", r"\$")


def set_log2_axis(axes: Axes) -> None:
    """A logarithmic x axis with ticks at 1, 2, 4, …, written as numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def style_grid(axes: Axes) -> None:
    """Light lines behind the data, no box around it."""
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_SIZE)


def add_colour_bar(
    figure: Figure, image: AxesImage, axes: Any, label: str, size: int = FONT_SIZE, **place: Any
) -> None:
    """A colour bar beside one or several axes, with its label in this size."""
    bar = figure.colorbar(image, ax=axes, **place)
    bar.set_label(label, fontsize=size)
    bar.ax.tick_params(labelsize=FONT_SIZE)


def draw_level(axes: Axes, values: Sequence[float], colour: str, is_vertical: bool = False, **style: Any) -> Line2D:
    """The median of several levels as a line across the axes, on a band from the least to the largest."""
    line, span = (axes.axvline, axes.axvspan) if is_vertical else (axes.axhline, axes.axhspan)
    span(min(values), max(values), color=style.pop("band", colour), **BAND)
    return line(statistics.median(values), color=colour, **style)


def add_legend_below(figure: Figure, handles: Sequence[Artist], **style: Any) -> None:
    """A legend without a frame below all axes."""
    place: dict[str, Any] = {"loc": "outside lower center", "fontsize": FONT_SIZE, "frameon": False}
    figure.legend(handles=handles, **{**place, **style})
