"""Decompositions of products and matrices, and the spacing of stored numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from makers import frame, normal
from torch import Tensor

from rankscope import linalg
from rankscope.linalg import (
    GRAM_MIN_COLUMNS,
    core_singular_values,
    decompose_qr,
    dense_singular_values,
    dense_svd,
    product_svd,
    transpose_matmul,
    triangular_factor,
    ulp,
    working_dtype,
)


def singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Those of left (out, r) · right (r, in), by the way that an update takes: (min(out, r, in),)."""
    return core_singular_values(triangular_factor(left), triangular_factor(right.T))


SHAPES = [(30, 4, 20), (20, 4, 30), (5, 9, 30), (30, 9, 5), (3, 8, 3), (1, 1, 1), (1, 4, 9)]


@pytest.mark.parametrize(("out", "r", "into"), SHAPES)
def test_svd_of_a_product(out: int, r: int, into: int) -> None:
    left, right = normal(out, r), normal(r, into, seed=1)
    M = left.numpy() @ right.numpy()
    U, s, Vt = product_svd(left, right)
    k = min(out, r, into)
    assert (U.shape, s.shape, Vt.shape) == ((out, k), (k,), (k, into))
    assert np.allclose((U * s @ Vt).numpy(), M, atol=1e-12 * s[0].item(), rtol=0)
    assert np.allclose((U.T @ U).numpy(), np.eye(k), atol=1e-13)
    assert np.allclose((Vt @ Vt.T).numpy(), np.eye(k), atol=1e-13)
    expected = np.linalg.svd(M, compute_uv=False)[:k]
    assert np.allclose(s.numpy(), expected, rtol=1e-12)
    assert np.allclose(singular_values(left, right).numpy(), expected, rtol=1e-12)
    (q_left, r_left), (q_right, r_right) = decompose_qr(left), decompose_qr(right.T)
    assert (r_left @ r_right.T).shape == (min(out, r), min(into, r))
    product = q_left.to_dense() @ r_left @ r_right.T @ q_right.to_dense().T
    assert np.allclose(product.numpy(), M, atol=1e-12 * s[0].item(), rtol=0)


def test_small_singular_values_of_a_product_are_right() -> None:
    """Down to 1e-12·σ₁; a route by Gram matrices stops at 1e-8."""
    sigma = 10.0 ** -np.arange(13)
    left, right = frame(60, 13) * torch.from_numpy(sigma), frame(40, 13, seed=1).T
    assert np.allclose(singular_values(left, right).numpy(), sigma, rtol=1e-3)


# Cholesky's route, and what must not go along it

EPS = 2.0**-52


def mixed(d: int, r: int, condition: float, seed: int = 0) -> Tensor:
    """Columns (d, r) of this condition, none of them short: the small directions are mixtures of all."""
    Q = frame(r, r, seed=seed + 50)
    return normal(d, r, seed=seed) @ (Q * torch.logspace(0, -math.log10(condition), r, dtype=torch.float64)) @ Q.T


def edited(d: int, r: int, seed: int, edit: Callable[[Tensor], None]) -> Tensor:
    L = normal(d, r, seed=seed)
    edit(L)
    return L


def twice(L: Tensor) -> None:
    L[:, 3] = L[:, 7]


def nearly_twice(L: Tensor) -> None:
    L[:, 3] = L[:, 7] * (1 + 1e-13)


FACTORS: dict[str, tuple[bool, Callable[[int, int, int], Tensor]]] = {
    # name: (whether Cholesky may serve, maker of (d, r, seed))
    "normal": (True, lambda d, r, s: normal(d, r, seed=s)),
    "of one sign": (True, lambda d, r, s: normal(d, r, seed=s).abs()),
    "orthonormal": (True, lambda d, r, s: frame(d, r, seed=s)),
    "bfloat16": (True, lambda d, r, s: normal(d, r, seed=s, dtype=torch.bfloat16).double()),
    "columns of every size": (
        True,
        lambda d, r, s: normal(d, r, seed=s) * torch.logspace(-9, 9, r, dtype=torch.float64),
    ),
    "large": (True, lambda d, r, s: normal(d, r, seed=s) * 1e60),
    "small": (True, lambda d, r, s: normal(d, r, seed=s) * 1e-60),
    "squares underflow": (False, lambda d, r, s: normal(d, r, seed=s) * 1e-155),
    "squares vanish": (False, lambda d, r, s: normal(d, r, seed=s) * 1e-170),
    "some squares vanish": (False, lambda d, r, s: edited(d, r, s, lambda L: L[:, 2:5].mul_(1e-165))),
    "condition 1e3": (False, lambda d, r, s: mixed(d, r, 1e3, s)),
    "condition 1e8": (False, lambda d, r, s: mixed(d, r, 1e8, s)),
    "condition 1e15": (False, lambda d, r, s: mixed(d, r, 1e15, s)),
    "a column twice": (False, lambda d, r, s: edited(d, r, s, twice)),
    "a column nearly twice": (False, lambda d, r, s: edited(d, r, s, nearly_twice)),
    "a column of zeros": (False, lambda d, r, s: edited(d, r, s, lambda L: L[:, 5].zero_())),
    "zero": (False, lambda d, r, s: torch.zeros(d, r, dtype=torch.float64)),
    "rank one": (False, lambda d, r, s: normal(d, 1, seed=s) @ normal(1, r, seed=s + 1)),
}


def served(tall: Tensor) -> bool:
    """Whether Cholesky's R is taken."""
    found = linalg._certify_cholesky(tall, None)
    return found is not None and found.condition <= linalg._condition_limit(tall)


@pytest.mark.parametrize("name", FACTORS)
def test_which_factors_cholesky_serves(name: str) -> None:
    expected, make = FACTORS[name]
    assert served(make(300, 24, 0)) == expected
    few = make(300, GRAM_MIN_COLUMNS - 1, 0)
    assert not served(few)


@pytest.mark.parametrize("right", FACTORS)
@pytest.mark.parametrize("left", FACTORS)
def test_products_of_all_factors_against_a_dense_svd(left: str, right: str) -> None:
    """Within the cutoff that ``Spectrum`` counts as zero, and orthonormal as far."""
    L, R = FACTORS[left][1](300, 24, 0), FACTORS[right][1](200, 24, 30).T
    # Products of very small columns are normalised first: dense entries would underflow.
    size = [max(float(factor.abs().max()), 1e-300) for factor in (L, R)]
    if L.any() and R.any() and size[0] * size[1] < 1e-290:
        pytest.skip("the product itself underflows")
    U, s, Vt = np.linalg.svd((L / size[0]).numpy() @ (R / size[1]).numpy(), full_matrices=False)
    found = (singular_values(L, R) / size[0] / size[1]).numpy()
    terms = float(((L / size[0]).norm(dim=0) * (R / size[1]).norm(dim=1)).max())
    assert np.allclose(found, s[:24], rtol=0, atol=300 * EPS * max(terms, s[0]))
    u, values, vt = product_svd(L, R)
    assert np.allclose((values / size[0] / size[1]).numpy(), s[:24], rtol=0, atol=300 * EPS * max(terms, s[0]))
    for basis in (u, vt.T):
        assert np.allclose((basis.T @ basis).numpy(), np.eye(24), rtol=0, atol=300 * EPS)
    rebuilt = (u * (values / size[0] / size[1]) @ vt).numpy()
    assert np.allclose(rebuilt, U[:, :24] * s[:24] @ Vt[:24], rtol=0, atol=600 * EPS * max(terms, s[0]))


@pytest.mark.parametrize("condition", [1.0, 3.0, 10.0, 100.0, 1e6])
@pytest.mark.parametrize("d", [40, 300, 5000])
def test_the_certificate_is_a_bound_and_a_close_one(condition: float, d: int) -> None:
    L = mixed(d, 32, condition) * torch.logspace(-4, 4, 32, dtype=torch.float64)
    certified = linalg._certify_cholesky(L, None)
    assert certified is not None
    exact = 1 / float(torch.linalg.svdvals(L / L.norm(dim=0))[-1])
    assert exact * (1 - 1e-6) <= certified.condition <= 32 ** (1 / 8) * exact * (1 + 1e-6)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize(("d", "condition"), [(200, 1.0), (2000, 1.0), (2000, 8.0), (200, 4.0)])
def test_cholesky_keeps_the_digits_that_it_promises(d: int, condition: float, sign: bool) -> None:
    """Against Cholesky in extended precision, as the change of columns of length 1 that would explain it."""
    L = mixed(d, 24, condition)
    L = L.abs() if sign else L
    L = L / L.norm(dim=0)
    certified = linalg._certify_cholesky(L, None)
    assert certified is not None
    exact = extended_cholesky(L.numpy().astype(np.longdouble))
    change = np.linalg.norm((certified.R.numpy() - exact).astype(float), axis=0).max()
    assert change <= math.sqrt(d * 24) / 8 * EPS * certified.condition


def extended_cholesky(L: np.ndarray) -> np.ndarray:
    """R of RᵀR = LᵀL in the precision of L, by definition."""
    if np.finfo(L.dtype).eps > 1e-18:
        pytest.skip("this machine has no extended precision")
    rest, R = L.T @ L, np.zeros((L.shape[1],) * 2, dtype=L.dtype)
    for j in range(len(R)):
        R[j, j:] = rest[j, j:] / np.sqrt(rest[j, j])
        rest -= np.outer(R[j], R[j])
    return R


@pytest.mark.parametrize("spectrum", ["flat", "cliff", "decay"])
@pytest.mark.parametrize("square", [1.0, 5.0])
def test_planted_spectra_come_back_along_every_route(spectrum: str, square: float) -> None:
    """U·diag(s)·M times M⁻¹·Vᵀ: the factors share the condition of M, the product has the planted values."""
    r = 32
    sigma = {
        "flat": np.ones(r),
        "cliff": np.where(np.arange(r) < 5, 1.0, 1e-9),
        "decay": 10.0 ** (-np.arange(r) / 4),
    }[spectrum]
    M = mixed(r, r, square, seed=4)
    left = frame(2000, r) * torch.from_numpy(np.sqrt(sigma)) @ M
    right = torch.linalg.inv(M) @ (torch.from_numpy(np.sqrt(sigma))[:, None] * frame(1500, r, seed=1).T)
    spread = float((left.norm(dim=0) * right.norm(dim=1)).max())
    assert np.allclose(singular_values(left, right).numpy(), sigma, rtol=0, atol=64 * EPS * spread)


def test_factors_that_cancel_keep_what_is_left() -> None:
    """x + (−x) + small: what is left is of the size of the small part, and Cholesky must not touch it."""
    x, y, small = normal(400, 20), normal(20, 300, seed=1), 1e-9
    left = torch.cat((x, -x, small * normal(400, 4, seed=2)), dim=1)
    right = torch.cat((y, y, normal(4, 300, seed=3)))
    expected = np.linalg.svd((left[:, 40:] @ right[40:]).numpy(), compute_uv=False)[:4]
    assert np.allclose(singular_values(left, right)[:4].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("d", "r", "condition"), [(5000, 32, 30.0), (20_000, 17, 330.0)])
def test_directions_are_orthonormal_between_the_limits_too(d: int, r: int, condition: float) -> None:
    """Where values may come from Cholesky's R, but M·R⁻¹ of it would not be orthonormal to a few eps·κ.

    In the second case Cholesky's M·R⁻¹ is off by 50 eps·κ, Householder's by 7.
    """
    L = mixed(d, r, condition)
    certified = linalg._certify_cholesky(L, None)
    assert certified is not None
    kappa = certified.condition
    assert kappa < linalg._condition_limit(L) < kappa**2
    Q, R = decompose_qr(L)
    assert Q.small is not None
    assert np.allclose((Q.to_dense().T @ Q.to_dense()).numpy(), np.eye(r), rtol=0, atol=16 * EPS * kappa)
    assert np.allclose((Q.to_dense() @ R).numpy(), L.numpy(), rtol=0, atol=1e-14 * float(L.norm()))


def test_r_of_either_route_squares_to_the_gram_matrix() -> None:
    for L in (normal(60, 24), normal(60, 8), normal(20, 30), mixed(60, 24, 1e5)):
        R, (Q, other_R) = triangular_factor(L), decompose_qr(L)
        for factor in (R, other_R):
            assert np.allclose(
                (factor.T @ factor).numpy(), (L.T @ L).numpy(), rtol=0, atol=1e-12 * float(L.square().sum())
            )
            assert torch.equal(factor, factor.triu())
        assert np.allclose((Q.to_dense() @ other_R).numpy(), L.numpy(), rtol=0, atol=1e-13 * float(L.norm()))


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 7), (7, 1)])
def test_svd_of_a_matrix_in_both_orientations(shape: tuple[int, int]) -> None:
    M = normal(*shape)
    U, s, Vt = dense_svd(M)
    k = min(shape)
    assert (U.shape, s.shape, Vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert np.allclose((U * s @ Vt).numpy(), M.numpy(), atol=1e-13)
    assert np.allclose(s.numpy(), np.linalg.svd(M.numpy(), compute_uv=False), rtol=1e-12)
    assert np.allclose(dense_singular_values(M).numpy(), s.numpy(), rtol=1e-12)


def spectrum_like(shape: tuple[int, int], sigma: np.ndarray, seed: int = 0) -> Tensor:
    """A float32 matrix with these singular values, to float32 rounding of its entries."""
    U, V = frame(shape[0], len(sigma), seed=seed), frame(shape[1], len(sigma), seed=seed + 1)
    return (U * torch.from_numpy(sigma) @ V.T).float()


def steps(n: int, kind: str) -> np.ndarray:
    at = np.arange(n)
    return {
        "flat": np.ones(n),
        "decay": 10.0 ** (-8 * at / n),
        "cliff": np.where(at < 3, 1.0, 1e-7),
        "pair": np.where(at < 2, [1.0, 1 - 1e-6] + [0] * (n - 2), 1e-3),
    }[kind]


HARD = {
    **{name: lambda m, n, name=name: spectrum_like((m, n), steps(min(m, n), name)) for name in ("decay", "cliff")},
    "flat": lambda m, n: spectrum_like((m, n), steps(min(m, n), "flat")),
    "two near the top": lambda m, n: spectrum_like((m, n), steps(min(m, n), "pair")),
    "rank one, one sign": lambda m, n: torch.outer(normal(m).abs().float(), normal(n, seed=1).abs().float()),
    "integers of rank two": lambda m, n: torch.outer(torch.arange(m) % 7, torch.ones(n)).float() + torch.arange(n) % 5,
    "noise": lambda m, n: normal(m, n).float(),
    "graded rows": lambda m, n: (normal(m, n) * torch.logspace(0, -30, m, dtype=torch.float64)[:, None]).float(),
    "zero": torch.zeros,
}


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("shape", [(300, 300), (700, 120), (120, 700), (8, 2)])
@pytest.mark.parametrize("name", HARD)
def test_squares_in_float64_lose_nothing_that_float32_holds(name: str, shape: tuple[int, int], size: float) -> None:
    """Against float64 svdvals of the same float32 entries: far inside of what ``Spectrum`` counts as zero."""
    M = HARD[name](*shape) * size
    assert linalg.should_use_gram(M if shape[0] >= shape[1] else M.T)
    exact = np.linalg.svd(M.double().numpy(), compute_uv=False)
    found = dense_singular_values(M).numpy()
    assert found.shape == exact.shape
    assert (np.diff(found) <= 0).all()
    assert (found >= 0).all()
    counted_as_zero = math.sqrt(max(shape)) * 2.0**-23 * exact[0]
    assert np.abs(found - exact).max() <= counted_as_zero / 20
    strong = exact > 1e-3 * exact[0]
    assert np.allclose(found[strong], exact[strong], rtol=1e-9, atol=0)
    if name in ("rank one, one sign", "integers of rank two"):  # what is left of the squares is below the cutoff
        rounding = 1 if name.startswith("rank") else 2
        assert (found[rounding:] <= counted_as_zero / 5).all()


def test_squares_are_taken_where_they_are_sooner_and_float32_is_what_is_there() -> None:
    def asked(m: int, n: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> bool:
        return linalg.should_use_gram(torch.empty(1, dtype=dtype, device=device).expand(m, n))

    assert asked(8192, 8192)
    assert not asked(8193, 8193)
    assert asked(50_000, 100)
    assert not asked(100, 100, torch.float64)  # half of its digits would go
    assert asked(50_000, 9000, device="meta")  # any accelerator with float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_transposed_products_by_either_library(dtype: torch.dtype) -> None:
    a, b = normal(40, 6).to(dtype), normal(40, 9, seed=1).to(dtype).requires_grad_()
    several = normal(3, 40, 6, seed=2).to(dtype)
    for one, two in ((a, a), (a, b), (a, normal(9, 40, seed=3).T.to(dtype)), (several, several)):
        found, expected = transpose_matmul(one, two), np.swapaxes(one.numpy(), -1, -2) @ two.detach().numpy()
        assert found.dtype == dtype
        assert np.allclose(found.detach().numpy(), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    M = normal(101, 13).float()
    whole = M.double().T @ M.double()
    for entries in (1, 13 * 7, 10**6):
        monkeypatch.setattr(linalg, "GRAM_BLOCK", entries)
        assert torch.allclose(linalg.gram_lower_triangle(M).tril(), whole.tril(), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("shape", [(50, 40), (40, 50)])
def test_weights_in_training_are_decomposed_too(shape: tuple[int, int]) -> None:
    M = normal(*shape).float().requires_grad_()
    assert np.allclose(dense_singular_values(M).detach().numpy(), np.linalg.svd(M.detach().numpy())[1], rtol=1e-5)


def test_working_precision() -> None:
    assert working_dtype(torch.device("cpu")) == torch.float64
    assert working_dtype(torch.device("mps")) == torch.float32  # which has no float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ulp_is_the_step_to_the_next_number(dtype: torch.dtype) -> None:
    """Against stepping the bit pattern: for a positive number, pattern + 1 is the next larger one."""
    largest = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(torch.int16))
    patterns = torch.arange(0, largest, 7, dtype=torch.int16)  # from zero through every subnormal binade to the top
    numbers, following = patterns.view(dtype), (patterns + 1).view(dtype)
    step = following.double() - numbers.double()
    assert patterns[0] == 0
    assert int((numbers.double() < torch.finfo(dtype).smallest_normal).sum()) > 10
    assert torch.equal(ulp(numbers, dtype).double(), step)
    assert torch.equal(ulp(-numbers, dtype).double(), step)
