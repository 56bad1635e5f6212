"""The result of ``compare`` with three sources or more: every pair beside its chance level, and the tree."""

from __future__ import annotations

from functools import cached_property
from itertools import combinations
from typing import ClassVar

import msgspec
import numpy as np

from rankscope.analysis.comparison import ComparedSource
from rankscope.analysis.display import html_table
from rankscope.analysis.layer_comparison import MATRIX_TITLES, MatrixKind
from rankscope.analysis.matrix_tables import overlap_table
from rankscope.formats.abstract_store import SkippedItem
from rankscope.noise import Array
from rankscope.result import Result

SCHEMA = "rankscope.matrix/1"
SIGNIFICANCE_LEVEL = 0.05
"""Overlaps with a corrected p below this level are beyond chance."""


class SideMatrix(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One side of every pair, all (n, n) and symmetric.

    ``overlap``: median over layers of φ(k, k), k the smaller number of directions of the two; ``expected``: that of
    random directions. ``p``: the probability that more than half of the layers overlap so much by chance, corrected for
    all pairs and sides (``combine_p_values``); NaN on the diagonal.
    """

    overlap: Array
    expected: Array
    p: Array


class MatrixResult(Result, frozen=True, eq=False, kw_only=True, dict=True):
    """Every pair of n sources, over the ``layers`` that all of them have.

    ``titles``: short names of the sources that all differ. ``norms``: (n,), ‖·‖_F. ``cosine`` and
    ``relative_difference`` ‖a − b‖/max(‖a‖, ‖b‖): (n, n), of all layers as one vector; None for factors, which are
    determined only up to a change of basis. ``distance``: (n, n), 1 − φ, the mean of the sides; ``chance_distance``:
    the same for random directions. ``joins``: (n − 1, 4), the tree of average linkage on ``distance``, in the format of
    ``scipy.cluster.hierarchy``. ``alone``: for each source, its layers that not all have.
    """

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    sources: tuple[ComparedSource, ...]
    titles: tuple[str, ...]
    of: MatrixKind
    layers: tuple[str, ...]
    left: SideMatrix | None
    right: SideMatrix | None
    norms: Array
    cosine: Array | None
    relative_difference: Array | None
    distance: Array
    chance_distance: Array
    joins: Array
    alone: tuple[tuple[str, ...], ...]
    skipped: tuple[SkippedItem, ...]
    notes: tuple[str, ...]

    @property
    def sides(self) -> dict[str, SideMatrix]:
        """The sides that were compared, by name."""
        both = {"left": self.left, "right": self.right}
        return {name: side for name, side in both.items() if side is not None}

    @property
    def order(self) -> list[int]:
        """The sources in the order of the leaves of the tree, similar ones side by side."""
        from scipy.cluster.hierarchy import leaves_list

        return [int(leaf) for leaf in leaves_list(self.joins)]

    @property
    def matrices(self) -> str:
        """What ``of`` means, in words."""
        return MATRIX_TITLES[self.of]

    @cached_property
    def beyond_chance(self) -> tuple[bool, ...]:
        """For each of the n − 1 joins, whether at least half of its pairs overlap beyond chance on some side."""
        least = np.fmin.reduce([side.p for side in self.sides.values()])
        return tuple(bool(np.median(least[np.ix_(*branches)]) < SIGNIFICANCE_LEVEL) for branches in self.branch_members)

    @property
    def branch_members(self) -> list[tuple[list[int], list[int]]]:
        """The sources in the two branches of each join, ascending."""
        members = [[leaf] for leaf in range(len(self.titles))]
        joined = []
        for a, b in self.joins[:, :2].astype(int):
            first, second = sorted((members[a], members[b]))
            joined.append((first, second))
            members.append(sorted(first + second))
        return joined

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of different sources, i < j."""
        return list(combinations(range(len(self.titles)), 2))

    def __repr__(self) -> str:
        n, sides = len(self.titles), self.sides.items()
        pairs = np.triu_indices(n, 1)
        ranges = [
            f"{name} overlap {s.overlap[pairs].min():.3f} to {s.overlap[pairs].max():.3f} "
            f"(chance {np.median(s.expected[pairs]):.3f})"
            for name, s in sides
        ]
        return f"MatrixResult({n} sources, {len(self.layers)} layers of {self.matrices}, {', '.join(ranges)})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), overlap_table(self), self.notes)
