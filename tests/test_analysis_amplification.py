"""Update against weight: planted answers, the paper's numbers, and random directions by seeded Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from makers import MAKERS, float64, frame, generator, normal
from scipy.stats import norm

from rankscope.analysis.amplification import WeightBasisCoordinates, amplification, positions, random_moments
from rankscope.errors import ShapeError
from rankscope.linalg import dense_svd
from rankscope.updates import Dense, LowRank


def decaying(m: int, n: int, power: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A weight (m, n) with σ_l = 1/l^power, float64."""
    k = min(m, n)
    return frame(m, k, seed) * torch.arange(1.0, k + 1, dtype=torch.float64) ** -power @ frame(n, k, seed + 1).T


def along(weight: torch.Tensor, places: list[int], sigma: list[float], scale: float = 1.0) -> LowRank:
    """scale · Σ σ·u_l·v_lᵀ over the weight's own l-th singular vectors, counted from 0."""
    U, _, Vt = dense_svd(weight)
    return LowRank(U[:, places] * torch.tensor(sigma, dtype=torch.float64), Vt[places], scale)


def monte_carlo(weight: torch.Tensor, i: int, j: int, count: int) -> np.ndarray:
    """‖UᵀWV‖²_F of uniformly random U (m, i) and V (n, j), seeded."""
    source = generator(7)
    U, V = (
        torch.linalg.qr(torch.randn(count, d, k, generator=source, dtype=torch.float64))[0]
        for d, k in ((weight.shape[0], i), (weight.shape[1], j))
    )
    found: np.ndarray = (U.mT @ weight @ V).square().sum(dim=(1, 2)).numpy()
    return found


# What random directions give


@pytest.mark.parametrize(("r", "printed"), [(4, 0.0202), (64, 0.3227)])
def test_the_papers_random_column(r: int, printed: float) -> None:
    """Table 7's W_q of GPT-3, 12288², ‖W‖ = 61.95: the mean knows the norm alone."""
    s = np.full(12288, 61.95 / math.sqrt(12288))
    assert math.sqrt(random_moments(s, (12288, 12288), r, r).mean) == pytest.approx(printed, abs=5e-5)


@pytest.mark.parametrize(("shape", "i", "j"), [((6, 9), 2, 3), ((9, 6), 1, 4), ((5, 4), 4, 2), ((7, 7), 1, 1)], ids=str)
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_moments_against_monte_carlo(shape: tuple[int, int], i: int, j: int, power: float) -> None:
    weight = decaying(*shape, power)
    null = random_moments(dense_svd(weight).s.numpy(), shape, i, j)
    x = monte_carlo(weight, i, j, 20_000)
    spread = (x - x.mean()) ** 2
    assert abs(x.mean() - null.mean) < 4 * x.std() / math.sqrt(len(x))
    assert abs(spread.mean() - null.variance) < 4 * spread.std() / math.sqrt(len(x))


@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5), (1, 4), (4, 1)])
def test_moments_of_one_direction_on_each_side(m: int, n: int) -> None:
    """E u_a⁴ = 3/(m(m + 2)) on the sphere, and E u_a²u_b² a third of it: hence
    E(uᵀWv)⁴ = 3(f² + 2q)/(mn(m + 2)(n + 2))."""
    s = np.array([2.0, 1.0, 0.5, 0.1])[: min(m, n)]
    f, q = float((s**2).sum()), float((s**4).sum())
    null = random_moments(s, (m, n), 1, 1)
    assert null.mean == pytest.approx(f / (m * n))
    assert null.variance == pytest.approx(3 * (f * f + 2 * q) / (m * n * (m + 2) * (n + 2)) - (f / (m * n)) ** 2)


def test_directions_that_fill_the_space_leave_nothing_to_chance() -> None:
    s = np.array([3.0, 2.0, 1.0])
    null = random_moments(s, (3, 3), 3, 3)
    assert (null.mean, null.variance, null.tail_probability(99.0)) == (pytest.approx(14), 0, 1)
    whole = amplification(WeightBasisCoordinates.of(Dense(normal(3, 3)), dense_svd(torch.diag(torch.from_numpy(s)))), 3)
    assert whole.own == pytest.approx(whole.top) == pytest.approx(whole.random)
    assert (whole.z, whole.p) == (0, 1)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("r", [1, 4, 8])
def test_tail_is_hardly_too_small(power: float, r: int) -> None:
    """At most three times too small down to 10⁻³, where a normal law with the same moments is far off."""
    weight = decaying(24, 20, power)
    null = random_moments(dense_svd(weight).s.numpy(), (24, 20), r, r)
    extreme = np.sort(monte_carlo(weight, r, r, 10_000))[[-10, -100, -500]]
    share = np.array([10, 100, 500]) / 10_000
    p = np.array([null.tail_probability(float(value)) for value in extreme])
    assert (p > share / 3).all()
    assert (p < share * 15).all()
    if r == 1:
        assert norm.sf((extreme[0] - null.mean) / math.sqrt(null.variance)) < share[0] / 100


def test_tail_falls_from_one() -> None:
    null = random_moments(np.array([2.0, 1.0]), (5, 6), 1, 1)
    p = [null.tail_probability(value) for value in (0.0, 0.01, 0.1, 1.0, 4.0)]
    assert p[0] == 1
    assert p == sorted(p, reverse=True)
    assert p[-1] < 0.01


# Table 7


@pytest.mark.parametrize("name", MAKERS)
def test_columns_by_definition(name: str) -> None:
    """‖U_rᵀWV_r‖_F multiplied out by numpy, for every kind of update, W not square."""
    update, weight = MAKERS[name].make(20, 14, 3), decaying(20, 14)
    U, s, Vt = np.linalg.svd(float64(update))
    r = 2
    found = amplification(WeightBasisCoordinates.of(update, dense_svd(weight)), r)
    own = float(np.linalg.norm(U[:, :r].T @ weight.numpy() @ Vt[:r].T))
    assert found.own == pytest.approx(own, rel=1e-5)
    assert found.top == pytest.approx(math.sqrt(1 + 1 / 4))
    assert found.norm == pytest.approx(float(np.linalg.norm(s)), rel=1e-6)
    assert found.amplification == pytest.approx(found.norm / own, rel=1e-5)
    weight_norm = float(weight.norm())
    assert found.random == pytest.approx(r * weight_norm / math.sqrt(20 * 14))
    assert found.random_amplification == pytest.approx(found.norm / found.random)
    null = random_moments(dense_svd(weight).s.numpy(), (20, 14), r, r)
    assert found.z == pytest.approx((own**2 - null.mean) / math.sqrt(null.variance), rel=1e-4)
    assert found.random_sd == pytest.approx(math.sqrt(null.variance) / (2 * found.random))


def test_planted_amplification() -> None:
    """Along directions 3 and 5 of W (σ = 1/3, 1/5) with σ = (6, 3) and scale 2: ‖ΔW‖ = 2√45, own = √(1/9 + 1/25)."""
    weight = decaying(12, 9)
    found = amplification(WeightBasisCoordinates.of(along(weight, [2, 4], [6.0, 3.0], 2.0), dense_svd(weight)), 2)
    own = math.sqrt(1 / 9 + 1 / 25)
    assert found.own == pytest.approx(own)
    assert found.amplification == pytest.approx(2 * math.sqrt(45) / own)
    first = amplification(WeightBasisCoordinates.of(along(weight, [2, 4], [6.0, 3.0], 2.0), dense_svd(weight)), 1)
    assert (first.r, first.own, first.norm) == (1, pytest.approx(1 / 3), pytest.approx(found.norm))


def test_strong_and_absent_directions() -> None:
    weight = decaying(30, 30, 0.5)
    base = dense_svd(weight)
    strong = amplification(WeightBasisCoordinates.of(along(weight, [0, 1], [2.0, 1.0]), base), 2)
    assert strong.own == pytest.approx(strong.top)
    assert strong.z > 10
    assert strong.p < 1e-4
    crossed = LowRank(base.U[:, :1], base.Vt[1:2])  # u_1 v_2ᵀ: between strong directions, where W has nothing
    absent = amplification(WeightBasisCoordinates.of(crossed, base), 1)
    assert absent.own == pytest.approx(0, abs=1e-14)
    assert absent.z < 0
    assert absent.p == pytest.approx(1)


def test_more_directions_than_there_are() -> None:
    weight = decaying(8, 6)
    update = along(weight, [0, 3], [1.0, 0.5])
    assert amplification(WeightBasisCoordinates.of(update, dense_svd(weight)), 5).r == 2
    assert WeightBasisCoordinates.of(update, dense_svd(weight), 1).k == 1


def test_errors() -> None:
    weight = decaying(8, 6)
    update = along(weight, [0], [1.0])
    with pytest.raises(ShapeError, match="transposed"):
        WeightBasisCoordinates.of(update, dense_svd(weight.T))
    with pytest.raises(ShapeError, match=r"\(8, 5\).*\(8, 6\)"):
        WeightBasisCoordinates.of(update, dense_svd(decaying(8, 5)))
    with pytest.raises(ShapeError, match="is zero"):
        WeightBasisCoordinates.of(update * 0.0, dense_svd(weight))
    found = WeightBasisCoordinates.of(update, dense_svd(weight))
    for call in (amplification, positions):
        with pytest.raises(ShapeError, match="at least one"):
            call(found, 0)
    with pytest.raises(ShapeError, match="no strength"):
        amplification(WeightBasisCoordinates.of(update, dense_svd(weight * 0)), 1)
    for i, j in ((0, 1), (1, 0), (9, 1), (1, 7)):
        with pytest.raises(ShapeError, match="do not fit"):
            random_moments(np.ones(6), (8, 6), i, j)


# Figure 8


def test_positions_of_planted_directions() -> None:
    """Directions 2 and 5 of W: all energy at these two places, φ(2, m) by counting."""
    weight = decaying(12, 7)
    found = positions(WeightBasisCoordinates.of(along(weight, [1, 4], [2.0, 1.0]), dense_svd(weight)), 2)
    for side, d in ((found.left, 12), (found.right, 7)):
        assert side.d == d
        assert np.allclose(side.energy, [0, 1, 0, 0, 1, 0, 0])
        assert np.allclose(side.overlap, [0, 1 / 2, 1 / 2, 1 / 2, 1, 1, 1])
        assert np.allclose(side.expected, np.array([2, 2, 3, 4, 5, 6, 7]) / d)
    assert found.i == 2


def test_left_and_right_are_told_apart() -> None:
    weight = decaying(9, 9)
    base = dense_svd(weight)
    found = positions(WeightBasisCoordinates.of(LowRank(base.U[:, 2:3], base.Vt[5:6]), base), 8)
    assert found.i == 1
    assert (int(found.left.energy.argmax()), int(found.right.energy.argmax())) == (2, 5)


def test_energy_outside_a_tall_weights_columns_is_missing() -> None:
    weight = decaying(12, 4)
    outside = torch.linalg.svd(weight)[0][:, -1:]
    found = positions(WeightBasisCoordinates.of(LowRank(outside, normal(1, 4)), dense_svd(weight)), 1)
    assert np.allclose(found.left.energy, 0)
    assert found.right.energy.sum() == pytest.approx(1)


def test_positions_of_random_directions_are_at_chance() -> None:
    """Mean over seeds within four standard errors at every place, d ≠ n on the left."""
    base = dense_svd(decaying(24, 10))
    sides = [
        positions(WeightBasisCoordinates.of(LowRank(normal(24, 3, seed=s), normal(3, 10, seed=s + 999)), base), 3)
        for s in range(300)
    ]
    for side in ("left", "right"):
        energy = np.array([getattr(one, side).energy for one in sides])
        grid = np.array([getattr(one, side).overlap for one in sides])
        d, expected = getattr(sides[0], side).d, getattr(sides[0], side).expected
        assert (np.abs(energy.mean(0) - 3 / d) < 4 * energy.std(0) / math.sqrt(300)).all()
        assert (np.abs(grid.mean(0) - expected) < 4 * grid.std(0) / math.sqrt(300) + 1e-12).all()
