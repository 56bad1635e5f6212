"""Small updates of every kind with a known matrix, and planted spectra: the makers behind the contract tests."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import rankscope
from rankscope.spectra import Spectrum
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank, Update


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal entries."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def frame(d: int, k: int, seed: int = 0) -> Tensor:
    """k orthonormal columns in dimension d, uniformly random, float64."""
    return torch.linalg.qr(normal(d, k, seed=seed))[0]


def planted(shape: tuple[int, int], sigma: object, seed: int = 0) -> LowRank:
    """U · diag(σ) · Vᵀ as factors in float64, scale 1."""
    s = torch.as_tensor(np.asarray(sigma, dtype=np.float64))
    return LowRank(frame(shape[0], len(s), seed) * s, frame(shape[1], len(s), seed + 1).T)


def planted_dense(shape: tuple[int, int], sigma: object, seed: int = 0) -> Dense:
    """The same multiplied out, float32."""
    factors = planted(shape, sigma, seed)
    return Dense(factors.B @ factors.A)


def spectrum_of(sigma: object, shape: tuple[int, int] | None = None, eps: float = 2.0**-52) -> Spectrum:
    """A complete spectrum of the given values, square where no shape is given."""
    values = np.asarray(sigma, dtype=np.float64)
    return Spectrum(values, float(values @ values), shape or (len(values), len(values)), eps)


def float64(update: Update) -> np.ndarray:
    """The matrix by numpy, from the raw fields alone."""
    if isinstance(update, LowRank):
        return update.scale * (update.B.double().numpy() @ update.A.double().numpy())
    if isinstance(update, Kronecker):
        return update.scale * np.kron(float64(update.W1), float64(update.W2))
    if isinstance(update, Hadamard):
        return float64(update.first) * float64(update.second)
    assert isinstance(update, Dense)
    return update.matrix.double().numpy()


@dataclass(frozen=True)
class Maker:
    """``make(out, in, seed)`` gives an update of class ``kind``; ``exact``: σ to this share of σ₁."""

    kind: type[Update]
    make: Callable[[int, int, int], Update]
    exact: float


def _dora(out: int, into: int, seed: int) -> Dense:
    """A whole DoRA update: magnitude · (W + BA)/‖W + BA‖ − W, which has no low-rank form."""
    W = normal(out, into, seed=seed)
    V = W + normal(out, 2, seed=seed + 1) @ normal(2, into, seed=seed + 2)
    return Dense(1.1 * W.norm(dim=1, keepdim=True) * V / V.norm(dim=1, keepdim=True) - W)


def _split(n: int) -> tuple[int, int]:
    """Two factors of n, the smaller first, as equal as they can be."""
    small = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
    return small, n // small


def _low_rank(out: int, into: int, r: int, seed: int, scale: float = 1.0) -> LowRank:
    return LowRank(normal(out, r, seed=seed), normal(r, into, seed=seed + 1), scale)


def _kronecker(out: int, into: int, seed: int, thin: tuple[bool, bool]) -> Kronecker:
    """Factors of the smaller and the larger divisors of both sides; rank 2 where ``thin``, else full."""
    (o1, o2), (i1, i2) = _split(out), _split(into)
    W1, W2 = (
        _low_rank(o, i, 2, s) if low else Dense(normal(o, i, seed=s))
        for o, i, s, low in ((o1, i1, seed, thin[0]), (o2, i2, seed + 2, thin[1]))
    )
    return Kronecker(W1, W2, -0.6)


def _hadamard(out: int, into: int, seed: int, r1: int, r2: int) -> Hadamard:
    return Hadamard(_low_rank(out, into, r1, seed, 1.5), _low_rank(out, into, r2, seed + 2, -0.4))


MAKERS: dict[str, Maker] = {
    "low rank": Maker(LowRank, lambda o, i, s: LowRank(normal(o, 3, seed=s), normal(3, i, seed=s + 1), 0.7), 1e-12),
    "low rank, bfloat16": Maker(
        LowRank,
        lambda o, i, s: LowRank(
            normal(o, 3, seed=s, dtype=torch.bfloat16), normal(3, i, seed=s + 1, dtype=torch.bfloat16), -2.0
        ),
        1e-12,
    ),
    "low rank, r > out and in": Maker(
        LowRank, lambda o, i, s: LowRank(normal(o, 40, seed=s), normal(40, i, seed=s + 1), 0.5), 1e-12
    ),
    "dense": Maker(Dense, lambda o, i, s: Dense(normal(o, i, seed=s)), 1e-6),
    "dense, stored in bfloat16": Maker(
        Dense,
        lambda o, i, s: Dense.difference(
            normal(o, i, seed=s, dtype=torch.bfloat16), normal(o, i, seed=s + 1, dtype=torch.bfloat16)
        ),
        1e-6,
    ),
    "DoRA, whole": Maker(Dense, _dora, 1e-6),
    "Kronecker, full factors": Maker(Kronecker, lambda o, i, s: _kronecker(o, i, s, (False, False)), 1e-6),
    "Kronecker, one low rank": Maker(Kronecker, lambda o, i, s: _kronecker(o, i, s, (False, True)), 1e-6),
    "Kronecker, low ranks": Maker(Kronecker, lambda o, i, s: _kronecker(o, i, s, (True, True)), 1e-12),
    "Hadamard, thin": Maker(Hadamard, lambda o, i, s: _hadamard(o, i, s, 2, 3), 1e-6),
    "Hadamard, r1 · r2 > out and in": Maker(Hadamard, lambda o, i, s: _hadamard(o, i, s, 7, 8), 1e-6),
}


def concrete_kinds() -> set[str]:
    """Names of all classes in the package that derive from Update, read from the source so that none is missed."""
    bases: dict[str, set[str]] = {}
    for path in Path(rankscope.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    kinds, derived = {"Update"}, {"Update"}
    while derived:
        derived = {name for name, above in bases.items() if above & kinds} - kinds
        kinds |= derived
    return kinds - {"Update"}
