"""The causal test: a tuned model whose update is cut to rank k, evaluated. How much rank does the task need?"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from rankscope.evidence.material import Material, group_by_rank
from rankscope.evidence.truncation.cut_model import CutModel
from rankscope.formats.names import layer_kind, natural_key
from rankscope.inference import Interval, Reach, first_reaching, mean_interval, ratio_interval
from rankscope.train.results import RunResult
from rankscope.train.study import GridEdge
from rankscope.verdict import (
    GAIN_SHARE,
    LOW_RANK_SHARE,
    MARGIN,
    Answer,
    MissingEvidenceError,
    Verdict,
    answer_at_most,
    format_interval,
)

KIND_RANKS = (0, 1, 4, 16)
"""Ranks that the matrices of one kind are cut to."""


class TruncationPoint(msgspec.Struct, frozen=True, kw_only=True):
    """The model at one k: its ``scores`` by seed with their mean, and the share of the whole update's gain that it
    keeps, None where the whole update has no gain."""

    k: int
    scores: tuple[float, ...]
    score: Interval
    share: Interval | None


class TruncationCurve(msgspec.Struct, frozen=True, kw_only=True):
    """The update of one method at its best rate, cut in all of its matrices at once.

    ``kept`` are the best rank-k parts, ``removed`` the update without them, each from k = 0 to ``limit``, the largest
    rank of a matrix. ``whole`` tensors have no rank, or belong to heads that are new to the base: they are kept as they
    are at every k, so that at k = 0 they are all there is. ``dim``: the median smaller side of the matrices. ``gain``
    over the base and ``recorded`` scores are those of the run itself. ``k90``: the smallest k that keeps ``GAIN``.
    """

    name: str
    rank: int | None
    lr: float
    edge: GridEdge
    seeds: tuple[int, ...]
    matrices: int
    whole: int
    dim: int
    limit: int
    recorded: tuple[float, ...]
    gain: Interval
    kept: tuple[TruncationPoint, ...]
    removed: tuple[TruncationPoint, ...]
    k90: Reach

    @property
    def reproduction_error(self) -> float:
        """The largest difference between the score of the whole update, evaluated here, and what its run recorded."""
        return max(abs(a - b) for a, b in zip(self.kept[-1].scores, self.recorded, strict=True))


class KindPoint(msgspec.Struct, frozen=True, kw_only=True):
    """The matrices of one kind cut to rank k and everything else whole; the share of the gain that is kept."""

    kind: str
    matrices: int
    k: int
    score: float
    share: float | None


class Truncation(msgspec.Struct, frozen=True, kw_only=True):
    """Full fine-tuning and the LoRA of the highest rank, cut; ``kinds`` are full fine-tuning's, of ``kinds_seed``."""

    metric: str
    higher_is_better: bool
    base: Interval
    full: TruncationCurve
    lora: TruncationCurve | None
    kinds: tuple[KindPoint, ...]
    kinds_seed: int

    @property
    def k90(self) -> Reach:
        """The smallest rank of full fine-tuning's update that keeps ``GAIN`` of its gain."""
        return self.full.k90


class _Scores(NamedTuple):
    """Of one seed, by k."""

    kept: dict[int, float]
    removed: dict[int, float]


def measure_truncation(material: Material) -> Truncation:
    """Cut full fine-tuning's update, and that of the LoRA of the highest rank, and evaluate the model at each k.

    Raises:
        MissingEvidenceError: no full fine-tuning is done, or its base was not measured.
    """
    rows = material.full_rows()
    base = mean_interval([material.base_score(row.record.run.seed) for row in rows])
    first = rows[0].record.run.seed
    kinds: tuple[KindPoint, ...] = ()
    taken: list[_Scores] = []
    for row in rows:
        update = CutModel(material, row)
        taken.append(_scores(material, update, control=True))
        if not kinds:
            kinds = tuple(_kinds(material, update, first, taken[0].kept[update.max_rank]))
    return Truncation(
        metric=material.study.metric,
        higher_is_better=material.study.higher_is_better,
        base=base,
        full=_cut(material, rows, "full fine-tuning", update, taken),
        lora=_lora(material),
        kinds=kinds,
        kinds_seed=first,
    )


def _lora(material: Material) -> TruncationCurve | None:
    """The adapters of the highest rank; None in a study without adapters."""
    try:
        rank, rows = max(group_by_rank(material.lora_rows()).items())
    except MissingEvidenceError:
        return None
    taken = []
    for row in rows:
        update = CutModel(material, row)
        taken.append(_scores(material, update, control=False))
    return _cut(material, rows, f"LoRA r = {rank}", update, taken)


def cut_ranks(limit: int, dim: int) -> list[int]:
    """0, the powers of two up to ``limit``, ``limit`` itself, and the largest rank that is called low."""
    powers = [2**i for i in range(limit.bit_length()) if 2**i < limit]
    return sorted({0, *powers, min(limit, int(LOW_RANK_SHARE * dim)), limit})


def _scores(material: Material, update: CutModel, control: bool) -> _Scores:
    ranks = cut_ranks(update.max_rank, update.dim)
    kept = {k: update.score_top_part(k) for k in material.track(ranks)}
    if not control:
        return _Scores(kept, {})
    removed = {k: update.score_without_top(k) for k in material.track(ranks[1:-1])}
    # Nothing removed is all kept, and the other way round.
    return _Scores(kept, {0: kept[ranks[-1]], **removed, ranks[-1]: kept[0]})


def _kinds(material: Material, update: CutModel, seed: int, whole: float) -> Iterable[KindPoint]:
    kinds = sorted({layer_kind(name) for name in update.names}, key=natural_key)
    jobs = [(kind, k) for kind in kinds for k in KIND_RANKS if k < update.max_rank_of_kind(kind)]
    gain = material.gain(whole, seed)
    for kind, k in material.track(jobs):
        score = update.score_top_part(k, kind)
        share = material.gain(score, seed) / gain if gain > 0 else None
        yield KindPoint(kind=kind, matrices=len(update.matrices_of_kind(kind)), k=k, score=score, share=share)


def _cut(
    material: Material, rows: Sequence[RunResult], name: str, update: CutModel, taken: Sequence[_Scores]
) -> TruncationCurve:
    seeds = tuple(row.record.run.seed for row in rows)
    gains = [material.gain(scores.kept[update.max_rank], seed) for scores, seed in zip(taken, seeds, strict=True)]

    def points(by_seed: Sequence[Mapping[int, float]]) -> tuple[TruncationPoint, ...]:
        return tuple(_point(material, k, [scores[k] for scores in by_seed], seeds, gains) for k in by_seed[0])

    kept = points([scores.kept for scores in taken])
    shares = [(point.k, point.share) for point in kept if point.share is not None]
    run, choice = rows[0].record.run, rows[0].choice
    return TruncationCurve(
        name=name,
        rank=run.rank,
        lr=run.lr or 0.0,
        edge=choice.edge if choice else None,
        seeds=seeds,
        matrices=len(update.names),
        whole=update.whole,
        dim=update.dim,
        limit=update.max_rank,
        recorded=tuple(row.score for row in rows if row.score is not None),
        gain=mean_interval(gains),
        kept=kept,
        removed=points([scores.removed for scores in taken]),
        k90=first_reaching(shares, GAIN_SHARE),
    )


def _point(
    material: Material, k: int, scores: Sequence[float], seeds: Sequence[int], gains: Sequence[float]
) -> TruncationPoint:
    some = statistics.fmean(gains) > 0
    own_gains = [material.gain(score, seed) for score, seed in zip(scores, seeds, strict=True)]
    share = ratio_interval(own_gains, gains) if some else None
    return TruncationPoint(k=k, scores=tuple(scores), score=mean_interval(scores), share=share)


def verdicts(result: Truncation) -> list[Verdict]:
    """Whether a low rank of the update is enough, whether it is needed, and how much of LoRA's rank is.

    Undecided where the best rate lies at an end of those tried, or the stored update is not the run's.
    """
    full, lora = result.full, result.lora
    low = f"A rank is low up to {LOW_RANK_SHARE * full.dim:g}, {LOW_RANK_SHARE:g} of the smaller side {full.dim}"
    said = [
        _enough(
            result, full, LOW_RANK_SHARE * full.dim, low, "A low-rank part of full fine-tuning's update keeps its gain."
        ),
        _need_verdict(result),
    ]
    if lora is not None:
        half = f"Half of what it has is {lora.limit / 2:g}"
        said.append(_enough(result, lora, lora.limit / 2, half, f"{lora.name} needs at most half of its directions."))
    return said


def _enough(result: Truncation, cut: TruncationCurve, line: float, drawn: str, claim: str) -> Verdict:
    refuted = (
        f"Less than {GAIN_SHARE:g} of the gain kept for sure (upper end of the interval) at every rank up to {line:g}."
    )
    if cut.gain.value <= 0:
        sentence = f"The update of {cut.name} has no gain over the base that a part of it could keep {_over(cut)}."
        return Verdict(line="truncation", claim=claim, answer="undecided", sentence=sentence, refuted_by=refuted)
    rank, low, high = cut.k90
    known = _has_intervals(cut)
    answer = answer_at_most(line, low, high) if _is_trustworthy(cut) else "undecided"
    return Verdict(
        line="truncation",
        claim=claim,
        answer=answer,
        sentence=_sentence(result, cut, drawn),
        refuted_by=refuted,
        value=rank,
        low=low if known else None,
        high=high if known else None,
    )


def _is_trustworthy(cut: TruncationCurve) -> bool:
    return _reproduces_score(cut) and cut.edge is None


def _reproduces_score(cut: TruncationCurve) -> bool:
    return cut.reproduction_error <= MARGIN * abs(cut.gain.value)


def _sentence(result: Truncation, cut: TruncationCurve, drawn: str) -> str:
    rank = cut.k90.rank
    below = [point.k for point in cut.kept if rank is not None and point.k < rank]
    gain = f"its gain of {cut.gain.value:.3g} {result.metric} {_over(cut)}"
    if rank == cut.limit:
        first = f"Only the whole update of {cut.name} keeps {gain}"
    else:
        how = f"Cut to its best rank {rank} in each of {cut.matrices} matrices" if rank else "Without its matrices"
        first = f"{how}, the update of {cut.name} keeps {_share(cut.kept, rank)} of {gain}"
    if below:
        first += f"; rank {below[-1]} keeps {_share(cut.kept, below[-1])}"
    said = [f"{first}. {drawn}."]
    if cut.whole and below:
        said.append(f"What has no rank, or is a new head, keeps {_share(cut.kept, 0)} alone.")
    return " ".join([*said, *_reservations(cut)])


def _reservations(cut: TruncationCurve) -> list[str]:
    """What a reader must know before trusting the answer."""
    said = []
    if len(cut.seeds) < 2:
        said.append("One seed gives no interval.")
    elif not _has_intervals(cut):
        said.append("The gain itself is not told from zero with so few seeds.")
    if not _reproduces_score(cut):
        said.append(
            f"But the stored update does not give the run's score back: it is {cut.reproduction_error:.3g} off."
        )
    if cut.edge is not None:
        end = "lowest" if cut.edge == "low" else "highest"
        said.append(f"Its best rate {cut.lr:g} is the {end} that was tried: a better one may lie beyond.")
    return said


def _has_intervals(cut: TruncationCurve) -> bool:
    """Whether shares of the gain have intervals."""
    whole = cut.kept[-1].share
    return whole is not None and whole.known


def _need_verdict(result: Truncation) -> Verdict:
    cut, k = result.full, result.full.k90.rank
    answer: Answer = "undecided"
    share = next((point.share for point in cut.removed if point.k == k), None)
    if share is None:
        sentence = f"There is no gain that could be lost {_over(cut)}."
    elif k == 0:
        sentence = f"No direction is needed: without any, {_share(cut.kept, 0)} of the gain is kept {_over(cut)}."
    else:
        sentence = (
            f"Without its top {k} directions in each matrix the update of {cut.name} keeps "
            f"{format_interval(share)} of its "
            f"gain, with them alone {_share(cut.kept, k)} {_over(cut)}. Needed are directions without which less than "
            f"{GAIN_SHARE:g} is kept."
        )
        sentence = " ".join([sentence, *_reservations(cut)])
        if share.low is not None and share.high is not None and _is_trustworthy(cut):
            answer = "yes" if share.high < GAIN_SHARE else "no" if share.low >= GAIN_SHARE else "undecided"
    return Verdict(
        line="truncation",
        claim="The gain needs those directions: the rest of the update does not make up for them.",
        answer=answer,
        sentence=sentence,
        refuted_by=f"At least {GAIN_SHARE:g} of the gain (lower end of the interval) kept without the top directions.",
    ).with_value(share)


def _share(points: Sequence[TruncationPoint], k: int | None) -> str:
    return next(
        (format_interval(point.share) for point in points if point.k == k and point.share is not None), "nothing"
    )


def _over(cut: TruncationCurve) -> str:
    return f"({len(cut.seeds)} seed{'' if len(cut.seeds) == 1 else 's'}, rate {cut.lr:g})"
