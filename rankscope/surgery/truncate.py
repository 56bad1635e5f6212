"""How much of an update is kept: the choice of ranks, the truncation itself, and its exact error."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankscope.errors import ConfigError
from rankscope.linalg import SVD, LeadingTriplets, leading_triplets, sketch_is_cheaper, ulp, working_dtype
from rankscope.noise import Array, noise_edge
from rankscope.spectra import Spectrum, mp_edge
from rankscope.updates import Dense, LowRank, Update

CHUNK = 1 << 22  # entries of a full matrix that are held in float64 at a time

MAX_EXCESS_ERROR = 1e-3
"""How much more than the least error a cut may leave, relative to that, where the largest σ are found alone."""
CANCELLATION_FACTOR = 8  # multiples of max(out, in)·eps that rounding leaves at most where factors cancel


class RankChoice(ABC):
    """Which singular values are kept. At least one is, and none that is zero to rounding beside others."""

    @abstractmethod
    def __str__(self) -> str:
        """As reports name it."""


class LayerChoice(RankChoice):
    """A choice that looks at one layer at a time."""

    @abstractmethod
    def count(self, update: Update, spectrum: Spectrum) -> int:
        """How many singular values are wanted."""

    def rank(self, update: Update, spectrum: Spectrum) -> int:
        """The rank of the truncated update."""
        return max(1, min(self.count(update, spectrum), int(np.count_nonzero(spectrum.ratios))))


@dataclass(frozen=True)
class Rank(LayerChoice):
    """At most r in every layer."""

    r: int

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"a rank is at least 1, not {self.r}")

    def count(self, update: Update, spectrum: Spectrum) -> int:
        return self.r

    def __str__(self) -> str:
        return f"rank {self.r}"


@dataclass(frozen=True)
class Energy(LayerChoice):
    """In every layer the fewest that hold this share of its exact energy ‖·‖²_F; 1 keeps all that is not rounding."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"a share of the energy lies above 0 and up to 1, not at {self.share:g}")

    def count(self, update: Update, spectrum: Spectrum) -> int:
        return spectrum.nonzero if self.share == 1 else spectrum.energy_rank(self.share)

    def __str__(self) -> str:
        return f"energy {self.share:g}"


@dataclass(frozen=True)
class SigmaRatio(LayerChoice):
    """In every layer those with σ ≥ ratio · σ₁."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"a ratio σ/σ₁ lies above 0 and up to 1, not at {self.ratio:g}")

    def count(self, update: Update, spectrum: Spectrum) -> int:
        return int(np.count_nonzero(spectrum.ratios >= self.ratio))

    def __str__(self) -> str:
        return f"σ ≥ {self.ratio:g} σ₁"


@dataclass(frozen=True)
class AboveNoise(LayerChoice):
    """Those that noise does not explain.

    Of a full update: above the rounding floor's edge where the file was half precision, else above the
    Marchenko–Pastur edge that the median σ suggests. Of a product: above what rounding its half-precision factors
    can have made (``rounding_edge``); float32 factors tell nothing of noise.
    """

    def count(self, update: Update, spectrum: Spectrum) -> int:
        edge = noise_level(update, spectrum)
        return spectrum.nonzero if edge is None else int(np.count_nonzero(spectrum.values > edge))

    def __str__(self) -> str:
        return "above noise"


@dataclass(frozen=True)
class Budget(RankChoice):
    """This many parameters in all layers together, shared out so that the total error is least (``budget.allot``)."""

    parameters: int

    def __post_init__(self) -> None:
        if self.parameters < 1:
            raise ConfigError(f"a budget is at least 1 parameter, not {self.parameters}")

    def __str__(self) -> str:
        return f"budget {self.parameters}"


def noise_level(update: Update, spectrum: Spectrum) -> float | None:
    """The largest σ that noise explains; None where every σ that is not rounding is signal.

    Raises:
        ConfigError: a product of factors in float32 or finer, which has no noise to be told from.
    """
    if isinstance(update, LowRank):
        edge = rounding_edge(update)
        if edge is None:
            raise ConfigError(
                f"nothing tells signal from noise in a product of {spectrum.stored} factors; choose a rank, a share "
                "of the energy or a budget instead"
            )
        return edge
    if spectrum.rounding > 0:
        return noise_edge(spectrum.rounding, spectrum.shape)
    return mp_edge(spectrum)


def rounding_edge(update: LowRank) -> float | None:
    """The largest σ that rounding the factors to half precision can have made; None for finer factors.

    Rounding adds noise δB of ulp/√12 per entry, so σ₁ of s(δB·A + B·δA) is at most
    |s|·(‖δB‖₂‖A‖₂ + ‖B‖₂‖δA‖₂), with ‖δB‖₂ at the edge of its noise, to first order.
    """
    fine = torch.finfo(torch.float32).eps
    if all(torch.finfo(factor.dtype).eps <= fine for factor in (update.B, update.A)):
        return None
    noise = [_rounding(factor) for factor in (update.B, update.A)]
    size = [float(torch.linalg.matrix_norm(f.to(working_dtype(f.device)), ord=2)) for f in (update.B, update.A)]
    return abs(update.scale) * (noise[0] * size[1] + size[0] * noise[1])


def _rounding(factor: Tensor) -> float:
    spacing = ulp(factor, factor.dtype).to(working_dtype(factor.device))
    return noise_edge(math.sqrt(float(spacing.square().mean()) / 12), (factor.shape[0], factor.shape[1]))


def decompose(update: Update, k: int | None) -> SVD:
    """The SVD, or of a full matrix of which k singular values are kept those alone, where they are found sooner.

    Their error exceeds the least one by at most ``MAX_EXCESS_ERROR``, in relative terms, by ``excess_error_bound``; a
    matrix whose singular values lie too close for that bound is decomposed as a whole.
    """
    if k is not None and isinstance(update, Dense) and sketch_is_cheaper(update.shape, k) and update.energy:
        found = leading_triplets(update.matrix, k)
        if excess_error_bound(found, update.energy) <= MAX_EXCESS_ERROR:
            return found.svd
    return update.svd()


def excess_error_bound(found: LeadingTriplets, energy: float) -> float:
    """A bound on how much larger the error of the cut is than the least, relative to that (0.001: one per mille).

    The squares s² are Ritz values of MᵀM with residuals ρ = s·‖Mᵀu − s·v‖. Each is below its σ² by at most ρ, and by
    ρ²/gap where the next Ritz value beyond the cut is that far (Parlett 1998, §11.7). So it holds as far as no
    direction was missed, which a random start makes all but impossible.
    """
    s, rho = found.svd.s, found.svd.s * found.residuals
    beyond = found.further[0].to(s) if len(found.further) else torch.zeros_like(s[0])
    gap = (s.square() - beyond.square()).clamp(min=torch.finfo(s.dtype).tiny)
    lost = float(torch.minimum(rho, rho.square() / gap).sum())
    left = energy - float(s.square().sum())
    rounding = torch.finfo(torch.float32).eps * energy  # a rest below it is none: the factors are written no finer
    return lost / max(left, rounding) / 2


def truncate_svd(svd: SVD, k: int, dtype: torch.dtype) -> LowRank:
    """The best approximation of rank k (Eckart & Young 1936), √σ on each side, rounded to ``dtype``; scale 1."""
    root = svd.s[:k].sqrt()
    return LowRank((svd.U[:, :k] * root).to(dtype), (root[:, None] * svd.Vt[:k]).to(dtype))


def fold_scale_and_round(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The same factors with the scale in B, rounded to ``dtype``."""
    return LowRank(update.left.to(dtype), update.A.to(dtype))


def distance(before: Update, after: LowRank) -> float:
    """‖before − after‖_F, to the working precision of ‖before‖; of thin factors without their product."""
    thin = before.product
    if thin is not None:
        return (thin + (after * -1.0)).norm
    matrix = before.dense() if isinstance(before, Dense) else before.working_matrix
    left, right = after.left, after.right
    rows = max(1, CHUNK // matrix.shape[1])
    parts = (matrix[i : i + rows].to(left.dtype) - left[i : i + rows] @ right for i in range(0, len(matrix), rows))
    return math.sqrt(math.fsum(float(part.square().sum()) for part in parts))


def is_zero(update: Update, spectrum: Spectrum) -> bool:
    """Whether an update is nothing: zero, or what rounding leaves of factors that cancel, as in x + (−x).

    A product of r terms is computed to a small multiple of max(out, in)·eps·max_l ‖b_l‖‖a_l‖.
    """
    cancelled = update.product is not None and CANCELLATION_FACTOR * max(spectrum.shape) * spectrum.eps >= 1
    return cancelled or not spectrum.values[0]


def retained_energy(spectrum: Spectrum, k: int) -> float:
    """Share of the energy in the k largest σ."""
    if not spectrum.complete:
        return min(1.0, float((spectrum.values[:k] ** 2).sum()) / spectrum.energy)
    if k >= spectrum.nonzero:
        return 1.0
    return float((spectrum.ratios[:k] ** 2).sum() / (spectrum.ratios**2).sum())


def signal_energies(update: Update, spectrum: Spectrum) -> Array:
    """σ² without those that are rounding: what a budget is spent on."""
    return spectrum.values[: 0 if is_zero(update, spectrum) else spectrum.nonzero] ** 2
