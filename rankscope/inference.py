"""Statistics on plain numbers: intervals, equivalence, correction for multiple tests. Imports no module of the package.

Runs are few (three seeds), so every method is exact for small samples, or gives an interval without ends:
``Interval(value, None, None)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE_LEVEL = 0.95
"""Coverage of an interval where the caller asks for no other."""
LARGEST_VALUE = 1e150
"""Larger values are refused, because their squares overflow."""


class Interval(NamedTuple):
    """A number and the ends of its interval, which are None where the data do not determine them."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether the interval has ends."""
        return self.low is not None and self.high is not None


def mean_interval(values: Sequence[float], level: float = CONFIDENCE_LEVEL) -> Interval:
    """Mean with Student's t interval; without ends for a single value.

    Raises:
        ValueError: no value.
    """
    x = _vector(values)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean)
    half = _t(level, len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], level: float = CONFIDENCE_LEVEL
) -> Interval:
    """Ratio of two means of paired values with Fieller's interval (Fieller 1954).

    The interval is the set of ratios c for which a t test on the pairs does not reject that numerator − c·denominator
    has mean zero. It has no ends for a single pair, or where the test does not reject that the denominator is zero.

    Raises:
        ValueError: no value, lengths that differ, or a denominator with mean zero.
    """
    y, x = _vector(numerators), _vector(denominators)
    if len(x) != len(y):
        raise ValueError(f"{len(y)} numerators and {len(x)} denominators cannot be paired")
    if x.mean() == 0:
        raise ValueError("the denominators have mean zero")
    ratio = float(y.mean() / x.mean())
    if len(x) < 2:
        return Interval(ratio)
    n, t2 = len(x), _t(level, len(x) - 1) ** 2
    covariance = np.cov(y, x) / n
    # (ȳ − c·x̄)² ≤ t²·Var(ȳ − c·x̄) is a·c² − 2b·c + d ≤ 0.
    a = float(x.mean() ** 2 - t2 * covariance[1, 1])
    b = float(x.mean() * y.mean() - t2 * covariance[0, 1])
    d = float(y.mean() ** 2 - t2 * covariance[0, 0])
    if a <= 0:
        return Interval(ratio)
    root = math.sqrt(max(b * b - a * d, 0.0))
    # The ratio is in the set; min and max keep it there where rounding would put it outside of a very narrow set.
    return Interval(ratio, min(ratio, (b - root) / a), max(ratio, (b + root) / a))


def median_interval(values: Sequence[float], level: float = CONFIDENCE_LEVEL) -> Interval:
    """Median with the interval between two order statistics, for any distribution; without ends below 6 values.

    The ends are the k-th smallest and k-th largest value, with the largest k for which the binomial distribution gives
    the interval at least the probability ``level`` (Conover 1999, §3.2).

    Raises:
        ValueError: no value.
    """
    from scipy.stats import binom

    x = np.sort(_vector(values))
    n = len(x)
    k = int(binom.ppf((1 - level) / 2, n, 0.5))
    # ppf returns the least k with cdf(k) at or above the tail, so that cdf(k − 1) is below it.
    while k > 0 and binom.cdf(k - 1, n, 0.5) > (1 - level) / 2:
        k -= 1
    median = float(np.median(x))
    return Interval(median) if k == 0 else Interval(median, float(x[k - 1]), float(x[n - k]))


def equivalence(differences: Sequence[float], margin: float) -> float | None:
    """p of the two one-sided t tests that the mean difference lies within ± margin (Schuirmann 1987).

    None for a single difference.

    Raises:
        ValueError: no value, or a margin that is not above zero.
    """
    from scipy.stats import t

    x = _vector(differences)
    if not margin > 0:
        raise ValueError(f"a margin of {margin} is not above zero")
    if len(x) < 2:
        return None
    standard_error = float(x.std(ddof=1)) / math.sqrt(len(x))
    distance = margin - abs(float(x.mean()))  # from the mean to the nearer end of the margin
    if standard_error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(t.sf(distance / standard_error, len(x) - 1))


def rank_correlation(x: Sequence[float], y: Sequence[float], level: float = CONFIDENCE_LEVEL) -> Interval:
    """Spearman's ρ with the interval of Bonett & Wright (2000): Fisher's z with variance (1 + ρ²/2)/(n − 3).

    For n pairs, ρ takes steps of 12/(n³ − n). For a perfect order (ρ = ±1) z would be infinite; it is taken half a step
    inside of ±1, because a few pairs agree by chance too, and the interval ends at ±1. No ends below 4 pairs.

    Raises:
        ValueError: lengths that differ, fewer than two pairs, or values that are all the same.
    """
    from scipy.stats import norm, rankdata

    a, b = _vector(x), _vector(y)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a correlation needs two pairs, not {len(a)} and {len(b)} values")
    a, b = rankdata(a), rankdata(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise ValueError("the correlation of values that are all the same is not defined")
    rho = float(np.corrcoef(a, b)[0, 1])
    if len(a) < 4:
        return Interval(rho)
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt((1 + rho * rho / 2) / (len(a) - 3))
    most = 1 - 6 / (len(a) ** 3 - len(a))
    z = math.atanh(max(-most, min(most, rho)))
    return Interval(rho, min(rho, math.tanh(z - half)), max(rho, math.tanh(z + half)))


def slope(x: Sequence[float], y: Sequence[float], level: float = CONFIDENCE_LEVEL) -> Interval:
    """Least-squares slope of y on x with its t interval; without ends below three points.

    Raises:
        ValueError: lengths that differ, or fewer than two different x.
    """
    a, b = _vector(x), _vector(y)
    if len(a) != len(b) or np.ptp(a) == 0:
        raise ValueError("a slope needs as many y as x, and two different values of x")
    centred = a - a.mean()
    spread = float(centred @ centred)
    value = float(centred @ b) / spread
    if len(a) < 3:
        return Interval(value)
    residual = b - b.mean() - value * centred
    error = math.sqrt(float(residual @ residual) / (len(a) - 2) / spread)
    half = _t(level, len(a) - 2) * error
    return Interval(value, value - half, value + half)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for their number (Holm 1979), in the given order; each is compared with the level itself.

    Raises:
        ValueError: a value that is not a probability.
    """
    values = np.asarray(p, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a p-value lies from 0 to 1")
    order = np.argsort(values)
    factors = np.arange(len(values), 0, -1)
    stepped = np.maximum.accumulate(np.minimum(values[order] * factors, 1.0))
    result = np.empty_like(stepped)
    result[order] = stepped
    return result


class Reach(NamedTuple):
    """The smallest of several ranks that reaches a share; None where none does.

    ``low`` is the smallest rank that possibly reaches it (the upper end of its interval does), ``high`` the smallest
    that certainly does (the lower end does); None where none does. A rank whose interval has no ends possibly reaches
    it, and does not certainly.
    """

    rank: int | None
    low: int | None
    high: int | None


def first_reaching(shares: Sequence[tuple[int, Interval]], share: float) -> Reach:
    """The smallest rank whose share is at least ``share``, and the smallest by the ends of the intervals.

    Args:
        shares: ranks and the shares that they reach, in any order.
    """
    ordered = sorted(shares, key=lambda pair: pair[0])

    def first(ends: Sequence[tuple[int, float | None]], unknown: bool = False) -> int | None:
        return next((rank for rank, end in ends if (unknown if end is None else end >= share)), None)

    return Reach(
        first([(rank, interval.value) for rank, interval in ordered]),
        first([(rank, interval.high) for rank, interval in ordered], unknown=True),
        first([(rank, interval.low) for rank, interval in ordered]),
    )


def largest_insufficient_rank(shares: Sequence[tuple[int, Interval | None]], share: float) -> int:
    """The largest rank that, with all smaller ones that were tried, certainly stays below ``share``.

    0 where the smallest rank possibly reaches it.

    Args:
        shares: ranks and the shares that they reach, in any order; None where the share is not known.
    """
    insufficient = 0
    for rank, interval in sorted(shares, key=lambda pair: pair[0]):
        if interval is None or interval.high is None or interval.high >= share:
            break
        insufficient = rank
    return insufficient


def _t(level: float, freedom: int) -> float:
    """Quantile of Student's t for a two-sided interval with this coverage."""
    from scipy.stats import t

    return float(t.ppf((1 + level) / 2, freedom))


def _vector(values: Sequence[float]) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError("no value")
    if not (np.abs(x) <= LARGEST_VALUE).all():
        raise ValueError(f"a value is not a number, or larger than {LARGEST_VALUE:g}")
    return x
