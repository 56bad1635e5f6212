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
    """A complete spectrum of the given values, square where no shape is told."""
    values = np.asarray(sigma, dtype=np.float64)
    return Spectrum(values, float(values @ values), shape or (len(values), len(values)), eps)


def float64(update: Update) -> np.ndarray:
    """The matrix by numpy, from the raw fields alone."""
    if isinstance(update, LowRank):
        return update.scale * (update.B.double().numpy() @ update.A.double().numpy())
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
}


def concrete_kinds() -> set[str]:
    """Names of all classes in the package that derive from Update, read from the source so that none is missed."""
    bases: dict[str, set[str]] = {}
    for path in Path(rankscope.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    kinds, found = {"Update"}, {"Update"}
    while found:
        found = {name for name, above in bases.items() if above & kinds} - kinds
        kinds |= found
    return kinds - {"Update"}
