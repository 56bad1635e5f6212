"""The change of one weight, shape (out, in): kept as factors, or held as a matrix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankscope.errors import NonFiniteError, ShapeError
from rankscope.linalg import (
    SVD,
    Basis,
    FactoredSVD,
    core_singular_values,
    dense_singular_values,
    dense_svd,
    factored_product_svd,
    gram,
    triangular_factor,
    ulp,
    working_dtype,
)

BLOCK = 2**20
"""Entries of a matrix that are subtracted, or squared in float64, at a time."""
LARGEST_ENTRY = 1e140
"""Squared and summed over a matrix, the entries of a product must still be float64 numbers."""


class Update(ABC):
    """The change of one weight. Everything but ``dense()`` works without multiplying factors out."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def eps(self) -> float:
        """Relative precision that the singular values are computed with."""

    @property
    @abstractmethod
    def energy(self) -> float:
        """‖·‖²_F."""

    @abstractmethod
    def singular_values(self) -> Tensor:
        """All singular values that can differ from zero, largest first."""

    @abstractmethod
    def svd(self) -> SVD:
        """Thin SVD (U, s, Vt)."""

    def factored_svd(self) -> FactoredSVD:
        """Thin SVD whose U and V are not multiplied out where the update has thin factors."""
        U, s, Vt = self.svd()
        return FactoredSVD(Basis(U), s, Basis(Vt.T))

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix (out, in) in float32: the only method that forms it."""

    @abstractmethod
    def __matmul__(self, other: Tensor) -> Tensor:
        """update · other, other (in, k), in the working precision."""

    @property
    @abstractmethod
    def T(self) -> Update:  # noqa: N802 (the name numpy and torch use)
        """The transposed update."""

    @abstractmethod
    def __mul__(self, factor: float) -> Update: ...

    @abstractmethod
    def to(self, device: torch.device | str) -> Update:
        """The same update on another device."""

    @property
    def nominal_rank(self) -> int | None:
        """The rank that the construction allows, LoRA's r; None for an update that was not made of factors."""
        return None

    @property
    def product(self) -> LowRank | None:
        """The same update as thin factors, where its construction has any; None for one without."""
        return None

    @property
    def working_matrix(self) -> Tensor:
        """The matrix (out, in) in the working precision, formed like that of ``dense()``."""
        return self.dense().to(working_dtype(self.device))

    @property
    def norm(self) -> float:
        """‖·‖_F."""
        return math.sqrt(self.energy)

    def __neg__(self) -> Update:
        return self * -1.0

    def inner(self, other: Update) -> float:
        """⟨self, other⟩ = tr(selfᵀ · other), forming no matrix where one of the two has thin factors.

        Raises:
            ShapeError: the shapes differ.
        """
        check_same_shape(self, other)
        thin = other.product
        if thin is not None:
            return float(((self @ thin.right.T) * thin.left).sum())
        if self.product is not None:
            return other.inner(self)
        return float((self.working_matrix * other.working_matrix).sum())


@dataclass(frozen=True, repr=False)
class LowRank(Update):
    """scale · B · A, with B (out, r) and A (r, in); only ``dense()`` multiplies them out.

    Half-precision factors are upcast before anything is computed from them.

    Raises:
        ShapeError: B and A are not matrices, do not share r, or have an empty side.
        NonFiniteError: a factor or the scale holds NaN or infinity.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ShapeError(
                f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not multiply; expected (out, r) and (r, in)"
            )
        if 0 in self.B.shape or 0 in self.A.shape:
            raise ShapeError(f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} have an empty side")
        if not math.isfinite(self.scale):
            raise NonFiniteError(f"the scale is {self.scale}")
        largest = max(1.0, abs(self.scale) * check_finite(self.B, "B")) * max(1.0, check_finite(self.A, "A"))
        if largest > LARGEST_ENTRY:
            raise NonFiniteError(f"scale · B · A reaches {largest:.3g}, too large to square; check the scale and dtype")

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def device(self) -> torch.device:
        return self.B.device

    @property
    def nominal_rank(self) -> int:
        return self.A.shape[0]

    @property
    def product(self) -> LowRank:
        return self

    @property
    def working_matrix(self) -> Tensor:
        return self.left @ self.right

    @property
    def left(self) -> Tensor:
        """scale · B in the working precision."""
        return self.B.to(working_dtype(self.device)) * self.scale

    @property
    def right(self) -> Tensor:
        """A in the working precision."""
        return self.A.to(working_dtype(self.device))

    @property
    def eps(self) -> float:
        return torch.finfo(working_dtype(self.device)).eps

    @property
    def energy(self) -> float:
        # tr(BᵀB · AAᵀ) would save the small SVD, and lose its digits where factors cancel.
        return float(self.singular_values().square().sum())

    @property
    def triangles(self) -> tuple[Tensor, Tensor]:
        """R_L, R_R (small, on the host) with R_LᵀR_L = BᵀB and R_RᵀR_R = AAᵀ, without the scale; found once."""
        found = self._recall("triangles")
        if found is None:
            working = working_dtype(self.device)
            left, right = self._recall("squares") or (None, None)
            found = triangular_factor(self.B.to(working), left), triangular_factor(self.A.to(working).T, right)
            self._remember("triangles", found)
        return found

    def _remember(self, name: str, pair: tuple[Any, Any]) -> None:
        self.__dict__[f"_{name}"] = (self._versions, pair)

    def _recall(self, name: str) -> tuple[Any, Any] | None:
        """What was remembered, unless a factor has been written to since, as training does."""
        versions, pair = self.__dict__.get(f"_{name}", (None, None))
        return pair if versions == self._versions else None

    @property
    def _versions(self) -> tuple[int, ...]:
        return tuple(-1 if factor.is_inference() else factor._version for factor in (self.B, self.A))

    @property
    def terms(self) -> Tensor:
        """(r,): |scale|·‖b_l‖‖a_l‖, the norms of the rank-one terms that the update is the sum of; on the host."""
        left, right = (torch.linalg.vector_norm(R, dim=0) for R in self.triangles)
        norms: Tensor = left * right * abs(self.scale)
        return norms

    def singular_values(self) -> Tensor:
        return core_singular_values(*self.triangles, self.scale).to(self.device)

    def svd(self) -> SVD:
        return self.factored_svd().to_svd()

    def factored_svd(self) -> FactoredSVD:
        working = working_dtype(self.device)
        squares = self._recall("squares") or (None, None)
        found, triangles = factored_product_svd(self.B.to(working), self.A.to(working), self.scale, squares)
        self._remember("triangles", triangles)
        return found

    def dense(self) -> Tensor:
        return self.working_matrix.float()

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.left @ (self.right @ other.to(self.right.dtype))

    @property
    def T(self) -> LowRank:  # noqa: N802
        return LowRank(self.A.T, self.B.T, self.scale)

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, scale=self.scale * factor)

    def __add__(self, other: LowRank) -> LowRank:
        """The exact sum, of rank r₁ + r₂."""
        check_same_shape(self, other)
        return LowRank(torch.cat((self.left, other.left), dim=1), torch.cat((self.right, other.right), dim=0))

    def to(self, device: torch.device | str) -> LowRank:
        B, A = self.B.to(device), self.A.to(device)
        # What is there already is not looked through again.
        return self if B is self.B and A is self.A else LowRank(B, A, self.scale)

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]} × {self.shape[1]}, r={self.nominal_rank}, scale={self.scale:g})"


@dataclass(frozen=True, repr=False)
class Dense(Update):
    """An update held as a matrix in float32 that remembers how coarsely it was stored.

    ``stored`` is the dtype of the tuned weight on disk and ``rounding`` the root mean square
    of the error per entry that rounding to it can have left (0 for float32 and finer).

    Raises:
        ShapeError: not a matrix, or one with an empty side.
        NonFiniteError: the matrix holds NaN or infinity.
    """

    matrix: Tensor
    stored: torch.dtype = torch.float32
    rounding: float = 0.0

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or 0 in self.matrix.shape:
            raise ShapeError(f"an update is a matrix (out, in), not {tuple(self.matrix.shape)}")
        object.__setattr__(self, "matrix", self.matrix.float())
        check_finite(self.matrix, "the update, as float32,")

    @classmethod
    def difference(cls, tuned: Tensor, base: Tensor) -> Dense:
        """tuned − base, both cast to float32 first; the rounding floor is that of ``tuned``'s dtype.

        Rounding to a dtype errs uniformly by up to half a unit in the last place, ulp/√12 rms.
        """
        if tuned.shape != base.shape:
            raise ShapeError(f"the tuned weight {tuple(tuned.shape)} and the base {tuple(base.shape)} differ in shape")
        if tuned.ndim != 2 or 0 in tuned.shape:
            return cls(tuned.float() - base.float(), tuned.dtype)
        step = block_rows(tuned.shape[1])
        parts = ((tuned[at : at + step], base[at : at + step]) for at in range(0, len(tuned), step))
        return cls.from_blocks(parts, (tuned.shape[0], tuned.shape[1]), tuned.device)

    @classmethod
    def from_blocks(cls, parts: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int], device: torch.device) -> Dense:
        """``difference`` from blocks of rows (tuned, base) that follow each other and make up ``shape``.

        Memory beside the result: a few blocks.
        """
        matrix, squares, start, stored = torch.empty(shape, device=device), 0.0, 0, torch.float32
        for tuned, base in parts:
            tuned, base, stored = tuned.to(device), base.to(device), tuned.dtype
            torch.sub(tuned.float(), base.float(), out=matrix[start : start + len(tuned)])
            start += len(tuned)
            if torch.finfo(stored).eps > torch.finfo(torch.float32).eps:
                squares += float(ulp(tuned, stored).to(working_dtype(device)).square().sum())
        return cls(matrix, stored, math.sqrt(squares / (12 * matrix.numel())))

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def eps(self) -> float:
        return torch.finfo(torch.float32).eps

    @property
    def energy(self) -> float:
        # In blocks, as torch makes a float64 copy of what it takes the norm of.
        working, step = working_dtype(self.device), block_rows(self.shape[1])
        norms = [torch.linalg.vector_norm(rows, dtype=working) for rows in self.matrix.split(step)]  # type: ignore[no-untyped-call]
        return float(torch.stack(norms).square().sum())

    def singular_values(self) -> Tensor:
        return dense_singular_values(self.matrix)

    def svd(self) -> SVD:
        return dense_svd(self.matrix)

    def dense(self) -> Tensor:
        return self.matrix

    def __matmul__(self, other: Tensor) -> Tensor:
        working = working_dtype(self.device)
        return self.matrix.to(working) @ other.to(working)

    @property
    def T(self) -> Dense:  # noqa: N802
        return replace(self, matrix=self.matrix.T)

    def __mul__(self, factor: float) -> Dense:
        return replace(self, matrix=self.matrix * factor, rounding=self.rounding * abs(factor))

    def to(self, device: torch.device | str) -> Dense:
        return replace(self, matrix=self.matrix.to(device))

    def __repr__(self) -> str:
        return f"Dense({self.shape[0]} × {self.shape[1]}, stored as {str(self.stored).removeprefix('torch.')})"


def block_rows(columns: int) -> int:
    """Rows of a matrix that are read and subtracted at a time."""
    return max(1, BLOCK // columns)


def cache_gram_matrices(updates: Sequence[Update]) -> None:
    """Find BᵀB and AAᵀ of all products in one multiplication per shape, for a GPU that single ones leave idle.

    Each product remembers its own, on the host.
    """
    alike: dict[Hashable, list[LowRank]] = defaultdict(list)
    for update in updates:
        if isinstance(update, LowRank):
            alike[update.B.shape, update.A.shape, update.B.dtype, update.A.dtype, update.device].append(update)
    for group in alike.values():
        working = working_dtype(group[0].device)
        left = gram(torch.stack([update.B for update in group]).to(working))
        right = gram(torch.stack([update.A for update in group]).to(working).mT)
        lefts, rights = ([None] * len(group) if squares is None else squares.cpu() for squares in (left, right))
        for update, *pair in zip(group, lefts, rights, strict=True):
            update._remember("squares", (pair[0], pair[1]))


def check_finite(tensor: Tensor, what: str) -> float:
    """The largest magnitude; raises NonFiniteError, with a count, where a tensor holds NaN or infinity."""
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values  # torch finds no extremes in float8
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(f"{what} {tuple(tensor.shape)} holds {bad} values that are NaN or infinite")
    return largest


def check_same_shape(a: Update, b: Update) -> None:
    if a.shape != b.shape:
        raise ShapeError(f"updates of shape {a.shape} and {b.shape} cannot be compared; are they of the same weight?")
