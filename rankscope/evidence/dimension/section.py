"""The page's section on intrinsic dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankscope.evidence.dimension.figure import plot_dimension
from rankscope.evidence.dimension.measure import DimensionCurve, IntrinsicDimension
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.train.method_table import find_method
from rankscope.verdict import GAIN_SHARE, Verdict, format_interval

HEADER = (
    "method",
    "d or r",
    "numbers trained",
    "of all parameters",
    "seeds",
    "rate",
    "best rate at an end",
    "share of the gain",
    "low",
    "high",
)


def build_section(found: IntrinsicDimension, verdicts: Sequence[Verdict]) -> Section:
    """The section of this line of evidence."""
    return Section(
        lead=(
            f"How many numbers does the task need, if they move all {found.parameters:,} parameters along random "
            f"directions? d90 is the smallest number tried that reaches {GAIN_SHARE:.0%} of full fine-tuning's gain."
        ),
        verdicts=verdicts,
        pictures=[_picture(found)],
        notes=_notes(found),
    )


def _picture(found: IntrinsicDimension) -> Picture:
    """Gain and rank against trained numbers."""
    return Picture(
        name="dimension",
        caption=(
            "Left: share of full fine-tuning's gain by how many numbers are trained, each size at its own best rate, "
            "with 95 % intervals over seeds; hollow where that rate lies at an end of those tried. Right: the "
            f"effective rank ({found.measure.replace('_', ' ')}) of the same updates."
        ),
        alt=" ".join(_describe_curve(found, curve) for curve in found.curves),
        draw=lambda: plot_dimension(found),
        data=_table(found),
    )


def _table(found: IntrinsicDimension) -> Table:
    """The numbers of the picture."""
    rank = found.measure.replace("_", " ")
    header = (*HEADER, found.metric, rank)
    return Table("dimension", "Random subspaces and LoRA by their trained numbers", header, _rows(found))


def _rows(found: IntrinsicDimension) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for curve in found.curves:
        # Of adapters only plain LoRA goes by its title here: the file has always had the others' names.
        name = curve.name if curve.is_random or curve.method == "lora" else curve.method
        for size in curve.sizes:
            part = size.trained / found.parameters
            edge = size.edge or ""
            place = (name, size.size, size.trained, part, size.seeds, size.lr, edge)
            rows.append((*place, *size.share, size.score.value, size.rank))
    last = ("full fine-tuning", None, found.parameters, 1.0, found.full_seeds, None, found.full_edge or "")
    return [*rows, (*last, 1.0, None, None, found.full.value, found.full_rank)]


def _notes(found: IntrinsicDimension) -> list[str]:
    """Why dimension and rank are not one thing, in this study's numbers."""
    said = [
        "Dimension is not rank. A rank-1 update of a 768 × 768 matrix has 1 536 numbers; a step along one random "
        "direction has one, and the rank of noise. The two curves share an axis and are never equated."
    ]
    for curve in found.curves:
        first = curve.sizes[0]
        if first.rank is not None:
            said.append(
                f"{curve.name}, {curve.size_symbol} = {first.size}: {first.trained:,} numbers, an update of "
                f"{found.measure.replace('_', ' ')} {first.rank:.3g} (noise of these shapes: {found.noise_rank:.3g})."
            )
    said += _side_by_side(found)
    if any(find_method(curve.method).layered for curve in found.curves):
        said.append(
            f"The structure-aware form pays {found.layers} of its d numbers for a factor a layer (Aghajanyan et al. "
            "2020)."
        )
    return said


def _side_by_side(found: IntrinsicDimension) -> list[str]:
    """LoRA at its lowest rank beside each kind of random subspace of about as many numbers."""
    lora = next((curve.sizes[0] for curve in found.curves if not curve.is_random), None)
    if lora is None:
        return []
    said = []
    for curve in found.curves:
        if curve.is_random:
            near = min(curve.sizes, key=lambda size: abs(math.log(size.trained / lora.trained)))
            said.append(
                f"LoRA with {lora.trained:,} numbers has {format_interval(lora.share)} of the gain, the {curve.name} nearest "
                f"in size, of {near.trained:,}, {format_interval(near.share)}."
            )
    return said


def _describe_curve(found: IntrinsicDimension, curve: DimensionCurve) -> str:
    last, d90 = curve.sizes[-1], curve.d90.rank
    reached = (
        f"reaches {GAIN_SHARE:.0%} of the gain with {d90:,} numbers"
        if d90 is not None
        else f"does not reach {GAIN_SHARE:.0%} of the gain"
    )
    return f"{curve.name} {reached}; with {last.trained:,} it has {format_interval(last.share)} of it."
