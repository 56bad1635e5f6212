"""Two updates of one weight: overlap, angles and distances of their directions, and how far apart they are."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import torch

from rankscope.errors import ShapeError
from rankscope.linalg import working_dtype
from rankscope.noise import Array
from rankscope.spectra import SMALLEST_ENERGY
from rankscope.subspace import Subspace, angles, chance, distances, overlap
from rankscope.updates import LowRank, Update, check_same_shape

Of = Literal["update", "A", "B"]
MOST_DIRECTIONS = 64
"""Directions of a full update that are compared unless more are asked for: most of the others are noise."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """φ(i, j) with what chance would give."""

    i: int
    j: int
    overlap: float
    expected: float
    z: float
    p: float


class SideComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """The top directions of a and b in one space of dimension ``d``.

    ``overlap``, ``expected``, ``z``, ``p``: (k_a, k_b), row i − 1 and column j − 1 for the top i of a and the top j
    of b (see ``rankscope.subspace.chance``). ``angles``: radians, ascending, between the whole spans, as are the
    ``distance``s. ``gaps_a``: (k_a,), (σ_i − σ_{i+1})/σ_i; ``cluster_a`` marks cuts among values so close that the
    span is arbitrary; b likewise.
    """

    d: int
    overlap: Array
    expected: Array
    z: Array
    p: Array
    angles: Array
    distance: dict[str, float]
    gaps_a: Array
    gaps_b: Array
    cluster_a: tuple[bool, ...]
    cluster_b: tuple[bool, ...]

    @classmethod
    def of(cls, a: Subspace, b: Subspace) -> SideComparison:
        grid = overlap(a, b)
        null = chance(grid, a.dim)
        return cls(
            d=a.dim,
            overlap=grid,
            expected=null.expected,
            z=null.z,
            p=null.p,
            angles=angles(a, b),
            distance=distances(a, b),
            gaps_a=a.gaps,
            gaps_b=b.gaps,
            cluster_a=tuple(a.in_cluster.tolist()),
            cluster_b=tuple(b.in_cluster.tolist()),
        )

    def at(self, i: int, j: int) -> Cell:
        """The cell of the top i of a and the top j of b, counted from 1."""
        cell = (i - 1, j - 1)
        numbers = (float(grid[cell]) for grid in (self.overlap, self.expected, self.z, self.p))
        return Cell(i=i, j=j, **dict(zip(("overlap", "expected", "z", "p"), numbers, strict=True)))

    @property
    def square(self) -> Cell:
        """As many directions of each as both have: the sharpest test where one has many more."""
        k = min(self.overlap.shape)
        return self.at(k, k)

    @property
    def whole(self) -> Cell:
        """All directions of both."""
        return self.at(*self.overlap.shape)


class LayerComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One layer. ``shape`` is (out, in), ``name`` what a calls it and ``name_b`` what b does.

    ``left``: output space, ``right``: input space; None for a side that the compared matrices do not have.
    ``relative_difference``: ‖a − b‖_F / max(‖a‖_F, ‖b‖_F). It, ``inner`` and ``cosine`` are None for factors, which
    are known up to a change of basis only.
    """

    name: str
    name_b: str
    shape: tuple[int, int]
    nominal_rank_a: int | None
    nominal_rank_b: int | None
    left: SideComparison | None
    right: SideComparison | None
    norm_a: float
    norm_b: float
    inner: float | None
    cosine: float | None
    relative_difference: float | None

    @property
    def sides(self) -> dict[str, SideComparison]:
        """Those of left and right that were compared."""
        both = {"left": self.left, "right": self.right}
        return {name: side for name, side in both.items() if side is not None}


def compare_layers(name: str, name_b: str, a: Update, b: Update, top: int | None, of: Of) -> LayerComparison:
    """Compare two updates of one weight, or their factors.

    Raises:
        ShapeError: the shapes differ, one has no direction (zero), or lacks the factor that is asked for.
    """
    check_same_shape(a, b)
    shape, ranks = a.shape, (a.nominal_rank, b.nominal_rank)
    a, b = matrix_of(a, of), matrix_of(b, of)
    left_a, right_a = Subspace.pair(a, _directions(a, top))
    left_b, right_b = Subspace.pair(b, _directions(b, top))
    inner = a.inner(b) if of == "update" else None
    norms = a.norm, b.norm
    if min(norms) ** 2 < SMALLEST_ENERGY:
        raise ShapeError(f"it is too small to compare: a norm of {min(norms):.3g} loses digits when it is squared")
    return LayerComparison(
        name=name,
        name_b=name_b,
        shape=shape,
        nominal_rank_a=ranks[0],
        nominal_rank_b=ranks[1],
        left=SideComparison.of(left_a, left_b) if of != "A" else None,
        right=SideComparison.of(right_a, right_b) if of != "B" else None,
        norm_a=norms[0],
        norm_b=norms[1],
        inner=inner,
        cosine=None if inner is None else cosine(inner, *norms),
        relative_difference=None if inner is None else difference(a, b, inner) / max(norms),
    )


def matrix_of(update: Update, of: Of) -> Update:
    """The update, or one of its factors as a product with the identity, without the scale."""
    if of == "update":
        return update
    if not isinstance(update, LowRank):
        raise ShapeError(f"it is no product of factors and has no {of}; compare the updates")
    same = torch.eye(update.nominal_rank, dtype=working_dtype(update.device), device=update.device)
    return LowRank(same, update.A) if of == "A" else LowRank(update.B, same)


def _directions(update: Update, top: int | None) -> int | None:
    return top if top is not None or isinstance(update, LowRank) else MOST_DIRECTIONS


def cosine(inner: float, norm_a: float, norm_b: float) -> float:
    """⟨a, b⟩/(‖a‖‖b‖), rounding kept out of the forbidden."""
    return min(1.0, max(-1.0, inner / norm_a / norm_b))


def difference(a: Update, b: Update, inner: float) -> float:
    """‖a − b‖_F without forming a product.

    Two thin products are subtracted exactly, as factors of rank r₁ + r₂; otherwise the norms and the inner product
    tell, to about 1e-8 of the larger norm, and float32 does not carry more.
    """
    one, two = a.product, b.product
    if one is not None and two is not None:
        values = (one + two * -1.0).singular_values()
        return float(torch.linalg.vector_norm(values))
    return math.sqrt(max(0.0, a.energy + b.energy - 2 * inner))
