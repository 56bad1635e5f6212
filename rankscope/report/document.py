"""What a page is made of, whatever it reports on: sections with verdicts, pictures and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure

from rankscope.plots.figure import encode
from rankscope.table import Cell as Cell
from rankscope.table import Table as Table
from rankscope.verdict import Verdict


@dataclass(frozen=True)
class Picture:
    """A figure, what it shows in words for whoever cannot see it, and the numbers in it.

    ``name`` is the stem of its files (png, svg, csv). ``draw`` is called once, when the figure is first asked for.
    """

    name: str
    caption: str
    alt: str
    draw: Callable[[], Figure]
    data: Table

    @cached_property
    def figure(self) -> Figure:
        """The figure, drawn once for the page and the files beside it."""
        return self.draw()

    @cached_property
    def png(self) -> bytes:
        """The figure as points, encoded once."""
        return encode(self.figure, "png")

    @cached_property
    def svg(self) -> bytes:
        """The figure as lines, encoded once."""
        return encode(self.figure, "svg")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One question and its answer. ``lead`` says in a sentence what is looked at and why.

    ``key`` is its anchor; ``missing`` says what the section would need, where it has nothing to show. The page of a
    study takes ``key`` and ``title`` of a line of evidence from ``evidence.lines``.
    """

    key: str = ""
    title: str = ""
    lead: str
    verdicts: Sequence[Verdict] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Document:
    """A page. ``facts`` are short pairs below the title; ``provenance`` is what made it, for the end of the page."""

    title: str
    lead: str
    sections: Sequence[Section]
    facts: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
