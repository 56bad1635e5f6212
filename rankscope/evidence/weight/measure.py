"""Does the update strengthen directions that the weight neglects (Hu et al. 2021, §7.3)? Does it add new ones?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from rankscope.analysis.amplification import Amplification
from rankscope.analysis.intruders import INTRUDER_THRESHOLD
from rankscope.evidence.material import Material, group_by_rank
from rankscope.evidence.weight.layers import (
    LayerAmplification,
    LayerIntruders,
    LayerMeasurements,
    PositionCurve,
    RankRuns,
    combine_amplifications,
    layer_amplifications,
    layer_intruders,
    measure_layer,
    position_curve,
    rank_label,
)
from rankscope.inference import Interval, median_interval, slope
from rankscope.verdict import MAX_CORRECTED_P, Answer, MissingEvidenceError, Verdict, answer_above, format_interval

JUDGED_RANK = 4
"""The paper's low rank; the nearest one of the study is judged."""
REACH_THRESHOLD = 1 / 2
"""Far below the weight's own strongest directions: at most this share of their ‖UᵀWV‖."""
INTRUDER_COUNT_THRESHOLD = 1 / 2
"""A median of more intruders than this a layer: most layers have at least one."""
SLOPE_FACTOR = 1.25
"""Amplification falls faster than along random directions: by this factor of their slope. Measured on random updates
it comes to 1.15, as ‖UᵀWV‖ is skewed at r = 1."""
FEW_LAYERS = "there are too few layers for an interval over them (6 are needed)"


class AmplificationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Table 7 over all layers, at LoRA's ``rank`` (None: full fine-tuning) and the top ``r`` directions of the update.

    ``median``: over layers. ``ratio``: its own/random, ``reach``: own/top, ``amplification``: as named, with intervals
    over layers. ``significant``: layers whose corrected p is below ``SIGNIFICANT``. ``edge``: whether the best rate
    lies at an end of those tried.
    """

    rank: int | None
    r: int
    layers: int
    seeds: int
    edge: bool
    significant: int
    median: Amplification
    ratio: Interval
    reach: Interval
    amplification: Interval | None

    @property
    def label(self) -> str:
        return rank_label(self.rank)


class IntruderSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Intruder dimensions over all layers.

    ``count``: median over layers of those among the top ``directions``; ``mean`` the mean; ``some``: layers with one on
    average over seeds. ``sweep``: means at each threshold of the sweep. ``share`` of the tuned weight's energy, and
    energy ``inside`` the strongest quarter of the old directions: medians over the layers with intruders, None where
    there are none. ``chance`` and ``inside_chance``: what a random direction would read.
    """

    rank: int | None
    layers: int
    seeds: int
    edge: bool
    directions: int
    count: Interval
    mean: float
    some: int
    sweep: tuple[float, ...]
    share: float | None
    inside: float | None
    chance: float
    inside_chance: float

    @property
    def label(self) -> str:
        return rank_label(self.rank)


class AmplificationSlope(msgspec.Struct, frozen=True, kw_only=True):
    """Slope of ln(amplification) against ln(r) over these ``ranks``, the median over layers; ``random``: the slope of
    the amplification that random directions would have."""

    ranks: tuple[int, ...]
    slope: Interval
    random: float


class WeightComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Updates against their weights: LoRA by rank, then full fine-tuning (rank None), at the best rate of each.

    ``fall``: over the LoRA ranks whose best rate is inside the grid; None where they are fewer than two. ``skipped``:
    what could not be measured, with reasons.
    """

    strengths: tuple[AmplificationSummary, ...]
    curves: tuple[PositionCurve, ...]
    novelties: tuple[IntruderSummary, ...]
    fall: AmplificationSlope | None
    columns: tuple[LayerAmplification, ...]
    intruders: tuple[LayerIntruders, ...]
    skipped: tuple[str, ...]

    @property
    def lora_strengths(self) -> list[AmplificationSummary]:
        """By rank."""
        return [one for one in self.strengths if one.rank is not None]

    @property
    def full_strengths(self) -> list[AmplificationSummary]:
        """By r; empty where the study has no full fine-tuning."""
        return [one for one in self.strengths if one.rank is None]

    @property
    def judged_strength(self) -> AmplificationSummary:
        """The LoRA rank nearest ``JUDGED_RANK``."""
        return min(self.lora_strengths, key=lambda one: (abs(one.r - JUDGED_RANK), one.r))


def measure_weight(material: Material) -> WeightComparison:
    """Table 7, Figure 8 and intruder dimensions of every adapted layer, at the best rate of each rank, over all seeds.

    Raises:
        MissingEvidenceError: there is no LoRA run, or none that can be held against the base.
    """
    groups = [RankRuns.of(material, rank, rows) for rank, rows in group_by_rank(material.lora_rows()).items()]
    if full := material.best_rows("full"):
        groups.append(RankRuns.of(material, None, full))
    measurements: dict[int | None, list[LayerMeasurements]] = {group.rank: [] for group in groups}
    skipped: list[str] = []
    for name in material.track(material.layers):
        for rank, one in measure_layer(material, name, groups, skipped.append):
            measurements[rank].append(one)
    groups = [group for group in groups if measurements[group.rank]]
    if all(group.rank is None for group in groups):
        reason = skipped[0] if skipped else "no adapter changes a matrix of the base"
        raise MissingEvidenceError(f"no adapter can be held against its weight ({reason}); train LoRA with --ranks")
    tables = {group.rank: layer_amplifications(group.rank, measurements[group.rank]) for group in groups}
    new = {group.rank: [layer_intruders(group.rank, one) for one in measurements[group.rank]] for group in groups}
    return WeightComparison(
        strengths=tuple(one for group in groups for one in _strengths(group, tables[group.rank])),
        curves=tuple(position_curve(group.rank, measurements[group.rank]) for group in groups),
        novelties=tuple(_novelty(group, new[group.rank]) for group in groups),
        fall=_fall([one for group in groups if not group.edge for one in tables[group.rank] if one.rank is not None]),
        columns=tuple(one for group in groups for one in tables[group.rank]),
        intruders=tuple(one for group in groups for one in new[group.rank]),
        skipped=tuple(skipped),
    )


def _strengths(group: RankRuns, table: Sequence[LayerAmplification]) -> Iterable[AmplificationSummary]:
    for r in dict.fromkeys(column.r for column in table):
        layers = [column for column in table if column.r == r]
        cells = [column.found for column in layers]
        factors = [cell.amplification for cell in cells if cell.amplification is not None]
        yield AmplificationSummary(
            rank=group.rank,
            r=r,
            layers=len(layers),
            seeds=len(group.stores),
            edge=group.edge,
            significant=sum(column.holm < MAX_CORRECTED_P for column in layers),
            median=combine_amplifications(cells, statistics.median),
            ratio=median_interval([cell.own / cell.random for cell in cells]),
            reach=median_interval([cell.own / cell.top for cell in cells]),
            amplification=median_interval(factors) if factors else None,
        )


def _novelty(group: RankRuns, layers: Sequence[LayerIntruders]) -> IntruderSummary:
    counts = [one.count for one in layers]
    some = [(one.share, one.inside) for one in layers if one.inside is not None]
    return IntruderSummary(
        rank=group.rank,
        layers=len(layers),
        seeds=len(group.stores),
        edge=group.edge,
        directions=max(len(seed) for one in layers for seed in one.cosines),
        count=median_interval(counts),
        mean=statistics.fmean(counts),
        some=sum(count >= 1 for count in counts),
        sweep=tuple(np.mean([one.counts for one in layers], axis=0).tolist()),
        share=statistics.median(share for share, _ in some) if some else None,
        inside=statistics.median(inside for _, inside in some) if some else None,
        chance=statistics.median(one.chance for one in layers),
        inside_chance=statistics.median(one.inside_chance for one in layers),
    )


def _fall(table: Sequence[LayerAmplification]) -> AmplificationSlope | None:
    """Of the layers that every rank has and an amplification is known for."""
    ranks = sorted({column.r for column in table})
    own, random = [], []
    for layer in dict.fromkeys(column.layer for column in table):
        cells = [(c.r, c.found.amplification, c.found.random_amplification) for c in table if c.layer == layer]
        known = [(math.log(r), math.log(a), math.log(b)) for r, a, b in cells if a]
        if len(known) == len(ranks) > 1:
            x, a, b = zip(*known, strict=True)
            own.append(slope(x, a).value)
            random.append(slope(x, b).value)
    return (
        AmplificationSlope(ranks=tuple(ranks), slope=median_interval(own), random=statistics.median(random))
        if own
        else None
    )


def verdicts(result: WeightComparison) -> list[Verdict]:
    """Where the update points, whether its amplification falls with the rank, and whether it brings new directions."""
    return [_direction(result), _falling(result), _novel(result)]


def _direction(result: WeightComparison) -> Verdict:
    """Compares ``ratio`` with 1 and ``reach`` with ``REACH_THRESHOLD``.

    "yes" where both intervals lie on the claimed side of their line, "no" where one lies on the other side.
    """
    at = result.judged_strength
    random, strong = answer_above(at.ratio, 1.0), answer_above(at.reach, REACH_THRESHOLD)
    answer: Answer = (
        "no" if random == "no" or strong == "yes" else "yes" if (random, strong) == ("yes", "no") else "undecided"
    )
    return _verdict(
        "The update points where the weight is neither strong nor merely random.",
        answer,
        f"at r = {at.r} the weight along the directions of ΔW, ‖UᵀWV‖, is {format_interval(at.ratio)} times that "
        "along random "
        f"ones (line: above 1) and {format_interval(at.reach)} of that along its own strongest (line: below "
        f"{REACH_THRESHOLD:g}); median "
        f"over {_layers(at)}. {at.significant} of {at.layers} layers are above random by themselves (corrected "
        f"p < {MAX_CORRECTED_P:g}; median z {at.median.z:.2g}).",
        f"‖UᵀWV‖ for sure below that along random directions, or above {REACH_THRESHOLD:g} of that along the "
        "weight's strongest.",
        at.ratio,
        [at.label] if at.edge else [],
    )


def _falling(result: WeightComparison) -> Verdict:
    """By the slope against 0 and against that of random directions, whose amplification falls as 1/r by itself."""
    claim = "The fewer directions an update has, the more it amplifies them, beyond what random directions would show."
    refuted = "A slope of ln(amplification) against ln(r) that is for sure above zero."
    edge = [one.label for one in result.lora_strengths if one.edge]
    if result.fall is None:
        lacking = f"of {len(result.lora_strengths)} LoRA ranks, two are needed with a best rate inside the grid."
        return _verdict(claim, "undecided", lacking, refuted, None, edge)
    fall, line = result.fall, min(0.0, SLOPE_FACTOR * result.fall.random)
    first, last = (
        next(one for one in result.lora_strengths if one.rank == rank) for rank in (fall.ranks[0], fall.ranks[-1])
    )
    ends = [f"{one.median.amplification or 0:.3g} at r = {one.r}" for one in (first, last)]
    random = [f"{one.median.random_amplification:.3g}" for one in (first, last)]
    answer: Answer = (
        "yes"
        if answer_above(fall.slope, line) == "no"
        else "no"
        if answer_above(fall.slope, 0.0) == "yes"
        else "undecided"
    )
    numbers = (
        f"the amplification ‖ΔW‖/‖UᵀWV‖ goes from {ends[0]} to {ends[1]}, with a log-log slope of "
        f"{format_interval(fall.slope)} (median over {_layers(first)}; line: {line:.3g}). Along random directions "
        "it would go "
        f"from {random[0]} to {random[1]}, with a slope of {fall.random:.3g}."
    )
    told = " Chance alone gives such a fall." if answer == "undecided" and answer_above(fall.slope, 0.0) == "no" else ""
    left_out = f" Left out, with their best rate at the end of the grid: {', '.join(edge)}." if edge else ""
    return _verdict(claim, answer, numbers + told + left_out, refuted, fall.slope, [])


def _novel(result: WeightComparison) -> Verdict:
    """By the median number of intruders a layer against ``INTRUDER_COUNT_THRESHOLD``."""
    at = result.judged_strength
    new = next(one for one in result.novelties if one.rank == at.rank)
    # In so few dimensions a random direction is an intruder no more often than not.
    told = new.chance < INTRUDER_THRESHOLD
    energy = (
        f" They hold {new.share:.2g} of the tuned weight's energy, and {new.inside:.2f} of theirs lies in the "
        f"strongest quarter of the old directions (chance {new.inside_chance:.2f})."
        if new.share is not None and new.inside is not None
        else ""
    )
    beside = [f" Full fine-tuning: a mean of {one.mean:.2g}." for one in result.novelties if one.rank is None]
    return _verdict(
        "The update brings no new direction among the weight's strongest (no intruder dimensions).",
        _opposite(answer_above(new.count, INTRUDER_COUNT_THRESHOLD)) if told else "undecided",
        f"at r = {at.r}, of the top {new.directions} directions of a tuned weight {format_interval(new.count)} are "
        "intruders, "
        f"with a max|cos| to all old ones below {INTRUDER_THRESHOLD:g} (random direction: {new.chance:.2f}); "
        "median over "
        f"{_layers(at)}, line {INTRUDER_COUNT_THRESHOLD:g}, mean {new.mean:.2g}; {new.some} layers have one or "
        f"more.{energy}"
        + "".join(beside)
        + ("" if told else " The layers are too small: a random direction would be none."),
        "At least one intruder in most layers, for sure.",
        new.count,
        [at.label] if at.edge else [],
    )


def _opposite(answer: Answer) -> Answer:
    swapped: dict[Answer, Answer] = {"yes": "no", "no": "yes", "undecided": "undecided"}
    return swapped[answer]


def _layers(one: AmplificationSummary) -> str:
    return f"{one.layers} layer{'' if one.layers == 1 else 's'}, {one.seeds} seed{'' if one.seeds == 1 else 's'} each"


def _verdict(
    claim: str, answer: Answer, numbers: str, refuted: str, value: Interval | None, edge: Sequence[str]
) -> Verdict:
    """Undecided, with the reason first, where the best rate lies at the end of the grid or layers are too few."""
    answer = "undecided" if edge else answer
    reasons = [f"the best rate of {', '.join(edge)} lies at the end of the grid"] if edge else []
    if value is not None and not value.known:
        reasons.append(FEW_LAYERS)
    said = f"undecided, as {' and '.join(reasons)}: {numbers}" if reasons else numbers
    low, high = (value.low, value.high) if value else (None, None)
    return Verdict(
        line="weight",
        claim=claim,
        answer=answer,
        sentence=said[0].upper() + said[1:],
        refuted_by=refuted,
        value=value.value if value else None,
        low=low,
        high=high,
    )
