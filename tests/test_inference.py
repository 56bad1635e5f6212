"""Statistics against scipy, brute force and simulated coverage, down to one value and values that are all the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from rankscope.inference import (
    CONFIDENCE_LEVEL,
    LARGEST_VALUE,
    Interval,
    Reach,
    equivalence,
    first_reaching,
    holm,
    largest_insufficient_rank,
    mean_interval,
    median_interval,
    rank_correlation,
    ratio_interval,
    slope,
)

Draw = Callable[[np.random.Generator], Interval]


def coverage(draw: Draw, truth: float, times: int = 1000, seed: int = 0) -> tuple[float, float]:
    """How often a drawn interval holds the truth, and four standard errors of that share at ``LEVEL``."""
    rng = np.random.default_rng(seed)
    found = [draw(rng) for _ in range(times)]
    held = [one.low is None or one.high is None or one.low <= truth <= one.high for one in found]
    return float(np.mean(held)), 4 * math.sqrt(CONFIDENCE_LEVEL * (1 - CONFIDENCE_LEVEL) / times)


def plain(found: Interval) -> bool:
    """Every number finite, the value between its ends."""
    if not found.known:
        return math.isfinite(found.value) and found.low is None and found.high is None
    return all(map(math.isfinite, found)) and found.low <= found.value <= found.high  # type: ignore[operator]


# Means


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_mean_has_students_interval(n: int, level: float) -> None:
    x = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(level)
    assert mean_interval(list(x), level) == pytest.approx((x.mean(), low, high), rel=1e-12)


def test_students_interval_covers_three_seeds() -> None:
    share, room = coverage(lambda rng: mean_interval(list(rng.normal(1, 3, 3))), 1.0)
    assert share == pytest.approx(CONFIDENCE_LEVEL, abs=room)
    # Negative control: the normal's 1.96 in the place of t's 4.3 is far too sure.
    narrow, _ = coverage(lambda rng: _normal_interval(rng.normal(1, 3, 3)), 1.0)
    assert narrow < CONFIDENCE_LEVEL - 2 * room


def _normal_interval(x: np.ndarray) -> Interval:
    half = 1.96 * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


# Ratios


def pairs(rng: np.random.Generator, n: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Correlated numerators about 1.8 and denominators about 2."""
    shared, own, other = rng.standard_normal((3, n))
    return 1.8 + noise * (shared + own), 2 + noise * (shared - 0.5 * other)


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("n", [3, 4, 12])
def test_fieller_inverts_the_paired_t_test(n: int, level: float) -> None:
    """A ratio c is inside where a t test does not tell y − c·x from zero: tried over a range of c by scipy."""
    y, x = pairs(np.random.default_rng(n), n, noise=0.1)
    found = ratio_interval(list(y), list(x), level)
    assert found.value == pytest.approx(y.mean() / x.mean(), rel=1e-14)
    assert found.low is not None
    assert found.high is not None

    def p(c: float) -> float:
        return float(stats.ttest_1samp(y - c * x, 0).pvalue)

    assert [p(found.low), p(found.high)] == pytest.approx([1 - level] * 2, rel=1e-6)
    for c in np.linspace(found.low - 2, found.high + 2, 201):
        assert (p(c) >= 1 - level) == (found.low <= c <= found.high)


def test_fieller_has_no_ends_where_the_denominator_may_be_zero() -> None:
    y, x = np.array([1.0, 1.2, 0.9]), np.array([0.1, -0.2, 0.3])
    found = ratio_interval(list(y), list(x))
    assert not found.known
    assert found.value == pytest.approx(y.mean() / x.mean())
    # By the test: no ratio is too large, either way.
    assert all(stats.ttest_1samp(y - c * x, 0).pvalue > 1 - CONFIDENCE_LEVEL for c in (-1e9, 1e9))


def test_fieller_is_not_the_interval_of_unpaired_values() -> None:
    """Where numerator and denominator move together, as with one seed's data, their ratio is known better."""
    x = np.array([1.0, 2.0, 3.0, 4.0])
    together, crossed = ratio_interval(list(0.9 * x), list(x)), ratio_interval(list(0.9 * x[::-1]), list(x))
    assert together == pytest.approx((0.9, 0.9, 0.9))
    assert crossed.value == pytest.approx(0.9)
    assert not crossed.known or crossed.high - crossed.low > 0.1  # type: ignore[operator]


@pytest.mark.parametrize("n", [3, 5])
def test_fieller_covers_the_ratio_of_means(n: int) -> None:
    share, room = coverage(lambda rng: ratio_interval(*map(list, pairs(rng, n, 0.1))), 0.9)
    assert share == pytest.approx(CONFIDENCE_LEVEL, abs=room)


def test_fieller_covers_where_the_denominator_is_noisy() -> None:
    """Intervals without ends hold everything: never less than the level."""
    share, room = coverage(lambda rng: ratio_interval(*map(list, pairs(rng, 4, 1.0))), 0.9)
    assert share >= CONFIDENCE_LEVEL - room


# Medians


@pytest.mark.parametrize("n", [*range(1, 31), 50, 101, 300])
def test_the_median_lies_between_order_statistics(n: int) -> None:
    """By the binomial itself: the k-th from either end covers, and the (k + 1)-th would not."""
    x = np.random.default_rng(n).permutation(n).astype(float)
    found = median_interval(list(x))
    assert found.value == np.median(x)

    def covers(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    if not found.known:
        assert n < 6
        assert covers(1) < CONFIDENCE_LEVEL
        return
    low, high = found.low, found.high
    assert low is not None
    assert high == n - 1 - low  # type: ignore[operator]
    k = int(low) + 1
    assert covers(k) >= CONFIDENCE_LEVEL
    assert k + 1 > n - k - 1 or covers(k + 1) < CONFIDENCE_LEVEL


@pytest.mark.parametrize("n", [6, 9, 20, 41])
def test_the_median_is_covered_whatever_the_law(n: int) -> None:
    share, room = coverage(lambda rng: median_interval(list(rng.exponential(1, n))), math.log(2))
    assert share >= CONFIDENCE_LEVEL - room
    assert share <= 0.97 + room  # what the steps of so few values allow, not the whole line


def test_the_median_is_covered_with_ties() -> None:
    share, room = coverage(lambda rng: median_interval(list(rng.poisson(1.2, 15).astype(float))), 1.0)
    assert share >= CONFIDENCE_LEVEL - room


# Equivalence


@pytest.mark.parametrize("mean", [-0.9, -0.2, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_equivalence_is_the_worse_of_two_one_sided_tests(n: int, mean: float) -> None:
    x = mean + np.random.default_rng(n).normal(0, 0.4, n)
    below = stats.ttest_1samp(x, 1.0, alternative="less").pvalue
    above = stats.ttest_1samp(x, -1.0, alternative="greater").pvalue
    assert equivalence(list(x), 1.0) == pytest.approx(max(below, above), rel=1e-9)


def test_equivalence_errs_as_often_as_it_may() -> None:
    """On the edge of the margin 5 % are called equivalent; the difference test's 'not significant' is no such thing."""
    rng = np.random.default_rng(1)
    draws = rng.normal(1.0, 0.3, (2000, 5))
    called = np.mean([(equivalence(list(x), 1.0) or 0) < 0.05 for x in draws])
    assert called == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 2000))
    few = [0.0, 2.0]  # no difference to be told, and no equivalence either
    assert stats.ttest_1samp(few, 0).pvalue > 0.05
    assert (equivalence(few, 1.0) or 0) > 0.05


@pytest.mark.parametrize(("constant", "p"), [(0.0, 0.0), (0.5, 0.0), (-0.5, 0.0), (1.0, 1.0), (2.0, 1.0), (-2.0, 1.0)])
def test_equivalence_of_differences_without_spread(constant: float, p: float) -> None:
    assert equivalence([constant] * 4, 1.0) == p


def test_equivalence_needs_two_and_a_margin() -> None:
    assert equivalence([0.0], 1.0) is None
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above zero"):
            equivalence([0.0, 0.1], margin)


# Correlations and slopes


@pytest.mark.parametrize("n", [4, 7, 40])
def test_the_rank_correlation_is_spearmans(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 5, n).astype(float), rng.normal(size=n)
    x[:2] = 0, 4  # not all the same
    found = rank_correlation(list(x), list(y))
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert rank_correlation(list(x), list(-y)) == pytest.approx((-found.value, -found.high, -found.low))  # type: ignore[operator]
    assert rank_correlation(list(np.exp(x)), list(y)) == pytest.approx(found)  # order alone counts


def test_the_interval_is_bonett_and_wrights() -> None:
    x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    y = [2.0, 1.0, 4.0, 3.0, 7.0, 5.0, 8.0, 6.0]
    rho = 1 - 6 * sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (8 * 63)
    half = 1.959963984540054 * math.sqrt((1 + rho**2 / 2) / 5)
    z = 0.5 * math.log((1 + rho) / (1 - rho))
    assert rank_correlation(x, y) == pytest.approx((rho, math.tanh(z - half), math.tanh(z + half)))


@pytest.mark.parametrize("r", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("n", [4, 6, 20])
def test_spearmans_interval_covers_gaussian_copulas(n: int, r: float) -> None:
    """ρ_s = 6/π·asin(r/2) (Pearson 1907). The interval is approximate: 2 % beside the noise of the simulation."""

    def draw(rng: np.random.Generator) -> Interval:
        x, other = rng.standard_normal((2, n))
        return rank_correlation(list(x), list(np.exp(r * x + math.sqrt(1 - r * r) * other)))

    share, room = coverage(draw, 6 / math.pi * math.asin(r / 2), times=400)
    assert share >= CONFIDENCE_LEVEL - 0.02 - room
    if n == 20:
        assert share <= CONFIDENCE_LEVEL + 0.02 + room  # not by being endless


def test_a_perfect_order_of_few_pairs_proves_little() -> None:
    """Of four pairs chance puts one in twelve in perfect order: z at ±1 itself would leave no interval at all."""
    four = rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
    assert four.value == four.high == pytest.approx(1.0)
    assert four.low is not None
    assert four.low < 0
    twelve = [float(i) for i in range(12)]
    many = rank_correlation(twelve, twelve[::-1])
    assert many.value == many.low == pytest.approx(-1.0)
    assert many.high is not None
    assert many.high < -0.8


@pytest.mark.parametrize("n", [3, 4, 20])
def test_the_slope_is_that_of_least_squares(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    y = 0.3 * x + rng.normal(size=n)
    expected = stats.linregress(x, y)
    half = stats.t.ppf(0.975, n - 2) * expected.stderr
    found = slope(list(x), list(y))
    assert found == pytest.approx((expected.slope, expected.slope - half, expected.slope + half), rel=1e-9)


def test_two_points_have_a_slope_and_no_interval() -> None:
    assert slope([0.0, 2.0], [1.0, 2.0]) == Interval(0.5)
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == pytest.approx((2.0, 2.0, 2.0))
    assert slope([0.0, 1.0, 2.0], [4.0, 4.0, 4.0]) == (0.0, 0.0, 0.0)


# Many looks


def by_hand(p: list[float]) -> list[float]:
    """Holm's rule step by step: of those at least as large as the i-th smallest there are n − i + 1."""
    found = []
    for value in p:
        smaller = sorted(other for other in p if other <= value)
        found.append(max(min(1.0, (len(p) - i) * other) for i, other in enumerate(smaller)))
    return found


@pytest.mark.parametrize(
    "p", [[0.01], [0.01, 0.04, 0.03], [0.03, 0.011, 0.02, 0.02], [1.0, 0.9, 0.0], [0.02, 0.02, 0.02], []], ids=str
)
def test_holm_against_the_rule_by_hand(p: list[float]) -> None:
    found = holm(p)
    assert list(found) == pytest.approx(by_hand(p))
    assert all(q >= value for q, value in zip(found, p, strict=True))


def test_holm_keeps_false_alarms_of_many_looks_to_the_level() -> None:
    rng = np.random.default_rng(2)
    p = rng.uniform(size=(4000, 6))
    alarms = np.mean([holm(row).min() < 0.05 for row in p])
    assert alarms == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=4 * math.sqrt(0.05 * 0.95 / 4000))
    assert np.mean(p.min(axis=1) < 0.05) > 0.2  # uncorrected


# The first rank that reaches


def ranks(*found: tuple[int, float, float | None, float | None]) -> list[tuple[int, Interval]]:
    return [(rank, Interval(value, low, high)) for rank, value, low, high in found]


CURVE = ranks((1, 0.5, 0.4, 0.6), (2, 0.85, 0.75, 0.95), (4, 0.92, 0.85, 0.99), (8, 0.97, 0.93, 1.01))


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (CURVE, Reach(4, 2, 8)),
        (CURVE[::-1], Reach(4, 2, 8)),  # in any order
        (CURVE[:2], Reach(None, 2, None)),
        (CURVE[:1], Reach(None, None, None)),
        (ranks((1, 0.9, 0.9, 0.9)), Reach(1, 1, 1)),  # at least, not above
        (ranks((1, 0.95, 0.92, 0.98), (2, 0.8, 0.7, 0.85)), Reach(1, 1, 1)),  # a later rank may fall again
        (ranks((1, 0.5, None, None), (2, 0.95, None, None)), Reach(2, 1, None)),
        (ranks((1, 0.5, None, None), (2, 0.95, 0.92, 0.98)), Reach(2, 1, 2)),  # what is not known may reach
        (ranks((1, 0.5, 0.4, 0.6), (2, 0.7, None, None)), Reach(None, 2, None)),
        ([], Reach(None, None, None)),
    ],
)
def test_the_first_rank_that_reaches(shares: list[tuple[int, Interval]], expected: Reach) -> None:
    assert first_reaching(shares, 0.9) == expected


# Edges

SINGLE: dict[str, Callable[[], Interval]] = {
    "mean": lambda: mean_interval([2.0]),
    "ratio": lambda: ratio_interval([1.0], [2.0]),
    "median": lambda: median_interval([2.0]),
    "slope": lambda: slope([0.0, 1.0], [1.0, 1.0]),
    "correlation": lambda: rank_correlation([0.0, 1.0, 2.0], [0.0, 2.0, 1.0]),
}


@pytest.mark.parametrize("name", SINGLE)
def test_too_few_values_have_no_ends(name: str) -> None:
    found = SINGLE[name]()
    assert not found.known
    assert plain(found)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-12, 1e120])
def test_constants_have_intervals_without_width(value: float) -> None:
    same = [value] * 7
    found = [mean_interval(same), median_interval(same)]
    found += [ratio_interval(same, same)] if value else []
    for one in found:
        assert plain(one)
        assert one.high - one.low <= 1e-6 * abs(one.value)  # type: ignore[operator]


@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e140])
def test_no_scale_makes_a_number_that_is_none(scale: float) -> None:
    y, x = ([scale * v for v in row] for row in ([1.0, 1.1, 0.9, 1.2, 0.8, 1.3], [2.0, 2.1, 1.7, 2.2, 1.9, 2.0]))
    for found in (mean_interval(y), median_interval(y), ratio_interval(y, x), slope(x, y), rank_correlation(x, y)):
        assert plain(found)
        assert found.known
    assert 0 <= (equivalence(y, 1.5 * scale) or 0) < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2 * LARGEST_VALUE])
def test_what_is_no_number_is_refused(bad: float) -> None:
    good = [1.0, 2.0, 3.0]
    for call in (
        lambda: mean_interval([1.0, bad]),
        lambda: median_interval([bad, *good]),
        lambda: ratio_interval(good, [1.0, 2.0, bad]),
        lambda: ratio_interval([1.0, 2.0, bad], good),
        lambda: equivalence([0.0, bad], 1.0),
        lambda: rank_correlation(good, [1.0, 2.0, bad]),
        lambda: slope([1.0, 2.0, bad], good),
    ):
        with pytest.raises(ValueError, match="not a number"):
            call()
    with pytest.raises(ValueError, match="from 0 to 1"):
        holm([0.5, bad])


def test_what_has_no_answer_is_refused() -> None:
    for call, words in (
        (lambda: mean_interval([]), "no value"),
        (lambda: median_interval([]), "no value"),
        (lambda: equivalence([], 1.0), "no value"),
        (lambda: ratio_interval([1.0, 2.0], [1.0]), "cannot be paired"),
        (lambda: ratio_interval([1.0, 2.0], [1.0, -1.0]), "mean zero"),
        (lambda: rank_correlation([1.0, 2.0], [1.0]), "two pairs"),
        (lambda: rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), "all the same"),
        (lambda: slope([1.0, 1.0], [1.0, 2.0]), "two different values"),
        (lambda: slope([1.0, 2.0], [1.0]), "as many y as x"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([(1, Interval(0.5, 0.4, 0.6)), (4, Interval(0.8, 0.7, 0.89)), (16, Interval(0.95, 0.9, 1.0))], 4),
        ([(16, Interval(0.5, 0.4, 0.6)), (1, Interval(0.9, 0.85, 0.95))], 0),  # in any order; what is below may reach
        ([(1, Interval(0.5, 0.4, 0.6)), (4, Interval(0.5))], 1),
        ([(1, Interval(0.5, 0.4, 0.6)), (4, None), (8, Interval(0.5, 0.4, 0.6))], 1),
        ([(2, Interval(0.5, 0.4, 0.9))], 0),
        ([], 0),
    ],
)
def test_how_far_ranks_surely_fall_short(shares: list[tuple[int, Interval | None]], expected: int) -> None:
    assert largest_insufficient_rank(shares, 0.9) == expected
