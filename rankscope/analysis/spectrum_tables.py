"""The tables of ``spectrum``; a column is defined once, with the places that show it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rankscope.measures import MEASURES, measures_shown
from rankscope.table import Cell, Column, Table, format_number

if TYPE_CHECKING:
    from rankscope.analysis.layer_spectra import LayerSpectrum, SpectrumResult
    from rankscope.spectra import RoundingFloor


def layer_table(result: SpectrumResult) -> Table:
    """One row for each layer, as the terminal and notebooks show it."""
    return Table.of(layer_columns(result), result.layers, "terminal", has_total=True)


def csv_table(results: Sequence[SpectrumResult]) -> Table:
    """One row for each layer of every result, with the bounds of the measures if any layer has them."""
    has_bounds = any(layer.bounds for result in results for layer in result.layers)
    tables = [Table.of(layer_columns(result, has_bounds), result.layers, "csv") for result in results]
    return Table("layers", "", tables[0].header, [row for table in tables for row in table.rows])


def is_noisy(result: SpectrumResult) -> bool:
    """Whether there are full updates, which are shown beside noise."""
    return any(layer.noise for layer in result.layers)


def is_adapter(result: SpectrumResult) -> bool:
    """Whether there are products of thin factors, which have a nominal rank."""
    return any(not layer.full for layer in result.layers)


def is_rounded(result: SpectrumResult) -> bool:
    """Whether half-precision storage left a rounding floor somewhere."""
    return any(layer.rounding_floor for layer in result.layers)


def layer_columns(result: SpectrumResult, has_bounds: bool = False) -> list[Column[LayerSpectrum]]:
    """The columns of a layer: in "csv", on the "terminal", and in the tables "ranks" and "values" of the page.

    Args:
        has_bounds: whether CSV has lower and upper bounds of every measure.
    """
    ranks = {"ranks": "r"} if is_adapter(result) else {}
    columns: list[Column[LayerSpectrum]] = [
        Column.of(lambda layer: result.path, csv="path"),
        Column.of(
            lambda layer: layer.name,
            total="median; all",
            **{"csv": "layer", "terminal": "layer", "ranks": "layer", "values": "layer"},
        ),
        Column.of(lambda layer: layer.shape[0], csv="out"),
        Column.of(lambda layer: layer.shape[1], csv="in"),
        Column.of(lambda layer: f"{layer.shape[0]} × {layer.shape[1]}", terminal="out × in", ranks="out × in"),
        Column.of(lambda layer: layer.nominal_rank, csv="nominal_rank", terminal="r", **ranks),
        Column.of(lambda layer: layer.scale, csv="scale"),
        Column.of(lambda layer: layer.dtype, csv="dtype", values="stored"),
        Column.of(lambda layer: layer.energy, csv="energy"),
        Column.of(lambda layer: layer.norm, csv="norm", values="norm"),
        Column.of(lambda layer: next(iter(layer.singular_values), None), values="σ₁"),
    ]
    columns += _measure_columns(result)
    columns += [column if is_noisy(result) else column.only("csv") for column in _noise_columns()]
    columns += [column if is_rounded(result) else column.only("csv") for column in _rounding_columns()]
    columns += _bound_columns() if has_bounds else []
    return [*columns, Column.of(lambda layer: layer.norm, terminal="norm", total=result.total.norm)]


def _measure_columns(result: SpectrumResult) -> Iterator[Column[LayerSpectrum]]:
    """All measures for CSV; for tables of layers those that they show, in their own order."""
    for name in MEASURES:
        yield Column(_get_measure(name), {"csv": name})
    total = result.total
    for measure in measures_shown("layers"):
        name, titles = measure.name, {"terminal": measure.title, "ranks": measure.title}
        median = format_measure(total.median.get(name), (total.bounds or {}).get(name))
        yield Column(_get_measure_or_bounds(name), titles, total=median)
        if is_noisy(result) and "medians" in measure.shown:
            yield Column(_get_noise(name), {"ranks": f"{measure.title}, noise"})


def _get_measure(name: str) -> Callable[[LayerSpectrum], Cell]:
    return lambda layer: layer.measures.get(name)


def _get_measure_or_bounds(name: str) -> Callable[[LayerSpectrum], Cell]:
    """The measure where it is known, else its bounds as text."""

    def get(layer: LayerSpectrum) -> Cell:
        value = layer.measures.get(name)
        return format_measure(value, layer.interval(name)) if value is None and layer.bounds else value

    return get


def format_measure(value: float | int | None, bounds: tuple[float, float] | None) -> str:
    """A measure, or its bounds where it is unknown."""
    if value is not None or bounds is None:
        return format_number(value)
    return "–".join(format_number(end) for end in bounds)


def _get_noise(name: str) -> Callable[[LayerSpectrum], Cell]:
    return lambda layer: (layer.noise or {}).get(name)


def _noise_columns() -> Iterator[Column[LayerSpectrum]]:
    """The measures of noise of a layer's shape, and the number of singular values above noise."""
    for name in MEASURES:
        yield Column(_get_noise(name), {"csv": f"noise_{name}"})
    for measure in measures_shown("noise"):
        yield Column(_get_noise(measure.name), {"terminal": f"noise {measure.title}"})
    yield Column(_get_noise("mp_edge"), {"csv": "mp_edge", "values": "noise edge (MP)"})
    yield Column(_get_noise("mp_count"), {"csv": "mp_count", "terminal": "MP", "values": "σ above it (MP)"})
    yield Column(_get_noise("gd_count"), {"csv": "gd_count", "terminal": "GD", "values": "σ above noise (GD)"})


def _rounding_columns() -> Iterator[Column[LayerSpectrum]]:
    """What storing the tuned weight in half precision can have added."""

    def column(get: Callable[[RoundingFloor], Cell], **titles: str) -> Column[LayerSpectrum]:
        return Column(lambda layer: get(layer.rounding_floor) if layer.rounding_floor else None, titles)

    yield column(lambda floor: floor.norm, csv="rounding_norm")
    yield column(lambda floor: floor.edge, csv="rounding_edge", values="rounding edge")
    yield column(lambda floor: floor.above, csv="above_rounding", values="σ above it")
    yield column(lambda floor: floor.share, values="rounding, share of norm")
    yield column(lambda floor: floor.measures.get("k90"), values="k90 without rounding")


def _bound_columns() -> Iterator[Column[LayerSpectrum]]:
    def get_end(name: str, end: int) -> Callable[[LayerSpectrum], Cell]:
        return lambda layer: layer.interval(name)[end]

    for name in MEASURES:
        yield Column(get_end(name, 0), {"csv": f"{name}_low"})
        yield Column(get_end(name, 1), {"csv": f"{name}_high"})


def source_columns(results: Sequence[SpectrumResult]) -> list[Column[SpectrumResult]]:
    """The columns of a source in the table "overview" of the page."""

    def get_rank(result: SpectrumResult) -> Cell:
        ranks = {layer.nominal_rank for layer in result.layers}
        return ranks.pop() if len(ranks) == 1 else None

    columns: list[Column[SpectrumResult]] = [
        Column.of(lambda result: result.title, overview="update"),
        Column.of(lambda result: result.kind, overview="kind"),
        Column.of(lambda result: result.total.layers, overview="layers"),
        Column.of(lambda result: result.total.zero, overview="unchanged"),
    ]
    if any(map(is_adapter, results)):  # empty where the layers of a source differ in r
        columns.append(Column.of(get_rank, overview="r"))
    for measure in measures_shown("medians"):
        columns.append(Column(_get_median(measure.name), {"overview": measure.title}))
        if any(map(is_noisy, results)):
            columns.append(Column(_get_noise_median(measure.name), {"overview": f"{measure.title}, noise"}))
    return [*columns, Column.of(lambda result: result.total.norm, overview="norm")]


def _get_median(name: str) -> Callable[[SpectrumResult], Cell]:
    return lambda result: result.total.median[name]


def _get_noise_median(name: str) -> Callable[[SpectrumResult], Cell]:
    return lambda result: noise_median(result, name)


def noise_median(result: SpectrumResult, name: str) -> float | None:
    """A measure of noise, median over the full updates that have changed; None where there is none."""
    values = [layer.noise[name] for layer in result.layers if layer.noise and layer.energy]
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None
