"""Is LoRA's update the low-rank part of the one that full fine-tuning makes? Rank by rank, against the best of each."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import Any

import msgspec

from rankscope.analysis.layer_agreement import CapturedEnergy, FullUpdate, LayerAgreement, compare_with_full_update
from rankscope.analysis.layer_comparison import MAX_DIRECTIONS
from rankscope.errors import ShapeError
from rankscope.evidence.material import Material, group_by_rank
from rankscope.formats.abstract_store import Store
from rankscope.inference import Interval, holm, mean_interval
from rankscope.train.results import RunResult
from rankscope.updates import LowRank
from rankscope.verdict import (
    MAX_CORRECTED_P,
    Answer,
    MissingEvidenceError,
    Verdict,
    answer_above,
    format_interval,
    median_over_layers,
)

EFFICIENCY_THRESHOLD = 0.5
"""LoRA's update is the low-rank part of the full one where it explains at least this share of what its rank could. No
paper sets the line."""
TYPICAL_RANK = 8
"""The verdict is about the rank nearest this one, the smaller of the two that Hu et al. (2021, §7.2) look into."""


class LayerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One layer at one rank, means over seeds; see ``analysis.agreement.LayerAgreement`` for what the numbers are.

    ``norm_full``, ``norm_lora``: ‖ΔW_full‖_F and ‖s·BA‖_F; ``ratio`` the second over the first. ``left``, ``right``,
    ``both``: share of the full update's energy inside LoRA's subspaces, beside ``…_chance``. ``top_left``,
    ``top_right``: φ(1, 1) of the full update's first direction and LoRA's, beside ``…_chance``. ``p_left``,
    ``p_right``: of the grid of top directions, corrected for looking at all of it, the largest over seeds; ``holm_…``
    corrected for all layers and sides too.
    """

    layer: str
    shape: tuple[int, int]
    norm_full: float
    norm_lora: float
    ratio: float
    floor: float
    achieved: float
    scaled: float
    cosine: float
    efficiency: float
    left: float
    left_chance: float
    right: float
    right_chance: float
    both: float
    both_chance: float
    top_left: float
    top_left_chance: float
    top_right: float
    top_right_chance: float
    p_left: float
    p_right: float
    holm_left: float
    holm_right: float


class TotalAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """All layers as one vector, by sums of squares: means over seeds. Each layer has its own best multiple."""

    floor: Interval
    achieved: Interval
    scaled: Interval
    cosine: Interval
    efficiency: Interval
    ratio: Interval


class RankAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """One rank against full fine-tuning of the same seeds; medians over layers of the means over seeds.

    ``significant_left``, ``significant_right``: how many layers have a ``holm`` below ``SIGNIFICANT``. ``edge``:
    whether the best rate of LoRA or of full fine-tuning lies at an end of those tried.
    """

    rank: int
    seeds: tuple[int, ...]
    edge: bool
    total: TotalAgreement
    efficiency: Interval
    cosine: Interval
    left: Interval
    left_chance: float
    right: Interval
    right_chance: float
    both: Interval
    both_chance: float
    top_left: Interval
    top_left_chance: float
    top_right: Interval
    top_right_chance: float
    significant_left: int
    significant_right: int
    rows: tuple[LayerRow, ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """``ranks``: LoRA at each rank. ``repeat``: in LoRA's place the full update of the next seed cut to that rank: how
    far full fine-tuning agrees with itself; empty with one seed. ``skipped``: layers left out, with reasons."""

    ranks: tuple[RankAgreement, ...]
    repeat: tuple[RankAgreement, ...]
    skipped: tuple[str, ...]


Rows = dict[int, list[LayerRow]]
"""Of one rank: the layers by seed."""


def measure_agreement(material: Material) -> Agreement:
    """Set LoRA's updates beside those of full fine-tuning of the same seed, at the best rate of each.

    Raises:
        MissingEvidenceError: no LoRA run, no full fine-tuning, or none of the same seed or layers.
    """
    ranks = group_by_rank(material.lora_rows())
    full = {row.record.run.seed: row for row in material.full_rows()}
    ranks = {rank: [row for row in rows if row.record.run.seed in full] for rank, rows in ranks.items()}
    ranks = {rank: rows for rank, rows in ranks.items() if rows}
    if not ranks:
        raise MissingEvidenceError("no LoRA run has the seed of a full fine-tuning; train both with the same --seeds")
    lora, repeat, skipped = _measure(material, ranks, full)
    if not lora:
        why = f" ({min(skipped)})" if skipped else ""
        raise MissingEvidenceError(
            f"LoRA and full fine-tuning changed no layer in common{why}; adapt layers of the base"
        )
    edges = {rank: any(_at_edge(row) for row in (*rows, *full.values())) for rank, rows in ranks.items()}
    return Agreement(
        ranks=tuple(_summary(rank, rows, edges[rank]) for rank, rows in lora.items()),
        repeat=tuple(_summary(rank, rows, any(map(_at_edge, full.values()))) for rank, rows in repeat.items()),
        skipped=tuple(sorted(skipped)),
    )


def _at_edge(row: RunResult) -> bool:
    return row.choice is not None and row.choice.edge is not None


def _measure(
    material: Material, ranks: Mapping[int, Sequence[RunResult]], full: Mapping[int, RunResult]
) -> tuple[dict[int, Rows], dict[int, Rows], set[str]]:
    """Layer by layer, so that a full update is taken apart once and only those of one layer are held."""
    tuned = {seed: material.store(row) for seed, row in full.items()}
    adapters = {rank: {row.record.run.seed: material.store(row) for row in rows} for rank, rows in ranks.items()}
    lora: dict[int, Rows] = defaultdict(lambda: defaultdict(list))
    repeat: dict[int, Rows] = defaultdict(lambda: defaultdict(list))
    skipped: set[str] = set()
    for name in material.track(material.layers):
        if not all(name in store for store in (*tuned.values(), *(s for by in adapters.values() for s in by.values()))):
            skipped.add(f"{name}: not every run changes it")
            continue
        try:
            layer_rows = list(_layer(material, name, tuned, adapters))
        except ShapeError as error:
            skipped.add(f"{name}: {error}")
            continue
        for into, rank, seed, row in layer_rows:
            (lora if into == "lora" else repeat)[rank][seed].append(row)
    return lora, repeat, skipped


def _layer(
    material: Material, name: str, tuned: Mapping[int, Store], adapters: Mapping[int, Mapping[int, Store]]
) -> Iterator[tuple[str, int, int, LayerRow]]:
    """("lora" or "repeat", rank, seed, row) for every adapter, and for every full update cut to its ranks."""
    top = max(MAX_DIRECTIONS, *(2 * rank for rank in adapters))
    targets = {seed: FullUpdate.of(store[name].to(material.device), top) for seed, store in tuned.items()}
    seeds = list(targets)
    following = dict(zip(seeds, seeds[1:] + seeds[:1], strict=True))
    for rank, stores in adapters.items():
        nominal = min(store.info(name).nominal_rank or rank for store in stores.values())  # PiSSA's is 2r
        for seed, store in stores.items():
            update = store[name].to(material.device)
            if not isinstance(update, LowRank):
                raise ShapeError("LoRA's update is no product of factors")
            yield "lora", rank, seed, _row(name, compare_with_full_update(targets[seed], update))
        for seed, target in targets.items():
            if len(seeds) > 1:
                yield (
                    "repeat",
                    rank,
                    seed,
                    _row(name, compare_with_full_update(target, targets[following[seed]].truncate(nominal))),
                )


COPIED_FIELDS = ("shape", "norm_full", "norm_lora", "ratio", "floor", "achieved", "scaled", "cosine", "efficiency")
CAPTURED_FIELDS = ("left", "right", "both")
TOP_FIELDS = ("top_left", "top_right")
MAX_FIELDS = ("p_left", "p_right", "holm_left", "holm_right")


def _row(name: str, a: LayerAgreement) -> LayerRow:
    numbers: dict[str, Any] = {field: getattr(a, field) for field in COPIED_FIELDS}
    for side in CAPTURED_FIELDS:
        captured: CapturedEnergy = getattr(a, side)
        numbers |= {side: captured.share, f"{side}_chance": captured.chance}
    for top, directions in zip(TOP_FIELDS, (a.left_directions, a.right_directions), strict=True):
        cell = directions.at(1, 1)
        numbers |= {top: cell.overlap, f"{top}_chance": cell.expected}
    numbers |= {"p_left": a.p_left, "p_right": a.p_right, "holm_left": a.p_left, "holm_right": a.p_right}
    return LayerRow(layer=name, **numbers)


def _summary(rank: int, by_seed: Rows, edge: bool) -> RankAgreement:
    rows = _correct_p_values([_over_seeds(same) for same in zip(*by_seed.values(), strict=True)])
    totals = [_total(one) for one in by_seed.values()]
    numbers: dict[str, Any] = {
        name: median_over_layers([getattr(row, name) for row in rows])
        for name in ("efficiency", "cosine", *CAPTURED_FIELDS, *TOP_FIELDS)
    }
    for name in (*CAPTURED_FIELDS, *TOP_FIELDS):
        numbers[f"{name}_chance"] = statistics.median(getattr(row, f"{name}_chance") for row in rows)
    return RankAgreement(
        rank=rank,
        seeds=tuple(sorted(by_seed)),
        edge=edge,
        total=TotalAgreement(**{name: mean_interval([one[name] for one in totals]) for name in totals[0]}),
        significant_left=sum(row.holm_left < MAX_CORRECTED_P for row in rows),
        significant_right=sum(row.holm_right < MAX_CORRECTED_P for row in rows),
        rows=tuple(rows),
        **numbers,
    )


def _over_seeds(same: Sequence[LayerRow]) -> LayerRow:
    """One layer: the mean of each number over seeds, the largest of each p."""
    numbers = [name for name in LayerRow.__struct_fields__ if name not in ("layer", "shape")]
    combined = {
        name: (max if name in MAX_FIELDS else statistics.fmean)(getattr(row, name) for row in same) for name in numbers
    }
    return msgspec.structs.replace(same[0], **combined)


def _correct_p_values(rows: Sequence[LayerRow]) -> list[LayerRow]:
    adjusted = holm([row.p_left for row in rows] + [row.p_right for row in rows]).tolist()
    return [
        msgspec.structs.replace(row, holm_left=left, holm_right=right)
        for row, left, right in zip(rows, adjusted[: len(rows)], adjusted[len(rows) :], strict=True)
    ]


def _total(rows: Sequence[LayerRow]) -> dict[str, float]:
    full, lora = sum(row.norm_full**2 for row in rows), sum(row.norm_lora**2 for row in rows)
    inner = sum(row.cosine * row.norm_full * row.norm_lora for row in rows)
    squares = {
        name: sum((getattr(row, name) * row.norm_full) ** 2 for row in rows) / full
        for name in ("floor", "achieved", "scaled")
    }
    return {
        **{name: sqrt(square) for name, square in squares.items()},
        "cosine": inner / sqrt(full * lora),
        "efficiency": (1 - squares["scaled"]) / (1 - squares["floor"]),
        "ratio": sqrt(lora / full),
    }


def verdicts(result: Agreement) -> list[Verdict]:
    """Whether LoRA's update at the rank nearest ``TYPICAL_RANK`` is the low-rank part of the full one.

    "yes": the interval of what it explains, of what its rank could, lies above ``EFFICIENCY_THRESHOLD``, and the top
    directions of most layers overlap beyond chance. "no": the interval lies below that, and below what another full
    fine-tuning explains. Where full fine-tuning does not agree with itself, LoRA's update can be no part of it.
    """
    one = min(result.ranks, key=lambda rank: (abs(rank.rank - TYPICAL_RANK), rank.rank))
    again = next((other for other in result.repeat if other.rank == one.rank), None)
    return [
        Verdict(
            line="agreement",
            claim="LoRA's update is the low-rank part of the one that full fine-tuning makes.",
            answer=_answer(one, again),
            sentence=_sentence(result, one, again),
            refuted_by=(
                f"Less than {EFFICIENCY_THRESHOLD:g} explained for sure of what the rank could, and less than the "
                "full update of "
                "another seed explains, cut to that rank."
            ),
        ).with_value(one.efficiency)
    ]


def _answer(one: RankAgreement, again: RankAgreement | None) -> Answer:
    explained = answer_above(one.efficiency, EFFICIENCY_THRESHOLD)
    if explained == "yes":
        return "yes" if 2 * one.significant_left > len(one.rows) else "undecided"
    if explained == "undecided" or one.edge or again is None or again.efficiency.low is None:
        return "undecided"
    return "no" if answer_above(one.efficiency, again.efficiency.low) == "no" else "undecided"


def _sentence(result: Agreement, one: RankAgreement, again: RankAgreement | None) -> str:
    layers, seeds = len(one.rows), len(one.seeds)
    over = f"median of {layers} layers, {seeds} seed{'s' if seeds > 1 else ''}"
    said = [
        f"At r = {one.rank} LoRA's update, scaled as well as can be, explains {format_interval(one.efficiency)} of "
        "the energy "
        f"of the full update that its rank could ({over}; the line was drawn at {EFFICIENCY_THRESHOLD:g}), with a "
        "cosine of "
        f"{format_interval(one.cosine)}.",
        f"The first left directions overlap by {format_interval(one.top_left)}, by chance "
        f"{one.top_left_chance:.2g}; top "
        f"directions do beyond chance in {one.significant_left} of {layers} layers (corrected p < "
        f"{MAX_CORRECTED_P:g}).",
    ]
    if len(result.ranks) > 1:
        ends = [f"{end.efficiency.value:.2g} at r = {end.rank}" for end in (result.ranks[0], result.ranks[-1])]
        said.append(f"It explains {' and '.join(ends)}.")
    if again is None:
        said.append("Not enough seeds to tell how far full fine-tuning agrees with itself.")
    else:
        said.append(
            f"The full update of another seed, cut to r = {one.rank}, explains {format_interval(again.efficiency)}."
        )
    if one.edge:
        said.append("A best rate lies at the end of those tried: a better one may agree more.")
    return " ".join(said)
