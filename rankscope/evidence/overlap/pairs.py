"""Pairs of runs side by side: the directions that they share, layer by layer and over all layers, beside chance."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from rankscope.analysis.comparison import CompareResult, compare
from rankscope.analysis.layer_comparison import MAX_DIRECTIONS, MatrixKind, OverlapCell, SideComparison
from rankscope.errors import RankscopeError
from rankscope.haar import familywise_p_values, null_distribution
from rankscope.inference import Interval, holm
from rankscope.noise import Array
from rankscope.subspace import Side
from rankscope.updates import LowRank, Update
from rankscope.verdict import MAX_CORRECTED_P, median_over_layers

ALIKE_Z = 3.0
"""z of the initial factors from which a side says where training began, not what it learned."""
SIDES: tuple[Side, ...] = ("left", "right")


class LayerOverlap(msgspec.Struct, frozen=True, kw_only=True):
    """One side of one layer, in dimension ``d``.

    ``top``: φ(1, 1). ``square``: φ(k, k), k the smaller number of directions. Where several pairs of runs were compared
    they hold the medians over pairs, and the largest p. ``p``: the least of the grid, corrected for looking at all of
    it; of the pair with the largest. ``holm``: that corrected for all layers and sides.
    """

    layer: str
    side: Side
    d: int
    top: OverlapCell
    square: OverlapCell
    p: float
    holm: float


class OverlapGrid(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """Medians over the ``layers`` (of every pair) with the most common number of directions.

    ``overlap`` and ``expected``: (k_a, k_b). The others are (min(k_a, k_b),): ``low`` and ``high``, between which 95 %
    of the φ(i, i) of one layer lie by chance; ``initial``, φ(i, i) of the factors before training, empty where unknown.
    """

    layers: int
    overlap: Array
    expected: Array
    low: Array
    high: Array
    initial: Array

    @property
    def diagonal(self) -> tuple[Array, Array]:
        """φ(i, i) and what is expected of it."""
        return self.overlap.diagonal(), self.expected.diagonal()


class SideOverlap(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One side of all layers; medians over layers.

    ``significant``: how many of the ``layers`` have a ``holm`` below ``SIGNIFICANT``. ``initial_z``: of the factors
    before training (A on the right, B on the left), the largest of z at (1, 1), (k, k) and all directions; None where
    they were not kept, or where B began as zero.
    """

    side: Side
    layers: int
    top: Interval
    top_expected: float
    top_z: float
    square: Interval
    square_expected: float
    square_z: float
    significant: int
    initial_z: float | None
    grid: OverlapGrid

    @property
    def k(self) -> int:
        """The smaller number of directions."""
        return len(self.grid.low)

    @property
    def is_informative(self) -> bool:
        """Whether this side tells what was learned: where A began is known, and began no more alike than by chance."""
        if self.initial_z is None:
            return self.side == "left"
        return self.initial_z < ALIKE_Z


class RunComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """Runs of rank ``rank_a`` against runs of rank ``rank_b``: ``pairs`` of their names.

    ``left`` or ``right`` is None where the compared matrices do not have that side. ``edge``: whether the best rate of
    one lies at an end of those tried. ``skipped``: what could not be compared, with reasons.
    """

    rank_a: int
    rank_b: int
    pairs: tuple[tuple[str, str], ...]
    edge: bool
    left: SideOverlap | None
    right: SideOverlap | None
    rows: tuple[LayerOverlap, ...]
    skipped: tuple[str, ...]

    @property
    def sides(self) -> dict[Side, SideOverlap]:
        both: dict[Side, SideOverlap | None] = {"left": self.left, "right": self.right}
        return {name: side for name, side in both.items() if side is not None}

    @property
    def decisive_side(self) -> SideOverlap:
        """The left side, or the only one."""
        return next(iter(self.sides.values()))


@dataclass(frozen=True)
class RunUpdates:
    """A run as far as its directions go: its rank, its updates by layer, and the factors that it began with."""

    name: str
    rank: int
    updates: Mapping[str, Update]
    initial: Mapping[str, Update] = field(default_factory=dict)
    edge: bool = False


def compare_runs(pairs: Sequence[tuple[RunUpdates, RunUpdates]], of: MatrixKind = "update") -> RunComparison:
    """Pairs of runs of the same two ranks, side by side, by at most ``MOST_DIRECTIONS`` of each.

    Raises:
        RankscopeError: no layer can be compared.
    """
    results = [_compare(a.updates, b.updates, of, MAX_DIRECTIONS) for a, b in pairs]
    rows = _rows(results)
    starts = {side: _initial(pairs, side) for side in SIDES}
    sides = {side: _side(side, rows, results, starts[side]) for side in SIDES if side in {row.side for row in rows}}
    skipped = {f"{one.name}: {one.reason}" for result in results for one in result.skipped}
    return RunComparison(
        rank_a=pairs[0][0].rank,
        rank_b=pairs[0][1].rank,
        pairs=tuple((a.name, b.name) for a, b in pairs),
        edge=any(run.edge for pair in pairs for run in pair),
        left=sides.get("left"),
        right=sides.get("right"),
        rows=tuple(rows),
        skipped=tuple(sorted(skipped)),
    )


def _compare(a: Mapping[str, Update], b: Mapping[str, Update], of: MatrixKind, top: int | None = None) -> CompareResult:
    """Where the updates are."""
    return compare(a, b, top=top, of=of, device=next(iter(a.values())).device)


def _rows(results: Sequence[CompareResult]) -> list[LayerOverlap]:
    """Every side of the layers that all pairs have, each number over pairs; the p corrected for all of them."""
    names = [layer.name for layer in results[0].layers]
    shared = [name for name in names if all(name in {layer.name for layer in result.layers} for result in results)]
    if not shared:
        raise RankscopeError("no layer can be compared in every pair of runs")
    sides = [side for side in SIDES if side in results[0].layers[0].sides]
    compared = [(name, side, [result[name].sides[side] for result in results]) for name in shared for side in sides]
    p = [max(float(familywise_p_values(one.p, one.d).min()) for one in several) for _, _, several in compared]
    return [
        LayerOverlap(
            layer=name,
            side=side,
            d=several[0].d,
            top=_cell(several, 1),
            square=_cell(several, min(min(one.overlap.shape) for one in several)),
            p=least,
            holm=float(adjusted),
        )
        for (name, side, several), least, adjusted in zip(compared, p, holm(p), strict=True)
    ]


def _cell(several: Sequence[SideComparison], k: int) -> OverlapCell:
    """φ(k, k): medians over pairs, and the largest p."""
    cells = [one.at(k, k) for one in several]
    overlap, expected, z = (
        statistics.median(getattr(cell, name) for cell in cells) for name in ("overlap", "expected", "z")
    )
    return OverlapCell(i=k, j=k, overlap=overlap, expected=expected, z=z, p=max(cell.p for cell in cells))


def _initial(pairs: Sequence[tuple[RunUpdates, RunUpdates]], side: Side) -> list[list[SideComparison]]:
    """The factors before training, A on the right and B on the left, pair by pair; empty where one has none."""
    of: MatrixKind = "A" if side == "right" else "B"
    comparisons = []
    for pair in pairs:
        a, b = ({name: update for name, update in run.initial.items() if _is_nonzero(update, of)} for run in pair)
        if not a or not b:
            return []
        comparisons.append([layer.sides[side] for layer in _compare(a, b, of).layers])
    return comparisons


def _is_nonzero(update: Update, of: MatrixKind) -> bool:
    """Whether a factor began as something else than zero."""
    return isinstance(update, LowRank) and bool((update.A if of == "A" else update.B).count_nonzero())


def _side(
    side: Side,
    rows: Iterable[LayerOverlap],
    results: Sequence[CompareResult],
    starts: Sequence[Sequence[SideComparison]],
) -> SideOverlap:
    own = [row for row in rows if row.side == side]
    names = {row.layer for row in own}
    measured = [layer.sides[side] for result in results for layer in result.layers if layer.name in names]
    alike = [statistics.median(max(s.at(1, 1).z, s.square.z, s.whole.z) for s in several) for several in starts]
    return SideOverlap(
        side=side,
        layers=len(own),
        top=median_over_layers([row.top.overlap for row in own]),
        top_expected=statistics.median(row.top.expected for row in own),
        top_z=statistics.median(row.top.z for row in own),
        square=median_over_layers([row.square.overlap for row in own]),
        square_expected=statistics.median(row.square.expected for row in own),
        square_z=statistics.median(row.square.z for row in own),
        significant=sum(row.holm < MAX_CORRECTED_P for row in own),
        initial_z=max(alike) if alike else None,
        grid=_grid(measured, [one for several in starts for one in several]),
    )


def _grid(measured: Sequence[SideComparison], starts: Sequence[SideComparison]) -> OverlapGrid:
    kept = _same_size(measured)
    nulls = [null_distribution(one.d, *one.overlap.shape) for one in kept]
    before = [one.overlap.diagonal() for one in _same_size(starts)]
    return OverlapGrid(
        layers=len(kept),
        overlap=np.median([one.overlap for one in kept], axis=0),
        expected=np.median([one.expected for one in kept], axis=0),
        low=np.median([one.low for one in nulls], axis=0),
        high=np.median([one.high for one in nulls], axis=0),
        initial=np.median(before, axis=0)[: len(nulls[0].low)] if before else np.empty(0),
    )


def _same_size(sides: Sequence[SideComparison]) -> list[SideComparison]:
    """Those with the most common number of directions; the largest of several."""
    sizes = Counter(one.overlap.shape for one in sides)
    size = max(sizes, key=lambda size: (sizes[size], size), default=None)
    return [one for one in sides if one.overlap.shape == size]
