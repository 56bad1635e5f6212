"""LoRA's update against that of full fine-tuning for the same weight, and against the best update of its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import torch

from rankscope.analysis.layer_comparison import MAX_DIRECTIONS, SideComparison, cosine_similarity, difference_norm
from rankscope.errors import ShapeError
from rankscope.haar import familywise_p_values
from rankscope.spectra import SMALLEST_ENERGY, Spectrum
from rankscope.subspace import Subspace
from rankscope.updates import LowRank, Update, check_same_shape


class CapturedEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """Share of the full update's energy inside directions of LoRA's update, and inside as many random ones."""

    share: float
    chance: float


class LayerAgreement(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """One weight (out, in), errors in units of ‖ΔW_full‖_F.

    ``rank``: LoRA's nominal r. ``k``: how many directions its update has. ``floor``: √Σ_{l>r}σ²/‖ΔW_full‖, the least
    error of any update of rank r (Eckart & Young 1936). ``achieved``: ‖ΔW_full − s·BA‖. ``scaled``: the same with the
    best multiple of s·BA, by ``scale`` ≥ 0, so that an opposite update explains nothing. ``efficiency``:
    (1 − scaled²)/(1 − floor²), the energy that the scaled update explains, as a share of what rank r could explain.
    ``inner`` and ``cosine``: of the two updates. ``left``, ``right``, ``both``: energy of the full update inside LoRA's
    output space, input space, or both.
    ``left_directions`` and ``right_directions``: the top directions of full against those of LoRA; ``p_left`` and
    ``p_right`` the least p of each grid, corrected for looking at all of it (``rankscope.haar``).
    """

    shape: tuple[int, int]
    rank: int
    k: int
    norm_full: float
    norm_lora: float
    inner: float
    floor: float
    achieved: float
    scaled: float
    scale: float
    cosine: float
    efficiency: float
    left: CapturedEnergy
    right: CapturedEnergy
    both: CapturedEnergy
    left_directions: SideComparison
    right_directions: SideComparison
    p_left: float
    p_right: float

    @property
    def ratio(self) -> float:
        """‖s·BA‖/‖ΔW_full‖."""
        return self.norm_lora / self.norm_full


@dataclass(frozen=True, eq=False, repr=False)
class FullUpdate:
    """A full update with its spectrum and top directions, decomposed once for many comparisons."""

    update: Update
    spectrum: Spectrum
    left: Subspace
    right: Subspace

    @classmethod
    def of(cls, update: Update, top: int = MAX_DIRECTIONS) -> FullUpdate:
        """Decompose an update: all singular values, and the top directions that are above rounding.

        Raises:
            ShapeError: an update without a direction (zero, or rounding alone).
        """
        svd = update.factored_svd()
        spectrum = Spectrum.from_values(update, svd.s)
        return cls(update, spectrum, *Subspace.of_svd(svd, spectrum, top))

    def truncate(self, rank: int) -> LowRank:
        """The best approximation of this rank, as factors.

        Raises:
            ShapeError: fewer directions were kept, though there are more.
        """
        if rank > self.left.k < self.spectrum.limit and self.spectrum.ratios[self.left.k] > 0:
            raise ShapeError(f"{self.left.k} directions of the update were kept; they have no cut at {rank}")
        left, right = self.left.top(rank), self.right.top(rank)
        sigma = torch.as_tensor(self.spectrum.values[: left.k].copy()).to(left.basis)
        return LowRank(left.basis * sigma, right.basis.T)

    def truncation_error(self, rank: int) -> float:
        """√Σ_{l>rank}σ²/√Σσ²."""
        energies = self.spectrum.values**2
        return math.sqrt(float(energies[rank:].sum() / energies.sum()))

    def __repr__(self) -> str:
        return f"FullUpdate({self.update!r}, top {self.left.k})"


def compare_with_full_update(full: Update | FullUpdate, lora: LowRank, top: int = MAX_DIRECTIONS) -> LayerAgreement:
    """How far LoRA's update is the low-rank part of the full one; no product of factors is formed.

    Args:
        full: the update of full fine-tuning, or its ``FullUpdate``.
        lora: the update of LoRA for the same weight, on the same device.
        top: how many directions of the two are compared at most.

    Raises:
        ShapeError: the shapes differ, or an update is zero or too small to be told from rounding.
    """
    target = full if isinstance(full, FullUpdate) else FullUpdate.of(full, top)
    update = target.update
    check_same_shape(update, lora)
    left, right = Subspace.pair(lora)
    norm_full, norm_lora = update.norm, lora.norm
    if min(norm_full, norm_lora) ** 2 < SMALLEST_ENERGY:
        least = min(norm_full, norm_lora)
        raise ShapeError(f"it is too small to compare: a norm of {least:.3g} loses digits when it is squared")
    inner = update.inner(lora)
    cos = cosine_similarity(inner, norm_full, norm_lora)
    along = max(cos, 0.0)
    floor = target.truncation_error(lora.nominal_rank)
    out = SideComparison.of(target.left.top(top), left.top(top))
    into = SideComparison.of(target.right.top(top), right.top(top))
    return LayerAgreement(
        shape=update.shape,
        rank=lora.nominal_rank,
        k=left.k,
        norm_full=norm_full,
        norm_lora=norm_lora,
        inner=inner,
        floor=floor,
        achieved=difference_norm(update, lora, inner, (norm_full, norm_lora)) / norm_full,
        # ‖F − cL‖² is least at c = ⟨F, L⟩/‖L‖², where it is ‖F‖²(1 − cos²).
        scaled=math.sqrt((1 - along) * (1 + along)),
        scale=max(inner, 0.0) / norm_lora**2,
        cosine=cos,
        efficiency=along**2 / ((1 - floor) * (1 + floor)),
        **captured_energy(update, left, right),
        left_directions=out,
        right_directions=into,
        p_left=_least(out),
        p_right=_least(into),
    )


def captured_energy(update: Update, left: Subspace, right: Subspace) -> dict[str, CapturedEnergy]:
    """Share of an update's energy inside a left, a right, and both subspaces: ‖UᵀF‖², ‖FV‖² and ‖UᵀFV‖² over ‖F‖².

    Random directions capture their share of the dimensions: k/out, k/in, and the product of the two.
    """
    inside = update @ right.basis
    energies = {
        "left": float((update.T @ left.basis).square().sum()),
        "right": float(inside.square().sum()),
        "both": float((left.basis.T @ inside).square().sum()),
    }
    chances = {"left": left.k / left.dim, "right": right.k / right.dim}
    chances["both"] = chances["left"] * chances["right"]
    total = update.energy
    return {
        name: CapturedEnergy(share=min(1.0, energy / total), chance=chances[name]) for name, energy in energies.items()
    }


def _least(side: SideComparison) -> float:
    return float(familywise_p_values(side.p, side.d).min())
