"""Linear algebra on plain tensors: decompositions of products and matrices. Imports no other module of the package.

Small problems are computed in float64 where the device has it, so that the analysis adds nothing to the rounding that
float32 or bfloat16 factors already have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GRAM_MIN_COLUMNS = 17
"""From this many columns on, Cholesky of a Gram matrix is faster than Householder's QR, its certificate included."""
GRAM_MAX_SIDE = 8192
"""Up to this smaller side, a CPU computes all σ of a float32 matrix faster from its float64 Gram matrix than by SVD."""
GRAM_BLOCK = 2**22
"""Entries of a float32 matrix that are converted to float64 at a time: 32 MB."""
KRYLOV_BLOCK = 16
"""Columns by which a Krylov space grows."""
KRYLOV_COLUMNS = 5
"""Columns of a Krylov space per requested singular value, of which at least twice ``KRYLOV_BLOCK`` are counted."""
LARGEST_ENTRY = 1e30
"""A float32 matrix with a larger entry is scaled before it is multiplied: sums over its rows may overflow."""
SMALLEST_SQUARE = 1e-280
"""Squares below this, or above its inverse, and their sums begin to lose digits."""


class SVD(NamedTuple):
    """U (out, k), s (k,) largest first, Vt (k, in); M = U · diag(s) · Vt."""

    U: Tensor
    s: Tensor
    Vt: Tensor


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def supports_non_blocking(device: torch.device) -> bool:
    """Whether the host may continue while a copy to the device runs (``non_blocking``).

    CUDA stages memory that is not pinned before the call returns. Apple's GPUs read it later, when it may have been
    freed: github.com/pytorch/pytorch/issues/189690.
    """
    return device.type != "mps"


class Basis(NamedTuple):
    """Orthonormal columns (d, k), kept as the factors ``tall`` (d, r) · ``small`` (r, k); None is the identity."""

    tall: Tensor
    small: Tensor | None = None

    def top(self, k: int) -> Basis:
        """The first k columns, (d, k)."""
        return Basis(self.tall[:, :k]) if self.small is None else Basis(self.tall, self.small[:, :k])

    def to_dense(self) -> Tensor:
        """The columns as one matrix (d, k)."""
        return self.tall if self.small is None else self.tall @ self.small

    def times(self, other: Tensor) -> Tensor:
        """basis · other for other (k, n): (d, n)."""
        return self.tall @ (other if self.small is None else self.small @ other)

    def coordinates(self, other: Basis) -> Tensor:
        """selfᵀ · other, (k, l), for another basis (d, l). The only large product is that of the tall factors."""
        product = transpose_matmul(self.tall, other.tall)  # (r, r')
        product = product if self.small is None else self.small.T @ product
        return product if other.small is None else product @ other.small


class FactoredSVD(NamedTuple):
    """M = U · diag(s) · Vᵀ with s (k,), and U (out, k) and V (in, k) as factors; s may be on the host."""

    U: Basis
    s: Tensor
    V: Basis

    def to_svd(self) -> SVD:
        """The same with U (out, k) and Vt (k, in) as matrices, and s on their device."""
        U = self.U.to_dense()
        return SVD(U, self.s.to(U.device), self.V.to_dense().T)


def transpose_matmul(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ·b, (…, r, s), for a (…, d, r) and b (…, d, s).

    numpy computes float64 products on the host. Where b is a, aᵀa is symmetric and numpy's BLAS takes half the time;
    for thin factors it was measured to take two thirds of the time of torch's.
    """
    if a.device.type != "cpu" or not a.dtype == b.dtype == torch.float64:
        return a.mT @ b
    return torch.from_numpy(np.matmul(a.detach().mT.numpy(), b.detach().numpy()))


def gram(tall: Tensor) -> Tensor | None:
    """MᵀM, (…, r, r), for M (…, d, r), where ``triangular_factor`` can use it; else None.

    It can for float64 and r ≤ d, and on a CPU for r ≥ ``GRAM_MIN_COLUMNS``.
    """
    least = GRAM_MIN_COLUMNS if tall.device.type == "cpu" else 1  # on a GPU, QR costs many times as much as the product
    if tall.dtype != torch.float64 or not least <= tall.shape[-1] <= tall.shape[-2]:
        return None
    return transpose_matmul(tall, tall)


def triangular_factor(tall: Tensor, squared: Tensor | None = None) -> Tensor:
    """R (min(d, r), r) of M = Q · R for M (d, r), on the host.

    Cholesky of MᵀM gives R where it is certified to be as good as Householder's QR; else Householder's QR does.

    The Gram matrix of columns of length 1 has errors of at most √(d·r)/8·eps (measured: up to .11·√(d·r)·eps for
    columns of one sign, and a fifth of that for random signs). Let κ = ‖R⁻¹‖ for such columns. Then R is exact for
    columns that are changed by √(d·r)/8·eps·κ of their length (Householder's R: by a few eps), and M·R⁻¹ is orthonormal
    to √(d·r)/4·eps·κ². R⁻¹ itself bounds κ. Cholesky's R is used while no singular value can move by more than d·eps/2,
    half of ``Spectrum.cutoff``: κ ≤ 4√(d/r). ``decompose_qr``, which needs M·R⁻¹ too, requires κ² ≤ 4√(d/r).

    Args:
        squared: MᵀM (r, r), where it is known.
    """
    certified = _certify_cholesky(tall, squared)
    if certified is not None and certified.condition <= _condition_limit(tall):
        return certified.R
    R: Tensor = torch.linalg.qr(tall, mode="r")[1].cpu()
    return R


def decompose_qr(tall: Tensor, squared: Tensor | None = None) -> tuple[Basis, Tensor]:
    """Q (d, min(d, r)) on M's device and R (min(d, r), r) on the host, of M = Q · R for M (d, r).

    R comes from Cholesky or Householder's QR as in ``triangular_factor``. Between the two limits on κ there, R is
    Householder's, with which M·R⁻¹ is orthonormal to a few eps·κ.

    Args:
        squared: MᵀM (r, r), where it is known.
    """
    certified = _certify_cholesky(tall, squared)
    if certified is not None and certified.condition <= _condition_limit(tall):
        R, inverse = certified.R, certified.inverse
        if certified.condition**2 > _condition_limit(tall):
            R = torch.linalg.qr(tall, mode="r")[1].cpu()
            inverse = _inverse(R)[0]
        return Basis(tall, inverse.to(tall.device)), R
    Q, R = torch.linalg.qr(tall)
    return Basis(Q), R.cpu()


class _CertifiedCholesky(NamedTuple):
    """Cholesky's R (r, r), R⁻¹ (r, r), and an upper bound on the κ of ``triangular_factor``."""

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
    """R (r, r) of the Gram matrix RᵀR.

    None where that is not positive definite, or where its squares are so small or large that they lose digits.
    """
    diagonal = squared.diagonal()
    R, failed = torch.linalg.cholesky_ex(squared, upper=True)
    in_range = bool((diagonal > SMALLEST_SQUARE).all() and (diagonal < 1 / SMALLEST_SQUARE).all())
    return R if in_range and not failed else None


def _inverse(R: Tensor) -> tuple[Tensor, float]:
    """R⁻¹ (r, r), and an upper bound on ‖D·R⁻¹‖, where D holds the lengths of R's columns.

    The bound is (Σσ⁸)^⅛ over the σ of D·R⁻¹: at least the largest σ, and at most r^⅛ times as large.
    """
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
    scaled = inverse * torch.linalg.vector_norm(R, dim=0)[:, None]
    fourth = torch.linalg.matrix_power(scaled @ scaled.T, 2)
    return inverse, float(torch.linalg.matrix_norm(fourth)) ** 0.25


def factored_product_svd(
    left: Tensor, right: Tensor, scale: float = 1.0, squared: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[FactoredSVD, tuple[Tensor, Tensor]]:
    """Thin SVD of scale · left · right for left (out, r) and right (r, in), and the R of left and of rightᵀ.

    O((out + in) r²). Nothing of the product's size (out, in) is formed; U and V stay factors.

    Args:
        squared: the Gram matrices leftᵀ·left and right·rightᵀ, both (r, r), where they are known.
    """
    (q_left, r_left), (q_right, r_right) = decompose_qr(left, squared[0]), decompose_qr(right.T, squared[1])
    u, s, vt = torch.linalg.svd(r_left @ r_right.T * scale, full_matrices=False)
    return FactoredSVD(_rotate(q_left, u), s, _rotate(q_right, vt.T)), (r_left, r_right)


def _rotate(basis: Basis, by: Tensor) -> Basis:
    """The columns basis · by, (d, l), for by (k, l)."""
    by = by.to(basis.tall.device)
    return Basis(basis.tall, by if basis.small is None else basis.small @ by)


def product_svd(left: Tensor, right: Tensor) -> SVD:
    """Thin SVD of left · right for left (out, r) and right (r, in), without forming the product. O((out + in) r²)."""
    return factored_product_svd(left, right)[0].to_svd()


def core_singular_values(R_left: Tensor, R_right: Tensor, scale: float = 1.0) -> Tensor:
    """Singular values (min(k, l),), largest first, of scale · R_L · R_Rᵀ for R_L (k, r) and R_R (l, r).

    They are those of scale · left · right, where R_L is the R of left and R_R that of rightᵀ.
    """
    values: Tensor = torch.linalg.svdvals(R_left @ R_right.T * scale)
    return values


def dense_svd(matrix: Tensor) -> SVD:
    """Thin SVD of a matrix (out, in). A wide matrix is transposed for it: LAPACK is several times slower on wide ones.

    On a GPU it is computed in float64: cusolver's float32 values were measured to have errors above float32 rounding.
    """
    matrix = matrix if matrix.device.type == "cpu" else matrix.to(working_dtype(matrix.device))
    if matrix.shape[0] >= matrix.shape[1]:
        return SVD(*torch.linalg.svd(matrix, full_matrices=False))
    u, s, vt = torch.linalg.svd(matrix.T, full_matrices=False)
    return SVD(vt.T, s, u.T)


def dense_singular_values(matrix: Tensor) -> Tensor:
    """All singular values (min(out, in),), largest first, of a matrix (out, in).

    They are the square roots of the eigenvalues of MᵀM where ``should_use_gram`` says so; else an SVD gives them.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if not should_use_gram(tall):
        values: Tensor = torch.linalg.svdvals(tall)
        return values
    eigenvalues = torch.linalg.eigvalsh(gram_lower_triangle(tall))  # reads the lower triangle alone
    roots: Tensor = eigenvalues.flip(0).clamp(min=0).sqrt()
    return roots


def should_use_gram(tall: Tensor) -> bool:
    """Whether MᵀM in float64 gives the singular values of M (m, n), n ≤ m, as precisely as an SVD of M, and faster.

    The eigenvalues have errors of about √m·2⁻⁵³·σ₁²: a σ below 1e-8·m^¼·σ₁ is noise of that size, and all above have
    float32 precision relative to σ₁ or better. An SVD in float32 leaves noise of about 1e-7·σ₁, and ``Spectrum`` counts
    what is below √m·1.2e-7·σ₁ as zero. So nothing is lost for float32 numbers; float64 ones would lose half their
    digits. A GPU always uses the Gram matrix: its products are fast, while cusolver's Jacobi method is slow.
    """
    if tall.dtype != torch.float32 or working_dtype(tall.device) != torch.float64:
        return False
    return tall.device.type != "cpu" or tall.shape[1] <= GRAM_MAX_SIDE


def gram_lower_triangle(tall: Tensor) -> Tensor:
    """The lower triangle of MᵀM (n, n) in float64, for M (m, n), which is converted a block of rows at a time."""
    n = tall.shape[1]
    blocks = (rows.to(torch.float64) for rows in _row_blocks(tall))
    if tall.device.type == "cpu":
        return _lower_triangle(blocks, n)
    total = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for part in blocks:
        total.addmm_(part.T, part)
    return total


def _lower_triangle(blocks: Iterable[Tensor], n: int) -> Tensor:
    """``gram_lower_triangle`` from blocks of rows (m, n), by BLAS's dsyrk, which torch lacks: half the cost."""
    from scipy.linalg.blas import dsyrk

    total = np.zeros((n, n), order="F")  # the upper triangle in Fortran's order; transposed, the lower one in C's
    for block in blocks:
        rows = block.detach().numpy()
        by_columns = rows.flags.f_contiguous  # blocks of a transposed wide matrix; dsyrk copies any other order
        total = dsyrk(1.0, rows if by_columns else rows.T, trans=by_columns, beta=1.0, c=total, overwrite_c=True)
    return torch.from_numpy(total.T)


class LeadingTriplets(NamedTuple):
    """Approximations of the k largest singular triplets of M (out, in).

    ``svd``: U (out, k) and Vt (k, in) orthonormal to float64, s the singular values of M·V, so s_l ≤ σ_l.
    ``residuals``: (k,), ‖Mᵀu_l − s_l·v_l‖. ``further``: the Ritz values after those, (columns − k,), in float32.
    """

    svd: SVD
    residuals: Tensor
    further: Tensor


def sketch_is_cheaper(shape: tuple[int, int], k: int) -> bool:
    """Whether ``leading_triplets`` costs much less than all singular values of a matrix (out, in).

    It does where the Krylov space has at most a quarter of the dimensions of the smaller side.
    """
    return 4 * krylov_columns(k) <= min(shape)


def krylov_columns(k: int) -> int:
    """Columns of the Krylov space that ``leading_triplets`` builds for k singular values."""
    return KRYLOV_COLUMNS * max(k, 2 * KRYLOV_BLOCK)


def leading_triplets(matrix: Tensor, k: int, columns: int | None = None, seed: int = 0) -> LeadingTriplets:
    """The k largest singular triplets of a float32 matrix (out, in) by block Krylov (Musco & Musco 2015, algorithm 2).

    The space is spanned by (MᵀM)^q·G for a Gaussian block G of ``KRYLOV_BLOCK`` columns; each new block is
    orthogonalised three times, against all before it. Blocks narrower than k reach higher powers for the same number of
    columns: at 2048 × 2048 and k = 64, a block of 72 was 10 to 10⁵ times less accurate. Products of the matrix with the
    space run in the matrix's precision; the final Rayleigh–Ritz step, on k columns, runs in float64.

    Args:
        columns: of the space; None is ``krylov_columns``. At least k and at most the smaller side are used.
        seed: of the starting block, which is drawn on the host and so the same on every device.
    """
    largest = float(torch.stack(matrix.aminmax()).abs().max())
    if largest > LARGEST_ENTRY:
        (U, s, Vt), *others = leading_triplets(matrix / largest, k, columns, seed)
        return LeadingTriplets(SVD(U, s * largest, Vt), *(values * largest for values in others))
    columns = max(k, min(columns or krylov_columns(k), *matrix.shape))
    basis, images = _krylov_basis(matrix, columns, seed)  # (in, columns), (out, columns)
    working = working_dtype(matrix.device)
    images = images.to(working)
    values, vectors = torch.linalg.eigh(transpose_matmul(images, images))  # (columns,), (columns, columns), ascending
    top = torch.linalg.qr(basis.to(working) @ vectors.flip(1)[:, :k])[0]  # (in, k)
    Q, R = torch.linalg.qr(_times(matrix, top))  # (out, k), (k, k)
    u, s, vt = torch.linalg.svd(R)
    U, Vt = Q @ u, vt @ top.T  # (out, k), (k, in)
    residuals = torch.linalg.vector_norm(_times_transposed(matrix, U) - Vt.T * s, dim=0)
    return LeadingTriplets(SVD(U, s, Vt), residuals, values.flip(0)[k:].clamp(min=0).sqrt())


def _krylov_basis(matrix: Tensor, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (in, columns) that span the Krylov space of a matrix (out, in), and its product with them."""
    source = torch.Generator().manual_seed(seed)
    images, basis = (matrix.new_zeros(side, columns) for side in matrix.shape)
    image = matrix.new_zeros(len(matrix), KRYLOV_BLOCK)
    for at in range(0, columns, KRYLOV_BLOCK):
        # (in, 16) and (in, at). (imageᵀ · matrix)ᵀ is twice as fast as matrixᵀ · image.
        block, before = (_scale_to_one(image).T @ matrix).T, basis[:, :at]
        # Random directions of the size of rounding: they continue where the matrix maps the block to nothing.
        random = torch.randn(block.shape, generator=source).to(matrix)
        block = (_scale_to_one(block) + torch.finfo(matrix.dtype).eps * random)[:, : columns - at]
        for _ in range(3):
            block = torch.linalg.qr(block - before @ (before.T @ block))[0]
        image = matrix @ block  # (out, 16)
        basis[:, at : at + KRYLOV_BLOCK], images[:, at : at + KRYLOV_BLOCK] = block, image
    return basis, images


def _scale_to_one(matrix: Tensor) -> Tensor:
    """The matrix divided by its largest entry, so that products stay in the range of the dtype; zero stays zero."""
    return matrix / matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny)


def _times(matrix: Tensor, other: Tensor) -> Tensor:
    """matrix (m, n) · other (n, k) in the precision of ``other``; the matrix is converted a block of rows at a time."""
    return torch.cat([rows.to(other.dtype) @ other for rows in _row_blocks(matrix)])


def _times_transposed(matrix: Tensor, other: Tensor) -> Tensor:
    """matrixᵀ · other, (n, k), likewise, for other (m, k). torch sums otherᵀ · matrix in two thirds of the time."""
    total, at = other.new_zeros(other.shape[1], matrix.shape[1]), 0
    for rows in _row_blocks(matrix):
        total.addmm_(other[at : at + len(rows)].T, rows.to(other.dtype))
        at += len(rows)
    return total.T


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in blocks of rows with at most ``GRAM_BLOCK`` entries each, or one row."""
    return torch.split(matrix, max(1, GRAM_BLOCK // matrix.shape[1]))


def ulp(weight: Tensor, stored: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of the dtype ``stored`` around each entry: float32, of the same shape."""
    info = torch.finfo(stored)
    _, exponent = torch.frexp(weight.float())
    # frexp returns a mantissa in [.5, 1), so the leading bit has the value 2^(exponent - 1).
    spacing = torch.ldexp(torch.full_like(weight, info.eps, dtype=torch.float32), exponent - 1)
    # Zero has no leading bit, though frexp returns 2^-1 for it; its neighbours are the smallest subnormals.
    return spacing.masked_fill(weight == 0, 0.0).clamp(min=info.smallest_normal * info.eps)
