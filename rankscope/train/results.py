"""What a study found: one row a run, with how well it did and what rank its update really has."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rankscope.analysis.spectra import SpectrumResult, spectrum
from rankscope.spectra import MEASURES
from rankscope.train.runs import Record
from rankscope.train.study import Study

MEASURE = "entropy_rank"
"""The effective rank that tables and plots of a study show unless another is asked for."""


@dataclass(frozen=True)
class Row:
    """One run: ``score`` is the study's metric on the test split, ``chosen_by`` the same on the validation split.

    ``spectra`` are those of its update, None for the base and for a run that diverged; ``ranks`` each measure of
    ``MEASURES``, the median over the layers that every run has.
    """

    record: Record
    score: float | None
    chosen_by: float | None
    ranks: dict[str, float]
    spectra: SpectrumResult | None
    best: bool
    """At the best rate of its method, rank and seed."""

    def to_json(self) -> dict[str, Any]:
        run, cost = self.record.run, self.record.cost
        return {
            "name": run.name,
            "method": run.method,
            "rank": run.rank,
            "alpha": run.alpha,
            "lr": run.lr,
            "seed": run.seed,
            "status": self.record.status,
            "best_rate": self.best,
            "validation": self.chosen_by,
            "test": self.score,
            "effective_rank": self.ranks,
            "trainable": cost.trainable if cost else 0,
            "seconds": cost.seconds if cost else 0.0,
        }


def rows(study: Study) -> list[Row]:
    """Every run that has ended: the base, LoRA by rank and rate, full fine-tuning."""
    best = {record.run for record in study.best()}
    layers = shared_layers(study)
    return [_row(study, record, record.run in best, layers) for record in study.records]


def _row(study: Study, record: Record, best: bool, layers: list[str]) -> Row:
    if record.status != "done":
        return Row(record, None, None, {}, None, False)
    spectra = None if record.run.method == "base" else spectrum(study.store(record.run))
    ranks = effective_ranks(spectra, layers) if spectra else {}
    return Row(record, study.score(record), study.score(record, "validation"), ranks, spectra, best)


def shared_layers(study: Study) -> list[str]:
    """The layers that every run with an update has; those of LoRA where full fine-tuning has more."""
    found: list[str] | None = None
    for record in study.done():
        if record.run.method != "base":
            store = study.store(record.run)
            found = [name for name in (found if found is not None else store.names()) if name in store]
    return found or []


def effective_ranks(spectra: SpectrumResult, layers: Iterable[str]) -> dict[str, float]:
    """Each measure of an update, the median over ``layers``."""
    measured = [spectra[name].measures for name in layers]
    if not measured:
        return {}
    return {name: float(statistics.median(measures[name] for measures in measured)) for name in MEASURES}


def baseline(study: Study) -> float | None:
    """The study's metric of the untouched base on the test split, the mean over seeds."""
    scores = [study.score(record) for record in study.done() if record.run.method == "base"]
    return statistics.fmean(scores) if scores else None
