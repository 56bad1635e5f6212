"""Whether an update points along strong directions of its weight, beside what random directions would do.

All numbers follow from the coordinates of the update's directions in the singular vectors of the weight, so one SVD of
the weight serves every update of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from torch import Tensor

from rankscope.errors import ShapeError
from rankscope.linalg import SVD
from rankscope.noise import Array
from rankscope.subspace import Subspace
from rankscope.updates import Update


@dataclass(frozen=True, eq=False, repr=False)
class WeightBasisCoordinates:
    """The top k directions of an update in the basis of its weight's singular vectors, n = min(out, in) of them.

    ``left``: (n, k), U_WᵀU. ``right``: (n, k), V_WᵀV. ``s``: (n,), singular values of the weight. ``norm``: ‖ΔW‖_F.
    ``shape``: (out, in).
    """

    left: Array
    right: Array
    s: Array
    norm: float
    shape: tuple[int, int]

    @classmethod
    def of(cls, update: Update, base: SVD, k: int | None = None) -> WeightBasisCoordinates:
        """The coordinates of the top k directions, or of all above rounding where k is None or larger.

        Args:
            base: SVD of the weight (out, in), thin, from ``rankscope.linalg.dense_svd``.

        Raises:
            ShapeError: the weight has another shape (is it transposed?), k < 1, or the update is zero.
        """
        check_base(update, base)
        left, right = Subspace.pair(update, k)
        return cls(
            left=_to_numpy(base.U.T.to(left.basis.dtype) @ left.basis),
            right=_to_numpy(base.Vt.to(right.basis.dtype) @ right.basis),
            s=_to_numpy(base.s),
            norm=update.norm,
            shape=update.shape,
        )

    @property
    def k(self) -> int:
        """Number of directions of the update."""
        return int(self.left.shape[1])


def check_base(update: Update, base: SVD) -> None:
    """Raises ShapeError unless the decomposed weight has the update's shape."""
    shape = base.U.shape[0], base.Vt.shape[1]
    if shape != update.shape:
        hint = "; it looks transposed" if shape == update.shape[::-1] else ""
        raise ShapeError(f"the weight {shape} and its update {update.shape} differ in shape{hint}")


class Amplification(msgspec.Struct, frozen=True, kw_only=True):
    """One column of Table 7 of Hu et al. 2021: how much of the weight W lies in r directions, and how ΔW compares.

    ``own``: ‖U_rᵀWV_r‖_F with the top r directions of ΔW. ``top``: with those of W itself, √Σ_{l≤r}σ_l(W)².
    ``random``: root mean square of the same with r uniformly random directions on each side; ``random_sd``: its
    standard deviation to first order, good where it is small beside ``random`` (from r ≈ 4 on). ``z``: own² against
    the exact mean and variance of random². ``p``: probability that random directions give at least ``own``.
    ``norm``: ‖ΔW‖_F, scale included. ``amplification``: norm/own, None where own is zero.
    ``random_amplification``: norm/random, what an update of this norm would have along random directions.
    """

    r: int
    own: float
    top: float
    random: float
    random_sd: float
    z: float
    p: float
    norm: float
    amplification: float | None
    random_amplification: float


def amplification(update: WeightBasisCoordinates, r: int) -> Amplification:
    """One column of Table 7 for the top r directions of an update, or for all where r is larger.

    Raises:
        ShapeError: r < 1, or a weight that is zero.
    """
    if r < 1:
        raise ShapeError(f"a subspace has at least one direction, not {r}")
    if not update.s[0]:
        raise ShapeError(f"a weight {update.shape} that is zero has no strength to amplify")
    r = min(r, update.k)
    own = float(np.linalg.norm(update.left[:, :r].T @ (update.s[:, None] * update.right[:, :r])))
    null = random_moments(update.s, update.shape, r, r)
    random = math.sqrt(null.mean)
    return Amplification(
        r=r,
        own=own,
        top=float(np.linalg.norm(update.s[:r])),
        random=random,
        random_sd=math.sqrt(null.variance) / (2 * random),
        z=(own**2 - null.mean) / math.sqrt(null.variance) if null.variance else 0.0,
        p=null.tail_probability(own**2),
        norm=update.norm,
        amplification=update.norm / own if own else None,
        random_amplification=update.norm / random,
    )


class Moments(NamedTuple):
    """Mean and variance of ‖UᵀWV‖²_F over independent, uniformly random U and V."""

    mean: float
    variance: float

    def tail_probability(self, value: float) -> float:
        """Probability of at least this value under the log-normal distribution with these moments.

        In seeded Monte Carlo runs with weights from white to rank one it was at most 3 times too small down to 2·10⁻⁴
        (a Gamma distribution: 8 times), and up to 10 times too large at r = 1.
        """
        from scipy.special import ndtr

        if not self.variance or value <= 0:  # without variance the directions fill both spaces
            return 1.0
        spread = math.log1p(self.variance / self.mean**2)
        return float(ndtr(-(math.log(value / self.mean) + spread / 2) / math.sqrt(spread)))


def random_moments(s: Array, shape: tuple[int, int], i: int, j: int) -> Moments:
    """Exact moments for i left and j right directions and a weight (m, n) with singular values ``s`` (min(m, n),).

    E = ij/(mn)·f, and with f = Σσ², q = Σσ⁴, c_m = [i(m − i)/m]/[(m − 1)(m + 2)/2], c_n likewise with j,
    Var = (j/n)²c_m(q − f²/m) + (i/m)²c_n(q − f²/n) + c_n{c_m[(q + f²)/2 − q/m] − c_m(q − f²/m)/n}.

    Raises:
        ShapeError: more directions than dimensions.
    """
    m, n = shape
    if not (1 <= i <= m and 1 <= j <= n):
        raise ShapeError(f"{i} left and {j} right directions do not fit a weight {shape}")
    f, q = float((s**2).sum()), float((s**4).sum())
    c_m, c_n = _energy_variance(i, m), _energy_variance(j, n)
    variance = (
        (j / n) ** 2 * c_m * (q - f * f / m)
        + (i / m) ** 2 * c_n * (q - f * f / n)
        + c_n * c_m * ((q + f * f) / 2 - q / m - (q - f * f / m) / n)
    )
    return Moments(i * j / (m * n) * f, max(variance, 0.0))


def _energy_variance(i: int, m: int) -> float:
    """c_m of ``random_moments``; 0 where the directions fill the space, also for m = 1, where it would be 0/0."""
    return 0.0 if i == m else (i * (m - i) / m) / ((m - 1) * (m + 2) / 2)


class SidePositions(NamedTuple):
    """How the top i directions of an update lie among those of its weight, in one space of dimension ``d``.

    ``energy``: (n,), ‖U_iᵀw_m‖² for the weight's m-th direction w_m; i/d by chance. ``overlap``: (n,), φ(i, m) of the
    top i of the update with the top m of the weight; ``expected``: (n,), max(i, m)/d, the same by chance.
    """

    d: int
    energy: Array
    overlap: Array
    expected: Array


class Positions(NamedTuple):
    """Figure 8 of Hu et al. 2021 with its chance level, in the output space and in the input space."""

    i: int
    left: SidePositions
    right: SidePositions


def positions(update: WeightBasisCoordinates, i: int) -> Positions:
    """Where in the weight's spectrum the top i directions of an update lie, or all of them where i is larger.

    Raises:
        ShapeError: i < 1.
    """
    if i < 1:
        raise ShapeError(f"a subspace has at least one direction, not {i}")
    i = min(i, update.k)
    return Positions(i, _side(update.left[:, :i], update.shape[0]), _side(update.right[:, :i], update.shape[1]))


def _side(coordinates: Array, d: int) -> SidePositions:
    n, i = coordinates.shape
    energy = (coordinates**2).sum(axis=1)
    m = np.arange(1.0, n + 1)
    overlap = np.minimum(np.cumsum(energy) / np.minimum(m, i), 1.0)
    return SidePositions(d, energy, overlap, np.maximum(m, i) / d)


def _to_numpy(tensor: Tensor) -> Array:
    """A tensor as float64 on the host; moved before it is converted, as Apple's GPUs have no float64."""
    numbers: Array = tensor.cpu().double().numpy()
    return numbers
