"""Updates: the change of one weight (out, in), kept as two factors or as a matrix."""

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
"""The largest entry of a product whose squares, summed over a matrix, are still finite in float64."""


class Update(ABC):
    """The change of one weight (out, in). ``dense()`` alone multiplies factors out."""

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
        """Relative precision of the dtype in which the singular values are computed."""

    @property
    @abstractmethod
    def energy(self) -> float:
        """‖·‖²_F."""

    @abstractmethod
    def singular_values(self) -> Tensor:
        """All singular values that can differ from zero, (k,), largest first."""

    @abstractmethod
    def svd(self) -> SVD:
        """Thin SVD: U (out, k), s (k,), Vt (k, in)."""

    def factored_svd(self) -> FactoredSVD:
        """Thin SVD whose U (out, k) and V (in, k) stay factors where the update has thin factors."""
        U, s, Vt = self.svd()
        return FactoredSVD(Basis(U), s, Basis(Vt.T))

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix (out, in) in float32. No other public method forms it where factors are thin."""

    @abstractmethod
    def __matmul__(self, other: Tensor) -> Tensor:
        """update · other, (out, k), for other (in, k), in the working precision."""

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
        """The rank that the construction allows, which is r for LoRA; None for an update without factors."""
        return None

    @property
    def product(self) -> LowRank | None:
        """The same update as thin factors; None where its construction has none."""
        return None

    @property
    def working_matrix(self) -> Tensor:
        """The matrix (out, in) in the working precision; like ``dense()``, this multiplies factors out."""
        return self.dense().to(working_dtype(self.device))

    @property
    def norm(self) -> float:
        """‖·‖_F."""
        return math.sqrt(self.energy)

    def __neg__(self) -> Update:
        return self * -1.0

    def inner(self, other: Update) -> float:
        """⟨self, other⟩ = tr(selfᵀ · other). No matrix is formed where one of the two has thin factors.

        Raises:
            ShapeError: the shapes differ.
        """
        check_same_shape(self, other)
        thin = other.product
        if thin is not None:
            return float(((self @ thin.right.T) * thin.left).sum())  # (out, r) both
        if self.product is not None:
            return other.inner(self)
        return float((self.working_matrix * other.working_matrix).sum())


@dataclass(frozen=True, repr=False)
class LowRank(Update):
    """scale · B · A, with B (out, r) and A (r, in).

    Half-precision factors are converted to the working precision before anything is computed from them.

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
        """scale · B, (out, r), in the working precision."""
        return self.B.to(working_dtype(self.device)) * self.scale

    @property
    def right(self) -> Tensor:
        """A, (r, in), in the working precision."""
        return self.A.to(working_dtype(self.device))

    @property
    def eps(self) -> float:
        return torch.finfo(working_dtype(self.device)).eps

    @property
    def energy(self) -> float:
        # tr(BᵀB · AAᵀ) needs no SVD of the core, but loses its digits where factors cancel.
        return float(self.singular_values().square().sum())

    @property
    def triangles(self) -> tuple[Tensor, Tensor]:
        """R of B (min(out, r), r) and of Aᵀ (min(in, r), r), without the scale, on the host; computed once."""
        triangles = self._recall("triangles")
        if triangles is None:
            working = working_dtype(self.device)
            left, right = self._recall("squares") or (None, None)
            triangles = triangular_factor(self.B.to(working), left), triangular_factor(self.A.to(working).T, right)
            self._remember("triangles", triangles)
        return triangles

    def _remember(self, name: str, pair: tuple[Any, Any]) -> None:
        self.__dict__[f"_{name}"] = (self._versions, pair)

    def _recall(self, name: str) -> tuple[Any, Any] | None:
        """What ``_remember`` stored; None if a factor has been written to since then, as training does."""
        versions, pair = self.__dict__.get(f"_{name}", (None, None))
        return pair if versions == self._versions else None

    @property
    def _versions(self) -> tuple[int, ...]:
        return tuple(-1 if factor.is_inference() else factor._version for factor in (self.B, self.A))

    @property
    def terms(self) -> Tensor:
        """The norms |scale|·‖b_l‖‖a_l‖, (r,), of the rank-one terms whose sum the update is; on the host."""
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
        svd, triangles = factored_product_svd(self.B.to(working), self.A.to(working), self.scale, squares)
        self._remember("triangles", triangles)
        return svd

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
        # Factors that are on the device already need no second check.
        return self if B is self.B and A is self.A else LowRank(B, A, self.scale)

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]} × {self.shape[1]}, r={self.nominal_rank}, scale={self.scale:g})"


@dataclass(frozen=True, repr=False)
class Dense(Update):
    """An update held as a float32 matrix (out, in), with what is known of its storage.

    ``stored`` is the dtype of the tuned weight on disk. ``rounding`` is the root mean square of the error per entry
    that rounding to this dtype can have left, 0 for float32 and finer.

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
        """tuned − base for two weights (out, in), both converted to float32 first.

        The rounding floor is that of ``tuned``'s dtype. The error of rounding is uniform within half a unit in the last
        place, so its root mean square is ulp/√12. Raises ShapeError where the shapes differ.
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
        """``difference`` from consecutive blocks of rows (tuned, base), both (m, in), which together have ``shape``."""
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
        # In blocks of rows, because torch copies to float64 what it takes the norm of.
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
    """How many rows of a matrix with this many columns are read and subtracted at a time."""
    return max(1, BLOCK // columns)


def cache_gram_matrices(updates: Sequence[Update]) -> None:
    """Give low-rank updates their BᵀB and AAᵀ from one multiplication per shape; single ones leave a GPU idle."""
    alike: dict[Hashable, list[LowRank]] = defaultdict(list)
    for update in updates:
        if isinstance(update, LowRank):
            alike[update.B.shape, update.A.shape, update.B.dtype, update.A.dtype, update.device].append(update)
    for group in alike.values():
        working = working_dtype(group[0].device)
        left = gram(torch.stack([update.B for update in group]).to(working))  # (n, r, r)
        right = gram(torch.stack([update.A for update in group]).to(working).mT)
        lefts, rights = ([None] * len(group) if squares is None else squares.cpu() for squares in (left, right))
        for update, *pair in zip(group, lefts, rights, strict=True):
            update._remember("squares", (pair[0], pair[1]))


def check_finite(tensor: Tensor, what: str) -> float:
    """The largest magnitude in a tensor of any shape, 0 for an empty one; NonFiniteError for NaN or infinity in it."""
    values = tensor.detach()
    values = values.float() if values.element_size() == 1 else values  # torch has no aminmax for float8
    if not values.numel():
        return 0.0
    low, high = values.aminmax()
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(f"{what} {tuple(tensor.shape)} holds {bad} values that are NaN or infinite")
    return largest


def check_same_shape(a: Update, b: Update) -> None:
    """Raise ShapeError where two updates differ in shape."""
    if a.shape != b.shape:
        raise ShapeError(f"updates of shape {a.shape} and {b.shape} cannot be compared; are they of the same weight?")
