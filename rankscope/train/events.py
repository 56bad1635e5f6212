"""What happens while a study is trained, as values: a listener is told each one, in this process or through a queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from rankscope.train.runs import Run, RunRecord


class GridPlanned(msgspec.Struct, frozen=True):
    """The runs of the study, as far as they are known, and the records of those that have ended."""

    runs: Sequence[Run]
    ended: Sequence[RunRecord]


class RunStarted(msgspec.Struct, frozen=True):
    """A run of ``steps`` steps is trained from step ``at`` on; above 0 where it was stopped before."""

    run: Run
    steps: int
    at: int


class StepsTaken(msgspec.Struct, frozen=True):
    """Runs that are trained together have taken ``steps`` steps, with so many tokens in all."""

    runs: Sequence[Run]
    tokens: int
    steps: int = 1


class RunEvaluated(msgspec.Struct, frozen=True):
    """The metrics of a run on the validation split after a step."""

    run: Run
    step: int
    metrics: Mapping[str, float]


class RunEnded(msgspec.Struct, frozen=True):
    """A run is done, has diverged, or was stopped."""

    record: RunRecord


class TrainingNote(msgspec.Struct, frozen=True):
    """A sentence that a person should read."""

    text: str


Event = GridPlanned | RunStarted | StepsTaken | RunEvaluated | RunEnded | TrainingNote


class Listener(Protocol):
    """Who is told how training goes; the command line draws progress from it."""

    def tell(self, event: Event) -> None: ...


class Silent:
    """A listener that says nothing."""

    def tell(self, event: Event) -> None: ...
