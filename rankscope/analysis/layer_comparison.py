"""Two updates of one weight: overlap, angles and distances of their directions, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from torch import Tensor

from rankscope.analysis.matching import Renames
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
from rankscope.track import Track
from rankscope.updates import LowRank, Update, check_same_shape

MatrixKind = Literal["update", "A", "B"]
SIDES: dict[MatrixKind, tuple[Side, ...]] = {"update": ("left", "right"), "A": ("right",), "B": ("left",)}
"""The sides that each kind of matrix has."""
MATRIX_TITLES: dict[MatrixKind, str] = {"update": "updates ΔW", "A": "factors A", "B": "factors B"}
"""The plural of each kind, for titles."""
CANCELLATION_THRESHOLD = 0.01
"""Below this share of the larger ‖·‖², ‖a − b‖² loses more than two digits when it is computed from norms."""
MAX_DIRECTIONS = 64
"""Directions of a full update that are compared by default: most of the others are noise."""
CAPPED_NOTE = f"of a full update the top {MAX_DIRECTIONS} directions are compared; top (--top) takes more or fewer"


class OverlapCell(msgspec.Struct, frozen=True, kw_only=True):
    """φ(i, j) beside chance: mean, z and p for random directions."""

    i: int
    j: int
    overlap: float
    expected: float
    z: float
    p: float


class SideComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True, dict=True):
    """The top directions of a and b in one space of dimension ``d``.

    ``overlap``: (k_a, k_b), row i − 1 and column j − 1 for the top i of a and the top j of b. ``angles``: radians,
    ascending, between the spans of all directions; ``distance``: of the same spans. ``gaps_a``: (k_a,),
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
        """Compare two subspaces; ``product``: UᵀV (k_a, k_b), if it is known (``rankscope.subspace.cosines``)."""
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
        """The overlap of random directions for every cell; computed when first asked for, as p is slow."""
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
        """The top k of both, k the smaller number of directions: the sharpest test where one has many more."""
        k = min(self.overlap.shape)
        return self.at(k, k)

    @cached_property
    def whole(self) -> OverlapCell:
        """All directions of both."""
        return self.at(*self.overlap.shape)


class LayerComparison(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One layer: ``shape`` (out, in), ``name`` in a, and ``name_b`` in b.

    ``left``: output space, ``right``: input space; None for a side that the compared matrices do not have.
    ``relative_difference``: ‖a − b‖_F / max(‖a‖_F, ‖b‖_F). It, ``inner`` and ``cosine`` are None for factors, which are
    determined only up to a change of basis.
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
        """The sides that were compared, by name."""
        both = {"left": self.left, "right": self.right}
        return {name: side for name, side in both.items() if side is not None}


@dataclass(frozen=True)
class ComparisonSettings:
    """What is compared of the sources, and how; the arguments of ``comparison.compare``, checked before it reads.

    Raises:
        ConfigError: less than one direction, or an unknown matrix.
    """

    layers: str | Iterable[str] | None = None
    top: int | None = None
    of: MatrixKind = "update"
    track: Track = iter
    rename: Renames = ()
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.top is not None and self.top < 1:
            raise ConfigError(f"top = {self.top}: compare at least one direction")
        if self.of not in get_args(MatrixKind):
            raise ConfigError(f"of = {self.of!r}: compare 'update', 'A' or 'B'")


def compare_layers(name: str, name_b: str, a: Update, b: Update, top: int | None, of: MatrixKind) -> LayerComparison:
    """Compare two updates of one weight, or their factors.

    Raises:
        ShapeError: the shapes differ, or an update is zero or has no factors where these are compared.
    """
    check_same_shape(a, b)
    shape, ranks = a.shape, (a.nominal_rank, b.nominal_rank)
    a, b = select_matrix(a, of), select_matrix(b, of)
    svd_a, svd_b = DecomposedUpdate.of(a, top), DecomposedUpdate.of(b, top)
    norms = svd_a.norm, svd_b.norm
    products = {side: svd_a.coordinates(svd_b, side) for side in SIDES[of]}
    compared = {side: svd_a.compare_side(svd_b, side, product) for side, product in products.items()}
    inner = _inner(svd_a, svd_b, products) if of == "update" else None
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
        """Decompose an update, with its top directions; None takes all, of a full update at most ``MAX_DIRECTIONS``.

        Raises:
            ShapeError: it has no direction above rounding, or is too small to be squared.
        """
        svd = update.factored_svd()
        spectrum = Spectrum.from_values(update, svd.s)
        kept = top if top is not None or isinstance(update, LowRank) else MAX_DIRECTIONS
        left, right = Subspace.of_svd(svd, spectrum, kept)
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
        """Whether it is a product of factors, so that all its directions are known."""
        return isinstance(self.update, LowRank)

    def coordinates(self, other: DecomposedUpdate, side: Side) -> Tensor:
        """UᵀU' or VᵀV' (n_a, n_b) on the host: all directions of two products, else the compared ones."""
        if not (self.thin and other.thin):
            return cosines(self.sides[side], other.sides[side])
        mine, others = ((svd.U if side == "left" else svd.V) for svd in (self.svd, other.svd))
        return mine.coordinates(others).cpu()

    def compare_side(self, other: DecomposedUpdate, side: Side, product: Tensor) -> SideComparison:
        """Compare one side, (k_a, k_b) directions; ``product`` (n_a, n_b) comes from ``coordinates``."""
        a, b = self.sides[side], other.sides[side]
        return SideComparison.of(a, b, product[: a.k, : b.k])


def _inner(a: DecomposedUpdate, b: DecomposedUpdate, products: Mapping[Side, Tensor]) -> float:
    """⟨a, b⟩; for two products Σ_ij σ_i·σ'_j·(UᵀU')_ij·(VᵀV')_ij, as UᵀU' and VᵀV' are known from the overlaps."""
    if not (a.thin and b.thin):
        return a.update.inner(b.update)
    return float(a.svd.s @ (products["left"] * products["right"]) @ b.svd.s)


def select_matrix(update: Update, of: MatrixKind) -> Update:
    """The update, or one of its factors as a product with the identity, without the scale."""
    if of == "update":
        return update
    if not isinstance(update, LowRank):
        raise ShapeError(f"it is no product of factors and has no {of}; compare the updates")
    identity = torch.eye(update.nominal_rank, dtype=working_dtype(update.device), device=update.device)
    return LowRank(identity, update.A) if of == "A" else LowRank(update.B, identity)


def cosine_similarity(inner: float, norm_a: float, norm_b: float) -> float:
    """⟨a, b⟩/(‖a‖‖b‖), clamped to [-1, 1] against rounding."""
    return min(1.0, max(-1.0, inner / norm_a / norm_b))


def difference_norm(a: Update, b: Update, inner: float, norms: tuple[float, float]) -> float:
    """‖a − b‖_F without forming a product, from ⟨a, b⟩ and both norms.

    Where these nearly cancel, two thin products are subtracted exactly, as factors of rank r₁ + r₂. Other updates keep
    an error of about 1e-8 of the larger norm, as much as float32 can hold.
    """
    squared = norms[0] ** 2 + norms[1] ** 2 - 2 * inner
    thin_a, thin_b = a.product, b.product
    if squared < CANCELLATION_THRESHOLD * max(norms) ** 2 and thin_a is not None and thin_b is not None:
        values = (thin_a + thin_b * -1.0).singular_values()
        return float(torch.linalg.vector_norm(values))
    return math.sqrt(max(0.0, squared))
