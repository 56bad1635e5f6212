"""Truncation: Eckart–Young against numpy, the exact error, and each way to choose a rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from makers import MAKERS, float64, frame, normal, planted, planted_dense

from rankscope.errors import ConfigError
from rankscope.linalg import leading_triplets
from rankscope.noise import noise_edge
from rankscope.spectra import Spectrum
from rankscope.structured import Hadamard
from rankscope.surgery.addition import add_and_round
from rankscope.surgery.truncate import (
    MAX_EXCESS_ERROR,
    AboveNoise,
    Budget,
    Energy,
    Rank,
    SigmaRatio,
    decompose,
    distance,
    excess_error_bound,
    fold_scale_and_round,
    is_zero,
    retained_energy,
    rounding_edge,
    truncate_svd,
)
from rankscope.updates import Dense, LowRank


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_matrix_of_that_rank_is_closer(name: str, k: int) -> None:
    maker = MAKERS[name]
    update = maker.make(30, 20, 5)
    after = truncate_svd(update.svd(), k, torch.float64)
    u, s, vt = np.linalg.svd(float64(update), full_matrices=False)
    np.testing.assert_allclose(float64(after), u[:, :k] * s[:k] @ vt[:k], rtol=0, atol=20 * maker.exact * s[0])
    assert distance(update, after) == pytest.approx(np.sqrt((s[k:] ** 2).sum()), abs=20 * maker.exact * s[0])
    assert (after.scale, after.nominal_rank) == (1.0, k)
    spectrum = Spectrum.of(update)
    assert retained_energy(spectrum, k) == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), rel=1e-5)


def test_factors_are_balanced() -> None:
    after = truncate_svd(planted((12, 9), [9.0, 4.0]).svd(), 2, torch.float64)
    np.testing.assert_allclose((after.B.T @ after.B).numpy(), np.diag([9.0, 4.0]), atol=1e-12)
    np.testing.assert_allclose((after.A @ after.A.T).numpy(), np.diag([9.0, 4.0]), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_the_error_counts_the_rounding_of_the_factors(dtype: torch.dtype, dense: bool) -> None:
    update = (planted_dense if dense else planted)((40, 30), [5.0, 3.0, 1.0, 0.5])
    after = truncate_svd(update.svd(), 2, dtype)
    assert after.B.dtype == after.A.dtype == dtype
    truth = float(np.linalg.norm(float64(update) - float64(after)))
    assert distance(update, after) == pytest.approx(truth, rel=1e-9)
    rounded = np.linalg.norm(float64(after) - float64(truncate_svd(update.svd(), 2, torch.float64)))
    assert rounded > 0.01 * torch.finfo(dtype).eps * update.norm
    assert truth == pytest.approx(np.hypot(np.hypot(1.0, 0.5), rounded), rel=1e-3)


def test_the_error_of_a_matrix_is_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    update = Dense(normal(23, 7))
    after = truncate_svd(update.svd(), 3, torch.float32)
    whole = distance(update, after)
    monkeypatch.setattr("rankscope.surgery.truncate.CHUNK", 15)
    assert distance(update, after) == pytest.approx(whole, rel=1e-12)


def test_carried_factors_have_the_scale_in_them() -> None:
    update = LowRank(normal(5, 2, dtype=torch.float32), normal(2, 4, dtype=torch.float32), 1.7)
    after = fold_scale_and_round(update, torch.float32)
    assert after.scale == 1.0
    assert torch.equal(after.A, update.A)
    np.testing.assert_allclose(float64(after), float64(update), rtol=1e-6)


SIGMA = [8.0, 4.0, 2.0, 1.0]  # shares of energy closer than 1e-6 are one in float32


@pytest.mark.parametrize(
    ("choice", "rank"),
    [
        (Rank(3), 3),
        (Rank(99), 4),
        (Energy(64 / 85 - 2e-6), 1),
        (Energy(64 / 85 + 2e-6), 2),
        (Energy(0.98), 3),
        (Energy(1), 4),
        (SigmaRatio(0.26), 2),
        (SigmaRatio(0.24), 3),
        (SigmaRatio(1), 1),
        (SigmaRatio(1e-9), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("dense", [False, True])
def test_ranks_by_each_choice(choice: Rank | Energy | SigmaRatio, rank: int, dense: bool) -> None:
    update = (planted_dense if dense else planted)((20, 16), SIGMA)
    assert choice.rank(update, Spectrum.of(update)) == rank


@pytest.mark.parametrize("choice", [Rank(3), Energy(0.9), SigmaRatio(0.5)], ids=str)
def test_a_rank_is_never_0_and_never_more_than_there_is(choice: Rank | Energy | SigmaRatio) -> None:
    zero = LowRank(torch.zeros(6, 3), normal(3, 5))
    assert choice.rank(zero, Spectrum.of(zero)) == 1
    one = planted((6, 5), [2.0, 0.0, 0.0])
    assert choice.rank(one, Spectrum.of(one)) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rank(0),
        lambda: Energy(0),
        lambda: Energy(1.01),
        lambda: Energy(float("nan")),
        lambda: SigmaRatio(0),
        lambda: SigmaRatio(-1),
        lambda: Budget(0),
    ],
)
def test_choices_that_make_no_sense(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


def test_a_full_update_is_cut_at_the_edge_of_its_noise() -> None:
    """Four planted directions above the edge of Gaussian noise are kept, and nothing else."""
    noise = 0.01 * normal(200, 150, seed=3)
    signal = planted((200, 150), [3.0, 2.0, 1.5, 1.0])
    update = Dense(torch.from_numpy(float64(signal)) + noise)
    spectrum = Spectrum.of(update)
    assert AboveNoise().rank(update, spectrum) == 4
    assert Energy(0.9).rank(update, spectrum) > 4 or spectrum.energy_rank(0.99) > 4
    only = Dense(noise)
    assert AboveNoise().rank(only, Spectrum.of(only)) <= 2


def test_a_half_precision_file_is_cut_at_its_rounding_floor() -> None:
    base = normal(200, 150, seed=4).bfloat16()
    tuned = (base.double() + torch.from_numpy(float64(planted((200, 150), [3.0, 2.0])))).bfloat16()
    update = Dense.difference(tuned, base)
    spectrum = Spectrum.of(update)
    edge = noise_edge(update.rounding, update.shape)
    assert spectrum.values[1] > edge > spectrum.values[2]
    assert AboveNoise().rank(update, spectrum) == 2
    assert spectrum.energy_rank(0.999) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_half_precision_factors_is_cut_at_what_rounding_them_made(dtype: torch.dtype) -> None:
    """The factors of a rank-4 product, mixed so that none of 16 columns is small, then rounded."""
    exact = planted((120, 90), [4.0, 3.0, 2.0, 1.0])
    mix = normal(16, 16, seed=7)
    wide = torch.cat([exact.B, torch.zeros(120, 12)], dim=1) @ mix
    tall = torch.linalg.solve(mix, torch.cat([exact.A, torch.zeros(12, 90)]))
    update = LowRank(wide.to(dtype), tall.to(dtype))
    spectrum = Spectrum.of(update)
    edge = rounding_edge(update)
    assert edge is not None
    assert spectrum.values[3] > edge > spectrum.values[4] > 0
    assert AboveNoise().rank(update, spectrum) == 4
    assert spectrum.nonzero == 16
    assert Energy(1).rank(update, spectrum) == 16


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_edge_is_what_rounding_does_to_the_product(size: float) -> None:
    """However the size is shared out over the factors: the largest σ of rounded − exact, which is bounded by it."""
    B, A = normal(150, 8, seed=1) * size, normal(8, 110, seed=2) / size
    update = LowRank(B.bfloat16(), A.bfloat16(), -3.0)
    edge = rounding_edge(update)
    assert edge is not None
    truth = np.linalg.norm(float64(update) + 3 * (B @ A).numpy(), ord=2)
    assert 0.3 * edge < truth < edge


def test_noise_of_exact_factors_cannot_be_told() -> None:
    update = planted((9, 8), [2.0, 1.0])
    with pytest.raises(ConfigError, match="product of float64 factors is not known; choose"):
        AboveNoise().rank(update, Spectrum.of(update))


def test_what_cancels_is_zero_and_what_is_small_is_not() -> None:
    update = LowRank(normal(30, 4), normal(4, 20))
    nothing = update + (-update)
    assert is_zero(nothing, Spectrum.of(nothing))
    little = update + planted((30, 20), [1e-9]) + (-update)
    assert not is_zero(little, Spectrum.of(little))
    assert not is_zero(update * 1e-30, Spectrum.of(update * 1e-30))
    none = LowRank(torch.zeros(3, 1), torch.ones(1, 3))
    assert is_zero(none, Spectrum.of(none))


def test_a_hadamard_product_of_factors_that_cancel_is_nothing() -> None:
    x, turn = LowRank(normal(30, 2), normal(2, 20, seed=1)), frame(2, 2, seed=2)
    update = Hadamard(x + -LowRank(x.B @ turn, turn.T @ x.A), planted((30, 20), [1.0]))
    assert update.singular_values()[0] > 0
    assert is_zero(update, Spectrum.of(update))


@pytest.mark.parametrize("name", MAKERS)
def test_updates_of_every_kind_are_added_in_the_working_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once, to float64 here: a matrix made in float32 on the way would show. Blocks of a few rows."""
    monkeypatch.setattr("rankscope.surgery.addition.CHUNK", 100)
    update, weight = MAKERS[name].make(30, 20, 5), normal(30, 20, seed=9)
    found, rounding = add_and_round(weight, [update], torch.float64)
    truth = weight.numpy() + float64(update)
    np.testing.assert_allclose(found.numpy(), truth, rtol=0, atol=1e-13 * np.abs(truth).max())
    assert rounding.norm == pytest.approx(np.linalg.norm(float64(update)), rel=1e-12)


LARGE = (700, 640)


def falling(kind: str) -> Dense:
    """A full update whose singular values fall as trained ones do, stop at a few, or are those of noise."""
    noise = normal(*LARGE, seed=3, dtype=torch.float32)
    sigma = {"few": [3.0, 2.0, 1.0], "power": 30 / np.arange(1, 101), "noise": [1e-9]}[kind]
    update = planted(LARGE, sigma, seed=5)
    share = {"few": 0.0, "power": 1e-3, "noise": 1.0}[kind]
    return Dense((update.B @ update.A).float() + share * noise)


@pytest.mark.parametrize("kind", ["few", "power", "noise"])
def test_the_top_alone_leaves_hardly_more_than_the_least_error(kind: str) -> None:
    """Beside a float64 SVD of the whole; the promised bound holds, and is no looser than it says."""
    update, k = falling(kind), 8
    s = np.linalg.svd(float64(update), compute_uv=False)
    found = decompose(update, k)
    assert len(found.s) == k
    np.testing.assert_allclose((found.Vt @ found.Vt.T).numpy(), np.eye(k), atol=1e-12)
    least, error = np.sqrt((s[k:] ** 2).sum()), distance(update, truncate_svd(found, k, torch.float64))
    rounding = 1e-6 * s[0]
    assert error <= least * (1 + MAX_EXCESS_ERROR) + rounding
    bound = excess_error_bound(leading_triplets(update.matrix, k), update.energy)
    if kind != "few":  # whose least error is rounding
        assert error / least - 1 <= bound + 1e-9
    if kind == "power":
        assert error / least - 1 < 1e-9
    spectrum = Spectrum.from_values(update, found.s)
    assert retained_energy(spectrum, k) == pytest.approx((s[:k] ** 2).sum() / (s**2).sum(), abs=1e-3)
    assert Rank(k).rank(update, spectrum) == (3 if kind == "few" else k)


def test_what_the_bound_does_not_promise_is_decomposed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Krylov space of hardly more columns than are asked for has large residuals, and the bound says so."""
    update = falling("noise")
    poor = leading_triplets(update.matrix, 8, columns=16)
    assert excess_error_bound(poor, update.energy) > MAX_EXCESS_ERROR
    monkeypatch.setattr("rankscope.surgery.truncate.leading_triplets", lambda matrix, k: poor)
    assert len(decompose(update, 8).s) == min(LARGE)


@pytest.mark.parametrize("k", [None, 600])
def test_the_whole_svd_where_all_is_wanted(k: int | None) -> None:
    update = Dense(normal(60, 50))
    assert len(decompose(update, k).s) == 50
    zero = Dense(torch.zeros(LARGE))
    assert len(decompose(zero, 8).s) == min(LARGE)
