"""The tables of ``compare`` with two sources; a column is defined once, with the places that show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from rankscope.table import Cell, Column, Table

if TYPE_CHECKING:
    from rankscope.analysis.comparison import CompareResult
    from rankscope.analysis.layer_comparison import LayerComparison, SideComparison
    from rankscope.subspace import Side

DISTANCES = ("projection", "geodesic", "chordal", "fubini_study", "procrustes")
"""The distances of two subspaces in CSV, by their keys in ``SideComparison.distance``."""


def layer_table(result: CompareResult) -> Table:
    """One row for each layer, as the terminal and notebooks show it."""
    return Table.of(layer_columns(result), result.layers, "terminal", has_total=True)


def layer_columns(result: CompareResult) -> list[Column[LayerComparison]]:
    """The columns of a layer: in "csv", on the "terminal", and in the tables "directions" and "sizes" of the page."""
    summary = result.summary
    renamed = {"directions": "in b"} if any(layer.name != layer.name_b for layer in result.layers) else {}
    columns: list[Column[LayerComparison]] = [
        Column(
            attrgetter("name"),
            {"csv": "layer", "terminal": "layer", "directions": "layer", "sizes": "layer"},
            total="median; all",
        ),
        Column(attrgetter("name_b"), {"csv": "layer_b", **renamed}),
        Column.of(lambda layer: layer.shape[0], csv="out"),
        Column.of(lambda layer: layer.shape[1], csv="in"),
        Column.of(lambda layer: f"{layer.shape[0]} × {layer.shape[1]}", directions="out × in"),
        Column.of(lambda layer: _first_side(layer).square.i, terminal="k", directions="k"),
        Column(attrgetter("nominal_rank_a"), {"sizes": "rank of a"}),
        Column(attrgetter("nominal_rank_b"), {"sizes": "rank of b"}),
    ]
    columns += [*_side_columns(result, "left"), *_side_columns(result, "right")]
    columns += [
        Column(_near_equal, {"directions": "near-equal σ"}),
        Column(attrgetter("norm_a"), {"csv": "norm_a", "sizes": "‖a‖"}),
        Column(attrgetter("norm_b"), {"csv": "norm_b", "sizes": "‖b‖"}),
        Column(_norm_ratio, {"sizes": "‖a‖/‖b‖"}),
        Column(attrgetter("inner"), {"csv": "inner"}),
    ]
    distances: list[Column[LayerComparison]] = [
        Column(
            attrgetter("cosine"),
            {"csv": "cosine", "terminal": "cosine", "sizes": "cosine"},
            text=".3f",
            total=summary.cosine,
        ),
        Column(lambda layer: 1 / math.sqrt(math.prod(layer.shape)), {"sizes": "cosine by chance (sd)"}),
        Column(
            attrgetter("relative_difference"),
            {"csv": "relative_difference", "terminal": "rel. diff.", "sizes": "relative difference"},
            text=".3f",
            total=summary.relative_difference,
        ),
    ]
    columns += distances if summary.cosine is not None else [column.only("csv") for column in distances]
    return [*columns, Column(_norm_ratio, {"terminal": "‖a‖/‖b‖"}, total=summary.norm_a / summary.norm_b)]


def _side_columns(result: CompareResult, name: Side) -> Iterator[Column[LayerComparison]]:
    """φ(k, k) of one side beside chance, and distances of the spans; CSV always has the columns of both sides."""
    summary = result.summary.sides.get(name)

    def column(get: Callable[[SideComparison], Cell], text: str = "", **titles: str) -> Column[LayerComparison]:
        side_column: Column[LayerComparison] = Column(lambda layer: _read_side(layer, name, get), titles, text)
        return side_column if summary else side_column.only("csv")

    yield column(lambda side: side.square.i, csv=f"{name}_i")
    yield column(lambda side: side.square.j, csv=f"{name}_j")
    if summary:
        yield Column(
            lambda layer: _read_side(layer, name, _overlap_and_chance),
            {"terminal": f"φ {name} (chance)"},
            total=f"{summary.overlap:.3f} ({summary.expected:.3f})",
        )
    yield column(lambda side: side.square.overlap, csv=f"{name}_overlap", directions=f"φ {name}")
    yield column(lambda side: side.square.expected, csv=f"{name}_expected", directions=f"chance {name}")
    yield column(lambda side: side.square.z, ".1f", csv=f"{name}_z", terminal="z", directions=f"z {name}")
    yield column(lambda side: side.square.p, "p", csv=f"{name}_p", terminal="p", directions=f"p {name}")
    for distance in DISTANCES:
        yield column(_get_distance(distance), csv=f"{name}_{distance}")


def _read_side(layer: LayerComparison, name: str, get: Callable[[SideComparison], Cell]) -> Cell:
    return get(layer.sides[name]) if name in layer.sides else None


def _first_side(layer: LayerComparison) -> SideComparison:
    return next(iter(layer.sides.values()))


def _overlap_and_chance(side: SideComparison) -> str:
    return f"{side.square.overlap:.3f} ({side.square.expected:.3f})"


def _get_distance(name: str) -> Callable[[SideComparison], Cell]:
    return lambda side: side.distance[name]


def _norm_ratio(layer: LayerComparison) -> float:
    return layer.norm_a / layer.norm_b


def _near_equal(layer: LayerComparison) -> Cell:
    """Which of a and b has near-equal singular values on both sides of the cut at k."""
    side = _first_side(layer)
    clusters = {"a": side.cluster_a, "b": side.cluster_b}
    return ", ".join(name for name, flags in clusters.items() if flags[side.square.i - 1]) or None


def span_columns(name: str) -> list[Column[LayerComparison]]:
    """The columns of a layer in the table "spans" of the page: all directions of a and b on one side."""

    def column(title: str, get: Callable[[SideComparison], Cell]) -> Column[LayerComparison]:
        return Column(lambda layer: get(layer.sides[name]), {"spans": title})

    return [
        Column(attrgetter("name"), {"spans": "layer"}),
        column("i × j", lambda side: f"{side.whole.i} × {side.whole.j}"),
        column("φ", lambda side: side.whole.overlap),
        column("chance", lambda side: side.whole.expected),
        column("least angle (°)", lambda side: float(np.degrees(side.angles[0]))),
        column("largest angle (°)", lambda side: float(np.degrees(side.angles[-1]))),
        column("projection", _get_distance("projection")),
        column("by chance", _projection_by_chance),
        column("geodesic", _get_distance("geodesic")),
        column("Fubini–Study", _get_distance("fubini_study")),
        column("Procrustes", _get_distance("procrustes")),
    ]


def _projection_by_chance(side: SideComparison) -> float:
    """Root mean square of the projection distance of random spans."""
    whole = side.whole
    return math.sqrt(max(0.0, min(whole.i, whole.j) * (1 - whole.expected)))
