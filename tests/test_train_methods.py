"""The table of training methods: it is complete, and a row from outside the package is trained and shown everywhere."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib import reload
from pathlib import Path

import pytest
from makers import in_subprocess
from matplotlib import pyplot

from rankscope.cli import main, train_command
from rankscope.cli.study_output import series_name
from rankscope.errors import ConfigError, FormatError
from rankscope.evidence.dimension.figure import plot_dimension
from rankscope.evidence.dimension.measure import measure_dimension
from rankscope.evidence.material import Material
from rankscope.train.config import make_study_config
from rankscope.train.method_table import METHODS, TrainingMethod, find_method, selectable_methods
from rankscope.train.methods import TrainableAdapters, TrainableModel, TrainableSubspace, find_trainer, make_trainable
from rankscope.train.runs import Run, RunRecord, plan_runs
from rankscope.train.study import Study
from rankscope.train.tasks import make_task


class MyAdapters(TrainableAdapters):
    """LoRA whose learning rates are halved."""

    def learning_rate_factor(self, i: int, name: str) -> float:
        return 0.5 * super().learning_rate_factor(i, name)


class MySubspace(TrainableSubspace):
    """A random subspace under another name."""


MINE = TrainingMethod(name="mine", title="my own LoRA", family="lora", trainer=f"{__name__}:MyAdapters")
MY_SUBSPACE = replace(
    find_method("subspace"),
    name="my-space",
    title="my own subspace",
    trainer=f"{__name__}:MySubspace",
    colour=5,
    marker="P",
)


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with two rows more, as another package would append them."""
    monkeypatch.setattr("rankscope.train.method_table.METHODS", METHODS)
    for method in (MINE, MY_SUBSPACE):
        METHODS.append(method)
    yield
    for method in (MINE, MY_SUBSPACE):
        METHODS.remove(method)
