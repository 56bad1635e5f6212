"""Measures, truncation and gaps, against planted spectra, closed forms and numpy."""

from __future__ import annotations

import math
import resource
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import MAKERS, float64, frame, normal, planted, planted_dense, spectrum_of

from rankscope.errors import NonFiniteError, RankscopeError, ShapeError
from rankscope.spectra import (
    MEASURES,
    Spectrum,
    mp_count,
    noise_measures,
    relative_gaps,
    relative_precision,
    rounding_floor,
)
from rankscope.structured import Hadamard, Kronecker
from rankscope.subspace import Subspace, angles, chance, overlap
from rankscope.updates import Dense, LowRank, Update

CHAIN = ("stable_rank", "participation_ratio", "energy_entropy_rank", "entropy_rank", "nonzero")


def chain_holds(spectrum: Spectrum) -> bool:
    numbers = [1.0, *(float(getattr(spectrum, name)) for name in CHAIN)]
    # Each is a handful of float64 operations on up to some hundred numbers.
    return all(a <= b * (1 + 1e-12) for a, b in pairwise(numbers))


# Measures


def test_the_names_of_the_json_form() -> None:
    names = "numerical_rank entropy_rank energy_entropy_rank stable_rank participation_ratio nuclear_rank k90 k95 k99"
    assert " ".join(MEASURES) == names == " ".join(spectrum_of([2.0, 1.0]).measures())


def test_unit_values() -> None:
    """METHODS: published for σ = (5, 3, 1, .5, .1), to four places."""
    found = spectrum_of([5, 3, 1, 0.5, 0.1]).measures()
    expected = {
        "stable_rank": 1.4104,
        "participation_ratio": 1.7584,
        "energy_entropy_rank": 2.0768,
        "entropy_rank": 3.1277,
        "nuclear_rank": 1.9200,
    }
    assert {name: round(found[name], 4) for name in expected} == expected
    # Σσ² = 35.26; 25 + 9 = 34 is 96.4 %, 25 is 70.9 %, with 1 it is 99.3 %.
    assert [found[name] for name in ("numerical_rank", "k90", "k95", "k99")] == [5, 2, 2, 3]


@pytest.mark.parametrize("n", [1, 2, 7, 10, 100])
@pytest.mark.parametrize("kind", [planted, planted_dense], ids=["low rank", "dense"])
def test_equal_singular_values_count_themselves(n: int, kind: object) -> None:
    """Every measure of n equal σ is n, and kτ = ⌈τn⌉ however the last digits of the cumulative sum fall."""
    for spectrum in (spectrum_of(np.ones(n)), Spectrum.of(kind((n + 20, n + 5), np.full(n, 3.0)))):  # type: ignore[operator]
        found = spectrum.measures()
        for name in (*CHAIN[:4], "nuclear_rank", "numerical_rank"):
            rel = 1e-5 if spectrum.eps > 1e-10 else 1e-12
            assert getattr(spectrum, name) == pytest.approx(n, rel=rel), name
        for name, tau in (("k90", 90), ("k95", 95), ("k99", 99)):
            assert found[name] == -(-tau * n // 100), name


@pytest.mark.parametrize("seed", range(8))
def test_a_share_that_is_met_exactly_is_met(seed: int) -> None:
    """σ = (3, 1): 9 of 10 is 90 %; σ² = (19, 1): 95 %. A decomposition that errs in its last digit must not say 2."""
    for kind in (planted, planted_dense):
        assert Spectrum.of(kind((9, 8), [3.0, 1.0], seed=seed)).k90 == 1
        assert Spectrum.of(kind((9, 8), [math.sqrt(19), 1.0], seed=seed)).k95 == 1
    assert spectrum_of([3.0, 1.001]).k90 == 2


def test_geometric_spectrum() -> None:
    """σ_l = q^(l−1), many of them: stable 1/(1 − q²), nuclear 1/(1 − q), participation (1 + q²)/(1 − q²)."""
    q = 0.5
    spectrum = spectrum_of(q ** np.arange(60))
    assert spectrum.stable_rank == pytest.approx(1 / (1 - q**2))
    assert spectrum.nuclear_rank == pytest.approx(1 / (1 - q))
    assert spectrum.participation_ratio == pytest.approx((1 + q**2) / (1 - q**2))
    # p_l = (1 − q)·q^(l−1): entropy −ln(1 − q) − q·ln q/(1 − q); with q² for the energies.
    for name, x in (("entropy_rank", q), ("energy_entropy_rank", q**2)):
        assert getattr(spectrum, name) == pytest.approx(math.exp(-math.log(1 - x) - x * math.log(x) / (1 - x)))
    assert (spectrum.k90, spectrum.k95, spectrum.k99) == (2, 3, 4)  # 1 − 4^−k: .75, .9375, .984, .996


@given(
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=40),
    st.sampled_from([2.0**-52, 2.0**-23]),
    st.sampled_from([1e-150, 1e-40, 1.0, 1e100]),
)
@settings(max_examples=300, deadline=None)
def test_the_chain_of_inequalities(sigma: list[float], eps: float, scale: float) -> None:
    spectrum = spectrum_of(np.sort(np.array(sigma))[::-1] * scale, (len(sigma) + 3, len(sigma)), eps=eps)
    if spectrum.values[0] == 0:
        assert set(spectrum.measures().values()) == {0}
    else:
        assert chain_holds(spectrum)
        assert 1 <= spectrum.k90 <= spectrum.k95 <= spectrum.k99 <= spectrum.nonzero


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_chain_for_updates(seed: int, r: int, out: int, into: int) -> None:
    update = LowRank(normal(out, r, seed=seed), normal(r, into, seed=seed + 1))
    assert chain_holds(Spectrum.of(update))
    assert chain_holds(Spectrum.of(Dense(update.dense())))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (1, 6), (6, 1)], ids=str)
def test_spectra_of_every_kind(name: str, shape: tuple[int, int]) -> None:
    update = MAKERS[name].make(*shape, 4)
    spectrum, M = Spectrum.of(update), float64(update)
    s = np.linalg.svd(M, compute_uv=False)
    assert np.allclose(spectrum.values, s[: len(spectrum.values)], atol=MAKERS[name].exact * s[0], rtol=0)
    assert spectrum.energy == pytest.approx((M**2).sum(), rel=1e-12)
    assert (spectrum.shape, spectrum.complete, spectrum.missing_energy) == (shape, True, 0)
    assert spectrum.numerical_rank == (
        np.linalg.matrix_rank(M) if not spectrum.rounding else (s > spectrum.cutoff).sum()
    )
    assert chain_holds(spectrum)
    assert spectrum.stable_rank == pytest.approx((M**2).sum() / s[0] ** 2, rel=1e-5)
    assert spectrum.participation_ratio == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-5)
    assert f"{shape[0]} × {shape[1]}" in repr(spectrum)


def test_what_is_remembered() -> None:
    factors = Spectrum.of(MAKERS["low rank, bfloat16"].make(9, 8, 0))
    assert (factors.stored, factors.nominal_rank, factors.rounding, factors.eps) == ("bfloat16", 3, 0, 2.0**-52)
    whole = Spectrum.of(MAKERS["dense, stored in bfloat16"].make(9, 8, 0))
    assert (whole.stored, whole.nominal_rank, whole.eps) == ("bfloat16", None, 2.0**-23)
    assert whole.rounding > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_factors_are_upcast_before_anything(dtype: torch.dtype) -> None:
    B, A = normal(300, 16, dtype=dtype), normal(16, 200, seed=1, dtype=dtype)
    s = np.linalg.svd(0.25 * B.double().numpy() @ A.double().numpy(), compute_uv=False)[:16]
    assert np.allclose(Spectrum.of(LowRank(B, A, 0.25)).values, s, rtol=0, atol=1e-12 * s[0])


def test_rounding_dust_is_not_counted() -> None:
    """A rank-1 product of nominal rank 64, and the same multiplied out in float32, have one non-zero σ."""
    B, A = normal(500, 1).expand(500, 64), normal(1, 400, seed=1).expand(64, 400)
    factors = LowRank(B, A)
    for spectrum in (Spectrum.of(factors), Spectrum.of(Dense(factors.dense()))):
        assert len(spectrum.values) >= 64
        assert spectrum.nonzero == spectrum.numerical_rank == 1
        for name in (*CHAIN, "nuclear_rank", "k90", "k99"):
            assert getattr(spectrum, name) == 1, name


def test_a_real_tail_is_counted_where_numerical_rank_gives_up() -> None:
    """Float32 and max(out, in) = 30 000: the convention's cutoff is .36 % of σ₁, and would hide 63 real values."""
    spectrum = spectrum_of(np.r_[1.0, np.full(63, 2e-3)], (30_000, 64), eps=2.0**-23)
    assert spectrum.numerical_rank == 1
    assert spectrum.nuclear_rank == pytest.approx(1 + 63 * 2e-3)
    assert chain_holds(spectrum)
    assert spectrum.nonzero == 64


def test_numerical_rank_agrees_with_numpy() -> None:
    for sigma in (np.ones(6), 10.0 ** -np.arange(0, 18, 2.0), np.r_[1, 1e-14, 0]):
        M = np.diag(sigma)
        assert spectrum_of(sigma).numerical_rank == np.linalg.matrix_rank(M)


def test_factors_that_cancel_leave_zero() -> None:
    """x + (−x) with the factors turned, so that the two halves do not cancel bit by bit."""
    x = LowRank(normal(60, 4), normal(4, 50, seed=1))
    turn = frame(4, 4, seed=2)
    difference = x + -LowRank(x.B @ turn, turn.T @ x.A)
    assert Spectrum.of(difference).values[0] > 0
    assert set(Spectrum.of(difference).measures().values()) == {0}
    # What remains is measured where it stands above the cancelled part's rounding.
    rest = difference + planted((60, 50), [1e-6, 1e-7], seed=5)
    assert Spectrum.of(rest).nonzero == 2
    assert Spectrum.of(rest).energy == pytest.approx(1.01e-12, rel=1e-6)


def cancelled(out: int, into: int, r: int = 2) -> LowRank:
    """x − x as factors that do not cancel bit by bit."""
    x, turn = LowRank(normal(out, r), normal(r, into, seed=1)), frame(r, r, seed=2)
    return x + -LowRank(x.B @ turn, turn.T @ x.A)


@pytest.mark.parametrize("r", [2, 7], ids=["thin", "formed"])
def test_a_hadamard_product_of_factors_that_cancel_is_zero(r: int) -> None:
    one, two = cancelled(30, 20), LowRank(normal(30, r, seed=4), normal(r, 20, seed=5))
    for product in (Hadamard(one, two), Hadamard(two, one)):
        assert (product.product is not None) == (r == 2)
        assert product.singular_values()[0] > 0
        assert set(Spectrum.of(product).measures().values()) == {0}
    assert Spectrum.of(Hadamard(two, LowRank(normal(30, 2), normal(2, 20)))).nonzero == min(2 * r, 20)


@pytest.mark.parametrize("other", [LowRank(normal(4, 2), normal(2, 5)), Dense(normal(4, 5))], ids=["thin", "dense"])
def test_a_kronecker_product_of_factors_that_cancel_is_zero(other: LowRank | Dense) -> None:
    for product in (Kronecker(cancelled(6, 7), other), Kronecker(other, cancelled(6, 7), 3.0)):
        assert product.singular_values()[0] > 0
        assert set(Spectrum.of(product).measures().values()) == {0}
    assert Spectrum.of(Kronecker(LowRank(normal(6, 2), normal(2, 7)), other)).nonzero == 2 * min(
        4, other.nominal_rank or 4
    )


def test_the_precisions_of_kronecker_factors_add() -> None:
    W = Dense(normal(4, 5))
    product = Kronecker(W, W)
    assert relative_precision(product, float(product.singular_values()[0])) == 2 * W.eps


ZOO: dict[str, Update] = {
    "zero": LowRank(torch.zeros(6, 2), torch.zeros(2, 5)),
    "zero, dense": Dense(torch.zeros(6, 5)),
    "B = 0": LowRank(torch.zeros(6, 2), normal(2, 5)),
    "scale 0": LowRank(normal(6, 2), normal(2, 5), 0.0),
    "rank one": planted((6, 5), [2.0]),
    "1 × n": LowRank(normal(1, 3), normal(3, 8)),
    "n × 1": Dense(normal(8, 1)),
    "1 × 1": Dense(torch.tensor([[-3.0]])),
    "r > out and in": LowRank(normal(4, 9), normal(9, 5)),
    "repeated σ": planted((9, 8), [2.0, 2.0, 2.0, 1.0, 1.0]),
    "repeated σ, dense": planted_dense((9, 8), [2.0, 2.0, 2.0, 1.0, 1.0]),
    "bfloat16": LowRank(normal(6, 2).bfloat16(), normal(2, 5).bfloat16()),
    "float16": LowRank(normal(6, 2).half(), normal(2, 5).half()),
    "not contiguous": LowRank(normal(2, 12)[:, ::2].T, normal(10, 2).T[:, ::2]),
    "subnormal factors": LowRank(normal(6, 2).float() * 1e-40, normal(2, 5).float()),
    "subnormal matrix": Dense(normal(6, 5) * 1e-41),
    "squares underflow": LowRank(normal(6, 2), normal(2, 5), 1e-170),
    "huge": LowRank(normal(6, 2), normal(2, 5), 1e100),
    "huge matrix": Dense(normal(6, 5) * 1e36),
    "stored in bfloat16": Dense.difference(normal(8, 6).bfloat16(), normal(8, 6, seed=1).bfloat16()),
}


@pytest.mark.parametrize("name", ZOO)
def test_edge_cases(name: str) -> None:
    update = ZOO[name]
    spectrum, M = Spectrum.of(update), float64(update)
    rank = np.linalg.matrix_rank(M, tol=np.linalg.norm(M, 2) * 1e-5)
    found = spectrum.measures()
    assert list(found) == list(MEASURES)
    assert all(math.isfinite(x) for x in found.values())
    if rank == 0:
        assert set(found.values()) == {0}
    else:
        assert chain_holds(spectrum)
        assert spectrum.nonzero == rank
        s = np.linalg.svd(M / np.abs(M).max(), compute_uv=False)[:rank]
        assert found["nuclear_rank"] == pytest.approx(s.sum() / s[0], rel=1e-4)
        assert found["stable_rank"] == pytest.approx((s @ s) / s[0] ** 2, rel=1e-4)
    assert spectrum.gaps.shape == spectrum.values.shape
    assert mp_count(spectrum) is None or spectrum.nominal_rank is None
    assert rounding_floor(spectrum) is None or name == "stored in bfloat16"
    assert "Spectrum(" in repr(spectrum)
    assert "<table>" in spectrum._repr_html_()
    # …and through the subspaces.
    if rank == 0:
        with pytest.raises(ShapeError, match="zero"):
            Subspace.pair(update)
        return
    left, right = Subspace.pair(update, 3)
    assert left.k == right.k == min(3, spectrum.numerical_rank)
    for side in (left, right):
        grid = overlap(side, side)
        assert np.allclose(np.diag(grid), 1)
        assert np.allclose(angles(side, side), 0, atol=1e-7)
        assert np.isfinite(chance(grid, side.dim).z).all()


def test_values_that_are_no_spectrum() -> None:
    for values, kind in (
        ([1.0, 2.0], ShapeError),
        ([1.0, -1.0], ShapeError),
        ([], ShapeError),
        ([[1.0]], ShapeError),
        ([3.0, 2.0, 1.0], ShapeError),
        ([math.inf, 1.0], NonFiniteError),
        ([math.nan, 1.0], NonFiniteError),
    ):
        with pytest.raises(kind):
            Spectrum(np.array(values), 1.0, (2, 2))
    with pytest.raises(NonFiniteError, match="overflow"):
        Spectrum(np.array([math.inf, 1.0]), 1.0, (2, 2))
    # Beyond what float32 can hold, but found in float64.
    assert Spectrum.of(Dense(torch.full((40, 40), 3e38))).values[0] == pytest.approx(1.2e40, rel=1e-6)
    for bad in (0.0, 1.5):
        with pytest.raises(RankscopeError, match="share"):
            spectrum_of([1.0]).energy_rank(bad)


def test_a_spectrum_cannot_be_changed() -> None:
    source = np.array([2.0, 1.0])
    spectrum = Spectrum(source, 5.0, (2, 2))
    source[0] = 9
    assert spectrum.values[0] == 2
    with pytest.raises(ValueError, match="read-only"):
        spectrum.values[0] = 3


# Truncation


def test_a_truncated_spectrum_knows_what_it_left_out() -> None:
    full = spectrum_of([5, 3, 1, 0.5, 0.1])
    top = full.top(2)
    assert (full.complete, top.complete) == (True, False)
    assert top.missing_energy == pytest.approx(1.26)
    assert full.missing_energy == 0
    assert top.stable_rank == pytest.approx(full.stable_rank)
    assert (top.k90, top.k95) == (full.k90, full.k95)
    assert top.measures() == {"stable_rank": top.stable_rank, "k90": 2, "k95": 2}
    for name in ("entropy_rank", "energy_entropy_rank", "participation_ratio", "nuclear_rank", "numerical_rank", "k99"):
        with pytest.raises(RankscopeError, match=rf"{name} cannot be computed from the top 2 of 5.*3\.6%"):
            getattr(top, name)
    assert "unknown" in repr(top)
    assert full.top(9).complete
    with pytest.raises(ShapeError):
        full.top(0)


def test_a_truncation_that_leaves_out_zeros_only_loses_nothing() -> None:
    full = Spectrum.of(planted_dense((30, 20), [3.0, 2.0, 1.0]))
    assert not full.top(4).complete
    assert full.top(4).measures() == pytest.approx(full.measures(), rel=1e-12)
    assert set(full.top(3).measures()) == {"stable_rank", "k90", "k95", "k99"}


def test_a_truncated_spectrum_whose_energy_underflows_does_not_guess() -> None:
    top = spectrum_of(np.array([2.0, 1.0, 1.0]) * 1e-170).top(1)
    assert top.measures() == {}
    with pytest.raises(RankscopeError, match="underflows"):
        _ = top.stable_rank


def test_low_rank_products_are_complete_at_r() -> None:
    spectrum = Spectrum.of(planted((30, 20), [3.0, 2.0, 1.0]))
    assert spectrum.complete
    assert spectrum.limit == 3
    assert not spectrum.top(2).complete


# Gaps


def test_gaps() -> None:
    spectrum = spectrum_of([4.0, 2.0, 1.999, 0.0])
    assert np.allclose(spectrum.gaps, [0.5, 0.0005, 1.0, 0.0])
    assert [spectrum.in_cluster(k) for k in (1, 2, 3, 4)] == [False, True, False, True]
    assert np.allclose(spectrum.top(2).gaps, [0.5, np.nan], equal_nan=True)
    assert np.allclose(relative_gaps(np.array([4.0, 1.0]), 0.5), [0.75, 0.5])
    with pytest.raises(RankscopeError, match="gap at cut 2"):
        spectrum.top(2).in_cluster(2)
    for k in (0, 5):
        with pytest.raises(ShapeError, match="no cut"):
            spectrum.in_cluster(k)


def test_the_gap_behind_the_last_real_value_is_whole() -> None:
    spectrum = Spectrum.of(planted_dense((30, 20), [3.0, 2.0]))
    assert spectrum.gaps[1] == 1
    assert set(spectrum.gaps[2:]) == {0}


def test_two_hundred_thousand_squared_without_forming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: LowRank) -> None:
        raise MemoryError("formed a product of factors")

    monkeypatch.setattr(LowRank, "dense", forbidden)
    unit = 1024 if sys.platform == "linux" else 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    d = 200_000
    a, b = planted((d, d), [4.0, 3.0, 2.0, 1.0]), planted((d, d), [4.0, 3.0, 2.0, 1.0], seed=7)
    spectrum = Spectrum.of(a)
    assert np.allclose(spectrum.values, [4, 3, 2, 1])
    assert spectrum.measures()["stable_rank"] == pytest.approx(30 / 16)
    assert abs(a.inner(b)) < 1
    assert (a + b).energy == pytest.approx(60, rel=1e-3)
    for x, y in zip(Subspace.pair(a), Subspace.pair(b), strict=True):
        grid = overlap(x, y)
        assert grid.shape == (4, 4)
        assert np.abs(chance(grid, d).z).max() < 6
        assert angles(x, y).min() > 1.5
        assert angles(x, x).max() < 1e-7
    assert noise_measures((d, d))["numerical_rank"] == d
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    assert grown < 400 * 2**20  # one float32 matrix of this shape takes 149 GiB
