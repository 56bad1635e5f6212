"""Decompositions of products and matrices, and the spacing of stored numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from makers import frame, normal

from rankscope.linalg import (
    dense_singular_values,
    dense_svd,
    product_core,
    product_singular_values,
    product_svd,
    ulp,
    working_dtype,
)

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
    assert np.allclose(product_singular_values(left, right).numpy(), expected, rtol=1e-12)
    q_left, core, q_right = product_core(left, right)
    assert core.shape == (min(out, r), min(into, r))
    assert np.allclose((q_left @ core @ q_right.T).numpy(), M, atol=1e-12 * s[0].item(), rtol=0)


def test_small_singular_values_of_a_product_are_right() -> None:
    """Down to 1e-12·σ₁; a route by Gram matrices stops at 1e-8."""
    sigma = 10.0 ** -np.arange(13)
    left, right = frame(60, 13) * torch.from_numpy(sigma), frame(40, 13, seed=1).T
    assert np.allclose(product_singular_values(left, right).numpy(), sigma, rtol=1e-3)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 7), (7, 1)])
def test_svd_of_a_matrix_in_both_orientations(shape: tuple[int, int]) -> None:
    M = normal(*shape)
    U, s, Vt = dense_svd(M)
    k = min(shape)
    assert (U.shape, s.shape, Vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert np.allclose((U * s @ Vt).numpy(), M.numpy(), atol=1e-13)
    assert np.allclose(s.numpy(), np.linalg.svd(M.numpy(), compute_uv=False), rtol=1e-12)
    assert np.allclose(dense_singular_values(M).numpy(), s.numpy(), rtol=1e-12)


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
