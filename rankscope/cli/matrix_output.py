"""``rankscope compare`` of three sources and more: the tables, CSV and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from rankscope.cli.output import format_count, print_rows
from rankscope.table import Cell, format_number

if TYPE_CHECKING:
    from rankscope.analysis.matrix import MatrixResult, SideMatrix
    from rankscope.noise import Array

PAIR_COLUMNS = ("overlap", "expected", "p")


def uncommon_layer_lines(result: MatrixResult, verbose: bool) -> Iterator[str]:
    """Layers that not all sources have: how many, or all of them."""
    for title, names in zip(result.titles, result.alone, strict=True):
        if names:
            shown = ", ".join(names if verbose else names[:1]) + ("" if verbose or len(names) == 1 else ", …")
            yield f"{format_count(len(names), 'layer')} of {title} that not all have: {shown}"


def print_matrix(result: MatrixResult) -> None:
    """φ of both sides in one table, and the cosines; sources in the order of the tree, alike ones side by side."""
    order = result.order
    sides = list(result.sides.values())
    places = "left below the diagonal, right above" if len(sides) == 2 else next(iter(result.sides))
    layers = f"{format_count(len(result.layers), 'layer')} that all share"
    click.echo(f"φ, median over {layers} ({result.matrices}): {places}")
    below, above = (sides * 2)[:2]
    rows = [
        [_overlap(below if j < i else above, order[i], order[j]) for j in range(len(order))] for i in range(len(order))
    ]
    _print(result, order, rows)
    click.echo(f"in brackets: not beyond chance, which is {_chance(sides)} (p ≥ 0.05, corrected for all pairs)")
    if result.cosine is not None:
        click.echo("\ncosine, all layers as one vector")
        _print(result, order, [[f"{result.cosine[i, j]:z.2f}" for j in order] for i in order])
    click.echo()
    _print_joins(result)


def _overlap(side: SideMatrix, i: int, j: int) -> str:
    from rankscope.analysis.matrix import SIGNIFICANCE_LEVEL

    text = f"{side.overlap[i, j]:.2f}"
    return f"({text})" if side.p[i, j] >= SIGNIFICANCE_LEVEL else text


def _print(result: MatrixResult, order: Sequence[int], rows: Sequence[Sequence[str]]) -> None:
    header = ["source", "#", *(str(i + 1) for i in order)]
    print_rows(header, [[result.titles[i], str(i + 1), *row] for i, row in zip(order, rows, strict=True)])


def _chance(sides: Sequence[SideMatrix]) -> str:
    ends = [float(end) for side in sides for end in (_others(side.expected).min(), _others(side.expected).max())]
    low, high = format_number(min(ends), 2), format_number(max(ends), 2)
    return low if low == high else f"{low} to {high}"


def _others(matrix: Array) -> Array:
    """The pairs of two different sources."""
    import numpy as np

    found: Array = matrix[np.triu_indices(len(matrix), 1)]
    return found


def _print_joins(result: MatrixResult) -> None:
    """What is joined with what, the most alike first."""
    joins = zip(result.branch_members, result.joins[:, 2], result.beyond_chance, strict=True)
    rows = [
        [f"{_format_members(one)} | {_format_members(other)}", f"{1 - distance:.3f}", "yes" if beyond else "no"]
        for (one, other), distance, beyond in joins
    ]
    print_rows(["joined, most alike first", "φ", "beyond chance"], rows)


def _format_members(members: Sequence[int]) -> str:
    """The numbers that tables give to sources, from 1, runs of three and more by their ends: ``1-4 7 8``."""
    runs: list[list[int]] = []
    for member in (place + 1 for place in members):
        if runs and member == runs[-1][-1] + 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs)


def csv_header() -> list[str]:
    sides = [f"{side}_{name}" for side in ("left", "right") for name in PAIR_COLUMNS]
    return ["a", "b", "layers", *sides, "norm_a", "norm_b", "cosine", "relative_difference", "distance"]


def csv_rows(result: MatrixResult) -> Iterator[list[Cell]]:
    """One row a pair."""
    for i, j in result.pairs:
        sides = [value for side in (result.left, result.right) for value in _csv_side(side, i, j)]
        sizes = [None if matrix is None else matrix[i, j] for matrix in (result.cosine, result.relative_difference)]
        ends = [result.norms[i], result.norms[j], *sizes, result.distance[i, j]]
        yield [result.titles[i], result.titles[j], len(result.layers), *sides, *ends]


def _csv_side(side: SideMatrix | None, i: int, j: int) -> list[Cell]:
    return [None] * len(PAIR_COLUMNS) if side is None else [getattr(side, name)[i, j] for name in PAIR_COLUMNS]
