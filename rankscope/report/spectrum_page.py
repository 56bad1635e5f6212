"""Spectra of one or several sources as a page: effective ranks beside noise, singular values, what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rankscope.analysis.layer_spectra import LayerSpectrum, SpectrumResult
from rankscope.plots import plot_spectra
from rankscope.report.cells import format_significant
from rankscope.report.compare_page import powers_of_two
from rankscope.report.document import Cell, Document, Picture, Section, Table
from rankscope.train.study import versions

MEASURE_COLUMNS = {
    "stable": "stable_rank",
    "participation": "participation_ratio",
    "entropy": "entropy_rank",
    "k90": "k90",
}
"""The measures that tables show, by the titles of their columns; --json has all."""
TOGETHER = 3
"""Sources in one picture: more in a row could not be read at the width of a page."""


def build_document(results: Sequence[SpectrumResult], command: str = "") -> Document:
    """The page of ``rankscope spectrum``.

    Args:
        results: one at least.
        command: what made this page, for its end.
    """
    several = len(results) > 1
    sections = [_overview(results)] if several else []
    sections += [_section(result, number, several) for number, result in enumerate(results, 1)]
    made_by = {"command": command, "versions": versions(), "schema": results[0].schema}
    facts = {"updates": str(len(results))} if several else {"path": results[0].path, "kind": results[0].kind}
    return Document(
        title=f"Singular spectra of {f'{len(results)} updates' if several else results[0].title}",
        lead="How much rank does an update really have? Singular values of every layer, and the rank that each measure "
        "makes of them, beside what noise of the same shape would read.",
        facts={**facts, "layers": str(sum(result.total.layers for result in results))},
        sections=sections,
        provenance=made_by,
    )


def _overview(results: Sequence[SpectrumResult]) -> Section:
    """All sources side by side."""
    noisy = any(layer.noise for result in results for layer in result.layers)
    adapter = any(not layer.full for result in results for layer in result.layers)
    header = ["update", "kind", "layers", "unchanged", *(["r"] if adapter else []), *_columns(noisy), "norm"]
    rows = [_source_row(result, adapter, noisy) for result in results]
    groups = [results[start : start + TOGETHER] for start in range(0, len(results), TOGETHER)]
    return Section(
        key="overview",
        title="All updates side by side",
        lead="Medians over the layers that have changed; the norm is of all layers together.",
        pictures=[_picture(group, f"spectra-{number}") for number, group in enumerate(groups, 1)],
        tables=[Table("overview", "Effective ranks of each update, median over its layers.", tuple(header), rows)],
        notes=_legend(adapter, noisy),
    )


def _columns(noisy: bool) -> list[str]:
    """Titles of the measures, each beside that of noise where there are full updates."""
    return [title for name in MEASURE_COLUMNS for title in ([name, f"{name}, noise"] if noisy else [name])]


def _legend(adapter: bool, noisy: bool) -> list[str]:
    notes = ["r: nominal rank of an adapter; empty for a full update."] if adapter else []
    notes += [
        "stable: Σσ²/σ₁². participation: (Σσ²)²/Σσ⁴. entropy: exp(−Σ p ln p) with p = σ/Σσ. k90: fewest directions "
        "that hold 90 % of the energy Σσ².",
    ]
    if noisy:
        notes.append(
            "noise: the same measure of a matrix of this shape with independent random entries. Near it, a rank says "
            "nothing of the task; adapters are products of thin factors and have none."
        )
    return notes


def _source_row(result: SpectrumResult, adapter: bool, noisy: bool) -> list[Cell]:
    """``r`` is shown where all layers have the same."""
    ranks = {layer.nominal_rank for layer in result.layers}
    row: list[Cell] = [result.title, result.kind, result.total.layers, result.total.zero]
    row += [ranks.pop() if len(ranks) == 1 else None] if adapter else []
    for measure in MEASURE_COLUMNS.values():
        row.append(result.total.median[measure])
        if noisy:
            row.append(_noise_median(result, measure))
    return [*row, result.total.norm]


def _noise_median(result: SpectrumResult, measure: str) -> float | None:
    found = [value for one in result.layers if one.noise and one.energy and (value := one.noise[measure]) is not None]
    return float(statistics.median(found)) if found else None


def _section(result: SpectrumResult, number: int, several: bool) -> Section:
    """One source: its picture where it is alone, and its tables."""
    noisy = any(layer.noise for layer in result.layers)
    adapter = any(not layer.full for layer in result.layers)
    tables = [
        Table(
            name=f"ranks-{number}",
            caption="Effective ranks, layer by layer.",
            header=("layer", "out × in", *(["r"] if adapter else []), "numerical", *_columns(noisy)),
            rows=[_rank_row(layer, adapter, noisy) for layer in result.layers],
        ),
        _values_table(result, number),
    ]
    if result.skipped:
        rows = [(one.name, one.reason) for one in result.skipped]
        tables.append(Table(f"skipped-{number}", "Tensors that were skipped, and why.", ("tensor", "reason"), rows))
    return Section(
        key=f"update-{number}",
        title=result.title if several else "Ranks and singular values",
        lead=_summary_sentence(result),
        pictures=[] if several else [_picture([result], "spectra")],
        tables=tables,
        notes=[*result.notes, *_values_notes(result), *([] if several else _legend(adapter, noisy))],
    )


def _summary_sentence(result: SpectrumResult) -> str:
    """The medians in words."""
    total = result.total
    said = [
        f"{name} {_short(total.median[measure])}{_noise(result, measure)}" for name, measure in MEASURE_COLUMNS.items()
    ]
    changed = total.layers - total.zero
    unchanged = f"; {total.zero} more have not changed at all" if total.zero else ""
    return (
        f"Ranks by measure, median over {changed} layer{'' if changed == 1 else 's'}{unchanged}: {', '.join(said)}. "
        f"The norm of all layers together is {_short(total.norm)}."
    )


def _noise(result: SpectrumResult, measure: str) -> str:
    noise = _noise_median(result, measure)
    return "" if noise is None else f" (noise {_short(noise)})"


def _short(value: float) -> str:
    return format_significant(value, 3, padded=False)


def _rank_row(layer: LayerSpectrum, adapter: bool, noisy: bool) -> list[Cell]:
    row: list[Cell] = [layer.name, f"{layer.shape[0]} × {layer.shape[1]}", *([layer.nominal_rank] if adapter else [])]
    row.append(layer.measures.get("numerical_rank"))
    for measure in MEASURE_COLUMNS.values():
        row.append(layer.measures.get(measure))
        if noisy:
            row.append((layer.noise or {}).get(measure))
    return row


def _values_table(result: SpectrumResult, number: int) -> Table:
    """Norms and largest singular values; for full updates beside the edges of noise and of rounding."""
    noisy = any(layer.noise for layer in result.layers)
    rounded = any(layer.rounding_floor for layer in result.layers)
    header = ["layer", "stored", "norm", "σ₁"]
    header += ["noise edge (MP)", "σ above it (MP)", "σ above noise (GD)"] if noisy else []
    header += ["rounding edge", "σ above it", "rounding, share of norm", "k90 without rounding"] if rounded else []
    return Table(
        name=f"values-{number}",
        caption="Norms and largest singular values, layer by layer.",
        header=tuple(header),
        rows=[_values_row(layer, noisy, rounded) for layer in result.layers],
    )


def _values_row(layer: LayerSpectrum, noisy: bool, rounded: bool) -> list[Cell]:
    first = layer.singular_values[0] if layer.singular_values else None
    noise: Mapping[str, float | int | None] = layer.noise or {}
    row: list[Cell] = [layer.name, layer.dtype, layer.norm, first]
    if noisy:
        row += [noise.get(name) for name in ("mp_edge", "mp_count", "gd_count")]
    if rounded and (floor := layer.rounding_floor):
        row += [floor.edge, floor.above, floor.share, floor.measures.get("k90")]
    elif rounded:
        row += [None] * 4
    return row


def _values_notes(result: SpectrumResult) -> list[str]:
    notes = []
    if any(layer.noise for layer in result.layers):
        notes.append(
            "noise edge: the largest σ of the noise that the median σ suggests (Marchenko–Pastur); GD: the count that "
            "Gavish and Donoho keep. Empty where the median is zero and says nothing of noise."
        )
    if any(layer.rounding_floor for layer in result.layers):
        notes.append(
            "rounding edge: the largest σ that storing the tuned weight in half precision can have added; the share is "
            "of its norm in that of the update."
        )
    return notes


def _picture(results: Sequence[SpectrumResult], name: str) -> Picture:
    """Spectra on the same axes, and σ at indices 1, 2, 4, … behind them."""
    several = len(results) > 1
    longest = max(len(layer.singular_values) for result in results for layer in result.layers)
    indices = powers_of_two(longest) if longest else []
    said = "; ".join(f"{result.title}: {_in_words(result)}" for result in results)
    header = [*(["update"] if several else []), "layer", *(f"σ{n}" for n in indices)]
    rows = [
        [*([result.title] if several else []), layer.name, *_values_at(layer, indices)]
        for result in results
        for layer in result.layers
    ]
    return Picture(
        name=name,
        caption="Singular values against their index. A line is a layer, its colour the kind of module, darker with "
        "depth; marks are effective ranks, median over layers.",
        alt=f"Singular values falling with their index, a line a layer. {said}.",
        draw=lambda: plot_spectra(results),
        data=Table(name, "Singular values at some of the indices; --json has all.", tuple(header), rows),
    )


def _in_words(result: SpectrumResult) -> str:
    firsts = [layer.singular_values[0] for layer in result.layers if layer.energy > 0]
    if not firsts:
        return "no layer has changed"
    k90 = f"k90 {_short(result.total.median['k90'])}{_noise(result, 'k90')} in the median"
    return f"σ₁ from {_short(min(firsts))} to {_short(max(firsts))}, {k90}"


def _values_at(layer: LayerSpectrum, indices: Sequence[int]) -> list[Cell]:
    values = layer.singular_values
    return [values[n - 1] if n <= len(values) else None for n in indices]
