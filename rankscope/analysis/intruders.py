"""Intruder dimensions: strong directions of a tuned weight that its pre-trained form did not have."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
import torch
from torch import Tensor

from rankscope.analysis.amplification import check_base
from rankscope.errors import ShapeError
from rankscope.linalg import SVD, dense_svd, product_svd, working_dtype
from rankscope.noise import Array
from rankscope.updates import Dense, Update

TOP_DIRECTIONS = 10
"""Directions of the tuned weight that are examined (Shuttleworth et al. 2024)."""
INTRUDER_THRESHOLD = 0.5
"""A direction whose largest |cos| to every pre-trained one is below this is an intruder (Shuttleworth et al. 2024)."""
SWEEP_THRESHOLDS = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""The thresholds at which intruders are counted, too."""
STRONGEST_SHARE = 1 / 4
"""Share of the pre-trained directions, strongest first, whose span is the one of ``Direction.inside``."""
GRAM_MAX_DIMENSION = 1024
"""Up to this smaller side, all eigenvalues of the Gram matrix are faster than a Krylov space."""
BASIS_MAX_RANK_SHARE = 1 / 4
"""Up to this rank, as a share of the smaller side, an update is expressed in the weight's own basis."""
TOLERANCE = 1e-9
"""Largest residual ‖Tᵀu − σv‖/σ₁ of a direction that is accepted from a Krylov space."""
MAX_KRYLOV_COLUMNS = 400
"""Where a Krylov space would need more, a dense SVD is taken instead."""


class Direction(msgspec.Struct, frozen=True, kw_only=True):
    """A left singular vector u of the tuned weight.

    ``cosine``: max_l |cos(u, u_l)| over all pre-trained left singular vectors, and ``position`` the l of the maximum,
    from 1. ``share``: of the tuned weight's energy, σ²/‖·‖²_F. ``inside``: energy of u in the span of the strongest
    ``STRONGEST_SHARE`` of the pre-trained directions: low for a new direction, high for a mixture of strong old ones.
    """

    cosine: float
    position: int
    share: float
    inside: float

    @property
    def is_intruder(self) -> bool:
        """Whether it is an intruder at the usual threshold."""
        return self.cosine < INTRUDER_THRESHOLD


class Intruders(msgspec.Struct, frozen=True, kw_only=True):
    """The top directions of a tuned weight, strongest first, beside the values of a random direction.

    ``chance``: the mean of the largest |cos| of a random direction; ``inside_chance``: its energy ``inside``.
    ``counts``: directions below each threshold of ``SWEEP_THRESHOLDS``.
    """

    directions: tuple[Direction, ...]
    chance: float
    inside_chance: float
    counts: tuple[int, ...]

    @property
    def intruding_directions(self) -> tuple[Direction, ...]:
        """The intruders at the usual threshold."""
        return tuple(direction for direction in self.directions if direction.is_intruder)


def intruders(update: Update, weight: Tensor, base: SVD, k: int = TOP_DIRECTIONS) -> Intruders:
    """Intruder dimensions among the top k left singular vectors of weight + update (Shuttleworth et al. 2024).

    Only |cos| counts, since singular vectors have no sign. Among near-equal singular values they are not unique either:
    the update may then rotate old directions into each other, which shows as a low cosine with a high ``inside``.
    Directions within rounding of zero are left out.

    Args:
        weight: (out, in).
        base: its thin SVD, from ``rankscope.linalg.dense_svd``; the same for every update of this weight.

    Raises:
        ShapeError: shapes that differ, k < 1, or a tuned weight that is zero.
    """
    check_base(update, base)
    if tuple(weight.shape) != update.shape:
        raise ShapeError(f"the weight {tuple(weight.shape)} and its update {update.shape} differ in shape")
    if k < 1:
        raise ShapeError(f"look at one direction at least, not {k}")
    k = min(k, *update.shape)
    top, energy = _in_basis(update, base, k) or _against_basis(update, weight, base, k)
    coordinates, s = _drop_rounding(top, update.shape)
    squared = coordinates.square().cpu().double().numpy()
    n, out = squared.shape[0], update.shape[0]
    strong = max(1, round(STRONGEST_SHARE * n))
    directions = tuple(
        Direction(
            cosine=float(np.sqrt(min(column.max(), 1.0))),
            position=int(column.argmax()) + 1,
            share=min(sigma**2 / energy, 1.0),
            inside=min(float(column[:strong].sum()), 1.0),
        )
        for column, sigma in zip(squared.T, s.tolist(), strict=True)
    )
    counts = tuple(sum(direction.cosine < threshold for direction in directions) for threshold in SWEEP_THRESHOLDS)
    return Intruders(directions=directions, chance=random_cosine(out, n), inside_chance=strong / out, counts=counts)


def random_cosine(d: int, n: int) -> float:
    """Mean of the largest |cos| between a uniformly random direction in d dimensions and n orthonormal ones.

    Exact: the length of a Gaussian vector is independent of its direction, so this is the mean of the largest of n
    |normal| numbers, ∫(1 − erf(x/√2)ⁿ)dx, over the mean length √2·Γ((d + 1)/2)/Γ(d/2). It grows as √(2 ln n/d), which
    is some 8 % too large at d = n = 768.
    """
    from scipy.integrate import trapezoid
    from scipy.special import erf, gammaln

    x: Array = np.linspace(0.0, 12.0, 4097)  # no normal number of any weight is as large as 12
    largest = float(trapezoid(1 - erf(x / math.sqrt(2)) ** n, x))
    return min(largest / (math.sqrt(2) * math.exp(gammaln((d + 1) / 2) - gammaln(d / 2))), 1.0)


Top = tuple[Tensor, Tensor]
"""Left singular vectors, or their coordinates, as columns; singular values."""


def _drop_rounding(top: Top, shape: tuple[int, int]) -> Top:
    """The directions whose singular value is more than rounding of the largest."""
    U, s = top
    if not s[0] > 0:
        raise ShapeError(f"the tuned weight {shape} is zero and has no directions")
    kept = int((s > s[0] * 1e-6).sum())  # squaring loses half of the digits; the rest is a margin
    return U[:, :kept], s[:kept]


def _against_basis(update: Update, weight: Tensor, base: SVD, k: int) -> tuple[Top, float]:
    """Coordinates (n, k) of the new top k left directions in the old ones, their singular values, and ‖W + ΔW‖²_F."""
    weight = weight.to(working_dtype(weight.device))
    if min(update.shape) <= GRAM_MAX_DIMENSION:
        U, s = _by_gram(weight + update.dense().to(weight.dtype), k)
    else:
        U, s = _by_krylov(update, weight, base, k)
    # Without forming the sum.
    energy = float(weight.square().sum()) + 2 * update.inner(Dense(weight)) + update.energy
    return (base.U.T.to(weight.dtype) @ U, s), energy


def _in_basis(update: Update, base: SVD, k: int) -> tuple[Top, float] | None:
    """As ``_against_basis`` for thin factors, computed in the basis of the old directions; None for other updates.

    There W is diag(s) and ΔW is PQᵀ. P = U₀ᵀB and Q = V₀ᵀAᵀ cost one product each; every step after that costs n·r.
    Where the basis does not fill its space, the part of the factors outside is appended.
    """
    thin, n = update.product, len(base.s)
    if thin is None or thin.nominal_rank > BASIS_MAX_RANK_SHARE * n:
        return None
    working = working_dtype(base.U.device)
    s = base.s.to(working)[:, None]
    P, Q = _coordinates(base.U.to(working), thin.left), _coordinates(base.Vt.T.to(working), thin.right.T)

    def apply(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        y = left @ (right.T @ x)
        y[:n] += s * x[:n]
        return y

    old = torch.eye(len(Q), min(2 * k, n), dtype=working, device=Q.device)
    start = torch.cat((old, product_svd(P, Q.T).Vt[: 2 * k].T), dim=1)
    top = block_krylov(lambda x: apply(x, P, Q), lambda y: apply(y, Q, P), start, k)
    if top is None:
        top = _by_gram(apply(torch.eye(len(Q), dtype=working, device=Q.device), P, Q), k)
    both = float((s * (P[:n] * Q[:n])).sum())
    return (top[0][:n], top[1]), float(s.square().sum()) + 2 * both + update.energy


def _coordinates(basis: Tensor, columns: Tensor) -> Tensor:
    """Coordinates of columns (d, r) in a basis (d, n); where n < d, those of their part outside it stand below."""
    inside = basis.T @ columns
    if basis.shape[1] == basis.shape[0]:
        return inside
    return torch.cat((inside, torch.linalg.qr(columns - basis @ inside, mode="r")[1]))


def _by_gram(tuned: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From the eigenvectors of the smaller Gram matrix; float64 is accurate for all but the weakest directions."""
    if tuned.shape[0] <= tuned.shape[1]:
        values, vectors = torch.linalg.eigh(tuned @ tuned.T)
        return vectors.flip(1)[:, :k], values.flip(0)[:k].clamp(min=0).sqrt()
    values, vectors = torch.linalg.eigh(tuned.T @ tuned)
    s = values.flip(0)[:k].clamp(min=0).sqrt()
    return tuned @ vectors.flip(1)[:, :k] / s.clamp(min=torch.finfo(s.dtype).tiny), s


def _by_krylov(update: Update, weight: Tensor, base: SVD, k: int) -> tuple[Tensor, Tensor]:
    """By block Krylov, started with the top directions of the weight and of the update, without forming their sum.

    The residuals of the Ritz vectors certify the result; where they stay too large, a dense SVD replaces it.
    """
    transposed = update.T

    def apply(x: Tensor) -> Tensor:
        return weight @ x + update @ x

    def back(y: Tensor) -> Tensor:
        return weight.T @ y + transposed @ y

    start = (base.Vt[: 2 * k].T.to(weight.dtype), update.svd().Vt[: 2 * k].T.to(weight.dtype))
    top = block_krylov(apply, back, torch.cat(start, dim=1), k)
    if top is not None:
        return top
    U, s, _ = dense_svd(weight + update.dense().to(weight.dtype))
    return U[:, :k], s[:k]


def block_krylov(
    apply: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], start: Tensor, k: int
) -> tuple[Tensor, Tensor] | None:
    """Top k left singular vectors (out, k) and values (k,) of an operator T by Rayleigh–Ritz in a growing space.

    None where residuals are above ``TOLERANCE`` when that space has ``MAX_KRYLOV_COLUMNS`` columns or is the whole one.

    Args:
        apply: x (in, b) → Tx. back: y (out, b) → Tᵀy.
        start: (in, b) with b ≥ k, columns near the right singular vectors.
    """
    basis = torch.linalg.qr(start)[0]
    image = apply(basis)
    while True:
        values, vectors = torch.linalg.eigh(image.T @ image)
        rotation = vectors.flip(1)[:, :k]
        s = values.flip(0)[:k].clamp(min=0).sqrt()
        U = image @ rotation / s.clamp(min=torch.finfo(s.dtype).tiny)
        residual = back(U) - basis @ rotation * s
        if bool(residual.norm(dim=0).max() <= TOLERANCE * s[0]):
            return U, s
        if basis.shape[1] + k > min(MAX_KRYLOV_COLUMNS, basis.shape[0]):
            return None
        for _ in range(2):  # once would leave what rounding adds
            residual = torch.linalg.qr(residual - basis @ (basis.T @ residual))[0]
        basis = torch.cat((basis, residual), dim=1)
        image = torch.cat((image, apply(residual)), dim=1)
