"""A study as the lines of evidence read it: what several of them need is made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankscope.analysis.layer_comparison import MatrixKind
from rankscope.analysis.svd_cache import SVDCache
from rankscope.errors import RankscopeError
from rankscope.formats.abstract_store import Store
from rankscope.formats.names import natural_key
from rankscope.lora.targets import is_within
from rankscope.track import Track
from rankscope.train.config import resolve_device
from rankscope.train.loop import evaluate_splits
from rankscope.train.results import RunResult, adapted_layers, run_results
from rankscope.train.runs import Run
from rankscope.train.study import Study
from rankscope.train.task import Split, Task
from rankscope.train.tasks import make_task
from rankscope.train.weights import weight_matrix
from rankscope.verdict import MissingEvidenceError

T = TypeVar("T")


class Material:
    """A study with its runs measured, its task ready to evaluate models, and the base's weights.

    Args:
        device: where models are evaluated and matrices decomposed; "auto" is the best there is.
        track: wraps lists that take long and may show progress.
        cache: folder that keeps the decompositions of the base's weights; None keeps none.
        of: what the overlap across ranks and seeds is of: "update" is ΔW, "A" and "B" are the factors.
        rows: the results of the runs, where they are measured already; None measures them when they are asked for.
    """

    def __init__(
        self,
        study: Study,
        device: str = "cpu",
        track: Track = iter,
        cache: Path | None = None,
        of: MatrixKind = "update",
        rows: Sequence[RunResult] | None = None,
    ) -> None:
        self.study = study
        self.bases = SVDCache(cache)
        self.device = resolve_device(device)
        self.track = track
        self.of = of
        self._rows = rows
        self._results: dict[Callable[[Material], Any], Any] = {}

    @cached_property
    def rows(self) -> list[RunResult]:
        """Every run that has ended."""
        return run_results(self.study) if self._rows is None else list(self._rows)

    def measure_once(self, measure: Callable[[Material], T]) -> T:
        """What ``measure`` says of this study; where it was asked before, its result from then."""
        if measure not in self._results:
            self._results[measure] = measure(self)
        result: T = self._results[measure]
        return result

    def best_rows(self, method: str, targets: str | None = None) -> list[RunResult]:
        """The runs of a method on these targets that are done, at the best rate of each rank: by rank, then seed."""
        rows = [row for row in self.rows if row.is_best and row.record.run.method == method]
        rows = [row for row in rows if row.record.run.targets == targets]
        return sorted(rows, key=lambda row: (row.record.run.rank or 0, row.record.run.seed))

    def lora_rows(self) -> list[RunResult]:
        """The adapters that stand for LoRA, as ``best`` gives them: of the first adapter method of the study that has
        any, on the targets that it was trained at most ranks on.

        Raises:
            MissingEvidenceError: no adapter was trained to the end.
        """
        best = [row.record.run for row in self.rows if row.is_best and row.record.run.is_lora]
        if not best:
            raise MissingEvidenceError("no LoRA run is done; train some with --ranks")
        cells = dict.fromkeys((r.targets, r.rank) for r in best if r.method == best[0].method)
        ranks = Counter(targets for targets, _ in cells)  # in the study's order, which decides between equals
        return self.best_rows(best[0].method, ranks.most_common(1)[0][0])

    def full_rows(self) -> list[RunResult]:
        """The runs of full fine-tuning at its best rate, one a seed.

        Raises:
            MissingEvidenceError: there is none.
        """
        rows = self.best_rows("full")
        if not rows:
            raise MissingEvidenceError("no full fine-tuning is done; train it beside LoRA (without --no-full)")
        return rows

    def base_score(self, seed: int) -> float:
        """The study's metric of the untouched base of this seed on the test split.

        Raises:
            MissingEvidenceError: the base was not measured.
        """
        for row in self.rows:
            if row.record.run.method == "base" and row.record.run.seed == seed and row.score is not None:
                return row.score
        raise MissingEvidenceError(f"the base of seed {seed} was not measured; let the study go on")

    def gain(self, score: float, seed: int) -> float:
        """How much better than the base of this seed a score is: above 0 for better, whatever the metric's way."""
        better = score - self.base_score(seed)
        return better if self.study.higher_is_better else -better

    @cached_property
    def layers(self) -> list[str]:
        """The layers that some adapter of the study has, or, without adapters, that full fine-tuning changes and that
        are no heads: those on which updates are compared."""
        adapted = adapted_layers(self.study)
        names = adapted or {name for row in self.full_rows() for name in self.store(row).names()}
        return [name for name in sort_names(names) if not any(is_within(name, head) for head in self.heads)]

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that are new to the base: every method trains them whole."""
        return self.task.heads

    def store(self, row: RunResult) -> Store:
        """The updates that a run learned.

        Raises:
            MissingEvidenceError: its weights were deleted.
        """
        return self.study.store(self.require_weights([row])[0].record.run)

    def require_weights(self, rows: Sequence[RunResult]) -> Sequence[RunResult]:
        """The same runs, all of them with what they learned.

        Raises:
            MissingEvidenceError: the weights of one were deleted.
        """
        gone = [row.record.run.name for row in rows if not self.study.has_weights(row.record.run)]
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            raise MissingEvidenceError(f"the weights of {gone[0]}{more} are gone; put them back, or train it again")
        return rows

    @cached_property
    def task(self) -> Task:
        """The study's base and data.

        Raises:
            MissingEvidenceError: they are not where the study left them, or have changed.
        """
        try:
            task = make_task(self.study.config)
            self.study.check_fingerprint(task)
        except RankscopeError as error:
            raise MissingEvidenceError(f"needs the study's base and data: {error}") from error
        return task

    @cached_property
    def base(self) -> nn.Module:
        """The untouched base on the CPU; not to be changed."""
        return self.task.model(self.study.config.seeds[0])

    def weight(self, name: str) -> Tensor:
        """The base weight (out, in) in float32 that the update of this name changes, on the device."""
        return weight_matrix(self.base, name).to(self.device)

    def copy_base(self, run: Run) -> nn.Module:
        """A copy of the base that this run started from, on the device."""
        return self.task.model(run.seed).to(self.device)

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split = "test") -> float:
        """The study's metric of a model on held-out data, in the arithmetic that the study used."""
        return evaluate_splits(self.task, model, (split,), self.study.config, self.device)[split][self.study.metric]

    def describe(self) -> dict[str, Any]:
        """What made the study: command, versions, machine, fingerprints, settings."""
        wanted = ("command", "versions", "machine", "fingerprint", "config")
        return {key: self.study.description[key] for key in wanted if key in self.study.description}


def sort_names(names: Iterable[str]) -> list[str]:
    """Layer names in their natural order."""
    return sorted(names, key=natural_key)


def group_by_rank(rows: Sequence[RunResult]) -> dict[int, list[RunResult]]:
    """Adapters by their rank, ascending."""
    ranks: dict[int, list[RunResult]] = {}
    for row in sorted(rows, key=lambda row: (row.record.run.rank or 0, row.record.run.seed)):
        if row.record.run.rank is not None:
            ranks.setdefault(row.record.run.rank, []).append(row)
    return ranks
