"""PiSSA (Meng et al. 2024): an adapter that starts from the largest singular directions of the weight itself.

The paper subtracts those directions from the base: W = W_res + s · B0 A0. Here the base is shared and never written to,
so the adapter adds s · (B A − B0 A0) to W: the same function, the same gradients of A and B, and a true update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankscope.linalg import SVD, dense_svd


def sign_fixed_svd(matrix: Tensor) -> SVD:
    """Thin SVD of a weight (out, in), at least in float32, with the largest entry of each column of U positive.

    With these signs the same weight gives the same start on every machine.
    """
    U, s, Vt = dense_svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return SVD(U * signs, s, Vt * signs.T)


def pissa_factors(svd: SVD, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A0 = √(S / scale) Vᵀ (r, in) and B0 = U √(S / scale) (out, r) of the largest r directions, as in PEFT."""
    root = (svd.s[:rank] / scale).sqrt()
    return root[:, None] * svd.Vt[:rank], svd.U[:, :rank] * root


def difference_factors(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (…, 2r, in) and (…, out, 2r) of B A − B0 A0, where A and A0 are (…, r, in), B and B0 (…, out, r).

    They are those of (B − B0) A + B0 (A − A0), which is exactly zero at the start. With [B, −B0] [A; A0], which PEFT
    writes to files, the update would be the small difference of two large products.
    """
    return torch.cat((A, A - A0), dim=-2), torch.cat((B - B0, B0), dim=-1)
