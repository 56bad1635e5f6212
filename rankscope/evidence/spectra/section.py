"""The section on spectra: the rank of the updates, beside what noise alone would read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rankscope.evidence.spectra.figure import plot_joint_spectra, plot_ranks_by_kind
from rankscope.evidence.spectra.measure import FULL_LABEL, JointSpectrum, KindRanks, LayerRanks, Spectra
from rankscope.formats.names import natural_key
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.spectra import MEASURES
from rankscope.verdict import LOW_RANK_SHARE, Verdict

NOISE = "noise"
TITLES = tuple(name.replace("_", " ") for name in MEASURES)


def build_section(found: Spectra, verdicts: Sequence[Verdict]) -> Section:
    """Singular values and effective ranks of all methods."""
    return Section(
        lead=(
            "How many directions does an update have? A measure of rank alone says little: pure noise has a rank, too, "
            "so each is shown beside that of a noise matrix of its shape."
        ),
        verdicts=verdicts,
        pictures=(*([_joint(found)] if found.joint else []), _by_kind(found)),
        tables=(_layers(found),),
        notes=tuple(_notes(found)),
    )


def _joint(found: Spectra) -> Picture:
    names = ", ".join(f"{one.kind}: {one.name}" for one in found.joint)
    return Picture(
        name="spectra",
        caption=(
            "Singular values of one layer a kind, that of median energy; geometric means over seeds. Grey: noise with "
            f"the energy of {_name(found.joint[0].curves[0].label)}. Layers: {names}."
        ),
        alt=" ".join(_joint_alt(one) for one in found.joint),
        draw=lambda: plot_joint_spectra(found),
        data=Table(
            name="spectra",
            caption="σ of each method and of noise, largest first.",
            header=("kind", "layer", "method", "index", "σ"),
            rows=[row for one in found.joint for row in _curves(one)],
        ),
    )


def _curves(one: JointSpectrum) -> Iterator[tuple[Cell, ...]]:
    lines = [(_name(curve.label), curve.values) for curve in one.curves]
    for name, values in [*lines, (NOISE, one.noise)]:
        for index, value in enumerate(values, 1):
            yield (one.kind, one.name, name, index, value)


def _joint_alt(one: JointSpectrum) -> str:
    """Of the first method and of LoRA's highest rank; the table has the others."""
    curves = dict.fromkeys((one.curves[0], one.curves[-1]))
    said = [f"{_name(curve.label)} from {curve.values[0]:.2g} to {curve.values[-1]:.2g}" for curve in curves]
    edge = f"; noise edge {one.mp_edge:.2g}" if one.mp_edge is not None else ""
    return f"{one.kind}: σ of {', '.join(said)}{edge}."


def _by_kind(found: Spectra) -> Picture:
    return Picture(
        name="ranks-by-kind",
        caption=(
            "Medians over the layers of each kind. Grey bars: a noise matrix of the same shape. A black line is the "
            f"smaller side of the weight, dotted {LOW_RANK_SHARE:g} of it."
        ),
        alt=" ".join(
            _kind_alt(kind) for kind in found.kinds if kind.label in (FULL_LABEL, f"r = {max(found.ranks or [0])}")
        ),
        draw=lambda: plot_ranks_by_kind(found),
        data=Table(
            name="ranks-by-kind",
            caption=(
                "Every measure by kind of module, median over layers; the share of energy is that of the squared norm "
                "of all layers."
            ),
            header=("kind", "method", "layers", "smaller side", "share of energy", *TITLES),
            rows=[row for kind in found.kinds for row in _kind_rows(kind)],
            digits=3,
        ),
    )


def _kind_alt(kind: KindRanks) -> str:
    noise = f" (noise {kind.noise['k90']:.3g})" if kind.noise is not None else ""
    return (
        f"{kind.kind}, {_name(kind.label)}: k90 {kind.measures['k90']:.3g}{noise}, entropy rank "
        f"{kind.measures['entropy_rank']:.3g}, of {kind.dim:g}."
    )


def _kind_rows(kind: KindRanks) -> Iterator[tuple[Cell, ...]]:
    measured = (kind.measures[measure] for measure in MEASURES)
    yield (kind.kind, _name(kind.label), kind.layers, kind.dim, kind.energy, *measured)
    if kind.noise is not None:
        yield (kind.kind, NOISE, kind.layers, kind.dim, None, *(kind.noise[measure] for measure in MEASURES))


def _layers(found: Spectra) -> Table:
    ordered = sorted(found.layers, key=lambda layer: (natural_key(layer.name), layer.rank or 0))
    floors = any(layer.floor is not None for layer in found.layers)
    return Table(
        name="spectra-layers",
        caption=(
            "Each layer by each method, means over seeds; in the rows “noise” a noise matrix of that shape. MP and GD "
            "count singular values above the noise edge of Marchenko & Pastur, and those worth keeping by Gavish & "
            "Donoho; an update of known low rank has neither."
        ),
        header=(
            *("layer", "method", "out × in", "norm", *TITLES, "MP count", "GD count"),
            *(("rounding share", "above rounding") if floors else ()),
        ),
        rows=[row for layer in ordered for row in _layer_rows(layer, floors)],
        digits=3,
    )


def _layer_rows(layer: LayerRanks, floors: bool) -> Iterator[tuple[Cell, ...]]:
    shape = f"{layer.shape[0]} × {layer.shape[1]}"
    measured = (layer.measures[measure] for measure in MEASURES)
    floor = (layer.floor, layer.above_floor) if floors else ()
    yield (layer.name, _name(layer.label), shape, layer.norm, *measured, layer.mp_count, layer.gd_count, *floor)
    if layer.noise is not None:
        noise = (layer.noise[measure] for measure in MEASURES)
        yield (layer.name, NOISE, shape, None, *noise, None, None, *((None, None) if floors else ()))


def _notes(found: Spectra) -> Iterator[str]:
    yield (
        "k90 is the fewest directions with 90 % of the squared norm; for square noise it is .51 of the side. The "
        "entropy rank is the exponential of the entropy of σ/Σσ (Roy & Vetterli)."
    )
    if any(layer.label == FULL_LABEL for layer in found.layers):
        yield (
            "Of full fine-tuning only the layers that an adapter of the study changes are counted, without biases, "
            "norms and heads."
        )
    if all(layer.floor is None for layer in found.layers):
        yield "All updates were stored in float32: there is no rounding floor."


def _name(label: str) -> str:
    return "full fine-tuning" if label == FULL_LABEL else f"LoRA {label}"
