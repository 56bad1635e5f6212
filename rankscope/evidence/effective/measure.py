"""Effective rank against performance: a point for each run of the study; and how much of its rank an update uses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import torch

from rankscope.evidence.entries import Entry
from rankscope.evidence.material import Material, group_by_rank
from rankscope.evidence.performance.measure import Performance, incomparability_reason, measure_performance
from rankscope.inference import (
    CONFIDENCE_LEVEL,
    Interval,
    largest_insufficient_rank,
    mean_interval,
    rank_correlation,
    slope,
)
from rankscope.measures import measures_shown
from rankscope.spectra import Spectrum
from rankscope.train.config import make_generator
from rankscope.train.results import DEFAULT_MEASURE, RunResult
from rankscope.updates import LowRank
from rankscope.verdict import GAIN_SHARE, LOW_RANK_SHARE, Answer, Verdict, format_interval

DRAWS = 4
"""Random products drawn for each shape and rank: their stable rank varies by a few per cent."""
ProductShape = tuple[int, int, int]
"""(out, in, rank) of an update B·A."""


class RunPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A run that is done and changes matrices. ``ranks``: each measure, the median over the layers that adapters have.

    ``best``: at the best rate of its label; ``edge``: that rate is at an end of those tried.
    """

    label: str
    method: str
    targets: str | None
    rank: int | None
    lr: float | None
    seed: int
    best: bool
    edge: bool
    score: float
    ranks: dict[str, float]


class Correlation(msgspec.Struct, frozen=True, kw_only=True):
    """Spearman's ρ of a measure with how good the score is: above 0 where higher ranks go with better scores.

    ``rho`` is None below two points, or where they are all the same.
    """

    among: str
    measure: str
    points: int
    rho: Interval | None


class PowerLawFit(msgspec.Struct, frozen=True, kw_only=True):
    """The least-squares fit stable rank = ``factor``·r^β over ``ranks``, a point a rank: the geometric mean over seeds.

    ``random``: β of products of random factors of the same shapes and ranks.
    """

    beta: Interval
    factor: float
    ranks: tuple[int, ...]
    random: float


class RankMeasures(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of LoRA's curve: its ``share`` of full fine-tuning's gain, and each measure, the mean over seeds.

    ``random``: the measures of products of random factors of the same shapes.
    """

    rank: int
    seeds: int
    edge: bool
    share: Interval | None
    measures: dict[str, Interval]
    random: dict[str, float]


class EffectiveRanks(msgspec.Struct, frozen=True, kw_only=True):
    """Every run's effective rank beside its score. ``method`` and ``targets`` say which runs are LoRA's curve.

    ``noise``: the measures of a noise matrix of the shapes of full fine-tuning's updates, the median over layers.
    ``doubt``: why shares of full fine-tuning's gain cannot be told, if they cannot.
    """

    metric: str
    higher_is_better: bool
    method: str
    targets: str | None
    dim: int
    base: float | None
    points: tuple[RunPoint, ...]
    curve: tuple[RankMeasures, ...]
    correlations: tuple[Correlation, ...]
    growth: PowerLawFit | None
    noise: dict[str, float] | None
    doubt: str | None


def measure_effective(material: Material) -> EffectiveRanks:
    """The effective rank of every run of a study against its score.

    Raises:
        MissingEvidenceError: no LoRA run is done, or the weights of one at a best rate are gone.
    """
    performance = material.measure_once(measure_performance)
    best = group_by_rank(material.require_weights(material.lora_rows()))
    random = {rank: random_measures(_products(rows[0])) for rank, rows in best.items()}
    curve = tuple(
        _rank_measures(entry, best[entry.rank], random[entry.rank]) for entry in performance.lora_curve if entry.rank
    )
    points = tuple(run_point(row) for row in material.rows if row.ranks and row.score is not None)
    base = performance.entry_of("base")
    return EffectiveRanks(
        metric=performance.metric,
        higher_is_better=performance.higher_is_better,
        method=performance.method,
        targets=performance.targets,
        dim=performance.dim,
        base=base.score.value if base else None,
        points=points,
        curve=curve,
        correlations=tuple(_correlations(performance, points)),
        growth=_growth(best, random),
        noise=_noise(material, material.lora_rows()[0]),
        doubt=incomparability_reason(performance),
    )


def measure_names() -> list[str]:
    """The measures of effective rank that are compared with performance."""
    return [measure.name for measure in measures_shown("evidence")]


def _products(row: RunResult) -> list[ProductShape]:
    """(out, in, rank) of each layer of an adapter; PiSSA's has rank 2r."""
    layers = row.spectra.layers if row.spectra else ()
    return [(*layer.shape, layer.nominal_rank) for layer in layers if layer.nominal_rank is not None]


def random_measures(products: Sequence[ProductShape]) -> dict[str, float]:
    """Each measure of products of two factors with independent normal entries, the median over these products."""
    kinds = {product: _random_measures(*product) for product in sorted(set(products))}
    return {name: statistics.median(kinds[product][name] for product in products) for name in measure_names()}


def _random_measures(out: int, into: int, rank: int) -> dict[str, float]:
    source = make_generator("random factors", out, into, rank)

    def draw() -> Mapping[str, float]:
        B = torch.randn(out, rank, generator=source, dtype=torch.float64)
        A = torch.randn(rank, into, generator=source, dtype=torch.float64)
        return Spectrum.of(LowRank(B, A)).measures()

    draws = [draw() for _ in range(DRAWS)]
    return {name: statistics.fmean(one[name] for one in draws) for name in measure_names()}


def run_point(row: RunResult) -> RunPoint:
    """A run that is done, whose ranks are known, as a point."""
    run = row.record.run
    return RunPoint(
        label=run.label,
        method=run.method,
        targets=run.targets,
        rank=run.rank,
        lr=run.lr,
        seed=run.seed,
        best=row.is_best,
        edge=bool(row.choice and row.choice.edge),
        score=row.score or 0.0,
        ranks={name: row.ranks[name] for name in measure_names()},
    )


def _rank_measures(entry: Entry, rows: Sequence[RunResult], random: dict[str, float]) -> RankMeasures:
    return RankMeasures(
        rank=entry.rank or 0,
        seeds=len(rows),
        edge=entry.edge is not None,
        share=entry.share,
        measures={name: mean_interval([row.ranks[name] for row in rows]) for name in measure_names()},
        random=random,
    )


def _noise(material: Material, adapter: RunResult) -> dict[str, float] | None:
    """The noise values of full fine-tuning's layers that the adapter has, too."""
    full = next((row for row in material.best_rows("full") if row.spectra), None)
    if full is None or full.spectra is None or adapter.spectra is None:
        return None
    adapted = {layer.name for layer in adapter.spectra.layers}
    noise = [layer.noise for layer in full.spectra.layers if layer.noise and layer.name in adapted]
    return (
        {name: statistics.median(layer[name] or 0.0 for layer in noise) for name in measure_names()} if noise else None
    )


def _correlations(result: Performance, points: Sequence[RunPoint]) -> list[Correlation]:
    """Among three sets of points: ranks, whose points are independent; their runs; and every run of the study."""
    lora = [p for p in points if p.best and p.method == result.method and p.targets == result.targets]
    sets = {
        "LoRA at its best rates, a point a rank": _means(lora),
        "LoRA at its best rates, a point a run": [(point.score, point.ranks) for point in lora],
        "every run of the study": [(point.score, point.ranks) for point in points],
    }
    way = 1.0 if result.higher_is_better else -1.0
    return [
        Correlation(
            among=among,
            measure=measure,
            points=len(some),
            rho=_rho([ranks[measure] for _, ranks in some], [way * score for score, _ in some]),
        )
        for among, some in sets.items()
        for measure in measure_names()
    ]


def _means(points: Iterable[RunPoint]) -> list[tuple[float, dict[str, float]]]:
    """Score and measures of each rank, means over seeds."""
    ranks: dict[int | None, list[RunPoint]] = {}
    for point in points:
        ranks.setdefault(point.rank, []).append(point)
    return [
        (
            statistics.fmean(point.score for point in same),
            {name: statistics.fmean(point.ranks[name] for point in same) for name in measure_names()},
        )
        for same in ranks.values()
    ]


def _rho(ranks: Sequence[float], goodness: Sequence[float]) -> Interval | None:
    if len(set(ranks)) < 2 or len(set(goodness)) < 2:
        return None
    return rank_correlation(ranks, goodness)


def _growth(runs: Mapping[int, Sequence[RunResult]], random: Mapping[int, Mapping[str, float]]) -> PowerLawFit | None:
    """Without updates of rank 1: their stable rank is 1 whatever was learned."""
    logs = {
        rank: statistics.fmean(math.log(row.ranks["stable_rank"]) for row in rows)
        for rank, rows in runs.items()
        if any(rank > 1 for *_, rank in _products(rows[0])) and all(row.ranks["stable_rank"] > 0 for row in rows)
    }
    if len(logs) < 2:
        return None
    x, y = [math.log(rank) for rank in logs], list(logs.values())
    beta = slope(x, y)
    return PowerLawFit(
        beta=beta,
        factor=math.exp(statistics.fmean(y) - beta.value * statistics.fmean(x)),
        ranks=tuple(logs),
        random=slope(x, [math.log(random[rank]["stable_rank"]) for rank in logs]).value,
    )


# Verdicts


def verdicts(result: EffectiveRanks) -> list[Verdict]:
    """Whether what is enough has a low effective rank, and whether updates use their rank as random ones would.

    None rests on ρ: that the order of scores follows the effective rank says nothing of how much is gained by it.
    """
    return [_low(result), _sublinear(result)]


def _low(result: EffectiveRanks) -> Verdict:
    answer, sentence, value = _whether_low(result)
    return Verdict(
        line="effective",
        claim=f"An adapter with {GAIN_SHARE:.0%} of full fine-tuning's gain has a low effective rank.",
        answer=answer,
        sentence=sentence,
        refuted_by=f"Entropy ranks surely above {LOW_RANK_SHARE * result.dim:g} of all adapters tried that may "
        f"reach {GAIN_SHARE:.0%}.",
    ).with_value(value)


def _whether_low(result: EffectiveRanks) -> tuple[Answer, str, Interval | None]:
    if result.doubt:
        return "undecided", result.doubt, None
    line = LOW_RANK_SHARE * result.dim
    sure = [one for one in result.curve if one.share and one.share.low is not None and one.share.low >= GAIN_SHARE]
    maybe = [one for one in result.curve if not _falls_short(one)]
    if not maybe:
        return "undecided", f"No rank tried reaches {GAIN_SHARE:.0%} of the gain.", None
    surest = _least(sure, lambda entropy: entropy.high) if sure else None
    least = _least(maybe, lambda entropy: entropy.low)
    shown = (surest or least).measures[DEFAULT_MEASURE]
    told = [f"{_describe_rank(surest)} and surely reaches {GAIN_SHARE:.0%}"] if surest else []
    told += [f"{_describe_rank(least)} and may reach {GAIN_SHARE:.0%}"] if least is not surest else []
    sentence = (
        f"{'; '.join(told)} (entropy rank, the largest measure, median over layers, mean over seeds with its "
        f"{CONFIDENCE_LEVEL:.0%} interval). Low is up to {line:g}, {LOW_RANK_SHARE:g} of {result.dim}."
    )
    if surest and shown.high is not None and shown.high <= line:
        return "yes", sentence, shown
    low = least.measures[DEFAULT_MEASURE].low
    if low is None or low <= line:
        return "undecided", sentence, shown
    least_enough = largest_insufficient_rank([(one.rank, one.share) for one in result.curve], GAIN_SHARE) + 1
    if least_enough <= line:  # its effective rank would be no larger
        return "undecided", f"{sentence} That no rank from {least_enough} to {line:g} is enough is not shown.", shown
    if any(one.edge for one in result.curve):
        return "undecided", f"{sentence} But some rank's best rate lies on the edge of those tried.", shown
    return "no", sentence, shown


def _describe_rank(one: RankMeasures) -> str:
    return (
        f"r = {one.rank} has an effective rank of {format_interval(one.measures[DEFAULT_MEASURE])} over "
        f"{one.seeds} seeds"
    )


def _falls_short(one: RankMeasures) -> bool:
    return one.share is not None and one.share.high is not None and one.share.high < GAIN_SHARE


def _least(some: Sequence[RankMeasures], end: Callable[[Interval], float | None]) -> RankMeasures:
    """The one with the least end of its entropy rank; without ends, the value counts."""

    def key(one: RankMeasures) -> float:
        end_value = end(one.measures[DEFAULT_MEASURE])
        return one.measures[DEFAULT_MEASURE].value if end_value is None else end_value

    return min(some, key=key)


def _sublinear(result: EffectiveRanks) -> Verdict:
    answer, sentence = _whether_sublinear(result)
    beta = result.growth.beta if result.growth else None
    return Verdict(
        line="effective",
        claim="Given more rank, updates use less of it than random factors: in stable rank ∝ r^β their β is lower.",
        answer=answer,
        sentence=sentence,
        refuted_by="An interval of β that begins at or above the β of products of random factors.",
    ).with_value(beta)


def _whether_sublinear(result: EffectiveRanks) -> tuple[Answer, str]:
    growth = result.growth
    if growth is None:
        return "undecided", "Fewer than two ranks above 1 are done; train more with --ranks."
    seeds = min(one.seeds for one in result.curve if one.rank in growth.ranks)
    sentence = (
        f"β = {format_interval(growth.beta)} over r = {', '.join(map(str, growth.ranks))}, a point a rank (mean of "
        f"{seeds} "
        f"seed{'' if seeds == 1 else 's'}), {CONFIDENCE_LEVEL:.0%} interval; random factors of these shapes would have "
        f"{growth.random:.3g}, and 1 is in proportion."
    )
    if any(one.rank == 1 for one in result.curve) and 1 not in growth.ranks:
        sentence += " r = 1 is left out: its stable rank is 1 by definition."
    if growth.beta.low is None or growth.beta.high is None:
        return "undecided", f"{sentence} Two ranks give no interval; train more with --ranks."
    if seeds < 2:
        return "undecided", f"{sentence} Not enough seeds to tell; train more with --seeds."
    if edges := [f"r = {one.rank}" for one in result.curve if one.edge and one.rank in growth.ranks]:
        return "undecided", f"{sentence} The best rate of {', '.join(edges)} lies on the edge of those tried."
    if growth.beta.high < growth.random:
        return "yes", sentence
    return ("no" if growth.beta.low >= growth.random else "undecided"), sentence
