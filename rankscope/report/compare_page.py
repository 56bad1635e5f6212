"""A comparison of two sources of updates as a page: shared directions, angles, distances, and what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rankscope.analysis.comparison import CompareResult, SideSummary
from rankscope.analysis.comparison_tables import layer_columns, span_columns
from rankscope.analysis.layer_comparison import SideComparison
from rankscope.inference import holm
from rankscope.plots import plot_overlap
from rankscope.plots.overlap_figure import SPACES, select_drawn_layers
from rankscope.report.document import Document, Picture, Section
from rankscope.report.shared_sections import (
    alone_tables,
    count_layers,
    format_short,
    powers_of_two,
    remark_sections,
    skipped_tables,
)
from rankscope.table import Table
from rankscope.train.study import versions
from rankscope.verdict import MAX_CORRECTED_P


def build_document(result: CompareResult, layer: str | None = None, command: str = "") -> Document:
    """The page of ``rankscope compare``.

    Args:
        layer: the layer that is drawn; None takes the median over layers.
        command: what made this page, for its end.

    Raises:
        ConfigError: no such layer.
    """
    a, b = result.titles
    sizes = [] if result.of != "update" else [_sizes_section(result)]
    return Document(
        title=f"{a} against {b}",
        lead=f"Do two sets of updates point the same way? {_summary_sentence(result)}",
        facts={
            "a": f"{result.a.path} ({result.a.kind})",
            "b": f"{result.b.path} ({result.b.kind})",
            "compared": result.matrices,
            "layers": str(len(result.layers)),
        },
        sections=[
            *remark_sections(result.notes),
            _directions_section(result, layer),
            _spans_section(result),
            *sizes,
            _omitted_section(result),
        ],
        provenance={"command": command, "versions": versions(), "schema": result.schema},
    )


def _summary_sentence(result: CompareResult) -> str:
    """The medians over layers beside chance, in words."""
    overlaps = [f"{_describe_side(side)} in the {SPACES[name]}" for name, side in _summaries(result).items()]
    cosine = result.summary.cosine
    rest = "" if cosine is None else f" The cosine of the updates, all layers as one vector, is {format_short(cosine)}."
    layers = count_layers(len(result.layers))
    return f"Their top directions overlap by {' and by '.join(overlaps)}, median over {layers}.{rest}"


def _describe_side(side: SideSummary) -> str:
    return f"φ = {format_short(side.overlap)} (chance {format_short(side.expected)})"


def _summaries(result: CompareResult) -> dict[str, SideSummary]:
    both = {"left": result.summary.left, "right": result.summary.right}
    return {name: side for name, side in both.items() if side is not None}


def _directions_section(result: CompareResult, layer: str | None) -> Section:
    """φ at as many top directions as both have, and the heat maps of all cuts."""
    caption = "Overlap φ(k, k) of the top k directions of each, k the smaller number of the two, layer by layer."
    return Section(
        key="directions",
        title="Shared directions",
        lead="The overlap φ(i, j) is the share of the top i directions of a that lies within the top j of b, where "
        "i ≤ j, and the other way round else: 1 where one holds the other, max(i, j)/d for random directions in "
        f"dimension d. {_beyond_chance(result)}",
        pictures=[_picture(result, layer)],
        tables=[Table.of(layer_columns(result), result.layers, "directions", caption)],
        notes=[
            "z and p say how far φ is from that of random directions; p is the chance of at least this φ, of this "
            "layer alone.",
            "near-equal σ: of a, b or both the cut at k falls among singular values so close that the top k "
            "directions are arbitrary; φ at this cut then says little.",
        ],
    )


def _beyond_chance(result: CompareResult) -> str:
    """In how many layers the overlap is more than chance, corrected for the number of layers."""
    counts = []
    for name in _summaries(result):
        p = holm([layer.sides[name].square.p for layer in result.layers])
        counts.append(
            f"in {int((p < MAX_CORRECTED_P).sum())} of {count_layers(len(result.layers))} in the {SPACES[name]}"
        )
    return (
        f"It is above chance {' and '.join(counts)} (p < {MAX_CORRECTED_P:g} by Holm's correction for the number of "
        "layers)."
    )


def _picture(result: CompareResult, layer: str | None) -> Picture:
    chosen, shown = select_drawn_layers(result, layer)
    cuts = _cuts(chosen)
    square = min(cuts[-1][0], cuts[-1][1])
    overlaps = []
    for name in chosen[0]:
        overlap, chance = _medians(chosen, name, square, square)
        overlaps.append(
            f"φ({square}, {square}) is {format_short(overlap)} in the {SPACES[name]}, by chance {format_short(chance)}"
        )
    return Picture(
        name="overlap",
        caption=f"Overlap φ(i, j) of the top i directions of a and the top j of b, beside its chance level on the same "
        f"colours; {shown}. Hatched: cuts among near-equal singular values.",
        alt=f"Heat maps of the overlap up to i = {cuts[-1][0]} and j = {cuts[-1][1]}, each beside its chance level; "
        f"{shown}. {'; '.join(overlaps)}.",
        draw=lambda: plot_overlap(result, layer),
        data=Table(
            name="overlap",
            caption=f"φ(i, j) and its chance level at some of the cuts; {shown}.",
            header=("i of a", "j of b", *(f"{title} {name}" for name in chosen[0] for title in ("φ", "chance"))),
            rows=[[i, j, *(value for name in chosen[0] for value in _medians(chosen, name, i, j))] for i, j in cuts],
        ),
    )


def _cuts(chosen: Sequence[dict[str, SideComparison]]) -> list[tuple[int, int]]:
    """Pairs of cuts at powers of two and at the last."""
    rows, columns = next(iter(chosen[0].values())).overlap.shape
    return [(i, j) for i in powers_of_two(rows) for j in powers_of_two(columns)]


def _medians(chosen: Sequence[dict[str, SideComparison]], name: str, i: int, j: int) -> tuple[float, float]:
    """φ(i, j) of one side and its chance level, medians over layers."""
    cells = [sides[name].at(i, j) for sides in chosen]
    return statistics.median(cell.overlap for cell in cells), statistics.median(cell.expected for cell in cells)


def _spans_section(result: CompareResult) -> Section:
    """All directions of both: φ, principal angles, distances; a table a side."""
    summaries = _summaries(result)
    overlaps = [
        f"{format_short(side.whole)} (chance {format_short(side.whole_expected)}) in the {SPACES[name]}"
        for name, side in summaries.items()
    ]
    return Section(
        key="spans",
        title="Angles and distances of the spans",
        lead="All directions that were compared of each, as two subspaces: the principal angles between them and "
        f"distances made of these angles. φ of the whole spans is {' and '.join(overlaps)}, median over "
        f"{count_layers(len(result.layers))}.",
        tables=[
            Table.of(
                span_columns(name),
                result.layers,
                "spans",
                f"Angles and distances in the {SPACES[name]}, layer by layer.",
                f"spans-{name}",
            )
            for name in summaries
        ],
        notes=[
            "i × j: the dimensions of the two. Angles in degrees, least and largest of the min(i, j) principal ones.",
            "projection: √(p − Σcos²θ) with p = min(i, j), the same as chordal; by chance: its root mean square for "
            "random spans. geodesic: √Σθ², in radians. Fubini–Study: arccos Πcosθ. Procrustes: √(2(p − Σcosθ)).",
        ],
    )


def _sizes_section(result: CompareResult) -> Section:
    """Norms, cosine and relative difference."""
    summary = result.summary
    difference = (
        ""
        if summary.relative_difference is None
        else f" Their difference is {format_short(summary.relative_difference)} of the larger."
    )
    caption = "Frobenius norms, cosine and relative difference ‖a − b‖/max(‖a‖, ‖b‖), layer by layer."
    return Section(
        key="sizes",
        title="Size and distance of the updates",
        lead="How large the updates are and how far apart. All layers together, ‖a‖ is "
        f"{format_short(summary.norm_a)} and ‖b‖ {format_short(summary.norm_b)}.{difference}",
        tables=[Table.of(layer_columns(result), result.layers, "sizes", caption)],
        notes=[
            "rank: the nominal rank of an adapter; empty for a full update.",
            "cosine by chance: its standard deviation about 0 for updates turned at random, 1/√(out·in).",
        ],
    )


def _omitted_section(result: CompareResult) -> Section:
    """Layers without a partner, and tensors that are no updates or cannot be compared."""
    alone = [(name, side) for side, names in (("a", result.unmatched.a), ("b", result.unmatched.b)) for name in names]
    tables = alone_tables(alone, "unmatched", "Layers that only one of the two has.", "only in")
    tables += skipped_tables(result.skipped)
    unmatched = f"{len(alone)} of the layers have no partner" if len(alone) != 1 else "1 layer has no partner"
    skipped = f"{len(result.skipped)} tensors were skipped" if len(result.skipped) != 1 else "1 tensor was skipped"
    lead = f"{unmatched}, and {skipped}." if tables else "Every layer of both was compared."
    return Section(key="left-out", title="What was not compared", lead=lead, tables=tables)
