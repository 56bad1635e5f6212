"""Intruder dimensions against two dense SVDs by numpy, and planted ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from makers import MAKERS, float64, frame, normal

from rankscope.analysis import intruders as module
from rankscope.analysis.intruders import (
    INTRUDER_THRESHOLD,
    SWEEP_THRESHOLDS,
    Intruders,
    block_krylov,
    intruders,
    random_cosine,
)
from rankscope.errors import ShapeError
from rankscope.linalg import SVD, dense_svd
from rankscope.updates import Dense, LowRank, Update


def weight_of(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """σ from 3 down to 1, evenly: no two near each other."""
    k = min(m, n)
    return frame(m, k, seed) * torch.linspace(3, 1, k, dtype=torch.float64) @ frame(n, k, seed + 1).T


def by_definition(update: Update, weight: torch.Tensor, k: int) -> list[tuple[float, int, float, float]]:
    """cosine, position, share and inside from two dense SVDs."""
    W = weight.double().numpy()
    U0 = np.linalg.svd(W, full_matrices=False)[0]
    U, s, _ = np.linalg.svd(W + float64(update), full_matrices=False)
    cosines = np.abs(U0.T @ U[:, :k])
    strong = round(U0.shape[1] / 4)
    return [
        (c.max(), int(c.argmax()) + 1, sigma**2 / (s @ s), (c[:strong] ** 2).sum())
        for c, sigma in zip(cosines.T, s, strict=False)
    ]


def check(found: Intruders, expected: list[tuple[float, int, float, float]], tolerance: float) -> None:
    assert [one.position for one in found.directions] == [position for _, position, _, _ in expected]
    for index, field in ((0, "cosine"), (2, "share"), (3, "inside")):
        got = [getattr(one, field) for one in found.directions]
        assert np.allclose(got, [one[index] for one in expected], atol=tolerance), field


def new_direction(weight: torch.Tensor, base: SVD, sigma: float) -> LowRank:
    """σ·u·vᵀ with u spread evenly over all pre-trained directions, v over the input space."""
    n = base.U.shape[1]
    signs = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    u, v = base.U @ signs / math.sqrt(n), torch.full((weight.shape[1],), 1 / math.sqrt(weight.shape[1]))
    return LowRank(u[:, None] * sigma, v[None].double())


@pytest.mark.parametrize("route", ["basis", "gram", "krylov", "dense"])
@pytest.mark.parametrize("shape", [(60, 44), (44, 60), (50, 50)], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_against_two_dense_svds(name: str, shape: tuple[int, int], route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to the top directions, every kind of update, wide and tall."""
    monkeypatch.setattr(module, "BASIS_MAX_RANK_SHARE", 1 / 4 if route == "basis" else 0)
    monkeypatch.setattr(module, "GRAM_MAX_DIMENSION", 1000 if route == "gram" else 0)
    monkeypatch.setattr(module, "MAX_KRYLOV_COLUMNS", 0 if route == "dense" else 400)
    update, weight = MAKERS[name].make(*shape, 4) * 0.2, weight_of(*shape)
    base = dense_svd(weight)
    # LowRank.dense() rounds to float32; gaps of some percent keep directions that good.
    check(intruders(update, weight, base, 5), by_definition(update, weight, 5), 1e-4)


def test_a_planted_intruder_is_found() -> None:
    """A new direction stronger than all: the first, spread over the old ones; the nine others are old."""
    weight = weight_of(64, 64)
    base = dense_svd(weight)
    found = intruders(new_direction(weight, base, 8.0), weight, base)
    assert len(found.directions) == 10
    (first,) = found.intruding_directions
    assert first is found.directions[0]
    assert first.cosine < 3 / math.sqrt(64)
    assert first.inside == pytest.approx(0.25, abs=0.15)  # as spread as a random direction
    assert found.inside_chance == 0.25
    assert first.share == pytest.approx(64 / (64 + float(weight.square().sum())), rel=0.1)
    assert min(one.cosine for one in found.directions[1:]) > INTRUDER_THRESHOLD
    assert found.counts[SWEEP_THRESHOLDS.index(INTRUDER_THRESHOLD)] == 1
    assert list(found.counts) == sorted(found.counts)


def test_no_intruders() -> None:
    """A small update, none to speak of, a flipped sign, a scaled copy of the strongest direction: nothing is new."""
    weight = weight_of(40, 64)
    base = dense_svd(weight)
    copy = LowRank(base.U[:, :1] * 5, base.Vt[:1])
    for update in (new_direction(weight, base, 1e-3), Dense(torch.zeros(40, 64)), Dense(-2 * weight), copy):
        found = intruders(update, weight, base)
        assert not found.intruding_directions
        assert found.directions[0].cosine > 0.9
        assert found.counts == (0,) * len(SWEEP_THRESHOLDS)


def test_strength_decides() -> None:
    """The same direction weaker than the top ten of the weight does not enter them."""
    weight = weight_of(64, 64)
    base = dense_svd(weight)
    assert not intruders(new_direction(weight, base, 0.5), weight, base).intruding_directions
    assert len(intruders(new_direction(weight, base, 6.0), weight, base).intruding_directions) == 1


def test_signs_do_not_matter() -> None:
    weight = weight_of(30, 20)
    base = dense_svd(weight)
    flips = torch.where(torch.arange(20) % 3 == 0, -1.0, 1.0).double()
    flipped = SVD(base.U * flips, base.s, base.Vt * flips[:, None])
    update = LowRank(normal(30, 2), normal(2, 20, seed=1), 0.3)
    assert intruders(update, weight, flipped) == intruders(update, weight, base)


def test_old_directions_turned_into_each_other_lie_inside() -> None:
    """A rotation by 45° in the plane of directions 1 and 2 of sixteen equals: cosine .7, all of it inside."""
    s = torch.cat((torch.tensor([2.0, 2.0]), torch.linspace(1, 0.5, 14))).double()
    U, V = frame(16, 16, 3), frame(16, 16, 4)
    weight = U * s @ V.T
    base = SVD(U, s, V.T)
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double() / math.sqrt(2)
    tuned = (U[:, :2] @ turn) * torch.tensor([2.5, 2.2]) @ (V[:, :2] @ turn).T
    found = intruders(Dense(tuned - U[:, :2] * 2 @ V[:, :2].T), weight, base, 2)
    assert [one.cosine for one in found.directions] == pytest.approx([math.sqrt(0.5)] * 2, abs=1e-5)
    assert [one.inside for one in found.directions] == pytest.approx([1, 1])


def test_directions_that_are_rounding_are_left_out() -> None:
    weight = torch.zeros(20, 12).double()
    weight[0, 0] = 1
    found = intruders(LowRank(normal(20, 1), normal(1, 12, seed=1)), weight, dense_svd(weight))
    assert len(found.directions) == 2


def test_errors() -> None:
    weight = weight_of(10, 6)
    base = dense_svd(weight)
    update = LowRank(normal(10, 1), normal(1, 6, seed=1))
    for broken, message in (
        (lambda: intruders(update, weight.T, base), "differ in shape"),
        (lambda: intruders(update, weight, dense_svd(weight.T)), "transposed"),
        (lambda: intruders(update, weight, base, 0), "at least"),
        (lambda: intruders(Dense(-weight), weight.float(), dense_svd(weight.float())), "is zero"),
    ):
        with pytest.raises(ShapeError, match=message):
            broken()


# The Krylov space


def test_krylov_needs_its_steps() -> None:
    """The start alone is off by more than the residuals allow; grown, it is right to 1e-7. A flat spectrum is harder
    than any weight."""
    weight = normal(300, 200)
    U, s, Vt = dense_svd(weight + 0.3 * normal(300, 200, seed=9))
    tuned = U * s @ Vt
    start = dense_svd(weight).Vt[:10].T
    steps = []

    def apply(x: torch.Tensor) -> torch.Tensor:
        steps.append(x.shape[1])
        return tuned @ x

    found = block_krylov(apply, lambda y: tuned.T @ y, start, 5)
    assert found is not None
    assert len(steps) > 3
    assert torch.allclose((found[0] * U[:, :5]).sum(0).abs(), torch.ones(5).double(), atol=1e-9)
    assert torch.allclose(found[1], s[:5], rtol=1e-12)
    at_start = torch.linalg.svd(tuned @ torch.linalg.qr(start)[0], full_matrices=False)[0]
    assert float((at_start[:, :5] * U[:, :5]).sum(0).abs().min()) < 0.99


def test_krylov_says_when_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KRYLOV_COLUMNS", 20)
    tuned = normal(300, 200)
    assert block_krylov(lambda x: tuned @ x, lambda y: tuned.T @ y, normal(200, 10, seed=1), 5) is None


@pytest.mark.parametrize("shape", [(60, 44), (44, 60), (50, 50)], ids=str)
def test_thin_factors_are_laid_into_the_old_basis(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weight, also where they leave its span; and as exact as float64 is."""
    monkeypatch.setattr(module, "_against_basis", lambda *_: pytest.fail("the basis was not used"))
    weight = weight_of(*shape)
    update = LowRank(normal(shape[0], 3), normal(3, shape[1], seed=1), 0.3)
    check(intruders(update, weight, dense_svd(weight), 6), by_definition(update, weight, 6), 1e-9)
    thick = LowRank(normal(shape[0], 13), normal(13, shape[1], seed=1), 0.3)
    assert module._in_basis(thick, dense_svd(weight), 6) is None


def test_krylov_multiplies_no_factors_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BASIS_MAX_RANK_SHARE", 0)
    monkeypatch.setattr(module, "GRAM_MAX_DIMENSION", 0)
    monkeypatch.setattr(LowRank, "dense", lambda _: pytest.fail("dense() was called"))
    weight = weight_of(120, 90)
    update = LowRank(normal(120, 2), normal(2, 90, seed=1), 0.2)
    assert len(intruders(update, weight, dense_svd(weight), 4).directions) == 4


# Chance


@pytest.mark.parametrize(("d", "n"), [(16, 16), (128, 128), (128, 40), (3, 1)])
def test_largest_cosine_of_a_random_direction(d: int, n: int) -> None:
    x = normal(20_000, d, seed=5)
    largest = (x[:, :n].abs().amax(1) / x.norm(dim=1)).numpy()
    assert abs(random_cosine(d, n) - largest.mean()) < 4 * largest.std() / math.sqrt(len(largest))


def test_largest_cosine_in_small_dimensions() -> None:
    assert random_cosine(1, 1) == 1
    assert random_cosine(2, 1) == pytest.approx(2 / math.pi, rel=1e-5)
    assert random_cosine(2, 2) == pytest.approx(2 * math.sqrt(2) / math.pi, rel=1e-5)  # mean of max(|cos|, |sin|)
