"""The top of a full update's spectrum by block Krylov, and what that says of every measure: bounds, never a guess."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rankscope.linalg import leading_triplets, sketch_is_cheaper
from rankscope.measures import MEASURES, Measure
from rankscope.noise import Array
from rankscope.spectra import RoundingFloor, Spectrum, rounding_floor
from rankscope.updates import Dense, Update

Bounds = tuple[float, float]
AGREEMENT_TOLERANCE = 5e-4
"""Bounds that differ by less of the upper one are one number, to the four digits that tables show."""


@dataclass(frozen=True, eq=False, repr=False)
class Sketch:
    """The k largest singular values of an update, how far they can be off, and the exact energy of all.

    ``top``: the spectrum, cut after k values, each of which is a Ritz value and so at most the singular value it stands
    for. ``errors``: (k,); the l-th singular value is at most ``top.values[l] + errors[l]``. ``further``: Ritz values
    after those, lower bounds of the singular values that follow. ``residuals``: (k,), ‖Mᵀu − σv‖.

    ``errors[l]`` is √Σ_{j≤l} residual², by the theorem that l Ritz values have l singular values within the norm of
    their block of residuals (Parlett 1998, theorem 11.5.2). That these are the *largest* is not in the residuals: a
    direction that the random start has nothing of is never found, which happens with probability zero.
    """

    top: Spectrum
    errors: Array
    residuals: Array
    further: Array

    @classmethod
    def of(cls, update: Dense, k: int, columns: int | None = None) -> Sketch:
        """Of the k largest, by ``rankscope.linalg.leading``."""
        found = leading_triplets(update.matrix, k, columns)
        residuals: Array = found.residuals.cpu().double().numpy()
        top = Spectrum.from_values(update, found.svd.s)
        errors: Array = np.sqrt(np.cumsum(residuals**2))
        return cls(top, errors, residuals, np.minimum(found.further.cpu().double().numpy(), top.values[-1]))

    @property
    def _flattest(self) -> Array:
        """The least concentrated energies that are possible: the Ritz values', then all alike.

        Any Σ_{i≤j}σ² is at least that of the first j Ritz values (Cauchy's interlacing), so the true energies majorise
        these. Ritz values below the mean of what they leave say nothing and are left out.
        """
        energies = np.concatenate((self.top.values, self.further)) ** 2
        n, j = self.top.limit, np.arange(1, len(energies) + 1)
        left = np.maximum(self.top.energy - np.cumsum(energies), 0.0)
        means = np.divide(left, n - j, out=np.zeros_like(left), where=n > j)
        useful = int(np.flatnonzero(means <= energies)[-1]) + 1 if (means <= energies).any() else 0
        rest = means[useful - 1] if useful else self.top.energy / n
        return np.concatenate((energies[:useful], np.full(n - useful, rest)))

    @property
    def _highest(self) -> Array:
        """The most that each energy can be: its own bound and those before it."""
        highest = np.minimum.accumulate(self.top.values + self.errors) ** 2
        return np.concatenate((highest, np.full(self.top.limit - len(highest), highest[-1])))

    def _steepest(self, energy: float) -> Array:
        """The most concentrated energies with this sum: as large as they can be, one after another."""
        steepest: Array = np.diff(np.minimum(np.cumsum(self._highest), energy), prepend=0.0)
        return steepest

    @property
    def _rounding(self) -> float:
        """Energy of the σ that may be left and count as zero."""
        first, n = float(self.top.values[0]), self.top.limit - len(self.top.values)
        left: float = self.top.energy - float(self.top.values @ self.top.values)
        return max(0.0, min(left, n * (self.top.precision * first) ** 2))

    def bounds(self) -> dict[str, Bounds]:
        """Lower and upper bound of each of ``MEASURES``, to the precision of the dtype; equal where nothing is open.

        Every measure but ``numerical_rank`` and ``entropy_rank`` is monotone in the majorisation order of the energies
        (Marshall, Olkin & Arnold 2011, 3.C), so the extremes are at the steepest and the flattest that are possible.
        """
        if self.top.energy == 0 or self.top.complete:
            return {name: (float(measure(self.top)),) * 2 for name, measure in MEASURES.items()}
        flat = self._flattest
        steep = [self._steepest(energy) for energy in (self.top.energy, self.top.energy - self._rounding)]
        return {name: self._bounds_of(measure, flat, steep) for name, measure in MEASURES.items()}

    def _bounds_of(self, measure: Measure, flat: Array, steep: list[Array]) -> Bounds:
        """Bounds by the measure's own rule; those of any rank where it has none."""
        match measure.bound:
            case "majorisation":
                return self._extremes(measure, flat, steep)
            case "share":
                return self._energy_ranks(measure.share, flat, steep[0])
            case "cutoff":
                return self._counts(self.top.cutoff)
            case "entropy":
                return self._entropy(flat, steep)
        return 0.0, float(self.top.limit)

    def _extremes(self, measure: Measure, flat: Array, steep: list[Array]) -> Bounds:
        low = min(measure(self._with(energies)) for energies in steep)
        return float(low), float(max(low, measure(self._with(flat))))

    def _with(self, energies: Array) -> Spectrum:
        values = np.sqrt(np.sort(np.maximum(energies, 0.0))[::-1] / energies.max())
        return Spectrum(values, float(values @ values), self.top.shape, 0.0)

    def _energy_ranks(self, share: float, flat: Array, steep: Array) -> Bounds:
        """Energies closer than the precision of σ² are equal, so a share may be reached that much earlier."""
        least, most = (share - 2 * self.top.precision) * steep.sum(), share * flat.sum()
        reached = np.cumsum(flat) >= most * (1 - 1e-12)
        return float(1 + np.argmax(np.cumsum(steep) >= least)), float(1 + np.argmax(reached))

    def _counts(self, above: float) -> Bounds:
        """#{σ > above}: those seen, or that the energy needs where all others lie below; those that it suffices for."""
        lower, highest = np.concatenate((self.top.values, self.further)), self._highest
        seen, n = int(np.count_nonzero(lower > above)), self.top.limit
        if highest[-1] <= above**2:
            return float(seen), float(np.count_nonzero(highest > above**2))
        doubt = 2 * self.top.precision * self.top.energy
        enough = np.cumsum(highest - above**2) + n * above**2 >= self.top.energy - doubt
        left = max(0.0, self.top.energy - float((lower[:seen] ** 2).sum())) + doubt
        return float(max(seen, 1 + int(np.argmax(enough)))), float(min(n, seen + math.floor(left / above**2)))

    def _entropy(self, flat: Array, steep: list[Array]) -> Bounds:
        """exp H with H = ln S + L/S, S = Σσ and L = −Σσ ln σ in units of the largest that σ₁ can be.

        S and L are concave in the energies, so both lie between their values at the extremes; H does too where no σ
        that is still open has a p above e/exp(H), the range in which H itself falls with concentration.
        """
        unit = float(steep[0][0])
        S_high, L_high = _sums(flat / unit)
        S_low, L_low = (min(sums) for sums in zip(*(_sums(energies / unit) for energies in steep), strict=True))
        high = min(max(_entropy_of(S, L_high) for S in (S_low, S_high)), math.log(self.top.limit))
        low = _entropy_of(min(max(L_low, S_low), S_high), L_low)
        loose = np.flatnonzero(self.errors > self.top.precision * self.top.values[0])
        first = int(loose[0]) if len(loose) else len(self.errors) - 1
        if math.sqrt(steep[0][first] / unit) / S_low * math.exp(high) <= math.e:
            low = max(low, min(_entropy_of(*_sums(energies / unit)) for energies in steep))
            high = min(high, _entropy_of(S_high, L_high))
        return math.exp(low), math.exp(max(low, high))

    def floor(self) -> RoundingFloor | None:
        """The rounding floor, with the measures that are known above it; None also where the sketch ends above it."""
        return rounding_floor(self.top) if self.top.values[-1] + self.errors[-1] <= self.top.cutoff else None


def resolve_bounds(name: str, low: float, high: float) -> float | int | None:
    """The one number that two bounds stand for; None where they differ."""
    if MEASURES[name].is_count:
        return int(low) if low == high else None
    return (low + high) / 2 if high - low <= AGREEMENT_TOLERANCE * high else None


def _sums(energies: Array) -> tuple[float, float]:
    kept = energies[energies > 0]
    values = np.sqrt(kept)
    return float(values.sum()), float(-(values * np.log(kept)).sum() / 2)


def _entropy_of(S: float, L: float) -> float:
    return math.log(S) + L / S


def sketch_update(update: Update, k: int) -> Sketch | None:
    """The sketch of an update's top k; None where an exact spectrum costs no more."""
    return Sketch.of(update, k) if isinstance(update, Dense) and sketch_is_cheaper(update.shape, k) else None
