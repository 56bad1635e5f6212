"""The largest singular values of a full update by block Krylov, and bounds on every measure that follow from them."""

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
"""Two bounds closer than this share of the upper one count as one number: tables show four digits."""


@dataclass(frozen=True, eq=False, repr=False)
class Sketch:
    """Approximations of an update's k largest singular values, bounds on their errors, and the exact energy of all.

    ``top``: the spectrum, cut after k values. Each is a Ritz value and so at most the singular value that it
    approximates. ``errors``: (k,); the l-th singular value is at most ``top.values[l] + errors[l]``. ``further``: the
    next Ritz values, lower bounds of the singular values that follow. ``residuals``: (k,), ‖Mᵀu − σv‖.

    ``errors[l]`` is √Σ_{j≤l} residual², by the theorem that l Ritz values have l singular values within the norm of
    their block of residuals (Parlett 1998, theorem 11.5.2). The residuals do not prove that these are the *largest*
    values: a direction orthogonal to the random start would be missed, which has probability zero.
    """

    top: Spectrum
    errors: Array
    residuals: Array
    further: Array

    @classmethod
    def of(cls, update: Dense, k: int, columns: int | None = None) -> Sketch:
        """The sketch of the k largest singular values, by ``linalg.leading_triplets``."""
        triplets = leading_triplets(update.matrix, k, columns)
        residuals: Array = triplets.residuals.cpu().double().numpy()
        top = Spectrum.from_values(update, triplets.svd.s)
        errors: Array = np.sqrt(np.cumsum(residuals**2))
        return cls(top, errors, residuals, np.minimum(triplets.further.cpu().double().numpy(), top.values[-1]))

    @property
    def _flattest(self) -> Array:
        """The least concentrated energies (n,) that are possible: those of the Ritz values, then equal ones.

        Any Σ_{i≤j}σ² is at least that of the first j Ritz values (Cauchy's interlacing), so the true energies majorise
        these. A Ritz value below the mean of the energies that remain after it gives no bound and is left out.
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
        """The upper bound of each energy (n,): the least of its own and of those before it."""
        highest = np.minimum.accumulate(self.top.values + self.errors) ** 2
        return np.concatenate((highest, np.full(self.top.limit - len(highest), highest[-1])))

    def _steepest(self, energy: float) -> Array:
        """The most concentrated energies (n,) with this sum: each at its upper bound until the sum is used up."""
        steepest: Array = np.diff(np.minimum(np.cumsum(self._highest), energy), prepend=0.0)
        return steepest

    @property
    def _rounding(self) -> float:
        """The most energy that σ outside of ``top`` can have while they count as zero."""
        first, n = float(self.top.values[0]), self.top.limit - len(self.top.values)
        left: float = self.top.energy - float(self.top.values @ self.top.values)
        return max(0.0, min(left, n * (self.top.precision * first) ** 2))

    def bounds(self) -> dict[str, Bounds]:
        """Lower and upper bound of each of ``MEASURES``, to the precision of the dtype; equal where it is certain.

        Every measure but ``numerical_rank`` and ``entropy_rank`` is monotone in the majorisation order of the energies
        (Marshall, Olkin & Arnold 2011, 3.C), so its extremes are those of the steepest and the flattest energies.
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
        low = min(measure(self._make_spectrum(energies)) for energies in steep)
        return float(low), float(max(low, measure(self._make_spectrum(flat))))

    def _make_spectrum(self, energies: Array) -> Spectrum:
        """A spectrum of this shape with these energies (n,), scaled to σ₁ = 1."""
        values = np.sqrt(np.sort(np.maximum(energies, 0.0))[::-1] / energies.max())
        return Spectrum(values, float(values @ values), self.top.shape, 0.0)

    def _energy_ranks(self, share: float, flat: Array, steep: Array) -> Bounds:
        """Bounds of the fewest k with this share of the energy.

        Energies closer than the precision of σ² count as equal, so the share may be reached that much earlier.
        """
        least, most = (share - 2 * self.top.precision) * steep.sum(), share * flat.sum()
        reached = np.cumsum(flat) >= most * (1 - 1e-12)
        return float(1 + np.argmax(np.cumsum(steep) >= least)), float(1 + np.argmax(reached))

    def _counts(self, above: float) -> Bounds:
        """Bounds of #{σ > above}.

        At least so many as the Ritz values show, or as the energy needs if all others lie at ``above``; at most so many
        as the remaining energy suffices for.
        """
        lower, highest = np.concatenate((self.top.values, self.further)), self._highest
        seen, n = int(np.count_nonzero(lower > above)), self.top.limit
        if highest[-1] <= above**2:
            return float(seen), float(np.count_nonzero(highest > above**2))
        doubt = 2 * self.top.precision * self.top.energy
        enough = np.cumsum(highest - above**2) + n * above**2 >= self.top.energy - doubt
        left = max(0.0, self.top.energy - float((lower[:seen] ** 2).sum())) + doubt
        return float(max(seen, 1 + int(np.argmax(enough)))), float(min(n, seen + math.floor(left / above**2)))

    def _entropy(self, flat: Array, steep: list[Array]) -> Bounds:
        """Bounds of exp H, where H = ln S + L/S, S = Σσ and L = −Σσ ln σ, in units of the largest possible σ₁.

        S and L are concave in the energies, so both lie between their values at the extremes. H does too where every σ
        that is not certain has p ≤ e/exp(H), the range in which H itself falls with concentration.
        """
        unit = float(steep[0][0])
        S_high, L_high = _sums(flat / unit)
        S_low, L_low = (min(sums) for sums in zip(*(_sums(energies / unit) for energies in steep), strict=True))
        high = min(max(_entropy_of(S, L_high) for S in (S_low, S_high)), math.log(self.top.limit))
        low = _entropy_of(min(max(L_low, S_low), S_high), L_low)
        uncertain = np.flatnonzero(self.errors > self.top.precision * self.top.values[0])
        first = int(uncertain[0]) if len(uncertain) else len(self.errors) - 1
        if math.sqrt(steep[0][first] / unit) / S_low * math.exp(high) <= math.e:
            low = max(low, min(_entropy_of(*_sums(energies / unit)) for energies in steep))
            high = min(high, _entropy_of(S_high, L_high))
        return math.exp(low), math.exp(max(low, high))

    def floor(self) -> RoundingFloor | None:
        """The rounding floor and the measures above it; None without a floor, or where the sketch does not reach it."""
        return rounding_floor(self.top) if self.top.values[-1] + self.errors[-1] <= self.top.cutoff else None


def resolve_bounds(name: str, low: float, high: float) -> float | int | None:
    """The number that two bounds of a measure agree on (``AGREEMENT_TOLERANCE``); None where they differ."""
    if MEASURES[name].is_count:
        return int(low) if low == high else None
    return (low + high) / 2 if high - low <= AGREEMENT_TOLERANCE * high else None


def _sums(energies: Array) -> tuple[float, float]:
    """S = Σσ and L = −Σσ ln σ of energies σ²."""
    kept = energies[energies > 0]
    values = np.sqrt(kept)
    return float(values.sum()), float(-(values * np.log(kept)).sum() / 2)


def _entropy_of(S: float, L: float) -> float:
    return math.log(S) + L / S


def sketch_update(update: Update, k: int) -> Sketch | None:
    """The sketch of an update's k largest singular values; None where an exact spectrum costs no more."""
    return Sketch.of(update, k) if isinstance(update, Dense) and sketch_is_cheaper(update.shape, k) else None
