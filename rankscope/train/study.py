"""A study: a folder of trained runs, made, continued and read."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch

import rankscope
from rankscope.errors import ConfigError, FormatError
from rankscope.formats.abstract_store import Store
from rankscope.formats.file_io import read_json, write_json
from rankscope.formats.store import open as open_store
from rankscope.train.claims import LOCK_NAME, lock_study, open_claims
from rankscope.train.config import RESUMABLE_KEYS, StudyConfig, make_study_config, resolve_device
from rankscope.train.events import Listener, Silent, TrainingNote
from rankscope.train.loop import set_precision
from rankscope.train.method_table import METHODS, find_method
from rankscope.train.process_group import open_process_group
from rankscope.train.run_state import STATE_NAME
from rankscope.train.runs import Run, RunRecord, plan_runs
from rankscope.train.session import Session
from rankscope.train.sweep import Sweep
from rankscope.train.task import Task
from rankscope.train.tasks import make_task

STUDY_SCHEMA = "rankscope.study/2"


GridEdge = Literal["low", "high"] | None


class LearningRateChoice(NamedTuple):
    """The best learning rate, among those tried in ascending order.

    ``edge`` says at which end of them it lies, if it does: then the true best may lie beyond, and a rank whose best
    learning rate was not tried looks worse than it is.
    """

    lr: float
    edge: GridEdge
    tried: tuple[float, ...]


class Study:
    """A study on disk: its settings and the runs that have ended.

    Raises:
        FormatError: the folder is not a study, or a file of it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.description = read_json(self.folder / "study.json")
        if self.description.get("schema") != STUDY_SCHEMA:
            schema = self.description.get("schema")
            raise FormatError(f"{self.folder / 'study.json'}: its schema is {schema!r}, not {STUDY_SCHEMA!r}")
        for key in ("config", "metric", "higher_is_better"):
            if key not in self.description:
                raise FormatError(f"{self.folder / 'study.json'}: holds no {key!r}; is this a study of rankscope?")
        self.config = make_study_config(self.description["config"], str(self.folder / "study.json"))
        self.metric: str = self.description["metric"]
        self.higher_is_better: bool = self.description["higher_is_better"]
        folders = sorted(path.parent for path in self.folder.glob("runs/*/run.json"))
        self.records = sorted((self._read(path) for path in folders), key=_order)

    def _read(self, folder: Path) -> RunRecord:
        record = RunRecord.read(folder)
        if folder.name != record.run.name:
            raise FormatError(f"{folder}: holds the run {record.run.name}; give the folder that name back")
        if record.status == "done" and not all(
            self.metric in record.metrics.get(s, {}) for s in ("validation", "test")
        ):
            raise FormatError(
                f"{folder / 'run.json'}: lacks {self.metric} of a split; delete the folder to run it again"
            )
        return record

    def score(self, record: RunRecord, split: str = "test") -> float:
        """The study's metric of a run that is done."""
        return record.metrics[split][self.metric]

    def done(self) -> list[RunRecord]:
        return [record for record in self.records if record.status == "done"]

    def choices(self) -> dict[str, LearningRateChoice]:
        """The best rate of each label (method, targets and rank), by the mean over seeds on the validation split."""
        cells: dict[str, list[RunRecord]] = {}
        for record in self.records:
            if record.run.lr is not None:
                cells.setdefault(record.run.label, []).append(record)
        choices = {label: self._choose(records) for label, records in cells.items()}
        return {label: choice for label, choice in choices.items() if choice is not None}

    def _choose(self, records: list[RunRecord]) -> LearningRateChoice | None:
        """A learning rate at which some seed diverged or was stopped is the best only where no other is left."""
        scores: dict[float, list[float]] = {}
        for record in records:
            if record.status == "done" and record.run.lr is not None:
                scores.setdefault(record.run.lr, []).append(self.score(record, "validation"))
        if not scores:
            return None
        most = max(len(values) for values in scores.values())
        means = {lr: statistics.fmean(values) for lr, values in scores.items() if len(values) == most}
        best = (max if self.higher_is_better else min)(means, key=lambda lr: means[lr])
        tried = sorted({record.run.lr for record in records if record.run.lr is not None})
        edge: GridEdge = "low" if best == tried[0] else "high" if best == tried[-1] else None
        return LearningRateChoice(best, edge if len(tried) > 1 else None, tuple(tried))

    def best(self) -> list[RunRecord]:
        """The runs at the best rate of their label, one a seed, and the untouched base."""
        choices = self.choices()

        def is_chosen(run: Run) -> bool:
            return run.lr is None or (run.label in choices and choices[run.label].lr == run.lr)

        return [record for record in self.done() if is_chosen(record.run)]

    def path(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def store(self, run: Run) -> Store:
        """The updates that a run learned: its adapter, or the update of full fine-tuning."""
        return open_store(self.path(run))

    def has_weights(self, run: Run) -> bool:
        """Whether what a run learned is still there; weights are large, and people delete those they need no more."""
        return any((self.path(run) / name).exists() for name in ("adapter", "update.safetensors"))

    def check_fingerprint(self, task: Task) -> None:
        """See that a task has the base and the data that the study was begun with.

        Raises:
            ConfigError: another base or other data.
        """
        begun, now = self.description.get("fingerprint", {}), task.fingerprint()
        for key in {**begun, **now}:
            if now.get(key) != begun.get(key):
                raise ConfigError(
                    f"{self.folder} was begun with another {key} ({begun.get(key)}, now {now.get(key)}); "
                    "runs on the one and the other cannot be compared"
                )

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{escape(r.run.name)}</td><td>{r.status}</td>"
            f"<td>{format(self.score(r), '.4f') if r.status == 'done' else ''}</td></tr>"
            for r in self.records
        )
        head = f"<tr><th>run</th><th>status</th><th>test {escape(self.metric)}</th></tr>"
        return f"<p><b>{escape(repr(self))}</b></p><table><thead>{head}</thead><tbody>{cells}</tbody></table>"

    def __repr__(self) -> str:
        return f"Study({str(self.folder)!r}, {len(self.records)} runs, {self.metric})"


def _order(record: RunRecord) -> tuple[int, str, int, float, int]:
    run = record.run
    return METHODS.index(find_method(run.method)), run.targets or "", run.rank or run.dim or 0, run.lr or 0.0, run.seed


def run_study(
    config: StudyConfig,
    folder: Path | str,
    listener: Listener | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Study:
    """Train every run of the study that has not ended yet.

    Args:
        folder: a new folder, or that of the same study, which is continued where it was left.
        listener: is told of each step, evaluation and end (``rankscope.train.events``); nobody is where it is None.
        stop: asked before each step; where it returns True the state is saved and ``InterruptedTrainingError`` raised.

    Several processes may be at work on one study: each takes runs that no other holds, and all return when the study is
    complete. torchrun is one way to start them.

    Raises:
        ConfigError: the folder holds a study with other settings, or something else.
        InterruptedTrainingError: ``stop`` said so.
    """
    folder = Path(folder)
    device = resolve_device(config.device)
    task = make_task(config)
    _check_free(folder)
    with open_claims(folder) as claims, set_precision(device, config), open_process_group(config, device) as team:
        planned = plan_runs(config, task)
        with lock_study(claims):
            _remove_study_leftovers(folder)
            _describe(folder, config, task, device)
        sweep = Sweep(Session(task, config, folder, device, listener or Silent(), stop, team), claims)
        runs = list(planned)
        _train_grid(sweep, runs)
        while config.extend_lrs and (more := extend_grid(Study(folder), planned)):
            sweep.session.listener.tell(TrainingNote(f"best rates on the edge of the grid: {len(more)} more runs"))
            runs += more
            _train_grid(sweep, runs)
    return Study(folder)


def _train_grid(sweep: Sweep, runs: list[Run]) -> None:
    sweep.announce(runs)
    if sweep.config.halving:
        way = 1.0 if sweep.task.higher_is_better else -1.0
        sweep.halve_learning_rates(runs, lambda metrics: way * metrics[sweep.task.metric])
    sweep.train(runs)


MAX_EXTENSIONS = 3


def extend_grid(study: Study, planned: list[Run]) -> list[Run]:
    """Runs at one further learning rate, for each label whose best lies at an end of those tried with every seed."""
    runs = []
    for label, choice in study.choices().items():
        asked = {run.lr for run in planned if run.label == label}
        if choice.edge is None or not asked or len(choice.tried) >= len(asked) + MAX_EXTENSIONS:
            continue
        seeds = {run.seed for run in planned if run.label == label}
        ended = {(r.run.lr, r.run.seed) for r in study.records if r.run.label == label}
        if all((lr, seed) in ended for lr in choice.tried for seed in seeds):
            like = next(run for run in planned if run.label == label)
            lr = next_learning_rate(choice.tried, choice.edge)
            runs += [msgspec.structs.replace(like, seed=seed, lr=lr) for seed in sorted(seeds)]
    return runs


def next_learning_rate(tried: tuple[float, ...], edge: GridEdge) -> float:
    """One step of the grid beyond its edge, on a log scale, to two digits."""
    lr = tried[-1] * tried[-1] / tried[-2] if edge == "high" else tried[0] * tried[0] / tried[1]
    return float(f"{lr:.2g}")


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds something other than a study, before anything is written to it."""
    if (folder / "study.json").exists() or not folder.exists():
        return
    if not folder.is_dir() or any(not path.name.startswith((LOCK_NAME, ".study.json.")) for path in folder.iterdir()):
        raise ConfigError(f"{folder} exists and is not a study; choose another folder with -o")


def _describe(folder: Path, config: StudyConfig, task: Task, device: torch.device) -> None:
    """Write study.json, or check that the one there is of the same study."""
    path = folder / "study.json"
    made_by = {
        "versions": versions(),
        "machine": describe_machine(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    earlier: list[Any] = []
    if path.exists():
        study = Study(folder)
        _check_same(study, config)
        study.check_fingerprint(task)
        before = {key: study.description.get(key) for key in made_by}
        earlier = list(study.description.get("earlier", [])) + ([before] if before != made_by else [])
    description = {
        "schema": STUDY_SCHEMA,
        "config": msgspec.to_builtins(config),
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "fingerprint": task.fingerprint(),
        **made_by,
        "earlier": earlier,
    }
    write_json(path, description)


def _check_same(study: Study, config: StudyConfig) -> None:
    for key in msgspec.structs.asdict(config):
        old, new = getattr(study.config, key), getattr(config, key)
        if key not in RESUMABLE_KEYS and old != new:
            raise ConfigError(
                f"{study.folder} is a study with {key} = {old!r}, not {new!r}; "
                "give it the same settings to go on with it, or choose another folder with -o"
            )


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    return {
        "rankscope": rankscope.__version__,
        "torch": str(torch.__version__),  # a TorchVersion, which no JSON takes
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine, by which a reader can judge times."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _remove_study_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing of the study's own files, and states of runs that have ended."""
    for path in folder.glob(".study.json.*.tmp"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"runs/*/{STATE_NAME}"):
        if (path.parent / "run.json").exists():
            path.unlink(missing_ok=True)
