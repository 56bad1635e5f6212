"""Several sources of updates, each with each, as a page: which are alike, every pair, what was left out."""

from __future__ import annotations

import numpy as np

from rankscope.analysis.matrix_result import SIGNIFICANCE_LEVEL, MatrixResult
from rankscope.analysis.matrix_tables import join_table, overlap_table, pair_table, source_columns
from rankscope.plots import plot_matrix
from rankscope.report.document import Document, Picture, Section
from rankscope.report.shared_sections import alone_tables, format_short, remark_sections, skipped_tables
from rankscope.table import Table
from rankscope.train.study import versions


def build_document(result: MatrixResult, command: str = "") -> Document:
    """The page of ``rankscope compare`` with three sources or more.

    Args:
        command: the command that makes this page, for its end.
    """
    n = len(result.titles)
    return Document(
        title=f"{n} sources, each with each",
        lead=f"Which of them learned the same? {_summary_sentence(result)}",
        facts={"sources": str(n), "compared": result.matrices, "layers": f"{len(result.layers)}, which all share"},
        sections=[
            *remark_sections(result.notes),
            _similarity_section(result),
            _pairs_section(result),
            _sources_section(result),
            _omitted_section(result),
        ],
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


def _similarity_section(result: MatrixResult) -> Section:
    caption = "φ, the mean of the sides, in the order of the tree; columns by the numbers of the sources."
    first = 1 - float(result.joins[0, 2])
    return Section(
        key="alike",
        title="Which are alike",
        lead="φ is the share of the top k directions that two sources have in common, where k is the smaller number of "
        "the two: 1 for equal spans, k/d for random ones in dimension d. It is the median over layers.",
        pictures=[
            Picture(
                name="alike",
                caption="The tree joins what overlaps most (average linkage on 1 − φ). Dashed: chance. Grey: joins not "
                "beyond it. A dot marks pairs that are not beyond chance.",
                alt=f"A tree of {len(result.titles)} sources beside heat maps of their overlap and cosine; the first "
                f"join is at φ = {format_short(first)}.",
                draw=lambda: plot_matrix(result),
                data=overlap_table(result, caption),
            )
        ],
        tables=[
            join_table(
                result,
                "joins",
                "Joins, the most alike first; beyond chance: at least half of the pairs that a join brings together.",
            )
        ],
    )


def _pairs_section(result: MatrixResult) -> Section:
    return Section(
        key="pairs",
        title="Every pair",
        lead="Overlap beside chance, and how far apart the updates are, all layers as one vector.",
        tables=[pair_table(result, "pairs", "All pairs.")],
        notes=[
            "p: the probability that more than half of the layers overlap so much by chance, however they depend on "
            "each other (Rüger 1978), corrected for all pairs and sides (Holm)."
        ],
    )


def _sources_section(result: MatrixResult) -> Section:
    places = range(len(result.titles))
    return Section(
        key="sources",
        title="The sources",
        lead="What was compared.",
        tables=[Table.of(source_columns(result), places, "sources", "The sources.")],
    )


def _omitted_section(result: MatrixResult) -> Section:
    alone = [(name, title) for title, names in zip(result.titles, result.alone, strict=True) for name in names]
    tables = alone_tables(alone, "alone", "Layers that not all sources have.", "source")
    tables += skipped_tables(result.skipped)
    lead = (
        "Layers that not all have, and tensors that are no updates." if tables else "Every layer of all was compared."
    )
    return Section(key="left-out", title="What was not compared", lead=lead, tables=tables)
