"""A study's methods at their best rates: what each scored, gained over the base, and cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from rankscope.evidence.material import Material
from rankscope.inference import Interval, equivalence, mean_interval, ratio_interval
from rankscope.train.results import RunResult
from rankscope.train.run_state import read_history
from rankscope.train.study import GridEdge
from rankscope.verdict import MissingEvidenceError

LAST_STRETCH = 4
"""The training loss at the end is the mean over the last quarter of the steps: one batch is too noisy."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A method with its targets and rank, at its best rate; or the untouched base.

    ``scores``: the study's metric on the test split, one for each of ``seeds``; ``score`` is their mean. ``rates``: how
    many were tried, ``edge`` at which end of them the best one lies. ``gain``: over the base of the same seed, above 0
    for better. Over the ``paired`` seeds, those that full fine-tuning has too: ``share``, the ratio of its mean gain to
    that of full fine-tuning; ``difference``, its gain less that of full fine-tuning; ``p`` that the difference lies
    within the margin, and ``corrected`` for the number of ranks, on LoRA's curve alone. ``gap``: training loss at the
    end less the loss on the test split, the mean over seeds. Costs are means over seeds; ``together`` runs were trained
    in one pass and share the peak. What cannot be told is None.
    """

    label: str
    method: str
    targets: str | None
    rank: int | None
    lr: float | None
    edge: GridEdge
    rates: int
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    score: Interval
    gain: Interval | None
    paired: tuple[int, ...] = ()
    share: Interval | None = None
    difference: Interval | None = None
    p: float | None = None
    corrected: float | None = None
    gap: float | None
    trainable: int
    seconds_per_step: float | None
    peak_memory: float | None
    saved_bytes: float | None
    together: int


def make_entry(
    material: Material,
    rows: Sequence[RunResult],
    gains: dict[int, float],
    full: dict[int, float],
    allowed: float | None,
) -> Entry:
    run, choice = rows[0].record.run, rows[0].choice
    scores = [row.score for row in rows if row.score is not None]
    costs = [row.record.cost for row in rows if row.record.cost]
    paired = sorted(gains.keys() & full.keys()) if run.method not in ("base", "full") else []
    differences = [gains[seed] - full[seed] for seed in paired]
    return Entry(
        label=run.label,
        method=run.method,
        targets=run.targets,
        rank=run.rank,
        lr=run.lr,
        edge=choice.edge if choice else None,
        rates=len(choice.tried) if choice else 0,
        seeds=tuple(row.record.run.seed for row in rows),
        scores=tuple(scores),
        score=mean_interval(scores),
        gain=mean_interval(list(gains.values())) if gains and run.method != "base" else None,
        paired=tuple(paired),
        share=gain_share(gains, full) if paired and allowed else None,
        difference=mean_interval(differences) if paired else None,
        p=equivalence(differences, allowed) if paired and allowed else None,
        gap=mean_of_known(_gap(material, row) for row in rows),
        trainable=costs[0].trainable if costs else 0,
        seconds_per_step=mean_of_known(cost.seconds_per_step for cost in costs),
        peak_memory=mean_of_known(cost.peak_memory for cost in costs),
        saved_bytes=mean_of_known(cost.saved_bytes for cost in costs),
        together=max((cost.together for cost in costs), default=1),
    )


def _gap(material: Material, row: RunResult) -> float | None:
    """Training loss over the last stretch less the loss on the test split, where both are told."""
    lines = read_history(material.study.path(row.record.run))
    try:
        losses = [float(loss) for line in lines for loss in line.get("train_losses", ())]
    except (AttributeError, TypeError, ValueError):  # damaged, as a file that is missing: it serves this one number
        return None
    held_out = row.record.metrics["test"].get("loss")
    if not losses or held_out is None:
        return None
    last = losses[-max(1, len(losses) // LAST_STRETCH) :]
    gap = statistics.fmean(last) - held_out
    return gap if math.isfinite(gap) else None


def mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def group_by_label(rows: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Runs by method, targets and rank."""
    labels: dict[str, list[RunResult]] = {}
    for row in rows:
        labels.setdefault(row.record.run.label, []).append(row)
    return labels


def gains_by_seed(material: Material, rows: Iterable[RunResult]) -> dict[int, float]:
    """What runs gain over the base of the same seed; none where that base was not measured."""
    gains = {}
    for row in rows:
        try:
            seed = row.record.run.seed
            gains[seed] = material.gain(row.score or 0.0, seed)
        except MissingEvidenceError:
            continue
    return gains


def gain_share(gains: Mapping[int, float], full: Mapping[int, float]) -> Interval | None:
    """The ratio of mean gains over the seeds that both have; None without any, or without a gain to share."""
    seeds = sorted(gains.keys() & full.keys())
    if not seeds or statistics.fmean(full[seed] for seed in seeds) <= 0:
        return None
    return ratio_interval([gains[seed] for seed in seeds], [full[seed] for seed in seeds])


def median_smaller_side(row: RunResult) -> int:
    """min(out, in), the median over the layers that an adapter adapts."""
    layers = row.spectra.layers if row.spectra else ()
    return statistics.median_low([min(layer.shape) for layer in layers if layer.nominal_rank is not None])
