"""The tables of ``compare`` with three or more sources; a column is defined once, with the places that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from rankscope.table import Cell, Column, Table

if TYPE_CHECKING:
    from rankscope.analysis.matrix_result import MatrixResult, SideMatrix
    from rankscope.noise import Array
    from rankscope.subspace import Side

Pair = tuple[int, int]


def pair_table(result: MatrixResult, place: str, caption: str = "") -> Table:
    """One row for each pair of sources, in "csv" or in the table "pairs" of the page."""
    return Table.of(pair_columns(result), result.pairs, place, caption)


def pair_columns(result: MatrixResult) -> list[Column[Pair]]:
    """The columns of a pair of sources: in "csv", and in the table "pairs" of the page."""
    titles, norms = result.titles, result.norms
    columns: list[Column[Pair]] = [
        Column.of(lambda pair: titles[pair[0]], csv="a", pairs="a"),
        Column.of(lambda pair: titles[pair[1]], csv="b", pairs="b"),
        Column.of(lambda pair: len(result.layers), csv="layers"),
        *_side_columns("left", result.left),
        *_side_columns("right", result.right),
        Column.of(lambda pair: norms[pair[0]], csv="norm_a"),
        Column.of(lambda pair: norms[pair[1]], csv="norm_b"),
        _matrix_column(result.cosine, csv="cosine", pairs="cosine"),
        _matrix_column(result.relative_difference, csv="relative_difference", pairs="relative difference"),
        _matrix_column(result.distance, csv="distance"),
    ]
    return columns


def _side_columns(name: Side, side: SideMatrix | None) -> Iterator[Column[Pair]]:
    for field, title in (("overlap", "φ"), ("expected", "chance"), ("p", "p")):
        matrix = None if side is None else getattr(side, field)
        yield _matrix_column(matrix, csv=f"{name}_{field}", pairs=f"{title} {name}")


def _matrix_column(matrix: Array | None, **titles: str) -> Column[Pair]:
    """The entries of a matrix (n, n); without a matrix, an empty column of CSV."""
    if matrix is None:
        return Column(lambda pair: None, titles).only("csv")
    return Column(_get_entry(matrix), titles)


def _get_entry(matrix: Array) -> Callable[[Pair], Cell]:
    return lambda pair: matrix[pair]


def source_columns(result: MatrixResult) -> list[Column[int]]:
    """The columns of a source in the table "sources" of the page; items are places from 0."""
    return [
        Column.of(lambda i: i + 1, sources="#"),
        Column.of(lambda i: result.titles[i], sources="name"),
        Column.of(lambda i: result.sources[i].path, sources="path"),
        Column.of(lambda i: result.sources[i].kind, sources="kind"),
        Column.of(lambda i: float(result.norms[i]), sources="norm"),
        Column.of(lambda i: len(result.alone[i]), sources="layers that not all have"),
    ]


class Join(NamedTuple):
    """One join of the tree: the sources of both branches, φ, and whether most of the pairs are beyond chance."""

    first: list[int]
    second: list[int]
    overlap: float
    beyond_chance: str


def join_table(result: MatrixResult, place: str, caption: str = "") -> Table:
    """One row for each join, largest φ first, on the "terminal" or in the table "joins" of the page."""

    def list_titles(members: Sequence[int]) -> str:
        return ", ".join(result.titles[i] for i in members)

    columns: list[Column[Join]] = [
        Column.of(
            lambda join: f"{_format_members(join.first)} | {_format_members(join.second)}",
            terminal="joined, most alike first",
        ),
        Column.of(lambda join: list_titles(join.first), joins="one"),
        Column.of(lambda join: list_titles(join.second), joins="other"),
        Column(attrgetter("overlap"), {"terminal": "φ", "joins": "φ"}, text=".3f"),
        Column(attrgetter("beyond_chance"), {"terminal": "beyond chance", "joins": "beyond chance"}),
    ]
    members, distances = result.branch_members, result.joins[:, 2]
    joins = [
        Join(first, second, float(1 - distance), "yes" if beyond else "no")
        for (first, second), distance, beyond in zip(members, distances, result.beyond_chance, strict=True)
    ]
    return Table.of(columns, joins, place, caption)


def _format_members(members: Sequence[int]) -> str:
    """The numbers of sources in tables, from 1; three or more in a row as a range: ``1-4 7 8``."""
    runs: list[list[int]] = []
    for member in (place + 1 for place in members):
        if runs and member == runs[-1][-1] + 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs)


def source_by_source_table(
    result: MatrixResult, get: Callable[[int, int], Cell], text: str, has_numbers: bool = True, caption: str = ""
) -> Table:
    """One row and one column for each source, in the order of the tree; ``get`` returns the cell of two sources."""
    order = result.order
    columns: list[Column[int]] = [Column.of(lambda i: result.titles[i], table="source")]
    columns += [Column.of(lambda i: str(i + 1), table="#")] if has_numbers else []
    columns += [Column(_get_second(get, j), {"table": str(j + 1)}, text) for j in order]
    return Table.of(columns, order, "table", caption, name="alike")


def _get_second(get: Callable[[int, int], Cell], j: int) -> Callable[[int], Cell]:
    return lambda i: get(i, j)


def overlap_table(result: MatrixResult, caption: str = "") -> Table:
    """φ of every pair of sources, the mean of the sides."""
    return source_by_source_table(
        result, lambda i, j: float(1 - result.distance[i, j]), ".3f", has_numbers=False, caption=caption
    )


def cosine_table(result: MatrixResult, cosine: Array) -> Table:
    """The cosine (n, n) of every pair of sources, all layers as one vector."""
    return source_by_source_table(result, lambda i, j: float(cosine[i, j]), "z.2f")


def side_table(result: MatrixResult, level: float) -> Table:
    """φ of the left side below the diagonal and of the right above it; in brackets where p ≥ ``level``."""
    below, above = (list(result.sides.values()) * 2)[:2]
    place = {source: number for number, source in enumerate(result.order)}

    def get(i: int, j: int) -> str:
        side = below if place[j] < place[i] else above
        text = f"{side.overlap[i, j]:.2f}"
        return f"({text})" if side.p[i, j] >= level else text

    return source_by_source_table(result, get, "")
