"""Chance levels of whole overlap grids against subspaces made another way: the Q of Gaussians, at full size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, ks_2samp

from rankscope import haar
from rankscope.errors import ShapeError
from rankscope.haar import (
    DRAWS,
    NullDistribution,
    familywise_p_values,
    least_p,
    null_distribution,
    random_squared_cosines,
)
from rankscope.subspace import chance

LEVELS = (0.05, 0.01)


def sizes(k_a: int, k_b: int) -> np.ndarray:
    """min(i, j)."""
    return np.minimum.outer(np.arange(1.0, k_a + 1), np.arange(1.0, k_b + 1))


def independent_grids(d: int, k_a: int, k_b: int, count: int, seed: int) -> np.ndarray:
    """φ(i, j) of pairs of random subspaces, (count, k_a, k_b): both bases drawn, neither fixed."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((count, d, k_a)))[0]
    V = np.linalg.qr(rng.standard_normal((count, d, k_b)))[0]
    squared = (U.transpose(0, 2, 1) @ V) ** 2
    return np.minimum(squared.cumsum(axis=1).cumsum(axis=2) / sizes(k_a, k_b), 1.0)


def binomial(level: float, trials: int) -> float:
    """Four standard errors of a rate of rejections, with that of the chance level itself, which is drawn too."""
    return 4 * math.sqrt(level * (1 - level) * (1 / trials + 1 / DRAWS))


# The sampler


@pytest.mark.parametrize(
    ("d", "i", "j"), [(64, 4, 8), (64, 8, 4), (384, 1, 1), (24, 1, 6), (12, 7, 6), (6, 6, 3), (5, 3, 5), (200, 16, 16)]
)
def test_moments_of_the_sampler(d: int, i: int, j: int) -> None:
    """E S = ij/d and Var S = 2ij(d − i)(d − j)/(d²(d − 1)(d + 2)), for every (i, j) at once (METHODS §2)."""
    n = 4000
    squared = random_squared_cosines(d, i, j, n, np.random.default_rng(3))
    assert squared.shape == (n, i, j)
    S = squared.cumsum(axis=1).cumsum(axis=2)
    a, b = np.arange(1.0, i + 1)[:, None], np.arange(1.0, j + 1)
    variance = 2 * a * b * (d - a) * (d - b) / (d**2 * (d - 1) * (d + 2))
    assert np.allclose(S.mean(axis=0), a * b / d, atol=5 * np.sqrt(variance.max() / n), rtol=0)
    free = variance > 0
    kurtosis = ((S - S.mean(axis=0)) ** 4).mean(axis=0)[free] / S.var(axis=0)[free] ** 2
    error = np.sqrt((kurtosis - 1) / n)
    assert (np.abs(S.var(axis=0)[free] / variance[free] - 1) < 5 * error).all()
    assert np.allclose(S[:, ~free], np.broadcast_to(a * b / d, S.shape[1:])[~free])


@pytest.mark.parametrize(("d", "k_a", "k_b"), [(64, 4, 8), (9, 6, 5), (7, 7, 2), (5, 1, 4)])
def test_the_sampler_has_the_law_of_whole_bases(d: int, k_a: int, k_b: int) -> None:
    """Not moments alone: the distribution at the first, the last and a middle cell, by Kolmogorov and Smirnov."""
    theirs = independent_grids(d, k_a, k_b, 3000, seed=8)
    ours = random_squared_cosines(d, k_a, k_b, 3000, np.random.default_rng(5)).cumsum(axis=1).cumsum(axis=2) / sizes(
        k_a, k_b
    )
    for i, j in {(0, 0), (k_a - 1, k_b - 1), (k_a // 2, k_b // 2)}:
        if np.ptp(theirs[:, i, j]) > 1e-9:  # all of the space leaves nothing to chance
            assert ks_2samp(ours[:, i, j], theirs[:, i, j]).pvalue > 1e-3


def test_draws_are_the_same_at_every_call() -> None:
    first = null_distribution(40, 3, 2).least
    haar._draw_null_distribution.cache_clear()
    assert np.array_equal(null_distribution(40, 3, 2).least, first)
    assert null_distribution(40, 2, 3) is null_distribution(40, 3, 2)  # the transposed grid has the same p
    assert len(first) == DRAWS
    assert (np.diff(first) >= 0).all()
    assert repr(null_distribution(40, 3, 2)) == "NullDistribution(3 × 2 in dimension 40, 2000 draws)"


# The least p of a grid


@pytest.mark.parametrize(("d", "k_a", "k_b"), [(128, 16, 4), (64, 8, 1), (12, 7, 6), (344, 20, 8)])
def test_reading_p_between_levels_costs_no_accuracy(
    d: int, k_a: int, k_b: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = independent_grids(d, k_a, k_b, 800, seed=1)
    exact = np.array([chance(grid, d).p.min() for grid in grids])
    small = exact < 0.2
    assert np.allclose(least_p(grids, d)[small], exact[small], rtol=0.01)
    monkeypatch.setattr(haar, "LEVELS", 4)  # negative control: too few
    assert np.abs(least_p(grids, d)[small] / exact[small] - 1).max() > 0.05


@pytest.mark.parametrize(
    ("d", "k_a", "k_b"),
    [(64, 8, 8), (64, 1, 1), (64, 1, 12), (128, 8, 16), (384, 4, 12), (16, 12, 9)],
)
def test_the_corrected_p_rejects_as_often_as_it_says(d: int, k_a: int, k_b: int) -> None:
    """Independent subspaces are called alike in 5 % of the trials at .05, in 1 % at .01; cells alone do it far more."""
    trials = 1500
    p = [chance(grid, d).p for grid in independent_grids(d, k_a, k_b, trials, seed=17)]
    whole = np.array([familywise_p_values(cells, d).min() for cells in p])
    alone = np.array([cells.min() for cells in p])
    for level in LEVELS:
        assert np.mean(whole <= level) == pytest.approx(level, abs=binomial(level, trials))
        if min(k_a, k_b) > 1:  # negative control: the least p as it stands
            assert np.mean(alone <= level) > level + 2 * binomial(level, trials)


@pytest.mark.slow
@pytest.mark.parametrize(("d", "k_a", "k_b"), [(64, 8, 8), (128, 8, 64), (384, 16, 16), (24, 20, 16)])
def test_the_corrected_p_over_many_trials(d: int, k_a: int, k_b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haar, "DRAWS", 20_000)
    haar._draw_null_distribution.cache_clear()
    level = NullDistribution(d, (k_a, k_b), null_distribution(d, k_a, k_b).least, np.empty(0), np.empty(0))
    haar._draw_null_distribution.cache_clear()
    trials = 20_000
    least = np.concatenate(
        [[chance(g, d).p.min() for g in independent_grids(d, k_a, k_b, 1000, seed=s)] for s in range(trials // 1000)]
    )
    for alpha in (0.05, 0.01, 0.001):
        error = 4 * math.sqrt(alpha * (1 - alpha) * 2 / trials)
        assert np.mean(level.familywise_p(least) <= alpha) == pytest.approx(alpha, abs=error)


def test_each_cell_is_corrected_by_counting() -> None:
    d = 50
    cells = chance(independent_grids(d, 6, 3, 1, seed=2)[0], d).p
    drawn = null_distribution(d, 6, 3).least
    found = familywise_p_values(cells, d)
    assert found.shape == cells.shape
    for at in np.ndindex(cells.shape):
        assert found[at] == pytest.approx((1 + np.count_nonzero(drawn <= cells[at])) / (1 + DRAWS))
    assert (found >= cells).all()  # looking at more can only weaken
    assert found.argmin() == cells.argmin()
    assert np.array_equal(familywise_p_values(cells.T, d), found.T)


def test_rarer_than_the_draws_is_bounded_by_the_number_of_cells() -> None:
    """Many layers are corrected once more: a p that stopped at 1/2001 could not pass among 56 of them."""
    p = np.full((4, 5), 0.5)
    p[2, 3] = 1e-12
    assert familywise_p_values(p, 64)[2, 3] == pytest.approx(20 * 1e-12)
    p[2, 3] = 0.9 * null_distribution(64, 4, 5).least[0]
    assert familywise_p_values(p, 64)[2, 3] == pytest.approx(min(1 / (1 + DRAWS), 20 * p[2, 3]))
    assert NullDistribution(9, (2, 2), np.array([0.2, 0.4]), np.empty(0), np.empty(0)).familywise_p(
        np.array(0.19)
    ) == pytest.approx(1 / 3)
    steps = null_distribution(64, 4, 5).familywise_p(np.geomspace(1e-9, 1, 500))
    assert (np.diff(steps) >= 0).all()
    assert steps[-1] == 1


def test_the_same_subspace_is_no_chance_and_all_of_the_space_is_nothing_else() -> None:
    assert familywise_p_values(chance(np.ones((3, 3)), 100).p, 100).min() == 0
    assert (familywise_p_values(chance(np.ones((5, 2)), 5).p, 5)[-1] == 1).all()
    assert (familywise_p_values(np.ones((1, 1)), 1) == 1).all()


# The band


def test_the_band_of_one_direction_has_a_closed_form() -> None:
    """φ(1, 1) ~ Beta(1/2, (d − 1)/2), whose p at the ends is the rest of the band; a count of draws tells it."""
    d, law = 60, beta(0.5, 59 / 2)
    found = null_distribution(d, 9, 4)
    assert law.sf(found.high[0]) == pytest.approx(0.025, abs=binomial(0.025, DRAWS))
    assert law.cdf(found.low[0]) == pytest.approx(0.025, abs=binomial(0.025, DRAWS))


def test_the_band_holds_95_percent_of_other_draws() -> None:
    grids = independent_grids(60, 9, 4, 1500, seed=31)
    found = null_distribution(60, 9, 4)
    for i in range(4):
        held = np.mean((grids[:, i, i] >= found.low[i]) & (grids[:, i, i] <= found.high[i]))
        assert held == pytest.approx(0.95, abs=binomial(0.05, 1500))


def test_errors() -> None:
    for d, k_a, k_b in ((4, 5, 1), (4, 1, 5), (4, 0, 1)):
        with pytest.raises(ShapeError, match="dimension 4"):
            null_distribution(d, k_a, k_b)
    with pytest.raises(ShapeError, match="whole grid"):
        familywise_p_values(np.ones(3), 9)
