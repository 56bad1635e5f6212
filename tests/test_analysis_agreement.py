"""LoRA's update against the full one: dense float64 numpy beside factored arithmetic, planted answers, chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from makers import float64, frame, normal, planted, planted_dense

from rankscope.analysis.layer_agreement import FullUpdate, LayerAgreement, captured_energy, compare_with_full_update
from rankscope.errors import ShapeError
from rankscope.haar import familywise_p_values
from rankscope.subspace import Subspace
from rankscope.updates import Dense, LowRank, Update

SHAPES = [(30, 18), (18, 30), (24, 24)]


def lora(shape: tuple[int, int], rank: int = 3, seed: int = 5, scale: float = 0.4) -> LowRank:
    return LowRank(normal(shape[0], rank, seed=seed), normal(rank, shape[1], seed=seed + 1), scale)


def full(shape: tuple[int, int], seed: int = 0) -> Dense:
    """Three strong directions on noise."""
    return Dense(3 * float_tensor(planted(shape, [3.0, 2.0, 1.0], seed)) + 0.3 * normal(*shape, seed=seed + 9))


def float_tensor(update: Update) -> torch.Tensor:
    return torch.from_numpy(float64(update))


def reference(F: np.ndarray, L: np.ndarray, rank: int) -> dict[str, float]:
    """Every number by its definition, from whole matrices and full SVDs."""
    norm, s = np.linalg.norm(F), np.linalg.svd(F, compute_uv=False)
    U, sigma, Vt = np.linalg.svd(L)
    k = int((sigma > 1e-9 * sigma[0]).sum())
    scale = max(0.0, float((F * L).sum() / (L * L).sum()))
    floor = math.sqrt((s[rank:] ** 2).sum()) / norm
    scaled = float(np.linalg.norm(F - scale * L) / norm)
    return {
        "k": k,
        "norm_full": norm,
        "norm_lora": np.linalg.norm(L),
        "ratio": np.linalg.norm(L) / norm,
        "inner": (F * L).sum(),
        "floor": floor,
        "achieved": np.linalg.norm(F - L) / norm,
        "scaled": scaled,
        "scale": scale,
        "cosine": (F * L).sum() / norm / np.linalg.norm(L),
        "efficiency": (1 - scaled**2) / (1 - floor**2),
        "left": np.linalg.norm(U[:, :k].T @ F) ** 2 / norm**2,
        "right": np.linalg.norm(F @ Vt[:k].T) ** 2 / norm**2,
        "both": np.linalg.norm(U[:, :k].T @ F @ Vt[:k].T) ** 2 / norm**2,
    }


def numbers(found: LayerAgreement) -> dict[str, float]:
    plain = ("k", "norm_full", "norm_lora", "ratio", "inner", "floor", "achieved", "scaled", "scale", "cosine")
    return {
        **{name: getattr(found, name) for name in (*plain, "efficiency")},
        **{name: getattr(found, name).share for name in ("left", "right", "both")},
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["along", "against"])
def test_every_number_against_whole_matrices(shape: tuple[int, int], sign: int) -> None:
    F = full(shape)
    some = lora(shape)
    L = LowRank(some.B, some.A, math.copysign(0.4, F.inner(some)) * sign)
    found = compare_with_full_update(F, L)
    assert numbers(found) == pytest.approx(reference(float64(F), float64(L), 3), rel=1e-6, abs=1e-9)
    assert (found.shape, found.rank, found.scale > 0) == (shape, 3, sign > 0)
    assert found.left.chance == pytest.approx(3 / shape[0])
    assert found.right.chance == pytest.approx(3 / shape[1])
    assert found.both.chance == pytest.approx(9 / shape[0] / shape[1])


def test_the_top_directions_are_full_fine_tunings_against_loras() -> None:
    F, L = full((30, 18)), lora((30, 18))
    found = compare_with_full_update(F, L, top=5)
    u, _, vt = np.linalg.svd(float64(F))
    U, _, Vt = np.linalg.svd(float64(L))
    for side, ours, theirs in ((found.left_directions, u, U), (found.right_directions, vt.T, Vt.T)):
        assert side.overlap.shape == (5, 3)
        assert side.overlap[0, 0] == pytest.approx((ours[:, 0] @ theirs[:, 0]) ** 2, rel=1e-4)
        assert side.overlap[4, 2] == pytest.approx(np.linalg.norm(ours[:, :5].T @ theirs[:, :3]) ** 2 / 3, rel=1e-4)
    assert (found.left_directions.d, found.right_directions.d) == (30, 18)
    assert found.p_left == familywise_p_values(found.left_directions.p, 30).min()
    assert found.p_right == familywise_p_values(found.right_directions.p, 18).min()
    assert compare_with_full_update(F, L, top=2).left_directions.overlap.shape == (2, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best_of_a_rank_agrees_in_all_that_the_rank_can(shape: tuple[int, int]) -> None:
    F = full(shape)
    best = FullUpdate.of(F).truncate(3)
    found = compare_with_full_update(F, best)
    s = np.linalg.svd(float64(F), compute_uv=False)
    expected = math.sqrt((s[3:] ** 2).sum() / (s**2).sum())
    assert (found.floor, found.achieved, found.scaled) == pytest.approx((expected,) * 3, rel=1e-5)
    assert (found.efficiency, found.scale) == pytest.approx((1, 1), abs=1e-6)
    assert found.cosine == pytest.approx(math.sqrt(1 - expected**2), rel=1e-6)
    assert found.left.share == pytest.approx(1 - expected**2, rel=1e-6)
    assert found.both.share == pytest.approx(1 - expected**2, rel=1e-6)
    assert np.allclose(np.diag(found.left_directions.overlap), 1, atol=1e-6)
    assert max(found.p_left, found.p_right) < 1e-6


def test_no_update_of_a_rank_goes_below_the_floor() -> None:
    F = full((30, 18))
    for rank in (1, 2, 3, 5, 18, 40):
        for seed in range(5):
            found = compare_with_full_update(F, lora((30, 18), rank, seed=seed))
            assert found.floor - 1e-9 <= found.scaled <= min(1.0, found.achieved) + 1e-9
            assert 0 <= found.efficiency <= 1 + 1e-9
    assert found.floor == 0  # a rank of 40 reaches everything
    assert (found.right.share, found.k) == (pytest.approx(1), 18)


def test_a_scale_changes_the_error_and_nothing_that_is_scaled() -> None:
    F, L = full((30, 18)), FullUpdate.of(full((30, 18))).truncate(2)
    one, four = compare_with_full_update(F, L), compare_with_full_update(F, L * 4.0)
    assert (four.scaled, four.efficiency, four.cosine) == pytest.approx((one.scaled, one.efficiency, one.cosine))
    assert four.scale == pytest.approx(one.scale / 4)
    assert four.ratio == pytest.approx(4 * one.ratio)
    assert four.achieved > 2 * one.achieved


def test_an_update_the_other_way_agrees_in_nothing() -> None:
    F = full((30, 18))
    found = compare_with_full_update(F, FullUpdate.of(F).truncate(3) * -1.0)
    assert (found.efficiency, found.scaled, found.scale) == (0, 1, 0)
    assert found.cosine < -0.8
    assert found.achieved > 1.8
    assert found.left.share > 0.7  # its directions are the right ones all the same


def test_planted_directions_and_energies() -> None:
    """Full: σ = 4, 2, 1 on orthonormal u_l v_lᵀ. LoRA: u₁v₁ᵀ and u₃v₂ᵀ, which is orthogonal to it."""
    U, V = frame(20, 3), frame(15, 3, seed=1)
    F = LowRank(U * torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), V.T)
    L = LowRank(torch.stack((U[:, 0], U[:, 2]), 1), torch.stack((V[:, 0], V[:, 1])))
    found = compare_with_full_update(F, L)
    assert found.inner == pytest.approx(4)
    assert found.cosine == pytest.approx(4 / math.sqrt(21 * 2))
    assert found.floor == pytest.approx(math.sqrt(1 / 21))
    assert found.achieved == pytest.approx(math.sqrt((21 + 2 - 8) / 21))
    assert found.scale == pytest.approx(2)
    assert found.scaled == pytest.approx(math.sqrt(1 - 8 / 21))
    assert found.efficiency == pytest.approx((8 / 21) / (20 / 21))
    assert (found.left.share, found.right.share) == pytest.approx((17 / 21, 20 / 21))
    assert found.both.share == pytest.approx(16 / 21)


def test_random_updates_agree_as_chance_has_it() -> None:
    """Negative control: 60 random updates capture k/out, k/in and their product, and explain next to nothing."""
    shape, rank = (40, 25), 4
    F = full(shape)
    found = [compare_with_full_update(F, lora(shape, rank, seed=2 * seed + 100)) for seed in range(60)]
    for name in ("left", "right", "both"):
        shares = np.array([getattr(one, name).share for one in found])
        error = 4 * shares.std() / math.sqrt(len(shares))
        assert shares.mean() == pytest.approx(getattr(found[0], name).chance, abs=error)
    assert np.mean([one.efficiency for one in found]) < 0.03
    assert np.mean([one.p_left < 0.05 for one in found]) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 60)


def test_what_was_taken_apart_once_serves_every_rank() -> None:
    F = full((30, 18))
    target = FullUpdate.of(F, 8)
    for rank in (1, 4):
        once, again = (
            compare_with_full_update(target, lora((30, 18), rank), top=8),
            compare_with_full_update(F, lora((30, 18), rank), top=8),
        )
        assert numbers(once) == numbers(again)
        assert np.array_equal(once.left_directions.overlap, again.left_directions.overlap)
    assert repr(target) == "FullUpdate(Dense(30 × 18, stored as float32), top 8)"


def test_a_cut_is_the_best_approximation() -> None:
    F = full((30, 18))
    U, s, Vt = np.linalg.svd(float64(F))
    for rank in (1, 3, 18):
        assert np.allclose(float64(FullUpdate.of(F).truncate(rank)), (U[:, :rank] * s[:rank]) @ Vt[:rank], atol=1e-5)
    assert float64(FullUpdate.of(planted_dense((9, 7), [2.0, 1.0])).truncate(5)).shape == (
        9,
        7,
    )  # it has no more than 2
    with pytest.raises(ShapeError, match="no cut at 5"):
        FullUpdate.of(F, 4).truncate(5)


def test_captured_energy_of_known_subspaces() -> None:
    F = planted((12, 8), [3.0, 2.0, 1.0])
    left, right = Subspace.pair(F)
    found = captured_energy(F, left.top(1), right.top(2))
    assert found["left"].share == pytest.approx(9 / 14)
    assert found["right"].share == pytest.approx(13 / 14)
    assert found["both"].share == pytest.approx(9 / 14)
    assert found["both"].chance == pytest.approx(2 / 96)


def test_nothing_multiplies_factors_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LowRank) -> torch.Tensor:
        raise AssertionError("factors were multiplied out")

    monkeypatch.setattr(LowRank, "dense", refuse)
    shape = (100_000, 100_000)
    big = LowRank(normal(shape[0], 3, seed=1), normal(3, shape[1], seed=2))
    found = compare_with_full_update(big, LowRank(big.B[:, :2], big.A[:2]))
    assert 0 < found.scaled < 1
    compare_with_full_update(full((30, 18)), lora((30, 18)))


def test_errors() -> None:
    F, L = full((30, 18)), lora((30, 18))
    with pytest.raises(ShapeError, match=r"\(30, 18\) and \(18, 30\)"):
        compare_with_full_update(F, L.T)
    with pytest.raises(ShapeError, match="is zero"):
        compare_with_full_update(Dense(torch.zeros(30, 18)), L)
    with pytest.raises(ShapeError, match="is zero"):
        compare_with_full_update(F, LowRank(torch.zeros(30, 2), normal(2, 18)))
    with pytest.raises(ShapeError, match="too small"):
        compare_with_full_update(F, L * 1e-150)
