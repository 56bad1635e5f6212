"""Overlap, angles and distances against scipy and definitions; chance levels against seeded Haar samples."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import MAKERS, float64, frame, normal, planted, planted_dense
from scipy.linalg import subspace_angles
from scipy.stats import norm

from rankscope.errors import ShapeError
from rankscope.linalg import Basis
from rankscope.spectra import Spectrum
from rankscope.subspace import Subspace, angles, chance, distances, orthonormalize, overlap
from rankscope.updates import Dense, LowRank


def left(basis: torch.Tensor) -> Subspace:
    return Subspace(basis, "left")


# Where directions come from


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=str)
def test_directions_of_every_kind(name: str, shape: tuple[int, int]) -> None:
    """Each direction is numpy's, up to sign: left from the output space, right from the input space."""
    update = MAKERS[name].make(*shape, 2)
    U, s, Vt = np.linalg.svd(float64(update))
    k = min(3, Spectrum.of(update).numerical_rank)
    a, b = Subspace.pair(update, 3)
    assert (a.side, b.side, a.dim, b.dim, a.k, b.k) == ("left", "right", *shape, k, k)
    for side, vectors in ((a, U[:, :k]), (b, Vt[:k].T)):
        assert side.basis.dtype == torch.float64
        assert np.allclose((side.basis.T @ side.basis).numpy(), np.eye(k), atol=1e-13)
        # Singular vectors move by the error of the matrix over the gap: float32 and gaps of some percent.
        assert np.allclose(np.abs(np.diag(vectors.T @ side.basis.numpy())), 1, atol=1e-6)
        assert np.allclose(side.gaps, (s[:k] - np.append(s, 0)[1 : k + 1]) / s[:k], atol=1e-5)
    assert np.allclose(a.basis.numpy(), Subspace.of(update, "left", 3).basis.numpy())
    assert np.allclose(b.basis.numpy(), Subspace.of(update, "right", 3).basis.numpy())
    # The singular vectors belong together: Uᵀ·M·V is diagonal and positive, signs included.
    core = a.basis.numpy().T @ float64(update) @ b.basis.numpy()
    assert np.allclose(core, np.diag(s[:k]), atol=1e-5 * s[0])


def test_directions_past_the_numerical_rank_are_rounding() -> None:
    for update in (planted((20, 15), [3.0, 2.0]), planted_dense((20, 15), [3.0, 2.0])):
        assert Subspace.of(update, "left").k == 2
        assert Subspace.of(update, "right", 10).k == 2
        assert Subspace.of(update, "right", 1).k == 1


def test_cuts_inside_a_cluster_are_marked() -> None:
    side = Subspace.of(planted((20, 15), [2.0, 2.0, 1.0, 0.999, 0.5]), "left")
    assert side.in_cluster.tolist() == [True, False, True, False, False]
    assert side.top(3).in_cluster.tolist() == [True, False, True]
    assert side.gaps[-1] == 1  # nothing follows the last one
    assert not left(frame(5, 2)).in_cluster.any()  # gaps not known
    assert np.isnan(left(frame(5, 2)).gaps).all()


def test_errors() -> None:
    update = planted((6, 5), [1.0, 0.5])
    for broken in (
        lambda: Subspace.of(update, "left", 0),
        lambda: Subspace.of(update, "up"),  # type: ignore[arg-type]
        lambda: Subspace(frame(5, 2), "up"),  # type: ignore[arg-type]
        lambda: Subspace(frame(5, 2).T, "left"),
        lambda: Subspace(torch.ones(5), "left"),
        lambda: Subspace(frame(5, 2), "left", np.ones(3)),
        lambda: left(frame(5, 2)).top(0),
    ):
        with pytest.raises(ShapeError):
            broken()
    for zero in (LowRank(torch.zeros(6, 2), normal(2, 5)), Dense(torch.zeros(3, 3))):
        with pytest.raises(ShapeError, match="is zero"):
            Subspace.of(zero, "left")
    a, b = Subspace.pair(planted((6, 6), [1.0]))
    for function in (overlap, angles, distances):
        with pytest.raises(ShapeError, match=r"a left and a right"):
            function(a, b)
        with pytest.raises(ShapeError, match=r"6 and 9"):
            function(a, left(frame(9, 1)))


def test_reprs() -> None:
    side = left(frame(9, 2))
    assert repr(side) == "Subspace(left, k=2 of dimension 9)"
    assert "Chance(2 × 2" in repr(chance(overlap(side, side), 9))


# Overlap


def test_the_grid_cell_by_cell() -> None:
    a, b = left(frame(15, 5)), left(frame(15, 3, seed=1))
    grid = overlap(a, b)
    assert grid.shape == (5, 3)
    for i in range(1, 6):
        for j in range(1, 4):
            product = a.basis[:, :i].numpy().T @ b.basis[:, :j].numpy()
            assert grid[i - 1, j - 1] == pytest.approx(np.linalg.norm(product) ** 2 / min(i, j), rel=1e-12)
    assert np.allclose(overlap(b, a), grid.T)


def test_overlap_of_known_subspaces() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    assert np.allclose(overlap(left(eye[:, :3]), left(eye[:, 3:6])), 0)
    assert np.allclose(overlap(left(eye[:, :2]), left(eye[:, [1, 0]])), [[0, 1], [1, 1]])
    theta = 0.3
    turned = math.cos(theta) * eye[:, :1] + math.sin(theta) * eye[:, 5:6]
    assert overlap(left(eye[:, :1]), left(turned))[0, 0] == pytest.approx(math.cos(theta) ** 2)
    whole = overlap(left(frame(40, 40)), left(frame(40, 40, seed=1)))
    assert whole.max() <= 1
    assert np.allclose(whole[-1], 1)  # all of the space holds everything


def test_the_projection_distance_and_overlap_are_one_thing() -> None:
    """φ = 1 − d²/p, with p outside (Hu et al.'s Appendix G misprints it)."""
    a, b = left(frame(12, 4)), left(frame(12, 3, seed=1))
    assert overlap(a, b)[-1, -1] == pytest.approx(1 - distances(a, b)["projection"] ** 2 / 3, rel=1e-12)


# Angles


def nudged(basis: torch.Tensor, size: float) -> torch.Tensor:
    return torch.linalg.qr(basis + size * normal(*basis.shape, seed=77))[0]


PAIRS = {
    "random": (frame(30, 4), frame(30, 4, seed=1)),
    "random, more on the left": (frame(30, 7), frame(30, 2, seed=1)),
    "random, more on the right": (frame(30, 2), frame(30, 7, seed=1)),
    "most of the space": (frame(10, 8), frame(10, 7, seed=1)),
    "identical": (frame(30, 4), frame(30, 4)),
    "nearly identical": (frame(30, 4), nudged(frame(30, 4), 1e-9)),
    "a thousandth apart": (frame(30, 4), nudged(frame(30, 4), 1e-3)),
    "one inside the other": (frame(30, 5), frame(30, 5)[:, 1:3]),
    "orthogonal": (frame(30, 8)[:, :4], frame(30, 8)[:, 4:]),
    "part shared, part orthogonal": (frame(30, 8)[:, :4], frame(30, 8)[:, 2:6]),
    "one dimension": (torch.ones(1, 1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_angles_agree_with_scipy(name: str) -> None:
    U, V = PAIRS[name]
    found = angles(left(U), left(V))
    expected = np.sort(subspace_angles(U.numpy(), V.numpy()))
    assert found.shape == (min(U.shape[1], V.shape[1]),)
    assert (np.diff(found) >= 0).all()
    # 1e-14 leaves room for two SVDs. Where tiny and right angles meet, scipy chooses the branch of θ_l by the angle
    # at the other end, and a right angle by its sine is good to 2e-8; planted angles below check that case.
    assert np.allclose(found, expected, atol=5e-8 if "part" in name else 1e-14, rtol=0)
    assert np.allclose(angles(left(V), left(U)), found, atol=1e-14)


@pytest.mark.parametrize("theta", [1e-12, 1e-9, 1e-4, 0.7, 0.8, 1.5, math.pi / 2])
def test_planted_angles(theta: float) -> None:
    """cos alone would read 1e-9 as 0 or 2e-8."""
    Q = frame(20, 6)
    turned = math.cos(theta) * Q[:, :3] + math.sin(theta) * Q[:, 3:]
    assert np.allclose(angles(left(Q[:, :3]), left(turned)), theta, atol=3e-15, rtol=0)


def test_planted_angles_of_every_size_at_once() -> None:
    theta = torch.tensor([1e-9, 1e-3, 0.7, 1.2, math.pi / 2], dtype=torch.float64)
    Q = frame(20, 10)
    turned = Q[:, :5] * theta.cos() + Q[:, 5:] * theta.sin()
    mixed = turned @ frame(5, 5, seed=3)  # the same span
    assert np.allclose(angles(left(Q[:, :5]), left(mixed)), theta.numpy(), atol=3e-15, rtol=0)


def test_singular_vectors_in_float32_are_made_orthonormal_in_float64() -> None:
    vectors = frame(50, 6).float()
    better = orthonormalize(vectors)
    assert np.allclose((better.T @ better).numpy(), np.eye(6), atol=1e-14)
    for i in range(1, 7):  # the span of the first i does not move, nor does any sign
        assert subspace_angles(better[:, :i].numpy(), vectors[:, :i].double().numpy()).max() < 1e-12
    assert (torch.einsum("dk,dk->k", better, vectors.double()) > 0.999).all()
    assert orthonormalize(frame(5, 2)).dtype == torch.float64


def as_factors(basis: torch.Tensor, condition: float, seed: int) -> Subspace:
    """A subspace found from factors that are neither orthonormal nor few, which are not multiplied out."""
    k = basis.shape[1]
    mixing = normal(k, k, seed=seed) if condition > 10 else torch.eye(k, dtype=torch.float64) + 0.05 * normal(k, k)
    strengths = torch.linspace(2, 1, k, dtype=torch.float64)
    update = LowRank(basis @ mixing, torch.linalg.solve(mixing, strengths[:, None] * frame(90, k, seed=seed + 9).T))
    return Subspace.of(update, "left")


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_subspaces_kept_as_factors_give_what_bases_give(condition: float) -> None:
    U, V = frame(400, 24), frame(400, 20, seed=1)
    a, b = as_factors(U, condition, 3), as_factors(V, condition, 4)
    assert a.factors.small is not None
    assert (a.k, a.dim, a.top(5).k, a.top(5).basis.shape) == (24, 400, 5, (400, 5))
    assert np.allclose(overlap(a, b), overlap(left(a.basis), left(b.basis)), rtol=0, atol=1e-13)
    assert np.allclose(angles(a, b), np.sort(subspace_angles(U.numpy(), V.numpy())), rtol=0, atol=1e-12)
    assert np.allclose(angles(a.top(3), b), angles(left(a.basis[:, :3]), left(b.basis)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_planted_angles_between_factors(condition: float) -> None:
    """Tiny, middling and right angles at once; 24 directions, so that Cholesky may serve."""
    tiny, large = torch.logspace(-12, -1, 16, dtype=torch.float64), torch.linspace(0.7, 1.5, 8, dtype=torch.float64)
    theta = torch.cat((tiny, large))
    Q = frame(400, 48)
    turned = Q[:, :24] * theta.cos() + Q[:, 24:] * theta.sin()
    found = angles(as_factors(Q[:, :24], condition, 3), as_factors(turned, condition, 4))
    assert np.allclose(found, theta.numpy(), rtol=0, atol=1e-13 * (condition if condition > 10 else 1))
    same = as_factors(Q[:, :24], condition, 3)
    assert angles(same, same).max() < 1e-14


def test_a_subspace_and_itself_though_its_factors_are_not_quite_orthonormal() -> None:
    side = Subspace.of(LowRank(normal(5000, 24), frame(90, 24, seed=7).T), "left")
    tall, small = side.factors
    assert small is not None
    side = replace(side, vectors=Basis(tall, small * (1 + 1e-13)))  # what projecting once would read as an angle
    assert angles(side, side).max() < 3e-15


# Distances


def test_distances_of_planted_angles() -> None:
    theta = np.array([0.1, 0.5, 1.2])
    Q = frame(20, 6)
    cos, sin = torch.from_numpy(np.cos(theta)), torch.from_numpy(np.sin(theta))
    found = distances(left(Q[:, :3]), left(Q[:, :3] * cos + Q[:, 3:] * sin))
    assert found == pytest.approx(
        {
            "projection": math.sqrt(3 - (np.cos(theta) ** 2).sum()),
            "geodesic": math.sqrt((theta**2).sum()),
            "chordal": math.sqrt((np.sin(theta) ** 2).sum()),
            "fubini_study": math.acos(np.cos(theta).prod()),
            "procrustes": math.sqrt(2 * (3 - np.cos(theta).sum())),
        },
        rel=1e-12,
    )


def test_procrustes_is_the_least_distance_over_rotations() -> None:
    from scipy.linalg import orthogonal_procrustes

    U, V = frame(20, 3), frame(20, 3, seed=1)
    best = orthogonal_procrustes(V.numpy(), U.numpy())[0]
    expected = np.linalg.norm(U.numpy() - V.numpy() @ best)
    assert distances(left(U), left(V))["procrustes"] == pytest.approx(expected, rel=1e-12)


def test_distances_at_the_ends() -> None:
    Q = frame(20, 6)
    assert all(x < 1e-14 for x in distances(left(Q[:, :3]), left(Q[:, :3])).values())
    far = distances(left(Q[:, :3]), left(Q[:, 3:]))
    expected = [math.sqrt(3), math.sqrt(3) * math.pi / 2, math.sqrt(3), math.pi / 2, math.sqrt(6)]
    assert list(far.values()) == pytest.approx(expected, rel=1e-12)
    tiny = 1e-9
    near = distances(left(Q[:, :1]), left(math.cos(tiny) * Q[:, :1] + math.sin(tiny) * Q[:, 1:2]))
    assert list(near.values()) == pytest.approx([tiny] * 5, rel=1e-5)


# Chance


def haar_sums(d: int, i: int, j: int, samples: int, seed: int = 0) -> np.ndarray:
    """S = ‖U_iᵀV_j‖²_F for uniformly random V and U the first i axes: tr(G_iᵀG_i(GᵀG)⁻¹), G Gaussian (d, j)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(samples // 10_000):
        G = rng.standard_normal((10_000, d, j))
        head = G[:, :i]
        found.append(
            np.trace(np.linalg.solve(G.transpose(0, 2, 1) @ G, head.transpose(0, 2, 1) @ head), axis1=1, axis2=2)
        )
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("d", "i", "j"), [(64, 4, 8), (40, 1, 1), (24, 1, 6), (12, 5, 5), (10, 6, 7), (6, 5, 5), (3, 2, 2)]
)
def test_chance_against_random_subspaces(d: int, i: int, j: int) -> None:
    n = 60_000 if d < 64 else 120_000
    S = haar_sums(d, i, j, n)
    grid = np.full((i, j), 0.5)
    level = chance(grid, d)
    p = min(i, j)
    # Standard errors: of a mean sd/√n, of a variance var·√((kurtosis − 1)/n); four of each.
    assert S.mean() / p == pytest.approx(level.expected[-1, -1], abs=4 * S.std() / p / math.sqrt(n))
    spread = math.sqrt((((S - S.mean()) ** 4).mean() / S.var() ** 2 - 1) / n)
    assert S.var() / p**2 == pytest.approx(level.sd[-1, -1] ** 2, rel=4 * spread)
    tail = tails(S / p, d, i, j)
    assert np.mean(tail < 0.05) == pytest.approx(0.05, rel=0.06)
    # .001 of n samples is 60 to 120 events, ±13 % to ±9 %; METHODS: three times too many by a normal law.
    assert 0.0005 < np.mean(tail < 0.001) < 0.0016
    assert np.mean(tail < 0.5) == pytest.approx(0.5, abs=0.02)


def tails(phi: np.ndarray, d: int, i: int, j: int) -> np.ndarray:
    """p of the cell (i, j) for many values: the tail is monotone, so a fine table is enough."""
    levels = np.linspace(0, 1, 400)
    table = [chance(np.full((i, j), x), d).p[-1, -1] for x in levels]
    return np.interp(phi, levels, table)


def test_a_normal_tail_is_too_optimistic() -> None:
    """Negative control (METHODS): z > 3.09 has .0033 of the samples, not .001."""
    S = haar_sums(64, 4, 8, 120_000)
    level = chance(np.full((4, 8), 0.5), 64)
    z = (S / 4 - level.expected[-1, -1]) / level.sd[-1, -1]
    assert 0.0027 < np.mean(norm.sf(z) < 0.001) < 0.0039


@pytest.mark.parametrize(("d", "j"), [(30, 1), (30, 7), (4, 3), (768, 64)])
def test_one_direction_has_an_exact_law(d: int, j: int) -> None:
    """S ~ Beta(j/2, (d − j)/2)."""
    from scipy.stats import beta

    law = beta(j / 2, (d - j) / 2)
    for phi in (0.0, 0.01, j / d, 0.5, 0.99):
        level = chance(np.full((1, j), phi), d)
        assert level.p[0, -1] == pytest.approx(law.sf(phi), rel=1e-9)
        assert level.expected[0, -1] == pytest.approx(law.mean())
        assert level.sd[0, -1] == pytest.approx(law.std())
        assert level.z[0, -1] == pytest.approx((phi - law.mean()) / law.std(), abs=1e-9)


def test_cells_that_leave_nothing_to_chance() -> None:
    a, b = left(frame(5, 5)), left(frame(5, 4, seed=1))
    level = chance(overlap(a, b), 5)
    assert (level.sd[-1] == 0).all()
    assert (level.z[-1] == 0).all()
    assert (level.p[-1] == 1).all()
    assert (level.expected[-1] == 1).all()
    assert (level.sd[:-1] > 0).all()
    only = chance(np.ones((1, 1)), 1)
    assert (only.expected.item(), only.sd.item(), only.z.item(), only.p.item()) == (1, 0, 0, 1)


def test_chance_is_symmetric_and_one_sided() -> None:
    grid = overlap(left(frame(20, 6)), left(frame(20, 3, seed=1)))
    level, turned = chance(grid, 20), chance(grid.T, 20)
    for name in ("expected", "sd", "z", "p"):
        assert np.allclose(getattr(level, name).T, getattr(turned, name))
    assert chance(np.ones((2, 2)), 20).p[-1, -1] == 0
    assert chance(np.zeros((2, 2)), 20).p[-1, -1] == 1
    assert (chance(np.zeros((2, 2)), 20).z < 0).all()
    # More dimensions than freedom: two 4-spaces in dimension 5 share at least three.
    assert chance(np.full((4, 4), 0.75), 5).p[-1, -1] == 1


def test_chance_needs_a_space_that_holds_the_directions() -> None:
    for grid, d in ((np.ones((4, 2)), 3), (np.ones(4), 9)):
        with pytest.raises(ShapeError):
            chance(grid, d)
