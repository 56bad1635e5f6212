"""The chance level of a whole overlap grid, from random draws of two independent, uniform (Haar) subspaces.

``subspace.chance`` gives the p of each cell (i, j). The least p of a grid is a minimum over all cells, so it must be
compared with the least p that grids have by chance alone (the maximum statistic; Westfall & Young 1993).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rankscope.errors import ShapeError
from rankscope.noise import Array
from rankscope.subspace import chance

DRAWS = 2000
"""Pairs of subspaces that are drawn for a chance level. A p of .05 has a standard error of .005, one of .01 of .002."""
BATCH = 250
BAND = 0.95
LEVELS = 64


@dataclass(frozen=True, eq=False, repr=False)
class NullDistribution:
    """What ``DRAWS`` random grids of k_a × k_b overlaps in dimension ``d`` contain.

    ``least``: (draws,), the least p of each grid, ascending. ``low`` and ``high``: (min(k_a, k_b),), the ends of the
    interval that holds φ(i, i) in a share ``BAND`` of the grids.
    """

    d: int
    shape: tuple[int, int]
    least: Array
    low: Array
    high: Array

    def familywise_p(self, p: Array) -> Array:
        """P(least p of a grid ≤ p) by chance, for p of any shape: (1 + #{least ≤ p})/(1 + draws).

        A p below those of all draws is bounded by the number of cells times p too (Bonferroni). So the number of draws
        does not limit how small it can be, which a further correction, for many layers, needs.
        """
        below = np.searchsorted(self.least, p, side="right")
        drawn_p = (1.0 + below) / (1.0 + len(self.least))
        cells = math.prod(self.shape)
        familywise: Array = np.where(below == 0, np.minimum(drawn_p, cells * p), drawn_p)
        return familywise

    def __repr__(self) -> str:
        return f"NullDistribution({self.shape[0]} × {self.shape[1]} in dimension {self.d}, {len(self.least)} draws)"


def familywise_p_values(p: Array, d: int) -> Array:
    """p of each cell of an overlap grid (k_a, k_b), corrected for all of its cells; the least is the p of the grid.

    Args:
        p: (k_a, k_b) from ``subspace.chance``, for subspaces in dimension ``d``.

    Raises:
        ShapeError: not a grid, or more directions than dimensions.
    """
    if p.ndim != 2:
        raise ShapeError(f"p of a whole grid (k_a, k_b) is needed, not of the shape {p.shape}")
    return null_distribution(d, *p.shape).familywise_p(p)


def null_distribution(d: int, k_a: int, k_b: int) -> NullDistribution:
    """The chance level of grids of this size. It is drawn at the first call, and the same at every call.

    Drawing needs memory for several times ``DRAWS``·k_a·k_b numbers: 130 MB for 64 × 64.

    Raises:
        ShapeError: more directions than dimensions, or none.
    """
    if not 1 <= min(k_a, k_b) <= max(k_a, k_b) <= d:
        raise ShapeError(f"there are no {k_a} and {k_b} directions in dimension {d}")
    return _draw_null_distribution(d, max(k_a, k_b), min(k_a, k_b))


@lru_cache(maxsize=256)
def _draw_null_distribution(d: int, more: int, fewer: int) -> NullDistribution:
    """``null_distribution`` for k_a ≥ k_b; the grids of the other order are transposed, and have the same p."""
    rng = np.random.default_rng((d, more, fewer))
    squared = np.concatenate([random_squared_cosines(d, more, fewer, BATCH, rng) for _ in range(0, DRAWS, BATCH)])
    grids = np.cumsum(np.cumsum(squared, axis=1, out=squared), axis=2, out=squared)  # (draws, more, fewer)
    grids /= np.minimum.outer(np.arange(1.0, more + 1), np.arange(1.0, fewer + 1))
    diagonals = grids.diagonal(axis1=1, axis2=2)
    low, high = np.quantile(diagonals, [(1 - BAND) / 2, (1 + BAND) / 2], axis=0)
    return NullDistribution(d, (more, fewer), np.sort(least_p(grids, d)), low, high)


def least_p(grids: Array, d: int) -> Array:
    """The least p (``subspace.chance``) of each of many grids (draws, k_a, k_b): (draws,).

    log p of each cell is interpolated between its values at ``LEVELS`` of the drawn overlaps, chosen so that p falls by
    about the same factor from one to the next. A test holds that this is precise to a few thousandths of p.
    """
    ranks = np.unique(np.geomspace(1, len(grids), LEVELS).round().astype(int))
    levels = np.sort(grids, axis=0)[len(grids) - ranks[::-1]]  # (levels, k_a, k_b)
    tables = np.log([np.maximum(chance(level, d).p, np.finfo(float).tiny) for level in levels])
    least = np.zeros(len(grids))
    for cell in np.ndindex(levels.shape[1:]):
        at = (slice(None), *cell)
        np.minimum(least, np.interp(grids[at], levels[at], tables[at]), out=least)
    p: Array = np.exp(least)
    return p


def random_squared_cosines(d: int, k_a: int, k_b: int, draws: int, rng: np.random.Generator) -> Array:
    """Squared entries of UᵀV for independent, uniformly random orthonormal U (d, k_a), V (d, k_b): (draws, k_a, k_b).

    Only the angles between them matter, so U can be the first k_a axes. V is the Q of a Gaussian (d, k_b). Of its last
    d − k_a rows only their R matters, which is drawn directly: triangular, with χ on the diagonal and Gaussians above
    (Bartlett 1933). The cost does not depend on d.
    """
    first_rows = rng.standard_normal((draws, k_a, k_b))
    rows = min(d - k_a, k_b)
    last_rows = np.triu(rng.standard_normal((draws, rows, k_b)), 1)
    diagonal = np.arange(rows)
    last_rows[:, diagonal, diagonal] = np.sqrt(rng.chisquare(d - k_a - diagonal, (draws, rows)))
    Q = np.linalg.qr(np.concatenate((first_rows, last_rows), axis=1))[0]  # (draws, k_a + rows, k_b)
    squared: Array = Q[:, :k_a] ** 2
    return squared


corrected = familywise_p_values
"""The former name of this function, for scripts that use it."""
