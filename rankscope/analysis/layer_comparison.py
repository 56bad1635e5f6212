"""Two updates of one weight: overlap, angles and distances of their directions, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from torch import Tensor

from rankscope.errors import ConfigError, ShapeError
from rankscope.linalg import FactoredSVD, working_dtype
from rankscope.noise import Array
from rankscope.spectra import SMALLEST_ENERGY, Spectrum
from rankscope.subspace import (
    Chance,
    Side,
    Subspace,
    angle_distances,
    angles,
    chance,
    chance_of_cells,
    cosines,
    overlap,
)
from rankscope.updates import LowRank, Update, check_same_shape

MatrixKind = Literal["update", "A", "B"]
SIDES: dict[MatrixKind, tuple[Side, ...]] = {"update": ("left", "right"), "A": ("right",), "B": ("left",)}
"""The sides that each kind of matrix has."""
MATRIX_TITLES: dict[MatrixKind, str] = {"update": "updates ΔW", "A": "factors A", "B": "factors B"}
"""What each is called."""
CANCELLATION_THRESHOLD = 0.01
"""‖a − b‖² below this share of the larger ‖·‖² has lost more than two digits as a difference of norms."""
MAX_DIRECTIONS = 64
"""Directions of a full update that are compared unless more are asked for: most of the others are noise."""


class OverlapCell(msgspec.Struct, frozen=True, kw_only=True):
    """φ(i, j) with what chance would give."""

    i: int
    j: int
    overlap: float
    expected: float
    z: float
    p: float


class SideComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True, dict=True):
    """The top directions of a and b in one space of dimension ``d``.

    ``overlap``: (k_a, k_b), row i − 1 and column j − 1 for the top i of a and the top j of b; ``chance`` stands beside
    it. ``angles``: radians, ascending, between the whole spans, as are the ``distance``s. ``gaps_a``: (k_a,),
    (σ_i − σ_{i+1})/σ_i; ``cluster_a`` marks cuts among values so close that the span is arbitrary; b likewise.
    """

    d: int
    overlap: Array
    angles: Array
    distance: dict[str, float]
    gaps_a: Array
    gaps_b: Array
    cluster_a: tuple[bool, ...]
    cluster_b: tuple[bool, ...]

    @classmethod
    def of(cls, a: Subspace, b: Subspace, product: Tensor | None = None) -> SideComparison:
        """``product``: UᵀV (k_a, k_b), where it is known (``rankscope.subspace.cosines``)."""
        product = cosines(a, b) if product is None else product
        grid, theta = overlap(a, b, product), angles(a, b, product)
        return cls(
            d=a.dim,
            overlap=grid,
            angles=theta,
            distance=angle_distances(theta),
            gaps_a=a.gaps,
            gaps_b=b.gaps,
            cluster_a=tuple(a.in_cluster.tolist()),
            cluster_b=tuple(b.in_cluster.tolist()),
        )

    @cached_property
    def chance(self) -> Chance:
        """What random directions would overlap, for every cell: found when first asked for, as p takes its time."""
        return chance(self.overlap, self.d)

    @property
    def expected(self) -> Array:
        """(k_a, k_b), the mean overlap of random directions."""
        return self.chance.expected

    @property
    def z(self) -> Array:
        """(k_a, k_b), how far the overlap is from ``expected``, in standard deviations of random directions."""
        return self.chance.z

    @property
    def p(self) -> Array:
        """(k_a, k_b), the probability that random directions overlap as much."""
        return self.chance.p

    def at(self, i: int, j: int) -> OverlapCell:
        """The cell of the top i of a and the top j of b, counted from 1."""
        overlap = self.overlap[i - 1 : i, j - 1]
        null = chance_of_cells(np.array([float(i)]), np.array([float(j)]), overlap, self.d)
        numbers = {"overlap": overlap, "expected": null.expected, "z": null.z, "p": null.p}
        return OverlapCell(i=i, j=j, **{name: float(number[0]) for name, number in numbers.items()})

    @cached_property
    def square(self) -> OverlapCell:
        """As many directions of each as both have: the sharpest test where one has many more."""
        k = min(self.overlap.shape)
        return self.at(k, k)

    @cached_property
    def whole(self) -> OverlapCell:
        """All directions of both."""
        return self.at(*self.overlap.shape)


class LayerComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One layer. ``shape`` is (out, in), ``name`` what a calls it and ``name_b`` what b does.

    ``left``: output space, ``right``: input space; None for a side that the compared matrices do not have.
    ``relative_difference``: ‖a − b‖_F / max(‖a‖_F, ‖b‖_F). It, ``inner`` and ``cosine`` are None for factors, which are
    known up to a change of basis only.
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


def check_comparison(top: int | None, of: str) -> None:
    """Refuse what cannot be compared, before anything is read.

    Raises:
        ConfigError: less than one direction, or a matrix that there is not.
    """
    if top is not None and top < 1:
        raise ConfigError(f"top = {top}: compare at least one direction")
    if of not in get_args(MatrixKind):
        raise ConfigError(f"of = {of!r}: compare 'update', 'A' or 'B'")


def compare_layers(name: str, name_b: str, a: Update, b: Update, top: int | None, of: MatrixKind) -> LayerComparison:
    """Compare two updates of one weight, or their factors.

    Raises:
        ShapeError: the shapes differ, one has no direction (zero), or lacks the factor that is asked for.
    """
    check_same_shape(a, b)
    shape, ranks = a.shape, (a.nominal_rank, b.nominal_rank)
    a, b = select_matrix(a, of), select_matrix(b, of)
    one, two = DecomposedUpdate.of(a, top), DecomposedUpdate.of(b, top)
    norms = one.norm, two.norm
    products = {side: one.coordinates(two, side) for side in SIDES[of]}
    compared = {side: one.compare_side(two, side, product) for side, product in products.items()}
    inner = _inner(one, two, products) if of == "update" else None
    return LayerComparison(
        name=name,
        name_b=name_b,
        shape=shape,
        nominal_rank_a=ranks[0],
        nominal_rank_b=ranks[1],
        left=compared.get("left"),
        right=compared.get("right"),
        norm_a=norms[0],
        norm_b=norms[1],
        inner=inner,
        cosine=None if inner is None else cosine_similarity(inner, *norms),
        relative_difference=None if inner is None else difference_norm(a, b, inner, norms) / max(norms),
    )


@dataclass(frozen=True, eq=False, repr=False)
class DecomposedUpdate:
    """An update with its SVD, and the directions of each side that are compared."""

    update: Update
    svd: FactoredSVD
    spectrum: Spectrum
    sides: dict[Side, Subspace]

    @classmethod
    def of(cls, update: Update, top: int | None) -> DecomposedUpdate:
        """Taken apart, with the top directions, at most ``MAX_DIRECTIONS`` of a full update where ``top`` is None.

        Raises:
            ShapeError: it has no direction (zero, or rounding alone), or is too small to be squared.
        """
        svd = update.factored_svd()
        spectrum = Spectrum.from_values(update, svd.s)
        left, right = Subspace.of_svd(svd, spectrum, _directions(update, top))
        if spectrum.energy < SMALLEST_ENERGY:
            norm = math.sqrt(spectrum.energy)
            raise ShapeError(f"it is too small to compare: a norm of {norm:.3g} loses digits when it is squared")
        return cls(update, svd, spectrum, {"left": left, "right": right})

    @property
    def norm(self) -> float:
        """‖·‖_F."""
        return math.sqrt(self.spectrum.energy)

    @property
    def thin(self) -> bool:
        """Whether it is a product, all of whose directions are known."""
        return isinstance(self.update, LowRank)

    def coordinates(self, other: DecomposedUpdate, side: Side) -> Tensor:
        """UᵀU' (or VᵀV'), on the host: of all directions between products, else of those that are compared."""
        if not (self.thin and other.thin):
            return cosines(self.sides[side], other.sides[side])
        mine, others = ((svd.U if side == "left" else svd.V) for svd in (self.svd, other.svd))
        return mine.coordinates(others).cpu()

    def compare_side(self, other: DecomposedUpdate, side: Side, product: Tensor) -> SideComparison:
        """One side of both, (k_a, k_b) directions; ``product`` (n_a, n_b) from ``coordinates`` has at least those."""
        a, b = self.sides[side], other.sides[side]
        return SideComparison.of(a, b, product[: a.k, : b.k])


def _inner(a: DecomposedUpdate, b: DecomposedUpdate, products: Mapping[Side, Tensor]) -> float:
    """⟨a, b⟩; of two products Σ_ij σ_i·σ'_j·(UᵀU')_ij·(VᵀV')_ij, from what their overlaps are made of."""
    if not (a.thin and b.thin):
        return a.update.inner(b.update)
    return float(a.svd.s @ (products["left"] * products["right"]) @ b.svd.s)


def select_matrix(update: Update, of: MatrixKind) -> Update:
    """The update, or one of its factors as a product with the identity, without the scale."""
    if of == "update":
        return update
    if not isinstance(update, LowRank):
        raise ShapeError(f"it is no product of factors and has no {of}; compare the updates")
    same = torch.eye(update.nominal_rank, dtype=working_dtype(update.device), device=update.device)
    return LowRank(same, update.A) if of == "A" else LowRank(update.B, same)


def _directions(update: Update, top: int | None) -> int | None:
    return top if top is not None or isinstance(update, LowRank) else MAX_DIRECTIONS


def cosine_similarity(inner: float, norm_a: float, norm_b: float) -> float:
    """⟨a, b⟩/(‖a‖‖b‖), clamped to [-1, 1] against rounding."""
    return min(1.0, max(-1.0, inner / norm_a / norm_b))


def difference_norm(a: Update, b: Update, inner: float, norms: tuple[float, float]) -> float:
    """‖a − b‖_F without forming a product, from ⟨a, b⟩ and both norms.

    Where those cancel, two thin products are subtracted exactly, as factors of rank r₁ + r₂; anything else is known to
    about 1e-8 of the larger norm, and float32 does not carry more.
    """
    squared = norms[0] ** 2 + norms[1] ** 2 - 2 * inner
    one, two = a.product, b.product
    if squared < CANCELLATION_THRESHOLD * max(norms) ** 2 and one is not None and two is not None:
        values = (one + two * -1.0).singular_values()
        return float(torch.linalg.vector_norm(values))
    return math.sqrt(max(0.0, squared))
