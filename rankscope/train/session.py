"""What every part of a training needs to know, as one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rankscope.formats.study_layout import RUNS_FOLDER
from rankscope.train.config import StudyConfig
from rankscope.train.events import Listener, Silent
from rankscope.train.process_group import SINGLE_PROCESS, TrainingProcesses
from rankscope.train.runs import Run
from rankscope.train.task import Task


@dataclass(frozen=True)
class Session:
    """One process at work on the runs of a study.

    Attributes:
        folder: of the study.
        listener: is told what happens.
        stop: asked before each step; where it says yes, states are saved and training ends.
        team: the processes that train a run together with this one.
    """

    task: Task
    config: StudyConfig
    folder: Path
    device: torch.device
    listener: Listener = Silent()  # noqa: RUF009 (it holds nothing)
    stop: Callable[[], bool] = lambda: False
    team: TrainingProcesses = SINGLE_PROCESS

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.config.steps or self.task.steps

    @property
    def batch_size(self) -> int:
        """Examples in one batch of a run."""
        return self.config.batch or self.task.default_batch

    def path(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / RUNS_FOLDER / run.name
