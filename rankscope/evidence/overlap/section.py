"""The section on overlap: do other ranks and other seeds learn the same directions?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rankscope.evidence.overlap.figure import ComparisonRow, plot_directions, plot_overlaps, select_comparisons
from rankscope.evidence.overlap.measure import MATRIX_SYMBOLS, Overlap, explain_side
from rankscope.evidence.overlap.pairs import RunComparison, SideOverlap
from rankscope.haar import DRAWS
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.verdict import MAX_CORRECTED_P, Verdict

MEANS = "φ(i, j) = ‖U_iᵀV_j‖²_F / min(i, j): 1 where the top i directions of one and the top j of the other are shared."


def build_section(found: Overlap, verdicts: Sequence[Verdict]) -> Section:
    """Overlap across ranks and seeds, as evidence on whether the directions learned are the task's own."""
    rows = select_comparisons(found)
    return Section(
        lead=(
            f"If the task asks for few directions, runs of another rank or seed find them again: the top directions of "
            f"{MATRIX_SYMBOLS[found.of]} are compared, each overlap beside what independent random subspaces would have."
        ),
        verdicts=verdicts,
        pictures=(_grids(found, rows), _directions(found, rows)),
        tables=(_summary(found), _layers(found)),
        notes=tuple(_notes(found)),
    )


def _grids(found: Overlap, rows: Sequence[ComparisonRow]) -> Picture:
    return Picture(
        name="overlap-grids",
        caption=f"{MEANS} Median over layers and pairs of runs.",
        alt="Heat maps of the overlap. " + " ".join(_describe_row(row) for row in rows),
        draw=lambda: plot_overlaps(found),
        data=Table(
            name="overlap-grids",
            caption="Overlap of the top i and the top j directions, median over layers.",
            header=("across", "side", "i", "j", "overlap", "by chance", "random pair"),
            rows=[cells for row in rows for cells in _grid_rows(row)],
        ),
    )


def _grid_rows(row: ComparisonRow) -> Iterator[tuple[Cell, ...]]:
    for side, random in _beside(row):
        same = random is not None and random.grid.overlap.shape == side.grid.overlap.shape
        for (i, j), value in ((at, side.grid.overlap[at]) for at in _places(side)):
            drawn_at = float(random.grid.overlap[i, j]) if random is not None and same else None
            yield row.across, side.side, i + 1, j + 1, float(value), float(side.grid.expected[i, j]), drawn_at


def _places(side: SideOverlap) -> Iterator[tuple[int, int]]:
    rows, columns = side.grid.overlap.shape
    return ((i, j) for i in range(rows) for j in range(columns))


def _beside(row: ComparisonRow) -> Iterator[tuple[SideOverlap, SideOverlap | None]]:
    for side in row.measured.sides.values():
        yield side, row.random.sides.get(side.side) if row.random else None


def _directions(found: Overlap, rows: Sequence[ComparisonRow]) -> Picture:
    return Picture(
        name="overlap-directions",
        caption=(
            "Overlap of as many top directions of each, median over layers and pairs of runs; the band holds 95 % of "
            "single layers by chance. Where the factors before training overlap already, the side proves nothing."
        ),
        alt="Overlap against the number of directions. " + " ".join(_describe_row(row) for row in rows),
        draw=lambda: plot_directions(found),
        data=Table(
            name="overlap-directions",
            caption="Overlap of the top i directions of each, median over layers.",
            header=("across", "side", "i", "overlap", "by chance", "from", "to", "before training", "random pair"),
            rows=[cells for row in rows for cells in _diagonal_rows(row)],
        ),
    )


def _diagonal_rows(row: ComparisonRow) -> Iterator[tuple[Cell, ...]]:
    for side, random in _beside(row):
        measured, expected = side.grid.diagonal
        before = side.grid.initial
        other = random.grid.diagonal[0] if random is not None else before[:0]
        for i in range(side.k):
            yield (
                row.across,
                side.side,
                i + 1,
                float(measured[i]),
                float(expected[i]),
                float(side.grid.low[i]),
                float(side.grid.high[i]),
                float(before[i]) if i < len(before) else None,
                float(other[i]) if i < len(other) else None,
            )


def _describe_row(row: ComparisonRow) -> str:
    """The finding in words, for whoever cannot see the picture."""
    sides = [
        f"on the {side.side} φ(1, 1) is {side.top.value:.2g}, by chance {side.top_expected:.2g}, and "
        f"φ({side.k}, {side.k}) is {side.square.value:.2g}, by chance {side.square_expected:.2g}"
        for side in row.measured.sides.values()
    ]
    return f"{row.title.capitalize()}: {'; '.join(sides)}."


def _summary(found: Overlap) -> Table:
    named = [("ranks", found.ranks)] if found.ranks else []
    named += [("seeds", one) for one in found.seeds] + [("random pair", one) for one in found.random]
    return Table(
        name="overlap-summary",
        caption=(
            "Medians over layers, with the interval of φ(1, 1). z is in standard deviations of the overlap of random "
            "subspaces. A side whose factors overlapped before training does not count."
        ),
        header=(
            *("across", "ranks", "pairs", "side", "φ(1, 1)", "from", "to", "chance (1, 1)", "z (1, 1)"),
            *("k", "φ(k, k)", "chance (k, k)", "z (k, k)", "layers", "beyond chance", "z before training", "counts"),
        ),
        rows=[_summary_row(across, one, side) for across, one in named for side in one.sides.values()],
        digits=3,
    )


def _summary_row(across: str, one: RunComparison, side: SideOverlap) -> tuple[Cell, ...]:
    counts = "" if across == "random pair" else "yes" if side.is_informative else "no"
    return (
        *(across, f"{one.rank_a}, {one.rank_b}", len(one.pairs), side.side),
        *(*side.top, side.top_expected, side.top_z),
        *(side.k, side.square.value, side.square_expected, side.square_z),
        *(side.layers, side.significant, side.initial_z, counts),
    )


def _layers(found: Overlap) -> Table:
    named = ([("ranks", found.ranks)] if found.ranks else []) + [("seeds", one) for one in found.seeds]
    return Table(
        name="overlap-layers",
        caption=(
            "Each layer and side, medians over pairs of runs. p is the least of a grid, corrected for looking at all "
            "of it, of the pair where it is largest; then corrected for all layers and sides."
        ),
        header=(
            *("across", "ranks", "layer", "side", "d", "φ(1, 1)", "chance (1, 1)", "z (1, 1)"),
            *("k", "φ(k, k)", "chance (k, k)", "z (k, k)", "p of the grid", "p of all"),
        ),
        rows=[
            (
                *(across, f"{one.rank_a}, {one.rank_b}", row.layer, row.side, row.d),
                *(row.top.overlap, row.top.expected, row.top.z),
                *(row.square.i, row.square.overlap, row.square.expected, row.square.z, row.p, row.holm),
            )
            for across, one in named
            for row in one.rows
        ],
        digits=3,
    )


def _notes(found: Overlap) -> Iterator[str]:
    yield (
        f"The p of a grid is the chance that the least p of a whole grid is as small, from {DRAWS} pairs of random "
        "subspaces; what is rarer is bounded by the number of cells times p. Holm's correction for layers and sides "
        f"follows, and {MAX_CORRECTED_P:g} is where the line is drawn. With several pairs of runs each of them has to pass."
    )
    if found.ranks is not None:
        yield "Across ranks each pair of runs has one seed: initial factors of its own, and the same batches in order."
    for across, one in (("ranks", found.ranks), ("seeds", found.seeds[-1] if found.seeds else None)):
        if one is not None and found.of != "B" and one.right is not None:
            yield f"Across {across} the right side {explain_side(one.right)}."
        if one is not None and one.skipped:
            yield f"Across {across} not compared: {'; '.join(one.skipped)}."
