"""Matrix work on plain tensors: tensors in, tensors out, no other module of the package.

Small problems are computed in float64 where the device has it, so that rounding in
float32 or bfloat16 factors is never added to by the analysis itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GRAM_MIN_COLUMNS = 17
"""Columns from which Cholesky of a Gram matrix is worth its certificate; up to here Householder's QR is as fast."""
GRAM_MAX_SIDE = 8192
"""Smaller side up to which a CPU has all σ of a float32 matrix sooner from its float64 Gram matrix than from an SVD."""
GRAM_BLOCK = 2**22
"""Entries of a float32 matrix that are turned into float64 at a time: 32 MB."""
KRYLOV_BLOCK = 16
"""Columns by which a Krylov space grows."""
KRYLOV_COLUMNS = 5
"""Columns of a Krylov space for each singular value that is wanted of it, and ``KRYLOV_BLOCK`` times twice as many at
least."""
LARGEST_ENTRY = 1e30
"""Above this a float32 matrix is scaled before it is multiplied, as sums over its rows and columns may overflow."""
SMALLEST_SQUARE = 1e-280
"""Below this, and above its inverse, squares and their sums begin to lose digits."""


class SVD(NamedTuple):
    """U (out, k), s (k,) largest first, Vt (k, in); M = U · diag(s) · Vt."""

    U: Tensor
    s: Tensor
    Vt: Tensor


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def supports_non_blocking(device: torch.device) -> bool:
    """Whether the host may go on while a copy to the device runs (``non_blocking``).

    CUDA stages memory that is not pinned before it returns. Apple's GPUs read it later, when it may have been freed:
    github.com/pytorch/pytorch/issues/189690.
    """
    return device.type != "mps"


class Basis(NamedTuple):
    """Orthonormal columns (d, k) kept as ``tall`` · ``small``, (d, r) and (r, k); ``small`` None is the identity."""

    tall: Tensor
    small: Tensor | None = None

    def top(self, k: int) -> Basis:
        """The first k columns."""
        return Basis(self.tall[:, :k]) if self.small is None else Basis(self.tall, self.small[:, :k])

    def to_dense(self) -> Tensor:
        """The columns, multiplied out."""
        return self.tall if self.small is None else self.tall @ self.small

    def times(self, other: Tensor) -> Tensor:
        """basis · other, other (k, n): (d, n)."""
        return self.tall @ (other if self.small is None else self.small @ other)

    def coordinates(self, other: Basis) -> Tensor:
        """selfᵀ · other, (k, l): one product of the tall factors, all else is small."""
        product = transpose_matmul(self.tall, other.tall)
        product = product if self.small is None else self.small.T @ product
        return product if other.small is None else product @ other.small


class FactoredSVD(NamedTuple):
    """M = U · diag(s) · Vᵀ, U (out, k) and V (in, k) as they were found, not multiplied out; s may be on the host."""

    U: Basis
    s: Tensor
    V: Basis

    def to_svd(self) -> SVD:
        U = self.U.to_dense()
        return SVD(U, self.s.to(U.device), self.V.to_dense().T)


def transpose_matmul(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ·b, a (…, d, r) and b (…, d, s).

    In float64 on the host by numpy: its BLAS takes half the time where b is a, as aᵀa is symmetric, and for thin
    factors was measured to take two thirds of what torch's takes.
    """
    if a.device.type != "cpu" or not a.dtype == b.dtype == torch.float64:
        return a.mT @ b
    return torch.from_numpy(np.matmul(a.detach().mT.numpy(), b.detach().numpy()))


def gram(tall: Tensor) -> Tensor | None:
    """MᵀM of M (…, d, r) where squares may do: in float64, r ≤ d, and on a CPU r ≥ ``GRAM_MIN_COLUMNS``; else None."""
    least = GRAM_MIN_COLUMNS if tall.device.type == "cpu" else 1  # on a GPU a QR costs many times what the product does
    if tall.dtype != torch.float64 or not least <= tall.shape[-1] <= tall.shape[-2]:
        return None
    return transpose_matmul(tall, tall)


def triangular_factor(tall: Tensor, squared: Tensor | None = None) -> Tensor:
    """R (min(d, r), r) of M = Q · R for M (d, r), on the host: by Cholesky where proven as good, or by Householder.

    The Gram matrix of columns of length 1 is wrong by at most √(d·r)/8·eps (measured: up to .11·√(d·r)·eps, for columns
    of one sign, and a fifth of it for signs at random). With κ = ‖R⁻¹‖ for such columns, R is then exact for columns
    that are off by √(d·r)/8·eps·κ of their length (Householder's: a few eps), and M·R⁻¹ is orthonormal to
    √(d·r)/4·eps·κ². R⁻¹ itself bounds κ. Cholesky's R is taken while values cannot move by more than d·eps/2, half of
    what ``Spectrum.cutoff`` calls zero: κ ≤ 4√(d/r); where vectors are made of it (``decompose_qr``), κ² ≤ 4√(d/r).

    Args:
        squared: MᵀM, where it is known.
    """
    found = _certify_cholesky(tall, squared)
    if found is not None and found.condition <= _condition_limit(tall):
        return found.R
    R: Tensor = torch.linalg.qr(tall, mode="r")[1].cpu()
    return R


def decompose_qr(tall: Tensor, squared: Tensor | None = None) -> tuple[Basis, Tensor]:
    """Q, where M is, and R, on the host: as ``triangular_factor``.

    Between the two limits Householder's R serves, with which M·R⁻¹ is orthonormal to a few eps·κ.
    """
    found = _certify_cholesky(tall, squared)
    if found is not None and found.condition <= _condition_limit(tall):
        R, inverse = found.R, found.inverse
        if found.condition**2 > _condition_limit(tall):
            R = torch.linalg.qr(tall, mode="r")[1].cpu()
            inverse = _inverse(R)[0]
        return Basis(tall, inverse.to(tall.device)), R
    Q, R = torch.linalg.qr(tall)
    return Basis(Q), R.cpu()


class _CertifiedCholesky(NamedTuple):
    """Cholesky's R with R⁻¹ and a bound on κ (``triangular_factor``)."""

    R: Tensor
    inverse: Tensor
    condition: float


def _condition_limit(tall: Tensor) -> float:
    d, r = tall.shape
    return 4 * math.sqrt(d / r)


def _certify_cholesky(tall: Tensor, squared: Tensor | None) -> _CertifiedCholesky | None:
    squared = gram(tall) if squared is None else squared
    R = None if squared is None else _cholesky(squared.cpu())
    return None if R is None else _CertifiedCholesky(R, *_inverse(R))


def _cholesky(squared: Tensor) -> Tensor | None:
    """R of RᵀR; None where it is not positive definite, or squares left the range in which they keep their digits."""
    diagonal = squared.diagonal()
    R, failed = torch.linalg.cholesky_ex(squared, upper=True)
    in_range = bool((diagonal > SMALLEST_SQUARE).all() and (diagonal < 1 / SMALLEST_SQUARE).all())
    return R if in_range and not failed else None


def _inverse(R: Tensor) -> tuple[Tensor, float]:
    """R⁻¹, and a bound on its norm for columns of length 1: D·R⁻¹ with D the lengths of R's columns.

    (Σσ⁸)^⅛ is at least the largest σ, and at most r^⅛ times as large.
    """
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
    scaled = inverse * torch.linalg.vector_norm(R, dim=0)[:, None]
    fourth = torch.linalg.matrix_power(scaled @ scaled.T, 2)
    return inverse, float(torch.linalg.matrix_norm(fourth)) ** 0.25


def factored_product_svd(
    left: Tensor, right: Tensor, scale: float = 1.0, squared: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[FactoredSVD, tuple[Tensor, Tensor]]:
    """Thin SVD of scale · left · right, left (out, r) and right (r, in), and both triangles that it came from.

    O((out + in) r²); nothing of the product's size is formed, and U and V are left as factors. ``gram_lower_triangle``: the Gram
    matrices leftᵀ·left and right·rightᵀ, where they are known.
    """
    (q_left, r_left), (q_right, r_right) = decompose_qr(left, squared[0]), decompose_qr(right.T, squared[1])
    u, s, vt = torch.linalg.svd(r_left @ r_right.T * scale, full_matrices=False)
    return FactoredSVD(_rotate(q_left, u), s, _rotate(q_right, vt.T)), (r_left, r_right)


def _rotate(basis: Basis, by: Tensor) -> Basis:
    """The columns of basis · by."""
    by = by.to(basis.tall.device)
    return Basis(basis.tall, by if basis.small is None else basis.small @ by)


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """Thin SVD of left · right without forming it. O((out + in) r²)."""
    return factored_product_svd(left, right)[0].to_svd()


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of left · right, largest first, min(out, r, in) of them, on the host."""
    return core_singular_values(triangular_factor(left), triangular_factor(right.T))


def core_singular_values(R_left: Tensor, R_right: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values of scale · R_L · R_Rᵀ, which are those of the product the triangles belong to."""
    values: Tensor = torch.linalg.svdvals(R_left @ R_right.T * scale)
    return values


def dense_svd(matrix: Tensor) -> SVD:
    """Thin SVD, taken in the tall orientation: LAPACK is several times slower on wide matrices.

    On a GPU in float64: cusolver's float32 values were measured to be off by more than float32 rounding.
    """
    matrix = matrix if matrix.device.type == "cpu" else matrix.to(working_dtype(matrix.device))
    if matrix.shape[0] >= matrix.shape[1]:
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    u, s, vt = torch.linalg.svd(matrix.T, full_matrices=False)
    return SVD(vt.T, s, u.T)


def dense_singular_values(matrix: Tensor) -> Tensor:
    """All singular values, largest first: as roots of the eigenvalues of MᵀM where ``should_use_gram`` says so, by SVD else."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if not should_use_gram(tall):
        values: Tensor = torch.linalg.svdvals(tall)
        return values
    eigenvalues = torch.linalg.eigvalsh(gram_lower_triangle(tall))  # of the lower triangle
    found: Tensor = eigenvalues.flip(0).clamp(min=0).sqrt()
    return found


def should_use_gram(tall: Tensor) -> bool:
    """Whether MᵀM in float64 gives the singular values of M (m, n), n ≤ m, as well as an SVD of M, and sooner.

    The eigenvalues are right to some √m·2⁻⁵³·σ₁²: a σ below 1e-8·m^¼·σ₁ is noise of that size, and all above are right
    to float32 rounding of σ₁ and better. An SVD in float32 leaves noise of some 1e-7·σ₁, and ``Spectrum`` counts what
    is below √m·1.2e-7·σ₁ as zero, so for float32 numbers nothing is lost; for float64 ones half of the digits would be.
    On a GPU always: large products are what it is made for, and Jacobi's method, which cusolver takes, is not.
    """
    if tall.dtype != torch.float32 or working_dtype(tall.device) != torch.float64:
        return False
    return tall.device.type != "cpu" or tall.shape[1] <= GRAM_MAX_SIDE


def gram_lower_triangle(tall: Tensor) -> Tensor:
    """The lower triangle of MᵀM (n, n) in float64, of M (m, n), which becomes float64 a block of rows at a time."""
    n = tall.shape[1]
    blocks = (rows.to(torch.float64) for rows in _row_blocks(tall))
    if tall.device.type == "cpu":
        return _lower_triangle(blocks, n)
    total = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for part in blocks:
        total.addmm_(part.T, part)
    return total


def _lower_triangle(blocks: Iterable[Tensor], n: int) -> Tensor:
    """As ``gram_lower_triangle``: BLAS has a product of a matrix with its transpose, at half the cost; torch does not offer it."""
    from scipy.linalg.blas import dsyrk

    total = np.zeros((n, n), order="F")  # a Fortran upper triangle is, transposed, a lower one of C
    for part in blocks:
        lies = part.detach().numpy()
        turned = lies.flags.f_contiguous  # of a wide matrix; dsyrk copies what does not lie as Fortran has it
        total = dsyrk(1.0, lies if turned else lies.T, trans=turned, beta=1.0, c=total, overwrite_c=True)
    return torch.from_numpy(total.T)


class LeadingTriplets(NamedTuple):
    """The k largest singular triplets of M as far as they were found.

    ``svd``: U (out, k) and Vt (k, in) orthonormal to float64, s the singular values of M·V, so s_l ≤ σ_l.
    ``residuals``: (k,), ‖Mᵀu_l − s_l·v_l‖. ``further``: Ritz values after those k, to float32 precision.
    """

    svd: SVD
    residuals: Tensor
    further: Tensor


def sketch_is_cheaper(shape: tuple[int, int], k: int) -> bool:
    """Whether ``leading_triplets`` costs well below all singular values: where its space is a small part of the whole."""
    return 4 * krylov_columns(k) <= min(shape)


def krylov_columns(k: int) -> int:
    """Columns of the Krylov space that ``leading_triplets`` builds for k singular values."""
    return KRYLOV_COLUMNS * max(k, 2 * KRYLOV_BLOCK)


def leading_triplets(matrix: Tensor, k: int, columns: int | None = None, seed: int = 0) -> LeadingTriplets:
    """The k largest singular triplets of a float32 matrix by block Krylov (Musco & Musco 2015, algorithm 2).

    The space is that of (MᵀM)^q·G for a Gaussian block G of ``KRYLOV_BLOCK`` columns, each new block orthogonalised
    against all before it, twice. Blocks narrower than k reach higher powers for the same number of columns: at 2048²,
    k = 64, a block of 72 was 10 to 10⁵ times less accurate. Products of the matrix with the space run in its own
    precision; the final Rayleigh–Ritz step, on k columns, in float64.

    Args:
        columns: of the space; None takes ``krylov_columns``. Never fewer than k, nor more than the smaller side.
        seed: of the starting block, which is drawn on the host: the same on every device.
    """
    largest = float(torch.stack(matrix.aminmax()).abs().max())
    if largest > LARGEST_ENTRY:
        (U, s, Vt), *others = leading_triplets(matrix / largest, k, columns, seed)
        return LeadingTriplets(SVD(U, s * largest, Vt), *(values * largest for values in others))
    columns = max(k, min(columns or krylov_columns(k), *matrix.shape))
    basis, images = _krylov_basis(matrix, columns, seed)
    working = working_dtype(matrix.device)
    images = images.to(working)
    values, vectors = torch.linalg.eigh(transpose_matmul(images, images))
    top = torch.linalg.qr(basis.to(working) @ vectors.flip(1)[:, :k])[0]
    Q, R = torch.linalg.qr(_times(matrix, top))
    u, s, vt = torch.linalg.svd(R)
    U, Vt = Q @ u, vt @ top.T
    residuals = torch.linalg.vector_norm(_times_transposed(matrix, U) - Vt.T * s, dim=0)
    return LeadingTriplets(SVD(U, s, Vt), residuals, values.flip(0)[k:].clamp(min=0).sqrt())


def _krylov_basis(matrix: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (in, ``columns``) of the Krylov space, and matrix · columns."""
    source = torch.Generator().manual_seed(seed)
    images, basis = (matrix.new_zeros(side, columns) for side in matrix.shape)
    image = matrix.new_zeros(len(matrix), KRYLOV_BLOCK)
    for at in range(0, columns, KRYLOV_BLOCK):
        block, before = (_of_size_one(image).T @ matrix).T, basis[:, :at]  # twice as fast as matrix.T @ image
        # At the size of rounding: where the matrix leaves nothing, or not enough, random directions go on.
        random = torch.randn(block.shape, generator=source).to(matrix)
        block = (_of_size_one(block) + torch.finfo(matrix.dtype).eps * random)[:, : columns - at]
        for _ in range(3):
            block = torch.linalg.qr(block - before @ (before.T @ block))[0]
        image = matrix @ block
        basis[:, at : at + KRYLOV_BLOCK], images[:, at : at + KRYLOV_BLOCK] = block, image
    return basis, images


def _of_size_one(matrix: Tensor) -> Tensor:
    """Scaled to a largest entry of 1, so that products stay in the range of the dtype; zero stays zero."""
    return matrix / matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)


def _times(matrix: Tensor, other: Tensor) -> Tensor:
    """matrix · other in the precision of ``other``, to which the matrix is brought a block of rows at a time."""
    return torch.cat([rows.to(other.dtype) @ other for rows in _row_blocks(matrix)])


def _times_transposed(matrix: Tensor, other: Tensor) -> Tensor:
    """matrixᵀ · other, likewise; summed as otherᵀ · matrix, for which torch takes two thirds of the time."""
    total, at = other.new_zeros(other.shape[1], matrix.shape[1]), 0
    for rows in _row_blocks(matrix):
        total.addmm_(other[at : at + len(rows)].T, rows.to(other.dtype))
        at += len(rows)
    return total.T


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in blocks of ``GRAM_BLOCK`` entries."""
    return torch.split(matrix, max(1, GRAM_BLOCK // matrix.shape[1]))


def ulp(weight: Tensor, stored: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of the dtype ``stored`` around each entry; float32 tensor."""
    info = torch.finfo(stored)
    _, exponent = torch.frexp(weight.float())
    # frexp has its mantissa in [.5, 1): the leading bit is worth 2^(exponent - 1).
    spacing = torch.ldexp(torch.full_like(weight, info.eps, dtype=torch.float32), exponent - 1)
    # Zero has no leading bit (frexp says 2^-1): its neighbours are the smallest subnormals.
    return spacing.masked_fill(weight == 0, 0.0).clamp(min=info.smallest_normal * info.eps)
