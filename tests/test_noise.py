"""Noise nulls and rounding floors, against sampled noise, integrals, published constants and planted updates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from makers import normal, planted, planted_dense, spectrum_of

from rankscope.errors import RankscopeError, ShapeError
from rankscope.noise import gd_omega, mp_median, mp_quantile, shrink_singular_values
from rankscope.spectra import (
    Spectrum,
    denoise_spectrum,
    gd_count,
    mp_count,
    mp_edge,
    noise_measures,
    noise_spectrum,
    rounding_floor,
)
from rankscope.subspace import Subspace
from rankscope.updates import Dense, LowRank


@pytest.mark.parametrize(
    ("shape", "fractions"),
    [
        (
            (4096, 4096),
            {
                "entropy_rank": 0.804,
                "energy_entropy_rank": 0.606,
                "participation_ratio": 0.5,
                "stable_rank": 0.25,
                "k90": 0.510,
                "k95": 0.609,
                "k99": 0.771,
                "numerical_rank": 1,
                "nuclear_rank": 8 / (3 * math.pi) / 2,  # mean σ of the quarter circle, 8/3π, over its edge 2
            },
        ),
        ((16384, 4096), {"k90": 0.76, "participation_ratio": 0.8, "stable_rank": 1 / 1.5**2}),
        ((4096, 16384), {"k90": 0.76, "participation_ratio": 0.8, "stable_rank": 1 / 1.5**2}),
    ],
)
def test_noise_fractions(shape: tuple[int, int], fractions: dict[str, float]) -> None:
    """METHODS and closed forms: participation 1/(1 + β), stable 1/(1 + √β)², as the shape grows; printed to 3 digits.

    The largest σ lies ~n^(−2/3) below its limit: .004 at 4096.
    """
    found = noise_measures(shape)
    for name, fraction in fractions.items():
        assert found[name] / min(shape) == pytest.approx(fraction, abs=2e-3), name


@pytest.mark.parametrize("shape", [(256, 256), (96, 384), (300, 40), (3, 200)], ids=str)
def test_noise_measures_match_sampled_noise(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    draws = [
        spectrum_of(np.linalg.svd(rng.standard_normal(shape), compute_uv=False), shape).measures() for _ in range(12)
    ]
    for name, expected in noise_measures(shape).items():
        mean = np.mean([draw[name] for draw in draws])
        # 3 %, or one for the integers: the closed form is a limit, and twelve draws have their own spread.
        assert mean == pytest.approx(expected, rel=0.03, abs=1.0 if name.startswith("k") else 0), name


def test_noise_spectrum_edges() -> None:
    assert set(noise_measures((1, 50)).values()) == {1}
    assert noise_measures((1, 1))["k90"] == 1
    assert noise_spectrum((20, 80)).values[0] < math.sqrt(20) + math.sqrt(80)
    assert noise_spectrum((20, 80)).values[-1] > math.sqrt(80) - math.sqrt(20)
    assert noise_spectrum((20, 80)).energy == pytest.approx(1600, rel=2e-3)
    first = noise_measures((20, 80))
    first["k90"] = 0
    assert noise_measures((20, 80))["k90"] > 0  # a caller cannot spoil what is kept


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.01, 1e-6])
def test_quantiles_invert_the_integral_of_the_density(beta: float) -> None:
    from scipy.integrate import quad

    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(x: float) -> float:
        return math.sqrt(max((high - x) * (x - low), 0)) / (2 * math.pi * beta * x)

    for level, x in zip((0.02, 0.5, 0.97), mp_quantile(np.array([0.02, 0.5, 0.97]), beta), strict=True):
        # quad meets the density's square-root edges: 1e-6 is what it reaches.
        assert quad(density, low, x, limit=200)[0] == pytest.approx(level, abs=1e-6)
    assert mp_quantile(np.array([0.0, 1.0]), beta) == pytest.approx([low, high], abs=1e-9)


def test_omega_of_gavish_and_donoho() -> None:
    assert [round(gd_omega(beta), 4) for beta in (1.0, 0.5, 0.25)] == [2.8584, 2.1712, 1.8369]
    assert gd_omega(1.0) == pytest.approx(4 / math.sqrt(3) / math.sqrt(mp_median(1.0)))


@pytest.mark.parametrize("shape", [(200, 300), (250, 250)], ids=str)
def test_counts_find_the_planted_rank_in_noise(shape: tuple[int, int]) -> None:
    """Five σ well above the noise edge, one below it; without them noise alone counts (next to) none."""
    edge = math.sqrt(shape[0]) + math.sqrt(shape[1])
    noise = normal(*shape, seed=3)
    signal = planted(shape, [9 * edge, 7 * edge, 5 * edge, 4 * edge, 3 * edge, 0.2 * edge], seed=8)
    for scale in (1.0, 1e-30):
        spectrum = Spectrum.of(Dense((noise + signal.B @ signal.A) * scale))
        assert mp_edge(spectrum) == pytest.approx(edge * scale, rel=0.03)
        assert gd_count(spectrum) == 5
        # An edge value can stick out: MP has no margin.
        assert mp_count(spectrum) in (5, 6)
    assert gd_count(Spectrum.of(Dense(noise))) == 0
    assert mp_count(Spectrum.of(Dense(noise))) in (0, 1)


def test_counts_refuse_where_the_median_says_nothing() -> None:
    refused = {
        "low rank": Spectrum.of(planted((20, 20), [3.0, 2.0])),
        "low rank, multiplied out": Spectrum.of(planted_dense((20, 20), [3.0, 2.0])),
        "nominal rank as large as the matrix": Spectrum.of(LowRank(normal(6, 8), normal(8, 6))),
        "truncated": spectrum_of(np.arange(9.0, 0, -1)).top(5),
        "zero": Spectrum.of(Dense(torch.zeros(4, 4))),
        "one row": Spectrum.of(Dense(normal(1, 9))),
    }
    for name, spectrum in refused.items():
        assert (mp_edge(spectrum), mp_count(spectrum), gd_count(spectrum)) == (None, None, None), name


# Rounding


SHARES = np.array([0.40, 0.25, 0.15, 0.11, 0.03, 0.02, 0.02, 0.02])  # of the energy: the first four hold 91 %


def rounded(dtype: torch.dtype) -> Spectrum:
    """An update with a true k90 of 4, ‖ΔW‖/‖W0‖ = .5 %, as stored in a dtype."""
    base = (normal(384, 384, seed=1) * 0.02).to(dtype).double()
    signal = planted((384, 384), np.sqrt(SHARES), seed=5)
    delta = (signal.B @ signal.A) * (0.005 * base.norm() / signal.norm)
    return Spectrum.of(Dense.difference((base + delta).to(dtype), base.to(dtype)))


def test_rounding_floor_of_bfloat16() -> None:
    spectrum = rounded(torch.bfloat16)
    floor = rounding_floor(spectrum)
    assert floor is not None
    assert floor.dtype == "bfloat16"
    assert spectrum.k90 == 8  # rounding adds a tenth of the energy, spread over all directions
    assert spectrum.entropy_rank > 50
    assert floor.above == spectrum.numerical_rank == 8
    assert (floor.measures["k90"], floor.measures["numerical_rank"]) == (4, 8)
    # 384 directions leave a spread of some percent in each shrunk σ².
    assert floor.measures["stable_rank"] == pytest.approx(1 / 0.4, rel=0.02)
    assert floor.measures["energy_entropy_rank"] == pytest.approx(math.exp(-SHARES @ np.log(SHARES)), rel=0.02)
    # METHODS: about 31 % of the update at this ratio.
    assert 0.28 < floor.share < 0.34
    assert floor.norm == pytest.approx(spectrum.rounding * 384)
    assert floor.edge == pytest.approx(spectrum.rounding * 2 * math.sqrt(384))
    assert floor.share == pytest.approx(floor.norm / math.sqrt(spectrum.energy))


def test_without_rounding_nothing_changes() -> None:
    spectrum = rounded(torch.float32)
    assert rounding_floor(spectrum) is None
    assert (spectrum.k90, spectrum.k99) == (4, 8)
    assert rounding_floor(Spectrum.of(planted((9, 9), [1.0]))) is None
    # Shrinking vanishing noise is the identity.
    free = denoise_spectrum(spectrum_of([5, 3, 1]), 1e-12)
    assert np.allclose(free.values, [5, 3, 1], rtol=1e-12)


def test_an_update_below_its_floor() -> None:
    base = normal(64, 32).bfloat16()
    unchanged = Spectrum.of(Dense.difference(base, base))
    floor = rounding_floor(unchanged)
    assert floor is not None
    assert (floor.share, floor.above) == (0, 0)
    small = normal(64, 32, seed=1) * 1e-5
    noise = Dense((base.double() + small) - base.double(), torch.bfloat16, Dense.difference(base, base).rounding)
    floor = rounding_floor(Spectrum.of(noise))
    assert floor is not None
    assert floor.share > 1
    assert floor.norm == pytest.approx(noise.rounding * math.sqrt(64 * 32))
    assert floor.edge == pytest.approx(noise.rounding * (8 + math.sqrt(32)))
    assert set(floor.measures.values()) == {0}
    with pytest.raises(ShapeError, match="above rounding"):
        Subspace.of(noise, "left")


def test_rounding_floor_of_a_truncated_spectrum() -> None:
    spectrum = rounded(torch.bfloat16)
    whole = rounding_floor(spectrum)
    assert rounding_floor(spectrum.top(9)) == whole
    with pytest.raises(RankscopeError, match="above the rounding floor"):
        rounding_floor(spectrum.top(3))


@pytest.mark.parametrize("shape", [(200, 200), (400, 100), (100, 400)], ids=str)
def test_the_shrinker_undoes_known_noise(shape: tuple[int, int]) -> None:
    """σ of signal + noise, shrunk, is nearer the signal in Frobenius norm than any one multiple of the truncation."""
    sigma = np.array([3.0, 2.0, 1.5]) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    signal = planted(shape, sigma, seed=4)
    S = (signal.B @ signal.A).numpy()
    U, y, Vt = np.linalg.svd(S + normal(*shape, seed=9).numpy())
    error = {}
    for factor in (0.98, 1.0, 1.02):
        kept = factor * shrink_singular_values(y, 1.0, shape)
        error[factor] = np.linalg.norm((U[:, : len(y)] * kept) @ Vt[: len(y)] - S)
        assert (kept > 0).sum() == 3
    hard = np.linalg.norm((U[:, :3] * y[:3]) @ Vt[:3] - S)
    assert error[1.0] < min(error[0.98], error[1.02], hard)
