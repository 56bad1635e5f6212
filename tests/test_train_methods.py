"""The table of training methods: it is complete, and rows from outside the package are trained and shown everywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import reload
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from command_line import run
from matplotlib.figure import Figure
from torch import nn

from rankscope.cli import train_command
from rankscope.errors import ConfigError, FormatError
from rankscope.evidence.dimension.figure import plot_dimension
from rankscope.evidence.dimension.measure import measure_dimension
from rankscope.evidence.material import Material
from rankscope.evidence.performance.figure import plot_rank_curve
from rankscope.evidence.performance.measure import measure_performance
from rankscope.plots.figure import COLOURS
from rankscope.train.config import make_study_config
from rankscope.train.method_table import IMPLIED, METHODS, TrainingMethod, find_method, selectable_methods
from rankscope.train.methods import TrainableAdapters, TrainableModel, TrainableSubspace, load_trainer, make_trainable
from rankscope.train.planted import PlantedTask
from rankscope.train.runs import Run, RunRecord, plan_runs
from rankscope.train.study import Study


class MyAdapters(TrainableAdapters):
    """LoRA at half the learning rate."""

    def learning_rate_factor(self, i: int, name: str) -> float:
        return 0.5


class MySubspace(TrainableSubspace):
    """A random subspace under another name."""


MINE = TrainingMethod(name="mine", title="my own LoRA", family="lora", trainer=f"{__name__}:MyAdapters", alpha=3.0)
MY_SUBSPACE = replace(
    find_method("subspace"),
    name="my-space",
    title="my own subspace",
    trainer=f"{__name__}:MySubspace",
    colour=5,
    marker="P",
)


@pytest.fixture
def extended() -> Iterator[None]:
    """The table with two more rows, as another package would append them."""
    METHODS.extend([MINE, MY_SUBSPACE])
    yield
    METHODS.remove(MINE)
    METHODS.remove(MY_SUBSPACE)


@pytest.fixture
def study(extended: None, tmp_path: Path) -> Path:
    return tmp_path / "study"


ARGUMENTS = [
    *("--task", "planted", "--methods", "lora,mine,my-space", "--ranks", "2", "--dims", "64"),
    *("--steps", "40", "--evaluations", "0", "--quiet"),
]


class BiasedTask(PlantedTask):
    """With a bias and a head, so that each method has something to train."""

    heads = ("second",)

    def model(self, seed: int) -> nn.Module:
        model = super().model(seed)
        model.get_submodule("first").register_parameter("bias", nn.Parameter(torch.zeros(64)))
        return model


def labels(figure: Figure) -> set[str]:
    """What the lines and annotations of a figure are called."""
    return {text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_row_is_complete(method: TrainingMethod) -> None:
    assert re.fullmatch(r"[a-z][a-z+-]*", method.name)
    assert method.title
    assert issubclass(load_trainer(method), TrainableModel)
    assert 0 <= method.colour < len(COLOURS)
    assert Run(method=method.name, seed=0).is_lora == (method.family == "lora")


def test_names_and_titles_are_unique_and_every_method_is_planned() -> None:
    assert len({method.name for method in METHODS}) == len({method.title for method in METHODS}) == len(METHODS)
    assert {*selectable_methods(), *IMPLIED} == {method.name for method in METHODS}
    config = make_study_config({"methods": selectable_methods(), "ranks": [1], "dims": [64]}, "test")
    task = BiasedTask(2, 0.1, count=64)
    planned = {run.method: run for run in plan_runs(config, task)}
    assert list(planned) == [method.name for method in METHODS]
    for name, planned_run in planned.items():
        trained = make_trainable(task, config, [planned_run]).parameters(0)
        assert {path.partition(".")[0] for path in trained} >= {"second"}, name


def test_the_help_lists_every_method(extended: None) -> None:
    text = CliRunner().invoke(reload(train_command).command, ["--help"]).output
    listed = re.split(r",\s+", text.partition("PATTERN,…   ")[2].partition(" [lora]")[0])
    assert listed == [*(method.name for method in METHODS if method.name not in IMPLIED)]
    assert "mine" in listed


@pytest.mark.usefixtures("extended")
def test_a_method_from_outside_is_trained_and_shown(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", *ARGUMENTS, "-o", study)
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.split("\n\n")[0].splitlines()[1:]] == [
        "base",
        "r = 2",
        "full",
        "mine r = 2",
        "my-space d = 64",
    ]
    record = next(record for record in Study(study).done() if record.run.method == "mine")
    assert record.run.alpha == 3.0
    assert json.loads((study / "runs" / record.run.name / "run.json").read_text())["run"]["method"] == "mine"
    rows = json.loads(run(capsys, "train", *ARGUMENTS, "-o", study, "--json")[1])["runs"]
    assert {"mine", "my-space"} <= {row["method"] for row in rows}
    assert next(row for row in rows if row["method"] == "mine")["effective_rank"]

    code, out, err = run(capsys, "report", study, "--lines", "performance,dimension", "--json", "--quiet")
    assert code == 0, err
    lines = json.loads(out)
    assert {"mine", "my-space"} <= {entry["method"] for entry in lines["performance"]["entries"]}
    assert "my-space" in [curve["method"] for curve in lines["dimension"]["curves"]]
    assert "my own subspace" in (study / "figures" / "dimension.csv").read_text()
    assert "mine r = 2" in (study / "figures" / "performance.csv").read_text()
    page = (study / "report.html").read_text()
    assert "my own subspace" in page
    assert "mine r" in page

    material = Material(Study(study))
    assert "my own LoRA, mean" in labels(plot_rank_curve(measure_performance(material)))
    figure = plot_dimension(measure_dimension(material))
    line = next(line for line in figure.axes[0].lines if line.get_label() == "my own subspace")
    assert (line.get_color(), line.get_marker()) == (COLOURS[5], "P")


def test_unknown_methods_are_refused(tmp_path: Path, extended: None) -> None:
    known = "lora, rslora, lora+, frozen-a, pissa, bias, head, subspace, said, mine, my-space"
    with pytest.raises(ConfigError, match=r"methods = \('lora', 'dora'\): expected some of " + re.escape(known)):
        make_study_config({"methods": ["lora", "dora"]}, "options")
    for name in IMPLIED:
        with pytest.raises(ConfigError, match="methods = "):
            make_study_config({"methods": [name]}, "options")
    with pytest.raises(ConfigError, match=re.escape(f"method 'dora' is not known; choose from {known}")):
        Run(method="dora", seed=0)
    RunRecord(run=Run(method="mine", seed=0), status="done", steps=0).write(tmp_path)
    METHODS.remove(MINE)
    with pytest.raises(FormatError, match=r"run.json: not a record of a run \(method 'mine' is not known"):
        RunRecord.read(tmp_path)
    METHODS.append(MINE)
