"""Spectra: the singular values of an update, effective ranks, and what noise or rounding alone would give."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from rankscope.errors import NonFiniteError, RankscopeError, ShapeError
from rankscope.linalg import working_dtype
from rankscope.measures import MEASURES as MEASURES
from rankscope.measures import measures_shown
from rankscope.noise import Array, gd_omega, mp_median, mp_quantile, noise_edge, shrink_singular_values
from rankscope.structured import Hadamard, Kronecker
from rankscope.updates import Dense, LowRank, Update

CLUSTER_GAP = 0.01
"""Singular values closer than 1 % are a cluster: their singular vectors are arbitrary up to a rotation."""
SMALLEST_ENERGY = 1e-290
"""A smaller energy has lost digits to underflow, so neither its missing part nor a cosine can be computed from it."""


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Singular values of an update, with what is known of their precision.

    ``values``: (k,), float64, largest first; fewer than exist where the decomposition was truncated.
    ``energy``: the exact ‖·‖²_F, from which follows how much a truncation left out.
    ``shape``: (out, in). ``eps``: relative precision of the dtype the SVD was computed in.
    ``nominal_rank``: LoRA's r, None for a full update. ``stored``: dtype on disk.
    ``rounding``: root mean square of the rounding error per entry that storage can have left.

    Each measure is a property of type float (counts: int), 0 for a zero update. Singular values at or below
    √max(out, in)·eps·σ₁ are rounding errors and count as zero in every measure: √n·eps is the probabilistic error bound
    of Higham & Mary (SIAM J. Sci. Comput. 2019). ``numerical_rank`` alone uses n·eps, the worst case, by convention.
    For the remaining σ of every spectrum, 1 ≤ stable ≤ participation ≤ energy-entropy ≤ entropy ≤ ``nonzero``.
    On a truncated spectrum, a measure that the missing tail could change raises RankscopeError.

    Raises:
        NonFiniteError: NaN or infinity among the values.
        ShapeError: values that are not sorted, not a vector, or more than min(out, in).
    """

    values: Array
    energy: float
    shape: tuple[int, int]
    eps: float = 2.0**-52
    nominal_rank: int | None = None
    stored: str = "float64"
    rounding: float = 0.0

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 1 or not 1 <= len(values) <= min(self.shape):
            raise ShapeError(f"{self.shape} has 1 to {min(self.shape)} singular values, not {values.shape}")
        if not (np.isfinite(values).all() and math.isfinite(self.energy)):
            raise NonFiniteError("the singular values overflow; scale the weights down")
        if values[-1] < 0 or (np.diff(values) > 0).any():
            raise ShapeError("singular values must be non-negative and sorted, largest first")
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    @classmethod
    def of(cls, update: Update) -> Spectrum:
        """All singular values of an update."""
        return cls.from_values(update, update.singular_values())

    @classmethod
    def from_values(cls, update: Update, s: Tensor) -> Spectrum:
        """The spectrum of an update from its singular values ``s`` (k,): all of them, or the largest."""
        values = s.cpu().double().numpy()  # in this order: Apple's GPUs have no float64
        stored, rounding = torch.float32, 0.0
        if isinstance(update, Dense):
            stored, rounding = update.stored, update.rounding
        elif isinstance(update, LowRank):
            stored = update.B.dtype
        all_values = isinstance(update, LowRank) and len(values) >= min(*update.shape, update.nominal_rank)
        energy = float(values @ values) if all_values else update.energy
        eps = relative_precision(update, float(values[0]))
        return cls(values, energy, update.shape, eps, update.nominal_rank, str(stored).removeprefix("torch."), rounding)

    def top(self, k: int) -> Spectrum:
        """The k largest singular values, with the energy of all.

        Raises:
            ShapeError: k < 1.
        """
        if k < 1:
            raise ShapeError(f"a spectrum keeps at least one singular value, not {k}")
        return replace(self, values=self.values[:k])

    @property
    def limit(self) -> int:
        """The number of singular values that can differ from zero."""
        return min(*self.shape, self.nominal_rank or min(self.shape))

    @property
    def complete(self) -> bool:
        """Whether ``values`` has every singular value that can differ from zero."""
        return len(self.values) >= self.limit

    @property
    def missing_energy(self) -> float:
        """Σσ² of the singular values that a truncation left out; 0 for a complete spectrum."""
        return 0.0 if self.complete else max(0.0, self.energy - float(self.values @ self.values))

    @property
    def precision(self) -> float:
        """√max(out, in)·eps: the rounding error of a singular value relative to σ₁."""
        return math.sqrt(max(self.shape)) * self.eps

    @cached_property
    def ratios(self) -> Array:
        """σ/σ₁, (k,), zero where σ is rounding. Measures use these: squares of tiny or huge σ leave float64."""
        ratios = self.values / self.values[0] if self.values[0] > 0 else np.zeros_like(self.values)
        return np.where(ratios > self.precision, ratios, 0.0)

    @property
    def cutoff(self) -> float:
        """The largest σ that ``numerical_rank`` does not count."""
        return max(float(self.values[0]) * max(self.shape) * self.eps, noise_edge(self.rounding, self.shape))

    def _require(self, determined: bool, name: str) -> None:
        if not determined:
            kept, energy = len(self.values), self.energy or 1.0
            raise RankscopeError(
                f"{name} cannot be computed from the top {kept} of {self.limit} singular values, which leave out "
                f"{self.missing_energy / energy:.1%} of the energy; keep more of them"
            )

    @property
    def _tail_known(self) -> bool:
        return self.complete or self.ratios[-1] == 0

    def _relative_energy(self) -> float:
        """‖·‖²_F/σ₁², including the part that a truncation left out."""
        kept = float(self.ratios @ self.ratios)
        if self._tail_known:
            return kept
        self._require(self.energy > SMALLEST_ENERGY, "the energy, which underflows,")
        return max(kept, self.energy / float(self.values[0]) ** 2)

    @property
    def nonzero(self) -> int:
        """#{σ > σ₁·√max(out, in)·eps}, the σ that are not rounding."""
        self._require(self._tail_known, "the number of non-zero singular values")
        return int(np.count_nonzero(self.ratios))

    @property
    def numerical_rank(self) -> int:
        """#{σ > σ₁·max(out, in)·eps}, eps of the dtype the SVD was computed in (convention of numpy and torch).

        Where half-precision storage left rounding errors, σ must also exceed their Marchenko–Pastur edge.
        """
        self._require(self.complete or self.values[-1] <= self.cutoff, "numerical_rank")
        return int(np.count_nonzero(self.values > self.cutoff))

    @property
    def entropy_rank(self) -> float:
        """exp(−Σ p ln p), p = σ/Σσ. Roy & Vetterli, EUSIPCO 2007 (``erank``)."""
        self._require(self._tail_known, "entropy_rank")
        return _exp_entropy(self.ratios)

    @property
    def energy_entropy_rank(self) -> float:
        """exp(−Σ p ln p), p = σ²/Σσ². ``entropy_rank`` is another number: its p is σ/Σσ."""
        self._require(self._tail_known, "energy_entropy_rank")
        return _exp_entropy(self.ratios**2)

    @property
    def stable_rank(self) -> float:
        """Σσ²/σ₁². Rudelson & Vershynin, J. ACM 2007. It needs σ₁ and the energy only."""
        return self._relative_energy()

    @property
    def participation_ratio(self) -> float:
        """(Σσ²)²/Σσ⁴."""
        self._require(self._tail_known, "participation_ratio")
        energies = self.ratios**2
        return float(energies.sum() ** 2 / (energies @ energies)) if energies[0] else 0.0

    @property
    def nuclear_rank(self) -> float:
        """Σσ/σ₁, the nuclear norm over the spectral norm. Other authors give this name to (Σσ)²/Σσ²."""
        self._require(self._tail_known, "nuclear_rank")
        return float(self.ratios.sum())

    @property
    def k90(self) -> int:
        """Fewest k with Σ_{l≤k}σ² ≥ .9·Σσ². Biderman et al. 2024 use .9."""
        return self.energy_rank(0.90)

    @property
    def k95(self) -> int:
        """Fewest k with Σ_{l≤k}σ² ≥ .95·Σσ²."""
        return self.energy_rank(0.95)

    @property
    def k99(self) -> int:
        """Fewest k with Σ_{l≤k}σ² ≥ .99·Σσ²."""
        return self.energy_rank(0.99)

    def energy_rank(self, share: float) -> int:
        """Fewest k with Σ_{l≤k}σ² ≥ share·Σσ²; shares that differ by less than the precision of σ² count as equal.

        Raises:
            RankscopeError: the share is outside (0, 1], or a truncated spectrum stops before it.
        """
        if not 0 < share <= 1:
            raise RankscopeError(f"a share of the energy must be above 0 and at most 1, not {share}")
        if not self.ratios[0]:
            return 0
        reached = np.cumsum(self.ratios**2) >= (share - 2 * self.precision) * self._relative_energy()
        self._require(bool(reached[-1]), f"k{100 * share:g}")
        return int(np.argmax(reached)) + 1

    def measures(self) -> dict[str, float | int]:
        """Every measure of ``MEASURES`` by its name; one that a missing tail could change is left out."""
        values: dict[str, float | int] = {}
        for name, measure in MEASURES.items():
            with suppress(RankscopeError):
                values[name] = measure(self)
        return values

    @property
    def gaps(self) -> Array:
        """(σ_k − σ_{k+1})/σ_k at every cut k = 1, 2, …: 0 where σ_k is zero, NaN where σ_{k+1} is not known."""
        return relative_gaps(self.ratios, 0.0 if self._tail_known else math.nan)

    def in_cluster(self, k: int) -> bool:
        """Whether σ_k and σ_{k+1} are closer than ``CLUSTER_GAP``, so that the top-k subspace is arbitrary.

        Raises:
            ShapeError: there is no cut k.
            RankscopeError: a truncation left out σ_{k+1}.
        """
        if not 1 <= k <= len(self.values):
            raise ShapeError(f"there is no cut {k} in a spectrum of {len(self.values)} singular values")
        self._require(not math.isnan(self.gaps[k - 1]), f"the gap at cut {k}")
        return bool(self.gaps[k - 1] < CLUSTER_GAP)

    def _summary(self) -> dict[str, str]:
        values = self.measures()
        shown = {measure.name: values.get(measure.name) for measure in measures_shown("summary")}
        return {
            "shape": f"{self.shape[0]} × {self.shape[1]}",
            "nominal rank": str(self.nominal_rank or "none (full)"),
            "singular values": f"{len(self.values)} of {self.limit}",
            **{name.replace("_", " "): "unknown" if x is None else f"{x:.4g}" for name, x in shown.items()},
        }

    def __repr__(self) -> str:
        return f"Spectrum({', '.join(f'{name} {value}' for name, value in self._summary().items())})"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in self._summary().items())
        return f"<table>{rows}</table>"


def relative_precision(update: Update, first: float) -> float:
    """Precision of an update's σ relative to σ₁ = ``first``: that of the dtype, or a larger one where factors cancel.

    A product B · A has errors of eps·max_l ‖b_l‖‖a_l‖ over its r rank-one terms; after x + (−x), only those remain. The
    terms of a Hadamard product are (b₁ₗ ∘ b₂ₘ)(a₁ₗ ∘ a₂ₘ), r₁·r₂ of them. The σ of a Kronecker product are products of
    σ, whose relative errors add.
    """
    if first == 0 or isinstance(update, Dense):
        return update.eps
    if isinstance(update, Kronecker):
        return _factor_precision(update.W1) + _factor_precision(update.W2)
    largest = float(_term_norms(update).max()) if isinstance(update, LowRank | Hadamard) else 0.0
    return max(update.eps, torch.finfo(working_dtype(update.device)).eps * largest / first)


def _factor_precision(factor: LowRank | Dense) -> float:
    """``relative_precision`` of a factor of a Kronecker product, relative to its own σ₁."""
    return factor.eps if isinstance(factor, Dense) else relative_precision(factor, float(factor.singular_values()[0]))


def _term_norms(update: LowRank | Hadamard) -> Tensor:
    """‖b‖‖a‖ of the rank-one terms whose sum the update is: (r,) or (r₁, r₂)."""
    if isinstance(update, LowRank):
        return update.terms
    first, second = update.first, update.second
    left: Tensor = (first.left.square().T @ second.left.square()).sqrt()
    return left * (first.right.square() @ second.right.square().T).sqrt()


def relative_gaps(values: Array, beyond: float) -> Array:
    """(σ_k − σ_{k+1})/σ_k for k = 1 … len(values), with ``beyond`` as the σ after the last; 0 where σ_k = 0."""
    following = np.append(values[1:], beyond)
    gaps: Array = np.divide(values - following, values, out=np.zeros_like(values), where=values > 0)
    return gaps


def _exp_entropy(weights: Array) -> float:
    kept = weights[weights > 0]
    if not len(kept):
        return 0.0
    p = kept / kept.sum()
    return float(np.exp(-(p @ np.log(p))))


@lru_cache(maxsize=64)
def noise_spectrum(shape: tuple[int, int]) -> Spectrum:
    """Spectrum of a noise matrix with independent entries of variance 1.

    σ_l is the quantile 1 − (l − ½)/min(out, in) of the Marchenko–Pastur law: exact as the shape grows, within about 2 %
    from 64 × 64 on.
    """
    m, n = sorted(shape)
    levels = 1 - (np.arange(m) + 0.5) / m
    values = np.sqrt(n * mp_quantile(levels, m / n))
    return Spectrum(values, float(values @ values), shape)


def noise_measures(shape: tuple[int, int]) -> dict[str, float | int]:
    """Every measure of a noise matrix of this shape (out, in), for comparison with those of an update."""
    return noise_spectrum((int(shape[0]), int(shape[1]))).measures()


def _median(spectrum: Spectrum) -> float | None:
    """Median σ, or None where it does not measure noise."""
    full = spectrum.nominal_rank is None and len(spectrum.values) == min(spectrum.shape) > 1
    median = float(np.median(spectrum.values))
    return median if full and median > spectrum.values[0] * spectrum.precision else None


def mp_edge(spectrum: Spectrum) -> float | None:
    """σ̂(√out + √in), the largest σ of noise with the same median σ: σ̂² = median(σ²)/(n·μ_β), n = max(out, in).

    None where the median does not measure noise: an update of known low rank, one whose median is zero, a truncated
    spectrum, or a single singular value.
    """
    median = _median(spectrum)
    if median is None:
        return None
    m, n = sorted(spectrum.shape)
    return noise_edge(median / math.sqrt(n * mp_median(m / n)), spectrum.shape)


def mp_count(spectrum: Spectrum) -> int | None:
    """#{σ > mp_edge}, the singular values that noise does not explain. None where ``mp_edge`` is."""
    edge = mp_edge(spectrum)
    return None if edge is None else int(np.count_nonzero(spectrum.values > edge))


def gd_count(spectrum: Spectrum) -> int | None:
    """#{σ > ω(β)·median(σ)}, the σ to keep for the least squared error. None where ``mp_edge`` is."""
    median = _median(spectrum)
    if median is None:
        return None
    m, n = sorted(spectrum.shape)
    return int(np.count_nonzero(spectrum.values > gd_omega(m / n) * median))


@dataclass(frozen=True)
class RoundingFloor:
    """The rounding errors that storing the tuned weight in ``dtype`` can have added to an update.

    ``norm``: their Frobenius norm. ``edge``: their largest σ. ``share``: norm/‖update‖ (0 for a zero update; above 1
    where storage erased most of the update). ``above``: #{σ > edge}. ``measures``: those of the spectrum after
    ``denoise_spectrum``.
    """

    dtype: str
    norm: float
    edge: float
    share: float
    above: int
    measures: dict[str, float | int]


def rounding_floor(spectrum: Spectrum) -> RoundingFloor | None:
    """The rounding floor of a full update from half-precision files; None for float32 and finer.

    Raises:
        RankscopeError: a truncated spectrum that does not reach down to the floor's edge.
    """
    if spectrum.rounding <= 0:
        return None
    edge = noise_edge(spectrum.rounding, spectrum.shape)
    spectrum._require(spectrum.complete or spectrum.values[-1] <= edge, "the number of σ above the rounding floor")
    norm = spectrum.rounding * math.sqrt(math.prod(spectrum.shape))
    total = math.sqrt(spectrum.energy)
    above = int(np.count_nonzero(spectrum.values > edge))
    measures = denoise_spectrum(spectrum, spectrum.rounding).measures()
    return RoundingFloor(spectrum.stored, norm, edge, norm / total if total else 0.0, above, measures)


def denoise_spectrum(spectrum: Spectrum, per_entry: float) -> Spectrum:
    """The spectrum after ``noise.shrink_singular_values`` for noise with this root mean square per entry."""
    values = np.zeros(min(spectrum.shape))
    values[: len(spectrum.values)] = shrink_singular_values(spectrum.values, per_entry, spectrum.shape)
    return replace(spectrum, values=values, energy=float(values @ values), rounding=0.0)
