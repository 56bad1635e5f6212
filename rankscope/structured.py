"""Updates made of factors in another way than B · A: Kronecker products (LoKr) and Hadamard products (LoHa).

Both keep their factors and compute with those. Their nominal rank is the rank that the construction allows, which is
much larger than the r of the factors in the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rankscope.errors import NonFiniteError, ShapeError
from rankscope.linalg import SVD, working_dtype
from rankscope.updates import LARGEST_ENTRY, Dense, LowRank, Update, check_finite


@dataclass(frozen=True, repr=False)
class Kronecker(Update):
    """scale · W₁ ⊗ W₂, (o₁·o₂, i₁·i₂), for W₁ (o₁, i₁) and W₂ (o₂, i₂); its blocks are W₁[a, b] · W₂.

    Its singular values are the products of those of the factors, and its singular vectors the Kronecker products of
    theirs (Van Loan, J. Comput. Appl. Math. 2000), so everything but ``dense()`` costs what the factors cost. The
    nominal rank is k₁·k₂, where k is the rank that a factor can have: its r, or its smaller side.

    Raises:
        NonFiniteError: the scale is NaN or infinite, or the product is too large to square.
    """

    W1: LowRank | Dense
    W2: LowRank | Dense
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise NonFiniteError(f"the scale is {self.scale}")
        _check_size(abs(self.scale) * _largest(self.W1), _largest(self.W2), "scale · W1 ⊗ W2")

    @property
    def shape(self) -> tuple[int, int]:
        return self.W1.shape[0] * self.W2.shape[0], self.W1.shape[1] * self.W2.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W1.device

    @property
    def nominal_rank(self) -> int:
        return _rank(self.W1) * _rank(self.W2)

    @property
    def eps(self) -> float:
        return max(self.W1.eps, self.W2.eps)

    @property
    def energy(self) -> float:
        return self.scale**2 * self.W1.energy * self.W2.energy

    @property
    def product(self) -> LowRank | None:
        """(B₁ ⊗ B₂)(A₁ ⊗ A₂) where k₁·k₂ is smaller than both sides; else None."""
        if self.nominal_rank >= min(self.shape):
            return None
        first, second = _factorize(self.W1), _factorize(self.W2)
        return LowRank(kron(first.left, second.left), kron(first.right, second.right), self.scale)

    @property
    def working_matrix(self) -> Tensor:
        return kron(self.W1.working_matrix, self.W2.working_matrix) * self.scale

    def singular_values(self) -> Tensor:
        return self._sort_products(self.W1.singular_values(), self.W2.singular_values())[0]

    def svd(self) -> SVD:
        svd1, svd2 = self.W1.svd(), self.W2.svd()
        s, order = self._sort_products(svd1.s, svd2.s)  # (k₁·k₂,) both
        at1, at2 = order // len(svd2.s), order % len(svd2.s)
        U = khatri_rao(svd1.U[:, at1], svd2.U[:, at2])  # (o₁·o₂, k₁·k₂)
        Vt = khatri_rao(svd1.Vt.T[:, at1], svd2.Vt.T[:, at2]).T  # (k₁·k₂, i₁·i₂)
        return SVD(U * math.copysign(1.0, self.scale), s, Vt)

    def _sort_products(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """All products of s₁ (k₁,) and s₂ (k₂,), largest first, and their indices among (1, 1), (1, 2), …: (k₁·k₂,)."""
        working = working_dtype(self.device)
        products = torch.outer(s1.to(working), s2.to(working)).flatten() * abs(self.scale)
        values, order = products.sort(descending=True)
        return values, order

    def dense(self) -> Tensor:
        return self.working_matrix.float()

    def __matmul__(self, other: Tensor) -> Tensor:
        (_, i1), (o2, i2), k = self.W1.shape, self.W2.shape, other.shape[1]
        # other as (i₁, i₂, k): W₂ acts on the second axis, then W₁ on the first.
        inner = self.W2 @ other.reshape(i1, i2, k).transpose(0, 1).reshape(i2, i1 * k)  # (o₂, i₁·k)
        outer = self.W1 @ inner.reshape(o2, i1, k).transpose(0, 1).reshape(i1, o2 * k)  # (o₁, o₂·k)
        return outer.reshape(-1, k) * self.scale

    @property
    def T(self) -> Kronecker:  # noqa: N802
        return replace(self, W1=self.W1.T, W2=self.W2.T)

    def __mul__(self, factor: float) -> Kronecker:
        return replace(self, scale=self.scale * factor)

    def inner(self, other: Update) -> float:
        """⟨self, other⟩; for factors of the same shapes it is the product of the factors' inner products."""
        if isinstance(other, Kronecker) and (self.W1.shape, self.W2.shape) == (other.W1.shape, other.W2.shape):
            return self.scale * other.scale * self.W1.inner(other.W1) * self.W2.inner(other.W2)
        return super().inner(other)

    def to(self, device: torch.device | str) -> Kronecker:
        return replace(self, W1=self.W1.to(device), W2=self.W2.to(device))

    def __repr__(self) -> str:
        return f"Kronecker({self.W1!r} ⊗ {self.W2!r}, scale={self.scale:g})"


@dataclass(frozen=True, repr=False)
class Hadamard(Update):
    """(s₁·B₁·A₁) ∘ (s₂·B₂·A₂), multiplied entry by entry: both (out, in), of rank r₁ and r₂.

    Its exact factors, of rank r₁·r₂, are Khatri–Rao products of B₁ with B₂ row by row and of A₁ with A₂ column by
    column (Hyeon-Woo et al., FedPara, ICLR 2022, Proposition 1). Where r₁·r₂ is smaller than both sides, everything is
    computed from those. Otherwise they would be larger than the matrix, and **the matrix is formed** by everything that
    needs more than the shape. The nominal rank is r₁·r₂.

    Raises:
        ShapeError: the factors' shapes differ.
        NonFiniteError: the product is too large to square.
    """

    first: LowRank
    second: LowRank

    def __post_init__(self) -> None:
        if self.first.shape != self.second.shape:
            raise ShapeError(
                f"matrices of shape {self.first.shape} and {self.second.shape} have no product entry by entry"
            )
        _check_size(_largest(self.first), _largest(self.second), "(B1 · A1) ∘ (B2 · A2)")

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def nominal_rank(self) -> int:
        return self.first.nominal_rank * self.second.nominal_rank

    @property
    def scale(self) -> float:
        return self.first.scale * self.second.scale

    @property
    def eps(self) -> float:
        return self._decomposable.eps

    @property
    def energy(self) -> float:
        if self.product is not None:
            return self.product.energy
        return float(torch.linalg.vector_norm(self.working_matrix) ** 2)

    @property
    def product(self) -> LowRank | None:
        """The Khatri–Rao factors where r₁·r₂ is smaller than both sides; else None."""
        return self._factors if self.nominal_rank < min(self.shape) else None

    @cached_property
    def _factors(self) -> LowRank:
        first, second = self.first, self.second
        left = khatri_rao(first.left.T, second.left.T).T  # (out, r₁·r₂)
        return LowRank(left, khatri_rao(first.right, second.right))

    @property
    def _decomposable(self) -> LowRank | Dense:
        """The form that is decomposed: thin factors, or the matrix."""
        return self.product or Dense(self.dense())

    @property
    def working_matrix(self) -> Tensor:
        return self.first.working_matrix * self.second.working_matrix

    def singular_values(self) -> Tensor:
        return self._decomposable.singular_values()

    def svd(self) -> SVD:
        return self._decomposable.svd()

    def dense(self) -> Tensor:
        return self.working_matrix.float()

    def __matmul__(self, other: Tensor) -> Tensor:
        if self.product is not None:
            return self.product @ other
        return self.working_matrix @ other.to(working_dtype(self.device))

    @property
    def T(self) -> Hadamard:  # noqa: N802
        return Hadamard(self.first.T, self.second.T)

    def __mul__(self, factor: float) -> Hadamard:
        return replace(self, first=self.first * factor)

    def to(self, device: torch.device | str) -> Hadamard:
        return Hadamard(self.first.to(device), self.second.to(device))

    def __repr__(self) -> str:
        return f"Hadamard({self.first!r} ∘ {self.second!r})"


def kron(X: Tensor, Y: Tensor) -> Tensor:
    """X ⊗ Y, (m·p, n·q), for X (m, n) and Y (p, q). torch.kron fails on some transposed matrices."""
    return (X[:, None, :, None] * Y[None, :, None, :]).reshape(X.shape[0] * Y.shape[0], -1)


def khatri_rao(X: Tensor, Y: Tensor) -> Tensor:
    """Kronecker products column by column, (m·n, k), of X (m, k) and Y (n, k)."""
    return (X[:, None, :] * Y[None, :, :]).flatten(0, 1)


def _rank(factor: LowRank | Dense) -> int:
    """The rank that a factor can have."""
    return min(*factor.shape, factor.nominal_rank or min(factor.shape))


def _factorize(factor: LowRank | Dense) -> LowRank:
    """The factor as a product with an inner side of at most ``_rank``; a matrix becomes itself times the identity."""
    if isinstance(factor, LowRank) and factor.nominal_rank <= min(factor.shape):
        return factor
    matrix = factor.working_matrix
    tall = matrix.shape[0] >= matrix.shape[1]
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return LowRank(matrix, identity) if tall else LowRank(identity, matrix)


def _largest(factor: LowRank | Dense) -> float:
    """An upper bound on the entries of the factor."""
    if isinstance(factor, LowRank):
        sides = check_finite(factor.B, "B") * check_finite(factor.A, "A")
        return abs(factor.scale) * factor.nominal_rank * sides
    return check_finite(factor.matrix, "the matrix")


def _check_size(first: float, second: float, what: str) -> None:
    largest = max(1.0, first) * max(1.0, second)
    if largest > LARGEST_ENTRY:
        raise NonFiniteError(f"{what} reaches {largest:.3g}, too large to square; check the scale and dtype")
