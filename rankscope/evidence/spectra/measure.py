"""Spectra of the updates against their nulls: noise, the rounding floor, and for LoRA the rank it was given."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec
import numpy as np

from rankscope.analysis.layer_spectra import LayerSpectrum
from rankscope.evidence.material import Material, group_by_rank
from rankscope.formats.names import layer_kind, natural_key
from rankscope.inference import Interval
from rankscope.spectra import MEASURES, noise_spectrum
from rankscope.train.results import RunResult
from rankscope.train.study import GridEdge
from rankscope.verdict import (
    LOW_RANK_SHARE,
    MIN_LAYERS,
    Answer,
    MissingEvidenceError,
    Verdict,
    answer_above,
    answer_low_rank,
    format_interval,
    median_over_layers,
)

FULL_LABEL = "full"
FLOOR = 0.5
"""Where rounding can make up more than this share of an update's norm, its rank is not told."""
USED = 0.5
"""LoRA uses its rank where the entropy rank of its update is at least this share of it."""


class LayerRanks(msgspec.Struct, frozen=True, kw_only=True):
    """The update of one layer by one method: means over seeds.

    ``label`` is "full" or "r = 8"; ``rank`` the nominal rank, None for full fine-tuning. ``measures`` has every name of
    ``rankscope.spectra.MEASURES``. For full fine-tuning only: ``noise``, the same measures of a noise matrix of this
    shape, and the counts of σ above its edge (None where the median σ says nothing of noise). ``floor``: the share of
    the norm that storing in half precision can have added, None where it was stored exactly; ``above_floor`` the number
    of σ above it. ``most``: how many σ can differ from zero, for PiSSA's saved update 2r.
    """

    label: str
    rank: int | None
    name: str
    kind: str
    shape: tuple[int, int]
    seeds: int
    norm: float
    measures: dict[str, float]
    noise: dict[str, float] | None
    mp_count: float | None
    gd_count: float | None
    floor: float | None
    above_floor: float | None
    most: int

    @property
    def dim(self) -> int:
        """The smaller side."""
        return min(self.shape)


class KindRanks(msgspec.Struct, frozen=True, kw_only=True):
    """The layers of one kind by one method: medians over layers, and the kind's share of the squared norm of all."""

    label: str
    rank: int | None
    kind: str
    layers: int
    dim: float
    energy: float
    measures: dict[str, float]
    noise: dict[str, float] | None


class SpectrumCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Singular values, largest first: the geometric mean over seeds."""

    label: str
    rank: int | None
    values: tuple[float, ...]


class JointSpectrum(msgspec.Struct, frozen=True, kw_only=True):
    """Spectra of one layer by every method: the layer of median energy of its kind, under the first of ``curves``.

    ``noise``: σ of a noise matrix of this shape with the energy of the first curve. ``mp_edge``, ``rounding_edge``: the
    largest σ of noise and of rounding, None where there is none.
    """

    kind: str
    name: str
    shape: tuple[int, int]
    curves: tuple[SpectrumCurve, ...]
    noise: tuple[float, ...]
    mp_edge: float | None
    rounding_edge: float | None


class Spectra(msgspec.Struct, frozen=True, kw_only=True):
    """Spectra of full fine-tuning and of LoRA at each rank, at their best rates, on the layers that LoRA changes.

    ``seeds`` by label; ``edges`` says which labels have their best rate at an end of those tried.
    """

    layers: tuple[LayerRanks, ...]
    kinds: tuple[KindRanks, ...]
    joint: tuple[JointSpectrum, ...]
    seeds: dict[str, int]
    edges: dict[str, GridEdge]

    def layers_of(self, label: str) -> list[LayerRanks]:
        """The layers of one method, in natural order."""
        return [layer for layer in self.layers if layer.label == label]

    @property
    def ranks(self) -> list[int]:
        """LoRA's ranks, ascending."""
        return sorted({layer.rank for layer in self.layers if layer.rank is not None})


class _MethodSpectra:
    """The runs of one method, one a seed, and the spectra of the layers they share."""

    def __init__(self, label: str, rank: int | None, rows: Sequence[RunResult], names: Sequence[str]) -> None:
        self.label, self.rank = label, rank
        self.edge: GridEdge = rows[0].choice.edge if rows[0].choice else None
        spectra = [{layer.name: layer for layer in row.spectra.layers} for row in rows if row.spectra is not None]
        self.seeds = len(spectra)
        shared = [name for name in names if spectra and all(name in by_name for by_name in spectra)]
        self.layers = {name: [by_name[name] for by_name in spectra] for name in shared}

    def energy(self, name: str) -> float:
        return statistics.fmean(layer.energy for layer in self.layers[name])


def measure_spectra(material: Material) -> Spectra:
    """What the runs' spectra say, gathered: nothing is decomposed again.

    Raises:
        MissingEvidenceError: neither full fine-tuning nor LoRA is done, or no weights are left.
    """
    methods = [method for method in _methods(material) if method.layers]
    if not methods:
        raise MissingEvidenceError("the weights of no LoRA run and of no full fine-tuning are there; train some")
    layers = [_layer(method, name) for method in methods for name in method.layers]
    return Spectra(
        layers=tuple(layers),
        kinds=tuple(_kinds(methods, layers)),
        joint=tuple(_joint(methods)),
        seeds={method.label: method.seeds for method in methods},
        edges={method.label: method.edge for method in methods},
    )


def _methods(material: Material) -> Iterable[_MethodSpectra]:
    """Full fine-tuning first, then LoRA by rank; whatever the study has."""
    with suppress(MissingEvidenceError):
        yield _MethodSpectra(FULL_LABEL, None, material.full_rows(), material.layers)
    with suppress(MissingEvidenceError):
        for rank, rows in group_by_rank(material.lora_rows()).items():
            yield _MethodSpectra(f"r = {rank}", rank, rows, material.layers)


def _layer(method: _MethodSpectra, name: str) -> LayerRanks:
    layers = method.layers[name]
    first = layers[0]
    return LayerRanks(
        label=method.label,
        rank=method.rank,
        name=name,
        kind=layer_kind(name),
        shape=first.shape,
        seeds=len(layers),
        norm=statistics.fmean(layer.norm for layer in layers),
        measures={measure: statistics.fmean(layer.measures[measure] for layer in layers) for measure in MEASURES},
        noise=_noise(first),
        mp_count=_mean(layer.noise["mp_count"] for layer in layers if layer.noise),
        gd_count=_mean(layer.noise["gd_count"] for layer in layers if layer.noise),
        floor=_mean(layer.rounding_floor.share for layer in layers if layer.rounding_floor),
        above_floor=_mean(layer.rounding_floor.above for layer in layers if layer.rounding_floor),
        most=min(*first.shape, first.nominal_rank or min(first.shape)),
    )


def _noise(layer: LayerSpectrum) -> dict[str, float] | None:
    if layer.noise is None:
        return None
    return {measure: float(value) for measure in MEASURES if (value := layer.noise[measure]) is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values, None where there are none or one of them is not known."""
    known = list(values)
    return statistics.fmean(v for v in known if v is not None) if known and None not in known else None


def _kinds(methods: Sequence[_MethodSpectra], layers: Sequence[LayerRanks]) -> Iterable[KindRanks]:
    for method in methods:
        own = [layer for layer in layers if layer.label == method.label]
        total = sum(method.energy(name) for name in method.layers)
        for kind in sorted({layer.kind for layer in own}, key=natural_key):
            same = [layer for layer in own if layer.kind == kind]
            energy = sum(method.energy(layer.name) for layer in same)
            noise = [layer.noise for layer in same if layer.noise is not None]
            yield KindRanks(
                label=method.label,
                rank=method.rank,
                kind=kind,
                layers=len(same),
                dim=statistics.median(layer.dim for layer in same),
                energy=energy / total if total > 0 else 0.0,
                measures=_medians([layer.measures for layer in same]),
                noise=_medians(noise) if noise else None,
            )


def _medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {measure: statistics.median(measures[measure] for measures in rows) for measure in MEASURES}


def _joint(methods: Sequence[_MethodSpectra]) -> Iterable[JointSpectrum]:
    """For each kind the layer that has the median energy under the first method, of those that all methods have."""
    first = methods[0]
    common = [name for name in first.layers if all(name in method.layers for method in methods)]
    for kind in sorted({layer_kind(name) for name in common}, key=natural_key):
        same = sorted((name for name in common if layer_kind(name) == kind), key=first.energy)
        yield _joint_of(methods, kind, same[(len(same) - 1) // 2])


def _joint_of(methods: Sequence[_MethodSpectra], kind: str, name: str) -> JointSpectrum:
    layers = methods[0].layers[name]
    null = noise_spectrum(layers[0].shape)
    scale = (methods[0].energy(name) / null.energy) ** 0.5
    return JointSpectrum(
        kind=kind,
        name=name,
        shape=layers[0].shape,
        curves=tuple(
            SpectrumCurve(label=method.label, rank=method.rank, values=_geometric(method.layers[name]))
            for method in methods
        ),
        noise=tuple((scale * null.values).tolist()),
        mp_edge=_mean(layer.noise["mp_edge"] for layer in layers if layer.noise),
        rounding_edge=_mean(layer.rounding_floor.edge for layer in layers if layer.rounding_floor),
    )


def _geometric(layers: Sequence[LayerSpectrum]) -> tuple[float, ...]:
    """Geometric mean of each σ over seeds; zero where one is."""
    values = np.array([layer.singular_values for layer in layers])
    with np.errstate(divide="ignore"):
        means: list[float] = np.exp(np.log(values).mean(axis=0)).tolist()
    return tuple(means)


def verdicts(result: Spectra) -> list[Verdict]:
    """Whether full fine-tuning's update has a low rank, and whether LoRA uses the rank it is given."""
    return [_of_full(result), *_of_lora(result)]


def _of_full(result: Spectra) -> Verdict:
    layers = result.layers_of(FULL_LABEL)
    changed = [layer for layer in layers if layer.norm > 0]
    answer: Answer = "undecided"
    share: Interval | None = None
    if not layers:
        sentence = "No full fine-tuning is done: LoRA's own update has a low rank by construction."
    elif not changed:
        sentence = "Full fine-tuning changed no matrix."
    else:
        share = median_over_layers([layer.measures["k90"] / layer.dim for layer in changed])
        sentence = _full_sentence(result, changed, share)
        floor = _floor(changed)
        if floor is not None and floor > FLOOR:
            sentence += f" The update is below the rounding floor: storage can have made {floor:.2g} of its norm."
        elif share.known and result.edges[FULL_LABEL] is None:
            answer = answer_low_rank(share.low, share.high, 1)
    return Verdict(
        line="spectra",
        claim="Few directions hold 90 % of the energy of full fine-tuning's update.",
        answer=answer,
        sentence=sentence,
        refuted_by=f"A median k90 (lower end of the interval) above {LOW_RANK_SHARE:g} of the smaller side.",
    ).with_value(share)


def _floor(layers: Sequence[LayerRanks]) -> float | None:
    """The median share of the norm that storage can have added; None where every layer was stored exactly."""
    shares = [layer.floor or 0.0 for layer in layers]
    return statistics.median(shares) if any(layer.floor is not None for layer in layers) else None


def _full_sentence(result: Spectra, layers: Sequence[LayerRanks], share: Interval) -> str:
    k90 = statistics.median(layer.measures["k90"] for layer in layers)
    dim = statistics.median(layer.dim for layer in layers)
    noise = statistics.median(layer.noise["k90"] / layer.dim for layer in layers if layer.noise)
    counts = [layer.mp_count for layer in layers if layer.mp_count is not None]
    above = f" {statistics.median(counts):.3g} singular values stand above the noise edge." if counts else ""
    return (
        f"90 % of the energy of full fine-tuning's update lies in {format_interval(share)} of the smaller side "
        "(median of "
        f"{_layers(layers)}, {_seeds(result, FULL_LABEL)}: {k90:.3g} of {dim:g}); pure noise of these shapes would "
        f"read {noise:.2g}.{above} Low is up to {LOW_RANK_SHARE:g}.{_edge(result, FULL_LABEL)}"
    )


def _of_lora(result: Spectra) -> list[Verdict]:
    """At the highest rank, where most can be left unused."""
    rank = max(result.ranks, default=1)
    label = f"r = {rank}"
    layers = [layer for layer in result.layers_of(label) if layer.norm > 0 and layer.most > 1]
    if not layers:
        return []
    share = median_over_layers([layer.measures["entropy_rank"] / layer.most for layer in layers])
    used: dict[Answer, Answer] = {"yes": "no", "no": "yes", "undecided": "undecided"}
    ranks = [f"{_entropy(result, r):.3g} at r = {r}" for r in result.ranks]
    return [
        Verdict(
            line="spectra",
            claim=f"LoRA of rank {rank} leaves most of its rank unused.",
            answer=used[answer_above(share, USED)] if result.edges[label] is None else "undecided",
            sentence=(
                f"At r = {rank} the entropy rank of LoRA's update is {format_interval(share)} of the rank that it "
                "can have "
                f"(median of {_layers(layers)}, {_seeds(result, label)}); below {USED:g} most is unused. It is "
                f"{', '.join(ranks)}.{_edge(result, label)}"
            ),
            refuted_by=f"An entropy rank of at least {USED:g} of r (lower end of the interval).",
        ).with_value(share)
    ]


def _entropy(result: Spectra, rank: int) -> float:
    return statistics.median(layer.measures["entropy_rank"] for layer in result.layers_of(f"r = {rank}"))


def _layers(layers: Sequence[LayerRanks]) -> str:
    few = f"{len(layers)} layer{'' if len(layers) == 1 else 's'}, from the least to the largest"
    return f"{len(layers)} layers" if len(layers) >= MIN_LAYERS else few


def _seeds(result: Spectra, label: str) -> str:
    count = result.seeds[label]
    return f"{count} seed{'' if count == 1 else 's'}"


def _edge(result: Spectra, label: str) -> str:
    edge = result.edges[label]
    end = "lowest" if edge == "low" else "highest"
    return f" Its best rate is the {end} that was tried: a better one may lie beyond." if edge else ""
