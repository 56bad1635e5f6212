"""Subspaces spanned by the top singular directions of updates: their overlap, angles, distances and chance level."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from rankscope.errors import ShapeError
from rankscope.linalg import Basis, FactoredSVD, working_dtype
from rankscope.noise import Array
from rankscope.spectra import CLUSTER_GAP, Spectrum
from rankscope.updates import Update

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """The top k singular directions of an update, in the output space (left) or the input space (right).

    ``vectors``: (d, k), orthonormal columns in the working precision, strongest direction first, as a matrix or as two
    factors. The constructor does not check that they are orthonormal; ``of`` and ``pair`` make them so.
    ``gaps``: (k,), (σ_i − σ_{i+1})/σ_i at the cut after direction i, NaN where it is not known.

    Raises:
        ShapeError: not a matrix with 1 ≤ k ≤ d, gaps that do not fit it, or an unknown side.
    """

    vectors: Tensor | Basis
    side: Side
    gaps: Array = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        if isinstance(self.vectors, Tensor):
            object.__setattr__(self, "vectors", Basis(self.vectors.to(working_dtype(self.vectors.device))))
        if any(part is not None and part.ndim != 2 for part in self.factors) or not 1 <= self.k <= self.dim:
            shapes = " · ".join(str(tuple(part.shape)) for part in self.factors if part is not None)
            raise ShapeError(f"a basis is (d, k) with 1 ≤ k ≤ d, not {shapes}")
        if self.side not in get_args(Side):
            raise ShapeError(f"a side is 'left' or 'right', not {self.side!r}")
        gaps = self.gaps if len(self.gaps) else np.full(self.k, np.nan)
        if gaps.shape != (self.k,):
            raise ShapeError(f"{self.k} directions have {self.k} cuts, not {gaps.shape}")
        object.__setattr__(self, "gaps", gaps)

    @property
    def factors(self) -> Basis:
        """The directions as factors (d, r) and (r, k), or a matrix (d, k) and None."""
        return cast(Basis, self.vectors)

    @cached_property
    def basis(self) -> Tensor:
        """The directions as a matrix (d, k)."""
        return self.factors.to_dense()

    @classmethod
    def of(cls, update: Update, side: Side, k: int | None = None) -> Subspace:
        """The top k left or right singular directions; where k is None or larger, all that are above rounding.

        Raises:
            ShapeError: k < 1, an unknown side, or an update without a direction (zero, or rounding alone).
        """
        if side not in get_args(Side):
            raise ShapeError(f"a side is 'left' or 'right', not {side!r}")
        left, right = cls.pair(update, k)
        return left if side == "left" else right

    @classmethod
    def pair(cls, update: Update, k: int | None = None) -> tuple[Subspace, Subspace]:
        """``of`` for both sides, left first, from one SVD."""
        svd = update.factored_svd()
        return cls.of_svd(svd, Spectrum.from_values(update, svd.s), k)

    @classmethod
    def of_svd(cls, svd: FactoredSVD, spectrum: Spectrum, k: int | None = None) -> tuple[Subspace, Subspace]:
        """``pair`` for an update whose SVD and spectrum are known."""
        if k is not None and k < 1:
            raise ShapeError(f"a subspace has at least one direction, not {k}")
        rank = int(np.count_nonzero(spectrum.values > spectrum.cutoff))
        if rank == 0:
            cause = "is zero" if not spectrum.values[0] else "does not rise above rounding"
            raise ShapeError(f"an update {spectrum.shape} that {cause} has no directions to compare")
        kept = min(k or rank, rank)
        return cls._side(svd.U, "left", kept, spectrum), cls._side(svd.V, "right", kept, spectrum)

    @classmethod
    def _side(cls, vectors: Basis, side: Side, k: int, spectrum: Spectrum) -> Subspace:
        kept = vectors.top(k)
        return cls(kept if kept.small is not None else orthonormalize(kept.tall), side, spectrum.gaps[:k])

    @property
    def dim(self) -> int:
        """The ambient dimension d."""
        return self.factors.tall.shape[0]

    @property
    def k(self) -> int:
        """The number of directions."""
        tall, small = self.factors
        return (tall if small is None else small).shape[-1]

    @property
    def in_cluster(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether the cut after direction i falls between values closer than ``CLUSTER_GAP``, so that the span of the
        top i is arbitrary: (k,)."""
        return np.less(self.gaps, CLUSTER_GAP)

    def top(self, k: int) -> Subspace:
        """The span of the first k directions, at most all of them.

        Raises:
            ShapeError: k < 1.
        """
        if k < 1:
            raise ShapeError(f"a subspace has at least one direction, not {k}")
        return replace(self, vectors=self.factors.top(k), gaps=self.gaps[:k])

    def __repr__(self) -> str:
        return f"Subspace({self.side}, k={self.k} of dimension {self.dim})"


def orthonormalize(vectors: Tensor) -> Tensor:
    """Columns (d, k) that are orthonormal in the working precision; the first i span what the first i of (d, k) span.

    Singular vectors that were computed in float32 are orthonormal to 1e-7 only, which is too little for angles.
    """
    working = working_dtype(vectors.device)
    if vectors.dtype == working:
        return vectors.contiguous()
    q, r = torch.linalg.qr(vectors.to(working))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(working)
    return signed


def _check_pair(a: Subspace, b: Subspace) -> None:
    if a.side != b.side:
        raise ShapeError(f"a {a.side} and a {b.side} subspace lie in different spaces; compare one side at a time")
    if a.dim != b.dim:
        raise ShapeError(f"subspaces of dimension {a.dim} and {b.dim} cannot be compared; are they of the same weight?")


def cosines(a: Subspace, b: Subspace) -> Tensor:
    """UᵀV, (k_a, k_b), on the host, from which ``overlap`` and ``angles`` are computed. U and V stay factors.

    Raises:
        ShapeError: the sides or the ambient dimensions differ.
    """
    _check_pair(a, b)
    return a.factors.coordinates(b.factors).cpu()


def overlap(a: Subspace, b: Subspace, product: Tensor | None = None) -> Array:
    """φ(i, j) = ‖U_iᵀV_j‖²_F / min(i, j) in [0, 1] for all i ≤ k_a, j ≤ k_b: (k_a, k_b) (Hu et al. 2021, §7.2).

    Args:
        product: UᵀV (k_a, k_b) from ``cosines``, where it is known.

    Raises:
        ShapeError: the sides or the ambient dimensions differ.
    """
    product = cosines(a, b) if product is None else product
    squared = product.double().numpy() ** 2  # (k_a, k_b), as all that follows
    sums = squared.cumsum(axis=0).cumsum(axis=1)
    grid: Array = np.minimum(sums / _smaller(*sums.shape), 1.0)
    return grid


def _smaller(i_max: int, j_max: int) -> Array:
    """min(i, j) for i = 1 … i_max, j = 1 … j_max: (i_max, j_max)."""
    smaller: Array = np.minimum.outer(np.arange(1.0, i_max + 1), np.arange(1.0, j_max + 1))
    return smaller


def angles(a: Subspace, b: Subspace, product: Tensor | None = None) -> Array:
    """Principal angles in radians, ascending, (min(k_a, k_b),) (Björck & Golub 1973).

    cos θ_l = σ_l(UᵀV) does not resolve angles below √eps. Angles up to 45° come from sin θ_l, the singular values of
    V − UUᵀV (Knyazev & Argentati 2002), so that tiny ones are precise too.

    Args:
        product: UᵀV (k_a, k_b) from ``cosines``, where it is known.

    Raises:
        ShapeError: the sides or the ambient dimensions differ.
    """
    product = cosines(a, b) if product is None else product
    if a.k < b.k:
        a, b, product = b, a, product.T
    cos = torch.linalg.svdvals(product)
    small = int((cos.square() >= 0.5).sum())
    theta = cos.clamp(max=1).arccos()
    if small:
        directions = torch.linalg.svd(product, full_matrices=False)[2][:small].T  # (k_b, small)
        theta[:small] = _sines(a.factors, b.factors, directions).clamp(max=1).arcsin()
    radians: Array = theta.double().numpy()
    return radians


def _sines(U: Basis, V: Basis, rotation: Tensor) -> Tensor:
    """Singular values (m,) of (1 − UUᵀ)·V·rotation, ascending, on the host; rotation (k, m) picks directions of V.

    U is orthonormal up to rounding only. Projecting twice reduces the effect of that error to its square.
    """
    rest = V.times(rotation.to(V.tall.device))  # (d, m)
    for _ in range(2):
        rest = rest - U.times(U.coordinates(Basis(rest)))
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(rest, mode="r")[1].cpu())
    return values.flip(0)


def distances(a: Subspace, b: Subspace) -> dict[str, float]:
    """The distances of ``angle_distances`` between two subspaces; 0 where they are equal or one lies in the other.

    Raises:
        ShapeError: the sides or the ambient dimensions differ.
    """
    return angle_distances(angles(a, b))


def angle_distances(theta: Array) -> dict[str, float]:
    """Distances from the p = min(k_a, k_b) principal angles θ (p,) (Edelman, Arias & Smith 1998).

    ``projection`` √(p − Σcos²θ); ``geodesic`` √Σθ²; ``chordal`` ‖sin θ‖, which is the same number as projection under
    the name of Conway, Hardin & Sloane 1996; ``fubini_study`` arccos Πcos θ; ``procrustes`` √(2(p − ‖UᵀV‖_*)), which
    is the least ‖U − VQ‖_F over orthogonal Q where k_a = k_b.
    """
    sin2 = np.sin(theta) ** 2
    with np.errstate(divide="ignore"):  # a right angle makes the product of cosines zero, its logarithm −∞
        log_cos2 = float(np.log1p(-sin2).sum())
    chordal = float(np.sqrt(sin2.sum()))
    return {
        "projection": chordal,
        "geodesic": float(np.sqrt((theta**2).sum())),
        "chordal": chordal,
        # tan = √(1 − Πcos²)/Πcos, because arccos alone does not resolve angles below 1e-8.
        "fubini_study": float(np.arctan2(np.sqrt(-np.expm1(log_cos2)), np.exp(log_cos2 / 2))),
        "procrustes": float(2 * np.sqrt((np.sin(theta / 2) ** 2).sum())),
    }


@dataclass(frozen=True, eq=False, repr=False)
class Chance:
    """The overlap of two independent, uniformly random subspaces, for comparison with a measured grid; all (k_a, k_b).

    ``expected``: E φ = max(i, j)/d. ``sd``: standard deviation of φ. ``z``: (φ − expected)/sd. ``p``: probability
    of at least this φ. Where one subspace is the whole space (i = d or j = d), φ is certain: sd 0, z 0, p 1.
    """

    expected: Array
    sd: Array
    z: Array
    p: Array

    def __repr__(self) -> str:
        rows, columns = self.z.shape
        return f"Chance({rows} × {columns}, largest z {self.z.max():.3g}, least p {self.p.min():.3g})"


def chance(grid: Array, d: int) -> Chance:
    """The chance level of every cell of an overlap grid (k_a, k_b) of subspaces in dimension d.

    S = φ·min(i, j) has E S = ij/d and Var S = 2ij(d − i)(d − j)/(d²(d − 1)(d + 2)). p is the upper tail of the Beta
    distribution with these moments on the support [max(0, i + j − d), min(i, j)] of S. It is exact for i = 1 and
    accurate in the tail, where a normal distribution gives a p that is too small. Each p is that of its cell alone;
    the least p of a whole grid needs a correction for multiple tests (``haar.familywise_p_values``).

    Raises:
        ShapeError: not a grid, or more directions than dimensions.
    """
    if grid.ndim != 2 or not 1 <= max(grid.shape) <= d:
        raise ShapeError(f"a grid {grid.shape} of overlaps does not fit into dimension {d}")
    return chance_of_cells(np.arange(1.0, grid.shape[0] + 1)[:, None], np.arange(1.0, grid.shape[1] + 1), grid, d)


def chance_of_cells(i: Array, j: Array, overlap: Array, d: int) -> Chance:
    """``chance`` of the top i against the top j directions; i and j broadcast to the shape of ``overlap``."""
    from scipy.special import betaincc

    i, j = np.broadcast_arrays(i, j)
    smaller = np.minimum(i, j)
    expected = np.maximum(i, j) / d
    # max(d − 1, 1), because d = 1 would divide by zero; the numerator is zero there.
    variance = 2 * i * j * (d - i) * (d - j) / (d**2 * max(d - 1, 1) * (d + 2))
    free = variance > 0
    sd = np.sqrt(variance) / smaller
    z = np.divide(overlap - expected, sd, out=np.zeros_like(expected), where=free)
    p = np.ones_like(expected)
    a, b, low, width = (x[free] for x in _beta(i, j, d, variance))
    p[free] = betaincc(a, b, np.clip((overlap[free] * smaller[free] - low) / width, 0.0, 1.0))
    return Chance(expected, sd, z, p)


def _beta(i: Array, j: Array, d: int, variance: Array) -> tuple[Array, Array, Array, Array]:
    """Parameters a and b, lower end and width of the Beta distribution with the mean ij/d and the variance of S."""
    low = np.maximum(0.0, i + j - d)
    width = np.minimum(i, j) - low
    with np.errstate(divide="ignore", invalid="ignore"):  # cells without variance, which the caller leaves out
        mean = (i * j / d - low) / width
        total = mean * (1 - mean) * width**2 / variance - 1
    return mean * total, (1 - mean) * total, low, width
