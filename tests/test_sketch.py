"""The top of a spectrum by block Krylov: orthonormal, never too much energy, and bounds that hold."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import frame, normal, planted

from rankscope import linalg
from rankscope.linalg import leading_triplets, sketch_is_cheaper
from rankscope.sketch import Sketch, resolve_bounds, sketch_update
from rankscope.spectra import MEASURES, Spectrum
from rankscope.updates import Dense

EPS = 2.0**-23


def with_values(sigma: np.ndarray, shape: tuple[int, int] = (240, 200), seed: int = 0) -> Dense:
    U, V = frame(shape[0], len(sigma), seed=seed), frame(shape[1], len(sigma), seed=seed + 1)
    return Dense((U * torch.from_numpy(np.asarray(sigma, dtype=float)) @ V.T).float())


AT = np.arange(200)
SPECTRA = {
    "flat": np.ones(200),
    "noise": np.linspace(2, 0, 200),
    "power": (AT + 1.0) ** -0.7,
    "slow power": (AT + 1.0) ** -0.2,
    "exponential": 0.8**AT,
    "cliff inside": np.where(AT < 4, 1.0, 1e-3),
    "cliff after": np.where(AT < 60, 1.0, 1e-3),
    "cliff into rounding": np.where(AT < 4, 3.0 - 0.1 * AT, 0.0),
    "cliff at the cut": np.where(AT < 8, 1.0, 1e-2),
    "rank one": np.where(AT < 1, 1.0, 0.0),
    "one and a plateau": np.where(AT < 1, 10.0, 1.0),
    "tail below rounding": np.where(AT < 5, 1.0, 1e-6),
}


@pytest.mark.parametrize("shape", [(240, 200), (200, 240)])
@pytest.mark.parametrize("name", SPECTRA)
def test_against_the_exact_spectrum(name: str, shape: tuple[int, int]) -> None:
    update = with_values(SPECTRA[name], shape)
    M, k = update.matrix.double().numpy(), 8
    exact = np.linalg.svd(M, compute_uv=False)
    (U, s, Vt), residuals, further = leading_triplets(update.matrix, k, 64)
    U, s, Vt = U.numpy(), s.numpy(), Vt.numpy()
    assert (U.shape, s.shape, Vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert np.allclose(U.T @ U, np.eye(k), atol=1e-12)
    assert np.allclose(Vt @ Vt.T, np.eye(k), atol=1e-12)
    assert np.allclose(np.linalg.norm(M.T @ U - Vt.T * s, axis=0), residuals.numpy(), atol=1e-12)
    assert np.allclose(M @ Vt.T, U * s, atol=1e-12)
    assert float(s @ s) <= update.energy * (1 + 1e-12)
    found = Sketch.of(update, k, 64)
    assert (s <= exact[:k] * (1 + 1e-12)).all()
    assert (exact[:k] <= s + found.errors + 1e-12).all()
    assert (further.numpy() <= exact[k : k + len(further)] + 1e-6 * exact[0]).all()
    check_bounds(update, found)


def known(found: Sketch) -> dict[str, float | int]:
    return {name: value for name, ends in found.bounds().items() if (value := resolve_bounds(name, *ends)) is not None}


def check_bounds(update: Dense, found: Sketch) -> None:
    whole = Spectrum.of(update)
    bounds = found.bounds()
    assert list(bounds) == list(MEASURES)
    for name, value in whole.measures().items():
        low, high = bounds[name]
        assert low * (1 - 1e-5) <= value <= high * (1 + 1e-5), (name, low, value, high)
        if name in known(found):
            assert known(found)[name] == pytest.approx(value, rel=6e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1.0), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(2, 12),
    st.sampled_from([(90, 70), (70, 70), (60, 110)]),
    st.sampled_from([1.0, 1e-20, 1e20]),
)
def test_bounds_hold_on_any_spectrum(
    plateaus: list[tuple[float, int]], k: int, shape: tuple[int, int], size: float
) -> None:
    """Plateaus of any height and length: those that end before, at, and after the cut."""
    sigma = np.sort(np.repeat([v for v, _ in plateaus], [n for _, n in plateaus]))[::-1][: min(shape)]
    update = with_values(size * sigma, shape)
    check_bounds(update, Sketch.of(update, k, 40))


def test_bounds_hold_where_the_values_are_known_only_roughly() -> None:
    """A space too small to converge: the errors are large, and the bounds know it."""
    for seed, name in enumerate(SPECTRA):
        update = with_values(SPECTRA[name], seed=10 * seed)
        check_bounds(update, Sketch.of(update, 8, 20))
    assert Sketch.of(with_values(SPECTRA["noise"]), 8, 20).errors[-1] > 0.05


@pytest.mark.parametrize("name", ["exponential", "cliff into rounding", "rank one", "tail below rounding"])
def test_what_a_sketch_determines_it_says(name: str) -> None:
    whole, found = Spectrum.of(with_values(SPECTRA[name])), Sketch.of(with_values(SPECTRA[name]), 40, 120)
    said = known(found)
    assert {"stable_rank", "participation_ratio", "energy_entropy_rank", "k90", "k95", "k99"} <= said.keys()
    for measure, value in said.items():
        assert value == pytest.approx(whole.measures()[measure], rel=6e-4)
        assert isinstance(value, int) == isinstance(whole.measures()[measure], int)


def test_what_is_open_is_an_interval() -> None:
    found = Sketch.of(with_values(SPECTRA["slow power"]), 8, 64)
    bounds, said = found.bounds(), known(found)
    assert set(said) < set(MEASURES)
    assert "entropy_rank" not in said
    assert bounds["k90"][0] < bounds["k90"][1]
    assert 40 < bounds["entropy_rank"][0] < bounds["entropy_rank"][1] < 200  # and says something nevertheless
    assert resolve_bounds("k90", 3.0, 3.0) == 3
    assert resolve_bounds("k90", 3.0, 4.0) is None
    assert resolve_bounds("stable_rank", 1.0, 1.0004) == pytest.approx(1.0002)
    assert resolve_bounds("stable_rank", 1.0, 1.001) is None


@pytest.mark.parametrize("columns", [4, 8, 24])
def test_no_rank_can_be_above_the_smaller_side(columns: int) -> None:
    for name in SPECTRA:
        for measure, (_, high) in Sketch.of(with_values(SPECTRA[name]), 4, columns).bounds().items():
            assert high <= 200 * (1 + 1e-12), (name, measure)


def test_the_space_stays_orthonormal_when_it_is_exhausted() -> None:
    for update in (with_values(SPECTRA["rank one"]), Dense(torch.zeros(60, 50)), Dense(torch.ones(50, 60))):
        basis, _ = linalg._krylov_basis(update.matrix, 48, 0)
        assert torch.allclose(basis.T @ basis, torch.eye(48), atol=3e-6)


def test_entries_near_the_end_of_float32_are_sketched_too() -> None:
    """Sums of them would overflow."""
    update = with_values(SPECTRA["power"])
    size = 3e38 / float(update.matrix.abs().max())
    huge = (update.matrix.double() * size).float()
    found, large = leading_triplets(update.matrix, 4, 64), leading_triplets(huge, 4, 64)
    assert np.allclose(large.svd.s.numpy() / size, found.svd.s.numpy(), rtol=1e-6)
    assert np.allclose(large.residuals.numpy() / size, found.residuals.numpy(), atol=1e-6)
    assert Sketch.of(Dense(huge), 4, 64).bounds()["stable_rank"][0] > 1


def test_a_zero_update_is_known_whole() -> None:
    found = Sketch.of(Dense(torch.zeros(60, 50)), 3)
    assert set(found.bounds().values()) == {(0.0, 0.0)}


def test_more_columns_are_nearer_and_one_seed_is_one_answer() -> None:
    matrix = normal(240, 200).float()
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:4]
    off = [
        float(np.abs(leading_triplets(matrix, 4, columns).svd.s.numpy() - exact).max()) for columns in (16, 32, 64, 128)
    ]
    assert all(later < earlier for earlier, later in pairwise(off))
    assert off[-1] < 1e-3
    assert torch.equal(leading_triplets(matrix, 4).svd.s, leading_triplets(matrix, 4).svd.s)


def test_a_sketch_is_taken_only_where_it_is_cheaper() -> None:
    assert sketch_is_cheaper((4096, 14336), 64)
    assert not sketch_is_cheaper((1024, 4096), 64)
    assert not sketch_is_cheaper((600, 600), 1)
    assert sketch_update(planted((2000, 2000), [3.0]), 4) is None  # thin factors are exact for less
    assert sketch_update(Dense(normal(600, 600).float()), 6) is None
    found = sketch_update(Dense(normal(640, 650).float()), 6)
    assert found is not None
    assert len(found.top.values) == 6


def test_rounding_floor_where_the_sketch_reaches_it() -> None:
    base = normal(200, 200, seed=3).bfloat16()
    tuned = (base.float() + with_values(np.where(AT < 4, 3.0, 0.0), (200, 200)).matrix).bfloat16()
    update = Dense.difference(tuned, base)
    whole = Spectrum.of(update)
    few, many = Sketch.of(update, 2, 60), Sketch.of(update, 10, 160)
    assert few.floor() is None
    reached = many.floor()
    assert reached is not None
    assert reached.above == 4
    assert reached.measures["stable_rank"] == pytest.approx(2 * 2.0, rel=0.1)
    assert many.bounds()["numerical_rank"] == (4.0, 4.0) == (whole.numerical_rank,) * 2
    assert math.isfinite(few.bounds()["numerical_rank"][1])
