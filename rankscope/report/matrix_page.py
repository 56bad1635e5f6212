"""Several sources of updates, each with each, as a page: which are alike, every pair, what was left out."""

from __future__ import annotations

import numpy as np

from rankscope.analysis.matrix import SIGNIFICANCE_LEVEL, MatrixResult
from rankscope.plots import plot_matrix
from rankscope.report.cells import format_significant
from rankscope.report.document import Cell, Document, Picture, Section, Table
from rankscope.train.study import versions


def build_document(result: MatrixResult, command: str = "") -> Document:
    """The page of ``rankscope compare`` with three sources or more.

    Args:
        command: what made this page, for its end.
    """
    n = len(result.titles)
    remarks = [Section(key="remarks", title="Remarks", lead="", notes=result.notes)] if result.notes else []
    return Document(
        title=f"{n} sources, each with each",
        lead=f"Which of them learned the same? {_summary_sentence(result)}",
        facts={"sources": str(n), "compared": result.matrices, "layers": f"{len(result.layers)}, which all share"},
        sections=[*remarks, _alike(result), _pairs(result), _sources(result), _omitted_section(result)],
        provenance={"command": command, "versions": versions(), "schema": result.schema},
    )


def _summary_sentence(result: MatrixResult) -> str:
    pairs = np.triu_indices(len(result.titles), 1)
    beyond = int((np.fmin.reduce([side.p for side in result.sides.values()])[pairs] < SIGNIFICANCE_LEVEL).sum())
    count = len(pairs[0])
    return (
        f"{beyond} of {count} pair{'' if count == 1 else 's'} overlap beyond chance (p < {SIGNIFICANCE_LEVEL:g}, "
        "corrected)."
    )


def _alike(result: MatrixResult) -> Section:
    rows: list[list[Cell]] = [
        [result.titles[i], *(float(1 - result.distance[i, j]) for j in result.order)] for i in result.order
    ]
    header = ("source", *(str(i + 1) for i in result.order))
    caption = "φ, the mean of the sides, in the order of the tree; columns by the numbers of the sources."
    data = Table(name="alike", caption=caption, header=header, rows=rows)
    first = 1 - float(result.joins[0, 2])
    return Section(
        key="alike",
        title="Which are alike",
        lead="φ is the share of the top k directions that two have in common, k the smaller number of the two: 1 for "
        "equal spans, k/d for random ones in dimension d; median over layers.",
        pictures=[
            Picture(
                name="alike",
                caption="The tree joins what overlaps most (average linkage on 1 − φ); dashed: chance; grey: joins not "
                "beyond it. A dot marks pairs that are not beyond chance.",
                alt=f"A tree of {len(result.titles)} sources beside heat maps of their overlap and cosine; the first "
                f"join is at φ = {format_significant(first, 3)}.",
                draw=lambda: plot_matrix(result),
                data=data,
            )
        ],
        tables=[_joins(result)],
    )


def _joins(result: MatrixResult) -> Table:
    rows: list[list[Cell]] = []
    for both, distance, beyond in zip(result.branch_members, result.joins[:, 2], result.beyond_chance, strict=True):
        one, other = (", ".join(result.titles[i] for i in members) for members in both)
        rows.append([one, other, float(1 - distance), "yes" if beyond else "no"])
    caption = "Joins, the most alike first; beyond chance: at least half of the pairs that a join brings together."
    return Table(name="joins", caption=caption, header=("one", "other", "φ", "beyond chance"), rows=rows)


def _pairs(result: MatrixResult) -> Section:
    header = ["a", "b", *(f"{title} {side}" for side in result.sides for title in ("φ", "chance", "p"))]
    header += [] if result.cosine is None else ["cosine", "relative difference"]
    rows: list[list[Cell]] = []
    for i, j in result.pairs:
        row: list[Cell] = [result.titles[i], result.titles[j]]
        for side in result.sides.values():
            row += [float(matrix[i, j]) for matrix in (side.overlap, side.expected, side.p)]
        sizes = (result.cosine, result.relative_difference)
        rows.append([*row, *(float(matrix[i, j]) for matrix in sizes if matrix is not None)])
    return Section(
        key="pairs",
        title="Every pair",
        lead="Overlap beside chance, and how far apart the updates are, all layers as one vector.",
        tables=[Table(name="pairs", caption="All pairs.", header=tuple(header), rows=rows)],
        notes=[
            "p: that more than half of the layers overlap so much by chance, however they depend on each other (Rüger "
            "1978), corrected for all pairs and sides (Holm)."
        ],
    )


def _sources(result: MatrixResult) -> Section:
    named = zip(result.titles, result.sources, result.norms, result.alone, strict=True)
    rows: list[list[Cell]] = [
        [i, title, one.path, one.kind, float(norm), len(alone)] for i, (title, one, norm, alone) in enumerate(named, 1)
    ]
    header = ("#", "name", "path", "kind", "norm", "layers that not all have")
    return Section(
        key="sources",
        title="The sources",
        lead="What was compared.",
        tables=[Table(name="sources", caption="The sources.", header=header, rows=rows)],
    )


def _omitted_section(result: MatrixResult) -> Section:
    alone = [(name, title) for title, names in zip(result.titles, result.alone, strict=True) for name in names]
    tables = []
    if alone:
        tables.append(Table("alone", "Layers that not all sources have.", ("layer", "source"), alone))
    if result.skipped:
        rows = [(one.name, one.reason) for one in result.skipped]
        tables.append(Table("skipped", "Tensors that were skipped, and why.", ("tensor", "reason"), rows))
    lead = (
        "Layers that not all have, and tensors that are no updates." if tables else "Every layer of all was compared."
    )
    return Section(key="left-out", title="What was not compared", lead=lead, tables=tables)
