"""Matrix work on plain tensors: tensors in, tensors out, no other module of the package.

Small problems are computed in float64 where the device has it, so that rounding in
float32 or bfloat16 factors is never added to by the analysis itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """U (out, k), s (k,) largest first, Vt (k, in); M = U · diag(s) · Vt."""

    U: Tensor
    s: Tensor
    Vt: Tensor


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def may_copy_ahead(device: torch.device) -> bool:
    """Whether the host may go on while a copy to the device runs (``non_blocking``).

    CUDA stages memory that is not pinned before it returns. Apple's GPUs read it later, when it may have been freed:
    github.com/pytorch/pytorch/issues/189690.
    """
    return device.type != "mps"


def product_core(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q_L, core, Q_R with left · right = Q_L · core · Q_Rᵀ; left (out, r), right (r, in).

    The core is min(out, r) × min(in, r): every singular value of the product is one of the core's.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    return q_left, r_left @ r_right.T, q_right


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """Thin SVD of left · right without forming it: two QRs and an SVD of size r. O((out + in) r²)."""
    q_left, core, q_right = product_core(left, right)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return SVD(q_left @ u, s, vt @ q_right.T)


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left · right, largest first, min(out, r, in) of them."""
    values: Tensor = torch.linalg.svdvals(product_core(left, right)[1])
    return values


def dense_svd(matrix: Tensor) -> SVD:
    """Thin SVD, taken in the tall orientation: LAPACK is several times slower on wide matrices."""
    if matrix.shape[0] >= matrix.shape[1]:
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    u, s, vt = torch.linalg.svd(matrix.T, full_matrices=False)
    return SVD(vt.T, s, u.T)


def dense_singular_values(matrix: Tensor) -> Tensor:
    """All singular values, largest first, in the tall orientation."""
    values: Tensor = torch.linalg.svdvals(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T)
    return values


def ulp(weight: Tensor, stored: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of the dtype ``stored`` around each entry; float32 tensor."""
    info = torch.finfo(stored)
    _, exponent = torch.frexp(weight.float())
    # frexp has its mantissa in [.5, 1): the leading bit is worth 2^(exponent - 1).
    spacing = torch.ldexp(torch.full_like(weight, info.eps, dtype=torch.float32), exponent - 1)
    # Zero has no leading bit (frexp says 2^-1): its neighbours are the smallest subnormals.
    return spacing.masked_fill(weight == 0, 0.0).clamp(min=info.smallest_normal * info.eps)
