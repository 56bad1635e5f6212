"""``spectrum``: the singular values and effective ranks of every layer."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import msgspec
import torch

from rankscope.analysis.display import html_table, short_name
from rankscope.analysis.sources import Readable, Source, select_layers
from rankscope.analysis.spectrum_tables import layer_table
from rankscope.analysis.worker_threads import Job, compute_items
from rankscope.errors import ConfigError, prefix_errors
from rankscope.formats.abstract_store import SkippedItem
from rankscope.formats.opening import Opening
from rankscope.measures import MEASURES, measures_shown
from rankscope.result import Result, find_layer
from rankscope.sketch import AGREEMENT_TOLERANCE, Bounds, resolve_bounds, sketch_update
from rankscope.spectra import (
    RoundingFloor,
    Spectrum,
    gd_count,
    mp_count,
    mp_edge,
    noise_measures,
    rounding_floor,
)
from rankscope.track import Track
from rankscope.updates import Update

SCHEMA = "rankscope.spectrum/1"
Measures = dict[str, float | int]


class LayerSpectrum(msgspec.Struct, frozen=True, kw_only=True):
    """One layer. ``shape`` is (out, in); ``nominal_rank`` LoRA's r, None for an update that is no product.

    ``singular_values``: largest first, of ``count`` that can differ from zero; the list may be cut, the measures take
    all. ``noise``, for full updates only: the same measures of a noise matrix of this shape, the noise edge that the
    median σ suggests and the counts above it (None where the median is zero). ``rounding_floor``: what storing in
    half precision can have added (``rankscope.spectra.RoundingFloor``). For sketched layers only: ``bounds``, lower and
    upper bound of every measure, where ``measures`` has those whose bounds agree; ``residuals``, ‖Mᵀu − σv‖ of each
    singular value (``rankscope.sketch.Sketch``).
    """

    name: str
    shape: tuple[int, int]
    nominal_rank: int | None
    scale: float
    dtype: str
    energy: float
    singular_values: tuple[float, ...]
    count: int
    measures: Measures
    noise: dict[str, float | int | None] | None
    rounding_floor: RoundingFloor | None
    bounds: dict[str, Bounds] | None = None
    residuals: tuple[float, ...] | None = None

    def interval(self, measure: str) -> Bounds:
        """The bounds of a measure, equal where it is known."""
        return self.bounds[measure] if self.bounds else (self.measures[measure],) * 2

    @property
    def norm(self) -> float:
        """‖·‖_F."""
        return math.sqrt(self.energy)

    @property
    def full(self) -> bool:
        """Whether the update is no product of thin factors."""
        return self.nominal_rank is None


class SpectrumTotals(msgspec.Struct, frozen=True, kw_only=True):
    """All layers together. ``zero``: number of layers that have not changed; they count in neither average.

    ``median``: of each measure over layers. ``weighted_mean``: weighted by the energy of layers. Where layers were
    sketched, both have the measures that are known to four digits, and ``bounds`` those of every median.
    """

    layers: int
    zero: int
    energy: float
    norm: float
    median: dict[str, float]
    weighted_mean: dict[str, float]
    bounds: dict[str, Bounds] | None = None


class SpectrumResult(Result, frozen=True, kw_only=True):
    """Spectra of all layers of one source."""

    schemas: ClassVar = (SCHEMA,)
    schema: str = SCHEMA
    path: str
    kind: str
    layers: tuple[LayerSpectrum, ...]
    total: SpectrumTotals
    skipped: tuple[SkippedItem, ...]
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> LayerSpectrum:
        """The layer of that name; KeyError where there is none."""
        return find_layer(self.layers, name)

    @property
    def title(self) -> str:
        """The end of the path that tells runs apart."""
        return short_name(self.path)

    def __repr__(self) -> str:
        known = [measure.name for measure in measures_shown("summary") if measure.name in self.total.median]
        ranks = ", ".join(f"{name} {self.total.median[name]:.4g}" for name in known)
        return f"SpectrumResult({self.title!r}: {len(self.layers)} layers, median {ranks}, norm {self.total.norm:.4g})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), layer_table(self), self.notes)


def spectrum(
    source: Readable,
    base: str | os.PathLike[str] | None = None,
    layers: str | Iterable[str] | None = None,
    top: int | None = None,
    device: torch.device | str = "cpu",
    track: Track = iter,
    alpha: float | None = None,
    workers: int | None = None,
    sketch: int | None = None,
    initial: str | os.PathLike[str] | None = None,
) -> SpectrumResult:
    """Singular values and effective ranks of every layer.

    Args:
        source: path of an adapter, a run, a file of updates or a checkpoint; a store; or a mapping of names to
            updates.
        base: checkpoint that a path's full weights were tuned from.
        layers: globs of whole names, or dotted parts of them (``q_proj``, ``layers.0``); None takes all.
        top: how many singular values of each layer the result keeps; the measures are of all.
        device: where the decompositions run.
        track: wraps the list of names and may show progress.
        alpha: α of a path's layers where the file has none.
        workers: one-thread workers that compute the layers with thin factors; None takes as many as torch would use
            threads. The result is the same to the bit.
        sketch: number of singular values to find in full updates, where that is much cheaper than all of them; measures
            that the rest could change get bounds (``rankscope.sketch``).
        initial: the adapter before training, where its initialisation moved the base (PiSSA and others).

    Raises:
        RankscopeError: there is nothing to read, nothing fits ``layers``, or a layer holds NaN or infinity.
    """
    return measure_spectra(source, Opening(base, alpha, initial, device), layers, top, track, workers, sketch)


def measure_spectra(
    source: Readable,
    opening: Opening,
    layers: str | Iterable[str] | None = None,
    top: int | None = None,
    track: Track = iter,
    workers: int | None = None,
    sketch: int | None = None,
) -> SpectrumResult:
    """``spectrum`` of a source with its opening.

    Raises:
        RankscopeError: as for ``spectrum``.
    """
    if sketch is not None and sketch < 1:
        raise ConfigError(f"sketch = {sketch}: find at least one singular value")
    if top is not None and top < 1:
        raise ConfigError(f"top = {top}: keep at least one singular value")
    opened = Source.of(source, opening)
    names = select_layers(opened.names(), layers, opened.label)

    job = Job(
        kind=opened.batch_key,
        read=lambda name: [opened.read(name)],
        compute=lambda name, updates: _measure_layer(opened, name, updates[0], top, sketch),
        cost=lambda name: opened.cost(name, sketch),
    )
    spectra = tuple(compute_items(names, job, opened.device, workers, track, opened.can_read_ahead))
    notes = (*opened.notes, *_zero_note(spectra), *_sketch_note(spectra))
    return SpectrumResult(
        path=opened.label, kind=opened.kind, layers=spectra, total=_total(spectra), skipped=opened.skipped, notes=notes
    )


def _measure_layer(source: Source, name: str, update: Update, top: int | None, sketch: int | None) -> LayerSpectrum:
    info = source.info(name)
    with prefix_errors(source.layer_label(name)):
        sketched = sketch_update(update, sketch) if sketch else None
        spectrum = sketched.top if sketched else Spectrum.of(update)
        bounds = sketched.bounds() if sketched else None
    return LayerSpectrum(
        name=name,
        shape=spectrum.shape,
        nominal_rank=spectrum.nominal_rank,
        scale=info.scale if info else getattr(update, "scale", 1.0),
        dtype=str(info.dtype).removeprefix("torch.") if info else spectrum.stored,
        energy=spectrum.energy,
        singular_values=tuple(spectrum.values[:top].tolist()),
        count=len(spectrum.values),
        measures=_resolve_measures(bounds) if bounds else spectrum.measures(),
        noise=_noise(update, spectrum),
        rounding_floor=sketched.floor() if sketched else rounding_floor(spectrum),
        bounds=bounds,
        residuals=tuple(sketched.residuals[:top].tolist()) if sketched else None,
    )


def _resolve_measures(bounds: Mapping[str, Bounds]) -> Measures:
    """The measures whose bounds agree."""
    return {name: value for name, ends in bounds.items() if (value := resolve_bounds(name, *ends)) is not None}


def _sketch_note(layers: Sequence[LayerSpectrum]) -> list[str]:
    sketched = [layer for layer in layers if layer.residuals]
    if not sketched:
        return []
    worst = max(max(layer.residuals or (0.0,)) / (layer.singular_values[0] or 1.0) for layer in sketched)
    without_floor = sum(layer.dtype in ("bfloat16", "float16") and layer.rounding_floor is None for layer in sketched)
    floor = f"; {without_floor} of them end above the rounding floor, which is unknown" if without_floor else ""
    return [
        f"{len(sketched)} of {len(layers)} layers were sketched: measures that the rest of the spectrum could change "
        f"have bounds (largest residual {worst:.1e} of the first singular value){floor}"
    ]


def _noise(update: Update, spectrum: Spectrum) -> dict[str, float | int | None] | None:
    """Measures of noise of the update's shape; None for a product, whose rank its factors limit."""
    if update.nominal_rank is not None:
        return None
    counts = {"mp_edge": mp_edge(spectrum), "mp_count": mp_count(spectrum), "gd_count": gd_count(spectrum)}
    return {**noise_measures(spectrum.shape), **counts}


def _zero_note(layers: Sequence[LayerSpectrum]) -> list[str]:
    zero = [layer.name for layer in layers if layer.energy == 0]
    if not zero:
        return []
    factors = " (a factor is still at its initial zero)" if not layers[0].full else ""
    return [f"{len(zero)} of {len(layers)} layers have not changed{factors}: {zero[0]}{', …' if len(zero) > 1 else ''}"]


def _total(layers: Sequence[LayerSpectrum]) -> SpectrumTotals:
    changed = [layer for layer in layers if layer.energy > 0]
    energy = math.fsum(layer.energy for layer in layers)

    def mean(name: str, end: int) -> float:
        return math.fsum(layer.interval(name)[end] * (layer.energy / energy) for layer in changed)

    def median(name: str, end: int) -> float:
        return float(statistics.median([layer.interval(name)[end] for layer in changed] or [0]))

    medians, means = ({m: (of(m, 0), of(m, 1)) for m in MEASURES} for of in (median, mean))
    return SpectrumTotals(
        layers=len(layers),
        zero=len(layers) - len(changed),
        energy=energy,
        norm=math.sqrt(energy),
        median=_resolve_averages(medians),
        weighted_mean=_resolve_averages(means),
        bounds=medians if any(layer.bounds for layer in layers) else None,
    )


def _resolve_averages(bounds: Mapping[str, Bounds]) -> dict[str, float]:
    """The averages whose bounds are equal, or agree to four digits, where their mean is taken."""
    return {
        name: low if low == high else (low + high) / 2
        for name, (low, high) in bounds.items()
        if high - low <= AGREEMENT_TOLERANCE * high
    }
