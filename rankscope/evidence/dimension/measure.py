"""Intrinsic dimension: how many numbers, moving the weights along random directions, do what full fine-tuning does.

d90 is the smallest tried d whose random subspace (``rankscope train --methods subspace,said``) reaches 90 % of full
fine-tuning's gain (Li et al. 2018; Aghajanyan et al. 2020). Dimension is not rank: a rank-1 update of a 768² matrix has
1 536 numbers, and an update along few random directions has the rank of noise. Both are shown on an axis of trained
numbers, and neither stands for the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import msgspec

from rankscope.analysis.layer_spectra import spectrum
from rankscope.evidence.entries import gain_share, gains_by_seed, mean_of_known
from rankscope.evidence.material import Material, group_by_rank
from rankscope.inference import Interval, Reach, first_reaching, mean_interval
from rankscope.spectra import noise_measures
from rankscope.train.method_table import find_method, methods_of
from rankscope.train.random_subspace import count_parameters_and_modules
from rankscope.train.results import DEFAULT_MEASURE, RunResult, effective_ranks
from rankscope.train.runs import base_parameter_names
from rankscope.train.study import GridEdge
from rankscope.verdict import GAIN_SHARE, Answer, MissingEvidenceError, Verdict, format_interval

SMALL_SHARE = 0.01
"""A dimension is called small up to this share of the parameters. What was published lies far below: 200 to 10 000
numbers of 110 to 355 million for BERT and RoBERTa on MRPC and QQP (Aghajanyan et al. 2020, Table 1)."""
ADVICE = "train some into this study with --methods subspace --dims 16,64,256,1024,4096,16384 (and said)"
EDGE = "best rate lies at an end of those tried"


class DimensionPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A method at one of its sizes (d, or LoRA's r), over seeds, at its best rate.

    ``trained`` counts what is trained of the base, without new heads, which every method trains whole. ``share`` is of
    full fine-tuning's gain over the base, on the seeds that both have. ``rank`` is the effective rank of the update,
    the median over layers and the mean over seeds.
    """

    size: int
    trained: int
    lr: float | None
    edge: GridEdge
    seeds: int
    score: Interval
    share: Interval
    rank: float | None


class DimensionCurve(msgspec.Struct, frozen=True, kw_only=True):
    """A method by its trained numbers, ascending. ``d90`` is in trained numbers, for LoRA those at r90."""

    method: str
    sizes: tuple[DimensionPoint, ...]
    d90: Reach

    @property
    def is_random(self) -> bool:
        """Whether it trains in a random subspace; else it is LoRA."""
        return find_method(self.method).family == "subspace"

    @property
    def name(self) -> str:
        """What plots and tables call it."""
        return find_method(self.method).title

    @property
    def size_symbol(self) -> str:
        """What its size is called."""
        return "d" if self.is_random else "r"


class IntrinsicDimension(msgspec.Struct, frozen=True, kw_only=True):
    """Random subspaces beside LoRA and full fine-tuning.

    ``parameters`` is D, what full fine-tuning trains without new heads, in ``layers`` modules. ``full`` is its score,
    ``full_rank`` the effective rank ``measure`` of its update, ``noise_rank`` that of noise: the median over layers.
    ``curves``: ``subspace`` and ``said``, as far as they were trained, then LoRA.
    """

    metric: str
    higher_is_better: bool
    measure: str
    parameters: int
    layers: int
    base: float
    full: Interval
    full_edge: GridEdge
    full_seeds: int
    full_rank: float | None
    noise_rank: float
    curves: tuple[DimensionCurve, ...]

    def score_at(self, share: float) -> float:
        """The score at a share of full fine-tuning's gain."""
        return self.base + share * (self.full.value - self.base)

    def share_at(self, score: float) -> float:
        """The way back from ``score_at``."""
        return (score - self.base) / (self.full.value - self.base)


def measure_dimension(material: Material) -> IntrinsicDimension:
    """Random subspaces of a study, by their dimension, beside its adapters.

    Raises:
        MissingEvidenceError: no run in a random subspace, or no full fine-tuning that gained anything.
    """
    groups = {method: group_by_dim(material.best_rows(method)) for method in methods_of("subspace")}
    if not any(groups.values()):
        raise MissingEvidenceError(f"no run in a random subspace is done; {ADVICE}")
    full = material.full_rows()
    gains = gains_by_seed(material, full)
    if not gains or statistics.fmean(gains.values()) <= 0:
        raise MissingEvidenceError("full fine-tuning gained nothing that a subspace could have a share of")
    count, layers = count_parameters_and_modules(material.base, base_parameter_names(material.base, material.task))
    curves = [_random_curve(material, method, groups[method], gains) for method in groups if groups[method]]
    if adapters := _adapters(material):
        ranks = {id(row): row.ranks.get(DEFAULT_MEASURE) for row in adapters}
        curves.append(_curve(material, adapters[0].record.run.method, group_by_rank(adapters), gains, ranks))
    known_curves = tuple(curve for curve in curves if curve.sizes)
    if not any(curve.is_random for curve in known_curves):
        raise MissingEvidenceError(f"no run in a random subspace has a seed of full fine-tuning's; {ADVICE}")
    return IntrinsicDimension(
        metric=material.study.metric,
        higher_is_better=material.study.higher_is_better,
        measure=DEFAULT_MEASURE,
        parameters=count,
        layers=layers,
        base=statistics.fmean(material.base_score(seed) for seed in gains),
        full=mean_interval([row.score for row in full if row.score is not None]),
        full_edge=full[0].choice.edge if full[0].choice else None,
        full_seeds=len(full),
        full_rank=mean_of_known(row.ranks.get(DEFAULT_MEASURE) for row in full),
        noise_rank=_noise_rank(full[0], material.layers),
        curves=known_curves,
    )


def group_by_dim(rows: Iterable[RunResult]) -> dict[int, list[RunResult]]:
    """Runs in random subspaces by their dimension, ascending."""
    dims: dict[int, list[RunResult]] = {}
    for row in sorted(rows, key=lambda row: (row.record.run.dim or 0, row.record.run.seed)):
        dims.setdefault(row.record.run.dim or 0, []).append(row)
    return dims


def _adapters(material: Material) -> list[RunResult]:
    try:
        return material.lora_rows()
    except MissingEvidenceError:
        return []


def _random_curve(
    material: Material, method: str, dims: dict[int, list[RunResult]], gains: dict[int, float]
) -> DimensionCurve:
    """With the effective rank of each update, which a study's rows do not carry for random subspaces."""
    rows = [row for same_dim in dims.values() for row in same_dim]
    ranks: dict[int, float | None] = {}
    for row in material.track(rows):
        ranks[id(row)] = effective_ranks(spectrum(material.store(row)), material.layers).get(DEFAULT_MEASURE)
    return _curve(material, method, dims, gains, ranks)


def _curve(
    material: Material,
    method: str,
    groups: dict[int, list[RunResult]],
    gains: dict[int, float],
    ranks: dict[int, float | None],
) -> DimensionCurve:
    heads = sum(weight.numel() for weight in material.base.parameters())
    heads -= count_parameters_and_modules(material.base, base_parameter_names(material.base, material.task))[0]
    paired = {size: [row for row in rows if row.record.run.seed in gains] for size, rows in groups.items()}
    shares = {size: gain_share(gains_by_seed(material, rows), gains) for size, rows in paired.items()}
    points = [_size(size, rows, share, heads, ranks) for size, rows in paired.items() if (share := shares[size])]
    ordered = tuple(sorted(points, key=lambda size: size.trained))
    return DimensionCurve(
        method=method, sizes=ordered, d90=first_reaching([(size.trained, size.share) for size in ordered], GAIN_SHARE)
    )


def _size(
    size: int, rows: Sequence[RunResult], share: Interval, heads: int, ranks: dict[int, float | None]
) -> DimensionPoint:
    cost, choice = rows[0].record.cost, rows[0].choice
    return DimensionPoint(
        size=size,
        trained=(cost.trainable if cost else 0) - heads,
        lr=rows[0].record.run.lr,
        edge=choice.edge if choice else None,
        seeds=len(rows),
        score=mean_interval([row.score for row in rows if row.score is not None]),
        share=share,
        rank=mean_of_known(ranks[id(row)] for row in rows),
    )


def _noise_rank(row: RunResult, layers: Sequence[str]) -> float:
    """Of noise of the shapes of these layers, the median."""
    measured = row.spectra.layers if row.spectra else ()
    return statistics.median(noise_measures(layer.shape)[DEFAULT_MEASURE] for layer in measured if layer.name in layers)


# Verdicts


def verdicts(result: IntrinsicDimension) -> list[Verdict]:
    """One of each kind of random subspace: whether few numbers are enough."""
    return [_verdict(result, curve) for curve in result.curves if curve.is_random]


def _verdict(result: IntrinsicDimension, curve: DimensionCurve) -> Verdict:
    answer, reason = _answer(result, curve)
    seeds = sorted({size.seeds for size in curve.sizes})
    over = f"{'–'.join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))} seed{'s' if seeds != [1] else ''}"
    line = (
        f"A d is small up to {SMALL_SHARE * result.parameters:,.0f}, {SMALL_SHARE:g} of {result.parameters:,} "
        "parameters."
    )
    known = any(size.share.known for size in curve.sizes)
    return Verdict(
        line="dimension",
        claim=f"Few numbers are enough: d90 ({curve.name}) is small against the parameters.",
        answer=answer,
        sentence=f"{reason} ({result.metric}, {over}). {line}",
        refuted_by=f"A share of the gain below {GAIN_SHARE:g} for sure (upper end of the interval) at a d above "
        "the line.",
        value=curve.d90.rank,
        low=curve.d90.low if known else None,
        high=curve.d90.high if known else None,
    )


def _answer(result: IntrinsicDimension, curve: DimensionCurve) -> tuple[Answer, str]:
    """What a larger subspace could do is no less. So a d below the line that surely reaches the share says yes, and one
    above it that surely does not says no, unless a rate that was not tried could change that."""
    line = SMALL_SHARE * result.parameters
    enough = [s for s in curve.sizes if s.trained <= line and s.share.low is not None and s.share.low >= GAIN_SHARE]
    missed = [s for s in curve.sizes if s.trained >= line and s.share.high is not None and s.share.high < GAIN_SHARE]
    if enough:
        said = _describe_point(enough[0])
        return ("yes", said) if result.full_edge is None else ("undecided", f"{said}, whose {EDGE}")
    if missed:
        kept = [size for size in missed if size.edge is None]
        return (
            ("no", f"Even {_describe_point(kept[-1])}")
            if kept
            else ("undecided", f"{_describe_point(missed[-1])}, but its {EDGE}")
        )
    return "undecided", _unclear(curve, line)


def _unclear(curve: DimensionCurve, line: float) -> str:
    """What is known on both sides of the line."""
    below = [size for size in curve.sizes if size.trained <= line][-1:]
    above = [size for size in curve.sizes if size.trained > line][:1]
    said = "; ".join(_describe_point(size) for size in below + above)
    if not any(size.share.known for size in curve.sizes):
        return f"Not enough seeds to tell: {said}"
    if not (below and above):
        return f"The line is not enclosed by what was tried: {said}"
    return f"The line lies between two sizes or within an interval: {said}"


def _describe_point(size: DimensionPoint) -> str:
    return f"d = {size.trained:,} reaches {format_interval(size.share)} of full fine-tuning's gain"
