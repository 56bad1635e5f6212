"""Updates of a study laid beside their weights, layer by layer; each number over the seeds of a rank."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from rankscope.analysis.amplification import Amplification, Positions, WeightBasisCoordinates, amplification, positions
from rankscope.analysis.intruders import Intruders, intruders
from rankscope.errors import ShapeError
from rankscope.evidence.material import Material
from rankscope.formats.abstract_store import Store
from rankscope.formats.names import layer_kind
from rankscope.inference import holm
from rankscope.linalg import working_dtype
from rankscope.subspace import Side
from rankscope.train.results import RunResult

FULL_RANKS = (1, 4, 16, 64)
"""Directions of a full update that Table 7 is made for; an adapter's are as many as its rank."""
POSITION_DIRECTIONS = 8
"""Directions of an update whose places among the weight's are looked at, at most (the paper's Figure 8)."""


class LayerAmplification(msgspec.Struct, frozen=True, kw_only=True):
    """Table 7 for one layer, at LoRA's ``rank`` (None: full fine-tuning) and the top ``r`` directions of the update.

    ``found``: means over ``seeds``, and the factors of these means; its p is the largest of the seeds. ``holm``: that p
    corrected for the layers.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    r: int
    seeds: int
    found: Amplification
    holm: float


class MeanPositions(msgspec.Struct, frozen=True, kw_only=True):
    """One side of Figure 8 at each end m of ``Curve.ends``: means over layers and seeds, as is their chance level.

    ``overlap``: φ(i, m), ``expected`` the same by chance. ``energy``: mean of ‖U_iᵀw‖² over the weight's directions w
    after the end before, up to m, in units of chance.
    """

    overlap: tuple[float, ...]
    expected: tuple[float, ...]
    energy: tuple[float, ...]


class PositionCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Where the top i directions of the updates lie among those of the weights; ``ends``: 1, 2, 4, …"""

    rank: int | None
    i: int
    ends: tuple[int, ...]
    left: MeanPositions
    right: MeanPositions

    @property
    def label(self) -> str:
        return rank_label(self.rank)

    @property
    def sides(self) -> dict[Side, MeanPositions]:
        return {"left": self.left, "right": self.right}


class LayerIntruders(msgspec.Struct, frozen=True, kw_only=True):
    """Intruder dimensions of one layer. ``cosines``: max|cos| of each of the top directions, a tuple a seed.

    ``counts``: mean over seeds at each threshold of the sweep, ``count`` at the usual one. ``share``: of the tuned
    weight's energy in intruders, mean over seeds. ``inside``: mean of their energy in the span of the strongest quarter
    of the old directions, None without intruders. ``chance`` and ``inside_chance``: of a random direction.
    """

    layer: str
    kind: str
    rank: int | None
    cosines: tuple[tuple[float, ...], ...]
    counts: tuple[float, ...]
    count: float
    share: float
    inside: float | None
    chance: float
    inside_chance: float


@dataclass(frozen=True)
class RankRuns:
    """The runs of one rank, a store for each seed; ``edge``: whether their rate lies at an end of those tried."""

    rank: int | None
    stores: Sequence[Store]
    edge: bool

    @classmethod
    def of(cls, material: Material, rank: int | None, rows: Sequence[RunResult]) -> RankRuns:
        edge = any(row.choice is not None and row.choice.edge is not None for row in rows)
        return cls(rank, [material.store(row) for row in rows], edge)


@dataclass(frozen=True)
class LayerMeasurements:
    """One layer of one rank: the measurements of each seed. ``tables``: by seed, then by r."""

    layer: str
    shape: tuple[int, int]
    tables: Sequence[Sequence[Amplification]]
    places: Sequence[Positions]
    new: Sequence[Intruders]


def rank_label(rank: int | None) -> str:
    """``r = 4``, or ``full``."""
    return "full" if rank is None else f"r = {rank}"


def measure_layer(
    material: Material, name: str, groups: Sequence[RankRuns], skip: Callable[[str], None]
) -> Iterator[tuple[int | None, LayerMeasurements]]:
    """One layer at every rank that has it. The weight is decomposed once.

    Args:
        skip: is told what could not be measured, and why.
    """
    matrix = material.weight(name)
    matrix = matrix.to(working_dtype(matrix.device))
    base = material.bases.svd(matrix)
    for group in groups:
        tables, places, new = [], [], []
        wanted = [r for r in FULL_RANKS if r <= min(matrix.shape)] if group.rank is None else [group.rank]
        try:
            for store in group.stores:
                if name in store:
                    update = store[name].to(material.device)
                    own = WeightBasisCoordinates.of(update, base, max(POSITION_DIRECTIONS, *wanted))
                    tables.append([amplification(own, r) for r in wanted])
                    places.append(positions(own, POSITION_DIRECTIONS))
                    new.append(intruders(update, matrix, base))
        except ShapeError as error:
            skip(f"{name}, {rank_label(group.rank)}: {error}")
            continue
        if tables:
            yield group.rank, LayerMeasurements(name, (matrix.shape[0], matrix.shape[1]), tables, places, new)


def layer_amplifications(rank: int | None, layers: Sequence[LayerMeasurements]) -> list[LayerAmplification]:
    """Table 7 by r, then by layer; the p of each r corrected for the layers."""
    cells: dict[int, list[tuple[LayerMeasurements, list[Amplification]]]] = {}
    for one in layers:
        asked = FULL_RANKS if rank is None else (rank,)
        for r, seeds in zip(asked, zip(*one.tables, strict=True), strict=False):
            cells.setdefault(r, []).append((one, list(seeds)))
    return [
        LayerAmplification(
            layer=one.layer,
            kind=layer_kind(one.layer),
            shape=one.shape,
            rank=rank,
            r=r,
            seeds=len(seeds),
            found=_over_seeds(seeds),
            holm=float(corrected),
        )
        for r, cells_of_r in cells.items()
        for (one, seeds), corrected in zip(
            cells_of_r, holm([max(cell.p for cell in seeds) for _, seeds in cells_of_r]), strict=True
        )
    ]


def _over_seeds(seeds: Sequence[Amplification]) -> Amplification:
    """Means, the largest p, and factors of the means: the mean of 1/own would be that of the least ``own``."""
    mean = combine_amplifications(seeds, statistics.fmean)
    return msgspec.structs.replace(
        mean,
        p=max(cell.p for cell in seeds),
        amplification=mean.norm / mean.own if mean.own else None,
        random_amplification=mean.norm / mean.random,
    )


def combine_amplifications(cells: Sequence[Amplification], how: Callable[[list[float]], float]) -> Amplification:
    """One number for each field of several; r is the largest, and an amplification that is not known is left out."""
    numbers = {
        name: [value for cell in cells if (value := getattr(cell, name)) is not None]
        for name in Amplification.__struct_fields__
    }
    r = max(cell.r for cell in cells)
    values = {name: how(several) if several else None for name, several in numbers.items()}
    return msgspec.convert({**values, "r": r}, Amplification)


def position_curve(rank: int | None, layers: Sequence[LayerMeasurements]) -> PositionCurve:
    """Figure 8 over the layers and seeds that have as many directions as most can have."""
    places_of_layers = [places for one in layers for places in one.places]
    i = max(places.i for places in places_of_layers)
    # Where directions are rounding, an update has fewer, and another chance level.
    places_of_layers = [places for places in places_of_layers if places.i == i]
    shortest = min(len(places.left.energy) for places in places_of_layers)
    ends = [2**power for power in range(shortest.bit_length()) if 2**power < shortest] + [shortest]
    left, right = (_places(places_of_layers, side, ends) for side in ("left", "right"))
    return PositionCurve(rank=rank, i=i, ends=tuple(ends), left=left, right=right)


def _places(positions: Sequence[Positions], name: str, ends: Sequence[int]) -> MeanPositions:
    sides = [getattr(places, name) for places in positions]
    at = np.array(ends) - 1
    energy = [
        [side.energy[start:end].mean() * side.d / places.i for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for places, side in zip(positions, sides, strict=True)
    ]

    def mean(rows: object) -> tuple[float, ...]:
        return tuple(np.mean(np.array(rows), axis=0).tolist())

    return MeanPositions(
        overlap=mean([side.overlap[at] for side in sides]),
        expected=mean([side.expected[at] for side in sides]),
        energy=mean(energy),
    )


def layer_intruders(rank: int | None, one: LayerMeasurements) -> LayerIntruders:
    """The intruder dimensions of a layer over its seeds."""
    new = [direction.inside for seed in one.new for direction in seed.intruding_directions]
    return LayerIntruders(
        layer=one.layer,
        kind=layer_kind(one.layer),
        rank=rank,
        cosines=tuple(tuple(direction.cosine for direction in seed.directions) for seed in one.new),
        counts=tuple(np.mean([seed.counts for seed in one.new], axis=0).tolist()),
        count=statistics.fmean(len(seed.intruding_directions) for seed in one.new),
        share=statistics.fmean(
            math.fsum(direction.share for direction in seed.intruding_directions) for seed in one.new
        ),
        inside=statistics.fmean(new) if new else None,
        chance=one.new[0].chance,
        inside_chance=one.new[0].inside_chance,
    )
