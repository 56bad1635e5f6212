"""``rankscope compare`` of three sources and more: the tables, CSV and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import click

from rankscope.cli.output import format_count, print_table
from rankscope.table import format_number

if TYPE_CHECKING:
    from rankscope.analysis.matrix_result import MatrixResult, SideMatrix


def uncommon_layer_lines(result: MatrixResult, verbose: bool) -> Iterator[str]:
    """Layers that not all sources have: how many, or all of them."""
    for title, names in zip(result.titles, result.alone, strict=True):
        if names:
            shown = ", ".join(names if verbose else names[:1]) + ("" if verbose or len(names) == 1 else ", …")
            yield f"{format_count(len(names), 'layer')} of {title} that not all have: {shown}"


def print_matrix(result: MatrixResult) -> None:
    """φ of both sides in one table, and the cosines; sources in the order of the tree, alike ones side by side."""
    from rankscope.analysis.matrix_result import SIGNIFICANCE_LEVEL
    from rankscope.analysis.matrix_tables import cosine_table, join_table, side_table

    sides = list(result.sides.values())
    places = "left below the diagonal, right above" if len(sides) == 2 else next(iter(result.sides))
    layers = f"{format_count(len(result.layers), 'layer')} that all share"
    click.echo(f"φ, median over {layers} ({result.matrices}): {places}")
    print_table(side_table(result, SIGNIFICANCE_LEVEL))
    click.echo(f"in brackets: not beyond chance, which is {_chance(sides)} (p ≥ 0.05, corrected for all pairs)")
    if result.cosine is not None:
        click.echo("\ncosine, all layers as one vector")
        print_table(cosine_table(result, result.cosine))
    click.echo()
    print_table(join_table(result, "terminal"))


def _chance(sides: Sequence[SideMatrix]) -> str:
    """The range of the chance levels of all pairs of two different sources."""
    levels = [float(side.expected[i, j]) for side in sides for i, j in combinations(range(len(side.expected)), 2)]
    low, high = format_number(min(levels), 2), format_number(max(levels), 2)
    return low if low == high else f"{low} to {high}"
