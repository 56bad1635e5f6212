"""Spectra of one or several sources as a page: effective ranks beside noise, singular values, what was left out."""

from __future__ import annotations

from collections.abc import Sequence

from rankscope.analysis.layer_spectra import LayerSpectrum, SpectrumResult
from rankscope.analysis.spectrum_tables import (
    is_adapter,
    is_noisy,
    is_rounded,
    layer_columns,
    noise_median,
    source_columns,
)
from rankscope.measures import measures_shown
from rankscope.plots import plot_spectra
from rankscope.report.document import Document, Picture, Section
from rankscope.report.shared_sections import count_layers, format_short, powers_of_two, skipped_tables
from rankscope.table import Cell, Table
from rankscope.train.study import versions

TOGETHER = 3
"""Sources in one picture: more in a row could not be read at the width of a page."""


def build_document(results: Sequence[SpectrumResult], command: str = "") -> Document:
    """The page of ``rankscope spectrum``.

    Args:
        results: at least one.
        command: the command that makes this page, for its end.
    """
    several = len(results) > 1
    sections = [_overview(results)] if several else []
    sections += [_section(result, number, several) for number, result in enumerate(results, 1)]
    facts = {"updates": str(len(results))} if several else {"path": results[0].path, "kind": results[0].kind}
    return Document(
        title=f"Singular spectra of {f'{len(results)} updates' if several else results[0].title}",
        lead="How much rank does an update really have? This page shows the singular values of every layer and its "
        "effective rank by several measures, beside those of noise of the same shape.",
        facts={**facts, "layers": str(sum(result.total.layers for result in results))},
        sections=sections,
        provenance={"command": command, "versions": versions(), "schema": results[0].schema},
    )


def _overview(results: Sequence[SpectrumResult]) -> Section:
    """All sources side by side."""
    groups = [results[start : start + TOGETHER] for start in range(0, len(results), TOGETHER)]
    caption = "Effective ranks of each update, median over its layers."
    return Section(
        key="overview",
        title="All updates side by side",
        lead="Medians over the layers that have changed; the norm is that of all layers together.",
        pictures=[_picture(group, f"spectra-{number}") for number, group in enumerate(groups, 1)],
        tables=[Table.of(source_columns(results), results, "overview", caption)],
        notes=_legend(results),
    )


def _legend(results: Sequence[SpectrumResult]) -> list[str]:
    notes = ["r: nominal rank of an adapter; empty for a full update."] if any(map(is_adapter, results)) else []
    notes.append(" ".join(f"{measure.title}: {measure.definition}." for measure in measures_shown("medians")))
    if any(map(is_noisy, results)):
        notes.append(
            "noise: the same measure of a matrix of this shape with independent random entries. A rank close to it "
            "says nothing about the task. Adapters are products of thin factors and have no such value."
        )
    return notes


def _section(result: SpectrumResult, number: int, several: bool) -> Section:
    """One source: its picture where it is the only one, and its tables."""
    columns = layer_columns(result)
    captions = {
        "ranks": "Effective ranks, layer by layer.",
        "values": "Norms and largest singular values, layer by layer.",
    }
    tables = [
        Table.of(columns, result.layers, place, caption, f"{place}-{number}") for place, caption in captions.items()
    ]
    return Section(
        key=f"update-{number}",
        title=result.title if several else "Ranks and singular values",
        lead=_summary_sentence(result),
        pictures=[] if several else [_picture([result], "spectra")],
        tables=[*tables, *skipped_tables(result.skipped, f"skipped-{number}")],
        notes=[*result.notes, *_values_notes(result), *([] if several else _legend([result]))],
    )


def _summary_sentence(result: SpectrumResult) -> str:
    """The medians in words."""
    total = result.total
    ranks = [
        f"{measure.title} {_short(total.median[measure.name])}{_noise(result, measure.name)}"
        for measure in measures_shown("medians")
    ]
    unchanged = f"; {total.zero} more have not changed at all" if total.zero else ""
    return (
        f"Ranks by measure, median over {count_layers(total.layers - total.zero)}{unchanged}: {', '.join(ranks)}. "
        f"The norm of all layers together is {_short(total.norm)}."
    )


def _noise(result: SpectrumResult, measure: str) -> str:
    noise = noise_median(result, measure)
    return "" if noise is None else f" (noise {_short(noise)})"


def _short(value: float) -> str:
    return format_short(value, padded=False)


def _values_notes(result: SpectrumResult) -> list[str]:
    notes = []
    if is_noisy(result):
        notes.append(
            "noise edge: the largest σ of the noise that the median σ suggests (Marchenko–Pastur, MP). GD: the number "
            "of σ that Gavish and Donoho's threshold keeps. Both are empty where the median is zero and says "
            "nothing about noise."
        )
    if is_rounded(result):
        notes.append(
            "rounding edge: the largest σ that storing the tuned weight in half precision can have added. The share is "
            "the norm of this rounding relative to that of the update."
        )
    return notes


def _picture(results: Sequence[SpectrumResult], name: str) -> Picture:
    """Spectra on the same axes, and σ at indices 1, 2, 4, … as the table behind them."""
    several = len(results) > 1
    longest = max(len(layer.singular_values) for result in results for layer in result.layers)
    indices = powers_of_two(longest) if longest else []
    header = [*(["update"] if several else []), "layer", *(f"σ{n}" for n in indices)]
    rows = [
        [*([result.title] if several else []), layer.name, *_values_at(layer, indices)]
        for result in results
        for layer in result.layers
    ]
    description = "; ".join(f"{result.title}: {_describe_spectrum(result)}" for result in results)
    return Picture(
        name=name,
        caption="Singular values against their index. Each line is a layer; its colour is the kind of module, darker "
        "with depth. Marks are effective ranks, median over layers.",
        alt=f"Singular values falling with their index, a line for each layer. {description}.",
        draw=lambda: plot_spectra(results),
        data=Table(name, "Singular values at some of the indices; --json has all.", tuple(header), rows),
    )


def _describe_spectrum(result: SpectrumResult) -> str:
    firsts = [layer.singular_values[0] for layer in result.layers if layer.energy > 0]
    if not firsts:
        return "no layer has changed"
    k90 = f"k90 {_short(result.total.median['k90'])}{_noise(result, 'k90')} in the median"
    return f"σ₁ from {_short(min(firsts))} to {_short(max(firsts))}, {k90}"


def _values_at(layer: LayerSpectrum, indices: Sequence[int]) -> list[Cell]:
    values = layer.singular_values
    return [values[n - 1] if n <= len(values) else None for n in indices]
