"""The choice of ranks, the truncation of one update, and its exact error."""

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

CHUNK = 1 << 22  # entries of a full matrix that are in float64 at a time

MAX_EXCESS_ERROR = 1e-3
"""Relative excess of the error over the least one that is allowed where only the largest σ are computed."""
CANCELLATION_FACTOR = 8  # rounding leaves at most so many multiples of max(out, in)·eps where factors cancel


class RankChoice(ABC):
    """Which singular values are kept: at least one, and beside others none that is zero to rounding."""

    @abstractmethod
    def __str__(self) -> str:
        """Its name in reports."""


class LayerChoice(RankChoice):
    """A choice that is made for each layer alone."""

    @abstractmethod
    def count(self, update: Update, spectrum: Spectrum) -> int:
        """How many singular values the choice asks for."""

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
    can have made (``rounding_edge``); float32 factors have no known noise.
    """

    def count(self, update: Update, spectrum: Spectrum) -> int:
        edge = noise_level(update, spectrum)
        return spectrum.nonzero if edge is None else int(np.count_nonzero(spectrum.values > edge))

    def __str__(self) -> str:
        return "above noise"


@dataclass(frozen=True)
class Budget(RankChoice):
    """This many parameters in all layers together, with the least total error (see ``allocate_ranks``)."""

    parameters: int

    def __post_init__(self) -> None:
        if self.parameters < 1:
            raise ConfigError(f"a budget is at least 1 parameter, not {self.parameters}")

    def __str__(self) -> str:
        return f"budget {self.parameters}"


def noise_level(update: Update, spectrum: Spectrum) -> float | None:
    """The largest σ that noise explains; None where every σ that is not rounding is signal.

    Raises:
        ConfigError: a product of factors in float32 or finer, whose noise is not known.
    """
    if isinstance(update, LowRank):
        edge = rounding_edge(update)
        if edge is None:
            raise ConfigError(
                f"the noise in a product of {spectrum.stored} factors is not known; choose a rank, a share "
                "of the energy or a budget instead"
            )
        return edge
    if spectrum.rounding > 0:
        return noise_edge(spectrum.rounding, spectrum.shape)
    return mp_edge(spectrum)


def rounding_edge(update: LowRank) -> float | None:
    """The largest σ that rounding B (out, r) and A (r, in) to half precision can have made; None for finer factors.

    Rounding adds noise δB of ulp/√12 per entry, so σ₁ of s(δB·A + B·δA) is at most
    |s|·(‖δB‖₂‖A‖₂ + ‖B‖₂‖δA‖₂), with ‖δB‖₂ at the edge of its noise, to first order.
    """
    fine = torch.finfo(torch.float32).eps
    if all(torch.finfo(factor.dtype).eps <= fine for factor in (update.B, update.A)):
        return None
    noise = [_rounding_noise(factor) for factor in (update.B, update.A)]
    norms = [float(torch.linalg.matrix_norm(f.to(working_dtype(f.device)), ord=2)) for f in (update.B, update.A)]
    return abs(update.scale) * (noise[0] * norms[1] + norms[0] * noise[1])


def _rounding_noise(factor: Tensor) -> float:
    """The largest σ of the rounding error of a factor."""
    spacing = ulp(factor, factor.dtype).to(working_dtype(factor.device))
    return noise_edge(math.sqrt(float(spacing.square().mean()) / 12), (factor.shape[0], factor.shape[1]))


def decompose(update: Update, k: int | None) -> SVD:
    """The SVD; of a full matrix of which k singular values are kept, only those, where that is faster.

    Their error exceeds the least one by at most ``MAX_EXCESS_ERROR``, in relative terms, by ``excess_error_bound``. A
    matrix whose singular values lie too close together for that bound is decomposed completely.
    """
    if k is not None and isinstance(update, Dense) and sketch_is_cheaper(update.shape, k) and update.energy:
        triplets = leading_triplets(update.matrix, k)
        if excess_error_bound(triplets, update.energy) <= MAX_EXCESS_ERROR:
            return triplets.svd
    return update.svd()


def excess_error_bound(triplets: LeadingTriplets, energy: float) -> float:
    """A bound on (error of the truncation − least error) / least error.

    The squares s² are Ritz values of MᵀM with residuals ρ = s·‖Mᵀu − s·v‖. Each is below its σ² by at most ρ, and by
    ρ²/gap if the next Ritz value after the truncation is at the distance gap (Parlett 1998, §11.7). The bound holds
    if no direction was missed; a random start makes that almost certain.
    """
    s, rho = triplets.svd.s, triplets.svd.s * triplets.residuals
    beyond = triplets.further[0].to(s) if len(triplets.further) else torch.zeros_like(s[0])
    gap = (s.square() - beyond.square()).clamp(min=torch.finfo(s.dtype).tiny)
    lost = float(torch.minimum(rho, rho.square() / gap).sum())
    left = energy - float(s.square().sum())
    rounding = torch.finfo(torch.float32).eps * energy  # a rest below it is zero: factors are stored no finer
    return lost / max(left, rounding) / 2


def truncate_svd(svd: SVD, k: int, dtype: torch.dtype) -> LowRank:
    """The best approximation of rank k (Eckart & Young 1936): B (out, k) and A (k, in) with √σ in each; scale 1."""
    root = svd.s[:k].sqrt()
    return LowRank((svd.U[:, :k] * root).to(dtype), (root[:, None] * svd.Vt[:k]).to(dtype))


def fold_scale_and_round(update: LowRank, dtype: torch.dtype) -> LowRank:
    """The same update with the scale multiplied into B, rounded to ``dtype``."""
    return LowRank(update.left.to(dtype), update.A.to(dtype))


def distance(before: Update, after: LowRank) -> float:
    """‖before − after‖_F, to the working precision of ‖before‖; thin factors are not multiplied out."""
    thin = before.product
    if thin is not None:
        return (thin + (after * -1.0)).norm
    matrix = before.dense() if isinstance(before, Dense) else before.working_matrix
    left, right = after.left, after.right
    rows = max(1, CHUNK // matrix.shape[1])
    parts = (matrix[i : i + rows].to(left.dtype) - left[i : i + rows] @ right for i in range(0, len(matrix), rows))
    return math.sqrt(math.fsum(float(part.square().sum()) for part in parts))


def is_zero(update: Update, spectrum: Spectrum) -> bool:
    """Whether an update is zero, or only the rounding error of factors that cancel, as in x + (−x).

    A product of r terms is computed to a small multiple of max(out, in)·eps·max_l ‖b_l‖‖a_l‖.
    """
    cancelled = update.product is not None and CANCELLATION_FACTOR * max(spectrum.shape) * spectrum.eps >= 1
    return cancelled or not spectrum.values[0]


def retained_energy(spectrum: Spectrum, k: int) -> float:
    """Share of the energy in the k largest σ, in [0, 1]."""
    if not spectrum.complete:
        return min(1.0, float((spectrum.values[:k] ** 2).sum()) / spectrum.energy)
    if k >= spectrum.nonzero:
        return 1.0
    return float((spectrum.ratios[:k] ** 2).sum() / (spectrum.ratios**2).sum())


def signal_energies(update: Update, spectrum: Spectrum) -> Array:
    """σ², largest first, without those that are rounding error: what a budget is spent on."""
    return spectrum.values[: 0 if is_zero(update, spectrum) else spectrum.nonzero] ** 2
