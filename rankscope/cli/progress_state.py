"""The progress of a grid in training: the numbers behind the live view and the plain lines."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rankscope.train.events import (
    Event,
    GridPlanned,
    RunEnded,
    RunEvaluated,
    RunStarted,
    StepsTaken,
    TrainingNote,
)
from rankscope.train.runs import Run, RunRecord

SPEED_WINDOW = 5.0  # seconds over which the speed is measured
MIN_ESTIMATE_SECONDS = 2.0  # seconds of training before time remaining is worth saying


class Metric(NamedTuple):
    """What runs are compared by, on the validation split."""

    name: str
    higher_is_better: bool

    @property
    def direction_text(self) -> str:
        return f"{'higher' if self.higher_is_better else 'lower'} is better"


class Leader(NamedTuple):
    """The best learning rate of a label so far, by the mean over its seeds of their last evaluations.

    ``ended`` and ``lost`` (diverged or stopped) count the runs of the label at all learning rates, of ``planned`` ones.
    """

    label: str
    score: float | None
    lr: float | None
    ended: int
    lost: int
    planned: int


class Speed:
    """Tokens per second over the last few seconds.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.stamps: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        """So many tokens between the last call and this one."""
        self.stamps.append((self.clock(), tokens))
        # The stamp before the window stays: the tokens of the next one were computed since then.
        while len(self.stamps) > 2 and self.stamps[1][0] < self.stamps[-1][0] - SPEED_WINDOW:
            self.stamps.popleft()

    def per_second(self) -> float | None:
        """None until some time has been measured."""
        if len(self.stamps) < 2:
            return None
        seconds = self.stamps[-1][0] - self.stamps[0][0]
        return sum(tokens for _, tokens in list(self.stamps)[1:]) / seconds if seconds > 0 else None


class ProgressState:
    """What the events so far add up to. The untouched base is no run here: it takes no steps.

    Args:
        metric: what runs are compared by, None where that is not known; asked for once the grid is planned.
        workers: how many groups can be in training at once.
        clock: seconds that never go back.
    """

    def __init__(
        self, metric: Callable[[], Metric | None], workers: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metric, self.workers, self.clock, self.speed = metric, workers, clock, Speed(clock)
        self.metric: Metric | None = None
        self.runs: dict[str, Run] = {}
        self.records: dict[str, RunRecord] = {}
        self.first: dict[str, int] = {}  # the step that a run was taken up at
        self.at: dict[str, int] = {}
        self.scores: dict[str, float] = {}
        self.bases: dict[int, float] = {}
        self.groups: list[list[str]] = []  # the one that made a step last comes last
        self.steps = 0  # of a run
        self.began: float | None = None

    # Events

    def tell(self, event: Event) -> None:
        match event:
            case GridPlanned():
                self.metric = self.metric or self._metric()
                for run in event.runs:
                    self._add_run(run)
                for record in event.ended:
                    self._end(record)
            case RunStarted():
                self._start(event.run, event.steps, event.at)
            case StepsTaken():
                self._step(event)
            case RunEvaluated():
                self._evaluate(event)
            case RunEnded():
                self._end(event.record)
            case TrainingNote():
                pass

    def _start(self, run: Run, steps: int, at: int) -> None:
        self._add_run(run)
        self.steps = steps
        self.first.setdefault(run.name, at)
        self.at[run.name] = at
        self._remove_from_groups(run)
        if self.began is None:
            self.began = self.clock()
            self.speed.add(0)

    def _step(self, event: StepsTaken) -> None:
        names = [run.name for run in event.runs]
        # A group that shares a run with this one is an earlier form of it.
        others = [group for group in self.groups if not set(group) & set(names)]
        self.groups = [*others, names][-self.workers :]
        for name in names:
            self.at[name] = min(self.at.get(name, 0) + event.steps, self.steps)
        self.speed.add(event.tokens)

    def _evaluate(self, event: RunEvaluated) -> None:
        score = self._score(event.metrics)
        if score is not None and event.step == 0:
            self.bases[event.run.seed] = score
        elif score is not None:
            self.at[event.run.name] = event.step
            self.scores[event.run.name] = score

    def _end(self, record: RunRecord) -> None:
        run = record.run
        if (base := self._score(record.before.get("validation", {}))) is not None:
            self.bases[run.seed] = base
        if run.method == "base":
            return
        self._add_run(run)
        self._remove_from_groups(run)
        self.records[run.name] = record
        self.at[run.name] = record.steps
        score = self._score(record.metrics.get("validation", {})) if record.status == "done" else None
        self.scores.pop(run.name, None)
        if score is not None:
            self.scores[run.name] = score

    def _add_run(self, run: Run) -> None:
        if run.method != "base":
            self.runs.setdefault(run.name, run)

    def _remove_from_groups(self, run: Run) -> None:
        """This run is in no group any more."""
        left = [[name for name in group if name != run.name] for group in self.groups]
        self.groups = [group for group in left if group]

    def _score(self, metrics: Mapping[str, float]) -> float | None:
        return None if self.metric is None else metrics.get(self.metric.name)

    # Numbers

    @property
    def run_count(self) -> int:
        return len(self.runs)

    @property
    def done_count(self) -> int:
        return len(self.records)

    @property
    def base_score(self) -> float | None:
        """Validation score of the untouched base, the mean over seeds."""
        return statistics.fmean(self.bases.values()) if self.bases else None

    @property
    def done_share(self) -> float:
        """The share of all steps of the grid that are done; a run that has ended early has none left."""
        if not self.steps:
            return self.done_count / max(1, self.run_count)
        return 1 - self._steps_left() / (self.run_count * self.steps)

    def seconds_left(self) -> float | None:
        """Seconds left at the pace since training began, evaluations included; None until the pace has settled."""
        seconds = 0.0 if self.began is None else self.clock() - self.began
        taken = sum(self.at[name] - first for name, first in self.first.items())
        return self._steps_left() * seconds / taken if seconds >= MIN_ESTIMATE_SECONDS and taken > 0 else None

    def _steps_left(self) -> int:
        """Steps that all runs have left."""
        return sum(self.steps - self.at.get(name, 0) for name in self.runs if name not in self.records)

    def training_groups(self) -> list[tuple[list[Run], int]]:
        """The groups that made a step last, with the step that each has reached."""
        return [([self.runs[name] for name in group], min(self.at[name] for name in group)) for group in self.groups]

    def leaders(self) -> list[Leader]:
        """One for each label, in the order of the grid."""
        labels: dict[str, list[Run]] = {}
        for run in self.runs.values():
            labels.setdefault(run.label, []).append(run)
        return [self._leader(label, runs) for label, runs in labels.items()]

    def _leader(self, label: str, runs: Sequence[Run]) -> Leader:
        rates: dict[float | None, list[float]] = {}
        for run in runs:
            if run.name in self.scores:
                rates.setdefault(run.lr, []).append(self.scores[run.name])
        ended = [self.records[run.name] for run in runs if run.name in self.records]
        lost = {record.run.name: record.run.lr for record in ended if record.status != "done"}
        way = -1.0 if self.metric is not None and self.metric.higher_is_better else 1.0
        # As in the study: a learning rate at which some seed was lost comes last.
        means = {lr: statistics.fmean(scores) for lr, scores in rates.items()}
        best = min(means, key=lambda lr: (lr in lost.values(), way * means[lr]), default=None)
        return Leader(label, means.get(best), best, len(ended), len(lost), len(runs))


def summarize_group(runs: Sequence[Run]) -> str:
    """What a group of runs is, shortened: ``r = 1,2,4  lr 0.003,0.01  seed 0``."""
    methods = _distinct(run.method for run in runs)
    parts = [] if methods == "lora" else [methods]
    parts += [targets] if (targets := _distinct((run.targets for run in runs), " and ")) else []
    parts += [f"r = {ranks}"] if (ranks := _distinct(run.rank for run in runs)) else []
    parts += [f"d = {dims}"] if (dims := _distinct(run.dim for run in runs)) else []
    parts += [f"lr {rates}"] if (rates := _distinct(f"{run.lr:g}" for run in runs if run.lr is not None)) else []
    return "  ".join([*parts, f"seed {_distinct(run.seed for run in runs)}"])


def _distinct(values: Iterable[object], between: str = ",") -> str:
    return between.join(dict.fromkeys(str(value) for value in values if value is not None))


def format_duration(seconds: float) -> str:
    """``40 s``, ``7 min``, ``2 h 05 min``: as exact as an estimate is."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
