"""The section of the page on updates against their weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rankscope.analysis.intruders import INTRUDER_THRESHOLD, SWEEP_THRESHOLDS
from rankscope.evidence.weight.figure import plot_intruders, plot_positions, plot_weight
from rankscope.evidence.weight.layers import FULL_RANKS, POSITION_DIRECTIONS
from rankscope.evidence.weight.measure import AmplificationSummary, WeightComparison
from rankscope.inference import Interval
from rankscope.report.document import Cell, Picture, Section, Table
from rankscope.verdict import Verdict

PUBLISHED = ((4, 0.32, 21.67, 0.02, 6.91, 21.5), (64, 1.90, 37.71, 0.33, 3.57, 1.9))
"""Table 7 of Hu et al. 2021: r; ‖UᵀWV‖ with the directions of ΔW, of W, random; ‖ΔW‖; amplification."""
PUBLISHED_NAME = "published: GPT-3, one W_q"
PUBLISHED_DIM = 12288


def build_section(found: WeightComparison, verdicts: Sequence[Verdict]) -> Section:
    """What the updates do to the weights that they are added to."""
    return Section(
        lead=(
            "LoRA's paper (§7.3) found that an update strengthens directions that the weight has but does not stress. "
            "Here the same is measured in every adapted layer, beside what random directions would give."
        ),
        verdicts=verdicts,
        pictures=[_amplification(found), _positions(found), _intruders(found)],
        tables=[_table7(found), _layers(found), _intruder_layers(found)],
        notes=_notes(found),
    )


def _notes(found: WeightComparison) -> list[str]:
    skipped = found.skipped
    return [
        "Each rank stands at its own best rate; ‖ΔW‖, and the amplification with it, grows with the rate, so a step "
        "between two ranks may be one between two rates. The scale α/r is part of ΔW.",
        "The random column is exact: E‖UᵀWV‖² = (r²/(out·in))‖W‖². By it alone the amplification of random directions "
        "falls as 1/r, so a fall with r says nothing unless it is held against theirs.",
        "p is from a log-normal law with the exact mean and variance of the random column, the largest over seeds, "
        "corrected over layers (Holm).",
        "Among near-equal singular values of W single directions are arbitrary, and a small update may turn them into "
        "each other. Such intruders lie in the strongest quarter of the old directions; new ones do not.",
        *([f"{len(skipped)} not measured: {'; '.join(skipped[:3])}{'; …' if skipped[3:] else ''}"] if skipped else []),
    ]


def _name(one: AmplificationSummary) -> str:
    return "full fine-tuning" if one.rank is None else f"LoRA r = {one.rank}"


def _amplification(found: WeightComparison) -> Picture:
    first, last = found.lora_strengths[0], found.lora_strengths[-1]
    ends = [f"{_value(one.amplification)} at r = {one.r}" for one in ((first, last) if first != last else (first,))]
    random = [f"{one.median.random_amplification:.3g}" for one in ((first, last) if first != last else (first,))]
    full = (
        f" Full fine-tuning: {_value(found.full_strengths[0].amplification)} at r = {found.full_strengths[0].r}."
        if found.full_strengths
        else ""
    )
    return Picture(
        name="weight",
        caption=(
            "Left: amplification ‖ΔW‖/‖UᵀWV‖ against r, one faint line a layer, heavy the median; dashed, what it "
            "would be along random directions. ‖ΔW‖ is that of the whole update at every r, also of full fine-tuning, "
            "whose top r directions hold a part of it only. Right: the columns of Table 7, medians over layers."
        ),
        alt=(
            f"The median amplification of LoRA is {', and '.join(ends)}; along random directions it would be "
            f"{', and '.join(random)}.{full}"
        ),
        draw=partial(plot_weight, found),
        data=Table(
            name="weight",
            caption="Medians over layers, with 95 % intervals over layers.",
            header=("update", "r", "amplification", "low", "high", "along random", "‖UᵀWV‖ ΔW", "W", "random", "sd"),
            rows=[
                [
                    _name(one),
                    one.r,
                    *(one.amplification or (None, None, None)),
                    one.median.random_amplification,
                    one.median.own,
                    one.median.top,
                    one.median.random,
                    one.median.random_sd,
                ]
                for one in found.strengths
            ],
        ),
    )


def _positions(found: WeightComparison) -> Picture:
    judged = next(curve for curve in found.curves if curve.rank == found.judged_strength.rank)
    said = [
        f"{side} {places.energy[0]:.2g} times chance at the strongest and {places.energy[-1]:.2g} at the weakest octave"
        for side, places in judged.sides.items()
    ]
    return Picture(
        name="weight-positions",
        caption=(
            f"Where in the weight's spectrum the update's top i = min(r, {POSITION_DIRECTIONS}) directions lie (Figure 8 of the "
            "paper). Above: energy at each place, 1 by chance. Below: overlap with the weight's top m; dashed, chance."
        ),
        alt=f"Energy of the directions of {judged.label}: {'; '.join(said)}.",
        draw=partial(plot_positions, found),
        data=Table(
            name="weight-positions",
            caption="Means over layers and seeds; places from the one after the row before up to m.",
            header=("update", "i", "side", "m", "φ(i, m)", "chance", "energy (1 = chance)"),
            rows=[
                [curve.label, curve.i, side, m, *numbers]
                for curve in found.curves
                for side, places in curve.sides.items()
                for m, *numbers in zip(curve.ends, places.overlap, places.expected, places.energy, strict=True)
            ],
        ),
    )


def _intruders(found: WeightComparison) -> Picture:
    counts = ", ".join(f"{one.mean:.2g} for {one.label}" for one in found.novelties)
    chance = found.novelties[0].chance
    return Picture(
        name="weight-intruders",
        caption=(
            f"Left: the largest |cos| of each of the top {found.novelties[0].directions} directions of the tuned "
            "weights to all old ones, a dot a direction of a layer and a seed. Right: how many lie below a threshold."
        ),
        alt=f"Intruders (max|cos| below {INTRUDER_THRESHOLD:g}; random directions: {chance:.2f}) a layer, on average: {counts}.",
        draw=partial(plot_intruders, found),
        data=Table(
            name="weight-intruders",
            caption="Mean number of intruders a layer, by threshold, beside the max|cos| of a random direction.",
            header=("update", *(f"ε = {threshold:g}" for threshold in SWEEP_THRESHOLDS), "random max|cos|"),
            rows=[[one.label, *one.sweep, one.chance] for one in found.novelties],
        ),
    )


def _table7(found: WeightComparison) -> Table:
    published: list[list[Cell]] = []
    for r, own, top, random, norm, factor in PUBLISHED:
        scale = [own / random, own / top, factor, norm / random]
        published.append([PUBLISHED_NAME, r, r / PUBLISHED_DIM, own, top, random, *scale[:2], norm, *scale[2:], None])
    return Table(
        name="weight-table7",
        caption=(
            "Table 7: ‖UᵀWV‖ with the top r directions of ΔW, of W, and random ones. Medians over layers; full "
            f"fine-tuning at its top {', '.join(str(r) for r in FULL_RANKS)}."
        ),
        header=(
            "update",
            "r",
            "r / smaller side",
            "ΔW",
            "W",
            "random",
            "ΔW / random",
            "ΔW / W",
            "‖ΔW‖",
            "amplification",
            "along random",
            "layers above random",
        ),
        rows=[*(_row7(found, one) for one in found.strengths), *published],
        digits=3,
    )


def _row7(found: WeightComparison, one: AmplificationSummary) -> list[Cell]:
    sides = sorted(min(c.shape) for c in found.columns if (c.rank, c.r) == (one.rank, one.r))
    share = one.r / sides[len(sides) // 2]
    cell = one.median
    numbers: list[Cell] = [cell.own, cell.top, cell.random, one.ratio.value, one.reach.value, cell.norm]
    factors: list[Cell] = [cell.amplification, cell.random_amplification]
    return [_name(one), one.r, share, *numbers, *factors, f"{one.significant} of {one.layers}"]


def _layers(found: WeightComparison) -> Table:
    return Table(
        name="weight-layers",
        caption="Table 7 layer by layer; means over seeds, p corrected over layers.",
        header=(
            "layer",
            "kind",
            "out",
            "in",
            "update",
            "r",
            "ΔW",
            "W",
            "random",
            "sd",
            "z",
            "p",
            "‖ΔW‖",
            "amplification",
            "along random",
        ),
        rows=[
            [
                column.layer,
                column.kind,
                *column.shape,
                "full" if column.rank is None else "LoRA",
                column.r,
                column.found.own,
                column.found.top,
                column.found.random,
                column.found.random_sd,
                column.found.z,
                column.holm,
                column.found.norm,
                column.found.amplification,
                column.found.random_amplification,
            ]
            for column in found.columns
        ],
        digits=3,
    )


def _intruder_layers(found: WeightComparison) -> Table:
    return Table(
        name="weight-intruder-layers",
        caption=(
            "Intruder dimensions layer by layer, means over seeds. Energy: share of the tuned weight's in intruders. "
            "Inside: share of theirs in the strongest quarter of the old directions. Random: max|cos| by chance."
        ),
        header=(
            "layer",
            "kind",
            "update",
            "intruders",
            "energy",
            "inside",
            "inside by chance",
            "least |cos|",
            "random",
        ),
        rows=[
            [
                one.layer,
                one.kind,
                "full" if one.rank is None else f"LoRA r = {one.rank}",
                one.count,
                one.share,
                one.inside,
                one.inside_chance,
                min(cosine for seed in one.cosines for cosine in seed),
                one.chance,
            ]
            for one in found.intruders
        ],
        digits=3,
    )


def _value(found: Interval | None) -> str:
    return "unknown" if found is None else f"{found.value:.3g}"
