"""The results of a study: one row for each run, with its scores and the effective ranks of its update."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rankscope.analysis.layer_spectra import SpectrumResult, spectrum
from rankscope.spectra import MEASURES
from rankscope.train.method_table import find_method
from rankscope.train.runs import Run, RunRecord
from rankscope.train.study import LearningRateChoice, Study

DEFAULT_MEASURE = "entropy_rank"
"""The effective rank that tables and plots of a study show unless another is asked for."""


@dataclass(frozen=True)
class RunResult:
    """One run: ``score`` is the study's metric on the test split, ``chosen_by`` the same on the validation split.

    ``spectra`` are those of its update, None for the base, for a run that diverged and for one whose weights were
    deleted; ``ranks`` each measure of ``MEASURES``, the median over the layers that every run has.
    """

    record: RunRecord
    score: float | None
    chosen_by: float | None
    ranks: dict[str, float]
    spectra: SpectrumResult | None
    choice: LearningRateChoice | None
    """Of its label, where this run is at the best rate."""

    @property
    def is_best(self) -> bool:
        """At the best rate of its method, targets and rank, or without one (the base)."""
        return self.record.status == "done" and (self.record.run.lr is None or self.choice is not None)

    def to_json(self) -> dict[str, Any]:
        run, cost = self.record.run, self.record.cost
        return {
            "name": run.name,
            "method": run.method,
            "targets": run.targets,
            "rank": run.rank,
            "alpha": run.alpha,
            "dim": run.dim,
            "lr": run.lr,
            "seed": run.seed,
            "status": self.record.status,
            "best_rate": self.is_best,
            "edge": self.choice.edge if self.choice else None,
            "validation": self.chosen_by,
            "test": self.score,
            "effective_rank": self.ranks,
            "trainable": cost.trainable if cost else 0,
            "seconds": cost.seconds if cost else 0.0,
        }


def run_results(study: Study) -> list[RunResult]:
    """Every run that has ended: the base, then method by method, each by targets, rank, rate and seed."""
    choices = study.choices()
    layers = adapted_layers(study)
    return [_row(study, record, choices.get(record.run.label), layers) for record in study.records]


def _row(study: Study, record: RunRecord, choice: LearningRateChoice | None, layers: set[str]) -> RunResult:
    if record.status != "done":
        return RunResult(record, None, None, {}, None, None)
    spectra = spectrum(study.store(record.run)) if has_matrices(record.run) and study.has_weights(record.run) else None
    ranks = effective_ranks(spectra, layers) if spectra else {}
    chosen = choice if choice is not None and choice.lr == record.run.lr else None
    return RunResult(record, study.score(record), study.score(record, "validation"), ranks, spectra, chosen)


def has_matrices(run: Run) -> bool:
    """Whether a run learns matrices of the base, which have a spectrum; in a random subspace it is that of noise."""
    return run.is_lora or find_method(run.method).has_spectrum


def adapted_layers(study: Study) -> set[str]:
    """The layers that some adapter of the study has: full fine-tuning, which changes more, is measured on these."""
    stores = [study.store(r.run) for r in study.done() if r.run.is_lora and study.has_weights(r.run)]
    return {name for store in stores for name in store.names()}


def effective_ranks(spectra: SpectrumResult, layers: Collection[str]) -> dict[str, float]:
    """Each measure of an update, the median over its layers, or over those of them that are in ``layers``."""
    measured = [layer.measures for layer in spectra.layers if not layers or layer.name in layers]
    if not measured:
        return {}
    return {name: float(statistics.median(measures[name] for measures in measured)) for name in MEASURES}


def baseline_score(study: Study) -> float | None:
    """The study's metric of the untouched base on the test split, the mean over seeds."""
    scores = [study.score(record) for record in study.done() if record.run.method == "base"]
    return statistics.fmean(scores) if scores else None
