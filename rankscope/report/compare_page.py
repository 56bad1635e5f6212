"""A comparison of two sources of updates as a page: shared directions, angles, distances, and what was left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from rankscope.analysis.comparison import CompareResult, SideSummary
from rankscope.analysis.layer_comparison import LayerComparison, SideComparison
from rankscope.inference import holm
from rankscope.plots import plot_overlap
from rankscope.plots.overlap_figure import select_drawn_layers
from rankscope.report.cells import format_significant
from rankscope.report.document import Cell, Document, Picture, Section, Table
from rankscope.train.study import versions
from rankscope.verdict import MAX_CORRECTED_P

SPACES = {"left": "output space (left)", "right": "input space (right)"}
DISTANCES = ("projection", "geodesic", "fubini_study", "procrustes")


def build_document(result: CompareResult, layer: str | None = None, command: str = "") -> Document:
    """The page of ``rankscope compare``.

    Args:
        layer: the layer that is drawn; None takes the median over layers.
        command: what made this page, for its end.

    Raises:
        ConfigError: no such layer.
    """
    a, b = result.titles
    remarks = [Section(key="remarks", title="Remarks", lead="", notes=result.notes)] if result.notes else []
    sizes = [] if result.of != "update" else [_sizes(result)]
    return Document(
        title=f"{a} against {b}",
        lead=f"Do two sets of updates point the same way? {_summary_sentence(result)}",
        facts={
            "a": f"{result.a.path} ({result.a.kind})",
            "b": f"{result.b.path} ({result.b.kind})",
            "compared": result.matrices,
            "layers": str(len(result.layers)),
        },
        sections=[*remarks, _directions(result, layer), _spans(result), *sizes, _omitted_section(result)],
        provenance={"command": command, "versions": versions(), "schema": result.schema},
    )


def _summary_sentence(result: CompareResult) -> str:
    """The medians over layers beside chance, in words."""
    said = [f"{_beside(side)} in the {SPACES[name]}" for name, side in _summaries(result).items()]
    cosine = result.summary.cosine
    rest = "" if cosine is None else f" The cosine of the updates, all layers as one vector, is {_short(cosine)}."
    return f"Their top directions overlap by {' and by '.join(said)}, median over {_layers(result)}.{rest}"


def _beside(side: SideSummary) -> str:
    return f"φ = {_short(side.overlap)} (chance {_short(side.expected)})"


def _short(value: float) -> str:
    return format_significant(value, 3)


def _layers(result: CompareResult) -> str:
    n = len(result.layers)
    return f"{n} layer{'' if n == 1 else 's'}"


def _summaries(result: CompareResult) -> dict[str, SideSummary]:
    both = {"left": result.summary.left, "right": result.summary.right}
    return {name: side for name, side in both.items() if side is not None}


def _directions(result: CompareResult, layer: str | None) -> Section:
    """φ at as many top directions as both have, and the heat maps of all cuts."""
    sides = list(_summaries(result))
    header = ["layer", *(["in b"] if _has_renames(result) else []), "out × in", "k"]
    header += [f"{title} {side}" for side in sides for title in ("φ", "chance", "z", "p")] + ["near-equal σ"]
    table = Table(
        name="directions",
        caption="Overlap φ(k, k) of the top k directions of each, k the smaller number of the two, layer by layer.",
        header=tuple(header),
        rows=[_direction_row(one, _has_renames(result)) for one in result.layers],
    )
    return Section(
        key="directions",
        title="Shared directions",
        lead="The overlap φ(i, j) is the share of the top i directions of a that lies within the top j of b, where "
        "i ≤ j, and the other way round else: 1 where one holds the other, max(i, j)/d for random directions in "
        f"dimension d. {_beyond_chance(result)}",
        pictures=[_picture(result, layer)],
        tables=[table],
        notes=[
            "z and p say how far φ is from that of random directions; p is the chance of at least this φ, of this "
            "layer alone.",
            "near-equal σ: of a, b or both the cut at k falls among singular values so close that the top k "
            "directions are arbitrary; φ at this cut then says little.",
        ],
    )


def _direction_row(layer: LayerComparison, renamed: bool) -> list[Cell]:
    first = next(iter(layer.sides.values()))
    k = first.square.i
    row: list[Cell] = [layer.name, *([layer.name_b] if renamed else []), _shape(layer), k]
    for side in layer.sides.values():
        row += [side.square.overlap, side.square.expected, side.square.z, side.square.p]
    clusters = {"a": first.cluster_a, "b": first.cluster_b}
    return [*row, ", ".join(name for name, flags in clusters.items() if flags[k - 1]) or None]


def _has_renames(result: CompareResult) -> bool:
    return any(layer.name != layer.name_b for layer in result.layers)


def _shape(layer: LayerComparison) -> str:
    return f"{layer.shape[0]} × {layer.shape[1]}"


def _beyond_chance(result: CompareResult) -> str:
    """In how many layers the overlap is more than chance, corrected for the number of layers."""
    said = []
    for name in _summaries(result):
        p = holm([layer.sides[name].square.p for layer in result.layers])
        said.append(f"in {int((p < MAX_CORRECTED_P).sum())} of {_layers(result)} in the {SPACES[name]}")
    return (
        f"It is above chance {' and '.join(said)} (p < {MAX_CORRECTED_P:g} by Holm's correction for the number of "
        "layers)."
    )


def _picture(result: CompareResult, layer: str | None) -> Picture:
    chosen, shown = select_drawn_layers(result, layer)
    cuts = _cuts(chosen)
    square = min(cuts[-1][0], cuts[-1][1])
    said = []
    for name in chosen[0]:
        cell = [[side[name].at(square, square) for side in chosen]][0]
        measured, expected = (statistics.median(getattr(c, field) for c in cell) for field in ("overlap", "expected"))
        said.append(f"φ({square}, {square}) is {_short(measured)} in the {SPACES[name]}, by chance {_short(expected)}")
    return Picture(
        name="overlap",
        caption=f"Overlap φ(i, j) of the top i directions of a and the top j of b, beside its chance level on the same "
        f"colours; {shown}. Hatched: cuts among near-equal singular values.",
        alt=f"Heat maps of the overlap up to i = {cuts[-1][0]} and j = {cuts[-1][1]}, each beside its chance level; "
        f"{shown}. {'; '.join(said)}.",
        draw=lambda: plot_overlap(result, layer),
        data=Table(
            name="overlap",
            caption=f"φ(i, j) and its chance level at some of the cuts; {shown}.",
            header=("i of a", "j of b", *(f"{title} {name}" for name in chosen[0] for title in ("φ", "chance"))),
            rows=[[i, j, *_medians(chosen, i, j)] for i, j in cuts],
        ),
    )


def _cuts(chosen: Sequence[dict[str, SideComparison]]) -> list[tuple[int, int]]:
    """Pairs of cuts at powers of two and at the last."""
    rows, columns = next(iter(chosen[0].values())).overlap.shape
    return [(i, j) for i in powers_of_two(rows) for j in powers_of_two(columns)]


def powers_of_two(last: int) -> list[int]:
    """1, 2, 4, … below ``last``, and ``last``."""
    return [*(2**n for n in range((last - 1).bit_length())), last]


def _medians(chosen: Sequence[dict[str, SideComparison]], i: int, j: int) -> list[Cell]:
    found: list[Cell] = []
    for name in chosen[0]:
        cells = [sides[name].at(i, j) for sides in chosen]
        found += [statistics.median(c.overlap for c in cells), statistics.median(c.expected for c in cells)]
    return found


def _spans(result: CompareResult) -> Section:
    """All directions of both: φ, principal angles, distances; a table a side."""
    summaries = _summaries(result)
    said = [
        f"{_short(side.whole)} (chance {_short(side.whole_expected)}) in the {SPACES[name]}"
        for name, side in summaries.items()
    ]
    return Section(
        key="spans",
        title="Angles and distances of the spans",
        lead="All directions that were compared of each, as two subspaces: the principal angles between them and "
        f"distances made of these angles. φ of the whole spans is {' and '.join(said)}, median over {_layers(result)}.",
        tables=[_span_table(result, name) for name in summaries],
        notes=[
            "i × j: the dimensions of the two. Angles in degrees, least and largest of the min(i, j) principal ones.",
            "projection: √(p − Σcos²θ) with p = min(i, j), the same as chordal; by chance: its root mean square for "
            "random spans. geodesic: √Σθ², in radians. Fubini–Study: arccos Πcosθ. Procrustes: √(2(p − Σcosθ)).",
        ],
    )


def _span_table(result: CompareResult, name: str) -> Table:
    return Table(
        name=f"spans-{name}",
        caption=f"Angles and distances in the {SPACES[name]}, layer by layer.",
        header=(
            *("layer", "i × j", "φ", "chance", "least angle (°)", "largest angle (°)"),
            *("projection", "by chance", "geodesic", "Fubini–Study", "Procrustes"),
        ),
        rows=[_span_row(layer.name, layer.sides[name]) for layer in result.layers],
    )


def _span_row(name: str, side: SideComparison) -> list[Cell]:
    whole, degrees = side.whole, np.degrees(side.angles)
    by_chance = math.sqrt(max(0.0, min(whole.i, whole.j) * (1 - whole.expected)))
    projection, *rest = (side.distance[one] for one in DISTANCES)
    angles = float(degrees[0]), float(degrees[-1])
    return [name, f"{whole.i} × {whole.j}", whole.overlap, whole.expected, *angles, projection, by_chance, *rest]


def _sizes(result: CompareResult) -> Section:
    """Norms, cosine and relative difference."""
    found = result.summary
    apart = (
        ""
        if found.relative_difference is None
        else f" Their difference is {_short(found.relative_difference)} of the larger."
    )
    return Section(
        key="sizes",
        title="Size and distance of the updates",
        lead=f"How large the updates are and how far apart. All layers together, ‖a‖ is {_short(found.norm_a)} and ‖b‖ "
        f"{_short(found.norm_b)}.{apart}",
        tables=[
            Table(
                name="sizes",
                caption="Frobenius norms, cosine and relative difference ‖a − b‖/max(‖a‖, ‖b‖), layer by layer.",
                header=(
                    *("layer", "rank of a", "rank of b", "‖a‖", "‖b‖", "‖a‖/‖b‖"),
                    *("cosine", "cosine by chance (sd)", "relative difference"),
                ),
                rows=[_size_row(layer) for layer in result.layers],
            )
        ],
        notes=[
            "rank: the nominal rank of an adapter; empty for a full update.",
            "cosine by chance: its standard deviation about 0 for updates turned at random, 1/√(out·in).",
        ],
    )


def _size_row(layer: LayerComparison) -> list[Cell]:
    return [
        *(layer.name, layer.nominal_rank_a, layer.nominal_rank_b),
        *(layer.norm_a, layer.norm_b, layer.norm_a / layer.norm_b),
        *(layer.cosine, 1 / math.sqrt(layer.shape[0] * layer.shape[1]), layer.relative_difference),
    ]


def _omitted_section(result: CompareResult) -> Section:
    """Layers without a partner, and tensors that are no updates or cannot be compared."""
    alone = [(name, side) for side, names in (("a", result.unmatched.a), ("b", result.unmatched.b)) for name in names]
    tables = []
    if alone:
        tables.append(Table("unmatched", "Layers that only one of the two has.", ("layer", "only in"), alone))
    if result.skipped:
        rows = [(one.name, one.reason) for one in result.skipped]
        tables.append(Table("skipped", "Tensors that were skipped, and why.", ("tensor", "reason"), rows))
    unmatched = f"{len(alone)} of the layers have no partner" if len(alone) != 1 else "1 layer has no partner"
    skipped = f"{len(result.skipped)} tensors were skipped" if len(result.skipped) != 1 else "1 tensor was skipped"
    lead = f"{unmatched}, and {skipped}." if tables else "Every layer of both was compared."
    return Section(key="left-out", title="What was not compared", lead=lead, tables=tables)
